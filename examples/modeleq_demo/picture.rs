//! The picture: errors over the number of steps, a panel for each method and quantity.

use std::path::Path;

use candle_diffeq::tableau::{EULER, RK4};

use crate::{Series, Whose, QUANTITIES};
use common::chart::{colour, picture, Curve, Mark, Panel, Scale, SeriesLabelPosition, TRUTH};
use common::dtype::Dtype;
use common::Result;

/// Draws the low precisions, bf16 dashed.
pub(crate) fn draw(path: &Path, all: &[Series]) -> Result<()> {
    picture(path, (1500, 860), |area| {
        let areas = area.split_evenly((2, QUANTITIES.len()));
        for (row, method) in [EULER, RK4].iter().enumerate() {
            for (q, quantity) in QUANTITIES.iter().enumerate() {
                // What lies under the others comes first.
                let layers = [Whose::Tape, Whose::Rampde, Whose::Ours];
                let drawn = layers.iter().flat_map(|whose| {
                    let of = |s: &&Series| s.whose == *whose && s.method == *method && is_low(s);
                    all.iter().filter(of)
                });
                let curve = |series: &Series| {
                    let points = series.errors.iter().map(|(n, e)| (*n as f64, e[q]));
                    let named = row == 0 && q == 0;
                    Curve::new(
                        if named { name(series) } else { String::new() },
                        match series.whose {
                            Whose::Tape => TRUTH,
                            Whose::Rampde => colour(1),
                            Whose::Ours | Whose::OursStoredLow => colour(0),
                        },
                        points,
                    )
                    .width(if series.whose == Whose::Tape { 3 } else { 1 })
                    .mark(match series.dtype {
                        Dtype::Bf16 => Mark::Dashed,
                        _ => Mark::DottedLine,
                    })
                };
                Panel {
                    scales: [Scale::Doublings, Scale::Decades],
                    curves: drawn.map(curve).collect(),
                    legend: SeriesLabelPosition::LowerLeft,
                    ..Panel::new(
                        format!("{quantity}, {}", method.name()),
                        "steps N",
                        "relative error",
                    )
                }
                .draw(&areas[row * QUANTITIES.len() + q])?;
            }
        }
        Ok(())
    })
}

fn is_low(series: &Series) -> bool {
    matches!(series.dtype, Dtype::F16 | Dtype::Bf16)
}

fn name(series: &Series) -> String {
    format!("{}, {}", series.whose.name(), series.dtype.name())
}
