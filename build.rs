//! Compiles `kernels/*.cu` to PTX where the feature `cuda` is on; does nothing otherwise.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs, thread};

/// PTX of this architecture is compiled by the driver for every later one.
const BASELINE: &str = "compute_80";

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    match compile() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn compile() -> Result<(), String> {
    let out = env::var_os("OUT_DIR").ok_or("cargo did not set OUT_DIR")?;
    let out = PathBuf::from(out);
    check_capability()?;
    let nvcc = nvcc();
    let sources = fs::read_dir("kernels").map_err(|e| format!("kernels: {e}"))?;
    let sources = sources.filter_map(|entry| Some(entry.ok()?.path()));
    let sources: Vec<_> = sources
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    thread::scope(|scope| {
        let jobs: Vec<_> = sources
            .iter()
            .map(|source| scope.spawn(|| to_ptx(&nvcc, source, &out)))
            .collect();
        jobs.into_iter().try_for_each(|job| {
            job.join()
                .unwrap_or_else(|_| Err("a compiler thread".into()))
        })
    })
}

/// Candle's own kernels are compiled for one card, ours for all from Ampere on.
fn check_capability() -> Result<(), String> {
    let Ok(capability) = env::var("CUDA_COMPUTE_CAP") else {
        // candle asks nvidia-smi then.
        return Ok(());
    };
    let digits: String = capability.chars().filter(char::is_ascii_digit).collect();
    match digits.parse::<u32>() {
        Ok(80..) => Ok(()),
        _ => Err(format!(
            "CUDA_COMPUTE_CAP is {capability}, but the kernels need 80 (Ampere) or later; \
             set it to that of your card, such as 80, 89 or 90"
        )),
    }
}

fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].map(env::var_os);
    let inside = homes
        .into_iter()
        .flatten()
        .map(|home| Path::new(&home).join("bin/nvcc"));
    inside
        .into_iter()
        .find(|nvcc| nvcc.exists())
        .unwrap_or_else(|| "nvcc".into())
}

fn to_ptx(nvcc: &Path, source: &Path, out: &Path) -> Result<(), String> {
    let name = source.file_stem().unwrap_or_default();
    let ptx = out.join(name).with_extension("ptx");
    let run = Command::new(nvcc)
        .args(["-ptx", "-O3", "-std=c++17", "-arch", BASELINE, "-o"])
        .args([&ptx, source])
        .status();
    match run {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{} {}: {status}", nvcc.display(), source.display())),
        Err(error) => Err(format!(
            "the feature `cuda` needs a CUDA compiler, and {} cannot be run: {error}; \
             install CUDA 12.8 or 13.0, or fetch a compiler with scripts/cuda-toolkit.sh, \
             and put nvcc on PATH or its toolkit into CUDA_HOME (see docs/cuda.md)",
            nvcc.display()
        )),
    }
}
