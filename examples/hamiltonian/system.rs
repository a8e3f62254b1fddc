//! The systems, and noisy points of their trajectories.

use candle_core::{DType, Device, Tensor};
use candle_diffeq::datasets::System;
use candle_diffeq::options::{Steps, TimeGrid};
use candle_diffeq::tableau::DOPRI5;
use candle_diffeq::{predict, OdeOptions, VectorField};
use rand::rngs::StdRng;
use rand::Rng;

use crate::common::random::{generator, normal};
use crate::common::Result;

/// A system, and how it is sampled.
pub(crate) struct Task {
    pub(crate) name: &'static str,
    pub(crate) system: System,
    /// Of starts, uniform.
    radii: [f64; 2],
    /// In each trajectory, on [0, 3].
    points: usize,
}

impl Task {
    pub(crate) const SPRING: &'static str = "spring";
}

/// H = q² + p², and H = p² + 3 (1 − cos q).
pub(crate) const TASKS: [Task; 2] = [
    Task {
        name: Task::SPRING,
        system: System::MassSpring {
            mass: 0.5,
            stiffness: 2.0,
        },
        radii: [0.1, 1.0],
        points: 30,
    },
    Task {
        name: "pendulum",
        system: System::Pendulum {
            inertia: 0.5,
            weight: 3.0,
        },
        radii: [1.3, 2.3],
        points: 45,
    },
];

/// Trajectories for training, and as many for testing.
const TRAJECTORIES: usize = 25;
const END: f64 = 3.0;
/// Deviation of the noise of states; velocities have none.
const NOISE: f64 = 0.1;
/// Length of roll-outs, and distance of their points.
const LONG: f64 = 20.0;
const STEP: f64 = 0.1;

/// Points with their velocities, `(rows, 2)` in f32, and exact roll-outs.
pub(crate) struct Data {
    pub(crate) task: &'static Task,
    pub(crate) train: [Tensor; 2],
    pub(crate) test: [Tensor; 2],
    pub(crate) times: TimeGrid,
    /// `(times, trajectories, 2)` in f64, from the starts of the test set.
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
        let grid = TimeGrid::linspace(0.0, END, task.points)?;
        let (train, _) = points(task, &grid, &mut rng)?;
        let (test, starts) = points(task, &grid, &mut rng)?;
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

/// Noisy states of trajectories with their exact velocities, and the starts.
fn points(task: &Task, times: &TimeGrid, rng: &mut StdRng) -> Result<([Tensor; 2], Tensor)> {
    let mut starts = vec![];
    for _ in 0..TRAJECTORIES {
        let radius = rng.random_range(task.radii[0]..task.radii[1]);
        let (sin, cos) = rng.random_range(0.0..std::f64::consts::TAU).sin_cos();
        starts.extend([radius * cos, radius * sin]);
    }
    let starts = Tensor::from_vec(starts, (TRAJECTORIES, 2), &Device::Cpu)?;
    let states = exact(task.system, &starts, times)?.flatten(0, 1)?;
    let t = candle_diffeq::Time::new(0.0, DType::F64, &Device::Cpu);
    let velocities = task.system.velocity(&t, &states)?;
    let noise = (normal(rng, states.shape(), DType::F64, &Device::Cpu)? * NOISE)?;
    let single = |x: Tensor| x.to_dtype(DType::F32);
    Ok(([single((states + noise)?)?, single(velocities)?], starts))
}
