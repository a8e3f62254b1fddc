//! What an attempt is measured by: its error estimate relative to the tolerance, the noise floor, which is an upper bound of
//! the part of the estimate that rounding causes, and how far its stages are apart.

use candle_core::{DType, Shape, Tensor};

use crate::adaptive::{ratio, Control, Measured, Norm, OfLeaf, Rounding};
use crate::error::{Result, Worst};
use crate::field::Field;
use crate::offer::Offered;
use crate::ops::ratio::{measured, row_rms, rows_of, Apart, Estimated};
use crate::problem::Problem;

/// The tolerance of a solve.
pub(super) struct Estimate {
    rtol: Vec<OfLeaf>,
    atol: Vec<OfLeaf>,
    worst_row: bool,
    /// By leaf.
    roundings: Vec<Rounding>,
    /// How many tensors, the first ones, act on the velocity; the stages of the others are not compared.
    acting: usize,
}

/// α and β of what rounding makes of a stage, α + |h| β, by leaf and row.
pub(super) type RoundedStages = Vec<(Tensor, Tensor)>;

/// What an attempt of length h is measured by.
pub(super) struct Measures<'a> {
    pub(super) h: f64,
    pub(super) error: &'a [Tensor],
    /// The state at both ends.
    pub(super) y: [&'a [Tensor]; 2],
    /// The differences of stages, h Σ d_i k_i and Σ d_i Y_i, where they are compared.
    pub(super) apart: Option<[&'a [Tensor]; 2]>,
}

impl Estimate {
    pub(super) fn new(problem: &Problem, control: &Control, field: &Field<'_>) -> Result<Self> {
        let (shapes, state) = (problem.packing.shapes(), problem.state());
        let [rtol, atol] = control.tolerances(shapes, state, problem.device())?;
        let roles = problem.scheme.roles.iter();
        let precisions: Vec<_> = roles.map(|r| r.compute.roundoff()).collect();
        Ok(Self {
            rtol,
            atol,
            worst_row: control.options.norm == Norm::WorstRow,
            roundings: control.roundings(&precisions)?,
            acting: acting(field, shapes),
        })
    }

    /// What rounding makes of stages of attempts from y with first velocity k.
    pub(super) fn rounded(&self, y: &[Tensor], k: &[Tensor]) -> Result<RoundedStages> {
        let leaves = y.iter().zip(k).zip(&self.roundings);
        let of_leaf = |((y, k), of): ((&Tensor, &Tensor), &Rounding)| {
            let (alpha, beta) = (row_rms(y, 0.0)?, row_rms(k, of.least)?);
            Ok(((alpha * of.roundoff)?, (beta * of.roundoff)?))
        };
        leaves.map(of_leaf).collect()
    }

    /// What an attempt is measured to be, relative to the tolerance at both its ends.
    pub(super) fn measured(&self, of: &Measures<'_>, rounded: &RoundedStages) -> Result<Measured> {
        let leaf = |leaf: usize| -> Result<Estimated<'_>> {
            let (mut floor, mut apart) = (None, None);
            let weight = self.roundings[leaf].weight;
            let rounding = |(alpha, beta): &(Tensor, Tensor)| alpha + (beta * of.h.abs())?;
            if let Some(rounding) = rounded.get(leaf).map(rounding).transpose()? {
                floor = (weight > 0.0).then(|| &rounding * weight).transpose()?;
                let compared = of.apart.filter(|_| leaf < self.acting);
                apart = compared.map(|stages| Apart {
                    stages: stages.map(|x| &x[leaf]),
                    rounding,
                });
            }
            Ok(Estimated {
                error: &of.error[leaf],
                y: of.y.map(|y| &y[leaf]),
                rtol: &self.rtol[leaf],
                atol: &self.atol[leaf],
                floor,
                apart,
            })
        };
        let leaves = (0..of.error.len()).map(leaf).collect::<Result<Vec<_>>>()?;
        measured(&leaves, self.worst_row)
    }

    /// As [`first_length`] in the norm of the tolerance.
    pub(super) fn first_length(
        &self,
        control: &Control,
        y: &[Tensor],
        k: &[Tensor],
        probe: impl FnOnce(f64) -> Result<Vec<Tensor>>,
    ) -> Result<f64> {
        let norm = |x: &[Tensor]| {
            let of = Measures {
                h: 0.0,
                error: x,
                y: [y, y],
                apart: None,
            };
            Ok(self.measured(&of, &vec![])?.r)
        };
        let roundoffs: Vec<_> = self.roundings.iter().map(|of| of.roundoff).collect();
        first_length(control, norm, (y, k, &roundoffs), probe)
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

/// How many tensors of a state act on the velocity.  Of the library's fields with rows, which know it, only the first does.
fn acting(field: &Field<'_>, shapes: &[Shape]) -> usize {
    let rows = Offered::from(field.offer()).and_then(|offered| offered.rows);
    match rows.and_then(|rows| rows.layout(shapes)) {
        Some(_) => 1,
        None => shapes.len(),
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
