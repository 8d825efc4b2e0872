//! Decompositions kept on disk, so that a second start on the same weights is instant.
//!
//! One file a model, rank, target set, memory format and algorithm: its name tells them apart, its
//! header repeats them in full, and a checksum covers everything. A file that is not exactly what
//! was written is recomputed. No failure of the cache fails a run.

use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{SVD_VERSION, Svd};
use crate::ranks::Ranks;

/// First bytes of a file, the version of its layout among them.
const MAGIC: &[u8; 8] = b"TLSVD\0\0\x01";
/// Larger results (high ranks of large models) are not worth the disk.
const MAX_BYTES: usize = 1 << 30;

/// Where decompositions are kept between runs.
#[derive(Debug, Clone)]
pub struct SvdCache {
    folder: Option<PathBuf>,
    /// Those who share the work of what is not there.
    pub(super) ranks: Ranks,
}

/// What a cached decomposition depends on.
#[derive(Debug, Clone, Copy)]
pub struct SvdKey<'a> {
    /// Hash of the checkpoint's weights.
    pub base_hash: &'a str,
    /// How the matrices are held in memory (`f32`, `bf16`, …), which rounds them.
    pub dtype: &'a str,
    pub rank: usize,
    /// Name and shape `[out, in]` of every matrix, in order.
    pub matrices: &'a [(String, [usize; 2])],
}

impl SvdCache {
    /// `svd/` in the first of `TINYLORA_CACHE`, `XDG_CACHE_HOME/tinylora`, `~/.cache/tinylora`;
    /// without any of them nothing is cached.
    pub fn user() -> Self {
        Self {
            folder: user_cache_dir().map(|dir| dir.join("svd")),
            ranks: Ranks::alone(),
        }
    }

    /// In a folder of one's own choice, which is made when something is written.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: Some(folder.into()),
            ranks: Ranks::alone(),
        }
    }

    /// Keeps nothing.
    pub fn disabled() -> Self {
        Self {
            folder: None,
            ranks: Ranks::alone(),
        }
    }

    /// Shares the work of decompositions that not every rank has kept.
    pub fn shared(mut self, ranks: &Ranks) -> Self {
        self.ranks = ranks.clone();
        self
    }

    /// The decompositions of `key`, if an intact file has them.
    pub fn load(&self, key: &SvdKey<'_>) -> Option<Vec<Svd>> {
        let path = self.path(key)?;
        let bytes = std::fs::read(&path).ok()?;
        let svds = decode(&bytes, key);
        if svds.is_none() {
            tracing::warn!("{} is damaged or foreign: computing again", path.display());
        }
        svds
    }

    /// Keeps `svds` for the next run.
    pub fn store(&self, key: &SvdKey<'_>, svds: &[Svd]) {
        let Some(path) = self.path(key) else { return };
        if key.num_values() * 4 > MAX_BYTES {
            tracing::debug!("not caching decompositions of more than {MAX_BYTES} bytes");
            return;
        }
        if let Err(error) = write_atomic(&path, &encode(key, svds)) {
            tracing::warn!("cannot keep decompositions in {}: {error}", path.display());
        }
    }

    fn path(&self, key: &SvdKey<'_>) -> Option<PathBuf> {
        let digest = hex(&Sha256::digest(key.header()));
        Some(self.folder.as_ref()?.join(format!("{}.svd", &digest[..32])))
    }
}

impl SvdKey<'_> {
    /// The whole key as one line of text.
    fn header(&self) -> String {
        let matrices: Vec<String> = self
            .matrices
            .iter()
            .map(|(name, [out, inner])| format!("{name}:{out}x{inner}"))
            .collect();
        format!(
            "algorithm {SVD_VERSION} base {} dtype {} rank {} matrices {}",
            self.base_hash,
            self.dtype,
            self.rank,
            matrices.join(",")
        )
    }

    fn num_values(&self) -> usize {
        let sides: usize = self
            .matrices
            .iter()
            .map(|(_, [out, inner])| out + inner + 1)
            .sum();
        sides * self.rank
    }
}

/// Magic, checksum of the rest, length of the header, header, then u, s, vt of each matrix in
/// little-endian f32.
fn encode(key: &SvdKey<'_>, svds: &[Svd]) -> Vec<u8> {
    let header = key.header();
    let mut body = Vec::with_capacity(8 + header.len() + 4 * key.num_values());
    body.extend((header.len() as u64).to_le_bytes());
    body.extend(header.as_bytes());
    for svd in svds {
        for values in [&svd.u, &svd.s, &svd.vt] {
            body.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        }
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend(Sha256::digest(&body));
    bytes.extend(body);
    bytes
}

fn decode(bytes: &[u8], key: &SvdKey<'_>) -> Option<Vec<Svd>> {
    let (checksum, body) = bytes.strip_prefix(MAGIC)?.split_at_checked(32)?;
    if Sha256::digest(body).as_slice() != checksum {
        return None;
    }
    let header = key.header();
    let body = body.strip_prefix(&(header.len() as u64).to_le_bytes())?;
    let values = body.strip_prefix(header.as_bytes())?;
    if values.len() != 4 * key.num_values() {
        return None;
    }
    let mut values = values
        .as_chunks::<4>()
        .0
        .iter()
        .map(|&x| f32::from_le_bytes(x));
    let mut take = |n: usize| values.by_ref().take(n).collect::<Vec<f32>>();
    key.matrices
        .iter()
        .map(|(_, [out, inner])| {
            let u = take(out * key.rank);
            let s = take(key.rank);
            Svd::new(u, s, take(inner * key.rank))
        })
        .collect()
}

/// A reader sees the whole file or none, whatever else runs.
fn write_atomic(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}

/// The user's cache folder of this program.
pub fn user_cache_dir() -> Option<PathBuf> {
    let folder = |key: &str| {
        std::env::var_os(key)
            .filter(|x| !x.is_empty())
            .map(PathBuf::from)
    };
    folder("TINYLORA_CACHE")
        .or_else(|| folder("XDG_CACHE_HOME").map(|dir| dir.join("tinylora")))
        .or_else(|| folder("HOME").map(|dir| dir.join(".cache").join("tinylora")))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn svd(seed: f32) -> Svd {
        let numbers = |n: usize| (0..n).map(|i| seed + i as f32 / 7.0).collect();
        Svd::new(numbers(2 * 5), numbers(2), numbers(2 * 3)).unwrap()
    }

    #[test]
    fn what_is_stored_comes_back_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let cache = SvdCache::at(dir.path().join("made on demand"));
        let matrices = [("a".to_string(), [5, 3]), ("b".to_string(), [5, 3])];
        let key = SvdKey {
            base_hash: "abc",
            dtype: "f32",
            rank: 2,
            matrices: &matrices,
        };
        let svds = vec![svd(1.0), svd(-2.0)];
        assert!(cache.load(&key).is_none());
        cache.store(&key, &svds);
        assert_eq!(cache.load(&key), Some(svds.clone()));
        for other in [
            SvdKey {
                base_hash: "abd",
                ..key
            },
            SvdKey {
                dtype: "bf16",
                ..key
            },
            SvdKey { rank: 1, ..key },
            SvdKey {
                matrices: &matrices[..1],
                ..key
            },
        ] {
            assert!(cache.load(&other).is_none());
            // Even under the right name a foreign file is not taken.
            std::fs::copy(cache.path(&key).unwrap(), cache.path(&other).unwrap()).unwrap();
            assert!(cache.load(&other).is_none());
        }
        SvdCache::disabled().store(&key, &svds);
        assert!(SvdCache::disabled().load(&key).is_none());
    }

    #[test]
    fn damage_is_noticed_and_repaired() {
        let dir = tempfile::tempdir().unwrap();
        let cache = SvdCache::at(dir.path());
        let matrices = [("a".to_string(), [5, 3])];
        let key = SvdKey {
            base_hash: "abc",
            dtype: "f32",
            rank: 2,
            matrices: &matrices,
        };
        let svds = vec![svd(0.5)];
        cache.store(&key, &svds);
        let path = cache.path(&key).unwrap();
        let intact = std::fs::read(&path).unwrap();
        for at in 0..intact.len() {
            let mut damaged = intact.clone();
            damaged[at] ^= 0x10;
            assert!(decode(&damaged, &key).is_none(), "byte {at}");
            assert!(decode(&intact[..at], &key).is_none(), "cut at {at}");
        }
        std::fs::write(&path, b"short").unwrap();
        assert!(cache.load(&key).is_none());
        cache.store(&key, &svds);
        assert_eq!(cache.load(&key), Some(svds));
    }

    #[test]
    fn a_folder_that_cannot_be_written_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a file");
        std::fs::write(&file, "").unwrap();
        let cache = SvdCache::at(file.join("below a file"));
        let key = SvdKey {
            base_hash: "abc",
            dtype: "f32",
            rank: 2,
            matrices: &[],
        };
        cache.store(&key, &[]);
        assert!(cache.load(&key).is_none());
    }
}
