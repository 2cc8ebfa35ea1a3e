//! What is on disk afterwards, and what is used of what is on disk before.

use std::ffi::OsStr;
use std::fs;
#[cfg(unix)]
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use st_hub::{DownloadRequest, Hub, HubConfig, HubError, expected_sha256};

use crate::server::{COMMIT, RepoFile, pattern};
use crate::{DEFAULT_FILES, FIRST, SECOND, World, request, request_for, walk};

/// Files that were asked for, of any host.
fn fetched(world: &World) -> Vec<String> {
    let mut files: Vec<String> = world.server.log().into_iter().filter_map(|seen| seen.file).collect();
    files.sort();
    files.dedup();
    files
}

#[test]
fn the_cache_is_laid_out_as_the_hugging_face_tools_do_it() {
    let world = World::new();
    let folder = world.download().0.unwrap();
    world.assert_complete(&folder);
    assert_eq!(folder, world.repo_folder().join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(world.repo_folder().join("refs/main")).unwrap(), COMMIT);
    for file in DEFAULT_FILES {
        let target = fs::read_link(folder.join(file)).unwrap();
        assert_eq!(target, Path::new("../../blobs").join(world.file(file).etag), "{file}");
    }
    let lock = world.cache().join(".locks").join(world.repo_folder().file_name().unwrap());
    assert!(lock.join(format!("{}.lock", world.file(FIRST).etag)).exists());
    let tree: serde_json::Value =
        serde_json::from_slice(&fs::read(world.repo_folder().join(format!("trees/{COMMIT}.json"))).unwrap()).unwrap();
    assert_eq!(tree["format_version"], 1);
    assert_eq!(tree["files"][FIRST]["lfs_sha256"], world.file(FIRST).etag);
    assert_eq!(tree["files"]["README.md"]["blob_id"], world.file("README.md").etag);
    assert!(!fetched(&world).contains(&"README.md".to_owned()), "a conversion does not need it");
}

#[test]
fn links_in_sub_folders_climb_as_far_as_they_must() {
    let world = World::new();
    let name = "extra/sub folder/ünï#%.json";
    let folder = world.download_with(&world.hub(), &request_for(&["extra/"])).0.unwrap();
    assert_eq!(fs::read(folder.join(name)).unwrap(), b"{}");
    let target = fs::read_link(folder.join(name)).unwrap();
    assert_eq!(target, Path::new("../../../../blobs").join(world.file(name).etag));
    let asked: Vec<_> = world.server.log().into_iter().filter(|s| s.file.as_deref() == Some(name)).collect();
    assert!(asked[0].target.ends_with("/extra/sub%20folder/%C3%BCn%C3%AF%23%25.json"), "{asked:?}");
}

#[test]
fn a_second_download_asks_for_the_commit_and_nothing_else() {
    let world = World::new();
    let first = world.download().0.unwrap();
    world.server.forget();
    let (second, events) = world.download();
    assert_eq!(second.unwrap(), first);
    assert_eq!(events.transferred(), 0);
    let log = world.server.log();
    assert_eq!(log.len(), 1, "{log:?}");
    assert!(log[0].target.ends_with("/revision/main"));
}

#[test]
fn a_commit_that_is_whole_needs_no_request_at_all() {
    let world = World::new();
    world.download().0.unwrap();
    world.server.forget();
    let by_commit = DownloadRequest { revision: COMMIT.into(), ..request() };
    world.assert_complete(&world.download_with(&world.hub(), &by_commit).0.unwrap());
    assert!(world.server.log().is_empty());
}

#[test]
fn another_revision_of_the_same_commit_only_gets_its_reference() {
    let world = World::new();
    world.download().0.unwrap();
    world.server.forget();
    for revision in ["v1", "refs/pr/1"] {
        let request = DownloadRequest { revision: revision.into(), ..request() };
        world.assert_complete(&world.download_with(&world.hub(), &request).0.unwrap());
        assert_eq!(fs::read_to_string(world.repo_folder().join("refs").join(revision)).unwrap(), COMMIT);
    }
    assert!(fetched(&world).is_empty());
    assert!(world.server.log()[1].target.ends_with("/revision/refs%2Fpr%2F1"));
}

#[test]
fn a_blob_that_is_there_is_linked_and_not_fetched() {
    let world = World::new();
    let folder = world.download().0.unwrap();
    fs::remove_file(folder.join(FIRST)).unwrap();
    world.server.forget();
    world.assert_complete(&world.download().0.unwrap());
    assert!(fetched(&world).is_empty());
}

#[test]
fn two_names_of_one_content_share_it() {
    let world = World::new();
    world.put("copy.safetensors", world.file(FIRST));
    let folder = world.download().0.unwrap();
    world.assert_complete(&folder);
    assert_eq!(fs::read_link(folder.join("copy.safetensors")).unwrap(), fs::read_link(folder.join(FIRST)).unwrap());
}

#[test]
fn a_listing_of_many_pages_is_read_to_its_end() {
    let world = World::new();
    world.server.change(|s| s.page = 2);
    world.assert_complete(&world.download().0.unwrap());
    let pages = world.server.log().iter().filter(|seen| seen.target.contains("/tree/")).count();
    assert_eq!(pages, 5);
}

#[test]
fn patterns_choose_files_and_no_match_is_an_error() {
    let world = World::new();
    let folder = world.download_with(&world.hub(), &request_for(&["*.md", "token*"])).0.unwrap();
    let files: Vec<_> = walk(&folder).iter().map(|p| p.strip_prefix(&folder).unwrap().to_owned()).collect();
    assert_eq!(files, [Path::new("README.md"), Path::new("tokenizer.json")]);
    let error = world.download_with(&world.hub(), &request_for(&["*.bin", "x/"])).0.unwrap_err();
    assert_eq!(error.to_string(), format!("no file of {} matches *.bin, x/*", crate::REPO));
}

#[test]
fn a_dry_run_lists_and_writes_nothing() {
    let world = World::new();
    let listing = world.hub().list(&request()).unwrap();
    let names: Vec<_> = listing.files.iter().map(|f| f.path.as_str()).collect();
    let mut expected = DEFAULT_FILES;
    expected.sort();
    assert_eq!(names, expected);
    let total: u64 = DEFAULT_FILES.iter().map(|f| world.file(f).size).sum();
    assert_eq!((listing.total_bytes(), listing.missing_bytes()), (total, total));
    assert_eq!(listing.commit, COMMIT);
    assert!(listing.free_bytes.unwrap() > 0);
    assert!(walk(world.folder.path()).is_empty());

    world.leave_partial(FIRST, &world.file(FIRST).content()[..1000]);
    assert_eq!(world.hub().list(&request()).unwrap().missing_bytes(), total - 1000);
    world.download().0.unwrap();
    assert_eq!(world.hub().list(&request()).unwrap().missing_bytes(), 0);
}

#[test]
fn what_cannot_fit_is_refused_before_the_first_byte() {
    let world = World::new();
    world.put(FIRST, RepoFile { listed_size: Some(1 << 60), ..world.file(FIRST) });
    world.put(SECOND, RepoFile { listed_size: Some(u64::MAX), ..world.file(SECOND) });
    let error = world.download().0.unwrap_err();
    let HubError::NoSpace { needed, free, .. } = &error else { panic!("{error}") };
    assert!(needed > free);
    assert!(fetched(&world).is_empty());
    assert!(walk(world.folder.path()).is_empty());
}

#[test]
fn offline_uses_what_is_whole_and_refuses_what_is_not() {
    let world = World::new();
    let error = world.download_with(&world.offline(), &request()).0.unwrap_err();
    assert!(matches!(error, HubError::Offline { .. }), "{error}");

    let folder = world.download().0.unwrap();
    world.server.forget();
    assert_eq!(world.download_with(&world.offline(), &request()).0.unwrap(), folder);
    assert_eq!(world.hub().cached(&request().repo, "main").unwrap(), Some(folder.clone()));

    fs::remove_file(world.blob(SECOND)).unwrap();
    let error = world.download_with(&world.offline(), &request()).0.unwrap_err();
    assert!(error.to_string().contains("missing files: 1 (200000 bytes)"), "{error}");
    assert_eq!(world.hub().cached(&request().repo, "main").unwrap(), None);
    let error = world.download_with(&world.offline(), &request_for(&["README.md"])).0.unwrap_err();
    assert!(matches!(error, HubError::Offline { .. }), "{error}");
    assert!(world.server.log().is_empty(), "offline is offline");
}

#[test]
fn a_snapshot_without_a_listing_counts_if_its_index_is_satisfied() {
    let world = World::new();
    let folder = world.download().0.unwrap();
    fs::remove_dir_all(world.repo_folder().join("trees")).unwrap();
    assert_eq!(world.download_with(&world.offline(), &request()).0.unwrap(), folder);
    fs::remove_file(folder.join(SECOND)).unwrap();
    assert!(world.download_with(&world.offline(), &request()).0.is_err());
}

#[test]
fn a_cached_model_of_another_kind_is_named() {
    let world = World::new();
    let folder = world.download().0.unwrap();
    fs::write(folder.join("config.json"), r#"{"architectures": ["SmallThinkerForCausalLM"],"x":1}"#).unwrap();
    fs::remove_dir_all(world.repo_folder().join("trees")).unwrap();
    assert!(world.hub().cached(&request().repo, "main").unwrap().is_some());
    fs::write(folder.join("config.json"), r#"{"architectures": ["GPT2LMHeadModel"]}"#).unwrap();
    let error = world.hub().cached(&request().repo, "main").unwrap_err();
    assert!(matches!(error, HubError::NotSmallThinker { .. }), "{error}");
}

/// Another cache folder, so that only the plain folder can have the files.
fn local(world: &World) -> (Hub, DownloadRequest) {
    let hub = Hub::new(HubConfig { cache_dir: world.folder.path().join("other"), ..world.config() });
    (hub, DownloadRequest { local_dir: Some(world.folder.path().join("plain")), ..request() })
}

#[test]
fn a_plain_folder_gets_plain_files_and_is_up_to_date_afterwards() {
    let world = World::new();
    let (hub, request) = local(&world);
    let folder = world.download_with(&hub, &request).0.unwrap();
    assert_eq!(folder, world.folder.path().join("plain"));
    world.assert_complete(&folder);
    assert!(DEFAULT_FILES.iter().all(|file| fs::symlink_metadata(folder.join(file)).unwrap().is_file()));
    let notes = folder.join(".cache/huggingface");
    let metadata = fs::read_to_string(notes.join(format!("download/{FIRST}.metadata"))).unwrap();
    let lines: Vec<_> = metadata.lines().collect();
    assert_eq!(lines[..2], [COMMIT, &world.file(FIRST).etag]);
    assert!(lines[2].parse::<f64>().unwrap() > 1.7e9);
    assert_eq!(fs::read_to_string(notes.join(".gitignore")).unwrap(), "*");
    assert!(!world.folder.path().join("other/models--Tiiny--SmallThinker-4BA0.6B-Instruct").exists());

    world.server.forget();
    assert_eq!(world.download_with(&hub, &request).1.transferred(), 0);
    assert!(fetched(&world).is_empty());
}

#[test]
fn in_a_plain_folder_too_a_partial_file_is_resumed_and_a_changed_one_replaced() {
    let world = World::new();
    let (hub, request) = local(&world);
    world.server.spoil(FIRST, crate::server::Fault::CutAfter(100_000));
    for _ in 0..9 {
        world.server.spoil(FIRST, crate::server::Fault::CutAfter(0));
    }
    assert!(world.download_with(&hub, &request).0.is_err());
    let folder = world.folder.path().join("plain");
    assert!(!folder.join(FIRST).exists());
    world.server.heal();
    world.assert_complete(&world.download_with(&hub, &request).0.unwrap());
    assert_eq!(world.server.ranges(FIRST).last().unwrap().as_deref(), Some("bytes=100000-"));

    // Somebody's own edit of the same length, long after: only the hash can tell.
    let mut content = world.file(SECOND).content().to_vec();
    content[0] ^= 1;
    fs::write(folder.join(SECOND), content).unwrap();
    let future = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
    fs::File::options().write(true).open(folder.join(SECOND)).unwrap().set_modified(future).unwrap();
    world.server.forget();
    world.assert_complete(&world.download_with(&hub, &request).0.unwrap());
    assert_eq!(fetched(&world), [SECOND]);
}

#[test]
fn files_that_somebody_put_there_are_recognised_by_their_content() {
    let world = World::new();
    let (hub, request) = local(&world);
    let folder = world.folder.path().join("plain");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(FIRST), world.file(FIRST).content()).unwrap();
    world.assert_complete(&world.download_with(&hub, &request).0.unwrap());
    assert!(!fetched(&world).contains(&FIRST.to_owned()));
}

#[test]
fn a_plain_folder_is_filled_from_the_cache() {
    let world = World::new();
    world.download().0.unwrap();
    world.server.forget();
    let request = DownloadRequest { local_dir: Some(world.folder.path().join("plain")), ..request() };
    world.assert_complete(&world.download_with(&world.offline(), &request).0.unwrap());
    assert!(world.server.log().is_empty());
}

#[test]
fn a_spoilt_cache_does_not_spoil_the_plain_folder() {
    let world = World::new();
    world.download().0.unwrap();
    fs::write(world.blob(FIRST), vec![0; 300_000]).unwrap();
    world.server.forget();
    let request = DownloadRequest { local_dir: Some(world.folder.path().join("plain")), ..request() };
    world.assert_complete(&world.download_with(&world.hub(), &request).0.unwrap());
    assert_eq!(fetched(&world), [FIRST]);
}

#[test]
fn what_a_file_should_contain_is_known_wherever_it_was_fetched_to() {
    let world = World::new();
    let hash = Some(world.file(FIRST).etag);
    let snapshot = world.download().0.unwrap();
    assert_eq!(expected_sha256(&snapshot.join(FIRST)), hash);
    assert_eq!(expected_sha256(&world.blob(FIRST)), hash);
    assert_eq!(expected_sha256(&snapshot.join("config.json")), None, "git's hash is no SHA-256");

    // A snapshot that holds the files themselves, as on a file system without links; and a damaged one all the more.
    fs::remove_file(snapshot.join(FIRST)).unwrap();
    fs::write(snapshot.join(FIRST), "damaged").unwrap();
    assert_eq!(expected_sha256(&snapshot.join(FIRST)), hash);

    let (hub, request) = local(&world);
    let plain = world.download_with(&hub, &request).0.unwrap();
    assert_eq!(expected_sha256(&plain.join(FIRST)), hash);
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
    fs::File::options().write(true).open(plain.join(FIRST)).unwrap().set_modified(later).unwrap();
    assert_eq!(expected_sha256(&plain.join(FIRST)), None, "somebody's own edit is no damage");

    let elsewhere = world.folder.path().join("blobs");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("a".repeat(64)), "").unwrap();
    assert_eq!(expected_sha256(&elsewhere.join("a".repeat(64))), None);
    assert_eq!(expected_sha256(&elsewhere.join("missing")), None);
}

#[test]
fn names_as_long_as_names_may_be_are_written_like_any_other() {
    let world = World::new();
    let longest = [format!("{}.json", "a".repeat(250)), format!("{}{}.json", "b".repeat(246), "é".repeat(2))];
    for (seed, name) in longest.iter().enumerate() {
        world.put(name, RepoFile::small(pattern(100, seed as u64 + 9)));
    }
    let cached = world.download().0.unwrap();
    let (hub, request) = local(&world);
    let plain = world.download_with(&hub, &request).0.unwrap();
    for folder in [&cached, &plain] {
        world.assert_complete(folder);
        assert!(longest.iter().all(|name| fs::read(folder.join(name)).unwrap() == world.file(name).content()));
    }
    world.server.forget();
    assert_eq!(world.download_with(&hub, &request).1.transferred(), 0);
    assert!(fetched(&world).is_empty());
}

#[test]
#[cfg(unix)]
fn a_cache_at_a_path_that_is_no_text_is_a_cache() {
    let world = World::new();
    let odd = world.folder.path().join(OsStr::from_bytes(b"caf\xe9"));
    let hub = Hub::new(HubConfig { cache_dir: odd.clone(), ..world.config() });
    let folder = world.download_with(&hub, &request()).0.unwrap();
    assert!(folder.starts_with(&odd));
    world.assert_complete(&folder);
    assert_eq!(hub.cached(&request().repo, "main").unwrap(), Some(folder));
}

#[test]
fn a_cache_that_cannot_be_written_is_named_and_one_that_is_whole_need_not_be() {
    let world = World::new();
    fs::write(world.folder.path().join("file"), "").unwrap();
    let under_a_file = world.folder.path().join("file/hub");
    let hub = Hub::new(HubConfig { cache_dir: under_a_file.clone(), ..world.config() });
    let error = world.download_with(&hub, &request()).0.unwrap_err();
    assert!(matches!(&error, HubError::Io { path, .. } if path.starts_with(&under_a_file)), "{error}");

    // As the administrator of a shared cache left it: no listing, and nobody else may add one.
    let folder = world.download().0.unwrap();
    fs::remove_dir_all(world.repo_folder().join("trees")).unwrap();
    fs::write(world.repo_folder().join("trees"), "").unwrap();
    assert_eq!(world.download().0.unwrap(), folder);
}
