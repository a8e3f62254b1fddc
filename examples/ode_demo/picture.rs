//! The picture: trajectories over time, phase portrait, losses.

use std::path::Path;

use candle_core::DType;
use plotters::prelude::*;

use crate::common::chart::{panel, use_own_font, Curve, Labels, Scale, COLOURS, TRUTH};
use crate::common::Result;
use crate::spiral::Trajectory;
use crate::training::Outcome;

/// Losses are averaged over this many iterations, to show the trend under the noise.
const SMOOTHING: usize = 20;

/// Writes the picture.
pub(crate) fn draw(path: &Path, data: &Trajectory, outcomes: &[Outcome]) -> Result<()> {
    use_own_font()?;
    let truth = data.states.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let times = data.times.points();
    let area = BitMapBackend::new(path, (1200, 860)).into_drawing_area();
    area.fill(&WHITE)?;
    let (top, bottom) = area.split_vertically(380);
    let (left, right) = bottom.split_horizontally(600);

    let over_time = |states: &[Vec<f64>], i: usize| -> Vec<(f64, f64)> {
        times.iter().zip(states).map(|(t, y)| (*t, y[i])).collect()
    };
    let plane = |states: &[Vec<f64>]| states.iter().map(|y| (y[0], y[1])).collect();
    let named = |points, i: usize, named: bool| Curve {
        points,
        colour: COLOURS[i % COLOURS.len()],
        name: if named {
            outcomes[i].dtype.name().to_owned()
        } else {
            String::new()
        },
        width: 1,
    };
    let true_curve = |points, named: bool| Curve {
        points,
        colour: TRUTH,
        name: if named {
            "truth".to_owned()
        } else {
            String::new()
        },
        width: 4,
    };

    let mut curves = vec![];
    for component in 0..2 {
        curves.push(true_curve(over_time(&truth, component), component == 0));
        for (i, outcome) in outcomes.iter().enumerate() {
            curves.push(named(
                over_time(&outcome.states, component),
                i,
                component == 0,
            ));
        }
    }
    let labels = Labels {
        title: "y' = y³A, learnt in mixed precision",
        x: "t",
        y: "y₁, y₂",
    };
    panel(&top, &labels, Scale::Linear, &curves)?;

    let mut curves = vec![true_curve(plane(&truth), false)];
    curves.extend((0..outcomes.len()).map(|i| named(plane(&outcomes[i].states), i, false)));
    let labels = Labels {
        title: "phase portrait",
        x: "y₁",
        y: "y₂",
    };
    panel(&left, &labels, Scale::Linear, &curves)?;

    let curves: Vec<_> = (0..outcomes.len())
        .map(|i| named(smoothed(&outcomes[i].losses), i, true))
        .collect();
    let labels = Labels {
        title: "loss (mean of 20)",
        x: "iteration",
        y: "L1 loss",
    };
    panel(&right, &labels, Scale::Logarithmic, &curves)?;
    area.present()?;
    Ok(())
}

fn smoothed(losses: &[f64]) -> Vec<(f64, f64)> {
    let window = SMOOTHING.min(losses.len());
    let mean = |(i, window): (usize, &[f64])| (i as f64, crate::common::mean(window));
    losses
        .windows(window.max(1))
        .enumerate()
        .map(mean)
        .collect()
}
