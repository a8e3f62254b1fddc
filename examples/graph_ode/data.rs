//! Cora: papers, which of them cite which, and the words in them.

use candle_core::{DType, Device, Tensor};
use candle_diffeq::nn::graph::Csr;

use common::Result;

const FILE: &[u8] = include_bytes!("cora.safetensors");

pub(crate) const CLASSES: usize = 7;

/// The graph on a device.
pub(crate) struct Data {
    /// Â = D^−½ (A + I) D^−½.
    pub(crate) graph: Csr,
    /// `(papers, words)`, every row of sum 1.
    pub(crate) words: Csr,
    pub(crate) train: Part,
    pub(crate) validation: Part,
    pub(crate) test: Part,
}

/// Some papers.
pub(crate) struct Part {
    /// Their numbers and classes, u32.
    pub(crate) papers: Tensor,
    pub(crate) classes: Tensor,
}

impl Data {
    pub(crate) fn read(device: &Device) -> Result<Self> {
        let tensors = candle_core::safetensors::load_buffer(FILE, &Device::Cpu)?;
        let get = |name: &str| tensors.get(name).ok_or(format!("no tensor `{name}`"));
        let labels = get("labels")?.to_dtype(DType::U32)?;
        let papers = labels.dim(0)?;
        let edges: Vec<[u32; 2]> = get("edges")?
            .to_vec2::<u32>()?
            .into_iter()
            .map(|edge| [edge[0], edge[1]])
            .collect();
        let graph = Csr::normalised_adjacency(papers, &edges, DType::F32, device)?;
        let offsets = get("features.row_offsets")?.to_vec1::<u32>()?;
        let offsets: Vec<usize> = offsets.into_iter().map(|x| x as usize).collect();
        let columns = get("features.columns")?.to_vec1::<u32>()?;
        let words = columns.iter().max().map_or(0, |&w| w as usize + 1);
        let share = |row: &[usize]| vec![1.0 / (row[1] - row[0]) as f32; row[1] - row[0]];
        let shares: Vec<f32> = offsets.windows(2).flat_map(share).collect();
        let shares = Tensor::new(shares.as_slice(), device)?;
        let part = |name: &str| -> Result<Part> {
            let papers = get(&format!("split.{name}"))?;
            Ok(Part {
                classes: labels.index_select(papers, 0)?.to_device(device)?,
                papers: papers.to_device(device)?,
            })
        };
        Ok(Self {
            graph,
            words: Csr::new(offsets, columns, words, shares)?,
            train: part("train")?,
            validation: part("val")?,
            test: part("test")?,
        })
    }
}
