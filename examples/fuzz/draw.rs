//! A random case from its seed.

use candle_diffeq::nn::Activation;
use candle_diffeq::tableau::Tableau;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::ball::Dt;
use crate::case::{
    Cache, Case, Cut, Entry, Field, Given, Grid, Lead, Method, Numbers, Plan, Scale,
};
use crate::problem::Problem;

/// The case of a seed.
pub(crate) fn case(seed: u64) -> Case {
    let mut rng = StdRng::seed_from_u64(seed);
    let rng = &mut rng;
    // Multiply-adds of one evaluation times evaluations; one case in fifty is large.
    let most = match one_in(rng, 50) {
        true => 2e8,
        false => 10f64.powf(rng.random_range(3.5..7.2)),
    };
    let field = field(rng);
    let case = Case {
        seed,
        rows: batch(rng),
        lead: pick(
            rng,
            &[
                Lead::Rows,
                Lead::Rows,
                Lead::Rows,
                Lead::Three,
                Lead::Vector,
                Lead::Scalar,
            ],
        ),
        method: method(rng),
        grid: grid(rng),
        steps: steps(rng),
        is_final: one_in(rng, 3),
        plan: plan(rng),
        numbers: numbers(rng),
        entry: pick(
            rng,
            &[
                Entry::Odeint,
                Entry::Solve,
                Entry::Neural,
                Entry::Module,
                Entry::Solution,
                Entry::Squares,
                Entry::Likelihood,
                Entry::Entropy,
            ],
        ),
        fusion: !one_in(rng, 4),
        checked: one_in(rng, 3),
        cache: Cache {
            bytes: pick(rng, &[0, 0, 100, 1000, 30_000, usize::MAX]),
            low: one_in(rng, 2),
        },
        scaling: match rng.random_range(0..8) {
            0 => Scale::Off,
            1 => Scale::Fixed(rng.random_range(-6..12)),
            2 => Scale::Dynamic(rng.random_range(0..12)),
            _ => Scale::Auto,
        },
        threads: rng.random_range(1..=4),
        tracked: !one_in(rng, 4),
        frozen: if one_in(rng, 4) { rng.random() } else { 0 },
        y0_scale: pick(rng, &[1.0, 1.0, 1.0, 0.01, 10.0]),
        cotangent_scale: 10f64.powi(pick(rng, &[0, 0, 0, -7, -4, 3])),
        twin: one_in(rng, 4).then(|| (rng.random_range(1..=4), plan(rng))),
        field,
    };
    within(case, most)
}

/// The case with fewer steps and rows, until it is not more work than that.
fn within(mut case: Case, most: f64) -> Case {
    loop {
        case = case.fitted();
        if Problem::work(&case) <= most {
            return case;
        }
        let smaller = |n: &mut usize| *n = (*n * 2 / 3).max(1);
        match &mut case.steps {
            Cut::PerInterval(m) if *m > 1 => smaller(m),
            Cut::Size(size) if *size < 0.5 => *size *= 2.0,
            _ if case.grid.fractions.len() > 2 => {
                case.grid.fractions.pop();
            }
            _ if case.rows > 1 => smaller(&mut case.rows),
            _ => return case,
        }
    }
}

fn one_in(rng: &mut StdRng, n: u32) -> bool {
    rng.random_range(0..n) == 0
}

fn pick<T: Copy>(rng: &mut StdRng, of: &[T]) -> T {
    of[rng.random_range(0..of.len())]
}

/// Widths 1 … 130: most are small, some at and around those of vectors and tiles.
fn width(rng: &mut StdRng) -> usize {
    match rng.random_range(0..10) {
        0..5 => rng.random_range(1..=6),
        5..7 => rng.random_range(1..=20),
        7..9 => {
            let near = pick(rng, &[8usize, 16, 24, 32, 48, 64, 96, 128]);
            near - 1 + rng.random_range(0..3usize)
        }
        _ => rng.random_range(1..=130),
    }
}

fn batch(rng: &mut StdRng) -> usize {
    match rng.random_range(0..4) {
        0 => 1,
        1 => rng.random_range(1..=9),
        2 => pick(rng, &[7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65]),
        _ => rng.random_range(1..=70),
    }
}

fn activation(rng: &mut StdRng) -> Activation {
    pick(rng, &Activation::ALL)
}

fn field(rng: &mut StdRng) -> Field {
    match rng.random_range(0..10) {
        0..3 => {
            let leaves = pick(rng, &[1usize, 1, 1, 2, 2, 3]);
            Field::Closure {
                seed: rng.random(),
                length: rng.random_range(0..9),
                cols: (0..leaves).map(|_| width(rng)).collect(),
                ours: one_in(rng, 2),
            }
        }
        3..6 => {
            let features = width(rng);
            let same = one_in(rng, 3);
            let hidden = rng.random_range(0..4);
            let inner = (0..hidden).map(|_| if same { features } else { width(rng) });
            let mut widths = vec![features];
            widths.extend(inner.collect::<Vec<_>>());
            widths.push(features);
            Field::Mlp {
                widths,
                activation: activation(rng),
                time: one_in(rng, 3),
                residual: one_in(rng, 3),
            }
        }
        6..8 => {
            let features = match one_in(rng, 8) {
                true => width(rng).min(40),
                false => rng.random_range(1..=6),
            };
            let hidden = pick(rng, &[0usize, 1, 1, 1, 2, 2, 2, 3]);
            let mut widths = vec![features];
            widths.extend((0..hidden).map(|_| width(rng)).collect::<Vec<_>>());
            widths.push(features);
            Field::Cnf {
                widths,
                activation: activation(rng),
                time: one_in(rng, 3),
            }
        }
        _ => conv(rng),
    }
}

fn conv(rng: &mut StdRng) -> Field {
    let groups = pick(rng, &[0usize, 0, 0, 1, 2]);
    let state = rng.random_range(1..=4);
    let mut channels = vec![state];
    for _ in 0..rng.random_range(0..3) {
        let hidden = match one_in(rng, 6) {
            true => rng.random_range(1..=33),
            false => rng.random_range(1..=6usize),
        };
        channels.push(hidden.next_multiple_of(groups.max(1)));
    }
    channels.push(state);
    Field::Conv {
        channels,
        size: pick(rng, &[1usize, 3, 3, 3, 5]),
        activation: activation(rng),
        groups,
        height: rng.random_range(1..=6),
        width: rng.random_range(1..=9),
    }
}

fn method(rng: &mut StdRng) -> Method {
    if !one_in(rng, 3) {
        return Method::Known(rng.random_range(0..Tableau::ALL.len()));
    }
    let stages = rng.random_range(1..=6);
    let coefficient = |rng: &mut StdRng| match one_in(rng, 3) {
        true => 0.0,
        false => rng.random_range(-0.5..1.0),
    };
    let mut row = |n: usize| (0..n).map(|_| coefficient(rng)).collect::<Vec<f64>>();
    let a = (0..stages).map(&mut row).collect();
    let mut b = row(stages);
    // They sum to one; a stage without weight is active only through later ones.
    let at = b.iter().rposition(|b| *b != 0.0).unwrap_or(0);
    b[at] += 1.0 - b.iter().sum::<f64>();
    Method::Own(a, b)
}

fn grid(rng: &mut StdRng) -> Grid {
    let intervals = match rng.random_range(0..12) {
        0 => 0,
        1..6 => 1,
        6..10 => rng.random_range(1..=4),
        _ => rng.random_range(1..=12),
    };
    let mut fractions = vec![0.0];
    for _ in 0..intervals {
        let last = fractions[fractions.len() - 1];
        fractions.push(last + 10f64.powf(rng.random_range(-1.5..0.0)));
    }
    let whole = fractions[intervals].max(1e-3);
    fractions.iter_mut().for_each(|f| *f /= whole);
    let dt = pick(rng, &[Dt::F64, Dt::F32]);
    Grid {
        fractions,
        start: pick(rng, &[0.0, 0.0, 0.0, 1.0, -2.5, 20.0]),
        backward: one_in(rng, 3),
        growth: rng.random_range(0.05..3.0),
        given: match rng.random_range(0..6) {
            0 => Given::Variable(dt),
            1 => Given::Tensor(dt),
            _ => Given::Host,
        },
    }
}

fn steps(rng: &mut StdRng) -> Cut {
    match rng.random_range(0..6) {
        0..2 => Cut::PerInterval(1),
        2..4 => Cut::PerInterval(rng.random_range(1..=6)),
        4 => Cut::PerInterval(rng.random_range(1..=150)),
        _ => Cut::Size(10f64.powf(rng.random_range(-2.0..0.3))),
    }
}

fn plan(rng: &mut StdRng) -> Plan {
    let n = match one_in(rng, 2) {
        true => rng.random_range(1..=4),
        false => rng.random_range(1..=60),
    };
    match rng.random_range(0..6) {
        0 => Plan::Every(n),
        1 => Plan::States(n),
        2 => Plan::Bytes(n),
        _ => Plan::All,
    }
}

fn numbers(rng: &mut StdRng) -> Numbers {
    let all = [Dt::F64, Dt::F32, Dt::Bf16, Dt::F16];
    let state = pick(rng, &[Dt::F64, Dt::F32, Dt::F32, Dt::F32]);
    let compute = match one_in(rng, 3) {
        true => state,
        false => pick(rng, &all),
    };
    let lower = one_in(rng, 4);
    Numbers {
        store: if lower { pick(rng, &all) } else { state },
        y0: if one_in(rng, 5) {
            pick(rng, &all)
        } else {
            state
        },
        last: one_in(rng, 4).then(|| pick(rng, &all)),
        explicit: !one_in(rng, 4),
        wide_masters: !one_in(rng, 3),
        compensated: one_in(rng, 4),
        ..Numbers::of(state, compute)
    }
}
