//! What rampde reached on the same problem: its authors' figures (its repository at 21bedcf,
//! 2025-02-12, then named torchmpnode; MIT), for states in f32.

use common::dtype::Dtype;
use common::Result;

/// dtype_f, dtype_y, method, package, n_steps, and relative errors of y(T), ∂L/∂y0, ∂L/∂A.
const FIGURES: &str = include_str!("rampde.csv");

/// Errors by number of steps.
pub(crate) fn errors(method: &str, dtype: Dtype) -> Result<Vec<(usize, [f64; 3])>> {
    let compute = match dtype {
        Dtype::F16 => "torch.float16",
        Dtype::Bf16 => "torch.bfloat16",
        Dtype::F32 | Dtype::F64 => return Ok(vec![]),
    };
    let mut found = vec![];
    for line in FIGURES.lines().skip(1) {
        let cells: Vec<&str> = line.split(',').collect();
        let &[f, _, of, _, steps, y, y0, a] = cells.as_slice() else {
            return Err(format!("rampde.csv: `{line}` has not eight cells").into());
        };
        if (f, of) == (compute, method) {
            found.push((steps.parse()?, [y.parse()?, y0.parse()?, a.parse()?]));
        }
    }
    Ok(found)
}
