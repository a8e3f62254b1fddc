//! Losses that are means over the rows of a batch.  A solve tile by tile can compute its part of such a loss while the
//! states of a tile are in the cache.

use candle_core::{DType, Shape, Tensor, D};
use candle_nn::loss::cross_entropy;

use crate::error::{Error, LossDefect, Result};
use crate::precision::at_least_f32;
use crate::problem::Problem;
use crate::rows::{Grade, RowGrade, RowsOf};
use crate::schedule::Output;
use crate::simd::Element;
use crate::state::RowLayout;
use crate::state::State;

/// A loss that is a mean over rows, for [`NeuralOde::loss`](crate::NeuralOde::loss).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum RowLoss {
    /// Mean of (y − target)² over all elements: the target has the shape of the returned states, which
    /// are one tensor.
    MeanSquaredError(Tensor),
    /// Mean over the rows of ½|z|² + ½ d ln 2π + l of the last state: the negative log-likelihood under
    /// a normal base of a flow (z, l) such as [`nn::Cnf`](crate::nn::Cnf), z `(…, d)` and l `(…, 1)`; or
    /// of z alone.  The solve goes from the data to the base, and l is 0 at its start.  Asks for [`Output::Final`].
    GaussianNll,
    /// Mean over the rows of −ln softmax(y)_class of the last state, y `(rows, classes)`; the tensor
    /// holds the classes, `(rows)` u32.  Asks for [`Output::Final`].
    CrossEntropy(Tensor),
}

const HALF_LN_TAU: f64 = 0.918_938_533_204_672_8;

impl RowLoss {
    /// The loss of returned states, a scalar of their dtype in candle's graph.  Of states at several
    /// times, `(times, …)`, every one counts as a row.  The mean over no row at all, of an empty batch, is NaN,
    /// as candle's is, with zero gradients.
    ///
    /// # Errors
    /// [`LossDefect::States`] if the loss cannot be computed from these states; [`LossDefect::NoSuchClass`].
    pub fn of<S: State>(&self, states: &S) -> Result<Tensor> {
        let leaves = states.leaves();
        let shapes: Vec<_> = leaves.iter().map(|y| y.dims().to_vec()).collect();
        self.fits(&shapes)?;
        // Sums of low precision are made in f32.
        let dtype = leaves[0].dtype();
        let first = &leaves[0].to_dtype(at_least_f32(dtype))?;
        let loss: Tensor = match self {
            Self::MeanSquaredError(target) => Ok::<_, Error>(
                (first - target.to_dtype(first.dtype())?)?
                    .sqr()?
                    .mean_all()?,
            ),
            Self::GaussianNll => {
                let features = first.dim(D::Minus1)?;
                let rows = first.elem_count() / features.max(1);
                let mut sum = (first.sqr()?.sum_all()? * 0.5)?;
                for l in &leaves[1..] {
                    sum = (sum + l.to_dtype(first.dtype())?.sum_all()?)?;
                }
                Ok(((sum / rows as f64)? + HALF_LN_TAU * features as f64)?)
            }
            // candle's refuses it.
            Self::CrossEntropy(_) if first.elem_count() == 0 => Ok((first.sum_all()? / 0.0)?),
            Self::CrossEntropy(classes) => {
                self.classes(first.dim(1)?)?;
                Ok(cross_entropy(first, classes)?)
            }
        }?;
        Ok(loss.to_dtype(dtype)?)
    }

    /// The classes, where it has some, all below their number.  candle takes the largest u32 for a row
    /// to leave out, and reads beyond the row's end for others on a GPU.
    fn classes(&self, count: usize) -> Result<Vec<u32>> {
        let Self::CrossEntropy(classes) = self else {
            return Ok(vec![]);
        };
        let all = classes.to_vec1::<u32>()?;
        match all.iter().position(|&class| class as usize >= count) {
            None => Ok(all),
            Some(row) => {
                let (class, classes) = (all[row], count);
                Err(LossDefect::NoSuchClass {
                    row,
                    class,
                    classes,
                }
                .into())
            }
        }
    }

    /// The states that it is a loss of, in words.
    fn needs(&self) -> &'static str {
        match self {
            Self::MeanSquaredError(_) => "one tensor, of the target's shape",
            Self::GaussianNll => "z (…, d), or z and l (…, 1) with the same rows",
            Self::CrossEntropy(_) => "one tensor (rows, classes), and the classes (rows), U32",
        }
    }

    /// Whether states of these shapes have such a loss.
    fn fits(&self, shapes: &[Vec<usize>]) -> Result<()> {
        let fits = match (self, shapes) {
            (Self::MeanSquaredError(target), [y]) => target.dims() == y,
            (Self::GaussianNll, [z]) => !z.is_empty(),
            (Self::GaussianNll, [z, l]) => match (z.split_last(), l.split_last()) {
                (Some((_, rows)), Some((1, of))) => rows == of,
                _ => false,
            },
            (Self::CrossEntropy(classes), [y]) => {
                y.len() == 2 && classes.dims() == &y[..1] && classes.dtype() == DType::U32
            }
            _ => false,
        };
        if fits {
            return Ok(());
        }
        Err(LossDefect::States {
            loss: self.to_string(),
            needs: self.needs(),
            shapes: shapes.to_vec(),
        }
        .into())
    }

    /// Whether the states that a solve returns have such a loss.
    pub(crate) fn check(&self, problem: &Problem) -> Result<()> {
        let several = problem.output != Output::Final;
        // Of states whose number is not known before the solve there is no loss.
        let unknown = several && problem.outputs() == 0;
        if unknown || several && !matches!(self, Self::MeanSquaredError(_)) {
            let loss = self.to_string();
            return Err(LossDefect::Output { loss }.into());
        }
        let returned = |state: &Shape| match several {
            true => [&[problem.outputs()], state.dims()].concat(),
            false => state.dims().to_vec(),
        };
        let shapes: Vec<_> = problem.packing.shapes().iter().map(returned).collect();
        self.fits(&shapes)?;
        let last = shapes[0].last().copied();
        self.classes(last.unwrap_or(0)).map(drop)
    }

    /// The loss for tiles of a problem that it fits; `None` where tiles do not have it.
    fn prepared<T: Element>(
        &self,
        problem: &Problem,
        layout: &RowLayout,
    ) -> Result<Option<PreparedLoss<T>>> {
        let features = layout.features[0];
        if problem.packing.shapes()[0].dims().last() != Some(&features) {
            // A row of the tiles is not a row of the loss.
            if !matches!(self, Self::MeanSquaredError(_)) {
                return Ok(None);
            }
        }
        Ok(match self {
            // The gradient of the target is candle's.
            Self::MeanSquaredError(target) if target.track_op() => None,
            Self::MeanSquaredError(target) => {
                let target = target.to_dtype(T::DTYPE)?.flatten_all()?.to_vec1()?;
                Some(PreparedLoss::MeanSquaredError(target))
            }
            Self::GaussianNll => Some(PreparedLoss::GaussianNll),
            Self::CrossEntropy(_) => Some(PreparedLoss::CrossEntropy(self.classes(features)?)),
        })
    }
}

impl RowGrade for RowLoss {
    fn single(&self, problem: &Problem, layout: &RowLayout) -> Result<Option<Box<dyn Grade<f32>>>> {
        let prepared = self.prepared::<f32>(problem, layout)?;
        Ok(prepared.map(|loss| Box::new(loss) as _))
    }

    fn double(&self, problem: &Problem, layout: &RowLayout) -> Result<Option<Box<dyn Grade<f64>>>> {
        let prepared = self.prepared::<f64>(problem, layout)?;
        Ok(prepared.map(|loss| Box::new(loss) as _))
    }
}

impl std::fmt::Display for RowLoss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::MeanSquaredError(target) => {
                write!(f, "the mean squared error of a target {:?}", target.shape())
            }
            Self::GaussianNll => write!(f, "the Gaussian negative log-likelihood"),
            Self::CrossEntropy(classes) => write!(
                f,
                "the cross entropy of classes {:?}, {:?}",
                classes.shape(),
                classes.dtype()
            ),
        }
    }
}

/// A [`RowLoss`] for tiles.
enum PreparedLoss<T> {
    /// The target, packed `(outputs, elements)`.
    MeanSquaredError(Vec<T>),
    GaussianNll,
    CrossEntropy(Vec<u32>),
}

impl<T: Element> Grade<T> for PreparedLoss<T> {
    fn grade(&self, layout: &RowLayout, of: &RowsOf<'_, T>, cotangent: &mut [T]) -> f64 {
        let features = layout.features[0];
        let rows = of.y.len() / layout.dim();
        let z = &of.y[..rows * features];
        let all = layout.rows as f64;
        match self {
            Self::MeanSquaredError(target) => {
                let elements = layout.rows * features;
                let from = of.output.0 * elements + of.first * features;
                let weight = 1.0 / (of.output.1 * elements) as f64;
                let mut sum = 0.0;
                for ((y, target), g) in z.iter().zip(&target[from..]).zip(cotangent) {
                    let error = y.to_f64() - target.to_f64();
                    sum += error * error;
                    *g = T::of(2.0 * weight * error);
                }
                sum * weight
            }
            Self::GaussianNll => {
                let mut sum = (rows * features) as f64 * HALF_LN_TAU;
                for (y, g) in z.iter().zip(&mut *cotangent) {
                    let y = y.to_f64();
                    sum += 0.5 * y * y;
                    *g = T::of(y / all);
                }
                let (l, g) = (&of.y[z.len()..], &mut cotangent[z.len()..]);
                g.fill(T::of(1.0 / all));
                (sum + l.iter().map(|l| l.to_f64()).sum::<f64>()) / all
            }
            Self::CrossEntropy(classes) => {
                let mut sum = 0.0;
                let each = z
                    .chunks_exact(features)
                    .zip(cotangent.chunks_exact_mut(features));
                for ((y, g), class) in each.zip(&classes[of.first..]) {
                    let most = y
                        .iter()
                        .map(|y| y.to_f64())
                        .fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = y.iter().map(|y| (y.to_f64() - most).exp()).sum();
                    for (i, (y, g)) in y.iter().zip(g).enumerate() {
                        let p = (y.to_f64() - most).exp() / total;
                        let target = f64::from(u8::from(i == *class as usize));
                        *g = T::of((p - target) / all);
                    }
                    sum += total.ln() + most - y[*class as usize].to_f64();
                }
                sum / all
            }
        }
    }
}
