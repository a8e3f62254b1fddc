//! The pictures: maps of both problems, and costs over the iterations.

use std::ops::Range;
use std::path::Path;

use candle_core::{Device, Tensor};

use crate::training::{Costs, Outcome};
use common::chart::{colour, picture, Area, Curve, Heat, Mark, Panel, Scale, TRUTH};
use common::random::{generator, normal};
use common::{mean, values, Result};

/// The window, in both directions.
const WINDOW: Range<f64> = -4.5..4.5;
/// Cells of the heat map in each direction.
const CELLS: usize = 64;
/// Points of a sample that are drawn, paths, and points of a path.
const DOTS: usize = 700;
const PATHS: usize = 48;
const POINTS: usize = 9;
/// Costs are averaged over this many iterations.
const SMOOTHING: usize = 20;
/// Panels in a row, and their size.
const COLUMNS: usize = 4;
const PANEL: (u32, u32) = (310, 300);

/// A row of panels for each problem.
pub(crate) fn maps(path: &Path, outcomes: &[&Outcome], seed: u64) -> Result<()> {
    let size = (COLUMNS as u32 * PANEL.0, outcomes.len() as u32 * PANEL.1);
    picture(path, size, |area| {
        let panels = area.split_evenly((outcomes.len(), COLUMNS));
        for (panels, o) in panels.chunks(COLUMNS).zip(outcomes) {
            match o.problem.pairs.len() {
                1 => plane(panels, o, seed)?,
                _ => pairs(panels, o, seed)?,
            }
        }
        Ok(())
    })
}

/// The density, samples, paths from data to noise, and where they end.
fn plane(panels: &[Area<'_>], o: &Outcome, seed: u64) -> Result<()> {
    let data = o.problem.sample(DOTS, seed, &Device::Cpu)?;
    let noise = normal(&mut generator(seed), (DOTS, 2), data.dtype(), data.device())?;
    let sent = o.flow.moved(&data, [0.0, 1.0])?;
    heat(o)?.draw(&panels[0])?;
    compared("data grey, samples blue", &data, &o.samples)?.draw(&panels[1])?;
    paths(o, &data)?.draw(&panels[2])?;
    compared("noise grey, data at t = 1 blue", &noise, &sent)?.draw(&panels[3])
}

/// Every pair of features, unmixed.
fn pairs(panels: &[Area<'_>], o: &Outcome, seed: u64) -> Result<()> {
    let problem = &o.problem;
    let data = problem.mix(&problem.sample(DOTS, seed, &Device::Cpu)?)?;
    let samples = problem.mix(&o.samples.to_device(&Device::Cpu)?)?;
    for (i, (panel, density)) in panels.iter().zip(problem.pairs).enumerate() {
        let of = |x: &Tensor| x.narrow(1, 2 * i, 2);
        compared(
            &format!("{}: {density}", problem.name),
            &of(&data)?,
            &of(&samples)?,
        )?
        .draw(panel)?;
    }
    Ok(())
}

fn square(title: &str) -> Panel {
    let mut panel = Panel::new(title, "x₁", "x₂");
    panel.ranges = [Some(WINDOW), Some(WINDOW)];
    panel
}

/// Two samples in the plane.
fn compared(title: &str, expected: &Tensor, got: &Tensor) -> Result<Panel> {
    let dots = |shade, x: &Tensor| -> Result<Curve> {
        let x = x.narrow(0, 0, DOTS.min(x.dim(0)?))?;
        Ok(Curve::new("", shade, points(&x)?).mark(Mark::Dots(1)))
    };
    let mut panel = square(title);
    panel.curves = vec![dots(TRUTH, expected)?, dots(colour(0), got)?];
    Ok(panel)
}

/// Points in the window, of (n, 2).
fn points(x: &Tensor) -> Result<Vec<(f64, f64)>> {
    let held = |p: &(f64, f64)| WINDOW.contains(&p.0) && WINDOW.contains(&p.1);
    let numbers = values(x)?;
    let pairs = numbers.chunks_exact(2).map(|p| (p[0], p[1]));
    Ok(pairs.filter(held).collect())
}

/// Paths of the first points, from data (dots) to noise.
fn paths(o: &Outcome, data: &Tensor) -> Result<Panel> {
    let mut x = data.narrow(0, 0, PATHS.min(data.dim(0)?))?;
    let time = |i: usize| i as f64 / (POINTS - 1) as f64;
    let mut at = vec![values(&x)?];
    for i in 1..POINTS {
        x = o.flow.moved(&x, [time(i - 1), time(i)])?;
        at.push(values(&x)?);
    }
    let path = |n: usize| at.iter().map(move |x| (x[2 * n], x[2 * n + 1]));
    let mut panel = square("paths from data (dots) to noise");
    let ends = |x: &[f64]| -> Vec<_> { x.chunks_exact(2).map(|p| (p[0], p[1])).collect() };
    panel.curves = (0..x.dim(0)?)
        .map(|n| Curve::new("", colour(0), path(n)))
        .collect();
    panel
        .curves
        .push(Curve::new("", colour(1), ends(&at[0])).mark(Mark::Dots(2)));
    Ok(panel)
}

/// The learnt density.
fn heat(o: &Outcome) -> Result<Panel> {
    let width = (WINDOW.end - WINDOW.start) / CELLS as f64;
    let middle = |i: usize| (WINDOW.start + (i as f64 + 0.5) * width) as f32;
    let grid = (0..CELLS).flat_map(|i| (0..CELLS).flat_map(move |j| [middle(j), middle(i)]));
    let grid = Tensor::from_iter(grid, o.samples.device())?.reshape((CELLS * CELLS, 2))?;
    let [nll, ..] = o.flow.costs(&grid)?;
    let density = values(&nll.neg()?.exp()?)?;
    let mut panel = square("learnt density");
    panel.heat = Some(Heat {
        x: WINDOW,
        y: WINDOW,
        values: density.chunks_exact(CELLS).map(<[f64]>::to_vec).collect(),
        name: String::new(),
        limits: None,
        numbers: false,
    });
    Ok(panel)
}

type Figure = fn(&Costs) -> f64;

/// Likelihood, transport cost and violation of the HJB equation over the iterations, a row for each
/// problem, a curve for each precision.
pub(crate) fn costs(path: &Path, by_problem: &[&[Outcome]]) -> Result<()> {
    let figures: [(&str, Figure); 3] = [
        ("negative log-likelihood", |c| c.nll),
        ("transport cost L", |c| c.transport),
        ("HJB violation R", |c| c.residual),
    ];
    picture(path, (1140, 300 * by_problem.len() as u32), |area| {
        let panels = area.split_evenly((by_problem.len(), figures.len()));
        for (panels, of) in panels.chunks(figures.len()).zip(by_problem) {
            for (panel, (name, figure)) in panels.iter().zip(figures) {
                history(of, name, figure).draw(panel)?;
            }
        }
        Ok(())
    })
}

fn history(outcomes: &[Outcome], name: &str, figure: Figure) -> Panel {
    let title = outcomes.first().map_or("", |o| o.problem.name);
    let mut panel = Panel::new(title, "iteration", name);
    panel.scales[1] = match name.starts_with("HJB") {
        true => Scale::Decades,
        false => Scale::Linear,
    };
    let curve = |(i, o): (usize, &Outcome)| {
        let costs: Vec<f64> = o.history.iter().map(figure).collect();
        let window = SMOOTHING.min(costs.len()).max(1);
        let middle = |(i, of): (usize, &[f64])| ((i + window / 2) as f64, mean(of));
        let points: Vec<_> = costs.windows(window).enumerate().map(middle).collect();
        Curve::new(o.mode.name, colour(i), points)
    };
    panel.curves = outcomes.iter().enumerate().map(curve).collect();
    panel
}
