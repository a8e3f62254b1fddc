//! What adaptive steps are controlled by, in device memory.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::{CudaDevice, Tensor};

use super::super::launch::{device_of, pointer, Operand};
use super::MOST_STAGES;
use crate::adaptive::{Control, OfLeaf, OnFailure, Rounding, Stability, Target};
use crate::error::Result;
use crate::tableau::Tableau;

/// Coefficients of a weight of the interpolant.
const DEGREE: usize = 8;

/// Laid out as `Control` in kernels/pace.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct NetControl {
    start: f64,
    direction: f64,
    order: f64,
    p: f64,
    i: f64,
    d: f64,
    safety: f64,
    limits: [f64; 2],
    first_step: f64,
    min_step: f64,
    max_step: f64,
    longest: f64,
    rtol: f64,
    atol: f64,
    rtols: u64,
    atols: u64,
    noise: f64,
    kappa: f64,
    roundoff: f64,
    /// 0 if steps are not limited by it.
    stable: f64,
    estimate: [f64; MOST_STAGES],
    states: [f64; MOST_STAGES],
    velocities: [f64; MOST_STAGES],
    interpolant: [[f64; DEGREE]; MOST_STAGES],
    targets: u64,
    points: u64,
    max_steps: u64,
    target_count: i32,
    point_count: i32,
    appended: i32,
    returns_all: i32,
    limited_is_error: i32,
    stops_all: i32,
    starts_at_jump: i32,
    limits_stability: i32,
}

/// A time at which a step must end.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct NetTarget {
    t: f64,
    jumps: i32,
    unused: i32,
}

// SAFETY: plain numbers, laid out as in kernels/pace.cuh.
unsafe impl DeviceRepr for NetControl {}
// SAFETY: as above.
unsafe impl DeviceRepr for NetTarget {}

/// The same, with what it points to.
pub(crate) struct DeviceControl {
    control: CudaSlice<NetControl>,
    _targets: CudaSlice<NetTarget>,
    _points: CudaSlice<f64>,
    _tolerances: [Option<Tensor>; 2],
}

/// What a solve of one tensor of the state is controlled by.
pub(crate) struct ControlOf<'a> {
    pub(crate) control: &'a Control,
    /// With its interpolant and f(t_{n+1}, y_{n+1}).
    pub(crate) tableau: &'a Tableau,
    /// The user's times.
    pub(crate) points: &'a [f64],
    /// rtol and atol.
    pub(crate) tolerances: [OfLeaf; 2],
    /// Of the tensor.
    pub(crate) roundings: Vec<Rounding>,
    /// Whether states are returned at all times, not at the last alone.
    pub(crate) returns_all: bool,
}

impl DeviceControl {
    /// `None` if the kernels do not know such a method.
    pub(crate) fn new(of: ControlOf<'_>, on: &Tensor) -> Result<Option<Self>> {
        let device: &CudaDevice = device_of(on)?;
        let ControlOf {
            control, tableau, ..
        } = of;
        let options = &control.options;
        let mut interpolant = [[0.0; DEGREE]; MOST_STAGES];
        for (i, to) in interpolant.iter_mut().enumerate() {
            let row = tableau.interpolant_row(i);
            let Some(to) = to.get_mut(..row.len()) else {
                return Ok(None);
            };
            to.copy_from_slice(row);
        }
        let weights = |of: &[f64]| -> Option<[f64; MOST_STAGES]> {
            let mut to = [0.0; MOST_STAGES];
            to.get_mut(..of.len())?.copy_from_slice(of);
            Some(to)
        };
        let Stability {
            interval,
            states,
            velocities,
        } = control.stability.clone().unwrap_or_default();
        let (Some(estimate), Some(states), Some(velocities)) = (
            weights(&control.estimate),
            weights(&states),
            weights(&velocities),
        ) else {
            return Ok(None);
        };
        let Some(rounding) = of.roundings.first() else {
            return Ok(None);
        };
        let (Ok(target_count), Ok(point_count)) = (
            i32::try_from(control.targets.len()),
            i32::try_from(of.points.len()),
        ) else {
            return Ok(None);
        };
        let target = |target: &Target| NetTarget {
            t: target.t,
            jumps: target.jumps.into(),
            unused: 0,
        };
        let targets: Vec<_> = control.targets.iter().map(target).collect();
        let (targets, points) = (device.clone_htod(&targets)?, device.clone_htod(of.points)?);
        let number = |of: &OfLeaf| match of {
            OfLeaf::Number(value) => *value,
            OfLeaf::Elements(_) => 0.0,
        };
        let elements = |of: &OfLeaf| match of {
            OfLeaf::Number(_) => Ok(None),
            OfLeaf::Elements(x) => x.contiguous().map(Some),
        };
        let tolerances = [elements(&of.tolerances[0])?, elements(&of.tolerances[1])?];
        let address = |x: &Option<Tensor>| match x {
            Some(x) => Ok(Operand::new(x)?.pointer),
            None => Ok::<_, crate::Error>(0),
        };
        let controller = options.controller;
        let numbers = NetControl {
            start: control.start,
            direction: control.direction,
            order: control.order,
            p: controller.p,
            i: controller.i,
            d: controller.d,
            safety: controller.safety,
            limits: controller.limits,
            first_step: options.first_step.unwrap_or(0.0),
            min_step: options.min_step,
            max_step: options.max_step,
            longest: control.longest(),
            rtol: number(&of.tolerances[0]),
            atol: number(&of.tolerances[1]),
            rtols: address(&tolerances[0])?,
            atols: address(&tolerances[1])?,
            noise: rounding.roundoff * rounding.weight,
            kappa: rounding.least,
            roundoff: rounding.roundoff,
            stable: controller.safety * interval,
            estimate,
            states,
            velocities,
            interpolant,
            targets: pointer(&targets),
            points: pointer(&points),
            max_steps: options.max_steps as u64,
            target_count,
            point_count,
            appended: control.appended.into(),
            returns_all: of.returns_all.into(),
            limited_is_error: options.limited_is_error.into(),
            stops_all: (options.on_failure == OnFailure::Error).into(),
            starts_at_jump: control.starts_at_jump.into(),
            limits_stability: options.stability_limit.into(),
        };
        Ok(Some(Self {
            control: device.clone_htod(&[numbers])?,
            _targets: targets,
            _points: points,
            _tolerances: tolerances,
        }))
    }

    pub(super) fn pointer(&self) -> u64 {
        pointer(&self.control)
    }
}
