//! What the experiments rest on besides the library: IDX files (MNIST), STL-10's binary files, SGD
//! with momentum, a field with a pull-back written by hand.
//!
//! `cargo test --test example_parts`, seconds.

#[allow(dead_code)]
#[path = "../examples/stl10/field.rs"]
mod field;
#[allow(dead_code)]
#[path = "../examples/stl10/data.rs"]
mod stl10;

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_diffeq::{odeint, OdeOptions, Time, VectorField};
use candle_nn::{Optimizer, VarBuilder, VarMap};
use common::conv::Conv;
use common::initial;
use common::momentum::{cosine, Config, Momentum};
use common::random::{generator, normal};
use field::{Sign, ThereAndBack};

use std::io::Write;

use common::idx::{parse, read, Idx};
use flate2::{write::GzEncoder, Compression};

/// Two images of 3 × 1.
const FILE: [u8; 22] = [
    0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 1, 10, 11, 12, 20, 21, 22,
];

fn expected() -> Idx {
    Idx {
        dims: vec![2, 3, 1],
        bytes: vec![10, 11, 12, 20, 21, 22],
    }
}

#[test]
fn an_idx_file_is_its_header_and_its_bytes() {
    assert_eq!(parse(&FILE).unwrap(), expected());
}

#[test]
fn idx_files_are_read_plain_and_gzipped() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, zipped) = (dir.path().join("plain"), dir.path().join("zipped"));
    std::fs::write(&plain, FILE).unwrap();
    let mut encoder = GzEncoder::new(vec![], Compression::default());
    encoder.write_all(&FILE).unwrap();
    std::fs::write(&zipped, encoder.finish().unwrap()).unwrap();
    assert_eq!(read(&plain).unwrap(), expected());
    assert_eq!(read(&zipped).unwrap(), expected());
}

#[test]
fn what_is_no_idx_file_of_bytes_is_an_error_that_says_so() {
    let of = |file: &[u8]| parse(file).unwrap_err();
    assert_eq!(of(b""), "no IDX file");
    assert_eq!(of(b"PNG!"), "no IDX file");
    assert_eq!(
        of(&[0, 0, 13, 1, 0, 0, 0, 0]),
        "an IDX file of type 0xd, not of bytes"
    );
    assert_eq!(of(&FILE[..9]), "the IDX header is cut off");
    let short = "an IDX file of shape [2, 3, 1] holds 5 bytes";
    assert_eq!(of(&FILE[..21]), short);
    let huge = [[0, 0, 8, 3].as_slice(), &[255; 12], &[0; 7]].concat();
    assert!(of(&huge).contains("holds 7 bytes"));
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let error = read(&missing).unwrap_err().to_string();
    assert!(error.starts_with(missing.to_str().unwrap()), "{error}");
}

#[test]
fn stl10_files_hold_columns_and_labels_from_one() {
    let side = stl10::SIDE;
    let bytes = side * side * stl10::CHANNELS;
    let image: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8).collect();
    let images = stl10::parse(&[image.clone(), image.clone()].concat(), &[1, 10]).unwrap();
    assert_eq!(images.labels, [0, 9]);
    for (channel, row, column) in [(0, 0, 1), (1, 5, 0), (2, 95, 7)] {
        let in_file = channel * side * side + column * side + row;
        let in_memory = bytes + channel * side * side + row * side + column;
        assert_eq!(images.pixels[in_memory], image[in_file]);
    }
}

#[test]
fn what_is_no_stl10_file_is_an_error_that_says_so() {
    let bytes = stl10::SIDE * stl10::SIDE * stl10::CHANNELS;
    let of = |pixels: usize, labels: &[u8]| stl10::parse(&vec![0; pixels], labels).unwrap_err();
    assert_eq!(of(7, &[1]), format!("7 bytes are not 1 images of {bytes}"));
    assert_eq!(of(bytes, &[0]), "0 is no label of STL-10");
    assert_eq!(of(bytes, &[11]), "11 is no label of STL-10");
}

#[test]
fn momentum_is_a_sum_of_gradients_and_decay() {
    let var = Var::new(2f64, &Device::Cpu).unwrap();
    let config = Config {
        rate: 0.1,
        momentum: 0.9,
        decay: 0.01,
    };
    let mut optimiser = Momentum::new(vec![var.clone()], config).unwrap();
    let (mut theta, mut v) = (2.0, 0.0);
    for _ in 0..3 {
        optimiser.backward_step(&var.sqr().unwrap()).unwrap();
        v = 0.9 * v + 2.0 * theta + 0.01 * theta;
        theta -= 0.1 * v;
        let got = var.to_scalar::<f64>().unwrap();
        assert!((got - theta).abs() < 1e-15);
    }
    let middle = cosine(0.1, 0.02, 0.5);
    assert!((middle - 0.06).abs() < 1e-15);
    assert_eq!(
        (cosine(0.1, 0.02, 0.0), cosine(0.1, 0.02, 1.0)),
        (0.1, 0.02)
    );
}

fn drawn(vars: &VarMap) {
    initial::normal(vars, &mut generator(1), |_, _| Some(0.5)).unwrap();
}

fn relative(x: &Tensor, y: &Tensor) -> f64 {
    common::relative(&common::values(x).unwrap(), &common::values(y).unwrap())
}

#[test]
fn a_convolution_over_patches_is_candles() {
    let (vars, device) = (VarMap::new(), Device::Cpu);
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &device);
    let x =
        Var::from_tensor(&normal(&mut generator(2), (2, 3, 9, 7), DType::F64, &device).unwrap());
    let x = x.unwrap();
    for (size, stride, padding) in [(3, 1, 0), (4, 2, 1), (1, 1, 0)] {
        let vb = vb.pp(size);
        let ours = Conv::new([3, 5, size], stride, padding, vb.clone()).unwrap();
        drawn(&vars);
        let weight = vb.get((5, 3, size, size), "weight").unwrap();
        let bias = vb.get(5, "bias").unwrap().reshape((5, 1, 1)).unwrap();
        let theirs = x.conv2d(&weight, padding, stride, 1, 1).unwrap();
        let theirs = theirs.broadcast_add(&bias).unwrap();
        let ours = ours.forward(&x).unwrap();
        assert!(relative(&ours, &theirs) < 1e-14);
        let grads = |y: &Tensor| y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let (ours, theirs) = (grads(&ours), grads(&theirs));
        for of in [x.as_tensor(), &weight] {
            let (ours, theirs) = (ours.get(of).unwrap(), theirs.get(of).unwrap());
            assert!(relative(ours, theirs) < 1e-13);
        }
    }
}

#[test]
fn there_and_back_pulls_back_what_candle_does() {
    let (vars, device) = (VarMap::new(), Device::Cpu);
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &device);
    let y0 = normal(&mut generator(3), (2, 3, 6, 5), DType::F64, &device).unwrap();
    let y0 = Var::from_tensor(&y0).unwrap();
    for sign in [Sign::Stable, Sign::Unstable] {
        let field = || ThereAndBack::new(3, sign, vb.clone()).unwrap();
        let (ours, theirs) = (field(), field());
        drawn(&vars);
        let tape = move |t: &Time, y: &Tensor| theirs.velocity(t, y);
        let solve = |ys: candle_diffeq::Result<Tensor>| {
            let last = ys.unwrap().get(2).unwrap();
            last.sqr().unwrap().sum_all().unwrap().backward().unwrap()
        };
        let (times, options) = ([0.0, 0.1, 0.3], OdeOptions::default());
        let ours = solve(odeint(ours, y0.as_tensor(), &times, &options));
        let tape = solve(odeint(tape, y0.as_tensor(), &times, &options));
        let weight = vb.get((3, 3, 3, 3), "weight").unwrap();
        let bias = vb.get(3, "bias").unwrap();
        for of in [y0.as_tensor(), &weight, &bias] {
            let (ours, tape) = (ours.get(of).unwrap(), tape.get(of).unwrap());
            assert!(relative(ours, tape) < 1e-12);
        }
    }
}
