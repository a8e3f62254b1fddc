//! The picture: what was seen of two spirals with the paths through it, and accuracies by epoch.

use std::path::Path;

use candle_core::DType;

use crate::spirals::paths;
use crate::{Run, MISSING};
use common::chart::{colour, picture, Area, Curve, Mark, Panel, SeriesLabelPosition};
use common::Result;

/// Points of a drawn path.
const POINTS: usize = 400;

/// Writes the picture.
pub(crate) fn draw(path: &Path, runs: &[Run]) -> Result<()> {
    picture(path, (1200, 560), |area| {
        let (left, right) = area.split_horizontally(560);
        if let Some(last) = runs.last() {
            spirals(&left, last)?;
        }
        let curve = |(i, o): (usize, &Run)| {
            let points = o.outcome.accuracies.iter().enumerate();
            let points = points.map(|(n, a)| ((n + 1) as f64, 100.0 * a));
            let name = format!("{}, {:.0} % missing", o.dtype.name(), 100.0 * o.missing);
            let mark = match o.dtype == runs[0].dtype {
                true => Mark::Line,
                false => Mark::Dashed,
            };
            Curve::new(name, colour(i % MISSING.len()), points)
                .mark(mark)
                .width(2)
        };
        Panel {
            curves: runs.iter().enumerate().map(curve).collect(),
            legend: SeriesLabelPosition::LowerRight,
            ..Panel::new("test", "epoch", "accuracy, %")
        }
        .draw(&right)
    })
}

fn spirals(area: &Area<'_>, run: &Run) -> Result<()> {
    let seen = run.training.values.narrow(0, 0, 2)?;
    let path = paths(&run.times, &seen)?;
    let [start, end] = path.ends();
    let mut lines = vec![vec![]; 2];
    for i in 0..=POINTS {
        let t = start + (end - start) * i as f64 / POINTS as f64;
        let x = path
            .evaluate(t.min(end))?
            .to_dtype(DType::F64)?
            .to_vec2::<f64>()?;
        for (line, x) in lines.iter_mut().zip(x) {
            line.push((x[1], x[2]));
        }
    }
    let seen = seen.to_dtype(DType::F64)?.to_vec3::<f64>()?;
    let whole = |i: usize| {
        let points = seen[i].iter().filter(|x| x.iter().all(|x| x.is_finite()));
        points.map(|x| (x[0], x[1])).collect::<Vec<_>>()
    };
    let mut curves = vec![];
    for (i, line) in lines.into_iter().enumerate() {
        let name = ["to the left", "to the right"][i];
        curves.push(Curve::new(name, colour(i), line));
        curves.push(Curve::new("", colour(i), whole(i)).mark(Mark::Dots(3)));
    }
    let missing = 100.0 * run.missing;
    Panel {
        curves,
        ..Panel::new(
            format!("{missing:.0} % of coordinates missing: paths, and points seen whole"),
            "x",
            "y",
        )
    }
    .draw(area)
}
