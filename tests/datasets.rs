//! Data to learn from: points of their classes, and systems against the formulas of textbooks.
//!
//! `cargo test --test datasets`, seconds.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::datasets::{Labelled, System};
use candle_diffeq::options::TimeGrid;
use candle_diffeq::tableau::RK4;
use candle_diffeq::{predict, Time, VectorField};
use common::{method, scattered, values, worst};

const SYSTEMS: [System; 8] = [
    System::LORENZ,
    System::VanDerPol { mu: 1.0 },
    System::RABINOVICH_FABRIKANT,
    System::MassSpring {
        mass: 0.5,
        stiffness: 2.0,
    },
    System::Pendulum {
        inertia: 0.5,
        weight: 3.0,
    },
    System::DoublePendulum { gravity: 9.8 },
    System::Acrobot { gravity: 9.8 },
    System::TwoBodies,
];

fn velocity(system: System, x: &[f64]) -> Vec<f64> {
    let t = Time::new(0.0, DType::F64, &Device::Cpu);
    let x = Tensor::from_slice(x, (1, x.len()), &Device::Cpu).unwrap();
    values(&system.velocity(&t, &x).unwrap())
}

#[test]
fn energies_stay_as_they_are_along_solutions() {
    let times = TimeGrid::linspace(0.0, 2.0, 5).unwrap();
    for system in SYSTEMS {
        let mut x = scattered(&[3, system.features()], 0.8, 1);
        if system == System::TwoBodies {
            // On a circle: bodies that meet have no velocity.
            let circle = [[1.0, 0.0, -1.0, 0.0, 0.0, 0.5, 0.0, -0.5]];
            x = Tensor::new(&circle, &Device::Cpu).unwrap();
        }
        let xs = predict(&system, &x, &times, &method(&RK4, 400)).unwrap();
        let Some(energy) = system.energy(&xs).unwrap() else {
            continue;
        };
        assert_eq!(energy.dims(), [&xs.dims()[..2], &[1]].concat());
        let first = energy.get(0).unwrap();
        let drift = worst(values(&energy.broadcast_sub(&first).unwrap()));
        assert!(drift < 1e-6, "{system:?}: {drift:e}");
    }
}

#[test]
fn velocities_are_those_of_the_formulas() {
    let close = |system, x: &[f64], expected: &[f64]| {
        let got = velocity(system, x);
        let off = worst(got.iter().zip(expected).map(|(a, b)| a - b));
        assert!(off < 1e-14, "{system:?}: {got:?} {expected:?}");
    };
    close(System::LORENZ, &[1.0, 2.0, 3.0], &[10.0, 23.0, -6.0]);
    close(System::VanDerPol { mu: 2.0 }, &[0.5, -1.0], &[-1.0, -2.0]);
    let fabrikant = [
        2.0 * (3.0 - 1.0 + 1.0) + 0.1,
        9.0 + 0.2,
        -6.0 * (0.14 + 2.0),
    ];
    close(System::RABINOVICH_FABRIKANT, &[1.0, 2.0, 3.0], &fabrikant);
    let spring = System::MassSpring {
        mass: 0.5,
        stiffness: 2.0,
    };
    close(spring, &[0.3, 0.7], &[1.4, -0.6]);
    let pendulum = System::Pendulum {
        inertia: 0.5,
        weight: 3.0,
    };
    close(pendulum, &[0.3, 0.7], &[1.4, -3.0 * 0.3f64.sin()]);
    // What hangs still stays so.
    let double = System::DoublePendulum { gravity: 9.8 };
    close(double, &[0.0; 4], &[0.0; 4]);
    close(System::Acrobot { gravity: 9.8 }, &[0.0; 6], &[0.0; 6]);
    let apart = [0.0, 0.0, 2.0, 0.0, 0.1, 0.2, 0.3, 0.4];
    close(
        System::TwoBodies,
        &apart,
        &[0.1, 0.2, 0.3, 0.4, 0.25, 0.0, -0.25, 0.0],
    );
}

/// M(θ) ω' of the double pendulum, by Lagrange: 2ω₁' + ω₂' cos Δ + ω₂² sin Δ + 2g sin θ₁ = 0 and
/// ω₂' + ω₁' cos Δ − ω₁² sin Δ + g sin θ₂ = 0.
#[test]
fn a_double_pendulum_solves_the_equations_of_lagrange() {
    let x = [0.4f64, -0.9, 1.3, -0.7];
    let k = velocity(System::DoublePendulum { gravity: 9.8 }, &x);
    let apart = x[0] - x[1];
    let first = 2.0 * k[2] + k[3] * apart.cos() + x[3] * x[3] * apart.sin() + 19.6 * x[0].sin();
    let second = k[3] + k[2] * apart.cos() - x[2] * x[2] * apart.sin() + 9.8 * x[1].sin();
    assert!(
        first.abs() < 1e-13 && second.abs() < 1e-13,
        "{first:e} {second:e}"
    );
}

/// The acrobot without torques, of which no energy is lost.
#[test]
fn an_acrobot_without_torques_keeps_its_energy() {
    let (g, c) = (9.8, 0.5f64);
    let energy = |x: &[f64]| {
        let (a, b, u, v) = (x[0], x[1], x[2], x[3]);
        // Kinetic energies of both centres of mass, and of the rotations.
        let speed = u * u + c * c * (u + v).powi(2) + 2.0 * c * u * (u + v) * b.cos();
        let kinetic = 0.5 * (c * c * u * u + speed + u * u + (u + v).powi(2));
        kinetic - g * (c * a.cos() + a.cos() + c * (a + b).cos())
    };
    let x0 = Tensor::new(&[[0.5, -0.8, 0.3, 0.4, 0.0, 0.0]], &Device::Cpu).unwrap();
    let times = TimeGrid::linspace(0.0, 2.0, 5).unwrap();
    let system = System::Acrobot { gravity: g };
    let xs = values(&predict(&system, &x0, &times, &method(&RK4, 400)).unwrap());
    let drift = xs.chunks(6).map(|x| energy(x) - energy(&xs[..6]));
    let drift = worst(drift);
    assert!(drift < 1e-7, "{drift:e}");
}

#[test]
fn points_lie_where_their_classes_are_and_are_the_same_for_a_seed() {
    let sets = [
        Labelled::Moons { noise: 0.0 },
        Labelled::Spirals {
            turns: 1.0,
            noise: 0.0,
        },
        Labelled::Spheres {
            features: 5,
            radii: [0.5, 1.0],
            noise: 0.0,
        },
        Labelled::Gaussians {
            classes: 6,
            radius: 4.0,
            noise: 0.0,
        },
        Labelled::GaussianSpiral {
            classes: 5,
            noise: 0.0,
        },
    ];
    for set in sets {
        let (x, classes) = set.sample(60, 3, &Device::Cpu).unwrap();
        assert_eq!(x.dims(), [60, set.features()]);
        let (again, _) = set.sample(60, 3, &Device::Cpu).unwrap();
        assert_eq!(values(&x), values(&again));
        let classes = classes.to_vec1::<u32>().unwrap();
        for class in 0..set.classes() as u32 {
            let count = classes.iter().filter(|c| **c == class).count();
            assert_eq!(count, 60 / set.classes());
        }
        for (x, class) in values(&x).chunks(set.features()).zip(classes) {
            let radius = x.iter().map(|x| x * x).sum::<f64>().sqrt();
            let k = f64::from(class);
            let expected = match set {
                // Of the centre of its own half circle.
                Labelled::Moons { .. } => {
                    let (cx, cy) = (k, 0.5 * k);
                    radius + 1.0 - (x[0] - cx).hypot(x[1] - cy)
                }
                Labelled::Spheres { radii, .. } => radii[class as usize],
                Labelled::Gaussians { radius, .. } => radius,
                Labelled::GaussianSpiral { .. } => (k + 1.0) / 5.0,
                _ => radius,
            };
            assert!((radius - expected).abs() < 1e-6, "{set:?} {x:?}");
        }
    }
    let none = Labelled::Spheres {
        features: 0,
        radii: [0.5, 1.0],
        noise: 0.0,
    };
    assert!(none.sample(3, 0, &Device::Cpu).is_err());
}
