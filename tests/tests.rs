//! Integration tests of the whole program, in one binary.

mod chat;
mod cli;
mod common;
mod company;
mod crates;
mod damage;
mod faults;
mod golden;
mod http;
mod hub;
mod identity;
mod loading;
mod made;
mod memory;
mod mixed;
mod outputs;
mod program;
mod regression;
mod reject;
mod routing;
mod server;
mod sessions;
mod stops;
mod types;
