//! The loop over seeds, and its report.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::bad;
use crate::ball::Dt;
use crate::case::{Case, Field};
use crate::check::{self, Failure, Pools, Sabotage, Verdict};
use crate::draw;
use crate::fields;
use crate::shrink::shrunk;
use crate::still;

/// How long to go on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Until {
    Cases(u64),
    Elapsed(Duration),
}

/// One case in so many is a bad input, and one is of rows that stand still.
const OTHERS: u64 = 12;

/// Failures that are shrunk; of further ones a line is printed.
const SHRUNK: u64 = 25;

#[derive(Default)]
struct Report {
    cases: u64,
    others: u64,
    failures: u64,
    out_of_range: u64,
    /// Bounds over numbers by compute dtype.
    sharpness: [Vec<f64>; 4],
}

/// Whether all cases from `first` on hold.
///
/// # Errors
/// Of threads.
pub(crate) fn run(
    first: u64,
    until: Until,
    threads: usize,
    sabotage: Sabotage,
) -> Result<bool, rayon::ThreadPoolBuildError> {
    // Panics are caught and reported with their case.
    std::panic::set_hook(Box::new(|_| {}));
    println!("vector unit: {}", unit());
    let start = Instant::now();
    let (next, stop) = (AtomicU64::new(first), AtomicBool::new(false));
    let report = Mutex::new(Report::default());
    let pools = (0..threads)
        .map(|_| Pools::new())
        .collect::<Result<Vec<_>, _>>()?;
    std::thread::scope(|scope| {
        for pools in &pools {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let more = match until {
                        Until::Cases(cases) => seed - first < cases,
                        Until::Elapsed(time) => start.elapsed() < time,
                    };
                    if !more {
                        stop.store(true, Ordering::Relaxed);
                        break;
                    }
                    one(seed, pools, sabotage, &report);
                }
            });
        }
    });
    let report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.print(start.elapsed());
    Ok(report.failures == 0)
}

/// The vector unit that the process uses.
fn unit() -> String {
    if let Ok(unit) = std::env::var("CANDLE_DIFFEQ_SIMD") {
        return format!("{unit} (CANDLE_DIFFEQ_SIMD)");
    }
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return "avx512".to_owned();
        }
        if is_x86_feature_detected!("avx2") {
            return "avx2".to_owned();
        }
    }
    "the best of this machine".to_owned()
}

fn one(seed: u64, pools: &Pools, sabotage: Sabotage, report: &Mutex<Report>) {
    let lock = || report.lock().unwrap_or_else(PoisonError::into_inner);
    let other = match seed % OTHERS {
        10 => Some(still::run(seed)),
        11 => Some(bad::run(seed)),
        _ => None,
    };
    if let Some(failure) = other {
        let mut report = lock();
        report.cases += 1;
        report.others += 1;
        if let Err(failure) = failure {
            report.failures += 1;
            println!("FAILED seed {seed}: {}", failure.text);
            println!("  again: cargo run --release --example fuzz -- --seed {seed}");
        }
        return;
    }
    let case = draw::case(seed);
    let verdict = check::run(&case, pools, sabotage);
    let shrinks = {
        let mut report = lock();
        report.cases += 1;
        match &verdict {
            Verdict::Agrees { sharpness } => {
                let of = match case.numbers.compute {
                    Dt::F64 => 0,
                    Dt::F32 => 1,
                    Dt::Bf16 => 2,
                    Dt::F16 => 3,
                };
                report.sharpness[of].push(*sharpness);
            }
            Verdict::OutOfRange => report.out_of_range += 1,
            Verdict::Fails(_) => report.failures += 1,
        }
        report.failures <= SHRUNK
    };
    if let Verdict::Fails(failure) = verdict {
        let smaller = shrinks.then(|| shrunk(&case, failure.clone(), pools, sabotage));
        let _one_at_a_time = lock();
        print(&case, &failure, smaller.as_ref());
    }
}

fn print(case: &Case, failure: &Failure, smaller: Option<&(Case, Failure)>) {
    println!("FAILED seed {}: {}", case.seed, failure.text);
    if let Some((smaller, still)) = smaller {
        println!("  case: {case:?}");
        println!("  shrunk: {}", still.text);
        println!("  shrunk case: {smaller:?}");
        if let Field::Closure { .. } = smaller.field {
            let program = fields::program(smaller);
            println!("  its velocity: {:?} of {:?}", program.ops, program.outputs);
        }
    }
    println!(
        "  again: cargo run --release --example fuzz -- --seed {}",
        case.seed
    );
}

impl Report {
    fn print(&self, elapsed: Duration) {
        println!(
            "{} bad inputs and rows that stand still; {} solves that leave the range of their dtype; {:.0} s",
            self.others,
            self.out_of_range,
            elapsed.as_secs_f64()
        );
        println!("bounds relative to the largest number of a tensor, the worst tensor of a case:");
        for (name, figures) in ["f64", "f32", "bf16", "f16"].iter().zip(&self.sharpness) {
            let mut sorted = figures.clone();
            sorted.sort_by(f64::total_cmp);
            let at = |share: f64| {
                let i = (share * sorted.len() as f64) as usize;
                sorted.get(i).copied().unwrap_or(f64::NAN)
            };
            println!(
                "  compute {name}: {} cases, median {:.0e}, nine of ten below {:.0e}",
                sorted.len(),
                at(0.5),
                at(0.9)
            );
        }
        println!("{} cases, {} failures", self.cases, self.failures);
    }
}

/// Breaks the reference in each way: it must be found among the first cases, and shrunk to a small one.
///
/// # Errors
/// Of threads.
pub(crate) fn finds_what_is_broken() -> Result<bool, rayon::ThreadPoolBuildError> {
    let pools = Pools::new()?;
    let mut all = true;
    for sabotage in [Sabotage::Weight, Sabotage::Gradient] {
        let found = found(sabotage, &pools);
        all &= found.is_some();
        match &found {
            Some((case, failure, smaller)) => {
                println!("{sabotage:?}: found");
                print(case, failure, Some(smaller));
            }
            None => println!("{sabotage:?}: NOT found"),
        }
    }
    Ok(all)
}

type Found = (Case, Failure, (Case, Failure));

/// The first case that fails with a broken reference, and what it is shrunk to.
pub(crate) fn found(sabotage: Sabotage, pools: &Pools) -> Option<Found> {
    (0..200).find_map(|seed| {
        let case = draw::case(seed);
        // Not what fails anyway.
        if let Verdict::Fails(_) = check::run(&case, pools, Sabotage::None) {
            return None;
        }
        match check::run(&case, pools, sabotage) {
            Verdict::Fails(failure) => {
                let smaller = shrunk(&case, failure.clone(), pools, sabotage);
                Some((case, failure, smaller))
            }
            _ => None,
        }
    })
}
