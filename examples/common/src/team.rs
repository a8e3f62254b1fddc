//! The processes that run an example together.

use candle_diffeq::distributed::{told, Alone, Group};
use clap::Args;

use super::Result;

/// To be flattened into the flags of an example that can be started by `mpirun`.
#[derive(Args, Clone, Debug)]
pub struct Together {
    /// Share every batch with the other processes that mpirun has started (build with --features mpi).
    #[arg(long)]
    mpi: bool,
}

/// One process, or those of MPI.
pub struct Team(Box<dyn Group>);

impl Together {
    /// The processes.
    ///
    /// # Errors
    /// MPI in a build without it, or where it cannot be started.
    pub fn team(&self) -> Result<Team> {
        match self.mpi {
            false => Ok(Team(Box::new(Alone))),
            true => mpi(),
        }
    }
}

#[cfg(feature = "mpi")]
fn mpi() -> Result<Team> {
    let group = candle_diffeq::distributed::MpiGroup::start()?;
    Ok(Team(Box::new(group)))
}

#[cfg(not(feature = "mpi"))]
fn mpi() -> Result<Team> {
    Err("--mpi: this build has no MPI; add --features mpi to the command".into())
}

impl Team {
    pub fn group(&self) -> &dyn Group {
        &*self.0
    }

    pub fn is_several(&self) -> bool {
        self.0.size() > 1
    }

    /// An outcome of this process, of which the others hear if it is an error.
    pub fn told<T>(&self, outcome: Result<T>) -> Result<T> {
        told(self.group(), outcome)
    }

    /// Whether this process prints and draws.
    pub fn leads(&self) -> bool {
        self.0.rank() == 0
    }
}
