//! What one process, or several together, measure.

use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::distributed::{share, Group, Replicas};
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, Mlp, RowLoss};
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::{NeuralOde, OdeOptions};
use candle_nn::loss::cross_entropy;
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::network::{Field, Layout, Network};
use common::dtype::Dtype;
use common::flags::Flags;
use common::mnist::{shifts, Data};
use common::random::{generator, normal};
use common::team::Team;
use common::{initial, median, use_every_core, Result};

/// What stands before the line with the outcome.
pub(crate) const MARK: &str = "measured: ";

/// What is measured.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Job {
    /// A training step of each workload.
    Steps,
    /// A training step of perceptrons of growing width.
    Widths,
    /// A training step of each workload with several numbers of rows.
    Rows,
    /// Sums over ranks of growing length.
    Sums,
}

impl Job {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Steps => "steps",
            Self::Widths => "widths",
            Self::Rows => "rows",
            Self::Sums => "sums",
        }
    }
}

/// Milliseconds y of something of size x: bytes or rows.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Point {
    pub(crate) x: f64,
    pub(crate) y: f64,
}

/// A network to train.
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    /// Of all ranks together.
    pub(crate) rows: usize,
    /// Whether two processes must not take longer than one with two threads.
    pub(crate) must_hold: bool,
    /// Of a group, rows and a seed.
    make: fn(&dyn Group, usize, u64) -> Result<Step<'_>>,
}

/// Numbers of rows that [`Job::Rows`] measures for each workload.
pub(crate) const ROWS: usize = 4;

pub(crate) const WORKLOADS: [Workload; 3] = [
    Workload {
        name: "W1: 2-64-64-2, 100 × rk4, 512 rows",
        rows: 512,
        must_hold: true,
        make: |group, rows, seed| perceptron(group, ([2, 64, 64, 2], 100), rows, seed),
    },
    Workload {
        name: "W2: 64-512-512-64, 40 × rk4, 256 rows",
        rows: 256,
        must_hold: true,
        make: |group, rows, seed| perceptron(group, ([64, 512, 512, 64], 40), rows, seed),
    },
    Workload {
        name: "MNIST: 32 channels, 4 × rk4, 64 images",
        rows: 64,
        must_hold: false,
        make: mnist,
    },
];

/// A training step, ready to be taken, and bytes of θ.
struct Step<'g> {
    bytes: usize,
    take: Box<dyn FnMut() -> Result<()> + 'g>,
}

fn perceptron<'g>(
    group: &'g dyn Group,
    (widths, steps): ([usize; 4], usize),
    rows: usize,
    seed: u64,
) -> Result<Step<'g>> {
    let (vars, mut rng) = (VarMap::new(), generator(seed));
    let ode = NeuralOde::new(&vars, "ode", &Device::Cpu, move |vb| {
        Mlp::new(&widths, Activation::Tanh, vb)
    })?;
    let ode = ode.options(OdeOptions {
        steps: Steps::PerInterval(steps),
        output: Output::Final,
        ..Default::default()
    });
    initial::layers(&vars, &mut rng)?;
    let mine = share(group, rows);
    let y0 = normal(&mut rng, (rows, widths[0]), DType::F32, &Device::Cpu)?;
    let y0 = y0.narrow(0, mine.start, mine.len())?.contiguous()?;
    let loss = RowLoss::MeanSquaredError(y0.neg()?);
    let replicas = Replicas::new(group, &vars)?;
    let mut optimiser = AdamW::new(replicas.variables(), ParamsAdamW::default())?;
    Ok(Step {
        bytes: bytes(&vars),
        take: Box::new(move || {
            let loss = ode.loss(&y0, &[0.0, 1.0], &loss)?;
            Ok(replicas.backward_step(&loss, mine.len(), &mut optimiser)?)
        }),
    })
}

fn mnist(group: &dyn Group, rows: usize, seed: u64) -> Result<Step<'_>> {
    let layout = Layout {
        stem: &[[4, 2, 1], [4, 2, 1]],
        channels: 32,
        groups: 8,
        field: Field::Plain,
        steps: 4,
        tolerance: None,
    };
    let (mut rng, device) = (generator(seed), Device::Cpu);
    let network = Network::new(layout, Dtype::F32, &device, &Recorder::default(), &mut rng)?;
    let data = Data::stand_in(&mut rng).training;
    let indices: Vec<usize> = (0..rows).map(|i| i % data.count()).collect();
    let mine = share(group, rows);
    let shifts = shifts(mine.len(), 0, &mut rng);
    let (images, labels) = data.batch(&indices[mine.clone()], &shifts, &device)?;
    let replicas = Replicas::new(group, network.map())?;
    let mut optimiser = AdamW::new(replicas.variables(), ParamsAdamW::default())?;
    Ok(Step {
        bytes: bytes(network.map()),
        take: Box::new(move || {
            let loss = cross_entropy(&network.train(&images)?, &labels)?;
            Ok(replicas.backward_step(&loss, mine.len(), &mut optimiser)?)
        }),
    })
}

fn bytes(vars: &VarMap) -> usize {
    4 * vars
        .all_vars()
        .iter()
        .map(|v| v.elem_count())
        .sum::<usize>()
}

impl Step<'_> {
    /// Median milliseconds, all ranks starting together.
    fn milliseconds(&mut self, group: &dyn Group, repeats: usize) -> Result<f64> {
        // The first solve checks the field.
        (0..2).try_for_each(|_| (self.take)())?;
        timed(group, repeats, || (self.take)())
    }
}

fn timed(group: &dyn Group, repeats: usize, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = vec![];
    for _ in 0..repeats {
        group.barrier()?;
        let clock = Instant::now();
        run()?;
        times.push(1e3 * clock.elapsed().as_secs_f64());
    }
    Ok(median(times))
}

/// Measures, and says it on the first rank.
pub(crate) fn main(job: Job, flags: &Flags, team: Result<Team>) -> ExitCode {
    use_every_core();
    let measured = team.and_then(|team| {
        let points = points(job, flags, team.group())?;
        if team.leads() {
            println!("{MARK}{}", serde_json::to_string(&points)?);
        }
        Ok(())
    });
    match measured {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn points(job: Job, flags: &Flags, group: &dyn Group) -> Result<Vec<Point>> {
    let (size, seed) = (flags.size(), flags.seed);
    let repeats = size.pick(1, 7, 15);
    let point = |x: usize, y: f64| Point { x: x as f64, y };
    let mut points = vec![];
    match job {
        Job::Steps => {
            for workload in &WORKLOADS {
                let rows = size.pick(8, workload.rows, workload.rows);
                let mut step = (workload.make)(group, rows, seed)?;
                points.push(point(step.bytes, step.milliseconds(group, repeats)?));
            }
        }
        Job::Widths => {
            for width in (4..=size.pick(6, 11, 11)).map(|e| 1 << e) {
                let mut step = perceptron(group, ([64, width, width, 64], 4), 64, seed)?;
                points.push(point(step.bytes, step.milliseconds(group, repeats)?));
            }
        }
        Job::Rows => {
            for workload in &WORKLOADS {
                // A quarter of the rows up to twice as many.
                for i in 0..ROWS {
                    let rows = (size.pick(8, workload.rows, workload.rows) << i) / 4;
                    let mut step = (workload.make)(group, rows, seed)?;
                    points.push(point(rows, step.milliseconds(group, repeats)?));
                }
            }
        }
        Job::Sums => {
            for length in (0..=size.pick(12, 24, 25)).step_by(2).map(|e| 1usize << e) {
                let x = Tensor::ones(length, DType::F32, &Device::Cpu)?;
                let sum = || group.sum(&x).map(drop).map_err(Into::into);
                (0..3).try_for_each(|_| sum())?;
                let repeats = size.pick(3, (1 << 22) / length, (1 << 23) / length);
                let repeats = repeats.clamp(3, 200);
                points.push(point(4 * length, timed(group, repeats, sum)?));
            }
        }
    }
    Ok(points)
}
