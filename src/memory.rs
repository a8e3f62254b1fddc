//! Memory: how much a solve is going to hold, estimated before its first step, and how much is available.
//!
//! Systems promise more memory than they have, so an allocation that succeeds proves nothing: a solve
//! that cannot fit would fill the machine and be killed.
//!
//! A process estimates for itself alone: if several share a machine or a control group, each of them counts all
//! available memory as its own.

mod control_groups;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Layout, Tensor};

use crate::error::{Error, MemoryNeed, Result};
use control_groups::Left;

/// Needs below this are not compared with the free memory: a small solve would take longer to ask than to
/// run.
const SMALL: u128 = 64 << 20;

/// Bytes that a tensor of candle's takes at least beside its numbers, for its shape, its strides and its
/// locks: 400 measured, of which the allocator's share varies.
pub(crate) const TENSOR: u128 = 384;

/// Numbers that a view shows, each once: a number that was broadcast counts once.
fn numbers(layout: &Layout) -> usize {
    let dims = layout.dims().iter().zip(layout.stride());
    dims.filter(|(_, stride)| **stride != 0)
        .map(|(n, _)| n)
        .product()
}

/// Bytes of these tensors, each storage once and without those that `others` have, and what a tensor takes beside its
/// numbers.
pub(crate) fn held<'a>(
    tensors: impl IntoIterator<Item = &'a Tensor>,
    others: impl IntoIterator<Item = &'a Tensor>,
) -> usize {
    let storage = |tensor: &Tensor| std::ptr::from_ref(&*tensor.storage_and_layout().0).addr();
    let others: HashSet<_> = others.into_iter().map(storage).collect();
    let (mut storages, mut count) = (HashMap::new(), 0);
    for tensor in tensors {
        count += 1;
        let bytes = numbers(tensor.layout()) * tensor.dtype().size_in_bytes();
        let held = storages.entry(storage(tensor)).or_insert(0);
        *held = bytes.max(*held);
    }
    let own = storages
        .iter()
        .filter(|(storage, _)| !others.contains(storage));
    own.map(|(_, bytes)| bytes).sum::<usize>() + count * TENSOR as usize
}

impl MemoryNeed {
    /// The same with so many bytes of evaluations.
    pub(crate) fn of(self, evaluations: u128) -> Self {
        Self {
            evaluations,
            ..self
        }
    }

    /// Refuses what cannot be had.
    pub(crate) fn check(self) -> Result<()> {
        if self.total() < SMALL {
            return Ok(());
        }
        self.within(available().unwrap_or(isize::MAX as u64))
    }

    fn within(self, available: u64) -> Result<()> {
        match self.total() <= available.into() {
            true => Ok(()),
            false => Err(Error::OutOfMemory {
                need: self,
                available,
            }),
        }
    }
}

/// What a solve holds while its number of steps is not known, compared with the memory that there is each time it has
/// grown by as much as a small solve needs.
#[derive(Debug, Default)]
pub(crate) struct Growth {
    /// The sum of what has grown.
    held: AtomicU64,
    /// What was held at the last comparison.
    compared: AtomicU64,
}

impl Growth {
    /// So many bytes are held in all, and so many more will be needed at the end: what is needed and what can be had, in
    /// bytes, if that does not suffice for as much growth again.
    pub(crate) fn reaches(&self, held: u64, later: u64) -> Option<[u64; 2]> {
        let compared = self.compared.load(Ordering::Relaxed);
        if held.saturating_sub(compared) < SMALL as u64 {
            return None;
        }
        // Two threads that compare at once do no harm.
        self.compared.store(held, Ordering::Relaxed);
        let need = SMALL as u64 + later;
        let available = available().filter(|available| *available < need)?;
        Some([need, available])
    }

    /// The same where one of many has grown from so many bytes to so many, or has shrunk.
    pub(crate) fn grows(&self, from: u64, to: u64) -> Option<[u64; 2]> {
        if from == to {
            // Threads share the sum: they touch it when it changes.
            return None;
        }
        let change = to.wrapping_sub(from);
        let before = self.held.fetch_add(change, Ordering::Relaxed);
        self.reaches(before.wrapping_add(change), 0)
    }
}

/// What was needed and what can be had, of an allocation that was refused; any other error is handed on.
pub(crate) fn refusal(error: Error) -> Result<[u64; 2]> {
    let Error::AllocationFailed { bytes, .. } = error else {
        return Err(error);
    };
    let need = u64::try_from(bytes).unwrap_or(u64::MAX);
    let left = available().unwrap_or(0);
    Ok([need, left.min(need.saturating_sub(1))])
}

/// What this process can still get, if the system tells: no more than its limit of addresses, nor than what
/// the machine has.
fn available() -> Option<u64> {
    match (addresses(), of_machine()) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// What is left of the limit that `ulimit -v` sets.
#[cfg(unix)]
fn addresses() -> Option<u64> {
    let limit = rlimit::Resource::AS.get_soft().ok()?;
    Some(limit.saturating_sub(mapped().unwrap_or(0)))
}

/// Addresses that the process has taken, where Linux says so, in kB.
#[cfg(unix)]
fn mapped() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let size = status
        .lines()
        .find_map(|line| line.strip_prefix("VmSize:"))?;
    let size: u64 = size.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(size.saturating_mul(1 << 10))
}

#[cfg(not(unix))]
fn addresses() -> Option<u64> {
    None
}

/// On Linux what is free or can be freed, with what is free of the swap, both within the limits of the
/// control groups; elsewhere, where systems make room as they go, what there is in all.
fn of_machine() -> Option<u64> {
    if !sysinfo::IS_SUPPORTED_SYSTEM {
        return None;
    }
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    if !cfg!(target_os = "linux") {
        return Some(system.total_memory()).filter(|&bytes| bytes > 0);
    }
    Some(Left::here().of_machine(system.available_memory(), system.free_swap()))
}

/// An empty vector with room for as many numbers as a user asks for, if the machine has so much.
pub(crate) fn room_within<N>(what: &'static str, numbers: usize) -> Result<Vec<N>> {
    let bytes = numbers as u128 * size_of::<N>() as u128;
    if bytes >= SMALL && available().is_some_and(|there| bytes > there.into()) {
        return Err(refused::<N>(what, numbers));
    }
    room_for(what, numbers)
}

/// An empty vector with room for so many numbers.
pub(crate) fn room_for<N>(what: &'static str, numbers: usize) -> Result<Vec<N>> {
    let mut room = vec![];
    let reserved = room.try_reserve_exact(numbers);
    reserved.map_err(|_| refused::<N>(what, numbers))?;
    Ok(room)
}

/// One more of many.
pub(crate) fn push<N>(what: &'static str, many: &mut Vec<N>, one: N) -> Result<()> {
    let more = many.len() + 1;
    many.try_reserve(1).map_err(|_| refused::<N>(what, more))?;
    many.push(one);
    Ok(())
}

/// Several more of many.
pub(crate) fn extend<N: Copy>(what: &'static str, many: &mut Vec<N>, more: &[N]) -> Result<()> {
    let all = many.len() + more.len();
    let reserved = many.try_reserve(more.len());
    reserved.map_err(|_| refused::<N>(what, all))?;
    many.extend_from_slice(more);
    Ok(())
}

/// So many zeros.
pub(crate) fn zeros<N: bytemuck::Zeroable>(what: &'static str, numbers: usize) -> Result<Vec<N>> {
    bytemuck::allocation::try_zeroed_vec(numbers).map_err(|()| refused::<N>(what, numbers))
}

fn refused<N>(what: &'static str, numbers: usize) -> Error {
    Error::AllocationFailed {
        what,
        bytes: numbers as u128 * size_of::<N>() as u128,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_more_than_there_is_is_refused_with_both_numbers() {
        let need = MemoryNeed {
            states: 3 << 30,
            evaluations: 1 << 30,
            ..Default::default()
        };
        assert!(need.within(4 << 30).is_ok());
        assert!(need.within((4 << 30) - 1).is_err());
        let error = need.within(1 << 30).unwrap_err();
        let text = "the solve needs 4.0 GiB (3.0 GiB for the states that Checkpoint keeps, \
                    1.0 GiB for the evaluations that ActivationCache keeps) of memory, \
                    and 1.0 GiB can be had: ";
        assert!(error.to_string().starts_with(text), "{error}");
    }

    #[test]
    fn no_machine_has_more_than_an_address_can_name() {
        let huge = MemoryNeed {
            states: u128::MAX,
            evaluations: 1,
            returned: 1,
            work: 0,
        };
        assert!(huge.check().is_err());
        assert!(room_for::<u64>("x", usize::MAX).is_err());
        assert!(room_within::<u64>("x", 1 << 59).is_err());
        assert!(zeros::<u64>("x", usize::MAX).is_err());
    }

    #[test]
    fn the_system_says_what_there_is() {
        // Tests run where it can: this one holds a page of it at least.
        assert!(available().is_none_or(|bytes| bytes > 4096));
    }
}
