//! From the start of a command on several ranks to its end on all of them.

use std::time::Duration;

use super::{Launched, Ranks};
use crate::{Error, Result};

/// How long a rank leaves the root to save and to end them all.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs a command on all ranks that the launcher has started. When it fails on any of several, this ends
/// them all, with the error's exit code.
///
/// # Errors
/// Those of `command` alone; [`Error::Config`] for several processes of a build without MPI.
pub fn run(command: impl FnOnce(&Ranks) -> Result<()>) -> Result<()> {
    let ranks = start(Launched::find())?;
    let Some(link) = ranks.link.clone() else {
        return command(&ranks);
    };
    // At the end all wait for the slowest: a process that leaves is an accident to some launchers.
    let result = command(&ranks).and_then(|()| ranks.gather::<()>(Ok(Vec::new())));
    let Err(error) = result else {
        link.finish();
        return Ok(());
    };
    ranks.tell(&error);
    if !ranks.is_root() {
        // The root says it, and takes the others with it when it has saved. Who is still there after
        // that has lost the root.
        std::thread::sleep(PATIENCE);
    }
    eprintln!("error: {error}");
    link.abort(error.exit_code());
    std::process::exit(error.exit_code().into());
}

#[cfg(feature = "mpi")]
fn start(launched: Launched) -> Result<Ranks> {
    if launched.size <= 1 {
        return Ok(Ranks::alone());
    }
    let link = super::mpi::MpiLink::start()?;
    let size = super::Link::size(&link);
    if size != launched.size {
        return Err(Error::config(format!(
            "{} processes were started, but MPI knows of {size}: the launcher and the MPI of this \
             build do not belong together (under Slurm: srun --mpi=pmix, or another of srun --mpi=list)",
            launched.size
        )));
    }
    Ok(Ranks::linked(std::sync::Arc::new(link)))
}

#[cfg(not(feature = "mpi"))]
fn start(launched: Launched) -> Result<Ranks> {
    if launched.size > 1 {
        return Err(Error::config(format!(
            "{} processes were started together, but this build has no MPI: build it with --features mpi",
            launched.size
        )));
    }
    Ok(Ranks::alone())
}
