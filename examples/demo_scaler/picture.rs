//! The picture: the scale of the adjoint over time.

use std::path::Path;

use crate::Outcome;
use common::chart::{colour, picture, Curve, Panel, Scale, SeriesLabelPosition};
use common::Result;

/// Steps of S over t, which the backward pass goes through from right to left.
pub(crate) fn draw(path: &Path, outcomes: &[Outcome]) -> Result<()> {
    let curve = |(i, o): (usize, &Outcome)| {
        let mut points = vec![];
        for (n, &(t, scale)) in o.scales.iter().enumerate() {
            if let Some(&(_, before)) = n.checked_sub(1).and_then(|n| o.scales.get(n)) {
                points.push((t, before));
            }
            points.push((t, scale));
        }
        if let Some(&(_, scale)) = o.scales.last() {
            points.push((0.0, scale));
        }
        Curve::new(o.case.name, colour(i), points).width(2)
    };
    picture(path, (900, 520), |area| {
        Panel {
            scales: [Scale::Linear, Scale::Doublings],
            curves: outcomes.iter().enumerate().map(curve).collect(),
            legend: SeriesLabelPosition::UpperRight,
            ..Panel::new(
                "the scale S follows the adjoint, from t = 1 back to 0",
                "time t",
                "scale S of the adjoint",
            )
        }
        .draw(area)
    })
}
