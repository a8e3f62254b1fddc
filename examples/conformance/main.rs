//! Holds our solutions and gradients against those of independent implementations, from files.
//!
//! * `cargo run --release --example conformance -- DIR`: every problem in DIR under five methods in
//!   f64; the last line is `worst <figure>`.  Seconds.
//! * `… -- DIR --compute bf16` (or `f16`): the same problems with f in low precision, held against
//!   f64 and against what two PyTorch recipes reach.  Seconds.
//! * `… -- --demo DIR`: adjoints that underflow in f16, with and without scaling; the last line is
//!   `worst scaled <figure>`.  Seconds.
//! * `… -- --adaptive DIR`: adaptive steps by five pairs in f64 against exact flows, gradients by three continuous adjoints,
//!   the problems of DETEST, and events with the derivatives of their times; the last line is `worst <largest error over its bar>`.  A minute.
//! * `… -- --zoo DIR`: potentials with their second derivatives, and the models made of them, in f64; the last line is
//!   `worst <figure>`.  A file that no model answers yet is named and fails.  Seconds.
//! * `… -- --sde DIR`: stochastic differential equations on given increments, every scheme of every file in f64, values
//!   and gradients; the last line is `worst <figure>`, the bar 1e-10.  Seconds.
//! * `… -- --cde DIR`: controlled differential equations along four control paths in f64, with gradients of the
//!   observations; the last line is `worst <figure>`.  Seconds.
//!
//! `--cuda` computes on the first GPU (in a build with `--features cuda`).
//!
//! Exits with 1 when an error exceeds its bound, or when a file cannot be used.

mod adaptive;
mod cde;
mod continuous;
mod demo;
mod discrete;
mod equations;
mod events;
mod fields;
mod flows;
mod low_precision;
mod oracle;
mod outcome;
mod sde;
mod steps;
mod zoo;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::Device;
use candle_diffeq::options::Checkpoint;
use candle_diffeq::scaling::Scaling;
use candle_diffeq::Precision;
use clap::{Parser, ValueEnum};

use crate::discrete::METHODS;
use crate::low_precision::Recipe;
use crate::oracle::{Oracle, Result};
use crate::outcome::{worse, QUANTITIES};

/// Compares solutions and gradients with oracle files.
#[derive(Parser)]
struct Args {
    /// Directory of .safetensors files.
    #[arg(required_unless_present_any = ["demo", "adaptive", "zoo", "sde", "cde"])]
    dir: Option<PathBuf>,
    /// Largest relative error in f64.
    #[arg(long, default_value_t = 1e-11, conflicts_with_all = ["compute", "demo", "adaptive", "zoo", "sde", "cde"])]
    tol: f64,
    /// Evaluate the fields in low precision.
    #[arg(long, conflicts_with_all = ["demo", "adaptive", "zoo", "sde", "cde"])]
    compute: Option<Compute>,
    /// Directory of f16 demonstrations, which are run instead.
    #[arg(long, value_name = "DIR", conflicts_with = "dir")]
    demo: Option<PathBuf>,
    /// Directory of exact flows for adaptive steps, which are run instead.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["dir", "demo"])]
    adaptive: Option<PathBuf>,
    /// Directory of potentials and models of the zoo, which are run instead.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["dir", "demo", "adaptive"])]
    zoo: Option<PathBuf>,
    /// Directory of stochastic differential equations, which are run instead.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["dir", "demo", "adaptive", "zoo"])]
    sde: Option<PathBuf>,
    /// Directory of controlled differential equations, which are solved instead.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["dir", "demo", "adaptive", "zoo", "sde"])]
    cde: Option<PathBuf>,
    /// Compute on the first GPU, in low precision natively.
    #[arg(long)]
    cuda: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Compute {
    Bf16,
    F16,
}

impl Compute {
    fn recipe(self) -> Recipe {
        match self {
            Self::Bf16 => low_precision::BF16,
            Self::F16 => low_precision::F16,
        }
    }
}

/// Whether all bounds are met.
#[derive(Clone, Copy, PartialEq)]
enum Verdict {
    Pass,
    Fail,
}

impl Verdict {
    /// NaN fails.
    fn of(error: f64, bound: f64) -> Self {
        if error <= bound {
            Self::Pass
        } else {
            Self::Fail
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Fail => "FAIL",
        }
    }
}

fn verdict(args: &Args) -> Result<Verdict> {
    let device = match args.cuda {
        true => Device::new_cuda(0)?,
        false => Device::Cpu,
    };
    if let Some(dir) = &args.adaptive {
        return steps::table(dir, &device);
    }
    if let Some(dir) = &args.zoo {
        return of_zoo(dir, &device);
    }
    if let Some(dir) = &args.sde {
        return equations(dir, &device);
    }
    if let Some(dir) = &args.cde {
        return controlled(dir, &device);
    }
    match (&args.demo, &args.dir, args.compute) {
        (Some(dir), ..) => demos(dir, &device),
        (_, Some(dir), Some(compute)) => low(dir, &compute.recipe(), &device),
        (_, Some(dir), None) => double(dir, args.tol, &device),
        _ => Err("no directory given".into()),
    }
}

fn main() -> ExitCode {
    match verdict(&Args::parse()) {
        Ok(Verdict::Pass) => ExitCode::SUCCESS,
        Ok(Verdict::Fail) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The files to check; says which are left out.
fn oracles(dir: &Path, device: &Device) -> Result<Vec<Oracle>> {
    let (oracles, skipped) = discrete::usable(Oracle::read_all(dir)?)?;
    for file in skipped {
        println!("skipped {file}");
    }
    oracles
        .into_iter()
        .map(|oracle| oracle.on(device))
        .collect()
}

/// A row of figures under the heads of [`QUANTITIES`].
fn row(figures: [f64; 6]) -> String {
    figures.map(|e| format!("{e:>9.1e}")).concat()
}

fn head(first: &str, second: &str) -> String {
    format!(
        "{first:<36}{second:<9}{}",
        QUANTITIES.map(|name| format!("{name:>9}")).concat()
    )
}

fn double(dir: &Path, tol: f64, device: &Device) -> Result<Verdict> {
    let oracles = oracles(dir, device)?;
    println!(
        "relative errors, the worst tensor of each quantity\n{}",
        head("file", "method")
    );
    let mut worst = 0.0;
    for oracle in &oracles {
        for method in METHODS.iter().filter(|m| oracle.knows(m.name())) {
            let solved =
                discrete::solved(oracle, method, Precision::f64()).map_err(|e| oracle.failed(e))?;
            let errors = solved.worst_parts(&discrete::exact(oracle, method)?);
            let figures = errors.each_ref().map(|(e, _)| *e);
            let weight = &errors[4].1;
            println!(
                "{:<36}{:<9}{}  worst weight {weight}",
                oracle.file,
                method.name(),
                row(figures)
            );
            worst = figures.into_iter().fold(worst, worse);
        }
    }
    println!("worst {worst:.3e}");
    Ok(Verdict::of(worst, tol))
}

fn low(dir: &Path, recipe: &Recipe, device: &Device) -> Result<Verdict> {
    let oracles = oracles(dir, device)?;
    println!(
        "relative errors of whole quantities\n{}",
        head("file", "method")
    );
    let mut rows = vec![];
    for oracle in &oracles {
        let errors = low_precision::errors(oracle, recipe)?;
        println!(
            "{:<36}{:<9}{}",
            oracle.file,
            low_precision::METHOD.name(),
            row(errors)
        );
        rows.push(errors);
    }
    let (means, bars) = (low_precision::geometric_mean(&rows), recipe.bars());
    let verdicts: [Verdict; 6] = std::array::from_fn(|i| Verdict::of(means[i], bars[i]));
    let summary = [
        ("geometric mean", means),
        ("max", low_precision::largest(&rows)),
        ("f32acc in PyTorch, geometric mean", recipe.f32acc),
        ("rampde, geometric mean", recipe.rampde),
        ("bar: min(2 f32acc, rampde)", bars),
    ];
    for (name, figures) in summary {
        println!("{name:<45}{}", row(figures));
    }
    println!(
        "{:<45}{}",
        "",
        verdicts.map(|v| format!("{:>9}", v.word())).concat()
    );
    let passed = verdicts.iter().all(|v| *v == Verdict::Pass);
    Ok(if passed { Verdict::Pass } else { Verdict::Fail })
}

fn of_zoo(dir: &Path, device: &Device) -> Result<Verdict> {
    println!("relative errors in f64, the worst tensor of each line");
    let (mut worst, mut unanswered) = (0.0, vec![]);
    for oracle in zoo::files(dir, device)? {
        match zoo::answer(&oracle)? {
            zoo::Answer::None(reason) => {
                println!("{:<42}UNANSWERED: {reason}", oracle.file);
                unanswered.push(oracle.file);
            }
            zoo::Answer::Lines(lines) => {
                for (what, error, part) in lines {
                    println!("{:<42}{what:<24}{error:>9.1e}  {part}", oracle.file);
                    worst = worse(worst, error);
                }
            }
        }
    }
    if !unanswered.is_empty() {
        println!("not answered, counted as failed: {}", unanswered.join(", "));
    }
    println!("worst {worst:.3e}");
    match unanswered.is_empty() {
        true => Ok(Verdict::of(worst, zoo::BAR)),
        false => Ok(Verdict::Fail),
    }
}

/// Largest relative error of a stochastic differential equation in f64.
const SDE_BAR: f64 = 1e-10;

fn equations(dir: &Path, device: &Device) -> Result<Verdict> {
    println!(
        "relative errors, in f64\n{:<36}{:<28}{:>9}{:>11}",
        "file", "method", "states", "gradients"
    );
    let (mut worst, mut checked) = (0.0, false);
    for oracle in Oracle::read_all(dir)? {
        let oracle = oracle.on(device)?;
        for scheme in sde::schemes(&oracle) {
            let name = scheme.1.name();
            let run = sde::run(&oracle, scheme, Checkpoint::All, Precision::f64())
                .map_err(|e| oracle.failed(format_args!("{name}: {e}")))?;
            println!(
                "{:<36}{name:<28}{:>9.1e}{:>11.1e}",
                oracle.file, run.states, run.gradients
            );
            worst = worse(worst, worse(run.states, run.gradients));
            checked = true;
        }
    }
    if !checked {
        return Err(format!("{}: nothing to check", dir.display()).into());
    }
    println!("worst {worst:.3e}");
    Ok(Verdict::of(worst, SDE_BAR))
}

/// Largest relative error of controlled differential equations.
const CONTROLLED: f64 = 1e-10;

fn controlled(dir: &Path, device: &Device) -> Result<Verdict> {
    let heads = cde::HEADS.map(|name| format!("{name:>9}")).concat();
    println!(
        "relative errors of whole quantities, of the worst weight\n{:<32}{:<20}{heads}",
        "file", "scheme"
    );
    let mut worst = 0.0;
    for oracle in Oracle::read_all(dir)? {
        let oracle = oracle.on(device)?;
        let rows = cde::rows(&oracle).map_err(|e| oracle.failed(e))?;
        for cde::Row { scheme, errors } in &rows {
            println!("{:<32}{scheme:<20}{}", oracle.file, row(*errors));
        }
        worst = worse(worst, cde::worst(&rows));
    }
    println!("worst {worst:.3e}");
    Ok(Verdict::of(worst, CONTROLLED))
}

fn demos(dir: &Path, device: &Device) -> Result<Verdict> {
    println!(
        "{:<36}{:<9}{:>9}{:>9}{:>12}{:>9}  scales",
        "file", "scaling", "grad_y0", "grad_w", "VJPs/stage", "retries"
    );
    let (mut worst, mut verdict) = (0.0, Verdict::Pass);
    for oracle in Oracle::read_all(dir)? {
        let oracle = oracle.on(device)?;
        let bar = demo::bar(&oracle);
        let scaled = demo::run(&oracle, Scaling::Auto).map_err(|e| oracle.failed(e))?;
        let unscaled = demo::run(&oracle, Scaling::Off).map_err(|e| oracle.failed(e))?;
        let met = Verdict::of(scaled.worst(), bar.scaled);
        print_demo(
            &oracle,
            "dynamic",
            &scaled,
            &format!("{} (<= {:.1e})", met.word(), bar.scaled),
        );
        let lost = match (bar.underflows, unscaled.worst() > demo::LOST) {
            (true, true) => "lost, as expected",
            (true, false) => "not lost, which is unexpected",
            (false, _) => "",
        };
        print_demo(&oracle, "off", &unscaled, lost);
        worst = worse(worst, scaled.worst());
        // What is not lost without scaling has not been computed in f16.
        if met == Verdict::Fail || (bar.underflows && unscaled.worst() <= demo::LOST) {
            verdict = Verdict::Fail;
        }
    }
    println!("worst scaled {worst:.3e}");
    Ok(verdict)
}

fn print_demo(oracle: &Oracle, scaling: &str, run: &demo::Run, remark: &str) {
    let scales = match run.stats.scale_range {
        Some((least, largest)) => format!("2^{}..2^{}", least.log2(), largest.log2()),
        None => "1".to_owned(),
    };
    println!(
        "{:<36}{scaling:<9}{:>9.1e}{:>9.1e}{:>12.3}{:>9}  {scales:<12} {remark}",
        oracle.file, run.y0, run.weights, run.vjps_per_stage, run.stats.retries
    );
}
