//! The picture: errors of the weight gradient over the number of steps.

use std::path::Path;

use crate::Row;
use common::chart::{colour, picture, Curve, Mark, Panel, Scale, SeriesLabelPosition, TRUTH};
use common::Result;

/// A panel for each precision.
pub(crate) fn draw(path: &Path, rows: &[Row]) -> Result<()> {
    let mut dtypes = vec![];
    for row in rows {
        if !dtypes.contains(&row.dtype) {
            dtypes.push(row.dtype);
        }
    }
    picture(path, (600 * dtypes.len() as u32, 460), |area| {
        let areas = area.split_evenly((1, dtypes.len()));
        for (i, (dtype, area)) in dtypes.iter().zip(areas).enumerate() {
            let of = |figure: fn(&Row) -> f64| {
                let rows = rows.iter().filter(|row| row.dtype == *dtype);
                rows.map(move |row| (row.steps as f64, figure(row)))
                    .collect::<Vec<_>>()
            };
            let named = |name| if i + 1 < dtypes.len() { "" } else { name };
            let curves = vec![
                Curve::new(named("tape"), TRUTH, of(|row| row.tape)).width(5),
                Curve::new(
                    named("by hand, sum in low precision"),
                    colour(1),
                    of(|row| row.low_sum),
                )
                .mark(Mark::Dashed),
                Curve::new(
                    named("by hand, sum in f32"),
                    colour(2),
                    of(|row| row.wide_sum),
                )
                .mark(Mark::DottedLine),
                Curve::new(named("ours"), colour(0), of(|row| row.ours)).mark(Mark::DottedLine),
            ];
            Panel {
                scales: [Scale::Doublings, Scale::Decades],
                curves,
                legend: SeriesLabelPosition::LowerLeft,
                ..Panel::new(
                    format!("∂L/∂A, f in {}", dtype.name()),
                    "steps N of Euler's method",
                    "relative error",
                )
            }
            .draw(&area)?;
        }
        Ok(())
    })
}
