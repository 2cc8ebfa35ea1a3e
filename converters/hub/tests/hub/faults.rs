//! What the network and the server do to a transfer.

use std::fs;
use std::time::Duration;

use proptest::prelude::*;
use st_hub::{Hub, HubConfig, HubError};

use crate::server::{Fault, RepoFile, pattern};
use crate::{FIRST, SECOND, World, request};

fn from(byte: usize) -> Option<String> {
    Some(format!("bytes={byte}-"))
}

#[test]
fn a_cut_connection_is_resumed_where_it_ended() {
    let world = World::new();
    world.server.spoil(FIRST, Fault::CutAfter(100_000));
    world.server.spoil(FIRST, Fault::CutAfter(50_000));
    let (result, events) = world.download();
    world.assert_complete(&result.unwrap());
    assert_eq!(world.server.ranges(FIRST), [None, from(100_000), from(150_000)]);
    // Bytes arrived in between, so the second cut counts as the first.
    assert_eq!(events.waits(), [1, 1]);
}

#[test]
fn a_cut_before_the_first_byte_is_tried_again_with_growing_waits() {
    let world = World::new();
    for _ in 0..3 {
        world.server.spoil(FIRST, Fault::CutAfter(0));
    }
    let (result, events) = world.download();
    world.assert_complete(&result.unwrap());
    assert_eq!(events.waits(), [1, 2, 4]);
}

#[test]
fn an_answer_without_content_counts_as_cut() {
    let world = World::new();
    world.server.spoil(FIRST, Fault::Length(0));
    world.assert_complete(&world.download().0.unwrap());
    assert_eq!(world.server.ranges(FIRST), [None, None]);
}

#[test]
fn endless_cuts_end_in_an_error_from_which_it_goes_on() {
    let world = World::new();
    world.server.spoil(FIRST, Fault::CutAfter(1000));
    for _ in 0..10 {
        world.server.spoil(FIRST, Fault::CutAfter(0));
    }
    let error = world.download().0.unwrap_err();
    assert!(matches!(&error, HubError::Cut { file, at: 1000, .. } if file == FIRST), "{error}");
    assert_eq!(world.server.ranges(FIRST).len(), 1 + 3);
    assert_eq!(fs::metadata(world.partial(FIRST)).unwrap().len(), 1000);
    assert!(!world.blob(FIRST).exists());
}

#[test]
fn what_an_earlier_run_left_is_resumed() {
    let world = World::new();
    world.leave_partial(FIRST, &world.file(FIRST).content()[..123_456]);
    let (result, events) = world.download();
    world.assert_complete(&result.unwrap());
    assert_eq!(world.server.ranges(FIRST), [from(123_456)]);
    assert_eq!(events.already(FIRST), 123_456);
}

#[test]
fn a_partial_file_that_is_complete_needs_no_transfer() {
    let world = World::new();
    world.leave_partial(FIRST, world.file(FIRST).content());
    world.assert_complete(&world.download().0.unwrap());
    assert!(world.server.ranges(FIRST).is_empty());
}

#[test]
fn a_partial_file_with_other_content_is_fetched_again_from_the_start() {
    let world = World::new();
    world.leave_partial(FIRST, &pattern(1000, 99));
    world.leave_partial(SECOND, &pattern(200_000, 99));
    world.assert_complete(&world.download().0.unwrap());
    assert_eq!(world.server.ranges(FIRST), [from(1000), None]);
    assert_eq!(world.server.ranges(SECOND), [None]);
}

#[test]
fn a_partial_file_that_is_too_long_is_not_trusted() {
    let world = World::new();
    world.leave_partial(FIRST, &pattern(300_001, 2));
    world.assert_complete(&world.download().0.unwrap());
    assert_eq!(world.server.ranges(FIRST), [None]);
}

#[test]
fn a_blob_of_the_wrong_length_is_replaced() {
    let world = World::new();
    fs::create_dir_all(world.blob(FIRST).parent().unwrap()).unwrap();
    fs::write(world.blob(FIRST), b"truncated by somebody").unwrap();
    world.assert_complete(&world.download().0.unwrap());
}

#[test]
fn too_many_requests_waits_as_long_as_the_server_asks() {
    let world = World::new();
    let busy = || Fault::Status(429, vec![("Retry-After", "7".into())]);
    world.server.spoil("tree", busy());
    world.server.spoil(FIRST, busy());
    let (result, events) = world.download();
    world.assert_complete(&result.unwrap());
    assert_eq!(events.waits(), [7, 7]);
}

#[test]
fn a_wait_of_an_hour_is_an_error_and_not_a_hang() {
    let world = World::new();
    world.server.spoil("info", Fault::Status(429, vec![("Retry-After", "3600".into())]));
    let (result, events) = world.download();
    let error = result.unwrap_err();
    assert!(matches!(error, HubError::RateLimited { .. }), "{error}");
    assert!(error.to_string().contains("3600 s"), "{error}");
    assert_eq!((world.server.log().len(), events.waits().len()), (1, 0));
}

#[test]
fn server_errors_are_tried_again_with_growing_waits() {
    let world = World::new();
    for status in [500, 503, 502] {
        world.server.spoil(FIRST, Fault::status(status));
    }
    world.server.spoil("info", Fault::status(504));
    let (result, events) = world.download();
    world.assert_complete(&result.unwrap());
    assert_eq!(events.waits(), [1, 1, 2, 4]);
}

#[test]
fn a_server_that_stays_broken_is_named() {
    let world = World::new();
    for _ in 0..10 {
        world.server.spoil("info", Fault::status(500));
    }
    let error = world.download().0.unwrap_err();
    assert!(matches!(error, HubError::Status { status: 500, .. }), "{error}");
    assert_eq!(world.server.log().len(), 1 + 3);
}

#[test]
fn a_silent_server_is_left_and_the_file_resumed() {
    let world = World::new();
    world.server.spoil(FIRST, Fault::StallAfter(70_000));
    let config = HubConfig { stall_timeout: Duration::from_millis(500), ..world.config() };
    let (result, events) = world.download_with(&Hub::new(config), &request());
    world.assert_complete(&result.unwrap());
    assert_eq!(world.server.ranges(FIRST), [None, from(70_000)]);
    let causes = events.causes.lock().unwrap();
    assert!(causes[0].contains("sent nothing for 0.5 s"), "{causes:?}");
}

#[test]
fn a_server_that_ignores_ranges_sends_it_all_and_that_is_right_too() {
    let world = World::new();
    world.leave_partial(FIRST, &world.file(FIRST).content()[..5000]);
    world.server.spoil(FIRST, Fault::IgnoreRange);
    let (result, events) = world.download();
    world.assert_complete(&result.unwrap());
    assert_eq!(world.server.ranges(FIRST), [from(5000)]);
    // 5000 bytes were there, were given up, and came again: progress ends at the file's size.
    let index = events.files.lock().unwrap().iter().position(|f| f == FIRST).unwrap();
    assert_eq!(events.arrived.lock().unwrap()[&index], (5000, 295_000));
}

#[test]
fn a_range_that_starts_elsewhere_is_not_appended() {
    let world = World::new();
    world.leave_partial(FIRST, &world.file(FIRST).content()[..5000]);
    world.server.spoil(FIRST, Fault::EarlyRange(10));
    world.assert_complete(&world.download().0.unwrap());
    assert_eq!(world.server.ranges(FIRST), [from(5000), None]);
}

#[test]
fn a_wrong_byte_is_noticed_and_the_file_fetched_again() {
    for file in [FIRST, "tokenizer.json"] {
        let world = World::new();
        world.server.spoil(file, Fault::WrongByte(4321));
        world.assert_complete(&world.download().0.unwrap());
        assert_eq!(world.server.ranges(file), [None, None]);
    }
}

#[test]
fn a_byte_that_stays_wrong_is_an_error_and_nothing_is_kept() {
    for (file, algorithm) in [(FIRST, "sha256"), ("tokenizer.json", "git sha1")] {
        let world = World::new();
        world.server.spoil(file, Fault::WrongByte(0));
        world.server.spoil(file, Fault::WrongByte(17));
        let error = world.download().0.unwrap_err();
        assert!(matches!(&error, HubError::Digest { algorithm: a, .. } if *a == algorithm), "{error}");
        assert!(!world.blob(file).exists());
        assert_eq!(fs::metadata(world.partial(file)).unwrap().len(), 0, "wrong bytes are not resumed from");
        world.assert_nothing_wrong();
    }
}

#[test]
fn a_length_that_is_not_the_listed_one_is_an_error() {
    for length in [1, 299_999, 300_001, 1 << 40] {
        let world = World::new();
        world.server.spoil(FIRST, Fault::Length(length));
        let error = world.download().0.unwrap_err();
        assert!(matches!(&error, HubError::Size { expected: 300_000, got, .. } if *got == length), "{error}");
        assert!(!world.blob(FIRST).exists());
    }
}

#[test]
fn bytes_after_the_last_are_an_error() {
    let world = World::new();
    world.server.spoil(FIRST, Fault::Extra(1));
    let error = world.download().0.unwrap_err();
    assert!(matches!(error, HubError::Size { expected: 300_000, got: 300_001, .. }), "{error}");
    assert!(!world.blob(FIRST).exists());
}

#[test]
fn a_body_without_stated_length_is_taken_if_it_is_the_file() {
    let world = World::new();
    world.server.spoil(FIRST, Fault::Extra(0));
    world.assert_complete(&world.download().0.unwrap());
}

#[test]
fn an_identity_that_is_not_the_listed_one_is_an_error_before_any_byte() {
    let world = World::new();
    world.server.spoil(FIRST, Fault::LinkedSize(1));
    let error = world.download().0.unwrap_err();
    assert!(matches!(error, HubError::Size { expected: 300_000, got: 1, .. }), "{error}");

    world.server.spoil(FIRST, Fault::LinkedEtag("f".repeat(64)));
    let error = world.download().0.unwrap_err();
    assert!(matches!(error, HubError::Changed { .. }), "{error}");
    assert!(!world.blob(FIRST).exists());
}

#[test]
fn a_listing_that_lies_about_the_size_is_caught() {
    let world = World::new();
    world.put(FIRST, RepoFile { listed_size: Some(299_000), ..world.file(FIRST) });
    let error = world.download().0.unwrap_err();
    assert!(matches!(error, HubError::Size { expected: 299_000, got: 300_000, .. }), "{error}");
    assert!(!world.blob(FIRST).exists());
}

#[test]
fn one_failure_stops_the_other_files() {
    let world = World::new();
    world.server.spoil(FIRST, Fault::status(404));
    world.server.spoil(SECOND, Fault::StallAfter(1000));
    let config = HubConfig { stall_timeout: Duration::from_secs(600), ..world.config() };
    let (result, _) = world.download_with(&Hub::new(config), &request());
    // Without the abort this would wait for ten minutes for the second file.
    let error = result.unwrap_err();
    assert!(matches!(&error, HubError::FileNotFound { file, .. } if file == FIRST), "{error}");
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        (0..400_000usize).prop_map(Fault::CutAfter),
        Just(Fault::IgnoreRange),
        (1..2000u64).prop_map(Fault::EarlyRange),
        (0..300_000u64).prop_map(Fault::WrongByte),
        (0..400_000u64).prop_map(Fault::Length),
        (0..3usize).prop_map(Fault::Extra),
        prop_oneof![Just(500u16), Just(429), Just(403), Just(404)].prop_map(Fault::status),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_no_wrong_file_gets_a_final_name_and_the_next_run_is_right(
        faults in prop::collection::vec(fault(), 1..5),
        left in prop::option::of((0..320_000usize, any::<bool>())),
    ) {
        let world = World::new();
        if let Some((len, wrong)) = left {
            let mut content = world.file(FIRST).content().to_vec();
            content.resize(len, 0);
            if wrong && let Some(byte) = content.last_mut() {
                *byte ^= 1;
            }
            world.leave_partial(FIRST, &content);
        }
        for fault in faults {
            world.server.spoil(FIRST, fault);
        }
        let mut runs = 0;
        let folder = loop {
            let result = world.download().0;
            world.assert_nothing_wrong();
            runs += 1;
            match result {
                Ok(folder) => break folder,
                Err(error) => prop_assert!(runs <= 6, "still failing without faults: {error}"),
            }
        };
        world.assert_complete(&folder);
    }
}
