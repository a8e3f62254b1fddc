//! The picture: what was taken for what, and by epoch accuracy, loss, and evaluations where they change.

use std::path::Path;

use crate::training::{Epoch, Outcome};
use common::chart::{colour, picture, Area, Curve, Heat, Mark, Panel, SeriesLabelPosition};
use common::mnist::{Data, CLASSES};
use common::Result;

/// Writes the picture.
pub(crate) fn draw(path: &Path, data: &Data, outcomes: &[Outcome]) -> Result<()> {
    let evaluations = |o: &Outcome| o.epochs.iter().map(|e| e.evaluations).collect::<Vec<_>>();
    let change = outcomes.iter().any(|o| {
        let all = evaluations(o);
        all.iter().any(|n| *n != all[0])
    });
    let height = if change { 720 } else { 560 };
    picture(path, (1200, height), |area| {
        let (left, right) = area.split_horizontally(620);
        confusions(&left, data, outcomes)?;
        let areas = right.split_evenly((if change { 3 } else { 2 }, 1));
        accuracies(&areas[0], outcomes)?;
        by_epoch("training", "cross entropy, nats", outcomes, |e| e.loss).draw(&areas[1])?;
        let name = "evaluations by image";
        let evaluations = Panel {
            legend: SeriesLabelPosition::LowerRight,
            ..by_epoch("cost, forward", name, outcomes, |e| e.evaluations)
        };
        areas.get(2).map_or(Ok(()), |area| evaluations.draw(area))
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
        data.validation.count(),
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
    let legend = SeriesLabelPosition::LowerRight;
    let accuracies = by_epoch("validation", "accuracy, %", outcomes, |e| {
        100.0 * e.accuracy
    });
    Panel {
        legend,
        ..accuracies
    }
    .draw(area)
}

fn by_epoch(title: &str, name: &str, outcomes: &[Outcome], of: fn(&Epoch) -> f64) -> Panel {
    let curve = |(i, o): (usize, &Outcome)| {
        let points = o.epochs.iter().enumerate();
        let points = points.map(|(n, e)| ((n + 1) as f64, of(e)));
        Curve::new(o.dtype.name(), colour(i), points).mark(Mark::DottedLine)
    };
    Panel {
        curves: outcomes.iter().enumerate().map(curve).collect(),
        ..Panel::new(title, "epoch", name)
    }
}
