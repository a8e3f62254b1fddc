//! The table of adaptive steps: a row for every file and pair, and for every file and continuous adjoint.

use std::path::Path;

use candle_core::Device;

use crate::adaptive::{Kind, Pair, DETEST, HELD, PAIRS, PLAIN};
use crate::continuous::{has_gradients, Way, BAR, WAYS};
use crate::oracle::{Oracle, Result};
use crate::outcome::worse;
use crate::{adaptive, events, Verdict};

pub(crate) fn table(dir: &Path, device: &Device) -> Result<Verdict> {
    println!(
        "relative errors of whole quantities, in f64\n{:<36}{:<12}{:>9}{:>9}{:>9}{:>9}{:>10}{:>10}{:>13}{:>12}",
        "file",
        "pair",
        "traj",
        "grad_y0",
        "grad_w",
        "grad_t",
        "accepted",
        "rejected",
        "evaluations",
        "over bar"
    );
    let (mut worst, mut checked) = (0.0, false);
    for oracle in Oracle::read_all(dir)? {
        let kind = match oracle.problem() {
            None => {
                println!("skipped {}: names no problem", oracle.file);
                continue;
            }
            Some(name) => match adaptive::kind(name) {
                None => {
                    println!("skipped {}: unknown problem `{name}`", oracle.file);
                    continue;
                }
                Some(kind) => kind,
            },
        };
        let oracle = oracle.on(device)?;
        checked = true;
        match kind {
            Kind::Events => {
                for pair in &PAIRS {
                    worst = worse(worst, events(&oracle, pair)?);
                }
            }
            Kind::Flow => {
                for pair in &PAIRS {
                    worst = worse(worst, flow(&oracle, pair)?);
                }
                for way in WAYS.iter().filter(|_| has_gradients(&oracle)) {
                    worst = worse(worst, continuous_adjoint(&oracle, way)?);
                }
            }
            Kind::Detest => worst = worse(worst, detest(&oracle)?),
        }
    }
    if !checked {
        return Err(format!("{}: nothing to check", dir.display()).into());
    }
    println!("worst {worst:.3e}");
    Ok(Verdict::of(worst, 1.0))
}

/// A row for a flow under one pair; its largest error over its bar.
fn flow(oracle: &Oracle, pair: &Pair) -> Result<f64> {
    let name = pair.method.name();
    let failed = |e| oracle.failed(format_args!("{name}: {e}"));
    let run = adaptive::flow(oracle, pair).map_err(failed)?;
    let over_bar = run.over_bar(pair);
    let figures = [Some(run.trajectory), run.y0, run.weights, run.times];
    let figures = figures.map(|e| e.map_or_else(|| "-".to_owned(), |e| format!("{e:.1e}")));
    println!(
        "{:<36}{name:<12}{}{:>10}{:>10}{:>13}{over_bar:>12.1e}",
        oracle.file,
        figures.map(|e| format!("{e:>9}")).concat(),
        run.stats.steps,
        run.stats.rejected,
        run.stats.evaluations,
    );
    Ok(over_bar)
}

/// A row for the gradients of a flow by a continuous adjoint under the first pair, with the counts of its backward
/// solve; the largest error over its bar.
fn continuous_adjoint(oracle: &Oracle, way: &Way) -> Result<f64> {
    let name = way.name;
    let failed = |e| oracle.failed(format_args!("{name}: {e}"));
    let run = way.flow(oracle, &PAIRS[0]).map_err(failed)?;
    let over_bar = run.gradients() / BAR;
    let figures = [None, run.y0, run.weights, run.times];
    let figures = figures.map(|e| e.map_or_else(|| "-".to_owned(), |e| format!("{e:.1e}")));
    let backward = &run.stats.backward;
    println!(
        "{:<36}{name:<12}{}{:>10}{:>10}{:>13}{over_bar:>12.1e}",
        oracle.file,
        figures.map(|e| format!("{e:>9}")).concat(),
        backward.steps,
        backward.rejected,
        backward.evaluations,
    );
    Ok(over_bar)
}

/// A row for the events of a file under one pair; their largest error over its bar.
fn events(oracle: &Oracle, pair: &Pair) -> Result<f64> {
    let name = pair.method.name();
    let failed = |e| oracle.failed(format_args!("{name}: {e}"));
    let run = events::events(oracle, pair).map_err(failed)?;
    let over_bar = run.over_bar(pair);
    let held = format!(
        "events: {}; t {:.1e}, y {:.1e}, grad_t {:.1e}",
        run.count, run.time, run.state, run.derivative
    );
    println!(
        "{:<36}{name:<12}{held:<56}{:>13}{over_bar:>12.1e}",
        oracle.file, run.stats.evaluations
    );
    Ok(over_bar)
}

/// Two rows for DETEST under each pair, one for each tolerance; the largest error over its bar.
fn detest(oracle: &Oracle) -> Result<f64> {
    let (problems, unknown) = adaptive::detest_problems(oracle)?;
    for name in unknown {
        println!("skipped {name} of {}: unknown problem", oracle.file);
    }
    let mut worst = 0.0;
    for pair in &PAIRS {
        for tol in DETEST {
            let name = pair.method.name();
            let failed = |e| oracle.failed(format_args!("{name}: {e}"));
            let run = |share| adaptive::detest(oracle, &problems, pair, tol, share).map_err(failed);
            let (run, plain) = (run(HELD)?, run(PLAIN)?);
            let held = format!(
                "tol {tol:.0e}: {} ends at {:.1} tol",
                run.problem, run.error
            );
            let plain = format!(
                "(rtol = atol = tol: {} at {:.0} tol)",
                plain.problem, plain.error
            );
            println!(
                "{:<36}{name:<12}{held:<56}{:>13}{:>12.1e}  {plain}",
                oracle.file, run.evaluations, run.over_bar
            );
            worst = worse(worst, run.over_bar);
        }
    }
    Ok(worst)
}
