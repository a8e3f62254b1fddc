//! Whether a velocity changes with the state at all.

use candle_core::Tensor;
use rand::rngs::StdRng;
use rand::SeedableRng;

use super::super::moved::Written;
use super::super::{Point, Subject};
use super::{norm, numbers, Of, Trial, SEED};
use crate::field::{pullback::alike, Field};
use crate::time::Time;

/// Whether tensors of the velocity change, smoothly, with tensors of the state, of these pairs (velocity, state);
/// `None` where the velocity is not finite and says nothing.
pub(crate) fn depends_on(
    field: &Field<'_>,
    t: &Time,
    y: &[Tensor],
    pairs: &[(usize, usize)],
    reach: f64,
) -> candle_core::Result<Option<bool>> {
    let point = Point::of(t, y);
    let (dtype, device) = t.kind();
    let time = point.time(point.t, dtype, &device);
    let k = field.velocity(&time, &point.y)?;
    if field.returns_velocity() {
        alike(&point.y, &k)?;
    }
    let base = numbers(&k)?;
    if !base.iter().all(|k| k.is_finite()) {
        return Ok(None);
    }
    let subject = Subject {
        field,
        twin: field,
        parameters: vec![],
        mover: &Written {
            field,
            only: Some(&[]),
        },
        reads_time: false,
        reach,
        strict: false,
    };
    let trial = Trial {
        subject: &subject,
        point: &point,
        base: &base,
        dtype,
        device: &device,
    };
    let mut rng = StdRng::seed_from_u64(SEED);
    // The velocity's tensor that an element belongs to.
    let owner: Vec<_> = (0..k.len())
        .flat_map(|j| vec![j; k[j].elem_count()])
        .collect();
    for leaf in 0..y.len() {
        let among = |i: usize| pairs.contains(&(owner[i], leaf));
        let of = Of::State(leaf);
        let x = trial.value(of)?;
        let mut changes = pairs.iter().any(|(_, l)| *l == leaf) && x.elem_count() > 0;
        changes = changes && !trial.is_a_label(leaf)?;
        for attempt in 0..2 {
            if !changes {
                break;
            }
            let d = trial.direction(of, &numbers(std::slice::from_ref(&x))?, &mut rng);
            let epsilon = trial.epsilon(of) / 3f64.powi(attempt);
            changes = match trial.smooth(of, &x, &d, epsilon, among)? {
                Some(smooth) => {
                    let doubt = norm(smooth.doubt.iter().flatten().copied());
                    let read = base.iter().enumerate().filter(|(i, _)| among(*i));
                    let noise = 8.0 * trial.unit() * norm(read.map(|(_, k)| *k));
                    norm(smooth.change.iter().copied()) > 4.0 * (doubt + noise)
                }
                None => false,
            };
        }
        if changes && !trial.is_made_of_steps(of, &mut rng)? {
            return Ok(Some(true));
        }
    }
    Ok(Some(false))
}
