//! The variables of one model on all ranks.

use std::collections::{HashMap, HashSet};
use std::fs::OpenOptions;
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Optimizer, VarMap};

use super::buckets::{self, Wire};
use super::group::{told, Group};
use super::totals::{maxima, of_first, sums};
use crate::error::{Error, GroupDefect, Result};
use crate::loss_scaler::{is_finite, LossScaler, Stepped};
use crate::ops;

/// Bytes of gradients in one message: long enough that its latency does not count.
const BUCKET: usize = 4 << 20;
/// Bytes of a message in which rank 0 says what failed.
const MESSAGE: usize = 512;

/// One model on all ranks of a group.  The variables start with the same values and stay the same, because every
/// rank's optimiser gets the same gradients.
///
/// Every function that takes gradients or rows must be called by all ranks, with the rows that each has.  A rank without
/// rows passes any scalar as its loss, such as zero, and 0 rows.  Ranks that train in different ways get
/// [`GroupDefect::OtherOptions`] at their first gradients.
///
/// If a rank's backward pass or optimiser fails, the other ranks get [`GroupDefect::Left`] with the reason.
pub struct Replicas<'g> {
    group: &'g dyn Group,
    names: Vec<String>,
    variables: Vec<Var>,
    /// Which of them are trained.
    trained: Vec<usize>,
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
    /// Which trained variables have a gradient on any rank with rows.
    present: Vec<usize>,
}

/// Those of these variables that are not another one under a second name: a gradient is there once.
fn first_of_each(variables: &[Var]) -> Vec<usize> {
    let mut seen = HashSet::new();
    let all = 0..variables.len();
    all.filter(|i| seen.insert(variables[*i].id())).collect()
}

impl<'g> Replicas<'g> {
    /// The variables of a map, in the order of their names, with the values that rank 0 has.
    ///
    /// # Errors
    /// [`GroupDefect::OtherVariables`] on all ranks if these are not the same variables on all of them; those of the group.
    pub fn new(group: &'g dyn Group, vars: &VarMap) -> Result<Self> {
        let data = vars.data().lock();
        let data = data.map_err(|_| {
            candle_core::Error::Msg("a thread panicked while it held the variables".into())
        })?;
        let mut named: Vec<_> = data.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
        drop(data);
        named.sort_by(|a, b| a.0.cmp(&b.0));
        let (names, variables): (Vec<_>, Vec<_>) = named.into_iter().unzip();
        let replicas = Self {
            group,
            trained: first_of_each(&variables),
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
    #[must_use]
    pub fn wire(mut self, wire: Wire) -> Self {
        self.wire = wire;
        self
    }

    /// How many bytes of gradients, in f32, one message holds.  Default 4 MiB.  A larger gradient is a message of its own.
    #[must_use]
    pub fn bucket(mut self, bytes: usize) -> Self {
        self.bucket = bytes;
        self
    }

    /// Names the variables that are not trained.  They start equal and are in checkpoints like all, but have no part in
    /// averages, norms and overflows, and [`variables`](Self::variables) leaves them out.  Their gradients are removed, so that
    /// no optimiser changes them.  A variable with several names is frozen by any of them.  Of several calls, each freezes
    /// more.  Default: all are trained.
    #[must_use]
    pub fn freeze(mut self, frozen: impl Fn(&str) -> bool) -> Self {
        let all = self.names.iter().zip(&self.variables);
        let frozen = all.filter(|(name, _)| frozen(name));
        let frozen: HashSet<_> = frozen.map(|(_, var)| var.id()).collect();
        self.trained
            .retain(|i| !frozen.contains(&self.variables[*i].id()));
        self
    }

    /// If the norm of the averaged gradients of all trained variables together is larger than this limit, scales them
    /// down to it.  Gradients with NaN or infinities are left as they are.  All ranks use the norm that rank 0 finds.  Default: no limit.
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

    /// The variables that are trained, in the order of their names: for the optimiser.
    pub fn variables(&self) -> Vec<Var> {
        let trained = self.trained.iter();
        trained.map(|i| self.variables[*i].clone()).collect()
    }

    /// Gives all ranks the values that rank 0 has, as [`new`](Self::new) does.
    ///
    /// # Errors
    /// Those of the group.
    pub fn broadcast(&self) -> Result<()> {
        for var in &self.variables {
            let value = self.group.broadcast(var.as_tensor(), 0)?;
            if self.group.rank() > 0 {
                told(self.group, var.set(&value))?;
            }
        }
        Ok(())
    }

    /// By how much any element of any variable differs from that of rank 0, on any rank, at most: zero unless a program has
    /// gone wrong.  Infinite where one is NaN and the other is not.
    ///
    /// # Errors
    /// Those of the group.
    pub fn spread(&self) -> Result<f64> {
        let mut spread = 0f64;
        for var in &self.variables {
            let first = self.group.broadcast(var.as_tensor(), 0)?;
            spread = spread.max(told(self.group, apart(var, &first))?);
        }
        Ok(maxima(self.group, &[spread])?[0])
    }

    /// Replaces the gradients of this rank's mean over its `rows` by those of the mean over the rows of all ranks, in
    /// the dtypes of the variables.  They are summed in f32 (f64 for variables of f64), and are the same bits on all
    /// ranks and in every run with as many ranks.  A trained variable that has a gradient on some rank with rows gets a
    /// gradient on all ranks.  The other variables have no gradient afterwards.
    ///
    /// # Errors
    /// [`GroupDefect::EmptyBatch`] on all ranks if none has rows; [`GroupDefect::OtherOptions`] on all ranks if one trains in
    /// another way; [`GroupDefect::Gradient`] for a gradient of another shape than its variable; those of the group.
    pub fn average(&self, grads: &mut GradStore, rows: usize) -> Result<()> {
        let agreed = self.agree(grads, rows, false, "without a scale")?;
        self.average_as(grads, rows, &agreed).map(drop)
    }

    /// Backward through this rank's mean over its rows, averaging, and the optimiser's step.
    ///
    /// # Errors
    /// Those of the backward pass, of [`average`](Self::average), of the optimiser.
    pub fn backward_step(
        &self,
        loss: &Tensor,
        rows: usize,
        optimiser: &mut impl Optimizer,
    ) -> Result<()> {
        let mut grads = told(self.group, loss.backward().map_err(Error::from))?;
        self.average(&mut grads, rows)?;
        told(self.group, optimiser.step(&grads).map_err(Error::from))
    }

    /// Like [`backward_step`](Self::backward_step), with a scale on the loss, as in [`LossScaler::backward_step`].
    /// If gradients of any rank overflow, also if a solve with
    /// [`OnOverflow::SkipUpdate`](crate::scaling::OnOverflow::SkipUpdate) says so, all ranks skip the step and lower
    /// their scales, so that scales stay equal.
    ///
    /// # Errors
    /// Those of the backward pass, of [`average`](Self::average), of the optimiser; [`GroupDefect::OtherOptions`] also if scalers
    /// differ.
    pub fn scaled_step(
        &self,
        scaler: &mut LossScaler,
        loss: &Tensor,
        rows: usize,
        optimiser: &mut impl Optimizer,
    ) -> Result<Stepped> {
        let mut grads = told(
            self.group,
            scaler.scaled(loss).and_then(|l| Ok(l.backward()?)),
        )?;
        let finite = told(self.group, scaler.unscale(&mut grads, &self.variables()))?;
        let way = format!("{scaler:?}");
        let agreed = self.agree(&grads, rows, rows > 0 && !finite, &way)?;
        // What is summed, and cast, may overflow where its parts do not; on all ranks alike.
        let finite = !agreed.overflow && self.average_as(&mut grads, rows, &agreed)?;
        scaler.update(finite);
        if !finite {
            return Ok(Stepped::Skipped);
        }
        told(self.group, optimiser.step(&grads).map_err(Error::from))?;
        Ok(Stepped::Taken)
    }

    /// Rank 0 writes the variables to a file of safetensors, which is complete at every moment: it is written beside the old
    /// one, with `.part` after its name, and renamed when it is on the disk.  So a rank that dies in the middle leaves the
    /// file that was there before.  Returns on all ranks when it is written.
    ///
    /// # Errors
    /// [`GroupDefect::Checkpoint`] on all ranks if it cannot be written; those of the group.
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
    /// dtype, in which case no variable has changed; those of the group.
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
        let on_disk = OpenOptions::new().write(true).open(&part);
        let on_disk = on_disk.and_then(|file| file.sync_all());
        on_disk
            .and_then(|()| std::fs::rename(&part, path))
            .map_err(|e| e.to_string())
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
        let mut message = outcome.err().unwrap_or_default().into_bytes();
        message.resize(MESSAGE, 0);
        let message = Tensor::from_vec(message, MESSAGE, &Device::Cpu)?;
        let message = self.group.broadcast(&message, 0)?.to_vec1::<u8>()?;
        let message = String::from_utf8_lossy(&message);
        let message = message.trim_end_matches('\0').to_owned();
        Err(GroupDefect::Checkpoint { path, message }.into())
    }

    /// Whether all ranks hold the variables of rank 0.
    fn compare(&self) -> Result<()> {
        let described = self.names.iter().zip(&self.variables);
        let described = described.map(|(n, v)| format!("{n} {:?} {:?}\n", v.dims(), v.dtype()));
        let hash = hash(&described.collect::<String>());
        // Two halves, each of which f64 holds exactly.
        let halves = [hash >> 32, hash & 0xffff_ffff].map(|half| half as f64);
        match self.other_than_first(&halves)? {
            Some(rank) => Err(GroupDefect::OtherVariables { rank }.into()),
            None => Ok(()),
        }
    }

    /// The last rank that has other numbers than rank 0.
    fn other_than_first(&self, mine: &[f64]) -> Result<Option<usize>> {
        let mut alike = true;
        for number in mine {
            alike &= of_first(self.group, *number)? == *number;
        }
        let rank = match alike {
            true => -1.0,
            false => self.group.rank() as f64,
        };
        let rank = maxima(self.group, &[rank])?[0];
        Ok((rank >= 0.0).then_some(rank as usize))
    }

    /// One small message in which ranks tell each other their rows, overflows, which gradients they have, and whether they
    /// train in the same way.
    fn agree(
        &self,
        grads: &GradStore,
        rows: usize,
        overflow: bool,
        way: &str,
    ) -> Result<Agreement> {
        let flag = |is: bool| f64::from(u8::from(is));
        // Few enough bits for exact sums: N Σ h² = (Σ h)² if, and only if, the h of all N ranks are equal.
        let h = (hash(&format!("{way}, {}", self.options())) & 0xf_ffff) as f64;
        let mut given = vec![rows as f64, flag(overflow), h, h * h];
        // Of all variables, since ranks may have frozen different ones.
        let first = given.len();
        given.resize(first + self.variables.len(), 0.0);
        for i in &self.trained {
            given[first + i] = flag(rows > 0 && grads.get(&self.variables[*i]).is_some());
        }
        let sums = sums(self.group, &given)?;
        let [sum, squares] = [sums[2] as u128, sums[3] as u128];
        if self.group.size() as u128 * squares != sum * sum {
            let rank = self.other_than_first(&[h])?.unwrap_or_default();
            return Err(GroupDefect::OtherOptions { rank }.into());
        }
        if sums[0] == 0.0 {
            return Err(GroupDefect::EmptyBatch.into());
        }
        Ok(Agreement {
            rows: sums[0],
            overflow: sums[1] > 0.0,
            present: (0..self.variables.len())
                .filter(|i| sums[first + i] > 0.0)
                .collect(),
        })
    }

    /// What must be the same on all ranks, so that they come to the same operations.
    fn options(&self) -> String {
        let Self {
            wire,
            bucket,
            clip,
            trained,
            ..
        } = self;
        format!("{wire:?}, {bucket}, {clip:?}, {trained:?}")
    }

    /// Averages, clips, casts, and tells whether all gradients are finite in the dtypes of their variables.
    fn average_as(&self, grads: &mut GradStore, rows: usize, agreed: &Agreement) -> Result<bool> {
        let vars = &agreed.present;
        let weight = rows as f64 / agreed.rows;
        let parts = vars.iter().map(|i| self.part(grads, *i, weight));
        let parts = told(self.group, parts.collect::<Result<Vec<_>>>())?;
        // What is not averaged differs by rank, and may still have the loss's scale: no optimiser must get it.
        for var in &self.variables {
            grads.remove(var);
        }
        let sums = buckets::sum(self.group, &parts, self.bucket, self.wire);
        let mut means = told(self.group, sums)?;
        if let Some(limit) = self.clip {
            let norm = of_first(self.group, told(self.group, norm(&means))?)?;
            if norm > limit && norm.is_finite() {
                for mean in &mut means {
                    *mean = told(self.group, &*mean * (limit / norm))?;
                }
            }
        }
        told(self.group, self.give(grads, vars, means))
    }

    /// What this rank adds to the mean gradient of a variable, flat, in the dtype of sums.
    fn part(&self, grads: &mut GradStore, i: usize, weight: f64) -> Result<Tensor> {
        let var = &self.variables[i];
        let summed = match var.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        match grads.remove(var) {
            Some(grad) if grad.dims() != var.dims() => Err(GroupDefect::Gradient {
                variable: self.names[i].clone(),
                shape: var.dims().to_vec(),
                gradient: grad.dims().to_vec(),
            }
            .into()),
            // The gradient of a rank without rows may be NaN.
            Some(grad) if weight > 0.0 => {
                Ok((grad.detach().flatten_all()?.to_dtype(summed)? * weight)?)
            }
            _ => Ok(Tensor::zeros(var.elem_count(), summed, var.device())?),
        }
    }

    /// Gives the optimiser the mean gradients in the dtypes of variables, and tells whether they are finite there.
    fn give(&self, grads: &mut GradStore, vars: &[usize], means: Vec<Tensor>) -> Result<bool> {
        let mut finite = true;
        for (i, mean) in vars.iter().zip(means) {
            let var = &self.variables[*i];
            let mean = mean.reshape(var.shape())?.to_dtype(var.dtype())?;
            finite &= is_finite(&mean)?;
            grads.insert(var, mean);
        }
        Ok(finite)
    }
}

/// FNV-1a.
fn hash(text: &str) -> u64 {
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, mix)
}

/// The largest |x − y|; infinite where only one is NaN.
fn apart(x: &Tensor, y: &Tensor) -> Result<f64> {
    let wide = |x: &Tensor| x.detach().flatten_all()?.to_dtype(DType::F64)?.to_vec1();
    let [x, y]: [candle_core::Result<Vec<f64>>; 2] = [x, y].map(wide);
    let apart = |(x, y): (f64, f64)| match x == y || (x.is_nan() && y.is_nan()) {
        true => 0.0,
        false if (x - y).is_nan() => f64::INFINITY,
        false => (x - y).abs(),
    };
    Ok(x?.into_iter().zip(y?).map(apart).fold(0.0, f64::max))
}

/// √Σ x², of all together, in f64.
fn norm(tensors: &[Tensor]) -> Result<f64> {
    let squares = |unit: f64| -> Result<f64> {
        let mut sum = 0.0;
        for x in tensors {
            let x = (x.to_dtype(DType::F64)? / unit)?;
            sum += x.sqr()?.sum_all()?.to_scalar::<f64>()?;
        }
        Ok(sum)
    };
    let sum = squares(1.0)?;
    if sum.is_normal() {
        return Ok(sum.sqrt());
    }
    // Squares of f64 overflow and underflow where their root does not.
    let mut largest = 0f64;
    for x in tensors {
        let magnitude = ops::magnitude(&x.to_dtype(DType::F64)?)?;
        if !magnitude.is_finite() {
            return Ok(magnitude);
        }
        largest = largest.max(magnitude);
    }
    match largest > 0.0 {
        true => Ok(largest * squares(largest)?.sqrt()),
        false => Ok(0.0),
    }
}
