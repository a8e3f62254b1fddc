//! The variables of one model on all ranks.

use std::collections::HashMap;
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Optimizer, VarMap};

use super::buckets::{self, Wire};
use super::totals::{maxima, of_first, sums};
use super::Group;
use crate::error::{Error, GroupDefect, Result};
use crate::loss_scaler::{LossScaler, Stepped};
use crate::ops;

/// Bytes of gradients in one message: long enough that its latency does not count.
const BUCKET: usize = 4 << 20;

/// One model on all ranks of a group: variables that start equal and stay equal, because every rank's optimiser gets the
/// same gradients.
///
/// Every function that takes gradients or rows must be called by all ranks, with the rows that each has.  A rank without
/// rows passes any scalar as its loss, such as zero, and 0 rows.
///
/// If a rank's backward pass or optimiser fails, the other ranks get [`GroupDefect::Left`] with the reason.
pub struct Replicas<'g> {
    group: &'g dyn Group,
    names: Vec<String>,
    variables: Vec<Var>,
    wire: Wire,
    bucket: usize,
    clip: Option<f64>,
}

/// What ranks tell each other before gradients.
struct Agreement {
    /// Of all ranks.
    rows: f64,
    /// On any rank.
    overflow: bool,
    /// Which variables have a gradient on any rank.
    present: Vec<bool>,
}

impl<'g> Replicas<'g> {
    /// The variables of a map, in the order of their names, with the values that rank 0 has.
    ///
    /// # Errors
    /// [`GroupDefect::OtherVariables`] on all ranks if these are not the same variables on all of them; of the group.
    pub fn new(group: &'g dyn Group, vars: &VarMap) -> Result<Self> {
        let data = vars.data().lock();
        let data = data.map_err(|_| {
            candle_core::Error::Msg("a thread panicked while it held the variables".into())
        })?;
        let mut named: Vec<_> = data.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
        drop(data);
        named.sort_by(|a, b| a.0.cmp(&b.0));
        let (names, variables) = named.into_iter().unzip();
        let replicas = Self {
            group,
            names,
            variables,
            wire: Wire::default(),
            bucket: BUCKET,
            clip: None,
        };
        replicas.compare()?;
        replicas.broadcast()?;
        Ok(replicas)
    }

    /// The numbers in which gradients travel.  Default [`Wire::F32`].
    pub fn wire(mut self, wire: Wire) -> Self {
        self.wire = wire;
        self
    }

    /// How many bytes of gradients one message holds.  Default 4 MiB.  A larger gradient is a message of its own.
    pub fn bucket(mut self, bytes: usize) -> Self {
        self.bucket = bytes;
        self
    }

    /// Scales averaged gradients down to this norm, of all variables together, where theirs is larger.  All ranks use the
    /// norm that rank 0 finds.  Default: no limit.
    ///
    /// # Errors
    /// [`GroupDefect::Clip`] unless the limit is positive.
    pub fn clip(mut self, limit: f64) -> Result<Self> {
        if limit.is_nan() || limit <= 0.0 {
            return Err(GroupDefect::Clip { limit }.into());
        }
        self.clip = Some(limit);
        Ok(self)
    }

    /// The variables, in the order of their names: for the optimiser.
    pub fn variables(&self) -> Vec<Var> {
        self.variables.clone()
    }

    /// Gives all ranks the values that rank 0 has, as [`new`](Self::new) does.
    ///
    /// # Errors
    /// Of the group.
    pub fn broadcast(&self) -> Result<()> {
        for var in &self.variables {
            let value = self.group.broadcast(var.as_tensor(), 0)?;
            if self.group.rank() > 0 {
                var.set(&value)?;
            }
        }
        Ok(())
    }

    /// By how much any element of any variable differs between ranks, at most: zero unless a program has gone wrong.
    ///
    /// # Errors
    /// Of the group.
    pub fn spread(&self) -> Result<f64> {
        let mut spread = 0f64;
        for var in &self.variables {
            let x = var.as_detached_tensor().to_dtype(DType::F64)?;
            let apart = (self.group.max(&x)? + self.group.max(&x.neg()?)?)?;
            spread = spread.max(ops::magnitude(&apart)?);
        }
        Ok(spread)
    }

    /// Replaces the gradients of this rank's mean over its `rows` by those of the mean over the rows of all ranks, in the
    /// dtypes of the variables.  They are summed in f32 (f64 for variables of f64), and are the same bits on all ranks and
    /// in every run with as many ranks.  A variable that has a gradient on some rank has one on all ranks; one that has none
    /// anywhere stays without.
    ///
    /// # Errors
    /// Of the group.
    pub fn average(&self, grads: &mut GradStore, rows: usize) -> Result<()> {
        let agreed = self.agree(grads, rows, false)?;
        self.average_as(grads, rows, &agreed).map(drop)
    }

    /// Backward through this rank's mean over its rows, averaging, and the optimiser's step.
    ///
    /// # Errors
    /// Of the backward pass, of the group, of the optimiser.
    pub fn backward_step(
        &self,
        loss: &Tensor,
        rows: usize,
        optimiser: &mut impl Optimizer,
    ) -> Result<()> {
        let mut grads = self.told(loss.backward().map_err(Error::from))?;
        self.average(&mut grads, rows)?;
        self.told(optimiser.step(&grads).map_err(Error::from))
    }

    /// The same with a scale on the loss, as [`LossScaler::backward_step`] does it.  If gradients of any rank overflow, be
    /// it that a solve with [`OnOverflow::SkipUpdate`](crate::scaling::OnOverflow::SkipUpdate) says so, all ranks skip the step and lower their scales, so that
    /// scales stay equal.
    ///
    /// # Errors
    /// Of the backward pass, of the group, of the optimiser.
    pub fn scaled_step(
        &self,
        scaler: &mut LossScaler,
        loss: &Tensor,
        rows: usize,
        optimiser: &mut impl Optimizer,
    ) -> Result<Stepped> {
        let mut grads = self.told(scaler.scaled(loss).and_then(|l| Ok(l.backward()?)))?;
        let finite = self.told(scaler.unscale(&mut grads, &self.variables))?;
        let agreed = self.agree(&grads, rows, rows > 0 && !finite)?;
        // What is summed, and cast, may overflow where its parts do not; on all ranks alike.
        let finite = !agreed.overflow && self.average_as(&mut grads, rows, &agreed)?;
        scaler.update(finite);
        if !finite {
            return Ok(Stepped::Skipped);
        }
        self.told(optimiser.step(&grads).map_err(Error::from))?;
        Ok(Stepped::Taken)
    }

    /// Rank 0 writes the variables to a file of safetensors, which is complete at every moment: a rank that dies in the
    /// middle leaves the file that was there before.  Returns on all ranks when it is written.
    ///
    /// # Errors
    /// [`GroupDefect::Checkpoint`] on all ranks if it cannot be written; of the group.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let outcome = match self.group.rank() {
            0 => self.write(path),
            _ => Ok(()),
        };
        self.of_rank_0(path, outcome)
    }

    /// Rank 0 reads a file that [`save`](Self::save), or `VarMap::save`, has written, and all ranks get its values; so
    /// only rank 0 needs to see the file.  It may hold more than these variables.  What an optimiser remembers is not in it.
    ///
    /// # Errors
    /// [`GroupDefect::Checkpoint`] on all ranks if it cannot be read, or if a variable is missing or of another shape or
    /// dtype, in which case no variable has changed; of the group.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let outcome = match self.group.rank() {
            0 => self.read(path),
            _ => Ok(()),
        };
        self.of_rank_0(path, outcome)?;
        self.broadcast()
    }

    fn write(&self, path: &Path) -> std::result::Result<(), String> {
        let named = self.names.iter().zip(&self.variables);
        let named = named.map(|(name, var)| (name.as_str(), var.as_detached_tensor()));
        let named: HashMap<&str, Tensor> = named.collect();
        let mut part = path.to_path_buf().into_os_string();
        part.push(".part");
        candle_core::safetensors::save(&named, &part).map_err(|e| e.to_string())?;
        std::fs::rename(&part, path).map_err(|e| e.to_string())
    }

    fn read(&self, path: &Path) -> std::result::Result<(), String> {
        let held = candle_core::safetensors::load(path, &Device::Cpu).map_err(|e| e.to_string())?;
        let mut values = vec![];
        for (name, var) in self.names.iter().zip(&self.variables) {
            let value = held.get(name).ok_or_else(|| format!("{name} is missing"))?;
            if value.dims() != var.dims() || value.dtype() != var.dtype() {
                let of = |x: &Tensor| format!("{:?} of shape {:?}", x.dtype(), x.dims());
                return Err(format!(
                    "{name} is {} there, and {} here",
                    of(value),
                    of(var)
                ));
            }
            values.push(value.to_device(var.device()).map_err(|e| e.to_string())?);
        }
        let mut pairs = self.variables.iter().zip(&values);
        pairs
            .try_for_each(|(var, value)| var.set(value))
            .map_err(|e| e.to_string())
    }

    /// What rank 0 came to, on all ranks.
    fn of_rank_0(&self, path: &Path, outcome: std::result::Result<(), String>) -> Result<()> {
        let failed = of_first(self.group, f64::from(u8::from(outcome.is_err())))?;
        if failed == 0.0 {
            return Ok(());
        }
        let path = path.display().to_string();
        let message = outcome
            .err()
            .unwrap_or_else(|| "its own error says why".into());
        Err(GroupDefect::Checkpoint { path, message }.into())
    }

    /// Tells the other ranks about an error of this one.
    fn told<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|error| self.group.give_up(&error.to_string()))
    }

    /// Whether all ranks hold the variables of rank 0.
    fn compare(&self) -> Result<()> {
        let [high, low] = self.fingerprint();
        let first = [of_first(self.group, high)?, of_first(self.group, low)?];
        let rank = match first == [high, low] {
            true => -1.0,
            false => self.group.rank() as f64,
        };
        match maxima(self.group, &[rank])?[0] {
            rank if rank >= 0.0 => {
                let rank = rank as usize;
                Err(GroupDefect::OtherVariables { rank }.into())
            }
            _ => Ok(()),
        }
    }

    /// Of names, shapes and dtypes (FNV-1a): two halves, each of which f64 holds exactly.
    fn fingerprint(&self) -> [f64; 2] {
        let described = self.names.iter().zip(&self.variables);
        let described = described.map(|(n, v)| format!("{n} {:?} {:?}\n", v.dims(), v.dtype()));
        let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        let bytes = described.flat_map(String::into_bytes);
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325, mix);
        [(hash >> 32) as f64, (hash & 0xffff_ffff) as f64]
    }

    /// One small message in which ranks tell each other their rows, overflows, and which gradients they have.
    fn agree(&self, grads: &GradStore, rows: usize, overflow: bool) -> Result<Agreement> {
        let flag = |is: bool| f64::from(u8::from(is));
        let mut given = vec![rows as f64, flag(overflow)];
        let present = self.variables.iter().map(|var| grads.get(var).is_some());
        given.extend(present.map(flag));
        let sums = sums(self.group, &given)?;
        Ok(Agreement {
            rows: sums[0],
            overflow: sums[1] > 0.0,
            present: sums[2..].iter().map(|count| *count > 0.0).collect(),
        })
    }

    /// Averages, clips, casts, and tells whether all gradients are finite in the dtypes of their variables.
    fn average_as(&self, grads: &mut GradStore, rows: usize, agreed: &Agreement) -> Result<bool> {
        let present = self.variables.iter().zip(&agreed.present);
        let vars: Vec<_> = present.filter(|(_, is)| **is).map(|(v, _)| v).collect();
        let weight = match rows {
            0 => None,
            rows => Some(rows as f64 / agreed.rows),
        };
        let mut parts = Vec::with_capacity(vars.len());
        for var in &vars {
            let summed = match var.dtype() {
                DType::F64 => DType::F64,
                _ => DType::F32,
            };
            // The gradient of a rank without rows may be NaN.
            parts.push(match (grads.remove(var), weight) {
                (Some(grad), Some(weight)) => {
                    (grad.detach().flatten_all()?.to_dtype(summed)? * weight)?
                }
                _ => Tensor::zeros(var.elem_count(), summed, var.device())?,
            });
        }
        let mut means = buckets::sum(self.group, &parts, self.bucket, self.wire)?;
        if let Some(limit) = self.clip {
            let norm = of_first(self.group, norm(&means)?)?;
            if norm > limit && norm.is_finite() {
                for mean in &mut means {
                    *mean = (&*mean * (limit / norm))?;
                }
            }
        }
        let mut finite = true;
        for (var, mean) in vars.into_iter().zip(means) {
            let mean = mean.reshape(var.shape())?.to_dtype(var.dtype())?;
            let held = match var.dtype() {
                DType::F64 => mean.clone(),
                _ => mean.to_dtype(DType::F32)?,
            };
            finite &= ops::magnitude(&held)?.is_finite();
            grads.insert(var, mean);
        }
        Ok(finite)
    }
}

/// √Σ x², of all together, in f64.
fn norm(tensors: &[Tensor]) -> Result<f64> {
    let mut sum = 0.0;
    for x in tensors {
        let squares = x.to_dtype(DType::F64)?.sqr()?.sum_all()?;
        sum += squares.to_scalar::<f64>()?;
    }
    Ok(sum.sqrt())
}
