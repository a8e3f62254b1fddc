//! The system that is learnt: y₁' = y₂, y₂' = μ(1 − y₁²) y₂ − y₁.

use candle_core::{DType, Device, Tensor, D};
use candle_diffeq::fields::constant;
use candle_diffeq::options::{Steps, TimeGrid};
use candle_diffeq::tableau::DOPRI5;
use candle_diffeq::{odeint, OdeOptions, Time};

use common::Result;

const MU: f64 = 1.0;
pub(crate) const START: [f64; 2] = [2.0, 0.0];
const END: f64 = 20.0;
const POINTS: usize = 1000;

/// y' for y `(…, 2)`.
pub(crate) fn velocity(y: &Tensor) -> candle_core::Result<Tensor> {
    let (y1, y2) = (y.narrow(D::Minus1, 0, 1)?, y.narrow(D::Minus1, 1, 1)?);
    let damping = (1.0 - y1.sqr()?)?;
    let force = (((damping * &y2)? * MU)? - y1)?;
    Tensor::cat(&[y2, force], D::Minus1)
}

/// States at the times of a grid from starts `(n, 2)`: `(times, n, 2)`, to about 1e-12.
pub(crate) fn solve(starts: &Tensor, times: &TimeGrid) -> Result<Tensor> {
    let options = OdeOptions {
        method: DOPRI5,
        steps: Steps::PerInterval(8),
        ..Default::default()
    };
    // No gradients are wanted of the data.
    let field = constant(|_: &Time, y: &Tensor| velocity(y));
    Ok(odeint(field, starts, times, &options)?)
}

/// The trajectory that is learnt, at equidistant times.
pub(crate) struct Trajectory {
    pub(crate) times: TimeGrid,
    /// `(points, 2)`, f64.
    pub(crate) states: Tensor,
}

impl Trajectory {
    pub(crate) fn new() -> Result<Self> {
        let times = TimeGrid::linspace(0.0, END, POINTS)?;
        let states = solve(&Tensor::new(&[START], &Device::Cpu)?, &times)?;
        Ok(Self {
            times,
            states: states.squeeze(1)?,
        })
    }

    /// Distance of neighbouring times.
    pub(crate) fn spacing(&self) -> f64 {
        END / (POINTS - 1) as f64
    }

    /// Windows of `length` states that begin at the given points: `(length, windows, 2)`, f32.
    pub(crate) fn windows(&self, starts: &[u32], length: usize) -> candle_core::Result<Tensor> {
        let starts = Tensor::new(starts, self.states.device())?;
        let at = |i: usize| {
            let points = (&starts + i as f64)?;
            self.states.index_select(&points, 0)
        };
        let states = (0..length)
            .map(at)
            .collect::<candle_core::Result<Vec<_>>>()?;
        Tensor::stack(&states, 0)?.to_dtype(DType::F32)
    }
}
