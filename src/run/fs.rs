//! File operations whose errors name the path, and writes that survive a crash.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::Path;

use crate::{Error, Result};

/// An I/O failure on `path`; a full disk is said plainly.
pub fn error(action: &str, path: &Path, cause: &std::io::Error) -> Error {
    if cause.kind() == ErrorKind::StorageFull {
        return Error::data(format!(
            "cannot {action} {}: the disk is full; free space and continue with `--resume`",
            path.display()
        ));
    }
    Error::file(action, path, cause)
}

/// Reads a text file.
pub fn read_to_string(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| error("read", path, &e))
}

/// Reads a file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| error("read", path, &e))
}

/// Creates a folder and its parents.
pub fn create_dir_all(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| error("create", path, &e))
}

/// Writes a file to stable storage; not atomic, so only for names nobody reads yet.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let fail = |e: std::io::Error| error("write", path, &e);
    let mut file = File::create(path).map_err(fail)?;
    file.write_all(bytes).map_err(fail)?;
    file.sync_all().map_err(fail)
}

/// Makes the content of a written file durable.
pub fn sync_file(path: &Path) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path);
    file.and_then(|f| f.sync_all())
        .map_err(|e| error("sync", path, &e))
}

/// Replaces a file in one step: readers see the old or the new content, also after a crash.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = parent(path);
    let mut temporary = tempfile::Builder::new()
        .prefix(".tmp-")
        .tempfile_in(folder)
        .map_err(|e| error("write", path, &e))?;
    let fail = |e: std::io::Error| error("write", path, &e);
    temporary.write_all(bytes).map_err(fail)?;
    make_readable(temporary.as_file()).map_err(fail)?;
    temporary.as_file().sync_all().map_err(fail)?;
    temporary.persist(path).map_err(|e| fail(e.error))?;
    sync_dir(folder)
}

/// Temporary files are private; what they become should be as readable as any other file.
#[cfg(unix)]
fn make_readable(file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn make_readable(_file: &File) -> std::io::Result<()> {
    Ok(())
}

/// Makes creations, renames and removals inside a folder durable.
pub fn sync_dir(path: &Path) -> Result<()> {
    // Folders cannot be opened as files on Windows, where renames are durable by themselves.
    if cfg!(unix) {
        let folder = File::open(path).map_err(|e| error("open", path, &e))?;
        folder.sync_all().map_err(|e| error("sync", path, &e))?;
    }
    Ok(())
}

/// The folder a path lies in (`.` for a bare name).
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
