//! Two classes of series, told apart by a neural controlled differential equation along the paths of the series.

use std::time::Instant;

use candle_core::{DType, Device, Module, Tensor};
use candle_diffeq::cde::{ControlPath, NeuralCde};
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, CdeMlp};
use candle_diffeq::options::Output;
use candle_diffeq::tableau::MIDPOINT;
use candle_diffeq::OdeOptions;
use candle_nn::{AdamW, Linear, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use indicatif::ProgressBar;
use rand::seq::SliceRandom;

use super::dtype::Dtype;
use super::random::generator;
use super::{initial, mean, median, Result};

/// Series, and which of two classes each belongs to.
pub struct Labelled {
    /// `(series, length, channels)`.
    pub values: Tensor,
    /// 0 or 1.
    pub labels: Vec<f32>,
}

impl Labelled {
    /// Some of them: values, and labels `(series, 1)`.
    fn batch(&self, chosen: &[usize], device: &Device) -> Result<(Tensor, Tensor)> {
        let index: Vec<u32> = chosen.iter().map(|&i| i as u32).collect();
        let index = Tensor::new(index, &Device::Cpu)?;
        let values = self.values.index_select(&index, 0)?.to_device(device)?;
        let labels: Vec<f32> = chosen.iter().map(|&i| self.labels[i]).collect();
        Ok((values, Tensor::from_vec(labels, (chosen.len(), 1), device)?))
    }

    fn all(&self, device: &Device) -> Result<(Tensor, Tensor)> {
        self.batch(&(0..self.labels.len()).collect::<Vec<_>>(), device)
    }
}

/// A model and its training: features `hidden` driven by F, a perceptron hidden-`width`-(hidden · channels).
#[derive(Clone, Copy)]
pub struct Setting {
    pub hidden: usize,
    pub width: usize,
    pub epochs: usize,
    pub batch: usize,
    pub rate: f64,
}

impl Setting {
    /// Updates of a training on so many series.
    pub fn updates(&self, series: usize) -> usize {
        self.epochs * (series / self.batch)
    }
}

/// What a training came to.
pub struct Outcome {
    /// The mean of each epoch.
    pub losses: Vec<f64>,
    /// On the other series, after every epoch.
    pub accuracies: Vec<f64>,
    /// Evaluations of the field in a forward pass.
    pub evaluations: f64,
    /// Median of an update.
    pub milliseconds: f64,
}

impl Outcome {
    /// After the last epoch: none is picked.
    pub fn accuracy(&self) -> f64 {
        self.accuracies.last().copied().unwrap_or(f64::NAN)
    }

    /// Of the last epoch.
    pub fn loss(&self) -> f64 {
        self.losses.last().copied().unwrap_or(f64::NAN)
    }
}

/// How values become paths, and the channels of these.
pub type Paths<'a> = (&'a dyn Fn(&Tensor) -> Result<ControlPath>, usize);

/// The mean of ln(1 + eˣ) − y x, without overflow.
fn cross_entropy(x: &Tensor, y: &Tensor) -> candle_core::Result<Tensor> {
    let logarithm = (x.abs()?.neg()?.exp()? + 1.0)?.log()?;
    ((x.relu()? - (x * y)?)? + logarithm)?.mean_all()
}

/// Trains on some series and tests on others.
pub fn train(
    setting: &Setting,
    [training, test]: [&Labelled; 2],
    (path, channels): Paths<'_>,
    (dtype, seed): (Dtype, u64),
    device: &Device,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let (recorder, vars) = (Recorder::default(), VarMap::new());
    let Setting { hidden, width, .. } = *setting;
    let cde = NeuralCde::new(
        &vars,
        "cde",
        DType::F32,
        device,
        move |vb| candle_nn::linear(channels, hidden, vb),
        move |vb| CdeMlp::new(&[hidden, width], channels, Activation::Relu, vb),
    )?
    .options(OdeOptions {
        method: MIDPOINT,
        precision: Some(dtype.precision()),
        output: Output::Final,
        recorder: Some(recorder.clone()),
        ..Default::default()
    });
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let readout: Linear = candle_nn::linear(hidden, 1, vb.pp("readout"))?;
    initial::layers(&vars, &mut generator(seed + 1))?;
    let adam = ParamsAdamW {
        lr: setting.rate,
        weight_decay: 0.0,
        ..Default::default()
    };
    let mut optimiser = AdamW::new(vars.all_vars(), adam)?;
    let (tested, truth) = test.all(device)?;
    let tested = path(&tested)?;
    let mut order: Vec<usize> = (0..training.labels.len()).collect();
    let mut rng = generator(seed + 2);
    let (mut losses, mut accuracies, mut milliseconds) = (vec![], vec![], vec![]);
    for _ in 0..setting.epochs {
        order.shuffle(&mut rng);
        let mut of_epoch = vec![];
        for chosen in order.chunks_exact(setting.batch) {
            let clock = Instant::now();
            let (values, labels) = training.batch(chosen, device)?;
            let path = path(&values)?;
            let logits = readout.forward(&cde.solve(&path, path.knots())?)?;
            let loss = cross_entropy(&logits, &labels)?;
            optimiser.backward_step(&loss)?;
            of_epoch.push(f64::from(loss.to_scalar::<f32>()?));
            milliseconds.push(1e3 * clock.elapsed().as_secs_f64());
            bar.inc(1);
        }
        losses.push(mean(&of_epoch));
        let logits = readout.forward(&cde.predict(&tested, tested.knots())?)?;
        let right = logits.gt(0f32)?.to_dtype(DType::F32)?.eq(&truth)?;
        let right = right.to_dtype(DType::F64)?.mean_all()?.to_scalar::<f64>()?;
        accuracies.push(right);
        bar.set_message(format!("test {:.1} %", 100.0 * right));
    }
    let passes = milliseconds.len() + setting.epochs;
    Ok(Outcome {
        losses,
        accuracies,
        evaluations: recorder.take().evaluations as f64 / passes as f64,
        milliseconds: median(milliseconds),
    })
}
