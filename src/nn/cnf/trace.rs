//! tr ∂g/∂z of a perceptron g, from its weights and the slopes D of its hidden layers, row by row
//! of the batch, in candle's operations.

use candle_core::{Result, Tensor};

/// The trace with what its pull-back reads.
pub(super) enum Trace {
    /// One hidden layer: Σ_j d_j m_j, m_j = Σ_i W1_ji W2_ij.
    Diagonal {
        weights: [Tensor; 2],
        slope: Tensor,
        m: Tensor,
    },
    /// Two: d2ᵀ B d1, B = W2 ∘ M, M = (W1 W3)ᵀ.
    Bilinear {
        weights: [Tensor; 3],
        slopes: [Tensor; 2],
        m: Tensor,
        b: Tensor,
        /// B d1.
        u: Tensor,
    },
    /// Any number: a forward tangent for each coordinate of z.
    Tangents {
        weights: Vec<Tensor>,
        slopes: Vec<Tensor>,
        /// What leaves the layers' products, `(coordinate, row, feature)`.
        before: Vec<Tensor>,
        /// What enters the products, first the unit vectors.
        after: Vec<Tensor>,
    },
}

/// What the trace leaves for the layers, given its cotangent.
pub(super) struct PulledTrace {
    /// Of the slopes.
    pub(super) slopes: Vec<Tensor>,
    /// Of the weights.
    pub(super) weights: Vec<Tensor>,
}

impl Trace {
    /// Of weights `[out, in]`, the first without its column for time, and slopes `(row, feature)`.
    pub(super) fn new(weights: Vec<Tensor>, slopes: Vec<Tensor>) -> Result<Self> {
        match (&*weights, &*slopes) {
            ([w1, w2], [d]) => Ok(Self::Diagonal {
                m: (w1 * w2.t()?)?.sum_keepdim(1)?,
                weights: [w1.clone(), w2.clone()],
                slope: d.clone(),
            }),
            ([w1, w2, w3], [d1, d2]) => {
                let m = w3.t()?.matmul(&w1.t()?)?;
                let b = (w2 * &m)?;
                Ok(Self::Bilinear {
                    u: d1.matmul(&b.t()?)?,
                    weights: [w1.clone(), w2.clone(), w3.clone()],
                    slopes: [d1.clone(), d2.clone()],
                    m,
                    b,
                })
            }
            _ => Self::tangents(weights, slopes),
        }
    }

    fn tangents(weights: Vec<Tensor>, slopes: Vec<Tensor>) -> Result<Self> {
        let (dim, first) = (weights[weights.len() - 1].dim(0)?, &weights[0]);
        let unit = Tensor::eye(dim, first.dtype(), first.device())?;
        let (mut before, mut after) = (vec![], vec![unit.unsqueeze(1)?]);
        for (l, slope) in slopes.iter().enumerate() {
            let tangent = product(&after[l], &weights[l].t()?)?;
            after.push(tangent.broadcast_mul(slope)?);
            before.push(tangent);
        }
        Ok(Self::Tangents {
            weights,
            slopes,
            before,
            after,
        })
    }

    /// The trace of every row, `(rows, 1)`.
    pub(super) fn value(&self, rows: usize) -> Result<Tensor> {
        match self {
            Self::Diagonal { slope, m, .. } => slope.matmul(m),
            Self::Bilinear { slopes, u, .. } => (&slopes[1] * u)?.sum_keepdim(1),
            Self::Tangents { weights, after, .. } => {
                let last = weights[weights.len() - 1].unsqueeze(1)?;
                let diagonal = after[after.len() - 1].broadcast_mul(&last)?;
                let trace = diagonal.sum(2)?.sum(0)?.unsqueeze(1)?;
                trace.broadcast_as((rows, 1))
            }
        }
    }

    /// Pulls back the trace's cotangent, `(rows, 1)`.
    pub(super) fn pull(&self, c: &Tensor) -> Result<PulledTrace> {
        match self {
            Self::Diagonal { weights, slope, m } => {
                let [w1, w2] = weights;
                let m_bar = slope.t()?.matmul(c)?;
                Ok(PulledTrace {
                    slopes: vec![c.matmul(&m.t()?)?],
                    weights: vec![
                        w2.t()?.broadcast_mul(&m_bar)?,
                        w1.broadcast_mul(&m_bar)?.t()?,
                    ],
                })
            }
            Self::Bilinear {
                weights,
                slopes: [d1, d2],
                m,
                b,
                u,
            } => {
                let [w1, w2, w3] = weights;
                let u_bar = d2.broadcast_mul(c)?;
                let b_bar = u_bar.t()?.matmul(d1)?;
                let m_bar = (&b_bar * w2)?;
                Ok(PulledTrace {
                    slopes: vec![u_bar.matmul(b)?, u.broadcast_mul(c)?],
                    weights: vec![
                        w3.matmul(&m_bar)?.t()?,
                        (b_bar * m)?,
                        m_bar.matmul(w1)?.t()?,
                    ],
                })
            }
            Self::Tangents {
                weights,
                slopes,
                before,
                after,
            } => pull_tangents(weights, slopes, before, after, c),
        }
    }
}

fn pull_tangents(
    weights: &[Tensor],
    slopes: &[Tensor],
    before: &[Tensor],
    after: &[Tensor],
    c: &Tensor,
) -> Result<PulledTrace> {
    let mut pulled = PulledTrace {
        slopes: vec![],
        weights: vec![],
    };
    let last = slopes.len();
    pulled.weights.push(after[last].broadcast_mul(c)?.sum(1)?);
    let mut g = weights[last].unsqueeze(1)?.broadcast_mul(c)?;
    for l in (0..last).rev() {
        pulled.slopes.push(g.broadcast_mul(&before[l])?.sum(0)?);
        g = g.broadcast_mul(&slopes[l])?;
        if l == 0 {
            // Its tangents are the unit vectors, the same for every row.
            pulled.weights.push(g.sum(1)?.t()?);
        } else {
            let x = after[l].flatten(0, 1)?;
            pulled.weights.push(g.flatten(0, 1)?.t()?.matmul(&x)?);
            g = product(&g, &weights[l])?;
        }
    }
    pulled.slopes.reverse();
    pulled.weights.reverse();
    Ok(pulled)
}

/// Of every tangent with a matrix.
fn product(tangents: &Tensor, by: &Tensor) -> Result<Tensor> {
    let (coordinates, rows, _) = tangents.dims3()?;
    let flat = tangents.flatten(0, 1)?.matmul(by)?;
    flat.reshape((coordinates, rows, by.dim(1)?))
}
