//! What `--adapter` names: a file, a line of text, or a PEFT directory.

use std::path::Path;

use super::file::SavedAdapter;
use super::peft::{self, PeftAdapter};
use super::svd::SvdCache;
use super::{Adapter, BaseModel, text};
use crate::model::Decoder;
use crate::{Error, Result};

/// An adapter that has been read and checked, not yet on a model.
#[derive(Debug)]
pub enum AdapterSource {
    /// This program's own form, as a file or a text.
    Own(Box<SavedAdapter>),
    Peft(Box<PeftAdapter>),
}

impl AdapterSource {
    /// Reads what `name` says.
    ///
    /// # Errors
    /// `Error::Data` that names the file or text and what is wrong with it.
    pub fn open(name: &str) -> Result<Self> {
        if text::is_text(name) {
            return SavedAdapter::from_text(name).map(|saved| Self::Own(Box::new(saved)));
        }
        let path = Path::new(name);
        if path.is_dir() {
            if peft::is_directory(path) {
                return PeftAdapter::open(path).map(|adapter| Self::Peft(Box::new(adapter)));
            }
            return Err(Error::data(format!(
                "adapter {name}: the directory is neither a run nor a PEFT adapter"
            )));
        }
        SavedAdapter::load(path).map(|saved| Self::Own(Box::new(saved)))
    }

    /// The adapter on its base model. `cache` and `progress` are as in [`Adapter::new`].
    ///
    /// # Errors
    /// `Error::Data` when it belongs to another model.
    pub fn onto(
        &self,
        base: BaseModel,
        decoder: &Decoder,
        cache: &SvdCache,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Adapter> {
        match self {
            Self::Own(saved) => saved.onto(base, decoder, cache, progress),
            Self::Peft(adapter) => adapter.onto(base, decoder),
        }
    }

    /// Whether `name` is a text rather than a path.
    pub fn is_text(name: &str) -> bool {
        text::is_text(name)
    }
}
