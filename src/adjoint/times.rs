//! t̄: gradients of the times that the user gave.

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::ops;
use crate::schedule::{Node, Step};

/// Time terms on a device that are kept before they are read.
const BLOCK: usize = 1024;

/// t̄, added up on the host: at once where reading a scalar costs nothing, otherwise in blocks.
pub(super) struct TimeGradients {
    times: Vec<f64>,
    pending: Vec<TimeTerm>,
}

impl TimeGradients {
    /// Zero at so many times.
    pub(super) fn new(times: usize) -> Self {
        Self {
            times: vec![0.0; times],
            pending: vec![],
        }
    }

    pub(super) fn add(&mut self, term: TimeTerm) -> Result<()> {
        if term.value.device().is_cpu() {
            let value = term.value.to_scalar()?;
            return self.sum(&term, value);
        }
        self.pending.push(term);
        match self.pending.len() {
            BLOCK.. => self.flush(),
            _ => Ok(()),
        }
    }

    /// Reads what is pending, in one transfer.
    fn flush(&mut self) -> Result<()> {
        let terms = std::mem::take(&mut self.pending);
        if terms.is_empty() {
            return Ok(());
        }
        let values: Vec<_> = terms.iter().map(|t| &t.value).collect();
        ops::note_host_read(values[0].device());
        let values = Tensor::stack(&values, 0)?.to_vec1()?;
        let mut terms = terms.iter().zip(values);
        terms.try_for_each(|(term, value)| self.sum(term, value))
    }

    fn sum(&mut self, term: &TimeTerm, value: f64) -> Result<()> {
        for (node, weight) in term.nodes.iter().zip(term.weights) {
            for (time, derivative) in node.derivatives() {
                self.times[time] += weight * derivative * value;
                if !self.times[time].is_finite() {
                    return Err(Error::NonFiniteGradient {
                        step: term.step.index,
                        t: term.step.t,
                    });
                }
            }
        }
        Ok(())
    }

    /// Adds the terms of another sum.
    pub(super) fn add_all(&mut self, other: Self) {
        self.pending.extend(other.pending);
        for (time, other) in self.times.iter_mut().zip(other.times) {
            *time += other;
        }
    }

    pub(super) fn finish(mut self) -> Result<Vec<f64>> {
        self.flush()?;
        Ok(self.times)
    }
}

/// A scalar on the device that belongs, with weights, to two nodes.
pub(super) struct TimeTerm {
    value: Tensor,
    step: Step,
    nodes: [Node; 2],
    weights: [f64; 2],
}

impl TimeTerm {
    /// Weights at the start and at the end of a step, whose nodes hand them on to the user's times.
    pub(super) fn new(step: Step, value: Tensor, start: f64, end: f64) -> Result<Self> {
        Ok(Self {
            value: value.reshape(())?.to_dtype(DType::F64)?,
            step,
            nodes: step.nodes,
            weights: [start, end],
        })
    }

    /// A term of one of the user's times, which lies in the step.
    pub(super) fn at(time: usize, step: Step, value: Tensor) -> Result<Self> {
        Ok(Self {
            nodes: [Node::Between(time, 0.0), Node::Constant],
            ..Self::new(step, value, 1.0, 0.0)?
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn time_terms_that_wait_are_summed_in_blocks_to_the_same_numbers() {
        let step = |interval| Step {
            index: interval,
            t: 0.0,
            h: 1.0,
            end: 1.0,
            limits: [0.0, 1.0],
            nodes: [0.0, 1.0].map(|s| Node::Between(interval, s)),
            dense: false,
        };
        let (mut at_once, mut waiting) = (TimeGradients::new(3), TimeGradients::new(3));
        for n in 0..2 * BLOCK + 3 {
            let term = || {
                let value = Tensor::new(n as f64, &Device::Cpu).unwrap();
                TimeTerm::new(step(n % 2), value, -1.0, 0.5).unwrap()
            };
            at_once.add(term()).unwrap();
            waiting.pending.push(term());
            if waiting.pending.len() == BLOCK {
                waiting.flush().unwrap();
            }
        }
        assert!(at_once.pending.is_empty() && waiting.pending.len() == 3);
        assert_eq!(at_once.finish().unwrap(), waiting.finish().unwrap());
        assert!(TimeGradients::new(0).finish().unwrap().is_empty());
    }
}
