//! Differences of a field along one argument, and what its pull-back says along the same direction.

mod dependence;
mod numbers;

use candle_core::{DType, Device, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{Point, Subject};
use crate::error::Result;
use crate::field::Cotangents;
use crate::precision::unit_roundoff;
pub(crate) use dependence::depends_on;
pub(crate) use numbers::{cotangent_of, differing, numbers};
use numbers::{like, norm};

/// What f depends on.
#[derive(Clone, Copy)]
pub(super) enum Of {
    State(usize),
    Parameter(usize),
    Time,
}

/// The same directions in every run.
pub(super) const SEED: u64 = 0x5eed_f1e1_d000_0001;

/// A pull-back whose result has been looked at.
pub(super) type PullAt<'a> = dyn Fn(&Vec<Tensor>) -> Result<Cotangents<Vec<Tensor>>> + 'a;

/// What one difference says of the pull-back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Evidence {
    /// The velocity changes, as the pull-back says.
    Agrees,
    /// The velocity does not change here, or the argument cannot be moved.
    Silent,
    /// To be looked into.
    Doubtful,
}

/// The check of one point.
pub(super) struct Trial<'a> {
    pub(super) subject: &'a Subject<'a>,
    pub(super) point: &'a Point,
    /// The velocity there.
    pub(super) base: &'a [f64],
    pub(super) dtype: DType,
    pub(super) device: &'a Device,
}

/// Velocities on both sides of a point, and the distance between them along the argument.
struct Sides {
    plus: Vec<f64>,
    minus: Vec<f64>,
    distance: Vec<f64>,
}

impl Trial<'_> {
    /// v as tensors like the velocity.
    pub(super) fn cotangent(&self, v: &[f64], k: &[Tensor]) -> Result<Vec<Tensor>> {
        let mut rest = v;
        let of_leaf = |k: &Tensor| {
            let leaf;
            (leaf, rest) = rest.split_at(k.elem_count());
            like(leaf, k)
        };
        k.iter().map(of_leaf).collect()
    }

    /// The argument at this point.
    fn value(&self, of: Of) -> Result<Tensor> {
        Ok(match of {
            Of::State(leaf) => self.point.y[leaf].clone(),
            Of::Parameter(i) => self.subject.parameters[i].tensor.detach(),
            Of::Time => Tensor::new(self.point.t, self.device)?,
        })
    }

    /// The velocity of one tensor of the state; a diffusion may have none, or fewer numbers.
    fn of_leaf(&self, leaf: usize) -> &[f64] {
        let y = &self.point.y;
        let before: usize = y[..leaf].iter().map(Tensor::elem_count).sum();
        let own = self.base.get(before..).unwrap_or_default();
        &own[..own.len().min(y[leaf].elem_count())]
    }

    /// A direction in which the argument may move, by element.
    fn direction(&self, of: Of, x: &[f64], rng: &mut StdRng) -> Vec<f64> {
        let mut draw = |scale: f64| {
            let size = rng.random_range(0.5..1.0) * scale;
            if rng.random::<bool>() {
                size
            } else {
                -size
            }
        };
        let rms = (x.iter().map(|x| x * x).sum::<f64>() / x.len().max(1) as f64).sqrt();
        match of {
            // States that occur, or nearly: each element by a part of itself, or along its velocity.
            Of::State(leaf) => {
                let k = self.of_leaf(leaf);
                let k = k.iter().copied().chain(std::iter::repeat(0.0));
                let scale = |(x, k): (&f64, f64)| match *x {
                    0.0 => (self.subject.reach * k).abs(),
                    x => x.abs(),
                };
                let scales: Vec<_> = x.iter().zip(k).map(scale).collect();
                // A tensor of zeros that stands still says nothing of its size.
                let least = if scales.iter().all(|s| *s == 0.0) {
                    0.01
                } else {
                    0.0
                };
                scales
                    .into_iter()
                    .map(|s| draw(f64::max(s, least)))
                    .collect()
            }
            Of::Parameter(_) => {
                let least = if rms > 0.0 { rms } else { 0.1 };
                x.iter().map(|x| draw(x.abs().max(least))).collect()
            }
            Of::Time if self.subject.reach > 0.0 => vec![draw(self.subject.reach)],
            Of::Time => vec![draw(x[0].abs().max(1.0))],
        }
    }

    /// The velocities at x ± εd; `None` where the field cannot be evaluated there.
    fn sides(&self, of: Of, x: &Tensor, d: &[f64], epsilon: f64) -> Result<Option<Sides>> {
        let at = numbers(std::slice::from_ref(x))?;
        let side = |sign: f64| -> Result<Option<(Vec<f64>, Vec<f64>)>> {
            let moved = at.iter().zip(d).map(|(x, d)| x + sign * epsilon * d);
            let moved = like(&moved.collect::<Vec<_>>(), x)?;
            let k = self.velocity(of, &moved);
            let Ok(k) = k else { return Ok(None) };
            Ok(Some((numbers(&k)?, numbers(&[moved])?)))
        };
        let (Some((plus, above)), Some((minus, below))) = (side(1.0)?, side(-1.0)?) else {
            return Ok(None);
        };
        if plus.len() != self.base.len() || minus.len() != self.base.len() {
            return Ok(None);
        }
        let distance = above.iter().zip(&below).map(|(a, b)| a - b).collect();
        Ok(Some(Sides {
            plus,
            minus,
            distance,
        }))
    }

    /// The velocity with one argument moved.
    fn velocity(&self, of: Of, value: &Tensor) -> candle_core::Result<Vec<Tensor>> {
        let y = &self.point.y;
        let time = |t| self.point.time(t, self.dtype, self.device);
        match of {
            Of::State(leaf) => {
                let mut y = y.clone();
                y[leaf] = value.clone();
                self.subject.field.velocity(&time(self.point.t), &y)
            }
            Of::Parameter(i) => {
                let parameter = &self.subject.parameters[i].tensor;
                let t = time(self.point.t);
                self.subject.mover.velocity(parameter, value, &t, y)
            }
            Of::Time => {
                let t = value.to_scalar::<f64>()?;
                self.subject.field.velocity(&time(t), y)
            }
        }
    }

    /// ⟨(∂f/∂x)ᵀ v, distance⟩, and whether all of that gradient is zero or missing.
    fn along(
        &self,
        of: Of,
        pulled: &Cotangents<Vec<Tensor>>,
        distance: &[f64],
    ) -> Result<(f64, bool)> {
        let gradient = match of {
            Of::State(leaf) => pulled.y.get(leaf),
            Of::Parameter(i) => pulled.params.get(&self.subject.parameters[i].tensor),
            Of::Time => pulled.t.as_ref(),
        };
        let Some(gradient) = gradient else {
            return Ok((0.0, true));
        };
        let gradient = numbers(std::slice::from_ref(gradient))?;
        let along = gradient.iter().zip(distance).map(|(g, d)| g * d).sum();
        Ok((along, gradient.iter().all(|g| *g == 0.0)))
    }

    /// Unit roundoff of what the field computes with.
    fn unit(&self) -> f64 {
        let of = |y: &Tensor| unit_roundoff(y.dtype());
        self.point.y.iter().map(of).fold(0.0, f64::max)
    }

    /// The size of every element of the velocity, that of its tensor at least: what its roundings are measured
    /// by.
    fn own_sizes(&self) -> Vec<f64> {
        let mut rest = self.base;
        let mut sizes = Vec::with_capacity(rest.len());
        for y in &self.point.y {
            let leaf;
            (leaf, rest) = rest.split_at(y.elem_count().min(rest.len()));
            let rms = norm(leaf.iter().copied()) / (leaf.len().max(1) as f64).sqrt();
            sizes.extend(leaf.iter().map(|k| 0.5 * (k.abs() + rms)));
        }
        // What parts of an equation return beside the first.
        let rms = norm(rest.iter().copied()) / (rest.len().max(1) as f64).sqrt();
        sizes.extend(rest.iter().map(|k| 0.5 * (k.abs() + rms)));
        sizes
    }

    /// How far the argument moves, relative to its size.
    fn epsilon(&self, of: Of) -> f64 {
        let unit = match of {
            Of::State(leaf) => unit_roundoff(self.point.y[leaf].dtype()),
            Of::Parameter(_) | Of::Time => self.unit(),
        };
        unit.cbrt()
    }

    /// Whether a tensor of the state holds whole numbers and stands still: a class, a count, which is not to
    /// be moved off itself.
    pub(super) fn is_a_label(&self, leaf: usize) -> Result<bool> {
        let y = &self.point.y;
        if self.of_leaf(leaf).iter().any(|k| *k != 0.0) {
            return Ok(false);
        }
        let x = numbers(std::slice::from_ref(&y[leaf]))?;
        Ok(x.iter().any(|x| *x != 0.0) && x.iter().all(|x| x.fract() == 0.0))
    }

    /// Whether the pull-back agrees with a difference at once, which is what most do.
    pub(super) fn agrees(
        &self,
        of: Of,
        first: &[(Vec<f64>, Cotangents<Vec<Tensor>>)],
        rng: &mut StdRng,
    ) -> Result<Evidence> {
        let x = self.value(of)?;
        if x.elem_count() == 0 || x.dtype().is_int() {
            return Ok(Evidence::Silent);
        }
        let d = self.direction(of, &numbers(std::slice::from_ref(&x))?, rng);
        let Some(sides) = self.sides(of, &x, &d, self.epsilon(of))? else {
            return Ok(Evidence::Silent);
        };
        let change: Vec<_> = sides
            .plus
            .iter()
            .zip(&sides.minus)
            .map(|(a, b)| a - b)
            .collect();
        let own = self.own_sizes();
        let moves = |i: usize| change[i].abs() > 16.0 * self.unit() * own[i];
        let size = norm((0..change.len()).filter(|&i| moves(i)).map(|i| change[i]));
        let noise = 8.0 * self.unit() * norm(self.base.iter().copied());
        if size > 0.0 && noise > 0.1 * size {
            // What moves is small beside what does not, and must be looked at alone.
            return Ok(Evidence::Doubtful);
        }
        for (v, pulled) in first {
            let (along, is_zero) = self.along(of, pulled, &sides.distance)?;
            let number: f64 = v.iter().zip(&change).map(|(v, c)| v * c).sum();
            let near = (number - along).abs() <= 0.01 * size + noise;
            if !near || is_zero && size > noise {
                return Ok(Evidence::Doubtful);
            }
        }
        Ok(match size > noise {
            true => Evidence::Agrees,
            false => Evidence::Silent,
        })
    }

    /// Whether the velocity stands still over short distances and moves over longer ones only, as floor(y) does
    /// at large y: many small jumps look smooth from afar.
    pub(super) fn is_made_of_steps(&self, of: Of, rng: &mut StdRng) -> Result<bool> {
        const SHORT: f64 = 0.05;
        let x = self.value(of)?;
        let d = self.direction(of, &numbers(std::slice::from_ref(&x))?, rng);
        let epsilon = self.epsilon(of);
        if d.iter().all(|d| (epsilon * d).abs() <= SHORT) {
            return Ok(false);
        }
        let short: Vec<_> = d
            .iter()
            .map(|d| d.clamp(-SHORT / epsilon, SHORT / epsilon))
            .collect();
        let (Some(far), Some(near)) = (
            self.sides(of, &x, &d, epsilon)?,
            self.sides(of, &x, &short, epsilon)?,
        ) else {
            return Ok(false);
        };
        let moved = (0..self.base.len()).filter(|&i| far.plus[i] != far.minus[i]);
        let (mut moving, mut still) = (0, 0);
        for i in moved {
            moving += 1;
            still += usize::from(near.plus[i] == near.minus[i]);
        }
        Ok(2 * still > moving)
    }

    /// The gradient of a parameter that cannot be moved, where rows do not see each other: of one row in the
    /// batch, and of that row alone, along the latter.  They must agree, and where candle's convolutions are
    /// wrong in batches they do not.
    pub(super) fn by_row(
        &self,
        i: usize,
        pull: &PullAt<'_>,
        k: &[Tensor],
    ) -> Result<Option<(f64, f64)>> {
        let rows = |x: &Tensor| x.dims().first().copied().unwrap_or(0);
        let y = &self.point.y;
        let batch = y.first().map_or(0, rows);
        if batch < 2 || !y.iter().chain(k).all(|x| rows(x) == batch) {
            return Ok(None);
        }
        let first = |x: &[Tensor]| -> candle_core::Result<Vec<Tensor>> {
            x.iter().map(|x| x.narrow(0, 0, 1)?.contiguous()).collect()
        };
        let time = self.point.time(self.point.t, self.dtype, self.device);
        let Ok((alone, pull_alone)) = self.subject.field.vjp(&time, &first(y)?) else {
            return Ok(None);
        };
        let (alone, of_batch) = (numbers(&alone)?, numbers(&first(k)?)?);
        let off = alone.iter().zip(&of_batch).map(|(a, b)| a - b);
        if alone.len() != of_batch.len()
            || norm(off) > 1e3 * self.unit() * norm(of_batch.iter().copied())
        {
            return Ok(None);
        }
        let mut rng = StdRng::seed_from_u64(SEED);
        let (mut of_row, mut of_all) = (vec![], vec![]);
        for k in k {
            let row = like(
                &cotangent_of(&mut rng, k.elem_count() / batch),
                &k.narrow(0, 0, 1)?,
            )?;
            of_all.push(row.pad_with_zeros(0, 0, batch - 1)?);
            of_row.push(row);
        }
        let parameter = &self.subject.parameters[i].tensor;
        let (all, Ok(row)) = (pull(&of_all)?, pull_alone(&of_row)) else {
            return Ok(None);
        };
        let (Some(all), Some(row)) = (all.params.get(parameter), row.params.get(parameter)) else {
            return Ok(None);
        };
        let (all, row) = (
            numbers(std::slice::from_ref(all))?,
            numbers(std::slice::from_ref(row))?,
        );
        let size = norm(row.iter().copied());
        let off = norm(all.iter().zip(&row).map(|(a, b)| a - b));
        let sound = off <= 1e3 * self.unit() * size || !off.is_finite();
        let along: f64 = all.iter().zip(&row).map(|(a, b)| a * b).sum();
        Ok((!sound).then(|| (along / size, size)))
    }

    /// What the pull-back says and what differences say, where they contradict each other.
    pub(super) fn disagreement(
        &self,
        of: Of,
        attempt: i32,
        k: &[Tensor],
        pull: &PullAt<'_>,
        rng: &mut StdRng,
    ) -> Result<Option<(f64, f64)>> {
        let x = self.value(of)?;
        let d = self.direction(of, &numbers(std::slice::from_ref(&x))?, rng);
        let epsilon = self.epsilon(of) / 2f64.powi(attempt % 3);
        let Some(smooth) = self.smooth(of, &x, &d, epsilon, |_| true)? else {
            return Ok(None);
        };
        let drawn = cotangent_of(rng, self.base.len());
        let v: Vec<_> = drawn
            .iter()
            .zip(&smooth.doubt)
            .zip(&smooth.change)
            .map(|((drawn, doubt), change)| match doubt {
                Some(_) if *change != 0.0 => *drawn,
                _ => 0.0,
            })
            .collect();
        let pulled = pull(&self.cotangent(&v, k)?)?;
        let (along, _) = self.along(of, &pulled, &smooth.distance)?;
        let number: f64 = v.iter().zip(&smooth.change).map(|(v, c)| v * c).sum();
        let on = |x: &[f64]| norm(x.iter().zip(&v).map(|(x, v)| x * v));
        let size = on(&smooth.change);
        let doubts = smooth.doubt.iter().zip(&v);
        let doubt = norm(doubts.filter_map(|(doubt, v)| Some(doubt.as_ref()? * v)));
        let noise = 8.0 * self.unit() * on(self.base);
        if !along.is_finite() || size <= 4.0 * (doubt + noise) {
            return Ok(None);
        }
        let share = match unit_roundoff(self.dtype).max(self.unit()) {
            u if u > 1e-5 => 0.1,
            _ => 0.03,
        };
        let far = (number - along).abs() > share * size + 6.0 * (doubt + noise);
        let scale = norm(smooth.distance.iter().copied());
        Ok(far.then(|| (along / scale, number / scale)))
    }

    /// The change of every element `among` these between x − εd/4 and x + εd/4, and which of them are smooth.
    fn smooth(
        &self,
        of: Of,
        x: &Tensor,
        d: &[f64],
        epsilon: f64,
        among: impl Fn(usize) -> bool,
    ) -> Result<Option<Smooth>> {
        let (Some(far), Some(middle), Some(near)) = (
            self.sides(of, x, d, epsilon)?,
            self.sides(of, x, d, 0.5 * epsilon)?,
            self.sides(of, x, d, 0.25 * epsilon)?,
        ) else {
            return Ok(None);
        };
        let unit = self.unit();
        let own = self.own_sizes();
        let (mut change, mut doubt) = (vec![], vec![]);
        let (mut moving, mut kept) = (0, 0);
        for (i, base) in self.base.iter().enumerate() {
            if !among(i) {
                change.push(0.0);
                doubt.push(None);
                continue;
            }
            let wide = 0.25 * (far.plus[i] - far.minus[i]);
            let between = 0.5 * (middle.plus[i] - middle.minus[i]);
            let narrow = near.plus[i] - near.minus[i];
            let (up, down) = (near.plus[i] - base, base - near.minus[i]);
            let noise = 8.0 * unit * own[i];
            let size = wide.abs().max(narrow.abs());
            let moves = size > noise || !size.is_finite();
            let smooth = (wide - narrow).abs() <= 0.05 * size + noise
                && (between - narrow).abs() <= 0.05 * size + noise
                && (up - down).abs() <= 0.1 * size + 2.0 * noise;
            moving += usize::from(moves);
            kept += usize::from(moves && smooth);
            change.push(if smooth && narrow.abs() > 0.25 * noise {
                narrow
            } else {
                0.0
            });
            doubt.push(smooth.then(|| (wide - narrow).abs()));
        }
        // Functions that are constant between jumps, roundings for one, have no derivative to compare with.
        if 2 * kept < moving || kept == 0 {
            return Ok(None);
        }
        Ok(Some(Smooth {
            change,
            doubt,
            distance: near.distance,
        }))
    }
}

/// What differences say, element by element.
struct Smooth {
    change: Vec<f64>,
    /// How far the two step sizes are apart; `None` where an element is not smooth.
    doubt: Vec<Option<f64>>,
    distance: Vec<f64>,
}
