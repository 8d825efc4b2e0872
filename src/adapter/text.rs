//! An adapter as one line of text: what 13 numbers and their specification take is short enough to
//! paste into a message.
//!
//! `tinylora1:` and then, in base64url without padding:
//!
//! | bytes | |
//! |---|---|
//! | 1 | bits 0–1 dtype (f32, bf16, f16), 2–3 sigma (output, input, split), 4–5 tie (tiled, structured, all, peft), 6 projection is peft, 7 all seven maps are adapted |
//! | 1 | what follows as f64: bit 0 projection_std, 1 scaling, 2 weight_tying (else 1, 1, 0) |
//! | 0–1 | without bit 7: one bit for each adapted map, q first |
//! | varints | version of the decomposition, layers of the base, r, u, n_tie, projection_seed |
//! | 8 each | the f64 announced above |
//! | 8 | first bytes of the base's SHA-256 |
//! | | the numbers in their dtype |
//! | 4 | first bytes of SHA-256 over the prefix and all the above |
//!
//! All little-endian; varints have seven bits a byte, the low ones first. An adapter has exactly
//! one text.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use half::{bf16, f16};
use sha2::{Digest, Sha256};

use super::file::{MAX_LAYERS, SavedAdapter, widen};
use super::modules::ModuleKind;
use super::spec::{AdapterKind, AdapterSpec, Projection, Sigma, StoredDtype, Tie};
use super::svd::SVD_VERSION;
use super::tying::Tying;
use super::{Adapter, BaseModel};
use crate::{Error, Result};

/// What every text begins with; the digit is the version of the layout.
const PREFIX: &str = "tinylora1:";
/// What a text of any version begins with.
const ANY_VERSION: &str = "tinylora";
const HASH_BYTES: usize = 8;
const CHECKSUM_BYTES: usize = 4;

const DTYPES: [StoredDtype; 3] = [StoredDtype::F32, StoredDtype::Bf16, StoredDtype::F16];
const SIGMAS: [Sigma; 3] = [Sigma::Output, Sigma::Input, Sigma::Split];
const TIES: [Tie; 4] = [Tie::Tiled, Tie::Structured, Tie::All, Tie::Peft];
const ALL_MAPS: u8 = 0x7f;

/// Whether the user means a text and not a path.
pub(super) fn is_text(name: &str) -> bool {
    name.trim()
        .strip_prefix(ANY_VERSION)
        .and_then(|rest| rest.split_once(':'))
        .is_some_and(|(version, _)| {
            !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit())
        })
}

/// Most numbers of an adapter whose text is worth showing.
const SHOWN: usize = 256;

impl Adapter {
    /// The adapter as one line, which `--adapter` takes, where that is short.
    pub fn short_text(&self) -> Option<String> {
        let (spec, numbers) = (self.spec(), self.parameters());
        let short = numbers.len() <= SHOWN;
        short.then(|| encode(spec, self.base(), numbers).ok())?
    }
}

impl SavedAdapter {
    /// As [`Adapter::short_text`].
    pub fn short_text(&self) -> Option<String> {
        let short = self.num_parameters() <= SHOWN;
        short.then(|| self.to_text().ok())?
    }

    /// The adapter as one line, however long.
    ///
    /// # Errors
    /// `Error::Config` for kinds other than `tinylora`, whose numbers are too many.
    pub fn to_text(&self) -> Result<String> {
        let numbers: Vec<f32> = self.numbers().collect();
        encode(&self.spec, &self.base, &numbers)
    }

    /// Reads an adapter's text.
    ///
    /// # Errors
    /// `Error::Data` that says what is wrong with it.
    pub fn from_text(text: &str) -> Result<Self> {
        let text = text.trim();
        let refuse = |cause: String| {
            let start: String = text.chars().take(24).collect();
            Error::data(format!("cannot read adapter {start}…: {cause}"))
        };
        let saved = decode(text).map_err(refuse)?;
        match saved.to_text() {
            Ok(again) if again == text => Ok(saved),
            _ => Err(refuse("it was not written by this program".into())),
        }
    }
}

fn encode(spec: &AdapterSpec, base: &BaseModel, numbers: &[f32]) -> Result<String> {
    if spec.kind != AdapterKind::TinyLora {
        return Err(Error::config(format!(
            "only tinylora adapters have a text form, not {}",
            spec.kind.name()
        )));
    }
    let maps = spec
        .target_modules
        .iter()
        .fold(0u8, |mask, kind| mask | 1 << kind.index());
    let floats = [
        (spec.projection_std, 1.0),
        (spec.scaling, 1.0),
        (spec.weight_tying, 0.0),
    ];
    let written = |i: usize| floats[i].0.to_bits() != f64::to_bits(floats[i].1);
    let mut bytes = vec![
        place(&DTYPES, spec.dtype)
            | place(&SIGMAS, spec.sigma) << 2
            | place(&TIES, spec.tie) << 4
            | u8::from(spec.projection == Projection::Peft) << 6
            | u8::from(maps == ALL_MAPS) << 7,
        (0..floats.len()).fold(0, |mask, i| mask | u8::from(written(i)) << i),
    ];
    if maps != ALL_MAPS {
        bytes.push(maps);
    }
    for n in [
        u64::from(SVD_VERSION),
        base.num_layers as u64,
        spec.r as u64,
        spec.u as u64,
        spec.n_tie as u64,
        spec.projection_seed,
    ] {
        push_varint(&mut bytes, n);
    }
    for i in (0..floats.len()).filter(|&i| written(i)) {
        bytes.extend(floats[i].0.to_le_bytes());
    }
    bytes.extend(short_hash(&base.hash)?);
    match spec.dtype {
        StoredDtype::F32 => bytes.extend(numbers.iter().flat_map(|x| x.to_le_bytes())),
        StoredDtype::Bf16 => {
            bytes.extend(
                numbers
                    .iter()
                    .flat_map(|&x| bf16::from_f32(x).to_le_bytes()),
            );
        }
        StoredDtype::F16 => {
            bytes.extend(numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()));
        }
    }
    let sum = checksum(&bytes);
    bytes.extend(sum);
    Ok(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&bytes)))
}

fn decode(text: &str) -> Result<SavedAdapter, String> {
    let Some(body) = text.strip_prefix(PREFIX) else {
        return Err(format!("this program reads texts that begin with {PREFIX}"));
    };
    let damaged = || "it is damaged (its checksum does not fit): copy it again".to_owned();
    let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| damaged())?;
    let (bytes, sum) = bytes
        .split_last_chunk::<CHECKSUM_BYTES>()
        .ok_or_else(damaged)?;
    if checksum(bytes) != *sum {
        return Err(damaged());
    }
    // Whole, hence written by some program; what follows guards against one that lies.
    let mut reader = Reader { bytes };
    let [first, second] = reader.take()?;
    let maps = match first >> 7 {
        1 => ALL_MAPS,
        _ => reader.take::<1>()?[0],
    };
    let svd_version = reader.varint()?;
    if svd_version != u64::from(SVD_VERSION) {
        return Err(format!(
            "it belongs to decomposition {svd_version} of the base weights, this program computes \
             {SVD_VERSION}"
        ));
    }
    let num_layers = reader.size()?;
    if !(1..=MAX_LAYERS).contains(&num_layers) {
        return Err(format!("its base model has {num_layers} layers"));
    }
    let (r, u, n_tie) = (reader.size()?, reader.size()?, reader.size()?);
    let projection_seed = reader.varint()?;
    let mut float = |bit: u8, default: f64| match second >> bit & 1 {
        0 => Ok(default),
        _ => reader.take().map(f64::from_le_bytes),
    };
    let spec = AdapterSpec {
        kind: AdapterKind::TinyLora,
        r,
        u,
        n_tie,
        tie: TIES[usize::from(first >> 4 & 3)],
        sigma: *SIGMAS
            .get(usize::from(first >> 2 & 3))
            .ok_or("its sigma is not known")?,
        dtype: *DTYPES
            .get(usize::from(first & 3))
            .ok_or("its dtype is not known")?,
        projection: match first >> 6 & 1 {
            0 => Projection::Philox,
            _ => Projection::Peft,
        },
        projection_std: float(0, 1.0)?,
        scaling: float(1, 1.0)?,
        weight_tying: float(2, 0.0)?,
        projection_seed,
        target_modules: ModuleKind::ALL
            .into_iter()
            .filter(|kind| maps >> kind.index() & 1 == 1)
            .collect(),
        ..AdapterSpec::default()
    };
    spec.validate().map_err(|e| e.to_string())?;
    let hash: String = reader
        .take::<HASH_BYTES>()?
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let groups = Tying::new(&spec, num_layers).num_groups;
    if reader.bytes.len() != groups * u * spec.dtype.size() {
        return Err(format!(
            "it should hold {} numbers, it holds {} bytes",
            groups * u,
            reader.bytes.len()
        ));
    }
    let numbers = widen(reader.bytes, spec.dtype);
    if let Some(i) = numbers.iter().position(|x| !x.is_finite()) {
        return Err(format!("number {i} is {}", numbers[i]));
    }
    let base = BaseModel {
        name: "another model".into(),
        hash,
        num_layers,
    };
    let shape = vec![groups, u];
    let origin: String = text.chars().take(24).chain(['…']).collect();
    Ok(SavedAdapter::of_text(
        spec,
        base,
        origin,
        ("v".into(), shape, numbers),
    ))
}

/// Number of `value` among `all`, which lists every one.
fn place<T: PartialEq>(all: &[T], value: T) -> u8 {
    all.iter().position(|x| *x == value).unwrap_or_default() as u8
}

fn short_hash(hash: &str) -> Result<[u8; HASH_BYTES]> {
    let mut bytes = [0; HASH_BYTES];
    for (i, byte) in bytes.iter_mut().enumerate() {
        let digits = hash.get(2 * i..2 * i + 2);
        *byte = digits
            .and_then(|d| u8::from_str_radix(d, 16).ok())
            .ok_or_else(|| Error::Internal(format!("{hash:?} is no hash of a model")))?;
    }
    Ok(bytes)
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let digest = Sha256::new()
        .chain_update(PREFIX)
        .chain_update(bytes)
        .finalize();
    let mut sum = [0; CHECKSUM_BYTES];
    sum.copy_from_slice(&digest[..CHECKSUM_BYTES]);
    sum
}

fn push_varint(bytes: &mut Vec<u8>, mut n: u64) {
    while n > 0x7f {
        bytes.push(n as u8 | 0x80);
        n >>= 7;
    }
    bytes.push(n as u8);
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (head, rest) = self
            .bytes
            .split_first_chunk::<N>()
            .ok_or("it ends too early")?;
        self.bytes = rest;
        Ok(*head)
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut n = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.take()?;
            n |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(n);
            }
        }
        Err("one of its integers is too long".into())
    }

    fn size(&mut self) -> Result<usize, String> {
        let n = self.varint()?;
        usize::try_from(n).map_err(|_| format!("its size {n} is too large"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn saved(spec: AdapterSpec, num_layers: usize, numbers: Vec<f32>) -> SavedAdapter {
        let shape = vec![Tying::new(&spec, num_layers).num_groups, spec.u];
        let base = BaseModel {
            name: "base".into(),
            hash: "0123456789abcdef".repeat(4),
            num_layers,
        };
        SavedAdapter::of_text(spec, base, "memory".into(), ("v".into(), shape, numbers))
    }

    fn thirteen() -> SavedAdapter {
        let spec = AdapterSpec {
            dtype: StoredDtype::Bf16,
            ..Default::default()
        };
        let v = (0..13).map(|i| (i as f32 - 6.0) / 4.0).collect();
        saved(spec, 28, v)
    }

    #[test]
    fn thirteen_numbers_fit_into_a_short_line_that_never_changes() {
        let text = thirteen().to_text().unwrap();
        assert_eq!(text.len(), 72, "{text}");
        // Texts are pasted into messages: this one has to be read forever.
        assert_eq!(
            text,
            "tinylora1:gQABHAIBECoBI0VniavN78C_oL-Av0C_AL-AvgAAgD4AP0A_gD-gP8A_nX941A"
        );
        let back = SavedAdapter::from_text(&format!("  {text}\n")).unwrap();
        assert_eq!(back.spec, thirteen().spec);
        assert_eq!(back.base.hash, "0123456789abcdef");
        assert!(back.numbers().eq(thirteen().numbers()));
    }

    #[test]
    fn every_damage_is_noticed() {
        let text = thirteen().to_text().unwrap();
        let body = PREFIX.len();
        for i in body..text.len() {
            for other in ["A", "b", "-", "=", "é"] {
                let changed = format!("{}{other}{}", &text[..i], &text[i + 1..]);
                if changed != text {
                    let error = SavedAdapter::from_text(&changed).unwrap_err();
                    assert!(error.to_string().contains("damaged"), "{error}");
                    assert_eq!(error.exit_code(), 3);
                }
            }
            assert!(SavedAdapter::from_text(&text[..i]).is_err(), "cut at {i}");
        }
        for (text, reason) in [
            (format!("{text}A"), "damaged"),
            (text.replace(PREFIX, "tinylora2:"), "begin with tinylora1:"),
            (text.to_lowercase(), "damaged"),
        ] {
            let error = SavedAdapter::from_text(&text).unwrap_err();
            assert!(error.to_string().contains(reason), "{error}");
        }
    }

    #[test]
    fn whole_texts_that_lie_are_refused() {
        let honest = thirteen().to_text().unwrap();
        let bytes = URL_SAFE_NO_PAD.decode(&honest[PREFIX.len()..]).unwrap();
        let bytes = &bytes[..bytes.len() - CHECKSUM_BYTES];
        let forged = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = bytes.to_vec();
            change(&mut bytes);
            let sum = checksum(&bytes);
            bytes.extend(sum);
            let text = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&bytes));
            SavedAdapter::from_text(&text).unwrap_err().to_string()
        };
        assert!(forged(&|b| b[0] |= 3).contains("dtype"));
        assert!(forged(&|b| b[0] |= 12).contains("sigma"));
        assert!(forged(&|b| b[1] = 8).contains("not written by"));
        assert!(forged(&|b| b[2] = 9).contains("decomposition 9"));
        assert!(forged(&|b| b[3] = 0).contains("0 layers"));
        assert!(forged(&|b| b[4] = 0).contains("adapter.r"));
        assert!(forged(&|b| b[5] = 2).contains("should hold 26 numbers"));
        assert!(forged(&|b| b.truncate(9)).contains("too early"));
        assert!(forged(&|b| b.splice(3..4, [0xff; 12]).for_each(drop)).contains("too long"));
        let last = bytes.len() - 1;
        assert!(forged(&|b| b[last] = 0x7f).contains("number 12 is"));
    }

    #[test]
    fn texts_are_told_from_paths() {
        assert!(is_text("tinylora1:abc"));
        assert!(is_text(" tinylora27:"));
        for path in ["tinylora", "tinylora:x", "tinyloraX:1", "runs/tinylora1:a"] {
            assert!(!is_text(path), "{path}");
        }
    }

    proptest! {
        #[test]
        fn every_specification_comes_back(
            (r, u, n_tie, num_layers) in (1usize..5, 1usize..9, 1usize..40, 1usize..12),
            (dtype, sigma, tie, maps) in (0usize..3, 0usize..3, 0usize..4, 1u8..128),
            (seed, std, scaling) in (any::<u64>(), 1e-3f64..9.0, prop::option::of(1e-3f64..99.0)),
            (peft, weight_tying) in (any::<bool>(), 0.0f64..=1.0),
            noise in any::<u32>(),
        ) {
            let spec = AdapterSpec {
                r, u, n_tie,
                dtype: DTYPES[dtype],
                sigma: SIGMAS[sigma],
                tie: TIES[tie],
                projection: if peft { Projection::Peft } else { Projection::Philox },
                projection_seed: seed,
                projection_std: if peft { 1.0 } else { std },
                scaling: scaling.unwrap_or(1.0),
                weight_tying: if tie == 3 { weight_tying } else { 0.0 },
                target_modules: ModuleKind::ALL
                    .into_iter()
                    .filter(|kind| maps >> kind.index() & 1 == 1)
                    .collect(),
                ..AdapterSpec::default()
            };
            let count = Tying::new(&spec, num_layers).num_groups * u;
            let numbers: Vec<f32> = (0..count)
                .map(|i| spec.dtype.round((f64::from(noise) * 1e-9 + i as f64).sin() as f32))
                .collect();
            let saved = saved(spec, num_layers, numbers);
            let text = saved.to_text().unwrap();
            let back = SavedAdapter::from_text(&text).unwrap();
            prop_assert_eq!(&back.spec, &saved.spec);
            prop_assert_eq!(back.base.num_layers, num_layers);
            prop_assert!(back.numbers().eq(saved.numbers()));
        }

        #[test]
        fn no_text_makes_the_reader_stumble(text in "tinylora1:[A-Za-z0-9_-]{0,90}") {
            prop_assert!(SavedAdapter::from_text(&text).is_err());
        }
    }
}
