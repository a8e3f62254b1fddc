//! Solves the Lorenz system on all intervals at once: parareal and Newton's multiple shooting beside a serial solve.
//!
//! `cargo run --release --example multiple_shooting` (seconds).  torchdyn's tutorial m2b: eight starts on [0, 3], in thirty
//! intervals, which are rows of one batch.  Prints errors and times sweep by sweep, writes a picture and the figures as JSON
//! beside it.  Exits with 1 when all sweeps together are not exact, or parareal takes longer than the serial solve.

use std::process::ExitCode;
use std::time::Instant;

use candle_core::{Device, Result as CandleResult, Tensor};
use candle_diffeq::datasets::System;
use candle_diffeq::models::shooting::{Shooting, Shot};
use candle_diffeq::nn::Jvp;
use candle_diffeq::options::Steps;
use candle_diffeq::tableau::RK4;
use candle_diffeq::{predict, OdeOptions, Time, VectorField};
use clap::Parser;
use serde_json::json;

use common::chart::{colour, picture, Curve, Mark, Panel, Scale};
use common::dtype::Dtype;
use common::flags::Flags;
use common::random::{generator, normal};
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{median, values, Result};

const STARTS: usize = 8;
const END: f64 = 3.0;
const INTERVALS: usize = 30;
/// Steps of RK4 in an interval.
const COARSE: usize = 4;
/// What all sweeps together may be off in f64, in units of the largest number.
const EXACT: f64 = 1e-10;
/// A change at which sweeps end, likewise.
const TOLERANCE: f64 = 1e-9;

/// Solves the Lorenz system on all intervals at once.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// Lorenz' system with its derivative along a direction.
struct Lorenz(System);

impl VectorField for Lorenz {
    fn velocity(&self, t: &Time, y: &Tensor) -> CandleResult<Tensor> {
        self.0.velocity(t, y)
    }
}

impl Jvp for Lorenz {
    fn jvp(&self, t: &Time, y: &Tensor, v: &Tensor) -> CandleResult<(Tensor, Tensor)> {
        let part = |x: &Tensor, i: usize| x.narrow(1, i, 1);
        let [x, y_, z] = [part(y, 0)?, part(y, 1)?, part(y, 2)?];
        let [a, b, c] = [part(v, 0)?, part(v, 1)?, part(v, 2)?];
        let bent = [
            ((&b - &a)? * 10.0)?,
            (((&a * (28.0 - &z)?)? - (&x * &c)?)? - &b)?,
            (((&a * &y_)? + (&x * &b)?)? - (c * (8.0 / 3.0))?)?,
        ];
        Ok((self.0.velocity(t, y)?, Tensor::cat(&bent, 1)?))
    }
}

/// One way after so many sweeps.
struct Sweep {
    method: &'static str,
    sweeps: usize,
    /// Errors of the states at the bounds of all intervals, in units of the largest number.
    errors: Vec<f64>,
    seconds: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("multiple_shooting", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

/// The median time of three runs, and what the last one returned.
fn timed<T>(run: impl Fn() -> candle_diffeq::Result<T>) -> Result<(T, f64)> {
    let mut seconds = vec![];
    loop {
        let clock = Instant::now();
        let result = run()?;
        seconds.push(clock.elapsed().as_secs_f64());
        if seconds.len() == 3 {
            return Ok((result, median(seconds)));
        }
    }
}

/// Errors at every bound.
fn errors(states: &Tensor, serial: &Tensor) -> Result<Vec<f64>> {
    let (all, exact) = (values(states)?, values(serial)?);
    let size = exact.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
    let each = all.len() / (INTERVALS + 1);
    let pairs: Vec<f64> = all
        .iter()
        .zip(&exact)
        .map(|(a, b)| (a - b).abs() / size)
        .collect();
    Ok(pairs
        .chunks(each)
        .map(|part| part.iter().copied().fold(0.0, f64::max))
        .collect())
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let fine = args.flags.size().pick(20, 100, 100);
    let lorenz = Lorenz(System::LORENZ);
    let length = END / INTERVALS as f64;
    for dtype in args
        .flags
        .precisions_among(&[Dtype::F64], &[Dtype::F64, Dtype::F32])?
    {
        let options = |steps: usize| OdeOptions {
            method: RK4,
            steps: Steps::PerInterval(steps),
            precision: Some(dtype.precision()),
            ..Default::default()
        };
        let mut rng = generator(args.flags.seed);
        let y0 = (normal(&mut rng, (STARTS, 3), dtype.state(), device)? + 15.0)?;
        let times: Vec<f64> = (0..=INTERVALS).map(|n| n as f64 * length).collect();
        let (serial, seconds) = timed(|| predict(&lorenz, &y0, &times, &options(fine)))?;
        let shooting = Shooting::new(options(COARSE), options(fine));
        let mut all = vec![];
        type Run<'a> = &'a dyn Fn(&Shooting) -> candle_diffeq::Result<Shot>;
        let parareal: Run<'_> = &|s| s.solve(&lorenz, &y0, (INTERVALS, length));
        let newton: Run<'_> = &|s| s.newton(&lorenz, &y0, (INTERVALS, length));
        for (method, run) in [("parareal", parareal), ("Newton", newton)] {
            for sweeps in [0, 1, 2, 3, 4, 5, 6, 8, 10, INTERVALS] {
                let own = shooting.clone().sweeps(sweeps).tolerance(0.0);
                let (shot, seconds) = timed(|| run(&own))?;
                let errors = errors(&shot.states, &serial)?;
                all.push(Sweep {
                    method,
                    sweeps,
                    errors,
                    seconds,
                });
            }
        }
        let ended = parareal(&shooting.clone().tolerance(TOLERANCE))?
            .changes
            .len();
        let ended_newton = newton(&shooting.clone().tolerance(TOLERANCE))?
            .changes
            .len();
        print(dtype, &all, seconds, [ended, ended_newton]);
        draw(report, dtype, &all, seconds)?;
        let json = |s: &Sweep| {
            json!({
                "method": s.method,
                "sweeps": s.sweeps,
                "error": s.errors.iter().copied().fold(0.0, f64::max),
                "seconds": s.seconds,
            })
        };
        let part = dtype.name();
        report.figure(part, all.iter().map(json).collect::<Vec<_>>())?;
        report.figure(&format!("{part}_serial_seconds"), seconds)?;
        if dtype == Dtype::F64 {
            demands(report, &all, seconds, [ended, ended_newton]);
        }
    }
    Ok(())
}

fn demands(report: &mut Report, all: &[Sweep], serial: f64, ended: [usize; 2]) {
    for (method, ended) in ["parareal", "Newton"].into_iter().zip(ended) {
        let own: Vec<_> = all.iter().filter(|s| s.method == method).collect();
        let Some(last) = own.last() else { continue };
        let error = last.errors.iter().copied().fold(0.0, f64::max);
        report.demand(error <= EXACT, || {
            format!("{method}: {error:.1e} from the serial solve after all sweeps")
        });
        let enough = own.iter().find(|s| s.sweeps >= ended);
        let seconds = enough.map_or(f64::INFINITY, |s| s.seconds);
        // A sweep of Newton's method solves for every feature's derivative, too, and pays where cores wait.
        report.demand(method != "parareal" || seconds < serial, || {
            format!("{method}: {seconds:.3} s in {ended} sweeps, the serial solve {serial:.3} s")
        });
    }
}

fn print(dtype: Dtype, all: &[Sweep], serial: f64, ended: [usize; 2]) {
    let mut table = Table::new([
        "method",
        "sweeps",
        "largest error",
        "ms",
        "speed-up over the serial solve",
    ]);
    for s in all {
        table.row([
            s.method.to_owned(),
            s.sweeps.to_string(),
            sci(s.errors.iter().copied().fold(0.0, f64::max)),
            format!("{:.1}", 1e3 * s.seconds),
            format!("{:.1}", serial / s.seconds),
        ]);
    }
    println!(
        "{}: the serial solve takes {:.1} ms",
        dtype.name(),
        1e3 * serial
    );
    print!("{table}");
    println!(
        "changes below {TOLERANCE:.0e} after {} sweeps of parareal, {} of Newton",
        ended[0], ended[1]
    );
}

fn draw(report: &mut Report, dtype: Dtype, all: &[Sweep], serial: f64) -> Result<()> {
    let part = match dtype {
        Dtype::F64 => "",
        other => other.name(),
    };
    picture(&report.picture(part), (1500, 420), |area| {
        let parts = area.split_evenly((1, 3));
        for (method, part) in ["parareal", "Newton"].iter().zip(&parts) {
            let own = all.iter().filter(|s| s.method == *method && s.sweeps <= 4);
            let curve = |(i, s): (usize, &Sweep)| {
                let at = s
                    .errors
                    .iter()
                    .enumerate()
                    .map(|(n, e)| (n as f64, e.max(1e-17)));
                Curve::new(format!("{} sweeps", s.sweeps), colour(i), at)
            };
            Panel {
                scales: [Scale::Linear, Scale::Decades],
                curves: own.enumerate().map(curve).collect(),
                ranges: [None, Some(1e-17..1e5)],
                ..Panel::new(
                    format!("{method}: error by interval"),
                    "interval",
                    "relative error",
                )
            }
            .draw(part)?;
        }
        let mut curves = vec![];
        for (i, method) in ["parareal", "Newton"].into_iter().enumerate() {
            let own = all.iter().filter(|s| s.method == method && s.sweeps <= 10);
            let at = own.map(|s| (s.sweeps as f64, 1e3 * s.seconds));
            curves.push(Curve::new(method, colour(i), at).mark(Mark::DottedLine));
        }
        let serial = [(0.0, 1e3 * serial), (10.0, 1e3 * serial)];
        curves.push(Curve::new("serial", colour(2), serial).mark(Mark::Dashed));
        Panel {
            curves,
            scales: [Scale::Linear, Scale::Decades],
            legend: common::chart::SeriesLabelPosition::LowerRight,
            ..Panel::new("time", "sweeps", "ms")
        }
        .draw(&parts[2])
    })
}
