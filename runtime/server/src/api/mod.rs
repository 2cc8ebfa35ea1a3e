//! One file an API: requests to jobs, events to responses.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod experts;
pub(crate) mod logprobs;
pub(crate) mod messages;
mod metrics;
pub(crate) mod models;
pub(crate) mod openai;
pub(crate) mod responses;
pub(crate) mod status;
pub(crate) mod text;
