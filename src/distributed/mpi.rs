//! A group on MPI, on any cluster.
//!
//! Collective operations are started without blocking and tested until they are done.  So a rank that waits can
//! meanwhile find out whether the other ranks still answer; the module `peers` does this.

mod peers;
mod raw;

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};

use self::peers::{Listener, Operation, Peers, Wait};
use self::raw::{Communicator, Number, Pending, Reduction, Session, Started, World};
use super::group::{exists, takes, COMPARED, SENT, SUMMED};
use super::Group;
use crate::error::{GroupDefect, Result};

/// How long a rank waits for others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Patience {
    /// A rank that has not answered for this long is considered dead.  Every process answers while it computes, so
    /// this need not be longer than a step; but it must be longer than a process may be suspended.  Default: 15 s.
    pub silence: Duration,
    /// How long to wait for a rank that answers, but does not reach the operation.  A rank that has finished waits
    /// without a time limit for the ranks that still answer.  Default: one hour.
    pub late: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(15),
            late: Duration::from_secs(3600),
        }
    }
}

/// Who waits for longer than this lets other processes of its core run.
const SPIN: Duration = Duration::from_micros(20);
/// Who waits for longer than this sleeps.
const SLEEP: Duration = Duration::from_secs(2);
/// Who waits looks after the others so often.
const LOOK: Duration = Duration::from_millis(10);
/// Elements in one message: MPI counts in 32 bits.
const LONGEST: usize = 1 << 28;

/// Kinds of operations.  Each has messages of its own, so that ranks in different operations wait, and are found, instead
/// of taking each other's numbers.
#[derive(Clone, Copy)]
enum Kind {
    SumF32,
    SumF64,
    MaxF32,
    MaxF64,
    Exchange,
    Gather,
    Broadcast,
    Barrier,
}

const KINDS: usize = Kind::Barrier as usize + 1;

/// All processes that `mpirun`, `srun` or the like has started.
///
/// To be made by all ranks, before anything that others wait for, and to be dropped when all is done: then it waits for the
/// others, and ends MPI, which cannot be started again in this process.  It stays in its thread.  Tensors of any device are
/// sent through the host.  A program that is started without a launcher is a group of one.
///
/// All ranks may make several groups, in the same order, for operations that do not depend on each other; MPI ends with
/// the last of them, which must be dropped on the thread that made the first.  A group takes ten communicators of MPI, which
/// are not given back before the process ends.  MPI has room for some thousands, so make few groups and keep them.
///
/// A rank that gets an error should end: its group does nothing more, and the others are told the rank where it began.
/// They hear the reason of an error that does not come from the group if the rank tells it; see [`told`](super::told).
/// While MPI itself reports nothing, a rank that was killed is found within [`Patience::silence`] and two seconds.  Most
/// launchers end all processes as soon as one has died; `docs/distributed.md` says how they are made to leave the others
/// time to finish.
///
/// A program that calls MPI by itself must start it before, with threads that may call it in turn: here a thread answers
/// the other ranks.  If both call MPI at the same time, that must be `Threading::Multiple`.  Once a group is made, errors of
/// `MPI_COMM_WORLD` are returned instead of ending the process: MPI reports failures of a group's operations there, too.
pub struct MpiGroup {
    rank: usize,
    size: usize,
    /// Where operations of each [`Kind`] are done, and where ranks meet for the last time.
    data: Vec<Communicator>,
    farewell: Communicator,
    peers: Arc<Peers>,
    listener: Listener,
    /// What has ended the group.
    ended: RefCell<Option<GroupDefect>>,
    longest: usize,
    session: Session,
    /// MPI is ended by the thread that has started it.
    stays: PhantomData<*const ()>,
}

impl MpiGroup {
    /// Starts MPI, or joins what has been started.  Returns when all ranks have come, for which there is no limit of time.
    ///
    /// # Errors
    /// [`GroupDefect::Start`].
    pub fn start() -> Result<Self> {
        Self::with_patience(Patience::default())
    }

    /// Like [`start`](Self::start), with another patience, which should be equal on all ranks.
    ///
    /// # Errors
    /// [`GroupDefect::Start`].
    pub fn with_patience(patience: Patience) -> Result<Self> {
        let started = Self::begin(patience);
        started.map_err(|reason| GroupDefect::Start { reason }.into())
    }

    fn begin(patience: Patience) -> std::result::Result<Self, String> {
        let session = Session::start()?;
        let world = World::new()?;
        let data = (0..KINDS).map(|_| world.copy());
        let data = data.collect::<std::result::Result<Vec<_>, _>>()?;
        let (farewell, control) = (world.copy()?, world.copy()?);
        drop(world);
        let (rank, size) = control.place()?;
        let peers = Arc::new(Peers::new(control, (rank, size), patience));
        let listener = Listener::start(&peers).map_err(|e| e.to_string())?;
        Ok(Self {
            rank,
            size,
            data,
            farewell,
            peers,
            listener,
            ended: RefCell::new(None),
            longest: LONGEST,
            session,
            stays: PhantomData,
        })
    }

    /// How many numbers one message of MPI holds, the same on all ranks.  Default 2²⁸, and no more: MPI counts in 32 bits.
    #[must_use]
    pub fn longest_message(mut self, numbers: usize) -> Self {
        self.longest = numbers.clamp(1, LONGEST);
        self
    }

    fn data(&self, kind: Kind) -> Communicator {
        self.data[kind as usize]
    }

    /// Waits for an operation of all ranks.
    fn complete<T: Number>(
        &self,
        operation: Operation,
        start: impl FnOnce() -> Started<T>,
    ) -> Result<Vec<T>> {
        self.goes_on()?;
        let wait = Wait::Operation(self.peers.enter(operation));
        let failed = |message: String| {
            let rank = self.rank;
            // Where a rank has died, most of what libraries say is about sockets.
            self.peers.search(wait).unwrap_or(GroupDefect::Library {
                rank,
                operation: operation.name,
                message,
            })
        };
        // A rank that has left is not waited for.
        let there = self.peers.watch(Duration::ZERO, wait);
        let begun = there.and_then(|()| start().map_err(failed));
        let outcome = begun.and_then(|mut pending| {
            self.wait(&mut pending, wait, failed)?;
            Ok(pending.received())
        });
        match outcome {
            Ok(received) => {
                self.peers.complete();
                Ok(received)
            }
            Err(defect) => Err(self.end(defect).into()),
        }
    }

    /// Whether nothing has ended the group.
    fn goes_on(&self) -> Result<()> {
        match &*self.ended.borrow() {
            Some(defect) => Err(defect.clone().into()),
            None => Ok(()),
        }
    }

    fn wait<T: Number>(
        &self,
        pending: &mut Pending<T>,
        wait: Wait,
        failed: impl Fn(String) -> GroupDefect,
    ) -> std::result::Result<(), GroupDefect> {
        let started = Instant::now();
        let mut looked = Duration::ZERO;
        while !pending.test().map_err(&failed)? {
            let waited = started.elapsed();
            if waited > looked + LOOK {
                looked = waited;
                self.peers.watch(waited, wait)?;
            }
            if waited > SLEEP {
                thread::sleep(Duration::from_millis(1));
            } else if waited > SPIN {
                thread::yield_now();
            }
        }
        Ok(())
    }

    /// Notes and tells what has ended the group, if nothing else has before.
    fn end(&self, defect: GroupDefect) -> GroupDefect {
        let mut ended = self.ended.borrow_mut();
        if let Some(before) = &*ended {
            return before.clone();
        }
        match &defect {
            GroupDefect::Left { rank, reason } => self.peers.leave(*rank, reason),
            GroupDefect::Lost { rank, .. } | GroupDefect::Late { rank, .. } => {
                self.peers
                    .leave(*rank, &format!("as rank {} found, {defect}", self.rank));
            }
            other => self.peers.leave(self.rank, &other.to_string()),
        }
        *ended = Some(defect.clone());
        defect
    }

    fn reduced<T: Number + WithDType>(&self, kind: Kind, x: &Tensor) -> Result<Tensor> {
        let (name, how) = match kind {
            Kind::MaxF32 | Kind::MaxF64 => ("a maximum", Reduction::Max),
            _ => ("a sum", Reduction::Sum),
        };
        let mut values = x.detach().flatten_all()?.to_vec1::<T>()?;
        let mut sums = vec![];
        while !values.is_empty() {
            let rest = values.split_off(values.len().min(self.longest));
            let what = operation_of::<T>(name, values.len());
            let part = self.complete(what, || self.data(kind).reduce(values, how))?;
            values = rest;
            match sums.is_empty() {
                true => sums = part,
                false => sums.extend(part),
            }
        }
        Ok(Tensor::from_vec(sums, x.shape(), x.device())?)
    }

    /// The sum of bf16: every rank gets a piece of all tensors, sums it in f32 from rank to rank, rounds, and sends it to all.
    fn sum_of_bf16(&self, x: &Tensor) -> Result<Tensor> {
        let values = x.detach().flatten_all()?.to_vec1::<bf16>()?;
        let mut sums = Vec::with_capacity(values.len());
        for part in values.chunks(self.longest) {
            let each = part.len().div_ceil(self.size);
            let mut bits: Vec<u16> = part.iter().map(|x| x.to_bits()).collect();
            bits.resize(each * self.size, 0);
            let what = Operation {
                of: "bf16",
                ..operation_of::<u16>("a sum", part.len())
            };
            let start = || self.data(Kind::Exchange).exchange(bits, self.size);
            let pieces = self.complete(what, start)?;
            let mut sum = vec![0f32; each];
            for piece in pieces.chunks_exact(each.max(1)) {
                for (sum, bits) in sum.iter_mut().zip(piece) {
                    *sum += bf16::from_bits(*bits).to_f32();
                }
            }
            let rounded = sum.iter().map(|x| bf16::from_f32(*x).to_bits()).collect();
            let start = || self.data(Kind::Gather).gather(rounded, self.size);
            let all = self.complete(what, start)?;
            sums.extend(all[..part.len()].iter().map(|bits| bf16::from_bits(*bits)));
        }
        Ok(Tensor::from_vec(sums, x.shape(), x.device())?)
    }

    fn sent(&self, mut bytes: Vec<u8>, root: usize) -> Result<Vec<u8>> {
        for part in bytes.chunks_mut(self.longest) {
            let what = Operation {
                of: "bytes",
                root: Some(root),
                ..operation_of::<u8>("a broadcast", part.len())
            };
            let start = || self.data(Kind::Broadcast).broadcast(part.to_vec(), root);
            part.copy_from_slice(&self.complete(what, start)?);
        }
        Ok(bytes)
    }

    /// Waits until all ranks leave in peace, and tells whether they do.
    fn parted(&self) -> bool {
        if self.ended.borrow().is_some() {
            return false;
        }
        if thread::panicking() {
            self.peers.leave(self.rank, "it panicked");
            return false;
        }
        self.peers.leave_in_peace(
            "it was done, or ended by an error of its own, while others were not done",
        );
        let Ok(mut pending) = self.farewell.barrier() else {
            return false;
        };
        let failed = |reason| GroupDefect::Start { reason };
        let parted = self.wait(&mut pending, Wait::Farewell, failed).is_ok();
        if parted {
            self.peers.drain();
        }
        parted
    }
}

/// An operation on so many numbers.
fn operation_of<T: Number>(name: &'static str, length: usize) -> Operation {
    Operation {
        name,
        of: T::NAME,
        length,
        root: None,
    }
}

impl Group for MpiGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sum(&self, x: &Tensor) -> Result<Tensor> {
        takes("a sum", &SUMMED, x)?;
        match x.dtype() {
            DType::F64 => self.reduced::<f64>(Kind::SumF64, x),
            DType::BF16 => self.sum_of_bf16(x),
            _ => self.reduced::<f32>(Kind::SumF32, x),
        }
    }

    fn max(&self, x: &Tensor) -> Result<Tensor> {
        takes("a maximum", &COMPARED, x)?;
        match x.dtype() {
            DType::F64 => self.reduced::<f64>(Kind::MaxF64, x),
            _ => self.reduced::<f32>(Kind::MaxF32, x),
        }
    }

    fn broadcast(&self, x: &Tensor, root: usize) -> Result<Tensor> {
        takes("a broadcast", &SENT, x)?;
        exists(root, self.size)?;
        let send = |bytes| self.sent(bytes, root);
        match x.dtype() {
            DType::F64 => relayed(x, send, |x: &f64| x.to_le_bytes(), f64::from_le_bytes),
            DType::F16 => relayed(x, send, |x: &f16| x.to_le_bytes(), f16::from_le_bytes),
            DType::BF16 => relayed(x, send, |x: &bf16| x.to_le_bytes(), bf16::from_le_bytes),
            DType::U8 => relayed(x, send, |x: &u8| x.to_le_bytes(), u8::from_le_bytes),
            DType::U32 => relayed(x, send, |x: &u32| x.to_le_bytes(), u32::from_le_bytes),
            DType::I64 => relayed(x, send, |x: &i64| x.to_le_bytes(), i64::from_le_bytes),
            _ => relayed(x, send, |x: &f32| x.to_le_bytes(), f32::from_le_bytes),
        }
    }

    fn barrier(&self) -> Result<()> {
        let what = Operation {
            of: "",
            ..operation_of::<u8>("a barrier", 0)
        };
        self.complete(what, || self.data(Kind::Barrier).barrier())
            .map(drop)
    }

    fn give_up(&self, reason: &str) {
        // A group of one process goes on.
        if self.size == 1 {
            return;
        }
        let (rank, reason) = (self.rank, reason.to_owned());
        self.end(GroupDefect::Left { rank, reason });
    }

    fn watch(&self, waited: Duration) -> Result<()> {
        self.goes_on()?;
        let found = self.peers.watch(waited, Wait::Else);
        found.map_err(|defect| self.end(defect).into())
    }
}

/// A tensor whose bytes have gone through `send`.
fn relayed<T: WithDType, const N: usize>(
    x: &Tensor,
    send: impl FnOnce(Vec<u8>) -> Result<Vec<u8>>,
    to: impl Fn(&T) -> [u8; N],
    from: impl Fn([u8; N]) -> T,
) -> Result<Tensor> {
    let values = x
        .detach()
        .flatten_all()?
        .to_device(&Device::Cpu)?
        .to_vec1::<T>()?;
    let bytes = send(values.iter().flat_map(to).collect())?;
    let pieces = bytes
        .chunks_exact(N)
        .filter_map(|piece| piece.try_into().ok());
    let values: Vec<T> = pieces.map(from).collect();
    Ok(Tensor::from_vec(values, x.shape(), x.device())?)
}

impl Drop for MpiGroup {
    fn drop(&mut self) {
        let parted = self.parted();
        self.listener.stop();
        // To end MPI is an operation of all ranks; without one of them it does not return.
        if parted {
            self.session.part();
        }
    }
}
