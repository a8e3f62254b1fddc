//! Calls of MPI, each checked, one at a time.
//!
//! The safe interface of the `mpi` crate panics or aborts where an operation is not waited for, and does not show error
//! codes; a group that must outlive a rank needs both.  So operations are started and tested here by MPI's own functions.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int};
use std::mem::MaybeUninit;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use mpi::environment::Universe;
use mpi::{ffi, Threading};

/// What MPI says of a failure.
pub(super) type Failure = String;

/// MPI is asked for no more than calls from several threads, one at a time.
static CALLS: Mutex<()> = Mutex::new(());

fn serial() -> MutexGuard<'static, ()> {
    CALLS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// MPI's code for success, in every implementation.
const SUCCESS: c_int = 0;

fn check(code: c_int) -> Result<(), Failure> {
    if code == SUCCESS {
        return Ok(());
    }
    let mut text = [0u8; 1024]; // more than MPI_MAX_ERROR_STRING of Open MPI (256) and of MPICH (512)
    let mut length = 0;
    // SAFETY: the buffer is longer than any text, and both outlive the call.
    let known =
        unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut length) };
    let length = usize::try_from(length).unwrap_or(0).min(text.len());
    match known {
        SUCCESS => Err(String::from_utf8_lossy(&text[..length]).into_owned()),
        _ => Err(format!("error {code}")),
    }
}

/// Who uses MPI in this process.
struct Users {
    count: usize,
    /// Where this library has started MPI, and on which thread: it must end there.
    universe: Option<(Universe, ThreadId)>,
    /// Whether some rank will not come to the end of MPI, which is an operation of all.
    broken: bool,
}

static USERS: Mutex<Users> = Mutex::new(Users {
    count: 0,
    universe: None,
    broken: false,
});

/// One user of MPI.  The last one ends it, if this library has started it and all ranks have parted in peace.
pub(super) struct Session {
    parted: bool,
}

impl Session {
    /// Starts MPI, or joins what has been started; if by another library, that one ends it.
    ///
    /// # Errors
    /// Why there is no MPI whose functions several threads may call in turn.
    pub(super) fn start() -> Result<Self, Failure> {
        let mut users = USERS.lock().unwrap_or_else(PoisonError::into_inner);
        // Another group may be there, whose thread calls MPI.
        let _serial = serial();
        if mpi::is_finalized() {
            return Err("MPI has been ended in this process, and cannot be started again".into());
        }
        let threading = match mpi::initialize_with_threading(Threading::Serialized) {
            Some((universe, threading)) => {
                users.universe = Some((universe, thread::current().id()));
                threading
            }
            None => {
                let mut provided = 0;
                // SAFETY: MPI is initialised; it writes one number.
                check(unsafe { ffi::MPI_Query_thread(&mut provided) })?;
                Threading::from(provided)
            }
        };
        if threading < Threading::Serialized {
            users.universe = None;
            return Err(format!(
                "MPI provides Threading::{threading:?}, and at least Serialized is needed"
            ));
        }
        users.count += 1;
        Ok(Self { parted: false })
    }

    /// Notes that all ranks have parted in peace.
    pub(super) fn part(&mut self) {
        self.parted = true;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut users = USERS.lock().unwrap_or_else(PoisonError::into_inner);
        users.count -= 1;
        users.broken |= !self.parted;
        if users.count > 0 || users.broken {
            return;
        }
        let here = thread::current().id();
        let universe = users.universe.take_if(|(_, thread)| *thread == here);
        let _serial = serial();
        drop(universe);
    }
}

/// Processes, and a space of messages of its own.
#[derive(Clone, Copy)]
pub(super) struct Communicator(ffi::MPI_Comm);

// SAFETY: a handle, not memory of this process's own; MPI's functions take it on any thread if calls do not overlap,
// and all calls are made under `CALLS`.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

/// MPI matches the copies of all ranks by their order, so one thread of a process makes all that it needs before another.
static COPIES: Mutex<()> = Mutex::new(());
/// Who waits for a copy looks so often.
const COPIED: Duration = Duration::from_micros(100);

/// The communicator of all processes, to be copied.
pub(super) struct World {
    _alone: MutexGuard<'static, ()>,
}

impl World {
    /// Waits for other threads that copy it.  Its errors are returned from here on: MPI reports there what fails in
    /// operations on copies, too, when they are tested.
    pub(super) fn new() -> Result<Self, Failure> {
        let _alone = COPIES.lock().unwrap_or_else(PoisonError::into_inner);
        let _serial = serial();
        // SAFETY: MPI is initialised.
        check(unsafe {
            ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN)
        })?;
        Ok(Self { _alone })
    }

    /// All processes, in a new space of messages; errors are returned.  Waits until all ranks copy it, and lets other threads
    /// call MPI meanwhile.  The copy is never freed, which would be an operation of all ranks.
    pub(super) fn copy(&self) -> Result<Communicator, Failure> {
        // SAFETY: a constant that MPI's library defines.
        let none = vec![unsafe { ffi::RSMPI_COMM_NULL }];
        let mut pending = Pending::start(vec![], none, |_, copy, request| {
            // SAFETY: MPI is initialised; the handle's place lives until the request is done.
            unsafe { ffi::MPI_Comm_idup(ffi::RSMPI_COMM_WORLD, copy, request) }
        })?;
        while !pending.test()? {
            thread::sleep(COPIED);
        }
        let copy = pending.received()[0];
        let _serial = serial();
        // SAFETY: the communicator exists.
        check(unsafe { ffi::MPI_Comm_set_errhandler(copy, ffi::RSMPI_ERRORS_RETURN) })?;
        Ok(Communicator(copy))
    }
}

impl Communicator {
    /// Rank of this process, and how many there are.
    pub(super) fn place(self) -> Result<(usize, usize), Failure> {
        let _serial = serial();
        let (mut rank, mut size) = (0, 0);
        // SAFETY: the communicator exists; each call writes one number.
        unsafe {
            check(ffi::MPI_Comm_rank(self.0, &mut rank))?;
            check(ffi::MPI_Comm_size(self.0, &mut size))?;
        }
        Ok((rank as usize, size as usize))
    }

    /// Starts a reduction of all ranks' numbers.
    pub(super) fn reduce<T: Number>(self, send: Vec<T>, how: Reduction) -> Started<T> {
        let length = send.len();
        Pending::start(send, room(length), |send, receive, request| {
            let n = length as c_int;
            // SAFETY: both buffers have n elements of this type and live until the request is done.
            unsafe {
                ffi::MPI_Iallreduce(
                    send.cast(),
                    receive.cast(),
                    n,
                    T::datatype(),
                    how.operator(),
                    self.0,
                    request,
                )
            }
        })
    }

    /// Starts to send the i-th of equal pieces to rank i, and to receive theirs.
    pub(super) fn exchange<T: Number>(self, send: Vec<T>, size: usize) -> Started<T> {
        let (length, each) = (send.len(), (send.len() / size.max(1)) as c_int);
        Pending::start(send, room(length), |send, receive, request| {
            let of = T::datatype();
            // SAFETY: both buffers have `each` elements for every rank, and live until the request is done.
            unsafe {
                ffi::MPI_Ialltoall(
                    send.cast(),
                    each,
                    of,
                    receive.cast(),
                    each,
                    of,
                    self.0,
                    request,
                )
            }
        })
    }

    /// Starts to collect the pieces of all ranks, on all of them.
    pub(super) fn gather<T: Number>(self, send: Vec<T>, size: usize) -> Started<T> {
        let each = send.len();
        Pending::start(send, room(each * size), |send, receive, request| {
            let (n, of) = (each as c_int, T::datatype());
            // SAFETY: n elements are sent, n received from every rank; buffers live until the request is done.
            unsafe {
                ffi::MPI_Iallgather(send.cast(), n, of, receive.cast(), n, of, self.0, request)
            }
        })
    }

    /// Starts to send the bytes of one rank to all.
    pub(super) fn broadcast(self, bytes: Vec<u8>, root: usize) -> Started<u8> {
        let length = bytes.len() as c_int;
        Pending::start(vec![], bytes, |_, buffer, request| {
            let of = u8::datatype();
            // SAFETY: the buffer has this length and lives until the request is done.
            unsafe { ffi::MPI_Ibcast(buffer.cast(), length, of, root as c_int, self.0, request) }
        })
    }

    /// Starts to wait until all ranks have done the same.
    pub(super) fn barrier(self) -> Started<u8> {
        Pending::start(vec![], vec![], |_, _, request| {
            // SAFETY: the communicator exists; the request lives until it is done.
            unsafe { ffi::MPI_Ibarrier(self.0, request) }
        })
    }

    /// Starts to send a message to one rank.
    pub(super) fn send(self, message: Vec<u8>, to: usize) -> Started<u8> {
        let length = message.len() as c_int;
        Pending::start(message, vec![], |message, _, request| {
            let of = u8::datatype();
            // SAFETY: the message has this length and lives until the request is done.
            unsafe { ffi::MPI_Isend(message.cast(), length, of, to as c_int, 0, self.0, request) }
        })
    }

    /// A message of at most `length` bytes that has arrived, and from whom.
    pub(super) fn receive(self, length: usize) -> Result<Option<(usize, Vec<u8>)>, Failure> {
        let _serial = serial();
        let (mut flag, mut status) = (0, MaybeUninit::<ffi::MPI_Status>::zeroed());
        // SAFETY: MPI_ANY_SOURCE is a constant; flag and status are written by the call.
        let source = unsafe {
            let any = ffi::RSMPI_ANY_SOURCE;
            check(ffi::MPI_Iprobe(
                any,
                0,
                self.0,
                &mut flag,
                status.as_mut_ptr(),
            ))?;
            status.assume_init().MPI_SOURCE
        };
        if flag == 0 {
            return Ok(None);
        }
        let mut message = vec![0u8; length];
        // SAFETY: the buffer has this length.  The message is there, and short enough to have been sent at once.
        check(unsafe {
            let (buffer, of) = (message.as_mut_ptr().cast(), u8::datatype());
            ffi::MPI_Recv(
                buffer,
                length as c_int,
                of,
                source,
                0,
                self.0,
                ffi::RSMPI_STATUS_IGNORE,
            )
        })?;
        Ok(Some((source as usize, message)))
    }
}

/// What is done with the numbers of all ranks.
#[derive(Clone, Copy)]
pub(super) enum Reduction {
    Sum,
    Max,
}

impl Reduction {
    fn operator(self) -> ffi::MPI_Op {
        // SAFETY: constants that MPI's library defines.
        unsafe {
            match self {
                Self::Sum => ffi::RSMPI_SUM,
                Self::Max => ffi::RSMPI_MAX,
            }
        }
    }
}

/// Numbers that MPI knows.
pub(super) trait Number: Copy + Default + 'static {
    const NAME: &'static str;

    fn datatype() -> ffi::MPI_Datatype;
}

macro_rules! numbers {
    ($($number:ty = $constant:ident,)+) => {
        $(impl Number for $number {
            const NAME: &'static str = stringify!($number);

            fn datatype() -> ffi::MPI_Datatype {
                // SAFETY: a constant that MPI's library defines.
                unsafe { ffi::$constant }
            }
        })+
    };
}

numbers! {
    f32 = RSMPI_FLOAT,
    f64 = RSMPI_DOUBLE,
    u16 = RSMPI_UINT16_T,
    u8 = RSMPI_UINT8_T,
}

/// Where so many numbers are received.
fn room<T: Number>(numbers: usize) -> Vec<T> {
    vec![T::default(); numbers]
}

/// An operation that goes on while the program runs, with the memory that it reads and writes.
pub(super) struct Pending<T> {
    request: ffi::MPI_Request,
    send: Vec<T>,
    receive: Vec<T>,
    done: bool,
}

// SAFETY: as of communicators; the buffers are ordinary vectors that nothing else refers to.
unsafe impl<T: Send> Send for Pending<T> {}

/// An operation that has begun, or why it could not.
pub(super) type Started<T> = Result<Pending<T>, Failure>;

impl<T> Pending<T> {
    fn start(
        send: Vec<T>,
        receive: Vec<T>,
        begin: impl FnOnce(*const T, *mut T, *mut ffi::MPI_Request) -> c_int,
    ) -> Started<T> {
        let mut pending = Self {
            // SAFETY: a constant that MPI's library defines.
            request: unsafe { ffi::RSMPI_REQUEST_NULL },
            send,
            receive,
            // Also if it fails to begin: a part of it may have begun.
            done: false,
        };
        let (send, receive) = (pending.send.as_ptr(), pending.receive.as_mut_ptr());
        let _serial = serial();
        check(begin(send, receive, &mut pending.request))?;
        Ok(pending)
    }

    /// Goes on with it, and tells whether it is done.
    pub(super) fn test(&mut self) -> Result<bool, Failure> {
        if self.done {
            return Ok(true);
        }
        let mut flag = 0;
        let _serial = serial();
        // SAFETY: the request was started by MPI and is not done; the status is not wanted.
        check(unsafe { ffi::MPI_Test(&mut self.request, &mut flag, ffi::RSMPI_STATUS_IGNORE) })?;
        self.done = flag != 0;
        Ok(self.done)
    }

    /// What was received, of an operation that is done.
    pub(super) fn received(mut self) -> Vec<T> {
        std::mem::take(&mut self.receive)
    }
}

impl<T> Drop for Pending<T> {
    fn drop(&mut self) {
        if !self.done {
            // MPI may still read and write it.
            std::mem::forget(std::mem::take(&mut self.send));
            std::mem::forget(std::mem::take(&mut self.receive));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_an_operation_that_fails_to_begin_is_not_used_again() {
        let _session = Session::start().unwrap();
        let fresh = || vec![1u8; 300];
        let mut held = vec![];
        let failed = Pending::start(fresh(), fresh(), |send, receive, _| {
            held = vec![send, receive.cast_const()];
            SUCCESS + 1
        });
        assert!(failed.is_err());
        // An allocator gives what was freed last to who asks next for as much.
        let others: Vec<_> = (0..64).map(|_| fresh()).collect();
        assert!(others.iter().all(|other| !held.contains(&other.as_ptr())));
    }
}
