//! The pictures: training and its best trajectory; the field that was learnt beside the true one.

use std::path::Path;

use candle_core::{Device, IndexOp, Tensor};
use candle_diffeq::options::TimeGrid;

use crate::oscillator::{self, Trajectory, START};
use crate::stream::{self, Square};
use crate::training::Outcome;
use common::chart::{
    colour, picture, Area, Arrows, Curve, Heat, Mark, Panel, RGBColor, Scale, SeriesLabelPosition,
    TRUTH,
};
use common::Result;

const SQUARE: Square = [-3.0, 3.0];
/// Where the trajectories of `draw_field` begin, and for how long they are followed.
const STARTS: [[f64; 2]; 5] = [
    [2.0, 0.0],
    [1.0, 1.0],
    [-1.0, -1.0],
    [0.5, -0.5],
    [-2.0, 1.5],
];
const LENGTH: f64 = 8.0;
/// Cells along a side of the map of errors.
const CELLS: usize = 50;
const LINES: RGBColor = RGBColor(90, 90, 90);

type Point = (f64, f64);

/// Training and test error, the test trajectory over time and in the plane.
pub(crate) fn draw_training(path: &Path, data: &Trajectory, outcomes: &[Outcome]) -> Result<()> {
    let start = Tensor::new(&[START], &Device::Cpu)?;
    let learnt = |o: &Outcome| pairs(&o.model.solve(&start, &data.times)?.squeeze(1)?);
    let learnt = outcomes.iter().map(learnt).collect::<Result<Vec<_>>>()?;
    let truth = pairs(&data.states)?;
    // Of the truth and of every outcome, by what is drawn of the states.
    let curves = |of: &dyn Fn(&[Point]) -> Vec<Point>, is_named: bool| {
        let truth = Curve::new(named(is_named, "truth"), TRUTH, of(&truth)).width(4);
        let learnt = outcomes.iter().zip(&learnt).enumerate();
        let learnt = learnt.map(|(i, (o, states))| {
            Curve::new(named(is_named, o.dtype.name()), colour(i), of(states))
        });
        std::iter::once(truth).chain(learnt).collect::<Vec<_>>()
    };
    let times = || data.times.points().iter().copied();
    let first = |states: &[Point]| times().zip(states.iter().map(|y| y.0)).collect();
    let second = |states: &[Point]| times().zip(states.iter().map(|y| y.1)).collect();
    let over_time = Panel {
        curves: [curves(&first, true), curves(&second, false)]
            .into_iter()
            .flatten()
            .collect(),
        // Room for the legend.
        ranges: [Some(0.0..21.8), None],
        ..Panel::new(
            "Van der Pol's oscillator, learnt from windows of 10 times",
            "t",
            "y₁, y₂",
        )
    };
    let portrait = Panel {
        curves: curves(&|states| states.to_vec(), false),
        ..Panel::new("phase portrait, best weights", "y₁", "y₂")
    };
    picture(path, (1200, 800), |area| {
        let (top, bottom) = area.split_vertically(360);
        let (left, right) = bottom.split_horizontally(600);
        over_time.draw(&top)?;
        errors(&left, outcomes)?;
        portrait.draw(&right)
    })
}

/// A name in the legend, or none.
fn named(is_named: bool, name: &str) -> String {
    if is_named {
        name.to_owned()
    } else {
        String::new()
    }
}

fn errors(area: &Area<'_>, outcomes: &[Outcome]) -> Result<()> {
    let mut curves = vec![];
    for (i, o) in outcomes.iter().enumerate() {
        let tests = o.tests.iter().map(|(n, error)| (*n as f64, *error));
        let losses = o
            .losses
            .iter()
            .enumerate()
            .map(|(n, loss)| (n as f64, *loss));
        let name = o.dtype.name();
        curves.push(Curve::new(format!("{name}, test"), colour(i), tests).width(2));
        // One loss in ten: they are noisy.
        curves.push(Curve::new("", colour(i), losses.step_by(10)));
    }
    Panel {
        scales: [Scale::Linear, Scale::Decades],
        curves,
        ..Panel::new(
            "errors: whole trajectory (wide), windows (thin)",
            "iteration",
            "mean square error",
        )
    }
    .draw(area)
}

/// Stream lines, trajectories from other starts, and errors of the velocity.
pub(crate) fn draw_field(path: &Path, outcome: &Outcome) -> Result<()> {
    let learnt = |y: &Tensor| outcome.model.velocity(y);
    let truth = |y: &Tensor| Ok(oscillator::velocity(y)?);
    let title = format!("learnt field, {}", outcome.dtype.name());
    picture(path, (1000, 940), |area| {
        let areas = area.split_evenly((2, 2));
        streams(&areas[0], "true field", &truth)?;
        streams(&areas[1], &title, &learnt)?;
        trajectories(&areas[2], outcome)?;
        differences(&areas[3], &truth, &learnt)
    })
}

fn streams(area: &Area<'_>, title: &str, field: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
    let velocity = |(x, y): Point| {
        let velocity = pairs(&field(&Tensor::new(&[[x, y]], &Device::Cpu)?)?)?;
        Ok(velocity[0])
    };
    let lines = stream::lines(SQUARE, velocity)?;
    let arrow = |line: &Vec<Point>| {
        let i = line.len() / 2;
        let (from, to) = (line[i - 2], line[(i + 2).min(line.len() - 1)]);
        (from, (to.0 - from.0, to.1 - from.1))
    };
    Panel {
        ranges: [Some(SQUARE[0]..SQUARE[1]), Some(SQUARE[0]..SQUARE[1])],
        arrows: vec![Arrows {
            colour: LINES,
            arrows: lines.iter().map(arrow).collect(),
        }],
        curves: lines
            .into_iter()
            .map(|line| Curve::new("", LINES, line))
            .collect(),
        ..Panel::new(title, "y₁", "y₂")
    }
    .draw(area)
}

fn trajectories(area: &Area<'_>, outcome: &Outcome) -> Result<()> {
    let starts = Tensor::new(&STARTS, &Device::Cpu)?;
    let times = TimeGrid::linspace(0.0, LENGTH, 401)?;
    let truth = oscillator::solve(&starts, &times)?;
    let learnt = outcome.model.solve(&starts, &times)?;
    let mut curves = vec![];
    for i in 0..STARTS.len() {
        curves.push(Curve::new(named(i == 0, "truth"), TRUTH, pairs(&truth.i((.., i))?)?).width(4));
        curves.push(
            Curve::new(
                named(i == 0, "learnt"),
                colour(0),
                pairs(&learnt.i((.., i))?)?,
            )
            .width(2),
        );
    }
    let ends = STARTS.map(|[x, y]| (x, y));
    curves.push(Curve::new("starts", colour(1), ends).mark(Mark::Dots(4)));
    Panel {
        curves,
        legend: SeriesLabelPosition::LowerRight,
        ranges: [Some(SQUARE[0]..SQUARE[1]), Some(SQUARE[0]..SQUARE[1])],
        ..Panel::new(format!("five starts, t up to {LENGTH}"), "y₁", "y₂")
    }
    .draw(area)
}

fn differences(
    area: &Area<'_>,
    truth: &dyn Fn(&Tensor) -> Result<Tensor>,
    learnt: &dyn Fn(&Tensor) -> Result<Tensor>,
) -> Result<()> {
    let [low, high] = SQUARE;
    let at = |i: usize| low + (high - low) * (i as f64 + 0.5) / CELLS as f64;
    let points = (0..CELLS).flat_map(|i| (0..CELLS).flat_map(move |j| [at(j), at(i)]));
    let points = Tensor::from_vec(points.collect::<Vec<_>>(), (CELLS * CELLS, 2), &Device::Cpu)?;
    let errors = pairs(&(learnt(&points)? - truth(&points)?)?)?;
    let row = |errors: &[Point]| errors.iter().map(|e| e.0.hypot(e.1).log10()).collect();
    let trained = oscillator::Trajectory::new()?.states;
    Panel {
        heat: Some(Heat {
            x: low..high,
            y: low..high,
            values: errors.chunks(CELLS).map(row).collect(),
            name: "log₁₀ ‖learnt − true velocity‖".to_owned(),
            limits: None,
            numbers: false,
        }),
        curves: vec![Curve::new("trained on", RGBColor(0, 0, 0), pairs(&trained)?).width(2)],
        ..Panel::new("error of the velocity", "y₁", "y₂")
    }
    .draw(area)
}

/// The rows of `(n, 2)`.
fn pairs(x: &Tensor) -> Result<Vec<Point>> {
    Ok(x.to_vec2::<f64>()?
        .iter()
        .map(|row| (row[0], row[1]))
        .collect())
}
