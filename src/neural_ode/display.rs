//! What a neural ODE is, in a line.

use std::fmt;
use std::sync::atomic::Ordering;

use candle_core::DType;

use super::NeuralOde;
use crate::adaptive::Tolerance;
use crate::schedule::Steps;
use crate::state::State;

/// Method, steps, precision, parameters, and the evaluations of the last solve.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, Mlp};
/// use candle_diffeq::{NeuralOde, Precision};
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::new(&vars, "f", &Device::Cpu, |vb| {
///     Mlp::new(&[2, 64, 2], Activation::Tanh, vb)
/// })?
/// .precision(Precision::bf16());
/// let text = "NeuralOde: rk4, fixed steps; computes in bf16, sums in f32; 4 parameters, 322 numbers";
/// assert_eq!(ode.to_string(), text);
/// ode.solve(&Tensor::ones((8, 2), DType::F32, &Device::Cpu)?, &[0.0, 0.5, 1.0])?;
/// assert_eq!(ode.to_string(), format!("{text}; 8 evaluations in the last solve"));
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
impl<S: State + 'static, A: State + 'static> fmt::Display for NeuralOde<S, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NeuralOde: {}, ", self.options.method.name())?;
        match &self.options.steps {
            Steps::Adaptive(adaptive) => {
                let [rtol, atol] = [&adaptive.rtol, &adaptive.atol].map(tolerance);
                write!(f, "adaptive steps, rtol {rtol}, atol {atol}")?;
            }
            _ => write!(f, "fixed steps")?,
        }
        match self.options.precision {
            Some(p) => {
                let with = if p.compensated {
                    " with compensation"
                } else {
                    ""
                };
                let [compute, state] = [p.compute, p.state].map(name);
                write!(f, "; computes in {compute}, sums in {state}{with}")?;
            }
            None => write!(f, "; computes in the dtype of its state")?,
        }
        let numbers: usize = match self.masters() {
            Ok(masters) => masters.iter().map(|var| var.elem_count()).sum(),
            // A variable has been taken out of the map.
            Err(_) => 0,
        };
        let parameters = self.names.len();
        write!(f, "; {parameters} parameters, {numbers} numbers")?;
        match self.last.load(Ordering::Relaxed) {
            0 => Ok(()),
            last => write!(f, "; {last} evaluations in the last solve"),
        }
    }
}

fn name(dtype: DType) -> &'static str {
    dtype.as_str()
}

fn tolerance(of: &Tolerance) -> String {
    match of {
        Tolerance::All(all) => format!("{all:e}"),
        Tolerance::ByLeaf(leaves) => format!("{leaves:?}"),
        Tolerance::ByElement(_) => "by element".to_owned(),
    }
}
