//! The picture: where backward steps were tried, and evaluations by update.

use std::path::Path;

use candle_diffeq::metrics::BackwardAttempt;

use crate::vowels::Trained;
use crate::way::{Cost, Way};
use common::chart::{colour, picture, Bars, Curve, Panel, SeriesLabelPosition};
use common::Result;

/// Bins of a histogram: one for each interval of the path.
const BINS: usize = 28;

/// Two histograms on the left, evaluations on the right.
pub(crate) fn draw(
    path: &Path,
    gradients: &[(Way, &Cost)],
    end: f64,
    trained: &[Trained],
) -> Result<()> {
    picture(path, (1300, 640), |area| {
        let (left, right) = area.split_horizontally(700);
        let parts = left.split_evenly((gradients.len().max(1), 1));
        for (part, (way, cost)) in parts.iter().zip(gradients) {
            let title = format!(
                "{}: {} accepted, {} rejected",
                way.name(),
                cost.accepted,
                cost.rejected
            );
            Panel {
                bars: vec![
                    bars("attempts", 0, &cost.attempts, end, |_| true),
                    bars("rejected", 1, &cost.attempts, end, |a| !a.accepted),
                ],
                legend: SeriesLabelPosition::UpperLeft,
                ..Panel::new(title, "t", "attempts")
            }
            .draw(part)?;
        }
        let mut seen = vec![];
        let curves = trained.iter().map(|t| {
            let known = seen.iter().position(|way| *way == t.way);
            let place = known.unwrap_or(seen.len());
            if known.is_none() {
                seen.push(t.way);
            }
            let label = known.map_or(t.way.name(), |_| "");
            let points = t.backward.iter().enumerate();
            Curve::new(label, colour(place), points.map(|(i, n)| (i as f64, *n)))
        });
        Panel {
            curves: curves.collect(),
            ..Panel::new("training, 1e-3, 1e-6", "update", "backward evaluations")
        }
        .draw(&right)
    })
}

/// How many attempts begin in every bin of [0, end].
fn bars(
    name: &str,
    place: usize,
    attempts: &[BackwardAttempt],
    end: f64,
    counts: impl Fn(&BackwardAttempt) -> bool,
) -> Bars {
    let width = end / BINS as f64;
    let mut heights = [0.0; BINS];
    for attempt in attempts.iter().filter(|a| counts(a)) {
        let bin = (0.5 * (attempt.from + attempt.to) / width) as usize;
        heights[bin.min(BINS - 1)] += 1.0;
    }
    let bar = |(i, height): (usize, &f64)| (i as f64 * width, (i + 1) as f64 * width, *height);
    Bars {
        name: name.to_owned(),
        colour: colour(place),
        bars: heights.iter().enumerate().map(bar).collect(),
    }
}
