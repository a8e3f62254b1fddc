//! The system that is learnt: y' = y³A, a spiral that turns more slowly as it shrinks.

use candle_core::{DType, Device, Result, Tensor};
use candle_diffeq::{constant, odeint, OdeOptions, Steps, Time, TimeGrid, DOPRI5};

/// y' = y³A, y³ by component, y a row.
const A: [[f64; 2]; 2] = [[-0.1, 2.0], [-2.0, -0.1]];
const Y0: [f64; 2] = [2.0, 0.0];
const END: f64 = 25.0;
const POINTS: usize = 1000;

/// The field: y (n, 2) to y' (n, 2).
pub(crate) fn velocity(y: &Tensor) -> Result<Tensor> {
    let a = Tensor::new(&A, y.device())?.to_dtype(y.dtype())?;
    (y.sqr()? * y)?.matmul(&a)
}

/// The trajectory at equidistant times.
pub(crate) struct Trajectory {
    pub(crate) times: TimeGrid,
    /// (points, 2), f64.
    pub(crate) states: Tensor,
}

impl Trajectory {
    /// Solved in f64, to about 1e-12.
    pub(crate) fn new() -> candle_diffeq::Result<Self> {
        let times = TimeGrid::linspace(0.0, END, POINTS)?;
        let options = OdeOptions {
            method: DOPRI5,
            steps: Steps::PerInterval(8),
            ..Default::default()
        };
        let y0 = Tensor::new(&[Y0], &Device::Cpu)?;
        // No gradients are wanted of the data.
        let field = constant(|_: &Time, y: &Tensor| velocity(y));
        let states = odeint(field, &y0, &times, &options)?;
        Ok(Self {
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
        END / (POINTS - 1) as f64
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
