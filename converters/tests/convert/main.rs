//! Conversion from end to end, on the reference checkpoints.

mod common;
mod faithful;
mod forms;
mod reject;
