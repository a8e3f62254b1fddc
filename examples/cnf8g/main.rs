//! Learns eight densities in the plane with continuous normalising flows, in f32, bf16, and f16
//! without and with adjoint scaling.
//!
//! `cargo run --release --example cnf8g` (minutes; `--smoke`: seconds; `--full`: the published size).
//! `--adaptive TOL` takes adaptive steps of DOPRI5 and BOSH3 in f32 and bf16, and writes `cnf8g_adaptive`.
//! `mpirun -n N … --mpi` shares every batch among N processes.  Prints likelihoods and discrepancies, draws densities and samples, and how the density forms over
//! time.  Exits with 1 when scaled f16 does not come within 2 % of the likelihood of f32.

mod picture;
mod training;
mod way;

use std::process::ExitCode;

use candle_core::Device;
use candle_diffeq::datasets::Density;
use candle_diffeq::distributed::{Alone, Group};
use clap::Parser;
use serde_json::json;

use crate::training::{train, Outcome, Setting};
use crate::way::Way;
use common::chart::SeriesLabelPosition;
use common::dtype::Dtype;
use common::flags::Flags;
use common::mode::Mode;
use common::report::{self, Report};
use common::table::Table;
use common::team::{Team, Together};
use common::{jobs, mean, progress, Result};

/// How far scaled f16 may end from f32.
const CLOSE: f64 = 0.02;
/// What a likelihood must come down to, in parts of the first loss.
const LEARNT: f64 = 0.9;
/// And of the eight Gaussians, whose entropy is 2.84.
const EIGHT_GAUSSIANS: f64 = 2.84 * 1.03;

/// Evaluations are noted as means over this many iterations.
const SHOWN: usize = 50;

/// Trains continuous normalising flows on densities in the plane.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    together: Together,
    /// Which densities [default: all].
    #[arg(long, value_delimiter = ',')]
    density: Vec<Density>,
    /// Iterations of each run [default: of the size].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    iters: Option<u32>,
    /// Adaptive steps with this relative and absolute tolerance.
    #[arg(long, value_name = "TOL")]
    adaptive: Option<f64>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let name = match args.adaptive {
        Some(_) => "cnf8g_adaptive",
        None => "cnf8g",
    };
    let team = args.together.team();
    report::run_together(name, &args.flags, team, |team, device, report| {
        run(&args, team, device, report)
    })
}

fn run(args: &Args, team: &Team, device: &Device, report: &mut Report) -> Result<()> {
    let size = args.flags.size();
    let mut setting = size.pick(Setting::SMOKE, Setting::SMALL, Setting::PUBLISHED);
    if let Some(iterations) = args.iters {
        setting.iterations = iterations as usize;
    }
    let densities = match args.density.as_slice() {
        [] => Density::ALL.to_vec(),
        asked => asked.to_vec(),
    };
    let all = [Dtype::F32, Dtype::Bf16, Dtype::F16];
    let default = match args.adaptive {
        Some(_) => &all[..2],
        None => &all,
    };
    let modes = Mode::of(&args.flags.precisions_among(default, &all)?);
    let ways = Way::all(&modes, args.adaptive);
    let pairs = densities
        .iter()
        .flat_map(|d| ways.iter().map(move |way| (*d, way)));
    let pairs: Vec<_> = pairs.collect();
    let bar = progress("train", pairs.len() * setting.iterations)?;
    let seed = args.flags.seed;
    let one = |group: &dyn Group, (density, way): &(Density, &Way)| {
        train(group, *density, way, &setting, seed, device, &bar)
    };
    // Processes that share a batch do one run after the other; one process does several at a time.
    let outcomes = match team.is_several() {
        true => pairs.iter().map(|pair| one(team.group(), pair)).collect(),
        false => jobs::run(device, &pairs, |pair| one(&Alone, pair)),
    }?;
    bar.finish_and_clear();
    if !team.leads() {
        return Ok(());
    }
    print(&outcomes, ways.len());
    let by_density: Vec<&[Outcome]> = outcomes.chunks(ways.len()).collect();
    // Of the precision that comes last: scaled f16, unless others were asked for.
    let last: Vec<_> = by_density.iter().filter_map(|of| of.last()).collect();
    picture::densities(&report.picture(""), &last, args.flags.seed)?;
    picture::flows(&report.picture("flow"), &last[..last.len().min(2)])?;
    // Losses fall, and evaluations grow.
    let axis = ("negative log-likelihood", SeriesLabelPosition::UpperRight);
    picture::over_iterations(&report.picture("loss"), &by_density, axis, |o| &o.losses)?;
    if args.adaptive.is_some() {
        let axis = ("evaluations forward", SeriesLabelPosition::LowerRight);
        picture::over_iterations(&report.picture("cost"), &by_density, axis, |o| {
            &o.evaluations
        })?;
    }
    report.figure("iterations", setting.iterations)?;
    report.figure("runs", outcomes.iter().map(json).collect::<Vec<_>>())?;
    demands(&by_density, report);
    Ok(())
}

/// One line for each density: likelihoods, then discrepancies; one line for each precision: times.
fn print(outcomes: &[Outcome], ways: usize) {
    for (title, figure) in [
        ("negative log-likelihood", nll as fn(&Outcome) -> String),
        ("10³ MMD² of samples to data", |o| thousandths(o.mmd)),
        ("10³ MMD² of data sent to noise", |o| {
            thousandths(o.mmd_noise)
        }),
    ] {
        let names = outcomes.iter().take(ways).map(|o| o.way.name.clone());
        let mut table = Table::of(std::iter::once(title.to_owned()).chain(names));
        for of in outcomes.chunks(ways) {
            let cells = of.iter().map(figure);
            table.line(
                of.iter()
                    .take(1)
                    .map(|o| o.density.to_string())
                    .chain(cells),
            );
        }
        println!("{table}");
    }
    let mut table = Table::new([
        "",
        "evaluations, first 10",
        "last 10",
        "ms forward",
        "backward",
        "pull-backs redone",
        "scale",
    ]);
    for (i, first) in outcomes.iter().take(ways).enumerate() {
        let of: Vec<_> = outcomes.iter().skip(i).step_by(ways).collect();
        let over = |f: fn(&Outcome) -> f64| mean(&of.iter().map(|o| f(o)).collect::<Vec<_>>());
        table.row([
            first.way.name.clone(),
            format!("{:.1}", over(|o| mean(first_of(&o.evaluations)))),
            format!("{:.1}", over(|o| mean(last_of(&o.evaluations)))),
            format!("{:.1}", over(|o| o.forward)),
            format!("{:.1}", over(|o| o.backward)),
            of.iter()
                .map(|o| o.stats.retries)
                .sum::<usize>()
                .to_string(),
            match first.stats.scale_range {
                Some((low, high)) => format!("2^{} … 2^{}", low.log2(), high.log2()),
                None => "–".to_owned(),
            },
        ]);
    }
    print!("{table}");
}

/// Ten of them, or fewer.
fn first_of(figures: &[f64]) -> &[f64] {
    &figures[..figures.len().min(10)]
}

fn last_of(figures: &[f64]) -> &[f64] {
    &figures[figures.len().saturating_sub(10)..]
}

fn nll(o: &Outcome) -> String {
    format!("{:.3}", o.nll)
}

fn thousandths(x: f64) -> String {
    format!("{:.2}", 1e3 * x)
}

fn json(o: &Outcome) -> serde_json::Value {
    json!({
        "density": o.density.name(),
        "precision": o.way.name,
        "evaluations": o.evaluations.chunks(SHOWN).map(mean).collect::<Vec<_>>(),
        "nll": o.nll,
        "mmd": o.mmd,
        "mmd_noise": o.mmd_noise,
        "loss_first": o.losses.first(),
        "loss_last": o.losses.last(),
        "forward_ms": o.forward,
        "backward_ms": o.backward,
        "bytes_kept": o.stats.bytes_kept,
        "vjps": o.stats.vjps,
        "retries": o.stats.retries,
    })
}

/// Every run must learn, and scaled f16 as well as f32.  NaN misses.
fn demands(by_density: &[&[Outcome]], report: &mut Report) {
    for o in by_density.iter().copied().flatten() {
        let first = o.losses.first().copied().unwrap_or(f64::NAN);
        let highest = match o.density {
            Density::EightGaussians => EIGHT_GAUSSIANS,
            _ => LEARNT * first,
        };
        report.demand(o.nll <= highest, || {
            let (density, mode, nll) = (o.density, &o.way.name, o.nll);
            format!("{density}, {mode}: a likelihood of {nll:.3}, not {highest:.3} or less")
        });
    }
    for of in by_density {
        let exact = of.iter().find(|o| o.way.mode.dtype == Dtype::F32);
        let scaled = of.iter().find(|o| o.way.mode.is_scaled_f16());
        let (Some(exact), Some(scaled)) = (exact, scaled) else {
            continue;
        };
        let apart = (scaled.nll - exact.nll).abs() / exact.nll.abs();
        report.demand(apart <= CLOSE, || {
            let density = exact.density;
            format!("{density}: the likelihood of scaled f16 is {apart:.3} from that of f32")
        });
    }
}
