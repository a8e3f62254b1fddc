//! What a solve and its backward pass did: counts, scales, bytes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Counts since the [`Recorder`] was last taken.
///
/// Steps, evaluations and pull-backs are those of the whole batch: where a field is integrated tile by tile
/// (see [`OdeOptions::fusion`](crate::OdeOptions::fusion)), one of every tile is one, so that both ways
/// report the same numbers for the same solve.  What only some tiles do, a pull-back repeated with a
/// smaller scale, is counted for each of them.  Counts add up over passes and solves; what is said to be the largest or the smallest
/// is that of any one of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Steps of the forward pass.
    pub steps: usize,
    /// Attempts of adaptive steps that were rejected; `steps` are those that were accepted.
    pub rejected: usize,
    /// Adaptive steps that were accepted only because they could not be shorter
    /// ([`Adaptive::min_step`](crate::control::Adaptive::min_step)).
    pub forced: usize,
    /// Adaptive steps that were accepted only because of the noise floor
    /// ([`Adaptive::noise_floor`](crate::control::Adaptive::noise_floor)): their error estimate is mostly rounding.
    pub limited: usize,
    /// The largest error of an accepted adaptive step without the noise floor, relative to the tolerance: tolerances
    /// were kept to within this factor.
    pub tolerance_factor: f64,
    /// The shortest and the longest adaptive step.
    pub step_range: Option<(f64, f64)>,
    /// The times between adaptive steps, from the first to the last of each solve.  Only of a
    /// [`Recorder::tracing`], and not where every row has its own, see [`rows`](Self::rows).
    pub step_times: Vec<f64>,
    /// The length of the first adaptive step of the last solve; where every row has its own, that of the first row.
    pub first_step: Option<f64>,
    /// Velocities evaluated by the forward pass.  Evaluations that only tell whether candle can trace
    /// the field, one where a velocity does not read the whole state, are not among them.
    pub evaluations: usize,
    /// The sum over the rows of the evaluations of each, where every row has steps of its own
    /// ([`StepControl::Rows`](crate::control::StepControl::Rows)).  There, `steps`, `rejected`, `forced`, `limited` and
    /// `evaluations` are those of the row that has most of them.
    pub row_evaluations: usize,
    /// Evaluations of whole tiles in such a solve.  Times the lanes of a tile, it is `row_evaluations` and what lanes
    /// computed in vain.
    pub tile_evaluations: usize,
    /// What each row did in such a solve, in their order.  Only of a [`Recorder::tracing`].
    pub rows: Vec<RowStats>,
    /// Velocities evaluated again by the backward pass, to linearise steps and to replay segments
    /// between checkpoints.  Fewer where an [`ActivationCache`](crate::ActivationCache) keeps them, which only
    /// tiles do: a step of which all is kept counts none, one of which a part is kept counts whole.
    pub recomputed: usize,
    /// Pull-backs, repeated ones included: steps × stages + `retries`.
    pub vjps: usize,
    /// Pull-backs repeated with a smaller adjoint scale.  Tiles have a scale each, and each repeats its own:
    /// this is the sum over them, and may differ from that of the batch under one scale.
    pub retries: usize,
    /// Smallest and largest adjoint scale that a pull-back used, of any tile; `None` where scaling is off.
    pub scale_range: Option<(f64, f64)>,
    /// (t, S) at the stages at which the adjoint scale S became another, in the order of the backward
    /// pass.  Only of a [`Recorder::tracing`], and not of fields that are integrated tile by tile,
    /// each with a scale of its own (see [`OdeOptions::fusion`](crate::OdeOptions::fusion)).
    pub scales: Vec<(f64, f64)>,
    /// Largest number of states kept at once by any one solve, by its forward pass for the backward
    /// pass and by the backward pass itself.  Several solves that are alive together keep more.
    pub states_kept: usize,
    /// Bytes of the numbers of those states, of all rows that were kept at once: of the batch, or, for
    /// [`NeuralOde::loss`](crate::NeuralOde::loss) tile by tile, of a tile for each thread.  Not counted is what
    /// keeping them costs beside their numbers: on the general path some 400 bytes for each tensor, which is
    /// most of it where states are small; in tiles the lanes that fill up the last one.
    pub bytes_kept: usize,
    /// Largest number of bytes of evaluations that any one solve kept, see
    /// [`ActivationCache`](crate::ActivationCache): of all tiles, the lanes that fill up the last one included,
    /// or of those that are integrated at a time ([`NeuralOde::loss`](crate::NeuralOde::loss)).  Zero on the
    /// general path.
    pub activation_bytes: usize,
    /// How often the solver waited for a device and read from it; what fields read is not counted.
    /// Zero on the CPU.
    pub host_reads: usize,
    /// Steps, forward and backward, that were launched as one CUDA graph each; see
    /// [`OdeOptions::graphs`](crate::OdeOptions::graphs).
    pub replayed: usize,
    /// Why others were not although that was asked for: the last reason.
    pub not_replayed: Option<NotReplayed>,
}

/// Why an adaptive solve did not reach its end.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum StopReason {
    /// All attempts were used up.
    #[error("all {max_steps} attempts are used up")]
    Attempts {
        /// How many there were.
        max_steps: usize,
    },
    /// The step is so short that the time does not change: the problem is stiff, or the field has a singularity.
    #[error("the step is below the resolution of f64: the problem is stiff or singular here, or the tolerance is out of reach")]
    Underflow,
    /// Velocities or states were NaN or infinite in many attempts in a row, although each was shorter than the one
    /// before, or at the start.
    #[error("the field gives NaN or infinity here, however short the step is")]
    NonFinite,
    /// More than a tenth of the steps were accepted only because of the noise floor
    /// ([`Adaptive::precision_limit_is_error`](crate::control::Adaptive::precision_limit_is_error)).
    #[error("{limited} steps are limited by the compute precision: tolerances were kept to within a factor of {factor:.1}")]
    PrecisionLimited {
        /// How many.
        limited: usize,
        /// The largest error relative to the tolerance.
        factor: f64,
    },
}

/// What one row did that has steps of its own.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RowStats {
    /// Steps.
    pub accepted: usize,
    /// Attempts that were rejected.
    pub rejected: usize,
    /// Velocities that were evaluated for it.
    pub evaluations: usize,
    /// Steps that were accepted only because of the noise floor.
    pub limited: usize,
    /// Why it did not reach the end, if it did not.
    pub stopped: Option<StopReason>,
    /// The times between its steps, from the first to the last.
    pub times: Vec<f64>,
}

/// Why steps were launched operation by operation although
/// [`OdeOptions::graphs`](crate::OdeOptions::graphs) is set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotReplayed {
    /// A graph does not pay for so few steps.
    #[error("there are {steps} steps, and a graph pays from {least} on")]
    FewSteps {
        /// Steps of the solve.
        steps: usize,
        /// Fewest steps that are replayed.
        least: usize,
    },
    /// The field reads [`Time::value`](crate::Time::value), [`interval`](crate::Time::interval) or
    /// [`step`](crate::Time::step), which a graph would keep as they were; of these only the value can be
    /// read from [`Time::tensor`](crate::Time::tensor) instead.
    #[error("the field reads Time::value, interval or step, which stand still in a graph; Time::tensor does not")]
    TimeValue,
    /// Gradients of the times are wanted.
    #[error("gradients of the times are wanted")]
    TimeGradients,
    /// The device has a stream of its own and orders it by events, until
    /// `CudaDevice::disable_event_tracking` is called.
    #[error("the device orders its stream by events: disable_event_tracking turns that off")]
    EventTracking,
    /// The field copies from or to the memory of the host.
    #[error("the field copies from or to the memory of the host")]
    HostMemory,
    /// What the field, candle or the driver said when a step was captured.
    #[error("a step cannot be captured: {0}")]
    Capture(String),
}

impl Stats {
    /// Notes a scale that was used.
    pub(crate) fn used_scale(&mut self, scale: f64) {
        let (min, max) = self.scale_range.unwrap_or((scale, scale));
        self.scale_range = Some((min.min(scale), max.max(scale)));
    }

    /// Notes the scale of a stage.
    pub(crate) fn used_scale_at(&mut self, t: f64, scale: f64) {
        self.used_scale(scale);
        if self.scales.last().is_none_or(|last| last.1 != scale) {
            self.scales.push((t, scale));
        }
    }

    /// Notes the length of an adaptive step.
    pub(crate) fn used_step(&mut self, h: f64) {
        let (least, most) = self.step_range.unwrap_or((h, h));
        self.step_range = Some((least.min(h), most.max(h)));
    }

    /// Joins the counts of another part of the same batch, which went through the same steps: what every
    /// part does counts once, what is repeated for one of them counts for each.
    pub(crate) fn join(&mut self, part: &Self) {
        let once = |stats: &Self| stats.vjps - stats.retries;
        let once = once(self).max(once(part));
        self.recomputed = self.recomputed.max(part.recomputed);
        self.retries += part.retries;
        self.vjps = once + self.retries;
        self.see(part);
    }

    /// Adds the counts of a pass; its trace of scales is the recorder's to keep.
    pub(crate) fn add(&mut self, pass: &Self) {
        self.steps += pass.steps;
        self.rejected += pass.rejected;
        self.forced += pass.forced;
        self.limited += pass.limited;
        self.first_step = pass.first_step.or(self.first_step);
        self.evaluations += pass.evaluations;
        self.row_evaluations += pass.row_evaluations;
        self.tile_evaluations += pass.tile_evaluations;
        self.recomputed += pass.recomputed;
        self.vjps += pass.vjps;
        self.retries += pass.retries;
        self.host_reads += pass.host_reads;
        self.replayed += pass.replayed;
        if pass.not_replayed.is_some() {
            self.not_replayed.clone_from(&pass.not_replayed);
        }
        self.see(pass);
    }

    /// The same with its times.
    pub(crate) fn take_over(&mut self, pass: &mut Self) {
        self.add(pass);
        self.step_times.append(&mut pass.step_times);
        self.rows.append(&mut pass.rows);
    }

    /// Joins the counts of a row that had steps of its own.
    pub(crate) fn see_row(&mut self, row: &Self) {
        self.steps = self.steps.max(row.steps);
        self.rejected = self.rejected.max(row.rejected);
        self.forced = self.forced.max(row.forced);
        self.limited = self.limited.max(row.limited);
        self.evaluations = self.evaluations.max(row.evaluations);
        self.first_step = self.first_step.or(row.first_step);
        self.see(row);
    }

    /// Takes over what is an extreme.
    fn see(&mut self, other: &Self) {
        for scale in other.scale_range.into_iter().flat_map(|(a, b)| [a, b]) {
            self.used_scale(scale);
        }
        for h in other.step_range.into_iter().flat_map(|(a, b)| [a, b]) {
            self.used_step(h);
        }
        self.tolerance_factor = self.tolerance_factor.max(other.tolerance_factor);
        self.kept(other.states_kept, other.bytes_kept);
        self.activation_bytes = self.activation_bytes.max(other.activation_bytes);
    }

    /// Notes how much is kept of evaluations.
    pub(crate) fn kept_evaluations(&mut self, bytes: u128) {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.activation_bytes = self.activation_bytes.max(bytes);
    }

    /// Notes how much is kept at this moment.
    pub(crate) fn kept(&mut self, states: usize, bytes: usize) {
        self.states_kept = self.states_kept.max(states);
        self.bytes_kept = self.bytes_kept.max(bytes);
    }
}

/// Collects [`Stats`] from every solve whose options hold a clone of it.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::{odeint, OdeOptions, Recorder, Time};
/// let recorder = Recorder::default();
/// let options = OdeOptions { recorder: Some(recorder.clone()), ..Default::default() };
/// let y0 = Tensor::new(&[1f32], &Device::Cpu)?;
/// odeint(|_: &Time, y: &Tensor| y.neg(), &y0, &[0.0, 0.5, 1.0], &options)?;
/// assert_eq!(recorder.take().evaluations, 8);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Recorder {
    stats: Arc<Mutex<Stats>>,
    traces: bool,
}

impl Recorder {
    /// One that also keeps [`Stats::scales`], [`Stats::step_times`] and [`Stats::rows`], which grow with every solve until they are taken.
    pub fn tracing() -> Self {
        Self {
            traces: true,
            ..Self::default()
        }
    }

    /// Whether what grows with every solve is kept.
    pub(crate) fn traces(&self) -> bool {
        self.traces
    }

    /// The counts so far.
    pub fn stats(&self) -> Stats {
        self.lock().clone()
    }

    /// The counts so far, which start anew.
    pub fn take(&self) -> Stats {
        std::mem::take(&mut self.lock())
    }

    /// Adds the counts of a pass, which counted on its own: fields may read the recorder.
    pub(crate) fn add(&self, pass: &Stats) {
        let mut stats = self.lock();
        stats.add(pass);
        if self.traces {
            stats.scales.extend_from_slice(&pass.scales);
            stats.step_times.extend_from_slice(&pass.step_times);
            stats.rows.extend_from_slice(&pass.rows);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Stats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_that_do_the_same_count_once_and_their_repetitions_add_up() {
        let tile = |retries| Stats {
            vjps: 40 + retries,
            recomputed: 40,
            retries,
            ..Default::default()
        };
        let mut batch = Stats::default();
        for retries in [0, 2, 3] {
            batch.join(&tile(retries));
        }
        assert_eq!((batch.vjps, batch.recomputed, batch.retries), (45, 40, 5));
    }
}
