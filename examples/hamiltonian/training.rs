//! One model, trained on velocities and rolled out.

use std::time::Instant;

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use candle_diffeq::nn::energy::{Energy, Hamiltonian};
use candle_diffeq::nn::{Activation, EnergyMlp, Mlp};
use candle_diffeq::options::Output;
use candle_diffeq::tableau::{EULER, RK4};
use candle_diffeq::{NeuralOde, OdeOptions};
use candle_nn::VarMap;
use indicatif::ProgressBar;
use rand::rngs::StdRng;
use rand::Rng;

use crate::system::{Data, Task};
use common::dtype::Dtype;
use common::fit::Fit;
use common::random::generator;
use common::{initial, Result};

/// Units of a hidden layer, of which there are two.
const WIDTH: usize = 200;

/// What is learnt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// H, whose gradient makes the velocity.
    Hamiltonian,
    /// The velocity itself.
    Perceptron,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Hamiltonian => "HNN",
            Self::Perceptron => "MLP",
        }
    }

    fn model(
        self,
        features: usize,
        vars: &VarMap,
        device: &Device,
    ) -> candle_diffeq::Result<NeuralOde> {
        match self {
            Self::Hamiltonian => NeuralOde::from_field(vars, "f", DType::F32, device, move |vb| {
                let widths = [features, WIDTH, WIDTH, 1];
                let energy = EnergyMlp::new(&widths, Activation::Tanh, Energy::Output, vb)?;
                Ok(Hamiltonian::new(energy))
            }),
            Self::Perceptron => NeuralOde::new(vars, "f", device, move |vb| {
                Mlp::new(&[features, WIDTH, WIDTH, features], Activation::Tanh, vb)
            }),
        }
    }
}

/// What a run came to.
pub(crate) struct Outcome {
    pub(crate) task: &'static Task,
    pub(crate) seed: u64,
    pub(crate) kind: Kind,
    pub(crate) dtype: Dtype,
    /// Mean squares of the velocity's errors, noise included.
    pub(crate) train: f64,
    pub(crate) test: f64,
    /// Mean squares over roll-outs of the errors of the true energy and of the state.
    pub(crate) energy: f64,
    pub(crate) state: f64,
    /// The roll-outs, `(times, trajectories, features)` in f64, and the exact ones.
    pub(crate) rolled: Tensor,
    pub(crate) truth: Tensor,
    pub(crate) times: Vec<f64>,
    pub(crate) vars: VarMap,
    pub(crate) seconds: f64,
}

/// The velocity of a model at x, in the precision of its solves: one step of Euler's method of length one is x + f(x).
fn velocity(ode: &NeuralOde, x: &Tensor) -> candle_diffeq::Result<Tensor> {
    Ok((ode.solve(x, &[0.0, 1.0])? - x)?)
}

pub(crate) fn train(
    data: &Data,
    kind: Kind,
    (dtype, fit): (Dtype, &Fit),
    seed: u64,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let clock = Instant::now();
    let device = data.train[0].device().clone();
    let vars = VarMap::new();
    let options = OdeOptions {
        precision: Some(dtype.precision()),
        ..Default::default()
    };
    let features = data.task.features();
    let ode = kind.model(features, &vars, &device)?.options(OdeOptions {
        method: EULER,
        output: Output::Final,
        ..options.clone()
    });
    let mut rng = generator(seed);
    initial::orthogonal(&vars, &mut rng)?;
    let error = |[x, k]: &[Tensor; 2]| -> Result<Tensor> {
        Ok((velocity(&ode, x)? - k)?.sqr()?.mean_all()?)
    };
    let of_batch = |rng: &mut StdRng| match data.task.batch {
        None => error(&data.train),
        Some(rows) => {
            let all = data.train[0].dim(0)? as u32;
            let numbers: Vec<u32> = (0..rows).map(|_| rng.random_range(0..all)).collect();
            let numbers = Tensor::new(numbers, &device)?;
            let [x, k] = &data.train;
            error(&[x.index_select(&numbers, 0)?, k.index_select(&numbers, 0)?])
        }
    };
    fit.run(&vars, bar, |_| of_batch(&mut rng))?;
    let of_set = |set| -> Result<f64> { Ok(f64::from(error(set)?.to_scalar::<f32>()?)) };
    let (train, test) = (of_set(&data.train)?, of_set(&data.test)?);
    let ode = ode.options(OdeOptions {
        method: RK4,
        ..options
    });
    let starts = data
        .truth
        .get(0)?
        .to_dtype(DType::F32)?
        .to_device(&device)?;
    let rolled = ode.predict(&starts, &data.times)?;
    let rolled = rolled.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let square = |x: Tensor| -> CandleResult<f64> { x.sqr()?.mean_all()?.to_scalar() };
    let energy = |x: &Tensor| -> Result<Tensor> {
        Ok(data
            .task
            .system
            .energy(x)?
            .ok_or("a system without energy")?)
    };
    Ok(Outcome {
        task: data.task,
        seed,
        kind,
        dtype,
        train,
        test,
        energy: square((energy(&rolled)? - energy(&data.truth)?)?)?,
        state: square((&rolled - &data.truth)?)?,
        rolled,
        truth: data.truth.clone(),
        times: data.times.points().to_vec(),
        vars,
        seconds: clock.elapsed().as_secs_f64(),
    })
}
