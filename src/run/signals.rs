//! SIGINT, SIGTERM and SIGHUP: the first asks the run to save and stop, the second leaves at once.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, Result};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Installs the handler, once a process, when there is something to save.
pub fn install() -> Result<()> {
    static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();
    let set = || {
        ctrlc::set_handler(|| {
            if INTERRUPTED.swap(true, Ordering::SeqCst) {
                // Nothing is half-written at a final name, so leaving here loses only the step.
                std::process::exit(130);
            }
        })
        .map_err(|e| e.to_string())
    };
    INSTALLED
        .get_or_init(set)
        .clone()
        .map_err(|e| Error::Internal(format!("cannot install the signal handler: {e}")))
}

/// Whether a signal has asked to stop. Cheap: long loops ask between tokens or micro-batches.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// [`Error::Interrupted`] once a signal has asked to stop, to leave a long computation with `?`.
pub fn check() -> Result<()> {
    if interrupted() {
        return Err(Error::Interrupted("interrupted".to_owned()));
    }
    Ok(())
}
