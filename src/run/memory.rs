//! Memory of this process and of the machine, where the system tells (Linux).

use std::path::{Path, PathBuf};

use super::environment::file_field;
use crate::ranks;

/// Share of the free memory that a training may take unless it is told.
const SHARE: (u64, u64) = (4, 5);

/// A bound on memory and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    pub bytes: u64,
    /// Reads after the number: `as model.memory_gb says`.
    pub origin: String,
}

impl Limit {
    /// What the user said, else four fifths of what is free now; `None` where nobody tells.
    pub fn find(memory_gb: Option<f64>) -> Option<Self> {
        match memory_gb {
            Some(gb) => Some(Self {
                bytes: (gb * 1e9) as u64,
                origin: "as model.memory_gb says".to_owned(),
            }),
            // What the process has already is part of what it will have.
            None => free().map(|free| Self::of_free(free, ranks::local_size() as u64)),
        }
    }
}

impl Limit {
    /// For one of `processes` of the run on this machine.
    fn of_free(free: u64, processes: u64) -> Self {
        let among = match processes {
            1 => String::new(),
            several => format!(", for {several} processes"),
        };
        Self {
            bytes: free / SHARE.1 * SHARE.0 / processes + resident().unwrap_or(0),
            origin: format!("four fifths of what is free{among}"),
        }
    }
}

/// Bytes of the machine's memory.
pub fn total() -> Option<u64> {
    kibibytes("/proc/meminfo", "MemTotal")
}

/// Bytes that this process can still take: of the machine, and of its control groups.
pub fn free() -> Option<u64> {
    let machine = kibibytes("/proc/meminfo", "MemAvailable")?;
    Some(machine.min(group_free().unwrap_or(u64::MAX)))
}

/// Bytes that the control groups of this process may have, if fewer than the machine's.
pub fn group_limit() -> Option<u64> {
    let limits = groups().into_iter().filter_map(|group| group.limit());
    let limit = limits.min()?;
    total().is_none_or(|total| limit < total).then_some(limit)
}

/// Resident memory of this process, in bytes.
pub fn resident() -> Option<u64> {
    kibibytes("/proc/self/status", "VmRSS")
}

/// Largest resident memory of this process so far, in bytes.
pub fn peak() -> Option<u64> {
    kibibytes("/proc/self/status", "VmHWM")
}

fn kibibytes(path: &str, name: &str) -> Option<u64> {
    let field = file_field(path, name)?;
    let kib: u64 = field.trim_end_matches("kB").trim().parse().ok()?;
    Some(kib << 10)
}

fn group_free() -> Option<u64> {
    let free = |group: Group| Some(group.limit()?.saturating_sub(group.used()));
    groups().into_iter().filter_map(free).min()
}

/// A control group with a bound on memory.
struct Group {
    folder: PathBuf,
    /// Names of its files under version 2 or 1.
    limit: &'static str,
    used: &'static str,
}

impl Group {
    fn read(&self, file: &str) -> Option<u64> {
        let text = std::fs::read_to_string(self.folder.join(file)).ok()?;
        text.trim().parse().ok()
    }

    /// `None` without a limit, which reads `max` in version 2 and is a huge number in version 1.
    fn limit(&self) -> Option<u64> {
        self.read(self.limit).filter(|&limit| limit < 1 << 60)
    }

    /// Without the pages of files that would be given back.
    fn used(&self) -> u64 {
        let inactive = std::fs::read_to_string(self.folder.join("memory.stat"))
            .ok()
            .and_then(|text| {
                let mut lines = text.lines().filter_map(|line| line.split_once(' '));
                let (_, value) = lines
                    .find(|(name, _)| matches!(*name, "inactive_file" | "total_inactive_file"))?;
                value.parse::<u64>().ok()
            });
        let used = self.read(self.used).unwrap_or(0);
        used.saturating_sub(inactive.unwrap_or(0))
    }
}

/// The groups that this process is in, from its own up to the root, as far as they can be seen.
fn groups() -> Vec<Group> {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut found = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (root, limit, used) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max", "memory.current"),
            _ if controllers.split(',').any(|c| c == "memory") => (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            ),
            _ => continue,
        };
        let path = Path::new(path.trim_start_matches('/'));
        for part in path.ancestors() {
            found.push(Group {
                folder: Path::new(root).join(part),
                limit,
                used,
            });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stated_limit_goes_first() {
        let limit = Limit::find(Some(1.5)).expect("a limit");
        assert_eq!(limit.bytes, 1_500_000_000);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_tells() {
        let (total, free, peak) = (total(), free(), peak());
        assert!(peak > Some(1 << 20) && peak < total, "{peak:?}");
        assert!(free > Some(0) && free <= total, "{free:?} of {total:?}");
        assert!(Limit::find(None).is_some_and(|limit| Some(limit.bytes) < total));
    }
}
