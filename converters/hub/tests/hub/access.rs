//! Who may see what, what does not exist, and what an address or a name from a server must not do.

use std::fs;

use st_hub::{Credentials, DownloadRequest, Hub, HubConfig, HubError, RepoId, Token};

use crate::server::{Fault, RepoFile};
use crate::{FIRST, REPO, World, request, request_for, walk};

/// The error, and how many requests it took.
fn failure(world: &World, hub: &Hub, request: &DownloadRequest) -> (HubError, usize) {
    world.server.forget();
    let error = world.download_with(hub, request).0.unwrap_err();
    (error, world.server.log().len())
}

fn with_token(world: &World, token: &str) -> Hub {
    Hub::new(HubConfig { token: Token::new(token.as_bytes(), "HF_TOKEN"), ..world.config() })
}

#[test]
fn the_token_goes_to_the_hub_and_not_where_it_redirects_to() {
    let world = World::new();
    world.server.change(|s| s.token = Some("hf_secret".into()));
    let (result, _) = world.download_with(&with_token(&world, "hf_secret"), &request());
    world.assert_complete(&result.unwrap());
    let log = world.server.log();
    assert!(log.iter().any(|seen| seen.storage));
    for seen in log {
        assert_eq!(seen.authorization.is_some(), !seen.storage, "{seen:?}");
    }
}

#[test]
fn the_token_does_not_follow_a_redirect_to_another_port_of_the_same_host() {
    let (world, other) = (World::new(), World::new());
    let target = format!("{}/{REPO}/resolve/main/{FIRST}", other.server.endpoint());
    world.server.spoil(FIRST, Fault::RedirectTo(target));
    let (result, _) = world.download_with(&with_token(&world, "hf_secret"), &request());
    world.assert_complete(&result.unwrap());
    let log = other.server.log();
    assert!(!log.is_empty() && log.iter().all(|seen| seen.authorization.is_none()), "{log:?}");
}

#[test]
fn a_redirect_within_the_hub_keeps_the_token() {
    let world = World::new();
    world.server.change(|s| s.token = Some("hf_secret".into()));
    world.server.spoil(FIRST, Fault::RedirectTo(format!("/{REPO}/resolve/main/{FIRST}")));
    let (result, _) = world.download_with(&with_token(&world, "hf_secret"), &request());
    world.assert_complete(&result.unwrap());
}

#[test]
fn redirects_without_end_or_to_other_schemes_are_refused() {
    let world = World::new();
    for _ in 0..20 {
        world.server.spoil(FIRST, Fault::RedirectTo(format!("/{REPO}/resolve/main/{FIRST}")));
    }
    let (error, _) = failure(&world, &world.hub(), &request_for(&[FIRST]));
    assert!(error.to_string().contains("too many redirects"), "{error}");

    let world = World::new();
    world.server.spoil(FIRST, Fault::RedirectTo("file:///etc/passwd".into()));
    let (error, _) = failure(&world, &world.hub(), &request_for(&[FIRST]));
    assert!(matches!(error, HubError::BadResponse { .. }), "{error}");
}

#[test]
fn a_missing_login_is_one_request() {
    let world = World::new();
    world.server.change(|s| s.token = Some("hf_secret".into()));
    let (error, requests) = failure(&world, &world.hub(), &request());
    assert!(matches!(error, HubError::Unauthorized { sent: Credentials::Nothing, .. }), "{error}");
    assert_eq!(requests, 1);

    let (error, requests) = failure(&world, &with_token(&world, "hf_wrong"), &request());
    assert!(matches!(error, HubError::Unauthorized { sent: Credentials::Token, .. }), "{error}");
    assert!(!format!("{error} {error:?}").contains("hf_wrong"), "the token is a secret");
    assert_eq!(requests, 1);
}

#[test]
fn a_gated_model_is_told_from_a_missing_login() {
    let world = World::new();
    world.server.change(|s| s.gated = true);
    let (error, requests) = failure(&world, &world.hub(), &request());
    let HubError::Gated { status: 403, host, .. } = &error else { panic!("{error}") };
    assert_eq!(*host, world.server.endpoint(), "where its page is");
    assert_eq!(requests, 1);
}

#[test]
fn a_forbidden_file_is_one_request_and_keeps_the_signature_secret() {
    let world = World::new();
    world.server.spoil(FIRST, Fault::Status(403, vec![("X-Error-Message", "no read access".into())]));
    let (error, _) = failure(&world, &world.hub(), &request_for(&[FIRST]));
    assert!(matches!(error, HubError::Forbidden { .. }) && error.to_string().contains("no read access"), "{error}");
    assert_eq!(world.server.log().iter().filter(|s| s.file.as_deref() == Some(FIRST)).count(), 1);
}

#[test]
fn an_unknown_model_is_one_request() {
    let world = World::new();
    let mistyped = DownloadRequest::new(RepoId::parse("PowerInfer/SmallThinker-4B-Instruct").unwrap());
    let (error, requests) = failure(&world, &world.hub(), &mistyped);
    assert!(matches!(error, HubError::RepoNotFound { .. }), "{error}");
    assert_eq!(requests, 1);
}

#[test]
fn an_unknown_revision_is_told_from_an_unknown_model() {
    let world = World::new();
    let (error, requests) = failure(&world, &world.hub(), &DownloadRequest { revision: "v9".into(), ..request() });
    assert!(matches!(&error, HubError::RevisionNotFound { revision, .. } if revision == "v9"), "{error}");
    assert_eq!(requests, 1);
}

#[test]
fn no_network_and_no_address_are_told_apart() {
    let world = World::new();
    // A port that was just free: nobody listens there.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let hub = Hub::new(HubConfig { endpoint: format!("http://127.0.0.1:{port}"), ..world.config() });
    let (error, _) = failure(&world, &hub, &request());
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
    for endpoint in ["", "huggingface.co", "ftp://hub", "http://"] {
        let hub = Hub::new(HubConfig { endpoint: endpoint.into(), ..world.config() });
        assert!(matches!(hub.list(&request()), Err(HubError::InvalidEndpoint { .. })), "{endpoint}");
    }
}

#[test]
fn another_kind_of_model_is_refused_before_its_weights() {
    let world = World::new();
    world.put("config.json", RepoFile::small(r#"{"architectures": ["LlamaForCausalLM"]}"#));
    for request in [request(), request_for(&["*.safetensors"])] {
        let (error, _) = failure(&world, &world.hub(), &request);
        assert!(matches!(error, HubError::NotSmallThinker { .. }), "{error}");
        assert!(error.to_string().contains("LlamaForCausalLM"), "{error}");
        let fetched: Vec<_> = world.server.log().into_iter().filter_map(|seen| seen.file).collect();
        assert_eq!(fetched, ["config.json"][..fetched.len()]);
    }
    world.server.change(|s| s.files.remove("config.json").map(drop).unwrap());
    world.put("config.json.bak", RepoFile::small("{}"));
    let clean = Hub::new(HubConfig { cache_dir: world.folder.path().join("other"), ..world.config() });
    let (error, _) = failure(&world, &clean, &request());
    assert!(error.to_string().contains("no config.json"), "{error}");
}

#[test]
fn file_names_that_leave_the_folder_are_refused() {
    for name in ["../evil.json", "/tmp/evil.json", "a/../../evil.json", "..\\evil.json", "a//evil.json"] {
        let world = World::new();
        world.put(name, RepoFile::small("evil"));
        let everything =
            DownloadRequest { local_dir: Some(world.folder.path().join("in/side")), ..request_for(&["*"]) };
        for request in [request_for(&["*"]), everything] {
            let (error, _) = failure(&world, &world.hub(), &request);
            assert!(matches!(&error, HubError::UnsafePath { path } if path == name), "{name}: {error}");
        }
        let written = walk(world.folder.path());
        assert!(written.is_empty(), "{written:?}");
    }
}

#[test]
fn commits_and_hashes_that_are_paths_are_refused() {
    let world = World::new();
    world.server.change(|s| s.commit = Some("../../../etc".into()));
    assert!(matches!(failure(&world, &world.hub(), &request()).0, HubError::BadResponse { .. }));

    let world = World::new();
    world.put(FIRST, RepoFile { etag: "../../../../evil".into(), ..world.file(FIRST) });
    assert!(matches!(failure(&world, &world.hub(), &request()).0, HubError::BadResponse { .. }));
    assert!(walk(world.folder.path()).is_empty());
}

#[test]
fn a_page_that_is_no_json_is_named() {
    let world = World::new();
    // A login page of a hotel, say: status 200, and not the hub.
    world.server.spoil("info", Fault::RedirectTo(format!("/{REPO}/resolve/main/README.md")));
    let (error, _) = failure(&world, &world.hub(), &request());
    assert!(matches!(error, HubError::BadResponse { .. }), "{error}");
    assert!(fs::read_dir(world.cache()).is_err(), "nothing was created");
}
