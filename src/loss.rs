//! Losses that are means over the rows of a batch, which a solve tile by tile can look at while a
//! tile is at hand.

use candle_core::{DType, Tensor, D};
use candle_nn::loss::cross_entropy;

use crate::error::{Error, Result};
use crate::problem::{Output, Problem};
use crate::rows::Layout;
use crate::simd::Element;
use crate::state::State;

/// A loss that is a mean over rows, for [`NeuralOde::loss`](crate::NeuralOde::loss).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum RowLoss {
    /// Mean of (y − target)² over all elements: the target has the shape of the returned states, which
    /// are one tensor.
    MeanSquare(Tensor),
    /// Mean over the rows of ½|z|² + ½ d ln 2π + l of the last state: the negative log-likelihood under
    /// a normal base of a flow (z, l) such as [`nn::Cnf`](crate::nn::Cnf), z `(…, d)` and l `(…, 1)`; or
    /// of z alone.  Asks for [`Output::Final`].
    NormalLikelihood,
    /// Mean over the rows of −ln softmax(y)_class of the last state, y `(rows, classes)`; the tensor
    /// holds the classes, `(rows)` u32.  Asks for [`Output::Final`].
    CrossEntropy(Tensor),
}

const HALF_LN_TAU: f64 = 0.918_938_533_204_672_8;

impl RowLoss {
    /// The loss of returned states, a scalar of their dtype in candle's graph.
    ///
    /// # Errors
    /// [`Error::LossState`] if these are not states that it is a loss of.
    pub fn of<S: State>(&self, states: &S) -> Result<Tensor> {
        let leaves = states.leaves();
        match (self, leaves.as_slice()) {
            (Self::MeanSquare(target), [y]) if y.shape() == target.shape() => {
                Ok((y - target.to_dtype(y.dtype())?)?.sqr()?.mean_all()?)
            }
            (Self::NormalLikelihood, [z, rest @ ..]) if rest.len() < 2 && z.rank() > 0 => {
                let features = z.dim(D::Minus1)?;
                let rows = z.elem_count() / features.max(1);
                let mut sum = (z.sqr()?.sum_all()? * 0.5)?;
                for l in rest {
                    if l.elem_count() != rows {
                        return Err(self.not_of(&leaves));
                    }
                    sum = (sum + l.to_dtype(z.dtype())?.sum_all()?)?;
                }
                Ok(((sum / rows as f64)? + HALF_LN_TAU * features as f64)?)
            }
            (Self::CrossEntropy(classes), [y])
                if y.rank() == 2 && classes.dims() == &y.dims()[..1] =>
            {
                Ok(cross_entropy(y, classes)?)
            }
            _ => Err(self.not_of(&leaves)),
        }
    }

    fn not_of(&self, leaves: &[Tensor]) -> Error {
        Error::LossState {
            loss: self.name(),
            shapes: leaves.iter().map(|l| l.shape().clone()).collect(),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::MeanSquare(_) => "MeanSquare, whose target has another shape,",
            Self::NormalLikelihood => "NormalLikelihood",
            Self::CrossEntropy(_) => "CrossEntropy",
        }
    }

    /// Whether it looks at all states, or at the last one.
    pub(crate) fn check(&self, output: Output) -> Result<()> {
        match (self, output) {
            (Self::MeanSquare(_), _) | (_, Output::Final) => Ok(()),
            (_, Output::All) => Err(Error::LossOutput { loss: self.name() }),
        }
    }

    /// The loss for tiles of a problem; `None` where tiles do not have it.
    pub(crate) fn prepared<T: Element>(
        &self,
        problem: &Problem,
        layout: &Layout,
    ) -> Result<Option<Prepared<T>>> {
        Ok(match (self, layout.features.as_slice()) {
            (Self::MeanSquare(target), [_]) if is_returned(target, problem) => {
                let target = target
                    .detach()
                    .to_dtype(T::DTYPE)?
                    .flatten_all()?
                    .to_vec1()?;
                Some(Prepared::MeanSquare(target))
            }
            (Self::NormalLikelihood, [_] | [_, 1]) => Some(Prepared::NormalLikelihood),
            (Self::CrossEntropy(classes), [n]) if classes.elem_count() == layout.rows => {
                let classes: Vec<u32> = classes.to_dtype(DType::U32)?.flatten_all()?.to_vec1()?;
                // A class that is none is left to candle, which says so.
                let fits = classes.iter().all(|class| (*class as usize) < *n);
                fits.then_some(Prepared::CrossEntropy(classes))
            }
            _ => None,
        })
    }
}

/// Whether x has the shape of the states that are returned, of one leaf.
fn is_returned(x: &Tensor, problem: &Problem) -> bool {
    let state = problem.packing.shapes()[0].dims();
    match (problem.output, x.dims()) {
        (Output::Final, dims) => dims == state,
        (Output::All, [outputs, rest @ ..]) => *outputs == problem.outputs() && rest == state,
        _ => false,
    }
}

/// A [`RowLoss`] for tiles.
pub(crate) enum Prepared<T> {
    /// The target, packed `(outputs, elements)`.
    MeanSquare(Vec<T>),
    NormalLikelihood,
    CrossEntropy(Vec<u32>),
}

/// Some rows of one returned state, leaf after leaf.
pub(crate) struct RowsOf<'a, T> {
    /// Which of the outputs, and of how many.
    pub(crate) output: (usize, usize),
    /// The first row.
    pub(crate) first: usize,
    /// The rows of the first leaf, and of the second where there is one.
    pub(crate) y: &'a [T],
}

impl<T: Element> Prepared<T> {
    /// The part of the mean that is of these rows, and its derivative in place of a copy of them.
    pub(crate) fn grade(&self, layout: &Layout, of: &RowsOf<'_, T>, cotangent: &mut [T]) -> f64 {
        let features = layout.features[0];
        let rows = of.y.len() / layout.dim();
        let z = &of.y[..rows * features];
        let all = layout.rows as f64;
        match self {
            Self::MeanSquare(target) => {
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
            Self::NormalLikelihood => {
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
