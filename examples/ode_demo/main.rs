//! Learns y' = y³A from its trajectory with a network of 252 weights, in f32, bf16 and f16.
//!
//! `cargo run --release --example ode_demo` (a minute; `--smoke`: seconds).  Prints a table, writes
//! a picture and the figures of the table as JSON beside it.  Exits with 1 when a precision has not
//! learnt, or a low one has learnt less than f32.

#[path = "../common/mod.rs"]
mod common;
mod picture;
mod spiral;
mod training;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use serde_json::json;

use crate::common::dtype::Dtype;
use crate::common::{progress, use_every_core, Result};
use crate::spiral::Trajectory;
use crate::training::{train, Outcome};

/// How much lower the loss must end than it began.
const LEARNT: f64 = 10.0;
/// How much higher than in f32 it may end in low precision.
const LOW: f64 = 1.5;
const SMOKE: usize = 30;

/// Trains a neural ODE on a spiral in several precisions.
#[derive(Parser)]
struct Args {
    /// Iterations in each precision.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    iters: u32,
    /// Compute precisions, trained one after the other.
    #[arg(long, value_delimiter = ',', default_values = ["f32", "bf16", "f16"])]
    precision: Vec<Dtype>,
    /// The picture; figures go beside it, as .json.
    #[arg(long, default_value = "out/ode_demo.png")]
    out: PathBuf,
    /// Of weights and windows.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A few iterations, and no demands.
    #[arg(long)]
    smoke: bool,
}

fn main() -> ExitCode {
    use_every_core();
    match run(&Args::parse()) {
        Ok(missed) if missed.is_empty() => ExitCode::SUCCESS,
        Ok(missed) => {
            missed.iter().for_each(|line| eprintln!("missed: {line}"));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What the outcome misses.
fn run(args: &Args) -> Result<Vec<String>> {
    let iterations = if args.smoke {
        SMOKE
    } else {
        args.iters as usize
    };
    if let Some(dir) = args.out.parent() {
        std::fs::create_dir_all(dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
    }
    let data = Trajectory::new()?;
    let mut outcomes = vec![];
    for &dtype in &args.precision {
        let bar = progress(dtype.name(), iterations)?;
        outcomes.push(train(&data, dtype, iterations, args.seed, &bar)?);
        bar.finish_and_clear();
    }
    print(&outcomes);
    picture::draw(&args.out, &data, &outcomes)?;
    let figures = args.out.with_extension("json");
    std::fs::write(&figures, json(args, &outcomes).to_string())?;
    println!("\n{} and {}", args.out.display(), figures.display());
    Ok(match args.smoke {
        true => vec![],
        false => missed(&outcomes),
    })
}

fn print(outcomes: &[Outcome]) {
    println!(
        "precision  loss: first -> last  trajectory L1  field error   ms/iteration forward, backward   bytes kept  retries"
    );
    for o in outcomes {
        println!(
            "{:<9}  {:>11.1e} -> {:.1e}  {:>13.4}  {:>10.2}%  {:>22.2}, {:>8.2}  {:>11}  {:>7}",
            o.dtype.name(),
            o.first(),
            o.last(),
            o.trajectory_error,
            100.0 * o.field_error,
            o.forward,
            o.backward,
            o.stats.bytes_kept,
            o.stats.retries
        );
    }
}

fn json(args: &Args, outcomes: &[Outcome]) -> serde_json::Value {
    let of = |o: &Outcome| {
        json!({
            "precision": o.dtype.name(),
            "loss_first": o.first(),
            "loss_last": o.last(),
            "trajectory_l1": o.trajectory_error,
            "field_error": o.field_error,
            "forward_ms": o.forward,
            "backward_ms": o.backward,
            "bytes_kept": o.stats.bytes_kept,
            "vjps": o.stats.vjps,
            "retries": o.stats.retries,
        })
    };
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "threads": std::env::var("RAYON_NUM_THREADS").ok(),
        "iterations": outcomes.first().map(|o| o.losses.len()),
        "seed": args.seed,
        "runs": outcomes.iter().map(of).collect::<Vec<_>>(),
    })
}

/// Every precision must learn, and low ones as well as f32.  NaN misses.
fn missed(outcomes: &[Outcome]) -> Vec<String> {
    let mut missed = vec![];
    let mut demand = |holds: bool, line: String| {
        if !holds {
            missed.push(line);
        }
    };
    let f32 = outcomes.iter().find(|o| o.dtype == Dtype::F32);
    for o in outcomes {
        let (name, gain) = (o.dtype.name(), o.first() / o.last());
        demand(
            gain >= LEARNT,
            format!("{name}: the loss fell by {gain:.1} only"),
        );
        if let Some(f32) = f32 {
            let ratio = o.last() / f32.last();
            demand(
                ratio <= LOW,
                format!("{name}: the loss is {ratio:.2} times that of f32"),
            );
        }
    }
    missed
}
