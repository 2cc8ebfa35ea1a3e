//! Integration tests of the whole program, in one binary. Those of pseudo-terminals, signals and links are for systems that have them.

mod answers;
mod apis;
mod arriving;
#[cfg(unix)]
mod chat;
mod cli;
mod common;
mod company;
mod crates;
mod damage;
mod drafts;
mod faults;
mod getting;
mod golden;
mod grammars;
mod hot;
mod http;
mod hub;
mod identity;
mod loading;
mod made;
mod memory;
mod mixed;
mod openapi;
#[cfg(unix)]
mod outputs;
mod planning;
mod profiles;
mod program;
mod promises;
mod published;
mod receipts;
mod regression;
mod reject;
mod routing;
mod server;
mod sessions;
mod snapshots;
mod sparse_head;
mod steps;
#[cfg(unix)]
mod stops;
mod types;
