//! Classifiers that are flows: a neural ODE, perhaps augmented before it, and perhaps a layer after it.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::nn::Linear;
use candle_diffeq::options::Steps;
use candle_diffeq::tableau::RK4;
use candle_diffeq::OdeOptions;
use candle_nn::{Module, VarBuilder, VarMap};
use indicatif::ProgressBar;
use serde_json::json;

use super::chart::{Area, Panel};
use super::classes::Sample;
use super::dtype::Dtype;
use super::fit::Fit;
use super::plane::{dots, over_time, paths, Window};
use super::random::generator;
use super::report::Report;
use super::table::{sci, Table};
use super::{initial, Result};

/// States at given times, `(times, rows, features)`, of rows of x.
pub type Flow = Box<dyn Fn(&Tensor, &[f64]) -> Result<Tensor>>;

/// A flow with its variables.
pub struct Classifier {
    pub name: String,
    vars: VarMap,
    flow: Flow,
    readout: Option<Linear>,
}

/// What training came to.
pub struct Trained {
    pub classifier: Classifier,
    pub losses: Vec<f64>,
    pub accuracy: f64,
    pub seconds: f64,
}

/// RK4 with so many steps over [0, 1], in this precision.
pub fn options(dtype: Dtype, steps: usize) -> OdeOptions {
    OdeOptions {
        method: RK4,
        steps: Steps::Size(1.0 / steps as f64),
        precision: Some(dtype.precision()),
        ..Default::default()
    }
}

impl Classifier {
    /// A flow whose last state holds the logits, or whose features a linear layer `readout` of so many `(features,
    /// classes)` reads; its layers are drawn from the seed.
    pub fn new(
        name: impl Into<String>,
        (vars, flow): (VarMap, Flow),
        readout: Option<(usize, usize)>,
        (seed, device): (u64, &Device),
    ) -> Result<Self> {
        let vb = VarBuilder::from_varmap(&vars, DType::F32, device).pp("readout");
        let readout = readout.map(|(features, classes)| Linear::new(features, classes, vb));
        let readout = readout.transpose()?;
        initial::layers(&vars, &mut generator(seed))?;
        Ok(Self {
            name: name.into(),
            vars,
            flow,
            readout,
        })
    }

    /// States at these times.
    pub fn states(&self, x: &Tensor, times: &[f64]) -> Result<Tensor> {
        (self.flow)(x, times)
    }

    /// Of x at time 1.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let states = self.states(x, &[0.0, 1.0])?;
        let last = states.get(states.dim(0)? - 1)?;
        match &self.readout {
            Some(readout) => Ok(readout.forward(&last)?),
            None => Ok(last),
        }
    }

    /// Trains it on the whole sample.
    pub fn train(self, sample: &Sample, fit: &Fit, bar: &ProgressBar) -> Result<Trained> {
        let clock = Instant::now();
        let losses = sample.fit((fit, &self.vars), bar, |x| self.logits(x))?;
        let accuracy = sample.accuracy(&self.logits(&sample.x)?.detach())?;
        Ok(Trained {
            classifier: self,
            losses,
            accuracy,
            seconds: clock.elapsed().as_secs_f64(),
        })
    }
}

/// Prints a row for each of these models, notes their figures, and demands that so great a share of the points is right.
pub fn tell(all: &[(Dtype, Trained)], right: f64, report: &mut Report) -> Result<()> {
    let mut table = Table::new(["model", "precision", "loss, first", "last", "right", "s"]);
    for (dtype, o) in all {
        let (name, share) = (&o.classifier.name, o.accuracy);
        table.row([
            name.clone(),
            dtype.name().to_owned(),
            sci(o.losses[0]),
            sci(o.last()),
            format!("{:.1} %", 100.0 * share),
            format!("{:.0}", o.seconds),
        ]);
        report.demand(share >= right, || {
            let dtype = dtype.name();
            format!("{name}, {dtype}: {share:.3} of the points are right, not {right}")
        });
    }
    print!("{table}");
    let json = |(dtype, o): &(Dtype, Trained)| {
        let mut figures = o.figures();
        figures["precision"] = json!(dtype.name());
        figures
    };
    report.figure("runs", all.iter().map(json).collect::<Vec<_>>())
}

impl Trained {
    /// Name, losses, accuracy and time.
    pub fn figures(&self) -> serde_json::Value {
        json!({
            "model": self.classifier.name,
            "loss_first": self.losses[0],
            "loss_last": self.last(),
            "accuracy": self.accuracy,
            "seconds": self.seconds,
        })
    }

    /// The mean of the last losses.
    pub fn last(&self) -> f64 {
        super::mean(&self.losses[self.losses.len().saturating_sub(10)..])
    }

    /// Three panels of a flow in the plane: a coordinate over time, the paths, and the regions of the classes.
    pub fn draw(&self, sample: &Sample, rows: usize, area: &Area<'_>) -> Result<()> {
        let parts = area.split_evenly((1, 3));
        let times: Vec<f64> = (0..=40).map(|i| f64::from(i) / 40.0).collect();
        let rows = rows.min(sample.x.dim(0)?);
        let x = sample.x.narrow(0, 0, rows)?;
        let classes = sample.numbers()?;
        let states = self.classifier.states(&x, &times)?.detach();
        let name = &self.classifier.name;
        let first = over_time(&times, &states, 0, &classes[..rows])?;
        Panel {
            curves: first,
            ..Panel::new(format!("{name}: first coordinate"), "depth", "z")
        }
        .draw(&parts[0])?;
        let mut curves = paths(&states, &classes[..rows])?;
        let ends = states.get(times.len() - 1)?;
        curves.extend(dots(&ends, &classes[..rows], false)?);
        Panel {
            curves,
            ..Panel::new(format!("{name}: paths"), "z₁", "z₂")
        }
        .draw(&parts[1])?;
        let window = Window::around(&sample.x)?;
        let device = sample.x.device().clone();
        let share = |x: &Tensor| {
            let logits = self.classifier.logits(x)?.detach();
            let share = candle_nn::ops::softmax(&logits, 1)?;
            Ok(share.narrow(1, 1, 1)?)
        };
        let heat = window.heat(40, (DType::F32, &device), share, "class 1")?;
        let most = 256.min(classes.len());
        let shown = sample.x.narrow(0, 0, most)?;
        Panel {
            heat: Some(heat),
            curves: dots(&shown, &classes[..most], false)?,
            ranges: window.ranges(),
            ..Panel::new(format!("{:.1} % right", 100.0 * self.accuracy), "x₁", "x₂")
        }
        .draw(&parts[2])
    }
}
