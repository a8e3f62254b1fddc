//! Layers whose weights are functions of time, expanded in a basis.

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::{coefficients, wrong_state, Linear};
use crate::time::Time;

/// Functions b_k(u) of one number u, in which weights are expanded.
///
/// ```
/// use candle_diffeq::nn::Basis;
/// assert_eq!(Basis::fourier(3).len(), 6);                  // cos 0, cos u, cos 2u, sin 0, sin u, sin 2u
/// assert_eq!(Basis::Fourier { orders: vec![0.5, 1.0] }.len(), 4);
/// assert_eq!(Basis::Chebyshev { terms: 4 }.len(), 4);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Basis {
    /// cos(n u) for each order n, then sin(n u) for each.
    Fourier {
        /// The orders, integers or not.
        orders: Vec<f64>,
    },
    /// 1, u, u², …
    Polynomial {
        /// Number of functions.
        terms: usize,
    },
    /// T_0 = 1, T_1 = u, T_{n+1} = 2u T_n − T_{n−1}; meant for |u| ≤ 1.
    Chebyshev {
        /// Number of functions.
        terms: usize,
    },
    /// exp(−((u − c_k)/w_k)²) with learnt centres c and widths w.
    Gaussian {
        /// Number of functions.
        terms: usize,
    },
    /// √(1 + ((u − c_k)/w_k)²) with learnt centres c and widths w.
    Multiquadric {
        /// Number of functions.
        terms: usize,
    },
}

impl Basis {
    /// Cosines and sines of the orders 0, 1, …, `orders` − 1.
    pub fn fourier(orders: usize) -> Self {
        Self::Fourier {
            orders: (0..orders).map(|n| n as f64).collect(),
        }
    }

    /// Number of functions.
    pub fn len(&self) -> usize {
        match self {
            Self::Fourier { orders } => 2 * orders.len(),
            Self::Polynomial { terms }
            | Self::Chebyshev { terms }
            | Self::Gaussian { terms }
            | Self::Multiquadric { terms } => *terms,
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn is_radial(&self) -> bool {
        matches!(self, Self::Gaussian { .. } | Self::Multiquadric { .. })
    }
}

/// Numbers that are functions of time: Σ_k b_k(u) C_k with u = t · dilation + shift.
///
/// Variables: `coeffs` `(functions, numbers)`, `dilation` (1 at first) and `shift` (0 at first), `(1)`, and for
/// radial functions `centres` and `widths`, `(functions)`.  They and time receive exact gradients.  A
/// [`GalerkinLinear`] is built from it, and so can be any other layer: reshape the numbers to its weights.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Basis, Galerkin};
/// use candle_diffeq::Time;
/// let coeffs = Tensor::new(&[[2.0], [1.0], [0.5]], &Device::Cpu)?;
/// let zero = Tensor::zeros(1, DType::F64, &Device::Cpu)?;
/// let one = Tensor::ones(1, DType::F64, &Device::Cpu)?;
/// let parabola = Galerkin::from_tensors(Basis::Polynomial { terms: 3 }, coeffs, [one, zero], None)?;
/// let at = parabola.at(&Time::new(2.0, DType::F64, &Device::Cpu))?;
/// assert_eq!(at.to_vec1::<f64>()?, [2.0 + 2.0 + 0.5 * 4.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Galerkin {
    basis: Basis,
    coeffs: Tensor,
    dilation: Tensor,
    shift: Tensor,
    /// Centres and widths.
    radial: Option<[Tensor; 2]>,
}

impl Galerkin {
    /// So many numbers, each expanded in the basis; coefficients are drawn from a normal distribution of this `deviation`,
    /// divided by the root of the number of functions.
    ///
    /// # Errors
    /// Those of the builder; no number or no function.
    pub fn new(numbers: usize, basis: Basis, deviation: f64, vb: VarBuilder<'_>) -> Result<Self> {
        let functions = basis.len();
        if numbers * functions == 0 {
            candle_core::bail!(
                "a Galerkin expansion needs at least one number and one function, got {numbers} numbers and {functions} functions"
            )
        }
        // Zeros, as elsewhere, would leave two such layers in a row without a gradient for ever.
        let stdev = deviation / (functions as f64).sqrt();
        let coeffs = Init::Randn { mean: 0.0, stdev };
        let radial = basis.is_radial().then(|| {
            let spread = Init::Uniform { lo: 0.0, up: 1.0 };
            Ok::<_, candle_core::Error>([
                vb.get_with_hints(functions, "centres", spread)?,
                vb.get_with_hints(functions, "widths", Init::Const(0.5))?,
            ])
        });
        let coeffs = vb.get_with_hints((functions, numbers), "coeffs", coeffs)?;
        let dilation = vb.get_with_hints(1, "dilation", Init::Const(1.0))?;
        let shift = vb.get_with_hints(1, "shift", Init::Const(0.0))?;
        Self::from_tensors(basis, coeffs, [dilation, shift], radial.transpose()?)
    }

    /// An expansion made of tensors that exist: coefficients, dilation and shift, centres and widths.
    ///
    /// # Errors
    /// If their shapes do not belong together.
    pub fn from_tensors(
        basis: Basis,
        coeffs: Tensor,
        [dilation, shift]: [Tensor; 2],
        radial: Option<[Tensor; 2]>,
    ) -> Result<Self> {
        let functions = basis.len();
        let fits = |x: &Tensor, n: usize| x.dims() == [n];
        let all = functions > 0
            && coeffs.rank() == 2
            && coeffs.dims()[0] == functions
            && [&dilation, &shift].into_iter().all(|x| fits(x, 1))
            && radial.is_some() == basis.is_radial()
            && radial.iter().flatten().all(|x| fits(x, functions));
        if !all {
            let radial = radial.iter().flatten().map(Tensor::dims);
            let radial: Vec<_> = radial.collect();
            candle_core::bail!(
                "an expansion in {functions} functions needs coefficients ({functions}, n), a dilation and a shift (1), and centres \
                 and widths ({functions}) where these are radial; got {:?}, {:?}, {:?}, {radial:?}",
                coeffs.dims(),
                dilation.dims(),
                shift.dims()
            )
        }
        Ok(Self {
            basis,
            coeffs,
            dilation,
            shift,
            radial,
        })
    }

    /// The numbers at time t, `(numbers)`, in the precision of t, f32 at least.
    ///
    /// # Errors
    /// Those of candle's operations.
    pub fn at(&self, t: &Time) -> Result<Tensor> {
        let t = t.tensor()?;
        let wide = coefficients(&t, self.coeffs.dtype());
        let cast = |x: &Tensor| x.to_dtype(wide);
        let u = cast(&self.dilation)?.broadcast_mul(&cast(&t)?)?;
        let u = (u + cast(&self.shift)?)?;
        let functions = self.functions(&u, wide)?.unsqueeze(0)?;
        functions.matmul(&cast(&self.coeffs)?)?.squeeze(0)
    }

    /// b(u), `(functions)`.
    fn functions(&self, u: &Tensor, wide: DType) -> Result<Tensor> {
        let one = u.ones_like()?;
        match (&self.basis, &self.radial) {
            (Basis::Fourier { orders }, _) => {
                let orders = Tensor::new(orders.as_slice(), u.device())?.to_dtype(wide)?;
                let angles = orders.broadcast_mul(u)?;
                Tensor::cat(&[angles.cos()?, angles.sin()?], 0)
            }
            (Basis::Polynomial { terms }, _) => {
                recursion(*terms, [one, u.clone()], |[_, last]| last * u)
            }
            (Basis::Chebyshev { terms }, _) => {
                recursion(*terms, [one, u.clone()], |[before, last]| {
                    ((last * u)? * 2.0)? - before
                })
            }
            (_, None) => candle_core::bail!("radial functions without centres"),
            (basis, Some([centres, widths])) => {
                let distance = centres.to_dtype(wide)?.broadcast_sub(u)?;
                let square = distance.div(&widths.to_dtype(wide)?)?.sqr()?;
                match basis {
                    Basis::Gaussian { .. } => square.neg()?.exp(),
                    _ => (square + 1.0)?.sqrt(),
                }
            }
        }
    }
}

/// So many functions, the first two given, each further one made of the two before it.
fn recursion(
    terms: usize,
    first: [Tensor; 2],
    next: impl Fn([&Tensor; 2]) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut all = first.to_vec();
    while all.len() < terms {
        let term = next([&all[all.len() - 2], &all[all.len() - 1]])?;
        all.push(term);
    }
    Tensor::cat(&all[..terms], 0)
}

/// y = x W(t)ᵀ + b(t), with the weights Σ_k b_k(u) C_k of a [`Galerkin`] expansion: x `(…, inputs)`,
/// y `(…, outputs)`.
///
/// "Dissecting Neural ODEs" (arXiv 2002.08071), section 3.1.  W and b are formed in the precision of t and rounded once.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_diffeq::nn::{Basis, GalerkinLinear, Linear};
/// use candle_diffeq::{NeuralOde, Time};
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, |vb| {
///     let first = GalerkinLinear::new(2, 32, Basis::fourier(5), vb.pp("first"))?;
///     let last = Linear::new(32, 2, vb.pp("last"))?;
///     Ok(move |t: &Time, y: &Tensor| last.forward(&first.forward(t, y)?.tanh()?))
/// })?;
/// let ys = ode.solve(&Tensor::ones((8, 2), DType::F32, &Device::Cpu)?, &[0.0, 0.5, 1.0])?;
/// assert_eq!(ys.dims(), [3, 8, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GalerkinLinear {
    weights: Galerkin,
    inputs: usize,
    outputs: usize,
}

impl GalerkinLinear {
    /// A layer of so many inputs and outputs; variables as those of [`Galerkin`], its numbers the rows of W, then b.  At
    /// first W(t) has about the size of the weights of a layer without time.
    ///
    /// # Errors
    /// As [`Galerkin::new`].
    pub fn new(inputs: usize, outputs: usize, basis: Basis, vb: VarBuilder<'_>) -> Result<Self> {
        if inputs * outputs == 0 {
            candle_core::bail!(
                "a GalerkinLinear layer needs at least one input and one output, got {inputs} and {outputs}"
            )
        }
        let deviation = 1.0 / (inputs as f64).sqrt();
        let weights = Galerkin::new(outputs * (inputs + 1), basis, deviation, vb)?;
        Self::of(weights, inputs, outputs)
    }

    /// A layer of an expansion that exists.
    ///
    /// # Errors
    /// If it has not outputs · (inputs + 1) numbers.
    pub fn of(weights: Galerkin, inputs: usize, outputs: usize) -> Result<Self> {
        let numbers = weights.coeffs.dims()[1];
        if numbers != outputs * (inputs + 1) {
            candle_core::bail!(
                "a GalerkinLinear layer of {inputs} inputs and {outputs} outputs needs {} numbers, got {numbers}",
                outputs * (inputs + 1)
            )
        }
        Ok(Self {
            weights,
            inputs,
            outputs,
        })
    }

    /// The layer that it is at time t, in `dtype`.
    ///
    /// # Errors
    /// Those of candle's operations.
    pub fn at(&self, t: &Time, dtype: DType) -> Result<Linear> {
        let numbers = self.weights.at(t)?.to_dtype(dtype)?;
        let weights = self.outputs * self.inputs;
        let weight = numbers.narrow(0, 0, weights)?;
        Ok(Linear {
            weight: weight.reshape((self.outputs, self.inputs))?,
            bias: Some(numbers.narrow(0, weights, self.outputs)?),
        })
    }

    /// y at time t.
    ///
    /// # Errors
    /// [`Error::FieldState`](crate::Error::FieldState) if x has other features; those of candle's operations.
    pub fn forward(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        if x.dims().last() != Some(&self.inputs) {
            let layer = format!("a GalerkinLinear layer of {} inputs", self.inputs);
            return Err(wrong_state(layer, format!("x (…, {})", self.inputs), &[x]));
        }
        self.at(t, x.dtype())?.forward(x)
    }
}
