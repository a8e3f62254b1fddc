//! θ̄ = Σ h (∂f/∂θ)ᵀ v: many small terms, summed in blocks.
//!
//! A running sum of n like terms loses up to n unit roundoffs, which at 10⁴ steps shows above the
//! rounding of f16.  Blocks of b terms, summed on their own and then added up, lose b + n/b (Higham,
//! "The Accuracy of Floating Point Summation", SIAM J. Sci. Comput. 14 (1993), §3).  With compensation, what each addition
//! to the total takes away is added with the next block, so that b unit roundoffs are lost for any n.

use candle_core::{DType, Tensor, TensorId};

use crate::error::Result;
use crate::ops;
#[cfg(feature = "cuda")]
use crate::ops::cuda::{self, Clock, SweepState};

/// Terms in a block: √n at 16 000 evaluations.
const BLOCK: usize = 128;

/// The running sums of all parameters' gradients.
pub(crate) struct Accumulator {
    dtype: DType,
    total: Vec<Tensor>,
    /// What rounding has taken from the totals, if that is kept; otherwise empty.
    lost: Vec<Tensor>,
    /// The sums of the current block, and how many terms each holds.
    block: Vec<Option<(Tensor, usize)>>,
}

impl Accumulator {
    /// Zero, in `dtype`, of the parameters' shapes.
    pub(crate) fn new(parameters: &[Tensor], dtype: DType) -> Result<Self> {
        let zeros = |p: &Tensor| Ok(Tensor::zeros(p.shape(), dtype, p.device())?);
        Ok(Self {
            dtype,
            total: parameters.iter().map(zeros).collect::<Result<_>>()?,
            lost: vec![],
            block: parameters.iter().map(|_| None).collect(),
        })
    }

    /// The same with compensated totals, or without.
    pub(crate) fn compensating(mut self, compensated: bool) -> Result<Self> {
        if compensated {
            let zeros = self.total.iter().map(Tensor::zeros_like);
            self.lost = zeros.collect::<candle_core::Result<_>>()?;
        }
        Ok(self)
    }

    /// `θ̄_i += c · grad`.
    pub(crate) fn add(&mut self, i: usize, c: f64, grad: &Tensor) -> Result<()> {
        let (mut sum, terms) = match self.block[i].take() {
            Some(block) => block,
            None => (Tensor::zeros(grad.shape(), self.dtype, grad.device())?, 0),
        };
        ops::accumulate(&mut sum, c, grad)?;
        if terms + 1 < BLOCK {
            self.block[i] = Some((sum, terms + 1));
        } else {
            self.add_block(i, &sum)?;
        }
        Ok(())
    }

    /// Adds the sum of a block to the total.
    fn add_block(&mut self, i: usize, sum: &Tensor) -> Result<()> {
        match self.lost.get_mut(i) {
            Some(lost) => {
                let total = &mut self.total[i];
                [*total, *lost] = ops::add_compensated([total, lost], &[(1.0, sum)])?;
            }
            None => ops::accumulate(&mut self.total[i], 1.0, sum)?,
        }
        Ok(())
    }

    /// `θ̄_i[at] = grad`, of one that has a row of its own for every step.
    pub(crate) fn set(&mut self, i: usize, at: usize, grad: &Tensor) -> Result<()> {
        let total = &self.total[i];
        let row = [&[1], &total.dims()[1..]].concat();
        total.slice_set(&grad.reshape(row)?.contiguous()?, 0, at)?;
        Ok(())
    }

    /// `θ̄_i += c/S · grad_i` for all parameters that have one, while the sweep goes on; c is multiplied by
    /// the h of a clock if there is one.  Blocks stay open until [`end_step`](Self::end_step).
    #[cfg(feature = "cuda")]
    pub(crate) fn add_all(
        &mut self,
        c: f64,
        grads: &[Option<Tensor>],
        sweep: &SweepState,
        clock: Option<&Clock>,
    ) -> Result<()> {
        for (block, grad) in self.block.iter_mut().zip(grads) {
            if let (None, Some(grad)) = (&block, grad) {
                *block = Some((Tensor::zeros(grad.shape(), self.dtype, grad.device())?, 0));
            }
        }
        let open = self.block.iter().zip(grads);
        let pairs = open.filter_map(|(block, grad)| Some((&block.as_ref()?.0, grad.as_ref()?)));
        cuda::accumulate_all(&pairs.collect::<Vec<_>>(), c, Some(sweep), clock)?;
        let with_grad = self.block.iter_mut().zip(grads);
        for (_, terms) in
            with_grad.filter_map(|(block, grad)| block.as_mut().filter(|_| grad.is_some()))
        {
            *terms += 1;
        }
        Ok(())
    }

    /// Adds up what is full.  Blocks keep their memory, which steps that are replayed add to.
    #[cfg(feature = "cuda")]
    pub(crate) fn end_step(&mut self) -> Result<()> {
        self.close(BLOCK)
    }

    /// Terms in each open block.
    #[cfg(feature = "cuda")]
    pub(crate) fn terms(&self) -> Vec<usize> {
        let terms = |block: &Option<(Tensor, usize)>| block.as_ref().map_or(0, |(_, terms)| *terms);
        self.block.iter().map(terms).collect()
    }

    /// Counts the terms that a replay has added, or that were not added after all.
    #[cfg(feature = "cuda")]
    pub(crate) fn set_terms(&mut self, terms: impl Iterator<Item = usize>) {
        for (block, count) in self.block.iter_mut().zip(terms) {
            if let Some((_, terms)) = block {
                *terms = count;
            }
        }
    }

    /// Opens a block for every parameter, so that none need be made on the way.
    #[cfg(feature = "cuda")]
    pub(crate) fn open_all(&mut self) -> Result<()> {
        for (block, total) in self.block.iter_mut().zip(&self.total) {
            if block.is_none() {
                *block = Some((total.zeros_like()?, 0));
            }
        }
        Ok(())
    }

    /// θ̄.
    pub(crate) fn finish(mut self) -> Result<Vec<Tensor>> {
        self.so_far()?;
        Ok(self.total)
    }

    /// θ̄ as far as it has been summed; more may follow.
    pub(crate) fn so_far(&mut self) -> Result<&[Tensor]> {
        self.close(1)?;
        Ok(&self.total)
    }

    /// Adds up blocks of so many terms at least, and empties them.
    fn close(&mut self, least: usize) -> Result<()> {
        for i in 0..self.block.len() {
            let full = self.block[i].take_if(|(_, terms)| *terms >= least);
            if let Some((sum, _)) = full {
                self.add_block(i, &sum)?;
                if sum.elem_count() > 0 {
                    sum.zero_set()?;
                }
                self.block[i] = Some((sum, 0));
            }
        }
        Ok(())
    }
}

/// The gradient of a parameter: the sum over all weights that are this parameter, zero if there is
/// none.
pub(crate) fn gradient_of(
    p: &Tensor,
    weights: &[TensorId],
    gradients: &[Tensor],
    dtype: DType,
) -> Result<Tensor> {
    let shares = weights.iter().zip(gradients);
    let mut shares = shares.filter(|(w, _)| **w == p.id()).map(|(_, g)| g);
    let first = match shares.next() {
        Some(gradient) => gradient.clone(),
        None => Tensor::zeros(p.shape(), dtype, p.device())?,
    };
    Ok(shares.try_fold(first, |sum, gradient| sum + gradient)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn blocks_lose_far_less_than_a_running_sum() {
        // Like terms, as neighbouring steps contribute them: 0.7 and a little less each time.
        let terms = (0..32_768).map(|i| 0.7 - 1e-6 * f64::from(i));
        let mut blocked = Accumulator::new(
            &[Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap()],
            DType::F32,
        )
        .unwrap();
        let mut running = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
        let mut exact = 0.0;
        for term in terms {
            let term = Tensor::new(&[term as f32], &Device::Cpu).unwrap();
            exact += f64::from(term.to_vec1::<f32>().unwrap()[0]);
            blocked.add(0, 1.0, &term).unwrap();
            ops::accumulate(&mut running, 1.0, &term).unwrap();
        }
        let error =
            |sum: &Tensor| (f64::from(sum.to_vec1::<f32>().unwrap()[0]) - exact).abs() / exact;
        let (blocked, running) = (error(&blocked.finish().unwrap()[0]), error(&running));
        let unit = 2f64.powi(-24);
        assert!(blocked <= (BLOCK + 32_768 / BLOCK) as f64 * unit);
        assert!(50.0 * blocked <= running, "{blocked:e}, {running:e}");
    }

    #[test]
    fn compensated_totals_lose_no_more_for_more_terms() {
        let error = |n: usize| {
            let zero = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
            let sums = Accumulator::new(&[zero], DType::F32).unwrap();
            let mut sums = sums.compensating(true).unwrap();
            let mut exact = 0.0;
            for i in 0..n {
                let term = 0.7 - 1e-6 * (i as f32);
                exact += f64::from(term);
                let term = Tensor::new(&[term], &Device::Cpu).unwrap();
                sums.add(0, 1.0, &term).unwrap();
            }
            // What is read on the way changes nothing.
            sums.so_far().unwrap();
            let sum = sums.finish().unwrap()[0].to_vec1::<f32>().unwrap()[0];
            (f64::from(sum) - exact).abs() / exact
        };
        let unit = 2f64.powi(-24);
        for n in [1, BLOCK - 1, BLOCK, 1000, 100_000] {
            assert!(error(n) <= 32.0 * unit, "{n}: {:e}", error(n) / unit);
        }
    }
}
