//! Repositories that have moved: the old name is followed wherever it is used, and one folder has the files.

use std::fs;

use st_hub::{ALIASES, DownloadRequest, HubError, RepoId};

use crate::server::{Moved, Server};
use crate::{FIRST, REPO, World, request};

const OLD: &str = "owner/old-name";

fn request_of(name: &str) -> DownloadRequest {
    DownloadRequest::new(RepoId::parse(name).unwrap())
}

/// The folders of models in the cache, links too.
fn folders(world: &World) -> Vec<String> {
    let names = fs::read_dir(world.cache()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("models--")).collect();
    names.sort();
    names
}

fn fetches(server: &Server) -> usize {
    server.log().iter().filter(|seen| seen.target.contains("/resolve/")).count()
}

#[test]
fn the_old_name_is_followed_at_every_address_and_the_new_one_has_the_folder() {
    for (status, absolute) in [(301, false), (302, true), (307, false), (307, true), (308, true)] {
        let world = World::new();
        let base = if absolute { world.server.endpoint() } else { String::new() };
        world.server.change(|s| {
            s.former = vec![OLD.into()];
            s.moved = Moved { status, base };
        });
        let folder = world.download_with(&world.hub(), &request_of(OLD)).0.unwrap();
        world.assert_complete(&folder);
        assert!(folder.starts_with(world.repo_folder()), "{}", folder.display());
        for address in ["/revision/", "/tree/", "/resolve/"] {
            let old = |target: &str| target.contains(OLD) && target.contains(address);
            assert!(world.server.log().iter().any(|seen| old(&seen.target)), "{address}");
        }
        assert_eq!(world.hub().list(&request_of(OLD)).unwrap().repo.as_str(), REPO);
        for name in [OLD, REPO] {
            assert_eq!(world.download_with(&world.offline(), &request_of(name)).0.unwrap(), folder);
            assert_eq!(world.offline().cached(&request_of(name).repo, "main").unwrap(), Some(folder.clone()));
        }
        world.server.forget();
        world.download_with(&world.hub(), &request_of(OLD)).0.unwrap();
        assert_eq!(fetches(&world.server), 0);
    }
}

#[test]
fn what_was_fetched_before_the_move_is_not_fetched_again() {
    for old in [OLD, ALIASES[0].former] {
        let world = World::new();
        world.server.change(|s| s.repo = old.into());
        let before = world.download_with(&world.hub(), &request_of(old)).0.unwrap();
        let kept = format!("models--{}", old.replace('/', "--"));
        assert_eq!(folders(&world), [kept.as_str()]);
        world.server.change(|s| {
            s.repo = REPO.into();
            s.former = vec![old.into()];
        });
        world.server.forget();
        // Whoever asks by the old name makes the new one known; of a model with an alias both are.
        let names = if old == OLD { [OLD, REPO, "4b"] } else { ["4b", REPO, old] };
        for name in names {
            assert_eq!(world.download_with(&world.hub(), &request_of(name)).0.unwrap(), before, "{name}");
            assert_eq!(world.download_with(&world.offline(), &request_of(name)).0.unwrap(), before, "{name}");
        }
        assert_eq!(fetches(&world.server), 0);
        let mut both = [kept, format!("models--{}", REPO.replace('/', "--"))];
        both.sort();
        assert_eq!(folders(&world), both);
        assert!(fs::symlink_metadata(world.repo_folder()).unwrap().is_symlink());
    }
}

#[test]
fn an_alias_means_the_old_name_where_only_that_is_known() {
    let world = World::new();
    let former = ALIASES[0].former;
    world.server.change(|s| s.repo = former.into());
    let folder = world.download().0.unwrap();
    world.assert_complete(&folder);
    for name in ["4b", REPO, former] {
        assert_eq!(world.download_with(&world.offline(), &request_of(name)).0.unwrap(), folder);
    }
    // Where neither is, the error is about the one that was asked for.
    world.server.change(|s| s.repo = "somebody/else".into());
    world.server.forget();
    let error = world.download().0.unwrap_err();
    assert!(matches!(&error, HubError::RepoNotFound { repo, .. } if repo == REPO), "{error}");
    assert_eq!(world.server.log().len(), 2);
}

#[test]
fn a_commit_of_a_repository_that_has_moved_is_found_by_both_names() {
    let world = World::new();
    world.server.change(|s| s.former = vec![OLD.into()]);
    let by_commit = |name| DownloadRequest { revision: crate::server::COMMIT.into(), ..request_of(name) };
    let folder = world.download_with(&world.hub(), &by_commit(OLD)).0.unwrap();
    world.assert_complete(&folder);
    world.server.forget();
    for name in [OLD, REPO, "4b"] {
        assert_eq!(world.download_with(&world.hub(), &by_commit(name)).0.unwrap(), folder);
    }
    assert!(world.server.log().is_empty());
}

#[test]
fn the_token_does_not_follow_a_repository_to_another_host() {
    let (world, other) = (World::new(), World::new());
    world.server.change(|s| {
        s.repo = OLD.into();
        s.former = vec![REPO.into()];
        s.moved = Moved { base: other.server.endpoint(), ..Moved::default() };
    });
    other.server.change(|s| s.repo = OLD.into());
    let token = st_hub::Token::new(b"hf_secret", "HF_TOKEN");
    let hub = st_hub::Hub::new(st_hub::HubConfig { token, ..world.config() });
    world.assert_complete(&world.download_with(&hub, &request()).0.unwrap());
    assert!(world.server.log().iter().all(|seen| seen.authorization.is_some()));
    let log = other.server.log();
    assert!(log.iter().any(|seen| seen.file.as_deref() == Some(FIRST)));
    assert!(log.iter().all(|seen| seen.authorization.is_none()), "{log:?}");
}
