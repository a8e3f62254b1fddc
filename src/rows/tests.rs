//! Solves tile by tile are those of the general path: on every vector unit of the machine, in tiles of
//! one vector and of two, of any width, batch and depth.
//!
//! The unit of a process is chosen once, so the whole suite speaks of one.  Here each case runs on
//! all of them, the thread that solves being under a cap; and in tiles of both widths, of which the
//! batch would choose one.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use proptest::prelude::*;

use crate::nn::energy::{Energy, GradientFlow, Hamiltonian};
use crate::nn::{
    Activation, Cnf, ConvField, EnergyMlp, Hutchinson, HyperCnf, Mlp, OtFlow, RowLoss,
};
use crate::options::{ActivationCache, Adaptive, Checkpoint, Output, StepControl, Steps};
use crate::simd::unit::{allowed, Cap};
use crate::tableau::{DOPRI5, EULER, HEUN, RK4};
use crate::{NeuralOde, OdeOptions, Precision, State};

/// Tiles of another width than the batch would choose, for this thread.
pub(super) mod width {
    use std::cell::Cell;

    thread_local! {
        static WIDE: Cell<Option<bool>> = const { Cell::new(None) };
    }

    pub(in crate::rows) fn here() -> Option<bool> {
        WIDE.get()
    }

    /// Runs `f`, whose solves on this thread have tiles of two vectors, or of one.
    pub(super) fn forced<R>(wide: bool, f: impl FnOnce() -> R) -> R {
        struct Restored(Option<bool>);
        impl Drop for Restored {
            fn drop(&mut self) {
                WIDE.set(self.0);
            }
        }
        let _restored = Restored(WIDE.replace(Some(wide)));
        f()
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Mlp {
        residual: bool,
    },
    Cnf,
    /// A flow whose trace is estimated.
    Estimated {
        residual: bool,
    },
    Conv {
        size: usize,
        image: [usize; 2],
    },
    Energy {
        energy: Energy,
        symplectic: bool,
    },
    /// With as many rows of A.
    Potential {
        rank: usize,
    },
    /// With as many hidden units of the network of time.
    Hyper {
        of_time: usize,
    },
}

#[derive(Clone, Debug)]
struct Case {
    kind: Kind,
    /// Features of the state and of the hidden layers; channels of a convolution.
    state: usize,
    hidden: Vec<usize>,
    activation: Activation,
    time: bool,
    rows: usize,
    times: Vec<f64>,
    options: OdeOptions,
    /// Whether it is a loss inside the solve.
    graded: bool,
    compensated: bool,
}

/// Numbers in (−size, size) that look random, of f32, so that both dtypes see the same.  Sines of
/// equidistant numbers would be matrices of rank two, whose norms grow with their sizes.
fn scattered(shape: &[usize], size: f64, seed: usize, dtype: DType) -> Tensor {
    let n: usize = shape.iter().product();
    let at = |i: usize| {
        let x = 43758.5453 * (12.9898 * (i + 1) as f64 + 4.1414 * seed as f64).sin();
        size * (2.0 * (x - x.floor()) - 1.0)
    };
    let numbers: Vec<f32> = (0..n).map(|i| at(i) as f32).collect();
    let x = Tensor::from_vec(numbers, shape, &Device::Cpu);
    x.and_then(|x| x.to_dtype(dtype)).unwrap()
}

fn values(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).and_then(|x| x.flatten_all());
    x.and_then(|x| x.to_vec1()).unwrap()
}

/// The names and variables of a map, sorted.
fn all(vars: &VarMap) -> Vec<(String, Var)> {
    let data = vars.data().lock().unwrap();
    let mut all: Vec<_> = data.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// What comes out: states or the loss, gradients of y0, gradients of all parameters.
type Answers = [Vec<f64>; 3];

/// max |x − exact| / max |exact| of each.
fn errors(got: &Answers, exact: &Answers) -> [f64; 3] {
    [0, 1, 2].map(|i| {
        assert_eq!(got[i].len(), exact[i].len());
        let largest = |x: &mut dyn Iterator<Item = f64>| x.map(f64::abs).fold(0.0, f64::max);
        let size = largest(&mut exact[i].iter().copied());
        let pairs = got[i].iter().zip(&exact[i]);
        let differences = pairs.map(|(x, e)| x - e);
        // A NaN would be lost in a maximum.
        assert!(differences.clone().all(f64::is_finite));
        largest(&mut { differences }) / size.max(1e-30)
    })
}

impl Case {
    fn widths(&self) -> Vec<usize> {
        [&[self.state], &self.hidden[..], &[self.state]].concat()
    }

    /// A potential of one output, or of as many as features.
    fn energy(&self, energy: Energy, vb: VarBuilder<'_>) -> candle_core::Result<EnergyMlp> {
        let outputs = match energy {
            Energy::Output => 1,
            Energy::SumOfSquares => self.state,
        };
        let widths = [&[self.state], &self.hidden[..], &[outputs]].concat();
        match self.time {
            true => EnergyMlp::with_time(&widths, self.activation, energy, vb),
            false => EnergyMlp::new(&widths, self.activation, energy, vb),
        }
    }

    fn mlp(&self, vb: VarBuilder<'_>) -> candle_core::Result<Mlp> {
        match self.time {
            true => Mlp::with_time(&self.widths(), self.activation, vb),
            false => Mlp::new(&self.widths(), self.activation, vb),
        }
    }

    /// Layers, one after the other, through which the longest sum goes.
    fn terms(&self) -> usize {
        let widest = self.widths().into_iter().max().unwrap_or(1);
        let (taps, pixels) = match self.kind {
            Kind::Conv { size, image } => (size * size, image[0] * image[1]),
            // Of the trace.
            Kind::Potential { .. } => (self.state, 1),
            _ => (1, 1),
        };
        let evaluations = self.options.method.stages() * 3 * self.times.len();
        widest * taps + self.rows * pixels * evaluations
    }

    /// What the roundings of a sum of terms of any sign come to, of as many terms as the network of time has outputs: each
    /// of its hidden units is given one such sum, which cancels.
    fn walk(&self) -> f64 {
        match self.kind {
            Kind::Hyper { .. } => ((3 * self.state + 1) as f64 * self.hidden[0] as f64).sqrt(),
            _ => 0.0,
        }
    }

    fn answers(&self, dtype: DType, fusion: bool) -> Answers {
        let (vars, case) = (VarMap::new(), self.clone());
        let start = |shape: &[usize]| scattered(shape, 1.0, 1, dtype);
        match self.kind {
            Kind::Mlp { residual } => {
                let build = move |vb: VarBuilder<'_>| {
                    let mlp = case.mlp(vb)?;
                    Ok(if residual { mlp.residual() } else { mlp })
                };
                let ode = NeuralOde::from_field(&vars, "", dtype, &Device::Cpu, build);
                let y0 = [start(&[self.rows, self.state])];
                self.solved::<Tensor>(ode.unwrap(), &vars, &y0, fusion)
            }
            Kind::Cnf => {
                let build = move |vb: VarBuilder<'_>| Cnf::new(case.mlp(vb)?);
                let ode = NeuralOde::from_field(&vars, "", dtype, &Device::Cpu, build);
                let y0 = [start(&[self.rows, self.state]), start(&[self.rows, 1])];
                self.solved::<(Tensor, Tensor)>(ode.unwrap(), &vars, &y0, fusion)
            }
            Kind::Estimated { residual } => {
                let build = move |vb: VarBuilder<'_>| {
                    let mlp = case.mlp(vb)?;
                    Ok(Hutchinson::new(match residual {
                        true => mlp.residual(),
                        false => mlp,
                    }))
                };
                let ode = NeuralOde::from_field(&vars, "", dtype, &Device::Cpu, build);
                let probe = scattered(&[self.rows, self.state], 1.5, 2, dtype);
                let z = start(&[self.rows, self.state]);
                let y0 = [z, start(&[self.rows, 1]), probe];
                self.solved::<(Tensor, Tensor, Tensor)>(ode.unwrap(), &vars, &y0, fusion)
            }
            Kind::Potential { rank } => {
                let build =
                    move |vb: VarBuilder<'_>| OtFlow::new(case.state, case.hidden[0], rank, vb);
                let ode = NeuralOde::from_field(&vars, "", dtype, &Device::Cpu, build);
                let y0 = [start(&[self.rows, self.state]), start(&[self.rows, 3])];
                self.solved::<(Tensor, Tensor)>(ode.unwrap(), &vars, &y0, fusion)
            }
            Kind::Hyper { of_time } => {
                let build = move |vb: VarBuilder<'_>| {
                    HyperCnf::new(case.state, case.hidden[0], of_time, vb)
                };
                let ode = NeuralOde::from_field(&vars, "", dtype, &Device::Cpu, build);
                let y0 = [start(&[self.rows, self.state]), start(&[self.rows, 1])];
                self.solved::<(Tensor, Tensor)>(ode.unwrap(), &vars, &y0, fusion)
            }
            Kind::Conv { size, image } => {
                let build = move |vb: VarBuilder<'_>| {
                    ConvField::new(&case.widths(), size, case.activation, vb)
                };
                let ode = NeuralOde::from_field(&vars, "", dtype, &Device::Cpu, build);
                let y0 = [start(&[self.rows, self.state, image[0], image[1]])];
                self.solved::<Tensor>(ode.unwrap(), &vars, &y0, fusion)
            }
            Kind::Energy { energy, symplectic } => {
                let (device, y0) = (Device::Cpu, [start(&[self.rows, self.state])]);
                let ode = if symplectic {
                    NeuralOde::from_field(&vars, "", dtype, &device, move |vb| {
                        Ok(Hamiltonian::new(case.energy(energy, vb)?))
                    })
                } else {
                    NeuralOde::from_field(&vars, "", dtype, &device, move |vb| {
                        Ok(GradientFlow::new(case.energy(energy, vb)?))
                    })
                };
                self.solved::<Tensor>(ode.unwrap(), &vars, &y0, fusion)
            }
        }
    }

    fn solved<S: State + 'static>(
        &self,
        ode: NeuralOde<S>,
        vars: &VarMap,
        y0: &[Tensor],
        fusion: bool,
    ) -> Answers {
        for (seed, (_, var)) in all(vars).iter().enumerate() {
            // What goes through a layer stays near one.
            let inputs = var.elem_count() as f64 / var.dims()[0] as f64;
            let size = 1.2 / inputs.sqrt();
            let x = scattered(var.dims(), size, 3 + seed, var.dtype());
            var.set(&x).unwrap();
        }
        if let Kind::Potential { rank } = self.kind {
            // ∂Φ/∂t − ½‖∇Φ‖² is far from its kink at 0, on one side or the other.
            let (_, c) = all(vars).into_iter().find(|(name, _)| name == "c").unwrap();
            let size = 40.0 + self.state as f64;
            let last = if rank % 2 == 0 { size } else { -size };
            let of_x = c.narrow(0, 0, self.state).unwrap();
            let last = Tensor::full(last, 1, &Device::Cpu).and_then(|x| x.to_dtype(c.dtype()));
            c.set(&Tensor::cat(&[&of_x, &last.unwrap()], 0).unwrap())
                .unwrap();
        }
        let plain = Precision::new(y0[0].dtype(), y0[0].dtype());
        let ode = ode.options(OdeOptions {
            fusion,
            precision: self.compensated.then(|| plain.compensated()),
            ..self.options.clone()
        });
        let y0: Vec<_> = y0.iter().map(|y| Var::from_tensor(y).unwrap()).collect();
        let start = S::from_leaves(y0.iter().map(|y| y.as_tensor().clone()).collect()).unwrap();
        let (loss, seen) = if self.graded {
            let loss = match self.kind {
                Kind::Cnf | Kind::Hyper { .. } => RowLoss::GaussianNll,
                _ => {
                    let times = match self.options.output {
                        Output::All | Output::Steps => vec![self.times.len()],
                        Output::Final => vec![],
                    };
                    let shape = [&times[..], y0[0].dims()].concat();
                    RowLoss::MeanSquaredError(scattered(&shape, 1.0, 40, y0[0].dtype()))
                }
            };
            let loss = ode.loss(&start, &self.times[..], &loss).unwrap();
            (loss.clone(), values(&loss))
        } else {
            let states = ode.solve(&start, &self.times[..]).unwrap().leaves();
            let weighted = |(i, y): (usize, &Tensor)| {
                // Of one sign, lest gradients cancel.
                let weights = (scattered(y.dims(), 0.5, 50 + i, y.dtype()) + 1.0)?;
                (y * weights)?.sum_all()
            };
            let mut parts = states.iter().enumerate().map(weighted);
            let first = parts.next().unwrap();
            let loss = parts.fold(first, |sum, part| sum? + part?).unwrap();
            (loss, states.iter().flat_map(values).collect())
        };
        let grads = loss.backward().unwrap();
        let of = |var: &Var| values(grads.get(var).unwrap());
        let parameters = all(vars).iter().flat_map(|(_, var)| of(var)).collect();
        [seen, y0.iter().flat_map(of).collect(), parameters]
    }

    /// Checks all units and both widths of tiles.
    fn check(&self) {
        // candle's operations on one thread: waking another takes longer than they.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        let pool = pool.unwrap();
        let general = |dtype| pool.install(|| self.answers(dtype, false));
        let exact = general(DType::F64);
        let general = errors(&general(DType::F32), &exact);
        let of = |unit: f64| 2.0 * self.terms() as f64 * unit;
        for cap in allowed::all() {
            let double = allowed::under(cap, || self.answers(DType::F64, true));
            for error in errors(&double, &exact) {
                assert!(error <= of(2f64.powi(-53)), "{cap:?}, f64: {error:e}");
            }
            // A roundoff may move a unit of relu over its kink.
            if self.activation == Activation::Relu {
                continue;
            }
            // Without a unit there are no tiles.
            let widths: &[bool] = if cap == Cap::None {
                &[false]
            } else {
                &[false, true]
            };
            for &wide in widths {
                let solve = || width::forced(wide, || self.answers(DType::F32, true));
                let single = errors(&allowed::under(cap, solve), &exact);
                for (error, general) in single.iter().zip(general) {
                    // Where a gradient cancels, the general path loses as many digits.
                    // Sums of n terms walk away by √n roundings.
                    let sums = (self.terms() as f64).sqrt();
                    let bound = (16.0 + self.walk() + sums) * 2f64.powi(-24) + general;
                    assert!(
                        *error <= bound,
                        "{cap:?}, f32, wide {wide}: {single:?}, {general:e}"
                    );
                }
            }
        }
    }
}

/// Widths from 1 to 130, of which small ones and those around whole vectors are tried more often.
fn width_of_layer() -> impl Strategy<Value = usize> {
    let around = (1..=16usize, 0..3usize).prop_map(|(n, off)| (8 * n + off).saturating_sub(1));
    prop_oneof![1..=20usize, around, 1..=130usize]
}

fn options() -> impl Strategy<Value = OdeOptions> {
    let methods = prop::sample::select(vec![EULER, HEUN, RK4, DOPRI5]);
    let outputs = prop::sample::select(vec![Output::All, Output::Final]);
    let plans = vec![Checkpoint::All, Checkpoint::Every(2), Checkpoint::States(2)];
    let caches = vec![
        ActivationCache::NONE,
        ActivationCache::within(40_000),
        ActivationCache::ALL,
    ];
    let kept = (
        prop::sample::select(plans),
        prop::sample::select(caches),
        1..3usize,
    );
    (methods, outputs, kept).prop_map(|(method, output, (checkpoint, activation_cache, steps))| {
        OdeOptions {
            method,
            output,
            checkpoint,
            activation_cache,
            steps: Steps::PerInterval(steps),
            ..Default::default()
        }
    })
}

prop_compose! {
    fn cases(kind: fn() -> BoxedStrategy<Kind>, hidden: std::ops::Range<usize>)(
        kind in kind(),
        state in width_of_layer(),
        hidden in prop::collection::vec(width_of_layer(), hidden),
        which in 0..Activation::ALL.len(),
        time in any::<bool>(),
        rows in 1..=70usize,
        backwards in any::<bool>(),
        options in options(),
        graded in any::<bool>(),
        compensated in any::<bool>(),
    ) -> Case {
        let mut options = options;
        if graded && matches!(kind, Kind::Cnf | Kind::Hyper { .. }) {
            options.output = Output::Final;
        }
        let times = if backwards { vec![0.5, 0.3, 0.2] } else { vec![0.0, 0.1, 0.4] };
        Case { kind, state, hidden, activation: Activation::ALL[which], time, rows, times, options, graded, compensated }
    }
}

fn perceptrons() -> BoxedStrategy<Kind> {
    any::<bool>()
        .prop_map(|residual| Kind::Mlp { residual })
        .boxed()
}

fn flows() -> BoxedStrategy<Kind> {
    Just(Kind::Cnf).boxed()
}

fn estimated_flows() -> BoxedStrategy<Kind> {
    any::<bool>()
        .prop_map(|residual| Kind::Estimated { residual })
        .boxed()
}

fn potentials() -> BoxedStrategy<Kind> {
    (1..=20usize)
        .prop_map(|rank| Kind::Potential { rank })
        .boxed()
}

fn flows_of_time() -> BoxedStrategy<Kind> {
    (1..=40usize)
        .prop_map(|of_time| Kind::Hyper { of_time })
        .boxed()
}

fn convolutions() -> BoxedStrategy<Kind> {
    let sizes = prop::sample::select(vec![1usize, 3, 5]);
    (sizes, 1..=5usize, 1..=5usize)
        .prop_map(|(size, height, width)| Kind::Conv {
            size,
            image: [height, width],
        })
        .boxed()
}

fn gradients() -> BoxedStrategy<Kind> {
    let energies = prop::sample::select(vec![Energy::Output, Energy::SumOfSquares]);
    (energies, any::<bool>())
        .prop_map(|(energy, symplectic)| Kind::Energy { energy, symplectic })
        .boxed()
}

/// Products that a case may cost an evaluation, lest candle's convolutions take minutes.
const MOST: usize = 4_000_000;

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn perceptrons_are_solved_alike_on_every_unit(case in cases(perceptrons, 0..3)) {
        case.check();
    }

    #[test]
    fn flows_are_solved_alike_on_every_unit(case in cases(flows, 1..3)) {
        case.check();
    }

    #[test]
    fn flows_of_an_estimated_trace_are_solved_alike_on_every_unit(
        mut case in cases(estimated_flows, 0..4),
    ) {
        // A loss in the solve is of one tensor, or of two.
        case.graded = false;
        case.check();
    }

    #[test]
    fn gradients_of_potentials_are_solved_alike_on_every_unit(mut case in cases(gradients, 1..4)) {
        let Kind::Energy { symplectic, .. } = case.kind else { unreachable!() };
        if symplectic {
            // Coordinates and as many momenta.
            case.state += case.state % 2;
        }
        if case.activation == Activation::Relu {
            case.activation = Activation::Tanh;
        }
        case.check();
    }

    #[test]
    fn flows_of_potentials_are_solved_alike_on_every_unit(mut case in cases(potentials, 1..2)) {
        let evaluation = case.hidden[0] * case.hidden[0] * (case.state + 4);
        case.rows = case.rows.min((MOST / evaluation).max(1));
        // A loss in the solve is of one tensor, or of a flow.
        case.graded = false;
        case.check();
    }

    #[test]
    fn flows_whose_weights_depend_on_time_are_solved_alike_on_every_unit(
        case in cases(flows_of_time, 1..2),
    ) {
        case.check();
    }

    #[test]
    fn convolutions_are_solved_alike_on_every_unit(mut case in cases(convolutions, 0..3)) {
        let Kind::Conv { size, image } = case.kind else { unreachable!() };
        let products: usize = case.widths().windows(2).map(|w| w[0] * w[1]).sum();
        let row = products * size * size * image[0] * image[1];
        case.rows = case.rows.min((MOST / row).max(1));
        case.check();
    }
}

/// Layers thinner than a vector, and than a line of the cache, of every depth that tiles have.
#[test]
fn thin_flows_have_gradients_on_every_unit() {
    for (state, hidden) in [
        (3, vec![8]),
        (3, vec![5]),
        (3, vec![5, 8]),
        (2, vec![8]),
        (1, vec![1]),
        (1, vec![1, 1]),
        (130, vec![1, 130]),
    ] {
        for rows in [1, 4, 33] {
            let case = Case {
                kind: Kind::Cnf,
                state,
                hidden: hidden.clone(),
                activation: Activation::Tanh,
                time: false,
                rows,
                times: vec![0.0, 1.0],
                options: OdeOptions::default(),
                graded: false,
                compensated: false,
            };
            case.check();
        }
    }
}

/// A row with adaptive steps of its own has the same bits in tiles of any width, and on every unit whose activation
/// has the same bits: in f32 that of relu only, since units divide differently.
#[test]
fn adaptive_rows_have_the_same_bits_on_every_unit_and_in_tiles_of_every_width() {
    let image = [3, 2];
    let kinds = [
        Kind::Mlp { residual: false },
        Kind::Cnf,
        Kind::Estimated { residual: true },
        Kind::Conv { size: 3, image },
    ];
    let cases = kinds.into_iter().flat_map(|kind| {
        [DType::F32, DType::F64]
            .map(|dtype| [Activation::Softplus, Activation::Relu].map(|a| (kind, dtype, a)))
    });
    for (kind, dtype, activation) in cases.flatten() {
        let adaptive = Adaptive::new(1e-5, 1e-7).control(StepControl::Rows);
        let case = Case {
            kind,
            state: 3,
            hidden: vec![17],
            activation,
            time: true,
            rows: 150,
            times: vec![0.0, 0.3, 1.0],
            options: OdeOptions {
                method: DOPRI5,
                steps: Steps::Adaptive(adaptive),
                ..Default::default()
            },
            graded: false,
            compensated: matches!(kind, Kind::Cnf),
        };
        let bits = |x: &[f64]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let alike = dtype == DType::F64 || activation == Activation::Relu;
        let mut first = None;
        for cap in allowed::all().into_iter().filter(|cap| *cap != Cap::None) {
            if !alike {
                first = None;
            }
            for wide in [false, true] {
                let solve = || width::forced(wide, || case.answers(dtype, true));
                let [states, y0, _] = allowed::under(cap, solve);
                let got = [bits(&states), bits(&y0)];
                let wanted = first.get_or_insert_with(|| got.clone());
                assert!(
                    got == *wanted,
                    "{kind:?} {dtype:?} {activation:?} {cap:?}, wide {wide}"
                );
            }
        }
    }
}
