//! Which vector unit runs: the best that the machine has, or the best that the user allows.

use std::ffi::{OsStr, OsString};
use std::sync::OnceLock;

use pulp::Arch;

use crate::error::{Error, Result};

/// The variable of the environment that caps the unit.
const VARIABLE: &str = "CANDLE_DIFFEQ_SIMD";

/// The best unit that is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cap {
    Avx512,
    Avx2,
    None,
}

impl Cap {
    /// The one that a word asks for.
    fn named(word: &OsStr) -> Option<Self> {
        match word.to_str()? {
            "avx512" => Some(Self::Avx512),
            "avx2" => Some(Self::Avx2),
            "none" => Some(Self::None),
            _ => None,
        }
    }

    /// The best unit of this machine that is allowed.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn best(self) -> Arch {
        if self == Self::Avx512 {
            if let Some(s) = pulp::x86::V4::try_new() {
                return Arch::V4(s);
            }
        }
        match pulp::x86::V3::try_new() {
            Some(s) if self != Self::None => Arch::V3(s),
            _ => Arch::Scalar,
        }
    }

    /// The best unit of this machine that is allowed: NEON, say, is below both units of x86.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn best(self) -> Arch {
        match self {
            Self::Avx512 | Self::Avx2 => Arch::new(),
            Self::None => Arch::Scalar,
        }
    }
}

/// The vector unit of this process.
///
/// # Errors
/// [`Error::UnknownVectorUnit`] if the environment asks for one that there is not.
pub(crate) fn unit() -> Result<Arch> {
    #[cfg(test)]
    if let Some(cap) = allowed::here() {
        return Ok(cap.best());
    }
    // Read once: both passes of a solve must run on the same unit.
    static UNIT: OnceLock<std::result::Result<Arch, String>> = OnceLock::new();
    let unit = UNIT.get_or_init(|| asked_for(std::env::var_os(VARIABLE)));
    unit.clone()
        .map_err(|given| Error::UnknownVectorUnit { given })
}

/// The unit that a value of the variable stands for, or the value.  An empty one is as good as none.
fn asked_for(value: Option<OsString>) -> std::result::Result<Arch, String> {
    let Some(word) = value.filter(|word| !word.is_empty()) else {
        return Ok(Arch::new());
    };
    match Cap::named(&word) {
        Some(cap) => Ok(cap.best()),
        None => Err(word.to_string_lossy().into_owned()),
    }
}

/// Other units for the tests of one process.
#[cfg(test)]
pub(crate) mod allowed {
    use std::cell::Cell;

    use super::{Arch, Cap};

    thread_local! {
        static CAP: Cell<Option<Cap>> = const { Cell::new(None) };
    }

    /// The cap that this thread is under.
    pub(super) fn here() -> Option<Cap> {
        CAP.get()
    }

    /// Runs `f` under a cap, as far as this thread asks for the unit: the threads of a solve are told.
    pub(crate) fn under<R>(cap: Cap, f: impl FnOnce() -> R) -> R {
        struct Restored(Option<Cap>);
        impl Drop for Restored {
            fn drop(&mut self) {
                CAP.set(self.0);
            }
        }
        let _restored = Restored(CAP.replace(Some(cap)));
        f()
    }

    /// Caps under which this machine has a unit each.
    pub(crate) fn all() -> Vec<Cap> {
        let mut units = vec![];
        let mut caps = vec![];
        for cap in [Cap::Avx512, Cap::Avx2, Cap::None] {
            let unit = std::mem::discriminant::<Arch>(&cap.best());
            if !units.contains(&unit) {
                units.push(unit);
                caps.push(cap);
            }
        }
        caps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(word: &str) -> std::result::Result<std::mem::Discriminant<Arch>, String> {
        asked_for(Some(word.into())).map(|arch| std::mem::discriminant(&arch))
    }

    #[test]
    fn a_word_caps_the_unit_and_what_is_not_there_falls_to_the_best_below() {
        let best = std::mem::discriminant(&Arch::new());
        let scalar = std::mem::discriminant(&Arch::Scalar);
        assert_eq!(asked("avx512"), Ok(best));
        assert_eq!(asked("none"), Ok(scalar));
        assert_eq!(asked(""), Ok(best));
        assert!(asked_for(None).is_ok_and(|arch| std::mem::discriminant(&arch) == best));
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = pulp::x86::V3::try_new().map(Arch::V3);
            let avx2 = std::mem::discriminant(&avx2.unwrap_or(Arch::Scalar));
            assert_eq!(asked("avx2"), Ok(avx2));
        }
        #[cfg(not(target_arch = "x86_64"))]
        assert_eq!(asked("avx2"), Ok(best));
    }

    #[test]
    fn an_unknown_word_is_handed_back() {
        for word in ["AVX2", "sse", "avx2 ", "1"] {
            assert_eq!(asked(word), Err(word.to_owned()));
        }
    }

    #[test]
    fn a_thread_may_be_under_a_cap_for_a_while() {
        let now = || unit().map(|arch| std::mem::discriminant(&arch)).unwrap();
        let before = now();
        for cap in allowed::all() {
            let under = allowed::under(cap, now);
            assert_eq!(under, std::mem::discriminant(&cap.best()));
        }
        assert_eq!(now(), before);
    }
}
