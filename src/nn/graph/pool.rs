//! Memory of evaluations over a graph, which the next evaluation uses again.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crate::simd::scratch::Scratch;
use crate::simd::Element;

/// Memory of evaluations that are over, the oldest first.
#[derive(Default)]
pub(super) struct Pool(Mutex<VecDeque<Scratch>>);

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pool")
    }
}

/// So many numbers, which go back to the pool; they hold what was there before.
pub(super) struct Buffer {
    scratch: Option<Scratch>,
    pool: Arc<Pool>,
}

impl Buffer {
    pub(super) fn new<T: Element>(count: usize, pool: &Arc<Pool>) -> Self {
        let fits = |s: &Scratch| s.numbers::<T>().len() == count;
        let found = {
            let mut free = pool.0.lock().unwrap_or_else(PoisonError::into_inner);
            let at = free.iter().rposition(fits);
            at.and_then(|at| free.remove(at))
        };
        // Other threads do not wait for an allocation.
        let scratch = found.unwrap_or_else(|| Scratch::new(count * size_of::<T>()));
        Self {
            scratch: Some(scratch),
            pool: Arc::clone(pool),
        }
    }

    pub(super) fn numbers<T: Element>(&self) -> &[T] {
        self.scratch.as_ref().map_or(&[], Scratch::numbers)
    }

    pub(super) fn numbers_mut<T: Element>(&mut self) -> &mut [T] {
        self.scratch.as_mut().map_or(&mut [], Scratch::numbers_mut)
    }
}

/// Bytes that wait for the next evaluation at most: of more, the oldest memory goes back.
const WAITING: usize = 64 << 20;

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(scratch) = self.scratch.take() else {
            return;
        };
        // Other threads do not wait until memory has gone back.
        let mut over = vec![];
        let mut free = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.push_back(scratch);
        let bytes = |s: &Scratch| s.numbers::<u8>().len();
        let mut all: usize = free.iter().map(bytes).sum();
        while all > WAITING {
            let Some(oldest) = free.pop_front() else {
                break;
            };
            all -= bytes(&oldest);
            over.push(oldest);
        }
        drop(free);
    }
}
