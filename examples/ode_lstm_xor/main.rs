//! Tells the parity of streams of bits that are given as events: an LSTM whose state flows between them beside others.
//!
//! `cargo run --release --example ode_lstm_xor` (minutes; `--smoke`: seconds).  "Learning long-term dependencies in
//! irregularly-sampled time series" (arXiv 2006.04418): a stream of bits becomes a list of runs, each a bit and how long it
//! lasts; the sought class is the exclusive or of all bits.  In ODE-RNN and ODE-LSTM the length of a run is the time over
//! which the state flows after the bit; the LSTM is told it as a number.  Prints accuracies, writes a picture and the figures
//! as JSON beside it.  Exits with 1 when the ODE-LSTM does not learn it, or in bf16 less than in f32.

#[path = "../common/mod.rs"]
mod common;

use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Module, Tensor, D};
use candle_diffeq::models::recurrent::{Cell, LstmCell, OdeRnn, Order, RnnCell};
use candle_diffeq::nn::{Activation, Linear, Mlp, RowSpeed};
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::tableau::RK4;
use candle_diffeq::{NeuralOde, OdeOptions};
use candle_nn::loss::cross_entropy;
use candle_nn::{VarBuilder, VarMap};
use clap::Parser;
use rand::rngs::StdRng;
use rand::Rng;
use serde_json::json;

use crate::common::chart::{colour, picture, Curve, Panel};
use crate::common::dtype::Dtype;
use crate::common::fit::Fit;
use crate::common::flags::Flags;
use crate::common::random::generator;
use crate::common::report::{self, Report};
use crate::common::table::{sci, Table};
use crate::common::{initial, mean, progress, Result};

const FIT: Fit = Fit::new(1200, 1e-2).falling_to(0.05);
const BATCH: usize = 128;
const HIDDEN: usize = 32;
/// Steps of RK4 over a run.
const STEPS: usize = 3;
/// The share of test streams whose class must be right, and how much less in low precision.
const RIGHT: f64 = 0.95;
const LOW: f64 = 0.03;

/// Tells the parity of streams of bits.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Bits of a stream.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..65))]
    bits: u32,
    /// Updates of each model [default: of the size].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    iters: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    OdeLstm(Dtype),
    OdeRnn,
    Lstm,
}

impl Kind {
    fn name(self) -> String {
        match self {
            Self::OdeLstm(dtype) => format!("ODE-LSTM, {}", dtype.name()),
            Self::OdeRnn => "ODE-RNN, f32".to_owned(),
            Self::Lstm => "LSTM told the lengths, f32".to_owned(),
        }
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::OdeLstm(dtype) => dtype,
            _ => Dtype::F32,
        }
    }
}

/// Streams as runs.
struct Runs {
    /// ±1 and the length in the mean of the lengths, `(rows, runs, 2)`.
    x: Tensor,
    /// `(rows, runs)`, and 1 where there is a run.
    lengths: Tensor,
    seen: Tensor,
    classes: Tensor,
}

/// So many streams.
fn streams(rows: usize, bits: usize, rng: &mut StdRng, device: &Device) -> Result<Runs> {
    let (mut x, mut lengths, mut seen, mut classes) = (vec![], vec![], vec![], vec![]);
    for _ in 0..rows {
        let stream: Vec<bool> = (0..bits).map(|_| rng.random()).collect();
        classes.push(stream.iter().filter(|b| **b).count() as u32 % 2);
        let runs: Vec<_> = stream.chunk_by(|a, b| a == b).collect();
        for i in 0..bits {
            let run = runs.get(i);
            let length = run.map_or(0.0, |run| run.len() as f32);
            let sign = run.map_or(0.0, |run| if run[0] { 1.0 } else { -1.0 });
            x.extend([sign, 0.5 * length]);
            lengths.push(length);
            seen.push(f32::from(run.is_some()));
        }
    }
    let of = |numbers: Vec<f32>, shape: &[usize]| Tensor::from_vec(numbers, shape, device);
    Ok(Runs {
        x: of(x, &[rows, bits, 2])?,
        lengths: of(lengths, &[rows, bits])?,
        seen: of(seen, &[rows, bits])?,
        classes: Tensor::from_vec(classes, rows, device)?,
    })
}

/// `(rows, runs, HIDDEN)` of runs.
type States = dyn Fn(&Runs) -> Result<Tensor>;

/// A recurrent model and a layer that reads its last state.
struct Model {
    states: Box<States>,
    readout: Linear,
}

impl Model {
    fn new(kind: Kind, vars: &VarMap, device: &Device) -> Result<Self> {
        let vb = VarBuilder::from_varmap(vars, DType::F32, device);
        let readout = Linear::new(HIDDEN, 2, vb.pp("readout"))?;
        let lstm = |inputs: usize| LstmCell::new(inputs, HIDDEN, vb.pp("cell"));
        let states = match kind {
            Kind::OdeLstm(_) => states(flow(kind, vars, device)?, lstm(1)?, true),
            Kind::OdeRnn => states(
                flow(kind, vars, device)?,
                RnnCell::new(1, HIDDEN, vb.pp("cell"))?,
                true,
            ),
            Kind::Lstm => states(flow(kind, &VarMap::new(), device)?, lstm(2)?, false),
        };
        Ok(Self { states, readout })
    }

    fn logits(&self, runs: &Runs) -> Result<Tensor> {
        let states = (self.states)(runs)?;
        let last = states
            .narrow(1, states.dim(1)? - 1, 1)?
            .squeeze(1)?
            .contiguous()?;
        Ok(self.readout.forward(&last)?)
    }
}

/// States after every run; those that do not flow are told the length instead.
fn states<C: Cell + 'static>(
    flow: NeuralOde<(Tensor, Tensor)>,
    cell: C,
    flows: bool,
) -> Box<States> {
    let model = OdeRnn::new(flow, cell).order(Order::CellFirst);
    Box::new(move |runs: &Runs| {
        let (x, gaps) = match flows {
            true => (runs.x.narrow(2, 0, 1)?.contiguous()?, runs.lengths.clone()),
            false => (runs.x.clone(), runs.lengths.zeros_like()?),
        };
        Ok(model.forward(&x, &gaps, Some(&runs.seen))?)
    })
}

fn flow(kind: Kind, vars: &VarMap, device: &Device) -> Result<NeuralOde<(Tensor, Tensor)>> {
    let ode = NeuralOde::from_field(vars, "f", DType::F32, device, |vb| {
        Mlp::new(&[HIDDEN, HIDDEN, HIDDEN], Activation::Tanh, vb).map(RowSpeed::new)
    })?;
    Ok(ode.options(OdeOptions {
        method: RK4,
        steps: Steps::PerInterval(STEPS),
        output: Output::Final,
        precision: Some(kind.dtype().precision()),
        ..Default::default()
    }))
}

struct Outcome {
    kind: Kind,
    losses: Vec<f64>,
    right: f64,
    seconds: f64,
}

fn train(kind: Kind, bits: usize, (fit, seed): (&Fit, u64), device: &Device) -> Result<Outcome> {
    let clock = Instant::now();
    let vars = VarMap::new();
    let model = Model::new(kind, &vars, device)?;
    let mut rng = generator(seed);
    initial::layers(&vars, &mut rng)?;
    let bar = progress(&kind.name(), fit.iterations)?;
    let losses = fit.run(&vars, &bar, |_| {
        let runs = streams(BATCH, bits, &mut rng, device)?;
        Ok(cross_entropy(&model.logits(&runs)?, &runs.classes)?)
    })?;
    bar.finish_and_clear();
    let test = streams(1000, bits, &mut rng, device)?;
    let right = model.logits(&test)?.argmax(D::Minus1)?.eq(&test.classes)?;
    Ok(Outcome {
        kind,
        losses,
        right: right.to_dtype(DType::F64)?.mean_all()?.to_scalar()?,
        seconds: clock.elapsed().as_secs_f64(),
    })
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("ode_lstm_xor", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let mut fit = FIT.iterations(args.flags.size().pick(3, FIT.iterations, 10_000));
    if let Some(iterations) = args.iters {
        fit = fit.iterations(iterations as usize);
    }
    let precisions = args.flags.precisions(&[Dtype::F32, Dtype::Bf16]);
    let kinds = precisions.into_iter().map(Kind::OdeLstm);
    let mut all = vec![];
    for kind in kinds.chain([Kind::OdeRnn, Kind::Lstm]) {
        all.push(train(
            kind,
            args.bits as usize,
            (&fit, args.flags.seed),
            device,
        )?);
    }
    let mut table = Table::new(["model", "right of 1000", "last loss", "s"]);
    for o in &all {
        table.row([
            o.kind.name(),
            format!("{:.1} %", 100.0 * o.right),
            sci(mean(&o.losses[o.losses.len().saturating_sub(20)..])),
            format!("{:.0}", o.seconds),
        ]);
    }
    print!("{table}");
    let of = |dtype: Dtype| {
        all.iter()
            .find(|o| o.kind == Kind::OdeLstm(dtype))
            .map(|o| o.right)
    };
    if let Some(right) = of(Dtype::F32) {
        report.demand(right >= RIGHT, || {
            format!("f32: {right:.3} of the streams are right, not {RIGHT}")
        });
    }
    if let Some((single, low)) = of(Dtype::F32).zip(of(Dtype::Bf16)) {
        report.demand(low >= single - LOW, || {
            format!("bf16: {low:.3} of the streams, in f32 {single:.3}")
        });
    }
    let json = |o: &Outcome| {
        json!({
            "model": o.kind.name(),
            "accuracy": o.right,
            "seconds": o.seconds,
        })
    };
    report.figure("bits", args.bits)?;
    report.figure("updates", fit.iterations)?;
    report.figure("runs", all.iter().map(json).collect::<Vec<_>>())?;
    picture(&report.picture(""), (800, 420), |area| {
        let curve = |(i, o): (usize, &Outcome)| {
            let part = (o.losses.len() / 60).max(1);
            let means = o.losses.chunks(part).enumerate();
            Curve::new(
                o.kind.name(),
                colour(i),
                means.map(|(k, l)| ((k * part) as f64, mean(l))),
            )
            .width(2)
        };
        Panel {
            curves: all.iter().enumerate().map(curve).collect(),
            ..Panel::new(
                format!("parity of {} bits", args.bits),
                "update",
                "cross entropy",
            )
        }
        .draw(area)
    })
}
