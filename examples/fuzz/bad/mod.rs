//! Inputs that are no problems: each must end in an error, not in a panic and not in a result.

mod fields;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::nn::{Activation, Cnf, ConvField, Mlp};
use candle_diffeq::options::{Checkpoint, Steps, Times};
use candle_diffeq::scaling::{DynamicScaling, Scaling};
use candle_diffeq::tableau::Tableau;
use candle_diffeq::{
    odeint, Error, NeuralOde, OdeOptions, Precision, Result, State, Time, VectorField,
};
use candle_nn::{VarBuilder, VarMap};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::check::{caught, Failure, Kind};

/// What is tried: its words, and the attempt.
type Attempt = (String, Box<dyn FnOnce() -> Result<()>>);

/// The bad input of a seed.
pub(crate) fn run(seed: u64) -> std::result::Result<(), Failure> {
    let rng = &mut StdRng::seed_from_u64(seed);
    let groups = [
        states,
        grids,
        tensor_grids,
        steps,
        options,
        precisions,
        tableaus,
        fields::shapes,
        fields::layers,
        fields::velocities,
        fields::cotangents,
        fields::parameters,
        fields::losses,
        fields::constructors,
        fields::explosions,
    ];
    let (words, attempt) = groups[rng.random_range(0..groups.len())](rng);
    let text = match caught(attempt) {
        Ok(Err(_)) => return Ok(()),
        Ok(Ok(())) => format!("bad input accepted: {words}"),
        Err(panic) => format!("bad input: {words}: {}", panic.text),
    };
    let kind = Kind::BadInput;
    Err(Failure { kind, text })
}

fn attempt(words: impl Into<String>, run: impl FnOnce() -> Result<()> + 'static) -> Attempt {
    (words.into(), Box::new(run))
}

fn pick<T: Clone>(rng: &mut StdRng, of: &[T]) -> T {
    of[rng.random_range(0..of.len())].clone()
}

fn not_finite(rng: &mut StdRng) -> f64 {
    pick(rng, &[f64::NAN, f64::INFINITY, f64::NEG_INFINITY])
}

fn decay(_: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
    y * -0.5
}

fn builder(vars: &VarMap, dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_varmap(vars, dtype, &Device::Cpu)
}

/// Forward and backward of a closure.
fn both<T: Times + ?Sized>(y0: &Tensor, times: &T, options: &OdeOptions) -> Result<()> {
    let y0 = Var::from_tensor(y0)?;
    let ys = odeint(decay, y0.as_tensor(), times, options)?;
    ys.sum_all()?.backward()?;
    Ok(())
}

/// Forward and backward of a field over variables.
fn through<S, F>(
    y0: &S,
    options: OdeOptions,
    vars: &VarMap,
    field: fn(VarBuilder<'_>) -> candle_core::Result<F>,
) -> Result<()>
where
    S: State + 'static,
    F: VectorField<S> + Send + Sync + 'static,
{
    let ode = NeuralOde::<S>::from_field(vars, "f", DType::F32, &Device::Cpu, field)?;
    let ys = ode.options(options).solve(y0, &[0.0, 0.1, 0.3])?;
    for y in ys.leaves() {
        y.sum_all()?.backward()?;
    }
    Ok(())
}

fn ones(shape: &[usize]) -> candle_core::Result<Tensor> {
    Tensor::ones(shape, DType::F32, &Device::Cpu)
}

fn mlp(vb: VarBuilder<'_>) -> candle_core::Result<Mlp> {
    Mlp::new(&[3, 5, 3], Activation::Tanh, vb)
}

fn flow(vb: VarBuilder<'_>) -> candle_core::Result<Cnf> {
    Cnf::new(mlp(vb)?)
}

fn conv(vb: VarBuilder<'_>) -> candle_core::Result<ConvField> {
    ConvField::new(&[3, 4, 3], 3, Activation::Tanh, vb)
}

/// NaN or infinity in y0.
fn states(rng: &mut StdRng) -> Attempt {
    let rows = rng.random_range(1..=40);
    let (x, at) = (not_finite(rng), rng.random_range(0..3 * rows));
    let fusion = pick(rng, &[true, false]);
    let options = OdeOptions {
        fusion,
        ..Default::default()
    };
    let which = rng.random_range(0..5);
    attempt(
        format!("y0 ({rows}, 3) holds {x} at {at}, field {which}, fusion {fusion}"),
        move || {
            let mut y0 = vec![0.5f32; 3 * rows];
            y0[at] = x as f32;
            let y0 = Tensor::from_vec(y0, (rows, 3), &Device::Cpu)?;
            let vars = VarMap::new();
            match which {
                0 => both(&y0, &[0.0, 1.0], &options),
                1 => through(&y0, options, &vars, mlp),
                2 => {
                    let l = Tensor::zeros((rows, 1), DType::F32, &Device::Cpu)?;
                    through(&(y0, l), options, &vars, flow)
                }
                3 => through(&y0.reshape((rows, 3, 1, 1))?, options, &vars, conv),
                // One point: nothing is evaluated.
                _ => both(&y0, &[0.5], &options),
            }
        },
    )
}

fn grids(rng: &mut StdRng) -> Attempt {
    let mut times: Vec<f64> = (0..5).map(|i| f64::from(i) * 0.25).collect();
    let at = rng.random_range(0..5);
    match rng.random_range(0..6) {
        0 => times.clear(),
        1 => times[at] = not_finite(rng),
        2 => times.swap(at, (at + 1) % 5),
        3 => times[at] = times[(at + 1) % 5],
        4 => times = vec![-1.7e308, 1.7e308],
        _ => times = vec![1.0, 1.0 + f64::EPSILON],
    }
    let steps = if times.last() == Some(&(1.0 + f64::EPSILON)) {
        Steps::PerInterval(3)
    } else {
        Steps::PerInterval(1)
    };
    attempt(format!("times {times:?}"), move || {
        let options = OdeOptions {
            steps,
            ..Default::default()
        };
        both(&ones(&[2, 3])?, &times, &options)
    })
}

fn tensor_grids(rng: &mut StdRng) -> Attempt {
    let which = rng.random_range(0..6);
    attempt(format!("a tensor as grid, kind {which}"), move || {
        let grid = Tensor::new(&[0.0, 0.5, 1.0], &Device::Cpu)?;
        let grid = match which {
            0 => grid.reshape((1, 3))?,
            1 => grid.narrow(0, 0, 1)?.reshape(())?,
            2 => grid.to_dtype(DType::F16)?,
            3 => grid.to_dtype(DType::BF16)?,
            4 => Tensor::new(&[0u32, 1, 2], &Device::Cpu)?,
            _ => (grid * f64::NAN)?,
        };
        both(&ones(&[2, 3])?, &grid, &OdeOptions::default())
    })
}

fn steps(rng: &mut StdRng) -> Attempt {
    let sizes = [
        0.0,
        -0.1,
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        1e-300,
    ];
    let steps = match rng.random_range(0..3) {
        0 => Steps::PerInterval(0),
        1 => Steps::PerInterval(usize::MAX),
        _ => Steps::Size(pick(rng, &sizes)),
    };
    attempt(format!("{steps:?}"), move || {
        let options = OdeOptions {
            steps,
            ..Default::default()
        };
        both(&ones(&[2, 3])?, &[0.0, 1.0], &options)
    })
}

fn options(rng: &mut StdRng) -> Attempt {
    let checkpoints = [
        Checkpoint::Every(0),
        Checkpoint::States(0),
        Checkpoint::Bytes(0),
        Checkpoint::Bytes(11),
        Checkpoint::Nothing,
    ];
    let headroom = |headroom: f64| DynamicScaling {
        headroom,
        ..Default::default()
    };
    let scalings = [
        Scaling::Fixed(0.0),
        Scaling::Fixed(-2.0),
        Scaling::Fixed(f64::NAN),
        Scaling::Fixed(f64::INFINITY),
        Scaling::Fixed(1e300),
        Scaling::Dynamic(headroom(f64::NAN)),
        Scaling::Dynamic(headroom(0.5)),
        Scaling::Dynamic(headroom(1e30)),
        Scaling::Dynamic(DynamicScaling {
            max_attempts: 0,
            ..Default::default()
        }),
    ];
    let mut options = OdeOptions::default();
    if pick(rng, &[true, false]) {
        options.checkpoint = pick(rng, &checkpoints);
    } else {
        options.scaling = pick(rng, &scalings);
    }
    let ours = pick(rng, &[true, false]);
    let words = format!(
        "{:?}, {:?}, ours {ours}",
        options.checkpoint, options.scaling
    );
    attempt(words, move || match ours {
        // A tile may be kept in fewer bytes than the whole state.
        true if options.checkpoint == Checkpoint::Bytes(11) => Err(Error::EmptyGrid),
        true => through(&ones(&[2, 3])?, options, &VarMap::new(), mlp),
        false => both(&ones(&[2, 3])?, &[0.0, 1.0], &options),
    })
}

fn precisions(rng: &mut StdRng) -> Attempt {
    let (low, wide) = (DType::BF16, DType::F64);
    let bad = [
        Precision::new(low, low),
        Precision::new(DType::F16, DType::F32),
        Precision::new(DType::F32, wide),
        Precision::f32().store(wide),
        Precision::new(DType::U32, DType::F32),
        Precision::new(DType::F32, DType::I64),
        Precision::f32().store(DType::U8),
    ];
    let which = rng.random_range(0..bad.len() + 5);
    attempt(format!("precision {which}"), move || {
        let mut options = OdeOptions::default();
        let mut y0 = ones(&[2, 3])?;
        match which.checked_sub(bad.len()) {
            None => options.precision = Some(bad[which]),
            Some(0) => options.leaf_precision = vec![Precision::f32(); 2],
            Some(1) => {
                options.precision = Some(Precision::f64());
                options.leaf_precision = vec![Precision::f32()];
            }
            Some(2) => y0 = y0.to_dtype(DType::U32)?,
            Some(3) => y0 = y0.to_dtype(DType::I64)?,
            Some(_) => {
                let none = |_: &Time, y: &Vec<Tensor>| Ok(y.clone());
                odeint(none, &vec![], &[0.0, 1.0], &options)?;
                return Ok(());
            }
        }
        both(&y0, &[0.0, 1.0], &options)
    })
}

fn tableaus(rng: &mut StdRng) -> Attempt {
    let known = pick(rng, &Tableau::ALL);
    let stages = known.stages();
    let mut a: Vec<Vec<f64>> = (0..stages).map(|i| known.a(i).to_vec()).collect();
    let (mut b, mut c) = (known.b().to_vec(), known.c().to_vec());
    let mut order = known.order();
    let at = rng.random_range(0..stages);
    let which = rng.random_range(0..9);
    match which {
        0 => b.clear(),
        1 => b[at] = not_finite(rng),
        2 => c[at] += 0.1,
        3 => a[at].push(0.0),
        4 => order = pick(rng, &[0, 9, usize::MAX]),
        5 => b[at] += 1e-3,
        6 => order += 1,
        7 => drop(a.pop()),
        _ => c.push(1.0),
    }
    if which == 0 {
        (a, c) = (vec![], vec![]);
    }
    attempt(
        format!("{} with defect {which} at {at}", known.name()),
        move || {
            Tableau::new("bad", order, a, b, c)?;
            Ok(())
        },
    )
}
