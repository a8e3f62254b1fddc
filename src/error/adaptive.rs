//! What can be wrong with adaptive steps: with what was asked for, and with how a solve went.

use candle_core::Tensor;

use crate::stats::StopReason;

/// Options of adaptive steps that cannot be followed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AdaptiveDefect {
    /// A number is out of range.
    #[error("{option} = {value:?} is out of range: it must be {range}")]
    Number {
        /// The option.
        option: &'static str,
        /// Its value.
        value: f64,
        /// The values that are possible, in words.
        range: &'static str,
    },
    /// A tolerance is negative or not finite.
    #[error("{which} = {value:?}: a tolerance is a finite number that is not negative")]
    Tolerance {
        /// `rtol` or `atol`.
        which: &'static str,
        /// Its value.
        value: f64,
    },
    /// Both tolerances of a tensor of the state are zero everywhere.
    #[error("rtol and atol of state tensor {leaf} are both zero: one of them must be positive in some element")]
    NoTolerance {
        /// The tensor.
        leaf: usize,
    },
    /// Tolerances by tensor of the state, but not one for each.
    #[error("{which}: {got} tolerances were given for a state of {leaves} tensors: give one number for all, or one tolerance for each tensor")]
    ToleranceCount {
        /// `rtol` or `atol`.
        which: &'static str,
        /// Tensors of the state.
        leaves: usize,
        /// Tolerances given.
        got: usize,
    },
    /// The method has no embedded weights.
    #[error("the method {method} estimates no error: adaptive steps need a pair, such as DOPRI5")]
    NoEstimate {
        /// Its name.
        method: String,
    },
    /// A dense solution is asked for a time outside of its interval.
    #[error("t = {t:?} is outside of the interval from {from:?} to {to:?}, in which the solution is known")]
    Outside {
        /// The time.
        t: f64,
        /// The first time of the solution.
        from: f64,
        /// The last one.
        to: f64,
    },
    /// Dense output and events need adaptive steps.
    #[error(
        "a dense solution and events need adaptive steps: set OdeOptions::steps to Steps::Adaptive"
    )]
    FixedSteps,
    /// With events, all times are asked for.
    #[error("a solve with events returns the states at all times: leave OdeOptions::output at Output::All")]
    EventOutput,
    /// The states at the ends of all steps were asked for, and a control per row.
    #[error("rows with steps of their own have different numbers of states: with Output::Steps use StepControl::Batch, or read the steps of each row from Stats::rows")]
    StepsOfRows,
    /// Control per row was asked for and cannot be had.
    #[error("StepControl::Rows is not available for this {}. On the CPU it needs a field that is integrated tile by tile (nn::Mlp, nn::Cnf, nn::Hutchinson of an nn::Mlp, nn::OtFlow, nn::ConvField, nn::ConstantField, nn::energy::Hamiltonian or GradientFlow of an nn::EnergyMlp that has hidden layers, none of them residual, nn::CdeMlp along a control path, nn::RowSpeed or nn::Relaxation around one of them), a processor with AVX2, AVX-512 or NEON, OdeOptions::fusion, f32 or f64 with one store precision, and times that are not tracked. On CUDA it needs an nn::Mlp that is solved in one launch, without compensated sums. Otherwise use StepControl::Batch", if *row_wise { "solve, although its field has independent rows" } else { "field" })]
    NoRows {
        /// Whether the field itself is one whose rows are independent.
        row_wise: bool,
    },
    /// Control per row was asked for in a solve that looks at every step of the whole batch.
    #[error("events and dense solutions have one step length for the batch: leave Adaptive::control unset, or find the events of each row by row_events")]
    RowsObserved,
    /// A time is in `step_t` and in `jump_t`, up to rounding.
    #[error("t = {t:?} is in step_t and in jump_t: if the field jumps there, leave it in jump_t alone, otherwise in step_t alone")]
    ForcedTwice {
        /// The time.
        t: f64,
    },
}

/// The element with the largest error relative to its tolerance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Worst {
    /// Tensor of the state.
    pub leaf: usize,
    /// Index along its first dimension; 0 if the tensor has one dimension.
    pub row: usize,
    /// Index within the row, or in the tensor of one dimension.
    pub index: usize,
}

/// An adaptive solve that did not reach its end: where it was, what it had done, and what it had computed.  Where
/// every row has steps of its own it is that of the first row that stopped, whose number is in `worst`, and the states
/// are those of this row, `(outputs, 1, features)` for each tensor.
#[derive(Clone, Debug)]
pub struct Stopped {
    /// Why.
    pub reason: StopReason,
    /// Where the solve was: the time at the end of the last step that was accepted, at which an attempt that was
    /// rejected after it began.
    pub t: f64,
    /// The signed length of the last attempt, if it was rejected; 0 if it was accepted.
    pub h: f64,
    /// The norm of its error relative to the tolerance, if it was rejected; otherwise 0.
    pub error: f64,
    /// Where the error was largest, if it was rejected.
    pub worst: Option<Worst>,
    /// Steps that were accepted until then.
    pub accepted: usize,
    /// Attempts that were rejected.
    pub rejected: usize,
    /// How many of the returned states, those at events included, were computed.
    pub outputs: usize,
    /// These, `(outputs, …)` for each tensor of the state, without gradients; empty if there are none.
    pub states: Vec<Tensor>,
}

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            reason,
            t,
            h,
            error,
            accepted,
            rejected,
            ..
        } = self;
        write!(f, "the solve stopped at t = {t:?}")?;
        if *h != 0.0 {
            write!(
                f,
                ", where an attempt of length {h:e} had the error {error:.3e}"
            )?;
        }
        if let Some(Worst { leaf, row, index }) = self.worst {
            write!(
                f,
                " (largest in state tensor {leaf}, row {row}, element {index})"
            )?;
        }
        write!(
            f,
            ", after {accepted} accepted and {rejected} rejected attempts: {reason}"
        )
    }
}
