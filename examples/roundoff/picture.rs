//! The picture: errors over the number of steps, a panel for each method and quantity.

use std::path::Path;

use candle_diffeq::tableau::{EULER, RK4};

use crate::{Kind, Series, QUANTITIES};
use common::chart::{colour, picture, Curve, Mark, Panel, Scale, SeriesLabelPosition, TRUTH};
use common::dtype::Dtype;
use common::Result;

/// Solution, ∂L/∂y0 and ∂L/∂θ; scaled, unscaled and constant scale are drawn where they differ.
const DRAWN: usize = 3;

/// Draws all series, tapes dashed.
pub(crate) fn draw(path: &Path, all: &[Series]) -> Result<()> {
    picture(path, (1500, 860), |area| {
        let areas = area.split_evenly((2, DRAWN));
        for (row, method) in [EULER, RK4].iter().enumerate() {
            for (q, quantity) in QUANTITIES[..DRAWN].iter().enumerate() {
                // What lies under the others comes first.
                let layers = [
                    Kind::Unscaled,
                    Kind::Constant,
                    Kind::Tape,
                    Kind::Scaled,
                    Kind::Compensated,
                ];
                let of_panel = layers.iter().flat_map(|kind| {
                    let of = |s: &&Series| s.kind == *kind && s.method == *method;
                    all.iter().filter(of)
                });
                let named = (row, q) == (0, 0);
                Panel {
                    scales: [Scale::Doublings, Scale::Decades],
                    curves: of_panel.map(|s| curve(s, q, named)).collect(),
                    // Room for the legend.
                    ranges: [None, (q == 0).then_some(1e-8..1.0)],
                    legend: SeriesLabelPosition::UpperLeft,
                    ..Panel::new(
                        format!("{quantity}, {}", method.name()),
                        "steps N",
                        "relative error",
                    )
                }
                .draw(&areas[row * DRAWN + q])?;
            }
        }
        Ok(())
    })
}

fn curve(series: &Series, q: usize, named: bool) -> Curve {
    let points = series.errors.iter().map(|(n, e)| (*n as f64, e[q]));
    let name = match named {
        true => format!("{}, {}", series.dtype.name(), series.kind.name()),
        false => String::new(),
    };
    let of_dtype = colour(match series.dtype {
        Dtype::F64 => 4,
        Dtype::F32 => 2,
        Dtype::Bf16 => 1,
        Dtype::F16 => 0,
    });
    match series.kind {
        Kind::Scaled => Curve::new(name, of_dtype, points).mark(Mark::DottedLine),
        Kind::Compensated => Curve::new(name, colour(4), points).mark(Mark::DottedLine),
        Kind::Unscaled => Curve::new(name, TRUTH, points).width(4),
        Kind::Constant => Curve::new(name, colour(3), points).mark(Mark::Dots(5)),
        Kind::Tape => Curve::new(name, of_dtype, points).mark(Mark::Dashed),
    }
}
