//! What is kept of a tile's trajectory: by default all states, one after the other in one piece of
//! memory; otherwise what a checkpoint plan keeps.

use std::sync::Arc;

use candle_core::DType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::error::Result;
use crate::memory::{extend, room_for};
use crate::simd::Element;
use crate::stats::Stats;
use crate::trajectory::{Checkpoint, Store, Trajectory};

/// The trajectory of a tile.
pub(super) enum TileTrajectory<T> {
    All(States<T>),
    Planned(Trajectory<Snapshot<T>, TileStore>),
}

impl<T: Element> TileTrajectory<T> {
    /// An empty one for so many steps from y, everything that a step carries in state precision.
    pub(super) fn new(
        checkpoint: Checkpoint,
        steps: usize,
        store: TileStore,
        y: &[T],
    ) -> Result<Self> {
        Ok(match checkpoint {
            Checkpoint::All => Self::All(States::new(store, steps)?),
            plan => Self::Planned(Trajectory::new(plan, steps, store, &Snapshot::of(y)?)?),
        })
    }

    /// An empty one for a number of steps that is not known yet, of one row.
    pub(super) fn online(checkpoint: Checkpoint, store: TileStore, y: &[T]) -> Result<Self> {
        Ok(match checkpoint {
            Checkpoint::All => Self::All(States::new(store, 0)?),
            plan => Self::Planned(Trajectory::online(plan, store, &Snapshot::of(y)?)?),
        })
    }

    /// Makes room for so many states, if there is memory and they are small.
    pub(super) fn reserve(&mut self, states: usize) {
        if let Self::All(all) = self {
            all.reserve(states);
        }
    }

    /// Whether a backward pass is possible.
    pub(super) fn can_rewind(&self) -> bool {
        match self {
            Self::All(_) => true,
            Self::Planned(trajectory) => trajectory.can_rewind(),
        }
    }

    /// Keeps what a step carries, y_n first, of one row or of all lanes, at the start of step n if it is wanted; n ascends from 0.
    pub(super) fn keep(&mut self, n: usize, y: &[T]) -> Result<()> {
        match self {
            Self::All(states) => states.push(&y[..states.store.size])?,
            Self::Planned(trajectory) if trajectory.wants(n) => {
                trajectory.offer(n, &Snapshot::of(y)?)?;
            }
            Self::Planned(_) => {}
        }
        Ok(())
    }

    /// Bytes of what is kept where steps carry so many numbers.
    pub(super) fn held(&self, numbers: usize) -> u64 {
        let bytes = match self {
            // With the room that more states will take first.
            Self::All(states) => states.room() * states.store.dtype.size_in_bytes(),
            Self::Planned(planned) => planned.kept_states() * numbers * size_of::<T>(),
        };
        bytes as u64
    }

    /// Notes what is kept.
    pub(super) fn record(&self, stats: &mut Stats) {
        match self {
            Self::All(states) => {
                let TileStore {
                    dtype, elements, ..
                } = states.store;
                let bytes = elements * dtype.size_in_bytes();
                stats.kept(states.count(), states.count() * bytes);
            }
            Self::Planned(trajectory) => trajectory.record(stats),
        }
    }
}

/// States of a tile in store precision, in the order of the steps.
pub(super) struct States<T> {
    store: TileStore,
    numbers: Numbers<T>,
}

enum Numbers<T> {
    State(Vec<T>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl<T: Element> States<T> {
    fn new(store: TileStore, steps: usize) -> Result<Self> {
        let (what, scratch) = ("kept states", steps.saturating_mul(store.size));
        Ok(Self {
            numbers: match store.dtype {
                DType::BF16 => Numbers::Bf16(room_for(what, scratch)?),
                DType::F16 => Numbers::F16(room_for(what, scratch)?),
                _ => Numbers::State(room_for(what, scratch)?),
            },
            store,
        })
    }

    /// Numbers that there is room for.
    fn room(&self) -> usize {
        match &self.numbers {
            Numbers::State(all) => all.capacity(),
            Numbers::Bf16(all) => all.capacity(),
            Numbers::F16(all) => all.capacity(),
        }
    }

    /// Makes room for so many more, as far as they fill a kilobyte.
    fn reserve(&mut self, states: usize) {
        const MOST: usize = 1 << 8;
        let more = states.saturating_mul(self.store.size).min(MOST);
        // Without it, memory is found later or refused there.
        let _ = match &mut self.numbers {
            Numbers::State(all) => all.try_reserve_exact(more),
            Numbers::Bf16(all) => all.try_reserve_exact(more),
            Numbers::F16(all) => all.try_reserve_exact(more),
        };
    }

    /// How many there are.
    fn count(&self) -> usize {
        let numbers = match &self.numbers {
            Numbers::State(all) => all.len(),
            Numbers::Bf16(all) => all.len(),
            Numbers::F16(all) => all.len(),
        };
        numbers / self.store.size.max(1)
    }

    fn push(&mut self, y: &[T]) -> Result<()> {
        let what = "kept states";
        match &mut self.numbers {
            Numbers::State(all) => extend(what, all, y),
            Numbers::Bf16(all) => extend(what, all, &narrowed(y)),
            Numbers::F16(all) => extend(what, all, &narrowed(y)),
        }
    }

    /// ŷ_n back into a tile or a row; `None` if it is not there.
    pub(super) fn load(&self, n: usize, y: &mut [T]) -> Option<()> {
        let size = self.store.size;
        let place = n * size..(n + 1) * size;
        match &self.numbers {
            Numbers::State(all) => y.copy_from_slice(all.get(place)?),
            Numbers::Bf16(all) => widen(y, all.get(place)?),
            Numbers::F16(all) => widen(y, all.get(place)?),
        }
        Some(())
    }
}

/// To bf16 or f16.
fn narrowed<T: Element, L: Copy + Default>(y: &[T]) -> Vec<L>
where
    [L]: HalfFloatSliceExt,
{
    let single: Vec<f32> = y.iter().map(|y| y.to_f64() as f32).collect();
    let mut low = vec![L::default(); y.len()];
    low.convert_from_f32_slice(&single);
    low
}

/// A kept state of a tile, in its store precision.
#[derive(Clone, Debug)]
pub(super) enum Snapshot<T> {
    State(Arc<Vec<T>>),
    Bf16(Arc<[bf16]>),
    F16(Arc<[f16]>),
}

impl<T: Element> Snapshot<T> {
    /// In state precision.
    pub(super) fn of(y: &[T]) -> Result<Self> {
        let mut state = room_for("a kept state", y.len())?;
        state.extend_from_slice(y);
        Ok(Self::State(Arc::new(state)))
    }

    /// Back into a tile or a row.
    pub(super) fn load(&self, y: &mut [T]) {
        match self {
            Self::State(kept) => y.copy_from_slice(kept),
            Self::Bf16(kept) => widen(y, kept),
            Self::F16(kept) => widen(y, kept),
        }
    }
}

/// The inverse.
fn widen<T: Element, L: Copy + Into<f32>>(y: &mut [T], kept: &[L]) {
    for (y, x) in y.iter_mut().zip(kept) {
        *y = T::of(f64::from((*x).into()));
    }
}

/// How the states of a tile are kept: all leaves alike, since they lie in one tile.
#[derive(Clone, Debug)]
pub(super) struct TileStore {
    /// Store precision.
    dtype: DType,
    /// Of the whole batch: what is counted is what all tiles keep together.
    elements: usize,
    /// Numbers of a state of the tile or the row; what a step carries may be a multiple.
    size: usize,
}

impl TileStore {
    /// For states of so many elements, of the whole batch, and of so many numbers in what is kept here.
    pub(super) fn new(dtype: DType, elements: usize, size: usize) -> Self {
        Self {
            dtype,
            elements,
            size,
        }
    }
}

impl<T: Element> Store<Snapshot<T>> for TileStore {
    fn stored(&self, y: &Snapshot<T>) -> Result<Snapshot<T>> {
        let Snapshot::State(state) = y else {
            return Ok(y.clone());
        };
        Ok(match self.dtype {
            DType::BF16 => Snapshot::Bf16(narrowed(&state[..self.size]).into()),
            DType::F16 => Snapshot::F16(narrowed(&state[..self.size]).into()),
            _ if state.len() > self.size => Snapshot::of(&state[..self.size])?,
            _ => y.clone(),
        })
    }

    fn bytes(&self, y: &Snapshot<T>) -> usize {
        self.elements
            * match y {
                Snapshot::State(y) => y.len() / self.size.max(1) * size_of::<T>(),
                Snapshot::Bf16(_) | Snapshot::F16(_) => 2,
            }
    }
}
