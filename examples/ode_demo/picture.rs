//! The picture: trajectories over time, phase portrait, losses.

use std::path::Path;

use candle_core::DType;

use crate::spiral::Trajectory;
use crate::training::Outcome;
use common::chart::{colour, picture, Area, Curve, Panel, Scale, TRUTH};
use common::Result;

/// Losses are averaged over this many iterations, to show the trend under the noise.
const SMOOTHING: usize = 20;

/// Writes the picture.
pub(crate) fn draw(path: &Path, data: &Trajectory, outcomes: &[Outcome]) -> Result<()> {
    let truth = data.states.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    picture(path, (1200, 860), |area| {
        let (top, bottom) = area.split_vertically(380);
        let (left, right) = bottom.split_horizontally(600);
        over_time(&top, data, &truth, outcomes)?;
        portrait(&left, &truth, outcomes)?;
        losses(&right, outcomes)
    })
}

/// Curves of the truth and of every outcome; only some are named in the legend.
fn curves<'a>(
    truth: Vec<(f64, f64)>,
    learnt: impl Fn(&'a Outcome) -> Vec<(f64, f64)>,
    outcomes: &'a [Outcome],
    named: bool,
) -> Vec<Curve> {
    let name = |name: &str| {
        if named {
            name.to_owned()
        } else {
            String::new()
        }
    };
    let outcomes = outcomes.iter().enumerate();
    let learnt = outcomes.map(|(i, o)| Curve::new(name(o.dtype.name()), colour(i), learnt(o)));
    let truth = Curve::new(name("truth"), TRUTH, truth).width(4);
    std::iter::once(truth).chain(learnt).collect()
}

fn over_time(
    area: &Area<'_>,
    data: &Trajectory,
    truth: &[Vec<f64>],
    outcomes: &[Outcome],
) -> Result<()> {
    let component = |states: &[Vec<f64>], i: usize| -> Vec<(f64, f64)> {
        let points = data.times.points().iter().zip(states);
        points.map(|(t, y)| (*t, y[i])).collect()
    };
    let both = (0..2).flat_map(|i| {
        let learnt = |o: &Outcome| component(&o.states, i);
        curves(component(truth, i), learnt, outcomes, i == 0)
    });
    Panel {
        curves: both.collect(),
        ..Panel::new("y' = y³A, learnt in mixed precision", "t", "y₁, y₂")
    }
    .draw(area)
}

fn portrait(area: &Area<'_>, truth: &[Vec<f64>], outcomes: &[Outcome]) -> Result<()> {
    let plane = |states: &[Vec<f64>]| states.iter().map(|y| (y[0], y[1])).collect();
    Panel {
        curves: curves(plane(truth), |o| plane(&o.states), outcomes, false),
        ..Panel::new("phase portrait", "y₁", "y₂")
    }
    .draw(area)
}

fn losses(area: &Area<'_>, outcomes: &[Outcome]) -> Result<()> {
    let curve =
        |(i, o): (usize, &Outcome)| Curve::new(o.dtype.name(), colour(i), smoothed(&o.losses));
    Panel {
        scales: [Scale::Linear, Scale::Decades],
        curves: outcomes.iter().enumerate().map(curve).collect(),
        ..Panel::new("loss (mean of 20)", "iteration", "L1 loss")
    }
    .draw(area)
}

fn smoothed(losses: &[f64]) -> Vec<(f64, f64)> {
    let window = SMOOTHING.min(losses.len());
    let mean = |(i, window): (usize, &[f64])| (i as f64, common::mean(window));
    losses
        .windows(window.max(1))
        .enumerate()
        .map(mean)
        .collect()
}
