//! The pictures: densities and samples, the density over time, likelihoods.

use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::training::{Flow, Outcome};
use common::chart::{colour, picture, Area, Curve, Heat, Mark, Panel, SeriesLabelPosition, TRUTH};
use common::{mean, values, Result};

/// The window, in both directions.
const WINDOW: Range<f64> = -4.0..4.0;
/// Cells of a heat map in each direction.
const CELLS: usize = 64;
/// Points of a sample that are drawn.
const DOTS: usize = 600;
/// Times at which the density is shown.
const TIMES: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];
/// Losses are averaged over this many iterations.
const SMOOTHING: usize = 20;
/// Panels in a row, and their size.
const COLUMNS: usize = 4;
const PANEL: (u32, u32) = (300, 290);

/// Learnt densities and samples of them, the data behind, eight panels for four densities.
pub(crate) fn densities(path: &Path, outcomes: &[&Outcome], seed: u64) -> Result<()> {
    let lines: Vec<_> = outcomes.chunks(COLUMNS).collect();
    let height = 2 * lines.len() as u32 * PANEL.1;
    let width = PANEL.0 * outcomes.len().min(COLUMNS) as u32;
    picture(path, (width, height), |area| {
        let panels = area.split_evenly((2 * lines.len(), outcomes.len().min(COLUMNS)));
        for (i, o) in outcomes.iter().enumerate() {
            let columns = outcomes.len().min(COLUMNS);
            let at = 2 * (i / COLUMNS) * columns + i % COLUMNS;
            let title = format!("{}: learnt density", o.density);
            heat(&panels[at], title, &o.flow, 1.0)?;
            samples(&panels[at + columns], o, seed)?;
        }
        Ok(())
    })
}

fn square(title: String) -> Panel {
    let mut panel = Panel::new(title, "z₁", "z₂");
    panel.ranges = [Some(WINDOW), Some(WINDOW)];
    panel
}

fn samples(area: &Area<'_>, o: &Outcome, seed: u64) -> Result<()> {
    let data = o.density.sample(DOTS, seed, &Device::Cpu)?;
    let dots = |shade, x: &Tensor| {
        let dots = Curve::new("", shade, points(x)?).mark(Mark::Dots(1));
        Ok::<_, Box<dyn std::error::Error>>(dots)
    };
    let drawn = o.samples.narrow(0, 0, DOTS.min(o.samples.dim(0)?))?;
    let mut panel = square("data grey, samples blue".to_owned());
    panel.curves = vec![dots(TRUTH, &data)?, dots(colour(0), &drawn)?];
    panel.draw(area)
}

/// Points in the window, of (n, 2).
fn points(x: &Tensor) -> Result<Vec<(f64, f64)>> {
    let held = |p: &(f64, f64)| WINDOW.contains(&p.0) && WINDOW.contains(&p.1);
    let pairs = values(x)?;
    let pairs = pairs.chunks_exact(2).map(|p| (p[0], p[1]));
    Ok(pairs.filter(held).collect())
}

/// exp log p at the middles of the cells.
fn heat(area: &Area<'_>, title: String, flow: &Flow, time: f64) -> Result<()> {
    let width = (WINDOW.end - WINDOW.start) / CELLS as f64;
    let middle = |i: usize| (WINDOW.start + (i as f64 + 0.5) * width) as f32;
    let grid = (0..CELLS).flat_map(|i| (0..CELLS).flat_map(move |j| [middle(j), middle(i)]));
    let grid = Tensor::from_iter(grid, &flow.device)?.reshape((CELLS * CELLS, 2))?;
    let density = values(&flow.log_density(&grid, time)?.exp()?.to_dtype(DType::F64)?)?;
    let mut panel = square(title);
    panel.heat = Some(Heat {
        x: WINDOW,
        y: WINDOW,
        values: density.chunks_exact(CELLS).map(<[f64]>::to_vec).collect(),
        name: String::new(),
        limits: None,
        numbers: false,
    });
    panel.draw(area)
}

/// How densities form out of noise, one row for each.
pub(crate) fn flows(path: &Path, outcomes: &[&Outcome]) -> Result<()> {
    let size = (TIMES.len() as u32 * 280, outcomes.len() as u32 * 270);
    picture(path, size, |area| {
        let panels = area.split_evenly((outcomes.len(), TIMES.len()));
        for (panel, (o, time)) in panels.iter().zip(
            outcomes
                .iter()
                .flat_map(|o| TIMES.iter().map(move |time| (o, *time))),
        ) {
            heat(panel, format!("{}, t = {time}", o.density), &o.flow, time)?;
        }
        Ok(())
    })
}

/// Losses over the iterations, or evaluations, one panel for each density and one curve for each precision.
pub(crate) fn over_iterations(
    path: &Path,
    by_density: &[&[Outcome]],
    (name, legend): (&str, SeriesLabelPosition),
    of: fn(&Outcome) -> &[f64],
) -> Result<()> {
    let columns = by_density.len().min(COLUMNS);
    let rows = by_density.len().div_ceil(columns.max(1));
    let size = (columns as u32 * 320, rows as u32 * 280);
    picture(path, size, |area| {
        let panels = area.split_evenly((rows, columns));
        for (i, (panel, outcomes)) in panels.iter().zip(by_density).enumerate() {
            let Some(first) = outcomes.first() else {
                continue;
            };
            let mut chart = Panel::new(first.density.name(), "iteration", name);
            chart.legend = legend.clone();
            let curve = |(j, o): (usize, &Outcome)| {
                let name = if i == 0 { &*o.way.name } else { "" };
                Curve::new(name, colour(j), smoothed(of(o)))
            };
            chart.curves = outcomes.iter().enumerate().map(curve).collect();
            chart.draw(panel)?;
        }
        Ok(())
    })
}

fn smoothed(losses: &[f64]) -> Vec<(f64, f64)> {
    let window = SMOOTHING.min(losses.len()).max(1);
    let middle = |(i, of): (usize, &[f64])| ((i + window / 2) as f64, mean(of));
    losses.windows(window).enumerate().map(middle).collect()
}
