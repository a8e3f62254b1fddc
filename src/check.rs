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

mod differences;
mod moved;

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{LazyLock, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use rand::rngs::StdRng;
use rand::SeedableRng;

use crate::autograd;
use crate::error::{Error, Result};
use crate::field::{Cotangents, Leaves, VectorField};
use crate::pullback;
use crate::state::State;
use crate::step::{alike, Field};
use crate::time::Time;
pub(crate) use differences::depends_on;
use differences::{differing, numbers, signs, Of, Trial, SEED};
use moved::{Mover, Written};
pub(crate) use moved::{Private, Rebuilt};

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
