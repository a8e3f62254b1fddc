//! Groups of tiles on all threads, and the order in which their results are added.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// An error in a tile, and when it happened: the solve returns the error that is first in the order of the pass, and of
/// those at one time the one in the first group.
pub(super) struct Failure {
    pub(super) at: (usize, usize),
    pub(super) error: Error,
}

impl Failure {
    /// Whether one that was found happened before this step.
    pub(super) fn is_before(found: &Option<Self>, step: usize) -> bool {
        found.as_ref().is_some_and(|found| found.at.0 < step)
    }

    /// Keeps the one of both that is first in the order of the pass, of those at one time the one that is there.
    pub(super) fn first(found: &mut Option<Self>, next: Self) {
        if found.as_ref().is_none_or(|found| next.at < found.at) {
            *found = Some(next);
        }
    }
}

/// Runs every group, on all threads, each thread with its own scratch memory, and folds the results in
/// the order of the groups; a result waits only for those of earlier groups.
pub(super) fn on_all_threads<G: Sync, W, R: Send>(
    groups: &[G],
    scratch: &(dyn Fn() -> W + Sync),
    run: &(dyn Fn(&mut W, &G) -> std::result::Result<R, Failure> + Sync),
    fold: &mut (dyn FnMut(usize, R) + Send),
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let folded = Mutex::new(Folded {
        fold,
        done: 0,
        waiting: groups.iter().map(|_| None).collect(),
        failure: None,
    });
    let work = || {
        let mut scratch = scratch();
        while let Some((g, group)) = {
            let g = next.fetch_add(1, Ordering::Relaxed);
            groups.get(g).map(|group| (g, group))
        } {
            let result = run(&mut scratch, group);
            let mut folded = folded.lock().unwrap_or_else(PoisonError::into_inner);
            folded.take(g, result);
        }
    };
    match groups.len().min(rayon::current_num_threads()) {
        0 | 1 => work(),
        threads => rayon::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|_| work());
            }
        }),
    }
    let folded = folded.into_inner().unwrap_or_else(PoisonError::into_inner);
    match folded.failure {
        Some((_, failure)) => Err(failure.error),
        None => Ok(()),
    }
}

/// Results of groups, folded in order.
struct Folded<'f, R> {
    fold: &'f mut (dyn FnMut(usize, R) + Send),
    /// Groups folded so far.
    done: usize,
    waiting: Vec<Option<R>>,
    /// The first, and its group.
    failure: Option<(usize, Failure)>,
}

impl<R> Folded<'_, R> {
    fn take(&mut self, group: usize, result: std::result::Result<R, Failure>) {
        match result {
            Ok(result) => self.waiting[group] = Some(result),
            Err(failure) => {
                let is_first = |(g, first): &(usize, Failure)| (failure.at, group) < (first.at, *g);
                if self.failure.as_ref().is_none_or(is_first) {
                    self.failure = Some((group, failure));
                }
            }
        }
        while let Some(result) = self.waiting.get_mut(self.done).and_then(Option::take) {
            (self.fold)(self.done, result);
            self.done += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_failures_at_one_time_the_one_in_the_first_group_is_the_error() {
        let of = |at, leaf| Failure {
            at,
            error: Error::NonFiniteState { leaf },
        };
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            for (times, expected) in [([(0, 0); 3], 0), ([(3, 1), (2, 7), (2, 7)], 1)] {
                let mut folded = Folded {
                    fold: &mut |_, ()| {},
                    done: 0,
                    waiting: vec![None; 3],
                    failure: None,
                };
                for group in order {
                    folded.take(group, Err(of(times[group], group)));
                }
                let Some((_, failure)) = folded.failure else {
                    panic!("no failure");
                };
                assert!(
                    matches!(failure.error, Error::NonFiniteState { leaf } if leaf == expected)
                );
            }
        }
    }
}
