//! The exact sum of two numbers: the rounded sum, and what rounding has taken from it.
//!
//! s = fl(a + b) and e with s + e = a + b exactly, for any a and b whose sum does not overflow (D. E. Knuth, "The Art of
//! Computer Programming" 2, §4.2.2).  It rests on the rounding of every operation by itself, so nothing here may be
//! reassociated or contracted; Rust does neither.

use std::ops::{Add, Sub};

use pulp::Simd;

use super::{Element, Kernel};

/// fl(a + b), and a + b − fl(a + b).
#[inline(always)]
pub(crate) fn two_sum<T: Copy + Add<Output = T> + Sub<Output = T>>(a: T, b: T) -> [T; 2] {
    let sum = a + b;
    let of_b = sum - a;
    [sum, (a - (sum - of_b)) + (b - of_b)]
}

/// `[sum, lost] ← two_sum(sum, lost)`, element by element.
pub(crate) struct TwoSums<'a, T> {
    pub(crate) sum: &'a mut [T],
    pub(crate) lost: &'a mut [T],
}

impl<T: Element, S: Simd> Kernel<S> for TwoSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let lost = T::vectors_mut::<S>(self.lost).iter_mut();
        for (sum, lost) in T::vectors_mut::<S>(self.sum).iter_mut().zip(lost) {
            let (a, b) = (*sum, *lost);
            *sum = T::plus(s, a, b);
            let of_b = T::minus(s, *sum, a);
            let of_a = T::minus(s, *sum, of_b);
            *lost = T::plus(s, T::minus(s, a, of_a), T::minus(s, b, of_b));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_two_parts_of_a_sum_are_the_sum(a in any::<i32>(), b in any::<i32>(), down in -20i32..20) {
            // Numbers of f32 whose sum f64 holds.
            let (a, b) = (a as f32, b as f32 * 2f32.powi(down));
            let [sum, lost] = two_sum(a, b);
            prop_assert_eq!(sum, a + b);
            prop_assert_eq!(f64::from(sum) + f64::from(lost), f64::from(a) + f64::from(b));
            // Once they are apart, they stay as they are.
            prop_assert_eq!(two_sum(sum, lost), [sum, lost]);
        }
    }

    #[test]
    fn a_sum_that_has_lost_nothing_stays_as_it_is() {
        for x in [0.0, -1.5, f32::MIN_POSITIVE, 1e30] {
            assert_eq!(two_sum(x, 0.0), [x, 0.0]);
        }
    }
}
