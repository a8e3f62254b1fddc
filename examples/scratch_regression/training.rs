//! One training run in one precision.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::options::{Checkpoint, Output, TimeGrid};
use candle_diffeq::tableau::RK4;
use candle_diffeq::{NeuralOde, OdeOptions};
use candle_nn::{AdamW, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use indicatif::ProgressBar;

use crate::network::{draw, loss, network, ode, point, START, STEPS};
use common::dtype::Dtype;
use common::random::generator;
use common::{gradients, median, Result};

const LEARNING_RATE: f64 = 5e-3;
/// The learning rate is multiplied by `DECAY` in each third of the epochs.
const DECAY: f64 = 0.8;
const CLIP: f64 = 1.0;
const PATIENCE: usize = 150;
/// Points of the field along each side of `SQUARE`.
pub(crate) const GRID: usize = 20;
pub(crate) const SQUARE: [f64; 2] = [-0.5, 1.5];

/// Where the gradient is checked: later there is hardly a loss, and its gradient is rounding.
pub(crate) const EARLY: usize = 10;

/// Values of variables, by name.
pub(crate) type Weights = Vec<(String, Tensor)>;

/// A point, and the velocity there.
pub(crate) type Arrow = ((f64, f64), (f64, f64));

/// What a run came to.
pub(crate) struct Outcome {
    pub(crate) dtype: Dtype,
    pub(crate) losses: Vec<f64>,
    pub(crate) best_epoch: usize,
    /// Median of an epoch.
    pub(crate) milliseconds: f64,
    /// Of epoch `EARLY` or the last before it, by name.
    pub(crate) early: Weights,
    /// States with the best weights, at every step.
    pub(crate) trajectory: Vec<(f64, f64)>,
    /// Row by row.
    pub(crate) field: Vec<Arrow>,
}

impl Outcome {
    pub(crate) fn best(&self) -> f64 {
        self.losses[self.best_epoch]
    }

    /// The loss of an epoch; where training stopped before, the best.
    pub(crate) fn at(&self, epoch: usize) -> Option<f64> {
        match self.losses.get(epoch) {
            Some(loss) => Some(*loss),
            None => (self.losses.len() > PATIENCE).then(|| self.best()),
        }
    }
}

pub(crate) fn train(
    dtype: Dtype,
    epochs: usize,
    seed: u64,
    device: &Device,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let vars = VarMap::new();
    let ode = ode(&vars, dtype.precision(), device)?;
    draw(&vars, &ode, &mut generator(seed))?;
    let adam = ParamsAdamW {
        lr: LEARNING_RATE,
        weight_decay: 0.0,
        ..Default::default()
    };
    let all = vars.all_vars();
    let mut optimiser = AdamW::new(all.clone(), adam)?;
    let start = point(START, dtype.state(), device)?;
    let (mut losses, mut times) = (vec![], vec![]);
    let (mut best_epoch, mut best, mut early) = (0, vec![], vec![]);
    for epoch in 0..epochs {
        let third = epoch / epochs.div_ceil(3);
        optimiser.set_learning_rate(LEARNING_RATE * DECAY.powi(third as i32));
        let clock = Instant::now();
        let loss = loss(&ode.solve(&start, &[0.0, 1.0])?)?;
        let mut grads = loss.backward()?;
        losses.push(loss.to_dtype(DType::F64)?.to_scalar()?);
        if epoch == 0 || losses[epoch] < losses[best_epoch] {
            (best_epoch, best) = (epoch, copies(&vars)?);
        }
        if epoch <= EARLY {
            early = copies(&vars)?;
        }
        gradients::clip(&mut grads, &all, CLIP)?;
        optimiser.step(&grads)?;
        times.push(1e3 * clock.elapsed().as_secs_f64());
        bar.set_message(format!("loss {:.1e}", losses[epoch]));
        bar.inc(1);
        if epoch - best_epoch >= PATIENCE {
            break;
        }
    }
    restore(&vars, &best)?;
    Ok(Outcome {
        dtype,
        losses,
        best_epoch,
        milliseconds: median(times),
        trajectory: trajectory(ode, dtype, &start)?,
        field: field(&vars, dtype, device)?,
        early,
    })
}

/// The values of all variables, by name.
fn copies(vars: &VarMap) -> Result<Weights> {
    let data = vars.data().lock().map_err(|_| "the variables are locked")?;
    let copy = |(name, var): (&String, &candle_core::Var)| Ok((name.clone(), var.copy()?));
    data.iter().map(copy).collect()
}

/// Sets variables to values, in their own dtypes and on their own devices.
pub(crate) fn restore(vars: &VarMap, weights: &Weights) -> Result<()> {
    let data = vars.data().lock().map_err(|_| "the variables are locked")?;
    for (name, value) in weights {
        let var = data
            .get(name)
            .ok_or_else(|| format!("no variable {name}"))?;
        var.set(&value.to_dtype(var.dtype())?.to_device(var.device())?)?;
    }
    Ok(())
}

fn pairs(x: &Tensor) -> Result<Vec<(f64, f64)>> {
    let rows = x.detach().to_dtype(DType::F64)?.to_vec2::<f64>()?;
    Ok(rows.iter().map(|row| (row[0], row[1])).collect())
}

fn trajectory(ode: NeuralOde, dtype: Dtype, start: &Tensor) -> Result<Vec<(f64, f64)>> {
    let ode = ode.options(OdeOptions {
        method: RK4,
        precision: Some(dtype.precision()),
        output: Output::All,
        checkpoint: Checkpoint::Nothing,
        ..Default::default()
    });
    let times = TimeGrid::linspace(0.0, 1.0, STEPS + 1)?;
    pairs(&ode.solve(start, &times)?.squeeze(1)?)
}

fn field(vars: &VarMap, dtype: Dtype, device: &Device) -> Result<Vec<Arrow>> {
    let [low, high] = SQUARE;
    let at = |i: usize| low + (high - low) * (i as f64 + 0.5) / GRID as f64;
    let points = (0..GRID).flat_map(|i| (0..GRID).map(move |j| vec![at(j), at(i)]));
    let points = Tensor::new(points.collect::<Vec<_>>(), device)?;
    let vb = VarBuilder::from_varmap(vars, dtype.state(), device);
    let velocity = network(vb.pp("ode"))?.forward(&points.to_dtype(dtype.state())?)?;
    let points = pairs(&points)?;
    Ok(points.into_iter().zip(pairs(&velocity)?).collect())
}
