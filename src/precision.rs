//! Which dtype is used for which numbers, and the places at which numbers are converted from one dtype to another.

use candle_core::{DType, Device};

use crate::error::{Error, Result};

/// How a low compute precision is realised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arithmetic {
    /// Rounded on the CPU, native elsewhere.  On the CPU a field then sees f32 tensors, and a cast
    /// that it lacks shows on a GPU only: run it once with `Native` before you take it there.
    #[default]
    Auto,
    /// The field is given tensors of the compute dtype and runs in it.
    Native,
    /// Values are rounded to the compute dtype but held in f32, in which the field runs: the
    /// rounding of inputs, velocities and cotangents at the speed of f32.  θ gradients are summed
    /// in f32.
    Rounded,
}

/// Which dtype plays which role.
///
/// | role | quantities |
/// |---|---|
/// | **state** | y, λ, gradients, all sums over stages, the returned states |
/// | **compute** | y and θ as the field sees them, k, the cotangents that are given to the pull-back |
/// | **store** | the kept trajectory |
///
/// After "Mixed Precision Training of Neural ODEs", arXiv 2510.23498, with the sums over stages and
/// the product with h moved from compute to state precision.
///
/// `state` is f32 or f64; `compute` and `store` are f16, bf16, f32 or f64, neither wider than
/// `state`.
///
/// ```
/// use candle_core::DType;
/// use candle_diffeq::Precision;
/// let p = Precision::bf16().store(DType::BF16);
/// assert_eq!((p.state, p.compute, p.store), (DType::F32, DType::BF16, DType::BF16));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Dtype of y, λ, gradients and every sum.
    pub state: DType,
    /// Dtype in which the velocity is evaluated and pulled back.
    pub compute: DType,
    /// Dtype of the kept trajectory.
    pub store: DType,
    /// How `compute` is realised when it is f16 or bf16.
    pub arithmetic: Arithmetic,
    /// Whether the state and its adjoint are summed over the steps with compensation, see
    /// [`compensated`](Self::compensated).
    pub compensated: bool,
}

impl Precision {
    /// One dtype for state, and one for compute; the trajectory is stored in state precision.
    pub const fn new(state: DType, compute: DType) -> Self {
        Self {
            state,
            compute,
            store: state,
            arithmetic: Arithmetic::Auto,
            compensated: false,
        }
    }

    /// Everything in f32.
    pub const fn f32() -> Self {
        Self::new(DType::F32, DType::F32)
    }

    /// Everything in f64.
    pub const fn f64() -> Self {
        Self::new(DType::F64, DType::F64)
    }

    /// Velocities in bf16, sums in f32.
    pub const fn bf16() -> Self {
        Self::new(DType::F32, DType::BF16)
    }

    /// Velocities in f16, sums in f32, adjoint scaled (see [`Scaling`](crate::scaling::Scaling)).
    pub const fn f16() -> Self {
        Self::new(DType::F32, DType::F16)
    }

    /// Sets the dtype of the kept trajectory: `store(BF16)` halves its memory.  The point at which the adjoint
    /// linearises then has an error of one rounding.
    #[must_use]
    pub const fn store(mut self, store: DType) -> Self {
        self.store = store;
        self
    }

    /// Sets the [`Arithmetic`].
    #[must_use]
    pub const fn arithmetic(mut self, arithmetic: Arithmetic) -> Self {
        self.arithmetic = arithmetic;
        self
    }

    /// With compensated sums of the state.  Each step adds h Σ b_i k_i to y, and what the rounding of this sum takes
    /// away is kept in a second tensor and added in the next step; λ and the sum of θ̄ are treated in the same way.  So
    /// the rounding errors of the sums no longer grow with the number of steps N: the errors of the solution and of the
    /// gradients are those of a few roundings to state precision, for any N.
    ///
    /// It is for f32 and many steps: without it, the errors of f32 are about N times 6e-8 in the worst case, while f16
    /// and bf16 evaluations usually hide them.  It costs one more tensor like the state in memory and a few operations
    /// for each element of the state, which is much less than an evaluation of most networks.  States that are kept
    /// to restart from ([`Checkpoint`](crate::options::Checkpoint)) take twice the memory; those that are kept to
    /// linearise at do not.  The whole state is compensated if the precision of one of its tensors asks for it.
    /// Stochastic equations and continuous adjoints refuse it.  On CUDA, no solve in one launch has it, so that adaptive
    /// steps have one length for the batch.
    ///
    /// Source: W. Kahan, "Further remarks on reducing truncation errors", CACM 8 (1965), with the exact sum of two
    /// numbers of D. E. Knuth, "The Art of Computer Programming" 2, §4.2.2.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_diffeq::options::{Output, Steps};
    /// use candle_diffeq::{odeint, OdeOptions, Precision, Time};
    /// // y' = y/16 from 1: after 20 000 steps of f32, the error is that of about one rounding.
    /// let error = |precision| -> candle_diffeq::Result<f64> {
    ///     let options = OdeOptions {
    ///         precision: Some(precision),
    ///         steps: Steps::PerInterval(20_000),
    ///         output: Output::Final,
    ///         ..Default::default()
    ///     };
    ///     let y0 = Tensor::ones(1, DType::F32, &Device::Cpu)?;
    ///     let y = odeint(|_: &Time, y: &Tensor| y * 0.0625, &y0, &[0.0, 1.0], &options)?;
    ///     Ok((f64::from(y.to_vec1::<f32>()?[0]) - 0.0625f64.exp()).abs())
    /// };
    /// assert!(error(Precision::f32().compensated())? < 1.5e-7);
    /// assert!(error(Precision::f32())? > 1e-5);
    /// # Ok::<(), candle_diffeq::Error>(())
    /// ```
    #[must_use]
    pub const fn compensated(mut self) -> Self {
        self.compensated = true;
        self
    }

    /// The precision of a state that comes in `dtype`: its own, with sums in f32 at least.
    pub(crate) fn of(dtype: DType) -> Self {
        match dtype {
            DType::F64 => Self::f64(),
            DType::BF16 => Self::bf16(),
            DType::F16 => Self::f16(),
            _ => Self::f32(),
        }
    }

    fn check(&self) -> Result<()> {
        let narrower = |d: DType| {
            matches!(d, DType::F16 | DType::BF16)
                || d == DType::F32
                || (d == DType::F64 && self.state == DType::F64)
        };
        let state = matches!(self.state, DType::F32 | DType::F64);
        if state && narrower(self.compute) && narrower(self.store) {
            return Ok(());
        }
        Err(Error::UnsupportedPrecision {
            state: self.state,
            compute: self.compute,
            store: self.store,
        })
    }

    /// The roles on one device.
    pub(crate) fn roles(&self, device: &Device) -> Result<Roles> {
        self.check()?;
        let low = matches!(self.compute, DType::F16 | DType::BF16);
        let rounded = match self.arithmetic {
            Arithmetic::Auto => device.is_cpu(),
            Arithmetic::Native => false,
            Arithmetic::Rounded => true,
        };
        let compute = if low && rounded {
            Rounding {
                to: self.compute,
                held: DType::F32,
            }
        } else {
            Rounding::cast(self.compute)
        };
        Ok(Roles {
            state: self.state,
            compute,
            store: Rounding::cast(self.store),
        })
    }
}

/// The dtype in which sums of numbers of this one are made: f32 for f16 and bf16.
pub(crate) fn at_least_f32(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        dtype => dtype,
    }
}

/// Half of the distance from one to the next number.
pub(crate) fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        DType::F64 => 2f64.powi(-53),
        _ => 2f64.powi(-24),
    }
}

/// A rounding to `to` whose result is held in `held`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rounding {
    pub(crate) to: DType,
    pub(crate) held: DType,
}

impl Rounding {
    /// Round by changing dtype.
    pub(crate) const fn cast(dtype: DType) -> Self {
        Self {
            to: dtype,
            held: dtype,
        }
    }

    /// The unit roundoff, and the smallest normal number.
    pub(crate) fn roundoff(&self) -> (f64, f64) {
        let smallest = match self.to {
            DType::F16 => 2f64.powi(-14),
            DType::F64 => f64::MIN_POSITIVE,
            _ => 2f64.powi(-126),
        };
        (unit_roundoff(self.to), smallest)
    }

    /// The low dtype that values are rounded to while they are held in a wider one.
    pub(crate) fn low(&self) -> Low {
        match self.to {
            DType::BF16 if self.held != self.to => Low::Bf16,
            DType::F16 if self.held != self.to => Low::F16,
            _ => Low::None,
        }
    }
}

/// What values that are held in a wide dtype are rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Low {
    None,
    Bf16,
    F16,
}

impl Low {
    /// One value, rounded to nearest even.
    pub(crate) fn round(self, x: f32) -> f32 {
        match self {
            Self::None => x,
            Self::Bf16 => half::bf16::from_f32(x).to_f32(),
            Self::F16 => half::f16::from_f32(x).to_f32(),
        }
    }
}

/// The roles of one state tensor on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Roles {
    pub(crate) state: DType,
    pub(crate) compute: Rounding,
    pub(crate) store: Rounding,
}

impl Roles {
    /// y in state precision, as the field sees it or as it is summed.
    pub(crate) fn state(&self) -> Rounding {
        Rounding::cast(self.state)
    }

    /// Whether a cotangent can underflow or overflow in compute precision.
    pub(crate) fn needs_scaling(&self) -> bool {
        self.compute.to == DType::F16
    }
}
