//! The wall clock. It may be set back or forth at any moment, so that what it says is for people to
//! read: names, dates. Durations are measured by `Instant`; nothing is put in order by it where the
//! order matters (`clippy.toml` keeps every other use away).

use std::time::{SystemTime, UNIX_EPOCH};

/// What the clock says.
#[expect(clippy::disallowed_methods, reason = "the one place")]
pub fn now() -> SystemTime {
    #[cfg(debug_assertions)]
    if let Some(wild) = super::faults::wild_clock() {
        return wild;
    }
    SystemTime::now()
}

/// Seconds since 1970 began; 0 for a clock that says less.
pub fn seconds() -> u64 {
    now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
