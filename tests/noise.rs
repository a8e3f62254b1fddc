//! Noise: its statistics, and that its bits depend on the seed and the place only.
//!
//! `cargo test --release --test noise`, seconds.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::error::SdeDefect;
use candle_diffeq::sde::{BrownianTree, Increments, Noise};
use candle_diffeq::Error;
use common::values;

/// Increments over so many steps of length one quarter.
fn increments(noise: &Noise, steps: usize, shape: (usize, usize)) -> Increments {
    let grid: Vec<_> = (0..=steps).map(|n| 0.25 * n as f64).collect();
    noise
        .increments(&grid, shape, DType::F64, &Device::Cpu)
        .unwrap()
}

/// Increments and integrals in units of the step, `[step][row][channel]`.
fn drawn(noise: &Noise, steps: usize, shape: (usize, usize)) -> [Vec<f64>; 2] {
    let all = increments(noise, steps, shape);
    let scaled = |x, c: f64| values(x).into_iter().map(|x| c * x).collect();
    // √h = ½ is a power of two, so that no bit changes.
    [scaled(all.w(), 2.0), scaled(all.u().unwrap(), 8.0)]
}

fn mean(x: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = x.fold((0.0, 0), |(sum, count), x| (sum + x, count + 1));
    sum / f64::from(count)
}

/// Every kind of noise, 2¹⁷ increments at least: a tree whose nodes are the times, and one whose finest interval is little
/// shorter than a step, which ends anywhere in it.
fn every_kind() -> [(Noise, [Vec<f64>; 2]); 3] {
    let tree = |depth| Noise::from(BrownianTree::new(11, depth).unwrap());
    [(Noise::seeded(11), 64), (tree(16), 64), (tree(7), 100)].map(|(noise, steps)| {
        let all = drawn(&noise, steps, (512, 4));
        (noise, all)
    })
}

#[test]
fn increments_have_the_moments_of_brownian_motion() {
    for (noise, [w, u]) in every_kind() {
        let n = w.len() as f64;
        // Five standard deviations of each mean of n numbers.
        let near = |what: &str, got: f64, exact: f64, deviation: f64| {
            let bound = 5.0 * deviation / n.sqrt();
            assert!((got - exact).abs() <= bound, "{what} of {noise:?}: {got}");
        };
        near("mean", mean(w.iter().copied()), 0.0, 1.0);
        near("variance", mean(w.iter().map(|w| w * w)), 1.0, 2f64.sqrt());
        near(
            "skewness",
            mean(w.iter().map(|w| w.powi(3))),
            0.0,
            15f64.sqrt(),
        );
        near(
            "kurtosis",
            mean(w.iter().map(|w| w.powi(4))),
            3.0,
            96f64.sqrt(),
        );
        near(
            "mean of U",
            mean(u.iter().copied()),
            0.0,
            (1f64 / 3.0).sqrt(),
        );
        near(
            "variance of U",
            mean(u.iter().map(|u| u * u)),
            1.0 / 3.0,
            2f64.sqrt() / 3.0,
        );
        let both = w.iter().zip(&u).map(|(w, u)| w * u);
        near("covariance", mean(both), 0.5, (1f64 / 3.0 + 0.25).sqrt());
    }
}

#[test]
fn increments_of_neighbours_in_step_row_and_channel_are_uncorrelated() {
    for (noise, [w, _]) in every_kind() {
        for apart in [1, 4, 2048] {
            let products = w.iter().zip(&w[apart..]).map(|(a, b)| a * b);
            let bound = 5.0 / (w.len() as f64).sqrt();
            let got = mean(products);
            assert!(got.abs() <= bound, "{apart} apart of {noise:?}: {got}");
        }
    }
}

#[test]
fn the_distribution_is_normal_in_its_tails() {
    for (noise, [w, _]) in every_kind() {
        for (beyond, share) in [
            (1.0, 0.317_310_5),
            (2.0, 0.045_500_26),
            (3.0, 0.002_699_796),
        ] {
            let got = mean(w.iter().map(|w| f64::from(u8::from(w.abs() > beyond))));
            let bound = 5.0 * (share / w.len() as f64).sqrt();
            assert!((got - share).abs() <= bound, "{beyond} of {noise:?}: {got}");
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    for noise in [Noise::seeded(3), BrownianTree::new(3, 12).unwrap().into()] {
        let [whole, _] = drawn(&noise, 3, (40, 3));
        let [few, _] = drawn(&noise, 3, (7, 3));
        let [part, _] = drawn(&noise.from_row(11), 3, (7, 3));
        for step in 0..3 {
            let of = |first: usize| &whole[(step * 40 + first) * 3..][..21];
            assert_eq!(&few[step * 21..][..21], of(0));
            assert_eq!(&part[step * 21..][..21], of(11));
        }
    }
}

#[test]
fn bits_are_the_same_on_every_number_of_threads() {
    for noise in [Noise::seeded(5), BrownianTree::new(5, 10).unwrap().into()] {
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().unwrap();
            pool.install(|| drawn(&noise, 4, (5000, 3)))
        };
        let one = on(1);
        assert_eq!(one, on(7));
    }
}

#[test]
fn the_bits_are_these_on_every_machine_and_vector_unit() {
    // Run under CANDLE_DIFFEQ_SIMD=avx512, avx2 and none.
    let [w, u] = drawn(&Noise::seeded(9), 2, (37, 5));
    let [tree, _] = drawn(&BrownianTree::new(9, 12).unwrap().into(), 2, (37, 5));
    let bits = [w[0], w[1], u[0], u[369], tree[7]].map(f64::to_bits);
    // The first two were computed by the same formulas in Python.
    let known = [
        0x3fe0_b622_0c70_246b,
        0xbfd1_17e8_094e_b7d2,
        0x3fd7_dcf6_1c1f_afe6,
        0xbfd8_e762_86b8_ab1a,
        0xbfea_91b5_4201_0030,
    ];
    assert_eq!(bits, known, "{bits:#018x?}");
}

#[test]
fn refinement_of_a_tree_keeps_what_was_there() {
    let noise = Noise::from(BrownianTree::new(17, 24).unwrap());
    let increments = |grid: &[f64]| {
        noise
            .increments(grid, (6, 2), DType::F64, &Device::Cpu)
            .unwrap()
    };
    let grid = |n: usize| {
        (0..=n)
            .map(|i| 2.0 + 3.0 * i as f64 / n as f64)
            .collect::<Vec<_>>()
    };
    // Of numbers of steps that are no powers of two, too.
    for (fine, k) in [(96, 3), (128, 16), (35, 7)] {
        let coarse = increments(&grid(fine / k));
        let joined = increments(&grid(fine))
            .coarsened(k, 3.0 / fine as f64)
            .unwrap();
        for (a, b) in [
            (joined.w(), coarse.w()),
            (joined.u().unwrap(), coarse.u().unwrap()),
        ] {
            let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap();
            // Sums of a hundred terms of size one.
            assert!(difference.to_scalar::<f64>().unwrap() < 1e-13);
        }
    }
}

#[test]
fn a_step_that_a_tree_does_not_resolve_is_an_error() {
    let noise = Noise::from(BrownianTree::new(17, 4).unwrap());
    let grid: Vec<_> = (0..=17).map(|i| f64::from(i) / 17.0).collect();
    let found = noise.increments(&grid, (1, 1), DType::F64, &Device::Cpu);
    assert!(matches!(
        found,
        Err(Error::Sde(SdeDefect::TreeTooCoarse { .. }))
    ));
    assert!(BrownianTree::new(17, 53).is_err());
}

#[test]
fn rows_that_32_bits_do_not_number_are_refused() {
    for noise in [
        || Noise::seeded(1),
        || Noise::from(BrownianTree::new(1, 4).unwrap()),
    ] {
        let draw = |first_row: u64| {
            let noise = noise().from_row(first_row);
            noise.increments(&[0.0, 1.0], (2, 1), DType::F64, &Device::Cpu)
        };
        assert!(draw((1 << 32) - 2).is_ok());
        for first_row in [(1 << 32) - 1, 1 << 32, u64::MAX] {
            let end = u128::from(first_row) + 2;
            match draw(first_row) {
                Err(Error::Sde(found)) => assert_eq!(found, SdeDefect::TooManyRows { end }),
                other => panic!("{other:?}"),
            }
        }
    }
    // Of no row, nothing is numbered.
    let none = Noise::seeded(1).from_row(1 << 32);
    assert!(none
        .increments(&[0.0, 1.0], (0, 1), DType::F64, &Device::Cpu)
        .is_ok());
}

#[test]
fn given_increments_are_converted_and_keep_their_gradients() {
    let w = Var::new(&[[[0.1f64, 1.0 + 1e-12]]], &Device::Cpu).unwrap();
    let given = Increments::new(w.as_tensor().clone());
    let given = given.with_integrals((w.as_tensor() * 0.5).unwrap());
    let noise = Noise::from(given.unwrap());
    let got = noise
        .increments(&[0.0, 1.0], (1, 2), DType::F32, &Device::Cpu)
        .unwrap();
    assert_eq!(got.w().dtype(), DType::F32);
    assert_eq!(got.u().unwrap().dtype(), DType::F32);
    assert_eq!(values(got.w()), [f64::from(0.1f32), 1.0]);
    let grads = got.w().sum_all().unwrap().backward().unwrap();
    assert_eq!(values(grads.get(&w).unwrap()), [1.0, 1.0]);
}

#[test]
fn increments_without_steps_and_rows_cannot_be_joined() {
    for shape in [&[][..], &[4]] {
        let x = || Tensor::zeros(shape, DType::F64, &Device::Cpu).unwrap();
        let plain = Increments::new(x());
        let both = Increments::new(x()).with_integrals(x()).unwrap();
        for increments in [plain, both] {
            assert!(matches!(
                increments.coarsened(1, 0.5),
                Err(Error::Sde(SdeDefect::Mismatch { .. }))
            ));
        }
    }
    // One channel need not have a dimension.
    let x = Tensor::ones((4, 3), DType::F64, &Device::Cpu).unwrap();
    let joined = Increments::new(x).coarsened(2, 0.5).unwrap();
    assert_eq!(values(joined.w()), [2.0; 6]);
}
