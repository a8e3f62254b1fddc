//! The noise of one step as tensors, and what the sums of a table multiply evaluations by.

use candle_core::{Device, Tensor};

use super::{constant, Driven, Evaluated, Functional, NoiseType, Part, Term};
use crate::error::{Error, Result, SdeDefect};
use crate::noise::Drawn;
use crate::ops;
use crate::precision::Rounding;
use crate::schedule::Step;

/// The increments of a step, drawn or read when they are first needed.
pub(crate) struct StepNoise<'a> {
    driven: &'a Driven,
    step: Step,
    /// Of each tensor that has noise.
    leaves: Vec<Units>,
}

/// ξ and η of one tensor of the state, in state precision, in shapes that multiply it.
pub(crate) struct Units {
    pub(crate) w: Tensor,
    u: Option<Tensor>,
}

impl<'a> StepNoise<'a> {
    pub(super) fn new(driven: &'a Driven, step: Step) -> Self {
        Self {
            driven,
            step,
            leaves: vec![],
        }
    }

    /// Σ c φ of these terms: the coefficient of 1, and the rest as a tensor that multiplies one of an evaluation's.
    pub(crate) fn weight<L>(
        &mut self,
        terms: &[Term],
        leaf: usize,
        evaluated: &[Evaluated<L>],
    ) -> Result<(f64, Option<Tensor>)> {
        let others: Vec<_> = terms
            .iter()
            .filter(|term| term.on != Functional::One)
            .collect();
        if others.is_empty() {
            return Ok((constant(terms), None));
        }
        self.fill(evaluated)?;
        let Some(units) = self.leaves.get(leaf) else {
            return Ok((0.0, None));
        };
        let functionals = others
            .iter()
            .map(|term| Ok((term.c, units.value(term.on)?)));
        let functionals = functionals.collect::<Result<Vec<_>>>()?;
        let weight = match functionals.as_slice() {
            [(1.0, one)] => one.clone(),
            all => {
                let terms: Vec<_> = all.iter().map(|(c, x)| (*c, x)).collect();
                ops::combine(&terms, 1.0, Rounding::cast(self.driven.state()))?
            }
        };
        Ok((constant(terms), Some(weight)))
    }

    /// ξ and η by tensor, if any were needed.
    pub(crate) fn units(&self) -> &[Units] {
        &self.leaves
    }

    /// Channels of a row.
    pub(crate) fn channels(&self, with_noise: usize) -> usize {
        match self.driven.drive.equation.noise {
            NoiseType::Scalar => 1,
            NoiseType::General { channels } => channels,
            NoiseType::Diagonal => (0..with_noise).map(|leaf| self.features(leaf)).sum(),
        }
    }

    /// Numbers of a row of one tensor.
    pub(crate) fn features(&self, leaf: usize) -> usize {
        self.driven.shapes[leaf].dims()[1..].iter().product()
    }

    /// Draws or reads them: the diffusion, which has been evaluated, says which tensors have noise.
    fn fill<L>(&mut self, evaluated: &[Evaluated<L>]) -> Result<()> {
        if !self.leaves.is_empty() {
            return Ok(());
        }
        let mut diffusions = evaluated.iter().filter(|e| e.part == Part::Diffusion);
        let with_noise = diffusions.next().map_or(0, |e| e.value.len());
        let driven = self.driven;
        let (rows, channels) = (driven.rows, self.channels(with_noise));
        let integrals = driven.drive.method.needs_integrals();
        let noise = &driven.drive.noise;
        let drawn = noise.draw(self.step, driven.span, (rows, channels), integrals)?;
        let (w, u) = match drawn {
            Some(Drawn { w, u }) => {
                let tensor = |x: Vec<f64>| -> Result<Tensor> {
                    let x = Tensor::from_vec(x, (rows, channels), &Device::Cpu)?;
                    Ok(x.to_dtype(driven.state())?.to_device(&driven.device)?)
                };
                let u = match integrals {
                    true => Some(tensor(u)?),
                    false => None,
                };
                (tensor(w)?, u)
            }
            None => self.given((rows, channels), integrals)?,
        };
        let mut first = 0;
        for leaf in 0..with_noise {
            let features = self.features(leaf);
            let shaped = |x: &Tensor| self.shaped(x, leaf, first);
            self.leaves.push(Units {
                w: shaped(&w)?,
                u: u.as_ref().map(shaped).transpose()?,
            });
            first += features;
        }
        Ok(())
    }

    /// Those that the user gave.
    fn given(
        &self,
        (rows, channels): (usize, usize),
        integrals: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let Driven { drive, steps, .. } = self.driven;
        let Some(given) = drive.noise.given() else {
            return Err(Error::NothingKept);
        };
        given.check(*steps, rows, channels)?;
        let (n, h) = (self.step.index, self.step.h);
        let of_step = |x: &Tensor, unit: f64| -> Result<Tensor> {
            if !x.device().same_device(&self.driven.device) {
                return Err(Error::DeviceMismatch {
                    what: "increments".to_owned(),
                    expected: self.driven.device.location(),
                    got: x.device().location(),
                });
            }
            let x = x.detach().get(n)?.reshape((rows, channels))?;
            ops::combine(
                &[(1.0 / unit, &x)],
                1.0,
                Rounding::cast(self.driven.state()),
            )
        };
        let (w, u) = given.read();
        let u = match (integrals, u) {
            (false, _) => None,
            (true, Some(u)) => Some(of_step(u, h * h.sqrt())?),
            (true, None) => {
                let method = drive.method.name();
                return Err(Error::Sde(SdeDefect::NoIntegrals { method }));
            }
        };
        Ok((of_step(w, h.sqrt())?, u))
    }

    /// Numbers of rows and channels in the shape that multiplies what the diffusion returns for a tensor, whose
    /// components begin at this one.
    fn shaped(&self, x: &Tensor, leaf: usize, first: usize) -> Result<Tensor> {
        let shape = &self.driven.shapes[leaf];
        let ones = vec![1; shape.rank() - 1];
        Ok(match self.driven.drive.equation.noise {
            NoiseType::Diagonal => x
                .narrow(1, first, self.features(leaf))?
                .contiguous()?
                .reshape(shape)?,
            NoiseType::Scalar => x.reshape([&[x.dim(0)?], &ones[..]].concat())?,
            NoiseType::General { channels } => {
                x.reshape([&[x.dim(0)?], &ones[..], &[channels]].concat())?
            }
        })
    }
}

impl Units {
    /// φ(ξ, η).
    pub(crate) fn value(&self, on: Functional) -> Result<Tensor> {
        let Self { w, u } = self;
        Ok(match on {
            Functional::One => w.ones_like()?,
            Functional::W => w.clone(),
            Functional::Ww => w.sqr()?.affine(0.5, -0.5)?,
            Functional::Www => ((w.sqr()? * w)? - (w * 3.0)?)?.affine(1.0 / 6.0, 0.0)?,
            Functional::U => match u {
                Some(u) => u.clone(),
                None => return Err(Error::NothingKept),
            },
        })
    }

    /// ∂φ/∂ξ, where it is not zero.
    pub(crate) fn slope(&self, on: Functional) -> Result<Option<Tensor>> {
        let Self { w, .. } = self;
        Ok(match on {
            Functional::One | Functional::U => None,
            Functional::W => Some(w.ones_like()?),
            Functional::Ww => Some(w.clone()),
            Functional::Www => Some(w.sqr()?.affine(0.5, -0.5)?),
        })
    }
}
