//! Fields that are linear maps of a gradient.

use pulp::Simd;

use crate::simd::Element;

/// The linear map from the gradient of a potential to a velocity.
#[derive(Clone, Copy, Debug)]
pub enum Turn {
    /// −g.
    Down,
    /// (g_p, −g_q) of g = (g_q, g_p).
    Symplectic,
}

impl Turn {
    /// Replaces g by A g.
    #[inline(always)]
    pub(super) fn apply<T: Element, S: Simd>(self, s: S, g: &mut [T::Vector<S>]) {
        let zero = T::zeros::<S>();
        match self {
            Self::Down => {
                for g in g {
                    *g = T::minus(s, zero, *g);
                }
            }
            Self::Symplectic => {
                let (of_q, of_p) = g.split_at_mut(g.len() / 2);
                for (q, p) in of_q.iter_mut().zip(of_p) {
                    (*q, *p) = (*p, T::minus(s, zero, *q));
                }
            }
        }
    }

    /// Aᵀ v.
    #[inline(always)]
    pub(super) fn pull<T: Element, S: Simd>(
        self,
        s: S,
        v: &[T::Vector<S>],
        out: &mut [T::Vector<S>],
    ) {
        let zero = T::zeros::<S>();
        match self {
            Self::Down => {
                for (out, v) in out.iter_mut().zip(v) {
                    *out = T::minus(s, zero, *v);
                }
            }
            Self::Symplectic => {
                let (of_q, of_p) = v.split_at(v.len() / 2);
                let (q, p) = out.split_at_mut(v.len() / 2);
                for (out, v) in q.iter_mut().zip(of_p) {
                    *out = T::minus(s, zero, *v);
                }
                p.copy_from_slice(of_q);
            }
        }
    }
}
