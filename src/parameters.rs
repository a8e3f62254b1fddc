//! θ: the parameters that the evaluations of one solve read.
//!
//! One evaluation is not enough to find them: a parameter may be read at other times only.  So the
//! forward pass is observed, and θ is the union over all its evaluations; a parameter that none of
//! them read gets no gradient, and no optimiser touches it.

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashSet;

use candle_core::{DType, Device, Tensor, TensorId, Var};

use crate::autograd;
use crate::error::{Error, Result};
use crate::field::{Pullback, VectorField};
use crate::ops;
use crate::step::{alike, Field};
use crate::time::Time;

/// A field under observation: detaches velocities and notes the variables that they depend on.
pub(crate) struct Observed<'f> {
    /// The field over variables.
    tracked: &'f Field<'f>,
    /// The same field over constants, cheaper to evaluate, once everything has been seen.
    plain: Option<&'f Field<'f>>,
    /// All there are to see, if that is known.
    known: Option<HashSet<TensorId>>,
    /// Whether a velocity that candle cannot trace is an error.
    must_track: bool,
    seen: RefCell<Seen>,
}

#[derive(Default)]
struct Seen {
    evaluations: usize,
    ids: HashSet<TensorId>,
    variables: Vec<Tensor>,
}

impl<'f> Observed<'f> {
    /// A field that reads whatever variables it has captured.
    pub(crate) fn closure(field: &'f Field<'f>, must_track: bool) -> Self {
        Self {
            tracked: field,
            plain: None,
            known: None,
            must_track,
            seen: RefCell::default(),
        }
    }

    /// A field built twice over the same `known` parameters: as variables, and as constants.
    pub(crate) fn twins(
        tracked: &'f Field<'f>,
        plain: &'f Field<'f>,
        known: HashSet<TensorId>,
    ) -> Self {
        Self {
            plain: Some(plain),
            known: Some(known),
            ..Self::closure(tracked, true)
        }
    }

    /// The parameters, in the order in which they were met, each once: layers may share one.
    pub(crate) fn into_parameters(self) -> Vec<Tensor> {
        let Some(mut listed) = self.tracked.parameters() else {
            return self.seen.into_inner().variables;
        };
        let mut ids = HashSet::new();
        listed.retain(|p| ids.insert(p.id()));
        listed
    }

    /// The first evaluation, on leaves of our own, which tells whether candle can trace the field.
    fn first(&self, t: &Time, y: &[Tensor]) -> candle_core::Result<Vec<Tensor>> {
        let leaves = leaves(y.iter().map(Ok))?;
        let own: HashSet<_> = leaves.iter().map(Tensor::id).collect();
        let k = self.tracked.velocity(t, &leaves)?;
        alike(y, &k)?;
        if !k.iter().any(Tensor::track_op) || self.hides_its_state(t, &leaves, &k, &own)? {
            return Err(Error::UntrackedVelocity { t: t.value() }.into());
        }
        self.note(t, &k, &own)?;
        Ok(k)
    }

    /// A later evaluation: what candle cannot trace would be an error of the backward pass, and is
    /// one here.  The parameters may be constants; a velocity that reads nothing else is evaluated
    /// again over variables.
    fn later(&self, field: &Field<'_>, t: &Time, y: &[Tensor]) -> candle_core::Result<Vec<Tensor>> {
        let leaves = leaves(y.iter().map(Ok))?;
        let own: HashSet<_> = leaves.iter().map(Tensor::id).collect();
        let mut k = field.velocity(t, &leaves)?;
        alike(y, &k)?;
        if self.plain.is_some() && !k.iter().any(Tensor::track_op) {
            k = self.tracked.velocity(t, &leaves)?;
        }
        if !k.iter().any(Tensor::track_op) {
            return Err(Error::UntrackedVelocity { t: t.value() }.into());
        }
        self.note(t, &k, &own)?;
        Ok(k)
    }

    /// Whether a velocity tensor changes with the state although candle sees no path between them:
    /// after a `detach`, or a `backward` inside the field.  Gradients would be silently wrong.
    /// Costs an evaluation only where the path is missing.
    fn hides_its_state(
        &self,
        t: &Time,
        y: &[Tensor],
        k: &[Tensor],
        own: &HashSet<TensorId>,
    ) -> candle_core::Result<bool> {
        let reads = |k: &Tensor| k.sorted_nodes().iter().any(|n| own.contains(&n.id()));
        if k.iter().all(reads) {
            return Ok(false);
        }
        let elsewhere = leaves(y.iter().map(|y| y.detach().affine(1.25, 0.25)))?;
        let moved = self.tracked.velocity(t, &elsewhere)?;
        for (k, moved) in k.iter().zip(&moved).filter(|(k, _)| !reads(k)) {
            let changed = k.detach().ne(&moved.detach())?.to_dtype(DType::F32)?;
            if changed.sum_all()?.to_scalar::<f32>()? > 0.0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Notes the variables behind k, but for the leaves of our `own`.
    fn note(&self, t: &Time, k: &[Tensor], own: &HashSet<TensorId>) -> Result<()> {
        let mut seen = self.seen.borrow_mut();
        seen.evaluations += 1;
        for variable in autograd::variables(k) {
            if own.contains(&variable.id()) {
                continue;
            }
            if self
                .known
                .as_ref()
                .is_some_and(|known| !known.contains(&variable.id()))
            {
                return Err(Error::ForeignParameter { t: t.value() });
            }
            if seen.ids.insert(variable.id()) {
                seen.variables.push(variable);
            }
        }
        Ok(())
    }

    /// An evaluation of a field that says itself what its parameters are, and need not be traced.
    fn declared(&self, t: &Time, y: &Vec<Tensor>) -> candle_core::Result<Vec<Tensor>> {
        let k = self.plain.unwrap_or(self.tracked).velocity(t, y)?;
        if self.plain.is_some() && k.iter().any(Tensor::track_op) {
            return Err(Error::ForeignParameter { t: t.value() }.into());
        }
        Ok(k)
    }

    /// Whether all known parameters have been seen.
    fn is_complete(&self) -> bool {
        let seen = self.seen.borrow();
        let all = |known: &HashSet<_>| known.len() == seen.variables.len();
        self.known.as_ref().is_some_and(all)
    }
}

impl VectorField<Vec<Tensor>> for Observed<'_> {
    fn velocity(&self, t: &Time, y: &Vec<Tensor>) -> candle_core::Result<Vec<Tensor>> {
        if self.tracked.parameters().is_some() {
            return self.declared(t, y);
        }
        if self.must_track {
            return match self.is_complete() {
                _ if self.seen.borrow().evaluations == 0 => self.first(t, y),
                true => self.later(self.plain.unwrap_or(self.tracked), t, y),
                false => self.later(self.tracked, t, y),
            };
        }
        let k = self.tracked.velocity(t, y)?;
        self.note(t, &k, &HashSet::new())?;
        Ok(k)
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &Vec<Tensor>,
    ) -> candle_core::Result<(Vec<Tensor>, Pullback<'f, Vec<Tensor>>)> {
        self.tracked.vjp(t, y)
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.tracked.parameters()
    }

    fn known(&self) -> Option<&dyn Any> {
        self.tracked.known()
    }
}

/// Variables of our own with these values.
fn leaves<T: std::borrow::Borrow<Tensor>>(
    y: impl Iterator<Item = candle_core::Result<T>>,
) -> candle_core::Result<Vec<Tensor>> {
    y.map(|y| Ok(Var::from_tensor(y?.borrow())?.into_inner()))
        .collect()
}

/// θ of one solve: what the field read, and the user's variables behind it, one to one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Theta {
    /// The tensors that the field reads.
    pub(crate) leaves: Vec<Tensor>,
    /// The user's; the same tensors where a closure captured them.
    pub(crate) masters: Vec<Tensor>,
    /// All masters in one vector, as they were at the solve; only for captured ones, which could
    /// be written before the backward pass.
    snapshot: Option<Tensor>,
}

impl Theta {
    /// Parameters that a closure captured.
    pub(crate) fn captured(variables: Vec<Tensor>, state: DType, device: &Device) -> Result<Self> {
        let name = |i| format!("{i} of the closure");
        check(variables.iter(), name, device)?;
        let mut theta = Self {
            leaves: variables.clone(),
            masters: variables,
            snapshot: None,
        };
        theta.snapshot = theta.pack(state)?.map(|p| p.detach().copy()).transpose()?;
        Ok(theta)
    }

    /// Private leaves, with the masters that they are copies of.
    pub(crate) fn copied(leaves: Vec<Tensor>, masters: Vec<Tensor>) -> Self {
        Self {
            leaves,
            masters,
            snapshot: None,
        }
    }

    /// All masters as one vector in `dtype`; `None` without parameters.
    fn pack(&self, dtype: DType) -> Result<Option<Tensor>> {
        if self.masters.is_empty() {
            return Ok(None);
        }
        let flat = self
            .masters
            .iter()
            .map(|p| p.flatten_all()?.to_dtype(dtype));
        let flat = flat.collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Some(Tensor::cat(&flat, 0)?))
    }

    /// Makes sure that captured parameters still are what the solve read.
    pub(crate) fn check_unchanged(&self, state: DType) -> Result<()> {
        let Some(then) = &self.snapshot else {
            return Ok(());
        };
        let Some(now) = self.pack(state)? else {
            return Ok(());
        };
        let changed = then.ne(&now.detach())?.to_dtype(DType::F32)?.sum_all()?;
        ops::note_host_read(changed.device());
        if changed.to_scalar::<f32>()? > 0.0 {
            return Err(Error::ParametersChanged);
        }
        Ok(())
    }
}

/// Parameters are floating-point, of one dtype, on the state's device; by number they have names.
pub(crate) fn check<'p>(
    parameters: impl Iterator<Item = &'p Tensor>,
    name: impl Fn(usize) -> String,
    device: &Device,
) -> Result<()> {
    let mut expected = None;
    for (i, p) in parameters.enumerate() {
        if !matches!(
            p.dtype(),
            DType::F16 | DType::BF16 | DType::F32 | DType::F64
        ) {
            return Err(Error::ParameterDtype {
                name: name(i),
                dtype: p.dtype(),
            });
        }
        let expected = *expected.get_or_insert(p.dtype());
        if p.dtype() != expected {
            return Err(Error::MixedParameters {
                name: name(i),
                expected,
                got: p.dtype(),
            });
        }
        if !p.device().same_device(device) {
            return Err(Error::DeviceMismatch {
                what: format!("parameter {}", name(i)),
                expected: device.location(),
                got: p.device().location(),
            });
        }
    }
    Ok(())
}
