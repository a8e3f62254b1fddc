//! Rows of a data set by rank.
//!
//! Batches are those of the whole group, whatever the number of ranks: a permutation of all rows, cut into batches of n,
//! the last of which may be shorter.  Rank r of R takes the rows ⌊r n / R⌋ … ⌊(r + 1) n / R⌋ of each.

use std::ops::Range;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::SeedableRng;

use super::Group;
use crate::error::{GroupDefect, Result};
use crate::memory::room_within;

/// Which of the `rows` of a batch of the whole group are this rank's.  Shares differ by one row at most, and are empty
/// for some ranks if there are fewer rows than ranks.
pub fn share(group: &dyn Group, rows: usize) -> Range<usize> {
    part(group.rank(), group.size(), rows)
}

fn part(rank: usize, size: usize, rows: usize) -> Range<usize> {
    // In u128, since rows · size may be more than usize holds.
    let cut = |r: usize| (r as u128 * rows as u128 / size as u128) as usize;
    cut(rank)..cut(rank + 1)
}

/// Divides the rows of a data set among ranks, batch by batch, in an order drawn from a seed.
///
/// ```
/// use candle_diffeq::distributed::{Alone, Shards};
/// let shards = Shards::new(&Alone, 10, 4, 7)?;
/// let sizes: Vec<_> = shards.epoch(0).iter().map(Vec::len).collect();
/// assert_eq!(sizes, [4, 4, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Shards {
    rows: usize,
    batch: usize,
    seed: u64,
    rank: usize,
    size: usize,
}

impl Shards {
    /// Splits a data set of `rows` rows into batches that have `batch` rows on all ranks together.
    ///
    /// # Errors
    /// [`GroupDefect::EmptyBatch`]; [`Error::AllocationFailed`](crate::Error::AllocationFailed) for more rows than memory can
    /// list.
    pub fn new(group: &dyn Group, rows: usize, batch: usize, seed: u64) -> Result<Self> {
        if batch == 0 {
            return Err(GroupDefect::EmptyBatch.into());
        }
        // An epoch lists all rows, and this rank's once more.
        let _: Vec<usize> = room_within("the rows of an epoch", rows.saturating_mul(2))?;
        Ok(Self {
            rows,
            batch,
            seed,
            rank: group.rank(),
            size: group.size(),
        })
    }

    /// The rows of this rank in each batch of an epoch.  Every epoch has its own order.  All ranks have the same number of
    /// batches, and all ranks together have the same rows in a batch, however many they are.
    pub fn epoch(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..self.rows).collect();
        // Neighbouring seeds and epochs must not meet: seed 0 in epoch 1 is not seed 1 in epoch 0.
        let seed = self.seed ^ epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        order.shuffle(&mut StdRng::seed_from_u64(seed));
        let mine = |batch: &[usize]| batch[part(self.rank, self.size, batch.len())].to_vec();
        order.chunks(self.batch).map(mine).collect()
    }
}
