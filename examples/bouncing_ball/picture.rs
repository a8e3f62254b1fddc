//! The picture: the flights, the derivatives of every bounce, and the fit.

use std::path::Path;

use crate::ball::PARAMETERS;
use crate::{Bounce, Fit, Flight, GUESS, TRUTH};
use common::chart::{self, colour, picture, Curve, Mark, Panel, Scale, SeriesLabelPosition};
use common::Result;

/// `flights` are those of the truth, of the guess, and of the fit.
pub(crate) fn draw(
    path: &Path,
    bounces: &[Bounce],
    flights: &[Flight; 3],
    fit: &Fit,
) -> Result<()> {
    picture(path, (1240, 860), |area| {
        let (top, bottom) = area.split_vertically(430);
        flown(flights, fit).draw(&top)?;
        let areas = bottom.split_evenly((1, 3));
        slopes(bounces).draw(&areas[0])?;
        let iterations = |ys: &[f64]| -> Vec<(f64, f64)> {
            ys.iter().enumerate().map(|(i, y)| (i as f64, *y)).collect()
        };
        let last = (fit.restitution.len() - 1) as f64;
        let truth = [(0.0, TRUTH.restitution), (last, TRUTH.restitution)];
        Panel {
            curves: vec![
                Curve::new("truth", chart::TRUTH, truth).width(4),
                Curve::new("fit", colour(0), iterations(&fit.restitution)).width(2),
            ],
            legend: SeriesLabelPosition::LowerRight,
            ..Panel::new("Restitution", "iteration", "e")
        }
        .draw(&areas[1])?;
        Panel {
            scales: [Scale::Linear, Scale::Decades],
            curves: vec![Curve::new("", colour(0), iterations(&fit.loss)).width(2)],
            ..Panel::new("Loss", "iteration", "mean square, s²")
        }
        .draw(&areas[2])
    })
}

fn flown([truth, guess, fitted]: &[Flight; 3], fit: &Fit) -> Panel {
    let on_the_ground =
        |bounces: &[f64]| -> Vec<(f64, f64)> { bounces.iter().map(|t| (*t, 0.0)).collect() };
    let named = |name: &str, e: f64| format!("{name}, e = {e:.4}");
    Panel {
        curves: vec![
            Curve::new(
                named("truth", TRUTH.restitution),
                chart::TRUTH,
                truth.path.clone(),
            )
            .width(5),
            Curve::new(named("first guess", GUESS), colour(1), guess.path.clone())
                .mark(Mark::Dashed),
            Curve::new(named("fit", fit.found()), colour(0), fitted.path.clone()).width(2),
            Curve::new("its bounces", colour(0), on_the_ground(&fitted.bounces))
                .mark(Mark::Dots(5)),
        ],
        ..Panel::new("Ten bounces", "t, s", "height, m")
    }
}

fn slopes(bounces: &[Bounce]) -> Panel {
    let of = |which: usize, i: usize| {
        bounces
            .iter()
            .enumerate()
            .map(move |(n, b)| ((n + 1) as f64, b.slopes[which][i].abs()))
    };
    let curves = (0..PARAMETERS.len()).flat_map(|i| {
        [
            Curve::new("", chart::TRUTH, of(1, i)).width(4),
            Curve::new(PARAMETERS[i], colour(i), of(0, i)).mark(Mark::Dots(4)),
        ]
    });
    Panel {
        scales: [Scale::Linear, Scale::Decades],
        curves: curves.collect(),
        // Room for the legend.
        ranges: [Some(0.0..11.0), Some(0.02..1000.0)],
        legend: SeriesLabelPosition::UpperLeft,
        ..Panel::new("|∂tₙ / ∂·|; grey: closed form", "bounce n", "")
    }
}
