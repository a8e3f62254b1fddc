//! Rows of a state into the lanes of a tile, and back.

use super::Element;

/// What the lanes of a tile hold that no row is left for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Idle {
    /// Copies of the last row: of states, so that a lane without a row does what a row does.
    Copies,
    /// Zeros: of cotangents, so that it adds nothing to a sum.
    Zeros,
}

/// Rows `[row][feature]` of a batch into a tile `[feature][B]`.
pub(crate) fn load<T: Element>(
    rows: &[T],
    features: usize,
    batch: usize,
    idle: Idle,
    tile: &mut [T],
) {
    for (b, row) in rows.chunks_exact(features).enumerate() {
        for (i, &x) in row.iter().enumerate() {
            tile[i * batch + b] = x;
        }
    }
    let used = rows.len() / features;
    for feature in tile.chunks_exact_mut(batch) {
        let last = match idle {
            Idle::Copies => used.checked_sub(1).map(|last| feature[last]),
            Idle::Zeros => None,
        };
        feature[used..].fill(last.unwrap_or_default());
    }
}

/// The inverse of [`load`].
pub(crate) fn store<T: Element>(tile: &[T], features: usize, batch: usize, rows: &mut [T]) {
    for (b, row) in rows.chunks_exact_mut(features).enumerate() {
        for (i, x) in row.iter_mut().enumerate() {
            *x = tile[i * batch + b];
        }
    }
}
