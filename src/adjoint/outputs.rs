//! The cotangents of returned states in the backward sweep.  The cotangent of an output at a node is added to λ.  An
//! output inside a step is y_n + h Σ b_i(x) k_i, so that its cotangent ȳ is added to λ_n, and b_i(x) ȳ to v_i.
//!
//! If the last stage of step n is also the first stage of step n + 1, the sweep has already pulled this stage back
//! when it comes to step n.  The cotangent that the outputs inside step n give to this stage is therefore passed to
//! step n + 1: κ = h_n Σ_m b_s(x_m) ȳ_m is added to v_1 of step n + 1 as κ / h_{n+1}, and the stage is pulled back
//! only once.

use candle_core::Tensor;

use crate::error::Result;
use crate::ops;
use crate::schedule::{Inside, Schedule};
use crate::state::Packing;
use crate::tableau::Tableau;

/// Cotangents of the returned states.
#[derive(Clone, Copy)]
pub(crate) struct Outputs<'a> {
    /// `(outputs, elements)`.
    pub(super) packed: &'a Tensor,
    pub(super) packing: &'a Packing,
}

impl Outputs<'_> {
    /// ȳ of one of them, by leaf.
    pub(super) fn of(&self, output: usize) -> Result<Vec<Tensor>> {
        self.packing.unpack(&self.packed.get(output)?)
    }

    /// ȳ at node n, if the state there is returned.
    pub(super) fn at_node(&self, schedule: &Schedule, n: usize) -> Result<Option<Vec<Tensor>>> {
        let output = schedule.at_node(n);
        output.map(|output| self.of(output)).transpose()
    }

    /// ȳ at the last node, or zeros.
    pub(super) fn at_end(&self, schedule: &Schedule) -> Result<Vec<Tensor>> {
        match self.at_node(schedule, schedule.len())? {
            Some(y) => Ok(y),
            None => self.packing.unpack(&self.packed.get(0)?.zeros_like()?),
        }
    }

    /// What enters step n from outputs inside it and inside the step before.
    pub(super) fn dense(&self, tableau: &Tableau, schedule: &Schedule, n: usize) -> Result<Dense> {
        let mut dense = Dense::default();
        if !schedule.is_dense() {
            return Ok(dense);
        }
        let last = tableau.stages() - 1;
        let inside = schedule.inside(n);
        if !inside.is_empty() {
            let keep_last = !schedule.is_joined(n + 1);
            let weights = |at: &Inside| {
                let mut weights = tableau.weights_at(at.x);
                weights[last] *= f64::from(u8::from(keep_last));
                weights.push(1.0);
                weights
            };
            let mut sums = self.sums(inside, weights)?;
            dense.state = sums.pop();
            dense.stages = sums;
        }
        if schedule.is_joined(n) {
            let before = schedule.inside(n - 1);
            let ratio = schedule.step(n - 1).h / schedule.step(n).h;
            if !before.is_empty() {
                let weight = |at: &Inside| vec![ratio * tableau.weights_at(at.x)[last]];
                dense.handed = self.sums(before, weight)?.pop();
            }
        }
        Ok(dense)
    }

    /// Σ_m w_r(x_m) ȳ_m for every row r of weights.
    fn sums(
        &self,
        inside: &[Inside],
        weights: impl Fn(&Inside) -> Vec<f64>,
    ) -> Result<Vec<Vec<Tensor>>> {
        let numbers: Vec<_> = inside.iter().map(|at| at.output as u32).collect();
        let numbers = Tensor::new(numbers.as_slice(), self.packed.device())?;
        let cotangents = self.packed.contiguous()?.index_select(&numbers, 0)?;
        let columns: Vec<_> = inside.iter().map(weights).collect();
        let rows = columns[0].len();
        let by_row = (0..rows).flat_map(|r| columns.iter().map(move |column| column[r]));
        let weights = Tensor::from_iter(by_row, cotangents.device())?
            .reshape((rows, inside.len()))?
            .to_dtype(cotangents.dtype())?;
        let sums = weights.matmul(&cotangents)?;
        (0..rows)
            .map(|r| self.packing.unpack(&sums.get(r)?))
            .collect()
    }
}

/// What enters a step from outputs that are not at nodes, by leaf.
#[derive(Clone, Default)]
pub(super) struct Dense {
    /// Σ_m b_i(x_m) ȳ_m by stage; empty where no output is inside the step.
    stages: Vec<Vec<Tensor>>,
    /// Σ_m ȳ_m.
    state: Option<Vec<Tensor>>,
    /// κ / h of the step.
    handed: Option<Vec<Tensor>>,
}

impl Dense {
    /// The terms of v_i in one leaf.
    pub(super) fn terms(&self, stage: usize, leaf: usize) -> impl Iterator<Item = (f64, &Tensor)> {
        let own = self.stages.get(stage).into_iter();
        let handed = self.handed.as_ref().filter(|_| stage == 0);
        own.chain(handed).map(move |y| (1.0, &y[leaf]))
    }

    /// The terms of λ_n in one leaf.
    pub(super) fn of_state(&self, leaf: usize) -> impl Iterator<Item = (f64, &Tensor)> {
        self.state.iter().map(move |y| (1.0, &y[leaf]))
    }

    /// The same without what the step before has handed on, which the length of that step multiplies.
    pub(super) fn own(&self) -> Self {
        Self {
            handed: None,
            ..self.clone()
        }
    }

    /// What enters the v_i from here, each tensor with its leaf.
    pub(super) fn seeds(&self) -> impl Iterator<Item = (usize, &Tensor)> + Clone {
        let all = self.stages.iter().chain(&self.handed);
        all.flat_map(|leaves| leaves.iter().enumerate())
    }

    /// The largest number that enters v_i from here, over some leaves.
    pub(super) fn magnitude(&self, looked_at: impl Fn(usize) -> bool) -> Result<f64> {
        let mut largest = 0.0f64;
        for (_, y) in self.seeds().filter(|(leaf, _)| looked_at(*leaf)) {
            largest = largest.max(ops::magnitude(y)?);
        }
        Ok(largest)
    }
}
