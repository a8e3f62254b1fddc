//! Symplectic ODE-Net (Y. D. Zhong, B. Dey, A. Chakraborty, ICLR 2020) on an acrobot: a mass matrix, a potential and a
//! matrix of control, learnt from short windows of trajectories.
//!
//! The state is (cos q, sin q, q', u).  With p = M q', H = ½ pᵀ M⁻¹ p + V and M⁻¹ = L Lᵀ + 0.1,
//!
//! p' = −∂H/∂q + G u,  q'' = M⁻¹ p' + (M⁻¹)' p.

use std::f64::consts::PI;
use std::time::Instant;

use candle_core::{DType, Device, Module, Tensor, D};
use candle_diffeq::datasets::System;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, Perceptron};
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::{predict, NeuralOde, OdeOptions, Time};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use rand::rngs::StdRng;
use rand::Rng;

use crate::way::{Cost, Pair, Way};
use common::random::{generator, uniform};
use common::{initial, median, Result};

const TOLERANCE: Pair = Pair(1e-4, 1e-4);
const BATCH: usize = 256;
/// Points of a trajectory, points of a window, and the time between two.
const POINTS: usize = 32;
const WINDOW: usize = 8;
const INTERVAL: f64 = 0.05;
/// Constant torques of the trajectories.
const TORQUES: [[f64; 2]; 9] = [
    [0.0, 0.0],
    [0.0, 1.0],
    [0.0, -1.0],
    [0.0, 2.0],
    [0.0, -2.0],
    [1.0, 0.0],
    [-1.0, 0.0],
    [2.0, 0.0],
    [-2.0, 0.0],
];
/// The fastest angular velocities of a trajectory that is used.
const FASTEST: [f64; 2] = [4.0 * PI, 9.0 * PI];

/// Windows, `(WINDOW, windows, 8)`.
pub(crate) struct Windows {
    training: Tensor,
    test: Tensor,
}

impl Windows {
    /// Of so many trajectories for each torque, seven tenths to train on.
    pub(crate) fn new(trajectories: usize, device: &Device) -> Result<Self> {
        let mut rng = generator(456_789);
        let (mut training, mut test) = (vec![], vec![]);
        for torques in TORQUES {
            let all = draw(torques, trajectories, &mut rng, device)?;
            let first = trajectories * 7 / 10;
            training.push(windows(&all.narrow(1, 0, first)?)?);
            test.push(windows(&all.narrow(1, first, trajectories - first)?)?);
        }
        Ok(Self {
            training: Tensor::cat(&training, 1)?.to_dtype(DType::F32)?,
            test: Tensor::cat(&test, 1)?.to_dtype(DType::F32)?,
        })
    }
}

/// Trajectories under constant torques that do not become too fast, `(POINTS, trajectories, 8)`.
fn draw(torques: [f64; 2], count: usize, rng: &mut StdRng, device: &Device) -> Result<Tensor> {
    let rows = 4 * count;
    let start = ((uniform(rng, (rows, 4), DType::F64, device)? * 2.0)? - 1.0)?;
    let torques = Tensor::new(&[torques], device)?.broadcast_as((rows, 2))?;
    let start = Tensor::cat(&[(start * PI)?, torques.contiguous()?], 1)?;
    let times: Vec<f64> = (0..POINTS).map(|i| INTERVAL * i as f64).collect();
    let options = OdeOptions {
        steps: Steps::PerInterval(20),
        ..Default::default()
    };
    let xs = predict(&System::Acrobot { gravity: 9.8 }, &start, &times, &options)?;
    let speeds = xs.narrow(2, 2, 2)?.abs()?.max(0)?.to_vec2::<f64>()?;
    let slow = |row: &&Vec<f64>| row.iter().zip(FASTEST).all(|(v, most)| *v < most - 1e-3);
    let chosen = speeds.iter().enumerate().filter(|(_, row)| slow(row));
    let chosen: Vec<u32> = chosen.map(|(i, _)| i as u32).take(count).collect();
    if chosen.len() < count {
        return Err(format!("{} trajectories of {count}", chosen.len()).into());
    }
    let xs = xs.index_select(&Tensor::new(chosen, device)?, 1)?;
    let (angles, rest) = (xs.narrow(2, 0, 2)?, xs.narrow(2, 2, 4)?);
    Ok(Tensor::cat(&[angles.cos()?, angles.sin()?, rest], 2)?)
}

/// All windows of trajectories.
fn windows(all: &Tensor) -> Result<Tensor> {
    let each = (0..=POINTS - WINDOW).map(|i| all.narrow(0, i, WINDOW));
    let each = each.collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::cat(&each, 1)?)
}

/// L, V and G.
struct Model {
    factor: Perceptron,
    potential: Perceptron,
    control: Perceptron,
}

impl Model {
    fn new(width: usize, vb: &VarBuilder<'_>) -> candle_core::Result<Self> {
        let net = |name: &str, widths: &[usize]| {
            Perceptron::new(widths, Activation::Softplus, vb.pp(name))
        };
        Ok(Self {
            factor: net("factor", &[4, width, width, 3])?,
            potential: net("potential", &[4, width, 1])?,
            control: net("control", &[4, width, 4])?,
        })
    }

    fn velocity(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let column = |x: &Tensor, i: usize| x.narrow(D::Minus1, i, 1);
        let (angles, v) = (
            x.narrow(1, 0, 4)?.contiguous()?,
            x.narrow(1, 4, 2)?.contiguous()?,
        );
        let u = x.narrow(1, 6, 2)?.contiguous()?;
        let (cos, sin) = (angles.narrow(1, 0, 2)?, angles.narrow(1, 2, 2)?);
        let turned = Tensor::cat(&[(&sin * &v)?.neg()?, (&cos * &v)?], 1)?;
        // L = (a 0; e b) and its derivative along the motion.
        let (factor, pushed) = self.factor.jvp(&angles, &turned)?;
        let [a, b, e] = [0, 1, 2].map(|i| column(&factor, i));
        let [da, db, de] = [0, 1, 2].map(|i| column(&pushed, i));
        let (a, b, e, da, db, de) = (a?, b?, e?, da?, db?, de?);
        // Both are symmetric: (00, 01, 11).
        let inverse_mass = [
            (a.sqr()? + 0.1)?,
            (&a * &e)?,
            ((e.sqr()? + b.sqr()?)? + 0.1)?,
        ];
        let changing = [
            ((&a * &da)? * 2.0)?,
            ((&da * &e)? + (&a * &de)?)?,
            (((&e * &de)? + (&b * &db)?)? * 2.0)?,
        ];
        let p = solve(&inverse_mass, &v)?;
        let (p0, p1) = (column(&p, 0)?, column(&p, 1)?);
        // ½ |Lᵀ p|² pulled back to L, and on to the angles.
        let (y0, y1) = (((&a * &p0)? + (&e * &p1)?)?, (&b * &p1)?);
        let seed = Tensor::cat(&[(&y0 * &p0)?, (&y1 * &p1)?, (&y0 * &p1)?], 1)?;
        let kinetic = self.factor.pull(&angles, &seed)?.1;
        let one = Tensor::ones((x.dim(0)?, 1), x.dtype(), x.device())?;
        let slope = (kinetic + self.potential.pull(&angles, &one)?.1)?;
        let (of_cos, of_sin) = (slope.narrow(1, 0, 2)?, slope.narrow(1, 2, 2)?);
        let control = self.control.forward(&angles)?.reshape(((), 2, 2))?;
        let driven = control.broadcast_mul(&u.unsqueeze(1)?)?.sum(2)?;
        let force = (((&sin * of_cos)? - (&cos * of_sin)?)? + driven)?;
        let faster = (product(&inverse_mass, &force)? + product(&changing, &p)?)?;
        Tensor::cat(&[turned, faster, u.zeros_like()?], 1)
    }
}

/// A symmetric matrix of two rows times a vector.
fn product([m00, m01, m11]: &[Tensor; 3], x: &Tensor) -> candle_core::Result<Tensor> {
    let (x0, x1) = (x.narrow(1, 0, 1)?, x.narrow(1, 1, 1)?);
    let first = ((m00 * &x0)? + (m01 * &x1)?)?;
    Tensor::cat(&[first, ((m01 * x0)? + (m11 * x1)?)?], 1)
}

/// Its inverse times a vector.
fn solve([m00, m01, m11]: &[Tensor; 3], x: &Tensor) -> candle_core::Result<Tensor> {
    let whole = ((m00 * m11)? - m01.sqr()?)?;
    product(&[m11.clone(), m01.neg()?, m00.clone()], x)?.broadcast_div(&whole)
}

/// What a training came to.
pub(crate) struct Learnt {
    pub(crate) way: Way,
    pub(crate) forward: Vec<f64>,
    pub(crate) backward: Vec<f64>,
    /// Mean squared error of test windows.
    pub(crate) error: f64,
    pub(crate) milliseconds: f64,
}

/// Trains on windows; the same ones for the same seed.
pub(crate) fn train(
    data: &Windows,
    way: Way,
    updates: usize,
    width: usize,
    seed: u64,
    device: &Device,
) -> Result<Learnt> {
    let (vars, recorder) = (VarMap::new(), Recorder::default());
    let ode = NeuralOde::from_field(&vars, "acrobot", DType::F32, device, move |vb| {
        let model = Model::new(width, &vb)?;
        Ok(move |_: &Time, x: &Tensor| model.velocity(x))
    })?
    .options(OdeOptions {
        output: Output::All,
        ..way.options(TOLERANCE, &recorder)
    });
    let mut rng = generator(seed);
    initial::layers(&vars, &mut rng)?;
    let adam = ParamsAdamW {
        lr: 1e-3,
        weight_decay: 0.01,
        ..Default::default()
    };
    let mut optimiser = AdamW::new(vars.all_vars(), adam)?;
    let times: Vec<f64> = (0..WINDOW).map(|i| INTERVAL * i as f64).collect();
    let (mut forward, mut backward, mut milliseconds) = (vec![], vec![], vec![]);
    for _ in 0..updates {
        let most = data.training.dim(1)? as u32;
        let chosen: Vec<u32> = (0..BATCH).map(|_| rng.random_range(0..most)).collect();
        let x = data
            .training
            .index_select(&Tensor::new(chosen, device)?, 1)?;
        recorder.take();
        let clock = Instant::now();
        let loss = (ode.solve(&x.get(0)?, &times)? - &x)?.sqr()?.mean_all()?;
        optimiser.backward_step(&loss)?;
        let took = 1e3 * clock.elapsed().as_secs_f64();
        let cost = Cost::new(way, recorder.take(), took);
        forward.push(cost.forward as f64);
        backward.push(cost.backward as f64);
        milliseconds.push(took);
    }
    let solved = ode.predict(&data.test.get(0)?, &times)?;
    let error = (solved - &data.test)?
        .sqr()?
        .mean_all()?
        .to_scalar::<f32>()?;
    Ok(Learnt {
        way,
        forward,
        backward,
        error: error.into(),
        milliseconds: median(milliseconds),
    })
}
