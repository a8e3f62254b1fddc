//! Activations and their slopes, of tensors and of tiles.

use candle_core::{Result, Tensor};
use pulp::Simd;

use super::elementwise;
use crate::precision::at_least_f32;
use crate::simd::product::Epilogue;
use crate::simd::{Element, Kernel};

/// An elementwise activation.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::nn::Activation;
/// let x = Tensor::new(&[-1f32, 0.0, 2.0], &Device::Cpu)?;
/// assert_eq!(Activation::Relu.forward(&x)?.to_vec1::<f32>()?, [0.0, 0.0, 2.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    /// tanh x.
    #[default]
    Tanh,
    /// 1 / (1 + exp(−x)).
    Sigmoid,
    /// ln(1 + exp x).
    Softplus,
    /// max(x, 0).
    Relu,
    /// x · sigmoid x, also called swish.
    Silu,
    /// x Φ(x), Φ the normal distribution function (`gelu_erf` of candle).
    Gelu,
    /// sin x.
    Sin,
    /// ln(eˣ + e⁻ˣ), whose slope is tanh.
    LogTwoCosh,
}

impl Activation {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Tanh,
        Self::Sigmoid,
        Self::Softplus,
        Self::Relu,
        Self::Silu,
        Self::Gelu,
        Self::Sin,
        Self::LogTwoCosh,
    ];

    /// σ(x), of x's shape and dtype, differentiable by candle.  On the CPU in f32 and f64 one pass on the vector unit and
    /// all threads, worth using in place of candle's in any model; elsewhere candle's operations.
    ///
    /// # Errors
    /// Those of candle's operations.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        match elementwise::is_for(x) {
            true => elementwise::value(self, x),
            false => self.composed(x),
        }
    }

    /// σ(x) in candle's operations.
    fn composed(self, x: &Tensor) -> Result<Tensor> {
        // candle's selections panic on an empty part of a tensor.
        if x.elem_count() == 0 {
            return x * 1.0;
        }
        match self {
            Self::Tanh => x.tanh(),
            Self::Sigmoid => sigmoid(x),
            Self::Softplus => {
                // 1 + e⁻ˣ has too few digits in low precision.
                let wide = x.to_dtype(at_least_f32(x.dtype()))?;
                let tail = (wide.abs()?.neg()?.exp()? + 1.0)?.log()?;
                (wide.relu()? + tail)?.to_dtype(x.dtype())
            }
            Self::Relu => relu(x),
            Self::Silu => (near(x)? * sigmoid(x)?)? + beyond(x)?,
            Self::Gelu => (near(x)? * normal(x)?)? + beyond(x)?,
            Self::Sin => x.sin(),
            Self::LogTwoCosh => {
                let size = x.to_dtype(at_least_f32(x.dtype()))?.abs()?;
                let tail = ((&size * -2.0)?.exp()? + 1.0)?.log()?;
                (size + tail)?.to_dtype(x.dtype())
            }
        }
    }

    /// σ'(z) g.
    pub(super) fn pull(self, z: &Tensor, g: &Tensor) -> Result<Tensor> {
        if elementwise::is_for(z) && g.dtype() == z.dtype() {
            return elementwise::pull(self, z, g);
        }
        g * self.slope(z, &self.composed(z)?)?
    }

    /// σ'(z), of `value` = σ(z).
    pub(super) fn slope(self, z: &Tensor, value: &Tensor) -> Result<Tensor> {
        match self {
            Self::Tanh => 1.0 - value.sqr()?,
            Self::Sigmoid => value * (1.0 - value)?,
            Self::Softplus => sigmoid(z),
            // The value is 0 where it is not positive, or NaN.
            Self::Relu => z.gt(0.0)?.where_cond(&z.ones_like()?, value),
            Self::Silu => {
                let s = sigmoid(z)?;
                &s * (((1.0 - &s)? * near(z)?)? + 1.0)?
            }
            Self::Gelu => normal(z)? + (near(z)? * normal_density(z)?)?,
            Self::Sin => z.cos(),
            Self::LogTwoCosh => z.tanh(),
        }
    }

    /// σ''(z), of `value` = σ(z) and `slope` = σ'(z).
    pub(super) fn curvature(self, z: &Tensor, value: &Tensor, slope: &Tensor) -> Result<Tensor> {
        match self {
            Self::Tanh => (value * slope)? * -2.0,
            Self::Sigmoid => slope * (1.0 - (value * 2.0)?)?,
            Self::Softplus => slope * (1.0 - slope)?,
            Self::LogTwoCosh => 1.0 - slope.sqr()?,
            Self::Relu => z.zeros_like(),
            Self::Silu => {
                let s = sigmoid(z)?;
                let bend = ((near(z)? * (1.0 - (&s * 2.0)?)?)? + 2.0)?;
                (&s * (1.0 - &s)?)? * bend
            }
            Self::Gelu => normal_density(z)? * (2.0 - near(z)?.sqr()?)?,
            Self::Sin => value.neg(),
        }
    }

    /// Whether the slope must be kept beside the value.
    pub(super) fn keeps_slope(self) -> bool {
        !matches!(self, Self::Tanh | Self::Sigmoid | Self::Relu)
    }

    /// Whether the curvature must be kept beside value and slope.
    pub(super) fn keeps_curvature(self) -> bool {
        matches!(self, Self::Silu | Self::Gelu)
    }
}

/// z becomes σ(z); `slope` becomes σ'(z) where it must be kept.
pub(super) struct Apply<'a, T: Element, S: Simd> {
    pub(super) activation: Activation,
    pub(super) z: &'a mut [T::Vector<S>],
    pub(super) slope: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for Apply<'_, T, S> {
    type Output = ();

    // Loops, not closures: a closure is not compiled for the vector unit.
    #[inline(always)]
    fn run(self, s: S) {
        let Self { z, slope, .. } = self;
        let both = z.iter_mut().zip(slope);
        match self.activation {
            Activation::Tanh => {
                for z in z {
                    *z = T::tanh(s, *z);
                }
            }
            Activation::Sigmoid => {
                for z in z {
                    *z = T::sigmoid(s, *z);
                }
            }
            Activation::Relu => {
                for z in z {
                    *z = T::positive_part(s, *z);
                }
            }
            Activation::Softplus => {
                for (z, d) in both {
                    [*z, *d] = T::softplus(s, *z);
                }
            }
            Activation::Sin => {
                for (z, d) in both {
                    [*z, *d] = T::sin_cos(s, *z);
                }
            }
            Activation::LogTwoCosh => {
                for (z, d) in both {
                    // |z| + ln(1 + e^−2|z|): nothing cancels.
                    let size = T::abs(s, *z);
                    let twice = T::minus(s, T::zeros::<S>(), T::plus(s, size, size));
                    let [rest, _] = T::softplus(s, twice);
                    *d = T::tanh(s, *z);
                    *z = T::plus(s, size, rest);
                }
            }
            Activation::Silu => {
                for (z, d) in both {
                    // Where σ vanishes, its product with z does too, however large z is.
                    let near = T::bounded(s, *z);
                    let sigmoid = T::sigmoid(s, near);
                    // σ + zσ(1 − σ)
                    let product = T::times(s, near, sigmoid);
                    let rest = T::fnmadd(s, product, sigmoid, product);
                    *d = T::plus(s, sigmoid, rest);
                    *z = T::times(s, T::larger(s, near, *z), sigmoid);
                }
            }
            Activation::Gelu => {
                for (z, d) in both {
                    let near = T::bounded(s, *z);
                    let [normal, density] = T::normal(s, near);
                    *d = T::mul_add(s, near, density, normal);
                    *z = T::times(s, T::larger(s, near, *z), normal);
                }
            }
        }
    }
}

/// g becomes σ'(z) g, for activations whose slope follows from the value.
pub(super) struct Pull<'a, T: Element, S: Simd> {
    pub(super) activation: Activation,
    pub(super) value: &'a [T::Vector<S>],
    pub(super) g: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for Pull<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        for (g, h) in self.g.iter_mut().zip(self.value) {
            *g = pulled::<T, S>(s, self.activation, *h, *g);
        }
    }
}

/// σ'(z) g of h = σ(z), for activations whose slope follows from the value; g for others.
#[inline(always)]
pub(super) fn pulled<T: Element, S: Simd>(
    s: S,
    activation: Activation,
    h: T::Vector<S>,
    g: T::Vector<S>,
) -> T::Vector<S> {
    let one = T::splat(s, T::of(1.0));
    match activation {
        Activation::Tanh => T::times(s, g, T::fnmadd(s, h, h, one)),
        Activation::Sigmoid => T::times(s, g, T::fnmadd(s, h, h, h)),
        Activation::Relu => T::where_positive(s, h, g),
        Activation::Softplus
        | Activation::Silu
        | Activation::Gelu
        | Activation::Sin
        | Activation::LogTwoCosh => g,
    }
}

/// A product that forms g leaves σ'(z) g.
pub(super) struct TimesSlope<'a, T: Element, S: Simd> {
    pub(super) activation: Activation,
    pub(super) value: &'a [T::Vector<S>],
    /// Where it is kept, else empty.
    pub(super) slope: &'a [T::Vector<S>],
}

impl<T: Element, S: Simd> Epilogue<T, S> for TimesSlope<'_, T, S> {
    #[inline(always)]
    fn store<const R: usize, const V: usize>(
        &self,
        s: S,
        at: usize,
        g: [[T::Vector<S>; V]; R],
        out: &mut [[T::Vector<S>; V]; R],
    ) {
        if self.slope.is_empty() {
            let h = self.value[at..][..R * V].as_chunks::<V>().0;
            for r in 0..R {
                for v in 0..V {
                    out[r][v] = pulled::<T, S>(s, self.activation, h[r][v], g[r][v]);
                }
            }
        } else {
            let slope = self.slope[at..][..R * V].as_chunks::<V>().0;
            for r in 0..R {
                for v in 0..V {
                    out[r][v] = T::times(s, g[r][v], slope[r][v]);
                }
            }
        }
    }
}

/// z becomes σ(z), `slope` σ'(z), and `curvature` σ''(z) where it must be kept.
pub(super) struct Expand<'a, T: Element, S: Simd> {
    pub(super) activation: Activation,
    pub(super) z: &'a mut [T::Vector<S>],
    pub(super) slope: &'a mut [T::Vector<S>],
    pub(super) curvature: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for Expand<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let Self {
            activation,
            z,
            slope,
            curvature,
        } = self;
        for (e, z) in curvature.iter_mut().zip(&*z) {
            *e = kept_curvature::<T, S>(s, activation, *z);
        }
        let apply = Apply::<T, S> {
            activation,
            z,
            slope,
        };
        apply.run(s);
        if !activation.keeps_slope() {
            slope.fill(T::splat(s, T::of(1.0)));
            let pull = Pull::<T, S> {
                activation,
                value: z,
                g: slope,
            };
            pull.run(s);
        }
    }
}

/// g becomes σ'(z) g + σ''(z) c r, with one c for every row of the tile.
pub(super) struct Bend<'a, T: Element, S: Simd, const V: usize> {
    pub(super) activation: Activation,
    pub(super) value: &'a [T::Vector<S>],
    pub(super) slope: &'a [T::Vector<S>],
    /// Where it is kept.
    pub(super) curvature: &'a [T::Vector<S>],
    pub(super) c: [T::Vector<S>; V],
    pub(super) r: &'a [T::Vector<S>],
    pub(super) g: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Bend<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let Self { activation, c, .. } = self;
        let (value, slope) = (self.value.as_chunks::<V>().0, self.slope.as_chunks().0);
        let (curvature, r) = (self.curvature.as_chunks::<V>().0, self.r.as_chunks::<V>().0);
        let each = self.g.as_chunks_mut::<V>().0.iter_mut().zip(r);
        for (i, ((g, r), (h, d))) in each.zip(value.iter().zip(slope)).enumerate() {
            let d: &[T::Vector<S>; V] = d;
            for v in 0..V {
                let e = match curvature.get(i) {
                    Some(e) => e[v],
                    None => curvature_of::<T, S>(s, activation, h[v], d[v]),
                };
                let bent = T::times(s, e, T::times(s, c[v], r[v]));
                g[v] = T::mul_add(s, d[v], g[v], bent);
            }
        }
    }
}

/// σ'' of value and slope, where it follows from them.
#[inline(always)]
pub(super) fn curvature_of<T: Element, S: Simd>(
    s: S,
    activation: Activation,
    value: T::Vector<S>,
    slope: T::Vector<S>,
) -> T::Vector<S> {
    let one = T::splat(s, T::of(1.0));
    match activation {
        Activation::Tanh => {
            let twice = T::plus(s, value, value);
            T::fnmadd(s, twice, slope, T::zeros::<S>())
        }
        Activation::Sigmoid => {
            let twice = T::plus(s, value, value);
            T::times(s, slope, T::minus(s, one, twice))
        }
        Activation::Softplus => T::times(s, slope, T::minus(s, one, slope)),
        Activation::Sin => T::minus(s, T::zeros::<S>(), value),
        Activation::LogTwoCosh => T::fnmadd(s, slope, slope, one),
        Activation::Relu | Activation::Silu | Activation::Gelu => T::zeros::<S>(),
    }
}

/// σ'' of z, where it must be kept.
#[inline(always)]
fn kept_curvature<T: Element, S: Simd>(
    s: S,
    activation: Activation,
    z: T::Vector<S>,
) -> T::Vector<S> {
    let (z, two) = (T::bounded(s, z), T::splat(s, T::of(2.0)));
    match activation {
        Activation::Silu => {
            let sigmoid = T::sigmoid(s, z);
            let slope = T::fnmadd(s, sigmoid, sigmoid, sigmoid);
            // 1 − 2σ
            let odd = T::minus(s, T::splat(s, T::of(1.0)), T::plus(s, sigmoid, sigmoid));
            T::times(s, slope, T::mul_add(s, z, odd, two))
        }
        Activation::Gelu => {
            let [_, density] = T::normal(s, z);
            T::times(s, density, T::fnmadd(s, z, z, two))
        }
        Activation::Tanh
        | Activation::Sigmoid
        | Activation::Softplus
        | Activation::Relu
        | Activation::Sin
        | Activation::LogTwoCosh => T::zeros::<S>(),
    }
}

/// Φ(x).  candle's `gelu_erf` is x Φ(x) too, but its gradient is right to six digits only.
fn normal(x: &Tensor) -> Result<Tensor> {
    ((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5
}

/// Φ'(x).
fn normal_density(x: &Tensor) -> Result<Tensor> {
    const ROOT_OF_TAU: f64 = 2.506_628_274_631_000_5;
    (x.sqr()? * -0.5)?.exp()? / ROOT_OF_TAU
}

/// candle's own, whose pull-back does not overflow where exp(−x) does.
fn sigmoid(x: &Tensor) -> Result<Tensor> {
    candle_nn::ops::sigmoid(x)
}

/// Beyond this the tails of the sigmoid and of the normal distribution are zero in f16 to f32, and the
/// square is a number in f16.
const FAR: f64 = 200.0;

/// z, but not further from zero than that: its products with such tails are zeros, not ∞ · 0.
fn near(z: &Tensor) -> Result<Tensor> {
    // Not by minimum and maximum, whose gradient is a half where both sides are equal.
    let ends = (z.ones_like()? * FAR)?;
    let ends = z.lt(0.0)?.where_cond(&ends.neg()?, &ends)?;
    z.abs()?.gt(FAR)?.where_cond(&ends, z)
}

/// What lies above the nearer part, where σ is one.
fn beyond(z: &Tensor) -> Result<Tensor> {
    z.gt(FAR)?.where_cond(&(z - FAR)?, &z.zeros_like()?)
}

/// max(x, 0) with NaN for NaN, in value and slope; candle's has 0.
fn relu(x: &Tensor) -> Result<Tensor> {
    let (plain, none) = (x.detach(), x.detach().zeros_like()?);
    let known = plain.eq(&plain)?;
    // 1 for numbers.
    let slope = known.where_cond(&plain.ones_like()?, &plain)?;
    plain.le(0.0)?.where_cond(&none, &(x * slope)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::simd::{enter, scalars, scalars_mut, vectors};

    #[test]
    fn the_tail_of_gelu_keeps_its_digits_in_f64() {
        for (x, normal) in [
            (-9.0f64, 1.128_588_405_953_84e-19),
            (-8.0, 6.220_960_574_271_79e-16),
            (-5.0, 2.866_515_718_791_94e-7),
            (-1.0, 0.158_655_253_931_457),
            (2.0, 0.977_249_868_051_821),
        ] {
            let exact = x * normal;
            let y = Activation::Gelu.forward(&Tensor::new(&[x], &Device::Cpu).unwrap());
            let y = y.unwrap().get(0).unwrap().to_scalar::<f64>().unwrap();
            assert!(
                (y - exact).abs() <= 1e-13 * exact.abs(),
                "{x}: {y:e} {exact:e}"
            );
        }
    }

    /// Numbers between −3 and 3, the same in every run.
    fn scattered(n: usize) -> Tensor {
        let at = |i: usize| 3.0 * (12.9898 * (i + 1) as f64).sin();
        Tensor::from_vec((0..n).map(at).collect(), n, &Device::Cpu).unwrap()
    }

    /// max |x − y|.
    fn distance(x: &Tensor, y: &Tensor) -> f64 {
        let max = (x - y).and_then(|d| d.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar());
        max.unwrap()
    }

    #[test]
    fn fused_activations_and_their_gradients_are_those_of_candle() {
        for n in [1, 17, 1024, 40_001] {
            for (dtype, bound) in [(DType::F64, 1e-14), (DType::F32, 2e-6)] {
                let x = (scattered(n) * 3.0)
                    .and_then(|x| x.to_dtype(dtype))
                    .unwrap();
                let x = Var::from_tensor(&x).unwrap();
                let g = scattered(n).cos().and_then(|g| g.to_dtype(dtype)).unwrap();
                for activation in Activation::ALL {
                    let [got, expected] = [
                        activation.forward(x.as_tensor()).unwrap(),
                        activation.composed(x.as_tensor()).unwrap(),
                    ];
                    assert!(distance(&got, &expected) <= 8.0 * bound, "{activation:?}");
                    let gradient = |y: Tensor| {
                        let grads = (y * &g).and_then(|y| y.sum_all()?.backward()).unwrap();
                        grads.get(&x).unwrap().clone()
                    };
                    let error = distance(&gradient(got), &gradient(expected));
                    assert!(error <= 8.0 * bound, "{activation:?} {error:e}");
                }
            }
        }
    }

    struct LanesOfNan;

    impl pulp::WithSimd for LanesOfNan {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, s: S) {
            lanes_of_nan::<f32, S>(s);
            lanes_of_nan::<f64, S>(s);
        }
    }

    #[inline(always)]
    fn lanes_of_nan<T: Element, S: Simd>(s: S) {
        let lanes = T::lanes::<S>();
        for (activation, at) in Activation::ALL
            .into_iter()
            .flat_map(|activation| (0..lanes).map(move |at| (activation, at)))
        {
            let mut all = [(); 3].map(|()| vectors::<T, S>(1));
            let [z, slope, curvature] = &mut all;
            scalars_mut::<T, S>(z).fill(T::of(0.5));
            scalars_mut::<T, S>(z)[at] = T::of(f64::NAN);
            // The rest of what a tile holds may be far away.
            scalars_mut::<T, S>(z)[(at + 1) % lanes] = T::of(2e4);
            if lanes == 1 {
                scalars_mut::<T, S>(z)[at] = T::of(f64::NAN);
            }
            let expand = Expand::<T, S> {
                activation,
                z,
                slope,
                curvature: match activation.keeps_curvature() {
                    true => curvature,
                    false => &mut [],
                },
            };
            enter(s, expand);
            let held = 2 + usize::from(activation.keeps_curvature());
            for x in &all[..held] {
                for (i, x) in scalars::<T, S>(x).iter().enumerate() {
                    assert_eq!(x.to_f64().is_nan(), i == at, "{activation:?} {x:?}");
                }
            }
            let sine = scalars::<T, S>(&all[0])[(at + 1) % lanes].to_f64();
            if activation == Activation::Sin && lanes > 1 {
                assert!((sine - 2e4f64.sin()).abs() < 1e-6, "{sine}");
            }
        }
    }

    #[test]
    fn a_nan_stays_one_in_its_own_lane_on_every_unit() {
        pulp::Scalar::new().vectorize(LanesOfNan);
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(unit) = pulp::x86::V3::try_new() {
                Simd::vectorize(unit, LanesOfNan);
            }
            if let Some(unit) = pulp::x86::V4::try_new() {
                Simd::vectorize(unit, LanesOfNan);
            }
        }
        pulp::Arch::new().dispatch(LanesOfNan);
    }

    #[test]
    fn strided_and_low_precision_tensors_have_activations_too() {
        let x = scattered(30)
            .reshape((6, 5))
            .and_then(|x| x.to_dtype(DType::F32))
            .unwrap();
        let transposed = x.t().unwrap();
        let expected = transposed.contiguous().unwrap().tanh().unwrap();
        let got = Activation::Tanh.forward(&transposed).unwrap();
        assert!(distance(&got, &expected) <= 1e-6);
        let low = Activation::Silu.forward(&x.to_dtype(DType::BF16).unwrap());
        assert_eq!(low.unwrap().dtype(), DType::BF16);
    }
}
