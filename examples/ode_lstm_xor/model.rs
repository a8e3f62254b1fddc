//! Recurrent models over runs of bits, and a layer that reads the parity from their states.

use candle_core::{DType, Device, Module, Tensor};
use candle_diffeq::models::recurrent::{Cell, LstmCell, OdeRnn, Order, RnnCell};
use candle_diffeq::nn::{Activation, Linear, Mlp, RowSpeed};
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::tableau::RK4;
use candle_diffeq::{NeuralOde, OdeOptions};
use candle_nn::{VarBuilder, VarMap};
use rand::rngs::StdRng;

use crate::streams::Runs;
use common::dtype::Dtype;
use common::{initial, Result};

const HIDDEN: usize = 32;
/// Steps of RK4 over a run.
const STEPS: usize = 3;
/// What the first weights of the flow are multiplied with.  Before it is trained, it then turns states by up to about a
/// radian a bit, a third of what parity needs; as the weights are drawn, by a quarter of that.
const SPEED: f64 = 2.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    OdeLstm(Dtype),
    OdeRnn(Dtype),
    Lstm,
}

impl Kind {
    pub(crate) fn name(self) -> String {
        match self {
            Self::OdeLstm(dtype) => format!("ODE-LSTM, {}", dtype.name()),
            Self::OdeRnn(dtype) => format!("ODE-RNN, {}", dtype.name()),
            Self::Lstm => "LSTM told the lengths, f32".to_owned(),
        }
    }
}

/// `(rows, runs, HIDDEN)` of runs.
type States = dyn Fn(&Runs) -> Result<Tensor>;

/// A recurrent model and a layer that reads its states.
pub(crate) struct Model {
    states: Box<States>,
    readout: Linear,
}

impl Model {
    pub(crate) fn new(
        kind: Kind,
        vars: &VarMap,
        rng: &mut StdRng,
        device: &Device,
    ) -> Result<Self> {
        let vb = VarBuilder::from_varmap(vars, DType::F32, device);
        let readout = Linear::new(HIDDEN, 2, vb.pp("readout"))?;
        let lstm = |inputs: usize| LstmCell::new(inputs, HIDDEN, vb.pp("cell"));
        let states = match kind {
            Kind::OdeLstm(dtype) => flowing(flow(dtype, vars, device)?, lstm(1)?),
            Kind::OdeRnn(dtype) => flowing(
                flow(dtype, vars, device)?,
                RnnCell::new(1, HIDDEN, vb.pp("cell"))?,
            ),
            Kind::Lstm => told(flow(Dtype::F32, &VarMap::new(), device)?, lstm(2)?),
        };
        initial::layers(vars, rng)?;
        quicken(vars)?;
        Ok(Self { states, readout })
    }

    /// Of both parities after every run, `(rows, runs, 2)`.
    pub(crate) fn logits(&self, runs: &Runs) -> Result<Tensor> {
        Ok(self.readout.forward(&(self.states)(runs)?)?)
    }
}

/// States that flow over the length of a run after its bit.
fn flowing<C: Cell + 'static>(flow: NeuralOde<(Tensor, Tensor)>, cell: C) -> Box<States> {
    let model = OdeRnn::new(flow, cell).order(Order::CellFirst);
    Box::new(move |runs: &Runs| {
        let bits = runs.x.narrow(2, 0, 1)?.contiguous()?;
        Ok(model.forward(&bits, &runs.lengths, Some(&runs.seen))?)
    })
}

/// States that stand still, of a cell that is told the length.
fn told<C: Cell + 'static>(flow: NeuralOde<(Tensor, Tensor)>, cell: C) -> Box<States> {
    let model = OdeRnn::new(flow, cell);
    Box::new(move |runs: &Runs| {
        let gaps = runs.lengths.zeros_like()?;
        Ok(model.forward(&runs.x, &gaps, Some(&runs.seen))?)
    })
}

fn flow(dtype: Dtype, vars: &VarMap, device: &Device) -> Result<NeuralOde<(Tensor, Tensor)>> {
    let ode = NeuralOde::from_field(vars, "flow", DType::F32, device, |vb| {
        Mlp::new(&[HIDDEN, HIDDEN, HIDDEN], Activation::Tanh, vb).map(RowSpeed::new)
    })?;
    Ok(ode.options(OdeOptions {
        method: RK4,
        steps: Steps::PerInterval(STEPS),
        output: Output::Final,
        precision: Some(dtype.precision()),
        ..Default::default()
    }))
}

/// Multiplies the weights of the flow with [`SPEED`].
fn quicken(vars: &VarMap) -> Result<()> {
    let data = vars.data().lock().map_err(|_| "the variables are locked")?;
    for (name, var) in data.iter() {
        if name.starts_with("flow.") && name.ends_with(".weight") {
            var.set(&(var.as_tensor() * SPEED)?)?;
        }
    }
    Ok(())
}
