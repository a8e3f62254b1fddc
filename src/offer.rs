//! Capabilities of this crate's fields that the solver can use instead of single evaluations, such as whole solves
//! tile by tile.  Each field describes its own capabilities, so that the solver does not depend on any particular
//! field.

use std::sync::Arc;

use candle_core::Tensor;

use crate::field::parts::{OfParts, Parts};
use crate::field::{Leaves, Offer, SharedField, VectorField};
use crate::intervals::Intervals;
#[cfg(feature = "cuda")]
use crate::problem::Problem;
#[cfg(feature = "cuda")]
use crate::rows::Solved;
use crate::rows::{Around, DrivenRows, RowField, Rows};
use crate::state::State;
#[cfg(feature = "cuda")]
use crate::stats::Stats;

/// A field for other threads, as a part of another one.
pub(crate) type SharedLeaves = Leaves<SharedField, Vec<Tensor>>;

/// An offer, as the solver reads it.
pub(crate) struct Offered {
    /// Whole solves tile by tile on the CPU.
    pub(crate) rows: Option<Rows>,
    /// The same of an equation that is driven by noise.
    pub(crate) driven: Option<DrivenRows>,
    /// The field for other threads.
    pub(crate) shared: SharedField,
    /// Whole solves in one launch on a GPU.
    #[cfg(feature = "cuda")]
    pub(crate) launch: Option<Box<dyn Launch>>,
}

/// A field whose whole solves may be one launch.
#[cfg(feature = "cuda")]
pub(crate) trait Launch: Send + Sync {
    /// Solves the problem, or leaves it to the general path.
    fn solve(
        &self,
        problem: &Problem,
        y0: &candle_core::Tensor,
        stats: &mut Stats,
    ) -> crate::Result<Option<Solved>>;
}

impl Offered {
    /// The offer of a field over S, which may be integrated tile by tile if it says so.
    pub(crate) fn of<S, F>(field: &F, has_tiles: bool) -> Self
    where
        S: State + 'static,
        F: RowField + VectorField<S>,
    {
        let field = Arc::new(field.clone());
        Self {
            rows: has_tiles.then(|| Rows::new(Arc::clone(&field))),
            driven: None,
            shared: Arc::new(Leaves::<Arc<F>, S>::new(field)),
            #[cfg(feature = "cuda")]
            launch: None,
        }
    }

    /// The same with a field for few rows; see [`Rows::few`].
    pub(crate) fn few<F: RowField>(self, field: F) -> Self {
        Self {
            rows: self.rows.map(|rows| rows.few(field)),
            ..self
        }
    }

    /// Of a field that is made of the one offered: `shared` makes the same for other threads.
    pub(crate) fn around<F>(self, around: Around, shared: impl FnOnce(SharedLeaves) -> F) -> Self
    where
        F: VectorField<Vec<Tensor>> + Send + Sync + 'static,
    {
        Self {
            rows: self.rows.map(|rows| rows.around(around)),
            driven: None,
            shared: Arc::new(shared(Leaves::new(self.shared))),
            #[cfg(feature = "cuda")]
            launch: None,
        }
    }

    /// Of fields that take turns, each in the interval of time that has its number: `shared` makes the same for other
    /// threads.
    pub(crate) fn in_turn<F>(
        parts: Vec<Self>,
        intervals: &Intervals,
        shared: impl FnOnce(Vec<SharedLeaves>) -> F,
    ) -> Self
    where
        F: VectorField<Vec<Tensor>> + Send + Sync + 'static,
    {
        let parts = parts.into_iter().map(|part| (part.rows, part.shared));
        let (rows, fields): (Vec<_>, Vec<_>) = parts.unzip();
        let rows = rows.into_iter().collect::<Option<_>>();
        Self {
            rows: rows.map(|rows| Rows::in_turn(rows, intervals.clone())),
            driven: None,
            shared: Arc::new(shared(fields.into_iter().map(Leaves::new).collect())),
            #[cfg(feature = "cuda")]
            launch: None,
        }
    }

    /// The same for a field that is solved in one launch where it fits.
    #[cfg(feature = "cuda")]
    pub(crate) fn launched(self, field: impl Launch + 'static) -> Self {
        Self {
            launch: Some(Box::new(field)),
            ..self
        }
    }

    /// What a field offers, if it is one of this crate, or an equation made of such.
    pub(crate) fn from(offer: Option<Offer>) -> Option<Self> {
        match offer?.0.downcast::<Self>() {
            Ok(offered) => Some(*offered),
            Err(parts) => Self::of_parts(*parts.downcast().ok()?),
        }
    }

    /// Of an equation.
    fn of_parts(OfParts(parts): OfParts) -> Option<Self> {
        let parts = parts.into_iter().map(|part| Self::from(Some(part)));
        let parts = parts.collect::<Option<Vec<_>>>()?.into_iter();
        let (rows, shared): (Vec<_>, Vec<_>) = parts.map(|part| (part.rows, part.shared)).unzip();
        let rows = rows.into_iter().collect::<Option<_>>();
        Some(Self {
            rows: None,
            driven: rows.map(DrivenRows::new),
            shared: Arc::new(Parts::new(shared)),
            #[cfg(feature = "cuda")]
            launch: None,
        })
    }

    /// What its tiles read when a solve begins, if it has some.
    pub(crate) fn weights(&self) -> Option<Vec<Tensor>> {
        match (&self.rows, &self.driven) {
            (Some(rows), _) => Some(rows.weights()),
            (None, Some(driven)) => Some(driven.weights()),
            (None, None) => None,
        }
    }
}

impl From<Offered> for Offer {
    fn from(offered: Offered) -> Self {
        Self(Box::new(offered))
    }
}
