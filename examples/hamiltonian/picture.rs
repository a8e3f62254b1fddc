//! The picture: for each system the learnt energy with a roll-out, and the true energy along roll-outs.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::nn::energy::{Energy, Potential};
use candle_diffeq::nn::{Activation, EnergyMlp, Linear, Perceptron};
use candle_diffeq::Time;
use candle_nn::VarMap;

use crate::training::{Kind, Outcome};
use common::chart::{colour, picture, Curve, Panel, TRUTH};
use common::plane::Window;
use common::{values, Result};

/// The trajectory that is shown.
const SHOWN: usize = 0;

pub(crate) fn draw(path: &Path, outcomes: &[Outcome], device: &Device) -> Result<()> {
    let mut names: Vec<_> = outcomes.iter().map(|o| o.task.name).collect();
    names.dedup();
    picture(path, (1100, 340 * names.len() as u32), |area| {
        let rows = area.split_evenly((names.len(), 1));
        for (name, row) in names.iter().zip(&rows) {
            let all = outcomes.iter().filter(|o| o.task.name == *name);
            let seed = all.clone().map(|o| o.seed).min();
            let own: Vec<_> = all.filter(|o| Some(o.seed) == seed).collect();
            let (left, right) = row.split_horizontally(520);
            portrait(&own, device)?.draw(&left)?;
            energies(&own)?.draw(&right)?;
        }
        Ok(())
    })
}

/// A path of states `(times, rows, features)`: their first two.
fn path_of(states: &Tensor) -> Result<Vec<(f64, f64)>> {
    let one = values(&states.narrow(1, SHOWN, 1)?)?;
    let features = states.dim(2)?;
    Ok(one.chunks(features).map(|x| (x[0], x[1])).collect())
}

fn portrait(own: &[&Outcome], device: &Device) -> Result<Panel> {
    let Some(first) = own.first() else {
        return Err("no outcome to draw".into());
    };
    let window = Window::around(&first.truth.narrow(2, 0, 2)?)?;
    // H of a plane; that of two bodies has eight coordinates.
    let plane = first.task.features() == 2;
    let learnt = own.iter().find(|o| plane && o.kind == Kind::Hamiltonian);
    let heat = learnt.map(|o| {
        let energy = energy_of(&o.vars)?;
        let t = Time::new(0.0, DType::F32, device);
        let of = |x: &Tensor| Ok(energy.gradient(&t, x)?.0);
        window.heat(80, (DType::F32, device), of, "")
    });
    let mut curves = vec![Curve::new("truth", TRUTH, path_of(&first.truth)?).width(5)];
    for (i, o) in own.iter().enumerate() {
        let name = format!("{}, {}", o.kind.name(), o.dtype.name());
        curves.push(Curve::new(name, colour(i), path_of(&o.rolled)?).width(2));
    }
    Ok(Panel {
        heat: heat.transpose()?,
        curves,
        ranges: window.ranges(),
        ..match plane {
            true => Panel::new(
                format!("{}: learnt H, and a roll-out to t = 20", first.task.name),
                "q",
                "p",
            ),
            false => Panel::new(
                format!("{}: the first one's roll-out to t = 20", first.task.name),
                "x",
                "y",
            ),
        }
    })
}

/// The network of a map of variables.
fn energy_of(vars: &VarMap) -> Result<EnergyMlp> {
    let data = vars.data().lock().map_err(|_| "the variables are locked")?;
    let mut layers = vec![];
    for i in 0.. {
        let of = |part: &str| data.get(&format!("f.{i}.{part}"));
        let Some(weight) = of("weight") else { break };
        let bias = of("bias").map(|b| b.as_tensor().detach());
        layers.push(Linear::from(candle_nn::Linear::new(
            weight.as_tensor().detach(),
            bias,
        )));
    }
    let net = Perceptron::from_layers(layers, Activation::Tanh)?;
    Ok(EnergyMlp::of(net, Energy::Output)?)
}

fn energies(own: &[&Outcome]) -> Result<Panel> {
    let mut curves = vec![];
    let mut title = String::new();
    for (i, o) in own.iter().enumerate() {
        let energy = |x: &Tensor| -> Result<Vec<f64>> {
            let one = x.narrow(1, SHOWN, 1)?;
            let energy = o.task.system.energy(&one)?;
            Ok(values(&energy.ok_or("a system without energy")?)?)
        };
        let along = |e: Vec<f64>| o.times.iter().copied().zip(e).collect::<Vec<_>>();
        if i == 0 {
            title = format!("{}: true energy along it", o.task.name);
            curves.push(Curve::new("truth", TRUTH, along(energy(&o.truth)?)).width(5));
        }
        let name = format!("{}, {}", o.kind.name(), o.dtype.name());
        curves.push(Curve::new(name, colour(i), along(energy(&o.rolled)?)).width(2));
    }
    Ok(Panel {
        curves,
        ..Panel::new(title, "t", "energy")
    })
}
