//! One file a subcommand: its arguments and a page that calls the library.

pub mod bench;
pub mod doctor;
pub mod eval;
mod eval_subjects;
pub mod export;
pub mod generate;
pub mod grade;
pub mod open;
pub mod report;
pub mod score;
mod side_by_side;
pub mod sweep;
pub mod train;
