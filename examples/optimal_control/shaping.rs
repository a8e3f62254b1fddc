//! Energy shaping: a potential and a friction that bring an elastic pendulum to rest.
//!
//! q' = p/m, p' = −k q − m g l sin q − b p/m + u, u = −V'(q) − K(q, p) p.

use candle_core::{DType, Device, Module, Tensor, D};
use candle_diffeq::nn::energy::{Energy, Potential};
use candle_diffeq::nn::{cost_precision, Activation, EnergyMlp, Perceptron, WithIntegral};
use candle_diffeq::options::Steps;
use candle_diffeq::tableau::RK4;
use candle_diffeq::{NeuralOde, OdeOptions, Time};
use candle_nn::{VarBuilder, VarMap};
use rand::Rng;
use serde_json::json;

use common::chart::{colour, Area, Curve, Panel};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::random::generator;
use common::report::Report;
use common::table::{sci, Table};
use common::{initial, progress, values, Result};

const MASS: f64 = 1.0;
const SPRING: f64 = 0.5;
const LENGTH: f64 = 1.0;
const FRICTION: f64 = 0.01;
const GRAVITY: f64 = 9.81;
const END: f64 = 3.0;
const STEPS: usize = 30;
const FIT: Fit = Fit::new(250, 1e-2).falling_to(0.1);
const BATCH: usize = 128;
/// Of the distance from rest, as a variance, and of the integral of |u|.
const VARIANCE: f64 = 0.05;
const WEIGHT: f64 = 0.01;
/// The root mean square distance from rest that is reached.
const REST: f64 = 0.5;

/// u, and what it is made of.
#[derive(Clone)]
struct Controller {
    potential: EnergyMlp,
    friction: Perceptron,
}

impl Controller {
    fn new(vb: VarBuilder<'_>) -> candle_core::Result<Self> {
        let (widths, softplus) = ([1, 32, 32, 1], Activation::Softplus);
        Ok(Self {
            potential: EnergyMlp::new(&widths, softplus, Energy::Output, vb.pp("v"))?,
            friction: Perceptron::new(&[2, 32, 1], softplus, vb.pp("k"))?,
        })
    }

    /// `(rows, 1)` of x = (q, p).
    fn at(&self, t: &Time, x: &Tensor) -> candle_core::Result<Tensor> {
        let (q, p) = (x.narrow(1, 0, 1)?.contiguous()?, x.narrow(1, 1, 1)?);
        let (_, slope) = self.potential.gradient(t, &q)?;
        (slope + (self.friction.forward(x)? * p)?)?.neg()
    }

    fn velocity(&self, t: &Time, x: &Tensor) -> candle_core::Result<Tensor> {
        let (q, p) = (x.narrow(1, 0, 1)?, x.narrow(1, 1, 1)?);
        let own = ((&q * -SPRING)? - (q.sin()? * (MASS * GRAVITY * LENGTH))?)?;
        let own = (own - (&p * (FRICTION / MASS))?)?;
        Tensor::cat(&[(p / MASS)?, (own + self.at(t, x)?)?], 1)
    }
}

/// What training came to.
pub(crate) struct Shaped {
    dtype: Dtype,
    losses: Vec<f64>,
    /// Root mean squares of x at the end, and what ∫ |u| is in the mean.
    rest: f64,
    without: f64,
    effort: f64,
    /// `(times, rows, 2)`, with control and without.
    controlled: Vec<f64>,
    free: Vec<f64>,
}

const SHOWN: usize = 12;

fn train(dtype: Dtype, (fit, seed): (&Fit, u64), device: &Device) -> Result<Shaped> {
    let vars = VarMap::new();
    let ode = NeuralOde::from_field(&vars, "f", DType::F32, device, |vb| {
        let controller = Controller::new(vb)?;
        let cost = controller.clone();
        Ok(WithIntegral::new(
            move |t: &Time, x: &Tensor| controller.velocity(t, x),
            move |t: &Time, x: &Tensor| cost.at(t, x)?.abs(),
        ))
    })?
    .options(OdeOptions {
        method: RK4,
        steps: Steps::Size(END / STEPS as f64),
        leaf_precision: cost_precision(dtype.precision()),
        ..Default::default()
    });
    let mut rng = generator(seed);
    initial::layers(&vars, &mut rng)?;
    // No control at first.
    for name in ["f.v.2.weight", "f.k.1.weight", "f.k.1.bias"] {
        let data = vars.data().lock().map_err(|_| "the variables are locked")?;
        let var = data.get(name).ok_or(format!("no variable {name}"))?;
        var.set(&var.zeros_like()?)?;
    }
    let mut starts = |n: usize| -> Result<(Tensor, Tensor)> {
        let turn = std::f64::consts::TAU;
        let x: Vec<f32> = (0..2 * n)
            .map(|_| rng.random_range(-turn..turn) as f32)
            .collect();
        let none = Tensor::zeros((n, 1), DType::F32, device)?;
        Ok((Tensor::from_vec(x, (n, 2), device)?, none))
    };
    let test = starts(256)?;
    let times: Vec<f64> = (0..=STEPS).map(|i| END * i as f64 / STEPS as f64).collect();
    let size = |x: &Tensor| -> Result<f64> {
        Ok(f64::from(x.sqr()?.sum(D::Minus1)?.mean_all()?.to_scalar::<f32>()?).sqrt())
    };
    let (free, _) = ode.predict(&test, &times)?;
    let without = size(&free.get(STEPS)?)?;
    let bar = progress(dtype.name(), fit.iterations)?;
    let losses = fit.run(&vars, &bar, |_| {
        let (xs, costs) = ode.solve(&starts(BATCH)?, &[0.0, END])?;
        let rest = (xs.get(1)?.sqr()?.sum(1)?.mean_all()? * (0.5 / VARIANCE))?;
        Ok((rest + (costs.get(1)?.mean_all()? * WEIGHT)?)?)
    })?;
    bar.finish_and_clear();
    let (states, costs) = ode.predict(&test, &times)?;
    let shown = |x: &Tensor| values(&x.narrow(1, 0, SHOWN)?);
    Ok(Shaped {
        dtype,
        losses,
        rest: size(&states.get(STEPS)?)?,
        without,
        effort: f64::from(costs.get(STEPS)?.mean_all()?.to_scalar::<f32>()?),
        controlled: shown(&states)?,
        free: shown(&free)?,
    })
}

pub(crate) fn run(flags: &Flags, device: &Device, report: &mut Report) -> Result<Vec<Shaped>> {
    let fit = FIT.iterations(flags.size().pick(3, FIT.iterations, 2000));
    let mut all = vec![];
    for dtype in flags.precisions(&[Dtype::F32, Dtype::Bf16])? {
        all.push(train(dtype, (&fit, flags.seed), device)?);
    }
    let mut table = Table::new([
        "energy shaping",
        "loss, first",
        "last",
        "|x| at t = 3",
        "without u",
        "∫ |u| dt",
    ]);
    for o in &all {
        let name = o.dtype.name();
        table.row([
            name.to_owned(),
            sci(o.losses[0]),
            sci(o.losses[o.losses.len() - 1]),
            format!("{:.3}", o.rest),
            format!("{:.3}", o.without),
            format!("{:.2}", o.effort),
        ]);
        report.demand(o.rest <= REST, || {
            format!("{name}: {:.3} from rest at t = {END}, not {REST}", o.rest)
        });
    }
    println!("{table}");
    let json = |o: &Shaped| {
        json!({
            "precision": o.dtype.name(),
            "distance_from_rest": o.rest,
            "without_control": o.without,
            "effort": o.effort,
        })
    };
    report.figure("energy_shaping", all.iter().map(json).collect::<Vec<_>>())?;
    Ok(all)
}

/// Solutions in the plane, without control and with it.
pub(crate) fn draw(all: &[Shaped], parts: [&Area<'_>; 2]) -> Result<()> {
    let o = &all[0];
    let titles = ["without control", "with the learnt potential and friction"];
    for ((states, title), part) in [&o.free, &o.controlled].into_iter().zip(titles).zip(parts) {
        let curve = |row: usize| {
            let at = |i: usize| {
                let k = (i * SHOWN + row) * 2;
                (states[k], states[k + 1])
            };
            Curve::new("", colour(row), (0..=STEPS).map(at))
        };
        Panel {
            curves: (0..SHOWN).map(curve).collect(),
            ..Panel::new(format!("{title}, to t = {END}"), "q", "p")
        }
        .draw(part)?;
    }
    Ok(())
}
