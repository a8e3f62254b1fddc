//! Arguments of a field: what it reads beside time, state and parameters.

use std::borrow::Cow;

use candle_core::{DType, Tensor, Var};

use crate::error::{Error, Result};
use crate::precision::Precision;
use crate::problem::{OdeOptions, Problem};
use crate::state::State;

/// The arguments of one solve: copies that the field reads, cut off their history, and the user's tensors
/// behind them, one to one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Args {
    /// Rounded to compute precision; variables where a gradient is wanted.
    pub(crate) leaves: Vec<Tensor>,
    pub(crate) masters: Vec<Tensor>,
}

impl Args {
    /// Copies for a solve of `problem`; of all floating-point tensors as variables, or only of those
    /// that candle tracks.
    pub(crate) fn new(
        masters: Vec<Tensor>,
        problem: &Problem,
        options: &OdeOptions,
        all: bool,
    ) -> Result<Self> {
        let each = options.args_precision.as_slice();
        if !each.is_empty() && each.len() != masters.len() {
            return Err(Error::ArgsPrecisionCount {
                args: masters.len(),
                given: each.len(),
            });
        }
        let copy = |(i, x): (usize, &Tensor)| -> Result<Tensor> {
            if !x.device().same_device(problem.device()) {
                return Err(Error::DeviceMismatch {
                    what: format!("argument {i}"),
                    expected: problem.device().location(),
                    got: x.device().location(),
                });
            }
            if !is_float(x.dtype()) {
                return Ok(x.copy()?);
            }
            let rounding = match each.get(i) {
                Some(precision) => precision.roles(problem.device())?.compute,
                None => problem.theta,
            };
            let rounded = rounding.round(x)?;
            Ok(match all || x.track_op() {
                true => Var::from_tensor(&rounded)?.into_inner(),
                false => rounded.copy()?,
            })
        };
        Ok(Self {
            leaves: masters
                .iter()
                .enumerate()
                .map(copy)
                .collect::<Result<_>>()?,
            masters,
        })
    }

    /// Whether a gradient with respect to one of them is wanted.
    pub(crate) fn is_tracked(&self) -> bool {
        self.variables().next().is_some()
    }

    /// The user's tensor behind one that the field reads, if it is an argument.
    pub(crate) fn master(&self, leaf: &Tensor) -> Option<&Tensor> {
        let at = self.leaves.iter().position(|l| l.id() == leaf.id())?;
        self.masters.get(at)
    }

    /// Those of which a gradient is wanted.
    pub(crate) fn variables(&self) -> impl Iterator<Item = Tensor> + '_ {
        self.leaves
            .iter()
            .filter(|leaf| leaf.is_variable())
            .cloned()
    }

    /// What an argument is called, if the tensor is one.
    pub(crate) fn name(&self, leaf: &Tensor) -> Option<String> {
        let at = self.leaves.iter().position(|l| l.id() == leaf.id())?;
        Some(format!("argument {at}"))
    }
}

/// The options of a solve with arguments, some of which keep their dtypes.
pub(crate) fn options_with<'o, A: State>(args: &A, options: &'o OdeOptions) -> Cow<'o, OdeOptions> {
    if !args.keeps_dtypes() || !options.args_precision.is_empty() {
        return Cow::Borrowed(options);
    }
    let each = args.leaves();
    let each = each.iter().map(|x| match x.dtype() {
        DType::F64 => Precision::f64(),
        dtype => Precision::new(DType::F32, if is_float(dtype) { dtype } else { DType::F32 }),
    });
    Cow::Owned(OdeOptions {
        args_precision: each.collect(),
        ..options.clone()
    })
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
}
