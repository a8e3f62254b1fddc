//! What fields of an [`EnergyMlp`] offer to the solver.

use candle_core::{Shape, Tensor};
use pulp::Simd;

use super::{EnergyTiles, Turn};
use crate::error::Error;
use crate::field::Offer;
use crate::nn::energy::{GradientFlow, Hamiltonian};
use crate::nn::EnergyMlp;
use crate::offer::Offered;
use crate::rows::RowField;
use crate::simd::Element;
use crate::state::RowLayout;

impl EnergyMlp {
    /// What the field of this potential offers to the solver: tiles, if there is a hidden layer and none is skipped.
    pub(in crate::nn::energy) fn offered(&self, turn: Turn) -> Option<Offer> {
        let hidden = self.net.layers.len().checked_sub(1)?;
        if hidden == 0 || (0..hidden).any(|l| self.net.skips(l)) {
            return None;
        }
        let energy = self.clone();
        Some(match turn {
            Turn::Down => Offered::of::<Tensor, _>(&GradientFlow::new(energy), true).into(),
            Turn::Symplectic => Offered::of::<Tensor, _>(&Hamiltonian::new(energy), true).into(),
        })
    }

    /// The parameters that ∇Φ depends on, layer after layer.
    pub(in crate::nn::energy) fn read(&self) -> impl Iterator<Item = &Tensor> {
        let (layers, shifts) = (self.net.layers.len(), self.shifts());
        self.net
            .layers
            .iter()
            .enumerate()
            .flat_map(move |(l, layer)| {
                let bias = layer.bias.as_ref();
                let bias = bias.filter(|_| !(shifts && l + 1 == layers));
                [Some(&layer.weight), bias].into_iter().flatten()
            })
    }

    fn row_layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
        let [shape] = shapes else { return None };
        let (last, rows) = shape.dims().split_last()?;
        (*last == self.features()).then(|| RowLayout {
            rows: rows.iter().product(),
            features: vec![*last],
        })
    }
}

macro_rules! row_field {
    ($field:ident, $turn:expr, $fits:expr) => {
        impl RowField for $field<EnergyMlp> {
            type Tiles<T: Element> = EnergyTiles<T>;

            fn weights(&self) -> Vec<Tensor> {
                self.energy().read().cloned().collect()
            }

            fn reads_time(&self) -> bool {
                self.energy().time
            }

            fn layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
                let fits: fn(usize) -> bool = $fits;
                let layout = self.energy().row_layout(shapes)?;
                fits(self.energy().features()).then_some(layout)
            }

            fn tiles<T: Element, S: Simd>(
                &self,
                s: S,
                _: &[Shape],
            ) -> std::result::Result<EnergyTiles<T>, Error> {
                EnergyTiles::new(s, self.energy(), $turn)
            }
        }
    };
}

row_field!(GradientFlow, Turn::Down, |_| true);
row_field!(Hamiltonian, Turn::Symplectic, |features| features % 2 == 0);
