//! The tables of the methods.

use super::equation::Calculus::{Ito, Stratonovich};
use super::table::Functional::{One, Ww, Www, U, W};
use super::table::Part::{Diffusion, Drift, MilsteinTerm};
use super::table::{Embedded, Evaluation, Functional, Part, Reach, SdeMethod, Sum, Table, Term};

/// c times an evaluation of the drift.
const fn f(of: usize, c: f64) -> Term {
    Term { of, on: One, c }
}

/// c φ times an evaluation of the diffusion.
const fn g(of: usize, on: Functional, c: f64) -> Term {
    Term { of, on, c }
}

/// y and terms.
const fn y(terms: &'static [Term]) -> Sum {
    Sum {
        base: &[1.0],
        terms,
    }
}

const fn at(part: Part, c: f64, at: Sum) -> Evaluation {
    Evaluation { part, c, at }
}

const START: [Evaluation; 2] = [at(Drift, 0.0, y(&[])), at(Diffusion, 0.0, y(&[]))];

/// Euler–Maruyama: y + f h + g ΔW.  Itô; strong order ½, one for additive noise; weak order one.
///
/// G. Maruyama, Rend. Circ. Mat. Palermo 4 (1955).
pub const EULER_MARUYAMA: SdeMethod = SdeMethod(&Table {
    name: "euler_maruyama",
    calculus: Ito,
    reach: Reach::Any,
    orders: [0.5, 1.0],
    evaluations: &START,
    next: &[y(&[f(0, 1.0), g(1, W, 1.0)])],
    embedded: None,
});

/// Milstein's method with the term ½ g ∂g/∂y (ΔW² − h), which the equation brings
/// ([`Sde::milstein_term`](crate::sde::Sde::milstein_term)).  Itô; strong order one.
///
/// G. N. Milstein, Theory Probab. Appl. 19 (1975).
pub const MILSTEIN_ITO: SdeMethod = SdeMethod(&Table {
    name: "milstein_ito",
    calculus: Ito,
    reach: Reach::NoAreas,
    orders: [1.0, 1.0],
    evaluations: &[START[0], START[1], at(MilsteinTerm, 0.0, y(&[]))],
    next: &[y(&[f(0, 1.0), g(1, W, 1.0), g(2, Ww, 1.0)])],
    embedded: None,
});

/// The same with ½ g ∂g/∂y ΔW².  Stratonovich; strong order one.
pub const MILSTEIN_STRATONOVICH: SdeMethod = SdeMethod(&Table {
    name: "milstein_stratonovich",
    calculus: Stratonovich,
    reach: Reach::NoAreas,
    orders: [1.0, 1.0],
    evaluations: &[START[0], START[1], at(MilsteinTerm, 0.0, y(&[]))],
    next: &[y(&[f(0, 1.0), g(1, W, 1.0), g(2, One, 0.5), g(2, Ww, 1.0)])],
    embedded: None,
});

/// Milstein's method without derivatives: with y* = y + f h + g √h, the term is (g(y*) − g)(ΔW² − h)/(2√h).  Itô; strong
/// order one for diagonal and scalar noise.
///
/// P. Kloeden, E. Platen, "Numerical Solution of Stochastic Differential Equations" (1992), §11.1.
pub const MILSTEIN_FREE_ITO: SdeMethod = SdeMethod(&Table {
    name: "milstein_free_ito",
    calculus: Ito,
    reach: Reach::NoAreas,
    orders: [1.0, 1.0],
    evaluations: &[
        START[0],
        START[1],
        at(Diffusion, 0.0, y(&[f(0, 1.0), g(1, One, 1.0)])),
    ],
    next: &[y(&[f(0, 1.0), g(1, W, 1.0), g(1, Ww, -1.0), g(2, Ww, 1.0)])],
    embedded: None,
});

/// The same for Stratonovich: y* = y + g √h, and (g(y*) − g) ΔW²/(2√h).  Strong order ½, and one only where g is linear in y
/// or additive: the difference has an error ½ g² g'' √h, which ΔW², unlike ΔW² − h, multiplies in the mean.  For order one
/// take [`EULER_HEUN`], at the same number of evaluations.
pub const MILSTEIN_FREE_STRATONOVICH: SdeMethod = SdeMethod(&Table {
    name: "milstein_free_stratonovich",
    calculus: Stratonovich,
    reach: Reach::NoAreas,
    orders: [0.5, 1.0],
    evaluations: &[START[0], START[1], at(Diffusion, 0.0, y(&[g(1, One, 1.0)]))],
    next: &[y(&[
        f(0, 1.0),
        g(1, W, 1.0),
        g(1, One, -0.5),
        g(1, Ww, -1.0),
        g(2, One, 0.5),
        g(2, Ww, 1.0),
    ])],
    embedded: None,
});

/// Euler–Heun: y + f h + ½ (a + g(t + h, y + a) ΔW) with a = g ΔW.  Stratonovich; strong order one, ½ for general noise.
pub const EULER_HEUN: SdeMethod = SdeMethod(&Table {
    name: "euler_heun",
    calculus: Stratonovich,
    reach: Reach::Any,
    orders: [1.0, 1.0],
    evaluations: &[START[0], START[1], at(Diffusion, 1.0, y(&[g(1, W, 1.0)]))],
    next: &[y(&[f(0, 1.0), g(1, W, 0.5), g(2, W, 0.5)])],
    embedded: None,
});

const EULER: Sum = y(&[f(0, 1.0), g(1, W, 1.0)]);

/// The sum of two parts, each of order h^{3/2} in a step.
///
/// The first is ½ (f_2 − f_0) h − ½ (g_3 − g_4) ΔW with g_4 at t and y + g ΔW.  It is ½ (f′g − g′f − ∂g/∂t) h ΔW and more of
/// higher order.  In a step, drift, noise and time contribute (f′g − g′f − ∂g/∂t) (U − ½ h ΔW) to the error of Heun's method,
/// whose root mean square is smaller by a factor of √3.  The second part is the difference from the
/// strong-stability-preserving method of order three (C.-W. Shu, S. Osher, J. Comput. Phys. 77, 1988), which shares the
/// stages of Heun's method: ⅓ (f_0 + f_2 − 2 f_5) h + ⅓ (g_1 + g_3 − 2 g_6) ΔW with f_5 and g_6 in the middle.  It contains
/// what the noise does to itself.
const EMBEDDED_IN_HEUN: Embedded = Embedded {
    evaluations: &[
        at(Diffusion, 0.0, y(&[g(1, W, 1.0)])),
        at(Drift, 0.5, MIDDLE),
        at(Diffusion, 0.5, MIDDLE),
    ],
    error: Sum {
        base: &[0.0],
        terms: &[
            f(0, -1.0 / 6.0),
            g(1, W, 1.0 / 3.0),
            f(2, 5.0 / 6.0),
            g(3, W, -1.0 / 6.0),
            g(4, W, 0.5),
            f(5, -2.0 / 3.0),
            g(6, W, -2.0 / 3.0),
        ],
    },
    order: 1.5,
};

const MIDDLE: Sum = y(&[f(0, 0.25), g(1, W, 0.25), f(2, 0.25), g(3, W, 0.25)]);

/// Heun's method: the mean of f h + g ΔW at the start and at the end of a step of Euler's method.  Stratonovich; strong
/// order one, ½ for general noise.  With adaptive steps it estimates its error by what drift, noise and time do to each
/// other in a step and by its difference from a method of order three, added.
pub const HEUN: SdeMethod = SdeMethod(&Table {
    name: "heun",
    calculus: Stratonovich,
    reach: Reach::Any,
    orders: [1.0, 1.0],
    evaluations: &[
        START[0],
        START[1],
        at(Drift, 1.0, EULER),
        at(Diffusion, 1.0, EULER),
    ],
    next: &[y(&[f(0, 0.5), g(1, W, 0.5), f(2, 0.5), g(3, W, 0.5)])],
    embedded: Some(&EMBEDDED_IN_HEUN),
});

const HALF: Sum = y(&[f(0, 0.5), g(1, W, 0.5)]);

/// The midpoint method: f h + g ΔW in the middle of a step of Euler's method.  Stratonovich; strong order one, ½ for
/// general noise.
pub const MIDPOINT: SdeMethod = SdeMethod(&Table {
    name: "midpoint",
    calculus: Stratonovich,
    reach: Reach::Any,
    orders: [1.0, 1.0],
    evaluations: &[
        START[0],
        START[1],
        at(Drift, 0.5, HALF),
        at(Diffusion, 0.5, HALF),
    ],
    next: &[y(&[f(2, 1.0), g(3, W, 1.0)])],
    embedded: None,
});

/// z' of reversible Heun: 2y − z + f h + g ΔW.
const REFLECTED: Sum = Sum {
    base: &[2.0, -1.0],
    terms: &[f(0, 1.0), g(1, W, 1.0)],
};

const AT_Z: Sum = Sum {
    base: &[0.0, 1.0],
    terms: &[],
};

/// Reversible Heun, with a second state z: z' = 2y − z + f(z) h + g(z) ΔW, and y moves by the mean of f h + g ΔW at z and
/// z'.  Stratonovich; strong order ½ in general and one for additive noise, and one is what is measured on diagonal and
/// scalar noise.  f and g are evaluated at z' again in the next step.
///
/// P. Kidger, J. Foster, X. Li, T. Lyons, "Efficient and accurate gradients for neural SDEs", NeurIPS 2021.
pub const REVERSIBLE_HEUN: SdeMethod = SdeMethod(&Table {
    name: "reversible_heun",
    calculus: Stratonovich,
    reach: Reach::Any,
    orders: [1.0, 1.0],
    evaluations: &[
        at(Drift, 0.0, AT_Z),
        at(Diffusion, 0.0, AT_Z),
        at(Drift, 1.0, REFLECTED),
        at(Diffusion, 1.0, REFLECTED),
    ],
    next: &[
        Sum {
            base: &[1.0, 0.0],
            terms: &[f(0, 0.5), g(1, W, 0.5), f(2, 0.5), g(3, W, 0.5)],
        },
        REFLECTED,
    ],
    embedded: None,
});

/// SRA1 for additive noise.  Itô and Stratonovich; strong order 1.5.
///
/// A. Rößler, "Runge–Kutta methods for the strong approximation of solutions of stochastic differential equations", SIAM J.
/// Numer. Anal. 48 (2010), table 2.
pub const SRA1: SdeMethod = SdeMethod(&Table {
    name: "sra1",
    calculus: Ito,
    reach: Reach::Additive,
    orders: [1.5, 1.5],
    evaluations: &[
        at(Drift, 0.0, y(&[])),
        at(Diffusion, 1.0, y(&[])),
        at(Diffusion, 0.0, y(&[])),
        at(Drift, 0.75, y(&[f(0, 0.75), g(1, U, 1.5)])),
    ],
    next: &[y(&[
        f(0, 1.0 / 3.0),
        g(1, W, 1.0),
        g(1, U, -1.0),
        g(2, U, 1.0),
        f(3, 2.0 / 3.0),
    ])],
    embedded: None,
});

/// SRI2 for diagonal and scalar noise.  Itô; strong order 1.5.
///
/// A. Rößler, as [`SRA1`], table 1.
pub const SRI2: SdeMethod = SdeMethod(&Table {
    name: "sri2",
    calculus: Ito,
    reach: Reach::NoAreas,
    orders: [1.5, 1.5],
    evaluations: &[
        START[0],
        START[1],
        at(Drift, 1.0, y(&[f(0, 1.0)])),
        at(Diffusion, 0.25, y(&[f(0, 0.25), g(1, One, -0.5)])),
        at(
            Drift,
            0.5,
            y(&[f(0, 0.25), g(1, U, 1.0), f(2, 0.25), g(3, U, 0.5)]),
        ),
        at(Diffusion, 1.0, y(&[f(0, 1.0), g(1, One, 1.0)])),
        at(
            Diffusion,
            0.25,
            y(&[g(1, One, 2.0), g(3, One, -1.0), f(4, 0.25), g(5, One, 0.5)]),
        ),
    ],
    next: &[y(&[
        f(0, 1.0 / 6.0),
        g(1, W, -1.0),
        g(1, Ww, 1.0),
        g(1, U, 2.0),
        g(1, Www, -2.0),
        f(2, 1.0 / 6.0),
        g(3, W, 4.0 / 3.0),
        g(3, Ww, -4.0 / 3.0),
        g(3, U, -4.0 / 3.0),
        g(3, Www, 5.0 / 3.0),
        f(4, 2.0 / 3.0),
        g(5, W, 2.0 / 3.0),
        g(5, Ww, 1.0 / 3.0),
        g(5, U, -2.0 / 3.0),
        g(5, Www, -2.0 / 3.0),
        g(6, Www, 1.0),
    ])],
    embedded: None,
});

/// Every method.
pub const ALL: [SdeMethod; 11] = [
    EULER_MARUYAMA,
    MILSTEIN_ITO,
    MILSTEIN_STRATONOVICH,
    MILSTEIN_FREE_ITO,
    MILSTEIN_FREE_STRATONOVICH,
    EULER_HEUN,
    HEUN,
    MIDPOINT,
    REVERSIBLE_HEUN,
    SRA1,
    SRI2,
];

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_distr::StandardNormal;

    use super::*;

    /// ⟨1, coefficients⟩ of a part on a functional.
    fn total(table: &Table, sum: &Sum, part: Part, on: Functional) -> f64 {
        let terms = sum.terms.iter();
        let of = terms.filter(|t| t.on == on && table.evaluations[t.of].part == part);
        of.map(|t| t.c).sum()
    }

    #[test]
    fn every_method_is_consistent() {
        for SdeMethod(table) in ALL {
            let y = &table.next[0];
            let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-14, "{}", table.name);
            // With constant f and g, y grows by f h + g ΔW and nothing else.
            close(total(table, y, Drift, One), 1.0);
            close(total(table, y, Diffusion, W), 1.0);
            for on in [One, Ww, U, Www] {
                close(total(table, y, Diffusion, on), 0.0);
            }
            for evaluation in table.evaluations {
                close(evaluation.at.base.iter().sum(), 1.0);
                // f at t + c h is f at the drift's distance.
                if evaluation.part == Drift {
                    close(total(table, &evaluation.at, Drift, One), evaluation.c);
                }
            }
        }
    }

    #[test]
    fn an_embedded_solution_is_consistent_and_falls_with_the_order_of_the_step() {
        for SdeMethod(table) in ALL {
            let Some(embedded) = table.embedded else {
                continue;
            };
            let all: Vec<_> = table
                .evaluations
                .iter()
                .chain(embedded.evaluations)
                .collect();
            for part in [Drift, Diffusion] {
                for on in [One, W, Ww, U, Www] {
                    // With constant f and g all solutions are the same.
                    let terms = embedded.error.terms.iter();
                    let of = terms.filter(|t| t.on == on && all[t.of].part == part);
                    let sum = of.map(|t| t.c).sum::<f64>();
                    assert!(sum.abs() <= 1e-15, "{}: {sum:e}", table.name);
                }
            }
            assert_eq!(embedded.order, table.orders[0] + 0.5);
        }
    }

    /// The evaluations of a step of f and g, one number each, and the sums that are asked for.
    fn step(
        table: &Table,
        [f, g]: [&dyn Fn(f64, f64) -> f64; 2],
        [t, h, dw]: [f64; 3],
        y: f64,
    ) -> [f64; 2] {
        let embedded = table.embedded.unwrap();
        let mut done: Vec<(Part, f64)> = vec![];
        let sum = |sum: &Sum, done: &[(Part, f64)]| {
            let terms = sum.terms.iter().map(|term| {
                let (part, value) = done[term.of];
                term.c * value * if part == Drift { h } else { dw }
            });
            sum.base[0] * y + terms.sum::<f64>()
        };
        for evaluation in table.evaluations.iter().chain(embedded.evaluations) {
            let at = (t + evaluation.c * h, sum(&evaluation.at, &done));
            let value = match evaluation.part {
                Drift => f(at.0, at.1),
                _ => g(at.0, at.1),
            };
            done.push((evaluation.part, value));
        }
        [
            sum(&table.next[0], &done),
            sum(&embedded.error, &done).abs(),
        ]
    }

    #[test]
    fn the_estimate_of_heun_is_of_the_size_of_its_error_whatever_the_equation() {
        type Function = fn(f64, f64) -> f64;
        let equations: [(&str, Function, Function); 6] = [
            ("f and g commute", |_, y| -y, |_, y| 0.5 * y),
            ("f g is constant", |_, y| 1.0 / y, |_, y| 0.3 * y),
            ("noise in time", |_, _| 0.0, |t, _| 1.0 + 10.0 * t),
            (
                "drift and noise in time",
                |_, y| -y,
                |t, _| 1.5 + (20.0 * t).cos(),
            ),
            ("noise alone", |_, _| 0.0, |_, y| (1.0 + y * y).sqrt()),
            (
                "both",
                |_, y| y - y * y * y,
                |_, y| 0.5 * (1.0 + y * y).sqrt(),
            ),
        ];
        const PATHS: usize = 400;
        const PARTS: usize = 32;
        let mut draw = rand::rngs::StdRng::seed_from_u64(5);
        for (name, f, g) in equations {
            for h in [0.1, 0.01] {
                let (mut errors, mut estimates) = (0.0, 0.0);
                for _ in 0..PATHS {
                    let part = h / PARTS as f64;
                    let increments: Vec<f64> = (0..PARTS)
                        .map(|_| part.sqrt() * draw.sample::<f64, _>(StandardNormal))
                        .collect();
                    let dw = increments.iter().sum();
                    let [y, estimate] = step(HEUN.0, [&f, &g], [0.05, h, dw], 1.0);
                    let exact = increments.iter().enumerate().fold(1.0, |y, (i, &dw)| {
                        step(HEUN.0, [&f, &g], [0.05 + i as f64 * part, part, dw], y)[0]
                    });
                    errors += (y - exact).powi(2);
                    estimates += estimate.powi(2);
                }
                let ratio = (estimates / errors).sqrt();
                assert!((0.8..5.0).contains(&ratio), "{name}, h = {h}: {ratio}");
            }
        }
    }

    #[test]
    fn sums_read_earlier_evaluations_in_order_and_every_state() {
        for SdeMethod(table) in ALL {
            let ascending = |sum: &Sum, before: usize| {
                let of = sum.terms.iter().map(|t| t.of);
                of.clone().is_sorted() && of.clone().all(|of| of < before)
            };
            for (i, evaluation) in table.evaluations.iter().enumerate() {
                assert!(ascending(&evaluation.at, i), "{}", table.name);
                assert_eq!(evaluation.at.base.len(), table.next.len());
            }
            for sum in table.next {
                assert!(ascending(sum, table.evaluations.len()), "{}", table.name);
                assert_eq!(sum.base.len(), table.next.len());
            }
        }
    }
}
