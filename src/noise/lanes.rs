//! The noise of the rows that the lanes of a tile hold: the numbers of [`Noise::draw`], lane by lane.

use pulp::{Simd, WithSimd};

use super::draw::{Place, Purpose, LANES};
use super::{normal, philox, spread_of_area, Drawn, Noise, Source};
use crate::error::Result;
use crate::schedule::Step;
use crate::simd::unit;

impl Noise {
    /// Whether it is a function of a seed, so that any row can be drawn by itself.
    pub(crate) fn is_drawn(&self) -> bool {
        self.given().is_none()
    }

    /// The increments of a step, in units of its length, ξ and (unless it is empty) η, each
    /// `[channel][lane]`.  Lanes hold consecutive rows, and then copies of the last one.
    pub(crate) fn draw_lanes(
        &self,
        step: Step,
        span: [f64; 2],
        rows: &[usize],
        [w, u]: [&mut [f64]; 2],
    ) -> Result<()> {
        let (Some(first), Some(last)) = (rows.first(), rows.last()) else {
            return Ok(());
        };
        match &self.0 {
            Source::Given(_) => {}
            Source::Tree(tree) => {
                let channels = w.len() / rows.len();
                let mut tree = *tree;
                tree.first_row += *first as u64;
                let Drawn { w: ws, u: us } = tree.step(step, span, (last + 1 - first, channels))?;
                for (lane, row) in rows.iter().enumerate() {
                    for c in 0..channels {
                        let from = (row - first) * channels + c;
                        w[c * rows.len() + lane] = ws[from];
                        if let Some(u) = u.get_mut(c * rows.len() + lane) {
                            *u = us[from];
                        }
                    }
                }
            }
            &Source::Steps { seed, first_row } => {
                let of = |purpose| Place {
                    seed,
                    purpose,
                    at: step.index as u64,
                    first_row,
                    blocks: 0,
                };
                let unit = unit()?;
                let draw = |purpose, out: &mut [f64]| {
                    unit.dispatch(Lanes {
                        place: of(purpose),
                        rows,
                        out,
                    });
                };
                draw(Purpose::Increment, w);
                if !u.is_empty() {
                    draw(Purpose::Area, u);
                    for (u, w) in u.iter_mut().zip(&*w) {
                        *u = 0.5 * w + spread_of_area() * *u;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Normal numbers of rows, `[channel][lane]`: channels 2b and 2b + 1 of a row are those of its block b.
struct Lanes<'a> {
    place: Place,
    rows: &'a [usize],
    out: &'a mut [f64],
}

impl WithSimd for Lanes<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { place, rows, out } = self;
        let (key, [at, purpose]) = place.key();
        let batch = rows.len();
        // Of the last block of an odd number of channels, the second numbers are left out.
        for (block, channels) in out.chunks_mut(2 * batch).enumerate() {
            for (chunk, rows) in rows.chunks(LANES).enumerate() {
                let mut words = [[at; LANES], [0; LANES], [0; LANES], [purpose; LANES]];
                for (word, row) in words[1].iter_mut().zip(rows) {
                    *word = (place.first_row + *row as u64) as u32;
                }
                words[2] = [block as u32; LANES];
                let pairs = normal::pairs(&philox::lanes(words, key));
                for (channel, numbers) in channels.chunks_mut(batch).zip(&pairs) {
                    channel[chunk * LANES..][..rows.len()].copy_from_slice(&numbers[..rows.len()]);
                }
            }
        }
    }
}
