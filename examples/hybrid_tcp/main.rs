//! A connection of the internet's transport protocol as a stochastic hybrid system: modes, flows, and jumps at random times.
//!
//! `cargo run --release --example hybrid_tcp` (seconds).  torchdyn's tutorial m2c (J. Hespanha, "Stochastic hybrid systems:
//! application to communication networks", 2004): off, slow start, congestion avoidance.  A jump of kind e occurs when its
//! integrated intensity λ_e meets a number drawn from the exponential distribution.  Prints the jumps, writes a picture and
//! the figures as JSON beside it.  Exits with 1 when times of jumps differ from their closed forms.

use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use candle_diffeq::events::{Direction, Event, Hybrid, HybridSolution};
use candle_diffeq::options::{Adaptive, Steps};
use candle_diffeq::tableau::DOPRI5;
use candle_diffeq::{OdeOptions, Time};
use clap::Parser;
use rand::rngs::StdRng;
use rand::Rng;
use rand_distr::Exp1;
use serde_json::json;

use common::chart::{colour, picture, Curve, Panel};
use common::dtype::Dtype;
use common::flags::Flags;
use common::random::generator;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{values, Result};

/// Growth of the window in slow start, and its inverse round trips.
const GROWTH: f64 = 0.693;
/// Places of a state (window, packets sent, mode, λ₁ … λ₅, thresholds₁ … ₅).
const WINDOW: usize = 0;
const SENT: usize = 1;
const MODE: usize = 2;
const INTENSITY: usize = 3;
const THRESHOLD: usize = 8;
const SIZE: usize = 13;
/// The mode in which each event occurs.
const MODES: [f64; 5] = [0.0, 1.0, 1.0, 2.0, 2.0];
const NAMES: [&str; 5] = ["start", "end", "drop", "drop", "end"];
/// By how much a time may differ from its closed form.
const CLOSE: f64 = 1e-8;

/// Simulates a connection.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// The most jumps.
    #[arg(long, default_value_t = 1000)]
    jumps: usize,
}

/// w' and s' by mode; λ' of the events.
fn flow(_: &Time, y: &Tensor) -> CandleResult<Tensor> {
    let at = |i: usize| y.narrow(0, i, 1);
    let (w, mode) = (at(WINDOW)?, at(MODE)?);
    let is = |m: f64| mode.eq(m)?.to_dtype(y.dtype());
    let (slow, avoiding) = (is(1.0)?, is(2.0)?);
    let window = (((&w * (GROWTH / 2.0))? * &slow)? + (&avoiding * 0.5)?)?;
    let sent = (&w * (&slow + &avoiding)?)?;
    let still = at(MODE)?.zeros_like()?;
    let ends = (&w / 20.0)?;
    let drops = (&w * 0.05)?;
    let wake = (still.ones_like()? / 3.0)?;
    let zeros = Tensor::zeros(SIZE - THRESHOLD, y.dtype(), y.device())?;
    Tensor::cat(
        &[
            &window, &sent, &still, &wake, &ends, &drops, &drops, &ends, &zeros,
        ],
        0,
    )
}

/// λ_e − s_e in its mode, and below zero elsewhere.
fn event(e: usize) -> Event {
    Event::new(move |_: &Time, y: &Tensor| {
        let apart = (y.narrow(0, INTENSITY + e, 1)? - y.narrow(0, THRESHOLD + e, 1)?)?;
        let own = y.narrow(0, MODE, 1)?.eq(MODES[e])?.to_dtype(y.dtype())?;
        // −1 in other modes.
        ((apart * &own)? + (own - 1.0)?)?.squeeze(0)
    })
    .direction(Direction::Rising)
}

/// The state after a jump; what is drawn comes from the generator.
fn jump(e: usize, y: &Tensor, rng: &mut StdRng) -> CandleResult<Tensor> {
    let dtype = y.dtype();
    let w = y.narrow(0, WINDOW, 1)?;
    let constant = |x: f64| Tensor::full(x, 1, y.device())?.to_dtype(dtype);
    let (w, s, mode) = match e {
        0 => (constant(GROWTH)?, constant(0.0)?, constant(1.0)?),
        1 | 4 => (constant(0.0)?, constant(0.0)?, constant(0.0)?),
        _ => ((w * 0.5)?, y.narrow(0, SENT, 1)?, constant(2.0)?),
    };
    let mut rest = vec![0.0; THRESHOLD - INTENSITY];
    rest.extend(draws(rng));
    let rest = Tensor::from_vec(rest, SIZE - INTENSITY, y.device())?.to_dtype(dtype)?;
    Tensor::cat(&[w, s, mode, rest], 0)
}

fn draws(rng: &mut StdRng) -> Vec<f64> {
    (0..SIZE - THRESHOLD).map(|_| rng.sample(Exp1)).collect()
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("hybrid_tcp", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let end = args.flags.size().pick(20.0, 100.0, 100.0);
    args.flags.precisions_among(&[Dtype::F64], &[Dtype::F64])?;
    let mut rng = generator(args.flags.seed);
    let mut start = vec![0.0; THRESHOLD];
    start.extend(draws(&mut rng));
    let y0 = Tensor::from_vec(start, SIZE, device)?;
    let rng = Arc::new(Mutex::new(rng));
    let draw = move |e: usize, _: &Tensor, y: &Tensor| {
        let mut rng = rng
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        jump(e, y, &mut rng)
    };
    let system = Hybrid::new(flow, (0..5).map(event).collect(), draw).max_events(args.jumps);
    let times: Vec<f64> = (0..=1000).map(|i| end * f64::from(i) / 1000.0).collect();
    let options = OdeOptions {
        method: DOPRI5,
        steps: Steps::Adaptive(Adaptive::new(1e-10, 1e-10)),
        ..Default::default()
    };
    let solution = system.solve(&y0, &times, &options)?;
    let worst = compare(&solution, &values(&y0)?)?;
    println!(
        "{} jumps until t = {end}; largest error of a time between jumps {}",
        solution.jumps.len(),
        sci(worst)
    );
    report.figure("jumps", solution.jumps.len())?;
    report.figure("largest_error_of_a_time", worst)?;
    report.demand(worst <= CLOSE, || {
        format!("a time between jumps is {worst:.1e} from its closed form")
    });
    tell(&solution, report)?;
    render(&solution, &times, report)
}

/// The largest error of the times between jumps, each from its closed form.
fn compare(solution: &HybridSolution<Tensor>, y0: &[f64]) -> Result<f64> {
    let (mut before, mut t0, mut worst) = (y0.to_vec(), 0.0, 0.0f64);
    for jump in &solution.jumps {
        let t: f64 = jump.before.t.to_dtype(DType::F64)?.to_scalar()?;
        let (w, threshold) = (before[WINDOW], before[THRESHOLD + jump.before.event]);
        // ∫ w dt is 20 times the threshold of an event with the intensity w/20.
        let exact = match before[MODE] as usize {
            0 => 3.0 * threshold,
            // w (e^{at} − 1)/a with a = GROWTH/2.
            1 => (1.0 + 20.0 * threshold * (GROWTH / 2.0) / w).ln() / (GROWTH / 2.0),
            // w t + t²/4.
            _ => 2.0 * ((w * w + 20.0 * threshold).sqrt() - w),
        };
        worst = worst.max((t - t0 - exact).abs());
        before = values(&jump.after)?;
        t0 = t;
    }
    Ok(worst)
}

fn tell(solution: &HybridSolution<Tensor>, report: &mut Report) -> Result<()> {
    let mut table = Table::new(["jump", "t", "window before", "after", "packets"]);
    let mut all = vec![];
    for jump in &solution.jumps {
        let t: f64 = jump.before.t.to_dtype(DType::F64)?.to_scalar()?;
        let (before, after) = (values(&jump.before.y)?, values(&jump.after)?);
        let name = NAMES[jump.before.event];
        if all.len() < 12 {
            table.row([
                name.to_owned(),
                format!("{t:.4}"),
                format!("{:.3}", before[WINDOW]),
                format!("{:.3}", after[WINDOW]),
                format!("{:.1}", before[SENT]),
            ]);
        }
        all.push(
            json!({ "t": t, "event": name, "window": before[WINDOW], "packets": before[SENT] }),
        );
    }
    print!("{table}");
    report.figure("all", all)
}

fn render(solution: &HybridSolution<Tensor>, times: &[f64], report: &mut Report) -> Result<()> {
    let all = values(&solution.states)?;
    let column = |i: usize| -> Vec<(f64, f64)> {
        let at = all.iter().skip(i).step_by(SIZE);
        times.iter().copied().zip(at.copied()).collect()
    };
    picture(&report.picture(""), (1200, 760), |area| {
        let parts = area.split_evenly((2, 2));
        let one = |title: &str, i: usize| Panel {
            curves: vec![Curve::new("", colour(0), column(i))],
            ..Panel::new(title, "t", "")
        };
        one("window of unacknowledged packets", WINDOW).draw(&parts[0])?;
        one("packets sent", SENT).draw(&parts[1])?;
        one("mode: off, slow start, avoidance", MODE).draw(&parts[2])?;
        let curve = |(e, name): (usize, &str)| Curve::new(name, colour(e), column(INTENSITY + e));
        Panel {
            curves: [(0, "λ₁"), (1, "λ₂ … λ₅")].map(curve).into(),
            ..Panel::new("integrated intensities since the last jump", "t", "λ")
        }
        .draw(&parts[3])
    })
}
