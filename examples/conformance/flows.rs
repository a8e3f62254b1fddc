//! The fields of the problems that adaptive steps are held against.

use std::collections::BTreeMap;

use candle_core::{DType, Error, Tensor, D};
use candle_diffeq::Time;

/// Weights by name; of a field that jumps also `jump_t`, the time at which it does.
pub(crate) type Weights = BTreeMap<String, Tensor>;

/// A field over one tensor.
pub(crate) type Flow = Box<dyn Fn(&Time, &Tensor) -> candle_core::Result<Tensor> + Send + Sync>;

/// A weight, which the file must have.
fn of<'a>(weights: &'a Weights, name: &str) -> candle_core::Result<&'a Tensor> {
    let missing = || Error::CannotFindTensor {
        path: name.to_owned(),
    };
    weights.get(name).ok_or_else(missing)
}

/// The i-th coordinate of y, as a last dimension of one.
fn coordinate(y: &Tensor, i: usize) -> candle_core::Result<Tensor> {
    y.narrow(D::Minus1, i, 1)
}

/// The field of a problem, if there is one of this name.
pub(crate) fn flow(problem: &str, w: Weights) -> Option<Flow> {
    let problem = problem.trim_start_matches(|c: char| c.is_ascii_digit() || c == '_');
    Some(match problem {
        "constant" => Box::new(move |t, y| {
            let (a, b) = (of(&w, "a")?, of(&w, "b")?);
            let line = t.tensor()?.broadcast_mul(a)?.broadcast_add(b)?;
            y.broadcast_sub(&line)?.powf(5.0)?.broadcast_add(a)
        }),
        "sine" => Box::new(|t, y| {
            let t = t.tensor()?;
            let forced = ((t.powf(4.0)? * (&t * 2.0)?.sin()?)? - t.sqr()?)?;
            let forced = (forced + (t.powf(3.0)? * 4.0)?)?;
            (y.broadcast_div(&t)? * 2.0)?.broadcast_add(&forced)
        }),
        "exp" => Box::new(|t, y| {
            let decay = ((t.tensor()? * -0.1)?.exp()? * -0.1)?;
            (y * 0.0)?.broadcast_add(&decay)
        }),
        "linear" => Box::new(move |_, y| {
            let columns = y.dims().last().copied().unwrap_or(1);
            let rows = y.reshape(((), columns))?;
            rows.matmul(&of(&w, "A")?.t()?)?.reshape(y.shape())
        }),
        name if name.starts_with("van_der_pol") => Box::new(move |_, y| {
            let (x, v) = (coordinate(y, 0)?, coordinate(y, 1)?);
            let damping = (x.sqr()?.neg()? + 1.0)?.broadcast_mul(of(&w, "mu")?)?;
            Tensor::cat(&[&v, &((damping * &v)? - x)?], D::Minus1)
        }),
        "lorenz" => Box::new(move |_, y| {
            let [x, y, z] = [0, 1, 2].map(|i| coordinate(y, i));
            let (x, y, z) = (x?, y?, z?);
            let dx = (&y - &x)?.broadcast_mul(of(&w, "sigma")?)?;
            let dy = ((&x * z.neg()?.broadcast_add(of(&w, "rho")?)?)? - &y)?;
            let dz = ((x * y)? - z.broadcast_mul(of(&w, "beta")?)?)?;
            Tensor::cat(&[dx, dy, dz], D::Minus1)
        }),
        "mlp" => Box::new(move |t, y| {
            let columns = y.dims().last().copied().unwrap_or(1);
            let y_rows = y.reshape(((), columns))?;
            let t = t.tensor()?.reshape((1, 1))?;
            let t = t.broadcast_as((y_rows.dim(0)?, 1))?;
            let mut x = Tensor::cat(&[&y_rows, &t], 1)?;
            for l in 1.. {
                let (weight, bias) = (of(&w, &layer(l))?, of(&w, &format!("l{l}.bias"))?);
                x = x.matmul(&weight.t()?)?.broadcast_add(bias)?;
                if !w.contains_key(&layer(l + 1)) {
                    break;
                }
                x = x.tanh()?;
            }
            x.reshape(y.shape())
        }),
        "spiral_rows" => Box::new(move |_, y| {
            let cube = (y.sqr()? * y)?;
            cube.matmul(of(&w, "A")?)?.broadcast_mul(of(&w, "rate")?)
        }),
        "jump" => {
            let at = w.get("jump_t").map_or(Ok(0.5), first);
            Box::new(move |t, y| match &at {
                Ok(at) if t.value() < *at => y * -0.5,
                Ok(_) => y.sqr(),
                Err(error) => candle_core::bail!("jump_t: {error}"),
            })
        }
        _ => return None,
    })
}

/// The name of a layer's weight.
fn layer(l: usize) -> String {
    format!("l{l}.weight")
}

fn first(x: &Tensor) -> candle_core::Result<f64> {
    x.flatten_all()?.get(0)?.to_dtype(DType::F64)?.to_scalar()
}

/// Σ over all elements of the loss of the files: Σ_i ⟨v_i, y(t_i)⟩ + ½ |y(t_last) − target|².
pub(crate) fn loss(ys: &Tensor, v: &Tensor, target: &Tensor) -> candle_core::Result<Tensor> {
    let last = ys.get(ys.dim(0)? - 1)?;
    let distance = ((last - target)?.sqr()?.sum_all()? * 0.5)?;
    (ys * v)?.sum_all()? + distance
}

/// Numbers of the five outer planets of problem C5: the constant of gravitation, the mass of the sun, and theirs.
const GRAVITATION: f64 = 2.95912208286;
const SUN: f64 = 1.00000597682;
const MASSES: [f64; 5] = [
    0.000954786104043,
    0.000285583733151,
    0.0000437273164546,
    0.0000517759138449,
    0.00000277777777778,
];

/// The 25 problems of DETEST (Hull, Enright, Fellen & Sedgwick, SIAM J. Numer. Anal. 9, 1972); None of another name,
/// and of a state of another size.
pub(crate) fn detest(problem: &str, t: f64, y: &[f64]) -> Option<Vec<f64>> {
    let size = match problem {
        "B1" => 2,
        "C5" => 30,
        _ => match problem.chars().next()? {
            'A' => 1,
            'B' => 3,
            'C' => y.len().max(1),
            'D' => 4,
            _ => 2,
        },
    };
    if y.len() != size {
        return None;
    }
    let band = |below: &dyn Fn(usize) -> f64, diagonal: &dyn Fn(usize) -> f64, above: f64| {
        let n = y.len();
        let row = |i: usize| {
            let before = if i > 0 { below(i) * y[i - 1] } else { 0.0 };
            let after = if i + 1 < n { above * y[i + 1] } else { 0.0 };
            before + diagonal(i) * y[i] + after
        };
        (0..n).map(row).collect::<Vec<_>>()
    };
    let kepler = || {
        let r3 = (y[0] * y[0] + y[1] * y[1]).powf(1.5);
        vec![y[2], y[3], -y[0] / r3, -y[1] / r3]
    };
    Some(match problem {
        "A1" => vec![-y[0]],
        "A2" => vec![-y[0].powi(3) / 2.0],
        "A3" => vec![y[0] * t.cos()],
        "A4" => vec![y[0] / 4.0 * (1.0 - y[0] / 20.0)],
        "A5" => vec![(y[0] - t) / (y[0] + t)],
        "B1" => vec![2.0 * (y[0] - y[0] * y[1]), -(y[1] - y[0] * y[1])],
        "B2" => vec![-y[0] + y[1], y[0] - 2.0 * y[1] + y[2], y[1] - y[2]],
        "B3" => vec![-y[0], y[0] - y[1] * y[1], y[1] * y[1]],
        "B4" => {
            let r = (y[0] * y[0] + y[1] * y[1]).sqrt();
            vec![-y[1] - y[0] * y[2] / r, y[0] - y[1] * y[2] / r, y[0] / r]
        }
        "B5" => vec![y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]],
        "C1" => {
            let last = y.len() - 1;
            band(&|_| 1.0, &|i| if i == last { 0.0 } else { -1.0 }, 0.0)
        }
        "C2" => {
            let last = y.len() - 1;
            let diagonal = |i: usize| if i == last { 0.0 } else { -((i + 1) as f64) };
            band(&|i| i as f64, &diagonal, 0.0)
        }
        "C3" | "C4" => band(&|_| 1.0, &|_| -2.0, 1.0),
        "C5" => planets(y),
        "D1" | "D2" | "D3" | "D4" | "D5" => kepler(),
        "E1" => {
            let s = t + 1.0;
            vec![y[1], -(y[1] / s + (1.0 - 0.25 / (s * s)) * y[0])]
        }
        "E2" => vec![y[1], (1.0 - y[0] * y[0]) * y[1] - y[0]],
        "E3" => vec![y[1], y[0].powi(3) / 6.0 - y[0] + 2.0 * (2.78535 * t).sin()],
        "E4" => vec![y[1], 0.032 - 0.4 * y[1] * y[1]],
        "E5" => vec![y[1], (1.0 + y[1] * y[1]).sqrt() / (25.0 - t)],
        _ => return None,
    })
}

/// The motion of the five outer planets.
fn planets(y: &[f64]) -> Vec<f64> {
    let place = |j: usize| [y[3 * j], y[3 * j + 1], y[3 * j + 2]];
    let cube = |x: [f64; 3]| x.iter().map(|x| x * x).sum::<f64>().powf(1.5);
    let mut out = y[15..].to_vec();
    for (j, own) in MASSES.iter().enumerate() {
        let x = place(j);
        let r3 = cube(x);
        let mut force = x.map(|x| -(SUN + own) * x / r3);
        for (k, mass) in MASSES.iter().enumerate().filter(|(k, _)| *k != j) {
            let other = place(k);
            let apart = [0, 1, 2].map(|i| other[i] - x[i]);
            let (d3, r3) = (cube(apart), cube(other));
            for i in 0..3 {
                force[i] += mass * (apart[i] / d3 - other[i] / r3);
            }
        }
        out.extend(force.map(|f| f * GRAVITATION));
    }
    out
}

/// All numbers of a tensor in f64, for a field that computes with them.
pub(crate) fn numbers(y: &Tensor) -> candle_core::Result<Vec<f64>> {
    y.flatten_all()?.to_vec1()
}
