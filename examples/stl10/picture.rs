//! The picture: losses, and a perturbation over time with both signs.

use std::path::Path;

use crate::data::Data;
use crate::training::{Outcome, Perturbations};
use common::chart::{colour, picture, Area, Curve, Mark, Panel, Scale, SeriesLabelPosition};
use common::{mean, Result};

/// Losses are averaged over this many iterations.
const SMOOTHING: usize = 10;

/// Writes the picture.
pub(crate) fn draw(path: &Path, data: &Data, outcomes: &[Outcome]) -> Result<()> {
    picture(path, (1200, 440), |area| {
        let (left, right) = area.split_horizontally(600);
        losses(&left, data, outcomes)?;
        perturbations(&right, outcomes)
    })
}

fn losses(area: &Area<'_>, data: &Data, outcomes: &[Outcome]) -> Result<()> {
    let curve = |(i, o): (usize, &Outcome)| {
        let window = SMOOTHING.min(o.losses.len()).max(1);
        let means = o.losses.windows(window).enumerate();
        let points = means.map(|(n, losses)| (n as f64, mean(losses)));
        Curve::new(o.dtype.name(), colour(i), points).width(2)
    };
    Panel {
        curves: outcomes.iter().enumerate().map(curve).collect(),
        ..Panel::new(
            data.name.clone(),
            "iteration",
            "cross entropy, nats (mean of 10)",
        )
    }
    .draw(area)
}

fn perturbations(area: &Area<'_>, outcomes: &[Outcome]) -> Result<()> {
    let Some(o) = outcomes.first() else {
        return Ok(());
    };
    let Perturbations {
        stable,
        unstable,
        coarse,
        learnt,
    } = &o.perturbations;
    let steps = |growth: &[(f64, f64)]| growth.len() - 1;
    let curves = [
        (
            format!("+, {} steps", steps(unstable)),
            unstable,
            Mark::Line,
        ),
        (format!("−, {} steps", steps(stable)), stable, Mark::Line),
        (
            format!("−, {} steps, as trained", steps(coarse)),
            coarse,
            Mark::DottedLine,
        ),
        (
            format!("after training, {} steps", steps(learnt)),
            learnt,
            Mark::Dashed,
        ),
    ];
    let curves = curves.into_iter().enumerate();
    let curves = curves.map(|(i, (name, growth, mark))| {
        Curve::new(name, colour(i + 1), growth.clone())
            .width(2)
            .mark(mark)
    });
    Panel {
        scales: [Scale::Linear, Scale::Decades],
        curves: curves.collect(),
        legend: SeriesLabelPosition::UpperLeft,
        ..Panel::new(
            format!(
                "1 % of noise in block 1, f = ∓Kᵀ norm(relu(Ky + b)), {}",
                o.dtype.name()
            ),
            "t",
            "distance, relative to t = 0",
        )
    }
    .draw(area)
}
