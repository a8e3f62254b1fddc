//! ∇Φ and tr ∇²Φ of one batch, and their pull-back: reverse mode through the formulas, written out.
//!
//! In the names of [`OtFlow`]: with t₀ = tanh(K₀s + b₀), t₁ = tanh(K₁u + b₁), and z = w + K₁ᵀ(t₁ ∘ w),
//!
//! ∇Φ = K₀ᵀ(t₀ ∘ z) + AᵀA s + c,
//! tr ∇²Φ = (1 − t₀²)·(z ∘ r) + (1 − t₁²)·(w ∘ n) + ‖A‖²,
//!
//! r the squared norms of the rows of K₀ and n = Σ_k q_k², q_k = K₁(t₀ ∘ K₀e_k); of K₀ and A only
//! the columns that belong to x.

use candle_core::{DType, Result, Tensor};

use super::{column_sums, OtFlow, SpaceTime};
use crate::nn::spread::{row_sums, spread};
use crate::nn::Activation;

/// One evaluation, and what its pull-back reads; `(row, unit)` where nothing else is said.
pub(super) struct Evaluation {
    of: OtFlow,
    s: SpaceTime,
    u: Tensor,
    t0: Tensor,
    t1: Tensor,
    z: Tensor,
    /// diag(w) K₁, `(unit, unit)`.
    weighted: Tensor,
    /// q_k by feature.
    q: Vec<Tensor>,
    /// n, in the dtype of the costs, as is `r`, `(unit, 1)`.
    n: Tensor,
    r: Tensor,
    /// ∇Φ in x and t, `(row, features + 1)`.
    gradient: Tensor,
}

/// diag(K₀e_k) K₁ᵀ, which t₀ is multiplied with to give q_k.
fn pushed(of: &OtFlow, k: usize) -> Result<Tensor> {
    let ([k0, _], [k1, _]) = (&of.open, &of.inner);
    k1.t()?.broadcast_mul(&k0.narrow(1, k, 1)?)
}

/// 1 − t².
fn slope(t: &Tensor) -> Result<Tensor> {
    1.0 - t.sqr()?
}

impl Evaluation {
    /// At `s`; what ends in costs is formed in the dtype `wide`.
    pub(super) fn new(of: OtFlow, s: SpaceTime, wide: DType) -> Result<Self> {
        let (rows, d) = (s.x.dim(0)?, of.features());
        let ([k0, _], [k1, _]) = (&of.open, &of.inner);
        let [open, u, inner] = of.layers(&s)?;
        let t0 = Activation::Tanh.forward(&open)?;
        let t1 = Activation::Tanh.forward(&inner)?;
        let weighted = k1.broadcast_mul(&of.w.unsqueeze(1)?)?;
        let z = (t1.matmul(&weighted)? + spread(&of.w, rows)?)?;
        let quadratic = s.product(&of.a, None)?.matmul(&of.a)?;
        let gradient = ((&t0 * &z)?.matmul(k0)? + quadratic)?;
        let gradient = (gradient + spread(&of.c, rows)?)?;
        let mut n = Tensor::zeros(t0.shape(), wide, t0.device())?;
        let mut q = Vec::with_capacity(d);
        for k in 0..d {
            let pushed = t0.matmul(&pushed(&of, k)?)?;
            n = (n + pushed.to_dtype(wide)?.sqr()?)?;
            q.push(pushed);
        }
        let r = k0.narrow(1, 0, d)?.to_dtype(wide)?.sqr()?.sum_keepdim(1)?;
        Ok(Self {
            of,
            s,
            u,
            t0,
            t1,
            z,
            weighted,
            q,
            n,
            r,
            gradient,
        })
    }

    /// tr ∇²Φ, `(row, 1)`.
    fn trace(&self) -> Result<Tensor> {
        let wide = |x: &Tensor| x.to_dtype(self.n.dtype());
        let first = wide(&(slope(&self.t0)? * &self.z)?)?.matmul(&self.r)?;
        let bent = (slope(&wide(&self.t1)?)? * &self.n)?;
        let second = bent.matmul(&wide(&self.of.w)?.unsqueeze(1)?)?;
        let a = wide(&self.of.a.narrow(1, 0, self.of.features())?)?;
        (first + second)? + spread(&a.sqr()?.sum_all()?, self.s.x.dim(0)?)?
    }

    /// ∇Φ in x, ½‖·‖² of it, and ∂Φ/∂t less that, `(row, …)`, the latter two in the dtype of the costs.
    fn slopes(&self) -> Result<[Tensor; 3]> {
        let (d, wide) = (self.of.features(), self.n.dtype());
        let of_x = self.gradient.narrow(1, 0, d)?;
        let transport = (row_sums(&of_x.to_dtype(wide)?.sqr()?)? * 0.5)?;
        let residual = (self.gradient.narrow(1, d, 1)?.to_dtype(wide)? - &transport)?;
        Ok([of_x, transport, residual])
    }

    /// The velocity of (x, costs).
    pub(super) fn velocities(&self, (x, costs): &(Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
        let [of_x, transport, residual] = self.slopes()?;
        let k = Tensor::cat(&[self.trace()?, transport, residual.abs()?], 1)?;
        Ok((of_x.neg()?.reshape(x.shape())?, k.reshape(costs.shape())?))
    }

    /// Cotangents of s and of the parameters, in the order in which the flow lists them.
    pub(super) fn pull(&self, (v, costs): &(Tensor, Tensor)) -> Result<(Tensor, [Tensor; 7])> {
        let narrow = |x: &Tensor| x.to_dtype(self.t0.dtype());
        let costs = costs.reshape(((), 3))?;
        let [of_x, _, residual] = self.slopes()?;
        let c_residual = (costs.narrow(1, 2, 1)? * residual.sign()?)?;
        let c_transport = (costs.narrow(1, 1, 1)? - &c_residual)?;
        let v = v.reshape(((), self.of.features()))?;
        let g_x = (of_x.broadcast_mul(&narrow(&c_transport)?)? - v)?;
        let g = Tensor::cat(&[&g_x, &narrow(&c_residual)?], 1)?;
        // Products on CUDA read no column of a wider tensor.
        self.pull_derivatives(&g, &costs.narrow(1, 0, 1)?.contiguous()?)
    }

    /// The same of cotangents `g` of ∇Φ and `c` of the trace.
    fn pull_derivatives(&self, g: &Tensor, c: &Tensor) -> Result<(Tensor, [Tensor; 7])> {
        let Self {
            of, s, t0, t1, z, ..
        } = self;
        let ([k0, _], [k1, _]) = (&of.open, &of.inner);
        let narrow = |x: &Tensor| x.to_dtype(t0.dtype());
        let (e0, e1) = (slope(t0)?, slope(t1)?);
        let n = narrow(&self.n)?;
        // c rᵀ and c wᵀ, row by row.
        let cr = narrow(&c.matmul(&self.r.t()?)?)?;
        let c = narrow(c)?;
        let cw = c.matmul(&of.w.unsqueeze(0)?)?;
        let column = |x: Tensor| x.t()?.matmul(&c);

        let g_k0 = g.matmul(&k0.t()?)?;
        let z_bar = ((&g_k0 * t0)? + (&cr * &e0)?)?;
        let traced = ((&cr * z)? * t0)?;
        let (q_t0, q_k0, q_k1) = self.pull_tangents(&((&cw * &e1)? * 2.0)?)?;
        let t0_bar = (((g_k0 * z)? - (traced * 2.0)?)? + q_t0)?;
        let t1_bar = (z_bar.matmul(&self.weighted.t()?)? - (((cw * &n)? * t1)? * 2.0)?)?;
        let p_bar = (t1_bar * &e1)?;
        let o_bar = ((t0_bar * &e0)? + (p_bar.matmul(k1)? * t0)?)?;

        let r_bar = column((&e0 * z)?)?;
        let of_r = self.columns_of_x(k0)?.broadcast_mul(&(r_bar * 2.0)?)?;
        let k0_bar = ((t0 * z)?.t()?.matmul(g)? + s.outer(&o_bar)?)?;
        let k0_bar = ((k0_bar + of_r)? + q_k0)?;
        let weighted_bar = t1.t()?.matmul(&z_bar)?;
        let of_w = weighted_bar.broadcast_mul(&of.w.unsqueeze(1)?)?;
        let k1_bar = ((of_w + p_bar.t()?.matmul(&self.u)?)? + q_k1)?;
        let w_bar = (column((e1 * n)?)? + row_sums(&(weighted_bar * k1)?)?)?;
        let w_bar = (w_bar.t()? + column_sums(&z_bar)?)?;

        let (a_g, a_s) = (g.matmul(&of.a.t()?)?, s.product(&of.a, None)?);
        let a_bar = (s.outer(&a_g)? + a_s.t()?.matmul(g)?)?;
        let total = (column_sums(&c)? * 2.0)?;
        let a_bar = (a_bar + self.columns_of_x(&of.a)?.broadcast_mul(&total)?)?;
        let s_bar = (o_bar.matmul(k0)? + a_g.matmul(&of.a)?)?;
        let (b0_bar, b1_bar) = (column_sums(&o_bar)?, column_sums(&p_bar)?);
        let c_bar = column_sums(g)?;
        Ok((s_bar, [k0_bar, b0_bar, k1_bar, b1_bar, w_bar, a_bar, c_bar]))
    }

    /// Cotangents of t₀, K₀ and K₁, given twice that of n.
    fn pull_tangents(&self, twice: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let ([k0, _], [k1, _]) = (&self.of.open, &self.of.inner);
        let (mut t0_bar, mut k1_bar) = (self.t0.zeros_like()?, k1.zeros_like()?);
        let (t0_t, k1_t) = (self.t0.t()?, k1.t()?.contiguous()?);
        let mut columns = Vec::with_capacity(self.q.len() + 1);
        for (k, q) in self.q.iter().enumerate() {
            let q_bar = (q * twice)?;
            t0_bar = (t0_bar + q_bar.matmul(&pushed(&self.of, k)?.t()?)?)?;
            let pushed_bar = t0_t.matmul(&q_bar)?;
            columns.push(row_sums(&(&pushed_bar * &k1_t)?)?);
            k1_bar = (k1_bar + pushed_bar.broadcast_mul(&k0.narrow(1, k, 1)?)?.t()?)?;
        }
        columns.push(k0.narrow(1, 0, 1)?.zeros_like()?);
        Ok((t0_bar, Tensor::cat(&columns, 1)?, k1_bar))
    }

    /// `x` with zeros in its last column, that of time.
    fn columns_of_x(&self, x: &Tensor) -> Result<Tensor> {
        x.narrow(1, 0, self.of.features())?.pad_with_zeros(1, 0, 1)
    }
}
