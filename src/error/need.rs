//! What a solve needs of memory, for the error that says that there is too little.

/// What a solve holds at once, in bytes, at least: what a field itself needs is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryNeed {
    /// States that are kept for the backward pass, as [`Checkpoint`](crate::options::Checkpoint) says, and what
    /// keeping one costs beside its numbers.
    pub states: u128,
    /// Evaluations that are kept, as [`ActivationCache`](crate::options::ActivationCache) says.
    pub evaluations: u128,
    /// States that are returned, as [`Output`](crate::options::Output) says: each by itself, and at the end all of them
    /// joined.  On the general path one that is kept as it was computed takes no further memory by itself.
    pub returned: u128,
    /// The evaluations at hand, where rows are solved tile by tile on several threads.
    pub work: u128,
}

impl MemoryNeed {
    /// All together.
    pub fn total(&self) -> u128 {
        let sum = self.states.saturating_add(self.evaluations);
        sum.saturating_add(self.returned).saturating_add(self.work)
    }
}

impl std::fmt::Display for MemoryNeed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = [
            (self.states, "the states that Checkpoint keeps"),
            (
                self.evaluations,
                "the evaluations that ActivationCache keeps",
            ),
            (self.returned, "the states that are returned"),
            (self.work, "the evaluations at hand"),
        ];
        write!(f, "{}", Bytes(self.total()))?;
        let mut between = " (";
        for (bytes, what) in parts.into_iter().filter(|(bytes, _)| *bytes > 0) {
            write!(f, "{between}{} for {what}", Bytes(bytes))?;
            between = ", ";
        }
        write!(f, "{}", if between == ", " { ")" } else { "" })
    }
}

/// A number of bytes as one reads it.
pub(crate) struct Bytes(pub(crate) u128);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let exponent = self.0.max(1).ilog2() / 10;
        match (exponent as usize).min(UNITS.len()).checked_sub(1) {
            None => write!(f, "{} B", self.0),
            Some(unit) => {
                let number = self.0 as f64 / 1024f64.powi(unit as i32 + 1);
                write!(f, "{number:.1} {}", UNITS[unit])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_in_the_largest_unit_that_they_fill() {
        let text = |bytes: u128| Bytes(bytes).to_string();
        assert_eq!([0, 1, 1023].map(text), ["0 B", "1 B", "1023 B"]);
        assert_eq!(text(1024), "1.0 KiB");
        assert_eq!(text(3 << 39), "1.5 TiB");
        assert_eq!(text(1 << 75), "32768.0 EiB");
    }
}
