//! The picture: bands of the prior and of the posterior around the points, and the loss.

use std::path::Path;

use crate::model::Data;
use crate::Run;
use common::chart::{colour, picture, Curve, Mark, Panel, SeriesLabelPosition, TRUTH};
use common::Result;

pub(crate) fn draw(path: &Path, data: &Data, run: &Run) -> Result<()> {
    picture(path, (1240, 760), |area| {
        let (top, bottom) = area.split_vertically(460);
        let mut curves = vec![];
        let bands = [
            ("prior", &run.prior, TRUTH),
            ("posterior", &run.posterior, colour(0)),
        ];
        for (name, bands, colour) in bands {
            for (i, band) in ["5 % to 95 %", "", "median", "", ""]
                .into_iter()
                .enumerate()
            {
                let points = run.times.iter().zip(bands).map(|(t, q)| (*t, q[i]));
                let label = match band {
                    "" => String::new(),
                    band => format!("{name}, {band}"),
                };
                let mark = if i == 2 { Mark::Line } else { Mark::Dashed };
                let width = if i == 2 { 3 } else { 1 + u32::from(i % 2 == 1) };
                curves.push(Curve::new(label, colour, points).mark(mark).width(width));
            }
        }
        for sample in &run.samples {
            let points = run.times.iter().copied().zip(sample.iter().copied());
            curves.push(Curve::new("", colour(5), points));
        }
        let points = data.times.iter().copied().zip(data.values.iter().copied());
        curves.push(Curve::new("points", colour(1), points).mark(Mark::Dots(4)));
        Panel {
            curves,
            legend: SeriesLabelPosition::UpperRight,
            ..Panel::new(
                "A path given twenty points: 5, 25, 50, 75, 95 % of samples",
                "t",
                "y",
            )
        }
        .draw(&top)?;
        let of = |figure: fn(&crate::model::Losses) -> f64, name: &str, i: usize| {
            let figures = run.losses.iter().enumerate();
            Curve::new(name, colour(i), figures.map(|(n, l)| (n as f64, figure(l)))).width(2)
        };
        Panel {
            curves: vec![
                of(|l| l.points, "−log p of the points", 1),
                of(|l| l.path, "KL of the path", 0),
                of(|l| l.start, "KL of y(0)", 2),
            ],
            ranges: [None, Some(-60.0..60.0)],
            legend: SeriesLabelPosition::LowerRight,
            ..Panel::new("Loss", "update", "nats")
        }
        .draw(&bottom)
    })
}
