//! One step, one solve and one adjoint sweep in every precision, on a tanh network of 2-64-64-2; and a
//! backward pass through the output of an encoder.
//!
//! `RAYON_NUM_THREADS=2 cargo bench --bench solve` (a minute); without the variable, candle asks the system for the number
//! of cores in every matrix product.  The device is synchronised before the clock stops.

use std::hint::black_box;

use candle_core::{Device, Tensor, Var};
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::{odeint_with, NeuralOde, OdeOptions, Precision, Solution, Time};
use candle_nn::{linear, Module, VarMap};
use criterion::{criterion_group, criterion_main, BatchSize, Criterion};

const BATCH: usize = 512;
const HIDDEN: usize = 64;
const STEPS: usize = 20;

const PRECISIONS: [(&str, Precision); 4] = [
    ("f64", Precision::f64()),
    ("f32", Precision::f32()),
    ("bf16", Precision::bf16()),
    ("f16", Precision::f16()),
];

/// A network over y, its initial states and a grid of `steps` steps.
struct Solve {
    ode: NeuralOde,
    y0: Tensor,
    times: Vec<f64>,
}

impl Solve {
    fn new(precision: Precision, steps: usize) -> candle_diffeq::Result<Self> {
        let device = Device::Cpu;
        let field = |vb: candle_nn::VarBuilder<'_>| {
            let l1 = linear(2, HIDDEN, vb.pp("l1"))?;
            let l2 = linear(HIDDEN, HIDDEN, vb.pp("l2"))?;
            let l3 = linear(HIDDEN, 2, vb.pp("l3"))?;
            let forward =
                move |y: &Tensor| l3.forward(&l2.forward(&l1.forward(y)?.tanh()?)?.tanh()?);
            Ok(candle_diffeq::fields::autonomous(candle_nn::func(forward)))
        };
        let options = OdeOptions {
            precision: Some(precision),
            output: Output::Final,
            ..Default::default()
        };
        let vars = VarMap::new();
        let ode = NeuralOde::from_field(&vars, "ode", precision.state, &device, field)?;
        let y0 = Tensor::randn(0f32, 1.0, (BATCH, 2), &device)?;
        Ok(Self {
            ode: ode.options(options),
            y0: y0.to_dtype(precision.state)?,
            times: (0..=steps).map(|n| n as f64 / steps as f64).collect(),
        })
    }

    fn forward(&self) -> candle_diffeq::Result<Solution<'static, Tensor>> {
        let solution = self.ode.solution(&self.y0, &self.times)?;
        self.y0.device().synchronize()?;
        Ok(solution)
    }

    fn sweep(&self, solution: &Solution<'_, Tensor>) -> candle_diffeq::Result<Tensor> {
        let cotangent = solution.states().ones_like()?;
        let gradients = solution.vjp(&cotangent)?;
        self.y0.device().synchronize()?;
        Ok(gradients.y0)
    }
}

fn forward(c: &mut Criterion) {
    for (group, steps) in [("step", 1), ("solve", STEPS)] {
        let mut group = c.benchmark_group(group);
        group.sample_size(10);
        for (name, precision) in PRECISIONS {
            let solve = Solve::new(precision, steps).unwrap();
            group.bench_function(name, |b| b.iter(|| black_box(solve.forward().unwrap())));
        }
    }
}

fn adjoint(c: &mut Criterion) {
    let mut group = c.benchmark_group("adjoint");
    group.sample_size(10);
    for (name, precision) in PRECISIONS {
        let solve = Solve::new(precision, STEPS).unwrap();
        group.bench_function(name, |b| {
            b.iter_batched(
                || solve.forward().unwrap(),
                |solution| black_box(solve.sweep(&solution).unwrap()),
                BatchSize::PerIteration,
            );
        });
    }
}

/// Backward through a solve whose field reads the output of an encoder, six layers of 256: given as an
/// argument, beside the same field without an encoder, the encoder alone, and the two of them in one graph without
/// a connection.  On one thread (`RAYON_NUM_THREADS=1`) candle's threads have nothing to wake up for.
fn context(c: &mut Criterion) {
    let device = Device::Cpu;
    let vars = VarMap::new();
    let vb = candle_nn::VarBuilder::from_varmap(&vars, candle_core::DType::F32, &device);
    let layers: Vec<_> = (0..6)
        .map(|i| linear(256, 256, vb.pp(i)).unwrap())
        .collect();
    let x = Tensor::randn(0f32, 1.0, (64, 256), &device).unwrap();
    let encode = || -> candle_core::Result<Tensor> {
        let h = layers
            .iter()
            .try_fold(x.clone(), |h, l| l.forward(&h)?.tanh());
        h?.narrow(1, 0, 4)?.contiguous()
    };
    let y0 = Tensor::randn(0f32, 1.0, (64, 4), &device).unwrap();
    let options = OdeOptions {
        steps: Steps::PerInterval(40),
        output: Output::Final,
        ..Default::default()
    };
    let field = |_: &Time, y: &Tensor, a: &Tensor| (y * a)?.sin();
    let solve = |context: &Tensor| {
        let y = odeint_with(field, &y0, context, &[0.0, 1.0], &options).unwrap();
        y.sqr().unwrap().sum_all().unwrap()
    };
    let mut group = c.benchmark_group("context");
    group.sample_size(20);
    let mut backward = |name, forward: &dyn Fn() -> Tensor| {
        group.bench_function(name, |b| {
            b.iter_batched(
                forward,
                |loss| black_box(loss.backward().unwrap()),
                BatchSize::PerIteration,
            );
        });
    };
    let constant = Var::from_tensor(&encode().unwrap().detach()).unwrap();
    backward("argument", &|| solve(&encode().unwrap()));
    backward("without encoder", &|| solve(constant.as_tensor()));
    backward("encoder alone", &|| encode().unwrap().sum_all().unwrap());
    backward("both, not connected", &|| {
        let encoded = encode().unwrap().sum_all().unwrap();
        (encoded + solve(constant.as_tensor())).unwrap()
    });
}

criterion_group!(benches, forward, adjoint, context);
criterion_main!(benches);
