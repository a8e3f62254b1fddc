//! Affine layers whose products suit the small batches and widths of a vector field.

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Module, Result, Shape, Tensor,
};
use candle_nn::VarBuilder;

use super::elementwise::numbers;
use super::spread::spread;
use super::{wrong_state, Checked};
use crate::precision::at_least_f32;
use crate::simd::matrix::{column_sums, product, Matrix};
use crate::simd::unit;
use crate::simd::Element;

/// y = x Wᵀ + b: x `(…, inputs)`, W `(outputs, inputs)`, b `(outputs)`, y `(…, outputs)`.
///
/// Takes the place of [`candle_nn::Linear`] in any model: the same names, shapes and initial values.
/// On the CPU in f32 and f64 the bias is part of the product, gradients are formed by products that
/// copy nothing, and small products use the whole vector unit and wake no other thread; elsewhere it is
/// candle's product and sum.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, Linear};
/// use candle_diffeq::fields::autonomous;
/// use candle_diffeq::NeuralOde;
/// use candle_nn::Module;
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, |vb| {
///     let (l1, l2) = (Linear::new(2, 16, vb.pp("l1"))?, Linear::new(16, 2, vb.pp("l2"))?);
///     Ok(autonomous(candle_nn::func(move |y: &Tensor| {
///         l2.forward(&Activation::Tanh.forward(&l1.forward(y)?)?)
///     })))
/// })?;
/// let y = ode.solve(&Tensor::ones((8, 2), DType::F32, &Device::Cpu)?, &[0.0, 1.0])?;
/// assert_eq!(y.dims(), [2, 8, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Linear {
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
}

impl Linear {
    /// `weight` and `bias` of a builder, initialised as [`candle_nn::linear()`] does.
    ///
    /// # Errors
    /// Those of the builder.
    pub fn new(inputs: usize, outputs: usize, vb: VarBuilder<'_>) -> Result<Self> {
        candle_nn::linear(inputs, outputs, vb).map(Self::from)
    }

    /// The same without bias.
    ///
    /// # Errors
    /// Those of the builder.
    pub fn without_bias(inputs: usize, outputs: usize, vb: VarBuilder<'_>) -> Result<Self> {
        candle_nn::linear_no_bias(inputs, outputs, vb).map(Self::from)
    }

    /// W.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// b.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl From<candle_nn::Linear> for Linear {
    fn from(layer: candle_nn::Linear) -> Self {
        Self {
            weight: layer.weight().clone(),
            bias: layer.bias().cloned(),
        }
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut checked = Checked::new("nn::Linear");
        checked.weight(0, &self.weight, 2, "a matrix (outputs, inputs)")?;
        let (outputs, inputs) = self.weight.dims2()?;
        if let Some(bias) = &self.bias {
            checked.bias(0, bias, outputs)?;
        }
        let rows = match x.dims().split_last() {
            Some((last, rows)) if *last == inputs => rows,
            _ => {
                let layer = format!("a Linear layer of {inputs} inputs");
                return Err(wrong_state(layer, format!("x (…, {inputs})"), &[x]));
            }
        };
        let flat = x.reshape((rows.iter().product::<usize>(), inputs))?;
        let y = affine(&flat, &self.weight, self.bias.as_ref())?;
        y.reshape([rows, &[outputs]].concat())
    }
}

/// x Wᵀ + b of a matrix x, differentiable by candle.
pub(super) fn affine(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if !ours(&[Some(x), Some(weight), bias]) {
        let y = x.matmul(&weight.t()?)?;
        return match bias {
            // The pull-back of a product is summed in f32, that of a broadcast in its own dtype.
            Some(bias) if bias.track_op() && matches!(y.dtype(), DType::F16 | DType::BF16) => {
                y + spread(bias, x.dim(0)?)?
            }
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        };
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    match bias {
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, AffineOp),
        None => x.apply_op2(&weight, Product(Form::Abt)),
    }
}

/// a b without history.
pub(super) fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    multiply(Form::Ab, a, b)
}

/// aᵀ b without history.
pub(super) fn transposed_matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    multiply(Form::Atb, a, b)
}

/// Σ over the rows of a matrix, without history; in f32 where x is narrower.
pub(super) fn sum_of_rows(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        _ if ours(&[Some(x)]) => x.contiguous()?.apply_op1_no_bwd(&ColumnSums),
        // candle sums bf16 in bf16: of 4096 ones it makes 256.
        dtype => x.detach().to_dtype(at_least_f32(dtype))?.sum(0),
    }
}

fn multiply(form: Form, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if ours(&[Some(a), Some(b)]) {
        let (a, b) = (a.contiguous()?, b.contiguous()?);
        return a.apply_op2_no_bwd(&b, &Product(form));
    }
    let (a, b) = (a.detach(), b.detach());
    match form {
        Form::Ab => a.matmul(&b),
        Form::Abt => a.matmul(&b.t()?),
        Form::Atb => a.t()?.matmul(&b),
    }
}

/// Whether these operands are for the products here.
fn ours(all: &[Option<&Tensor>]) -> bool {
    let mut all = all.iter().flatten();
    let Some(dtype) = all.clone().next().map(|x| x.dtype()) else {
        return false;
    };
    matches!(dtype, DType::F32 | DType::F64)
        && all.all(|x| x.device().is_cpu() && x.dtype() == dtype)
}

/// Which operand is transposed.
#[derive(Clone, Copy)]
enum Form {
    Ab,
    Abt,
    Atb,
}

impl Form {
    /// Runs it.
    fn run<T: Element>(
        self,
        (a, a_layout): (&[T], &Layout),
        (b, b_layout): (&[T], &Layout),
        start: &[T],
    ) -> Result<(Vec<T>, Shape)> {
        let (a, b) = (matrix(a, a_layout)?, matrix(b, b_layout)?);
        let (a, b) = match self {
            Self::Ab => (a, b),
            Self::Abt => (a, b.t()),
            Self::Atb => (a.t(), b),
        };
        let (rows, inner, columns) = (a.rows(), a.columns(), b.columns());
        if inner != b.rows() || !start.is_empty() && start.len() != columns {
            candle_core::bail!(
                "a product of {rows} x {inner} and {} x {columns}, with {} numbers added to a row",
                b.rows(),
                start.len()
            )
        }
        Ok((product(a, b, start)?, Shape::from((rows, columns))))
    }
}

fn matrix<'a, T: Element>(x: &'a [T], layout: &Layout) -> Result<Matrix<'a, T>> {
    let (rows, columns) = layout.shape().dims2()?;
    Ok(Matrix::new(numbers(x, layout)?, rows, columns))
}

/// Two operands.
struct Product(Form);

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        at_a: &Layout,
        b: &CpuStorage,
        at_b: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match (a, b) {
            (CpuStorage::F32(a), CpuStorage::F32(b)) => {
                let (out, shape) = self.0.run((a, at_a), (b, at_b), &[])?;
                Ok((CpuStorage::F32(out), shape))
            }
            (CpuStorage::F64(a), CpuStorage::F64(b)) => {
                let (out, shape) = self.0.run((a, at_a), (b, at_b), &[])?;
                Ok((CpuStorage::F64(out), shape))
            }
            _ => candle_core::bail!("a product of operands that are not both f32 or both f64"),
        }
    }

    /// Of x Wᵀ, the only form with history.
    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        pull(x, weight, g)
    }
}

/// What goes back through x Wᵀ, to those that are tracked.
fn pull(x: &Tensor, weight: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let to_x = x.track_op().then(|| matmul(g, weight));
    let to_weight = weight.track_op().then(|| transposed_matmul(g, x));
    Ok((to_x.transpose()?, to_weight.transpose()?))
}

/// x Wᵀ + b.
struct AffineOp;

impl CustomOp3 for AffineOp {
    fn name(&self) -> &'static str {
        "affine"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        at_x: &Layout,
        weight: &CpuStorage,
        at_weight: &Layout,
        bias: &CpuStorage,
        at_bias: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match (x, weight, bias) {
            (CpuStorage::F32(x), CpuStorage::F32(w), CpuStorage::F32(b)) => {
                let b = numbers(b, at_bias)?;
                let (out, shape) = Form::Abt.run((x, at_x), (w, at_weight), b)?;
                Ok((CpuStorage::F32(out), shape))
            }
            (CpuStorage::F64(x), CpuStorage::F64(w), CpuStorage::F64(b)) => {
                let b = numbers(b, at_bias)?;
                let (out, shape) = Form::Abt.run((x, at_x), (w, at_weight), b)?;
                Ok((CpuStorage::F64(out), shape))
            }
            _ => candle_core::bail!("a layer of operands that are not all f32 or all f64"),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (to_x, to_weight) = pull(x, weight, g)?;
        let to_bias = bias.track_op().then(|| sum_of_rows(g));
        Ok((to_x, to_weight, to_bias.transpose()?))
    }
}

struct ColumnSums;

impl CustomOp1 for ColumnSums {
    fn name(&self) -> &'static str {
        "column sums"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((_, columns), unit) = (layout.shape().dims2()?, unit()?);
        let out = match x {
            CpuStorage::F32(x) => CpuStorage::F32(column_sums(unit, numbers(x, layout)?, columns)),
            CpuStorage::F64(x) => CpuStorage::F64(column_sums(unit, numbers(x, layout)?, columns)),
            _ => candle_core::bail!("column sums of numbers that are neither f32 nor f64"),
        };
        Ok((out, Shape::from(columns)))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use rand_distr::StandardNormal;

    use super::*;

    /// Normal numbers, the same for a shape in every run.
    fn variable(shape: &[usize], dtype: DType) -> Var {
        let seed = shape.iter().fold(0, |seed, &n| 1009 * seed + n as u64);
        let normal = StdRng::seed_from_u64(seed).sample_iter(StandardNormal);
        let x: Vec<f64> = normal.take(shape.iter().product()).collect();
        let x = Tensor::from_vec(x, shape, &Device::Cpu).unwrap();
        Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap()
    }

    fn wide(x: &Tensor) -> Tensor {
        x.detach().to_dtype(DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        let x = wide(x).abs().unwrap().flatten_all().unwrap();
        x.max(0).unwrap().to_scalar().unwrap()
    }

    /// max |x − y| / max |y|.
    fn distance(x: &Tensor, y: &Tensor) -> f64 {
        largest(&(wide(x) - wide(y)).unwrap()) / largest(y).max(1e-300)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn a_layer_and_its_gradients_are_those_of_candle_nn(
            batch in 1usize..300, inputs in 1usize..300, outputs in 1usize..70, bias in any::<bool>(), double in any::<bool>(),
        ) {
            let (dtype, unit) = match double {
                true => (DType::F64, 2f64.powi(-53)),
                false => (DType::F32, 2f64.powi(-24)),
            };
            let (x, w) = (variable(&[batch, inputs], dtype), variable(&[outputs, inputs], dtype));
            let b = bias.then(|| variable(&[outputs], dtype));
            let g = variable(&[batch, outputs], dtype);
            // The reference is f64 whatever the dtype of the layer.
            let double = |x: &Var| Var::from_tensor(&wide(x)).unwrap();
            let (x64, w64, b64) = (double(&x), double(&w), b.as_ref().map(double));
            let layer = Linear {
                weight: w.as_tensor().clone(),
                bias: b.as_ref().map(|b| b.as_tensor().clone()),
            };
            let reference = candle_nn::Linear::new(
                w64.as_tensor().clone(),
                b64.as_ref().map(|b| b.as_tensor().clone()),
            );
            let (y, y64) = (layer.forward(&x).unwrap(), reference.forward(&x64).unwrap());
            prop_assert_eq!(y.dims(), y64.dims());
            // Sums of n terms are off by n roundoffs of the sum of their sizes.
            let size = |x: &Tensor| wide(x).abs().unwrap();
            let (xs, ws, gs) = (size(&x), size(&w), size(&g));
            let holds = |got: &Tensor, exact: &Tensor, sizes: Tensor, terms: usize| {
                let error = largest(&(wide(got) - wide(exact)).unwrap());
                error <= (terms + 2) as f64 * unit * largest(&sizes)
            };
            let mut sizes = xs.matmul(&ws.t().unwrap()).unwrap();
            if let Some(b) = &b {
                sizes = sizes.broadcast_add(&size(b)).unwrap();
            }
            prop_assert!(holds(&y, &y64, sizes, inputs + 1));
            let grads = (y * g.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
            let grads64 = (y64 * wide(&g)).unwrap().sum_all().unwrap().backward().unwrap();
            let of = |x: &Var, x64: &Var| (grads.get(x).unwrap().clone(), grads64.get(x64).unwrap().clone());
            let (got, exact) = of(&x, &x64);
            prop_assert!(holds(&got, &exact, gs.matmul(&ws).unwrap(), outputs));
            let (got, exact) = of(&w, &w64);
            prop_assert!(holds(&got, &exact, gs.t().unwrap().matmul(&xs).unwrap(), batch));
            if let (Some(b), Some(b64)) = (&b, &b64) {
                let (got, exact) = of(b, b64);
                prop_assert!(holds(&got, &exact, gs.sum(0).unwrap(), batch));
            }
        }
    }

    #[test]
    fn large_products_are_cut_into_pieces_without_a_seam() {
        let (a, b) = (
            variable(&[700, 600], DType::F64),
            variable(&[90, 600], DType::F64),
        );
        let y = affine(a.as_tensor(), b.as_tensor(), None).unwrap();
        let expected = a.matmul(&b.t().unwrap()).unwrap();
        assert!(distance(&y, &expected) <= 1e-14);
        let y = transposed_matmul(b.as_tensor(), &expected.t().unwrap()).unwrap();
        let expected = b.t().unwrap().matmul(&expected.t().unwrap()).unwrap();
        assert!(distance(&y, &expected) <= 1e-14);
    }

    #[test]
    fn rows_keep_their_shape_and_other_widths_are_errors() {
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        let layer = Linear::new(3, 5, vb.clone()).unwrap();
        let x = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(layer.forward(&x(&[2, 4, 3])).unwrap().dims(), [2, 4, 5]);
        assert_eq!(layer.forward(&x(&[3])).unwrap().dims(), [5]);
        assert_eq!(layer.forward(&x(&[0, 3])).unwrap().dims(), [0, 5]);
        for wrong in [&[2, 4][..], &[]] {
            let error = layer.forward(&x(wrong)).unwrap_err().to_string();
            assert!(error.contains("3 inputs"), "{error}");
        }
        let thin = Linear::without_bias(3, 5, vb).unwrap();
        assert!(thin.bias().is_none());
        assert_eq!(thin.forward(&x(&[2, 3])).unwrap().dims(), [2, 5]);
    }

    #[test]
    fn constants_have_no_gradient_and_low_precision_is_candles() {
        let layer = Linear {
            weight: variable(&[4, 3], DType::F32).as_tensor().detach(),
            bias: Some(variable(&[4], DType::F32).as_tensor().detach()),
        };
        let x = variable(&[7, 3], DType::F32);
        let grads = layer
            .forward(&x)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        assert!(grads.get(&layer.weight).is_none() && grads.get(&x).is_some());
        let low = Linear {
            weight: layer.weight.to_dtype(DType::F16).unwrap(),
            bias: None,
        };
        let y = low.forward(&x.to_dtype(DType::F16).unwrap()).unwrap();
        assert_eq!(y.dtype(), DType::F16);
    }
}
