//! A workload file: weights p0, p1, …, y0, t, target, and the reference's loss and gradients in f64;
//! in its header `kind` (mlp, conv, cnf, hyper, ot_flow, hutchinson, van_der_pol, scaled_mlp, sde, cde, hnn, galerkin, graph) and
//! `method`.
//!
//! Where the header has `rtol` and `atol`, steps are adaptive, the loss is of all outputs, and `ref.ys` is the state at
//! the times of numbers `ref.index`; it may have an `activation`, too.
//!
//! In an `sde`, the first half of the weights belongs to the drift and the second half to the diffusion, and `noise` in
//! the header is the seed of the increments.  A `cde` is driven by the Hermite path through the observations `x`, (rows,
//! times, channels), at the times `t`.  A `graph` has `edges`, pairs of the rows of the state.

use std::collections::HashMap;
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var, D};
use candle_diffeq::cde::Observations;
use candle_diffeq::nn::graph::Csr;
use candle_diffeq::nn::Activation;
use candle_diffeq::options::{Adaptive, Output, StepControl, Steps};
use candle_diffeq::tableau::{Tableau, RK4};
use candle_diffeq::{sde, OdeOptions};
use candle_nn::{VarBuilder, VarMap};
use safetensors::SafeTensors;

use crate::fields::{self, Drive, Kind, Ode, Place, Whose, KINDS};
use common::Result;

/// What a file says.
pub(crate) struct Workload {
    pub(crate) name: String,
    pub(crate) times: Vec<f64>,
    pub(crate) method: Tableau,
    /// Relative and absolute, where steps are adaptive.
    pub(crate) tolerances: Option<[f64; 2]>,
    activation: Activation,
    drive: Drive,
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
        let missing = |key: &str| failed(&format!("no `{key}` in its header"));
        let text = |key: &str| {
            let json = header.get(key).ok_or_else(|| missing(key))?;
            serde_json::from_str::<String>(json).map_err(|e| failed(&format!("`{key}`: {e}")))
        };
        let number = |key: &str| {
            let json = header.get(key).ok_or_else(|| missing(key))?;
            serde_json::from_str::<f64>(json).map_err(|e| failed(&format!("`{key}`: {e}")))
        };
        let tensors =
            candle_core::safetensors::load_buffer(&bytes, device).map_err(|e| failed(&e))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let mut workload = Self::new(&name, &text("kind")?, &text("method")?, tensors, device)
            .map_err(|e| failed(&e))?;
        if header.contains_key("rtol") || header.contains_key("atol") {
            workload.tolerances = Some([number("rtol")?, number("atol")?]);
        }
        if workload.kind.name == "sde" {
            let method = text("method")?;
            let found = sde::ALL.into_iter().find(|m| m.name() == method);
            let method = found.ok_or_else(|| failed(&format!("unknown method `{method}`")))?;
            workload.drive = Drive::Noise(method, number("noise")? as u64);
        }
        if header.contains_key("activation") {
            let name = text("activation")?;
            let known = Activation::ALL.into_iter();
            let mut known = known.filter(|a| format!("{a:?}").to_lowercase() == name);
            let unknown = || failed(&format!("unknown activation `{name}`"));
            workload.activation = known.next().ok_or_else(unknown)?;
        }
        Ok(workload)
    }

    /// How the file asks for it to be solved, adaptive steps controlled as the library does or as it is told.
    pub(crate) fn options(&self, control: Option<StepControl>) -> OdeOptions {
        let steps = self.tolerances.map(|[rtol, atol]| {
            let adaptive = Adaptive::new(rtol, atol);
            Steps::Adaptive(match control {
                Some(control) => adaptive.control(control),
                None => adaptive,
            })
        });
        OdeOptions {
            method: self.method.clone(),
            steps: steps.unwrap_or_default(),
            output: match self.is_of_the_end() {
                true => Output::Final,
                false => Output::All,
            },
            ..Default::default()
        }
    }

    /// Whether steps are adaptive.
    pub(crate) fn is_adaptive(&self) -> bool {
        self.tolerances.is_some()
    }

    /// Whether it is one of torchdyn's models, or a flow of the examples.
    pub(crate) fn is_model(&self) -> bool {
        matches!(
            self.kind.name,
            "hnn" | "galerkin" | "graph" | "hyper" | "ot_flow" | "hutchinson"
        )
    }

    /// Whether the library's own field is solved tile by tile, with adaptive steps controlled so.
    pub(crate) fn is_in_tiles(&self, control: Option<StepControl>) -> bool {
        !matches!(self.drive, Drive::Graph(_)) && control != Some(StepControl::Batch)
    }

    /// Whether it is driven by noise or a path.
    pub(crate) fn is_driven(&self) -> bool {
        !matches!(self.drive, Drive::Nothing | Drive::Graph(_))
    }

    /// Whether the loss reads the last state alone.
    pub(crate) fn is_of_the_end(&self) -> bool {
        self.is_density() || !self.is_adaptive()
    }

    /// The first of the times whose states are outputs: an oscillator's start is one.
    fn first_output(&self) -> usize {
        usize::from(self.kind.name != "van_der_pol")
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
        let tableau = match kind.name {
            // It has one of its own.
            "sde" => Some(RK4),
            _ => Tableau::ALL.into_iter().find(|t| t.name() == method),
        };
        let method = tableau.ok_or_else(|| format!("unknown method `{method}`"))?;
        let weights = (0..)
            .take_while(|i| tensors.contains_key(&format!("p{i}")))
            .count();
        if weights == 0 {
            return Err("no weights p0, p1, …".into());
        }
        let mut workload = Self {
            name: name.to_owned(),
            times: vec![],
            method,
            tolerances: None,
            activation: Activation::Tanh,
            drive: Drive::Nothing,
            kind,
            weights,
            tensors,
            device: device.clone(),
        };
        workload.times = workload.tensor("t", DType::F64)?.to_vec1()?;
        if kind.name == "cde" {
            let observed = workload.tensor("x", DType::F32)?;
            let path = Observations::at(&workload.times[..], &observed)?.hermite()?;
            workload.drive = Drive::Path(path);
        }
        if kind.name == "graph" {
            let edges = workload.tensor("edges", DType::U32)?.to_vec2::<u32>()?;
            let edges: Vec<_> = edges.iter().map(|edge| [edge[0], edge[1]]).collect();
            let nodes = workload.tensor("y0", DType::F32)?.dim(0)?;
            let graph = Csr::normalised_adjacency(nodes, &edges, DType::F32, device)?;
            workload.drive = Drive::Graph(graph);
            workload.activation = Activation::Softplus;
        }
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
            let shapes = shapes.iter().enumerate();
            shapes
                .map(|(i, shape)| vb.get(shape.clone(), &variable(i)))
                .collect()
        };
        let place = Place {
            vars,
            dtype,
            device: &self.device,
            features: self.tensor("y0", dtype)?.dim(1)?,
            activation: self.activation,
            drive: self.drive.clone(),
        };
        let (ask, plain) = (Box::new(layers), self.kind.plain);
        Ok(match (whose, self.kind.ours) {
            (Whose::Tape, _) => fields::tape(plain, &place, ask, &options)?,
            (Whose::Ours, Some(build)) => build(&place, ask, options)?,
            (Whose::DropIn, _) => fields::plain(plain, fields::DROP_IN, &place, ask, options)?,
            _ => fields::plain(plain, fields::CANDLES, &place, ask, options)?,
        })
    }

    /// y0, tracked; for a density its logarithm starts at zero, and the speed of a row is its last column.
    pub(crate) fn y0(&self, dtype: DType) -> Result<Initial> {
        let var = Var::from_tensor(&self.tensor("y0", dtype)?)?;
        let mut leaves = vec![var.as_tensor().clone()];
        if let Some(costs) = self.costs() {
            leaves.push(Tensor::zeros((var.dim(0)?, costs), dtype, &self.device)?);
        }
        if self.kind.name == "hutchinson" {
            // Signs of normal numbers are a probe of Rademacher's distribution.
            leaves.push(var.detach().sign()?);
        }
        if self.kind.name == "scaled_mlp" {
            let last = var.dim(1)?.saturating_sub(1);
            leaves = vec![var.narrow(1, 0, last)?, var.narrow(1, last, 1)?];
        }
        Ok(Initial { var, leaves })
    }

    /// Whether the state has its log-density beside it.
    pub(crate) fn is_density(&self) -> bool {
        self.costs().is_some()
    }

    /// The log-density and what is integrated with it.
    fn costs(&self) -> Option<usize> {
        match self.kind.name {
            "cnf" | "hyper" | "hutchinson" => Some(1),
            "ot_flow" => Some(3),
            _ => None,
        }
    }

    /// What the final state should be, where the loss asks for it.
    pub(crate) fn target(&self, dtype: DType) -> Result<Option<Tensor>> {
        Ok(match self.is_density() {
            true => None,
            false => Some(self.tensor("target", dtype)?),
        })
    }

    /// The mean square distance of all outputs from the target, in as many columns as that has, or the mean negative
    /// log-likelihood under a standard normal, up to a constant, with the further costs of an `ot_flow`.
    pub(crate) fn loss(
        &self,
        y: &[Tensor],
        target: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        match (y, target) {
            ([y], Some(target)) if self.is_of_the_end() => (y - target)?.sqr()?.mean_all(),
            ([y, ..], Some(target)) => {
                let first = self.first_output();
                let y = y.narrow(0, first, y.dim(0)?.saturating_sub(first))?;
                let y = y.narrow(D::Minus1, 0, target.dim(D::Minus1)?)?;
                y.broadcast_sub(target)?.sqr()?.mean_all()
            }
            ([z, costs, ..], None) => ((z.sqr()?.sum(1)? * 0.5)? + costs.sum(1)?)?.mean_all(),
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

    /// The relative error of the states at the times for which the file has them.
    pub(crate) fn state_error(&self, y: &[Tensor]) -> Result<Option<f64>> {
        if !self.tensors.contains_key("ref.ys") {
            return Ok(None);
        }
        let flat = |x: &Tensor| -> Result<Vec<f64>> {
            Ok(x.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
        };
        let y = y.iter().map(Tensor::detach).collect::<Vec<_>>();
        let y = Tensor::cat(&y, D::Minus1)?;
        let y = match self.is_of_the_end() {
            true => y.unsqueeze(0)?,
            false => y,
        };
        let passed_over = self.times.len().saturating_sub(y.dim(0)?);
        let mut got = vec![];
        for index in self.tensor("ref.index", DType::F64)?.to_vec1::<f64>()? {
            let state = (index as usize).checked_sub(passed_over);
            let missing = || format!("{}: ref.index {index} is of no output", self.name);
            got.extend(flat(&y.get(state.ok_or_else(missing)?)?)?);
        }
        let expected = flat(&self.tensor("ref.ys", DType::F64)?)?;
        Ok(Some(distance(&got, &expected)?))
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
pub(crate) fn variable(i: usize) -> String {
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
