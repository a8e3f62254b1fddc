//! The error of an attempt of a backward step as one number: which parts of it count, and their tolerances.

use candle_core::Tensor;

use super::augmented::Augmented;
use crate::adaptive::{Adaptive, Control, Measured, Norm, OfLeaf, Rounding};
use crate::error::Result;
use crate::gradient::{AdjointNorm, AdjointTolerance, Continuous, ErrorRatios};
use crate::integrate::first_length;
use crate::ops::ratio::{measured, row_rms, rows_of, Estimated};
use crate::precision::{unit_roundoff, Roles};
use crate::time::TimeGrid;

/// The tolerance of what is solved, and of θ̄ and t̄ behind it where they are part of the error.
pub(super) struct Measure<'a> {
    norm: &'a AdjointNorm,
    worst_row: bool,
    /// Tensors of y, of y and λ, and parameters behind them.
    parts: [usize; 3],
    rtol: Vec<OfLeaf>,
    atol: Vec<OfLeaf>,
    /// u ‖b − b̂‖₂ and κ by part, where there is a floor.
    roundings: Vec<Rounding>,
    /// u by part.
    roundoffs: Vec<f64>,
    /// Zeros of θ̄ and t̄, for a norm of the user's that reads them before they are part of the error.
    sums: Vec<Tensor>,
}

/// α and β of the floor α + |h| β by part.
pub(super) type Floor = Option<Vec<(Tensor, Tensor)>>;

impl<'a> Measure<'a> {
    pub(super) fn new(
        augmented: &Augmented<'_>,
        continuous: &'a Continuous,
        adaptive: &Adaptive,
        roles: &[Roles],
        largest: f64,
    ) -> Result<Self> {
        let problem = augmented.problem;
        let points = problem.grid.points();
        let ends = TimeGrid::new(vec![points[points.len() - 1], points[0]])?;
        let control = Control::new(adaptive, &continuous.method, &ends, &[])?;
        let (shapes, state) = (problem.packing.shapes(), problem.state());
        let [of_y, absolute] = control.tolerances(shapes, state, problem.device())?;
        let scale = match continuous.tolerance {
            AdjointTolerance::Relative if largest > 0.0 => largest,
            _ => 1.0,
        };
        let scaled = |atol: &OfLeaf| -> Result<OfLeaf> {
            Ok(match atol {
                OfLeaf::Number(value) => OfLeaf::Number(value * scale),
                OfLeaf::Elements(x) => OfLeaf::Elements((x * scale)?),
            })
        };
        let adjoint = absolute.iter().map(scaled).collect::<Result<Vec<_>>>()?;
        let (mut rtol, mut atol) = (of_y.clone(), adjoint);
        let carried = match augmented.carries_y() {
            true => shapes.len(),
            false => 0,
        };
        if carried > 0 {
            rtol.extend(of_y);
            atol.splice(0..0, absolute);
        }
        let parts = [carried, roles.len(), augmented.theta.len()];
        if continuous.norm.reads_sums() {
            let sums = parts[2] + usize::from(augmented.reads_time());
            let least = [adaptive.rtol.least()?, adaptive.atol.least()? * scale];
            rtol.extend((0..sums).map(|_| OfLeaf::Number(least[0])));
            atol.extend((0..sums).map(|_| OfLeaf::Number(least[1])));
        }
        // λ is rounded to compute precision where the field sees it, multiplied by S: what is below κ/S is lost.
        let of_y = problem.scheme.roles.iter().map(|r| r.compute.roundoff());
        let unscale = match problem.scaler.is_dynamic() {
            true if largest > 0.0 => largest,
            true => 1.0,
            false => 1.0 / problem.scaler.scale(),
        };
        let of_adjoint = of_y.clone().map(|(u, least)| (u, least * unscale));
        // θ̄ and t̄ are sums of products of what the field has rounded in its lowest precision.
        let of_sums = of_adjoint
            .clone()
            .fold((0.0, 0.0), |a: (f64, f64), b| (a.0.max(b.0), a.1.max(b.1)));
        let sums = rtol.len() - parts[1];
        let precisions: Vec<_> = of_y.take(carried).chain(of_adjoint).collect();
        let all = [&precisions[..], &vec![of_sums; sums]].concat();
        let zeros = |p: &Tensor| Tensor::zeros(p.shape(), state, p.device());
        let mut zero_sums: Vec<Tensor> = vec![];
        if matches!(continuous.norm, AdjointNorm::Own(_)) && continuous.norm.reads_sums() {
            let theta = augmented.theta.iter().map(zeros);
            zero_sums = theta.collect::<candle_core::Result<_>>()?;
            if augmented.reads_time() {
                zero_sums.push(Tensor::zeros((), state, problem.device())?);
            }
        }
        let roundoff = |i: usize| match precisions.get(i) {
            Some((u, _)) => *u,
            None => unit_roundoff(state),
        };
        Ok(Self {
            norm: &continuous.norm,
            worst_row: adaptive.norm == Norm::WorstRow,
            parts,
            roundings: control.roundings(&all)?,
            roundoffs: (0..rtol.len()).map(roundoff).collect(),
            rtol,
            atol,
            sums: zero_sums,
        })
    }

    /// Whether θ̄ and t̄ are part of the error.
    pub(super) fn reads_sums(&self) -> bool {
        self.norm.reads_sums()
    }

    /// Whether they take part in the choice of the first length: at first they are zero, and so is their tolerance unless
    /// it has an absolute part.
    pub(super) fn begins_with_sums(&self) -> bool {
        let has_tolerance = |atol: &OfLeaf| matches!(atol, OfLeaf::Number(atol) if *atol > 0.0);
        self.reads_sums() && self.atol[self.parts[1]..].iter().all(has_tolerance)
    }

    /// The floor of attempts from x with first velocity k; θ̄ and t̄ behind them are zero in x: of a sum only what is
    /// added to it is in its error.
    pub(super) fn floor(&self, x: &[Tensor], k: &[Tensor]) -> Result<Floor> {
        if self.roundings.iter().all(|of| of.weight == 0.0) {
            return Ok(None);
        }
        let of = |((x, k), of): ((&Tensor, &Tensor), &Rounding)| {
            let (alpha, beta) = (row_rms(x, 0.0)?, row_rms(k, of.least)?);
            let u = of.roundoff * of.weight;
            Ok(((alpha * u)?, (beta * u)?))
        };
        let leaves = x.iter().zip(k).zip(&self.roundings).map(of);
        leaves.collect::<Result<_>>().map(Some)
    }

    /// The error as one number, with the floor and without.
    pub(super) fn norms(
        &self,
        error: &[Tensor],
        ends: [&[Tensor]; 2],
        floor: &Floor,
        h: f64,
    ) -> Result<[f64; 2]> {
        let part = |i: usize| -> Result<Estimated<'_>> {
            let floor = match floor.as_ref().and_then(|floor| floor.get(i)) {
                Some((alpha, beta)) => Some((alpha + (beta * h.abs())?)?),
                None => None,
            };
            Ok(Estimated {
                error: &error[i],
                y: ends.map(|y| &y[i]),
                rtol: &self.rtol[i],
                atol: &self.atol[i],
                floor,
                apart: None,
            })
        };
        let parts = (0..error.len()).map(part).collect::<Result<Vec<_>>>()?;
        let (state, sums) = parts.split_at(self.parts[1]);
        match self.norm {
            AdjointNorm::Own(own) => {
                let of = |with_floor| own.of(&self.ratios(&parts, with_floor)?);
                match parts.iter().any(|part| part.floor.is_some()) {
                    true => Ok([of(true)?, of(false)?]),
                    false => Ok([of(false)?; 2]),
                }
            }
            AdjointNorm::Rms => {
                let (mut squares, mut count) = ([0.0; 2], 0);
                for part in &parts {
                    let n = part.error.elem_count();
                    let norms = norms_of(std::slice::from_ref(part), false)?;
                    squares = std::array::from_fn(|i| squares[i] + n as f64 * norms[i].powi(2));
                    count += n;
                }
                Ok(squares.map(|square| (square / count.max(1) as f64).sqrt()))
            }
            AdjointNorm::Seminorm | AdjointNorm::Largest => {
                let of_state = norms_of(state, self.worst_row)?;
                let of_sums = norms_of(sums, false)?;
                Ok(std::array::from_fn(|i| of_state[i].max(of_sums[i])))
            }
        }
    }

    /// Errors relative to their tolerances, for a norm of the user's.
    fn ratios(&self, parts: &[Estimated<'_>], with_floor: bool) -> Result<ErrorRatios> {
        let ratio = |part: &Estimated<'_>| -> Result<Tensor> {
            let larger = part.y[0].abs()?.maximum(&part.y[1].abs()?)?;
            let scaled = match part.rtol {
                OfLeaf::Number(value) => (&larger * *value)?,
                OfLeaf::Elements(x) => (&larger * x)?,
            };
            let mut tolerance = match part.atol {
                OfLeaf::Number(value) => (scaled + *value)?,
                OfLeaf::Elements(x) => (scaled + x)?,
            };
            if let Some(floor) = part.floor.as_ref().filter(|_| with_floor) {
                let (rows, _) = rows_of(part.error);
                let ones = vec![1; larger.rank().saturating_sub(1)];
                let shape = if larger.rank() > 0 {
                    [&[rows], &ones[..]].concat()
                } else {
                    vec![]
                };
                let floor = floor.to_dtype(larger.dtype())?.reshape(shape)?;
                tolerance = tolerance.broadcast_add(&floor)?;
            }
            // Velocities come in compute dtype.
            let error = part.error.to_dtype(larger.dtype())?;
            // Flat: on CUDA candle chooses between tensors with dimensions only.
            let ratio = (&error / tolerance)?.flatten_all()?;
            let flat = error.flatten_all()?;
            let chosen = flat.eq(0.0)?.where_cond(&flat.zeros_like()?, &ratio)?;
            Ok(chosen.reshape(error.shape())?)
        };
        let [y, state, params] = self.parts;
        let mut all = parts.iter().map(ratio).collect::<Result<Vec<_>>>()?;
        let missing = all.len().saturating_sub(state)..;
        all.extend(self.sums.get(missing).unwrap_or_default().iter().cloned());
        let behind = all.get(state..).unwrap_or_default();
        Ok(ErrorRatios {
            y: all[..y].to_vec(),
            adjoint: all[y..state.min(all.len())].to_vec(),
            params: behind.iter().take(params).cloned().collect(),
            time: behind.get(params).cloned(),
        })
    }

    /// The length of the first attempt from x with first velocity k; `probe` evaluates after an Euler step.
    pub(super) fn first_length(
        &self,
        control: &Control,
        x: &[Tensor],
        k: &[Tensor],
        probe: impl FnOnce(f64) -> Result<Vec<Tensor>>,
    ) -> Result<f64> {
        let norm = |error: &[Tensor]| Ok(self.norms(error, [x, x], &None, 0.0)?[0]);
        first_length(control, norm, (x, k, &self.roundoffs), probe)
    }
}

/// The largest norm of these parts, with the floor and without; zero of none.
fn norms_of(parts: &[Estimated<'_>], worst_row: bool) -> Result<[f64; 2]> {
    if parts.is_empty() {
        return Ok([0.0; 2]);
    }
    let Measured { r, plain, .. } = measured(parts, worst_row)?;
    Ok([r, plain])
}
