//! Solvers with a learnt correction of their error.
//!
//! A method of order p makes steps y_{n+1} = y_n + h ψ(t_n, y_n, h) with an error of h^{p+1} in each.  A *hypersolver*
//! ("Hypersolvers", arXiv 2007.09601) adds a network g that has learnt this error,
//!
//! y_{n+1} = y_n + h ψ + h^{p+1} g(t_n, y_n, f(t_n, y_n)),
//!
//! so that steps may be longer.  What g is to learn are the [`residuals`] (y(t_{n+1}) − y(t_n) − h ψ) / h^{p+1} of exact
//! solutions, by plain regression.

use candle_core::{Result, Tensor};

use crate::field::autograd::check_traced;
use crate::field::VectorField;
use crate::tableau::{Tableau, EULER};
use crate::time::{beside, Time, TimeGrid};

/// ψ + h^p g of a field, a method and a network, as a field: Euler's method with it is the hypersolver.
///
/// It reads h from the step that it is evaluated in, so it may be solved by [`EULER`] only, in steps of any lengths.  g is
/// any closure `|t, y, k| …` with k = f(t, y); stage sums are in the dtype in which the field is evaluated.  Gradients with
/// respect to time leave out what h and the times of inner stages contribute.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::{predict, OdeOptions, Time};
/// use candle_diffeq::models::hypersolver::Hypersolver;
/// use candle_diffeq::options::Steps;
/// use candle_diffeq::tableau::EULER;
/// // Of y' = −y the error of a step of Euler's method is h² y/2 at first, which makes it one of order two.
/// let field = |_: &Time, y: &Tensor| y.neg();
/// let hyper = Hypersolver::new(field, EULER, |_: &Time, y: &Tensor, _: &Tensor| y * 0.5);
/// let options = OdeOptions { method: EULER, steps: Steps::PerInterval(10), ..Default::default() };
/// let y = predict(&hyper, &Tensor::new(&[1.0], &Device::Cpu)?, &[0.0, 1.0], &options)?;
/// let error = y.get(1)?.get(0)?.to_scalar::<f64>()? - (-1f64).exp();
/// assert!(error.abs() < 1e-3);                                     // Euler's own is 2e-2
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Hypersolver<F, G> {
    field: F,
    method: Tableau,
    correction: G,
}

impl<F, G> Hypersolver<F, G>
where
    F: VectorField,
    G: Fn(&Time, &Tensor, &Tensor) -> Result<Tensor>,
{
    /// The hypersolver of a field f by an explicit method and the correction g, which returns a tensor of the shape of y.
    pub fn new(field: F, method: Tableau, correction: G) -> Self {
        Self {
            field,
            method,
            correction,
        }
    }
}

impl<F, G> VectorField<Tensor> for Hypersolver<F, G>
where
    F: VectorField,
    G: Fn(&Time, &Tensor, &Tensor) -> Result<Tensor>,
{
    fn velocity(&self, t: &Time, y: &Tensor) -> Result<Tensor> {
        let Some([start, end]) = t.interval() else {
            candle_core::bail!(
                "a Hypersolver is evaluated inside of a step, from which it has its length"
            )
        };
        // A step that begins at a jump is evaluated beside it.
        let beside = (beside(start, end > start) - start).abs();
        if (t.value() - start).abs() > 1e-9 * (end - start).abs() + beside {
            candle_core::bail!(
                "a Hypersolver is evaluated at {} inside the step from {start} to {end}: solve it by {}, whose only stage \
                 is at the start",
                t.value(),
                EULER.name()
            )
        }
        let h = end - start;
        let (sum, first) = increment(&self.field, &self.method, (t, y), h)?;
        check_traced("a Hypersolver", &self.field, y, &first)?;
        let order = self.method.order() as i32;
        sum + ((self.correction)(t, y, &first)? * h.powi(order))?
    }

    fn jumps(&self) -> Vec<f64> {
        self.field.jumps()
    }
}

/// ψ = Σ b_i k_i, and k_1.
fn increment<F: VectorField>(
    field: &F,
    method: &Tableau,
    (t, y): (&Time, &Tensor),
    h: f64,
) -> Result<(Tensor, Tensor)> {
    let weighted = |start: Option<Tensor>, weights: &[f64], ks: &[Tensor], scale: f64| {
        let mut sum = start;
        for (w, k) in weights.iter().zip(ks).filter(|(w, _)| **w != 0.0) {
            let term = (k * (w * scale))?;
            sum = Some(match sum {
                Some(sum) => (sum + term)?,
                None => term,
            });
        }
        sum.map_or_else(|| y.zeros_like(), Ok)
    };
    let (dtype, _) = t.kind();
    let mut ks: Vec<Tensor> = vec![field.velocity(t, y)?];
    for i in 1..method.stages() {
        let at = weighted(Some(y.clone()), method.a(i), &ks, h)?;
        let time = Time::new(t.value() + method.c()[i] * h, dtype, y.device());
        let time = match (t.step(), t.interval()) {
            (Some(step), Some(interval)) => time.within(step, interval),
            _ => time,
        };
        ks.push(field.velocity(&time, &at)?);
    }
    let sum = weighted(None, method.b(), &ks, 1.0)?;
    Ok((sum, ks.swap_remove(0)))
}

/// What a correction is to learn: states y_n with the velocities k_n and the residuals r_n of their steps.
#[derive(Clone, Debug)]
pub struct Residuals {
    /// The times t_n, one for each step.
    pub times: Vec<f64>,
    /// y_n, `(steps, rows, …)`.
    pub states: Tensor,
    /// f(t_n, y_n), of the same shape.
    pub velocities: Tensor,
    /// (y_{n+1} − y_n − h ψ) / h^{p+1}, of the same shape.
    pub residuals: Tensor,
}

/// The residuals of a method's steps along exact states `(times, rows, …)`, without history.
///
/// # Errors
/// If there is not one state for each time, or fewer than two; of the field.
pub fn residuals<F: VectorField>(
    field: &F,
    method: &Tableau,
    times: &TimeGrid,
    states: &Tensor,
) -> Result<Residuals> {
    let points = times.points();
    let count = states.dim(0)?;
    if count != points.len() || count < 2 {
        candle_core::bail!(
            "{} times were given for {count} states: give one for each, and at least two",
            points.len()
        )
    }
    let (mut velocities, mut all) = (vec![], vec![]);
    for n in 0..count - 1 {
        let [start, end] = [points[n], points[n + 1]];
        let (y, next) = (states.get(n)?.detach(), states.get(n + 1)?.detach());
        let time = Time::new(start, states.dtype(), states.device()).within(n, [start, end]);
        let h = end - start;
        let (sum, first) = increment(field, method, (&time, &y), h)?;
        let rest = ((next - &y)? - (sum.detach() * h)?)?;
        all.push((rest / h.powi(method.order() as i32 + 1))?);
        velocities.push(first.detach());
    }
    Ok(Residuals {
        times: points[..count - 1].to_vec(),
        states: states.narrow(0, 0, count - 1)?.detach(),
        velocities: Tensor::stack(&velocities, 0)?,
        residuals: Tensor::stack(&all, 0)?,
    })
}
