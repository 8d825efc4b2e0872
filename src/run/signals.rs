//! SIGINT, SIGTERM and SIGHUP: the first asks the run to save and stop, the second leaves at once.

use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use crate::{Error, Result};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Programs that must not outlive this one.
static CHILDREN: Mutex<Vec<Weak<Mutex<Child>>>> = Mutex::new(Vec::new());

/// Installs the handler, once a process, when there is something to save.
pub fn install() -> Result<()> {
    static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();
    let set = || {
        ctrlc::set_handler(|| {
            if INTERRUPTED.swap(true, Ordering::SeqCst) {
                // Nothing is half-written at a final name, so leaving here loses only the step.
                end_children();
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

/// Has a program end with this one when a second signal has it leave at once.
pub fn ends_with_us(child: &Arc<Mutex<Child>>) {
    let mut children = CHILDREN.lock().unwrap_or_else(PoisonError::into_inner);
    children.retain(|child| child.strong_count() > 0);
    children.push(Arc::downgrade(child));
}

fn end_children() {
    let children = CHILDREN.lock().unwrap_or_else(PoisonError::into_inner);
    for child in children.iter().filter_map(Weak::upgrade) {
        // It may have ended by itself.
        let _ = child.lock().unwrap_or_else(PoisonError::into_inner).kill();
    }
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
