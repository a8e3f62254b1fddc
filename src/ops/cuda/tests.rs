//! Kernels against sums in f64 and against their CPU twins; without a GPU they say so and pass.

use candle_core::{DType, Device, Tensor};

use super::sweep::SweepState;
use super::{
    accumulate_all, activate, capture, keep_uploads, pull, stage, update, Captured, Clock, Looks,
    SlopeFrom, NO_ACTIVATION,
};
use crate::error::Error;
use crate::ops::tests::{gpu, roundoff, values};
use crate::precision::Rounding;
use crate::scaler::{DynamicScaling, Outcome, Scaler, Scaling};
use crate::stats::NotReplayed;

const FLOATS: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];

/// Sizes around the edges of vectors, warps and blocks.
const SIZES: [usize; 9] = [1, 3, 4, 31, 255, 1023, 1024, 1025, 5000];

/// Numbers of size one, the same in every run.
fn numbers(n: usize, seed: f64, dtype: DType, device: &Device) -> Tensor {
    let numbers: Vec<_> = (0..n).map(|i| (i as f64 * 0.7 + seed).sin()).collect();
    let x = Tensor::from_vec(numbers, n, &Device::Cpu).unwrap();
    x.to_dtype(dtype).unwrap().to_device(device).unwrap()
}

fn on_host(x: &Tensor) -> Vec<f64> {
    values(&x.to_device(&Device::Cpu).unwrap())
}

#[test]
fn an_update_is_summed_once_and_stored_from_the_sum() {
    let Some(gpu) = gpu() else { return };
    for n in SIZES {
        for (dtype, state) in FLOATS.map(|d| (d, if d == DType::F64 { d } else { DType::F32 })) {
            let y = numbers(n, 0.1, state, &gpu);
            let ks: Vec<_> = (0..5)
                .map(|j| numbers(n, 1.3 * f64::from(j), dtype, &gpu))
                .collect();
            let mut terms = vec![(1.0, &y)];
            terms.extend(ks.iter().map(|k| (0.17, k)));
            let mut looks = Looks::new(&y).unwrap();
            let store = Some(Rounding::cast(DType::BF16));
            let to = (Rounding::cast(state), store);
            let updated = update(&terms, None, to, &mut looks, None).unwrap();
            assert!(updated.lost.is_none());
            let next = updated.y;
            assert_eq!(looks.read().unwrap(), None);
            let stored = updated.stored.unwrap();
            assert_eq!(stored.dtype(), DType::BF16);
            let host: Vec<_> = terms.iter().map(|(c, x)| (*c, on_host(x))).collect();
            let (next, stored) = (on_host(&next), on_host(&stored));
            for i in 0..n {
                let exact: f64 = host.iter().map(|(c, x)| c * x[i]).sum();
                assert!(
                    (next[i] - exact).abs() <= 8.0 * roundoff(state) * 2.0,
                    "{n} {dtype:?} {i}"
                );
                assert_eq!(stored[i], half::bf16::from_f64(next[i]).to_f64());
            }
        }
    }
}

#[test]
fn a_compensated_update_loses_nothing() {
    let Some(gpu) = gpu() else { return };
    for n in SIZES {
        for state in [DType::F32, DType::F64] {
            let y = (numbers(n, 0.1, state, &gpu) * 1e4).unwrap();
            let lost = (numbers(n, 2.1, state, &gpu) * (1e3 * roundoff(state))).unwrap();
            let ks: Vec<_> = (0..3)
                .map(|j| numbers(n, 1.3 * f64::from(j), DType::BF16, &gpu))
                .collect();
            let mut terms = vec![(1.0, &y)];
            terms.extend(ks.iter().map(|k| (0.25, k)));
            let mut looks = Looks::new(&y).unwrap();
            let to = (Rounding::cast(state), None);
            let updated = update(&terms, Some(&lost), to, &mut looks, None).unwrap();
            assert_eq!(looks.read().unwrap(), None);
            let (next, rest) = (updated.y, updated.lost.unwrap());
            // The same by the operation for itself, and on the CPU, which rounds products of k by themselves.
            let again = crate::ops::add_compensated([&y, &lost], &terms[1..]).unwrap();
            assert_eq!(on_host(&again[0]), on_host(&next));
            assert_eq!(on_host(&again[1]), on_host(&rest));
            let host: Vec<_> = terms.iter().map(|(c, x)| (*c, on_host(x))).collect();
            let (lost, next, rest) = (on_host(&lost), on_host(&next), on_host(&rest));
            for i in 0..n {
                let others: f64 = host[1..].iter().map(|(c, x)| c * x[i]).sum();
                let exact = host[0].1[i] + (lost[i] + others);
                // Roundings of the small terms only, not of the sum.
                if state == DType::F32 {
                    let bound = 4.0 * roundoff(state) * 3.0;
                    assert!((next[i] + rest[i] - exact).abs() <= bound, "{n} {i}");
                }
                assert!(rest[i].abs() <= roundoff(state) * next[i].abs());
            }
            // In place, in the backward sweep.
            let scaler = Scaler::new(Scaling::Off, false).unwrap();
            let sweep = SweepState::new(scaler, std::slice::from_ref(&y), &[false]).unwrap();
            let own = [&y, &again[1]].map(|x| x.force_contiguous().unwrap());
            let before = on_host(&own[1]);
            let carried = (&own[0], Some(&own[1]));
            sweep
                .update(carried, &terms[1..3], Some(&ks[2]), 0, false, None)
                .unwrap();
            let (next, rest) = (on_host(&own[0]), on_host(&own[1]));
            let k = on_host(&ks[2]);
            for i in 0..n {
                let others: f64 = host[1..3].iter().map(|(c, x)| c * x[i]).sum();
                let exact = host[0].1[i] + (before[i] + others + k[i]);
                if state == DType::F32 {
                    let bound = 4.0 * roundoff(state) * 3.0;
                    assert!((next[i] + rest[i] - exact).abs() <= bound, "{n} {i}");
                }
            }
        }
    }
}

#[test]
fn the_first_look_that_found_something_is_reported() {
    let Some(gpu) = gpu() else { return };
    for bad in [0, 1023, 1024, 4999] {
        let mut data = vec![1f32; 5000];
        data[bad] = f32::NAN;
        let bad = Tensor::from_vec(data, 5000, &gpu).unwrap();
        let good = Tensor::ones(5000, DType::F32, &gpu).unwrap();
        let mut looks = Looks::new(&good).unwrap();
        let to = (Rounding::cast(DType::F32), None);
        looks.see(&[good.clone(), good.clone()]).unwrap();
        update(&[(1.0, &good)], None, to, &mut looks, None).unwrap();
        update(&[(1.0, &bad)], Some(&good), to, &mut looks, None).unwrap();
        looks.see(&[good, bad]).unwrap();
        assert_eq!(looks.read().unwrap(), Some(2));
    }
}

#[test]
fn all_parameters_are_added_to_in_one_launch_and_more_in_several() {
    let Some(gpu) = gpu() else { return };
    for state in [DType::F32, DType::F64] {
        let sizes: Vec<usize> = (0..70).map(|p| [1, 5, 0, 1024, 2047][p % 5]).collect();
        let new = |seed: f64, dtype: fn(usize) -> DType| {
            let each = sizes
                .iter()
                .enumerate()
                .map(move |(p, &n)| (p, n, seed + p as f64, dtype(p)));
            each.filter(|(_, n, ..)| *n > 0)
                .map(|(_, n, seed, d)| numbers(n, seed, d, &gpu))
                .collect::<Vec<_>>()
        };
        let accs = match state {
            DType::F32 => new(0.5, |_| DType::F32),
            _ => new(0.5, |_| DType::F64),
        };
        let grads = new(2.5, |p| FLOATS[p % 4]);
        let before: Vec<_> = accs.iter().map(on_host).collect();
        let pairs: Vec<_> = accs.iter().zip(&grads).collect();
        accumulate_all(&pairs, -1.7, None, None).unwrap();
        for ((acc, before), grad) in accs.iter().zip(before).zip(&grads) {
            for ((after, before), grad) in on_host(acc).iter().zip(before).zip(on_host(grad)) {
                assert!((after - (before - 1.7 * grad)).abs() <= 6.0 * roundoff(state));
            }
        }
    }
}

#[test]
fn activations_and_bias_gradients_are_those_of_f64() {
    let Some(gpu) = gpu() else { return };
    use crate::nn::Activation;
    for (rows, columns) in [(1, 1), (7, 5), (300, 33), (90, 260), (1000, 64)] {
        for dtype in FLOATS {
            let unit = roundoff(dtype).max(1e-15);
            let z = (numbers(rows * columns, 0.3, dtype, &gpu) * 3.0).unwrap();
            let z = z.reshape((rows, columns)).unwrap();
            let bias = numbers(columns, 1.1, dtype, &gpu);
            for activation in Activation::ALL {
                let (value, slope) = activate(&z, &bias, activation as i32, true).unwrap();
                let exact = z
                    .to_device(&Device::Cpu)
                    .unwrap()
                    .to_dtype(DType::F64)
                    .unwrap();
                let b = bias
                    .to_device(&Device::Cpu)
                    .unwrap()
                    .to_dtype(DType::F64)
                    .unwrap();
                let x = candle_core::Var::from_tensor(&exact.broadcast_add(&b).unwrap()).unwrap();
                let y = activation.forward(x.as_tensor()).unwrap();
                let d = y
                    .sum_all()
                    .unwrap()
                    .backward()
                    .unwrap()
                    .get(&x)
                    .unwrap()
                    .clone();
                let bound = 16.0 * roundoff(DType::F32).min(unit) + unit;
                for (got, exact) in [(&value, &y), (&slope.unwrap(), &d)] {
                    for (got, exact) in on_host(got).iter().zip(values(exact)) {
                        let edge = activation == Activation::Relu;
                        let error = (got - exact).abs();
                        assert!(
                            edge || error <= 2.0 * bound * (1.0 + exact.abs()),
                            "{activation:?} {dtype:?} {error:e}"
                        );
                    }
                }
            }
            let g = numbers(rows * columns, 0.9, dtype, &gpu)
                .reshape((rows, columns))
                .unwrap();
            for activation in [Activation::Tanh, Activation::Sigmoid, Activation::Relu] {
                let (value, slope) = activate(&z, &bias, activation as i32, true).unwrap();
                let slope = slope.unwrap();
                let [given, of_value] = [
                    SlopeFrom::Given(&slope),
                    SlopeFrom::OfValue(&value, activation as i32),
                ]
                .map(|slope| pull(&g, Some(slope)).unwrap());
                let sums = [&given, &of_value].map(|(_, sums)| on_host(sums));
                for (given, of_value) in sums[0].iter().zip(&sums[1]) {
                    assert!((given - of_value).abs() <= 12.0 * unit * rows as f64);
                }
                let [given, of_value] = [given, of_value].map(|(pulled, _)| on_host(&pulled));
                for (given, of_value) in given.into_iter().zip(of_value) {
                    // The value was rounded, and a slope changes by at most twice as much as the value.
                    let bound = 4.0 * unit * (1.0 + given.abs());
                    assert!(
                        (given - of_value).abs() <= bound,
                        "{activation:?} {dtype:?}"
                    );
                }
            }
            let (sum, slope) = activate(&z, &bias, NO_ACTIVATION, false).unwrap();
            assert!(slope.is_none());
            let [sums, z, bias] = [&sum, &z, &bias].map(on_host);
            for (i, got) in sums.into_iter().enumerate() {
                let exact = z[i] + bias[i % columns];
                assert!((got - exact).abs() <= 2.0 * unit * exact.abs() + roundoff(DType::F32));
            }
            let slope = numbers(rows * columns, 4.9, dtype, &gpu)
                .reshape((rows, columns))
                .unwrap();
            for slope in [None, Some(&slope)] {
                let (pulled, sums) = pull(&g, slope.map(SlopeFrom::Given)).unwrap();
                let pulled = on_host(&pulled);
                let sum = if dtype == DType::F64 {
                    DType::F64
                } else {
                    DType::F32
                };
                assert_eq!(sums.dtype(), sum);
                for (o, got) in on_host(&sums).into_iter().enumerate() {
                    let column = (0..rows).map(|r| pulled[r * columns + o]);
                    let size: f64 = column.clone().map(f64::abs).sum();
                    let exact: f64 = column.sum();
                    let error = (got - exact).abs();
                    assert!(
                        // 16 terms of a thread, 8 lanes and 8 parts at most; this oracle adds all rows in f64.
                        error <= (48.0 * roundoff(sum) + rows as f64 * roundoff(DType::F64)) * size,
                        "{rows} {columns} {dtype:?} {error:e}"
                    );
                }
                let [g, d] = [Some(&g), slope].map(|x| x.map(on_host));
                let g = g.unwrap();
                for i in 0..rows * columns {
                    let exact = g[i] * d.as_ref().map_or(1.0, |d| d[i]);
                    assert!(
                        (pulled[i] - exact).abs()
                            <= 2.0 * unit * exact.abs() + 1e-7 * unit.min(1e-3)
                    );
                }
            }
        }
    }
}

/// max|λ| and the outcome of each step, as a sweep meets them.
const HISTORY: [(f32, Outcome); 12] = [
    (1.0, Outcome::Clean),
    (0.9, Outcome::Clean),
    (0.4, Outcome::Clean),
    (0.1, Outcome::StateOverflow),
    (0.1, Outcome::Clean),
    (0.0, Outcome::Clean),
    (0.001, Outcome::Clean),
    (0.001, Outcome::Clean),
    (30.0, Outcome::ParameterOverflow),
    (1e-6, Outcome::Clean),
    (1e-6, Outcome::Clean),
    (1e-6, Outcome::Clean),
];

#[test]
fn the_scaler_on_the_device_decides_as_the_one_on_the_host() {
    let Some(gpu) = gpu() else { return };
    let rule = DynamicScaling {
        recovery_interval: 2,
        ..Default::default()
    };
    let mut host = Scaler::new(Scaling::Dynamic(rule), true).unwrap();
    for (step, (size, outcome)) in HISTORY.into_iter().enumerate() {
        let adj = Tensor::from_vec(vec![size, -size / 2.0, 0.0], 3, &gpu).unwrap();
        let state = SweepState::new(host, std::slice::from_ref(&adj), &[true]).unwrap();
        state.aim().unwrap();
        let before = host.aimed(f64::from(size));
        let bad = Tensor::from_vec(vec![1.0, f32::INFINITY], 2, &gpu).unwrap();
        let fine = Tensor::ones(2, DType::F32, &gpu).unwrap();
        let seen = |kind| if outcome == kind { &bad } else { &fine };
        for pulled in 0..2 {
            for kind in [Outcome::StateOverflow, Outcome::ParameterOverflow] {
                state
                    .look(pulled, kind, std::slice::from_ref(seen(kind)))
                    .unwrap();
            }
        }
        // Q(S λ), and λ + h/S w, untouched by a step that overflowed.
        let seed = state
            .seed(&[(1.0, &adj)], 1, Rounding::cast(DType::F32), None)
            .unwrap();
        assert_eq!(on_host(&seed)[0], f64::from(size) * before.scale());
        state
            .update(
                (&adj, None),
                &[(0.5, &seed)],
                Some(&fine.get(0).unwrap().broadcast_as(3).unwrap()),
                0,
                true,
                None,
            )
            .unwrap();
        let clean = outcome == Outcome::Clean;
        let expected = if clean {
            1.5 * f64::from(size) + 1.0
        } else {
            f64::from(size)
        };
        assert!((on_host(&adj)[0] - expected).abs() <= 4.0 * roundoff(DType::F32) * expected);
        state.settle(step, None).unwrap();
        let found = state.read(host).unwrap();
        assert_eq!(found.bad, None);
        assert_eq!(found.scales, Some((before.scale(), before.scale())));
        host = match found.stop {
            None => {
                assert!(clean, "step {step}");
                before.after_step()
            }
            Some(stop) => {
                assert_eq!((stop.step, stop.outcome), (step, outcome));
                assert_eq!(stop.scaler, before);
                before.after(outcome)
            }
        };
    }
}

#[test]
fn a_graph_does_its_work_at_each_launch_with_what_the_clock_shows() {
    let Some(gpu) = gpu() else { return };
    let clock = Clock::new(&gpu, DType::F64, 3).unwrap();
    let x = numbers(1500, 0.3, DType::F64, &gpu);
    let (y, t) = (x.zeros_like().unwrap(), clock.time(1).unwrap());
    let work = || {
        let y_next = stage(&[(1.0, &y), (2.0, &x)], Rounding::cast(DType::F64), &clock)?;
        let y_next = y_next.broadcast_add(&t)?;
        Ok(y.slice_set(&y_next, 0, 0)?)
    };
    // Once before, so that candle's kernels and shapes are on the device.
    {
        let _uploads = keep_uploads(&gpu).unwrap();
        work().unwrap();
    }
    let Captured::Graph(graph) = capture(&gpu, work).unwrap() else {
        panic!("nothing there to refuse");
    };
    assert!(on_host(&y).iter().all(|y| *y == 0.0));
    let mut expected = vec![0.0; 1500];
    for h in [0.1, 0.7, -0.3] {
        clock.tick(h, &[7.0, 10.0 * h, 8.0], 0, 0).unwrap();
        graph.launch().unwrap();
        for (y, x) in expected.iter_mut().zip(on_host(&x)) {
            *y = f64::mul_add(2.0 * h, x, *y) + 10.0 * h;
        }
        assert_eq!(on_host(&y), expected);
    }
}

#[test]
fn what_cannot_be_repeated_is_refused_and_the_device_goes_on() {
    let Some(gpu) = gpu() else { return };
    let Device::Cuda(on) = &gpu else { return };
    let x = numbers(5, 0.3, DType::F32, &gpu);
    let refused = |work: &mut dyn FnMut() -> crate::Result<()>| {
        let captured = capture(&gpu, work).unwrap();
        assert_eq!(on_host(&(&x + &x).unwrap())[0], 2.0 * on_host(&x)[0]);
        match captured {
            Captured::Graph(_) => panic!("captured"),
            Captured::Refused(reason) => reason,
        }
    };
    let said = |reason| matches!(reason, NotReplayed::Capture(_));
    // Memory that was there before is freed.
    let mut before = Some(x.affine(1.0, 1.0).unwrap());
    assert!(said(refused(&mut || {
        before = None;
        Ok(())
    })));
    // The host waits, or reads, or has an opinion.
    assert!(said(refused(&mut || Ok(gpu.synchronize()?))));
    assert!(said(refused(&mut || Ok(x.to_vec1::<f32>().map(|_| ())?))));
    assert!(said(refused(&mut || Err(Error::NoSteps))));
    // Bytes of the host are copied.
    let reason = refused(&mut || {
        let copied = on.cuda_stream().clone_htod(&[1f32, 2.0]);
        Ok(copied.map(|_| ()).map_err(candle_core::Error::wrap)?)
    });
    assert_eq!(reason, NotReplayed::HostMemory);
    // Something stays.
    let mut kept = None;
    let keeps = capture(&gpu, || {
        kept = Some(x.affine(2.0, 0.0)?);
        Ok(())
    });
    assert!(matches!(keeps.err(), Some(Error::KeptInGraph)));
    drop(kept);
    let _ = on.cuda_stream().context().check_err();
    // A capture within a capture, and one that unwinds.
    assert!(said(refused(&mut || {
        match capture(&gpu, || Ok(()))? {
            Captured::Graph(_) => Ok(()),
            Captured::Refused(_) => Err(Error::NoSteps),
        }
    })));
    let unwinds = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = capture(&gpu, || panic!("on purpose"));
    }));
    assert!(unwinds.is_err());
    assert_eq!(on_host(&(&x + &x).unwrap())[0], 2.0 * on_host(&x)[0]);
    // The legacy stream has no captures.
    let legacy = on.cuda_stream().context().default_stream();
    let mode = candle_core::cuda_backend::cudarc::driver::sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    assert!(legacy.begin_capture(mode).is_err());
}
