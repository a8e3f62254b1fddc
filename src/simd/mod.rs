//! f32 and f64 in the lanes of whatever vector unit the machine has.
//!
//! AVX-512, AVX2, NEON or scalar code is chosen at run time ([`unit`]), and [`pulp`] compiles it; the
//! bodies here are safe and the same for all.  What runs inside a `Simd` must be inlined into a function that was entered
//! through [`Simd::vectorize`], so hot loops are [`WithSimd`](pulp::WithSimd) structs.

pub(crate) mod convolution;
pub(crate) mod elementary;
pub(crate) mod matrix;
pub(crate) mod matvec;
pub(crate) mod outer;
pub(crate) mod packed;
pub(crate) mod pieces;
pub(crate) mod product;
pub(crate) mod scratch;
#[cfg(test)]
mod tests;
pub(crate) mod tiles;
mod transpose;
pub(crate) mod two_sum;
pub(crate) mod unit;

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};
use pulp::Simd;

use crate::precision::Low;
use scratch::Scratch;
pub(crate) use unit::unit;

/// A number that fills vectors.
pub(crate) trait Element:
    Pod
    + Default
    + PartialOrd
    + std::fmt::Debug
    + Send
    + Sync
    + candle_core::WithDType
    + std::ops::AddAssign
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
{
    /// Whether tiles of two vectors are worth their code; f64 is for studies, in tiles of one.
    const WIDE: bool;

    /// The vector of this number on S.
    type Vector<S: Simd>: Pod + std::fmt::Debug + Send + Sync;

    /// A coefficient, rounded once.
    fn of(x: f64) -> Self;
    /// The same number in f64.
    fn wide(self) -> f64;
    /// a·b + self, rounded once, as [`mul_add`](Self::mul_add) does it.
    fn plus_product(self, a: Self, b: Self) -> Self;

    fn splat<S: Simd>(s: S, x: Self) -> Self::Vector<S>;
    fn plus<S: Simd>(s: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn minus<S: Simd>(s: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn times<S: Simd>(s: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn larger<S: Simd>(s: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn abs<S: Simd>(s: S, a: Self::Vector<S>) -> Self::Vector<S>;
    /// a·b + c, fused where the machine can.
    fn mul_add<S: Simd>(
        s: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// c − a·b, fused where the machine can.
    fn fnmadd<S: Simd>(
        s: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// Sum of the lanes.
    fn total<S: Simd>(s: S, a: Self::Vector<S>) -> Self;
    /// Largest of the lanes, which are no NaN.
    fn largest<S: Simd>(s: S, a: Self::Vector<S>) -> Self;

    /// tanh x.
    fn tanh<S: Simd>(s: S, x: Self::Vector<S>) -> Self::Vector<S>;
    /// exp x; in f32 between exp(−87) and exp 87.
    fn exp<S: Simd>(s: S, x: Self::Vector<S>) -> Self::Vector<S>;
    /// 1 / (1 + exp(−x)).
    fn sigmoid<S: Simd>(s: S, x: Self::Vector<S>) -> Self::Vector<S>;
    /// ln(1 + exp x) and its derivative.
    fn softplus<S: Simd>(s: S, x: Self::Vector<S>) -> [Self::Vector<S>; 2];
    /// Φ(x), the normal distribution function, and its derivative.
    fn normal<S: Simd>(s: S, x: Self::Vector<S>) -> [Self::Vector<S>; 2];
    /// sin x and cos x.
    fn sin_cos<S: Simd>(s: S, x: Self::Vector<S>) -> [Self::Vector<S>; 2];
    /// max(x, 0); a NaN stays one.
    fn positive_part<S: Simd>(s: S, x: Self::Vector<S>) -> Self::Vector<S>;
    /// x where the lanes of a positive part are positive; elsewhere the part itself, which is 0 or NaN.
    fn where_positive<S: Simd>(s: S, part: Self::Vector<S>, x: Self::Vector<S>) -> Self::Vector<S>;
    /// x, but not below −1000 nor above 1000; a NaN stays one.
    fn bounded<S: Simd>(s: S, x: Self::Vector<S>) -> Self::Vector<S>;

    /// Rounded to `low`, held in this number.
    fn round<S: Simd>(s: S, low: Low, x: Self::Vector<S>) -> Self::Vector<S>;

    /// `to[c][r] = from[r][c]` for a square of as many rows as a vector has lanes, vectors at
    /// strides in vectors.
    fn transpose<S: Simd>(
        s: S,
        from: &[Self::Vector<S>],
        from_stride: usize,
        to: &mut [Self::Vector<S>],
        to_stride: usize,
    );

    /// Lanes of a vector.
    fn lanes<S: Simd>() -> usize {
        size_of::<Self::Vector<S>>() / size_of::<Self>()
    }

    /// Numbers as vectors, of which there is a whole number.
    #[inline(always)]
    fn vectors<S: Simd>(numbers: &[Self]) -> &[Self::Vector<S>] {
        bytemuck::cast_slice(numbers)
    }

    /// The same to write.
    #[inline(always)]
    fn vectors_mut<S: Simd>(numbers: &mut [Self]) -> &mut [Self::Vector<S>] {
        bytemuck::cast_slice_mut(numbers)
    }

    /// 0 in all lanes.
    fn zeros<S: Simd>() -> Self::Vector<S> {
        Zeroable::zeroed()
    }

    /// f of every lane, one after the other.
    #[inline(always)]
    fn map<S: Simd>(mut x: Self::Vector<S>, f: impl Fn(Self) -> Self) -> Self::Vector<S> {
        for x in bytemuck::cast_slice_mut::<_, Self>(std::slice::from_mut(&mut x)) {
            *x = f(*x);
        }
        x
    }
}

/// A loop that runs on vectors of S, as a function of its own.
pub(crate) trait Kernel<S: Simd> {
    type Output;

    /// Runs it; always inlined, into code for the vector unit.
    fn run(self, s: S) -> Self::Output;
}

/// A kernel with the vector unit that it runs on.
struct Entered<K, S> {
    kernel: K,
    simd: S,
}

impl<S: Simd, K: Kernel<S>> pulp::NullaryFnOnce for Entered<K, S> {
    type Output = K::Output;

    #[inline(always)]
    fn call(self) -> K::Output {
        self.kernel.run(self.simd)
    }
}

/// Runs a kernel.
#[inline(always)]
pub(crate) fn enter<S: Simd, K: Kernel<S>>(simd: S, kernel: K) -> K::Output {
    simd.vectorize(Entered { kernel, simd })
}

/// Owned numbers, from the beginning of a line of the cache on: a vector across two of them costs twice.
pub(crate) struct Aligned<X> {
    scratch: Scratch,
    number: PhantomData<X>,
}

impl<X: Pod> Deref for Aligned<X> {
    type Target = [X];

    #[inline(always)]
    fn deref(&self) -> &[X] {
        self.scratch.numbers()
    }
}

impl<X: Pod> DerefMut for Aligned<X> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [X] {
        self.scratch.numbers_mut()
    }
}

/// Owned vectors.
pub(crate) type Vectors<T, S> = Aligned<<T as Element>::Vector<S>>;

/// n zeros.
pub(crate) fn aligned<X: Pod>(n: usize) -> Aligned<X> {
    Aligned {
        scratch: Scratch::new(n * size_of::<X>()),
        number: PhantomData,
    }
}

/// n vectors of zeros.
pub(crate) fn vectors<T: Element, S: Simd>(n: usize) -> Vectors<T, S> {
    Aligned {
        scratch: Scratch::new(n * size_of::<T::Vector<S>>()),
        number: PhantomData,
    }
}

/// The numbers in a slice of vectors.
#[inline(always)]
pub(crate) fn scalars<T: Element, S: Simd>(vectors: &[T::Vector<S>]) -> &[T] {
    bytemuck::cast_slice(vectors)
}

/// The numbers in a slice of vectors, to write.
#[inline(always)]
pub(crate) fn scalars_mut<T: Element, S: Simd>(vectors: &mut [T::Vector<S>]) -> &mut [T] {
    bytemuck::cast_slice_mut(vectors)
}

macro_rules! arithmetic {
    ($($name:ident($($arg:ident),*) = $pulp:ident;)*) => {
        $(#[inline(always)]
        fn $name<S: Simd>(s: S, $($arg: Self::Vector<S>),*) -> Self::Vector<S> {
            s.$pulp($($arg),*)
        })*
    };
}

impl Element for f32 {
    const WIDE: bool = true;

    type Vector<S: Simd> = S::f32s;

    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        self.into()
    }

    #[inline(always)]
    fn plus_product(self, a: f32, b: f32) -> f32 {
        a.mul_add(b, self)
    }

    #[inline(always)]
    fn splat<S: Simd>(s: S, x: f32) -> S::f32s {
        s.splat_f32s(x)
    }

    arithmetic! {
        plus(a, b) = add_f32s;
        minus(a, b) = sub_f32s;
        times(a, b) = mul_f32s;
        larger(a, b) = max_f32s;
        abs(a) = abs_f32s;
        mul_add(a, b, c) = mul_add_e_f32s;
        fnmadd(a, b, c) = negate_mul_add_e_f32s;
    }

    #[inline(always)]
    fn total<S: Simd>(s: S, a: S::f32s) -> f32 {
        s.reduce_sum_f32s(a)
    }

    #[inline(always)]
    fn largest<S: Simd>(s: S, a: S::f32s) -> f32 {
        s.reduce_max_f32s(a)
    }

    #[inline(always)]
    fn tanh<S: Simd>(s: S, x: S::f32s) -> S::f32s {
        elementary::tanh(s, x)
    }

    #[inline(always)]
    fn exp<S: Simd>(s: S, x: S::f32s) -> S::f32s {
        elementary::exp(s, x)
    }

    #[inline(always)]
    fn sigmoid<S: Simd>(s: S, x: S::f32s) -> S::f32s {
        elementary::sigmoid(s, x)
    }

    #[inline(always)]
    fn softplus<S: Simd>(s: S, x: S::f32s) -> [S::f32s; 2] {
        elementary::softplus(s, x)
    }

    #[inline(always)]
    fn normal<S: Simd>(s: S, x: S::f32s) -> [S::f32s; 2] {
        elementary::normal(s, x)
    }

    #[inline(always)]
    fn sin_cos<S: Simd>(s: S, x: S::f32s) -> [S::f32s; 2] {
        elementary::sin_cos(s, x)
    }

    #[inline(always)]
    fn positive_part<S: Simd>(s: S, x: S::f32s) -> S::f32s {
        elementary::at_least(s, 0.0, x)
    }

    #[inline(always)]
    fn where_positive<S: Simd>(s: S, part: S::f32s, x: S::f32s) -> S::f32s {
        let positive = s.greater_than_f32s(part, s.splat_f32s(0.0));
        s.select_f32s(positive, x, part)
    }

    #[inline(always)]
    fn bounded<S: Simd>(s: S, x: S::f32s) -> S::f32s {
        elementary::at_least(s, -1000.0, elementary::at_most(s, 1000.0, x))
    }

    #[inline(always)]
    fn round<S: Simd>(s: S, low: Low, x: S::f32s) -> S::f32s {
        match low {
            Low::None => x,
            Low::Bf16 => elementary::round_bf16(s, x),
            Low::F16 => elementary::round_f16(s, x),
        }
    }

    #[inline(always)]
    fn transpose<S: Simd>(
        s: S,
        from: &[S::f32s],
        from_stride: usize,
        to: &mut [S::f32s],
        to_stride: usize,
    ) {
        transpose::transpose_f32(s, from, from_stride, to, to_stride);
    }
}

impl Element for f64 {
    const WIDE: bool = false;

    type Vector<S: Simd> = S::f64s;

    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }

    #[inline(always)]
    fn plus_product(self, a: f64, b: f64) -> f64 {
        a.mul_add(b, self)
    }

    #[inline(always)]
    fn splat<S: Simd>(s: S, x: f64) -> S::f64s {
        s.splat_f64s(x)
    }

    arithmetic! {
        plus(a, b) = add_f64s;
        minus(a, b) = sub_f64s;
        times(a, b) = mul_f64s;
        larger(a, b) = max_f64s;
        abs(a) = abs_f64s;
        mul_add(a, b, c) = mul_add_e_f64s;
        fnmadd(a, b, c) = negate_mul_add_e_f64s;
    }

    #[inline(always)]
    fn total<S: Simd>(s: S, a: S::f64s) -> f64 {
        s.reduce_sum_f64s(a)
    }

    #[inline(always)]
    fn largest<S: Simd>(s: S, a: S::f64s) -> f64 {
        s.reduce_max_f64s(a)
    }

    // f64 is for studies: the elementary functions are those of the standard library, by lane.

    #[inline(always)]
    fn tanh<S: Simd>(_: S, x: S::f64s) -> S::f64s {
        Self::map::<S>(x, f64::tanh)
    }

    #[inline(always)]
    fn exp<S: Simd>(_: S, x: S::f64s) -> S::f64s {
        Self::map::<S>(x, f64::exp)
    }

    #[inline(always)]
    fn sigmoid<S: Simd>(_: S, x: S::f64s) -> S::f64s {
        Self::map::<S>(x, elementary::sigmoid_f64)
    }

    #[inline(always)]
    fn softplus<S: Simd>(_: S, x: S::f64s) -> [S::f64s; 2] {
        let value = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
        [
            Self::map::<S>(x, value),
            Self::map::<S>(x, elementary::sigmoid_f64),
        ]
    }

    #[inline(always)]
    fn normal<S: Simd>(_: S, x: S::f64s) -> [S::f64s; 2] {
        [
            Self::map::<S>(x, elementary::normal_f64),
            Self::map::<S>(x, elementary::normal_density_f64),
        ]
    }

    #[inline(always)]
    fn sin_cos<S: Simd>(_: S, x: S::f64s) -> [S::f64s; 2] {
        [Self::map::<S>(x, f64::sin), Self::map::<S>(x, f64::cos)]
    }

    #[inline(always)]
    fn positive_part<S: Simd>(s: S, x: S::f64s) -> S::f64s {
        let zero = s.splat_f64s(0.0);
        // Not positive: zero where that can be said, else NaN.
        s.select_f64s(s.less_than_or_equal_f64s(x, zero), zero, x)
    }

    #[inline(always)]
    fn where_positive<S: Simd>(s: S, part: S::f64s, x: S::f64s) -> S::f64s {
        let positive = s.greater_than_f64s(part, s.splat_f64s(0.0));
        s.select_f64s(positive, x, part)
    }

    #[inline(always)]
    fn bounded<S: Simd>(_: S, x: S::f64s) -> S::f64s {
        Self::map::<S>(x, |x| x.clamp(-1000.0, 1000.0))
    }

    #[inline(always)]
    fn round<S: Simd>(_: S, low: Low, x: S::f64s) -> S::f64s {
        Self::map::<S>(x, |x| low.round(x as f32).into())
    }

    #[inline(always)]
    fn transpose<S: Simd>(
        s: S,
        from: &[S::f64s],
        from_stride: usize,
        to: &mut [S::f64s],
        to_stride: usize,
    ) {
        transpose::transpose_f64(s, from, from_stride, to, to_stride);
    }
}
