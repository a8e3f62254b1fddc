//! A stack of graph convolutions on the CPU: each layer is one pass over the nodes, forward and backward, and a chunk of nodes
//! stays in the cache of a core from the sparse product to the activation.
//!
//! The chunks depend on the layers alone, and the sums over them are formed in order: results do not depend on the number of
//! threads.

use std::sync::Arc;

use super::field::Found;
use super::pattern::Pattern;
use super::pool::{Buffer, Pool};
use super::product::Lines;
use super::Gcn;
use crate::nn::elementwise::{ElementJob, Of};
use crate::nn::weights::{numbers, with_numbers};
use crate::nn::Activation;
use crate::simd::matrix::{column_sums, product_of_rows, Matrix};
use crate::simd::pieces::for_each;
use crate::simd::{unit, Element};
use candle_core::{Device, Result, Tensor};
use pulp::{Simd, WithSimd};

/// Products of a chunk of nodes at most, which takes some tens of microseconds.
const CHUNK: usize = 1 << 21;
/// Nodes of a chunk at least.
const FEWEST: usize = 32;

/// A layer in numbers of T.
struct Layer<T> {
    pattern: Arc<Pattern>,
    values: Vec<T>,
    /// `[output][input]`.
    weight: Vec<T>,
    bias: Vec<T>,
    inputs: usize,
    outputs: usize,
}

impl<T: Element> Layer<T> {
    fn nodes(&self) -> usize {
        self.pattern.by_row.lines()
    }

    /// Nodes of a chunk.  Of a large graph, the chunks have nearly as many each, and their number is a multiple of four.
    fn chunk(&self) -> usize {
        let most = (CHUNK / (self.inputs * self.outputs).max(1)).max(FEWEST);
        let chunks = self.nodes().div_ceil(most).next_multiple_of(4);
        let nodes = self.nodes().div_ceil(chunks).max(FEWEST);
        nodes.next_multiple_of(8)
    }

    fn weights(&self) -> Matrix<'_, T> {
        Matrix::new(&self.weight, self.outputs, self.inputs)
    }
}

pub(super) struct Stack<T> {
    layers: Vec<Layer<T>>,
    activation: Activation,
    pool: Arc<Pool>,
}

/// What an evaluation keeps of a layer.
struct Kept {
    /// A a, `(nodes, inputs)`.
    gathered: Buffer,
    /// σ'(z), `(nodes, outputs)`, of a hidden layer.
    slope: Option<Buffer>,
}

pub(super) struct Evaluation<T> {
    stack: Arc<Stack<T>>,
    kept: Vec<Kept>,
}

impl<T: Element> Stack<T> {
    pub(super) fn new(layers: &[Gcn], activation: Activation) -> Result<Self> {
        let layer = |layer: &Gcn| {
            let (inputs, outputs) = layer.widths();
            Ok(Layer {
                pattern: Arc::clone(layer.graph.pattern()),
                values: numbers(layer.graph.values())?,
                weight: numbers(&layer.linear.weight)?,
                bias: numbers(&layer.bias)?,
                inputs,
                outputs,
            })
        };
        Ok(Self {
            layers: layers.iter().map(layer).collect::<Result<_>>()?,
            activation,
            pool: layers.first().map_or_else(Arc::default, Gcn::pool),
        })
    }

    fn tensor(&self, x: Vec<T>, l: usize) -> Result<Tensor> {
        let layer = &self.layers[l];
        Tensor::from_vec(x, (layer.nodes(), layer.inputs), &Device::Cpu)
    }

    /// The velocity at y, `(nodes, features)`.
    pub(super) fn velocity(&self, y: &[T]) -> Result<Vec<T>> {
        Ok(self.run(y, false)?.0)
    }

    /// The same, and what its pull-back reads.
    pub(super) fn evaluate(self: &Arc<Self>, y: &[T]) -> Result<(Vec<T>, Evaluation<T>)> {
        let (velocity, kept) = self.run(y, true)?;
        let stack = Arc::clone(self);
        Ok((velocity, Evaluation { stack, kept }))
    }

    /// The same of a tensor.
    pub(super) fn evaluate_tensor(self: &Arc<Self>, y: &Tensor) -> Result<(Tensor, Evaluation<T>)> {
        let (velocity, kept) = with_numbers(y, |y| self.evaluate(y))??;
        Ok((self.tensor(velocity, 0)?, kept))
    }

    /// The velocity, and what is kept of each layer if anything is.
    fn run(&self, y: &[T], keeps: bool) -> Result<(Vec<T>, Vec<Kept>)> {
        let unit = unit()?;
        let (mut kept, mut velocity) = (vec![], vec![]);
        let mut hidden: Option<Buffer> = None;
        for (l, layer) in self.layers.iter().enumerate() {
            let (inputs, outputs, nodes) = (layer.inputs, layer.outputs, layer.nodes());
            let last = l + 1 == self.layers.len();
            let x = hidden.as_ref().map_or(y, Buffer::numbers);
            let buffer = || Buffer::new::<T>(nodes * outputs, &self.pool);
            let (mut slope, mut value) = (None, None);
            let z: &mut [T] = match last {
                true => {
                    velocity = vec![T::default(); nodes * outputs];
                    &mut velocity
                }
                false => value.insert(buffer()).numbers_mut(),
            };
            let chunk = layer.chunk();
            let work = |c: usize, s: &mut [T], z: &mut [T], slope: Option<&mut [T]>| {
                unit.dispatch(Lines {
                    side: &layer.pattern.by_row,
                    value: &|e| layer.values[e],
                    x,
                    width: inputs,
                    first: c * chunk,
                    out: s,
                });
                let s = Matrix::new(s, z.len() / outputs, inputs);
                product_of_rows(unit, s, layer.weights().t(), &layer.bias, z);
                if !last {
                    unit.dispatch(ElementJob {
                        activation: self.activation,
                        x: &[],
                        of: slope.map_or(Of::Own, Of::Both),
                        out: z,
                    });
                }
            };
            let each = z.chunks_mut(chunk * outputs).enumerate();
            if keeps {
                let mut gathered = Buffer::new::<T>(nodes * inputs, &self.pool);
                let each = each.zip(gathered.numbers_mut().chunks_mut(chunk * inputs));
                if last {
                    for_each(each, &|((c, z), s)| work(c, s, z, None));
                } else {
                    let slopes = slope.insert(buffer()).numbers_mut();
                    let each = each.zip(slopes.chunks_mut(chunk * outputs));
                    for_each(each, &|(((c, z), s), slope)| work(c, s, z, Some(slope)));
                }
                kept.push(Kept { gathered, slope });
            } else {
                for_each(each, &|(c, z)| {
                    let rows = z.len() / outputs;
                    let mut s = Buffer::new::<T>(rows * inputs, &self.pool);
                    work(c, s.numbers_mut(), z, None);
                });
            }
            hidden = value;
        }
        Ok((velocity, kept))
    }
}

impl<T: Element> Evaluation<T> {
    /// Bytes that it holds, its copies of the layers included.
    pub(super) fn bytes(&self) -> usize {
        let of = |kept: &Kept| {
            let slope = kept
                .slope
                .as_ref()
                .map_or(0, |slope| slope.numbers::<T>().len());
            kept.gathered.numbers::<T>().len() + slope
        };
        let weights = |layer: &Layer<T>| layer.values.len() + layer.weight.len() + layer.bias.len();
        let kept: usize = self.kept.iter().map(of).sum();
        let layers: usize = self.stack.layers.iter().map(weights).sum();
        (kept + layers) * size_of::<T>()
    }

    /// vᵀ ∂f/∂y, and the gradients of the layers.
    pub(super) fn pull(&self, v: &Tensor) -> Result<Found> {
        with_numbers(v, |v| self.pulled(v))?
    }

    fn pulled(&self, v: &[T]) -> Result<Found> {
        let (unit, stack) = (unit()?, &*self.stack);
        // The cotangent of A a of the layer after, of which Aᵀ makes that of a.
        let mut after: Option<Buffer> = None;
        let mut gradients = vec![];
        for (l, layer) in stack.layers.iter().enumerate().rev() {
            let (inputs, outputs, nodes) = (layer.inputs, layer.outputs, layer.nodes());
            let chunk = layer.chunk();
            let mut to_gathered = Buffer::new::<T>(nodes * inputs, &stack.pool);
            let Kept { gathered, slope } = &self.kept[l];
            let (gathered, next) = (gathered.numbers::<T>(), stack.layers.get(l + 1));
            let work = |c: usize, out: &mut [T]| -> [Vec<T>; 2] {
                let rows = out.len() / inputs;
                let places = c * chunk * outputs..(c * chunk + rows) * outputs;
                let mut from_next = None;
                if let (Some(next), Some(after), Some(slope)) = (next, &after, slope) {
                    let mut g = Buffer::new::<T>(rows * outputs, &stack.pool);
                    let x = after.numbers();
                    unit.dispatch(transposed(next, x, c * chunk, g.numbers_mut()));
                    let slopes = &slope.numbers::<T>()[places.clone()];
                    unit.dispatch(TimesSlope {
                        g: g.numbers_mut(),
                        slopes,
                    });
                    from_next = Some(g);
                }
                let g = from_next
                    .as_ref()
                    .map_or_else(|| &v[places], Buffer::numbers);
                let to_bias = column_sums(unit, g, outputs);
                let g = Matrix::new(g, rows, outputs);
                product_of_rows(unit, g, layer.weights(), &[], out);
                let s = &gathered[c * chunk * inputs..][..rows * inputs];
                let mut to_weight = vec![T::default(); outputs * inputs];
                let s = Matrix::new(s, rows, inputs);
                product_of_rows(unit, g.t(), s, &[], &mut to_weight);
                [to_weight, to_bias]
            };
            let mut parts: Vec<Option<[Vec<T>; 2]>> = vec![];
            parts.resize_with(nodes.div_ceil(chunk), || None);
            let chunks = to_gathered.numbers_mut().chunks_mut(chunk * inputs);
            for_each(chunks.zip(&mut parts).enumerate(), &|(c, (out, part))| {
                *part = Some(work(c, out));
            });
            let mut sums = [
                vec![T::default(); outputs * inputs],
                vec![T::default(); outputs],
            ];
            for part in parts.into_iter().flatten() {
                for (sum, part) in sums.iter_mut().zip(part) {
                    for (sum, x) in sum.iter_mut().zip(part) {
                        *sum += x;
                    }
                }
            }
            let [weight, bias] = sums;
            gradients.push([
                Tensor::from_vec(weight, (outputs, inputs), &Device::Cpu)?,
                Tensor::from_vec(bias, outputs, &Device::Cpu)?,
            ]);
            after = Some(to_gathered);
        }
        gradients.reverse();
        let (first, after) = (&stack.layers[0], after.as_ref());
        let mut state = vec![T::default(); first.nodes() * first.inputs];
        if let Some(after) = after {
            let chunk = first.chunk();
            let chunks = state.chunks_mut(chunk * first.inputs).enumerate();
            for_each(chunks, &|(c, out)| {
                unit.dispatch(transposed(first, after.numbers(), c * chunk, out));
            });
        }
        Ok(Found {
            state: stack.tensor(state, 0)?,
            layers: gradients,
        })
    }
}

/// σ'(z) g in place of g.
struct TimesSlope<'a, T> {
    g: &'a mut [T],
    slopes: &'a [T],
}

impl<T: Element> WithSimd for TimesSlope<'_, T> {
    type Output = ();

    /// In a plain loop, which the compiler turns into vectors of the unit.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (g, slope) in self.g.iter_mut().zip(self.slopes) {
            *g *= *slope;
        }
    }
}

/// Lines of Aᵀ x of a layer, from the `first` on.
fn transposed<'a, T: Element>(
    layer: &'a Layer<T>,
    x: &'a [T],
    first: usize,
    out: &'a mut [T],
) -> Lines<'a, T, impl Fn(usize) -> T + 'a> {
    let names = &layer.pattern.numbers;
    Lines {
        side: &layer.pattern.by_column,
        value: move |e: usize| layer.values[names[e] as usize],
        x,
        width: layer.inputs,
        first,
        out,
    }
}
