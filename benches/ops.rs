//! Every fused operation beside the chain of candle's operations that it replaces.
//!
//! `cargo bench --bench ops` (three minutes).  Sizes: a state of a small batch, and one beyond the
//! caches; a layer of 64 at a batch of 512.

use std::hint::black_box;

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_diffeq::nn::{Activation, Cnf, ConvField, Linear, Mlp};
use candle_diffeq::options::Output;
use candle_diffeq::{internals, odeint, OdeOptions, State, VectorField};
use candle_nn::{VarBuilder, VarMap};
use criterion::{criterion_group, criterion_main, BenchmarkGroup, BenchmarkId, Criterion};

type Group<'a> = BenchmarkGroup<'a, criterion::measurement::WallTime>;

/// Elements: 128 KiB of f32, and 16 MiB.
const SIZES: [usize; 2] = [1 << 15, 1 << 22];

fn random(shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

/// The same work in both ways, under the names `fused` and `chain`.
fn compare(group: &mut Group<'_>, size: usize, mut work: impl FnMut(bool)) {
    for (name, fused) in [("fused", true), ("chain", false)] {
        let id = BenchmarkId::new(name, size);
        group.bench_function(id, |b| b.iter(|| work(fused)));
    }
}

fn sums(c: &mut Criterion) {
    // y + h Σ a_j k_j of four stages, in state precision and rounded to what is stored.
    for (name, to) in [
        ("stage sum f32", DType::F32),
        ("stage sum bf16", DType::BF16),
    ] {
        let mut group = c.benchmark_group(name);
        for size in SIZES {
            let x: Vec<_> = (0..5).map(|_| random(size)).collect();
            let terms: Vec<_> = x.iter().map(|x| (0.1, x)).collect();
            compare(&mut group, size, |fused| {
                black_box(internals::combine(fused, &terms, to).unwrap());
            });
        }
    }
    let mut group = c.benchmark_group("gradient accumulation");
    for size in SIZES {
        let (mut acc, x) = (random(size), random(size));
        compare(&mut group, size, |fused| {
            internals::accumulate(fused, &mut acc, 1e-9, &x).unwrap();
        });
    }
    drop(group);
    let mut group = c.benchmark_group("finite check");
    for size in SIZES {
        let x = random(size);
        compare(&mut group, size, |fused| {
            black_box(internals::magnitude(fused, &x).unwrap());
        });
    }
}

/// ∂Σy of a module, through candle's graph.
fn backward(y: Tensor) {
    black_box(y.sum_all().and_then(|y| y.backward()).unwrap());
}

fn modules(c: &mut Criterion) {
    let x = Var::from_tensor(&random((512, 64))).unwrap();
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let ours = Linear::new(64, 64, vb.clone()).unwrap();
    let candles = candle_nn::linear(64, 64, vb).unwrap();
    let linear = |fused: bool| match fused {
        true => ours.forward(&x).unwrap(),
        false => candles.forward(&x).unwrap(),
    };
    let tanh = |fused: bool| match fused {
        true => Activation::Tanh.forward(&x).unwrap(),
        false => x.tanh().unwrap(),
    };
    let parts: [(&str, &dyn Fn(bool) -> Tensor); 2] = [("linear", &linear), ("tanh", &tanh)];
    for (name, module) in parts {
        let mut group = c.benchmark_group(name);
        compare(&mut group, 512, |fused| {
            black_box(module(fused));
        });
        drop(group);
        let mut group = c.benchmark_group(format!("{name}, forward and backward"));
        compare(&mut group, 512, |fused| backward(module(fused)));
    }
}

/// A whole solve of ten steps and its gradients, tile by tile and on the general path.
fn whole<S: State + 'static, F: VectorField<S> + Clone + Send + Sync + 'static>(
    c: &mut Criterion,
    name: &str,
    field: &F,
    y0: &[Tensor],
) {
    let leaves = y0.iter().map(|y| Var::from_tensor(y).unwrap().into_inner());
    let y0 = S::from_leaves(leaves.collect()).unwrap();
    let times: Vec<_> = (0..=10).map(|n| f64::from(n) / 10.0).collect();
    let mut group = c.benchmark_group(name);
    group.sample_size(10);
    compare(&mut group, y0.leaves()[0].elem_count(), |fusion| {
        let options = OdeOptions {
            output: Output::Final,
            fusion,
            ..Default::default()
        };
        let y = odeint(field.clone(), &y0, &times, &options).unwrap();
        backward(y.leaves().swap_remove(0));
    });
}

fn solves(c: &mut Criterion) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let widths = [2, 64, 64, 2];
    let mlp = Mlp::new(&widths, Activation::Tanh, vb.pp("mlp")).unwrap();
    whole::<Tensor, _>(c, "solve, mlp", &mlp, &[random((512, 2))]);
    let cnf = Cnf::new(Mlp::new(&widths, Activation::Tanh, vb.pp("cnf")).unwrap()).unwrap();
    let y0 = [random((512, 2)), random((512, 1))];
    whole::<(Tensor, Tensor), _>(c, "solve, cnf", &cnf, &y0);
    let conv = ConvField::new(&[16, 16, 16], 3, Activation::Relu, vb.pp("conv")).unwrap();
    whole::<Tensor, _>(c, "solve, conv", &conv, &[random((16, 16, 14, 14))]);
}

criterion_group!(benches, sums, modules, solves);
criterion_main!(benches);
