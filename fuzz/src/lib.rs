//! What the fuzz targets share: input as a file, and the promises that every reader keeps.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tinylora::Result;

/// A bound that only something like exponential work exceeds, whatever else the machine does.
const LIMIT: Duration = Duration::from_secs(2);

static PLACE: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

/// Path of a file in this process's own folder.
pub fn path(name: &str) -> PathBuf {
    PLACE.path().join(name)
}

/// Writes the input to a file and reads it: no panic, no hang, and a refusal that says what is wrong
/// with which file (`named`), as the user's or the file's fault.
pub fn read_file<T>(name: &str, data: &[u8], named: &str, read: impl FnOnce(&Path) -> Result<T>) {
    let path = path(name);
    std::fs::write(&path, data).expect("written");
    promises(named, || read(&path));
}

/// As [`read_file`] for what is not in a file.
pub fn promises<T>(named: &str, read: impl FnOnce() -> Result<T>) {
    let start = Instant::now();
    if let Err(error) = read() {
        assert!(matches!(error.exit_code(), 2 | 3), "{error}");
        assert!(error.to_string().contains(named), "{error}");
    }
    assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
}

/// The embedded checkpoint with one file of it replaced; gives its folder.
pub fn mini_with(name: &str, data: &[u8]) -> PathBuf {
    let folder = path("model");
    if !folder.exists() {
        let mini = tinylora::data::mini::directory().expect("the embedded model");
        std::fs::create_dir(&folder).expect("a folder");
        for entry in std::fs::read_dir(mini).expect("the embedded model") {
            let from = entry.expect("a file").path();
            let to = folder.join(from.file_name().expect("a name"));
            std::fs::copy(from, to).expect("copied");
        }
    }
    std::fs::write(folder.join(name), data).expect("written");
    folder
}
