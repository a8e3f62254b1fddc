//! Times that a backward solve has to meet: where the field jumps, and where steps must end.

use crate::time::coincide;

/// Times, ascending.
#[derive(Clone, Debug, Default)]
pub(super) struct Instants(Vec<f64>);

impl Instants {
    pub(super) fn new(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        times.dedup();
        Self(times)
    }

    /// Whether one of them is t, but for rounding.
    pub(super) fn has(&self, t: f64) -> bool {
        !self.within([t, t]).is_empty()
    }

    /// Those from one time to another, both included, but for rounding.
    pub(super) fn within(&self, [a, b]: [f64; 2]) -> &[f64] {
        let (low, high) = (a.min(b), a.max(b));
        let mut from = self.0.partition_point(|t| *t < low);
        let mut to = self.0.partition_point(|t| *t <= high);
        while from > 0 && coincide(self.0[from - 1], low) {
            from -= 1;
        }
        while to < self.0.len() && coincide(self.0[to], high) {
            to += 1;
        }
        &self.0[from..to]
    }

    /// The first of them on the way from one time to another, or this other one.
    pub(super) fn until(&self, t: f64, towards: f64) -> f64 {
        let between = |at: &&f64| {
            let apart = !coincide(**at, t) && !coincide(**at, towards);
            apart && (**at - t) * (**at - towards) < 0.0
        };
        let mut on_the_way = self.within([t, towards]).iter().filter(between);
        let first = match towards < t {
            true => on_the_way.next_back(),
            false => on_the_way.next(),
        };
        first.copied().unwrap_or(towards)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_on_the_way_is_found_in_both_directions() {
        let times = Instants::new(vec![2.0, 0.5, 1.0, 1.0]);
        assert_eq!(times.until(3.0, 0.0), 2.0);
        assert_eq!(times.until(2.0, 0.0), 1.0);
        assert_eq!(times.until(2.0f64.next_up(), 0.0), 1.0);
        assert_eq!(times.until(0.0, 3.0), 0.5);
        assert_eq!(times.until(0.5, 0.25), 0.25);
        assert_eq!(times.within([2.0, 1.0]), [1.0, 2.0]);
        assert_eq!(
            times.within([1.0f64.next_up(), 2.0f64.next_down()]),
            [1.0, 2.0]
        );
        assert!(times.has(0.5f64.next_down()) && !times.has(0.6));
    }
}
