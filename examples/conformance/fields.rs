//! The right-hand sides f_θ(t, y) of the problems, by name, in ordinary candle operations.
//!
//! Shapes come with the weights and the state.  Coefficients that depend on time are formed in
//! state precision, from [`Time::tensor`], and rounded once; so a gradient with respect to time
//! passes through them, and a low compute precision does not round t.

use std::collections::BTreeMap;

use candle_core::{Error, Result, Shape, Tensor, D};
use candle_diffeq::Time;
use candle_nn::VarBuilder;

/// A field over the parts of the state.
pub(crate) type Field = Box<dyn Fn(&Time, &Vec<Tensor>) -> Result<Vec<Tensor>> + Send + Sync>;

/// Makes a field of its weights.
pub(crate) type Build = fn(&Weights<'_>) -> Result<Field>;

/// Weights of shapes that the file tells.
pub(crate) struct Weights<'a> {
    pub(crate) vb: VarBuilder<'a>,
    pub(crate) shapes: &'a BTreeMap<String, Shape>,
}

impl Weights<'_> {
    pub(crate) fn get(&self, name: &str) -> Result<Tensor> {
        let missing = || Error::CannotFindTensor {
            path: name.to_owned(),
        };
        let shape = self.shapes.get(name).ok_or_else(missing)?;
        self.vb.get(shape, name)
    }
}

/// Every problem of the discrete oracles.
pub(crate) const FIELDS: [(&str, Build); 13] = [
    ("linear", linear),
    ("spiral_mlp", spiral_mlp),
    ("van_der_pol", van_der_pol),
    ("lotka_volterra", lotka_volterra),
    ("conv_block", |weights| conv(weights, Tensor::relu)),
    ("cnf_exact_trace", cnf_exact_trace),
    ("tuple_state", tuple_state),
    ("nonuniform_grid", mlp),
    ("backward_time", mlp),
    ("time_dependent", time_dependent),
    ("hamiltonian_pendulum", hamiltonian_pendulum),
    ("otflow_potential", otflow_potential),
    ("conv_tanh", |weights| conv(weights, Tensor::tanh)),
];

/// The field of a problem.
pub(crate) fn by_name(problem: &str) -> Option<Build> {
    FIELDS
        .iter()
        .find(|(name, _)| *name == problem)
        .map(|(_, build)| *build)
}

/// A field over a state of one tensor.
pub(crate) fn single(
    f: impl Fn(&Time, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Field {
    Box::new(move |t, y| match y.as_slice() {
        [y] => Ok(vec![f(t, y)?]),
        _ => candle_core::bail!("this field is one of a single tensor, got {}", y.len()),
    })
}

/// A field over a state of two tensors.
fn double(
    f: impl Fn(&Time, &Tensor, &Tensor) -> Result<[Tensor; 2]> + Send + Sync + 'static,
) -> Field {
    Box::new(move |t, y| match y.as_slice() {
        [x, z] => Ok(f(t, x, z)?.into()),
        _ => candle_core::bail!("this field is one of two tensors, got {}", y.len()),
    })
}

/// x Wᵀ over the last dimension of x, whatever comes before it.
fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let Some((_, lead)) = x.dims().split_last() else {
        candle_core::bail!("a state of rank 0 has no last dimension");
    };
    let rows = x.reshape(((), inputs))?.matmul(&weight.t()?)?;
    rows.reshape([lead, &[outputs]].concat())
}

/// x ↦ x Wᵀ + b.
pub(crate) struct Affine {
    weight: Tensor,
    bias: Tensor,
}

impl Affine {
    pub(crate) fn new(weights: &Weights<'_>, name: &str) -> Result<Self> {
        Ok(Self {
            weight: weights.get(&format!("{name}.weight"))?,
            bias: weights.get(&format!("{name}.bias"))?,
        })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        product(x, &self.weight)?.broadcast_add(&self.bias)
    }
}

/// (x, t) ↦ [x, t] Wᵀ + b.
struct AffineInTime {
    of_state: Tensor,
    of_time: Tensor,
    bias: Option<Tensor>,
}

impl AffineInTime {
    fn new(weight: &Tensor, bias: Option<Tensor>) -> Result<Self> {
        let states = weight.dim(1)?.saturating_sub(1);
        Ok(Self {
            of_state: weight.narrow(1, 0, states)?.contiguous()?,
            of_time: weight.narrow(1, states, 1)?.squeeze(1)?,
            bias,
        })
    }

    fn forward(&self, t: &Tensor, x: &Tensor) -> Result<Tensor> {
        let mut drive = self.of_time.to_dtype(t.dtype())?.broadcast_mul(t)?;
        if let Some(bias) = &self.bias {
            drive = (drive + bias.to_dtype(t.dtype())?)?;
        }
        product(x, &self.of_state)?.broadcast_add(&drive.to_dtype(x.dtype())?)
    }
}

/// The two coordinates in the last dimension.
fn coordinates(y: &Tensor) -> Result<(Tensor, Tensor)> {
    let at = |i| y.narrow(D::Minus1, i, 1);
    Ok((at(0)?, at(1)?))
}

fn linear(weights: &Weights<'_>) -> Result<Field> {
    let a = weights.get("A.weight")?;
    Ok(single(move |_, y| product(y, &a)))
}

/// f = l2(tanh(l1(y))).
fn mlp(weights: &Weights<'_>) -> Result<Field> {
    let (l1, l2) = (Affine::new(weights, "l1")?, Affine::new(weights, "l2")?);
    Ok(single(move |_, y| l2.forward(&l1.forward(y)?.tanh()?)))
}

/// f = l2(tanh(l1(y³))).
fn spiral_mlp(weights: &Weights<'_>) -> Result<Field> {
    let (l1, l2) = (Affine::new(weights, "l1")?, Affine::new(weights, "l2")?);
    let cube = |y: &Tensor| y.sqr()? * y;
    Ok(single(move |_, y| {
        l2.forward(&l1.forward(&cube(y)?)?.tanh()?)
    }))
}

/// x' = v, v' = μ (1 − x²) v − x.
fn van_der_pol(weights: &Weights<'_>) -> Result<Field> {
    let mu = weights.get("mu")?;
    Ok(single(move |_, y| {
        let (x, v) = coordinates(y)?;
        let damping = ((1.0 - x.sqr()?)? * &v)?.broadcast_mul(&mu)?;
        Tensor::cat(&[&v, &(damping - &x)?], D::Minus1)
    }))
}

/// x' = αx − βxz, z' = δxz − γz.
fn lotka_volterra(weights: &Weights<'_>) -> Result<Field> {
    let get = |name| weights.get(name);
    let (alpha, beta, gamma, delta) = (get("alpha")?, get("beta")?, get("gamma")?, get("delta")?);
    Ok(single(move |_, y| {
        let (x, z) = coordinates(y)?;
        let meetings = (&x * &z)?;
        let prey = (x.broadcast_mul(&alpha)? - meetings.broadcast_mul(&beta)?)?;
        let predators = (meetings.broadcast_mul(&delta)? - z.broadcast_mul(&gamma)?)?;
        Tensor::cat(&[prey, predators], D::Minus1)
    }))
}

/// f = c2(σ(c1(y))) with convolutions that keep the size of the image, y of shape
/// (…, channels, height, width).
fn conv(weights: &Weights<'_>, activation: fn(&Tensor) -> Result<Tensor>) -> Result<Field> {
    let layer = |name| -> Result<_> {
        let Affine { weight, bias } = Affine::new(weights, name)?;
        Ok((weight, bias.reshape(((), 1, 1))?))
    };
    let (c1, c2) = (layer("c1")?, layer("c2")?);
    let apply = |x: &Tensor, (kernel, bias): &(Tensor, Tensor)| {
        let padding = kernel.dim(D::Minus1)? / 2;
        x.conv2d(kernel, padding, 1, 1, 1)?.broadcast_add(bias)
    };
    Ok(single(move |_, y| {
        let image = (y.dim(D::Minus(3))?, y.dim(D::Minus2)?, y.dim(D::Minus1)?);
        let images = y.reshape(((), image.0, image.1, image.2))?;
        apply(&activation(&apply(&images, &c1)?)?, &c2)?.reshape(y.shape())
    }))
}

/// z' = l3(tanh(l2(tanh(l1(z))))), (log p)' = −tr ∂z'/∂z.
///
/// With s_i = tanh' of layer i, ∂z'/∂z = W3 diag(s2) W2 diag(s1) W1, of which the trace is s2ᵀ M s1
/// with M = W2 ∘ (W1 W3)ᵀ: the forward tangents of all coordinates in one product.
fn cnf_exact_trace(weights: &Weights<'_>) -> Result<Field> {
    let (l1, l2) = (Affine::new(weights, "l1")?, Affine::new(weights, "l2")?);
    let l3 = Affine::new(weights, "l3")?;
    Ok(double(move |_, z, logp| {
        let h1 = l1.forward(z)?.tanh()?;
        let h2 = l2.forward(&h1)?.tanh()?;
        let (s1, s2) = ((1.0 - h1.sqr()?)?, (1.0 - h2.sqr()?)?);
        let m = (&l2.weight * l1.weight.matmul(&l3.weight)?.t()?)?;
        let trace = (product(&s1, &m)? * s2)?.sum(D::Minus1)?;
        Ok([l3.forward(&h2)?, trace.neg()?.reshape(logp.shape())?])
    }))
}

/// x' = p(v) − 0.1 x, v' = tanh(q(x)) − 0.2 v.
fn tuple_state(weights: &Weights<'_>) -> Result<Field> {
    let (p, q) = (Affine::new(weights, "p")?, Affine::new(weights, "q")?);
    Ok(double(move |_, x, v| {
        let dx = (p.forward(v)? - (x * 0.1)?)?;
        let dv = (q.forward(x)?.tanh()? - (v * 0.2)?)?;
        Ok([dx, dv])
    }))
}

/// f = l2(tanh(l1([y, t]))) + a sin ωt.
fn time_dependent(weights: &Weights<'_>) -> Result<Field> {
    let l1 = AffineInTime::new(&weights.get("l1.weight")?, Some(weights.get("l1.bias")?))?;
    let l2 = Affine::new(weights, "l2")?;
    let (amp, omega) = (weights.get("amp")?, weights.get("omega")?);
    Ok(single(move |t, y| {
        let t = t.tensor()?;
        let wave = omega.to_dtype(t.dtype())?.broadcast_mul(&t)?.sin()?;
        let wave = amp.to_dtype(t.dtype())?.broadcast_mul(&wave)?;
        let hidden = l1.forward(&t, y)?.tanh()?;
        l2.forward(&hidden)?
            .broadcast_add(&wave.to_dtype(y.dtype())?)
    }))
}

/// q' = p, p' = −k sin q.
fn hamiltonian_pendulum(weights: &Weights<'_>) -> Result<Field> {
    let k = weights.get("k")?;
    Ok(single(move |_, y| {
        let (q, p) = coordinates(y)?;
        let force = q.sin()?.broadcast_mul(&k)?.neg()?;
        Tensor::cat(&[p, force], D::Minus1)
    }))
}

/// x' = −∇_x Φ, c' = ½|x'|² with the OT-flow potential of s = [x, t],
/// Φ = wᵀN(s) + ½|A s|² + bᵀs, N = u + σ(K1 u + b1), u = σ(K0 s + b0), σ = log(eˣ + e⁻ˣ).
///
/// ∇Φ = K0ᵀ(tanh(K0 s + b0) ∘ (w + K1ᵀ(tanh(K1 u + b1) ∘ w))) + AᵀA s + b; σ' = tanh.
fn otflow_potential(weights: &Weights<'_>) -> Result<Field> {
    let bias = weights.get("K0.bias")?;
    let k0 = AffineInTime::new(&weights.get("K0.weight")?, Some(bias))?;
    let k1 = Affine::new(weights, "K1")?;
    let quadratic = AffineInTime::new(&weights.get("A")?, None)?;
    let w = weights.get("w")?;
    let b = weights.get("b")?;
    Ok(double(move |t, x, cost| {
        let t = t.tensor()?;
        let z0 = k0.forward(&t, x)?;
        let outer = k1.forward(&log_two_cosh(&z0)?)?.tanh()?.broadcast_mul(&w)?;
        let inner = product(&outer, &k1.weight.t()?)?.broadcast_add(&w)?;
        let of_n = product(&(z0.tanh()? * inner)?, &k0.of_state.t()?)?;
        let of_a = product(&quadratic.forward(&t, x)?, &quadratic.of_state.t()?)?;
        let b = b.narrow(0, 0, x.dim(D::Minus1)?)?;
        let dx = (of_n + of_a)?.broadcast_add(&b)?.neg()?;
        let dc = (dx.sqr()?.sum(D::Minus1)? * 0.5)?;
        Ok([dx, dc.reshape(cost.shape())?])
    }))
}

/// log(2 cosh x) = |x| + log(1 + e^(−2|x|)), which does not overflow.
fn log_two_cosh(x: &Tensor) -> Result<Tensor> {
    let x = x.abs()?;
    let tail = ((&x * -2.0)?.exp()? + 1.0)?.log()?;
    x + tail
}
