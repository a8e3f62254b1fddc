//! A workload file: weights p0, p1, …, y0, t, target, and the reference's loss and gradients in f64;
//! in its header `kind` (mlp, conv, cnf, hyper) and `method`.

use std::collections::HashMap;
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::{OdeOptions, Tableau};
use candle_nn::{VarBuilder, VarMap};
use safetensors::SafeTensors;

use crate::common::Result;
use crate::fields::{self, Kind, Ode, Place, Whose, KINDS};

/// What a file says.
pub(crate) struct Workload {
    pub(crate) name: String,
    pub(crate) times: Vec<f64>,
    pub(crate) method: Tableau,
    kind: &'static Kind,
    /// Weights p0, p1, … in this order.
    weights: usize,
    tensors: HashMap<String, Tensor>,
    device: Device,
}

/// The initial state: the variable of the data, and the parts of the state of which it is one.
pub(crate) struct Initial {
    pub(crate) var: Var,
    pub(crate) leaves: Vec<Tensor>,
}

impl Workload {
    /// Reads a file.
    pub(crate) fn read(path: &Path, device: &Device) -> Result<Self> {
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
        let tensors =
            candle_core::safetensors::load_buffer(&bytes, device).map_err(|e| failed(&e))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        Self::new(&name, &text("kind")?, &text("method")?, tensors, device)
            .map_err(|e| failed(&e).into())
    }

    /// Of tensors by their names in a file; the reference may be missing.
    pub(crate) fn new(
        name: &str,
        kind: &str,
        method: &str,
        tensors: HashMap<String, Tensor>,
        device: &Device,
    ) -> Result<Self> {
        let known = KINDS.iter().find(|known| known.name == kind);
        let kind = known.ok_or_else(|| format!("unknown kind `{kind}`"))?;
        let tableau = Tableau::ALL.into_iter().find(|t| t.name() == method);
        let method = tableau.ok_or_else(|| format!("unknown method `{method}`"))?;
        let weights = (0..)
            .take_while(|i| tensors.contains_key(&format!("p{i}")))
            .count();
        if weights == 0 || weights % 2 == 1 {
            return Err("its weights are not pairs p0, p1, …".into());
        }
        let mut workload = Self {
            name: name.to_owned(),
            times: vec![],
            method,
            kind,
            weights,
            tensors,
            device: device.clone(),
        };
        workload.times = workload.tensor("t", DType::F64)?.to_vec1()?;
        Ok(workload)
    }

    /// Multiply-adds of the products of one evaluation, of a perceptron.
    pub(crate) fn products(&self) -> Option<f64> {
        let weights = (0..self.weights).step_by(2).map(|i| format!("p{i}"));
        let matrices = weights.filter_map(|name| self.tensors.get(&name));
        let rows = self.tensors.get("y0")?.dims().first()?;
        let products: usize = matrices.map(|w| w.elem_count() * rows).sum();
        (self.kind.name == "mlp").then_some(products as f64)
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
            let var = Var::from_tensor(&self.tensor(&format!("p{i}"), dtype)?)?;
            data.insert(variable(i), var);
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
            let get = |i: usize| vb.get(shapes[i].clone(), &variable(i));
            let pairs = (0..shapes.len()).step_by(2);
            pairs.map(|i| Ok((get(i)?, get(i + 1)?))).collect()
        };
        let place = Place {
            vars,
            dtype,
            device: &self.device,
            features: self.tensor("y0", dtype)?.dim(1)?,
        };
        let (ask, plain) = (Box::new(layers), self.kind.plain);
        Ok(match (whose, self.kind.ours) {
            (Whose::Tape, _) => fields::tape(plain, &place, ask, &options)?,
            (Whose::Ours, Some(build)) => build(&place, ask, options)?,
            (Whose::DropIn, _) => fields::plain(plain, fields::DROP_IN, &place, ask, options)?,
            _ => fields::plain(plain, fields::CANDLES, &place, ask, options)?,
        })
    }

    /// y0, tracked; for a density its logarithm starts at zero.
    pub(crate) fn y0(&self, dtype: DType) -> Result<Initial> {
        let var = Var::from_tensor(&self.tensor("y0", dtype)?)?;
        let mut leaves = vec![var.as_tensor().clone()];
        if self.is_density() {
            leaves.push(Tensor::zeros((var.dim(0)?, 1), dtype, &self.device)?);
        }
        Ok(Initial { var, leaves })
    }

    /// Whether the state has its log-density beside it.
    pub(crate) fn is_density(&self) -> bool {
        matches!(self.kind.name, "cnf" | "hyper")
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
        let reference = |name: &str| flat(&self.tensor(name, DType::F64)?);
        let (mut got, mut expected) = (vec![], vec![]);
        let mut gradients = self.gradients(vars, y0, grads)?;
        let y0 = gradients.pop().ok_or("no gradients")?;
        for (name, gradient) in &gradients {
            got.extend(flat(gradient)?);
            expected.extend(reference(name)?);
        }
        Ok([
            distance(&flat(loss)?, &reference("loss")?)?,
            distance(&got, &expected)?,
            distance(&flat(&y0.1)?, &reference(&y0.0)?)?,
        ])
    }

    /// Gradients of the weights and, last, of y0, by their names in a file.
    pub(crate) fn gradients(
        &self,
        vars: &VarMap,
        y0: &Var,
        grads: &GradStore,
    ) -> Result<Vec<(String, Tensor)>> {
        let vars = vars.data().lock();
        let vars = vars.map_err(|_| "the variables are poisoned")?;
        let of = |name: String, var: Option<&Var>| {
            let gradient = var.and_then(|var| grads.get(var));
            let gradient = gradient.ok_or_else(|| format!("{}: no {name}", self.name))?;
            Ok((name, gradient.clone()))
        };
        let weights = (0..self.weights).map(|i| of(format!("grad.p{i}"), vars.get(&variable(i))));
        weights
            .chain([of("grad.y0".to_owned(), Some(y0))])
            .collect()
    }
}

/// The name of the i-th weight as a variable.
fn variable(i: usize) -> String {
    format!("{}.{}", i / 2, ["weight", "bias"][i % 2])
}

/// ‖x − y‖ / ‖y‖.
fn distance(x: &[f64], y: &[f64]) -> Result<f64> {
    if x.len() != y.len() {
        return Err(format!("{} values where the reference has {}", x.len(), y.len()).into());
    }
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    Ok(norm(&mut x.iter().zip(y).map(|(x, y)| x - y)) / norm(&mut y.iter().copied()))
}
