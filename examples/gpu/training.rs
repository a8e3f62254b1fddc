//! Whether memory stays as it is over many iterations of training.

use candle_core::Device;
use candle_diffeq::Precision;
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use serde_json::{json, Value};

use crate::pass::{Pass, OURS};
use crate::pool::{Bytes, Pool};
use crate::workload::Workload;
use common::Result;

/// Iterations after which nothing may be added.
const SETTLED: usize = 10;

/// Trains for so many iterations and says what the pool held after each, at most, until it had settled
/// and later.
pub(crate) fn memory(
    workload: &Workload,
    precision: Precision,
    iterations: usize,
    device: &Device,
) -> Result<Value> {
    let pool = Pool::of(device)?.ok_or("--training: the memory of a GPU is looked at")?;
    let pass = Pass::new(workload, precision, OURS)?;
    let mut optimiser = AdamW::new(pass.vars.all_vars(), ParamsAdamW::default())?;
    pool.forget_peak()?;
    let mut seen = vec![];
    for _ in 0..iterations {
        optimiser.backward_step(&pass.loss()?)?;
        device.synchronize()?;
        seen.push(pool.bytes()?);
    }
    let (first, later) = seen.split_at(SETTLED.min(seen.len()));
    let (settled, end) = (most(first), most(later));
    Ok(json!({
        "training": workload.name, "iterations": iterations,
        "settled": figures(settled), "later": figures(end),
        "flat": end.used <= settled.used && end.peak <= settled.peak && end.reserved <= settled.reserved,
    }))
}

fn most(seen: &[Bytes]) -> Bytes {
    let of = |part: fn(&Bytes) -> u64| seen.iter().map(part).max().unwrap_or(0);
    Bytes {
        used: of(|b| b.used),
        peak: of(|b| b.peak),
        reserved: of(|b| b.reserved),
    }
}

fn figures(bytes: Bytes) -> Value {
    json!({ "used": bytes.used, "peak": bytes.peak, "reserved": bytes.reserved })
}
