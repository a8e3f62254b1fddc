//! Memory of evaluations over a graph, which the next evaluation uses again.

use std::sync::{Arc, Mutex, PoisonError};

use crate::simd::scratch::Scratch;
use crate::simd::Element;

/// Memory of evaluations that are over.
#[derive(Default)]
pub(super) struct Pool(Mutex<Vec<Scratch>>);

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
            let at = free.iter().position(fits);
            at.map(|at| free.swap_remove(at))
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

/// Buffers that wait for the next evaluation at most: of more, memory goes back.
const WAITING: usize = 64;

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut free = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(scratch) = self.scratch.take().filter(|_| free.len() < WAITING) {
            free.push(scratch);
        }
    }
}
