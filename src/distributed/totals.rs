//! Numbers of the whole group: losses, statistics.

use candle_core::{Device, Tensor};

use super::Group;
use crate::error::Result;
use crate::stats::Stats;

/// Σ over ranks, in f64.
pub(super) fn sums(group: &dyn Group, values: &[f64]) -> Result<Vec<f64>> {
    let x = Tensor::new(values, &Device::Cpu)?;
    Ok(group.sum(&x)?.to_vec1()?)
}

/// max over ranks, in f64.
pub(super) fn maxima(group: &dyn Group, values: &[f64]) -> Result<Vec<f64>> {
    let x = Tensor::new(values, &Device::Cpu)?;
    Ok(group.max(&x)?.to_vec1()?)
}

/// What rank 0 has, in f64.
pub(super) fn of_first(group: &dyn Group, value: f64) -> Result<f64> {
    let x = Tensor::new(&[value], &Device::Cpu)?;
    Ok(group.broadcast(&x, 0)?.to_vec1::<f64>()?[0])
}

/// The mean over the rows of all ranks, of means over the rows of each: the loss of the whole batch.  The value of a rank
/// without rows does not count.  NaN if no rank has any.
///
/// # Errors
/// Those of the group.
pub fn mean(group: &dyn Group, value: f64, rows: usize) -> Result<f64> {
    let weighted = match rows {
        0 => 0.0,
        rows => value * rows as f64,
    };
    let sums = sums(group, &[weighted, rows as f64])?;
    Ok(sums[0] / sums[1])
}

/// Statistics of all ranks, equal on all of them.  Counts are added over ranks, as they are added over solves: a step that
/// every rank takes for its own rows counts once for each rank.  Largest and smallest values are those of any rank.  The
/// first step is that of rank 0; what grows with every solve (`step_times`, `scales`, `rows`, the attempts of
/// `backward`) and `not_replayed` stay those of this rank.
///
/// # Errors
/// Those of the group.
pub fn total(group: &dyn Group, stats: &Stats) -> Result<Stats> {
    let mut stats = stats.clone();
    let counts = counts(&mut stats);
    let given: Vec<f64> = counts.iter().map(|count| **count as f64).collect();
    for (count, sum) in counts.into_iter().zip(sums(group, &given)?) {
        *count = sum as usize;
    }
    // Of a range, the ends as maxima: −smallest and largest.
    let ends = |range: Option<(f64, f64)>| match range {
        Some((low, high)) => [-low, high],
        None => [f64::NEG_INFINITY; 2],
    };
    let range = |ends: &[f64]| (ends[1] > f64::NEG_INFINITY).then_some((-ends[0], ends[1]));
    let [steps, scales] = [stats.step_range, stats.scale_range].map(ends);
    let kept = [stats.states_kept, stats.bytes_kept, stats.activation_bytes];
    let kept = kept.map(|n| n as f64);
    let back = &stats.backward;
    let factors = [stats.tolerance_factor, back.tolerance_factor, back.drift];
    let given = [&steps[..], &scales, &kept, &factors].concat();
    let most = maxima(group, &given)?;
    stats.step_range = range(&most[0..2]);
    stats.scale_range = range(&most[2..4]);
    stats.states_kept = most[4] as usize;
    stats.bytes_kept = most[5] as usize;
    stats.activation_bytes = most[6] as usize;
    stats.tolerance_factor = most[7];
    [stats.backward.tolerance_factor, stats.backward.drift] = [most[8], most[9]];
    let first = of_first(group, stats.first_step.unwrap_or(f64::NAN))?;
    stats.first_step = (!first.is_nan()).then_some(first);
    Ok(stats)
}

/// What is added.
fn counts(stats: &mut Stats) -> [&mut usize; 18] {
    [
        &mut stats.steps,
        &mut stats.rejected,
        &mut stats.forced,
        &mut stats.limited,
        &mut stats.evaluations,
        &mut stats.row_evaluations,
        &mut stats.tile_evaluations,
        &mut stats.recomputed,
        &mut stats.vjps,
        &mut stats.retries,
        &mut stats.host_reads,
        &mut stats.replayed,
        &mut stats.backward.steps,
        &mut stats.backward.rejected,
        &mut stats.backward.forced,
        &mut stats.backward.limited,
        &mut stats.backward.evaluations,
        &mut stats.backward.points,
    ]
}
