//! Signs of life: small messages by which ranks find out who is still there.
//!
//! A rank that waits in an operation calls the others; each answers, from a thread of its own if it computes, with the
//! number of operations that it has come to, and with what it has done where this rank waits.  A rank that leaves says so,
//! with the number of operations that it has done and the reason.  These messages have a communicator of their own, so that
//! they never meet those of the operations.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::raw::{Communicator, Failure, Pending};
use super::Patience;
use crate::distributed::message::{Here, Left, Message, LENGTH};
use crate::error::GroupDefect;

/// A thread looks for messages so often.
const LISTEN: Duration = Duration::from_millis(50);
/// Who waits for longer than this calls the others, and again after as long.
const CALL: Duration = Duration::from_secs(1);
/// How long messages of a rank that leaves may take to be sent.
const FLUSH: Duration = Duration::from_millis(500);
/// Operations that a rank remembers.
const REMEMBERED: usize = 64;

/// An operation, as ranks compare it: all must do the same.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operation {
    pub(super) name: &'static str,
    /// The kind of its numbers, and how many there are.
    pub(super) of: &'static str,
    pub(super) length: usize,
    /// Of a broadcast.
    pub(super) root: Option<usize>,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name, of, length, ..
        } = self;
        f.write_str(name)?;
        if !of.is_empty() {
            write!(f, " of {length} {of}")?;
        }
        match self.root {
            Some(root) => write!(f, " from rank {root}"),
            None => Ok(()),
        }
    }
}

/// What a rank waits for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wait {
    /// The operation of this number.
    Operation(u64),
    /// That all have done their work.
    Farewell,
    /// Something else that needs all ranks.
    Else,
}

impl Wait {
    /// Whether it is in vain when a rank has left so.
    fn is_ended_by(self, left: &Left) -> bool {
        match self {
            // One that has done its part of the operation may go before it has arrived here.
            Self::Operation(number) => left.completed < number,
            Self::Farewell => !left.in_peace,
            Self::Else => true,
        }
    }
}

/// What this rank knows about another.
#[derive(Clone, Default)]
struct Peer {
    /// When it was called, if it has not answered since.
    called: Option<Instant>,
    /// What it answered last.
    here: Here,
    left: Option<Left>,
}

struct State {
    peers: Vec<Peer>,
    /// Messages on their way.
    outbox: Vec<Pending<u8>>,
    last_call: Option<Instant>,
    /// Operations that this rank has come to, and completed.
    entered: u64,
    completed: u64,
    /// The last of them.
    operations: VecDeque<Operation>,
}

impl State {
    /// Of a group of this size, before its first operation.
    fn of(size: usize) -> Self {
        Self {
            peers: vec![Peer::default(); size],
            outbox: vec![],
            last_call: None,
            entered: 0,
            completed: 0,
            operations: VecDeque::with_capacity(REMEMBERED),
        }
    }

    /// The operation of a number, if this rank has come to it and still knows it.
    fn operation(&self, number: u64) -> Option<Operation> {
        let before = usize::try_from(self.entered.checked_sub(number)?).ok()?;
        self.operations.iter().rev().nth(before).copied()
    }

    /// Who does not answer this rank, or does not come, if it has waited for long enough.
    fn missing(
        &self,
        rank: usize,
        patience: Patience,
        waited: Duration,
        wait: Wait,
    ) -> Result<(), GroupDefect> {
        let others = self.peers.iter().enumerate();
        let others = others.filter(|(other, _)| *other != rank);
        for (rank, peer) in others.clone() {
            let silent = peer
                .called
                .map_or(Duration::ZERO, |called| called.elapsed());
            if silent > patience.silence {
                let seconds = silent.as_secs_f64();
                return Err(GroupDefect::Lost { rank, seconds });
            }
        }
        // Who waits only for the others' end loses nothing by it, and would end their work by going.
        if waited <= patience.late || matches!(wait, Wait::Farewell) {
            return Ok(());
        }
        let seconds = waited.as_secs_f64();
        let last = others.min_by_key(|(_, peer)| peer.here.entered);
        Err(match last {
            Some((rank, peer)) if peer.here.entered < self.entered => {
                GroupDefect::Late { rank, seconds }
            }
            _ => GroupDefect::Stuck { seconds },
        })
    }
}

/// The others, as this rank knows them.
pub(super) struct Peers {
    control: Communicator,
    rank: usize,
    patience: Patience,
    state: Mutex<State>,
}

impl Peers {
    pub(super) fn new(
        control: Communicator,
        (rank, size): (usize, usize),
        patience: Patience,
    ) -> Self {
        Self {
            control,
            rank,
            patience,
            state: Mutex::new(State::of(size)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that this rank has come to an operation; its number.
    pub(super) fn enter(&self, operation: Operation) -> u64 {
        let mut state = self.state();
        state.entered += 1;
        if state.operations.len() == REMEMBERED {
            state.operations.pop_front();
        }
        state.operations.push_back(operation);
        state.last_call = None;
        state.peers.iter_mut().for_each(|peer| peer.called = None);
        state.entered
    }

    /// Notes that it is done.
    pub(super) fn complete(&self) {
        self.state().completed += 1;
    }

    /// Whether what this rank has waited for can still come.
    pub(super) fn watch(&self, waited: Duration, wait: Wait) -> Result<(), GroupDefect> {
        let mut state = self.state();
        self.serve(&mut state);
        let mut left = state.peers.iter().filter_map(|peer| peer.left.as_ref());
        if let Some(left) = left.find(|left| wait.is_ended_by(left)) {
            let (rank, reason) = (left.culprit, left.reason.clone());
            return Err(GroupDefect::Left { rank, reason });
        }
        if waited < CALL {
            return Ok(());
        }
        if state.last_call.is_none_or(|last| last.elapsed() >= CALL) {
            self.call(&mut state);
        }
        if let Wait::Operation(number) = wait {
            Self::compare(&state, number)?;
        }
        state.missing(self.rank, self.patience, waited, wait)
    }

    /// Whether all that have answered do the same in an operation.
    fn compare(state: &State, number: u64) -> Result<(), GroupDefect> {
        let Some(here) = state.operation(number).map(|o| o.to_string()) else {
            return Ok(());
        };
        for (rank, peer) in state.peers.iter().enumerate() {
            let there = &peer.here.operation;
            if peer.here.number == number && !there.is_empty() && *there != here {
                let there = there.clone();
                return Err(GroupDefect::OtherOperation { rank, there, here });
            }
        }
        Ok(())
    }

    /// Waits for a rank to be found missing or elsewhere, after the library has failed: it seldom says which.
    pub(super) fn search(&self, wait: Wait) -> Option<GroupDefect> {
        let started = Instant::now();
        while started.elapsed() < self.patience.silence + 2 * CALL {
            if let Err(defect) = self.watch(CALL, wait) {
                return Some(defect);
            }
            thread::sleep(LISTEN);
        }
        None
    }

    /// Tells all others that this rank goes because of an error, and waits for a moment until they have been told.
    pub(super) fn leave(&self, culprit: usize, reason: &str) {
        self.say_goodbye(culprit, reason, false);
    }

    /// Tells all others that this rank has done its work.
    pub(super) fn leave_in_peace(&self, reason: &str) {
        self.say_goodbye(self.rank, reason, true);
    }

    fn say_goodbye(&self, culprit: usize, reason: &str, in_peace: bool) {
        let mut state = self.state();
        let message = Message::Left(Left {
            completed: state.completed,
            culprit,
            in_peace,
            reason: reason.to_owned(),
        });
        self.send_to_all(&mut state, &message);
        self.flush(&mut state, |_| true);
    }

    /// Takes what is still on its way, before MPI is ended: the last message of every rank says that it goes.
    pub(super) fn drain(&self) {
        let gone = |state: &State| {
            let mut peers = state.peers.iter().enumerate();
            peers.all(|(rank, peer)| rank == self.rank || peer.left.is_some())
        };
        self.flush(&mut self.state(), gone);
    }

    /// Sends and receives for a moment, until all is sent and more is done.
    fn flush(&self, state: &mut State, done: impl Fn(&State) -> bool) {
        let started = Instant::now();
        while !(state.outbox.is_empty() && done(state)) && started.elapsed() < FLUSH {
            self.serve(state);
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn call(&self, state: &mut State) {
        let now = Instant::now();
        state.last_call = Some(now);
        for (rank, peer) in state.peers.iter_mut().enumerate() {
            if rank != self.rank {
                peer.called.get_or_insert(now);
            }
        }
        self.send_to_all(state, &Message::Call(state.entered));
    }

    fn send_to_all(&self, state: &mut State, message: &Message) {
        for rank in (0..state.peers.len()).filter(|rank| *rank != self.rank) {
            self.send(state, message, rank);
        }
    }

    /// A message that cannot be sent is one to a rank that is found missing anyway.
    fn send(&self, state: &mut State, message: &Message, to: usize) {
        state
            .outbox
            .extend(self.control.send(message.to_bytes(), to));
    }

    /// Reads what has arrived, and answers.
    fn serve(&self, state: &mut State) {
        state.outbox.retain_mut(|sent| !sent.test().unwrap_or(true));
        while let Some((from, message)) = self.next() {
            let Some(peer) = state.peers.get_mut(from) else {
                continue;
            };
            peer.called = None;
            match message {
                Message::Call(number) => {
                    let operation = state.operation(number).map(|o| o.to_string());
                    let here = Here {
                        entered: state.entered,
                        number,
                        operation: operation.unwrap_or_default(),
                    };
                    self.send(state, &Message::Here(here), from);
                }
                Message::Here(here) => peer.here = here,
                Message::Left(left) => peer.left = Some(left),
            }
        }
    }

    fn next(&self) -> Option<(usize, Message)> {
        let received: Result<_, Failure> = self.control.receive(LENGTH);
        let (from, bytes) = received.ok()??;
        Some((from, Message::from_bytes(&bytes)?))
    }
}

/// The thread that answers while this rank computes.
pub(super) struct Listener {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    pub(super) fn start(peers: &Arc<Peers>) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, peers) = (stop.clone(), peers.clone());
        let listen = move || {
            while !stopped.load(Ordering::Relaxed) {
                // A rank that waits answers by itself.
                if let Ok(mut state) = peers.state.try_lock() {
                    peers.serve(&mut state);
                }
                thread::park_timeout(LISTEN);
            }
        };
        let thread = thread::Builder::new()
            .name("signs of life".into())
            .spawn(listen)?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    pub(super) fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What rank 1 of three says when it has come to five operations, and the others have answered that they have come to so
    /// many, after a wait.
    fn found(others: [u64; 2], seconds: u64, wait: Wait) -> Option<GroupDefect> {
        let mut state = State::of(3);
        state.entered = 5;
        for (rank, entered) in [0, 2].into_iter().zip(others) {
            state.peers[rank].here.entered = entered;
        }
        let patience = Patience {
            silence: Duration::from_secs(1),
            late: Duration::from_secs(10),
        };
        let waited = Duration::from_secs(seconds);
        state.missing(1, patience, waited, wait).err()
    }

    #[test]
    fn a_rank_is_named_as_late_only_if_it_has_come_to_fewer_operations() {
        for wait in [Wait::Operation(5), Wait::Else] {
            let seconds = 11.0;
            assert_eq!(found([3, 5], 10, wait), None);
            let late = |rank| Some(GroupDefect::Late { rank, seconds });
            assert_eq!(found([3, 5], 11, wait), late(0));
            assert_eq!(found([6, 4], 11, wait), late(2));
            let stuck = Some(GroupDefect::Stuck { seconds });
            assert_eq!(found([5, 5], 11, wait), stuck);
            assert_eq!(found([6, 5], 11, wait), stuck);
        }
    }

    #[test]
    fn who_waits_for_the_end_of_others_waits_while_they_answer() {
        assert_eq!(found([6, 4], 1_000_000, Wait::Farewell), None);
        let mut state = State::of(2);
        state.peers[1].called = Instant::now().checked_sub(Duration::from_secs(3));
        let patience = Patience {
            silence: Duration::from_secs(1),
            ..Default::default()
        };
        let silent = state.missing(0, patience, Duration::from_secs(5), Wait::Farewell);
        assert!(matches!(silent, Err(GroupDefect::Lost { rank: 1, .. })));
    }
}
