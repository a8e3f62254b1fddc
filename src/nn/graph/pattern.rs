//! Where the entries of a sparse matrix are.

use std::sync::Arc;

use candle_core::Result;

use super::pool::Pool;

/// Places of the entries, row by row, and the same by columns.
#[derive(Debug)]
pub(super) struct Pattern {
    /// The entries of row i are those from `by_row.offsets[i]` to `by_row.offsets[i + 1]`.
    pub(super) by_row: Side,
    /// Those of column j, with the number that each has among the entries by row.
    pub(super) by_column: Side,
    pub(super) numbers: Vec<u32>,
    /// Memory of evaluations over this graph: models are built anew for each solve, and the graph is not.
    pub(super) pool: Arc<Pool>,
    /// The same in the memory of GPUs, once they have multiplied with it.
    #[cfg(feature = "cuda")]
    on_devices: super::device::OnDevices,
}

/// The entries of one line after the other, and in which line of the other direction each is.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) offsets: Vec<usize>,
    pub(super) across: Vec<u32>,
}

impl Side {
    /// How many rows, or columns.
    pub(super) fn lines(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The entries of a line.
    pub(super) fn line(&self, i: usize) -> std::ops::Range<usize> {
        self.offsets[i]..self.offsets[i + 1]
    }

    /// The line of every entry.
    pub(super) fn line_of_each(&self) -> Vec<u32> {
        let line = |i: usize| self.line(i).map(move |_| i as u32);
        (0..self.lines()).flat_map(line).collect()
    }
}

impl Pattern {
    /// The rows, or the columns, in the memory of a GPU.
    #[cfg(feature = "cuda")]
    pub(super) fn on_device(
        &self,
        device: &candle_core::CudaDevice,
        by_column: bool,
    ) -> Result<Arc<crate::ops::cuda::csr::DeviceSide>> {
        let side = match by_column {
            true => (&self.by_column, Some(&self.numbers[..])),
            false => (&self.by_row, None),
        };
        self.on_devices.get(device, by_column, side)
    }

    /// Rows that begin at these entries, with the column of each entry.
    ///
    /// # Errors
    /// If offsets do not begin at 0, fall, or end elsewhere than at the last entry; if a column is beyond the last, or a
    /// size cannot be counted in 32 bits.
    pub(super) fn new(offsets: Vec<usize>, across: Vec<u32>, columns: usize) -> Result<Self> {
        let entries = across.len();
        let rises = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
        if offsets.first() != Some(&0) || offsets.last() != Some(&entries) || !rises {
            candle_core::bail!(
                "offsets of the rows of a sparse matrix must rise from 0 to the number of its entries, {entries}"
            )
        }
        if let Some(beyond) = across.iter().find(|&&j| j as usize >= columns) {
            candle_core::bail!(
                "an entry of a sparse matrix is in column {beyond}, but there are {columns} columns, numbered from 0"
            )
        }
        let rows = offsets.len() - 1;
        if [rows, columns, entries]
            .iter()
            .any(|&n| n > u32::MAX as usize)
        {
            candle_core::bail!("a sparse matrix cannot have {rows} rows, {columns} columns and {entries} entries: each number must be below 2^32")
        }
        // Counting sort by column keeps the order of rows, so sums over a column have a fixed order, too.
        let mut starts = vec![0; columns + 1];
        for &j in &across {
            starts[j as usize + 1] += 1;
        }
        for j in 0..columns {
            starts[j + 1] += starts[j];
        }
        let mut next = starts.clone();
        let (mut rows_of, mut numbers) = (vec![0; entries], vec![0; entries]);
        let by_row = Side { offsets, across };
        for i in 0..by_row.lines() {
            for e in by_row.line(i) {
                let at = &mut next[by_row.across[e] as usize];
                (rows_of[*at], numbers[*at]) = (i as u32, e as u32);
                *at += 1;
            }
        }
        Ok(Self {
            by_row,
            by_column: Side {
                offsets: starts,
                across: rows_of,
            },
            numbers,
            pool: Arc::default(),
            #[cfg(feature = "cuda")]
            on_devices: Default::default(),
        })
    }
}
