//! Prompts that are read while others are answered: between the layers of a piece, answers get their tokens.
//!
//! Every piece of a prompt reads most experts of a layer, however small it is, so that small pieces cost nearly as much as large ones;
//! and a large one takes as long as many tokens of others. So those do not wait for its end: where a layer ends, their rows go through
//! all layers, with buffers of their own. What a row computes depends on none of this.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use st_model::{Batch, BatchKind, ModelError, Observer, Sequence, Workspace};
use tokio::sync::mpsc::Sender;

use super::steps::{Share, Steps, add_piece};
use crate::job::Event;
use crate::piece::Pieces;
use crate::settings::ANSWERS_BETWEEN as ROWS;

/// After so long others get their tokens, and not before a prompt had as much time as those took.
const EVERY: Duration = Duration::from_millis(50);

/// What happens between the layers of a piece.
struct Between<'s, 'a> {
    steps: &'s mut Steps<'a>,
    readers: Vec<Sender<Event>>,
    /// When others had their latest tokens, how long those took, and how long all of them.
    latest: Instant,
    took: Duration,
    all: Duration,
    /// Steps of others so far.
    count: usize,
}

impl Observer for Between<'_, '_> {
    fn progress(&mut self, _: usize, _: usize) -> ControlFlow<()> {
        if self.readers.iter().any(Sender::is_closed) || self.steps.app.is_over() {
            return ControlFlow::Break(());
        }
        if self.latest.elapsed() >= EVERY.max(self.took) {
            let started = Instant::now();
            self.steps.drop_gone();
            let shares = some_answers(self.steps, self.count);
            if !shares.is_empty() {
                self.steps.step(&shares);
            }
            self.took = started.elapsed();
            self.all += self.took;
            self.count += 1;
            self.latest = Instant::now();
        }
        ControlFlow::Continue(())
    }
}

/// Reads pieces of prompts, and answers others meanwhile: at least once, and as often as there is time. `small` are buffers for answers.
pub(super) fn read(steps: &mut Steps<'_>, small: &mut Workspace, pieces: &mut Pieces, readers: &[Share]) {
    // The buffers of answers are in the place of those that the prompts take, meanwhile.
    std::mem::swap(&mut steps.workspace, small);
    let mut readers = readers.to_vec();
    readers.sort_by_key(|share| std::cmp::Reverse(share.index));
    let (mut batch, mut reading) = (Batch::new(BatchKind::Prompt), Vec::new());
    for share in readers {
        let conversation = steps.active.remove(share.index);
        add_piece(&mut batch, reading.len(), &conversation, share.rows);
        reading.push((conversation, share.rows));
    }
    let started = Instant::now();
    let engine = Arc::clone(&steps.engine);
    let mut between = Between {
        readers: reading.iter().map(|(conversation, _)| conversation.reader()).collect(),
        steps,
        latest: started,
        took: Duration::ZERO,
        all: Duration::ZERO,
        count: 0,
    };
    let outcome = loop {
        let mut sequences: Vec<&mut Sequence> =
            reading.iter_mut().map(|(conversation, _)| &mut conversation.sequence).collect();
        match engine.forward(&batch, &mut sequences, small, &mut between) {
            Err(ModelError::KvFull { .. }) if between.steps.kept.make_room() => {}
            outcome => break outcome,
        }
    };
    let (count, took) = (between.count, started.elapsed().saturating_sub(between.all));
    std::mem::swap(&mut steps.workspace, small);
    // Whoever was read now comes after those that were not.
    let first = steps.active.len();
    let shares = reading.iter().enumerate().map(|(i, &(_, rows))| Share { index: first + i, rows });
    let shares: Vec<Share> = shares.collect();
    steps.active.extend(reading.into_iter().map(|(conversation, _)| conversation));
    steps.turn = 0;
    pieces.took(batch.len(), took / engine.config().n_layers.max(1) as u32);
    steps.settle(&shares, outcome);
    steps.app.metrics.steps.add(1);
    steps.app.metrics.busy.add_time(took);
    if count == 0 {
        let shares = some_answers(steps, 0);
        if !shares.is_empty() {
            steps.step(&shares);
        }
    }
}

/// Answers that fit between two layers; where there are more, others each time.
fn some_answers(steps: &mut Steps<'_>, count: usize) -> Vec<Share> {
    let n = steps.active.iter().filter(|conversation| !conversation.is_reading()).count();
    let mut shares = steps.answers(ROWS.saturating_sub(n), false);
    if shares.len() > ROWS {
        let by = count * ROWS % shares.len();
        shares.rotate_left(by);
        shares.truncate(ROWS);
    }
    shares
}
