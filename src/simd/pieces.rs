//! Work on the pieces of a slice, on all threads.

use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::{Mutex, PoisonError};

use candle_core::utils::barrier_pool;

/// Runs `work` on the calling thread and on others, `threads` in all at most.  It must not call candle's operations nor this
/// function.
///
/// The others are the threads of candle's elementwise operations, if at least half of them have something to do.  After a
/// piece of work they wait for the next one for some hundred microseconds before they sleep; to wake a thread takes 10 to 200
/// microseconds.  They serve one caller after the other.
fn together(threads: usize, work: &(dyn Fn() + Sync)) {
    let threads = threads.min(rayon::current_num_threads());
    if threads < 2 {
        return work();
    }
    let pool = barrier_pool();
    if 2 * threads > pool.n_workers() {
        // A panic that went through the pool would leave it locked.
        let panicked = Mutex::new(None);
        pool.execute_chunked(threads, |share| {
            let run = AssertUnwindSafe(|| share.for_each(|_| work()));
            if let Err(payload) = catch_unwind(run) {
                *panicked.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
            }
        });
        if let Some(payload) = panicked
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
        {
            resume_unwind(payload);
        }
        return;
    }
    rayon::in_place_scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| work());
        }
        work();
    });
}

/// Calls `each` for every piece, on all threads if there are several; a thread takes the next piece when it has done one.
pub(crate) fn for_each<I>(pieces: I, each: &(dyn Fn(I::Item) + Sync))
where
    I: ExactSizeIterator<Item: Send> + Send,
{
    let threads = pieces.len();
    let pieces = Mutex::new(pieces);
    let next = || {
        let mut pieces = pieces.lock().unwrap_or_else(PoisonError::into_inner);
        pieces.next()
    };
    together(threads, &|| {
        while let Some(piece) = next() {
            each(piece);
        }
    });
}

/// Elements of which every piece but the last has a multiple: whole vectors, and whole blocks of a fused sum.
const BLOCK: usize = 1024;

/// The size of the pieces of n elements that threads take.  Up to `alone` elements are one piece, because a second thread
/// would not make them faster.  More elements are cut into pieces of about a quarter of `alone`, all of one size but the
/// last, so that the threads finish at about the same time.
pub(crate) fn share(n: usize, alone: usize) -> usize {
    if n <= alone {
        return alone;
    }
    let pieces = n.div_ceil(alone.div_ceil(4));
    n.div_ceil(pieces).next_multiple_of(BLOCK)
}

/// Calls `each` for every piece of so many elements, with the place where it begins, on all threads if there are
/// several pieces.  It is compiled once for each type of element, and not once more for each kind of work.
pub(crate) fn by_piece<X: Send>(
    all: &mut [X],
    size: usize,
    each: &(dyn Fn(usize, &mut [X]) + Sync),
) {
    if all.len() <= size {
        return each(0, all);
    }
    let pieces = all.chunks_mut(size).enumerate();
    for_each(pieces, &|(i, piece)| each(i * size, piece));
}

/// The same for the pieces of two slices of one length.
pub(crate) fn by_pieces_of_two<X: Send>(
    [first, second]: [&mut [X]; 2],
    size: usize,
    each: &(dyn Fn(usize, [&mut [X]; 2]) + Sync),
) {
    if first.len() <= size {
        return each(0, [first, second]);
    }
    let pieces = first.chunks_mut(size).zip(second.chunks_mut(size));
    for_each(pieces.enumerate(), &|(i, (first, second))| {
        each(i * size, [first, second]);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_in_a_piece_reaches_the_caller_and_leaves_the_threads_as_they_were() {
        for _ in 0..2 {
            let mut all = vec![0; 64];
            let caught = catch_unwind(AssertUnwindSafe(|| {
                by_piece(&mut all, 1, &|at, _| assert!(at != 40, "a piece"));
            }));
            assert!(caught.is_err());
            by_piece(&mut all, 1, &|at, piece| piece[0] = at);
            assert_eq!(all, (0..64).collect::<Vec<_>>());
        }
    }

    #[test]
    fn many_elements_are_cut_into_pieces_of_nearly_one_size() {
        for n in [0, 1, 4096] {
            assert_eq!(share(n, 4096), 4096);
        }
        for n in [4097, 5000, 12_000, 12_289, 1 << 20] {
            let size = share(n, 4096);
            assert!(size.is_multiple_of(BLOCK) && size <= 4096 / 4, "{n} {size}");
        }
        // 173 312 numbers in six pieces, the last of which is 17 % smaller.
        assert_eq!(share(173_312, 1 << 17), 29_696);
    }

    #[test]
    fn every_piece_is_seen_once_with_its_place() {
        for n in [0, 1, 4, 5, 13] {
            let mut all = vec![0; n];
            by_piece(&mut all, 4, &|at, piece| {
                for (i, x) in (at..).zip(piece) {
                    *x += i + 1;
                }
            });
            assert_eq!(all, (1..=n).collect::<Vec<_>>());
            let (mut first, mut second) = (vec![0; n], vec![0; n]);
            by_pieces_of_two([&mut first, &mut second], 4, &|at, [first, second]| {
                for ((i, x), y) in (at..).zip(first).zip(second) {
                    (*x, *y) = (*x + i + 1, *y + 2 * i);
                }
            });
            assert_eq!(first, (1..=n).collect::<Vec<_>>());
            assert_eq!(second, (0..n).map(|i| 2 * i).collect::<Vec<_>>());
        }
    }
}
