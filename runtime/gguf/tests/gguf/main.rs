//! What the crate promises, seen from outside: damaged input is refused, what is written is read back, and
//! nothing half-written is left behind.

mod checksums;
mod common;
mod expert_index;
mod reject;
mod round_trip;
mod split;
mod writer;
