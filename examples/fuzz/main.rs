//! Random solves against a naive f64 reference, and bad inputs, which must end in an error.
//!
//! * `cargo run --release --example fuzz`: 20 000 cases, minutes; the last line is
//!   `<n> cases, <n> failures`.
//! * `… -- --seconds 60`: as many as a minute has.
//! * `… -- --seed N`: one case, shrunk if it fails.
//!
//! Every case follows from its seed.  A failure prints the seed, the case, a smaller case that fails too, and
//! the command that repeats it; the exit code is 1.

mod bad;
mod ball;
mod case;
mod check;
mod curve;
mod draw;
mod fields;
mod fuzz;
mod problem;
mod program;
mod reference;
mod shrink;
mod still;
mod subject;
mod tape;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use crate::check::Sabotage;
use crate::fuzz::Until;

/// Solves random problems and compares them with a naive reference.
#[derive(Parser)]
struct Args {
    /// Seed of the first case; the others follow.  Alone: only this one.
    #[arg(long)]
    seed: Option<u64>,
    /// Cases to run [default: 20000].
    #[arg(long)]
    cases: Option<u64>,
    /// Runs for so long instead.
    #[arg(long, conflicts_with = "cases")]
    seconds: Option<u64>,
    /// Cases at a time [default: one for each core].
    #[arg(long)]
    threads: Option<usize>,
    /// A few hundred cases.
    #[arg(long, conflicts_with_all = ["cases", "seconds"])]
    smoke: bool,
    /// Breaks the reference on purpose: every failure must be found and shrunk.
    #[arg(long)]
    self_test: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let until = match (args.cases, args.seconds, args.seed) {
        _ if args.smoke => Until::Cases(300),
        (Some(cases), ..) => Until::Cases(cases),
        (_, Some(seconds), _) => Until::Elapsed(Duration::from_secs(seconds)),
        (_, _, Some(_)) => Until::Cases(1),
        _ => Until::Cases(20_000),
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    common::threads::set_to_every_core();
    let threads = args.threads.unwrap_or(cores).max(1);
    let passed = match args.self_test {
        true => fuzz::finds_what_is_broken(),
        false => fuzz::run(args.seed.unwrap_or(0), until, threads, Sabotage::None),
    };
    match passed {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
