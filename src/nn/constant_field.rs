//! A field with the same velocity everywhere.

use candle_core::backprop::GradStore;
use candle_core::{Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder};
use pulp::Simd;

use super::linear::sum_of_rows;
use super::weights::{append_totals, fill, numbers, Place};
use crate::error::Error;
use crate::field::{Cotangents, Offer, Pullback, VectorField};
use crate::offer::Offered;
use crate::rows::{At, RowField, Slot, TileField};
use crate::simd::outer::add_rows;
use crate::simd::Element;
use crate::state::RowLayout;
use crate::time::Time;

/// f(t, y) = c in every row.  As the diffusion of an equation it gives additive noise, whose strength differs from
/// component to component and may be learnt.
///
/// y: `(…, features)`.  On the CPU the solver integrates it tile by tile, alone and as a part of an equation.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, ConstantField, Mlp};
/// use candle_diffeq::sde::{ito, NeuralSde, Noise, OfField};
/// let vars = candle_nn::VarMap::new();
/// let sde = NeuralSde::new(&vars, "sde", DType::F32, &Device::Cpu, |vb| {
///     let drift = Mlp::new(&[2, 16, 2], Activation::Tanh, vb.pp("drift"))?;
///     let spread = ConstantField::new(2, 0.3, vb.pp("spread"))?;
///     Ok(ito(drift, OfField(spread)).additive())
/// })?;
/// let y0 = Tensor::zeros((8, 2), DType::F32, &Device::Cpu)?;
/// let ys = sde.solve(&y0, &[0.0, 0.1, 0.2], &Noise::seeded(1))?;
/// assert!(ys.get(2)?.sum_all()?.backward()?.get(&vars.all_vars()[0]).is_some());
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ConstantField {
    value: Tensor,
}

impl ConstantField {
    /// A field with the parameter `value`, one number for each feature.  All of them begin with the given number.
    ///
    /// # Errors
    /// Those of the builder; an error if there are no features.
    pub fn new(features: usize, value: f64, vb: VarBuilder<'_>) -> Result<Self> {
        Self::from_value(vb.get_with_hints(features, "value", Init::Const(value))?)
    }

    /// A field with this tensor as c, `[features]`.
    ///
    /// # Errors
    /// If the tensor is empty, or is not a vector of a floating-point dtype.
    pub fn from_value(value: Tensor) -> Result<Self> {
        if value.rank() != 1 || value.elem_count() == 0 || !value.dtype().is_float() {
            candle_core::bail!(
                "the value of a ConstantField is a vector of floating-point numbers, one for each feature, not {:?} of {:?}",
                value.shape(),
                value.dtype()
            )
        }
        Ok(Self { value })
    }

    /// c.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Features of the state.
    pub fn features(&self) -> usize {
        self.value.elem_count()
    }

    fn check(&self, y: &Tensor) -> Result<()> {
        let features = self.features();
        if y.dims().last() == Some(&features) {
            return Ok(());
        }
        let field = format!("a ConstantField of {features} features");
        Err(super::wrong_state(
            field,
            format!("y (…, {features})"),
            &[y],
        ))
    }
}

impl VectorField<Tensor> for ConstantField {
    fn velocity(&self, _: &Time, y: &Tensor) -> Result<Tensor> {
        self.check(y)?;
        self.value
            .to_dtype(y.dtype())?
            .broadcast_as(y.shape())?
            .contiguous()
    }

    fn vjp<'f>(&'f self, t: &Time, y: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        let k = self.velocity(t, y)?.detach();
        let pull = move |v: &Tensor| {
            let mut cotangents = Cotangents {
                y: v.zeros_like()?,
                t: None,
                params: GradStore::default(),
            };
            if self.value.track_op() {
                let rows = v.reshape(((), self.features()))?;
                cotangents.params.insert(&self.value, sum_of_rows(&rows)?);
            }
            Ok(cotangents)
        };
        Ok((k, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let tracked = Some(&self.value).filter(|value| value.track_op());
        Some(tracked.into_iter().cloned().collect())
    }

    fn is_constant_in(&self, _: usize) -> bool {
        true
    }

    fn offer(&self) -> Option<Offer> {
        Some(Offered::of::<Tensor, _>(self, true).into())
    }
}

impl RowField for ConstantField {
    type Tiles<T: Element> = ConstantTiles<T>;

    fn weights(&self) -> Vec<Tensor> {
        vec![self.value.clone()]
    }

    fn reads_time(&self) -> bool {
        false
    }

    fn layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
        let [shape] = shapes else { return None };
        let (last, rows) = shape.dims().split_last()?;
        (*last == self.features()).then(|| RowLayout {
            rows: rows.iter().product(),
            features: vec![*last],
        })
    }

    fn tiles<T: Element, S: Simd>(
        &self,
        _: S,
        _: &[Shape],
    ) -> std::result::Result<ConstantTiles<T>, Error> {
        Ok(ConstantTiles(numbers(&self.value)?))
    }
}

/// A [`ConstantField`] over tiles.  A slot keeps the stage, which nothing reads; cotangents are those of the velocity.
pub(crate) struct ConstantTiles<T>(Vec<T>);

impl<T: Element> TileField<T> for ConstantTiles<T> {
    fn kept(&self) -> usize {
        self.0.len()
    }

    fn cotangents<S: Simd>(&self) -> usize {
        self.0.len()
    }

    fn sums<S: Simd>(&self) -> usize {
        self.0.len()
    }

    fn scratch<S: Simd, const V: usize>(&self, _: usize) -> usize {
        0
    }

    fn parameters(&self) -> usize {
        self.0.len()
    }

    #[inline(always)]
    fn velocity<S: Simd, const V: usize>(
        &self,
        s: S,
        _: &At<'_, T::Vector<S>>,
        _: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
    ) {
        let features = k.into_iter().flat_map(|k| k.chunks_exact_mut(V));
        for (k, c) in features.zip(&self.0) {
            k.fill(T::splat(s, *c));
        }
    }

    #[inline(always)]
    fn vjp<S: Simd, const V: usize>(
        &self,
        _: S,
        _: &[T::Vector<S>],
        _: &mut [T::Vector<S>],
        w: &mut [T::Vector<S>],
    ) {
        w.fill(T::zeros::<S>());
    }

    #[inline(always)]
    fn accumulate<S: Simd, const V: usize>(
        &self,
        s: S,
        window: &[Slot<'_, T::Vector<S>>],
        _: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        let mut pairs = Vec::with_capacity(window.len());
        fill::<_, V>(&mut pairs, window, Place { read: 0, left: 0 }, 0);
        add_rows::<T, S, V>(s, &pairs, sums);
    }

    #[inline(always)]
    fn gradients<S: Simd>(&self, s: S, sums: &[T::Vector<S>]) -> Vec<T> {
        let mut gradients = Vec::with_capacity(self.0.len());
        append_totals::<T, S>(s, sums, &mut gradients);
        gradients
    }
}
