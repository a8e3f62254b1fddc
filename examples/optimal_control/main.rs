//! Learns to bring an elastic pendulum to rest, and to do so with a solver that has learnt its own error.
//!
//! `cargo run --release --example optimal_control` (minutes; `--smoke`: seconds).  torchdyn's tutorials m3b and m4b.
//! *Energy shaping*: u = −V'(q) − K(q, p) p with perceptrons V and K, which begin at zero; the loss is the
//! distance from rest at t = 3 and the integral of |u|.  *Hypersolver*: a controller of a pendulum with friction is trained
//! through Euler's method, through a hypersolver of the same steps, and through RK4, each judged by an accurate solve.  Prints
//! two tables, writes a picture and the figures as JSON beside it.  Exits with 1 when the pendulum is not brought to rest, or
//! the hypersolver is no closer to the true cost than Euler's method.

mod hyper;
mod shaping;

use std::process::ExitCode;

use candle_core::Device;
use clap::Parser;

use common::chart::picture;
use common::flags::Flags;
use common::report::{self, Report};
use common::Result;

/// Learns to control pendulums.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("optimal_control", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let shaped = shaping::run(&args.flags, device, report)?;
    let solvers = hyper::run(&args.flags, device, report)?;
    picture(&report.picture(""), (1400, 420), |area| {
        let parts = area.split_evenly((1, 3));
        shaping::draw(&shaped, [&parts[0], &parts[1]])?;
        hyper::draw(&solvers, &parts[2])
    })
}
