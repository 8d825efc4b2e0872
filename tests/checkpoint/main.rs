//! Opening checkpoints: what is read exactly, and what is refused clearly.

mod chat;
mod config;
mod corrupted;
mod gguf;
mod hostile;
mod hub;
mod oracle;
mod support;
mod tokenizer;
mod weights;
