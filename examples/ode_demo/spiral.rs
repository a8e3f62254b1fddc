//! The system that is learnt: y' = y³A, a spiral that turns more slowly as it shrinks.

use candle_core::{DType, Device, Result, Tensor};
use candle_diffeq::fields::constant;
use candle_diffeq::options::{Steps, TimeGrid};
use candle_diffeq::tableau::DOPRI5;
use candle_diffeq::{odeint, OdeOptions, Time};

/// A spiral: y' = y³A, y³ by component, y a row; its start, and the times that are seen.
pub(crate) struct Spiral {
    a: [[f64; 2]; 2],
    y0: [f64; 2],
    end: f64,
    points: usize,
    /// Between two points, to about 1e-12.
    steps: usize,
}

impl Spiral {
    /// torchdiffeq's.
    pub(crate) const SMALL: Self = Self {
        a: [[-0.1, 2.0], [-2.0, -0.1]],
        y0: [2.0, 0.0],
        end: 25.0,
        points: 1000,
        steps: 8,
    };
    /// rampde's.
    pub(crate) const PUBLISHED: Self = Self {
        a: [[-0.1, 6.0], [-2.0, -0.1]],
        y0: [2.0, 0.0],
        end: 20.0,
        points: 20_000,
        steps: 2,
    };

    /// The field: y (n, 2) to y' (n, 2).
    pub(crate) fn velocity(&self, y: &Tensor) -> Result<Tensor> {
        let a = Tensor::new(&self.a, y.device())?.to_dtype(y.dtype())?;
        (y.sqr()? * y)?.matmul(&a)
    }
}

/// The trajectory at equidistant times.
pub(crate) struct Trajectory {
    pub(crate) spiral: &'static Spiral,
    pub(crate) times: TimeGrid,
    /// (points, 2), f64, on the CPU.
    pub(crate) states: Tensor,
}

impl Trajectory {
    /// Solved in f64.
    pub(crate) fn new(spiral: &'static Spiral) -> candle_diffeq::Result<Self> {
        let times = TimeGrid::linspace(0.0, spiral.end, spiral.points)?;
        let options = OdeOptions {
            method: DOPRI5,
            steps: Steps::PerInterval(spiral.steps),
            ..Default::default()
        };
        let y0 = Tensor::new(&[spiral.y0], &Device::Cpu)?;
        // No gradients are wanted of the data.
        let field = constant(|_: &Time, y: &Tensor| spiral.velocity(y));
        let states = odeint(field, &y0, &times, &options)?;
        Ok(Self {
            spiral,
            times,
            states: states.squeeze(1)?,
        })
    }

    /// Where every trajectory starts, (1, 2).
    pub(crate) fn start(&self, dtype: DType) -> Result<Tensor> {
        self.states.narrow(0, 0, 1)?.to_dtype(dtype)
    }

    /// Distance of neighbouring times.
    pub(crate) fn spacing(&self) -> f64 {
        self.spiral.end / (self.spiral.points - 1) as f64
    }

    /// Windows of `length` states that begin at the given points: (length, windows, 2).
    pub(crate) fn windows(&self, starts: &[u32], length: usize, dtype: DType) -> Result<Tensor> {
        let starts = Tensor::new(starts, self.states.device())?;
        let at = |i| {
            let points = (&starts + i as f64)?;
            self.states.index_select(&points, 0)
        };
        let states = (0..length).map(at).collect::<Result<Vec<_>>>()?;
        Tensor::stack(&states, 0)?.to_dtype(dtype)
    }
}
