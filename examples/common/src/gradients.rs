//! Gradients of all variables together.

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};

/// ‖∇L‖ over all of `vars`, in whatever order they come: a `VarMap` has another one in every run.
pub fn norm(grads: &GradStore, vars: &[Var]) -> Result<f64> {
    let grads = vars.iter().filter_map(|var| grads.get(var));
    let square = |grad: &Tensor| {
        let grad = grad.detach().to_dtype(DType::F64)?;
        grad.sqr()?.sum_all()?.to_scalar::<f64>()
    };
    let mut squares = grads.map(square).collect::<Result<Vec<_>>>()?;
    squares.sort_by(f64::total_cmp);
    Ok(squares.iter().sum::<f64>().sqrt())
}

/// Scales gradients down to a norm of `limit` where theirs is larger; returns what it was.
pub fn clip(grads: &mut GradStore, vars: &[Var], limit: f64) -> Result<f64> {
    let norm = norm(grads, vars)?;
    if norm > limit {
        for var in vars {
            if let Some(grad) = grads.remove(var) {
                grads.insert(var, (grad.detach() * (limit / norm))?);
            }
        }
    }
    Ok(norm)
}

/// One after the other as numbers; zeros where there is none.
pub fn flat(grads: &GradStore, vars: &[Var]) -> Result<Vec<f64>> {
    let of = |var: &Var| match grads.get(var) {
        Some(grad) => super::values(grad),
        None => super::values(&Tensor::zeros_like(var)?),
    };
    Ok(vars.iter().map(of).collect::<Result<Vec<_>>>()?.concat())
}
