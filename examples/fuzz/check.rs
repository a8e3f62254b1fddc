//! A case, run on both sides and compared.

use std::panic::{catch_unwind, AssertUnwindSafe};

use rayon::ThreadPool;

use crate::ball::{Balls, Dt};
use crate::case::{Case, Given};
use crate::problem::Problem;
use crate::reference::{self, Expected, Range};
use crate::subject::{solved, Got};

/// What came of a case.
#[derive(Clone, Debug)]
pub(crate) enum Verdict {
    /// The largest bound of a tensor over its largest number, which says how sharp the comparison was.
    Agrees {
        sharpness: f64,
    },
    /// Numbers leave the range of their dtype, and the crate says so, or may.
    OutOfRange,
    Fails(Failure),
}

#[derive(Clone, Debug)]
pub(crate) struct Failure {
    /// What shrinking keeps.
    pub(crate) kind: Kind,
    pub(crate) text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    Panic,
    Error,
    States,
    Loss,
    StateGradient,
    ParameterGradient,
    TimeGradient,
    Bits,
    BadInput,
    Still,
}

/// What the self-test breaks in the reference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Sabotage {
    #[default]
    None,
    /// The last weight of every method with two stages or more.
    Weight,
    /// The gradient of the last parameter.
    Gradient,
}

/// Pools of one to four threads.
pub(crate) struct Pools(Vec<ThreadPool>);

impl Pools {
    /// # Errors
    /// Of the threads.
    pub(crate) fn new() -> Result<Self, rayon::ThreadPoolBuildError> {
        let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build();
        Ok(Self((1..=4).map(pool).collect::<Result<_, _>>()?))
    }

    fn get(&self, threads: usize) -> &ThreadPool {
        &self.0[threads.clamp(1, self.0.len()) - 1]
    }
}

/// Catches panics, and says what they said.
pub(crate) fn caught<R>(run: impl FnOnce() -> R) -> Result<R, Failure> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        let text = text.or(payload.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Failure {
            kind: Kind::Panic,
            text: format!("panic: {}", text.unwrap_or_default()),
        }
    })
}

/// Runs a case.
pub(crate) fn run(case: &Case, pools: &Pools, sabotage: Sabotage) -> Verdict {
    match compare(case, pools, sabotage) {
        Ok(verdict) => verdict,
        Err(failure) => Verdict::Fails(failure),
    }
}

fn compare(case: &Case, pools: &Pools, sabotage: Sabotage) -> Result<Verdict, Failure> {
    let fail = |kind, text| Failure { kind, text };
    let mut p = Problem::new(case).map_err(|e| fail(Kind::Error, e.to_string()))?;
    let subject = |threads: usize, plan| {
        let solve = || pools.get(threads).install(|| solved(&p, plan));
        caught(solve)
    };
    let got = subject(case.threads, case.plan)?;
    if let Some((threads, plan)) = case.twin {
        let twin = subject(threads, plan)?;
        let is_same = match (&got, &twin) {
            (Ok(got), Ok(twin)) => same_bits(got, twin),
            (Err(_), Err(_)) => true,
            _ => false,
        };
        if !is_same {
            let text = format!("other bits on {threads} threads with {plan:?}");
            return Err(fail(Kind::Bits, text));
        }
    }
    if let (Sabotage::Weight, [.., last]) = (sabotage, p.table.b.as_mut_slice()) {
        *last += 1e-3;
    }
    let mut expected = reference::solve(&p);
    if let (Sabotage::Gradient, Some(last)) = (sabotage, expected.params.last_mut()) {
        last.x.iter_mut().for_each(|x| *x *= 1.01);
    }
    round_gradients(&p, &mut expected);
    match (got, expected.overflow) {
        (Ok(got), Range::Inside) => matches(&p, &expected, &got),
        (Ok(_), Range::Perhaps) | (Err(_), Range::Perhaps | Range::Outside) => {
            Ok(Verdict::OutOfRange)
        }
        (Ok(_), Range::Outside) => {
            let text = "a result although numbers leave the range of their dtype".to_owned();
            Err(fail(Kind::Error, text))
        }
        (Err(error), Range::Inside) => Err(fail(Kind::Error, format!("error: {error}"))),
    }
}

fn same_bits(a: &Got, b: &Got) -> bool {
    let all = |got: &Got| -> Vec<u64> {
        let y0 = got.y0.iter().flatten().flatten();
        let params = got.params.iter().flatten().flatten();
        let states = got.states.iter().flatten();
        let rest = got.loss.iter().chain(got.times.iter().flatten());
        let all = states.chain(y0).chain(params).chain(rest);
        all.map(|x| x.to_bits()).collect()
    };
    all(a) == all(b)
}

/// Gradients arrive in the dtype of what they belong to.
fn round_gradients(p: &Problem, expected: &mut Expected) {
    let masters = p.numbers.masters(p.case.entry);
    let pulled = matches!(
        p.case.entry,
        crate::case::Entry::Solve | crate::case::Entry::Solution
    );
    let y0 = if pulled {
        p.numbers.state
    } else {
        p.numbers.y0
    };
    for (of, dt) in expected
        .y0
        .iter_mut()
        .map(|g| (g, y0))
        .chain(expected.params.iter_mut().map(|g| (g, masters)))
    {
        of.blur(dt.unit() + p.numbers.state.unit());
        // Below the range of normal numbers of f16, in which only y0 may be.
        if dt == Dt::F16 {
            of.e.iter_mut().for_each(|e| *e += 2f64.powi(-24));
        }
    }
    if let Given::Variable(dt) | Given::Tensor(dt) = p.case.grid.given {
        expected.times.blur(dt.unit());
    }
}

fn matches(p: &Problem, expected: &Expected, got: &Got) -> Result<Verdict, Failure> {
    let mut sharpness: f64 = 0.0;
    let mut hold = |kind: Kind, what: String, x: &Balls, got: &[f64]| {
        sharpness = sharpness.max(compared(&what, x, got).map_err(|text| Failure { kind, text })?);
        Ok::<_, Failure>(())
    };
    for (leaf, got) in got.states.iter().enumerate() {
        let size = p.y0[leaf].len();
        for (output, states) in expected.states.iter().enumerate() {
            let part = got
                .get(output * size..(output + 1) * size)
                .unwrap_or_default();
            hold(
                Kind::States,
                format!("state {leaf} at output {output}"),
                &states[leaf],
                part,
            )?;
        }
        let all = expected.states.len() * size;
        if got.len() != all {
            let text = format!("state {leaf} has {} numbers instead of {all}", got.len());
            return Err(Failure {
                kind: Kind::States,
                text,
            });
        }
    }
    if let Some(loss) = &expected.loss {
        let got: Vec<f64> = got.loss.into_iter().collect();
        hold(Kind::Loss, "the loss".to_owned(), loss, &got)?;
    }
    for (leaf, got) in got.y0.iter().flatten().enumerate() {
        let what = format!("the gradient of state {leaf}");
        hold(Kind::StateGradient, what, &expected.y0[leaf], got)?;
    }
    for (i, (got, x)) in got.params.iter().zip(&expected.params).enumerate() {
        let frozen = i < 64 && p.case.frozen >> i & 1 == 1;
        let what = format!("the gradient of {}", p.program.params[i].name);
        let zeros = vec![0.0; x.len()];
        match got {
            Some(got) if !frozen => hold(Kind::ParameterGradient, what, x, got)?,
            Some(_) => {
                let text = format!("{what}, which is a constant");
                return Err(Failure {
                    kind: Kind::ParameterGradient,
                    text,
                });
            }
            // None is a zero, of what no evaluation reads.
            None if frozen => {}
            None => hold(Kind::ParameterGradient, what, x, &zeros)?,
        }
    }
    if let Some(got) = &got.times {
        hold(
            Kind::TimeGradient,
            "the gradient of the times".to_owned(),
            &expected.times,
            got,
        )?;
    }
    Ok(Verdict::Agrees { sharpness })
}

/// The largest bound over the largest number, or what is wrong.
fn compared(what: &str, x: &Balls, got: &[f64]) -> Result<f64, String> {
    if got.len() != x.len() {
        return Err(format!(
            "{what}: {} numbers instead of {}",
            got.len(),
            x.len()
        ));
    }
    for (i, got) in got.iter().enumerate() {
        let (x, e) = (x.x[i], x.e[i]);
        // Numbers below the normal ones of f32 have no relative precision.
        let bound = e + 2f64.powi(-120);
        let error = (got - x).abs();
        if error > bound || error.is_nan() {
            return Err(format!(
                "{what}[{i}] is {got:e} instead of {x:e} ± {bound:.1e}"
            ));
        }
    }
    let largest = x.x.iter().fold(0.0, |most: f64, x| x.abs().max(most));
    let widest = x.e.iter().copied().fold(0.0, f64::max);
    Ok(if largest > 0.0 { widest / largest } else { 0.0 })
}
