//! Sparse matrices, row by row.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::pattern::Pattern;
use super::product::Product;

/// A sparse matrix A in compressed rows: where its entries are, and a tensor of their values.
///
/// [`matmul`](Self::matmul) is A x for a dense x `(columns, features)`, differentiable in x and in the values.  The places of
/// the entries are shared between clones.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::graph::Csr;
/// // [[0, 2, 0], [1, 0, 3]]
/// let values = Tensor::new(&[2.0, 1.0, 3.0], &Device::Cpu)?;
/// let a = Csr::new(vec![0, 1, 3], vec![1, 0, 2], 3, values)?;
/// let x = Tensor::new(&[[1.0], [10.0], [100.0]], &Device::Cpu)?;
/// assert_eq!(a.matmul(&x)?.to_vec2::<f64>()?, [[20.0], [301.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Csr {
    pattern: Arc<Pattern>,
    columns: usize,
    values: Tensor,
}

impl Csr {
    /// The entries of row i are those from `offsets[i]` to `offsets[i + 1]`, in the columns `across`, with these values
    /// `(entries)`, f32 or f64 on any device.  Several entries at one place are added.
    ///
    /// # Errors
    /// If offsets do not rise from 0 to the number of entries, a column is beyond the last, or there is not one value
    /// for each entry.
    pub fn new(
        offsets: Vec<usize>,
        across: Vec<u32>,
        columns: usize,
        values: Tensor,
    ) -> Result<Self> {
        let pattern = Arc::new(Pattern::new(offsets, across, columns)?);
        Self::of(pattern, columns, values)
    }

    /// Every entry of a dense matrix, zeros included, so that all of them have a gradient.
    ///
    /// # Errors
    /// If it is no matrix of floating-point numbers.
    pub fn from_dense(matrix: &Tensor) -> Result<Self> {
        let (rows, columns) = matrix.dims2()?;
        let offsets = (0..=rows).map(|i| i * columns).collect();
        let across = (0..rows).flat_map(|_| 0..columns as u32).collect();
        Self::new(offsets, across, columns, matrix.flatten_all()?)
    }

    /// D^−½ (A + I) D^−½ of an undirected graph, D the degrees with the loops: the matrix of a graph convolution
    /// (Kipf & Welling, arXiv 1609.02907).
    ///
    /// Edges may come in both directions, and more than once: all that join the same two nodes count as one, and an edge
    /// from a node to itself is the loop that every node has.
    ///
    /// # Errors
    /// If an edge has a node that there is not.
    pub fn normalised_adjacency(
        nodes: usize,
        edges: &[[u32; 2]],
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let mut neighbours: Vec<Vec<u32>> = (0..nodes).map(|i| vec![i as u32]).collect();
        for &[i, j] in edges {
            if i.max(j) as usize >= nodes {
                candle_core::bail!(
                    "an edge joins the nodes {i} and {j}, but a graph of {nodes} nodes numbers them from 0 to {nodes} - 1"
                )
            }
            neighbours[i as usize].push(j);
            neighbours[j as usize].push(i);
        }
        for all in &mut neighbours {
            all.sort_unstable();
            all.dedup();
        }
        let degrees: Vec<f64> = neighbours.iter().map(|n| n.len() as f64).collect();
        let (mut offsets, mut across, mut values) = (vec![0], vec![], vec![]);
        for (i, own) in neighbours.iter_mut().enumerate() {
            own.sort_unstable();
            for &j in own.iter() {
                across.push(j);
                values.push(1.0 / (degrees[i] * degrees[j as usize]).sqrt());
            }
            offsets.push(across.len());
        }
        let entries = values.len();
        let values = Tensor::from_vec(values, entries, &Device::Cpu)?.to_dtype(dtype)?;
        Self::new(offsets, across, nodes, values.to_device(device)?)
    }

    fn of(pattern: Arc<Pattern>, columns: usize, values: Tensor) -> Result<Self> {
        let entries = pattern.by_row.across.len();
        if values.dims() != [entries] || !values.dtype().is_float() {
            candle_core::bail!(
                "a sparse matrix of {entries} entries needs as many floating-point values, got {:?} {:?}",
                values.dtype(),
                values.shape()
            )
        }
        Ok(Self {
            pattern,
            columns,
            values,
        })
    }

    /// Other values at the same places, `(entries)`.
    ///
    /// # Errors
    /// If there is not one for each entry.
    pub fn with_values(&self, values: Tensor) -> Result<Self> {
        Self::of(Arc::clone(&self.pattern), self.columns, values)
    }

    /// The values of the entries, row by row.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// Where the entries are.
    pub(super) fn pattern(&self) -> &Arc<Pattern> {
        &self.pattern
    }

    /// Rows and columns.
    pub fn dims(&self) -> (usize, usize) {
        (self.pattern.by_row.lines(), self.columns)
    }

    /// A x for x `(columns, features)`; `(rows, features)` in the dtype of x.
    ///
    /// On the CPU and on CUDA one operation, whose sums are in the order of the entries on every vector unit and for any
    /// number of threads, and in f32 where x is narrower.  On other devices three of candle's: gather, scale, add.
    ///
    /// # Errors
    /// If x is no matrix of as many rows as A has columns, or elsewhere than the values; of candle's operations.
    pub fn matmul(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, columns) = self.dims();
        if x.rank() != 2 || x.dims()[0] != columns {
            let field = format!("a sparse matrix of {rows} x {columns}");
            let needs = format!("x ({columns}, features)");
            return Err(crate::nn::wrong_state(field, needs, &[x]));
        }
        let wide = match x.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let (values, wide_x) = (self.values.to_dtype(wide)?, x.to_dtype(wide)?);
        let is_fused = x.device().is_cpu() || cfg!(feature = "cuda") && x.device().is_cuda();
        let y = match is_fused {
            true => {
                let product = Product(Arc::clone(&self.pattern));
                values
                    .contiguous()?
                    .apply_op2(&wide_x.contiguous()?, product)?
            }
            false => self.gathered(&values, &wide_x)?,
        };
        y.to_dtype(x.dtype())
    }

    /// The same in candle's operations.
    fn gathered(&self, values: &Tensor, x: &Tensor) -> Result<Tensor> {
        let side = &self.pattern.by_row;
        let index = |of: Vec<u32>| {
            let entries = of.len();
            Tensor::from_vec(of, entries, x.device())
        };
        let rows = index(side.line_of_each())?;
        let each = x.index_select(&index(side.across.clone())?, 0)?;
        let each = each.broadcast_mul(&values.unsqueeze(1)?)?;
        let zeros = Tensor::zeros((side.lines(), x.dim(1)?), x.dtype(), x.device())?;
        zeros.index_add(&rows, &each, 0)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    #[test]
    fn the_product_in_candles_operations_is_the_fused_one() {
        let device = Device::Cpu;
        let values = Var::from_tensor(&Tensor::new(&[0.5, -1.0, 2.0, 0.25, 3.0], &device).unwrap());
        let values = values.unwrap();
        let offsets = vec![0, 2, 2, 5];
        let a = Csr::new(offsets, vec![3, 0, 1, 1, 2], 4, values.as_tensor().clone()).unwrap();
        let x = Tensor::arange(0.0, 20.0, &device)
            .unwrap()
            .reshape((4, 5))
            .unwrap();
        let x = Var::from_tensor(&x.sin().unwrap()).unwrap();
        let g = Tensor::arange(1.0, 16.0, &device)
            .unwrap()
            .reshape((3, 5))
            .unwrap();
        let run = |y: Tensor| {
            let grads = (&y * &g).unwrap().sum_all().unwrap().backward().unwrap();
            [
                y,
                grads.get(&x).unwrap().clone(),
                grads.get(&values).unwrap().clone(),
            ]
        };
        let fused = run(a.matmul(&x).unwrap());
        let plain = run(a.gathered(&values, &x).unwrap());
        for (fused, plain) in fused.iter().zip(&plain) {
            let apart = (fused - plain)
                .unwrap()
                .abs()
                .unwrap()
                .flatten_all()
                .unwrap();
            let apart: f64 = apart.max(0).unwrap().to_scalar().unwrap();
            assert!(apart <= 1e-14, "{apart:e}");
        }
    }
}
