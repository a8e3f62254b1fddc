//! A heat map: a matrix as colours, and the bar that says what they mean.

use std::ops::Range;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::axis::{number, Axis, Scale};
use super::{Area, AXIS, FONT, LABEL};
use crate::Result;

/// Values over a rectangle, to be put behind what else is in a panel.
pub struct Heat {
    pub x: Range<f64>,
    pub y: Range<f64>,
    /// Rows of equal length, from low y to high y.
    pub values: Vec<Vec<f64>>,
    /// What the values are, beside the bar; no bar if empty.
    pub name: String,
    /// The values of the darkest and the lightest colour; the least and the greatest if `None`.
    pub limits: Option<Range<f64>>,
    /// Whether values stand in their cells as numbers.
    pub numbers: bool,
}

impl Heat {
    pub(super) fn limits(&self) -> Range<f64> {
        let all = self.values.iter().flatten().copied();
        let axis = || Axis::around(all, Scale::Linear, 0.0).range();
        self.limits.clone().unwrap_or_else(axis)
    }

    /// The cells: two corners, and the value.
    pub(super) fn cells(&self) -> impl Iterator<Item = ([(f64, f64); 2], f64)> + '_ {
        let rows = self.values.len() as f64;
        let height = (self.y.end - self.y.start) / rows;
        self.values.iter().enumerate().flat_map(move |(i, row)| {
            let width = (self.x.end - self.x.start) / row.len() as f64;
            let low = self.y.start + i as f64 * height;
            row.iter().enumerate().map(move |(j, value)| {
                let left = self.x.start + j as f64 * width;
                ([(left, low), (left + width, low + height)], *value)
            })
        })
    }

    /// Values as text, where they are wanted, dark on light and light on dark.
    pub(super) fn texts(&self) -> impl Iterator<Item = Text<'static, (f64, f64), String>> + '_ {
        let limits = self.limits();
        let wanted = self.cells().filter(|_| self.numbers);
        wanted.map(move |([(x0, y0), (x1, y1)], value)| {
            let light = (value - limits.start) / (limits.end - limits.start) > 0.6;
            let style = (FONT, LABEL).into_font().color(match light {
                true => &BLACK,
                false => &WHITE,
            });
            let style = style.pos(Pos::new(HPos::Center, VPos::Center));
            let middle = ((x0 + x1) / 2.0, (y0 + y1) / 2.0);
            Text::new(number(value), middle, style)
        })
    }

    /// The colour bar.
    pub(super) fn bar(&self, area: &Area<'_>) -> Result<()> {
        const SHADES: usize = 128;
        let limits = self.limits();
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .margin_top(44)
            .margin_bottom(52)
            .y_label_area_size(62)
            .build_cartesian_2d(0.0..1.0, Axis::new(limits.clone(), Scale::Linear))?;
        let at = |i: usize| limits.start + (limits.end - limits.start) * i as f64 / SHADES as f64;
        chart.draw_series((0..SHADES).map(|i| {
            let style = colour((at(i) + at(i + 1)) / 2.0, &limits).filled();
            Rectangle::new([(0.0, at(i)), (1.0, at(i + 1))], style)
        }))?;
        chart
            .configure_mesh()
            .disable_mesh()
            .x_labels(0)
            .y_desc(&self.name)
            .label_style((FONT, LABEL))
            .axis_desc_style((FONT, AXIS))
            .draw()?;
        Ok(())
    }
}

/// From dark to light, equally readable in grey; NaN is white.
pub(super) fn colour(value: f64, limits: &Range<f64>) -> RGBColor {
    match value.is_finite() {
        true => ViridisRGB.get_color_normalized(
            value.clamp(limits.start, limits.end),
            limits.start,
            limits.end,
        ),
        false => WHITE,
    }
}
