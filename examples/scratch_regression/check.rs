//! The gradient, held against candle's own tape and against differences.

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::Precision;
use candle_nn::{Module, VarBuilder, VarMap};
use rand::Rng;
use rand_distr::StandardNormal;

use crate::network::{loss, network, ode, point, START, STEPS};
use crate::training::{restore, Weights};
use crate::{DIFFERENCES, EXACT};
use common::dtype::Dtype;
use common::random::generator;
use common::{gradients, relative, Result};

/// Random directions for differences, and the length of a step along one.
const DIRECTIONS: usize = 10;
const STEP: f64 = 1e-6;

/// A gradient and how far it is from another.
pub(crate) struct Check {
    pub(crate) name: String,
    pub(crate) error: f64,
    pub(crate) limit: f64,
}

/// Checks at these weights.
pub(crate) fn run(weights: &Weights, seed: u64) -> Result<Vec<Check>> {
    let exact = Gradient::of(weights, Precision::f64())?;
    let mut checks = vec![
        Check {
            name: format!("f64, against candle's tape over all {STEPS} steps"),
            error: relative(&exact.gradient, &exact.tape()?),
            limit: EXACT,
        },
        Check {
            name: format!("f64, against central differences along {DIRECTIONS} directions"),
            error: exact.against_differences(seed)?,
            limit: DIFFERENCES,
        },
    ];
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        let low = Gradient::of(weights, dtype.precision())?;
        checks.push(Check {
            name: format!("{}, against f64", dtype.name()),
            error: relative(&low.gradient, &exact.gradient),
            limit: f64::INFINITY,
        });
    }
    Ok(checks)
}

/// The variables of a map by name: its own order is another one in every map.
fn sorted(vars: &VarMap) -> Result<Vec<Var>> {
    let data = vars.data().lock().map_err(|_| "the variables are locked")?;
    let mut named: Vec<_> = data.iter().collect();
    named.sort_by_key(|(name, _)| name.as_str());
    Ok(named.into_iter().map(|(_, var)| var.clone()).collect())
}

/// ∇L by all weights, and what it was computed with.
struct Gradient {
    vars: VarMap,
    all: Vec<Var>,
    solve: Box<dyn Fn() -> Result<Tensor>>,
    gradient: Vec<f64>,
}

impl Gradient {
    fn of(weights: &Weights, precision: Precision) -> Result<Self> {
        let vars = VarMap::new();
        let (dtype, device) = (precision.state, Device::Cpu);
        let ode = ode(&vars, precision, &device)?;
        restore(&vars, weights)?;
        let start = point(START, dtype, &device)?;
        let solve = move || Ok(loss(&ode.solve(&start, &[0.0, 1.0])?)?);
        let all = sorted(&vars)?;
        let gradient = gradients::flat(&solve()?.backward()?, &all)?;
        Ok(Self {
            vars,
            all,
            solve: Box::new(solve),
            gradient,
        })
    }

    /// ∇L of the method written out in candle's operations.
    fn tape(&self) -> Result<Vec<f64>> {
        let vb = VarBuilder::from_varmap(&self.vars, DType::F64, &Device::Cpu);
        let f = network(vb.pp("ode"))?;
        let mut y = point(START, DType::F64, &Device::Cpu)?;
        let h = 1.0 / STEPS as f64;
        for _ in 0..STEPS {
            let k1 = f.forward(&y)?;
            let k2 = f.forward(&(&y + (&k1 * (h / 2.0))?)?)?;
            let k3 = f.forward(&(&y + (&k2 * (h / 2.0))?)?)?;
            let k4 = f.forward(&(&y + (&k3 * h)?)?)?;
            let sum = ((k1 + k4)? + ((k2 + k3)? * 2.0)?)?;
            y = (y + (sum * (h / 6.0))?)?;
        }
        Ok(gradients::flat(&loss(&y)?.backward()?, &self.all)?)
    }

    /// The error over directional derivatives.
    fn against_differences(&self, seed: u64) -> Result<f64> {
        let mut rng = generator(seed);
        let at = self.all.iter().map(|var| Ok(var.copy()?));
        let at = at.collect::<Result<Vec<_>>>()?;
        let (mut exact, mut differences) = (vec![], vec![]);
        for _ in 0..DIRECTIONS {
            let draws = (0..self.gradient.len()).map(|_| rng.sample(StandardNormal));
            let draws: Vec<f64> = draws.collect();
            let length = draws.iter().map(|x| x * x).sum::<f64>().sqrt();
            let direction: Vec<f64> = draws.iter().map(|x| x / length).collect();
            let product = self.gradient.iter().zip(&direction).map(|(g, d)| g * d);
            exact.push(product.sum());
            let loss = |step: f64| -> Result<f64> {
                self.shift(&at, &direction, step)?;
                Ok((self.solve)()?.to_scalar()?)
            };
            differences.push((loss(STEP)? - loss(-STEP)?) / (2.0 * STEP));
        }
        self.shift(&at, &vec![0.0; self.gradient.len()], 0.0)?;
        Ok(relative(&differences, &exact))
    }

    /// Sets the variables to `at` + step · direction.
    fn shift(&self, at: &[Tensor], direction: &[f64], step: f64) -> Result<()> {
        let mut rest = direction;
        for (var, at) in self.all.iter().zip(at) {
            let (own, others) = rest.split_at(at.elem_count());
            let own = Tensor::from_slice(own, at.shape(), at.device())?;
            var.set(&(at + (own * step)?)?)?;
            rest = others;
        }
        Ok(())
    }
}
