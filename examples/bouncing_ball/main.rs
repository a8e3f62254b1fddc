//! A bouncing ball as a hybrid system: derivatives of the time of the tenth bounce, and a fit through the bounces.
//!
//! `cargo run --release --example bouncing_ball` (seconds; `--smoke`: fewer iterations).  Exits with 1 when times or
//! derivatives are not those of the closed form, or when the fit does not find the restitution.

mod ball;
mod picture;

use std::process::ExitCode;

use candle_core::{Device, Tensor};
use clap::Parser;
use serde_json::json;

use crate::ball::{Ball, Variables, PARAMETERS};
use common::dtype::Dtype;
use common::flags::Flags;
use common::random::{generator, normal};
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{values, Result};

const BOUNCES: usize = 10;
const TRUTH: Ball = Ball {
    gravity: 9.81,
    restitution: 0.85,
    height: 1.5,
    speed: 1.0,
};
/// Of the restitution, where the fit begins.
const GUESS: f64 = 0.6;
/// Of the observed times, in seconds.
const NOISE: f64 = 5e-3;
const RATE: f64 = 1.5e-3;
/// Largest errors of times, of derivatives relative to one plus their size, and of the fit.
const BARS: [f64; 3] = [1e-9, 1e-6, 1e-3];

/// Bounces of a ball, their derivatives, and a fit.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// A ball over time.
struct Flight {
    /// Time and height.
    path: Vec<(f64, f64)>,
    bounces: Vec<f64>,
}

/// The n-th bounce: time, and derivatives, ours and in closed form.
struct Bounce {
    t: [f64; 2],
    slopes: [[f64; 4]; 2],
}

/// Gradient descent: the restitution and the loss before each iteration, and at the end.
struct Fit {
    observed: Vec<f64>,
    restitution: Vec<f64>,
    loss: Vec<f64>,
}

impl Fit {
    fn found(&self) -> f64 {
        self.restitution.last().copied().unwrap_or(f64::NAN)
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("bouncing_ball", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let f64 = [Dtype::F64];
    args.flags.precisions_among(&f64, &f64)?;
    let bounces = bounces(device)?;
    let iterations = args.flags.size().pick(5, 36, 36);
    let fit = fit(iterations, args.flags.seed, device)?;
    let guess = Ball {
        restitution: GUESS,
        ..TRUTH
    };
    let fitted = Ball {
        restitution: fit.found(),
        ..TRUTH
    };
    let flights = [
        flight(&TRUTH, device)?,
        flight(&guess, device)?,
        flight(&fitted, device)?,
    ];
    print(&bounces, &fit);
    picture::draw(&report.picture(""), &bounces, &flights, &fit)?;
    let bounce = |b: &Bounce| {
        let [t, exact] = b.t;
        let [slopes, exact_slopes] = b.slopes;
        json!({"t": t, "exact": exact, "slopes": slopes, "exact_slopes": exact_slopes})
    };
    report.figure("parameters", PARAMETERS)?;
    report.figure("bounces", bounces.iter().map(bounce).collect::<Vec<_>>())?;
    report.figure("observed", &fit.observed)?;
    report.figure("restitution", &fit.restitution)?;
    report.figure("loss", &fit.loss)?;
    demands(&bounces, &fit, report);
    Ok(())
}

/// Ten bounces with derivatives.
fn bounces(device: &Device) -> Result<Vec<Bounce>> {
    let variables = Variables::new(&TRUTH, device)?;
    let solved = variables.fly(&[0.0, TRUTH.top(BOUNCES)])?;
    let mut bounces = vec![];
    for (i, jump) in solved.jumps.iter().enumerate() {
        let t = &jump.before.t;
        let grads = t.backward()?;
        let of = |var: &candle_core::Var| match grads.get(var) {
            Some(grad) => values(grad),
            None => values(&var.zeros_like()?),
        };
        let (g, e, start) = (
            of(&variables.gravity)?,
            of(&variables.restitution)?,
            of(&variables.start)?,
        );
        bounces.push(Bounce {
            t: [t.to_scalar()?, TRUTH.bounce(i + 1)],
            slopes: [[g[0], e[0], start[0], start[1]], TRUTH.slopes(i + 1)],
        });
    }
    Ok(bounces)
}

/// From the start to the highest point after the last bounce.
fn flight(ball: &Ball, device: &Device) -> Result<Flight> {
    const POINTS: usize = 600;
    let end = ball.top(BOUNCES);
    let times: Vec<f64> = (0..=POINTS)
        .map(|i| end * i as f64 / POINTS as f64)
        .collect();
    let solved = Variables::new(ball, device)?.fly(&times)?;
    let heights = values(&solved.states.narrow(1, 0, 1)?)?;
    let bounces = solved.jumps.iter().map(|jump| jump.before.t.to_scalar());
    let bounces = bounces.collect::<candle_core::Result<Vec<f64>>>()?;
    let mut path: Vec<_> = times.into_iter().zip(heights).collect();
    path.extend(bounces.iter().map(|t| (*t, 0.0)));
    path.sort_by(|a, b| a.0.total_cmp(&b.0));
    Ok(Flight { path, bounces })
}

/// Minimises the mean square of the differences to observed times.
fn fit(iterations: usize, seed: u64, device: &Device) -> Result<Fit> {
    let exact: Vec<f64> = (1..=BOUNCES).map(|n| TRUTH.bounce(n)).collect();
    let exact = Tensor::new(exact, device)?;
    let noise = normal(&mut generator(seed), BOUNCES, exact.dtype(), device)?;
    let observed = (exact + (noise * NOISE)?)?;
    let guess = Ball {
        restitution: GUESS,
        ..TRUTH
    };
    let variables = Variables::new(&guess, device)?;
    let restitution = &variables.restitution;
    let mut fit = Fit {
        observed: values(&observed)?,
        restitution: vec![],
        loss: vec![],
    };
    for i in 0..=iterations {
        let e = values(restitution)?[0];
        // It bounces for ever; the ball of this restitution does so ten times until then.
        let end = Ball {
            restitution: e,
            ..TRUTH
        }
        .top(BOUNCES);
        let solved = variables.fly(&[0.0, end])?;
        let times: Vec<_> = solved.jumps.iter().map(|jump| &jump.before.t).collect();
        let loss = (Tensor::stack(&times, 0)? - &observed)?.sqr()?.mean_all()?;
        fit.restitution.push(e);
        fit.loss.push(loss.to_scalar()?);
        if i < iterations {
            let grads = loss.backward()?;
            let grad = grads.get(restitution).ok_or("no gradient")?;
            restitution.set(&(restitution.as_tensor() - (grad * RATE)?)?)?;
        }
    }
    Ok(fit)
}

fn print(bounces: &[Bounce], fit: &Fit) {
    let Some(last) = bounces.last() else { return };
    println!(
        "bounce {} at {:.12} s, in closed form {:.12} s\n",
        bounces.len(),
        last.t[0],
        last.t[1]
    );
    let mut table = Table::new(["derivative by", "ours", "closed form", "error"]);
    for (i, name) in PARAMETERS.iter().enumerate() {
        let [ours, exact] = last.slopes.map(|slopes| slopes[i]);
        table.row([
            (*name).to_owned(),
            format!("{ours:.10}"),
            format!("{exact:.10}"),
            sci((ours - exact).abs()),
        ]);
    }
    println!("{table}");
    println!(
        "restitution {:.5} after {} iterations from {GUESS}, true {}, loss {} from {}",
        fit.found(),
        fit.restitution.len() - 1,
        TRUTH.restitution,
        fit.loss.last().map_or_else(String::new, |x| sci(*x)),
        fit.loss.first().map_or_else(String::new, |x| sci(*x)),
    );
}

fn demands(bounces: &[Bounce], fit: &Fit, report: &mut Report) {
    let [times, slopes, found] = BARS;
    report.demand(bounces.len() == BOUNCES, || {
        format!("{} bounces", bounces.len())
    });
    for (i, bounce) in bounces.iter().enumerate() {
        let error = (bounce.t[0] - bounce.t[1]).abs();
        report.demand(error <= times, || {
            format!("bounce {}: its time is off by {error:.1e}", i + 1)
        });
        let [ours, exact] = bounce.slopes;
        for ((name, ours), exact) in PARAMETERS.iter().zip(ours).zip(exact) {
            let error = (ours - exact).abs() / (1.0 + exact.abs());
            report.demand(error <= slopes, || {
                format!(
                    "bounce {}: the derivative by {name} is off by {error:.1e}",
                    i + 1
                )
            });
        }
    }
    let error = (fit.found() - TRUTH.restitution).abs();
    report.demand(error <= found, || format!("the fit is off by {error:.1e}"));
}
