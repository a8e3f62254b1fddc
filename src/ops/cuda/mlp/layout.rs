//! Where a network lies in shared memory, and a method as kernels read it.

use candle_core::cuda_backend::cudarc::driver::LaunchConfig;

use super::super::launch::THREADS;
use super::{
    Fit, LayerOf, Net, NetLayer, NetMethod, StepsOf, GROUP, MOST_LAYERS, MOST_STAGES, PITCH,
};
use crate::tableau::Tableau;

/// Where everything of a net is in shared memory.
pub(super) fn outline(layers: &[LayerOf<'_>], dim: usize, time: bool, keeps_slopes: bool) -> Net {
    let mut net = Net {
        layers: [NetLayer::default(); MOST_LAYERS],
        count: layers.len() as i32,
        dim: dim as i32,
        time: time.into(),
        activation: 0,
        dtype: 0,
        keeps_slopes: keeps_slopes.into(),
        weights: 0,
        slot: 0,
        cotangents: 0,
        widest: 0,
    };
    for (at, layer) in net.layers.iter_mut().zip(layers) {
        let (outputs, inputs) = (layer.weight.dims()[0], layer.weight.dims()[1]);
        let padded = outputs.next_multiple_of(GROUP) as i32;
        (at.inputs, at.outputs, at.padded) = (inputs as i32, outputs as i32, padded);
        at.skips = layer.skips.into();
        at.weights = net.weights;
        // A product reads whole groups of inputs.
        at.biases = at.weights + inputs.next_multiple_of(GROUP) as i32 * padded;
        net.weights = at.biases + padded;
        at.input = net.slot;
        net.slot += at.inputs;
        at.cotangent = net.cotangents;
        net.cotangents += at.outputs;
        net.widest = net.widest.max(at.inputs).max(at.outputs);
    }
    if keeps_slopes {
        for at in &mut net.layers[..layers.len().saturating_sub(1)] {
            at.slope = net.slot;
            net.slot += at.outputs;
        }
    }
    net
}

/// The fastest way to use at most `limit` bytes of shared memory, if there is one.
pub(super) fn fit(net: &Net, stages: usize, steps: StepsOf, limit: usize) -> Option<Fit> {
    // What the kernels declare beside, and the states that they hold beside y_n: y_{n+1}, or v.
    let (reserved, beside) = match steps {
        StepsOf::Batch => (1 << 10, 0),
        StepsOf::Row => (24 << 10, net.dim as usize),
    };
    let limit = limit.checked_sub(reserved)?;
    let bytes = |weights: i32, features: usize| 4 * (weights as usize + features * PITCH);
    let (slot, dim) = (net.slot as usize, net.dim as usize);
    let forward = bytes(net.weights, slot + dim + beside + stages * dim);
    let backward = |keeps_all: bool, parts_shared: bool| {
        let slots = if keeps_all { stages } else { 1 } * slot;
        let rest = 2 * dim + beside + 2 * stages * dim + (net.widest + net.cotangents) as usize;
        let parts = if parts_shared { net.weights } else { 0 };
        bytes(net.weights + parts, slots + rest)
    };
    let ways = [(true, true), (false, true), (true, false), (false, false)];
    let way = ways
        .into_iter()
        .find(|&(all, parts)| backward(all, parts) <= limit);
    let (keeps_all, parts_shared) = way.filter(|_| forward <= limit)?;
    Some(Fit {
        forward,
        backward: backward(keeps_all, parts_shared),
        keeps_all,
        parts_shared,
    })
}

/// Steps of every row may need the last stage, which is not the solution's own, for outputs inside them.
pub(super) fn in_numbers(tableau: &Tableau, steps: StepsOf) -> NetMethod {
    let active = match steps {
        StepsOf::Batch => tableau.active(),
        StepsOf::Row => tableau.dense_active(),
    };
    let mut method = NetMethod {
        a: [[0.0; MOST_STAGES]; MOST_STAGES],
        b: [0.0; MOST_STAGES],
        c: [0.0; MOST_STAGES],
        active: [0; MOST_STAGES],
        stages: tableau.stages() as i32,
    };
    for (i, active) in active.into_iter().enumerate() {
        let row = tableau.a(i);
        method.a[i][..row.len()].copy_from_slice(row);
        (method.b[i], method.c[i]) = (tableau.b()[i], tableau.c()[i]);
        method.active[i] = active.into();
    }
    method
}

pub(super) fn with_shared(blocks: u32, bytes: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (blocks, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: bytes as u32,
    }
}
