//! Philox 4×32 with ten rounds: random words as a function of a counter and a key.
//!
//! J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.  The constants are
//! the paper's, and the answers of its library Random123 are tests below.

/// The multipliers of a round.
const MULTIPLY: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];

/// What is added to the key after each round: the golden ratio and √3 − 1.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Four random words of one counter under one key.
///
/// ```
/// use candle_diffeq::sde::philox4x32;
/// let words = philox4x32([0; 4], [0; 2]);
/// assert_eq!(words, [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
/// ```
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [[a], [b], [c], [d]] = lanes(counter.map(|word| [word]), key);
    [a, b, c, d]
}

/// The same of as many counters as there are lanes: word w of lane l is `words[w][l]`.
#[inline(always)]
// Lanes of four arrays at once.
#[allow(clippy::needless_range_loop)]
pub(super) fn lanes<const L: usize>(mut words: [[u32; L]; 4], mut key: [u32; 2]) -> [[u32; L]; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [0, 1].map(|i| key[i].wrapping_add(WEYL[i]));
        }
        for l in 0..L {
            let first = u64::from(words[0][l]) * u64::from(MULTIPLY[0]);
            let second = u64::from(words[2][l]) * u64::from(MULTIPLY[1]);
            words[0][l] = (second >> 32) as u32 ^ words[1][l] ^ key[0];
            words[1][l] = second as u32;
            words[2][l] = (first >> 32) as u32 ^ words[3][l] ^ key[1];
            words[3][l] = first as u32;
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_those_of_random123() {
        let known = [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, words) in known {
            assert_eq!(philox4x32(counter, key), words);
        }
    }

    #[test]
    fn every_lane_is_a_counter_of_its_own() {
        let counters: [[u32; 5]; 4] =
            std::array::from_fn(|w| std::array::from_fn(|l| (7 * w + 3 * l) as u32));
        let words = lanes(counters, [3, 4]);
        for l in 0..5 {
            let alone = philox4x32(counters.map(|word| word[l]), [3, 4]);
            assert_eq!(words.map(|word| word[l]), alone);
        }
    }
}
