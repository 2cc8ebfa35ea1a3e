//! What is chosen, and what never is.

use super::*;
use crate::draw::mix;

fn sampler(change: impl FnOnce(&mut SamplerOptions)) -> Sampler {
    let mut options = SamplerOptions { temperature: 1.0, ..SamplerOptions::greedy() };
    change(&mut options);
    Sampler::new(options).expect("valid options")
}

/// How often each of `n` tokens is drawn in `draws` draws.
fn histogram(sampler: &mut Sampler, logits: &[f32], draws: usize) -> Vec<usize> {
    let mut counts = vec![0; logits.len()];
    for position in 0..draws {
        counts[sampler.sample(logits, position).expect("a token") as usize] += 1;
    }
    counts
}

#[test]
fn greedy_takes_the_lowest_id_on_ties() {
    let mut greedy = Sampler::new(SamplerOptions::greedy()).expect("valid");
    assert_eq!(greedy.sample(&[0.0, 3.0, 3.0, -1.0], 0), Ok(1));
    assert_eq!(greedy.sample(&[0.0, -0.0], 0), Ok(0));
    assert_eq!(greedy.sample(&[-0.0, 0.0], 0), Ok(0));
    assert_eq!(greedy.sample(&[-3.0, -2.0, -2.0, -7.0], 0), Ok(1));
    let mut long = vec![-1.0; 1000];
    long[777] = -0.5;
    assert_eq!(greedy.sample(&long, 0), Ok(777));
}

#[test]
fn logits_that_are_no_numbers_are_refused() {
    let mut draw = sampler(|_| ());
    let Err(SamplerError::NotFinite { id: 1, .. }) = draw.sample(&[0.0, f32::NAN], 0) else {
        panic!("NaN was accepted");
    };
    assert!(draw.sample(&[f32::INFINITY], 0).is_err());
    let mut long = vec![0.0; 1000];
    long[777] = f32::NAN;
    assert!(matches!(draw.sample(&long, 0), Err(SamplerError::NotFinite { id: 777, .. })));
    // What is not to be chosen is not chosen, and is no reason to choose nothing.
    let mut only = vec![f32::NEG_INFINITY; 1000];
    only[777] = -3.0;
    assert_eq!(draw.sample(&only, 0), Ok(777));
    assert_eq!(draw.sample(&[], 0), Err(SamplerError::Empty));
}

#[test]
fn options_outside_their_range_are_refused() {
    let bad: [fn(&mut SamplerOptions); 8] = [
        |o| o.temperature = -0.1,
        |o| o.temperature = f32::NAN,
        |o| o.temperature = f32::INFINITY,
        |o| o.top_p = 0.0,
        |o| o.top_p = 1.1,
        |o| o.min_p = -0.1,
        |o| o.min_p = f32::NAN,
        |o| o.repeat_penalty = 0.0,
    ];
    for change in bad {
        let mut options = SamplerOptions::greedy();
        change(&mut options);
        assert!(Sampler::new(options).is_err(), "{options:?}");
    }
}

#[test]
fn draws_follow_the_probabilities() {
    let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
    let counts = histogram(&mut sampler(|o| o.seed = 7), &logits, 20_000);
    for (count, p) in counts.iter().zip([0.5, 0.3, 0.2]) {
        let got = *count as f64 / 20_000.0;
        assert!((got - p).abs() < 0.015, "{counts:?}");
    }
}

#[test]
fn equal_seeds_give_equal_draws_and_others_do_not() {
    let logits: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin()).collect();
    let draws = |seed| -> Vec<u32> {
        let mut s = sampler(|o| o.seed = seed);
        (0..32).map(|position| s.sample(&logits, position).expect("a token")).collect()
    };
    assert_eq!(draws(1), draws(1));
    assert_ne!(draws(1), draws(2));
}

#[test]
fn a_draw_depends_on_seed_and_place_alone() {
    let logits: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut s = sampler(|o| o.seed = 3);
    let forwards: Vec<u32> = (0..32).map(|position| s.sample(&logits, position).expect("a token")).collect();
    let mut backwards: Vec<u32> = (0..32).rev().map(|position| s.sample(&logits, position).expect("a token")).collect();
    backwards.reverse();
    assert_eq!(forwards, backwards);
    // From the authors' splitmix64.c with the seed 0.
    assert_eq!(mix(0x9e37_79b9_7f4a_7c15), 0xe220_a839_7b1d_cdaf);
    // Places far apart and neighbouring seeds have numbers of their own.
    let mut all: Vec<u64> =
        (0..100).flat_map(|seed| [0, 1, 2, 1 << 20, u64::MAX].map(|position| unit(seed, position).to_bits())).collect();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 500);
    let mean = (0..10_000).map(|position| unit(9, position)).sum::<f64>() / 10_000.0;
    assert!((mean - 0.5).abs() < 0.01, "{mean}");
}

#[test]
fn biases_and_penalties_move_logits_of_the_answer_alone() {
    let greedy = |change: fn(&mut SamplerOptions)| {
        sampler(|o| {
            o.temperature = 0.0;
            change(o);
        })
    };
    let mut biased = greedy(|_| ()).with_bias(vec![(2, 100.0), (0, -100.0), (9, 1.0)]).expect("numbers");
    assert_eq!(biased.sample(&[3.0, 2.0, 1.0], 0), Ok(2));
    assert!(greedy(|_| ()).with_bias(vec![(0, f32::NAN)]).is_err());

    // The prompt does not count, each time in the answer does.
    let mut s = greedy(|o| o.frequency_penalty = 1.0);
    s.begin(&[0; 5]);
    assert_eq!(s.sample(&[3.0, 0.5], 0), Ok(0));
    s.accept(0);
    s.accept(0);
    assert_eq!(s.sample(&[3.0, 0.5], 0), Ok(0));
    s.accept(0);
    assert_eq!(s.sample(&[3.0, 0.5], 0), Ok(1));
    s.begin(&[]);
    assert_eq!(s.sample(&[3.0, 0.5], 0), Ok(0));

    let mut s = greedy(|o| o.presence_penalty = 1.0);
    s.accept(0);
    s.accept(0);
    assert_eq!(s.sample(&[3.0, 0.5], 0), Ok(0));
    assert_eq!(s.sample(&[1.4, 0.5], 0), Ok(1));
}

#[test]
fn what_is_not_allowed_is_never_chosen() {
    let logits: Vec<f32> = (0..100).map(|i| -(i as f32)).collect();
    for temperature in [0.0, 1.0] {
        let mut s = sampler(|o| o.temperature = temperature);
        let mut allowed = [0u32; 4];
        assert_eq!(s.sample_among(&logits, 0, Some(&allowed)), Err(SamplerError::Empty));
        allowed[2] = 1 << 7;
        assert_eq!(s.sample_among(&logits, 0, Some(&allowed)), Ok(71));
        // A mask that is shorter than the vocabulary allows nothing beyond its end.
        assert_eq!(s.sample_among(&logits, 0, Some(&allowed[..2])), Err(SamplerError::Empty));
        assert_eq!(s.sample_among(&logits, 5, Some(&[u32::MAX; 4])), s.sample(&logits, 5));
    }
}

#[test]
fn top_k_keeps_the_best() {
    let logits: Vec<f32> = (0..5000).map(|i| ((i * 7919) % 5000) as f32 * 1e-4).collect();
    let mut kept = Vec::new();
    for k in [1, 2, 40, 1024, 4999, 5000] {
        keep_top_k(&logits, k, &mut kept);
        let mut all: Vec<u32> = (0..5000).collect();
        all.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        let mut got: Vec<u32> = kept.iter().map(|c| c.id).collect();
        got.sort_unstable();
        all.truncate(k);
        all.sort_unstable();
        assert_eq!(got, all);
    }
    let counts = histogram(&mut sampler(|o| o.top_k = 2), &[1.0, 1.1, 1.2], 500);
    assert_eq!(counts[0], 0);
    assert!(counts[1] > 0 && counts[2] > 0);
}

#[test]
fn ties_at_the_edge_of_top_k_keep_the_lowest_ids() {
    let mut kept = Vec::new();
    keep_top_k(&[1.0; 5000], 3, &mut kept);
    let mut ids: Vec<u32> = kept.iter().map(|c| c.id).collect();
    ids.sort_unstable();
    assert_eq!(ids, [0, 1, 2]);
}

#[test]
fn top_p_keeps_the_token_that_reaches_it() {
    let logits = [0.5f32.ln(), 0.3f32.ln(), 0.15f32.ln(), 0.05f32.ln()];
    let counts = histogram(&mut sampler(|o| o.top_p = 0.7), &logits, 500);
    assert!(counts[0] > 0 && counts[1] > 0);
    assert_eq!(counts[2..], [0, 0]);
    let counts = histogram(&mut sampler(|o| o.top_p = 1e-9), &logits, 100);
    assert_eq!(counts, [100, 0, 0, 0]);
}

#[test]
fn top_p_over_a_large_flat_vocabulary() {
    let logits = vec![0.0; 10_000];
    let mut s = sampler(|o| o.top_p = 0.5);
    s.sample(&logits, 0).expect("a token");
    assert_eq!(s.candidates.len(), 5000);
}

#[test]
fn min_p_is_relative_to_the_best() {
    let logits = [0.6f32.ln(), 0.35f32.ln(), 0.05f32.ln()];
    let counts = histogram(&mut sampler(|o| o.min_p = 0.1), &logits, 500);
    assert!(counts[1] > 0);
    assert_eq!(counts[2], 0);
    let counts = histogram(&mut sampler(|o| o.min_p = 1.0), &logits, 50);
    assert_eq!(counts, [50, 0, 0]);
}

#[test]
fn repeat_penalty_counts_each_recent_token_once_and_forgets_old_ones() {
    let mut s = Sampler::new(SamplerOptions { repeat_penalty: 2.0, ..SamplerOptions::greedy() }).expect("valid");
    let logits = [1.0, 1.5, -0.1];
    assert_eq!(s.sample(&logits, 0), Ok(1));
    s.accept(1);
    s.accept(1);
    // 1.5 / 2 = 0.75; dividing twice would do as well, so the margin is checked below.
    assert_eq!(s.sample(&logits, 0), Ok(0));
    assert_eq!(s.sample(&[0.7, 1.5, 0.0], 0), Ok(1));
    for _ in 0..REPEAT_WINDOW {
        s.accept(2);
    }
    assert_eq!(s.sample(&logits, 0), Ok(1));
    // A negative logit is multiplied: -0.1 becomes -0.2.
    assert_eq!(s.sample(&[-0.15, -0.2, -0.1], 0), Ok(0));
    s.begin(&[]);
    assert_eq!(s.sample(&[-0.15, -0.2, -0.1], 0), Ok(2));
}

#[test]
fn extreme_settings_still_choose() {
    for repeat_penalty in [1e-38, f32::MAX] {
        for temperature in [0.0, f32::MIN_POSITIVE, 1.0, f32::MAX] {
            for (top_k, top_p, min_p) in [(0, 1.0, 0.0), (1, f32::MIN_POSITIVE, 1.0), (usize::MAX, 0.5, 0.5)] {
                let (frequency_penalty, presence_penalty) = (f32::MAX, -f32::MAX);
                let options = SamplerOptions {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    repeat_penalty,
                    frequency_penalty,
                    presence_penalty,
                    seed: 1,
                };
                let mut s = Sampler::new(options).expect("valid");
                for logits in [[30.0, -30.0, 1.0], [0.0, 0.0, 0.0], [f32::MAX, f32::MIN, -1.0]] {
                    (0..3).for_each(|id| s.accept(id));
                    assert!(s.sample(&logits, 0).expect("a token") < 3, "{options:?}");
                }
            }
        }
    }
}

#[test]
fn buffers_do_not_grow_after_the_first_token() {
    let logits: Vec<f32> = (0..4000).map(|i| (i as f32 * 0.11).cos()).collect();
    let mut s = sampler(|o| {
        o.top_k = 40;
        o.repeat_penalty = 1.1;
    });
    s.sample(&logits, 0).expect("a token");
    let before = (s.candidates.as_ptr(), s.adjusted.as_ptr(), s.candidates.capacity());
    for _ in 0..100 {
        let id = s.sample(&logits, 0).expect("a token");
        s.accept(id);
    }
    assert_eq!(before, (s.candidates.as_ptr(), s.adjusted.as_ptr(), s.candidates.capacity()));
}
