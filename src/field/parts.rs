//! Equations of several parts that are evaluated one by one: the drift and the diffusion of a stochastic differential
//! equation.

use candle_core::backprop::GradStore;
use candle_core::Tensor;

use super::{Cotangents, Leaves, Offer, Pullback, VectorField};
use crate::time::Time;

/// The parts of an equation, each a field over lists of tensors, as one: it returns what all of them do, one after the
/// other.  A solver evaluates the parts; the whole is what a check looks at.
pub(crate) struct Parts<B>(Vec<Leaves<B, Vec<Tensor>>>);

/// What each part of an equation offers.
pub(crate) struct OfParts(pub(crate) Vec<Offer>);

impl<B> Parts<B> {
    pub(crate) fn new(parts: Vec<B>) -> Self {
        Self(parts.into_iter().map(Leaves::new).collect())
    }
}

impl<B> VectorField<Vec<Tensor>> for Parts<B>
where
    B: std::ops::Deref<Target: VectorField<Vec<Tensor>>>,
{
    fn velocity(&self, t: &Time, y: &Vec<Tensor>) -> candle_core::Result<Vec<Tensor>> {
        let mut all = vec![];
        for part in &self.0 {
            all.extend(part.velocity(t, y)?);
        }
        Ok(all)
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &Vec<Tensor>,
    ) -> candle_core::Result<(Vec<Tensor>, Pullback<'f, Vec<Tensor>>)> {
        let (mut all, mut pulls) = (vec![], vec![]);
        for part in &self.0 {
            let (k, pull) = part.vjp(t, y)?;
            pulls.push((k.len(), pull));
            all.extend(k);
        }
        let pull = move |v: &Vec<Tensor>| {
            let (mut rest, mut sum) = (v.as_slice(), None);
            for (count, pull) in &pulls {
                let own;
                (own, rest) = rest.split_at(*count);
                let pulled = pull(&own.to_vec())?;
                sum = Some(match sum.take() {
                    None => pulled,
                    Some(before) => added(before, pulled)?,
                });
            }
            match sum {
                Some(sum) => Ok(sum),
                None => candle_core::bail!("an equation without parts"),
            }
        };
        Ok((all, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let listed = self.0.iter().map(|part| part.parameters());
        Some(listed.collect::<Option<Vec<_>>>()?.concat())
    }

    fn jumps(&self) -> Vec<f64> {
        let mut all: Vec<_> = self.0.iter().flat_map(|part| part.jumps()).collect();
        all.sort_by(f64::total_cmp);
        all.dedup();
        all
    }

    /// Only where all parts have something to offer.
    fn offer(&self) -> Option<Offer> {
        let offers = self.0.iter().map(|part| part.offer());
        Some(Offer(Box::new(OfParts(offers.collect::<Option<_>>()?))))
    }

    fn parts(&self) -> Vec<&dyn VectorField<Vec<Tensor>>> {
        self.0.iter().map(|part| part as _).collect()
    }
}

/// The sum of what two pull-backs returned.
fn added(
    a: Cotangents<Vec<Tensor>>,
    b: Cotangents<Vec<Tensor>>,
) -> candle_core::Result<Cotangents<Vec<Tensor>>> {
    let y = a.y.iter().zip(&b.y).map(|(a, b)| a + b);
    let y = y.collect::<candle_core::Result<_>>()?;
    let t = match (a.t, b.t) {
        (Some(a), Some(b)) => Some((a + b)?),
        (a, b) => a.or(b),
    };
    let (mut params, ids): (GradStore, Vec<_>) = (a.params, b.params.get_ids().copied().collect());
    for id in ids {
        let (before, more) = (params.get_id(id).cloned(), b.params.get_id(id).cloned());
        if let Some(more) = more {
            let sum = match before {
                Some(before) => (before + more)?,
                None => more,
            };
            params.insert_id(id, sum);
        }
    }
    Ok(Cotangents { y, t, params })
}
