//! θ: the parameters that the evaluations of one solve read.
//!
//! One evaluation is not enough to find them: a parameter may be read at other times only.  So the
//! forward pass is observed, and θ is the union over all its evaluations; a parameter that none of
//! them read gets no gradient, and no optimiser touches it.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use candle_core::{DType, Device, Tensor, TensorId};

use crate::arguments::Args;
use crate::error::{Error, Result};
use crate::field::check::{self, Point};
use crate::field::{autograd, pullback::alike, Field, KeptVjp, Offer, Pullback, VectorField};
use crate::ops;
use crate::problem::Problem;
use crate::time::Time;

/// A field under observation: notes the variables that velocities depend on, and whether candle sees how they
/// depend on the state.
pub(crate) struct Observed<'f> {
    /// The field over variables.
    tracked: &'f Field<'f>,
    /// The same field over constants, cheaper to evaluate, once everything has been seen.
    plain: Option<&'f Field<'f>>,
    /// All there are to see, if that is known.
    known: Option<HashSet<TensorId>>,
    /// Whether the solve becomes part of candle's graph: then a velocity that candle cannot trace back
    /// to the state it changes with is an error.
    in_graph: bool,
    /// How far a state may move for a look whether the velocity changes with it, in multiples of the
    /// velocity.
    reach: f64,
    /// Evaluations whose points are noted, ascending.
    noted: Vec<usize>,
    /// What stands for the field in other solves.
    identity: u64,
    /// What has been seen, which the parts of an equation share.
    seen: Rc<RefCell<Seen>>,
    /// The parts of an equation.
    parts: Vec<Observed<'f>>,
}

#[derive(Default)]
struct Seen {
    evaluations: usize,
    ids: HashSet<TensorId>,
    variables: Vec<Tensor>,
    points: Vec<Point>,
    /// Which tensors of the velocity were connected with which of the state: each pattern that was found
    /// sound, and the evaluation at which it is looked at again.
    connected: HashMap<Vec<bool>, usize>,
    /// Nodes of the graph of the first velocity, and of the last one.
    nodes: usize,
    graph: usize,
    /// Sizes of graphs that were met: a new one is a point to be looked at, too.
    graphs: HashSet<usize>,
}

/// Points of a solve that are looked at.
const MOST_POINTS: usize = 8;

impl<'f> Observed<'f> {
    /// A field that reads whatever variables it has captured.
    pub(crate) fn closure(field: &'f Field<'f>, in_graph: bool) -> Self {
        let seen = Rc::default();
        let of = |tracked: &'f Field<'f>| Self {
            tracked,
            plain: None,
            known: None,
            in_graph,
            reach: 0.0,
            noted: vec![],
            identity: 0,
            seen: Rc::clone(&seen),
            parts: vec![],
        };
        Self {
            parts: field.parts().into_iter().map(of).collect(),
            ..of(field)
        }
    }

    /// A field built twice over the same `known` parameters: as variables, and as constants.
    pub(crate) fn twins(
        tracked: &'f Field<'f>,
        plain: &'f Field<'f>,
        known: HashSet<TensorId>,
    ) -> Self {
        let mut all = Self::closure(tracked, true);
        for (part, plain) in all.parts.iter_mut().zip(plain.parts()) {
            part.plain = Some(plain);
            part.known = Some(known.clone());
        }
        Self {
            plain: Some(plain),
            known: Some(known),
            ..all
        }
    }

    /// Of a solve of this problem; the points of some evaluations are noted if they are to be checked.
    pub(crate) fn solving(mut self, problem: &Problem, identity: u64, checked: bool) -> Self {
        self.identity = identity;
        // Of adaptive steps some hundred evaluations are expected.
        let steps = problem.plan.known().map_or(16, |schedule| schedule.len());
        let points = problem.grid.points();
        if let (Some(first), Some(last)) = (points.first(), points.last()) {
            self.reach = (last - first).abs() / steps.max(1) as f64;
        }
        let all = steps.saturating_mul(problem.evaluations());
        self.noted = match (checked, problem.graphs) {
            (false, _) => vec![],
            // Memory of a step that is captured as a CUDA graph belongs to the graph.
            (true, true) => vec![0],
            (true, false) => vec![0, all / 2, all.saturating_sub(1)],
        };
        self.noted.dedup();
        for (i, part) in self.parts.iter_mut().enumerate() {
            part.identity = check::pattern((identity, i), &[]);
            part.reach = self.reach;
            part.noted = self.noted.clone();
        }
        self
    }

    /// The points that were noted, in the order of the evaluations.
    pub(crate) fn points(&self) -> Vec<Point> {
        self.seen.borrow().points.clone()
    }

    /// Nodes of the graph of the first velocity.
    pub(crate) fn nodes(&self) -> usize {
        self.seen.borrow().nodes
    }

    /// The solve is done: the patterns that it found sound need not be looked at in others.
    pub(crate) fn settle(&self) {
        for pattern in self.seen.borrow().connected.keys() {
            check::note_checked(check::pattern(self.identity, pattern));
        }
    }

    /// How far a state may move when the field is checked.
    pub(crate) fn reach(&self) -> f64 {
        self.reach
    }

    /// Whether a variable was read so far, or is listed by the field.
    pub(crate) fn reads_variables(&self) -> bool {
        let of_parts = self.parts.iter().any(Self::reads_variables);
        of_parts
            || match self.tracked.parameters() {
                Some(listed) => listed.iter().any(Tensor::track_op),
                None => !self.seen.borrow().variables.is_empty(),
            }
    }

    /// The parameters, in the order in which they were met, each once: layers may share one.
    pub(crate) fn into_parameters(self) -> Vec<Tensor> {
        let mut all = self.parameters_so_far();
        let mut ids = HashSet::new();
        all.retain(|p| ids.insert(p.id()));
        all
    }

    /// The same, while the field is still observed.
    pub(crate) fn parameters_so_far(&self) -> Vec<Tensor> {
        if !self.parts.is_empty() {
            let listed = self.parts.iter().flat_map(Self::parameters_so_far);
            let mut ids = HashSet::new();
            return listed.filter(|p| ids.insert(p.id())).collect();
        }
        match self.tracked.parameters() {
            Some(listed) => listed,
            None => self.seen.borrow().variables.clone(),
        }
    }

    /// An evaluation on leaves of our own, which tells what candle can trace the velocity to.  The
    /// parameters may be constants; a velocity that reads nothing else is evaluated again over variables.
    fn traced(
        &self,
        field: &Field<'_>,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<Vec<Tensor>> {
        let leaves = autograd::copies(y)?;
        let mut k = field.velocity(t, &leaves)?;
        self.check_like(y, &k)?;
        if self.plain.is_some() && !k.iter().any(Tensor::track_op) {
            k = self.tracked.velocity(t, &leaves)?;
            self.check_like(y, &k)?;
        }
        self.look_at(t, y, &leaves, &k)?;
        Ok(k)
    }

    /// Notes what a velocity that was computed from these leaves at y depends on.
    fn look_at(
        &self,
        t: &Time,
        y: &[Tensor],
        leaves: &[Tensor],
        k: &[Tensor],
    ) -> candle_core::Result<()> {
        let own: Vec<_> = leaves.iter().map(Tensor::id).collect();
        let connected = self.note(t, k, &own)?;
        self.look_at_new_graphs(t, y);
        self.verify(t, y, connected)
    }

    /// A velocity is like the state.
    fn check_like(&self, y: &[Tensor], k: &[Tensor]) -> Result<()> {
        match self.tracked.returns_velocity() {
            true => alike(y, k),
            false => Ok(()),
        }
    }

    /// Notes the points of velocities that are computed in another way than those before, a few of them.
    fn look_at_new_graphs(&self, t: &Time, y: &[Tensor]) {
        let mut seen = self.seen.borrow_mut();
        let graph = seen.graph;
        let new = seen.graphs.insert(graph) && seen.evaluations > 1;
        if new && self.noted.len() > 1 && seen.points.len() < MOST_POINTS {
            seen.points.push(Point::of(t, y));
        }
    }

    /// Makes sure that no tensor of the velocity changes with a tensor of the state that candle cannot trace it
    /// to: after a `detach`, or a `backward` inside the field, gradients would be silently wrong.  A pattern of
    /// such pairs is looked at when it is met, and again after twice as many evaluations.
    fn verify(&self, t: &Time, y: &[Tensor], connected: Vec<bool>) -> candle_core::Result<()> {
        if connected.iter().all(|c| *c) {
            return Ok(());
        }
        let (due, number) = {
            let seen = self.seen.borrow();
            let due = match seen.connected.get(&connected) {
                Some(next) => seen.evaluations >= *next,
                None => !check::is_checked(check::pattern(self.identity, &connected)),
            };
            (due, seen.evaluations)
        };
        if !due {
            return Ok(());
        }
        let field = self.plain.unwrap_or(self.tracked);
        let states = y.len();
        let missing = (0..connected.len()).filter(|&pair| !connected[pair]);
        let pairs = missing.map(|pair| (pair / states, pair % states));
        let pairs: Vec<_> = pairs
            .filter(|(_, leaf)| !field.is_constant_in(*leaf))
            .collect();
        match check::depends_on(field, t, y, &pairs, self.reach)? {
            Some(true) => return Err(Error::UntrackedVelocity { t: t.peek() }.into()),
            Some(false) => {
                let mut seen = self.seen.borrow_mut();
                seen.connected.insert(connected, 2 * number);
            }
            None => {}
        }
        Ok(())
    }

    /// Notes the variables behind k; which tensors of the velocity are connected with which of our `own` leaves,
    /// one velocity after the other.
    fn note(&self, t: &Time, k: &[Tensor], own: &[TensorId]) -> Result<Vec<bool>> {
        let mut seen = self.seen.borrow_mut();
        let mut connected = vec![false; k.len() * own.len()];
        let mut nodes_of_all = 0;
        for (row, k) in k.iter().enumerate() {
            let nodes = k.sorted_nodes();
            nodes_of_all += nodes.len();
            for variable in nodes.into_iter().filter(|node| node.is_variable()) {
                if t.leaf().is_some_and(|time| time.id() == variable.id()) {
                    continue;
                }
                if let Some(leaf) = own.iter().position(|id| *id == variable.id()) {
                    connected[row * own.len() + leaf] = true;
                    continue;
                }
                let known = self.known.as_ref();
                if known.is_some_and(|known| !known.contains(&variable.id())) {
                    return Err(Error::ForeignParameter { t: t.peek() });
                }
                if seen.ids.insert(variable.id()) {
                    seen.variables.push(variable.clone());
                }
            }
        }
        if seen.evaluations <= 1 {
            seen.nodes = nodes_of_all;
        }
        seen.graph = nodes_of_all;
        Ok(connected)
    }

    /// Counts an evaluation, and keeps its point if it is wanted.
    fn count(&self, t: &Time, y: &[Tensor]) {
        let mut seen = self.seen.borrow_mut();
        if self.noted.binary_search(&seen.evaluations).is_ok() {
            seen.points.push(Point::of(t, y));
        }
        seen.evaluations += 1;
    }

    /// An evaluation of a field that says itself what its parameters are, and need not be traced.
    fn declared(&self, t: &Time, y: &Vec<Tensor>) -> candle_core::Result<Vec<Tensor>> {
        let k = self.plain.unwrap_or(self.tracked).velocity(t, y)?;
        if self.plain.is_some() && k.iter().any(Tensor::track_op) {
            return Err(Error::ForeignParameter { t: t.peek() }.into());
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
        if let Some((first, others)) = self.parts.split_first() {
            for part in others {
                part.velocity(t, y)?;
            }
            return first.velocity(t, y);
        }
        self.count(t, y);
        if self.tracked.parameters().is_some() {
            return self.declared(t, y);
        }
        if self.in_graph {
            return match self.is_complete() {
                true => self.traced(self.plain.unwrap_or(self.tracked), t, y),
                false => self.traced(self.tracked, t, y),
            };
        }
        let k = self.tracked.velocity(t, y)?;
        self.note(t, &k, &[])?;
        Ok(k)
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &Vec<Tensor>,
    ) -> candle_core::Result<(Vec<Tensor>, Pullback<'f, Vec<Tensor>>)> {
        self.tracked.vjp(t, y)
    }

    fn vjp_kept(&self, t: &Time, y: &Vec<Tensor>) -> candle_core::Result<Option<KeptVjp>> {
        let own = self.tracked.vjp_kept(t, y)?;
        // What a field lists is not looked for in graphs; without candle's graph nothing is looked for.
        let listed = self.tracked.parameters().is_some() || !self.parts.is_empty();
        if own.is_none() && (listed || !self.in_graph || !self.tracked.is_traced()) {
            return Ok(None);
        }
        self.count(t, y);
        if own.is_some() {
            return Ok(own);
        }
        let leaves = autograd::copies(y)?;
        let k = self.tracked.velocity(t, &leaves)?;
        self.check_like(y, &k)?;
        self.look_at(t, y, &leaves, &k)?;
        autograd::kept(leaves, t, &k).map(Some)
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.tracked.parameters()
    }

    fn parts(&self) -> Vec<&dyn VectorField<Vec<Tensor>>> {
        self.parts.iter().map(|part| part as _).collect()
    }

    fn offer(&self) -> Option<Offer> {
        self.tracked.offer()
    }
}

/// θ of one solve: what the field read, parameters and arguments, and the user's tensors behind it, one to
/// one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Theta {
    /// The tensors that the field reads.
    pub(crate) leaves: Vec<Tensor>,
    /// The user's; the same tensors where a closure captured them.
    pub(crate) masters: Vec<Tensor>,
    /// Parameters that a closure captured, and all of them in one vector, as they were at the solve:
    /// they could be written before the backward pass.
    captured: Option<(Vec<Tensor>, Tensor)>,
}

impl Theta {
    /// Parameters that a closure captured, and copies of its arguments.
    pub(crate) fn captured(leaves: Vec<Tensor>, args: &Args, device: &Device) -> Result<Self> {
        let captured = |p: &&Tensor| args.master(p).is_none();
        let own: Vec<_> = leaves.iter().filter(captured).cloned().collect();
        let name = |i| format!("{i} of the closure");
        check_parameters(own.iter(), name, device)?;
        let masters = leaves.iter();
        let masters = masters
            .map(|p| args.master(p).unwrap_or(p).clone())
            .collect();
        let then = match own.is_empty() {
            true => None,
            false => Some(in_one(&own)?.copy()?),
        };
        Ok(Self {
            leaves,
            masters,
            captured: then.map(|then| (own, then)),
        })
    }

    /// Private leaves, with the masters that they are copies of.
    pub(crate) fn copied(leaves: Vec<Tensor>, masters: Vec<Tensor>) -> Self {
        Self {
            leaves,
            masters,
            captured: None,
        }
    }

    /// The same with increments of noise among them, which are read step by step.
    pub(crate) fn with_increments(mut self, increments: Vec<Tensor>) -> Self {
        self.leaves.extend(increments.iter().cloned());
        self.masters.extend(increments);
        self
    }

    /// Makes sure that captured parameters still are what the solve read, in their own dtype; NaN is as
    /// good as any other value.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        let Some((parameters, then)) = &self.captured else {
            return Ok(());
        };
        let now = in_one(parameters)?;
        let differ = then.ne(&now)?;
        let both_nan = (then.ne(then)? * now.ne(&now)?)?;
        let changed = differ.gt(&both_nan)?.to_dtype(DType::F32)?.sum_all()?;
        ops::note_host_read(changed.device());
        if changed.to_scalar::<f32>()? > 0.0 {
            return Err(Error::ParametersChanged);
        }
        Ok(())
    }
}

/// Parameters of one dtype in one vector.
fn in_one(parameters: &[Tensor]) -> Result<Tensor> {
    let flat = parameters.iter().map(|p| p.detach().flatten_all());
    let flat = flat.collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::cat(&flat, 0)?)
}

/// Parameters are floating-point, of one dtype, on the state's device; by number they have names.
pub(crate) fn check_parameters<'p>(
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
