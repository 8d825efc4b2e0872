//! File operations whose errors name the path, and writes that survive a crash.
//!
//! Every change that a run makes to the file system goes through [`change`], so that a test can make
//! each of them fail in turn (`faults`).

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use crate::{Error, Result};

/// How names of files begin that are not whole yet. What a killed process leaves of them is removed
/// when its folder is opened again.
pub const TEMPORARY: &str = ".tmp-tinylora-";

/// An I/O failure on `path`; a full disk is said plainly.
pub fn error(action: &str, path: &Path, cause: &io::Error) -> Error {
    if matches!(
        cause.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded
    ) {
        return Error::data(format!(
            "cannot {action} {}: the disk is full; free space and start again (a training goes on \
             with `--resume`)",
            path.display()
        ));
    }
    Error::file(action, path, cause)
}

/// Does something to the file system; a failure names `path`.
pub fn change<T>(action: &str, path: &Path, doing: impl FnOnce() -> io::Result<T>) -> Result<T> {
    #[cfg(debug_assertions)]
    super::faults::before_change().map_err(|e| error(action, path, &e))?;
    doing().map_err(|e| error(action, path, &e))
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
    change("create", path, || fs::create_dir_all(path))
}

/// Opens a file to write to, with what it holds; makes it when it is not there.
pub fn open_to_write(path: &Path) -> Result<File> {
    change("open", path, || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
    })
}

/// Writes all of `bytes` at the file's position.
pub fn write_all(mut file: impl Write, path: &Path, bytes: &[u8]) -> Result<()> {
    #[cfg(debug_assertions)]
    let bytes = {
        // On a full disk a write fails with a part of it done.
        let (first, second) = bytes.split_at(bytes.len() / 2);
        change("write", path, || file.write_all(first))?;
        second
    };
    change("write", path, || file.write_all(bytes))
}

/// Cuts a file that is open to write.
pub fn set_len(file: &File, path: &Path, length: u64) -> Result<()> {
    change("cut", path, || file.set_len(length))
}

/// Writes a file to stable storage; not atomic, so only for names nobody reads yet.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = change("create", path, || File::create(path))?;
    write_all(&mut file, path, bytes)?;
    change("sync", path, || file.sync_all())
}

/// Makes the content of a written file durable.
pub fn sync_file(path: &Path) -> Result<()> {
    change("sync", path, || {
        OpenOptions::new().write(true).open(path)?.sync_all()
    })
}

/// Replaces a file in one step: readers see the old or the new content, also after a crash.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = temporary_for(path)?;
    write_all(&mut temporary, path, bytes)?;
    put_in_place(temporary, path)
}

/// A file in the folder of `path` to be written and given that name by [`put_in_place`].
pub fn temporary_for(path: &Path) -> Result<tempfile::NamedTempFile> {
    change("create", path, || {
        tempfile::Builder::new()
            .prefix(TEMPORARY)
            .tempfile_in(parent(path))
    })
}

/// Makes a written temporary file durable and gives it its name.
pub fn put_in_place(temporary: tempfile::NamedTempFile, path: &Path) -> Result<()> {
    change("write", path, || {
        make_readable(temporary.as_file())?;
        temporary.as_file().sync_all()
    })?;
    change("write", path, || {
        temporary.persist(path).map_err(|e| e.error)
    })?;
    sync_dir(parent(path))
}

/// Temporary files are private; what they become should be as readable as any other file.
#[cfg(unix)]
fn make_readable(file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn make_readable(_file: &File) -> io::Result<()> {
    Ok(())
}

/// Makes creations, renames and removals inside a folder durable.
pub fn sync_dir(path: &Path) -> Result<()> {
    // Folders cannot be opened as files on Windows, where renames are durable by themselves.
    if cfg!(unix) {
        change("sync", path, || File::open(path)?.sync_all())?;
    }
    Ok(())
}

/// Gives a file or folder another name on the same file system.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    change("rename", from, || fs::rename(from, to))
}

/// Removes a folder with everything in it, if it is there.
pub fn remove_dir_all(path: &Path) -> Result<()> {
    change("remove", path, || match fs::remove_dir_all(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    })
}

/// Removes what a killed process left half-made in a folder that nobody else is in.
pub fn remove_temporaries(folder: &Path) -> Result<()> {
    let entries = fs::read_dir(folder).map_err(|e| error("read", folder, &e))?;
    for entry in entries {
        let entry = entry.map_err(|e| error("read", folder, &e))?;
        if !is_temporary(&entry.file_name()) {
            continue;
        }
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_dir_all(&path)?;
        } else {
            change("remove", &path, || fs::remove_file(&path))?;
        }
    }
    Ok(())
}

/// Whether a name is one of a file that is not whole.
pub fn is_temporary(name: &std::ffi::OsStr) -> bool {
    name.to_string_lossy().starts_with(TEMPORARY)
}

/// The folder a path lies in (`.` for a bare name).
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
