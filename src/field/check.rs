//! A field's pull-back, compared with differences of the field.
//!
//! Layers without a backward operation or with a wrong one, a `detach`, or a `backward` inside the
//! field give wrong gradients without any error.  Therefore the pull-back's derivative along a
//! direction d of one argument x, ⟨(∂f/∂x)ᵀ v, d⟩, is compared with ⟨v, f(x + εd) − f(x − εd)⟩ / 2ε.
//!
//! At a kink or a jump of f, a difference does not approximate a derivative.  An element of f is **smooth** if the
//! central quotients for different step sizes agree, and the two one-sided quotients agree; v is zero for all other
//! elements.  If most of the elements that change are not smooth, the check concludes nothing.  It is no error
//! either if the difference is zero where the pull-back has a gradient: this is a straight-through estimator.

mod differences;
mod moved;

use std::any::TypeId;
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{LazyLock, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use rand::rngs::StdRng;
use rand::SeedableRng;

use crate::error::{Error, Result};
use crate::field::{autograd, pullback, pullback::alike, Cotangents, Field, Leaves, VectorField};
use crate::precision::Precision;
use crate::state::State;
use crate::time::Time;
pub(crate) use differences::depends_on;
use differences::{cotangent_of, differing, numbers, Evidence, Of, Trial, SEED};
use moved::Mover;
pub(crate) use moved::{Rebuilt, Written};

/// When a solve in candle's graph compares the pull-back of its field with differences; see
/// [`check_field`].
///
/// The check evaluates the field at the first, a middle and the last evaluation of the solve, and at small
/// relative distances from them: twice for each parameter of a model and each tensor of the state, more if pull-back
/// and difference disagree.  A parameter that changes the velocity but receives no gradient is an error; declare
/// parameters that are meant to be constant with [`NeuralOde::freeze`](crate::NeuralOde::freeze).  Fields of
/// [`nn`](crate::nn) that are integrated tile by tile are not checked.
///
/// The user's variables are never written.  Therefore the check does not change parameters that a closure has
/// captured; if the rows of its state are independent, it compares their gradient for one row, computed in the batch
/// and from this row alone.  [`check_field`] does change them.  A gradient that is wrong on purpose, reversed or
/// partly detached, is an error: turn the check off for such a field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FieldCheck {
    /// For a [`NeuralOde`](crate::NeuralOde), at its first solves for each set of tensor shapes until one confirms
    /// the gradient of every parameter, at most at three; for [`odeint`](crate::odeint), at the first solve in a
    /// process for each combination of closure type, tensor shapes and size of the closure's graph.  For this, all
    /// batches of two or more rows count as equal.  Function pointers, boxed closures and candle's `Sequential` have one type
    /// whatever they compute, and a closure may compute something else after a captured value has changed: take
    /// [`Always`](Self::Always) to have each of them checked.
    #[default]
    Once,
    /// At every solve that becomes part of candle's graph.
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
/// use candle_diffeq::{Error, Time};
/// use candle_diffeq::fields::check_field;
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
    // A field is shown the time in the dtype of the sums.
    let dtype = Precision::of(first.dtype()).state;
    let device = first.device().clone();
    let point = Point::of(&Time::new(t, dtype, &device), &y);
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
        mover: &Written {
            field: &field,
            only: None,
        },
        reads_time: true,
        reach: 0.0,
        strict: true,
    };
    subject.check_all(&[point], dtype, &device)?;
    Ok(())
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
    shown_as: f64,
    step: Option<(usize, [f64; 2])>,
    pub(crate) y: Vec<Tensor>,
}

impl Point {
    /// This one, without history.
    pub(crate) fn of(t: &Time, y: &[Tensor]) -> Self {
        Self {
            t: t.peek(),
            shown_as: t.peek_shown(),
            step: t.peek_step(),
            y: y.iter().map(Tensor::detach).collect(),
        }
    }

    /// Time t in the step that the point lies in.
    fn time(&self, t: f64, dtype: DType, device: &Device) -> Time {
        self.placed(Time::new(t, dtype, device))
    }

    fn placed(&self, time: Time) -> Time {
        let time = match time.peek() == self.t {
            true => time.shown_as(self.shown_as),
            false => time,
        };
        match self.step {
            Some((step, interval)) => time.within(step, interval),
            None => time,
        }
    }
}

/// A parameter as the field reads it.
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) tensor: Tensor,
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
    /// Whether what fails by itself is an error here, or left to the backward pass, which says where.
    pub(crate) strict: bool,
}

impl Subject<'_> {
    /// Looks at these points; whether every parameter has shown that its gradient is right.
    pub(crate) fn check_all(
        &self,
        points: &[Point],
        dtype: DType,
        device: &Device,
    ) -> Result<bool> {
        let mut sound = vec![false; self.parameters.len()];
        let mut looked = true;
        for point in points {
            looked = self.check(point, dtype, device, &mut sound)? && looked;
        }
        Ok(looked && sound.iter().all(|s| *s))
    }

    /// Looks at one point, at those parameters that have not been found `sound`; whether there was something to
    /// see.  `dtype` is that of the state.
    fn check(
        &self,
        point: &Point,
        dtype: DType,
        device: &Device,
        sound: &mut [bool],
    ) -> Result<bool> {
        let time = match self.reads_time {
            true => point.placed(Time::differentiable(point.t, dtype, device)),
            false => point.time(point.t, dtype, device),
        };
        let failed = |error: Error| match error {
            Error::UntrackedVelocity { .. } => Err(error),
            error if self.strict => Err(error),
            _ => Ok(false),
        };
        let (linear, pull) = match self.field.vjp(&time, &point.y) {
            Ok(linear) => linear,
            Err(error) => return failed(error.into()),
        };
        let k = self.field.velocity(&time, &point.y)?;
        let again = self.twin.velocity(&time, &point.y)?;
        for k in [&linear, &k, &again] {
            // An equation of several parts returns all of them, one after the other.
            if !self.field.parts().is_empty() {
                continue;
            }
            if let Err(error) = alike(&point.y, k) {
                return failed(error);
            }
        }
        if let Some(leaf) = differing(&k, &again)? {
            return Err(Error::NotDeterministic { leaf, t: point.t });
        }
        let theta: Vec<_> = self.parameters.iter().map(|p| p.tensor.clone()).collect();
        let pull = |v: &Vec<Tensor>| {
            let pulled = pull(v)?;
            let t = point.t;
            pullback::check(&point.y, &theta, &pulled).map_err(|defect| {
                Error::InvalidPullback {
                    step: 0,
                    stage: 0,
                    t,
                    defect,
                }
            })?;
            Ok(pulled)
        };
        let base = numbers(&k)?;
        if !base.iter().all(|k| k.is_finite()) {
            return Ok(false);
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
            let v = cotangent_of(&mut rng, base.len());
            match pull(&trial.cotangent(&v, &k)?) {
                Ok(pulled) => first.push((v, pulled)),
                Err(error) => return failed(error),
            }
        }
        let lost = self.reaches_nothing(first.iter().map(|(_, pulled)| pulled))?;
        let mut arguments = vec![];
        for (i, sound) in sound.iter_mut().enumerate() {
            if *sound && !lost {
                continue;
            }
            match self.mover.moves(&self.parameters[i].tensor) {
                true => arguments.push(Of::Parameter(i)),
                false => {
                    let found = trial.by_row(i, &pull, &k)?;
                    self.contradiction(found, Of::Parameter(i), point.t)?;
                    *sound = true;
                }
            }
        }
        for leaf in 0..point.y.len() {
            // Where it is declared constant it has no derivative, whatever it computes.
            if !self.field.is_constant_in(leaf) && !trial.is_a_label(leaf)? {
                arguments.push(Of::State(leaf));
            }
        }
        if self.reads_time && time.leaf().is_some() && !time.was_read() {
            arguments.push(Of::Time);
        }
        for of in arguments {
            let verdict = trial.agrees(of, &first, &mut rng)?;
            if let (Of::Parameter(i), Evidence::Agrees) = (of, verdict) {
                sound[i] = true;
            }
            if verdict != Evidence::Doubtful {
                continue;
            }
            // A wrong one is right along some direction by chance, so three of seven decide.
            let (mut found, mut times) = (None, 0);
            for attempt in 0..7 {
                if let Some(numbers) = trial.disagreement(of, attempt, &k, &pull, &mut rng)? {
                    (found, times) = (Some(numbers), times + 1);
                }
                if times == 3 {
                    break;
                }
            }
            let found = found.filter(|_| times == 3);
            if found.is_some() && trial.is_made_of_steps(of, &mut rng)? {
                continue;
            }
            self.contradiction(found, of, point.t)?;
        }
        Ok(true)
    }

    /// Whether candle's graph connects the velocity with nothing at all: then parameters are looked at again.
    fn reaches_nothing<'p>(
        &self,
        mut pulled: impl Iterator<Item = &'p Cotangents<Vec<Tensor>>>,
    ) -> Result<bool> {
        let of_theta = |p: &Cotangents<_>| {
            let mut parameters = self.parameters.iter();
            parameters.any(|parameter| p.params.get(&parameter.tensor).is_some())
        };
        pulled.try_fold(true, |nothing, p| {
            let of_state = numbers(&p.y)?.iter().any(|w| *w != 0.0);
            Ok(nothing && !of_state && !of_theta(p))
        })
    }

    /// The error of what the pull-back and differences say, if they contradict each other.
    fn contradiction(&self, found: Option<(f64, f64)>, of: Of, t: f64) -> Result<()> {
        let Some((pullback, differences)) = found else {
            return Ok(());
        };
        let of = match of {
            Of::State(leaf) => format!("state tensor {leaf}"),
            Of::Parameter(i) => self.parameters[i].name.clone(),
            Of::Time => "time".to_owned(),
        };
        Err(Error::WrongPullback {
            of,
            t,
            pullback,
            differences,
        })
    }
}

/// The types of closures that were checked in this process, with the shapes that they were given.
static CHECKED: LazyLock<Mutex<HashSet<u64>>> = LazyLock::new(Mutex::default);

/// What stands for a closure: its type, how large the graph of its velocity is, whether time is looked at, and
/// the tensors that it reads, without the number of rows.
pub(crate) fn key(kind: TypeId, graph: (usize, bool), tensors: &[&[Tensor]]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (kind, graph).hash(&mut hasher);
    for group in tensors {
        for x in *group {
            // Many rows are as good as others, but a single one hides what is wrong in batches.
            let several = x.dims().first().is_some_and(|rows| *rows > 1);
            (x.dims().get(1..), several, x.dtype().as_str()).hash(&mut hasher);
        }
        group.len().hash(&mut hasher);
    }
    hasher.finish()
}

/// What stands for a closure of this type, or a model, whose velocity is connected with the state like this.
pub(crate) fn pattern(identity: impl Hash, connected: &[bool]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (identity, connected).hash(&mut hasher);
    hasher.finish()
}

/// Whether this one was checked before.
pub(crate) fn is_checked(key: u64) -> bool {
    let checked = CHECKED.lock().unwrap_or_else(PoisonError::into_inner);
    checked.contains(&key)
}

/// It has been looked at.
pub(crate) fn note_checked(key: u64) {
    let mut checked = CHECKED.lock().unwrap_or_else(PoisonError::into_inner);
    checked.insert(key);
}
