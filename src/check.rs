//! A field's pull-back, compared with differences of the field.
//!
//! Layers without a backward operation, or with a wrong one, a `detach` on the way, a `backward` inside
//! the field: all give wrong gradients, and nothing says so.  So what the pull-back says along a
//! direction d of one argument x, ⟨(∂f/∂x)ᵀ v, d⟩, is compared with ⟨v, f(x + εd) − f(x − εd)⟩ / 2ε.
//!
//! A difference is no derivative where f has a kink or a jump.  An element of f is **smooth** where the
//! central quotients of two step sizes agree, and the two one-sided ones; v is zero on all others, and
//! where most of the elements that change are not smooth nothing is concluded.  A difference that sees
//! nothing where the pull-back has a gradient is no fault either: that is a straight-through estimator.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{LazyLock, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor, Var};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::autograd;
use crate::error::{Error, Result};
use crate::field::{Cotangents, Leaves, VectorField};
use crate::odeint::OwnedField;
use crate::pullback;
use crate::state::State;
use crate::step::{alike, Field};
use crate::time::Time;

/// When a solve in candle's graph compares the pull-back of its field with differences; see
/// [`check_field`].
///
/// The check evaluates the field a few dozen times, at states of the solve and at small relative
/// distances from them.  Fields of [`nn`](crate::nn) that are integrated tile by tile are not checked.  A
/// parameter of a model that candle's graph does not connect with the velocity counts as frozen, as long as the
/// gradient of the state is right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FieldCheck {
    /// At the first solve of a [`NeuralOde`](crate::NeuralOde), and at the first of each type of closure and
    /// shapes that [`odeint`](crate::odeint) meets in a process.
    #[default]
    Once,
    /// At every solve.
    Always,
    /// Never.
    Never,
}

/// Compares the pull-back of a field with central differences at (t, y), along random directions of
/// every tensor of the state, of every parameter, and of time where the field reads
/// [`Time::tensor`].  Two evaluations at the same point must agree to the bit.
///
/// y: in the dtype in which the field is to run.  Differences tell more in f64 and f32 than in bf16 and
/// f16, where only large errors show.
///
/// Variables that the field has captured are written, one after the other, and restored to the bit
/// before the function returns: no other thread may use them meanwhile.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_diffeq::{check_field, Error, Time};
/// let w = Var::new(&[[0.5f32, 0.1], [-0.3, 0.2]], &Device::Cpu)?;
/// let y = Tensor::new(&[[1f32, 2.0]], &Device::Cpu)?;
/// let sound = |_: &Time, y: &Tensor| y.matmul(w.as_tensor())?.tanh();
/// check_field(&sound, 0.0, &y)?;
/// // candle_nn's softmax over the last dimension has no backward operation.
/// let wrong = |_: &Time, y: &Tensor| {
///     candle_nn::ops::softmax_last_dim(&y.matmul(w.as_tensor())?)? - y
/// };
/// assert!(matches!(check_field(&wrong, 0.0, &y), Err(Error::WrongPullback { .. })));
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// [`Error::WrongPullback`], [`Error::NotDeterministic`], and those of the field.
pub fn check_field<S, F>(field: &F, t: f64, y: &S) -> Result<()>
where
    S: State,
    F: VectorField<S>,
{
    let y = y.leaves();
    let Some(first) = y.first() else {
        return Err(Error::EmptyState);
    };
    let (dtype, device) = (first.dtype(), first.device().clone());
    let point = Point {
        t,
        y: y.iter().map(Tensor::detach).collect(),
    };
    let field = Leaves::<&F, S>::new(field);
    let time = Time::differentiable(t, dtype, &device);
    let variables = own_variables(&field, &time, &point.y)?;
    let name = |i: usize| format!("parameter {i} of the field, in the order in which it is read");
    let parameters = variables
        .into_iter()
        .enumerate()
        .map(|(i, tensor)| Parameter {
            name: name(i),
            tensor,
        });
    let subject = Subject {
        field: &field,
        twin: &field,
        parameters: parameters.collect(),
        mover: &Written { field: &field },
        reads_time: true,
        reach: 0.0,
    };
    subject.check(&point, dtype, &device, Depth::Full)
}

/// The variables that one evaluation reads, or that the field lists.
fn own_variables(field: &Field<'_>, t: &Time, y: &[Tensor]) -> Result<Vec<Tensor>> {
    if let Some(listed) = field.parameters() {
        return Ok(listed);
    }
    let k = field.velocity(t, &y.to_vec())?;
    let of_time = t.leaf().map(Tensor::id);
    let mut seen = HashSet::new();
    let variables = autograd::variables(&k).into_iter();
    Ok(variables
        .filter(|v| Some(v.id()) != of_time && seen.insert(v.id()))
        .collect())
}

/// A point of a solve: the time, and the state as the field saw it.
#[derive(Clone, Debug)]
pub(crate) struct Point {
    pub(crate) t: f64,
    pub(crate) y: Vec<Tensor>,
}

/// A parameter as the field reads it.
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) tensor: Tensor,
}

/// Evaluates a field with one parameter at another value.
pub(crate) trait Mover {
    /// The velocity, or `None` where this parameter cannot be moved.
    fn velocity(
        &self,
        parameter: &Tensor,
        value: &Tensor,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<Option<Vec<Tensor>>>;
}

/// Parameters stay where they are.
pub(crate) struct Unmoved;

impl Mover for Unmoved {
    fn velocity(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Time,
        _: &[Tensor],
    ) -> candle_core::Result<Option<Vec<Tensor>>> {
        Ok(None)
    }
}

/// Variables are written, and restored.
pub(crate) struct Written<'a> {
    pub(crate) field: &'a Field<'a>,
}

impl Mover for Written<'_> {
    fn velocity(
        &self,
        parameter: &Tensor,
        value: &Tensor,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<Option<Vec<Tensor>>> {
        if !parameter.is_variable() || !parameter.is_contiguous() {
            return Ok(None);
        }
        let restored = Restored {
            var: Var::from_tensor(parameter)?,
            before: parameter.detach().copy()?,
        };
        restored.var.set(value)?;
        let k = self.field.velocity(t, &y.to_vec()).map(Some);
        drop(restored);
        k
    }
}

/// Writes back what a variable held.
struct Restored {
    var: Var,
    before: Tensor,
}

impl Drop for Restored {
    fn drop(&mut self) {
        // It was written a moment ago, by the same call, with a tensor of the same shape and dtype.
        let _ = self.var.set(&self.before);
    }
}

/// Of a closure's parameters, those that the check may write without being asked: copies of our own, and the
/// filters of convolutions over one dimension, of which candle's gradient is wrong on the CPU.
pub(crate) struct Private<'a> {
    pub(crate) field: &'a Field<'a>,
    /// Copies that nobody else reads.
    pub(crate) own: &'a [Tensor],
}

impl Mover for Private<'_> {
    fn velocity(
        &self,
        parameter: &Tensor,
        value: &Tensor,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<Option<Vec<Tensor>>> {
        let own = self.own.iter().any(|p| p.id() == parameter.id());
        // Solves that run side by side on a pool's threads may share variables.
        let filter = parameter.rank() == 3 && rayon::current_thread_index().is_none();
        match own || filter {
            true => Written { field: self.field }.velocity(parameter, value, t, y),
            false => Ok(None),
        }
    }
}

/// A model is built anew over other values of its parameters.
pub(crate) struct Rebuilt<'a> {
    pub(crate) parameters: &'a [Tensor],
    pub(crate) build: &'a dyn Fn(&[Tensor]) -> candle_core::Result<OwnedField>,
}

impl Mover for Rebuilt<'_> {
    fn velocity(
        &self,
        parameter: &Tensor,
        value: &Tensor,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<Option<Vec<Tensor>>> {
        let moved = self
            .parameters
            .iter()
            .map(|p| match p.id() == parameter.id() {
                true => value.clone(),
                false => p.detach(),
            });
        let field = (self.build)(&moved.collect::<Vec<_>>())?;
        field.velocity(t, &y.to_vec()).map(Some)
    }
}

/// How much of a field is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Every argument.
    Full,
    /// The state and time only.
    State,
}

/// A field, and what its check needs.
pub(crate) struct Subject<'a> {
    /// The field whose pull-back is looked at.
    pub(crate) field: &'a Field<'a>,
    /// The same, or built a second time: it must give the same bits.
    pub(crate) twin: &'a Field<'a>,
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) mover: &'a dyn Mover,
    /// Whether the gradient with respect to time is looked at.
    pub(crate) reads_time: bool,
    /// How far an element of the state that is zero may move, in multiples of its velocity: about a step.
    pub(crate) reach: f64,
}

/// What f depends on.
#[derive(Clone, Copy)]
enum Of {
    State(usize),
    Parameter(usize),
    Time,
}

impl Subject<'_> {
    /// Looks at everything at the first of these points, and at the state and time at the others.
    pub(crate) fn check_all(&self, points: &[Point], dtype: DType, device: &Device) -> Result<()> {
        for (i, point) in points.iter().enumerate() {
            let depth = if i == 0 { Depth::Full } else { Depth::State };
            self.check(point, dtype, device, depth)?;
        }
        Ok(())
    }

    /// Looks at one point; `dtype` is that of the state.
    pub(crate) fn check(
        &self,
        point: &Point,
        dtype: DType,
        device: &Device,
        depth: Depth,
    ) -> Result<()> {
        let time = match self.reads_time {
            true => Time::differentiable(point.t, dtype, device),
            false => Time::new(point.t, dtype, device),
        };
        // What fails by itself says so in the backward pass, and where.
        let Ok((linear, pull)) = self.field.vjp(&time, &point.y) else {
            return Ok(());
        };
        if alike(&point.y, &linear).is_err() {
            return Ok(());
        }
        let k = self.field.velocity(&time, &point.y)?;
        let again = self.twin.velocity(&time, &point.y)?;
        if let Some(leaf) = differing(&k, &again)? {
            return Err(Error::NotDeterministic { leaf, t: point.t });
        }
        let theta: Vec<_> = self.parameters.iter().map(|p| p.tensor.clone()).collect();
        let pull = |v: &Vec<Tensor>| {
            let pulled = pull(v).ok()?;
            pullback::check(v, &theta, &pulled)
                .is_ok()
                .then_some(pulled)
        };
        let base = numbers(&k)?;
        if !base.iter().all(|k| k.is_finite()) {
            return Ok(());
        }
        let trial = Trial {
            subject: self,
            point,
            base: &base,
            dtype,
            device,
        };
        let mut rng = StdRng::seed_from_u64(SEED);
        // Two cotangents for all arguments: most agree at once.
        let mut first = vec![];
        for _ in 0..2 {
            let v = signs(&mut rng, base.len());
            let Some(pulled) = pull(&trial.cotangent(&v, &k)?) else {
                return Ok(());
            };
            first.push((v, pulled));
        }
        let (lost, frozen) = self.unreached(first.iter().map(|(_, pulled)| pulled))?;
        let mut arguments = vec![];
        if depth == Depth::Full || lost {
            let read = (0..self.parameters.len()).filter(|i| !frozen.contains(i));
            arguments.extend(read.map(Of::Parameter));
        }
        // Where it is declared constant it has no derivative, whatever it computes.
        let leaves = (0..point.y.len()).filter(|&leaf| !self.field.is_constant_in(leaf));
        arguments.extend(leaves.map(Of::State));
        if self.reads_time && time.leaf().is_some() && !time.was_read() {
            arguments.push(Of::Time);
        }
        for of in arguments {
            if trial.agrees(of, &first, &mut rng)? {
                continue;
            }
            // A wrong one is right along some direction by chance, so two of four decide.
            let (mut found, mut times) = (None, 0);
            for attempt in 0..4 {
                if let Some(numbers) = trial.disagreement(of, attempt, &k, &pull, &mut rng)? {
                    times += 1;
                    found = Some(numbers).filter(|_| times == 2);
                }
                if found.is_some() {
                    break;
                }
            }
            if let Some((pullback, differences)) = found {
                return Err(Error::WrongPullback {
                    of: self.name(of, &frozen),
                    t: point.t,
                    pullback,
                    differences,
                });
            }
        }
        Ok(())
    }

    /// Parameters that candle's graph does not connect with the velocity: detached on purpose, or hidden behind
    /// a layer that records nothing, which then shows in the gradient of the state.  Where the velocity is
    /// connected with nothing at all, they are not frozen but lost.
    fn unreached<'p>(
        &self,
        pulled: impl Iterator<Item = &'p Cotangents<Vec<Tensor>>> + Clone,
    ) -> Result<(bool, Vec<usize>)> {
        let reached = |i: &usize| {
            let parameter = &self.parameters[*i].tensor;
            pulled.clone().any(|p| p.params.get(parameter).is_some())
        };
        let (reached, frozen): (Vec<_>, Vec<_>) = (0..self.parameters.len()).partition(reached);
        let mut connected = !reached.is_empty();
        for pulled in pulled {
            connected = connected || numbers(&pulled.y)?.iter().any(|w| *w != 0.0);
        }
        Ok(match connected {
            true => (false, frozen),
            false => (true, vec![]),
        })
    }

    fn name(&self, of: Of, frozen: &[usize]) -> String {
        match of {
            Of::State(leaf) if frozen.is_empty() => format!("state tensor {leaf}"),
            Of::State(leaf) => {
                let names = frozen.iter().map(|&i| self.parameters[i].name.as_str());
                let names: Vec<_> = names.collect();
                format!(
                    "state tensor {leaf} (and none reaches {})",
                    names.join(", ")
                )
            }
            Of::Parameter(i) => self.parameters[i].name.clone(),
            Of::Time => "time".to_owned(),
        }
    }
}

/// The same directions in every run.
const SEED: u64 = 0x5eed_f1e1_d000_0001;

/// A pull-back; `None` where it fails.
type Pull<'a> = dyn Fn(&Vec<Tensor>) -> Option<Cotangents<Vec<Tensor>>> + 'a;

/// The check of one point.
struct Trial<'a> {
    subject: &'a Subject<'a>,
    point: &'a Point,
    /// The velocity there.
    base: &'a [f64],
    dtype: DType,
    device: &'a Device,
}

/// Velocities on both sides of a point, and the distance between them along the argument.
struct Sides {
    plus: Vec<f64>,
    minus: Vec<f64>,
    distance: Vec<f64>,
}

impl Trial<'_> {
    /// v as tensors like the velocity.
    fn cotangent(&self, v: &[f64], k: &[Tensor]) -> Result<Vec<Tensor>> {
        let mut rest = v;
        let of_leaf = |k: &Tensor| {
            let leaf;
            (leaf, rest) = rest.split_at(k.elem_count());
            like(leaf, k)
        };
        k.iter().map(of_leaf).collect()
    }

    /// The argument at this point.
    fn value(&self, of: Of) -> Result<Tensor> {
        Ok(match of {
            Of::State(leaf) => self.point.y[leaf].clone(),
            Of::Parameter(i) => self.subject.parameters[i].tensor.detach(),
            Of::Time => Tensor::new(self.point.t, self.device)?,
        })
    }

    /// A direction in which the argument may move, by element.
    fn direction(&self, of: Of, x: &[f64], rng: &mut StdRng) -> Vec<f64> {
        let mut draw = |scale: f64| {
            let size = rng.random_range(0.5..1.0) * scale;
            if rng.random::<bool>() {
                size
            } else {
                -size
            }
        };
        let rms = (x.iter().map(|x| x * x).sum::<f64>() / x.len().max(1) as f64).sqrt();
        match of {
            // States that occur, or nearly: each element by a part of itself, or along its velocity.
            Of::State(leaf) => {
                let before = self.point.y[..leaf].iter().map(Tensor::elem_count).sum();
                let k = &self.base[before..][..x.len()];
                let scale = |(x, k): (&f64, &f64)| match *x {
                    0.0 => (self.subject.reach * k).abs(),
                    x => x.abs(),
                };
                let scales: Vec<_> = x.iter().zip(k).map(scale).collect();
                // A tensor of zeros that stands still says nothing of its size.
                let least = if scales.iter().all(|s| *s == 0.0) {
                    0.01
                } else {
                    0.0
                };
                scales
                    .into_iter()
                    .map(|s| draw(f64::max(s, least)))
                    .collect()
            }
            Of::Parameter(_) => {
                let least = if rms > 0.0 { rms } else { 0.1 };
                x.iter().map(|x| draw(x.abs().max(least))).collect()
            }
            Of::Time if self.subject.reach > 0.0 => vec![draw(self.subject.reach)],
            Of::Time => vec![draw(x[0].abs().max(1.0))],
        }
    }

    /// The velocities at x ± εd; `None` where the field cannot be evaluated there.
    fn sides(&self, of: Of, x: &Tensor, d: &[f64], epsilon: f64) -> Result<Option<Sides>> {
        let at = numbers(std::slice::from_ref(x))?;
        let side = |sign: f64| -> Result<Option<(Vec<f64>, Vec<f64>)>> {
            let moved = at.iter().zip(d).map(|(x, d)| x + sign * epsilon * d);
            let moved = like(&moved.collect::<Vec<_>>(), x)?;
            let k = self.velocity(of, &moved);
            let Ok(Some(k)) = k else { return Ok(None) };
            Ok(Some((numbers(&k)?, numbers(&[moved])?)))
        };
        let (Some((plus, above)), Some((minus, below))) = (side(1.0)?, side(-1.0)?) else {
            return Ok(None);
        };
        if plus.len() != self.base.len() || minus.len() != self.base.len() {
            return Ok(None);
        }
        let distance = above.iter().zip(&below).map(|(a, b)| a - b).collect();
        Ok(Some(Sides {
            plus,
            minus,
            distance,
        }))
    }

    /// The velocity with one argument moved.
    fn velocity(&self, of: Of, value: &Tensor) -> candle_core::Result<Option<Vec<Tensor>>> {
        let y = &self.point.y;
        let time = |t| Time::new(t, self.dtype, self.device);
        match of {
            Of::State(leaf) => {
                let mut y = y.clone();
                y[leaf] = value.clone();
                self.subject
                    .field
                    .velocity(&time(self.point.t), &y)
                    .map(Some)
            }
            Of::Parameter(i) => {
                let parameter = &self.subject.parameters[i].tensor;
                let t = time(self.point.t);
                self.subject.mover.velocity(parameter, value, &t, y)
            }
            Of::Time => {
                let t = value.to_scalar::<f64>()?;
                self.subject.field.velocity(&time(t), y).map(Some)
            }
        }
    }

    /// ⟨(∂f/∂x)ᵀ v, distance⟩, and whether all of that gradient is zero or missing.
    fn along(
        &self,
        of: Of,
        pulled: &Cotangents<Vec<Tensor>>,
        distance: &[f64],
    ) -> Result<(f64, bool)> {
        let gradient = match of {
            Of::State(leaf) => pulled.y.get(leaf),
            Of::Parameter(i) => pulled.params.get(&self.subject.parameters[i].tensor),
            Of::Time => pulled.t.as_ref(),
        };
        let Some(gradient) = gradient else {
            return Ok((0.0, true));
        };
        let gradient = numbers(std::slice::from_ref(gradient))?;
        let along = gradient.iter().zip(distance).map(|(g, d)| g * d).sum();
        Ok((along, gradient.iter().all(|g| *g == 0.0)))
    }

    /// Unit roundoff of what the field computes with.
    fn unit(&self) -> f64 {
        let of = |y: &Tensor| unit_roundoff(y.dtype());
        self.point.y.iter().map(of).fold(0.0, f64::max)
    }

    /// Whether the pull-back agrees with a difference at once, which is what most do.
    fn agrees(
        &self,
        of: Of,
        first: &[(Vec<f64>, Cotangents<Vec<Tensor>>)],
        rng: &mut StdRng,
    ) -> Result<bool> {
        let x = self.value(of)?;
        if x.elem_count() == 0 || x.dtype().is_int() {
            return Ok(true);
        }
        let d = self.direction(of, &numbers(std::slice::from_ref(&x))?, rng);
        let epsilon = self.unit().cbrt();
        let Some(sides) = self.sides(of, &x, &d, epsilon)? else {
            return Ok(true);
        };
        let change: Vec<_> = sides
            .plus
            .iter()
            .zip(&sides.minus)
            .map(|(a, b)| a - b)
            .collect();
        let size = norm(change.iter().copied());
        let noise = 8.0 * self.unit() * norm(self.base.iter().copied());
        for (v, pulled) in first {
            let (along, is_zero) = self.along(of, pulled, &sides.distance)?;
            let number: f64 = v.iter().zip(&change).map(|(v, c)| v * c).sum();
            let near = (number - along).abs() <= 0.01 * size + noise;
            if !near || is_zero && size > noise {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What the pull-back says and what differences say, where they contradict each other.
    fn disagreement(
        &self,
        of: Of,
        attempt: i32,
        k: &[Tensor],
        pull: &Pull<'_>,
        rng: &mut StdRng,
    ) -> Result<Option<(f64, f64)>> {
        let x = self.value(of)?;
        let d = self.direction(of, &numbers(std::slice::from_ref(&x))?, rng);
        let epsilon = self.unit().cbrt() / 2f64.powi(attempt);
        let Some(smooth) = self.smooth(of, &x, &d, epsilon)? else {
            return Ok(None);
        };
        let signs = signs(rng, self.base.len());
        let v: Vec<_> = signs
            .iter()
            .zip(&smooth.doubt)
            .map(|(sign, doubt)| if doubt.is_some() { *sign } else { 0.0 })
            .collect();
        let Some(pulled) = pull(&self.cotangent(&v, k)?) else {
            return Ok(None);
        };
        let (along, _) = self.along(of, &pulled, &smooth.distance)?;
        let number: f64 = v.iter().zip(&smooth.change).map(|(v, c)| v * c).sum();
        let on = |x: &[f64]| norm(x.iter().zip(&v).map(|(x, v)| x * v));
        let size = on(&smooth.change);
        let doubt = norm(smooth.doubt.iter().flatten().copied());
        let noise = 8.0 * self.unit() * on(self.base);
        if !along.is_finite() || size <= 4.0 * (doubt + noise) {
            return Ok(None);
        }
        let share = match unit_roundoff(self.dtype).max(self.unit()) {
            u if u > 1e-5 => 0.1,
            _ => 0.03,
        };
        let far = (number - along).abs() > share * size + 6.0 * (doubt + noise);
        let scale = norm(smooth.distance.iter().copied());
        Ok(far.then(|| (along / scale, number / scale)))
    }

    /// The change of every element between x − εd/4 and x + εd/4, and which of them are smooth.
    fn smooth(&self, of: Of, x: &Tensor, d: &[f64], epsilon: f64) -> Result<Option<Smooth>> {
        let (Some(far), Some(near)) = (
            self.sides(of, x, d, epsilon)?,
            self.sides(of, x, d, 0.25 * epsilon)?,
        ) else {
            return Ok(None);
        };
        let unit = self.unit();
        let rms = norm(self.base.iter().copied()) / (self.base.len().max(1) as f64).sqrt();
        let (mut change, mut doubt) = (vec![], vec![]);
        let (mut moving, mut kept) = (0, 0);
        for (i, base) in self.base.iter().enumerate() {
            let wide = 0.25 * (far.plus[i] - far.minus[i]);
            let narrow = near.plus[i] - near.minus[i];
            let (up, down) = (near.plus[i] - base, base - near.minus[i]);
            let noise = 4.0 * unit * (base.abs() + rms);
            let size = wide.abs().max(narrow.abs());
            let moves = size > noise || !size.is_finite();
            let smooth = (wide - narrow).abs() <= 0.05 * size + noise
                && (up - down).abs() <= 0.1 * size + 2.0 * noise;
            moving += usize::from(moves);
            kept += usize::from(moves && smooth);
            change.push(if smooth { narrow } else { 0.0 });
            doubt.push(smooth.then(|| (wide - narrow).abs()));
        }
        // Functions that are constant between jumps, roundings for one, have no derivative to compare with.
        if 2 * kept < moving || kept == 0 {
            return Ok(None);
        }
        Ok(Some(Smooth {
            change,
            doubt,
            distance: near.distance,
        }))
    }
}

/// What differences say, element by element.
struct Smooth {
    change: Vec<f64>,
    /// How far the two step sizes are apart; `None` where an element is not smooth.
    doubt: Vec<Option<f64>>,
    distance: Vec<f64>,
}

/// Whether the velocity changes, smoothly, with these tensors of the state.
pub(crate) fn depends_on(
    field: &Field<'_>,
    t: &Time,
    y: &[Tensor],
    leaves: impl IntoIterator<Item = usize>,
    reach: f64,
) -> candle_core::Result<bool> {
    let point = Point {
        t: t.peek(),
        y: y.iter().map(Tensor::detach).collect(),
    };
    let (dtype, device) = t.kind();
    let time = Time::new(point.t, dtype, &device);
    let base = numbers(&field.velocity(&time, &point.y)?)?;
    if !base.iter().all(|k| k.is_finite()) {
        return Ok(false);
    }
    let subject = Subject {
        field,
        twin: field,
        parameters: vec![],
        mover: &Unmoved,
        reads_time: false,
        reach,
    };
    let trial = Trial {
        subject: &subject,
        point: &point,
        base: &base,
        dtype,
        device: &device,
    };
    let mut rng = StdRng::seed_from_u64(SEED);
    for leaf in leaves {
        let of = Of::State(leaf);
        let x = trial.value(of)?;
        let mut changes = x.elem_count() > 0;
        for attempt in 0..2 {
            if !changes {
                break;
            }
            let d = trial.direction(of, &numbers(std::slice::from_ref(&x))?, &mut rng);
            let epsilon = trial.unit().cbrt() / 3f64.powi(attempt);
            changes = match trial.smooth(of, &x, &d, epsilon)? {
                Some(smooth) => {
                    let doubt = norm(smooth.doubt.iter().flatten().copied());
                    let noise = 8.0 * trial.unit() * norm(base.iter().copied());
                    norm(smooth.change.iter().copied()) > 4.0 * (doubt + noise)
                }
                None => false,
            };
        }
        if changes {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The types of closures that were checked in this process, with the shapes that they were given.
static CHECKED: LazyLock<Mutex<HashSet<u64>>> = LazyLock::new(Mutex::default);

/// A closure's type and the shapes of what it reads.
pub(crate) fn key(kind: std::any::TypeId, tensors: &[&[Tensor]]) -> u64 {
    let mut hasher = DefaultHasher::new();
    kind.hash(&mut hasher);
    for group in tensors {
        for x in *group {
            (x.dims(), x.dtype().as_str()).hash(&mut hasher);
        }
        group.len().hash(&mut hasher);
    }
    hasher.finish()
}

/// Whether this one was checked before.
pub(crate) fn is_checked(key: u64) -> bool {
    let checked = CHECKED.lock().unwrap_or_else(PoisonError::into_inner);
    checked.contains(&key)
}

/// It was found sound.
pub(crate) fn note_checked(key: u64) {
    let mut checked = CHECKED.lock().unwrap_or_else(PoisonError::into_inner);
    checked.insert(key);
}

/// All elements in f64.
fn numbers(tensors: &[Tensor]) -> candle_core::Result<Vec<f64>> {
    let mut all = vec![];
    for x in tensors {
        let x = x.detach().flatten_all()?.to_dtype(DType::F64)?;
        all.extend(x.to_vec1::<f64>()?);
    }
    Ok(all)
}

/// These numbers in a tensor like another.
fn like(x: &[f64], other: &Tensor) -> Result<Tensor> {
    let x = Tensor::from_vec(x.to_vec(), other.shape(), &Device::Cpu)?;
    Ok(x.to_dtype(other.dtype())?.to_device(other.device())?)
}

/// The first tensor in which two evaluations differ by a bit; NaN equals NaN.
fn differing(a: &[Tensor], b: &[Tensor]) -> Result<Option<usize>> {
    for (leaf, (a, b)) in a.iter().zip(b).enumerate() {
        let (a, b) = (
            numbers(std::slice::from_ref(a))?,
            numbers(std::slice::from_ref(b))?,
        );
        let same = |(a, b): (&f64, &f64)| a == b || a.is_nan() && b.is_nan();
        if a.len() != b.len() || !a.iter().zip(&b).all(same) {
            return Ok(Some(leaf));
        }
    }
    Ok(None)
}

/// ±1 by chance.
fn signs(rng: &mut StdRng, n: usize) -> Vec<f64> {
    let mut sign = || if rng.random::<bool>() { 1.0 } else { -1.0 };
    (0..n).map(|_| sign()).collect()
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON / 2.0,
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => f64::from(f32::EPSILON) / 2.0,
    }
}
