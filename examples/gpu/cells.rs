//! The cells that can be measured without files: fields, batches and steps, with numbers from a seed
//! and a reference in f64 by the library itself.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::Precision;
use rand::rngs::StdRng;

use crate::pass::{Pass, OURS};
use crate::workload::Workload;
use common::{random, Result};

/// A field by kind and widths, rows, pixels along an image's edge, and steps.
pub(crate) struct Cell {
    pub(crate) name: &'static str,
    kind: &'static str,
    widths: &'static [usize],
    batch: usize,
    image: Option<usize>,
    /// Of output intervals, each a step where steps are not adaptive.
    steps: usize,
    method: &'static str,
    /// The last time, and rtol where steps are adaptive.
    end: f64,
    rtol: Option<f64>,
}

const fn cell(
    name: &'static str,
    kind: &'static str,
    widths: &'static [usize],
    batch: usize,
    steps: usize,
) -> Cell {
    Cell {
        name,
        kind,
        widths,
        batch,
        image: None,
        steps,
        method: "rk4",
        end: 1.0,
        rtol: None,
    }
}

/// The same with adaptive steps.
const fn adaptive(cell: Cell) -> Cell {
    Cell {
        method: "dopri5",
        end: 10.0,
        rtol: Some(1e-5),
        ..cell
    }
}

/// W1 to W5 of `benches/peers`, what fills a GPU, and a perceptron with adaptive steps of every row.
pub(crate) const CELLS: [Cell; 11] = [
    cell("W1", "mlp", &[2, 64, 64, 2], 512, 100),
    cell("W2", "mlp", &[64, 512, 512, 64], 256, 40),
    Cell {
        image: Some(28),
        ..cell("W3", "conv", &[16, 16, 16], 32, 8)
    },
    cell("W4", "cnf", &[2, 64, 64, 2], 512, 8),
    Cell {
        method: "euler",
        ..cell("W5", "mlp", &[2, 64, 64, 2], 64, 2000)
    },
    cell("G1", "mlp", &[2, 64, 64, 2], 65_536, 100),
    cell("G2", "mlp", &[512, 2048, 2048, 512], 4096, 40),
    Cell {
        image: Some(56),
        ..cell("G3", "conv", &[64, 64, 64], 64, 8)
    },
    cell("G4", "hyper", &[1, 32, 32, 896], 1024, 127),
    adaptive(cell("A1", "mlp", &[2, 64, 64, 2], 512, 10)),
    adaptive(cell("A2", "mlp", &[2, 64, 64, 2], 65_536, 10)),
];

/// Every kind of field, small; perceptrons that go in one launch, and that do not.
pub(crate) const SMOKE: [Cell; 6] = [
    cell("thin", "mlp", &[2, 8, 2], 40, 2),
    cell("wide", "mlp", &[3, 130, 3], 5, 6),
    Cell {
        image: Some(5),
        ..cell("conv", "conv", &[2, 3, 2], 2, 2)
    },
    cell("cnf", "cnf", &[2, 8, 8, 2], 6, 2),
    cell("hyper", "hyper", &[1, 4, 4, 35], 6, 6),
    adaptive(cell("rows", "mlp", &[2, 8, 2], 40, 3)),
];

impl Cell {
    /// The problem, with reference.
    pub(crate) fn workload(&self, device: &Device) -> Result<Workload> {
        let mut tensors = self.tensors(device)?;
        let build = |tensors, rtol: Option<f64>| -> Result<Workload> {
            let mut workload = Workload::new(self.name, self.kind, self.method, tensors, device)?;
            workload.tolerances = rtol.map(|rtol| [rtol, rtol / 100.0]);
            Ok(workload)
        };
        // The reference keeps a tolerance beside which that of the cell is coarse.
        let plain = build(tensors.clone(), self.rtol.map(|rtol| rtol * 1e-4))?;
        let pass = Pass::new(&plain, Precision::f64(), OURS)?;
        let loss = pass.loss()?;
        tensors.extend(plain.gradients(&pass.vars, &pass.y0.var, &loss.backward()?)?);
        tensors.insert("loss".to_owned(), loss.detach());
        build(tensors, self.rtol)
    }

    /// Weights uniform in ±1/√inputs, states and targets normal, times from 0 to the end, of a density from
    /// 1 to 0.
    fn tensors(&self, device: &Device) -> Result<HashMap<String, Tensor>> {
        let mut rng = random::generator(11);
        let mut tensors = HashMap::new();
        let kernel = if self.image.is_some() {
            vec![3, 3]
        } else {
            vec![]
        };
        for (layer, pair) in self.widths.windows(2).enumerate() {
            let inputs = pair[0] * kernel.iter().product::<usize>();
            let shapes = [[&[pair[1], pair[0]], &kernel[..]].concat(), vec![pair[1]]];
            for (i, shape) in shapes.into_iter().enumerate() {
                let name = format!("p{}", 2 * layer + i);
                tensors.insert(name, weight(&mut rng, shape, inputs, device)?);
            }
        }
        let is_hyper = self.kind == "hyper";
        let features = if is_hyper { 2 } else { self.widths[0] };
        let pixels = self.image.map_or(vec![], |edge| vec![edge; 2]);
        let state = [&[self.batch, features], &pixels[..]].concat();
        for name in ["y0", "target"] {
            let value = random::normal(&mut rng, state.clone(), DType::F32, device)?;
            tensors.insert(name.to_owned(), value);
        }
        let time = |n: usize| self.end * n as f64 / self.steps as f64;
        let times = (0..=self.steps).map(|n| if is_hyper { 1.0 - time(n) } else { time(n) });
        let times = times.collect::<Vec<_>>();
        tensors.insert("t".to_owned(), Tensor::new(times, device)?);
        Ok(tensors)
    }
}

fn weight(
    rng: &mut StdRng,
    shape: Vec<usize>,
    inputs: usize,
    device: &Device,
) -> candle_core::Result<Tensor> {
    let bound = (inputs as f64).sqrt().recip();
    ((random::uniform(rng, shape, DType::F32, device)? * 2.0)? - 1.0)? * bound
}
