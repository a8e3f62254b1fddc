//! What figures depend on besides the code: versions, processor, threads, GPU.

use std::process::Command;

use candle_core::Device;
use serde::Serialize;

use super::threads::THREADS;

/// Where a run took place.
#[derive(Clone, Debug, Serialize)]
pub struct Environment {
    /// Of candle-diffeq and of candle, as the lock file tells.
    pub version: String,
    pub candle: String,
    pub system: String,
    pub cpu: String,
    /// The widest vectors of the processor.
    pub vectors: &'static str,
    pub threads: String,
    pub device: String,
}

const UNKNOWN: &str = "unknown";

impl Environment {
    pub fn of(device: &Device) -> Self {
        Self {
            version: locked("candle-diffeq").unwrap_or_else(|| UNKNOWN.to_owned()),
            candle: locked("candle-core").unwrap_or_else(|| UNKNOWN.to_owned()),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            cpu: cpu().unwrap_or_else(|| UNKNOWN.to_owned()),
            vectors: vectors(),
            threads: std::env::var(THREADS).unwrap_or_else(|_| UNKNOWN.to_owned()),
            device: match device.is_cuda() {
                true => gpu().unwrap_or_else(|| "CUDA".to_owned()),
                false => "CPU".to_owned(),
            },
        }
    }
}

impl std::fmt::Display for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            version,
            candle,
            system,
            cpu,
            vectors,
            threads,
            device,
        } = self;
        write!(
            f,
            "candle-diffeq {version}, candle {candle}; {device}; {cpu}, {vectors}, {threads} threads; {system}"
        )
    }
}

/// The version of a package.
fn locked(package: &str) -> Option<String> {
    let lock = concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.lock");
    let lock = std::fs::read_to_string(lock).ok()?;
    let mut lines = lock.lines();
    lines.find(|line| {
        line.strip_prefix("name = ")
            .is_some_and(|name| name.trim_matches('"') == package)
    })?;
    let version = lines.next()?.strip_prefix("version = ")?;
    Some(version.trim_matches('"').to_owned())
}

fn cpu() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let model = info.lines().find(|line| line.starts_with("model name"))?;
    Some(model.split_once(':')?.1.trim().to_owned())
}

#[cfg(target_arch = "x86_64")]
fn vectors() -> &'static str {
    if std::arch::is_x86_feature_detected!("avx512f") {
        "AVX-512"
    } else if std::arch::is_x86_feature_detected!("avx2") {
        "AVX2"
    } else {
        "SSE2"
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn vectors() -> &'static str {
    UNKNOWN
}

/// Name and driver, as the driver's own tool says.
fn gpu() -> Option<String> {
    let query = ["--query-gpu=name,driver_version", "--format=csv,noheader"];
    let output = Command::new("nvidia-smi").args(query).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let first = text.lines().next()?.trim();
    (!first.is_empty()).then(|| first.to_owned())
}
