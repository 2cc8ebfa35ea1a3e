use super::*;
use crate::fixture::{ALIGNED, Fixture, ODD};
use crate::io::{BufferedIo, Fault, FaultyIo};
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
            for (n_slots, io, io_threads, prefetch, whole_records) in [
                (ALL_EXPERTS, IoMode::Auto, 2, true, false),
                (4, IoMode::Auto, 1, true, true),
                (5, IoMode::Buffered, 3, false, false),
                (9, IoMode::Direct, 8, true, false),
                (14, IoMode::Auto, 4, true, false),
            ] {
                let options =
                    StoreOptions { n_slots, top_k: 2, io, io_threads, prefetch, whole_records, ..Default::default() };
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
                assert_eq!(stats.rereads + 15, stats.loads.max(15 + stats.rereads));
                assert_eq!(store.is_resident(), n_slots >= 15);
                if store.is_resident() {
                    assert_eq!((stats.rereads, stats.evictions, stats.prefetch_dropped), (0, 0, 0));
                    assert_eq!(store.capacity(), 15);
                }
                assert_eq!(stats.verified > 0, layout == Layout::Offload);
                assert!(stats.bytes_read > 0 && stats.io_seconds > 0.0);
                assert_eq!((stats.failures, stats.retries), (0, 0));
            }
        }
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
                let mut waves = store.waves(layer, &ids);
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
