//! What a person can do about an error of the hub.

use std::io;

use st_hub::{ALIASES, Credentials, HubError, closest_known};

const GOES_ON: &str = "run the same command again: it goes on where it stopped";

pub(super) fn hint(error: &HubError) -> Option<String> {
    Some(match error {
        HubError::InvalidName { .. } => {
            format!("a model is `4b`, `21b`, or `owner/name` as on the hub, e.g. {}", ALIASES[0].repo)
        }
        HubError::InvalidEndpoint { .. } => {
            "HF_ENDPOINT should look like https://huggingface.co; odd characters of a password are written %40".into()
        }
        HubError::InvalidProxy { variable } => {
            format!("{variable} should look like http://proxy:3128 or socks5h://proxy:1080, or be unset")
        }
        HubError::InvalidToken { .. } => {
            "copy the token again, without quotes or anything else around it: it begins with hf_".into()
        }
        HubError::Unreachable { .. } => {
            "check the network and the proxy settings; --offline (or HF_HUB_OFFLINE=1) uses what is in the cache".into()
        }
        HubError::Unauthorized { repo, sent: Credentials::Nothing, .. } => format!(
            "check the name {repo:?}; if the model is private, log in with `hf auth login`, set HF_TOKEN, or pass --token{}",
            did_you_mean(repo)
        ),
        HubError::Unauthorized { host, sent: Credentials::Token, .. } => {
            format!("the token is invalid or expired, or cannot see this model: make a new one at {host}/settings/tokens")
        }
        HubError::Unauthorized { sent: Credentials::Password, .. } => "check user and password in HF_ENDPOINT".into(),
        HubError::Gated { repo, host, sent, .. } => {
            let login = match sent {
                Credentials::Nothing => ", then log in with `hf auth login` or set HF_TOKEN",
                Credentials::Token | Credentials::Password => "",
            };
            format!("accept the licence at {host}/{repo}{login}")
        }
        HubError::Forbidden { page: true, .. } => {
            "a web page came with it: a filter or a proxy on the way refuses, not the hub".into()
        }
        HubError::Forbidden { .. } => {
            "the token needs read access to this repository (a fine-grained token has to name it)".into()
        }
        HubError::RepoNotFound { repo, .. } => {
            format!("check the spelling, or log in if it is private{}", did_you_mean(repo))
        }
        HubError::NoListing { .. } => "HF_ENDPOINT names a mirror that lists no files: without it the hub itself is \
             asked; or fetch the folder by other means and name it as MODEL"
            .into(),
        HubError::RevisionNotFound { .. } => {
            "a revision is a branch, a tag or a full commit hash; without --revision it is `main`".into()
        }
        HubError::RateLimited { .. } => {
            "wait a while and run the same command again: it goes on where it stopped; logged-in users have higher limits"
                .into()
        }
        HubError::Status { status, .. } if *status >= 500 => {
            "the hub has a problem; run the same command again later: it goes on where it stopped".into()
        }
        HubError::Size { .. } | HubError::Digest { .. } | HubError::Changed { .. } => {
            "something on the way (a proxy, a mirror, a login page) may be altering the download; nothing wrong was kept"
                .into()
        }
        HubError::BadResponse { .. } | HubError::WebPage { .. } => {
            "check HF_ENDPOINT and the proxy settings: a login page or a mirror may be answering in the hub's place".into()
        }
        HubError::LfsPointer { .. } => {
            "HF_ENDPOINT names a mirror that has what git stores, without the large files: without it the hub itself is asked"
                .into()
        }
        HubError::NoSpace { .. } => {
            "free some space, or point --local-dir, HF_HUB_CACHE or HF_HOME at a larger disk".into()
        }
        HubError::Offline { .. } => "run the same command once without --offline and without HF_HUB_OFFLINE".into(),
        HubError::NothingMatches { .. } => "--include '*' --dry-run lists every file".into(),
        HubError::Busy { .. } => "wait until it is done, or end it, and try again".into(),
        HubError::NotSmallThinker { .. } => {
            "only models whose config.json says SmallThinkerForCausalLM can be used: `4b` and `21b` are two".into()
        }
        HubError::Io { source, .. } if is_unwritable(source) => {
            "point --local-dir, HF_HUB_CACHE or HF_HOME at a folder that you may write to".into()
        }
        HubError::Cut { .. } | HubError::Stalled { .. } | HubError::Cancelled => GOES_ON.into(),
        _ => return None,
    })
}

fn is_unwritable(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, PermissionDenied, ReadOnlyFilesystem};
    matches!(error.kind(), PermissionDenied | ReadOnlyFilesystem | NotADirectory)
}

/// The words that propose the closest known model, or none when none is close.
fn did_you_mean(repo: &str) -> String {
    closest_known(repo).map_or_else(String::new, |alias| format!("; did you mean {} (`{}`)?", alias.repo, alias.short))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_refusal_says_what_to_do_about_it() {
        let (repo, host) = (String::from("Tiiny/SmallThinker-4B-Instruct"), String::from("https://hub"));
        let unauthorized = |sent| HubError::Unauthorized { repo: repo.clone(), host: host.clone(), sent };
        let io = |kind: io::ErrorKind| HubError::Io { action: "create", path: "/hf".into(), source: kind.into() };
        let forbidden = |page| HubError::Forbidden { url: host.clone(), message: None, page };
        let gated = |sent| HubError::Gated { repo: repo.clone(), host: host.clone(), status: 403, sent };
        let cases: [(HubError, &[&str]); 24] = [
            (unauthorized(Credentials::Nothing), &["hf auth login", "HF_TOKEN", "--token", "did you mean"]),
            (unauthorized(Credentials::Token), &["invalid or expired", "https://hub/settings/tokens"]),
            (unauthorized(Credentials::Password), &["HF_ENDPOINT"]),
            (gated(Credentials::Nothing), &["https://hub/Tiiny/SmallThinker-4B-Instruct", "log in"]),
            (gated(Credentials::Token), &["accept the licence"]),
            (forbidden(false), &["read access"]),
            (forbidden(true), &["filter or a proxy"]),
            (
                HubError::RepoNotFound { repo: repo.clone(), host: host.clone() },
                &["did you mean Tiiny/SmallThinker-4BA0.6B-Instruct (`4b`)?"],
            ),
            (HubError::NoListing { repo: repo.clone(), host: host.clone() }, &["HF_ENDPOINT", "MODEL"]),
            (HubError::RevisionNotFound { repo: repo.clone(), revision: "v9".into() }, &["`main`"]),
            (HubError::Unreachable { host: host.clone(), cause: "x".into() }, &["--offline"]),
            (HubError::NotSmallThinker { repo: repo.clone(), found: "x".into() }, &["`4b`"]),
            (HubError::BadResponse { url: host.clone(), reason: "x".into() }, &["login page"]),
            (HubError::WebPage { url: host.clone(), wanted: "x".into() }, &["login page", "HF_ENDPOINT"]),
            (HubError::Cut { file: "x".into(), at: 1, cause: "x".into() }, &["goes on where it stopped"]),
            (HubError::Stalled { host: host.clone(), limit: Duration::ZERO }, &["goes on where it stopped"]),
            (HubError::LfsPointer { file: "x".into(), host: host.clone() }, &["HF_ENDPOINT", "the large files"]),
            (HubError::NoSpace { path: "/hf".into(), needed: 2, free: 1 }, &["--local-dir"]),
            (
                HubError::Offline { repo: repo.clone(), revision: "main".into(), what: "x".into() },
                &["without --offline"],
            ),
            (HubError::Busy { repo: repo.clone() }, &["wait until"]),
            (HubError::InvalidProxy { variable: "https_proxy".into() }, &["https_proxy should"]),
            (HubError::InvalidToken { origin: "HF_TOKEN".into(), found: '"' }, &["token", "quotes"]),
            (io(io::ErrorKind::PermissionDenied), &["HF_HOME", "HF_HUB_CACHE", "--local-dir"]),
            (io(io::ErrorKind::ReadOnlyFilesystem), &["HF_HOME"]),
        ];
        for (error, parts) in cases {
            let hint = hint(&error).unwrap_or_else(|| panic!("{error}"));
            assert!(parts.iter().all(|part| hint.contains(part)), "{error}: {hint}");
        }
        assert_eq!(hint(&io(io::ErrorKind::NotFound)), None);
        assert!(!hint(&gated(Credentials::Token)).is_some_and(|hint| hint.contains("log in")));
    }
}
