//! Bits of the noise on every vector unit of the machine.

use super::*;
use crate::simd::unit::{allowed, Cap};

#[test]
fn bits_are_the_same_on_every_vector_unit() {
    let on = |cap: Cap| {
        allowed::under(cap, || {
            let noise = Noise::seeded(9);
            let drawn = noise.draw((3, [0.0, 1.0]), [0.0, 8.0], (37, 5), true);
            let Drawn { w, u } = drawn.unwrap().unwrap();
            [w, u]
        })
    };
    let [wide, narrow, none] = [Cap::Avx512, Cap::Avx2, Cap::None].map(on);
    assert!(wide == none && narrow == none);
}
