//! Charts as PNG files, with a font of their own: no system font is needed.

use std::ops::Range;

use plotters::prelude::*;
use plotters::style::{register_font, FontStyle};

use super::Result;

/// What is drawn on.
pub(crate) type Area<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;

const FONT: &str = "sans-serif";

/// Of what is known to be true: light, for the curves that are to lie on it.
pub(crate) const TRUTH: RGBColor = RGBColor(175, 175, 175);

/// Of one series after the other (Okabe & Ito, distinct for the colour-blind).
pub(crate) const COLOURS: [RGBColor; 4] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
];

/// A curve: points, colour, name in the legend (none if empty).
pub(crate) struct Curve {
    pub(crate) points: Vec<(f64, f64)>,
    pub(crate) colour: RGBColor,
    pub(crate) name: String,
    pub(crate) width: u32,
}

/// Title and names of the axes.
pub(crate) struct Labels {
    pub(crate) title: &'static str,
    pub(crate) x: &'static str,
    pub(crate) y: &'static str,
}

/// How y is spaced.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Scale {
    Linear,
    Logarithmic,
}

/// To be called before anything is drawn.
pub(crate) fn use_own_font() -> Result<()> {
    register_font(FONT, FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| "the bundled font cannot be read".into())
}

/// A panel with axes around all points, and the curves in it.
pub(crate) fn panel(
    area: &Area<'_>,
    labels: &Labels,
    scale: Scale,
    curves: &[Curve],
) -> Result<()> {
    let (x, y) = (range(curves, |p| p.0), range(curves, |p| p.1));
    let mut builder = ChartBuilder::on(area);
    builder
        .caption(labels.title, (FONT, 20))
        .margin(12)
        .margin_right(28)
        .x_label_area_size(40)
        .y_label_area_size(62);
    // The two kinds of axes are two types.
    macro_rules! draw {
        ($y:expr) => {{
            let mut chart = builder.build_cartesian_2d(x, $y)?;
            chart
                .configure_mesh()
                .x_desc(labels.x)
                .y_desc(labels.y)
                .label_style((FONT, 14))
                .axis_desc_style((FONT, 15))
                .light_line_style(TRANSPARENT)
                .bold_line_style(BLACK.mix(0.08))
                .draw()?;
            for curve in curves {
                let style = curve.colour.stroke_width(curve.width);
                let line = chart.draw_series(LineSeries::new(curve.points.clone(), style))?;
                if !curve.name.is_empty() {
                    line.label(curve.name.clone())
                        .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], style));
                }
            }
            if curves.iter().any(|c| !c.name.is_empty()) {
                chart
                    .configure_series_labels()
                    .position(SeriesLabelPosition::UpperRight)
                    .label_font((FONT, 14))
                    .background_style(WHITE.mix(0.85))
                    .border_style(BLACK.mix(0.15))
                    .draw()?;
            }
        }};
    }
    match scale {
        Scale::Linear => draw!(widened(y)),
        Scale::Logarithmic => draw!((y.start * 0.8..y.end * 1.25).log_scale()),
    }
    Ok(())
}

/// From the least to the largest finite coordinate.
fn range(curves: &[Curve], coordinate: impl Fn(&(f64, f64)) -> f64) -> Range<f64> {
    let all = curves.iter().flat_map(|c| &c.points).map(coordinate);
    let (low, high) = all
        .filter(|x| x.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| {
            (low.min(x), high.max(x))
        });
    if low < high {
        low..high
    } else {
        0.0..1.0
    }
}

fn widened(range: Range<f64>) -> Range<f64> {
    let margin = 0.06 * (range.end - range.start);
    range.start - margin..range.end + margin
}
