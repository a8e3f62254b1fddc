//! What a neural ODE does at a solve.

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use candle_core::{Tensor, TensorId, Var};

use super::model::Builder;
use super::NeuralOde;
use crate::arguments::{options_with, Args};
use crate::driven::Drive;
use crate::error::{Error, Result};
use crate::field::check::{self, FieldCheck, Parameter, Rebuilt, Subject};
use crate::field::{Field, Leaves, SharedField, VectorField};
use crate::integrate::Forward;
use crate::loss::RowLoss;
use crate::node::{node, Source};
use crate::odeint::states;
use crate::parameters::{self, Observed, Theta};
use crate::passes::{run, run_tiles};
use crate::problem::{OdeOptions, Problem};
use crate::state::{Packing, State};
use crate::stats::Recorder;
use crate::time::Times;

impl<S: State + 'static, A: State + 'static> NeuralOde<S, A> {
    /// The problem, the user's variables, the arguments and y0, joined; all are checked.
    fn prepare<T: Times + ?Sized>(
        &self,
        (y0, args): (&[Tensor], &A),
        times: &T,
        loss: Option<&RowLoss>,
        untracked_too: bool,
        options: &OdeOptions,
    ) -> Result<Inputs> {
        let problem = Problem::new(y0, times.to_grid()?, options)?;
        if let Some(loss) = loss {
            loss.check(&problem)?;
        }
        let options = options_with(args, options);
        let masters = self.masters()?;
        let all = masters.iter().map(|var| var.as_tensor());
        let name = |i: usize| self.names[i].clone();
        parameters::check_parameters(all, name, problem.device())?;
        Ok(Inputs {
            args: Args::new(args.leaves(), &problem, &options, untracked_too)?,
            y0: Packing::join(y0, problem.state())?,
            masters,
            problem,
        })
    }

    /// Everything up to the end of the forward pass.
    pub(crate) fn run<T: Times + ?Sized>(
        &self,
        given: (&S, &A),
        times: &T,
        loss: Option<&RowLoss>,
        in_graph: bool,
        drive: Option<&Drive>,
    ) -> Result<Solve> {
        let before = self.recorded();
        let solve = self.solved(given, times, loss, in_graph, drive, None)?;
        self.note(&solve.problem, before);
        Ok(solve)
    }

    /// The same with another forward pass, in the graph.
    pub(crate) fn run_with<T: Times + ?Sized>(
        &self,
        given: (&S, &A),
        times: &T,
        pass: Pass<'_>,
    ) -> Result<Solve> {
        let before = self.recorded();
        let solve = self.solved(given, times, None, true, None, Some(pass))?;
        self.note(&solve.problem, before);
        Ok(solve)
    }

    /// Evaluations that the recorder of the options has seen.
    fn recorded(&self) -> usize {
        let recorder = self.options.recorder.as_ref();
        recorder.map_or(0, Recorder::evaluations)
    }

    /// Notes the evaluations of a solve.
    fn note(&self, problem: &Problem, before: usize) {
        let made = problem.recorder.evaluations().saturating_sub(before);
        self.last.store(made, Ordering::Relaxed);
    }

    fn solved<T: Times + ?Sized>(
        &self,
        (y0, args): (&S, &A),
        times: &T,
        loss: Option<&RowLoss>,
        in_graph: bool,
        drive: Option<&Drive>,
        pass: Option<Pass<'_>>,
    ) -> Result<Solve> {
        let options = pass.as_ref().map_or(&self.options, |pass| pass.options);
        let given = y0.leaves();
        let Inputs {
            problem,
            masters,
            args,
            y0,
        } = self.prepare((&given, args), times, loss, !in_graph, options)?;
        let increments = drive.map_or_else(Vec::new, |drive| {
            drive.masters(!in_graph && problem.continuous.is_none())
        });
        let tracked = y0.track_op() || problem.grid.is_tracked() || args.is_tracked();
        let tracked = tracked || !increments.is_empty();
        let keep = !in_graph || tracked || !masters.is_empty();
        let packable = self.packable(&problem, &masters).filter(|_| pass.is_none());
        let jumps = packable.as_ref().map_or_else(Vec::new, |f| f.jumps());
        let problem = problem.meeting(&jumps, options)?;
        if let Some(field) = packable {
            let by_noise = driven_of(&problem, drive)?;
            let of_tiles = by_noise.as_ref().unwrap_or(&problem);
            if let Some(forward) = run_tiles(of_tiles, &*field, &y0, loss.map(|loss| loss as _))? {
                let problem = by_noise.unwrap_or(problem);
                let theta = Observed::closure(&*field, true).into_parameters();
                let theta = Theta::copied(theta.clone(), theta);
                return Ok(Solve {
                    problem,
                    field: Box::new(Leaves::<SharedField, Vec<Tensor>>::new(Arc::clone(&field))),
                    source: Source::Shared(field),
                    theta,
                    forward,
                    y0,
                });
            }
        }
        let (leaves, origin) = self.leaves(&problem, masters, &args)?;
        let builder = self.builder(&problem);
        let field = builder.build(&leaves, &args.leaves)?;
        let problem = problem.meeting(&field.jumps(), options)?;
        let problem = driven(problem, drive)?;
        let plain = match field.offer() {
            // It lists its parameters, and is hardly ever evaluated as tensors.
            Some(_) => None,
            None => Some(builder.build(&detached(&leaves), &detached(&args.leaves))?),
        };
        let observed = match &plain {
            None => Observed::closure(&*field, true),
            Some(plain) => {
                let read = leaves.iter().cloned().chain(args.variables());
                let read = read.filter(Tensor::is_variable).map(|p| p.id());
                Observed::twins(&*field, &**plain, read.collect())
            }
        };
        let graph = (problem.theta.to as usize, problem.grid.is_tracked());
        let kind = check::key(TypeId::of::<Self>(), graph, &[&given, &args.leaves]);
        let wanted = match options.check {
            FieldCheck::Never => false,
            FieldCheck::Once => self.checks_left(kind) > 0,
            FieldCheck::Always => true,
        };
        let wanted = wanted && in_graph && keep && !problem.is_empty();
        let observed = observed.solving(&problem, self.identity, wanted);
        if let Some(listed) = observed.parameters() {
            with_masters(listed, &origin)?;
        }
        let forward = match pass {
            Some(pass) => (pass.advance)(&problem, &observed, &y0, &|| keep)?,
            None => {
                let loss = loss.map(|loss| loss as _);
                run(&problem, &observed, &y0, loss, &|| keep)?
            }
        };
        if let (true, Some(plain)) = (wanted, &plain) {
            let fields: [&Field<'_>; 2] = [&*field, &**plain];
            let sound = self.is_sound(fields, &observed, &builder, &leaves, &args, &problem)?;
            let left = self.checks_left(kind).saturating_sub(1);
            let mut checks = self.checks.lock().unwrap_or_else(PoisonError::into_inner);
            checks.insert(kind, if sound { 0 } else { left });
        }
        observed.settle();
        let read = match problem.is_empty() {
            // Nothing was read: all of them have zero gradients.
            true => leaves.iter().cloned().chain(args.variables()).collect(),
            false => observed.into_parameters(),
        };
        let (read, masters) = with_masters(read, &origin)?;
        let args = args.leaves;
        let rebuild = move || builder.build(&leaves, &args);
        Ok(Solve {
            problem,
            field,
            source: Source::Built(Arc::new(rebuild)),
            theta: Theta::copied(read, masters).with_increments(increments),
            forward,
            y0,
        })
    }

    /// The parameters as the model of one solve reads them, and the user's tensors behind these and behind the
    /// arguments.
    fn leaves(
        &self,
        problem: &Problem,
        masters: Vec<Var>,
        args: &Args,
    ) -> Result<(Vec<Tensor>, HashMap<TensorId, Tensor>)> {
        let mut leaves = Vec::with_capacity(masters.len());
        let mut origin = HashMap::new();
        for (name, master) in self.names.iter().zip(masters) {
            let rounded = problem.theta.round(&master)?;
            if self.frozen.contains(name) {
                // Whatever a field of the user's own makes of it ends here.
                let leaf = rounded.copy()?;
                origin.insert(leaf.id(), leaf.clone());
                leaves.push(leaf);
                continue;
            }
            let leaf = Var::from_tensor(&rounded)?.into_inner();
            origin.insert(leaf.id(), master.into_inner());
            leaves.push(leaf);
        }
        for leaf in args.variables() {
            if let Some(master) = args.master(&leaf) {
                origin.insert(leaf.id(), master.clone());
            }
        }
        Ok((leaves, origin))
    }

    fn builder(&self, problem: &Problem) -> Builder {
        Builder {
            factory: Arc::clone(&self.factory),
            names: self.names.clone(),
            dtype: problem.theta.held,
            device: self.device.clone(),
        }
    }

    /// Compares the field with differences at points of a solve that is done; whether every parameter has shown
    /// that its gradient is right.
    fn is_sound(
        &self,
        [field, twin]: [&Field<'_>; 2],
        observed: &Observed<'_>,
        builder: &Builder,
        leaves: &[Tensor],
        args: &Args,
        problem: &Problem,
    ) -> Result<bool> {
        let named = self.names.iter().zip(leaves);
        let moving = named.filter(|(_, leaf)| leaf.is_variable());
        let parameters = moving.map(|(name, leaf)| Parameter {
            name: format!("parameter {name}"),
            tensor: leaf.clone(),
        });
        let of_args = args.variables().map(|leaf| Parameter {
            name: args.name(&leaf).unwrap_or_default(),
            tensor: leaf,
        });
        let build = |values: &[Tensor]| {
            let (leaves, args) = values.split_at(leaves.len());
            builder.build(leaves, args)
        };
        let subject = Subject {
            field,
            twin,
            parameters: parameters.chain(of_args).collect(),
            mover: &Rebuilt {
                parameters: &[leaves, &args.leaves].concat(),
                build: &build,
            },
            reads_time: problem.grid.is_tracked(),
            reach: observed.reach(),
            strict: false,
        };
        subject.check_all(&observed.points(), problem.state(), problem.device())
    }

    /// The states, and nothing kept.
    pub(crate) fn predict_given<T: Times + ?Sized>(
        &self,
        y0: &S,
        args: &A,
        times: &T,
        drive: Option<&Drive>,
    ) -> Result<S> {
        let before = self.recorded();
        let prepared = self.prepare((&y0.leaves(), args), times, None, false, &self.options)?;
        let Inputs {
            masters, args, y0, ..
        } = prepared;
        let problem = prepared.problem.keeping_nothing();
        let packable = self.packable(&problem, &masters);
        let jumps = packable.as_ref().map_or_else(Vec::new, |f| f.jumps());
        let problem = problem.meeting(&jumps, &self.options)?;
        if let Some(field) = packable {
            let by_noise = driven_of(&problem, drive)?;
            let of_tiles = by_noise.as_ref().unwrap_or(&problem);
            if let Some(forward) = run_tiles(of_tiles, &*field, &y0, None)? {
                self.note(of_tiles, before);
                return states(of_tiles, forward);
            }
        }
        // Copies: the user's own may be written while the solve goes on.
        let copied = |master: &Var| Ok(problem.theta.round(master)?.copy()?);
        let copies = masters.iter().map(copied).collect::<Result<Vec<_>>>()?;
        let field = self
            .builder(&problem)
            .build(&copies, &detached(&args.leaves))?;
        let problem = problem.meeting(&field.jumps(), &self.options)?;
        let problem = driven(problem, drive)?;
        let forward = run(&problem, &*field, &y0, None, &|| false)?;
        self.note(&problem, before);
        states(&problem, forward)
    }
}

/// A forward pass that is not that of [`run`], and the options of the solve.
pub(crate) struct Pass<'a> {
    pub(crate) options: &'a OdeOptions,
    pub(crate) advance: &'a mut Advance<'a>,
}

/// From y0, joined; keeps what a backward pass needs, if it is told so.
type Advance<'a> =
    dyn FnMut(&Problem, &Field<'_>, &Tensor, &dyn Fn() -> bool) -> Result<Forward> + 'a;

/// What a solve was given, checked.
struct Inputs {
    problem: Problem,
    masters: Vec<Var>,
    args: Args,
    y0: Tensor,
}

/// A forward pass that is done, and what its backward pass needs.
pub(crate) struct Solve {
    pub(crate) problem: Problem,
    pub(crate) field: Box<Field<'static>>,
    pub(crate) source: Source,
    pub(crate) theta: Theta,
    pub(crate) forward: Forward,
    pub(crate) y0: Tensor,
}

impl Solve {
    /// The returned states, as part of candle's graph.
    pub(crate) fn in_graph<S: State>(self) -> Result<S> {
        let Self {
            problem,
            source,
            theta,
            forward,
            y0,
            ..
        } = self;
        node(problem, source, theta, forward, &y0)
    }
}

/// The problem driven by noise, if it is to be.
fn driven(problem: Problem, drive: Option<&Drive>) -> Result<Problem> {
    Ok(driven_of(&problem, drive)?.unwrap_or(problem))
}

/// The same, or nothing.
fn driven_of(problem: &Problem, drive: Option<&Drive>) -> Result<Option<Problem>> {
    let of = |drive: &Drive| problem.clone().driven_by(drive.clone());
    drive.map(of).transpose()
}

/// The same tensors without history.
fn detached(tensors: &[Tensor]) -> Vec<Tensor> {
    tensors.iter().map(Tensor::detach).collect()
}

/// The tensors that the field reads, and the user's variables behind them.
fn with_masters(
    leaves: Vec<Tensor>,
    origin: &HashMap<TensorId, Tensor>,
) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let of = |(index, leaf): (usize, &Tensor)| match origin.get(&leaf.id()) {
        Some(master) => Ok(master.clone()),
        None => Err(Error::UnknownParameter { index }),
    };
    let masters = leaves.iter().enumerate().map(of).collect::<Result<_>>()?;
    Ok((leaves, masters))
}
