//! One pair of axes and what is in it.

use std::ops::Range;

use plotters::prelude::*;

use super::axis::{Axis, Scale};
use super::heat::{colour, Heat};
use super::{Area, AXIS, FONT, LABEL, TITLE};
use crate::Result;

/// How the points of a curve are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Mark {
    #[default]
    Line,
    Dashed,
    /// Dots only, of a radius in pixels.
    Dots(u32),
    /// A line, and a dot at every point.
    DottedLine,
}

/// Points, colour, name in the legend (none if empty).  Points that are not finite are left out.
pub struct Curve {
    pub name: String,
    pub colour: RGBColor,
    pub points: Vec<(f64, f64)>,
    pub mark: Mark,
    pub width: u32,
}

impl Curve {
    /// A thin line.
    pub fn new(
        name: impl Into<String>,
        colour: RGBColor,
        points: impl IntoIterator<Item = (f64, f64)>,
    ) -> Self {
        Self {
            name: name.into(),
            colour,
            points: points.into_iter().collect(),
            mark: Mark::Line,
            width: 1,
        }
    }

    pub fn mark(mut self, mark: Mark) -> Self {
        self.mark = mark;
        self
    }

    /// In pixels.
    pub fn width(mut self, width: u32) -> Self {
        self.width = width;
        self
    }
}

/// Arrows of one colour: (where from, how far), both in the units of the axes.
pub struct Arrows {
    pub colour: RGBColor,
    pub arrows: Vec<((f64, f64), (f64, f64))>,
}

/// Bars of one colour from zero up: (left, right, height).
pub struct Bars {
    pub name: String,
    pub colour: RGBColor,
    pub bars: Vec<(f64, f64, f64)>,
}

impl Bars {
    /// The density of a sample over equal bins.
    pub fn histogram(
        name: impl Into<String>,
        colour: RGBColor,
        sample: &[f64],
        range: Range<f64>,
        bins: usize,
    ) -> Self {
        let width = (range.end - range.start) / bins as f64;
        let mut counts = vec![0usize; bins];
        for x in sample.iter().filter(|x| range.contains(x)) {
            let bin = ((x - range.start) / width) as usize;
            counts[bin.min(bins - 1)] += 1;
        }
        let bar = |(i, count): (usize, &usize)| {
            let left = range.start + i as f64 * width;
            let density = *count as f64 / (sample.len() as f64 * width);
            (left, left + width, density)
        };
        Self {
            name: name.into(),
            colour,
            bars: counts.iter().enumerate().map(bar).collect(),
        }
    }
}

/// Title, axes, contents.  Everything is public, for `..Panel::new(title, x, y)`.
pub struct Panel {
    pub title: String,
    /// Names of the axes, with units.
    pub names: [String; 2],
    pub scales: [Scale; 2],
    /// Around all contents where `None`.
    pub ranges: [Option<Range<f64>>; 2],
    pub heat: Option<Heat>,
    pub bars: Vec<Bars>,
    pub arrows: Vec<Arrows>,
    pub curves: Vec<Curve>,
    pub legend: SeriesLabelPosition,
}

type Chart<'a, 'b> = ChartContext<'a, BitMapBackend<'b>, Cartesian2d<Axis, Axis>>;

/// Share of the range that is left free at each end, in x and y.
const MARGINS: [f64; 2] = [0.02, 0.06];
/// Width of a colour bar with its labels, in pixels.
const BAR: i32 = 110;

impl Panel {
    /// Empty, with linear axes of these names.
    pub fn new(title: impl Into<String>, x: &str, y: &str) -> Self {
        Self {
            title: title.into(),
            names: [x.to_owned(), y.to_owned()],
            scales: [Scale::Linear; 2],
            ranges: [None, None],
            heat: None,
            bars: vec![],
            arrows: vec![],
            curves: vec![],
            legend: SeriesLabelPosition::UpperRight,
        }
    }

    /// Draws it into the whole of the area.
    pub fn draw(&self, area: &Area<'_>) -> Result<()> {
        match self.heat.as_ref().filter(|heat| !heat.name.is_empty()) {
            Some(heat) => {
                let width = area.dim_in_pixel().0 as i32;
                let (left, right) = area.split_horizontally(width - BAR);
                heat.bar(&right)?;
                self.chart(&left)
            }
            None => self.chart(area),
        }
    }

    fn chart(&self, area: &Area<'_>) -> Result<()> {
        let [x, y] = [self.axis(0), self.axis(1)];
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, (FONT, TITLE))
            .margin(12)
            .margin_right(28)
            .x_label_area_size(40)
            .y_label_area_size(66)
            .build_cartesian_2d(x, y)?;
        if let Some(heat) = &self.heat {
            let limits = heat.limits();
            let cell = |(corners, value)| Rectangle::new(corners, colour(value, &limits).filled());
            chart.draw_series(heat.cells().map(cell))?;
            chart.draw_series(heat.texts())?;
        }
        chart
            .configure_mesh()
            .x_desc(&self.names[0])
            .y_desc(&self.names[1])
            .x_labels(10)
            .y_labels(10)
            .label_style((FONT, LABEL))
            .axis_desc_style((FONT, AXIS))
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(match self.heat {
                Some(_) => 0.0,
                None => 0.08,
            }))
            .draw()?;
        self.bars
            .iter()
            .try_for_each(|b| draw_bars(&mut chart, b))?;
        let mut arrows = self.arrows.iter();
        arrows.try_for_each(|arrows| draw_arrows(&mut chart, arrows))?;
        let mut curves = self.curves.iter();
        curves.try_for_each(|curve| draw_curve(&mut chart, curve, self.scales))?;
        let names = self.curves.iter().map(|c| &c.name);
        if names
            .chain(self.bars.iter().map(|b| &b.name))
            .any(|n| !n.is_empty())
        {
            chart
                .configure_series_labels()
                .position(self.legend.clone())
                .label_font((FONT, LABEL))
                .background_style(WHITE.mix(0.85))
                .border_style(BLACK.mix(0.15))
                .draw()?;
        }
        Ok(())
    }

    /// The x axis (0) or the y axis (1).
    fn axis(&self, which: usize) -> Axis {
        let scale = self.scales[which];
        if let Some(range) = &self.ranges[which] {
            return Axis::new(range.clone(), scale);
        }
        let pick = |(x, y): (f64, f64)| if which == 0 { x } else { y };
        if let Some(heat) = &self.heat {
            let range = if which == 0 { &heat.x } else { &heat.y };
            return Axis::new(range.clone(), scale);
        }
        let curves = self.curves.iter().flat_map(|c| &c.points).copied();
        let bars = self.bars.iter().flat_map(|b| &b.bars);
        let bars = bars.flat_map(|&(left, right, height)| [(left, 0.0), (right, height)]);
        let arrows = self.arrows.iter().flat_map(|a| &a.arrows);
        let arrows = arrows.flat_map(|&((x, y), (dx, dy))| [(x, y), (x + dx, y + dy)]);
        let points = curves.chain(bars).chain(arrows);
        Axis::around(points.map(pick), scale, MARGINS[which])
    }
}

fn draw_curve<'a, 'b: 'a>(
    chart: &mut Chart<'a, 'b>,
    curve: &Curve,
    scales: [Scale; 2],
) -> Result<()> {
    let held = |p: &&(f64, f64)| scales[0].holds(p.0) && scales[1].holds(p.1);
    let points: Vec<_> = curve.points.iter().filter(held).copied().collect();
    let (mark, width) = (curve.mark, curve.width);
    let (line, fill) = (curve.colour.stroke_width(width), curve.colour.filled());
    let radius = match mark {
        Mark::Dots(radius) => radius,
        _ => width + 2,
    };
    let dots = || points.iter().map(|p| Circle::new(*p, radius, fill));
    let drawn = match mark {
        Mark::Line => chart.draw_series(LineSeries::new(points.clone(), line))?,
        Mark::Dashed => chart.draw_series(DashedLineSeries::new(points.clone(), 7, 5, line))?,
        Mark::Dots(_) => chart.draw_series(dots())?,
        Mark::DottedLine => {
            chart.draw_series(dots())?;
            chart.draw_series(LineSeries::new(points.clone(), line))?
        }
    };
    if curve.name.is_empty() {
        return Ok(());
    }
    drawn.label(&curve.name).legend(move |(x, y)| {
        let absent = TRANSPARENT.filled();
        let (pieces, dot) = match mark {
            Mark::Line => ([Some((0, 19)), None], absent),
            Mark::Dashed => ([Some((0, 7)), Some((12, 19))], absent),
            Mark::Dots(_) => ([None, None], fill),
            Mark::DottedLine => ([Some((0, 19)), None], fill),
        };
        let [first, second] = pieces.map(|ends| match ends {
            Some((from, to)) => PathElement::new(vec![(from, 0), (to, 0)], line),
            None => PathElement::new(vec![], absent),
        });
        EmptyElement::at((x, y)) + first + second + Circle::new((9, 0), radius.min(5), dot)
    });
    Ok(())
}

fn draw_bars<'a, 'b: 'a>(chart: &mut Chart<'a, 'b>, bars: &Bars) -> Result<()> {
    let fill = bars.colour.mix(0.5).filled();
    let bar = |&(left, right, height)| Rectangle::new([(left, 0.0), (right, height)], fill);
    let drawn = chart.draw_series(bars.bars.iter().map(bar))?;
    if !bars.name.is_empty() {
        drawn
            .label(&bars.name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 19, y + 5)], fill));
    }
    Ok(())
}

/// Shafts and heads; the heads are a third of the shaft, at most six pixels.
fn draw_arrows<'a, 'b: 'a>(chart: &mut Chart<'a, 'b>, arrows: &Arrows) -> Result<()> {
    let style = arrows.colour.stroke_width(1);
    let mut shapes = vec![];
    for &((x, y), (dx, dy)) in &arrows.arrows {
        let (from, to) = (
            chart.backend_coord(&(x, y)),
            chart.backend_coord(&(x + dx, y + dy)),
        );
        let (px, py) = (f64::from(to.0 - from.0), f64::from(to.1 - from.1));
        let length = px.hypot(py);
        if !length.is_finite() || length < 1.0 {
            continue;
        }
        let head = (length / 3.0).min(6.0) / length;
        let barb = |side: f64| {
            let (bx, by) = (-px + side * 0.5 * py, -py - side * 0.5 * px);
            (
                (px + head * bx).round() as i32,
                (py + head * by).round() as i32,
            )
        };
        let tip = (px as i32, py as i32);
        shapes.push(
            EmptyElement::at((x, y))
                + PathElement::new(vec![(0, 0), tip], style)
                + PathElement::new(vec![barb(1.0), tip, barb(-1.0)], style),
        );
    }
    chart.draw_series(shapes)?;
    Ok(())
}
