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

/// The same for the pieces of two slices of one length.
pub(crate) fn by_pieces_of_two<X: Send>(
    [first, second]: [&mut [X]; 2],
    size: usize,
    each: &(dyn Fn(usize, [&mut [X]; 2]) + Sync),
) {
    if first.len() <= size {
        return each(0, [first, second]);
    }
    rayon::scope(|scope| {
        let pieces = first.chunks_mut(size).zip(second.chunks_mut(size));
        for (i, (first, second)) in pieces.enumerate() {
            scope.spawn(move |_| each(i * size, [first, second]));
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
