//! Bits of the noise on every vector unit of the machine.

use super::*;
use crate::simd::unit::{allowed, Cap};

#[test]
fn bits_are_the_same_on_every_vector_unit() {
    let on = |cap: Cap| {
        allowed::under(cap, || {
            let noise = Noise::seeded(9);
            let drawn = noise.draw(Step::free(3, 0.0, 1.0, 1.0), [0.0, 8.0], (37, 5), true);
            let Drawn { w, u } = drawn.unwrap().unwrap();
            [w, u]
        })
    };
    let [wide, narrow, none] = [Cap::Avx512, Cap::Avx2, Cap::None].map(on);
    assert!(wide == none && narrow == none);
}

#[test]
fn lanes_of_a_tile_have_the_bits_of_their_rows() {
    let (span, step) = ([0.0, 8.0], Step::free(3, 0.5, 0.75, 1.25));
    let tree = Noise::from(BrownianTree::new(4, 12).unwrap());
    for noise in [Noise::seeded(9), Noise::seeded(9).from_row(70), tree] {
        for channels in [1, 4, 5] {
            let whole = noise.draw(step, span, (100, channels), true);
            let Drawn { w, u } = whole.unwrap().unwrap();
            // Eight lanes with three rows left, sixteen, and a number that fills no vector.
            for (first, rows, batch) in [(97, 3, 8), (16, 16, 16), (0, 3, 3), (32, 32, 32)] {
                let held: Vec<_> = (0..batch).map(|l| first + l.min(rows - 1)).collect();
                for cap in [Cap::Avx512, Cap::Avx2, Cap::None] {
                    let mut out = [0, 1].map(|_| vec![0.0; channels * batch]);
                    let [lw, lu] = &mut out;
                    allowed::under(cap, || noise.draw_lanes(step, span, &held, [lw, lu])).unwrap();
                    for (lane, row) in held.iter().enumerate() {
                        for c in 0..channels {
                            assert_eq!(out[0][c * batch + lane], w[row * channels + c]);
                            assert_eq!(out[1][c * batch + lane], u[row * channels + c]);
                        }
                    }
                }
            }
        }
    }
}
