//! The picture: which speaker was taken for which, and accuracy and loss by epoch.

use std::path::Path;

use crate::data::CLASSES;
use crate::training::{Epoch, Outcome};
use common::chart::{colour, picture, Area, Curve, Heat, Panel, SeriesLabelPosition};
use common::Result;

/// Writes the picture.
pub(crate) fn draw(path: &Path, outcomes: &[Outcome]) -> Result<()> {
    picture(path, (1200, 560), |area| {
        let (left, right) = area.split_horizontally(600);
        confusions(&left, outcomes)?;
        let (top, bottom) = right.split_vertically(280);
        let legend = SeriesLabelPosition::LowerRight;
        let accuracies = by_epoch("test", "accuracy, %", outcomes, |e| 100.0 * e.accuracy);
        Panel {
            legend,
            ..accuracies
        }
        .draw(&top)?;
        by_epoch("training", "cross entropy, nats", outcomes, |e| e.loss).draw(&bottom)
    })
}

fn confusions(area: &Area<'_>, outcomes: &[Outcome]) -> Result<()> {
    let Some(outcome) = outcomes.first() else {
        return Ok(());
    };
    let edges = -0.5..CLASSES as f64 - 0.5;
    let title = format!(
        "370 test utterances, {}, {:.1} % right",
        outcome.dtype.name(),
        100.0 * outcome.accuracy()
    );
    Panel {
        heat: Some(Heat {
            x: edges.clone(),
            y: edges,
            values: outcome.confusion.clone(),
            name: "utterances".to_owned(),
            limits: None,
            numbers: true,
        }),
        ..Panel::new(title, "taken for speaker", "true speaker")
    }
    .draw(area)
}

/// A curve for each run, in the colour of its precision; the first of each is named.
fn by_epoch(title: &str, name: &str, outcomes: &[Outcome], of: fn(&Epoch) -> f64) -> Panel {
    let mut seen = vec![];
    let curves = outcomes.iter().map(|o| {
        let place = seen.iter().position(|dtype| *dtype == o.dtype);
        let label = match place {
            Some(_) => "",
            None => o.dtype.name(),
        };
        let place = place.unwrap_or(seen.len());
        if place == seen.len() {
            seen.push(o.dtype);
        }
        let points = o.epochs.iter().enumerate();
        let points = points.map(|(n, e)| ((n + 1) as f64, of(e)));
        Curve::new(label, colour(place), points)
    });
    Panel {
        curves: curves.collect(),
        ..Panel::new(title, "epoch", name)
    }
}
