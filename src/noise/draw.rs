//! Arrays of normal numbers, each a function of its counter only.

use pulp::{Simd, WithSimd};

use super::{normal, philox};
use crate::error::Result;
use crate::simd::pieces::by_pieces_of_two;
use crate::simd::unit;

/// Counters that are computed at once.
pub(super) const LANES: usize = 16;

/// Counters that one thread takes at a time; fewer are not worth a second thread.
const PIECE: usize = 1 << 12;

/// What numbers are for: those of different purposes are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The increment of a step.
    Increment = 0,
    /// Its space-time integral.
    Area = 1,
    /// The whole path of a tree.
    Root = 2,
    /// A node of a tree.
    Node = 3,
}

/// The numbers of one place in time: rows of blocks, each of which is a counter and gives two numbers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) seed: u64,
    pub(super) purpose: Purpose,
    /// A step, or a node of a tree, below 2⁵⁶.
    pub(super) at: u64,
    pub(super) first_row: u64,
    /// Blocks in a row.
    pub(super) blocks: usize,
}

impl Place {
    /// The key, and what all counters have in common: their first and their last word.
    #[inline(always)]
    pub(super) fn key(&self) -> ([u32; 2], [u32; 2]) {
        let Self {
            seed, purpose, at, ..
        } = *self;
        let upper = (purpose as u32) << 28 | (at >> 32) as u32 & 0x0fff_ffff;
        ([seed as u32, (seed >> 32) as u32], [at as u32, upper])
    }

    /// Two numbers of every block of so many rows: the first ones, then the second ones, `[row][block]`.
    pub(super) fn pairs(&self, rows: usize) -> Result<[Vec<f64>; 2]> {
        let unit = unit()?;
        let mut out = [0, 1].map(|_| vec![0.0; rows * self.blocks]);
        let [first, second] = &mut out;
        by_pieces_of_two([first, second], PIECE, &|at, out| {
            unit.dispatch(Piece {
                place: self,
                at,
                out,
            });
        });
        Ok(out)
    }

    /// Normal numbers of so many rows of `channels`, `[row][channel]`: a block has two of a row.
    pub(super) fn numbers(&self, rows: usize, channels: usize) -> Result<Vec<f64>> {
        let blocks = channels.div_ceil(2);
        let [first, second] = Self { blocks, ..*self }.pairs(rows)?;
        let mut out = Vec::with_capacity(rows * channels);
        for row in 0..rows {
            for channel in 0..channels {
                let block = row * blocks + channel / 2;
                out.push(if channel % 2 == 0 {
                    first[block]
                } else {
                    second[block]
                });
            }
        }
        Ok(out)
    }
}

/// A run of blocks, from `at` on.
struct Piece<'a> {
    place: &'a Place,
    at: usize,
    out: [&'a mut [f64]; 2],
}

impl WithSimd for Piece<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Place {
            first_row, blocks, ..
        } = *self.place;
        let (key, [at, upper]) = self.place.key();
        let [first, second] = self.out;
        for start in (0..first.len()).step_by(LANES) {
            let here = LANES.min(first.len() - start);
            let mut counters = [[at; LANES], [0; LANES], [0; LANES], [upper; LANES]];
            let [_, rows, columns, _] = &mut counters;
            let lanes = rows.iter_mut().zip(columns).take(here);
            for (flat, (row, column)) in (self.at + start..).zip(lanes) {
                *row = (first_row + (flat / blocks) as u64) as u32;
                *column = (flat % blocks) as u32;
            }
            let [a, b] = normal::pairs(&philox::lanes(counters, key));
            first[start..][..here].copy_from_slice(&a[..here]);
            second[start..][..here].copy_from_slice(&b[..here]);
        }
    }
}
