//! The systems, and noisy points of their trajectories.

use candle_core::{DType, Device, Tensor};
use candle_diffeq::datasets::System;
use candle_diffeq::options::{Steps, TimeGrid};
use candle_diffeq::tableau::DOPRI5;
use candle_diffeq::{predict, OdeOptions, VectorField};
use rand::rngs::StdRng;
use rand::Rng;
use rand_distr::StandardNormal;

use common::random::{generator, normal};
use common::Result;

/// A system, and how it is sampled.
pub(crate) struct Task {
    pub(crate) name: &'static str,
    pub(crate) system: System,
    /// A start of a trajectory, and of a roll-out.
    start: fn(&mut StdRng) -> Vec<f64>,
    rolled: fn(&mut StdRng) -> Vec<f64>,
    /// Trajectories for training, and as many for testing.
    trajectories: usize,
    /// In each trajectory, on [0, end].
    points: usize,
    end: f64,
    /// Deviation of the noise of states; velocities have none.
    noise: f64,
    /// Points of an update; `None` for all.
    pub(crate) batch: Option<usize>,
    /// Trainings of each model, of whose energy errors the mean is compared.
    pub(crate) trainings: u64,
    /// By how much more the energy of the perceptron's trajectories must be off, squared.
    pub(crate) factor: f64,
}

impl Task {
    /// Numbers of a state.
    pub(crate) fn features(&self) -> usize {
        self.system.features()
    }
}

/// On a circle of a radius in [low, high).
fn circle(rng: &mut StdRng, [low, high]: [f64; 2]) -> Vec<f64> {
    let radius = rng.random_range(low..high);
    let (sin, cos) = rng.random_range(0.0..std::f64::consts::TAU).sin_cos();
    vec![radius * cos, radius * sin]
}

/// Both coordinates of a size in [0.2, 1), of either sign: where the authors begin their roll-outs of the spring, some of
/// them outside the trajectories that were learnt.
fn corners(rng: &mut StdRng) -> Vec<f64> {
    let coordinate = |_| {
        let size = rng.random_range(0.2..1.0);
        if rng.random() {
            size
        } else {
            -size
        }
    };
    (0..2).map(coordinate).collect()
}

/// Two bodies on orbits that are nearly circles about their middle, at a distance of r from it: |q'| = 1/(2 √r).
fn orbits(rng: &mut StdRng) -> Vec<f64> {
    let q = circle(rng, [0.5, 1.5]);
    let r = q[0].hypot(q[1]);
    let off = 1.0 + 0.05 * rng.sample::<f64, _>(StandardNormal);
    let speed = off / (2.0 * r.powf(1.5));
    let p = [-speed * q[1], speed * q[0]];
    vec![q[0], q[1], -q[0], -q[1], p[0], p[1], -p[0], -p[1]]
}

/// H = q² + p², H = p² + 3 (1 − cos q), and H = ½ |p|² − 1/|q₁ − q₂|.
pub(crate) const TASKS: [Task; 3] = [
    Task {
        name: "spring",
        system: System::MassSpring {
            mass: 0.5,
            stiffness: 2.0,
        },
        start: |rng| circle(rng, [0.1, 1.0]),
        rolled: corners,
        trajectories: 25,
        points: 30,
        end: 3.0,
        noise: 0.1,
        batch: None,
        trainings: 3,
        factor: 100.0,
    },
    Task {
        name: "pendulum",
        system: System::Pendulum {
            inertia: 0.5,
            weight: 3.0,
        },
        start: |rng| circle(rng, [1.3, 2.3]),
        rolled: |rng| circle(rng, [1.3, 2.3]),
        trajectories: 25,
        points: 45,
        end: 3.0,
        noise: 0.1,
        batch: None,
        trainings: 1,
        factor: 1.0,
    },
    Task {
        name: "two bodies",
        system: System::TwoBodies,
        start: orbits,
        rolled: orbits,
        trajectories: 400,
        points: 40,
        end: 20.0,
        noise: 0.0,
        batch: Some(400),
        trainings: 1,
        factor: 100.0,
    },
];

/// Roll-outs.
const ROLLED: usize = 25;
/// Length of roll-outs, and distance of their points.
const LONG: f64 = 20.0;
const STEP: f64 = 0.1;

/// Points with their velocities, `(rows, features)` in f32, and exact roll-outs.
pub(crate) struct Data {
    pub(crate) task: &'static Task,
    pub(crate) train: [Tensor; 2],
    pub(crate) test: [Tensor; 2],
    pub(crate) times: TimeGrid,
    /// `(times, trajectories, features)` in f64.
    pub(crate) truth: Tensor,
}

/// The exact trajectories.
fn exact(system: System, starts: &Tensor, times: &TimeGrid) -> Result<Tensor> {
    let options = OdeOptions {
        method: DOPRI5,
        steps: Steps::PerInterval(16),
        ..Default::default()
    };
    Ok(predict(&system, starts, times, &options)?)
}

impl Data {
    pub(crate) fn new(task: &'static Task, seed: u64, device: &Device) -> Result<Self> {
        let mut rng = generator(seed);
        let grid = TimeGrid::linspace(0.0, task.end, task.points)?;
        let train = points(task, &grid, &mut rng)?;
        let test = points(task, &grid, &mut rng)?;
        let starts = starts(task, task.rolled, ROLLED, &mut rng)?;
        let times = TimeGrid::linspace(0.0, LONG, (LONG / STEP) as usize + 1)?;
        let there = |[x, k]: [Tensor; 2]| {
            Ok::<_, candle_core::Error>([x.to_device(device)?, k.to_device(device)?])
        };
        Ok(Self {
            task,
            train: there(train)?,
            test: there(test)?,
            truth: exact(task.system, &starts, &times)?,
            times,
        })
    }
}

/// So many starts, `(rows, features)`.
fn starts(
    task: &Task,
    start: fn(&mut StdRng) -> Vec<f64>,
    rows: usize,
    rng: &mut StdRng,
) -> Result<Tensor> {
    let starts: Vec<f64> = (0..rows).flat_map(|_| start(rng)).collect();
    let shape = (rows, task.features());
    Ok(Tensor::from_vec(starts, shape, &Device::Cpu)?)
}

/// Noisy states of trajectories with their exact velocities.
fn points(task: &Task, times: &TimeGrid, rng: &mut StdRng) -> Result<[Tensor; 2]> {
    let starts = starts(task, task.start, task.trajectories, rng)?;
    let states = exact(task.system, &starts, times)?.flatten(0, 1)?;
    let t = candle_diffeq::Time::new(0.0, DType::F64, &Device::Cpu);
    let velocities = task.system.velocity(&t, &states)?;
    let noise = (normal(rng, states.shape(), DType::F64, &Device::Cpu)? * task.noise)?;
    let single = |x: Tensor| x.to_dtype(DType::F32);
    Ok([single((states + noise)?)?, single(velocities)?])
}
