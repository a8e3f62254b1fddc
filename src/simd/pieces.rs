//! Work on the pieces of a slice, on all threads.

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
    rayon::scope(|scope| {
        for (i, piece) in all.chunks_mut(size).enumerate() {
            scope.spawn(move |_| each(i * size, piece));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

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
        }
    }
}
