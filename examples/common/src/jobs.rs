//! Many small runs, one on each core.

use std::ffi::OsString;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

use candle_core::Device;

use super::threads::THREADS;
use super::Result;

/// The threads of candle's products, and of its loops over long tensors, which spin when they are idle.
const VARIABLES: [&str; 2] = [THREADS, "CANDLE_NUM_THREADS"];

/// Lets candle use one thread as long as this lives; then the variables are what they were before.
struct OneThread([Option<OsString>; 2]);

impl OneThread {
    fn new() -> Self {
        Self(VARIABLES.map(|name| {
            let before = std::env::var_os(name);
            std::env::set_var(name, "1");
            before
        }))
    }
}

impl Drop for OneThread {
    fn drop(&mut self) {
        for (name, before) in VARIABLES.iter().zip(&self.0) {
            match before {
                Some(value) => std::env::set_var(name, value),
                None => std::env::remove_var(name),
            }
        }
    }
}

/// Runs every job, on the CPU as many at a time as there are cores with one thread each, which for
/// batches of some hundred rows is the better use of them; results in the order of the jobs.
///
/// # Errors
/// That of the first job that fails; the others are finished.
pub fn run<J: Sync, R: Send>(
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
    let one_thread = (workers > 1).then(OneThread::new);
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
    drop(one_thread);
    let mut done = done.into_inner().map_err(|_| "a run panicked")?;
    done.sort_by_key(|(i, _)| *i);
    let results: std::result::Result<Vec<R>, String> = done.into_iter().map(|(_, r)| r).collect();
    let results = results?;
    match results.len() == jobs.len() {
        true => Ok(results),
        false => Err("a run panicked".into()),
    }
}
