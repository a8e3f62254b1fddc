//! Solutions and gradients as numbers: by the library, and by candle's tape over all steps.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_diffeq::metrics::Stats;
use candle_diffeq::options::{Checkpoint, Output, Steps};
use candle_diffeq::tableau::Tableau;
use candle_diffeq::{NeuralOde, OdeOptions, State, Time};
use candle_nn::VarMap;

/// y(T), ∂L/∂y0 and ∂L/∂θ, all parameters in one.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    pub state: Vec<f64>,
    pub y0: Vec<f64>,
    pub theta: Vec<f64>,
    pub stats: Stats,
}

/// Relative errors of the three.
#[derive(Clone, Copy, Debug, Default)]
pub struct Errors {
    pub state: f64,
    pub y0: f64,
    pub theta: f64,
}

impl Errors {
    pub fn all(&self) -> [f64; 3] {
        [self.state, self.y0, self.theta]
    }
}

impl Gradients {
    pub fn errors(&self, reference: &Self) -> Errors {
        Errors {
            state: relative(&self.state, &reference.state),
            y0: relative(&self.y0, &reference.y0),
            theta: relative(&self.theta, &reference.theta),
        }
    }
}

/// All values of a tensor of any dtype and device.
pub fn values(x: &Tensor) -> Result<Vec<f64>> {
    x.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// ‖x − y‖ / ‖y‖; NaN where the lengths differ.
pub fn relative(x: &[f64], y: &[f64]) -> f64 {
    if x.len() != y.len() {
        return f64::NAN;
    }
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut x.iter().zip(y).map(|(x, y)| x - y)) / norm(&mut y.iter().copied())
}

/// Solves to the last time, forms the loss, and pulls it back through candle's graph.  `leaf` is the
/// variable in y0 whose gradient is wanted, `state` picks what is compared; statistics are taken from
/// the recorder of the options, if there is one.
pub fn solve<S: State + 'static>(
    ode: NeuralOde<S>,
    (vars, y0, leaf): (&VarMap, &S, &Var),
    times: &[f64],
    mut options: OdeOptions,
    (state, loss): (impl Fn(&S) -> Tensor, impl Fn(&S) -> Result<Tensor>),
) -> candle_diffeq::Result<Gradients> {
    let recorder = options.recorder.get_or_insert_default().clone();
    options.output = Output::Final;
    let ode = ode.options(options);
    let y = ode.solve(y0, times)?;
    let grads = loss(&y)?.backward()?;
    let data = vars
        .data()
        .lock()
        .map_err(|_| candle_core::Error::UnwrapNone)?;
    let mut theta = vec![];
    for name in ode.parameters() {
        if let Some(grad) = data.get(name).and_then(|var| grads.get(var)) {
            theta.extend(values(grad)?);
        }
    }
    Ok(Gradients {
        state: values(&state(&y))?,
        y0: grads.get(leaf).map(values).transpose()?.unwrap_or_default(),
        theta,
        stats: recorder.take(),
    })
}

/// y' = f(w, t, y) on [0, T], and a loss of y(T), which is formed in f64.
#[derive(Clone)]
pub struct Problem {
    /// Of weights, t and y, in the dtype of y.
    pub field: fn(&[Tensor], f64, &Tensor) -> Result<Tensor>,
    pub weights: Vec<Tensor>,
    pub y0: Tensor,
    pub end: f64,
    pub loss: fn(&Tensor) -> Result<Tensor>,
}

fn in_steps(options: OdeOptions, steps: usize) -> OdeOptions {
    OdeOptions {
        steps: Steps::PerInterval(steps),
        ..options
    }
}

/// Enough for candle to walk a graph of 10⁵ evaluations, which it does by recursion.
const STACK: usize = 2 << 30;

impl Problem {
    /// By the library, in equal steps.
    pub fn solve(&self, options: OdeOptions, steps: usize) -> candle_diffeq::Result<Gradients> {
        let state = options.precision.map_or(DType::F32, |p| p.state);
        let (vars, ode) = self.ode(state)?;
        let y0 = Var::from_tensor(&self.y0.to_dtype(state)?)?;
        let loss = |y: &Tensor| (self.loss)(&y.to_dtype(DType::F64)?);
        let given = (&vars, y0.as_tensor(), &y0);
        let options = in_steps(options, steps);
        solve(ode, given, &[0.0, self.end], options, (Tensor::clone, loss))
    }

    /// L alone.
    pub fn value(&self, options: OdeOptions, steps: usize) -> candle_diffeq::Result<f64> {
        let state = options.precision.map_or(DType::F32, |p| p.state);
        let ode = self.ode(state)?.1.options(OdeOptions {
            checkpoint: Checkpoint::Nothing,
            output: Output::Final,
            ..in_steps(options, steps)
        });
        let y = ode.solve(&self.y0.to_dtype(state)?, &[0.0, self.end])?;
        Ok((self.loss)(&y.detach().to_dtype(DType::F64)?)?.to_scalar()?)
    }

    /// The neural ODE, and its variables in the dtype of the state.
    fn ode(&self, state: DType) -> candle_diffeq::Result<(VarMap, NeuralOde)> {
        let mut vars = VarMap::new();
        let (field, shapes) = (self.field, self.shapes());
        let ode = NeuralOde::from_field(&vars, "", state, self.y0.device(), move |vb| {
            let get = |(i, shape): (usize, &Vec<usize>)| vb.get(shape.as_slice(), &format!("w{i}"));
            let weights = shapes.iter().enumerate().map(get);
            let weights = weights.collect::<Result<Vec<_>>>()?;
            Ok(move |t: &Time, y: &Tensor| field(&weights, t.value(), y))
        })?;
        for (i, weight) in self.weights.iter().enumerate() {
            vars.set_one(format!("w{i}"), weight.to_dtype(state)?)?;
        }
        Ok((vars, ode))
    }

    /// By candle's tape over all steps, as autocast does it: weights cast to `compute` once, f in
    /// `compute`, y and sums over stages in `state`.
    pub fn tape(
        &self,
        method: &Tableau,
        (state, compute): (DType, DType),
        steps: usize,
    ) -> Result<Gradients> {
        let run = || self.taped(method, (state, compute), steps);
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK);
            let running = thread.spawn_scoped(scope, run)?;
            let failed = |_| candle_core::Error::Msg("the tape's thread panicked".to_owned());
            running.join().map_err(failed)?
        })
    }

    fn taped(
        &self,
        method: &Tableau,
        (state, compute): (DType, DType),
        steps: usize,
    ) -> Result<Gradients> {
        let var = |x: &Tensor| Var::from_tensor(&x.to_dtype(state)?);
        let masters: Vec<Var> = self.weights.iter().map(var).collect::<Result<_>>()?;
        let cast = |w: &Var| w.as_tensor().to_dtype(compute);
        let weights: Vec<Tensor> = masters.iter().map(cast).collect::<Result<_>>()?;
        let y0 = var(&self.y0)?;
        let h = self.end / steps as f64;
        let add = |y: Tensor, (c, k): (&f64, &Tensor)| match *c {
            0.0 => Ok(y),
            c => y + (k * (h * c))?,
        };
        let mut y = y0.as_tensor().clone();
        for n in 0..steps {
            let mut ks: Vec<Tensor> = vec![];
            for i in 0..method.stages() {
                let stage = method.a(i).iter().zip(&ks).try_fold(y.clone(), add)?;
                let t = (n as f64 + method.c()[i]) * h;
                let k = (self.field)(&weights, t, &stage.to_dtype(compute)?)?;
                ks.push(k.to_dtype(state)?);
            }
            y = method.b().iter().zip(&ks).try_fold(y, add)?;
        }
        let grads = (self.loss)(&y.to_dtype(DType::F64)?)?.backward()?;
        let grad = |var: &Var| match grads.get(var) {
            Some(grad) => values(grad),
            None => Ok(vec![0.0; var.elem_count()]),
        };
        let theta = masters.iter().map(grad).collect::<Result<Vec<_>>>()?;
        Ok(Gradients {
            state: values(&y)?,
            y0: grad(&y0)?,
            theta: theta.concat(),
            stats: Stats::default(),
        })
    }

    fn shapes(&self) -> Vec<Vec<usize>> {
        self.weights.iter().map(|w| w.dims().to_vec()).collect()
    }

    /// The same elsewhere.
    pub fn on(mut self, device: &Device) -> Result<Self> {
        self.y0 = self.y0.to_device(device)?;
        for weight in &mut self.weights {
            *weight = weight.to_device(device)?;
        }
        Ok(self)
    }
}
