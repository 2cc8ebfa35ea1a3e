//! Prompts that are read while others are answered: between the layers of a piece, answers get their tokens.
//!
//! Every piece of a prompt reads most experts of a layer, however small it is, so that small pieces cost nearly as much as large ones;
//! and a large one takes as long as many tokens of others. So those do not wait for its end: where a layer ends, their rows go through
//! all layers, with buffers of their own. What a row computes depends on none of this.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use st_model::{Batch, BatchKind, ModelError, Observer, Sequence};
use tokio::sync::mpsc::Sender;

use super::{Scheduler, Share, add_piece};
use crate::job::Event;
use crate::settings::ANSWERS_BETWEEN as ROWS;

/// After so long others get their tokens, and not before a prompt had as much time as those took.
const EVERY: Duration = Duration::from_millis(50);

/// What happens between the layers of a piece.
struct Between<'s, 'a> {
    scheduler: &'s mut Scheduler<'a>,
    readers: Vec<Sender<Event>>,
    /// When others had their latest tokens, how long those took, and how long all of them.
    latest: Instant,
    took: Duration,
    all: Duration,
    steps: usize,
}

impl Observer for Between<'_, '_> {
    fn progress(&mut self, _: usize, _: usize) -> ControlFlow<()> {
        if self.readers.iter().any(Sender::is_closed) || self.scheduler.app.is_over() {
            return ControlFlow::Break(());
        }
        if self.latest.elapsed() >= EVERY.max(self.took) {
            let started = Instant::now();
            self.scheduler.drop_gone();
            let shares = self.scheduler.some_answers(self.steps);
            if !shares.is_empty() {
                self.scheduler.step(&shares);
            }
            self.took = started.elapsed();
            self.all += self.took;
            self.steps += 1;
            self.latest = Instant::now();
        }
        ControlFlow::Continue(())
    }
}

impl Scheduler<'_> {
    /// Reads pieces of prompts, and answers others meanwhile: at least once, and as often as there is time.
    pub(super) fn read_between(&mut self, readers: &[Share]) {
        // The buffers of answers are in the place of those that the prompts take, meanwhile.
        let Some(small) = self.small.take() else { return self.step(readers) };
        let mut workspace = std::mem::replace(&mut self.workspace, small);
        let mut readers = readers.to_vec();
        readers.sort_by_key(|share| std::cmp::Reverse(share.index));
        let (mut batch, mut reading) = (Batch::new(BatchKind::Prompt), Vec::new());
        for share in readers {
            let conversation = self.active.remove(share.index);
            add_piece(&mut batch, reading.len(), &conversation, share.rows);
            reading.push((conversation, share.rows));
        }
        let started = Instant::now();
        let engine = Arc::clone(&self.engine);
        let mut between = Between {
            readers: reading.iter().map(|(conversation, _)| conversation.reader()).collect(),
            scheduler: self,
            latest: started,
            took: Duration::ZERO,
            all: Duration::ZERO,
            steps: 0,
        };
        let outcome = loop {
            let mut sequences: Vec<&mut Sequence> =
                reading.iter_mut().map(|(conversation, _)| &mut conversation.sequence).collect();
            match engine.forward(&batch, &mut sequences, &mut workspace, &mut between) {
                Err(ModelError::KvFull { .. }) if between.scheduler.make_room() => {}
                outcome => break outcome,
            }
        };
        let (steps, took) = (between.steps, started.elapsed().saturating_sub(between.all));
        self.small = Some(std::mem::replace(&mut self.workspace, workspace));
        // Whoever was read now comes after those that were not.
        let first = self.active.len();
        let shares = reading.iter().enumerate().map(|(i, &(_, rows))| Share { index: first + i, rows });
        let shares: Vec<Share> = shares.collect();
        self.active.extend(reading.into_iter().map(|(conversation, _)| conversation));
        self.turn = 0;
        self.pieces.took(batch.len(), took / self.engine.config().n_layers.max(1) as u32);
        self.settle(&shares, outcome);
        self.app.metrics.steps.add(1);
        self.app.metrics.busy.add_time(took);
        if steps == 0 {
            let shares = self.some_answers(0);
            if !shares.is_empty() {
                self.step(&shares);
            }
        }
    }

    /// Answers that fit between two layers; where there are more, others each time.
    fn some_answers(&mut self, steps: usize) -> Vec<Share> {
        let n = self.active.iter().filter(|conversation| !conversation.is_reading()).count();
        let mut shares = self.answers(ROWS.saturating_sub(n), false);
        if shares.len() > ROWS {
            let by = steps * ROWS % shares.len();
            shares.rotate_left(by);
            shares.truncate(ROWS);
        }
        shares
    }
}
