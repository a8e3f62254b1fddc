//! Tableaux: row sums and order conditions of every constant, and what makes a tableau invalid.

#[path = "../src/every_core.rs"]
mod every_core;

use candle_diffeq::error::TableauDefect;
use candle_diffeq::tableau::{Tableau, BOSH3, DOPRI5, DOPRI8, FEHLBERG45, RK4, TSIT5};
use candle_diffeq::Error;

fn defect(result: candle_diffeq::Result<impl std::fmt::Debug>) -> TableauDefect {
    match result.unwrap_err() {
        Error::InvalidTableau { defect, .. } => defect,
        other => panic!("{other}"),
    }
}

#[test]
fn every_constant_meets_the_conditions_of_its_order() {
    for tableau in Tableau::ALL {
        tableau.check().unwrap();
    }
}

#[test]
fn no_constant_meets_the_conditions_of_one_order_more() {
    for tableau in Tableau::ALL.iter().filter(|t| t.order() < 8) {
        let more = tableau.order() + 1;
        match defect(tableau.check_weights(tableau.b(), more)) {
            TableauDefect::OrderCondition {
                order, residual, ..
            } => {
                assert_eq!(order, more);
                assert!(residual.abs() > 1e-5, "{}: {residual:e}", tableau.name());
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn embedded_weights_have_their_own_order() {
    for (pair, order) in [
        (BOSH3, 2),
        (FEHLBERG45, 4),
        (DOPRI5, 4),
        (TSIT5, 4),
        (DOPRI8, 7),
    ] {
        let weights = pair.embedded().unwrap().to_vec();
        pair.check_weights(&weights, order).unwrap();
        defect(pair.check_weights(&weights, order + 1));
    }
}

#[test]
fn a_stage_that_nothing_depends_on_is_not_active() {
    for (tableau, evaluations) in [
        (BOSH3, 3),
        (DOPRI5, 6),
        (TSIT5, 6),
        (RK4, 4),
        (FEHLBERG45, 6),
    ] {
        let active = tableau.active();
        assert_eq!(
            active.iter().filter(|&&a| a).count(),
            evaluations,
            "{}",
            tableau.name()
        );
    }
}

#[test]
fn a_wrong_sixth_digit_is_found_in_every_row() {
    for tableau in Tableau::ALL.iter().filter(|t| t.order() > 2) {
        let rows = || {
            (0..tableau.stages())
                .map(|i| tableau.a(i).to_vec())
                .collect()
        };
        let active = tableau.active();
        for i in (2..tableau.stages()).filter(|&i| active[i]) {
            // The row sum is kept, so that only order conditions can tell.
            let mut a: Vec<Vec<f64>> = rows();
            a[i][0] -= 1e-6;
            a[i][1] += 1e-6;
            let (b, c) = (tableau.b().to_vec(), tableau.c().to_vec());
            let found = defect(Tableau::new("wrong", tableau.order(), a, b, c));
            let expected = matches!(found, TableauDefect::OrderCondition { .. });
            assert!(expected, "{} row {i}: {found}", tableau.name());
        }
    }
}

#[test]
fn cancellation_and_overflow_satisfy_no_condition() {
    use TableauDefect as D;
    let two = || vec![vec![], vec![1.0]];
    for b in [[1e13, -1e13], [1e308, 1e308], [f64::MAX, -f64::MAX]] {
        let found = defect(euler(two(), b.to_vec(), vec![0.0, 1.0]));
        assert!(
            matches!(found, D::OrderCondition { order: 1, .. }),
            "{found}"
        );
    }
    for last in [[1e13, -1e13], [1e308, 1e308]] {
        let a = vec![vec![], vec![1.0], last.to_vec()];
        let found = defect(euler(a, vec![1.0, 0.0, 0.0], vec![0.0, 1.0, 7.0]));
        assert!(matches!(found, D::RowSum { row: 2, .. }), "{found}");
    }
}

#[test]
fn weights_are_checked_for_length_and_nan() {
    let found = defect(RK4.check_weights(&[1.0], 1));
    let (what, stages, got) = ("weights", 4, 1);
    assert_eq!(found, TableauDefect::Length { what, stages, got });
    let nan = [f64::NAN, 0.0, 0.0, 0.0];
    let found = defect(RK4.check_weights(&nan, 1));
    assert!(
        matches!(found, TableauDefect::OrderCondition { .. }),
        "{found}"
    );
}

#[test]
fn weights_that_miss_a_condition_are_named() {
    let what_of = |error: TableauDefect| match error {
        TableauDefect::OrderCondition { what, .. } => what,
        other => panic!("{other}"),
    };
    let two = || vec![vec![], vec![1.0]];
    let b = euler(two(), vec![0.5, 0.6], vec![0.0, 1.0]);
    let heun = euler(two(), vec![0.5, 0.5], vec![0.0, 1.0]).unwrap();
    let given = heun.check_weights(&[0.5, 0.6], 1);
    let embedded = defect(heun.with_embedded(vec![0.5, 0.6]));
    assert!(embedded.to_string().contains("embedded"), "{embedded}");
    let found = [defect(b), embedded, defect(given)];
    assert_eq!(found.map(what_of), ["b", "embedded", "weights"]);
}

fn euler(a: Vec<Vec<f64>>, b: Vec<f64>, c: Vec<f64>) -> candle_diffeq::Result<Tableau> {
    Tableau::new("mine", 1, a, b, c)
}

#[test]
fn each_defect_is_named() {
    use TableauDefect as D;
    let two = || vec![vec![], vec![0.5]];
    let midpoint = || Tableau::new("mine", 2, two(), vec![0.0, 1.0], vec![0.0, 0.5]).unwrap();
    for (result, expected) in [
        (euler(vec![], vec![], vec![]), D::NoStages),
        (
            euler(vec![vec![]], vec![0.5, 0.5], vec![0.0, 1.0]),
            D::Length {
                what: "a",
                stages: 2,
                got: 1,
            },
        ),
        (
            euler(two(), vec![0.5, 0.5], vec![0.0]),
            D::Length {
                what: "c",
                stages: 2,
                got: 1,
            },
        ),
        (
            euler(vec![vec![], vec![0.5, 0.5]], vec![0.5, 0.5], vec![0.0, 1.0]),
            D::RowLength { row: 1, got: 2 },
        ),
        (
            euler(vec![vec![], vec![f64::NAN]], vec![0.5, 0.5], vec![0.0, 1.0]),
            D::NonFinite { what: "a" },
        ),
        (
            euler(two(), vec![0.5, f64::INFINITY], vec![0.0, 0.5]),
            D::NonFinite { what: "b" },
        ),
        (
            euler(two(), vec![0.5, 0.5], vec![0.0, f64::NAN]),
            D::NonFinite { what: "c" },
        ),
        (
            midpoint().with_embedded(vec![1.0, f64::NAN]),
            D::NonFinite { what: "embedded" },
        ),
        (
            midpoint().with_embedded(vec![1.0]),
            D::Length {
                what: "embedded",
                stages: 2,
                got: 1,
            },
        ),
        (
            euler(two(), vec![0.5, 0.5], vec![0.0, 0.75]),
            D::RowSum {
                row: 1,
                sum: 0.5,
                c: 0.75,
            },
        ),
        (
            Tableau::new("mine", 0, vec![vec![]], vec![1.0], vec![0.0]),
            D::OrderUnsupported { order: 0 },
        ),
        (
            Tableau::new("mine", 9, vec![vec![]], vec![1.0], vec![0.0]),
            D::OrderUnsupported { order: 9 },
        ),
        (
            euler(vec![vec![]], vec![0.75], vec![0.0]),
            D::OrderCondition {
                what: "b",
                order: 1,
                tree: "[]".into(),
                residual: -0.25,
            },
        ),
        (
            Tableau::new("mine", 2, vec![vec![]], vec![1.0], vec![0.0]),
            D::OrderCondition {
                what: "b",
                order: 2,
                tree: "[[]]".into(),
                residual: -0.5,
            },
        ),
        (
            midpoint().with_embedded(vec![0.25, 0.25]),
            D::OrderCondition {
                what: "embedded",
                order: 1,
                tree: "[]".into(),
                residual: -0.5,
            },
        ),
    ] {
        let got = defect(result);
        // NaN is not equal to itself, so defects are compared as text.
        assert_eq!(got.to_string(), expected.to_string());
    }
}

#[test]
fn a_users_own_tableau_is_as_good_as_a_constant() {
    // Nyström's method of order three.
    let a = vec![vec![], vec![2.0 / 3.0], vec![0.0, 2.0 / 3.0]];
    let (b, c) = (vec![0.25, 0.375, 0.375], vec![0.0, 2.0 / 3.0, 2.0 / 3.0]);
    let nystrom = Tableau::new("nystrom3", 3, a, b, c).unwrap();
    assert_eq!(
        (nystrom.name(), nystrom.order(), nystrom.stages()),
        ("nystrom3", 3, 3)
    );
    assert_eq!(nystrom.a(2), [0.0, 2.0 / 3.0]);
    assert_eq!(nystrom.a(7), [0.0; 0]);
    let paired = nystrom.with_embedded(vec![1.0, 0.0, 0.0]).unwrap();
    assert_eq!(paired.embedded(), Some(&[1.0, 0.0, 0.0][..]));
}
