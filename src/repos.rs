//! The hub as the environment describes it, and what its repositories are called.

use st_hub::{Hub, HubConfig, RepoId};

use crate::context::Context;

/// The hub as the environment describes it.
pub(crate) fn hub(context: &Context) -> Hub {
    Hub::new(hub_config(context))
}

/// Settings of the hub as the environment gives them.
pub(crate) fn hub_config(context: &Context) -> HubConfig {
    let env = &context.env;
    HubConfig {
        endpoint: env.hub_endpoint.clone(),
        token: env.hub_token(),
        offline: env.offline,
        proxies: env.proxies.clone(),
        cancel: context.interrupt.cancel().flag(),
        ..HubConfig::new(&env.hub_cache)
    }
}

/// What a person types for a repository.
pub(crate) fn short_name(repo: &RepoId) -> String {
    repo.alias().map_or_else(|| repo.to_string(), |alias| alias.short.to_owned())
}
