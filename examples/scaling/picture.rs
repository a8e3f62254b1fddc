//! The picture: sums, steps, efficiency, and rows that are needed.

use std::path::Path;

use crate::job::{Point, WORKLOADS};
use crate::model::Linear;
use crate::{networks, Measured, EFFICIENT, LAYOUTS};
use common::chart::{colour, picture, Curve, Mark, Panel, Scale, SeriesLabelPosition};
use common::Result;

/// Ranks that are drawn.
fn ranks() -> impl Iterator<Item = usize> {
    (1..=10).map(|e| 1 << e)
}

fn line(points: &[Point]) -> Vec<(f64, f64)> {
    points.iter().map(|p| (p.x, p.y)).collect()
}

/// Writes the picture.
pub(crate) fn draw(path: &Path, measured: &Measured) -> Result<()> {
    picture(path, (1100, 820), |area| {
        let areas = area.split_evenly((2, 2));
        sums(&measured.sums, measured.sum).draw(&areas[0])?;
        steps(&measured.widths).draw(&areas[1])?;
        efficiency(measured).draw(&areas[2])?;
        rows(measured).draw(&areas[3])
    })
}

fn sums(points: &[Point], fit: Linear) -> Panel {
    let fitted = points.iter().map(|p| (p.x, fit.at(p.x)));
    Panel {
        scales: [Scale::Decades, Scale::Decades],
        legend: SeriesLabelPosition::UpperLeft,
        curves: vec![
            Curve::new("measured", colour(0), line(points)).mark(Mark::Dots(4)),
            Curve::new("α + β · bytes", colour(1), fitted),
        ],
        ..Panel::new("sum over 2 ranks of this machine", "bytes", "ms")
    }
}

fn steps(widths: &[Vec<Point>]) -> Panel {
    let curve = |(i, points): (usize, &Vec<Point>)| {
        Curve::new(LAYOUTS[i].name(), colour(i), line(points)).mark(Mark::DottedLine)
    };
    Panel {
        scales: [Scale::Decades, Scale::Decades],
        legend: SeriesLabelPosition::UpperLeft,
        curves: widths.iter().enumerate().map(curve).collect(),
        ..Panel::new(
            "training step, 64-w-w-64, 64 rows, 4 × rk4",
            "bytes of θ",
            "ms",
        )
    }
}

/// The workload's name up to the colon, on a network: solid as measured, dots or dashes as assumed.
fn curves(measured: &Measured, of: impl Fn(usize, usize, usize) -> f64) -> Vec<Curve> {
    let mut curves = vec![];
    for (w, workload) in WORKLOADS.iter().enumerate() {
        for (k, mark) in [Mark::Line, Mark::Dashed, Mark::DottedLine]
            .into_iter()
            .enumerate()
        {
            let name = workload.name.split(':').next().unwrap_or_default();
            let name = [
                format!("{name}, sums as here"),
                format!("{name}, 10 Gbit"),
                format!("{name}, 100 Gbit"),
            ];
            let points = ranks().map(|n| (n as f64, of(w, k, n)));
            curves.push(Curve::new(name[k].clone(), colour(w), points).mark(mark));
        }
    }
    debug_assert_eq!(networks(measured.sum).len(), 3);
    curves
}

fn efficiency(measured: &Measured) -> Panel {
    let networks = networks(measured.sum);
    let of = |w: usize, k: usize, n: usize| {
        let step = measured.rows[w].at(WORKLOADS[w].rows as f64);
        100.0 * networks[k].efficiency(n, measured.bytes[w], step)
    };
    Panel {
        scales: [Scale::Doublings, Scale::Linear],
        ranges: [None, Some(0.0..105.0)],
        legend: SeriesLabelPosition::LowerLeft,
        curves: curves(measured, of),
        ..Panel::new(
            "model: every rank has the workload's rows",
            "ranks, one thread each",
            "efficiency, %",
        )
    }
}

fn rows(measured: &Measured) -> Panel {
    let networks = networks(measured.sum);
    let of = |w: usize, k: usize, n: usize| {
        networks[k].rows(n, measured.bytes[w], measured.rows[w], EFFICIENT)
    };
    let mut curves = curves(measured, of);
    curves.iter_mut().for_each(|c| c.name.clear());
    Panel {
        scales: [Scale::Doublings, Scale::Decades],
        curves,
        ..Panel::new(
            "model: rows of a rank for 90 %",
            "ranks, one thread each",
            "rows",
        )
    }
}
