//! Many small runs, one on each core.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

use candle_core::Device;

use super::threads::THREADS;
use super::Result;

/// Runs every job, on the CPU as many at a time as there are cores with one thread each, which for
/// batches of some hundred rows is the better use of them; results in the order of the jobs.
///
/// # Errors
/// That of the first job that fails; the others are finished.
pub(crate) fn run<J: Sync, R: Send>(
    device: &Device,
    jobs: &[J],
    job: impl Fn(&J) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let threads = std::env::var(THREADS).ok().and_then(|n| n.parse().ok());
    let threads = threads.filter(|n| *n > 0);
    let workers = match device.is_cpu() {
        true => threads.unwrap_or(1).min(jobs.len()),
        false => 1,
    };
    if workers > 1 {
        // candle's products, and its loops over long tensors, whose idle threads spin.
        std::env::set_var(THREADS, "1");
        std::env::set_var("CANDLE_NUM_THREADS", "1");
    }
    let (next, done) = (AtomicUsize::new(0), Mutex::new(vec![]));
    let work = || {
        while let Some((i, next)) = {
            let i = next.fetch_add(1, Ordering::Relaxed);
            jobs.get(i).map(|job| (i, job))
        } {
            let result = job(next).map_err(|e| e.to_string());
            if let Ok(mut done) = done.lock() {
                done.push((i, result));
            }
        }
    };
    // Joined one by one: what panicked is said by the results that are missing.
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        threads.into_iter().for_each(|thread| drop(thread.join()));
    });
    if workers > 1 {
        std::env::set_var(THREADS, workers.to_string());
    }
    let mut done = done.into_inner().map_err(|_| "a run panicked")?;
    done.sort_by_key(|(i, _)| *i);
    let results: std::result::Result<Vec<R>, String> = done.into_iter().map(|(_, r)| r).collect();
    let results = results?;
    match results.len() == jobs.len() {
        true => Ok(results),
        false => Err("a run panicked".into()),
    }
}
