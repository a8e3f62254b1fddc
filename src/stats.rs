//! What a solve and its backward pass did: counts, scales, bytes.

mod backward;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use backward::{BackwardAttempt, BackwardStats};

/// Counts since the [`Recorder`] was last taken.
///
/// Steps, evaluations and pull-backs are counted for the whole batch.  If a field is integrated tile by tile (see
/// [`OdeOptions::fusion`](crate::OdeOptions::fusion)), an evaluation that every tile makes counts once, so that the
/// numbers are the same as without tiles.  Work that only some tiles do, such as a pull-back that is repeated with a
/// smaller scale, is counted for each of these tiles.  Counts are added over passes and solves.  A largest or
/// smallest value is the extreme value of all passes and solves.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Steps of the forward pass.
    pub steps: usize,
    /// Attempts of adaptive steps that were rejected; `steps` are those that were accepted.
    pub rejected: usize,
    /// Adaptive steps that were accepted only because they could not be shorter
    /// ([`Adaptive::min_step`](crate::options::Adaptive::min_step)).
    pub forced: usize,
    /// Adaptive steps that were accepted only because of the noise floor
    /// ([`Adaptive::noise_floor`](crate::options::Adaptive::noise_floor)): their error estimate is mostly rounding.
    pub limited: usize,
    /// The largest error estimate of an accepted adaptive step, relative to the tolerance without the noise floor.
    /// If it is greater than one, the tolerance was exceeded by this factor.
    pub tolerance_factor: f64,
    /// The shortest and the longest adaptive step.
    pub step_range: Option<(f64, f64)>,
    /// The times at which adaptive steps begin or end, from the start of each solve to the end of its last step, which may
    /// be after an event that ends the solve.  Filled only by a [`Recorder::tracing`], and not for solves in which every
    /// row has its own steps; see [`rows`](Self::rows) for these.
    pub step_times: Vec<f64>,
    /// The length of the first adaptive step of the last solve.  If every row has its own steps, this is the length
    /// of the first step of the first row.
    pub first_step: Option<f64>,
    /// Velocities evaluated by the forward pass.  Evaluations that only test whether candle can trace the field are
    /// not counted; they are made where a velocity does not read the whole state.
    pub evaluations: usize,
    /// The number of evaluations, summed over all rows, of solves in which every row has its own steps
    /// ([`StepControl::Rows`](crate::options::StepControl::Rows)).  In such a solve, each of `steps`, `rejected`,
    /// `forced`, `limited` and `evaluations` is the largest count of any row.
    pub row_evaluations: usize,
    /// The number of evaluations of whole tiles in such a solve, on CUDA of whole blocks of 32 rows.  This number,
    /// multiplied by the number of lanes of a tile, is `row_evaluations` plus the number of evaluations in lanes whose result was not needed.
    pub tile_evaluations: usize,
    /// Statistics of each row in such a solve, in the order of the rows.  Filled only by a [`Recorder::tracing`].
    pub rows: Vec<RowStats>,
    /// Velocities evaluated again by the backward pass, to linearise steps and to replay segments between checkpoints.
    /// If an [`ActivationCache`](crate::options::ActivationCache) keeps evaluations, a step that is kept completely adds
    /// nothing to this count, and a step that is kept in part adds all of its evaluations.
    pub recomputed: usize,
    /// Pull-backs, repeated ones included.  In each step there is one for every stage of
    /// [`Tableau::active`](crate::tableau::Tableau::active), for example for six of the seven stages of
    /// [`DOPRI5`](crate::tableau::DOPRI5).  If an output lies inside the step, there is also one for every other stage that the
    /// interpolant reads.  If times have gradients, a step that ends at an output on a jump is pulled back once more.
    /// `retries` are added to this.
    pub vjps: usize,
    /// Pull-backs repeated with a smaller adjoint scale.  Each tile has its own scale (each row, if it has its own steps)
    /// and repeats its own pull-backs.  This number is the sum over all tiles, and may differ from the number for a batch that has one common scale.
    pub retries: usize,
    /// Smallest and largest adjoint scale that a pull-back used, of any tile or row; `None` where scaling is off.
    pub scale_range: Option<(f64, f64)>,
    /// (t, S) at the stages at which the adjoint scale S changed, in the order of the backward pass.  Filled only by
    /// a [`Recorder::tracing`], and not for fields that are integrated tile by tile, because there every tile has its
    /// own scale (see [`OdeOptions::fusion`](crate::OdeOptions::fusion)).
    pub scales: Vec<(f64, f64)>,
    /// Largest number of states kept at once by any one solve, by its forward pass for the backward
    /// pass and by the backward pass itself.  Several solves that are alive together keep more.
    pub states_kept: usize,
    /// Bytes of the numbers in the kept states, for all rows whose states were kept at the same time.  These are the
    /// rows of the whole batch, or, for [`NeuralOde::loss`](crate::NeuralOde::loss) tile by tile, the rows of one
    /// tile for each thread.  Other memory is not counted: on the general path about 400 bytes for each tensor, which
    /// is more than the numbers if states are small, and in tiles the unused lanes of the last tile.
    pub bytes_kept: usize,
    /// Largest number of bytes of evaluations that any one solve kept, see
    /// [`ActivationCache`](crate::options::ActivationCache).  All tiles are counted, including the unused lanes of the
    /// last tile; for [`NeuralOde::loss`](crate::NeuralOde::loss), only the tiles that are integrated at the same time
    /// are counted.  On the general path these are the bytes of the tensors in candle's graphs, or of what a field keeps.
    pub activation_bytes: usize,
    /// The number of times that the solver waited for a device and read from its memory; reads by fields are not
    /// counted.
    /// Zero on the CPU.
    pub host_reads: usize,
    /// Steps, forward and backward, that were launched as one CUDA graph each ("replayed" means "launched as a
    /// graph"); see [`OdeOptions::graphs`](crate::OdeOptions::graphs).
    pub replayed: usize,
    /// The reason why other steps were not launched as graphs although
    /// [`OdeOptions::graphs`](crate::OdeOptions::graphs) is set.  If there were several reasons, this is the last
    /// one.  It is `None` for solves in which the option has no effect.
    pub not_replayed: Option<NotReplayed>,
    /// The backward solves of continuous adjoints ([`Gradient`](crate::options::Gradient)).
    pub backward: BackwardStats,
}

/// Why an adaptive solve did not reach its end.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum StopReason {
    /// All attempts were used up.
    #[error("all {max_steps} attempts are used up: permit more (Adaptive::max_steps), or set larger tolerances; a stiff problem needs very many short steps")]
    Attempts {
        /// How many there were.
        max_steps: usize,
    },
    /// The step is so short that the time does not change (for a row with its own steps: the time in the precision in
    /// which its field reads it): the problem is stiff, or the field has a singularity.
    #[error("the step is so short that the time does not change (in f64, or for a row with its own steps in the precision in which the field reads time): the problem is stiff or singular here, or the field jumps at a time that Adaptive::jump_t does not name, or the tolerance is too small for this precision")]
    Underflow,
    /// Velocities or states were NaN or infinite in many consecutive attempts although each attempt was shorter than the
    /// previous one, or in an attempt that could not be shorter, or, of a row with its own steps, at the start.
    #[error("the field gives NaN or infinity here in all attempts, each shorter than the one before: examine the field at this time and state; if Adaptive::min_step or the limits of the controller keep the attempts long, permit shorter ones")]
    NonFinite,
    /// The states that were kept for a backward pass and the outputs have grown until the machine had no memory left:
    /// keep fewer states ([`Checkpoint`](crate::options::Checkpoint)).
    #[error("memory is full: {need} more bytes are needed, and {available} can be had; keep fewer states (Checkpoint::Every, States or Bytes)")]
    Memory {
        /// Bytes that the next steps and the end of the solve need.
        need: u64,
        /// Bytes that could be had.
        available: u64,
    },
    /// More than a tenth of the steps were accepted only because of the noise floor
    /// ([`Adaptive::precision_limit_is_error`](crate::options::Adaptive::precision_limit_is_error)).
    #[error("{limited} steps are limited by the compute precision: tolerances were kept to within a factor of {factor:.1}; set larger tolerances, or compute in a higher precision")]
    PrecisionLimited {
        /// How many.
        limited: usize,
        /// The largest error relative to the tolerance.
        factor: f64,
    },
}

/// Statistics of one row that has its own steps.
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
    /// The reason why the row did not reach the end; `None` if it reached the end.
    pub stopped: Option<StopReason>,
    /// The times at which steps of the row begin or end, from the first to the last.
    pub times: Vec<f64>,
}

/// Why steps were launched operation by operation although
/// [`OdeOptions::graphs`](crate::OdeOptions::graphs) is set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotReplayed {
    /// The solve has so few steps that capturing a graph would cost more time than it saves.
    #[error("there are {steps} steps, and a graph saves time only from {least} steps on")]
    FewSteps {
        /// Steps of the solve.
        steps: usize,
        /// Fewest steps that are replayed.
        least: usize,
    },
    /// The field reads [`Time::value`](crate::Time::value), [`interval`](crate::Time::interval) or
    /// [`step`](crate::Time::step), whose results a graph would not update when it is replayed.  Only the value can
    /// be read from [`Time::tensor`](crate::Time::tensor) instead.
    #[error("the field reads Time::value, interval or step, which stand still in a graph; Time::tensor does not")]
    TimeValue,
    /// The evaluations of the step are kept for the backward pass
    /// ([`ActivationCache`](crate::options::ActivationCache)), and what is created in a graph cannot be kept.
    #[error("the evaluations of the step are kept, and what is created in a graph cannot be")]
    KeptEvaluations,
    /// Gradients with respect to the times are required.
    #[error("gradients of the times are required: give the times as numbers if they are not")]
    TimeGradients,
    /// The device has its own stream and synchronises it by events.  A call of `CudaDevice::disable_event_tracking`
    /// turns this off.
    #[error("the device orders its stream by events: disable_event_tracking turns that off")]
    EventTracking,
    /// The field copies from or to the memory of the host.
    #[error("the field copies from or to the memory of the host: leave out what reads numbers from the device, and upload what does not change before the solve")]
    HostMemory,
    /// The error message of the field, candle or the driver when a step was captured.
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
        self.backward.add(&pass.backward);
        self.see(pass);
    }

    /// The same with its times.
    pub(crate) fn take_over(&mut self, pass: &mut Self) {
        self.add(pass);
        self.step_times.append(&mut pass.step_times);
        self.rows.append(&mut pass.rows);
        self.backward.attempts.append(&mut pass.backward.attempts);
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
/// use candle_diffeq::{odeint, OdeOptions, Time};
/// use candle_diffeq::metrics::Recorder;
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
    /// A recorder that also keeps [`Stats::scales`], [`Stats::step_times`], [`Stats::rows`] and
    /// [`BackwardStats::attempts`](crate::metrics::BackwardStats::attempts), which grow with every solve until
    /// [`take`](Self::take) is called.
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

    /// Returns the counts so far and resets them to zero.
    pub fn take(&self) -> Stats {
        std::mem::take(&mut self.lock())
    }

    /// Evaluations of the forward pass so far.
    pub(crate) fn evaluations(&self) -> usize {
        self.lock().evaluations
    }

    /// Adds the counts of a pass, which counted on its own: fields may read the recorder.
    pub(crate) fn add(&self, pass: &Stats) {
        let mut stats = self.lock();
        stats.add(pass);
        if self.traces {
            stats.scales.extend_from_slice(&pass.scales);
            stats.step_times.extend_from_slice(&pass.step_times);
            stats.rows.extend_from_slice(&pass.rows);
            let attempts = &mut stats.backward.attempts;
            attempts.extend_from_slice(&pass.backward.attempts);
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
