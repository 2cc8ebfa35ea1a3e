use super::*;
use crate::fixture::{ALIGNED, Fixture, ODD};
use crate::io::{BufferedIo, DirectIo, Fault, FaultyIo, IoMode};
use crate::options::ALL_EXPERTS;
use st_gguf::{GgufFile, Layout, checksum_keys};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const LAYOUTS: [Layout; 2] = [Layout::Gguf, Layout::Offload];

fn store(fixture: &Fixture, options: StoreOptions) -> Result<ExpertStore, StoreError> {
    ExpertStore::new(Arc::clone(&fixture.source), fixture.index.clone(), fixture.format(), options)
}

fn check(fixture: &Fixture, layer: usize, lease: &Lease<'_>) {
    for rank in 0..lease.len() {
        for matrix in Matrix::ALL {
            let got = lease.wait(rank, matrix).unwrap();
            assert!(got == fixture.expected(layer, lease.id(rank) as usize, matrix), "{layer} {rank} {matrix:?}");
            assert!(lease.is_ready(rank, matrix));
        }
    }
}

/// A routing with some locality: `top_k` distinct experts per layer.
fn route(fixture: &Fixture, token: usize, layer: usize, top_k: usize) -> Vec<u32> {
    let n = fixture.n_experts;
    let first = (token * token + 3 * layer) % n;
    (0..top_k).map(|i| ((first + i * (1 + token % 2)) % n) as u32).collect()
}

#[test]
fn every_budget_layout_and_mode_hands_out_the_files_bytes() {
    for layout in LAYOUTS {
        for shape in [ALIGNED, ODD] {
            let fixture = Fixture::new(layout, 3, 5, shape);
            for (n_slots, io, io_threads, prefetch) in [
                (ALL_EXPERTS, IoMode::Auto, 2, true),
                (4, IoMode::Auto, 1, true),
                (5, IoMode::Buffered, 3, false),
                (9, IoMode::Direct, 8, true),
                (14, IoMode::Auto, 4, true),
            ] {
                let options = StoreOptions { n_slots, top_k: 2, io, io_threads, prefetch, ..Default::default() };
                let store = match store(&fixture, options) {
                    Err(StoreError::DirectRefused { .. }) if io == IoMode::Direct => continue,
                    store => store.unwrap(),
                };
                for token in 0..12 {
                    for layer in 0..3 {
                        let ids = route(&fixture, token, layer, 2);
                        store.prefetch(layer, &ids);
                        let lease = store.acquire(layer, &ids).unwrap();
                        check(&fixture, layer, &lease);
                        assert_eq!([lease.id(0), lease.id(1)], *ids);
                    }
                }
                let stats = store.stats();
                assert_eq!(stats.lookups, 72);
                assert_eq!(stats.loads, stats.misses());
                let sum = |counts: Vec<u32>| counts.into_iter().map(u64::from).sum::<u64>();
                let (uses, reads) = store.activity();
                assert_eq!((uses.len(), sum(uses), sum(reads)), (15, stats.lookups, stats.loads));
                assert!(stats.loads <= 15 + stats.rereads);
                assert_eq!(store.is_resident(), n_slots >= 15);
                if store.is_resident() {
                    assert_eq!((stats.rereads, stats.evictions, stats.prefetch_dropped), (0, 0, 0));
                    assert_eq!(store.capacity(), 15);
                }
                assert!(stats.verified > 0 && stats.verified <= 15);
                assert!(stats.bytes_read > 0 && stats.io_seconds > 0.0);
                assert_eq!((stats.failures, stats.retries), (0, 0));
            }
        }
    }
}

/// Files by other writers may begin their records anywhere.
#[test]
fn records_off_the_page_are_read_by_way_of_a_buffer() {
    let fixture = Fixture::aligned_to(32, Layout::Offload, 2, 4, ODD);
    assert!(!fixture.index.record(0, 0).unwrap().offset.is_multiple_of(4096));
    for io in [IoMode::Auto, IoMode::Buffered] {
        let store = store(&fixture, StoreOptions { n_slots: 4, top_k: 2, io, ..Default::default() }).unwrap();
        for layer in [0, 1, 0] {
            check(&fixture, layer, &store.acquire(layer, &[3, 0]).unwrap());
        }
        assert!(store.io_buffer_bytes() > 0);
    }
}

/// Whoever lends memory asks for it and gives it again at any time, and every lease has the file's bytes.
#[test]
fn lent_slots_come_and_go_while_others_use_them() {
    for layout in LAYOUTS {
        let fixture = Fixture::new(layout, 3, 5, ALIGNED);
        let options = StoreOptions { n_slots: 4, lent: 7, top_k: 2, guess_slots: 1, ..Default::default() };
        let store = store(&fixture, options).unwrap();
        assert_eq!((store.n_slots(), store.usable_slots(), store.capacity()), (4, 11, 2));
        std::thread::scope(|scope| {
            for first in 0..2 {
                let (fixture, store) = (&fixture, &store);
                scope.spawn(move || {
                    for token in first..120 {
                        let ids = route(fixture, token, token % 3, 2);
                        store.prefetch_guess((token + 1) % 3, &ids);
                        store.prefetch(token % 3, &ids);
                        check(fixture, token % 3, &store.acquire_for(token % 3, &ids, Use::Keep).unwrap());
                    }
                });
            }
            for n in 0..200 {
                store.set_lent(n * 5 % 9).unwrap();
                assert_eq!(store.usable_slots(), 4 + (n * 5 % 9).min(7));
            }
        });
        // With no more slots than are its own it still serves.
        store.set_lent(0).unwrap();
        check(&fixture, 0, &store.acquire(0, &[4, 2]).unwrap());
    }
}

#[test]
fn waves_hand_out_every_expert_once() {
    let fixture = Fixture::new(Layout::Offload, 2, 9, ODD);
    for n_slots in [4, 7, 12, ALL_EXPERTS] {
        let store = store(&fixture, StoreOptions { n_slots, top_k: 2, ..Default::default() }).unwrap();
        for _ in 0..3 {
            for layer in 0..2 {
                let ids: Vec<u32> = (0..9).collect();
                let mut waves = store.waves(layer, &ids, Use::Sweep);
                let mut seen = Vec::new();
                let mut before = None;
                while let Some(lease) = waves.next_wave().unwrap() {
                    check(&fixture, layer, &lease);
                    seen.extend((0..lease.len()).map(|rank| lease.id(rank)));
                    // Holding one earlier wave is allowed.
                    before = Some(lease);
                }
                drop(before);
                assert_eq!(seen, waves.ids());
                seen.sort_unstable();
                assert_eq!(seen, ids);
            }
        }
        // A sweep larger than the cache must not push out everything: later rounds find something.
        assert!(n_slots < 7 || store.stats().hits > 0, "{n_slots} slots");
    }
}

#[test]
fn requests_that_cannot_be_served_say_why() {
    let fixture = Fixture::new(Layout::Gguf, 1, 8, ODD);
    let options = StoreOptions { n_slots: 4, top_k: 2, ..Default::default() };
    let few = StoreOptions { n_slots: 3, ..options.clone() };
    assert!(matches!(store(&fixture, few), Err(StoreError::TooFewSlots { minimum: 4, got: 3 })));
    let store = store(&fixture, options).unwrap();
    assert!(matches!(store.acquire(0, &[0, 1, 2]), Err(StoreError::LeaseTooLarge { asked: 3, capacity: 2 })));
    assert!(matches!(store.acquire(0, &[8]), Err(StoreError::UnknownExpert { expert: 8, n_experts: 8, .. })));
    assert!(matches!(store.acquire(1, &[0]), Err(StoreError::UnknownExpert { layer: 1, n_layers: 1, .. })));
    assert!(matches!(store.acquire(0, &[1, 1]), Err(StoreError::Duplicate { layer: 0, expert: 1 })));
    store.prefetch(7, &[99]);
    store.prefetch(0, &[99]);
    let (a, b) = (store.acquire(0, &[0, 1]).unwrap(), store.acquire(0, &[2, 3]).unwrap());
    // Every slot is held: prefetches are dropped, hits are served, others are told.
    store.prefetch(0, &[4, 5]);
    drop(store.acquire(0, &[1, 2]).unwrap());
    assert!(matches!(store.acquire(0, &[4]), Err(StoreError::SlotsPinned { asked: 1, free: 0, n_slots: 4 })));
    check(&fixture, 0, &a);
    check(&fixture, 0, &b);
    drop(a);
    check(&fixture, 0, &store.acquire(0, &[4, 5]).unwrap());
    assert_eq!(store.stats().prefetch_dropped, 2);
}

#[test]
fn a_file_of_other_sizes_is_refused() {
    let (small, large) = (Fixture::new(Layout::Gguf, 1, 2, ODD), Fixture::new(Layout::Offload, 1, 2, ALIGNED));
    for (fixture, format) in [(&small, &large), (&large, &small)] {
        let source = Arc::clone(&fixture.source);
        let made = ExpertStore::new(source, fixture.index.clone(), format.format(), StoreOptions::default());
        assert!(matches!(made, Err(StoreError::Format { .. })), "{made:?}");
    }
}

#[test]
fn landing_gives_each_rank_once_and_ready_ones_first() {
    let fixture = Fixture::new(Layout::Gguf, 1, 8, ODD);
    let io =
        FaultyIo::new(BufferedIo::open(&fixture.path, true).unwrap(), |_| vec![Fault::Delay(Duration::from_millis(2))]);
    let options = StoreOptions { n_slots: 8, io_threads: 2, ..Default::default() };
    let store = ExpertStore::with_io(Box::new(io), fixture.index.clone(), fixture.format(), options).unwrap();
    check(&fixture, 0, &store.acquire(0, &[5, 6]).unwrap());
    let lease = store.acquire(0, &[0, 5, 1, 6, 2]).unwrap();
    let mut landing = lease.as_they_land(Matrix::Down);
    let mut order = Vec::new();
    landing.next_batch(&mut order).unwrap();
    assert_eq!(order, [1, 3]);
    loop {
        let before = order.len();
        landing.next_batch(&mut order).unwrap();
        if order.len() == before {
            break;
        }
        assert!(order[before..].iter().all(|&rank| lease.is_ready(rank, Matrix::Down)));
    }
    order.sort_unstable();
    assert_eq!(order, [0, 1, 2, 3, 4]);
}

/// Deterministic numbers for fault plans.
fn hash(seed: u64, x: u64) -> u64 {
    let mixed = (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ x).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ mixed >> 29).wrapping_mul(0x94d0_49bb_1331_11eb) >> 17
}

fn faulty(
    fixture: &Fixture,
    options: &StoreOptions,
    plan: impl Fn(u64) -> Vec<Fault> + Send + Sync + 'static,
) -> ExpertStore {
    // Direct reads where this file system has them, so that alignment is tested too.
    let made = match DirectIo::open(&fixture.path) {
        Ok(io) => ExpertStore::with_io(
            Box::new(FaultyIo::new(io, plan)),
            fixture.index.clone(),
            fixture.format(),
            options.clone(),
        ),
        Err(_) => {
            let io = FaultyIo::new(BufferedIo::open(&fixture.path, true).unwrap(), plan);
            ExpertStore::with_io(Box::new(io), fixture.index.clone(), fixture.format(), options.clone())
        }
    };
    made.unwrap()
}

/// What is delayed, shortened, or wrong only once never shows.
#[test]
fn passing_faults_never_show() {
    for layout in LAYOUTS {
        let fixture = Fixture::new(layout, 3, 6, ODD);
        for seed in 0..30 {
            let options = StoreOptions {
                n_slots: 4 + (seed as usize * 5) % 15,
                top_k: 2,
                io_threads: 1 + seed as usize % 4,
                prefetch: seed % 3 != 0,
                guess_slots: seed as usize % 3,
                ..Default::default()
            };
            let store = faulty(&fixture, &options, move |offset| {
                let dice = hash(seed, offset);
                let mut faults = vec![];
                if dice.is_multiple_of(3) {
                    faults.push(Fault::Delay(Duration::from_micros(dice % 300)));
                }
                if seed % 2 == 0 && (dice / 3).is_multiple_of(2) {
                    faults.push(Fault::Short((dice % 6000) as usize));
                }
                match dice / 6 % 5 {
                    // A read in several parts could fail once in each, which is more than one retry makes good.
                    0 if seed % 2 == 1 => faults.push(Fault::FailOnce),
                    1 => faults.push(Fault::CorruptOnce),
                    _ => {}
                }
                faults
            });
            for token in 0..6 {
                for layer in 0..3 {
                    let ids = route(&fixture, token + seed as usize, layer, 2);
                    store.prefetch(layer, &ids);
                    store.prefetch_guess((layer + 1) % 3, &route(&fixture, token, layer + 1, 2));
                    check(&fixture, layer, &store.acquire(layer, &ids).unwrap());
                }
            }
            assert_eq!(store.stats().failures, 0);
        }
    }
}

/// What fails for good is an error that names the expert; the others are right, and the store goes on.
#[test]
fn lasting_faults_are_errors_and_the_store_goes_on() {
    for layout in LAYOUTS {
        let fixture = Fixture::new(layout, 2, 6, ODD);
        for seed in 0..30u64 {
            let fault = [Fault::Panic, Fault::Corrupt, Fault::Fail][seed as usize % 3];
            let broken = Arc::new(AtomicBool::new(true));
            let is_broken = Arc::clone(&broken);
            let options = StoreOptions {
                n_slots: 4 + seed as usize % 9,
                top_k: 2,
                io_threads: 1 + seed as usize % 3,
                ..Default::default()
            };
            let store = faulty(&fixture, &options, move |offset| {
                let bad = is_broken.load(Ordering::SeqCst) && hash(seed, offset).is_multiple_of(7);
                if bad { vec![fault] } else { vec![] }
            });
            let (mut right, mut wrong) = (0, 0);
            for token in 0..8 {
                for layer in 0..2 {
                    let ids = route(&fixture, token, layer, 2);
                    store.prefetch(layer, &ids);
                    let lease = store.acquire(layer, &ids).unwrap();
                    for (rank, &id) in ids.iter().enumerate() {
                        for matrix in Matrix::ALL {
                            match lease.wait(rank, matrix) {
                                Ok(got) => {
                                    assert!(got == fixture.expected(layer, id as usize, matrix));
                                    right += 1;
                                }
                                Err(error) => {
                                    let (StoreError::Read { ref path, layer: l, expert, offset, .. }
                                    | StoreError::Corrupt { ref path, layer: l, expert, offset, .. }) = error
                                    else {
                                        panic!("{error}")
                                    };
                                    assert_eq!((path, l as usize, expert), (&fixture.path, layer, id));
                                    assert!(offset > 0);
                                    if let StoreError::Corrupt { matrix, .. } = error {
                                        assert_eq!(matrix.is_some(), layout == Layout::Gguf);
                                    }
                                    assert!(
                                        !lease.is_ready(rank, Matrix::Gate)
                                            || layout == Layout::Gguf
                                            || fault != Fault::Corrupt
                                    );
                                    wrong += 1;
                                }
                            }
                        }
                    }
                }
            }
            assert!(right > 0);
            assert_eq!(wrong > 0, store.stats().failures > 0);
            // The drive recovers, and so does everything else.
            broken.store(false, Ordering::SeqCst);
            for layer in 0..2 {
                let mut waves = store.waves(layer, &[0, 1, 2, 3, 4, 5], Use::Sweep);
                while let Some(lease) = waves.next_wave().unwrap() {
                    check(&fixture, layer, &lease);
                }
            }
        }
    }
}

/// What was damaged after the file was made is named, and the rest of the file works.
#[test]
fn a_flipped_bit_is_found() {
    for (layout, matrix) in [
        (Layout::Offload, None),
        (Layout::Gguf, Some(Matrix::Gate)),
        (Layout::Gguf, Some(Matrix::Up)),
        (Layout::Gguf, Some(Matrix::Down)),
    ] {
        let fixture = Fixture::new(layout, 1, 4, ALIGNED);
        let place = match matrix {
            Some(matrix) => fixture.index.matrix(0, 2, matrix),
            None => fixture.index.record(0, 2).unwrap(),
        };
        let mut bytes = std::fs::read(&fixture.path).unwrap();
        bytes[(place.offset + place.len / 2) as usize] ^= 1;
        std::fs::write(&fixture.path, bytes).unwrap();
        for (io, n_slots) in [(IoMode::Auto, 4), (IoMode::Buffered, 4), (IoMode::Auto, 3)] {
            let store = store(&fixture, StoreOptions { n_slots, io, ..Default::default() }).unwrap();
            if n_slots == 4 {
                let lease = store.acquire(0, &[1, 2]).unwrap();
                assert!(lease.wait(0, Matrix::Down).is_ok());
                let mut ranks = Vec::new();
                let mut landing = lease.as_they_land(matrix.unwrap_or(Matrix::Gate));
                let outcomes = [0; 3].map(|_| landing.next_batch(&mut ranks));
                assert_eq!((outcomes.iter().filter(|o| o.is_err()).count(), &ranks[..]), (1, &[0][..]));
            }
            let lease = store.acquire(0, &[2]).unwrap();
            let error = lease.wait(0, matrix.unwrap_or(Matrix::Gate)).unwrap_err();
            let StoreError::Corrupt { expert: 2, matrix: named, offset, .. } = error else { panic!("{error}") };
            assert_eq!((named, offset), (matrix, place.offset));
            assert!(error.to_string().contains(matrix.map_or("expert 2", Matrix::name)), "{error}");
            assert!(store.stats().retries > 0);
        }
    }
}

/// Files of other programs have no checksums, and are read as they are.
#[test]
fn without_checksums_nothing_is_verified() {
    let fixture = Fixture::new(Layout::Gguf, 2, 4, ODD);
    // The key under another name of the same length is one that nobody knows.
    let mut bytes = std::fs::read(&fixture.path).unwrap();
    let key = checksum_keys::CRC32C.as_bytes();
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap();
    bytes[at] = b'x';
    let header = GgufFile::from_static(bytes.leak()).unwrap().header;
    let index = ExpertIndex::from_header(&header, &fixture.shape).unwrap();
    assert!(index.checksums(1, 3).is_empty());
    let options = StoreOptions { n_slots: 4, ..Default::default() };
    let store = ExpertStore::new(Arc::clone(&fixture.source), index, fixture.format(), options).unwrap();
    check(&fixture, 1, &store.acquire(1, &[3, 0]).unwrap());
    assert_eq!(store.stats().verified, 0);
}

/// The file shrinks while it is in use.
#[test]
fn a_truncated_file_is_an_error_with_the_reason() {
    for layout in LAYOUTS {
        let fixture = Fixture::new(layout, 1, 8, ODD);
        let store = store(&fixture, StoreOptions { n_slots: 4, top_k: 2, ..Default::default() }).unwrap();
        std::fs::OpenOptions::new().write(true).open(&fixture.path).unwrap().set_len(5000).unwrap();
        let error = store.acquire(0, &[7]).unwrap().wait(0, Matrix::Down).unwrap_err();
        let StoreError::Read { cause, .. } = error else { panic!("{error}") };
        assert_eq!(cause.kind(), std::io::ErrorKind::UnexpectedEof);
    }
}

/// Where nothing is evicted, slots are made of the file's own pages, unless the system's are larger than those that records begin at; a file
/// that ends early is an error there, too.
#[test]
#[cfg(target_os = "linux")]
fn records_are_mapped_where_every_expert_stays() {
    let name = |fixture: &Fixture, options| store(fixture, options).unwrap().io_name();
    let larger = st_sys::system_page() > st_sys::PAGE;
    let packed = if larger { "buffered" } else { "mapped" };
    for (layout, expected) in [(Layout::Gguf, "buffered"), (Layout::Offload, packed)] {
        let fixture = Fixture::new(layout, 2, 4, ODD);
        assert_eq!(name(&fixture, StoreOptions::default()), expected);
        assert_eq!(name(&fixture, StoreOptions { io: IoMode::Buffered, ..Default::default() }), "buffered");
        assert_ne!(name(&fixture, StoreOptions { n_slots: 4, ..Default::default() }), "mapped");
    }
    if larger {
        return;
    }
    let fixture = Fixture::new(Layout::Offload, 2, 4, ODD);
    let store = store(&fixture, StoreOptions::default()).unwrap();
    check(&fixture, 0, &store.acquire(0, &[0, 3]).unwrap());
    let last = fixture.index.record(1, 3).unwrap();
    std::fs::OpenOptions::new().write(true).open(&fixture.path).unwrap().set_len(last.end() - 1).unwrap();
    let error = store.acquire(1, &[3]).unwrap().wait(0, Matrix::Gate).unwrap_err();
    let StoreError::Read { cause, offset, .. } = error else { panic!("{error}") };
    assert_eq!((cause.kind(), offset), (std::io::ErrorKind::UnexpectedEof, last.offset));
    assert_eq!(store.stats().retries, 1);
    check(&fixture, 0, &store.acquire(0, &[0, 3, 1]).unwrap());
}

/// Several sessions at once, each with its own leases, and threads of one session waiting for the same expert.
#[test]
fn threads_share_one_read_and_see_the_same_bytes() {
    for layout in LAYOUTS {
        let fixture = Fixture::new(layout, 2, 8, ODD);
        let options = StoreOptions { n_slots: 12, top_k: 2, io_threads: 3, ..Default::default() };
        let store =
            faulty(&fixture, &options, |offset| vec![Fault::Delay(Duration::from_micros(hash(1, offset) % 200))]);
        std::thread::scope(|scope| {
            for session in 0..3 {
                let (store, fixture) = (&store, &fixture);
                scope.spawn(move || {
                    for token in 0..40 {
                        let layer = token % 2;
                        let ids = route(fixture, token / 3 + session, layer, 2);
                        store.prefetch(layer, &ids);
                        let lease = store.acquire(layer, &ids).unwrap();
                        std::thread::scope(|workers| {
                            workers.spawn(|| check(fixture, layer, &lease));
                            check(fixture, layer, &lease);
                        });
                    }
                });
            }
        });
        let stats = store.stats();
        assert_eq!((stats.lookups, stats.failures), (240, 0));
        assert!(stats.loads <= stats.misses() + stats.prefetch_issued);
    }
}

/// A lease that is given back while its experts load, and a store that is closed while reads are queued.
#[test]
fn leaving_early_is_harmless() {
    let fixture = Fixture::new(Layout::Gguf, 1, 16, ODD);
    let options = StoreOptions { n_slots: 8, top_k: 2, io_threads: 2, ..Default::default() };
    let store = faulty(&fixture, &options, |_| vec![Fault::Delay(Duration::from_micros(500))]);
    for start in 0..12u32 {
        drop(store.acquire(0, &[start, start + 1, start + 2, start + 3]).unwrap());
    }
    check(&fixture, 0, &store.acquire(0, &[0, 15]).unwrap());
    store.prefetch(0, &[3, 4, 5]);
    drop(store);
}

#[test]
fn what_is_planned_is_what_is_taken() {
    for layout in LAYOUTS {
        let fixture = Fixture::new(layout, 4, 8, ODD);
        for huge_pages in [false, true] {
            let options = StoreOptions { huge_pages, io_threads: 3, ..Default::default() };
            let all = StoreMemory::of(&fixture.index, &fixture.format, &options);
            // The records of this file lie on pages, so nothing has to be rearranged on the way.
            assert_eq!(all.io_buffer_bytes == 0, layout == Layout::Offload);
            for n_slots in [16, 32] {
                let options = StoreOptions { n_slots, ..options.clone() };
                let planned = StoreMemory::of(&fixture.index, &fixture.format, &options);
                assert!(huge_pages || n_slots == 32 || planned.slab_bytes == all.slab_bytes / 2);
                let store = store(&fixture, options).unwrap();
                assert_eq!(
                    (store.slab_bytes(), store.io_buffer_bytes()),
                    (planned.slab_bytes, planned.io_buffer_bytes)
                );
            }
        }
    }
}
