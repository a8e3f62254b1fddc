//! The picture: evaluations and errors over the tolerance, a row for each problem.

use std::path::Path;

use candle_diffeq::tableau::Tableau;

use crate::{Run, Series};
use common::chart::{colour, picture, Curve, Mark, Panel, Scale, SeriesLabelPosition, TRUTH};
use common::dtype::Dtype;
use common::Result;

/// Draws one method: solid with the noise floor, dashed without.
pub(crate) fn draw(
    path: &Path,
    all: &[Series],
    problems: [&str; 2],
    method: &Tableau,
    attempts: usize,
) -> Result<()> {
    picture(path, (1240, 900), |area| {
        let areas = area.split_evenly((2, 2));
        for (row, problem) in problems.iter().enumerate() {
            let of = |s: &&Series| s.problem == *problem && s.method == *method;
            let of: Vec<&Series> = all.iter().filter(of).collect();
            let title = |what: &str| format!("{problem}, {}: {what}", method.name());
            Panel {
                scales: [Scale::Decades; 2],
                curves: evaluations(&of, row == 0, attempts),
                ..Panel::new(title("cost"), "rtol", "evaluations of f")
            }
            .draw(&areas[2 * row])?;
            let error = |run: &Run| Some((run.rtol, run.error?));
            let names = [
                (row == 0).then_some("with the noise floor"),
                (row == 0).then_some("without"),
            ];
            Panel {
                scales: [Scale::Decades; 2],
                curves: legend(names)
                    .into_iter()
                    .chain(curves(&of, false, error))
                    .collect(),
                legend: SeriesLabelPosition::LowerRight,
                ..Panel::new(title("error"), "rtol", "relative error at T")
            }
            .draw(&areas[2 * row + 1])?;
        }
        Ok(())
    })
}

/// What lines mean, without points.
fn legend(names: [Option<&str>; 2]) -> Vec<Curve> {
    let marks = [Mark::Line, Mark::Dashed];
    let named = names.into_iter().zip(marks);
    named
        .filter_map(|(name, mark)| Some(Curve::new(name?, TRUTH, []).mark(mark).width(2)))
        .collect()
}

fn evaluations(of: &[&Series], named: bool, attempts: usize) -> Vec<Curve> {
    let all = curves(of, named, |run| Some((run.rtol, run.evaluations as f64)));
    // Under the lines that end there.
    let runs = of.iter().flat_map(|s| &s.runs);
    let stopped = runs.filter(|run| run.error.is_none());
    let stopped = stopped.map(|run| (run.rtol, run.evaluations as f64));
    let name = match named {
        true => format!("stopped after {attempts} attempts"),
        false => String::new(),
    };
    let stopped = Curve::new(name, TRUTH, stopped).mark(Mark::Dots(8));
    std::iter::once(stopped).chain(all).collect()
}

fn curves(of: &[&Series], named: bool, point: impl Fn(&Run) -> Option<(f64, f64)>) -> Vec<Curve> {
    let curve = |series: &&Series| {
        let name = match named && series.floor {
            true => series.dtype.name(),
            false => "",
        };
        let (mark, width) = match series.floor {
            true => (Mark::DottedLine, 2),
            false => (Mark::Dashed, 2),
        };
        let points = series.runs.iter().filter_map(&point);
        Curve::new(name, of_dtype(series.dtype), points)
            .mark(mark)
            .width(width)
    };
    // Dashes lie over solid lines where both are the same.
    let (solid, dashed): (Vec<&Series>, Vec<&Series>) = of.iter().partition(|s| s.floor);
    solid.iter().chain(&dashed).map(curve).collect()
}

fn of_dtype(dtype: Dtype) -> common::chart::RGBColor {
    colour(match dtype {
        Dtype::F64 => 4,
        Dtype::F32 => 2,
        Dtype::Bf16 => 1,
        Dtype::F16 => 0,
    })
}
