//! A gated recurrent unit in continuous time.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::linear::{affine, matmul, sum_of_rows, transposed_matmul};
use super::{add_gradient, wrong_state, Activation, Linear};
use crate::field::{Cotangents, Pullback, VectorField};
use crate::time::Time;

/// h' = (1 − z) ∘ (u − h) with r = σ(W_r h + b_r), z = σ(W_z h + b_z), u = tanh(W_u (r ∘ h) + b_u).
///
/// It is what a gated recurrent unit without inputs does in a small time; h stays between −1 and 1 where it begins there
/// (E. De Brouwer and others, "GRU-ODE-Bayes", NeurIPS 2019, equation 3).  h: `(…, features)`.  The pull-back is written by
/// hand.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::GruField;
/// use candle_diffeq::NeuralOde;
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, |vb| GruField::new(16, vb))?;
/// let hs = ode.solve(&Tensor::zeros((8, 16), DType::F32, &Device::Cpu)?, &[0.0, 0.5, 1.0])?;
/// assert_eq!(hs.dims(), [3, 8, 16]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GruField {
    /// Of r, z and u.
    gates: [Linear; 3],
}

/// One evaluation.
struct Pass {
    h: Tensor,
    /// r, z and u.
    values: [Tensor; 3],
    /// r ∘ h.
    reset: Tensor,
    k: Tensor,
}

impl GruField {
    /// So many features; variables `r`, `z` and `u`, each with a `weight` and a `bias`, initialised as those of
    /// [`candle_nn::linear()`].
    ///
    /// # Errors
    /// Those of the builder.
    pub fn new(features: usize, vb: VarBuilder<'_>) -> Result<Self> {
        let gate = |name: &str| Linear::new(features, features, vb.pp(name));
        Self::of([gate("r")?, gate("z")?, gate("u")?])
    }

    /// The same without biases, as the authors have it.
    ///
    /// # Errors
    /// Those of the builder.
    pub fn without_bias(features: usize, vb: VarBuilder<'_>) -> Result<Self> {
        let gate = |name: &str| Linear::without_bias(features, features, vb.pp(name));
        Self::of([gate("r")?, gate("z")?, gate("u")?])
    }

    /// Layers of r, z and u that exist, with biases or without.
    ///
    /// # Errors
    /// If their weights are not square and of one size.
    pub fn of(gates: [Linear; 3]) -> Result<Self> {
        let features = gates[0].weight.dims().first().copied().unwrap_or(0);
        let fits = |gate: &Linear| {
            let bias = gate.bias.as_ref();
            gate.weight.dims() == [features; 2] && bias.is_none_or(|b| b.dims() == [features])
        };
        if !gates.iter().all(fits) {
            let dims: Vec<_> = gates.iter().map(|g| g.weight.dims()).collect();
            candle_core::bail!(
                "the layers of a GruField must be square and of one size, got weights {dims:?}"
            )
        }
        Ok(Self { gates })
    }

    /// Numbers of a row of h.
    pub fn features(&self) -> usize {
        self.gates[0].weight.dims()[0]
    }

    fn pass(&self, h: &Tensor, history: bool) -> Result<Pass> {
        if h.dims().last() != Some(&self.features()) {
            let field = format!("a GruField of {} features", self.features());
            return Err(wrong_state(
                field,
                format!("h (…, {})", self.features()),
                &[h],
            ));
        }
        let h = h.reshape(((), self.features()))?;
        let plain = |x: &Tensor| match history {
            true => x.to_dtype(h.dtype()),
            false => x.detach().to_dtype(h.dtype()),
        };
        let gate = |i: usize, x: &Tensor, activation: Activation| {
            let bias = self.gates[i].bias.as_ref().map(plain).transpose()?;
            let x = affine(x, &plain(&self.gates[i].weight)?, bias.as_ref())?;
            activation.forward(&x)
        };
        let r = gate(0, &h, Activation::Sigmoid)?;
        let z = gate(1, &h, Activation::Sigmoid)?;
        let reset = (&r * &h)?;
        let u = gate(2, &reset, Activation::Tanh)?;
        let k = ((1.0 - &z)? * (&u - &h)?)?;
        Ok(Pass {
            h,
            values: [r, z, u],
            reset,
            k,
        })
    }

    /// vᵀ∂f of an evaluation.
    fn pulled(&self, pass: &Pass, v: &Tensor) -> Result<Cotangents<Tensor>> {
        let Pass {
            h,
            values: [r, z, u],
            reset,
            ..
        } = pass;
        let shape = v.shape().clone();
        let v = v.detach().reshape(h.shape())?;
        let weight = |i: usize| self.gates[i].weight.detach().to_dtype(v.dtype());
        let through = (&v * (1.0 - z)?)?;
        let of_u = (&through * (1.0 - u.sqr()?)?)?;
        let of_reset = matmul(&of_u, &weight(2)?)?;
        let of_r = ((&of_reset * h)? * (r * (1.0 - r)?)?)?;
        let of_z = ((&v * (h - u)?)? * (z * (1.0 - z)?)?)?;
        let of_h = ((&of_reset * r)? - through)?;
        let of_h = (of_h + matmul(&of_r, &weight(0)?)?)?;
        let of_h = (of_h + matmul(&of_z, &weight(1)?)?)?;
        let mut cotangents = Cotangents::of_state(of_h.reshape(shape)?);
        let gates = self.gates.iter().zip([(of_r, h), (of_z, h), (of_u, reset)]);
        for (gate, (delta, read)) in gates {
            if gate.weight.track_op() {
                let product = transposed_matmul(&delta, read)?;
                add_gradient(&mut cotangents.params, &gate.weight, product)?;
            }
            if let Some(bias) = gate.bias.as_ref().filter(|b| b.track_op()) {
                add_gradient(&mut cotangents.params, bias, sum_of_rows(&delta)?)?;
            }
        }
        Ok(cotangents)
    }
}

impl VectorField<Tensor> for GruField {
    fn velocity(&self, _: &Time, h: &Tensor) -> Result<Tensor> {
        self.pass(h, true)?.k.reshape(h.shape())
    }

    fn vjp<'f>(&'f self, _: &Time, h: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        let pass = self.pass(&h.detach(), false)?;
        let k = pass.k.reshape(h.shape())?;
        let pull = move |v: &Tensor| self.pulled(&pass, v);
        Ok((k, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let all = self.gates.iter();
        let all = all.flat_map(|g| std::iter::once(&g.weight).chain(&g.bias));
        Some(all.filter(|p| p.track_op()).cloned().collect())
    }
}
