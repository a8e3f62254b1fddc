//! The picture: what was taken for what, and accuracy by epoch.

use std::path::Path;

use crate::common::chart::{colour, picture, Area, Curve, Heat, Mark, Panel, SeriesLabelPosition};
use crate::common::Result;
use crate::data::{Data, CLASSES};
use crate::training::Outcome;

/// Writes the picture.
pub(crate) fn draw(path: &Path, data: &Data, outcomes: &[Outcome]) -> Result<()> {
    picture(path, (1200, 560), |area| {
        let (left, right) = area.split_horizontally(620);
        confusions(&left, data, outcomes)?;
        let (top, bottom) = right.split_vertically(280);
        accuracies(&top, outcomes)?;
        losses(&bottom, outcomes)
    })
}

fn confusions(area: &Area<'_>, data: &Data, outcomes: &[Outcome]) -> Result<()> {
    let Some(outcome) = outcomes.first() else {
        return Ok(());
    };
    let edges = -0.5..CLASSES as f64 - 0.5;
    // Shares of a row are coloured, and counts written.
    let title = format!(
        "{} validation images, {}, {:.1} % right",
        data.validation.len(),
        outcome.dtype.name(),
        100.0 * outcome.accuracy()
    );
    Panel {
        heat: Some(Heat {
            x: edges.clone(),
            y: edges,
            values: outcome.confusion.clone(),
            name: "images".to_owned(),
            limits: None,
            numbers: true,
        }),
        ..Panel::new(title, "taken for", "true digit")
    }
    .draw(area)
}

fn accuracies(area: &Area<'_>, outcomes: &[Outcome]) -> Result<()> {
    let curve = |(i, o): (usize, &Outcome)| {
        let points = o.epochs.iter().enumerate();
        let points = points.map(|(n, e)| ((n + 1) as f64, 100.0 * e.accuracy));
        Curve::new(o.dtype.name(), colour(i), points).mark(Mark::DottedLine)
    };
    Panel {
        curves: outcomes.iter().enumerate().map(curve).collect(),
        legend: SeriesLabelPosition::LowerRight,
        ..Panel::new("validation", "epoch", "accuracy, %")
    }
    .draw(area)
}

fn losses(area: &Area<'_>, outcomes: &[Outcome]) -> Result<()> {
    let curve = |(i, o): (usize, &Outcome)| {
        let points = o.epochs.iter().enumerate();
        let points = points.map(|(n, e)| ((n + 1) as f64, e.loss));
        Curve::new(o.dtype.name(), colour(i), points).mark(Mark::DottedLine)
    };
    Panel {
        curves: outcomes.iter().enumerate().map(curve).collect(),
        ..Panel::new("training", "epoch", "cross entropy, nats")
    }
    .draw(area)
}
