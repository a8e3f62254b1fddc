//! Where the parts of slots and cotangents are.

use super::{End, EnergyTiles};
use crate::simd::Element;

/// Where the parts of a slot begin, in features.
pub(super) struct Places {
    /// Of what is kept.
    pub(super) delta_last: usize,
    pub(super) delta: usize,
    pub(super) bend: usize,
    pub(super) value: usize,
    pub(super) slope: usize,
    pub(super) kept: usize,
    /// Of the cotangents.
    pub(super) tangent: usize,
    pub(super) dot_last: usize,
    pub(super) dot: usize,
    pub(super) cotangents: usize,
}

impl<T: Element> EnergyTiles<T> {
    pub(super) fn places(&self) -> Places {
        let (inputs, units) = (self.inputs(), self.units());
        let squares = match &self.end {
            End::Output(_) => 0,
            End::Squares(layer) => layer.weights.outputs,
        };
        let delta = inputs + squares;
        let slope = delta + 3 * units;
        let tangent = self.features;
        let dot_last = tangent + inputs + units;
        let dot = dot_last + squares;
        Places {
            delta_last: inputs,
            delta,
            bend: delta + units,
            value: delta + 2 * units,
            slope,
            kept: slope
                + if self.activation.keeps_slope() {
                    units
                } else {
                    0
                },
            tangent,
            dot_last,
            dot,
            cotangents: dot + 2 * units,
        }
    }
}
