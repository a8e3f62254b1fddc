//! The network of time of a [`HyperCnf`]: the weights at a time, and their pull-back.

use std::borrow::Cow;

use candle_core::Result;
use pulp::Simd;

use crate::nn::weights::numbers;
use crate::nn::HyperCnf;
use crate::simd::packed::Packed;
use crate::simd::product::padded;
use crate::simd::{enter, scalars, scalars_mut, Element, Kernel};

/// Times that are pulled back in one pass over the last matrix.
pub(super) const TOGETHER: usize = 3;

/// Its layers by input, `[input][output]`, outputs filled up with zeros to whole vectors.
///
/// The last one puts out W, U, G and b, the first three by feature: `[feature][unit]`.
pub(super) struct Network<T> {
    features: usize,
    width: usize,
    hidden: usize,
    first: Vec<T>,
    first_bias: Vec<T>,
    middle: Vec<T>,
    middle_bias: Vec<T>,
    last: Vec<T>,
    last_bias: Vec<T>,
}

/// The weights at a time, and what their pull-back reads.
#[derive(Clone)]
pub(super) struct Generated<T> {
    pub(super) t: T,
    /// W, `(unit, feature)`, Wᵀ, V = U σ(G) / m and Vᵀ.
    pub(super) w: Packed<T>,
    pub(super) w_transposed: Packed<T>,
    pub(super) v: Packed<T>,
    pub(super) v_transposed: Packed<T>,
    pub(super) bias: Vec<T>,
    /// v_j·w_j.
    pub(super) coupling: Vec<T>,
    /// Of the two hidden layers.
    values: [Vec<T>; 2],
    /// W, U, σ(G) and V, `[feature][unit]`.
    parts: [Vec<T>; 4],
}

/// A matrix `[output][input]` by input, outputs where `place` says.
fn by_input<T: Element>(
    matrix: &[T],
    inputs: usize,
    outputs: usize,
    place: impl Fn(usize) -> usize,
) -> Vec<T> {
    let mut turned = vec![T::default(); inputs * outputs];
    for (output, row) in matrix.chunks_exact(inputs).enumerate() {
        for (input, x) in row.iter().enumerate() {
            turned[input * outputs + place(output)] = *x;
        }
    }
    turned
}

impl<T: Element> Network<T> {
    pub(super) fn new<S: Simd>(flow: &HyperCnf) -> Result<Self> {
        let [first, middle, last] = flow.layers.as_slice() else {
            candle_core::bail!("a network of time of {} layers", flow.layers.len())
        };
        let hidden = first.weight().dim(0)?;
        let mut network = Self {
            features: flow.features,
            width: flow.width,
            hidden,
            first: vec![],
            first_bias: vec![],
            middle: vec![],
            middle_bias: vec![],
            last: vec![],
            last_bias: vec![],
        };
        let (outputs, count) = (padded::<T, S>(hidden), network.numbers::<S>());
        let in_order = |x: &[T], inputs| by_input(x, inputs, outputs, |output| output);
        let permuted = |x: &[T], inputs| by_input(x, inputs, count, |n| network.place::<S>(n));
        let bias = |layer: &candle_nn::Linear| match layer.bias() {
            Some(bias) => numbers::<T>(bias),
            None => candle_core::bail!("a network of time without biases"),
        };
        let last_bias = permuted(&bias(last)?, 1);
        let last = permuted(&numbers(last.weight())?, hidden);
        network.first = in_order(&numbers(first.weight())?, 1);
        network.first_bias = in_order(&bias(first)?, 1);
        network.middle = in_order(&numbers(middle.weight())?, hidden);
        network.middle_bias = in_order(&bias(middle)?, 1);
        (network.last, network.last_bias) = (last, last_bias);
        Ok(network)
    }

    /// Hidden units of the flow, filled up to whole vectors.
    pub(super) fn padded_width<S: Simd>(&self) -> usize {
        padded::<T, S>(self.width)
    }

    /// What the last layer puts out.
    fn numbers<S: Simd>(&self) -> usize {
        (3 * self.features + 1) * self.padded_width::<S>()
    }

    /// Where the n-th output of [`HyperCnf`]'s last layer is.
    fn place<S: Simd>(&self, n: usize) -> usize {
        let (d, m, width) = (self.features, self.width, self.padded_width::<S>());
        let (block, at) = (n / (m * d), n % (m * d));
        match block {
            3.. => 3 * d * width + at,
            _ => (block * d + at % d) * width + at / d,
        }
    }

    /// Numbers of what is held of a time.
    pub(super) fn generated(&self) -> usize {
        (8 * self.features + 2) * self.width + 2 * self.hidden
    }

    pub(super) fn parameters(&self) -> usize {
        let (hidden, outputs) = (self.hidden, (3 * self.features + 1) * self.width);
        2 * hidden + (hidden + 1) * (hidden + outputs)
    }

    /// Vectors of the sums of its gradients: layer after layer from the last one, weight and bias.
    pub(super) fn sums<S: Simd>(&self) -> usize {
        let hidden = padded::<T, S>(self.hidden);
        let numbers = (self.hidden + 1) * (self.numbers::<S>() + hidden) + 2 * hidden;
        numbers / T::lanes::<S>()
    }

    /// Vectors of scratch of one time.
    pub(super) fn scratch<S: Simd>(&self) -> usize {
        (self.numbers::<S>() + 2 * padded::<T, S>(self.hidden)) / T::lanes::<S>()
    }

    /// The weights at a time.
    #[inline(always)]
    pub(super) fn generate<S: Simd>(&self, s: S, t: T) -> Generated<T> {
        enter(s, Generate { network: self, t })
    }

    /// Adds what the sums of some times over rows, `of_times`, leave for the parameters.
    #[inline(always)]
    pub(super) fn accumulate<S: Simd>(
        &self,
        s: S,
        at: &[Cow<'_, Generated<T>>],
        of_times: &[T::Vector<S>],
        scratch: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        let size = of_times.len() / at.len().max(1);
        let each = scratch.chunks_exact_mut(self.scratch::<S>());
        for ((at, of_time), numbers) in at.iter().zip(of_times.chunks_exact(size)).zip(each) {
            let combine = Combine::<T, S> {
                network: self,
                at,
                of_time,
                numbers,
            };
            enter(s, combine);
        }
        let network = self;
        match at {
            [a, b, c] => enter(
                s,
                Pull::<T, S, 3> {
                    network,
                    at: [a, b, c],
                    scratch,
                    sums,
                },
            ),
            [a, b] => enter(
                s,
                Pull::<T, S, 2> {
                    network,
                    at: [a, b],
                    scratch,
                    sums,
                },
            ),
            [a] => enter(
                s,
                Pull::<T, S, 1> {
                    network,
                    at: [a],
                    scratch,
                    sums,
                },
            ),
            _ => {}
        }
    }

    /// The sums as gradients, in the order of [`HyperCnf`]'s layers.
    pub(super) fn gradients<S: Simd>(&self, _: S, sums: &[T::Vector<S>]) -> Vec<T> {
        let (hidden, outputs) = (self.hidden, padded::<T, S>(self.hidden));
        let count = self.numbers::<S>();
        let (last, rest) = scalars::<T, S>(sums).split_at(hidden * count);
        let (last_bias, rest) = rest.split_at(count);
        let (middle, rest) = rest.split_at(hidden * outputs);
        let (middle_bias, rest) = rest.split_at(outputs);
        let (first, first_bias) = rest.split_at(outputs);
        let mut gradients = Vec::with_capacity(self.parameters());
        gradients.extend(&first[..hidden]);
        gradients.extend(&first_bias[..hidden]);
        for output in 0..hidden {
            gradients.extend((0..hidden).map(|input| middle[input * outputs + output]));
        }
        gradients.extend(&middle_bias[..hidden]);
        let places = (0..(3 * self.features + 1) * self.width).map(|n| self.place::<S>(n));
        for place in places.clone() {
            gradients.extend((0..hidden).map(|input| last[input * count + place]));
        }
        gradients.extend(places.map(|place| last_bias[place]));
        gradients
    }
}

/// [`Network::generate`].
struct Generate<'a, T> {
    network: &'a Network<T>,
    t: T,
}

impl<T: Element, S: Simd> Kernel<S> for Generate<'_, T> {
    type Output = Generated<T>;

    #[inline(always)]
    fn run(self, s: S) -> Generated<T> {
        let Self { network, t } = self;
        let (d, m, width) = (network.features, network.width, network.padded_width::<S>());
        let first = layer::<T, S>(s, &[t], &network.first, &network.first_bias);
        let first = tanh::<T, S>(s, first);
        let second = layer::<T, S>(
            s,
            &first[..network.hidden],
            &network.middle,
            &network.middle_bias,
        );
        let second = tanh::<T, S>(s, second);
        let mut w = layer::<T, S>(
            s,
            &second[..network.hidden],
            &network.last,
            &network.last_bias,
        );
        let mut bias = w.split_off(3 * d * width);
        bias.truncate(m);
        let mut gate = w.split_off(2 * d * width);
        let u = w.split_off(d * width);
        let (mut v, mut coupling) = (u.clone(), vec![T::default(); width]);
        let scale = T::splat(s, T::of(1.0 / m as f64));
        let each = T::vectors_mut::<S>(&mut v).iter_mut();
        for (v, gate) in each.zip(T::vectors_mut::<S>(&mut gate)) {
            *gate = T::sigmoid(s, *gate);
            *v = T::times(s, T::times(s, *v, *gate), scale);
        }
        for (w, v) in w.chunks_exact(width).zip(v.chunks_exact(width)) {
            let each = T::vectors::<S>(w).iter().zip(T::vectors::<S>(v));
            for (sum, (w, v)) in T::vectors_mut::<S>(&mut coupling).iter_mut().zip(each) {
                *sum = T::mul_add(s, *v, *w, *sum);
            }
        }
        coupling.truncate(m);
        Generated {
            t,
            w: Packed::new::<S>(m, d, |unit, feature| w[feature * width + unit]),
            w_transposed: Packed::new::<S>(d, m, |feature, unit| w[feature * width + unit]),
            v: Packed::new::<S>(m, d, |unit, feature| v[feature * width + unit]),
            v_transposed: Packed::new::<S>(d, m, |feature, unit| v[feature * width + unit]),
            bias,
            coupling,
            values: [first, second],
            parts: [w, u, gate, v],
        }
    }
}

/// b + Σ_i x_i w_i.
#[inline(always)]
fn layer<T: Element, S: Simd>(s: S, x: &[T], weights: &[T], bias: &[T]) -> Vec<T> {
    let mut out = bias.to_vec();
    for (x, weights) in x.iter().zip(weights.chunks_exact(bias.len())) {
        let x = T::splat(s, *x);
        let each = T::vectors_mut::<S>(&mut out).iter_mut();
        for (out, w) in each.zip(T::vectors::<S>(weights)) {
            *out = T::mul_add(s, x, *w, *out);
        }
    }
    out
}

#[inline(always)]
fn tanh<T: Element, S: Simd>(s: S, mut x: Vec<T>) -> Vec<T> {
    for x in T::vectors_mut::<S>(&mut x) {
        *x = T::tanh(s, *x);
    }
    x
}

/// The cotangents of what the last layer puts out, from the sums over rows: W̄ and b̄ by the products alone, V̄, and s̄.
struct Combine<'a, T: Element, S: Simd> {
    network: &'a Network<T>,
    at: &'a Generated<T>,
    of_time: &'a [T::Vector<S>],
    numbers: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for Combine<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let d = self.network.features;
        let vectors = self.network.padded_width::<S>() / T::lanes::<S>();
        let scale = T::splat(s, T::of(1.0 / self.network.width as f64));
        let one = T::splat(s, T::of(1.0));
        let [w, u, gate, v] = &self.at.parts;
        let (w, u) = (T::vectors::<S>(w), T::vectors::<S>(u));
        let (gate, v) = (T::vectors::<S>(gate), T::vectors::<S>(v));
        let (of_w, rest) = self.of_time.split_at(d * vectors);
        let (of_bias, rest) = rest.split_at(vectors);
        let (of_v, of_coupling) = rest.split_at(d * vectors);
        for at in 0..d * vectors {
            let s_bar = of_coupling[at % vectors];
            let v_bar = T::mul_add(s, s_bar, w[at], of_v[at]);
            let u_bar = T::times(s, T::times(s, v_bar, scale), gate[at]);
            let rest = T::times(s, u[at], T::minus(s, one, gate[at]));
            self.numbers[at] = T::mul_add(s, s_bar, v[at], of_w[at]);
            self.numbers[d * vectors + at] = u_bar;
            self.numbers[2 * d * vectors + at] = T::times(s, u_bar, rest);
        }
        self.numbers[3 * d * vectors..][..vectors].copy_from_slice(of_bias);
    }
}

/// The pull-back through all layers, of N times.
struct Pull<'a, T: Element, S: Simd, const N: usize> {
    network: &'a Network<T>,
    at: [&'a Generated<T>; N],
    /// By time: the cotangents of what the last layer puts out, and space for those of the hidden layers.
    scratch: &'a mut [T::Vector<S>],
    sums: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const N: usize> Kernel<S> for Pull<'_, T, S, N> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let Self {
            network,
            at,
            scratch,
            sums,
        } = self;
        let lanes = T::lanes::<S>();
        let hidden = padded::<T, S>(network.hidden) / lanes;
        let numbers = network.numbers::<S>() / lanes;
        let (last, rest) = sums.split_at_mut((network.hidden + 1) * numbers);
        let (middle, first) = rest.split_at_mut((network.hidden + 1) * hidden);
        let mut outputs: [&[T::Vector<S>]; N] = [&[]; N];
        let mut seconds: [&mut [T::Vector<S>]; N] = std::array::from_fn(|_| Default::default());
        let mut firsts: [&mut [T::Vector<S>]; N] = std::array::from_fn(|_| Default::default());
        for (n, scratch) in scratch
            .chunks_exact_mut(numbers + 2 * hidden)
            .take(N)
            .enumerate()
        {
            let (of_outputs, rest) = scratch.split_at_mut(numbers);
            let (second, first) = rest.split_at_mut(hidden);
            (outputs[n], seconds[n], firsts[n]) = (of_outputs, second, first);
        }
        let mut values: [&[T]; N] = [&[]; N];
        for n in 0..N {
            values[n] = &at[n].values[1];
        }
        pull_layer::<T, S, N>(s, &network.last, values, outputs, &mut seconds, last);
        let mut middles: [&[T::Vector<S>]; N] = [&[]; N];
        for (n, second) in seconds.into_iter().enumerate() {
            bend::<T, S>(s, &at[n].values[1], second);
            middles[n] = second;
            values[n] = &at[n].values[0];
        }
        pull_layer::<T, S, N>(s, &network.middle, values, middles, &mut firsts, middle);
        let (weight, bias) = first.split_at_mut(hidden);
        for (n, first) in firsts.into_iter().enumerate() {
            bend::<T, S>(s, &at[n].values[0], first);
            let t = T::splat(s, at[n].t);
            for ((weight, bias), g) in weight.iter_mut().zip(&mut *bias).zip(&*first) {
                *weight = T::mul_add(s, t, *g, *weight);
                *bias = T::plus(s, *bias, *g);
            }
        }
    }
}

/// Adds the gradients of a layer to its sums, of N times with these inputs and cotangents of the outputs; writes the
/// cotangents of the inputs, with zeros where there are none.
#[inline(always)]
fn pull_layer<T: Element, S: Simd, const N: usize>(
    s: S,
    weights: &[T],
    x: [&[T]; N],
    g: [&[T::Vector<S>]; N],
    x_bar: &mut [&mut [T::Vector<S>]; N],
    sums: &mut [T::Vector<S>],
) {
    let outputs = g[0].len();
    let weights = T::vectors::<S>(weights);
    let (sums, bias) = sums.split_at_mut(weights.len());
    for x_bar in x_bar.iter_mut() {
        x_bar.fill(T::zeros::<S>());
    }
    let rows = sums
        .chunks_exact_mut(outputs)
        .zip(weights.chunks_exact(outputs));
    for (input, (sums, weights)) in rows.enumerate() {
        let mut factors = [T::zeros::<S>(); N];
        for n in 0..N {
            factors[n] = T::splat(s, x[n][input]);
        }
        let mut products = [T::zeros::<S>(); N];
        for (at, (sum, w)) in sums.iter_mut().zip(weights).enumerate() {
            for n in 0..N {
                let g = g[n][at];
                *sum = T::mul_add(s, factors[n], g, *sum);
                products[n] = T::mul_add(s, *w, g, products[n]);
            }
        }
        for n in 0..N {
            scalars_mut::<T, S>(x_bar[n])[input] = T::total(s, products[n]);
        }
    }
    for g in g {
        for (bias, g) in bias.iter_mut().zip(g) {
            *bias = T::plus(s, *bias, *g);
        }
    }
}

/// g becomes (1 − h²) g.
#[inline(always)]
fn bend<T: Element, S: Simd>(s: S, h: &[T], g: &mut [T::Vector<S>]) {
    for (g, h) in g.iter_mut().zip(T::vectors::<S>(h)) {
        let left = T::times(s, *h, *g);
        *g = T::fnmadd(s, *h, left, *g);
    }
}
