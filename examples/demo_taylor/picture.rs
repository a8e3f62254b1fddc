//! The picture: both remainders of the MLP over h.

use std::path::Path;

use crate::taylor::Towards;
use crate::Test;
use common::chart::{colour, picture, Curve, Mark, Panel, Scale, SeriesLabelPosition, TRUTH};
use common::Result;

/// Columns: what is moved.  Rows: the numbers of steps.
pub(crate) fn draw(path: &Path, tests: &[Test]) -> Result<()> {
    let drawn = || tests.iter().filter(|t| t.problem.starts_with("MLP"));
    let mut steps: Vec<usize> = drawn().map(|t| t.steps).collect();
    steps.sort_unstable();
    steps.dedup();
    picture(path, (1200, 430 * steps.len() as u32), |area| {
        let areas = area.split_evenly((steps.len(), Towards::ALL.len()));
        let panels = steps
            .iter()
            .flat_map(|n| Towards::ALL.map(|towards| (*n, towards)));
        for ((n, towards), area) in panels.zip(&areas) {
            let of_panel = drawn().filter(|t| (t.steps, t.towards) == (n, towards));
            Panel {
                scales: [Scale::Decades; 2],
                curves: curves(&of_panel.collect::<Vec<_>>()),
                legend: SeriesLabelPosition::LowerRight,
                ..Panel::new(
                    format!("MLP, rk4, {n} steps, towards {}", towards.name()),
                    "length h of the move",
                    "E₀ (dashed), E₁",
                )
            }
            .draw(area)?;
        }
        Ok(())
    })
}

fn curves(tests: &[&Test]) -> Vec<Curve> {
    let mut curves = vec![];
    for (i, test) in tests.iter().enumerate() {
        let points = |order: usize| {
            let points = test.remainders.points.iter();
            points.map(move |p| (p.h, p.remainders[order]))
        };
        if i == 0 {
            // h² through the first point of E₁.
            if let Some((h0, e)) = points(1).next() {
                let square = points(1).map(|(h, _)| (h, e * (h / h0).powi(2)));
                curves.push(Curve::new("slope 2", TRUTH, square).width(4));
            }
        }
        let name = test.dtype.name();
        curves.push(Curve::new("", colour(i), points(0)).mark(Mark::Dashed));
        curves.push(Curve::new(name, colour(i), points(1)).width(2));
    }
    curves
}
