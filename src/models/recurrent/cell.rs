//! Recurrent cells: a hidden state and an observation give the next state.

use candle_core::{DType, Device, Module, Result, Tensor, D};
use candle_nn::VarBuilder;

use crate::nn::{Activation, Linear};

/// A hidden state.
#[derive(Clone, Debug)]
pub struct Hidden {
    /// What flows between observations and what is read, `(rows, hidden)`.
    pub h: Tensor,
    /// What stands still between them: the memory c of an LSTM, `(rows, hidden)`.
    pub still: Option<Tensor>,
}

impl Hidden {
    /// This where `seen` `(rows, 1)` is 1, and what was before where it is 0.
    pub(super) fn where_seen(&self, seen: &Tensor, before: &Self) -> Result<Self> {
        let seen = seen.to_dtype(self.h.dtype())?;
        let mixed = |new: &Tensor, old: &Tensor| old + (new - old)?.broadcast_mul(&seen)?;
        let still = self.still.as_ref().zip(before.still.as_ref());
        Ok(Self {
            h: mixed(&self.h, &before.h)?,
            still: still.map(|(new, old)| mixed(new, old)).transpose()?,
        })
    }
}

/// A recurrent cell.
pub trait Cell {
    /// The state before the first observation.
    ///
    /// # Errors
    /// Of candle's operations.
    fn start(&self, rows: usize, dtype: DType, device: &Device) -> Result<Hidden>;

    /// The state after an observation x `(rows, features)`.
    ///
    /// # Errors
    /// If x has other features; of candle's operations.
    fn update(&self, x: &Tensor, before: &Hidden) -> Result<Hidden>;
}

/// Layers of x and of h into so many parts of the size of h.
#[derive(Clone, Debug)]
struct Layers {
    of_x: Linear,
    of_h: Linear,
    hidden: usize,
}

impl Layers {
    fn new(inputs: usize, hidden: usize, parts: usize, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            of_x: Linear::new(inputs, parts * hidden, vb.pp("x"))?,
            of_h: Linear::new(hidden, parts * hidden, vb.pp("h"))?,
            hidden,
        })
    }

    /// Part i of a layer's result.
    fn part(&self, whole: &Tensor, i: usize) -> Result<Tensor> {
        whole.narrow(D::Minus1, i * self.hidden, self.hidden)
    }

    fn zeros(&self, rows: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        Tensor::zeros((rows, self.hidden), dtype, device)
    }
}

/// h ← tanh(W x + U h + b).
#[derive(Clone, Debug)]
pub struct RnnCell(Layers);

impl RnnCell {
    /// From so many features to a state of so many; variables `x` and `h`, each with a `weight` and a `bias`.
    ///
    /// # Errors
    /// Of the builder.
    pub fn new(inputs: usize, hidden: usize, vb: VarBuilder<'_>) -> Result<Self> {
        Layers::new(inputs, hidden, 1, vb).map(Self)
    }
}

impl Cell for RnnCell {
    fn start(&self, rows: usize, dtype: DType, device: &Device) -> Result<Hidden> {
        let h = self.0.zeros(rows, dtype, device)?;
        Ok(Hidden { h, still: None })
    }

    fn update(&self, x: &Tensor, before: &Hidden) -> Result<Hidden> {
        let sum = (self.0.of_x.forward(x)? + self.0.of_h.forward(&before.h)?)?;
        Ok(Hidden {
            h: Activation::Tanh.forward(&sum)?,
            still: None,
        })
    }
}

/// h ← (1 − z) ∘ n + z ∘ h with n = tanh(W x + b + r ∘ (U h + c)) and gates r, z.
#[derive(Clone, Debug)]
pub struct GruCell(Layers);

impl GruCell {
    /// From so many features to a state of so many; variables `x` and `h`, each with a `weight` and a `bias` of r, z and n.
    ///
    /// # Errors
    /// Of the builder.
    pub fn new(inputs: usize, hidden: usize, vb: VarBuilder<'_>) -> Result<Self> {
        Layers::new(inputs, hidden, 3, vb).map(Self)
    }
}

impl Cell for GruCell {
    fn start(&self, rows: usize, dtype: DType, device: &Device) -> Result<Hidden> {
        let h = self.0.zeros(rows, dtype, device)?;
        Ok(Hidden { h, still: None })
    }

    fn update(&self, x: &Tensor, before: &Hidden) -> Result<Hidden> {
        let layers = &self.0;
        let (of_x, of_h) = (layers.of_x.forward(x)?, layers.of_h.forward(&before.h)?);
        let sum = |i: usize| layers.part(&of_x, i)? + layers.part(&of_h, i)?;
        let r = Activation::Sigmoid.forward(&sum(0)?)?;
        let z = Activation::Sigmoid.forward(&sum(1)?)?;
        let n = (layers.part(&of_x, 2)? + (r * layers.part(&of_h, 2)?)?)?;
        let n = Activation::Tanh.forward(&n)?;
        // n + z ∘ (h − n).
        let h = (&n + (z * (&before.h - &n)?)?)?;
        Ok(Hidden { h, still: None })
    }
}

/// A memory c with three gates; c stands still between observations.  With z = W x + b + U h + d, whose four parts of the size
/// of h are z_i, z_f, z_g and z_o in this order,
///
/// i = σ(z_i), f = σ(z_f + 1), g = tanh(z_g), o = σ(z_o),
///
/// c ← f ∘ c + i ∘ g, h ← o ∘ tanh(c).
///
/// The gate f has one added to its bias in every update, so that the memory begins by remembering (R. Jozefowicz,
/// W. Zaremba, I. Sutskever, "An empirical exploration of recurrent network architectures", ICML 2015).  Weights of an LSTM
/// that does not add it are those of this one if 1 is subtracted from their second part of b or of d.
#[derive(Clone, Debug)]
pub struct LstmCell(Layers);

impl LstmCell {
    /// From so many features to a state of so many; variables `x.weight` (W), `x.bias` (b), `h.weight` (U) and `h.bias` (d),
    /// each with four parts one below the other: of i, f, g and o.
    ///
    /// # Errors
    /// Of the builder.
    pub fn new(inputs: usize, hidden: usize, vb: VarBuilder<'_>) -> Result<Self> {
        Layers::new(inputs, hidden, 4, vb).map(Self)
    }
}

impl Cell for LstmCell {
    fn start(&self, rows: usize, dtype: DType, device: &Device) -> Result<Hidden> {
        let h = self.0.zeros(rows, dtype, device)?;
        let still = Some(h.clone());
        Ok(Hidden { h, still })
    }

    fn update(&self, x: &Tensor, before: &Hidden) -> Result<Hidden> {
        let layers = &self.0;
        let sum = (layers.of_x.forward(x)? + layers.of_h.forward(&before.h)?)?;
        let gate = |i: usize, by: Activation| by.forward(&layers.part(&sum, i)?);
        let forget = Activation::Sigmoid.forward(&(layers.part(&sum, 1)? + 1.0)?)?;
        let new = (gate(0, Activation::Sigmoid)? * gate(2, Activation::Tanh)?)?;
        let c = match &before.still {
            Some(c) => ((forget * c)? + new)?,
            None => new,
        };
        let h = (gate(3, Activation::Sigmoid)? * Activation::Tanh.forward(&c)?)?;
        Ok(Hidden { h, still: Some(c) })
    }
}
