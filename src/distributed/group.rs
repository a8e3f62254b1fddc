//! The group: what processes that train one model do together.

use std::fmt::Display;
use std::time::Duration;

use candle_core::{DType, Tensor};

use crate::error::{GroupDefect, Result};

/// Processes that train together, numbered by rank from 0 to `size` − 1.
///
/// Every rank must call the same operations in the same order, with tensors of the same shape and dtype.  If ranks wait in
/// operations of different kinds, that is an error.  If they are of one kind but differ in their number of elements or in
/// their root, some ranks may get wrong results before an error ends the group.
///
/// An operation returns when this rank's part of it is done.  Results are equal on all ranks, and are the same bits in
/// every run with as many ranks on the same machines, as far as the library that carries the messages sums in a fixed
/// order.  Results have the shape, dtype and device of the operand and carry no history.
///
/// # Errors
/// Operations return [`Error::Group`](crate::Error::Group) if a rank fails, dies or does not come, and name it.
pub trait Group {
    /// The number of this process.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// The sum over ranks, element by element; f32, f64 or bf16.  The sum of bf16 is formed in f32 from left to right
    /// and rounded once, except where the implementation says otherwise.
    ///
    /// # Errors
    /// As of all operations; [`GroupDefect::Dtype`].
    fn sum(&self, x: &Tensor) -> Result<Tensor>;

    /// The largest over ranks, element by element; f32 or f64, of numbers that are not NaN.
    ///
    /// # Errors
    /// As of all operations; [`GroupDefect::Dtype`].
    fn max(&self, x: &Tensor) -> Result<Tensor>;

    /// What `root` has given; what other ranks give is looked at only for its shape.  f32, f64, f16, bf16, u8, u32 or i64.
    ///
    /// # Errors
    /// As of all operations; [`GroupDefect::Dtype`], [`GroupDefect::NoSuchRank`].
    fn broadcast(&self, x: &Tensor, root: usize) -> Result<Tensor>;

    /// Waits until all ranks are here.
    ///
    /// # Errors
    /// As of all operations.
    fn barrier(&self) -> Result<()>;

    /// Tells the other ranks that this one cannot go on, and why.  Their next operation fails with this reason instead of
    /// waiting; so does every later one of this rank.  A group of one process goes on.
    fn give_up(&self, reason: &str) {
        let _ = reason;
    }

    /// Whether every rank is alive, for who waits for something else than an operation of this group; `waited` is for
    /// how long.  To be called from time to time.
    ///
    /// # Errors
    /// [`GroupDefect::Lost`], [`GroupDefect::Left`], [`GroupDefect::Late`], [`GroupDefect::Stuck`].
    fn watch(&self, waited: Duration) -> Result<()> {
        let _ = waited;
        Ok(())
    }
}

/// The outcome of something that this rank does by itself.  If it is an error, the other ranks are told the reason, and the
/// group ends ([`Group::give_up`]).
///
/// ```
/// use candle_diffeq::distributed::{told, Alone, Group};
/// fn train(group: &dyn Group) -> candle_diffeq::Result<()> {
///     group.barrier()
/// }
/// // Under mpirun: let group = MpiGroup::start()?;
/// let group = Alone;
/// told(&group, train(&group))?;
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// # Errors
/// That of the outcome.
pub fn told<T, E: Display>(
    group: &dyn Group,
    outcome: std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    outcome.inspect_err(|error| group.give_up(&error.to_string()))
}

/// A group of one process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Group for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum(&self, x: &Tensor) -> Result<Tensor> {
        takes("a sum", &SUMMED, x)?;
        Ok(x.detach())
    }

    fn max(&self, x: &Tensor) -> Result<Tensor> {
        takes("a maximum", &COMPARED, x)?;
        Ok(x.detach())
    }

    fn broadcast(&self, x: &Tensor, root: usize) -> Result<Tensor> {
        takes("a broadcast", &SENT, x)?;
        exists(root, 1)?;
        Ok(x.detach())
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}

/// What can be summed, compared and sent.
pub(super) const SUMMED: [DType; 3] = [DType::F32, DType::F64, DType::BF16];
pub(super) const COMPARED: [DType; 2] = [DType::F32, DType::F64];
pub(super) const SENT: [DType; 7] = [
    DType::F32,
    DType::F64,
    DType::F16,
    DType::BF16,
    DType::U8,
    DType::U32,
    DType::I64,
];

/// Whether an operation takes the dtype of a tensor.
pub(super) fn takes(operation: &'static str, dtypes: &[DType], x: &Tensor) -> Result<()> {
    let dtype = x.dtype();
    match dtypes.contains(&dtype) {
        true => Ok(()),
        false => Err(GroupDefect::Dtype { operation, dtype }.into()),
    }
}

/// Whether a rank is in a group of this size.
pub(super) fn exists(rank: usize, size: usize) -> Result<()> {
    match rank < size {
        true => Ok(()),
        false => Err(GroupDefect::NoSuchRank { rank, size }.into()),
    }
}
