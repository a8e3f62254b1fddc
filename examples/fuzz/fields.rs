//! The fields of cases as programs.

use candle_diffeq::nn::Activation;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::case::{Case, Field};
use crate::program::{Image, Op, Program};

/// The program of a case's field.
pub(crate) fn program(case: &Case) -> Program {
    let cols = case.field.cols();
    let mut p = Program {
        leaves: cols.iter().map(|&cols| (case.rows, cols)).collect(),
        ..Default::default()
    };
    match &case.field {
        Field::Closure { seed, length, .. } => closure(&mut p, *seed, *length),
        Field::Mlp {
            widths,
            activation,
            time,
            residual,
        } => {
            let layers = layers(&mut p, widths, *time);
            let (out, _) = perceptron(&mut p, &layers, *activation, *time, *residual);
            p.outputs = vec![out];
        }
        Field::Cnf {
            widths,
            activation,
            time,
        } => flow(&mut p, widths, *activation, *time),
        Field::Conv { .. } => convolutions(&mut p, &case.field),
    }
    p
}

/// Weight and bias of layers named by their numbers; the weights let signals keep their size.
fn layers(p: &mut Program, widths: &[usize], time: bool) -> Vec<(usize, usize)> {
    let layer = |(l, w): (usize, &[usize])| {
        let inputs = w[0] + usize::from(time && l == 0);
        let spread = 1.5 / (inputs as f64).sqrt();
        let weight = p.param(format!("{l}.weight"), &[w[1], inputs], 0.0, spread);
        (weight, p.param(format!("{l}.bias"), &[w[1]], 0.0, 0.7))
    };
    widths.windows(2).enumerate().map(layer).collect()
}

/// Its output, and what every activation reads.
fn perceptron(
    p: &mut Program,
    layers: &[(usize, usize)],
    activation: Activation,
    time: bool,
    residual: bool,
) -> (usize, Vec<usize>) {
    let mut x = p.push(Op::State(0));
    if time {
        let t = p.push(Op::Time);
        x = p.push(Op::Concat(x, t));
    }
    let mut read = vec![];
    for (l, &(w, b)) in layers.iter().enumerate() {
        let z = p.push(Op::Affine { x, w, b: Some(b) });
        if l + 1 == layers.len() {
            x = z;
            break;
        }
        read.push(z);
        let h = act(p, z, activation, 0);
        // A layer that keeps its width is skipped, but for one that reads time.
        let keeps = p.shapes[z] == p.shapes[x] && !(time && l == 0);
        x = if residual && keeps {
            p.push(Op::Add(h, x))
        } else {
            h
        };
    }
    (x, read)
}

fn act(p: &mut Program, x: usize, activation: Activation, order: usize) -> usize {
    p.push(Op::Act {
        x,
        activation,
        order,
    })
}

/// z' = g(z), l' = −Σ_j ∂g_j/∂z_j, a tangent for every feature.
fn flow(p: &mut Program, widths: &[usize], activation: Activation, time: bool) {
    let layers = layers(p, widths, time);
    let (out, read) = perceptron(p, &layers, activation, time, false);
    let slopes: Vec<_> = read.iter().map(|&z| act(p, z, activation, 1)).collect();
    let mut trace = None;
    for j in 0..widths[0] {
        let mut tangent = p.push(Op::Column { p: layers[0].0, j });
        for (&slope, &(w, _)) in slopes.iter().zip(&layers[1..]) {
            let bent = p.push(Op::Mul(slope, tangent));
            tangent = p.push(Op::Affine {
                x: bent,
                w,
                b: None,
            });
        }
        let own = p.push(Op::Slice {
            x: tangent,
            from: j,
            n: 1,
        });
        trace = Some(match trace {
            None => own,
            Some(sum) => p.push(Op::Add(sum, own)),
        });
    }
    let mut minus = p.push(Op::Scale(trace.unwrap_or(out), -1.0));
    if p.shapes[minus].0 != p.leaves[1].0 {
        // A linear flow: the same trace for every row.
        let l = p.push(Op::State(1));
        let nothing = p.push(Op::Scale(l, 0.0));
        minus = p.push(Op::Add(minus, nothing));
    }
    p.outputs = vec![out, minus];
}

fn convolutions(p: &mut Program, field: &Field) {
    let Field::Conv {
        channels,
        size,
        activation,
        groups,
        height,
        width,
    } = field
    else {
        return;
    };
    let mut x = p.push(Op::State(0));
    for (l, c) in channels.windows(2).enumerate() {
        let image = Image {
            inputs: c[0],
            outputs: c[1],
            size: *size,
            height: *height,
            width: *width,
        };
        let spread = 1.5 / ((c[0] * size * size) as f64).sqrt();
        let w = p.param(
            format!("{l}.weight"),
            &[c[1], c[0], *size, *size],
            0.0,
            spread,
        );
        let b = p.param(format!("{l}.bias"), &[c[1]], 0.0, 0.7);
        x = p.push(Op::Conv { x, w, b, image });
        if l + 2 == channels.len() {
            break;
        }
        if *groups > 0 {
            x = group_norm(p, x, (l, c[1]), *groups, height * width);
        }
        x = act(p, x, *activation, 0);
    }
    p.outputs = vec![x];
}

/// γ (x − mean) / √(variance + 10⁻⁵) + β of layer l of so many channels.
fn group_norm(
    p: &mut Program,
    x: usize,
    (l, channels): (usize, usize),
    groups: usize,
    pixels: usize,
) -> usize {
    let each = channels / groups * pixels;
    let mean = p.push(Op::GroupMean { x, groups });
    let mean = p.push(Op::Scale(mean, -1.0));
    let mean = p.push(Op::Spread {
        x: mean,
        times: each,
    });
    let centred = p.push(Op::Add(x, mean));
    let square = p.push(Op::Mul(centred, centred));
    let variance = p.push(Op::GroupMean { x: square, groups });
    let root = p.push(Op::RSqrt {
        x: variance,
        epsilon: 1e-5,
    });
    let root = p.push(Op::Spread {
        x: root,
        times: each,
    });
    let normal = p.push(Op::Mul(centred, root));
    let mut by_channel = |name: &str, centre| {
        let param = p.param(format!("{l}.norm.{name}"), &[channels], centre, 0.5);
        let param = p.push(Op::Param(param));
        p.push(Op::Spread {
            x: param,
            times: pixels,
        })
    };
    let (gamma, beta) = (by_channel("weight", 1.0), by_channel("bias", 0.0));
    let scaled = p.push(Op::Mul(normal, gamma));
    p.push(Op::Add(scaled, beta))
}

/// Random operations, and for each tensor of the state one of their results of its width.
fn closure(p: &mut Program, seed: u64, length: usize) {
    let rng = &mut StdRng::seed_from_u64(seed);
    let mut pool: Vec<usize> = (0..p.leaves.len()).map(|l| p.push(Op::State(l))).collect();
    for _ in 0..length {
        let x = pool[rng.random_range(0..pool.len())];
        let next = operation(p, rng, x, &pool);
        pool.push(next);
    }
    for leaf in 0..p.leaves.len() {
        let fits = |&&x: &&usize| p.shapes[x] == p.leaves[leaf];
        let x = match pool.iter().rev().find(fits) {
            // The state itself is no interesting velocity, and no stable one.
            Some(&x) if matches!(p.ops[x], Op::State(_)) => p.push(Op::Scale(x, -0.7)),
            Some(&x) => x,
            None => {
                let last = pool[pool.len() - 1];
                linear(p, last, p.leaves[leaf].1, true)
            }
        };
        p.outputs.push(x);
    }
}

fn linear(p: &mut Program, x: usize, outputs: usize, bias: bool) -> usize {
    let (inputs, n) = (p.shapes[x].1, p.params.len());
    let spread = 1.5 / (inputs as f64).sqrt();
    let w = p.param(format!("p{n}.weight"), &[outputs, inputs], 0.0, spread);
    let b = bias.then(|| p.param(format!("p{n}.bias"), &[outputs], 0.0, 0.7));
    p.push(Op::Affine { x, w, b })
}

fn operation(p: &mut Program, rng: &mut StdRng, x: usize, pool: &[usize]) -> usize {
    let (_, cols) = p.shapes[x];
    let name = format!("p{}", p.params.len());
    match rng.random_range(0..10) {
        0..2 => {
            let leaf = rng.random_range(0..p.leaves.len());
            let outputs = match rng.random_range(0..2) {
                0 => p.leaves[leaf].1,
                _ => rng.random_range(1..=40),
            };
            linear(p, x, outputs, rng.random_range(0..3) > 0)
        }
        2..5 => {
            let activation = Activation::ALL[rng.random_range(0..Activation::ALL.len())];
            act(p, x, activation, 0)
        }
        5 => {
            // Parameters of rank 0, 1 and 2.
            let shape = [vec![], vec![cols], vec![1, cols]][rng.random_range(0..3)].clone();
            let param = p.param(name, &shape, 0.0, 1.0);
            let param = p.push(Op::Param(param));
            match rng.random_range(0..2) {
                0 => p.push(Op::Mul(x, param)),
                _ => p.push(Op::Add(x, param)),
            }
        }
        6 => {
            // sin(ωt) x, or sin(ωt) + x.
            let omega = p.param(name, &[cols], 0.5, 1.0);
            let (omega, t) = (p.push(Op::Param(omega)), p.push(Op::Time));
            let phase = p.push(Op::Mul(omega, t));
            let wave = act(p, phase, Activation::Sin, 0);
            match rng.random_range(0..2) {
                0 => p.push(Op::Mul(x, wave)),
                _ => p.push(Op::Add(x, wave)),
            }
        }
        7 => {
            // What the mean over features or over rows adds.
            let mean = match rng.random_range(0..2) {
                0 => p.push(Op::SumCols(x)),
                _ => p.push(Op::MeanRows(x)),
            };
            let mean = p.push(Op::Scale(mean, 1.0 / cols as f64));
            p.push(Op::Add(x, mean))
        }
        8 => {
            let like = |&&y: &&usize| p.shapes[y] == p.shapes[x] && y != x;
            let other = pool.iter().rev().find(like).copied().unwrap_or(x);
            match rng.random_range(0..2) {
                0 => {
                    let bounded = act(p, other, Activation::Tanh, 0);
                    p.push(Op::Mul(x, bounded))
                }
                _ => p.push(Op::Add(x, other)),
            }
        }
        _ => match cols {
            1 => p.push(Op::Scale(x, rng.random_range(-1.0..1.0))),
            _ => {
                let from = rng.random_range(0..cols);
                let n = rng.random_range(1..=cols - from);
                let part = p.push(Op::Slice { x, from, n });
                let other = pool[rng.random_range(0..pool.len())];
                match p.shapes[other].1 + n <= 130 {
                    true => p.push(Op::Concat(part, other)),
                    false => part,
                }
            }
        },
    }
}
