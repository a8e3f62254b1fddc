//! The error estimate of an attempt relative to the tolerance, and the noise floor: an upper bound of the part of the
//! estimate that rounding causes.

use candle_core::{DType, Tensor};

use crate::adaptive::{ratio, Control, Norm, OfLeaf};
use crate::error::{Result, Worst};
use crate::ops::ratio::{error_norms, row_rms, rows_of, Estimated};
use crate::problem::Problem;

/// The tolerance of a solve.
pub(super) struct Estimate {
    rtol: Vec<OfLeaf>,
    atol: Vec<OfLeaf>,
    worst_row: bool,
    /// u ‖b − b̂‖₂ and κ by leaf, where there is a floor.
    noise: Option<Vec<(f64, f64)>>,
    /// u by leaf.
    roundoffs: Vec<f64>,
}

/// α and β of the floor α + |h| β, by leaf and row.
pub(super) type Floor = Option<Vec<(Tensor, Tensor)>>;

impl Estimate {
    pub(super) fn new(problem: &Problem, control: &Control) -> Result<Self> {
        let (shapes, state) = (problem.packing.shapes(), problem.state());
        let [rtol, atol] = control.tolerances(shapes, state, problem.device())?;
        let roles = problem.scheme.roles.iter();
        let precisions: Vec<_> = roles.map(|r| r.compute.roundoff()).collect();
        Ok(Self {
            rtol,
            atol,
            worst_row: control.options.norm == Norm::WorstRow,
            noise: control.noise(&precisions)?,
            roundoffs: precisions.iter().map(|(u, _)| *u).collect(),
        })
    }

    /// The floor of attempts from y with first velocity k.
    pub(super) fn floor(&self, y: &[Tensor], k: &[Tensor]) -> Result<Floor> {
        let Some(noise) = &self.noise else {
            return Ok(None);
        };
        let leaves = y.iter().zip(k).zip(noise);
        let of_leaf = |((y, k), (u, least)): ((&Tensor, &Tensor), &(f64, f64))| {
            let (alpha, beta) = (row_rms(y, 0.0)?, row_rms(k, *least)?);
            Ok(((alpha * *u)?, (beta * *u)?))
        };
        leaves.map(of_leaf).collect::<Result<_>>().map(Some)
    }

    /// The norms of an error relative to the tolerance at y and y⁺, with the floor and without.
    pub(super) fn norms(
        &self,
        error: &[Tensor],
        y: [&[Tensor]; 2],
        floor: &Floor,
        h: f64,
    ) -> Result<[f64; 2]> {
        let leaf = |leaf: usize| -> Result<Estimated<'_>> {
            let floor = match floor {
                Some(floor) => {
                    let (alpha, beta) = &floor[leaf];
                    Some((alpha + (beta * h.abs())?)?)
                }
                None => None,
            };
            Ok(Estimated {
                error: &error[leaf],
                y: y.map(|y| &y[leaf]),
                rtol: &self.rtol[leaf],
                atol: &self.atol[leaf],
                floor,
            })
        };
        let leaves = (0..error.len()).map(leaf).collect::<Result<Vec<_>>>()?;
        error_norms(&leaves, self.worst_row)
    }

    /// As [`first_length`] in the norm of the tolerance.
    pub(super) fn first_length(
        &self,
        control: &Control,
        y: &[Tensor],
        k: &[Tensor],
        probe: impl FnOnce(f64) -> Result<Vec<Tensor>>,
    ) -> Result<f64> {
        let norm = |x: &[Tensor]| Ok(self.norms(x, [y, y], &None, 0.0)?[0]);
        first_length(control, norm, (y, k, &self.roundoffs), probe)
    }

    /// The element whose error is largest.
    pub(super) fn worst(&self, error: &[Tensor], y: [&[Tensor]; 2]) -> Result<Option<Worst>> {
        let numbers = |x: &Tensor| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let mut worst = None;
        let mut largest = -1.0;
        for (leaf, error) in error.iter().enumerate() {
            let tolerance = |tolerance: &OfLeaf| match tolerance {
                OfLeaf::Number(value) => Ok(vec![*value; error.elem_count()]),
                OfLeaf::Elements(x) => numbers(x),
            };
            let (rtol, atol) = (tolerance(&self.rtol[leaf])?, tolerance(&self.atol[leaf])?);
            let (y0, y1) = (numbers(&y[0][leaf])?, numbers(&y[1][leaf])?);
            let features = rows_of(error).1.max(1);
            for (i, e) in numbers(error)?.into_iter().enumerate() {
                let ratio = ratio(e, atol[i] + rtol[i] * y0[i].abs().max(y1[i].abs()));
                if ratio > largest {
                    largest = ratio;
                    worst = Some(Worst {
                        leaf,
                        row: i / features,
                        index: i % features,
                    });
                }
            }
        }
        Ok(worst)
    }
}

/// The length of the first attempt from y with first velocity k, in a norm relative to the tolerance: `probe` evaluates
/// the field after an explicit Euler step of a length (Hairer, Nørsett & Wanner I, §II.4).  The part of the difference
/// that can be rounding, with unit roundoffs by tensor, is left out.
pub(crate) fn first_length(
    control: &Control,
    norm: impl Fn(&[Tensor]) -> Result<f64>,
    (y, k, roundoffs): (&[Tensor], &[Tensor], &[f64]),
    probe: impl FnOnce(f64) -> Result<Vec<Tensor>>,
) -> Result<f64> {
    // Velocities come in compute dtype.
    let wide = |x: &Tensor| -> Result<Tensor> { Ok(x.to_dtype(y[0].dtype())?) };
    let k = k.iter().map(wide).collect::<Result<Vec<_>>>()?;
    let (d0, d1) = (norm(y)?, norm(&k)?);
    let most = control.longest();
    let length = control.probe(d0, d1).min(most);
    let further = probe(control.direction * length)?;
    let difference = |((a, b), u): ((&Tensor, &Tensor), &f64)| -> Result<Tensor> {
        let noise = (a.abs()? * (2.0 * u))?;
        let change = ((wide(b)? - a)?.abs()? - noise)?;
        let zero = Tensor::zeros((), change.dtype(), change.device())?;
        // A maximum may skip NaN, a sum does not.
        Ok((change.broadcast_maximum(&zero)? + (&change * 0.0)?)?)
    };
    let pairs = k.iter().zip(&further).zip(roundoffs);
    let difference = pairs.map(difference).collect::<Result<Vec<_>>>()?;
    let d2 = norm(&difference)? / length;
    let h = control.first_length(length, d1, d2);
    Ok(if h.is_finite() && h > 0.0 {
        h.min(most)
    } else {
        length
    })
}
