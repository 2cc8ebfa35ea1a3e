//! Parts of files that are read and not stored; what a cache holds, and removing it.

use super::*;
use crate::server::Fault;

fn part(world: &World, range: std::ops::Range<u64>) -> Result<Vec<u8>, HubError> {
    let request = DownloadRequest { revision: server::COMMIT.to_owned(), ..request() };
    world.hub().read_part(&request, FIRST, range)
}

#[test]
fn a_part_is_right_whatever_the_server_does() {
    let world = World::new();
    let content = world.file(FIRST);
    let faults = [
        None,
        Some(Fault::IgnoreRange),
        Some(Fault::EarlyRange(7)),
        Some(Fault::CutAfter(10)),
        Some(Fault::status(503)),
    ];
    for fault in faults {
        for range in [0..8, 0..1000, 1000..1001, 299_000..300_000, 5..5] {
            if let Some(fault) = &fault {
                world.server.spoil(FIRST, fault.clone());
            }
            let expected = &content.content()[range.start as usize..range.end as usize];
            assert_eq!(part(&world, range.clone()).unwrap(), expected, "{fault:?} {range:?}");
            world.server.heal();
        }
    }
    assert!(fs::read_dir(world.cache()).is_err(), "something was stored");
}

#[test]
fn a_part_that_is_not_there_is_an_error() {
    let world = World::new();
    for _ in 0..10 {
        world.server.spoil(FIRST, Fault::status(500));
    }
    assert!(matches!(part(&world, 0..8), Err(HubError::Status { .. })));
    world.server.heal();
    assert!(part(&world, 299_999..300_001).is_err());
    assert!(part(&world, 400_000..400_001).is_err());
}

#[test]
fn the_cache_says_what_it_holds_and_lets_go_of_it() {
    let world = World::new();
    assert_eq!(world.hub().held().unwrap(), []);
    world.download().0.unwrap();
    let held = world.offline().held().unwrap();
    assert_eq!(held.len(), 1, "{held:?}");
    assert_eq!(held[0].repo.as_str(), REPO);
    assert!(held[0].bytes >= 500_000);
    let names: Vec<&str> = held[0].files.iter().map(|file| file.name.as_str()).collect();
    assert!(names.contains(&FIRST) && names.contains(&"config.json"), "{names:?}");
    // By its former name, too.
    let former = RepoId::parse("PowerInfer/SmallThinker-4BA0.6B-Instruct").unwrap();
    assert_eq!(world.offline().held_of(&former).unwrap(), Some(held[0].clone()));

    world.hub().remove_files(&former, &[FIRST.to_owned()]).unwrap();
    assert!(!world.blob(FIRST).exists() && world.blob(SECOND).exists());
    assert!(world.offline().cached(&former, "main").unwrap().is_none(), "it is no longer whole");
    world.download().0.unwrap();
    world.hub().remove(&former).unwrap();
    assert_eq!(world.offline().held().unwrap(), []);
    assert!(!world.repo_folder().exists());
    assert_eq!(world.offline().held_of(&former).unwrap(), None);
}

#[test]
fn what_two_names_share_stays_until_both_are_gone() {
    let world = World::new();
    world.put("copy.safetensors", world.file(FIRST));
    world.download().0.unwrap();
    let repo = request().repo;
    world.hub().remove_files(&repo, &[FIRST.to_owned()]).unwrap();
    assert!(world.blob(FIRST).exists());
    world.hub().remove_files(&repo, &["copy.safetensors".to_owned()]).unwrap();
    assert!(!world.blob(FIRST).exists());
}

#[test]
fn what_another_process_fetches_is_not_removed() {
    let world = World::new();
    world.download().0.unwrap();
    let locks = world.cache().join(".locks/models--Tiiny--SmallThinker-4BA0.6B-Instruct");
    let lock = fs::File::open(locks.join(format!("{}.lock", world.file(FIRST).etag))).unwrap();
    lock.lock().unwrap();
    let repo = request().repo;
    assert!(matches!(world.hub().remove(&repo), Err(HubError::Busy { .. })));
    assert!(matches!(world.hub().remove_files(&repo, &[FIRST.to_owned()]), Err(HubError::Busy { .. })));
    assert!(world.blob(FIRST).exists());
    lock.unlock().unwrap();
    world.hub().remove(&repo).unwrap();
}
