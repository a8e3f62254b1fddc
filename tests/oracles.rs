//! Solutions and gradients against independent implementations in f64, from the files in
//! `tests/data`; the same comparisons as `examples/conformance` prints.
//!
//! `cargo test --test oracles`, seconds.

#[path = "../src/every_core.rs"]
mod every_core;

use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_diffeq::{scaling::Scaling, Precision};

#[path = "../examples/conformance/demo.rs"]
mod demo;
#[path = "../examples/conformance/discrete.rs"]
mod discrete;
#[path = "../examples/conformance/fields.rs"]
mod fields;
#[path = "../examples/conformance/low_precision.rs"]
#[allow(dead_code)]
mod low_precision;
#[path = "../examples/conformance/oracle.rs"]
mod oracle;
#[path = "../examples/conformance/outcome.rs"]
mod outcome;

use low_precision::Recipe;
use oracle::Oracle;
use outcome::QUANTITIES;

fn data(dir: &str) -> PathBuf {
    // Where the test runs, which need not be where it was compiled.
    let root = std::env::var_os("CARGO_MANIFEST_DIR");
    let root = root.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    root.join("tests/data").join(dir)
}

/// The CPU and, in a build for CUDA, the GPU if there is one.
fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    if cfg!(feature = "cuda") {
        match Device::new_cuda(0) {
            Ok(gpu) => devices.push(gpu),
            Err(error) => {
                let needed = std::env::var_os("CANDLE_DIFFEQ_NEEDS_GPU").is_some();
                assert!(!needed, "a GPU is needed: {error}");
                eprintln!("NOT RUN on CUDA: no device");
            }
        }
    }
    devices
}

fn problems(device: &Device) -> Vec<Oracle> {
    let oracles = Oracle::read_all(&data("discrete")).unwrap();
    let (oracles, skipped) = discrete::usable(oracles).unwrap();
    assert_eq!((oracles.len(), skipped.len()), (fields::FIELDS.len(), 0));
    let there = oracles.into_iter().map(|oracle| oracle.on(device));
    there.collect::<oracle::Result<_>>().unwrap()
}

#[test]
fn f64_solutions_and_all_gradients_are_those_of_the_oracles() {
    for device in devices() {
        // 22 unit roundoffs measured on the CPU, over at most 20 steps of 4 stages.
        let bound = match device.is_cpu() {
            true => 64.0 * f64::EPSILON / 2.0,
            false => 1e-12,
        };
        for oracle in &problems(&device) {
            for method in &discrete::METHODS {
                let solved = discrete::solved(oracle, method, Precision::f64()).unwrap();
                let errors = solved.worst_parts(&discrete::exact(oracle, method).unwrap());
                for ((e, part), quantity) in errors.into_iter().zip(QUANTITIES) {
                    let (file, method) = (&oracle.file, method.name());
                    assert!(e <= bound, "{file} {method} {quantity} {part}: {e:e}");
                }
            }
        }
    }
}

/// Each mean within the bars: at most twice what sums in f32 allow, never above rampde.
fn holds(recipe: &Recipe) {
    for device in devices() {
        let problems = problems(&device);
        let rows = problems
            .iter()
            .map(|oracle| low_precision::errors(oracle, recipe));
        let rows: Vec<_> = rows.collect::<oracle::Result<_>>().unwrap();
        let (means, bars) = (low_precision::geometric_mean(&rows), recipe.bars());
        for ((mean, bar), quantity) in means.into_iter().zip(bars).zip(QUANTITIES) {
            assert!(mean <= bar, "{device:?} {quantity}: {mean:e} > {bar:e}");
        }
    }
}

#[test]
fn bf16_errors_are_those_of_f32_sums_and_below_rampdes() {
    holds(&low_precision::BF16);
}

#[test]
fn f16_errors_are_those_of_f32_sums_and_below_rampdes() {
    holds(&low_precision::F16);
}

#[test]
fn an_adjoint_that_underflows_f16_is_kept_by_scaling_and_lost_without() {
    let oracles = Oracle::read_all(&data("demo_f16")).unwrap();
    assert_eq!(oracles.len(), 7);
    let everywhere = devices().into_iter().flat_map(|device| {
        let read = Oracle::read_all(&data("demo_f16")).unwrap();
        read.into_iter()
            .map(move |oracle| oracle.on(&device).unwrap())
    });
    for oracle in &everywhere.collect::<Vec<_>>() {
        let bar = demo::bar(oracle);
        let scaled = demo::run(oracle, Scaling::Auto).unwrap();
        let unscaled = demo::run(oracle, Scaling::Off).unwrap();
        assert!(scaled.worst() <= bar.scaled, "{}", oracle.file);
        assert_eq!(scaled.vjps_per_stage, 1.0, "{}", oracle.file);
        assert_eq!(scaled.stats.retries, 0, "{}", oracle.file);
        if bar.underflows {
            assert!(unscaled.worst() > demo::LOST, "{}", oracle.file);
        }
    }
}

#[test]
fn a_file_that_cannot_be_used_is_an_error_with_its_name() {
    let message = |dir: &Path| match Oracle::read_all(dir) {
        Ok(_) => panic!("{} was read", dir.display()),
        Err(e) => e.to_string(),
    };
    assert!(message(&data("nowhere")).contains("nowhere"));
    assert!(message(&data("")).contains("no .safetensors file"));
    let dir = std::env::temp_dir().join(format!("candle-diffeq-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("cut.safetensors"), [1, 2, 3]).unwrap();
    let got = message(&dir);
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(got.contains("cut.safetensors"), "{got}");
}
