//! The picture: steps and errors of every row over its speed, and what an error costs.

use std::path::Path;

use crate::{Control, Run, DRAWN};
use common::chart::{colour, picture, Curve, Mark, Panel, RGBColor, Scale, SeriesLabelPosition};
use common::Result;

/// The runs of one precision.
pub(crate) fn draw(path: &Path, speeds: &[f64], runs: &[&Run]) -> Result<()> {
    let at = |run: &&&Run| (run.rtol / DRAWN - 1.0).abs() < 1e-6;
    let drawn: Vec<&Run> = runs.iter().filter(at).copied().collect();
    let over_speed = |run: &Run, figures: Vec<f64>| {
        let points = speeds.iter().copied().zip(figures);
        Curve::new(run.control.name(), of(run.control), points)
    };
    picture(path, (1240, 900), |area| {
        let areas = area.split_evenly((2, 2));
        let steps = drawn.iter().map(|run| {
            let steps = run.steps.iter().map(|n| *n as f64).collect();
            let curve = over_speed(run, steps).width(3);
            match run.control {
                Control::Rows => curve.mark(Mark::Dots(2)),
                Control::WorstRow | Control::Batch => curve,
            }
        });
        Panel {
            scales: [Scale::Decades; 2],
            curves: steps.collect(),
            legend: SeriesLabelPosition::LowerRight,
            ..Panel::new(
                format!("Steps by row, rtol {DRAWN:.0e}"),
                "speed of the row",
                "accepted steps",
            )
        }
        .draw(&areas[0])?;
        let errors = drawn
            .iter()
            .map(|run| over_speed(run, run.errors.clone()).mark(Mark::Dots(2)));
        Panel {
            scales: [Scale::Decades; 2],
            curves: errors.collect(),
            legend: SeriesLabelPosition::UpperLeft,
            ..Panel::new(
                format!("Errors by row, rtol {DRAWN:.0e}"),
                "speed of the row",
                "relative error at the end",
            )
        }
        .draw(&areas[1])?;
        costs(
            "Evaluations and error, one dot for each rtol",
            "evaluations by row",
            runs,
            |run| run.evaluations,
        )
        .draw(&areas[2])?;
        let name = "forward and backward, ms";
        costs("Time and error, one dot for each rtol", name, runs, |run| {
            run.ms[1]
        })
        .draw(&areas[3])
    })
}

fn costs(title: &str, name: &str, runs: &[&Run], cost: impl Fn(&Run) -> f64) -> Panel {
    let curve = |control: Control| {
        let runs = runs.iter().filter(|run| run.control == control);
        let points = runs.map(|run| (run.worst(), cost(run)));
        Curve::new(control.name(), of(control), points)
            .mark(Mark::DottedLine)
            .width(2)
    };
    Panel {
        scales: [Scale::Decades; 2],
        curves: Control::ALL.into_iter().map(curve).collect(),
        ..Panel::new(title, "relative error of the worst row", name)
    }
}

fn of(control: Control) -> RGBColor {
    colour(match control {
        Control::Rows => 0,
        Control::WorstRow => 1,
        Control::Batch => 2,
    })
}
