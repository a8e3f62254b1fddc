//! A smaller case that fails in the same way.

use candle_diffeq::nn::Activation;
use candle_diffeq::tableau::Tableau;

use crate::case::{Case, Cut, Entry, Field, Given, Lead, Method, Numbers, Plan, Scale};
use crate::check::{run, Failure, Kind, Pools, Sabotage, Verdict};

/// Runs of a shrink.
const MOST_RUNS: usize = 400;

/// The smallest case found, and how it fails.
pub(crate) fn shrunk(
    case: &Case,
    failure: Failure,
    pools: &Pools,
    sabotage: Sabotage,
) -> (Case, Failure) {
    let (mut case, mut failure) = (case.clone(), failure);
    let mut runs = 0;
    'again: loop {
        for smaller in smaller(&case) {
            let smaller = smaller.fitted();
            if format!("{smaller:?}") == format!("{case:?}") {
                continue;
            }
            runs += 1;
            if runs > MOST_RUNS {
                return (case, failure);
            }
            if let Verdict::Fails(still) = run(&smaller, pools, sabotage) {
                if alike(still.kind, failure.kind) {
                    (case, failure) = (smaller, still);
                    continue 'again;
                }
            }
        }
        return (case, failure);
    }
}

/// Wrong numbers are alike, wherever they show.
fn alike(a: Kind, b: Kind) -> bool {
    let wrong = |kind| {
        !matches!(
            kind,
            Kind::Panic | Kind::Error | Kind::Bits | Kind::BadInput
        )
    };
    a == b || wrong(a) && wrong(b)
}

/// Cases with one thing made simpler, the largest cuts first.
fn smaller(case: &Case) -> Vec<Case> {
    let mut all = vec![];
    let mut with = |change: &dyn Fn(&mut Case)| {
        let mut case = case.clone();
        change(&mut case);
        all.push(case);
    };
    with(&|c| c.grid.fractions = vec![0.0, 1.0]);
    with(&|c| c.steps = Cut::PerInterval(1));
    with(&|c| c.rows = 1);
    with(&|c| c.rows /= 2);
    with(&|c| c.rows -= 1);
    with(&|c| c.method = Method::Known(0));
    with(&|c| c.method = Method::Known(Tableau::ALL.len().min(1)));
    for field in simpler(&case.field) {
        with(&move |c| c.field = field.clone());
    }
    with(&|c| c.numbers = Numbers::F64);
    with(&|c| c.numbers = Numbers::F32);
    with(&|c| c.numbers = Numbers::of(c.numbers.state, c.numbers.compute));
    with(&|c| c.numbers.compensated = false);
    with(&|c| c.entry = Entry::Solve);
    with(&|c| c.entry = Entry::Odeint);
    with(&|c| c.entry = Entry::Neural);
    with(&|c| c.grid.given = Given::Host);
    with(&|c| c.grid.backward = false);
    with(&|c| c.grid.start = 0.0);
    with(&|c| c.plan = Plan::All);
    with(&|c| c.is_final = true);
    with(&|c| c.lead = Lead::Rows);
    with(&|c| c.scaling = Scale::Auto);
    with(&|c| (c.cache.bytes, c.cache.low) = (0, false));
    with(&|c| c.cache.low = false);
    with(&|c| c.fusion = false);
    with(&|c| c.checked = false);
    with(&|c| c.threads = 1);
    with(&|c| c.tracked = true);
    with(&|c| c.frozen = 0);
    with(&|c| c.twin = None);
    with(&|c| (c.y0_scale, c.cotangent_scale) = (1.0, 1.0));
    match case.steps {
        Cut::PerInterval(m) => {
            with(&|c| c.steps = Cut::PerInterval((m / 2).max(1)));
            with(&|c| c.steps = Cut::PerInterval((m - 1).max(1)));
        }
        Cut::Size(_) => with(&|c| c.steps = Cut::PerInterval(5)),
    }
    if case.grid.fractions.len() > 2 {
        with(&|c| c.grid.fractions.truncate(c.grid.fractions.len() / 2 + 1));
        with(&|c| c.grid.fractions.truncate(c.grid.fractions.len() - 1));
    }
    if let Method::Own(a, b) = &case.method {
        // Without the last stage, whose weight the one before takes over.
        if let [head @ .., before, last] = b.as_slice() {
            let b = [head, &[before + last]].concat();
            let a = a[..b.len()].to_vec();
            with(&move |c| c.method = Method::Own(a.clone(), b.clone()));
        }
    }
    all.retain(|case| case.rows > 0 && !case.grid.fractions.is_empty());
    all
}

fn simpler(field: &Field) -> Vec<Field> {
    let mut all = vec![];
    let lists = |widths: &[usize], first_too: bool| {
        // Without a layer, then every width halved or one less.
        let mut lists = vec![];
        for i in 1..widths.len().saturating_sub(1) {
            lists.push([&widths[..i], &widths[i + 1..]].concat());
        }
        for less in [|n: usize| n.div_ceil(2), |n: usize| (n - 1).max(1)] {
            for i in 0..widths.len() - 1 {
                let mut list = widths.to_vec();
                list[i] = less(list[i]);
                if i == 0 && first_too {
                    let last = list.len() - 1;
                    list[last] = list[0];
                }
                lists.push(list);
            }
        }
        lists
    };
    match field {
        Field::Closure {
            seed,
            length,
            cols,
            ours,
        } => {
            let with = |length: usize, cols: Vec<usize>, ours| Field::Closure {
                seed: *seed,
                length,
                cols,
                ours,
            };
            for length in [0, length / 2, length.saturating_sub(1)] {
                all.push(with(length, cols.clone(), *ours));
            }
            if cols.len() > 1 {
                all.push(with(*length, cols[..cols.len() - 1].to_vec(), *ours));
            }
            let mut cols = cols.clone();
            for i in 0..cols.len() {
                let before = cols[i];
                for less in [1, before / 2, before - 1] {
                    cols[i] = less.max(1);
                    all.push(with(*length, cols.clone(), *ours));
                }
                cols[i] = before;
            }
            all.push(with(*length, cols, false));
        }
        Field::Mlp {
            widths,
            activation,
            time,
            residual,
        } => {
            let with = |widths: Vec<usize>, activation, time, residual| Field::Mlp {
                widths,
                activation,
                time,
                residual,
            };
            for widths in lists(widths, true) {
                all.push(with(widths, *activation, *time, *residual));
            }
            all.push(with(widths.clone(), *activation, *time, false));
            all.push(with(widths.clone(), *activation, false, *residual));
            all.push(with(widths.clone(), Activation::Tanh, *time, *residual));
        }
        Field::Cnf {
            widths,
            activation,
            time,
        } => {
            let with = |widths: Vec<usize>, activation, time| Field::Cnf {
                widths,
                activation,
                time,
            };
            for widths in lists(widths, true) {
                all.push(with(widths, *activation, *time));
            }
            all.push(with(widths.clone(), *activation, false));
            all.push(with(widths.clone(), Activation::Tanh, *time));
        }
        Field::Conv {
            channels,
            size,
            activation,
            groups,
            height,
            width,
        } => {
            let with =
                |channels: Vec<usize>, size, activation, groups, (height, width)| Field::Conv {
                    channels,
                    size,
                    activation,
                    groups,
                    height,
                    width,
                };
            let image = (*height, *width);
            for channels in lists(channels, true) {
                let inner = &channels[1..channels.len() - 1];
                if *groups == 0 || inner.iter().all(|c| c % groups == 0) {
                    all.push(with(channels, *size, *activation, *groups, image));
                }
            }
            for image in [
                (1, *width),
                (*height, 1),
                (height.div_ceil(2), width.div_ceil(2)),
            ] {
                all.push(with(channels.clone(), *size, *activation, *groups, image));
            }
            all.push(with(channels.clone(), 1, *activation, *groups, image));
            all.push(with(channels.clone(), *size, *activation, 0, image));
            all.push(with(
                channels.clone(),
                *size,
                Activation::Tanh,
                *groups,
                image,
            ));
        }
    }
    all.retain(|smaller| smaller != field);
    all
}
