//! The crate on a problem: what it returns, as numbers.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_diffeq::fields::FieldCheck;
use candle_diffeq::nn::{Activation, Cnf, ConvField, Linear, Mlp, RowLoss};
use candle_diffeq::options::{ActivationCache, Output, Steps, TimeGrid};
use candle_diffeq::scaling::{DynamicScaling, Scaling};
use candle_diffeq::{
    odeint, solution, NeuralOde, OdeOptions, Precision, Result, State, Time, VectorField,
};
use candle_nn::{VarBuilder, VarMap};

use crate::ball::{Balls, Dt};
use crate::case::{Cut, Entry, Field, Given, Plan, Scale};
use crate::problem::Problem;
use crate::program::{Op, Program};

/// What a solve gave; gradients that were not asked for are missing.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Got {
    /// By tensor, all outputs.
    pub(crate) states: Vec<Vec<f64>>,
    pub(crate) loss: Option<f64>,
    pub(crate) y0: Option<Vec<Vec<f64>>>,
    /// By parameter; none of those that are frozen or that no evaluation read.
    pub(crate) params: Vec<Option<Vec<f64>>>,
    pub(crate) times: Option<Vec<f64>>,
}

impl Dt {
    pub(crate) fn candle(self) -> DType {
        match self {
            Self::F64 => DType::F64,
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

/// Solves and differentiates.
///
/// # Errors
/// The crate's.
pub(crate) fn solved(p: &Problem, plan: Plan) -> Result<Got> {
    let inputs = Inputs::new(p, plan)?;
    match p.case.field.clone() {
        Field::Closure { ours, .. } => {
            let program = Arc::new(p.program.clone());
            inputs.run::<Vec<Tensor>, _>(move |vb| Closure::new(&program, ours, &vb))
        }
        Field::Mlp {
            widths,
            activation,
            time,
            residual,
        } => {
            let build = move |vb: VarBuilder<'_>| {
                let mlp = match time {
                    true => Mlp::with_time(&widths, activation, vb)?,
                    false => Mlp::new(&widths, activation, vb)?,
                };
                Ok(if residual { mlp.residual() } else { mlp })
            };
            inputs.run_module(build)
        }
        Field::Cnf {
            widths,
            activation,
            time,
        } => inputs.run::<(Tensor, Tensor), _>(move |vb| {
            Cnf::new(match time {
                true => Mlp::with_time(&widths, activation, vb)?,
                false => Mlp::new(&widths, activation, vb)?,
            })
        }),
        Field::Conv {
            channels,
            size,
            activation,
            groups,
            ..
        } => inputs.run_module(move |vb| match groups {
            0 => ConvField::new(&channels, size, activation, vb),
            _ => ConvField::with_group_norm(&channels, size, groups, activation, vb),
        }),
    }
}

struct Inputs<'p> {
    p: &'p Problem,
    /// Variables, or constants where they are frozen.
    params: Vec<Tensor>,
    vars: Vec<Var>,
    y0: Vec<Tensor>,
    times: Option<Tensor>,
    grid: TimeGrid,
    options: OdeOptions,
}

fn tensor(x: &Balls, shape: &[usize], dt: Dt) -> candle_core::Result<Tensor> {
    Tensor::from_vec(x.x.clone(), shape, &Device::Cpu)?.to_dtype(dt.candle())
}

fn numbers(x: &Tensor) -> candle_core::Result<Vec<f64>> {
    x.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

impl<'p> Inputs<'p> {
    fn new(p: &'p Problem, plan: Plan) -> Result<Self> {
        let masters = p.numbers.masters(p.case.entry);
        let (mut params, mut vars) = (vec![], vec![]);
        for (i, (x, of)) in p.params.iter().zip(&p.program.params).enumerate() {
            let var = Var::from_tensor(&tensor(x, &of.shape, masters)?)?;
            let frozen = i < 64 && p.case.frozen >> i & 1 == 1;
            params.push(if frozen {
                var.as_detached_tensor()
            } else {
                var.as_tensor().clone()
            });
            vars.push(var);
        }
        let mut y0 = vec![];
        for (leaf, x) in p.y0.iter().enumerate() {
            let y = tensor(x, &p.shape(leaf), p.numbers.y0)?;
            y0.push(match p.case.tracked {
                true => Var::from_tensor(&y)?.into_inner(),
                false => y,
            });
        }
        let time = |dt: Dt| Tensor::new(p.times.as_slice(), &Device::Cpu)?.to_dtype(dt.candle());
        let times = match p.case.grid.given {
            Given::Host => None,
            Given::Tensor(dt) => Some(time(dt)?),
            Given::Variable(dt) => Some(Var::from_tensor(&time(dt)?)?.into_inner()),
        };
        let grid = match &times {
            None => TimeGrid::new(p.times.clone())?,
            Some(times) => TimeGrid::from_tensor(times)?,
        };
        Ok(Self {
            options: options(p, plan)?,
            p,
            params,
            vars,
            y0,
            times,
            grid,
        })
    }

    /// Parameters by the names that the field asks for.
    fn builder(&self) -> VarBuilder<'static> {
        let names = self.p.program.params.iter().map(|p| p.name.clone());
        let named: HashMap<_, _> = names.zip(self.params.iter().cloned()).collect();
        VarBuilder::from_tensors(named, self.masters(), &Device::Cpu)
    }

    fn masters(&self) -> DType {
        self.p.numbers.masters(self.p.case.entry).candle()
    }

    fn map(&self) -> VarMap {
        let map = VarMap::new();
        let names = self.p.program.params.iter().map(|p| p.name.clone());
        let mut data = map.data().lock().unwrap_or_else(PoisonError::into_inner);
        data.extend(names.zip(self.vars.iter().cloned()));
        drop(data);
        map
    }

    fn run_module<F>(
        &self,
        build: impl Fn(VarBuilder<'_>) -> candle_core::Result<F> + Send + Sync + 'static,
    ) -> Result<Got>
    where
        F: VectorField<Tensor> + Module + Send + Sync + 'static,
    {
        if self.p.case.entry == Entry::Module {
            return self.run_neural(NeuralOde::new(&self.map(), "", &Device::Cpu, build)?);
        }
        self.run::<Tensor, F>(build)
    }

    fn run<S, F>(
        &self,
        build: impl Fn(VarBuilder<'_>) -> candle_core::Result<F> + Send + Sync + 'static,
    ) -> Result<Got>
    where
        S: State + 'static,
        F: VectorField<S> + Send + Sync + 'static,
    {
        let y0 = S::from_leaves(self.y0.clone())?;
        match self.p.case.entry {
            Entry::Odeint => {
                let ys = odeint(build(self.builder())?, &y0, &self.grid, &self.options)?;
                self.backward(&ys)
            }
            Entry::Solve => {
                let field = build(self.builder())?;
                let solution = solution(&field, &y0, &self.grid, &self.options)?;
                let gradients = solution.vjp(&self.cotangents::<S>()?)?;
                self.pulled(solution.states(), gradients)
            }
            _ => {
                let map = self.map();
                let dtype = self.masters();
                self.run_neural(NeuralOde::from_field(&map, "", dtype, &Device::Cpu, build)?)
            }
        }
    }

    fn run_neural<S: State + 'static>(&self, ode: NeuralOde<S>) -> Result<Got> {
        let ode = ode.options(self.options.clone());
        let y0 = S::from_leaves(self.y0.clone())?;
        let p = self.p;
        let loss = match p.case.entry {
            Entry::Solution => {
                let solution = ode.solution(&y0, &self.grid)?;
                let gradients = solution.vjp(&self.cotangents::<S>()?)?;
                return self.pulled(solution.states(), gradients);
            }
            Entry::Squares => {
                let target = self.cotangents::<S>()?.leaves();
                RowLoss::MeanSquaredError(target[0].clone())
            }
            Entry::Likelihood => RowLoss::GaussianNll,
            Entry::Entropy => {
                RowLoss::CrossEntropy(Tensor::new(p.classes.as_slice(), &Device::Cpu)?)
            }
            _ => return self.backward(&ode.solve(&y0, &self.grid)?),
        };
        let loss = ode.loss(&y0, &self.grid, &loss)?;
        let grads = loss.backward()?;
        Ok(Got {
            loss: Some(numbers(&loss)?[0]),
            ..self.gradients(&grads)?
        })
    }

    /// The cotangents, or the target, as a state of the shapes that are returned.
    fn cotangents<S: State>(&self) -> Result<S> {
        let p = self.p;
        let of = |leaf: usize| -> candle_core::Result<Tensor> {
            let parts = p.cotangents.iter();
            let parts = parts.map(|v| tensor(&v[leaf], &p.shape(leaf), p.numbers.state));
            let parts = parts.collect::<candle_core::Result<Vec<_>>>()?;
            match p.case.is_final {
                true => Ok(parts[0].clone()),
                false => Tensor::stack(&parts, 0),
            }
        };
        let leaves = (0..p.y0.len())
            .map(of)
            .collect::<candle_core::Result<_>>()?;
        S::from_leaves(leaves)
    }

    /// Of Σ ⟨v, y⟩, of which candle makes the cotangents v.
    fn backward<S: State>(&self, ys: &S) -> Result<Got> {
        let states = ys.leaves();
        let mut loss: Option<Tensor> = None;
        for (y, v) in states.iter().zip(self.cotangents::<S>()?.leaves()) {
            let part = (y * v)?.sum_all()?;
            loss = Some(match loss {
                None => part,
                Some(loss) => (loss + part)?,
            });
        }
        let grads = match loss {
            Some(loss) => loss.backward()?,
            None => GradStore::default(),
        };
        Ok(Got {
            states: states
                .iter()
                .map(numbers)
                .collect::<candle_core::Result<_>>()?,
            ..self.gradients(&grads)?
        })
    }

    fn gradients(&self, grads: &GradStore) -> Result<Got> {
        let of = |x: &Tensor| grads.get(x).map(numbers).transpose();
        let mut got = Got::default();
        for p in &self.params {
            got.params.push(of(p)?);
        }
        if self.p.case.tracked {
            let y0 = self.y0.iter().map(|y| Ok(of(y)?.unwrap_or_default()));
            got.y0 = Some(y0.collect::<Result<_>>()?);
        }
        if let (Given::Variable(_), Some(times)) = (self.p.case.grid.given, &self.times) {
            got.times = Some(of(times)?.unwrap_or_default());
        }
        Ok(got)
    }

    fn pulled<S: State>(&self, states: &S, of: candle_diffeq::Gradients<S>) -> Result<Got> {
        let all = |s: &S| {
            s.leaves()
                .iter()
                .map(numbers)
                .collect::<candle_core::Result<Vec<_>>>()
        };
        let mut got = Got {
            states: all(states)?,
            y0: Some(all(&of.y0)?),
            times: of.times.as_ref().map(numbers).transpose()?,
            ..Got::default()
        };
        for p in &self.params {
            got.params.push(of.params.get(p).map(numbers).transpose()?);
        }
        Ok(got)
    }
}

fn options(p: &Problem, plan: Plan) -> Result<OdeOptions> {
    let (case, n) = (&p.case, p.numbers);
    let precision = |compute: Dt| {
        let plain = Precision::new(n.state.candle(), compute.candle()).store(n.store.candle());
        match n.compensated {
            true => plain.compensated(),
            false => plain,
        }
    };
    let leaves = 0..p.y0.len();
    Ok(OdeOptions {
        method: case.method.tableau()?,
        precision: n.explicit.then(|| precision(n.compute)),
        leaf_precision: match n.last {
            None => vec![],
            Some(_) => leaves.map(|leaf| precision(n.compute(leaf))).collect(),
        },
        steps: match case.steps {
            Cut::PerInterval(m) => Steps::PerInterval(m),
            Cut::Size(_) => Steps::Size(p.size),
        },
        output: if case.is_final {
            Output::Final
        } else {
            Output::All
        },
        checkpoint: plan.checkpoint(p),
        activation_cache: match case.cache.low {
            true => ActivationCache::within(case.cache.bytes).in_bf16(),
            false => ActivationCache::within(case.cache.bytes),
        },
        fusion: case.fusion,
        // Not once: what comes of a case follows from its seed alone.
        check: match case.checked {
            true => FieldCheck::Always,
            false => FieldCheck::Never,
        },
        scaling: match case.scaling {
            Scale::Auto => Scaling::Auto,
            Scale::Off => Scaling::Off,
            Scale::Fixed(scale) => Scaling::Fixed(2f64.powi(scale)),
            Scale::Dynamic(headroom) => Scaling::Dynamic(DynamicScaling {
                headroom: 2f64.powi(headroom),
                ..Default::default()
            }),
        },
        ..Default::default()
    })
}

/// A program in candle's operations.
struct Closure {
    program: Arc<Program>,
    params: Vec<Tensor>,
    ours: bool,
}

impl Closure {
    fn new(program: &Arc<Program>, ours: bool, vb: &VarBuilder<'_>) -> candle_core::Result<Self> {
        let get = |p: &crate::program::Param| vb.get(p.shape.as_slice(), &p.name);
        Ok(Self {
            params: program
                .params
                .iter()
                .map(get)
                .collect::<candle_core::Result<_>>()?,
            program: Arc::clone(program),
            ours,
        })
    }

    fn affine(&self, x: &Tensor, w: usize, b: Option<usize>) -> candle_core::Result<Tensor> {
        let (w, b) = (&self.params[w], b.map(|b| &self.params[b]));
        if self.ours {
            let layer = candle_nn::Linear::new(w.clone(), b.cloned());
            return Linear::from(layer).forward(x);
        }
        let y = x.matmul(&w.t()?)?;
        match b {
            Some(b) => y.broadcast_add(b),
            None => Ok(y),
        }
    }

    fn act(&self, x: &Tensor, activation: Activation) -> candle_core::Result<Tensor> {
        match activation {
            _ if self.ours => activation.forward(x),
            Activation::Tanh => x.tanh(),
            Activation::Sigmoid => candle_nn::ops::sigmoid(x),
            Activation::Relu => x.relu(),
            Activation::Silu => x.silu(),
            Activation::Sin => x.sin(),
            // candle has no softplus nor this, and a gradient of gelu of eight digits.
            Activation::Softplus | Activation::Gelu | Activation::LogTwoCosh => {
                activation.forward(x)
            }
        }
    }
}

impl VectorField<Vec<Tensor>> for Closure {
    fn is_traced(&self) -> bool {
        true
    }

    fn velocity(&self, t: &Time, y: &Vec<Tensor>) -> candle_core::Result<Vec<Tensor>> {
        let of = &self.program;
        let mut all: Vec<Tensor> = Vec::with_capacity(of.ops.len());
        for op in &of.ops {
            let next = match op {
                Op::State(leaf) => y[*leaf].reshape(of.leaves[*leaf])?,
                Op::Param(p) => {
                    let matrix = (of.params[*p].rows, of.params[*p].cols);
                    self.params[*p].reshape(matrix)?
                }
                Op::Time => t.tensor()?.to_dtype(y[0].dtype())?.reshape((1, 1))?,
                Op::Affine { x, w, b } => self.affine(&all[*x], *w, *b)?,
                Op::Act { x, activation, .. } => self.act(&all[*x], *activation)?,
                Op::Add(a, b) => all[*a].broadcast_add(&all[*b])?,
                Op::Mul(a, b) => all[*a].broadcast_mul(&all[*b])?,
                Op::Scale(x, c) => (&all[*x] * *c)?,
                Op::SumCols(x) => all[*x].sum_keepdim(1)?,
                Op::MeanRows(x) => all[*x].mean_keepdim(0)?,
                Op::Concat(a, b) => Tensor::cat(&[&all[*a], &all[*b]], 1)?,
                Op::Slice { x, from, n } => all[*x].narrow(1, *from, *n)?,
                Op::Column { .. }
                | Op::Conv { .. }
                | Op::GroupMean { .. }
                | Op::Spread { .. }
                | Op::RSqrt { .. } => candle_core::bail!("closures have no such operation"),
            };
            all.push(next);
        }
        let outputs = of.outputs.iter().zip(y);
        outputs.map(|(&o, y)| all[o].reshape(y.shape())).collect()
    }
}
