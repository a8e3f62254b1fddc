//! The state y: one tensor or several, of any shapes.

use std::ops::Range;

use candle_core::{DType, Shape, Tensor};

use crate::error::{Error, Result};

/// What can be integrated, or handed to a field as arguments: `Tensor`, `Vec<Tensor>`, `[Tensor; N]`, and
/// tuples of two or three.
///
/// The tensors ("leaves") may have different shapes and dtypes; they share a device.  `()` has none: it
/// stands for a field without arguments.
pub trait State: Clone {
    /// The tensors, in order; clones share storage.
    fn leaves(&self) -> Vec<Tensor>;

    /// The state made of these tensors.
    ///
    /// # Errors
    /// [`Error::LeafCount`] if their number is not that of the type.
    fn from_leaves(leaves: Vec<Tensor>) -> Result<Self>;

    /// Whether tensors of arguments keep their dtypes, instead of being rounded to compute precision, where
    /// [`OdeOptions::args_precision`](crate::OdeOptions::args_precision) says nothing.  Default: no.
    fn keeps_dtypes(&self) -> bool {
        false
    }

    /// Times at which a field that has this as its arguments jumps; see
    /// [`VectorField::jumps`](crate::VectorField::jumps).  Default: none.
    fn jumps(&self) -> Vec<f64> {
        vec![]
    }
}

impl State for Tensor {
    fn leaves(&self) -> Vec<Tensor> {
        vec![self.clone()]
    }

    fn from_leaves(leaves: Vec<Tensor>) -> Result<Self> {
        let [leaf] = <[Tensor; 1]>::from_leaves(leaves)?;
        Ok(leaf)
    }
}

impl State for () {
    fn leaves(&self) -> Vec<Tensor> {
        vec![]
    }

    fn from_leaves(leaves: Vec<Tensor>) -> Result<Self> {
        <[Tensor; 0]>::from_leaves(leaves).map(|[]| ())
    }
}

impl State for Vec<Tensor> {
    fn leaves(&self) -> Vec<Tensor> {
        self.clone()
    }

    fn from_leaves(leaves: Vec<Tensor>) -> Result<Self> {
        Ok(leaves)
    }
}

impl<const N: usize> State for [Tensor; N] {
    fn leaves(&self) -> Vec<Tensor> {
        self.to_vec()
    }

    fn from_leaves(leaves: Vec<Tensor>) -> Result<Self> {
        leaves
            .try_into()
            .map_err(|leaves: Vec<Tensor>| Error::LeafCount {
                expected: N,
                got: leaves.len(),
            })
    }
}

impl State for (Tensor, Tensor) {
    fn leaves(&self) -> Vec<Tensor> {
        vec![self.0.clone(), self.1.clone()]
    }

    fn from_leaves(leaves: Vec<Tensor>) -> Result<Self> {
        <[Tensor; 2]>::from_leaves(leaves).map(Into::into)
    }
}

impl State for (Tensor, Tensor, Tensor) {
    fn leaves(&self) -> Vec<Tensor> {
        vec![self.0.clone(), self.1.clone(), self.2.clone()]
    }

    fn from_leaves(leaves: Vec<Tensor>) -> Result<Self> {
        <[Tensor; 3]>::from_leaves(leaves).map(Into::into)
    }
}

/// Where each leaf lies in the packed state, a vector of all elements.
#[derive(Clone, Debug)]
pub(crate) struct Packing {
    shapes: Vec<Shape>,
}

impl Packing {
    pub(crate) fn new(leaves: &[Tensor]) -> Self {
        Self {
            shapes: leaves.iter().map(|y| y.shape().clone()).collect(),
        }
    }

    /// Of leaves of these shapes.
    pub(crate) fn of(shapes: Vec<Shape>) -> Self {
        Self { shapes }
    }

    /// Of n states, whose rows follow on each other.
    pub(crate) fn repeated(&self, n: usize) -> Self {
        let of = |shape: &Shape| match shape.dims() {
            [rows, row @ ..] => [&[n * rows], row].concat().into(),
            [] => shape.clone(),
        };
        Self {
            shapes: self.shapes.iter().map(of).collect(),
        }
    }

    /// Shapes of the leaves.
    pub(crate) fn shapes(&self) -> &[Shape] {
        &self.shapes
    }

    /// Elements of the whole state.
    pub(crate) fn len(&self) -> usize {
        self.shapes.iter().map(Shape::elem_count).sum()
    }

    /// Leaves to one tensor in `dtype`: a single one as it is, several as a vector; differentiable.
    pub(crate) fn join(leaves: &[Tensor], dtype: DType) -> Result<Tensor> {
        match leaves {
            [one] => Ok(one.to_dtype(dtype)?),
            _ => Self::pack(leaves, dtype),
        }
    }

    /// `(…, len)`, or `(…, shape)` of a single leaf, to leaves `(…, shape)`; differentiable.
    pub(crate) fn split(&self, joined: &Tensor) -> Result<Vec<Tensor>> {
        match self.shapes.as_slice() {
            [_] => Ok(vec![joined.clone()]),
            _ => self.unpack(joined),
        }
    }

    /// The dimensions of what [`join`](Self::join) makes of the leaves.
    pub(crate) fn joined(&self) -> Vec<usize> {
        match self.shapes.as_slice() {
            [one] => one.dims().to_vec(),
            _ => vec![self.len()],
        }
    }

    /// Leaves to one vector in `dtype`; differentiable.
    pub(crate) fn pack(leaves: &[Tensor], dtype: DType) -> Result<Tensor> {
        let flat = leaves
            .iter()
            .map(|y| y.flatten_all()?.to_dtype(dtype))
            .collect::<candle_core::Result<Vec<_>>>()?;
        Ok(match flat.as_slice() {
            [one] => one.clone(),
            _ => Tensor::cat(&flat, 0)?,
        })
    }

    /// `(…, len)` to leaves `(…, shape)`; differentiable.
    pub(crate) fn unpack(&self, packed: &Tensor) -> Result<Vec<Tensor>> {
        let lead = &packed.dims()[..packed.rank() - 1];
        let mut at = 0;
        self.shapes
            .iter()
            .map(|shape| {
                let n = shape.elem_count();
                let part = packed.narrow(packed.rank() - 1, at, n)?;
                at += n;
                Ok(part.reshape([lead, shape.dims()].concat())?)
            })
            .collect()
    }
}

/// Rows of a state, and the features of a row by leaf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RowLayout {
    pub(crate) rows: usize,
    pub(crate) features: Vec<usize>,
}

impl RowLayout {
    /// Features of a row, all leaves together.
    pub(crate) fn dim(&self) -> usize {
        self.features.iter().sum()
    }

    /// Where a leaf of the rows from `first` on begins in a packed state.
    pub(crate) fn offset(&self, leaf: usize, first: usize) -> usize {
        let before: usize = self.features[..leaf].iter().sum();
        before * self.rows + first * self.features[leaf]
    }

    /// Puts a tile, `[leaf][row]`, where its rows are in a packed state; the rest of `tiles`.
    pub(crate) fn place<'a, T: Copy>(
        &self,
        rows: &Range<usize>,
        mut tiles: &'a [T],
        packed: &mut [T],
    ) -> &'a [T] {
        for (leaf, &features) in self.features.iter().enumerate() {
            let part;
            (part, tiles) = tiles.split_at(rows.len() * features);
            packed[self.offset(leaf, rows.start)..][..part.len()].copy_from_slice(part);
        }
        tiles
    }
}
