//! Sums over rows and pixels of low precision are made in f32, and functions of low precision are right to a rounding.
//!
//! `cargo test --release --test wide_sums`, a second.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::fields::check_field;
use candle_diffeq::nn::{depth_cat, Activation, ConvField, RowLoss};
use candle_diffeq::{Time, VectorField};
use candle_nn::{VarBuilder, VarMap};
use common::{relative, scattered, values, U_BF16, U_F16};

/// So many ones that their sum in bf16 or f16 does not grow any more.
const MANY: usize = 4096;

fn ones(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::ones(shape, dtype, &Device::Cpu).unwrap()
}

#[test]
fn gradients_of_the_biases_of_a_convolution_are_sums_in_f32() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F16, &Device::Cpu);
    let field = ConvField::new(&[1, 1], 1, Activation::Tanh, vb).unwrap();
    let x = ones(&[1, 1, 64, 64], DType::F16);
    let time = Time::new(0.0, DType::F32, &Device::Cpu);
    let (_, pull) = field.vjp(&time, &x).unwrap();
    let pulled = pull(&x).unwrap();
    for (name, var) in vars.data().lock().unwrap().iter() {
        if name.contains("bias") {
            let grad = values(pulled.params.get(var).unwrap());
            assert_eq!(grad, [MANY as f64], "{name}");
        }
    }
    // And those that candle traces.
    let k = field.velocity(&time, &x).unwrap();
    let grads = k.sum_all().unwrap().backward().unwrap();
    for (name, var) in vars.data().lock().unwrap().iter() {
        if name.contains("bias") {
            assert_eq!(values(grads.get(var).unwrap()), [MANY as f64], "{name}");
        }
    }
}

#[test]
fn the_gradient_of_the_time_beside_many_rows_is_a_sum_in_its_own_dtype() {
    let x = ones(&[MANY, 2], DType::BF16);
    let time = Time::differentiable(0.5, DType::F32, &Device::Cpu);
    let joined = depth_cat(&time, &x, 1).unwrap();
    let grads = joined.sum_all().unwrap().backward().unwrap();
    let grad = grads.get(&time.tensor().unwrap()).unwrap();
    assert_eq!(values(grad), [MANY as f64]);
}

#[test]
fn a_loss_of_low_precision_is_that_of_f32_rounded_once() {
    for (dtype, u) in [(DType::BF16, U_BF16), (DType::F16, U_F16)] {
        let y = scattered(&[MANY, 4], 6.0, 1).to_dtype(dtype).unwrap();
        let wide = y.to_dtype(DType::F32).unwrap();
        let zeros = wide.zeros_like().unwrap();
        let classes = Tensor::zeros(MANY, DType::U32, &Device::Cpu).unwrap();
        for loss in [
            RowLoss::MeanSquaredError(zeros),
            RowLoss::GaussianNll,
            RowLoss::CrossEntropy(classes),
        ] {
            let got = loss.of(&y).unwrap();
            assert_eq!(got.dtype(), dtype);
            let error = relative(&got, &loss.of(&wide).unwrap());
            assert!(error <= u, "{loss:?} {dtype:?}: {error:e}");
        }
    }
}

#[test]
fn activations_of_low_precision_are_right_where_they_are_small_and_at_the_ends() {
    for dtype in [DType::BF16, DType::F16] {
        let u = if dtype == DType::F16 { U_F16 } else { U_BF16 };
        let x = Tensor::new(&[-8f32, -6.0, -4.0, -1.0, 3.0], &Device::Cpu).unwrap();
        let x = Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap();
        // Tracked, so that it is computed by candle's operations.
        let got = values(&Activation::Softplus.forward(x.as_tensor()).unwrap());
        for (got, x) in got.iter().zip(values(&x)) {
            let exact = x.exp().ln_1p();
            assert!(
                (got - exact).abs() <= 2.0 * u * exact,
                "{dtype:?} {x}: {got}"
            );
        }
        let ends = Tensor::new(&[-200f32, 200.0], &Device::Cpu).unwrap();
        let ends = Var::from_tensor(&ends.to_dtype(dtype).unwrap()).unwrap();
        for activation in [Activation::Silu, Activation::Gelu] {
            let value = activation.forward(ends.as_tensor()).unwrap();
            let grads = value.sum_all().unwrap().backward().unwrap();
            assert_eq!(
                values(grads.get(&ends).unwrap()),
                [0.0, 1.0],
                "{activation:?}"
            );
            assert_eq!(values(&value), [0.0, 200.0], "{activation:?}");
        }
    }
}

#[test]
fn a_field_is_checked_with_the_time_that_a_solve_would_show() {
    let omega = Tensor::new(2f32, &Device::Cpu).unwrap();
    let field = |t: &Time, y: &Tensor| {
        let coefficient = (t.tensor()? * &omega)?.cos()?;
        y.broadcast_mul(&coefficient.to_dtype(y.dtype())?)
    };
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let y = scattered(&[3, 2], 1.0, 1).to_dtype(dtype).unwrap();
        check_field(&field, 1.003, &y).unwrap();
    }
}

#[test]
fn an_empty_part_of_a_tensor_has_activations() {
    for dtype in [DType::BF16, DType::F32] {
        let all = Var::from_tensor(&Tensor::zeros((0, 4), dtype, &Device::Cpu).unwrap()).unwrap();
        let part = all.narrow(1, 2, 2).unwrap();
        for activation in Activation::ALL {
            let value = activation.forward(&part).unwrap();
            assert_eq!(value.dims(), [0, 2], "{activation:?}");
            assert_eq!(value.dtype(), dtype);
        }
    }
}
