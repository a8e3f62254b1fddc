//! A workload file: weights p0, p1, …, y0, t, target, and the reference's loss and gradients in f64;
//! in its header `kind` (mlp, conv, cnf) and `method`.

use std::collections::HashMap;
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::{OdeOptions, Tableau};
use candle_nn::{VarBuilder, VarMap};
use safetensors::SafeTensors;

use crate::common::Result;
use crate::fields::{self, Kind, Ode, Whose, KINDS};

/// What a file says.
pub(crate) struct Workload {
    pub(crate) name: String,
    pub(crate) times: Vec<f64>,
    pub(crate) method: Tableau,
    kind: &'static Kind,
    /// Weights p0, p1, … in this order.
    weights: usize,
    tensors: HashMap<String, Tensor>,
}

/// The initial state: the variable of the data, and the parts of the state of which it is one.
pub(crate) struct Initial {
    pub(crate) var: Var,
    pub(crate) leaves: Vec<Tensor>,
}

impl Workload {
    /// Reads a file.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let failed = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
        let bytes = std::fs::read(path).map_err(|e| failed(&e))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| failed(&e))?;
        let header = header.metadata().clone().unwrap_or_default();
        let text = |key: &str| {
            let json = header
                .get(key)
                .ok_or_else(|| failed(&format!("no `{key}` in its header")))?;
            serde_json::from_str::<String>(json).map_err(|e| failed(&format!("`{key}`: {e}")))
        };
        let (kind, method) = (text("kind")?, text("method")?);
        let known = KINDS.iter().find(|known| known.name == kind);
        let kind = known.ok_or_else(|| failed(&format!("unknown kind `{kind}`")))?;
        let tableau = Tableau::ALL.into_iter().find(|t| t.name() == method);
        let tableau = tableau.ok_or_else(|| failed(&format!("unknown method `{method}`")))?;
        let tensors =
            candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|e| failed(&e))?;
        let weights = (0..)
            .take_while(|i| tensors.contains_key(&format!("p{i}")))
            .count();
        if weights == 0 || weights % 2 == 1 {
            return Err(failed(&"its weights are not pairs p0, p1, …").into());
        }
        let mut workload = Self {
            name: path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            times: vec![],
            method: tableau,
            kind,
            weights,
            tensors,
        };
        workload.times = workload
            .tensor("t", DType::F64)?
            .to_vec1()
            .map_err(|e| failed(&e))?;
        Ok(workload)
    }

    fn tensor(&self, name: &str, dtype: DType) -> Result<Tensor> {
        let tensor = self.tensors.get(name);
        let tensor = tensor.ok_or_else(|| format!("{}: no tensor `{name}`", self.name))?;
        Ok(tensor.to_dtype(dtype)?)
    }

    /// Puts the weights into `vars`.
    pub(crate) fn fill(&self, vars: &VarMap, dtype: DType) -> Result<()> {
        let mut data = vars
            .data()
            .lock()
            .map_err(|_| "the variables are poisoned")?;
        for i in 0..self.weights {
            let name = format!("p{i}");
            let var = Var::from_tensor(&self.tensor(&name, dtype)?)?;
            data.insert(name, var);
        }
        Ok(())
    }

    /// The field over variables that are there: ours where there is one, or of plain layers.
    pub(crate) fn ode(
        &self,
        vars: &VarMap,
        dtype: DType,
        whose: Whose,
        options: OdeOptions,
    ) -> Result<Ode> {
        let shapes: Vec<_> = (0..self.weights)
            .map(|i| Ok(self.tensor(&format!("p{i}"), dtype)?.shape().clone()))
            .collect::<Result<_>>()?;
        let layers = move |vb: VarBuilder<'_>| -> candle_core::Result<Vec<_>> {
            let get = |i: usize| vb.get(shapes[i].clone(), &format!("p{i}"));
            let pairs = (0..shapes.len()).step_by(2);
            pairs.map(|i| Ok((get(i)?, get(i + 1)?))).collect()
        };
        let (ask, plain) = (Box::new(layers), self.kind.plain);
        Ok(match (whose, self.kind.ours) {
            (Whose::Tape, _) => fields::tape(plain, vars, dtype, ask, &options)?,
            (Whose::Ours, Some(build)) => build(vars, dtype, ask, options)?,
            (Whose::DropIn, _) => fields::plain(plain, fields::DROP_IN, vars, dtype, ask, options)?,
            _ => fields::plain(plain, fields::CANDLES, vars, dtype, ask, options)?,
        })
    }

    /// y0, tracked; for a density its logarithm starts at zero.
    pub(crate) fn y0(&self, dtype: DType) -> Result<Initial> {
        let var = Var::from_tensor(&self.tensor("y0", dtype)?)?;
        let mut leaves = vec![var.as_tensor().clone()];
        if self.is_density() {
            leaves.push(Tensor::zeros((var.dim(0)?, 1), dtype, &Device::Cpu)?);
        }
        Ok(Initial { var, leaves })
    }

    fn is_density(&self) -> bool {
        self.kind.name == "cnf"
    }

    /// What the final state should be, where the loss asks for it.
    pub(crate) fn target(&self, dtype: DType) -> Result<Option<Tensor>> {
        Ok(match self.is_density() {
            true => None,
            false => Some(self.tensor("target", dtype)?),
        })
    }

    /// The mean square distance from the target, or the mean negative log-likelihood under a
    /// standard normal, up to a constant.
    pub(crate) fn loss(
        &self,
        y: &[Tensor],
        target: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        match (y, target) {
            ([y], Some(target)) => (y - target)?.sqr()?.mean_all(),
            ([z, log], None) => ((z.sqr()?.sum_keepdim(1)? * 0.5)? + log)?.mean_all(),
            _ => candle_core::bail!("the state has {} parts", y.len()),
        }
    }

    /// Relative errors of the loss, of all weight gradients together, and of the gradient of y0.
    pub(crate) fn errors(
        &self,
        loss: &Tensor,
        vars: &VarMap,
        y0: &Var,
        grads: &GradStore,
    ) -> Result<[f64; 3]> {
        let flat = |x: &Tensor| -> Result<Vec<f64>> {
            Ok(x.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
        };
        let grad = |var: &Var, name: &str| -> Result<Vec<f64>> {
            flat(
                grads
                    .get(var)
                    .ok_or_else(|| format!("no gradient of {name}"))?,
            )
        };
        let reference = |name: &str| flat(&self.tensor(name, DType::F64)?);
        let (mut got, mut expected) = (vec![], vec![]);
        let vars = vars
            .data()
            .lock()
            .map_err(|_| "the variables are poisoned")?;
        for i in 0..self.weights {
            let name = format!("p{i}");
            let var = vars
                .get(&name)
                .ok_or_else(|| format!("no variable {name}"))?;
            got.extend(grad(var, &name)?);
            expected.extend(reference(&format!("grad.{name}"))?);
        }
        Ok([
            distance(&flat(loss)?, &reference("loss")?)?,
            distance(&got, &expected)?,
            distance(&grad(y0, "y0")?, &reference("grad.y0")?)?,
        ])
    }
}

/// ‖x − y‖ / ‖y‖.
fn distance(x: &[f64], y: &[f64]) -> Result<f64> {
    if x.len() != y.len() {
        return Err(format!("{} values where the reference has {}", x.len(), y.len()).into());
    }
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    Ok(norm(&mut x.iter().zip(y).map(|(x, y)| x - y)) / norm(&mut y.iter().copied()))
}
