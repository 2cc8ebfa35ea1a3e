//! Keys and values of the positions that later tokens can still see, in pages.
//!
//! Owns which pages a layer holds: one that attends to everything grows by pages, a window layer gives back those that nobody
//! can see any more. Pages are shared between sequences with a common beginning, and copied before they are written. Where a
//! position lies in a page is the kernels' matter.

use std::ops::Range;
use std::sync::Arc;

use st_format::ModelShape;
use st_kernels::{KV_CHUNK, KvFormat, KvPage, KvPages, KvPagesMut, KvPool, KvType, Pool};

use crate::error::ModelError;

/// Positions of a page.
pub(crate) const POSITION_STEP: usize = KV_CHUNK;

/// Keys and values of one layer of one sequence.
#[derive(Clone, Debug)]
pub(crate) struct LayerKv {
    memory: KvPool,
    window: Option<usize>,
    /// Pages of the chunks from this one on.
    first_chunk: usize,
    pages: Vec<Arc<KvPage>>,
}

/// What the pages of a model look like.
pub(crate) fn format(config: &ModelShape, ty: KvType) -> KvFormat {
    KvFormat::new(ty, config.n_kv_heads, config.head_dim)
}

/// Pages that a layer of one sequence of at most `ctx` tokens holds at most, in a batch of `rows` rows: all of the context's, or
/// those that a window sees from any of the rows, wherever chunks begin.
pub(crate) fn most_pages(window: Option<usize>, ctx: usize, rows: usize) -> usize {
    let all = ctx.div_ceil(KV_CHUNK);
    window.map_or(all, |window| all.min(window.saturating_add(rows).saturating_sub(1).div_ceil(KV_CHUNK) + 1))
}

impl LayerKv {
    /// An empty layer, with pages from `memory`.
    pub(crate) fn new(config: &ModelShape, layer: usize, memory: &KvPool) -> Self {
        Self { memory: memory.clone(), window: config.windows[layer], first_chunk: 0, pages: Vec::new() }
    }

    /// A layer with the pages of the chunks from `first_chunk` on, as they were.
    pub(crate) fn restored(
        memory: &KvPool,
        window: Option<usize>,
        first_chunk: usize,
        pages: Vec<Arc<KvPage>>,
    ) -> Self {
        Self { memory: memory.clone(), window, first_chunk, pages }
    }

    /// The pages of some chunks that it has.
    pub(crate) fn pages_of(&self, chunks: Range<usize>) -> impl Iterator<Item = &KvPage> {
        self.pages[chunks.start - self.first_chunk..chunks.end - self.first_chunk].iter().map(AsRef::as_ref)
    }

    /// Makes room for the positions `new`: gives back what none of them sees, takes pages, and copies one that is shared.
    ///
    /// # Errors
    /// [`ModelError::KvFull`] where there are no more pages.
    pub(crate) fn prepare(&mut self, new: Range<usize>) -> Result<(), ModelError> {
        let visible = self.window.map_or(0, |window| (new.start + 1).saturating_sub(window)) / KV_CHUNK;
        let gone = visible.saturating_sub(self.first_chunk).min(self.pages.len());
        self.pages.drain(..gone);
        self.first_chunk += gone;
        let full = || ModelError::KvFull { pages: self.memory.most() };
        for chunk in new.start / KV_CHUNK..new.end.div_ceil(KV_CHUNK) {
            match self.pages.get_mut(chunk - self.first_chunk) {
                None => self.pages.push(self.memory.page().ok_or_else(full)?),
                Some(page) => {
                    if Arc::get_mut(page).is_none() {
                        *page = self.memory.copy(page).ok_or_else(full)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Stores the positions from `position` on, for which [`Self::prepare`] made room; each row of `width` floats ends with the
    /// keys and the values of one, `n_kv_heads * head_dim` each.
    pub(crate) fn write(&mut self, pool: &Pool, position: usize, rows: &[f32], width: usize) {
        KvPagesMut::new(self.first_chunk, &mut self.pages).write_rows(pool, position, rows, width);
    }

    /// Gives back the pages that lie wholly behind the first `len` positions.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.pages.truncate(len.div_ceil(KV_CHUNK).saturating_sub(self.first_chunk));
        if len == 0 {
            self.first_chunk = 0;
        }
    }

    /// What the kernels read.
    pub(crate) fn pages(&self) -> KvPages<'_> {
        KvPages::new(self.memory.format(), self.first_chunk, &self.pages)
    }

    /// Positions that a token sees, itself included; `None` where it sees all before it.
    pub(crate) fn window(&self) -> Option<usize> {
        self.window
    }

    /// The fewest positions that the text can be cut to: what a window layer has given back does not come back.
    pub(crate) fn shortest_cut(&self) -> usize {
        match self.window {
            Some(window) if self.first_chunk > 0 => self.first_chunk * KV_CHUNK + window - 1,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A layer whose tokens see `window` positions, and the pool of its pages.
    fn layer(window: Option<usize>, most: usize) -> LayerKv {
        let memory = KvPool::new(KvFormat::new(KvType::F32, 1, 32), most);
        LayerKv { memory, window, first_chunk: 0, pages: Vec::new() }
    }

    #[test]
    fn a_window_gives_pages_back_and_never_needs_more_than_planned() {
        for (window, rows) in [(64, 1), (64, 512), (300, 7), (1, 256), (256, 256), (257, 1000)] {
            let most = most_pages(Some(window), usize::MAX, rows);
            let mut kv = layer(Some(window), most);
            for position in (0..20 * KV_CHUNK).step_by(rows) {
                kv.prepare(position..position + rows).expect("as many pages as planned");
                assert_eq!(kv.memory.in_use(), kv.pages.len());
                let there = kv.pages().positions();
                assert!(there.start <= (position + 1).saturating_sub(window) && position + rows <= there.end);
                // Where the batch began can be gone back to.
                assert!(kv.shortest_cut() <= position);
            }
            assert!(kv.first_chunk > 0);
            kv.truncate(0);
            assert_eq!((kv.memory.in_use(), kv.first_chunk), (0, 0));
        }
        assert_eq!(most_pages(None, 1000, 512), 4);
        assert_eq!(most_pages(Some(4096), 1000, 512), 4);
    }

    #[test]
    fn copies_share_pages_until_one_is_written() {
        let mut kv = layer(None, 4);
        kv.prepare(0..300).expect("room");
        let mut copy = kv.clone();
        assert_eq!(kv.memory.in_use(), 2);
        // The last page, half full, is copied; the first stays shared.
        copy.prepare(300..301).expect("room");
        assert_eq!(kv.memory.in_use(), 3);
        assert!(Arc::ptr_eq(&kv.pages[0], &copy.pages[0]) && !Arc::ptr_eq(&kv.pages[1], &copy.pages[1]));
        // The original's last page is its own again.
        kv.prepare(300..301).expect("room");
        assert_eq!(kv.memory.in_use(), 3);
        copy.prepare(301..601).expect("room");
        assert!(matches!(kv.prepare(301..601), Err(ModelError::KvFull { pages: 4 })));
        drop(copy);
        kv.prepare(301..601).expect("room again");
    }
}
