//! The ball: as a hybrid system, and in closed form.

use candle_core::{Device, Result, Tensor, Var};
use candle_diffeq::events::{Direction, Event, Hybrid, HybridSolution};
use candle_diffeq::options::{Adaptive, Steps};
use candle_diffeq::tableau::DOPRI5;
use candle_diffeq::{OdeOptions, Time};

/// What derivatives are with respect to, in this order.
pub(crate) const PARAMETERS: [&str; 4] = ["gravity", "restitution", "height", "speed"];

/// p' = v, v' = −g; at p = 0 falling, v becomes −e v.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ball {
    pub(crate) gravity: f64,
    pub(crate) restitution: f64,
    pub(crate) height: f64,
    pub(crate) speed: f64,
}

impl Ball {
    /// The speed at which it first meets the ground.
    fn impact(&self) -> f64 {
        (self.speed * self.speed + 2.0 * self.gravity * self.height).sqrt()
    }

    /// 1 + 2 (e + e² + … + eⁿ⁻¹): the time until the n-th bounce in units of a fall at that speed, and its derivative.
    fn falls(&self, n: i32) -> (f64, f64) {
        let e = self.restitution;
        let sum: f64 = (1..n).map(|k| e.powi(k)).sum();
        let slope: f64 = (1..n).map(|k| f64::from(k) * e.powi(k - 1)).sum();
        (1.0 + 2.0 * sum, 2.0 * slope)
    }

    /// When it bounces for the n-th time, from one.
    pub(crate) fn bounce(&self, n: usize) -> f64 {
        let (falls, _) = self.falls(n as i32);
        (self.speed + self.impact() * falls) / self.gravity
    }

    /// The derivatives of that time.
    pub(crate) fn slopes(&self, n: usize) -> [f64; 4] {
        let (g, impact) = (self.gravity, self.impact());
        let (falls, slope) = self.falls(n as i32);
        [
            (self.height / impact * falls - self.bounce(n)) / g,
            impact * slope / g,
            falls / impact,
            (1.0 + self.speed / impact * falls) / g,
        ]
    }

    /// When it is highest between the n-th bounce and the next.
    pub(crate) fn top(&self, n: usize) -> f64 {
        (self.bounce(n) + self.bounce(n + 1)) / 2.0
    }
}

/// The same as variables.
pub(crate) struct Variables {
    pub(crate) gravity: Var,
    pub(crate) restitution: Var,
    /// Height and speed.
    pub(crate) start: Var,
}

impl Variables {
    pub(crate) fn new(ball: &Ball, device: &Device) -> Result<Self> {
        let one = |x: f64| Var::new(&[x], device);
        Ok(Self {
            gravity: one(ball.gravity)?,
            restitution: one(ball.restitution)?,
            start: Var::new(&[ball.height, ball.speed], device)?,
        })
    }

    /// The ball at these times, and its bounces until the last of them.
    pub(crate) fn fly(&self, times: &[f64]) -> candle_diffeq::Result<HybridSolution<Tensor>> {
        let gravity = self.gravity.as_tensor().clone();
        let restitution = self.restitution.as_tensor().clone();
        let fall =
            move |_: &Time, y: &Tensor| Tensor::cat(&[&y.narrow(0, 1, 1)?, &gravity.neg()?], 0);
        let ground = Event::new(|_: &Time, y: &Tensor| y.get(0)).direction(Direction::Falling);
        let bounce = move |_: usize, _: &Tensor, y: &Tensor| {
            let speed = y.narrow(0, 1, 1)?.broadcast_mul(&restitution)?.neg()?;
            // Exactly on the ground.
            Tensor::cat(&[&y.narrow(0, 0, 1)?.zeros_like()?, &speed], 0)
        };
        let options = OdeOptions {
            method: DOPRI5,
            steps: Steps::Adaptive(Adaptive::new(1e-10, 1e-12)),
            ..Default::default()
        };
        Hybrid::new(fall, vec![ground], bounce).solve(self.start.as_tensor(), times, &options)
    }
}
