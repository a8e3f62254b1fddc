//! The picture: samples given a series, data and the prior in the plane, and the parts of the loss.

use std::path::Path;

use crate::data::Data;
use crate::model::{by_row, Losses};
use crate::Run;
use common::chart::{colour, picture, Area, Curve, Mark, Panel, Scale, SeriesLabelPosition, TRUTH};
use common::Result;

/// Writes the picture of one run, whose samples are given this series.
pub(crate) fn draw(path: &Path, (data, series): (&Data, usize), run: &Run) -> Result<()> {
    let truth = by_row(&data.values)?;
    picture(path, (1260, 760), |area| {
        let (top, bottom) = area.split_vertically(380);
        for (i, part) in top.split_evenly((1, 3)).iter().enumerate() {
            let over_time = |path: &[Vec<f64>]| {
                let points = data.times.iter().zip(path);
                points.map(|(t, x)| (*t, x[i])).collect::<Vec<_>>()
            };
            let mut curves: Vec<_> = run
                .samples
                .iter()
                .map(|sample| Curve::new("", colour(5), over_time(sample)))
                .collect();
            let points = Curve::new("observed", colour(1), over_time(&truth[series]));
            curves.push(points.mark(Mark::Dots(3)));
            let name = ["x", "y", "z"][i];
            Panel {
                curves,
                legend: SeriesLabelPosition::UpperRight,
                ..Panel::new(
                    format!("{name}: 16 samples given a held-out series"),
                    "t",
                    name,
                )
            }
            .draw(part)?;
        }
        let parts = bottom.split_evenly((1, 3));
        plane(
            &parts[0],
            "Data",
            &truth[..run.dreams.len().min(truth.len())],
        )?;
        plane(&parts[1], "Samples of the prior", &run.dreams)?;
        let of = |figure: fn(&Losses) -> f64, name: &str, i: usize| {
            let figures = run.losses.iter().enumerate();
            let figures = figures.map(|(n, l)| (n as f64, figure(l)));
            // A density may be above one, and has no place on this axis then.
            Curve::new(name, colour(i), figures.filter(|(_, y)| *y > 0.0))
        };
        Panel {
            curves: vec![
                of(|l| l.points, "−log p", 1),
                of(|l| l.path, "KL of the path", 0),
                of(|l| l.start, "KL of z(0)", 2),
            ],
            scales: [Scale::Linear, Scale::Decades],
            legend: SeriesLabelPosition::UpperRight,
            ..Panel::new("Loss of a series", "update", "nats")
        }
        .draw(&parts[2])
    })
}

/// Paths in the plane of the first and the third coordinate.
fn plane(area: &Area<'_>, title: &str, paths: &[Vec<Vec<f64>>]) -> Result<()> {
    let curve = |(i, path): (usize, &Vec<Vec<f64>>)| {
        let shade = if i == 0 { colour(1) } else { TRUTH };
        Curve::new("", shade, path.iter().map(|x| (x[0], x[2])))
    };
    let mut curves: Vec<_> = paths.iter().enumerate().map(curve).collect();
    curves.reverse();
    Panel {
        curves,
        ranges: [Some(-3.0..3.0), Some(-3.0..3.0)],
        ..Panel::new(title, "x", "z")
    }
    .draw(area)
}
