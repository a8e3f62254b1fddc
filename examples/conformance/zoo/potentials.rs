//! A potential with its first and second derivatives, and the pull-backs of all of them.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use candle_diffeq::nn::energy::{Curved, Energy, Potential};
use candle_diffeq::nn::{Activation, EnergyMlp, Linear, Perceptron};
use candle_diffeq::Time;

use crate::oracle::{Oracle, Result};
use crate::outcome::{error, parts, worse};

/// The network of a file over variables, with its inputs.
struct Case<'a> {
    oracle: &'a Oracle,
    weights: BTreeMap<String, Var>,
    net: Perceptron,
    x: Var,
    /// Whether the last input is time.
    timed: bool,
}

/// A number whose gradients a file has.
struct Scalar {
    sum: Tensor,
    /// What it reads beside x and the weights.
    reads: Vec<(&'static str, Var)>,
    /// The times of its rows, where they are read.
    times: Vec<Tensor>,
}

/// A line of the result: what, its largest error, and which tensor has it.
type Line = (String, f64, String);

/// All comparisons of a file.
pub(super) fn lines(oracle: &Oracle, sigma: Activation) -> Result<Vec<Line>> {
    let case = Case::new(oracle, sigma)?;
    let mut lines = vec![case.values()?];
    for tag in [
        "value",
        "pull_gradient",
        "pull_bilinear",
        "pull_laplacian",
        "pull_hessian",
    ] {
        lines.push(case.pulled(tag)?);
    }
    lines.push(case.pulled_by_hand()?);
    Ok(lines)
}

impl<'a> Case<'a> {
    fn new(oracle: &'a Oracle, sigma: Activation) -> Result<Self> {
        let mut weights = BTreeMap::new();
        for (name, w) in oracle.under("w.") {
            weights.insert(name, Var::from_tensor(&w)?);
        }
        let mut layers = vec![];
        for i in 1.. {
            let of = |part: &str| weights.get(&format!("l{i}.{part}"));
            let Some(weight) = of("weight") else { break };
            let bias = of("bias").map(|b: &Var| b.as_tensor().clone());
            let layer = candle_nn::Linear::new(weight.as_tensor().clone(), bias);
            layers.push(Linear::from(layer));
        }
        Ok(Self {
            oracle,
            net: Perceptron::from_layers(layers, sigma)?,
            weights,
            x: Var::from_tensor(oracle.tensor("x")?)?,
            timed: oracle.problem() == Some("potential_time"),
        })
    }

    /// The potential of all inputs, and a time that it does not read.
    fn whole(&self) -> Result<(EnergyMlp, Time)> {
        let x = self.x.as_tensor();
        let time = Time::new(0.0, x.dtype(), x.device());
        Ok((EnergyMlp::of(self.net.clone(), Energy::Output)?, time))
    }

    /// ΔΦ over the coordinates of space; the cotangent of each time is returned with the time itself.
    fn laplacian(&self) -> Result<(Tensor, Vec<Tensor>)> {
        let x = self.x.as_tensor();
        if !self.timed {
            let (energy, t) = self.whole()?;
            return Ok((energy.laplacian(&t, x)?, vec![]));
        }
        let energy = EnergyMlp::of_time(self.net.clone(), Energy::Output)?;
        let (rows, columns) = x.dims2()?;
        let (mut all, mut times) = (vec![], vec![]);
        // Every row has a time of its own.
        for row in 0..rows {
            let at = x.get(row)?.get(columns - 1)?.to_scalar::<f64>()?;
            let t = Time::differentiable(at, x.dtype(), x.device());
            let space = x.narrow(0, row, 1)?.narrow(1, 0, columns - 1)?;
            all.push(energy.laplacian(&t, &space)?);
            times.push(t.tensor()?);
        }
        Ok((Tensor::cat(&all, 0)?, times))
    }

    fn values(&self) -> Result<Line> {
        let (energy, t) = self.whole()?;
        let (x, of) = (self.x.as_tensor(), |name| self.oracle.tensor(name));
        let (phi, gradient) = energy.gradient(&t, x)?;
        let (again, hvp) = energy.gradient_jvp(&t, x, (0.0, of("v")?))?;
        let (_, right) = energy.gradient_jvp(&t, x, (0.0, of("w2")?))?;
        let got = [
            ("phi", phi),
            ("gradient", gradient),
            ("gradient", again),
            ("hvp", hvp),
            ("hessian", energy.hessian(&t, x)?),
            ("laplacian", self.laplacian()?.0),
            ("bilinear", (right * of("p")?)?.sum_keepdim(1)?),
        ];
        let mut worst = (0.0, String::new());
        for (name, got) in got {
            worst = larger(worst, self.compare(name, got, of(name)?)?);
        }
        Ok(("values".into(), worst.0, worst.1))
    }

    /// The number whose gradients the file has under the tag.
    fn scalar(&self, tag: &str) -> Result<Scalar> {
        let (energy, t) = self.whole()?;
        let (x, of) = (self.x.as_tensor(), |name| self.oracle.tensor(name));
        let mut reads = vec![];
        let mut times = vec![];
        let products = match tag {
            "value" => (energy.gradient(&t, x)?.0 * of("c")?)?,
            "pull_gradient" => (energy.gradient(&t, x)?.1 * of("v")?)?,
            "pull_laplacian" => {
                let (laplacian, at) = self.laplacian()?;
                times = at;
                (laplacian * of("c")?)?
            }
            "pull_hessian" => (energy.hessian(&t, x)? * of("U")?)?,
            _ => {
                let (p, w) = (Var::from_tensor(of("p")?)?, Var::from_tensor(of("w2")?)?);
                let (_, right) = energy.gradient_jvp(&t, x, (0.0, &w))?;
                let products = (right * p.as_tensor())?;
                reads = vec![("p", p), ("w2", w)];
                products
            }
        };
        Ok(Scalar {
            sum: products.sum_all()?,
            reads,
            times,
        })
    }

    /// By candle's tape through the formulas.
    fn pulled(&self, tag: &str) -> Result<Line> {
        let Scalar { sum, reads, times } = self.scalar(tag)?;
        let grads = sum.backward()?;
        let mut of_x = grads.get(&self.x).ok_or("no gradient of x")?.clone();
        if !times.is_empty() {
            let zeros = of_x.narrow(1, 0, 1)?.zeros_like()?;
            let of_time = times.iter().enumerate().map(|(row, t)| match grads.get(t) {
                Some(t) => t.reshape((1, 1)),
                None => zeros.narrow(0, row, 1),
            });
            let of_time = of_time.collect::<candle_core::Result<Vec<_>>>()?;
            let space = of_x.narrow(1, 0, of_x.dim(1)? - 1)?;
            of_x = Tensor::cat(&[space, Tensor::cat(&of_time, 0)?], 1)?;
        }
        let mut worst = self.compare("grad.x", of_x, self.grad(tag, "x")?)?;
        for (name, var) in reads {
            let got = grads.get(&var).ok_or("no gradient")?.clone();
            worst = larger(worst, self.compare(name, got, self.grad(tag, name)?)?);
        }
        worst = larger(worst, self.weights(&grads, tag)?);
        Ok((tag.into(), worst.0, worst.1))
    }

    /// The pull-back of the gradient that is written by hand.
    fn pulled_by_hand(&self) -> Result<Line> {
        let (energy, t) = self.whole()?;
        let (gradient, pull) = energy.gradient_vjp(&t, &self.x)?;
        let cotangents = pull(self.oracle.tensor("v")?)?;
        let (tag, of) = ("pull_gradient", |name| self.oracle.tensor(name));
        let mut worst = self.compare("gradient", gradient, of("gradient")?)?;
        worst = larger(
            worst,
            self.compare("grad.x", cotangents.y, self.grad(tag, "x")?)?,
        );
        worst = larger(worst, self.weights(&cotangents.params, tag)?);
        Ok(("pull_gradient by hand".into(), worst.0, worst.1))
    }

    fn grad(&self, tag: &str, of: &str) -> Result<&Tensor> {
        self.oracle.tensor(&format!("{tag}/grad.{of}"))
    }

    fn weights(&self, grads: &GradStore, tag: &str) -> Result<(f64, String)> {
        let mut worst = (0.0, String::new());
        for (name, var) in &self.weights {
            let got = match grads.get(var) {
                Some(grad) => grad.clone(),
                None => var.zeros_like()?,
            };
            let exact = self.grad(tag, &format!("w.{name}"))?;
            worst = larger(worst, self.compare(name, got, exact)?);
        }
        Ok(worst)
    }

    fn compare(&self, name: &str, got: Tensor, exact: &Tensor) -> Result<(f64, String)> {
        if got.dims() != exact.dims() {
            let (got, exact) = (got.dims(), exact.dims());
            let what = format_args!("{name} has shape {got:?}, expected {exact:?}");
            return Err(self.oracle.failed(what));
        }
        let one = |x: Tensor| parts(vec![(name.to_owned(), x)]);
        Ok((error(&one(got)?, &one(exact.clone())?), name.to_owned()))
    }
}

/// The one with the larger error.
fn larger(a: (f64, String), b: (f64, String)) -> (f64, String) {
    match worse(a.0, b.0).total_cmp(&a.0).is_eq() {
        true => a,
        false => b,
    }
}
