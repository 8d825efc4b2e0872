//! One file a subcommand: its arguments and a page that calls the library.

pub mod grade;
pub mod train;
