//! A case: everything that one solve depends on, as data.

use candle_diffeq::nn::Activation;
use candle_diffeq::tableau::Tableau;

use crate::ball::Dt;

/// One solve.  Numbers (weights, states, cotangents) are drawn from `seed`.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) field: Field,
    pub(crate) rows: usize,
    pub(crate) lead: Lead,
    pub(crate) method: Method,
    pub(crate) grid: Grid,
    pub(crate) steps: Cut,
    pub(crate) is_final: bool,
    pub(crate) plan: Plan,
    pub(crate) numbers: Numbers,
    pub(crate) entry: Entry,
    pub(crate) fusion: bool,
    /// Whether the field's pull-back is checked against differences: no false alarm may come.
    pub(crate) checked: bool,
    pub(crate) cache: Cache,
    pub(crate) scaling: Scale,
    pub(crate) threads: usize,
    /// Whether y0 is a variable.
    pub(crate) tracked: bool,
    /// Parameter i is a constant if bit i is set.
    pub(crate) frozen: u64,
    pub(crate) y0_scale: f64,
    pub(crate) cotangent_scale: f64,
    /// Another number of threads and another plan, which must give the same bits.
    pub(crate) twin: Option<(usize, Plan)>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Field {
    /// `length` random operations on tensors of so many features.
    Closure {
        seed: u64,
        length: usize,
        cols: Vec<usize>,
        /// Layers of the crate's, or candle's own operations.
        ours: bool,
    },
    Mlp {
        widths: Vec<usize>,
        activation: Activation,
        time: bool,
        residual: bool,
    },
    Cnf {
        widths: Vec<usize>,
        activation: Activation,
        time: bool,
    },
    Conv {
        channels: Vec<usize>,
        size: usize,
        activation: Activation,
        /// Of the norm; 0: none.
        groups: usize,
        height: usize,
        width: usize,
    },
}

/// The dimensions before the features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lead {
    /// `(rows, features)`
    Rows,
    /// `(1, rows, features)`
    Three,
    /// `(features)`, of one row
    Vector,
    /// `()`, of one row and one feature
    Scalar,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Method {
    /// One of the crate's, by its place in `Tableau::ALL`.
    Known(usize),
    /// a by rows, b; c are the sums.
    Own(Vec<Vec<f64>>, Vec<f64>),
}

impl Method {
    pub(crate) fn tableau(&self) -> candle_diffeq::Result<Tableau> {
        match self {
            Self::Known(i) => Ok(Tableau::ALL[*i].clone()),
            Self::Own(a, b) => {
                let c = a.iter().map(|row| row.iter().sum()).collect();
                Tableau::new("random", 1, a.clone(), b.clone(), c)
            }
        }
    }
}

/// The grid start ± span · fractions.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Grid {
    /// From 0, increasing.
    pub(crate) fractions: Vec<f64>,
    pub(crate) start: f64,
    pub(crate) backward: bool,
    /// The span is what lets perturbations grow by e to this power at most.
    pub(crate) growth: f64,
    pub(crate) given: Given,
}

/// How the grid is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Given {
    Host,
    Tensor(Dt),
    Variable(Dt),
}

/// How intervals are cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Cut {
    PerInterval(usize),
    /// By a fraction of the span.
    Size(f64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    All,
    Every(usize),
    States(usize),
    /// Bytes of so many states.
    Bytes(usize),
}

/// Dtypes of a solve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Numbers {
    pub(crate) state: Dt,
    pub(crate) compute: Dt,
    pub(crate) store: Dt,
    pub(crate) y0: Dt,
    /// Compute dtype of the last of several tensors.
    pub(crate) last: Option<Dt>,
    /// Whether the options say so, or y0's dtype does.
    pub(crate) explicit: bool,
    /// Whether variables are f64.
    pub(crate) wide_masters: bool,
    /// Whether the state is summed with compensation.
    pub(crate) compensated: bool,
}

impl Numbers {
    pub(crate) const F64: Self = Self::of(Dt::F64, Dt::F64);
    pub(crate) const F32: Self = Self::of(Dt::F32, Dt::F32);

    pub(crate) const fn of(state: Dt, compute: Dt) -> Self {
        Self {
            state,
            compute,
            store: state,
            y0: state,
            last: None,
            explicit: true,
            wide_masters: matches!(state, Dt::F64),
            compensated: false,
        }
    }

    /// The dtype that the field's tensors have: low ones are rounded on the CPU, not used.
    pub(crate) fn held(&self) -> Dt {
        if self.compute.is_low() {
            Dt::F32
        } else {
            self.compute
        }
    }
}

/// What is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// `odeint`, then `backward`.
    Odeint,
    /// `solution`, then `vjp`.
    Solve,
    /// `NeuralOde::from_field(..).solve`, then `backward`.
    Neural,
    /// The same of `NeuralOde::new`.
    Module,
    /// `NeuralOde::solution`, then `vjp`.
    Solution,
    /// `NeuralOde::loss`, then `backward`.
    Squares,
    Likelihood,
    Entropy,
}

impl Entry {
    pub(crate) fn is_loss(self) -> bool {
        matches!(self, Self::Squares | Self::Likelihood | Self::Entropy)
    }

    /// Whether variables are copied and rounded, or read as they are.
    pub(crate) fn has_masters(self) -> bool {
        !matches!(self, Self::Odeint | Self::Solve)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cache {
    pub(crate) bytes: usize,
    pub(crate) low: bool,
}

/// Scaling of the adjoint, powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    Auto,
    Off,
    Fixed(i32),
    /// Headroom.
    Dynamic(i32),
}

impl Field {
    /// Features of the state's tensors.
    pub(crate) fn cols(&self) -> Vec<usize> {
        match self {
            Self::Closure { cols, .. } => cols.clone(),
            Self::Mlp { widths, .. } => vec![widths[0]],
            Self::Cnf { widths, .. } => vec![widths[0], 1],
            Self::Conv {
                channels,
                height,
                width,
                ..
            } => vec![channels[0] * height * width],
        }
    }

    /// Whether the crate integrates it tile by tile.
    pub(crate) fn is_tiled(&self) -> bool {
        match self {
            Self::Closure { .. } => false,
            Self::Mlp { .. } | Self::Conv { .. } => true,
            Self::Cnf { widths, .. } => widths.len() > 2,
        }
    }
}

impl Case {
    /// Makes the parts of a case fit together.
    pub(crate) fn fitted(mut self) -> Self {
        let leaves = self.field.cols().len();
        self.fit_entry(leaves);
        self.fit_numbers(leaves);
        let scalar =
            leaves == 1 && self.field.cols() == [1] && matches!(self.field, Field::Closure { .. });
        match (&self.field, self.lead) {
            (Field::Conv { .. }, _) => self.lead = Lead::Rows,
            (_, Lead::Scalar) if !scalar => self.lead = Lead::Vector,
            _ => {}
        }
        if self.entry == Entry::Entropy {
            self.lead = Lead::Rows;
        }
        if matches!(self.lead, Lead::Vector | Lead::Scalar) {
            self.rows = 1;
        }
        if self.entry.has_masters() {
            self.frozen = 0;
        }
        if self.frozen != 0 {
            self.tracked = true;
        }
        if self.entry.is_loss() || self.cache.bytes > 0 {
            // Plans of their own: which of several paths is taken depends on them.
            self.twin = self.twin.map(|(threads, _)| (threads, self.plan));
        }
        self
    }

    fn fit_entry(&mut self, leaves: usize) {
        if self.entry == Entry::Module {
            let module = match self.field {
                Field::Mlp { time, .. } => !time,
                Field::Conv { .. } => true,
                _ => false,
            };
            if !module {
                self.entry = Entry::Neural;
            }
        }
        if self.entry.is_loss() {
            self.entry = match (&self.field, self.entry) {
                (Field::Cnf { .. }, _) => Entry::Likelihood,
                (_, Entry::Likelihood | Entry::Entropy)
                    if matches!(self.field, Field::Conv { .. }) =>
                {
                    Entry::Squares
                }
                (_, _) if leaves > 1 => Entry::Neural,
                (_, Entry::Likelihood) if self.lead == Lead::Scalar => Entry::Squares,
                (_, entry) => entry,
            };
            if matches!(self.entry, Entry::Likelihood | Entry::Entropy) {
                self.is_final = true;
            }
        }
    }

    fn fit_numbers(&mut self, leaves: usize) {
        let n = &mut self.numbers;
        if !n.explicit {
            n.state = if n.y0 == Dt::F64 { Dt::F64 } else { Dt::F32 };
            (n.compute, n.store, n.last) = (n.y0, n.state, None);
            n.compensated = false;
        }
        if n.state != Dt::F64 {
            let narrow = |dt: Dt| if dt == Dt::F64 { Dt::F32 } else { dt };
            (n.compute, n.store, n.y0) = (narrow(n.compute), narrow(n.store), narrow(n.y0));
            n.wide_masters = false;
        }
        let closure = matches!(self.field, Field::Closure { .. });
        if leaves < 2 || !closure || n.held() != Dt::F32 || n.last == Some(Dt::F64) {
            n.last = None;
        }
        if self.entry == Entry::Module {
            n.wide_masters = false;
        }
    }
}
