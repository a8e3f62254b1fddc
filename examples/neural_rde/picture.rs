//! The picture: a path with the chord of its windows, and accuracies over their length.

use std::path::Path;

use candle_core::DType;

use crate::data::Depth;
use crate::Run;
use common::chart::{colour, picture, Area, Curve, Mark, Panel, Scale, SeriesLabelPosition, TRUTH};
use common::path_classifier::Labelled;
use common::Result;

/// Points of a window that is drawn, and how many windows are.
const WINDOW: usize = 32;
const WINDOWS: usize = 5;

/// Writes the picture.
pub(crate) fn draw(path: &Path, runs: &[Run], test: &Labelled) -> Result<()> {
    picture(path, (1240, 540), |area| {
        let (left, right) = area.split_horizontally(560);
        windows(&left, test)?;
        let mut dtypes = vec![];
        for run in runs {
            if !dtypes.contains(&run.dtype) {
                dtypes.push(run.dtype);
            }
        }
        let mut curves = vec![];
        for (i, depth) in [Depth::One, Depth::Two].into_iter().enumerate() {
            for (j, &dtype) in dtypes.iter().enumerate() {
                let own = runs.iter().filter(|r| r.depth == depth && r.dtype == dtype);
                let points = own.map(|r| (r.window as f64, 100.0 * r.outcome.accuracy()));
                let name = format!("depth {}, {}", depth.number(), dtype.name());
                let curve = Curve::new(name, colour(2 * i + j), points);
                curves.push(curve.mark(Mark::DottedLine).width(2));
            }
        }
        Panel {
            curves,
            scales: [Scale::Decades, Scale::Linear],
            ranges: [None, Some(40.0..102.0)],
            legend: SeriesLabelPosition::LowerLeft,
            ..Panel::new(
                "Which way does it turn?",
                "points of a window, one step each",
                "test accuracy, %",
            )
        }
        .draw(&right)
    })
}

/// One series and the chords of its windows.
fn windows(area: &Area<'_>, test: &Labelled) -> Result<()> {
    let points = WINDOW * WINDOWS + 1;
    let series = test.values.get(0)?.narrow(0, 0, points)?;
    let all = series.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let at = |i: usize| (all[i][0], all[i][1]);
    Panel {
        curves: vec![
            Curve::new("the series", TRUTH, (0..points).map(at)),
            Curve::new(
                format!("windows of {WINDOW} points"),
                colour(0),
                (0..=WINDOWS).map(|i| at(i * WINDOW)),
            )
            .mark(Mark::DottedLine)
            .width(2),
        ],
        legend: SeriesLabelPosition::UpperRight,
        ..Panel::new(
            "Depth 2 knows the areas between the series and its chords",
            "x",
            "y",
        )
    }
    .draw(area)
}
