//! Sums of outer products: the gradient of a matrix from a window of evaluations.

use pulp::Simd;

use super::product::{add_product, block, has_block, has_many_registers};
use super::{scalars, Element, Kernel};

/// The x and g of one evaluation in a window: tiles `[feature][B]`.
#[derive(Clone, Copy)]
pub(crate) struct Pair<'a, X> {
    pub(crate) x: &'a [X],
    pub(crate) g: &'a [X],
}

/// `dWᵀ[input][output] += Σ x[input] g[output]`, the outputs in the lanes, from transposed g.
pub(crate) struct Outer<'a, T: Element, S: Simd, const V: usize> {
    pub(crate) inputs: usize,
    /// A multiple of the lanes.  g has so many features, those beyond the layer's anything finite.
    pub(crate) outputs: usize,
    pub(crate) window: &'a [Pair<'a, T::Vector<S>>],
    /// [`outer_room`]: g of the window in two vectors of outputs, `[evaluation][B][2]`.
    pub(crate) transposed: &'a mut [T::Vector<S>],
    /// `[input][output]`.
    pub(crate) sums: &'a mut [T::Vector<S>],
}

/// Vectors that [`Outer`] needs for a window of so many pairs.
pub(crate) fn outer_room<T: Element, S: Simd, const V: usize>(pairs: usize) -> usize {
    pairs * V * T::lanes::<S>() * 2
}

/// One number of each row.
#[inline(always)]
fn column<T: Copy + Default, const R: usize>(rows: &[&[T]; R], at: usize) -> [T; R] {
    let mut column = [T::default(); R];
    for r in 0..R {
        column[r] = rows[r][at];
    }
    column
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Outer<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(mut self, s: S) {
        let across = self.outputs / T::lanes::<S>();
        for output in (0..across).step_by(2) {
            if output + 2 <= across {
                self.strip::<2>(s, output);
            } else {
                self.strip::<1>(s, output);
            }
        }
    }
}

impl<T: Element, S: Simd, const V: usize> Outer<'_, T, S, V> {
    /// All inputs by W vectors of outputs.
    #[inline(always)]
    fn strip<const W: usize>(&mut self, s: S, output: usize) {
        let lanes = T::lanes::<S>();
        let size = V * lanes * W;
        for (pair, transposed) in self
            .window
            .iter()
            .zip(self.transposed.chunks_exact_mut(size))
        {
            for w in 0..W {
                for v in 0..V {
                    let from = &pair.g[(output + w) * lanes * V + v..];
                    T::transpose(s, from, V, &mut transposed[v * lanes * W + w..], W);
                }
            }
        }
        let mut input = 0;
        while input < self.inputs {
            let height = block::<T, S>(self.inputs, input);
            match height {
                8 if const { has_block::<T, S, 8>() } => self.block::<8, W>(s, input, output),
                6 if const { has_block::<T, S, 6>() } => self.block::<6, W>(s, input, output),
                4 if const { has_block::<T, S, 4>() } => self.block::<4, W>(s, input, output),
                2 if const { has_block::<T, S, 2>() } => self.block::<2, W>(s, input, output),
                _ => self.block::<1, W>(s, input, output),
            }
            input += height;
        }
    }

    /// R inputs by W vectors of outputs.
    #[inline(always)]
    fn block<const R: usize, const W: usize>(&mut self, s: S, input: usize, output: usize) {
        let (across, rows) = (self.outputs / T::lanes::<S>(), V * T::lanes::<S>());
        let transposed = self.transposed.as_chunks::<W>().0.chunks_exact(rows);
        let mut sums = [[T::zeros::<S>(); W]; R];
        for (pair, transposed) in self.window.iter().zip(transposed) {
            let x = scalars::<T, S>(&pair.x[input * V..(input + R) * V]);
            let mut each: [&[T]; R] = [&x[..rows]; R];
            for r in 1..R {
                each[r] = &x[r * rows..][..rows];
            }
            // By twos: a turn of the loop that is shorter does not keep the multipliers fed.
            let (twos, last) = transposed.as_chunks::<2>();
            for (b, g) in twos.iter().enumerate() {
                add_product(s, &column(&each, 2 * b), &g[0], &mut sums);
                add_product(s, &column(&each, 2 * b + 1), &g[1], &mut sums);
            }
            if let [g] = last {
                add_product(s, &column(&each, rows - 1), g, &mut sums);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let out = &mut self.sums[(input + r) * across + output..][..W];
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = T::plus(s, *out, *sum);
            }
        }
    }
}

/// `dW[output][input] += Σ g[output] x[input]` by lane, the batch in the lanes: for layers that are too
/// thin for [`Outer`].
pub(crate) struct Dot<'a, T: Element, S: Simd, const V: usize> {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) window: &'a [Pair<'a, T::Vector<S>>],
    /// `[output][input]`.
    pub(crate) sums: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Dot<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(mut self, s: S) {
        let mut output = 0;
        while output < self.outputs {
            // Accumulators for half of the registers, or for twelve of sixteen: eight or six by two, or the reverse.
            let height = part::<T, S>(self.outputs - output, T::WIDE);
            let mut input = 0;
            while input < self.inputs {
                let left = self.inputs - input;
                let width = match height {
                    6.. if left >= 2 && T::WIDE => 2,
                    6.. => 1,
                    _ => part::<T, S>(left, false),
                };
                match (height, width) {
                    (8, 2) if const { is_tall::<T, S>() && T::WIDE } => {
                        self.block::<8, 2>(s, output, input);
                    }
                    (8, _) if const { is_tall::<T, S>() } => self.block::<8, 1>(s, output, input),
                    (6, 2) if const { !is_tall::<T, S>() } => self.block::<6, 2>(s, output, input),
                    (6, _) if const { !is_tall::<T, S>() } => self.block::<6, 1>(s, output, input),
                    (2, 8) if const { is_tall::<T, S>() && T::WIDE } => {
                        self.block::<2, 8>(s, output, input);
                    }
                    (2, 6) if const { !is_tall::<T, S>() } => self.block::<2, 6>(s, output, input),
                    (2, _) if const { T::WIDE } => self.block::<2, 1>(s, output, input),
                    (_, 8) if const { is_tall::<T, S>() } => self.block::<1, 8>(s, output, input),
                    (_, 6) if const { !is_tall::<T, S>() } => self.block::<1, 6>(s, output, input),
                    _ => self.block::<1, 1>(s, output, input),
                }
                input += width;
            }
            output += height;
        }
    }
}

/// Whether blocks have eight rows or columns, and not six.
const fn is_tall<T: Element, S: Simd>() -> bool {
    has_many_registers::<S>() || !T::WIDE
}

/// Eight or six of those that are left, or two if there are such blocks, or one.
fn part<T: Element, S: Simd>(left: usize, twos: bool) -> usize {
    match left {
        8.. if is_tall::<T, S>() => 8,
        6.. if !is_tall::<T, S>() => 6,
        2.. if twos => 2,
        _ => 1,
    }
}

impl<T: Element, S: Simd, const V: usize> Dot<'_, T, S, V> {
    /// R outputs by C inputs.
    #[inline(always)]
    fn block<const R: usize, const C: usize>(&mut self, s: S, output: usize, input: usize) {
        let mut sums = [[T::zeros::<S>(); C]; R];
        for pair in self.window {
            let x = &pair.x[input * V..][..C * V];
            let g = &pair.g[output * V..][..R * V];
            for v in 0..V {
                for r in 0..R {
                    for c in 0..C {
                        let product = (g[r * V + v], x[c * V + v]);
                        sums[r][c] = T::mul_add(s, product.0, product.1, sums[r][c]);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let out = &mut self.sums[(output + r) * self.inputs + input..][..C];
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = T::plus(s, *out, *sum);
            }
        }
    }
}

/// `sums[output] += Σ g[output]`, by lane.
#[inline(always)]
pub(crate) fn add_rows<T: Element, S: Simd, const V: usize>(
    s: S,
    window: &[Pair<'_, T::Vector<S>>],
    sums: &mut [T::Vector<S>],
) {
    let (fours, rest) = sums.as_chunks_mut::<4>();
    let first = 4 * fours.len();
    for (i, sums) in fours.iter_mut().enumerate() {
        add_some::<T, S, V, 4>(s, 4 * i, window, sums);
    }
    for (i, sum) in (first..).zip(rest) {
        add_some::<T, S, V, 1>(s, i, window, std::array::from_mut(sum));
    }
}

/// [`add_rows`] of R outputs.
#[inline(always)]
fn add_some<T: Element, S: Simd, const V: usize, const R: usize>(
    s: S,
    output: usize,
    window: &[Pair<'_, T::Vector<S>>],
    sums: &mut [T::Vector<S>; R],
) {
    let mut parts = [T::zeros::<S>(); R];
    for pair in window {
        let g = pair.g[output * V..][..R * V].as_chunks::<V>().0;
        for r in 0..R {
            for g in g[r] {
                parts[r] = T::plus(s, parts[r], g);
            }
        }
    }
    for r in 0..R {
        sums[r] = T::plus(s, sums[r], parts[r]);
    }
}
