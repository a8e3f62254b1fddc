//! The picture: losses, trajectories, and the field that was learnt.

use std::path::Path;

use crate::network::{START, TARGET};
use crate::training::{Arrow, Outcome, GRID, SQUARE};
use common::chart::{
    colour, picture, Area, Arrows, Curve, Heat, Mark, Panel, RGBColor, Scale, SeriesLabelPosition,
};
use common::Result;

const ENDS: RGBColor = RGBColor(40, 40, 40);
/// On the colours of speeds.
const ARROWS: RGBColor = RGBColor(235, 235, 235);
const PATH: RGBColor = RGBColor(213, 94, 0);

/// Writes the picture.
pub(crate) fn draw(path: &Path, outcomes: &[Outcome]) -> Result<()> {
    picture(path, (1290, 420), |area| {
        let (left, right) = area.split_horizontally(800);
        let (losses_at, plane_at) = left.split_horizontally(410);
        losses(&losses_at, outcomes)?;
        trajectories(&plane_at, outcomes)?;
        field(&right, outcomes)
    })
}

fn losses(area: &Area<'_>, outcomes: &[Outcome]) -> Result<()> {
    let curve = |(i, o): (usize, &Outcome)| {
        let points = o.losses.iter().enumerate();
        Curve::new(
            o.dtype.name(),
            colour(i),
            points.map(|(n, l)| (n as f64, *l)),
        )
    };
    Panel {
        scales: [Scale::Linear, Scale::Decades],
        curves: outcomes.iter().enumerate().map(curve).collect(),
        ..Panel::new("loss", "epoch", "½ ‖y(1) − (1, 1)‖²")
    }
    .draw(area)
}

/// Where it starts and where it is to end.
fn ends() -> Curve {
    let points = [START, TARGET].map(|[x, y]| (x, y));
    Curve::new("start, target", ENDS, points).mark(Mark::Dots(5))
}

fn trajectories(area: &Area<'_>, outcomes: &[Outcome]) -> Result<()> {
    let curve = |(i, o): (usize, &Outcome)| {
        // They lie on each other: wide ones first.
        let width = 3 * (outcomes.len() - i) as u32 - 2;
        Curve::new(o.dtype.name(), colour(i), o.trajectory.clone()).width(width)
    };
    let mut curves: Vec<_> = outcomes.iter().enumerate().map(curve).collect();
    curves.push(ends());
    Panel {
        curves,
        legend: SeriesLabelPosition::UpperLeft,
        ..Panel::new("trajectories, 100 steps of RK4", "y₁", "y₂")
    }
    .draw(area)
}

fn field(area: &Area<'_>, outcomes: &[Outcome]) -> Result<()> {
    let Some(outcome) = outcomes.first() else {
        return Ok(());
    };
    let [low, high] = SQUARE;
    let speed = |(_, v): &Arrow| v.0.hypot(v.1);
    let length = 0.7 * (high - low) / GRID as f64;
    let arrow = |point: &Arrow| {
        let (at, v) = *point;
        let scale = length / speed(point).max(f64::MIN_POSITIVE);
        let (dx, dy) = (v.0 * scale, v.1 * scale);
        ((at.0 - dx / 2.0, at.1 - dy / 2.0), (dx, dy))
    };
    let row = |points: &[Arrow]| points.iter().map(speed).collect();
    let title = format!("velocity learnt in {}", outcome.dtype.name());
    Panel {
        ranges: [Some(low..high), Some(low..high)],
        heat: Some(Heat {
            x: low..high,
            y: low..high,
            values: outcome.field.chunks(GRID).map(row).collect(),
            name: "speed ‖f(y)‖".to_owned(),
            limits: None,
            numbers: false,
        }),
        arrows: vec![Arrows {
            colour: ARROWS,
            arrows: outcome.field.iter().map(arrow).collect(),
        }],
        curves: vec![
            Curve::new("", PATH, outcome.trajectory.clone()).width(2),
            Curve {
                name: String::new(),
                colour: PATH,
                ..ends()
            },
        ],
        ..Panel::new(title, "y₁", "y₂")
    }
    .draw(area)
}
