//! Keys and values of a layer, arranged for the attention kernels, in pages by reference count.
//!
//! A page holds the positions of one chunk of [`KV_CHUNK`], head by head the keys and then the values, with the head dimension
//! `d` padded to a multiple of 32:
//!
//! - keys: for each tile of 16 positions, for each dimension, 16 values (one per position). In Q8_0 a tile is, for each block
//!   of 32 dimensions, 16 f16 scales and 32 × 16 int8 values.
//! - values: for each block of 32 dimensions, for each position, 32 values. In Q8_0 such a block begins with the f16 scales of
//!   all positions.
//!
//! So a query reads keys with one lane per position and values with one lane per dimension, both in one sequential stream.
//!
//! In BF16 two such rows (of dimensions 2i and 2i + 1, or of positions) are one of 32-bit words: the even row's value in the upper
//! half, which is where the instruction that multiplies pairs begins, the odd row's in the lower.

mod cells;
mod format;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::aligned::AlignedBuf;
use crate::pool::Pool;
use cells::write_head;
pub(crate) use cells::{key_at, value_at};
pub(crate) use format::KV_TILE;
pub use format::{KV_CHUNK, KvFormat, KvType};

/// The memory of pages: what is given back is used again.
#[derive(Debug, Clone)]
pub struct KvPool {
    format: KvFormat,
    shelf: Arc<Shelf>,
}

#[derive(Debug)]
struct Shelf {
    /// The most pages that may be in use.
    most: usize,
    lender: Option<Lender>,
    state: Mutex<ShelfState>,
}

/// Who uses the memory of pages that do not have it: told how many have.
struct Lender(Box<dyn Fn(usize) + Send + Sync>);

impl std::fmt::Debug for Lender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lender")
    }
}

#[derive(Debug, Default)]
struct ShelfState {
    in_use: usize,
    /// Pages that have memory, in use or not.
    taken: usize,
    /// Memory of pages that are not.
    free: Vec<AlignedBuf<u8>>,
}

impl KvPool {
    /// A pool of which at most `most` pages are in use at any time.
    pub fn new(format: KvFormat, most: usize) -> Self {
        Self { format, shelf: Arc::new(Shelf { most, lender: None, state: Mutex::default() }) }
    }

    /// A pool whose memory somebody else uses as long as no page has it. `lender` is told how many pages have: before one more
    /// takes its own, and when all have given theirs back, since none is in use. It is called for one page at a time and must
    /// not ask for a page, or drop one.
    pub fn lent(format: KvFormat, most: usize, lender: impl Fn(usize) + Send + Sync + 'static) -> Self {
        let lender = Some(Lender(Box::new(lender)));
        Self { format, shelf: Arc::new(Shelf { most, lender, state: Mutex::default() }) }
    }

    /// What its pages look like.
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// Pages in use.
    pub fn in_use(&self) -> usize {
        self.shelf.lock().in_use
    }

    /// The most pages that may be in use.
    pub fn most(&self) -> usize {
        self.shelf.most
    }

    /// A page of zeros; `None` where all are in use.
    pub fn page(&self) -> Option<Arc<KvPage>> {
        let (mut data, fresh) = self.memory()?;
        if !fresh {
            // Nothing of another text, not even what is no number, shall be near this one.
            data.fill(0);
        }
        Some(self.bind(data))
    }

    /// A page with what `page` holds; `None` where all are in use.
    pub fn copy(&self, page: &KvPage) -> Option<Arc<KvPage>> {
        let (mut data, _) = self.memory()?;
        data.copy_from_slice(&page.data);
        Some(self.bind(data))
    }

    fn memory(&self) -> Option<(AlignedBuf<u8>, bool)> {
        let mut state = self.shelf.lock();
        if state.in_use >= self.shelf.most {
            return None;
        }
        state.in_use += 1;
        let used = state.free.pop();
        if used.is_none() {
            state.taken += 1;
            if let Some(Lender(told)) = &self.shelf.lender {
                // Under the lock, so that whoever is told last is told the latest.
                told(state.taken);
            }
        }
        drop(state);
        let fresh = used.is_none();
        // Side by side, so that small pages share the system's large ones.
        Some((used.unwrap_or_else(|| AlignedBuf::zeroed_in_arena(self.format.page_bytes())), fresh))
    }

    fn bind(&self, data: AlignedBuf<u8>) -> Arc<KvPage> {
        Arc::new(KvPage { format: self.format, data, shelf: Arc::clone(&self.shelf) })
    }
}

impl Shelf {
    fn lock(&self) -> MutexGuard<'_, ShelfState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keys and values of [`KV_CHUNK`] positions of one layer, all KV heads. Its memory goes back to its pool.
#[derive(Debug)]
pub struct KvPage {
    format: KvFormat,
    data: AlignedBuf<u8>,
    shelf: Arc<Shelf>,
}

impl Drop for KvPage {
    fn drop(&mut self) {
        let mut state = self.shelf.lock();
        state.in_use -= 1;
        state.free.push(std::mem::take(&mut self.data));
        if let (0, Some(Lender(told))) = (state.in_use, &self.shelf.lender) {
            state.free = Vec::new();
            state.taken = 0;
            told(0);
        }
    }
}

impl KvPage {
    /// Its memory, the same for the same keys and values on every machine.
    pub fn as_bytes(&self) -> &[u8] {
        &self.data
    }

    /// What its memory is where only the first `positions` positions were ever written.
    pub fn bytes_of_first(&self, positions: usize) -> Vec<u8> {
        let KvFormat { ty, n_heads: _, head_dim } = self.format;
        let (mut bytes, zeros) = (self.data.to_vec(), vec![0.0; head_dim]);
        for head in bytes.chunks_exact_mut(self.format.head_bytes()) {
            (positions..KV_CHUNK).for_each(|p| write_head(ty, head, p, &zeros, &zeros));
        }
        bytes
    }

    /// Its memory, to be filled with what [`KvPage::as_bytes`] gave. Any bytes are numbers, if not any that make sense.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        &mut self.data
    }

    /// Stores the keys and values (`n_heads × head_dim` each) of position `p` of the chunk.
    ///
    /// # Panics
    /// If there is no such position, or a length is not `n_heads × head_dim`.
    pub fn write(&mut self, p: usize, keys: &[f32], values: &[f32]) {
        let KvFormat { ty, n_heads, head_dim } = self.format;
        assert!(p < KV_CHUNK, "position {p} of a page");
        assert_eq!(keys.len(), n_heads * head_dim, "key length");
        assert_eq!(values.len(), n_heads * head_dim, "value length");
        let heads = self.data.chunks_exact_mut(self.format.head_bytes());
        for (head, (key, value)) in heads.zip(keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim))) {
            write_head(ty, head, p, key, value);
        }
    }
}

/// The pages that follow each other from a chunk on, which may be written: nobody else holds them.
#[derive(Debug)]
pub struct KvPagesMut<'a> {
    first_chunk: usize,
    pages: &'a mut [Arc<KvPage>],
}

impl<'a> KvPagesMut<'a> {
    /// The pages of the chunks from `first_chunk` on.
    pub fn new(first_chunk: usize, pages: &'a mut [Arc<KvPage>]) -> Self {
        Self { first_chunk, pages }
    }

    /// Stores the positions from `first` on, shared among the threads of a pool: each row of `width` floats ends with the keys and
    /// then the values of one.
    ///
    /// # Panics
    /// If `rows` is not whole rows, they are too short for keys and values, or a position's page is missing or not this
    /// holder's alone.
    pub fn write_rows(&mut self, pool: &Pool, first: usize, rows: &[f32], width: usize) {
        assert!(width > 0 && rows.len().is_multiple_of(width), "{} floats are not rows of {width}", rows.len());
        if rows.is_empty() {
            return;
        }
        let n = rows.len() / width;
        let first_page = (first / KV_CHUNK).checked_sub(self.first_chunk).expect("the page of a position is gone");
        let last_page = (first + n - 1) / KV_CHUNK - self.first_chunk;
        let pages = &mut self.pages[first_page..=last_page];
        let KvFormat { ty, n_heads, head_dim: d } = pages[0].format;
        let kv_dim = n_heads * d;
        assert!(width >= 2 * kv_dim, "rows of {width} floats for {kv_dim} keys and values");
        let of_row = |row: usize| rows[(row + 1) * width - 2 * kv_dim..(row + 1) * width].split_at(kv_dim);
        let own = pages.iter_mut().map(|page| Arc::get_mut(page).expect("a page that is written is held once"));
        if n == 1 {
            // Too little to be shared.
            let (keys, values) = of_row(0);
            return own.for_each(|page| page.write(first % KV_CHUNK, keys, values));
        }
        let head_bytes = pages_head_bytes(ty, d);
        let mut heads: Vec<&mut [u8]> = own.flat_map(|page| page.data.chunks_exact_mut(head_bytes)).collect();
        pool.run_chunks(&mut heads, 1, &|i, part| {
            let (head, base) = (i % n_heads, (first / KV_CHUNK + i / n_heads) * KV_CHUNK);
            for pos in first.max(base)..(first + n).min(base + KV_CHUNK) {
                let (keys, values) = of_row(pos - first);
                write_head(ty, part[0], pos - base, &keys[head * d..][..d], &values[head * d..][..d]);
            }
        });
    }
}

fn pages_head_bytes(ty: KvType, head_dim: usize) -> usize {
    KvFormat { ty, n_heads: 1, head_dim }.head_bytes()
}

/// What attention reads of a layer: the pages of the chunks from one on.
#[derive(Debug, Clone, Copy)]
pub struct KvPages<'a> {
    format: KvFormat,
    first_chunk: usize,
    pages: &'a [Arc<KvPage>],
}

impl<'a> KvPages<'a> {
    /// The pages of the chunks from `first_chunk` on, all of that format.
    pub fn new(format: KvFormat, first_chunk: usize, pages: &'a [Arc<KvPage>]) -> Self {
        debug_assert!(pages.iter().all(|page| page.format == format), "pages of several formats");
        Self { format, first_chunk, pages }
    }

    /// What the pages look like.
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// The positions that there is room for.
    pub fn positions(&self) -> Range<usize> {
        self.first_chunk * KV_CHUNK..(self.first_chunk + self.pages.len()) * KV_CHUNK
    }

    /// Keys of head `head` in chunk `chunk`.
    pub(crate) fn keys(&self, head: usize, chunk: usize) -> &'a [u8] {
        let both = self.head(head, chunk);
        &both[..both.len() / 2]
    }

    /// Values of it.
    pub(crate) fn values(&self, head: usize, chunk: usize) -> &'a [u8] {
        let both = self.head(head, chunk);
        &both[both.len() / 2..]
    }

    fn head(&self, head: usize, chunk: usize) -> &'a [u8] {
        assert!(head < self.format.n_heads, "KV head {head} of {}", self.format.n_heads);
        let bytes = self.format.head_bytes();
        &self.pages[chunk - self.first_chunk].data[head * bytes..(head + 1) * bytes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPES: [KvType; 4] = [KvType::F32, KvType::Bf16, KvType::F16, KvType::Q8_0];

    #[test]
    fn what_is_written_is_read() {
        for (ty, bound) in TYPES.into_iter().zip([0.0, 2e-3, 1e-3, 8e-3]) {
            let (heads, d) = (2, 40);
            let pool = KvPool::new(KvFormat::new(ty, heads, d), 3);
            let mut pages: Vec<_> = (0..3).map(|_| pool.page().unwrap()).collect();
            for pos in [512, 529, 767, 768, 1200] {
                let x: Vec<f32> = (0..heads * d).map(|i| ((pos + i * 7) % 101) as f32 / 101.0 - 0.5).collect();
                let y: Vec<f32> = x.iter().map(|v| -v).collect();
                Arc::get_mut(&mut pages[pos / KV_CHUNK - 2]).unwrap().write(pos % KV_CHUNK, &x, &y);
                let kv = KvPages::new(pool.format(), 2, &pages);
                assert_eq!(kv.positions(), 512..1280);
                for (i, &x) in x.iter().enumerate() {
                    let (head, dim) = (i / d, i % d);
                    let key = key_at(ty, kv.keys(head, pos / KV_CHUNK), 64, pos % KV_CHUNK, dim);
                    let value = value_at(ty, kv.values(head, pos / KV_CHUNK), pos % KV_CHUNK, dim);
                    assert!((key - x).abs() <= bound && (value + x).abs() <= bound, "{ty:?} {pos} {i}");
                }
            }
        }
    }

    #[test]
    fn rows_are_written_as_one_by_one() {
        let (heads, d, width) = (3, 40, 300);
        let threads = Pool::new(2).unwrap();
        for ty in TYPES {
            let pool = KvPool::new(KvFormat::new(ty, heads, d), 10);
            // Within a page, across pages, and one alone.
            for (first, n) in [(3, 1), (200, 100), (400, 300), (700, 512)] {
                let rows: Vec<f32> = (0..n * width).map(|i| (i * 31 % 997) as f32 / 997.0 - 0.5).collect();
                let at = first / KV_CHUNK;
                let pages = || (at..=(first + n - 1) / KV_CHUNK).map(|_| pool.page().unwrap()).collect::<Vec<_>>();
                let (mut one_by_one, mut together) = (pages(), pages());
                for (i, row) in rows.chunks(width).enumerate() {
                    let (keys, values) = row[width - 2 * heads * d..].split_at(heads * d);
                    let page = Arc::get_mut(&mut one_by_one[(first + i) / KV_CHUNK - at]).unwrap();
                    page.write((first + i) % KV_CHUNK, keys, values);
                }
                KvPagesMut::new(at, &mut together).write_rows(&threads, first, &rows, width);
                let same = one_by_one.iter().zip(&together).all(|(a, b)| a.data[..] == b.data[..]);
                assert!(same, "{ty:?} {first} {n}");
            }
        }
    }

    #[test]
    fn memory_of_pages_is_bounded_and_used_again_clean() {
        let pool = KvPool::new(KvFormat::new(KvType::F32, 1, 32), 2);
        let mut page = pool.page().unwrap();
        Arc::get_mut(&mut page).unwrap().write(9, &[f32::NAN; 32], &[1.0; 32]);
        let copy = pool.copy(&page).unwrap();
        assert!(copy.data[..] == page.data[..] && pool.page().is_none() && pool.in_use() == 2);
        let second = Arc::clone(&page);
        drop(page);
        assert!(pool.page().is_none());
        drop(second);
        assert_eq!(pool.in_use(), 1);
        assert!(pool.page().unwrap().data.iter().all(|&byte| byte == 0));
    }
}
