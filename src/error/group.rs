//! What ends a group of processes, or keeps it from starting.

use candle_core::DType;

/// Failures of the processes that train one model together.
///
/// The first six end the group: every later operation of it returns the same error again.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GroupDefect {
    /// A rank gives no sign of life: its process was killed, it hangs, or its host cannot be reached.
    #[error("rank {rank} of the group has given no sign of life for {seconds:.0} s: its process has died, or its host cannot be reached")]
    Lost {
        /// The rank that is missing.
        rank: usize,
        /// How long it has been silent.
        seconds: f64,
    },
    /// A rank has left the group while others still need it, after an error of its own, a panic, or because it was done.
    #[error("rank {rank} has left the group: {reason}")]
    Left {
        /// The rank where it began.
        rank: usize,
        /// What it said.
        reason: String,
    },
    /// A rank is alive, but does not come to the operation in which the others wait.
    #[error("rank {rank} of the group is alive, but others have waited {seconds:.0} s for it: does every rank do the same operations?")]
    Late {
        /// The rank that is missing.
        rank: usize,
        /// How long this rank has waited.
        seconds: f64,
    },
    /// All ranks answer and have reached the same number of operations, but this operation does not end.
    #[error("every rank of the group answers and none is behind, but this rank has waited for {seconds:.0} s: do all ranks do the same operations, on tensors of the same device?")]
    Stuck {
        /// How long this rank has waited.
        seconds: f64,
    },
    /// A rank does another operation than this one.
    #[error("rank {rank} does {there} where this rank does {here}: all ranks must do the same operations in the same order")]
    OtherOperation {
        /// The other rank.
        rank: usize,
        /// What it does.
        there: String,
        /// What this rank does.
        here: String,
    },
    /// The library that carries the messages failed.
    #[error("{operation} failed on rank {rank}: {message}")]
    Library {
        /// This rank.
        rank: usize,
        /// The operation.
        operation: &'static str,
        /// What the library says.
        message: String,
    },
    /// A group could not be started.
    #[error("the group cannot be started: {reason}")]
    Start {
        /// Why.
        reason: String,
    },
    /// An operation has no such numbers.
    #[error("{operation} over ranks takes no tensor of {dtype:?}")]
    Dtype {
        /// The operation.
        operation: &'static str,
        /// The dtype that was given.
        dtype: DType,
    },
    /// There is no such rank.
    #[error("there is no rank {rank} in a group of {size}")]
    NoSuchRank {
        /// What was asked for.
        rank: usize,
        /// How many ranks there are.
        size: usize,
    },
    /// Ranks hold variables of other names, shapes or dtypes.
    #[error("rank {rank} holds other variables than rank 0: names, shapes and dtypes must be the same on all ranks")]
    OtherVariables {
        /// A rank that differs from rank 0.
        rank: usize,
    },
    /// Ranks train in different ways.
    #[error("rank {rank} trains in another way than rank 0: clipping, wire, buckets, frozen variables, the function that averages, and the loss scaler must be the same on all ranks")]
    OtherOptions {
        /// A rank that differs from rank 0.
        rank: usize,
    },
    /// A gradient does not have the shape of its variable.
    #[error("the gradient of {variable} has shape {gradient:?}, and the variable {shape:?}")]
    Gradient {
        /// The name of the variable.
        variable: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The shape of the gradient that was given.
        gradient: Vec<usize>,
    },
    /// Rank 0 could not write or read a checkpoint.
    #[error("rank 0 could not use the checkpoint {path}: {message}")]
    Checkpoint {
        /// The file.
        path: String,
        /// What failed on rank 0, on all ranks.
        message: String,
    },
    /// A batch of no rows, on all ranks together.
    #[error("a batch of the whole group needs at least one row")]
    EmptyBatch,
    /// A limit of the gradient's norm that is not positive.
    #[error("gradients cannot be clipped to a norm of {limit}")]
    Clip {
        /// What was given.
        limit: f64,
    },
}
