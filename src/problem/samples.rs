//! A problem that is driven by noise, and several samples of each initial state.

use std::sync::Arc;

use candle_core::{Shape, Tensor};

use super::{Plan, Problem};
use crate::driven::{Drive, Driven};
use crate::error::{Error, Result, SdeDefect};
use crate::state::Packing;

impl Problem {
    /// The same problem driven by noise.
    pub(crate) fn driven_by(self, drive: Drive) -> Result<Self> {
        if self.scheme.compensated {
            return Err(Error::Sde(SdeDefect::Compensated));
        }
        let samples = drive.samples;
        let rows = self
            .given
            .shapes()
            .first()
            .map_or(0, |y| y.dims().first().map_or(0, |n| *n));
        drive.check_samples(rows, self.given.len() * self.state().size_in_bytes())?;
        let packing = self.given.repeated(samples);
        let y0 = (packing.shapes(), self.scheme.roles.as_slice());
        let schedule = self.plan.known().map(|schedule| &**schedule);
        let driven = Driven::new(drive, y0, (&self.grid, schedule), self.device())?;
        let plan = match (&self.plan, driven.embedded()) {
            (Plan::Adaptive(control), Some(embedded)) => {
                let pair = (embedded.order, embedded.weights());
                Plan::Adaptive(Arc::new(control.estimating(pair)))
            }
            (plan, _) => plan.clone(),
        };
        Ok(Self {
            packing,
            samples,
            driven: Some(Arc::new(driven)),
            // Tiles take steps that are known.
            fusion: self.fusion && matches!(plan, Plan::Known(_)),
            plan,
            graphs: false,
            ..self
        })
    }

    /// The state at the start from y0, both joined: the rows of y0, sample after sample.
    pub(crate) fn start(&self, y0: &Tensor) -> Result<Tensor> {
        let y0 = y0.detach();
        if self.samples == 1 {
            return Ok(y0);
        }
        let repeated = |(y, shape): (&Tensor, &Shape)| {
            let all = y
                .unsqueeze(0)?
                .broadcast_as([&[self.samples], y.dims()].concat())?;
            all.contiguous()?.reshape(shape)
        };
        let leaves = self.given.split(&y0)?;
        let leaves = leaves.iter().zip(self.packing.shapes()).map(repeated);
        let leaves = leaves.collect::<candle_core::Result<Vec<_>>>()?;
        Packing::join(&leaves, self.state())
    }

    /// The gradient of y0 from that of the state at the start.
    pub(crate) fn summed(&self, start: Vec<Tensor>) -> Result<Vec<Tensor>> {
        if self.samples == 1 {
            return Ok(start);
        }
        let of = |(y, shape): (&Tensor, &Shape)| {
            let by_sample = y.reshape([&[self.samples], shape.dims()].concat())?;
            by_sample.sum(0)
        };
        let leaves = start.iter().zip(self.given.shapes()).map(of);
        Ok(leaves.collect::<candle_core::Result<_>>()?)
    }
}
