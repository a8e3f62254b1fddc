//! Signs of life: small messages by which ranks find out who is still there.
//!
//! A rank that waits calls the others; each answers, from a thread of its own if it computes, with the number of
//! operations that it has come to.  A rank that leaves says so, with the number of operations that it has done and the
//! reason.  These messages have a communicator of their own, so that they never meet those of the operations.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::raw::{Communicator, Failure, Pending};
use super::Patience;
use crate::error::GroupDefect;

/// A thread looks for messages so often.
const LISTEN: Duration = Duration::from_millis(50);
/// Who waits for longer than this calls the others, and again after as long.
const CALL: Duration = Duration::from_secs(1);
/// How long messages of a rank that leaves may take to be sent.
const FLUSH: Duration = Duration::from_millis(500);
/// Bytes of a message: kind, rank, count, length of the text, text.
const LENGTH: usize = 512;
const HEAD: usize = 1 + 4 + 8 + 2;

/// What ranks tell each other.
#[derive(Clone, Debug, PartialEq)]
enum Message {
    /// Is anybody there?
    Call,
    /// Yes, and so many operations have begun here.
    Here(u64),
    /// This rank goes.
    Left(Left),
}

/// How a rank has left.
#[derive(Clone, Debug, PartialEq)]
struct Left {
    /// Operations that it has completed.
    completed: u64,
    /// Where it began.
    culprit: usize,
    reason: String,
}

impl Message {
    fn to_bytes(&self) -> Vec<u8> {
        let (kind, rank, count, text) = match self {
            Self::Call => (0, 0, 0, ""),
            Self::Here(count) => (1, 0, *count, ""),
            Self::Left(left) => (2, left.culprit, left.completed, &*left.reason),
        };
        let most = LENGTH - HEAD;
        let end = (0..=most.min(text.len()))
            .rev()
            .find(|&i| text.is_char_boundary(i));
        let text = &text.as_bytes()[..end.unwrap_or(0)];
        let mut bytes = vec![kind];
        bytes.extend((rank as u32).to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text);
        bytes.resize(LENGTH, 0);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (head, text) = bytes.split_at_checked(HEAD)?;
        let rank = u32::from_le_bytes(head[1..5].try_into().ok()?);
        let count = u64::from_le_bytes(head[5..13].try_into().ok()?);
        let length = u16::from_le_bytes(head[13..15].try_into().ok()?);
        let text = text.get(..usize::from(length))?;
        match head[0] {
            0 => Some(Self::Call),
            1 => Some(Self::Here(count)),
            2 => Some(Self::Left(Left {
                completed: count,
                culprit: rank as usize,
                reason: String::from_utf8_lossy(text).into_owned(),
            })),
            _ => None,
        }
    }
}

/// What this rank knows about another.
#[derive(Clone, Default)]
struct Peer {
    /// When it was called, if it has not answered since.
    called: Option<Instant>,
    /// Operations that it had come to when it answered last.
    entered: u64,
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
            state: Mutex::new(State {
                peers: vec![Peer::default(); size],
                outbox: vec![],
                last_call: None,
                entered: 0,
                completed: 0,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that this rank has come to an operation; its number.
    pub(super) fn enter(&self) -> u64 {
        let mut state = self.state();
        state.entered += 1;
        state.last_call = None;
        state.peers.iter_mut().for_each(|peer| peer.called = None);
        state.entered
    }

    /// Notes that it is done.
    pub(super) fn complete(&self) {
        self.state().completed += 1;
    }

    /// Operations that this rank has completed.
    pub(super) fn completed(&self) -> u64 {
        self.state().completed
    }

    /// Whether the others can still come to an operation, for which this rank has waited; or, without a number, whether
    /// they are still there.
    pub(super) fn watch(
        &self,
        waited: Duration,
        operation: Option<u64>,
    ) -> Result<(), GroupDefect> {
        let mut state = self.state();
        self.serve(&mut state);
        for left in state.peers.iter().filter_map(|peer| peer.left.as_ref()) {
            // One that has done its part of the operation may go before it has arrived here.
            if operation.is_none_or(|number| left.completed < number) {
                let (rank, reason) = (left.culprit, left.reason.clone());
                return Err(GroupDefect::Left { rank, reason });
            }
        }
        if waited < CALL {
            return Ok(());
        }
        if state.last_call.is_none_or(|last| last.elapsed() >= CALL) {
            self.call(&mut state);
        }
        let others = state.peers.iter().enumerate();
        let others = others.filter(|(rank, _)| *rank != self.rank);
        for (rank, peer) in others.clone() {
            let silent = peer
                .called
                .map_or(Duration::ZERO, |called| called.elapsed());
            if silent > self.patience.silence {
                let seconds = silent.as_secs_f64();
                return Err(GroupDefect::Lost { rank, seconds });
            }
        }
        match others.min_by_key(|(_, peer)| peer.entered) {
            Some((rank, _)) if waited > self.patience.late => {
                let seconds = waited.as_secs_f64();
                Err(GroupDefect::Late { rank, seconds })
            }
            _ => Ok(()),
        }
    }

    /// Waits for a rank to be found missing, after the library has failed: it seldom says which.
    pub(super) fn search(&self) -> Option<GroupDefect> {
        let started = Instant::now();
        while started.elapsed() < self.patience.silence + 2 * CALL {
            if let Err(defect) = self.watch(CALL, None) {
                return Some(defect);
            }
            thread::sleep(LISTEN);
        }
        None
    }

    /// Tells all others that this rank goes, and waits for a moment until they have been told.
    pub(super) fn leave(&self, culprit: usize, reason: &str) {
        let mut state = self.state();
        let message = Message::Left(Left {
            completed: state.completed,
            culprit,
            reason: reason.to_owned(),
        });
        self.send_to_all(&mut state, &message);
        let started = Instant::now();
        while !state.outbox.is_empty() && started.elapsed() < FLUSH {
            self.serve(&mut state);
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
        self.send_to_all(state, &Message::Call);
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
                Message::Call => {
                    let here = Message::Here(state.entered);
                    self.send(state, &here, from);
                }
                Message::Here(entered) => peer.entered = entered,
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
                thread::sleep(LISTEN);
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
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_as_it_was_sent_and_a_long_reason_is_cut_between_characters() {
        let left = |reason: String| {
            Message::Left(Left {
                completed: 1 << 40,
                culprit: 70_000,
                reason,
            })
        };
        for message in [Message::Call, Message::Here(7), left("an error".into())] {
            assert_eq!(Message::from_bytes(&message.to_bytes()), Some(message));
        }
        let long = left("ä".repeat(400)).to_bytes();
        assert_eq!(long.len(), LENGTH);
        let cut = left("ä".repeat((LENGTH - HEAD) / 2));
        assert_eq!(Message::from_bytes(&long), Some(cut));
        assert_eq!(Message::from_bytes(&[9; LENGTH]), None);
        assert_eq!(Message::from_bytes(&[0; 3]), None);
    }
}
