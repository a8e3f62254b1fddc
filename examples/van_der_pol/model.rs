//! The perceptron, and the equation that it is the field of.

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, Mlp};
use candle_diffeq::options::{Checkpoint, TimeGrid};
use candle_diffeq::tableau::RK4;
use candle_diffeq::{NeuralOde, OdeOptions};
use candle_nn::{Module, VarBuilder, VarMap};

use common::dtype::Dtype;
use common::random::generator;
use common::{initial, Result};

const WIDTHS: [usize; 4] = [2, 50, 50, 2];

fn network(vb: VarBuilder<'_>) -> candle_core::Result<Mlp> {
    Mlp::new(&WIDTHS, Activation::Tanh, vb)
}

/// One set of weights, solved for training and without a backward pass.
pub(crate) struct Model {
    vars: VarMap,
    training: NeuralOde,
    testing: NeuralOde,
    device: Device,
}

impl Model {
    pub(crate) fn new(dtype: Dtype, seed: u64, device: &Device, to: &Recorder) -> Result<Self> {
        let vars = VarMap::new();
        let ode = || NeuralOde::new(&vars, "ode", device, network);
        let plain = OdeOptions {
            method: RK4,
            precision: Some(dtype.precision()),
            ..Default::default()
        };
        let training = ode()?.options(OdeOptions {
            recorder: Some(to.clone()),
            ..plain.clone()
        });
        let testing = ode()?.options(OdeOptions {
            checkpoint: Checkpoint::Nothing,
            ..plain
        });
        initial::normal(&vars, &mut generator(seed), initial::he)?;
        Ok(Self {
            vars,
            training,
            testing,
            device: device.clone(),
        })
    }

    pub(crate) fn vars(&self) -> Vec<Var> {
        self.vars.all_vars()
    }

    /// Mean square error over windows `(times, windows, 2)`, solved from their first states.
    pub(crate) fn loss(&self, windows: &Tensor, times: &[f64]) -> Result<Tensor> {
        let windows = windows.to_device(&self.device)?;
        let states = self.training.solve(&windows.get(0)?, times)?;
        Ok((states - windows)?.sqr()?.mean_all()?)
    }

    /// States from starts `(n, 2)`: `(times, n, 2)`, both in f64.
    pub(crate) fn solve(&self, starts: &Tensor, times: &TimeGrid) -> Result<Tensor> {
        let starts = starts.to_dtype(DType::F32)?.to_device(&self.device)?;
        let states = self.testing.solve(&starts, times)?.detach();
        Ok(states.to_device(&Device::Cpu)?.to_dtype(DType::F64)?)
    }

    /// f̂(y) for y `(n, 2)` in f64, evaluated in f32.
    pub(crate) fn velocity(&self, y: &Tensor) -> Result<Tensor> {
        let vb = VarBuilder::from_varmap(&self.vars, DType::F32, &self.device);
        let y = y.to_dtype(DType::F32)?.to_device(&self.device)?;
        let velocity = network(vb.pp("ode"))?.forward(&y)?.detach();
        Ok(velocity.to_device(&Device::Cpu)?.to_dtype(DType::F64)?)
    }
}
