//! Adapters: what is trained on top of the frozen model.
