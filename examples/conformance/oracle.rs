//! One oracle file: the inputs of a problem, and what an independent implementation in f64 got.
//!
//! Tensors: `t`, `y0`, `w.<name>`; `loss.v`, `loss.target` and per method `<m>/traj`, `<m>/loss`,
//! `<m>/grad.y0`, `<m>/grad.t`, `<m>/grad.w.<name>`, or one `cotangent` and the same without `<m>/`.
//! A state of several tensors has `y0.0`, `y0.1`, … and so for everything of its shapes.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;

/// Failures of a file carry its name; those of a solve are of [`candle_diffeq::Error`].
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;

/// Result of everything here.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Tensors with their names.
pub(crate) type Named = Vec<(String, Tensor)>;

/// The content of one file; all tensors in f64.
pub(crate) struct Oracle {
    /// Name of the file.
    pub(crate) file: String,
    activation: Option<String>,
    meta: serde_json::Value,
    tensors: BTreeMap<String, Tensor>,
}

impl Oracle {
    /// Reads one file.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let failed = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
        let bytes = std::fs::read(path).map_err(|e| failed(&e))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| failed(&e))?;
        let header = header.metadata().clone().unwrap_or_default();
        let meta = header
            .get("meta")
            .ok_or_else(|| failed(&"no `meta` in its header"))?;
        let meta: serde_json::Value = serde_json::from_str(meta).map_err(|e| failed(&e))?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).and_then(|all| {
            all.into_iter()
                .map(|(n, x)| Ok((n, x.to_dtype(DType::F64)?)))
                .collect()
        });
        Ok(Self {
            file: file.into_owned(),
            activation: meta["activation"].as_str().map(str::to_owned),
            meta,
            tensors: tensors.map_err(|e| failed(&e))?,
        })
    }

    /// Every `.safetensors` file of a directory, by name.
    pub(crate) fn read_all(dir: &Path) -> Result<Vec<Self>> {
        let failed = |e| format!("{}: {e}", dir.display());
        let entries = std::fs::read_dir(dir).map_err(failed)?;
        let paths = entries.map(|entry| Ok(entry?.path()));
        let mut paths = paths.collect::<std::io::Result<Vec<_>>>().map_err(failed)?;
        paths.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
        paths.sort();
        if paths.is_empty() {
            return Err(format!("{}: no .safetensors file", dir.display()).into());
        }
        paths.iter().map(|path| Self::read(path)).collect()
    }

    /// The same on another device.
    pub(crate) fn on(mut self, device: &Device) -> Result<Self> {
        for x in self.tensors.values_mut() {
            *x = x.to_device(device)?;
        }
        Ok(self)
    }

    /// Where its tensors are.
    pub(crate) fn device(&self) -> Device {
        let first = self.tensors.values().next();
        first.map_or(Device::Cpu, |x| x.device().clone())
    }

    /// The problem's name in `meta`.
    pub(crate) fn problem(&self) -> Option<&str> {
        self.said("problem")
    }

    /// What `meta` says under a name.
    pub(crate) fn said(&self, name: &str) -> Option<&str> {
        self.meta[name].as_str()
    }

    /// The activation's name in `meta`.
    #[allow(dead_code)] // of the files of the zoo only
    pub(crate) fn activation(&self) -> Option<&str> {
        self.activation.as_deref()
    }

    /// An error about this file.
    pub(crate) fn failed(&self, what: impl std::fmt::Display) -> Error {
        format!("{}: {what}", self.file).into()
    }

    /// One tensor.
    pub(crate) fn tensor(&self, name: &str) -> Result<&Tensor> {
        let missing = || self.failed(format_args!("no tensor `{name}`"));
        self.tensors.get(name).ok_or_else(missing)
    }

    /// A quantity of the state's structure: `name`, or `name.0`, `name.1`, …
    pub(crate) fn parts(&self, name: &str) -> Result<Named> {
        let part = |j| {
            Some((
                format!("{name}.{j}"),
                self.tensors.get(&format!("{name}.{j}"))?.clone(),
            ))
        };
        let parts: Named = (0..).map_while(part).collect();
        if parts.is_empty() {
            return Ok(vec![(name.to_owned(), self.tensor(name)?.clone())]);
        }
        Ok(parts)
    }

    /// All tensors under a prefix, without it, in the order of their names.
    pub(crate) fn under(&self, prefix: &str) -> Named {
        let named = |(name, x): (&String, &Tensor)| {
            Some((name.strip_prefix(prefix)?.to_owned(), x.clone()))
        };
        self.tensors.iter().filter_map(named).collect()
    }

    /// Whether the file tells what a method gives.
    pub(crate) fn knows(&self, method: &str) -> bool {
        self.tensors.contains_key(&format!("{method}/loss"))
    }
}
