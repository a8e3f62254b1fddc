//! The picture: strong errors on both problems, and weak errors, over the step.

use std::path::Path;

use crate::problem::Problem;
use crate::Run;
use common::chart::{colour, picture, Curve, Mark, Panel, Scale, SeriesLabelPosition, TRUTH};
use common::Result;

pub(crate) fn draw(path: &Path, runs: &[Run]) -> Result<()> {
    picture(path, (1500, 820), |area| {
        let areas = area.split_evenly((1, 3));
        for (problem, area) in Problem::ALL.into_iter().zip(&areas) {
            panel(
                format!("Strong error, {}", problem.name()),
                "root mean square of the error at t = 1",
                runs.iter().filter(|run| run.problem == problem),
                |run| run.strong.clone(),
            )
            .draw(area)?;
        }
        panel(
            "Weak error, GBM".to_owned(),
            "|E Y(1)² − exact|",
            runs.iter().filter(|run| run.problem == Problem::Gbm),
            |run| {
                // What is below its sampling error says nothing.
                let known = run.weak.iter().map(|(error, deviation)| match error.abs() {
                    error if error > 3.0 * deviation => error,
                    _ => f64::NAN,
                });
                known.collect()
            },
        )
        .draw(&areas[2])
    })
}

fn panel<'r>(
    title: String,
    name: &str,
    runs: impl Iterator<Item = &'r Run>,
    errors: impl Fn(&Run) -> Vec<f64>,
) -> Panel {
    let mut curves = vec![];
    let (mut smallest, mut largest) = (f64::MAX, 0.0f64);
    let mut ends = (1.0, 1.0);
    for (i, run) in runs.enumerate() {
        let errors = errors(run);
        let h = run.steps.iter().map(|n| 1.0 / *n as f64);
        largest = errors.iter().copied().fold(largest, f64::max);
        smallest = errors.iter().copied().fold(smallest, f64::min);
        ends = (
            1.0 / run.steps[run.steps.len() - 1] as f64,
            1.0 / run.steps[0] as f64,
        );
        let curve = Curve::new(run.name(), colour(i), h.zip(errors));
        // There are six colours.
        let mark = if i < 6 {
            Mark::DottedLine
        } else {
            Mark::Dots(4)
        };
        curves.push(curve.mark(mark).width(2));
    }
    for order in [0.5, 1.0, 1.5] {
        let at = |h: f64| (h, largest * (h / ends.1).powf(order));
        let line = Curve::new(format!("h^{order}"), TRUTH, [at(ends.0), at(ends.1)]);
        curves.push(line.mark(Mark::Dashed));
    }
    Panel {
        scales: [Scale::Decades; 2],
        curves,
        // Below everything there is room for the legend.
        ranges: [None, Some(smallest * 5e-3..largest * 1.5)],
        legend: SeriesLabelPosition::LowerRight,
        ..Panel::new(title, "h", name)
    }
}
