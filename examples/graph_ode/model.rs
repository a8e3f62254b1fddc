//! A graph convolution into 64 features, a graph neural ODE or a rectifier over them, and a convolution into classes.

use candle_core::{DType, Device, Module, Result as CandleResult, Tensor};
use candle_diffeq::nn::graph::Gcn;
use candle_diffeq::nn::{dropout_mask, Activation};
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::tableau::RK4;
use candle_diffeq::{NeuralOde, OdeOptions, Time};
use candle_nn::{Init, VarBuilder, VarMap};

use crate::data::{Data, CLASSES};
use common::dtype::Dtype;
use common::random::generator;
use common::{initial, Result};

const WIDTH: usize = 64;
/// Dropout of words, and inside the field.
const WORDS: f64 = 0.4;
const INSIDE: f64 = 0.9;
/// RK4 over [0, 1].
const STEPS: usize = 2;

/// What lies between the two convolutions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Ode(Dtype),
    /// Nothing but a rectifier: the network of Kipf and Welling.
    Plain,
}

impl Kind {
    pub(crate) fn name(self) -> String {
        match self {
            Self::Ode(dtype) => format!("graph ODE, {}", dtype.name()),
            Self::Plain => "GCN, f32".to_owned(),
        }
    }
}

/// Masks of the features before each convolution of the field.
type Masks = (Tensor, Tensor);

pub(crate) struct Model {
    pub(crate) vars: VarMap,
    first: [Tensor; 2],
    flow: Option<NeuralOde<Tensor, Masks>>,
    last: Gcn,
}

impl Model {
    /// Weights and biases uniform in ±1/√outputs.
    pub(crate) fn new(data: &Data, kind: Kind, seed: u64, device: &Device) -> Result<Self> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
        let words = data.words.dims().1;
        let first = [
            vb.get_with_hints((words, WIDTH), "first.weight", Init::Const(0.0))?,
            vb.get_with_hints(WIDTH, "first.bias", Init::Const(0.0))?,
        ];
        let last = Gcn::new(WIDTH, CLASSES, &data.graph, vb.pp("last"))?;
        let flow = match kind {
            Kind::Plain => None,
            Kind::Ode(dtype) => Some(flow(data, dtype, &vars, device)?),
        };
        let mut rng = generator(seed);
        let all = vars.data().lock().map_err(|_| "the variables are locked")?;
        let mut names: Vec<_> = all.keys().collect();
        names.sort();
        for name in names {
            let dims = all[name].dims();
            let outputs = match name.as_str() {
                "first.weight" => dims[1],
                _ => dims[0],
            };
            initial::uniform(&all[name], &mut rng, 1.0 / (outputs as f64).sqrt())?;
        }
        drop(all);
        Ok(Self {
            vars,
            first,
            flow,
            last,
        })
    }

    /// Logits of all papers; with dropout drawn from the seed, if there is one.
    pub(crate) fn logits(&self, data: &Data, dropout: Option<u64>) -> Result<Tensor> {
        let shares = data.words.values();
        let device = shares.device().clone();
        let mask = |shape: &[usize], share: f64, seed: u64| {
            dropout_mask(shape.to_vec(), share, seed, DType::F32, &device)
        };
        let words = match dropout {
            Some(seed) => {
                let kept = mask(shares.dims(), WORDS, 3 * seed)?;
                data.words.with_values((shares * kept)?)?
            }
            None => data.words.clone(),
        };
        let [weight, bias] = &self.first;
        let h = data
            .graph
            .matmul(&words.matmul(weight)?)?
            .broadcast_add(bias)?;
        let h = match &self.flow {
            None => h.relu()?,
            Some(flow) => {
                let masks = match dropout {
                    Some(seed) => (
                        mask(h.dims(), INSIDE, 3 * seed + 1)?,
                        mask(h.dims(), INSIDE, 3 * seed + 2)?,
                    ),
                    None => (h.ones_like()?, h.ones_like()?),
                };
                flow.given(&masks).solve(&h, &[0.0, 1.0])?
            }
        };
        Ok(self.last.forward(&h)?)
    }

    /// ½ Σ θ², of which weight decay is the gradient.
    pub(crate) fn half_squares(&self) -> CandleResult<Tensor> {
        let squares = self.vars.all_vars();
        let squares = squares.iter().map(|var| var.sqr()?.sum_all());
        let squares = Tensor::stack(&squares.collect::<CandleResult<Vec<_>>>()?, 0)?;
        squares.sum_all()? * 0.5
    }
}

/// h' = Â (m₂ ∘ softplus(Â (m₁ ∘ h) W₁ᵀ + b₁)) W₂ᵀ + b₂.
fn flow(
    data: &Data,
    dtype: Dtype,
    vars: &VarMap,
    device: &Device,
) -> Result<NeuralOde<Tensor, Masks>> {
    let graph = data.graph.clone();
    let ode = NeuralOde::with_args(vars, "f", DType::F32, device, move |vb| {
        let layers = [
            Gcn::new(WIDTH, WIDTH, &graph, vb.pp(0))?,
            Gcn::new(WIDTH, WIDTH, &graph, vb.pp(1))?,
        ];
        Ok(move |_: &Time, h: &Tensor, (first, second): &Masks| {
            let hidden = layers[0].forward(&(h * first)?)?;
            let hidden = Activation::Softplus.forward(&hidden)?;
            layers[1].forward(&(hidden * second)?)
        })
    })?;
    Ok(ode.options(OdeOptions {
        method: RK4,
        steps: Steps::PerInterval(STEPS),
        output: Output::Final,
        precision: Some(dtype.precision()),
        ..Default::default()
    }))
}
