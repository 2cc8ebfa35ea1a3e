//! Buffers shared among the threads of a pool, so that callers need no `unsafe`: each thread writes a part of its own.
//!
//! Four ways: a list in chunks, and rows of columns in tiles that are handed out one by one, in ranges that halve, or as several
//! products side by side.

use std::ops::Range;

use super::Pool;
use crate::out::ColumnsMut;

/// Which rows of a buffer go together.
#[derive(Debug, Clone, Copy)]
pub enum RowSplit<'a> {
    /// All of them.
    All,
    /// So many after each other; at the end there may be fewer.
    Every(usize),
    /// Those of each range, which ascend; the rows between them stay as they are.
    Ranges(&'a [Range<usize>]),
}

impl RowSplit<'_> {
    /// How many groups there are of `rows` rows.
    ///
    /// # Panics
    /// If a group has no room, or ranges do not ascend, overlap or are not among the rows.
    fn groups(&self, rows: usize) -> usize {
        match *self {
            Self::All => usize::from(rows > 0),
            Self::Every(n) => rows.div_ceil(n),
            Self::Ranges(ranges) => {
                let mut end = 0;
                for range in ranges {
                    assert!(end <= range.start && range.start <= range.end, "rows {range:?} after row {end}");
                    end = range.end;
                }
                assert!(end <= rows, "row {end} of {rows}");
                ranges.len()
            }
        }
    }

    /// The rows of a group.
    fn group(&self, i: usize, rows: usize) -> Range<usize> {
        match *self {
            Self::All => 0..rows,
            Self::Every(n) => i * n..rows.min((i + 1) * n),
            Self::Ranges(ranges) => ranges[i].clone(),
        }
    }
}

impl Pool {
    /// Cuts `out` into chunks of `chunk_len` (the last may be shorter) and runs `job(i, chunk)` for each, like
    /// `for_each`.
    ///
    /// # Panics
    /// If `chunk_len` is 0, or as [`Self::run`].
    pub fn run_chunks<T: Send>(&self, out: &mut [T], chunk_len: usize, job: &(dyn Fn(usize, &mut [T]) + Sync)) {
        assert!(chunk_len > 0, "run_chunks: chunk_len is 0");
        let len = out.len();
        let base = SendPtr(out.as_mut_ptr());
        self.for_each(len.div_ceil(chunk_len), &|i| {
            let start = i * chunk_len;
            let n = chunk_len.min(len - start);
            // SAFETY: `for_each` hands out each `i` once, so the chunks in use are disjoint parts of `out`, which is
            // exclusively borrowed until all are done; `start + n <= len`.
            let chunk = unsafe { base.slice_mut(start, n) };
            job(i, chunk);
        });
    }

    /// Sees `out` as rows of `ld` values, cuts the columns of each group of rows into ranges of `chunk` (the last may be shorter) and
    /// runs `job(group, tile)` for each, like [`Self::run_chunks`].
    ///
    /// # Panics
    /// If `out` is not whole rows, `chunk` is 0 or `split` does not fit, or as [`Self::run`].
    pub fn run_tiles<T: Send>(
        &self,
        out: &mut [T],
        ld: usize,
        split: RowSplit<'_>,
        chunk: usize,
        job: &(dyn Fn(usize, ColumnsMut<'_, T>) + Sync),
    ) {
        assert!(chunk > 0, "a chunk of 0 columns");
        let (rows, across, base) = (rows_of(out.len(), ld), ld.div_ceil(chunk), SendPtr(out.as_mut_ptr()));
        self.for_each(split.groups(rows) * across, &|i| {
            let (group, column) = (i / across, i % across * chunk);
            let columns = column..ld.min(column + chunk);
            // SAFETY: `for_each` hands out each `i` once and groups of rows are disjoint (`groups` checks it), so no two views share an
            // element; all lie in `out`, which is exclusively borrowed until all are done.
            job(group, unsafe { ColumnsMut::from_raw(base.get(), split.group(group, rows), ld, columns) });
        });
    }

    /// Sees `out` as rows of `ld` values, cuts the columns of each group of rows into units of `unit` (the last may be shorter) and
    /// runs `job(group, columns)` for runs of units of one group. Each thread begins with a contiguous share of its own and takes half
    /// of what is left of it at a time, then of the others': long runs while there is much to do, short ones at the end. The calling
    /// thread first runs `own`, while the others begin.
    ///
    /// # Panics
    /// If `out` is not whole rows, `unit` is 0 or `split` does not fit, as [`Self::run`], and as `own`.
    pub fn run_ranges<T: Send>(
        &self,
        out: &mut [T],
        ld: usize,
        split: RowSplit<'_>,
        unit: usize,
        own: impl FnOnce(),
        job: &(dyn Fn(usize, ColumnsMut<'_, T>) + Sync),
    ) {
        assert!(unit > 0, "a unit of 0 columns");
        let (rows, across, base) = (rows_of(out.len(), ld), ld.div_ceil(unit), SendPtr(out.as_mut_ptr()));
        self.for_ranges_while(split.groups(rows) * across, own, &|mut units| {
            while !units.is_empty() {
                let group = units.start / across;
                let end = units.end.min((group + 1) * across);
                let columns = (units.start - group * across) * unit..ld.min((end - group * across) * unit);
                // SAFETY: `for_ranges_while` hands out each unit once and groups of rows are disjoint (`groups` checks it), so no two
                // views share an element; all lie in `out`, which is exclusively borrowed until all are done.
                job(group, unsafe { ColumnsMut::from_raw(base.get(), split.group(group, rows), ld, columns) });
                units.start = end;
            }
        });
    }

    /// [`Self::run_ranges`] for all rows of `out` together, whose columns are several products side by side, the i-th of `widths[i]` outputs:
    /// `job(i, columns)` gets a run of columns of one of them, counted from its own first. The calling thread first runs `own`.
    ///
    /// # Panics
    /// If `out` is not whole rows of all widths together, `unit` is 0, as [`Self::run`], and as `own`.
    pub fn run_parts(
        &self,
        out: &mut [f32],
        widths: &[usize],
        unit: usize,
        own: impl FnOnce(),
        job: &(dyn Fn(usize, ColumnsMut<'_>) + Sync),
    ) {
        assert!(unit > 0, "a unit of 0 columns");
        let ld: usize = widths.iter().sum();
        let (rows, base) = (rows_of(out.len(), ld), SendPtr(out.as_mut_ptr()));
        let units = |width: usize| width.div_ceil(unit);
        self.for_ranges_while(widths.iter().copied().map(units).sum(), own, &|wanted| {
            let (mut first_unit, mut first_column) = (0, 0);
            for (i, &width) in widths.iter().enumerate() {
                let mine = wanted.start.max(first_unit) - first_unit
                    ..wanted.end.min(first_unit + units(width)).max(first_unit) - first_unit;
                if mine.start < mine.end {
                    let columns = mine.start * unit..width.min(mine.end * unit);
                    // SAFETY: `for_ranges_while` hands out each unit once, and a unit is columns of one part, so no two views share an
                    // element. Columns of a part, counted from `first_column`, end at `first_column + width <= ld`, so all lie in `out`,
                    // which is exclusively borrowed until all are done.
                    job(i, unsafe { ColumnsMut::from_raw(base.get().add(first_column), 0..rows, ld, columns) });
                }
                (first_unit, first_column) = (first_unit + units(width), first_column + width);
            }
        });
    }
}

/// # Panics
/// If `len` values are not rows of `ld`.
fn rows_of(len: usize, ld: usize) -> usize {
    assert!(ld > 0 && len.is_multiple_of(ld), "{len} values are not rows of {ld}");
    len / ld
}

/// A pointer that may cross threads; what makes that sound is said where it is used.
struct SendPtr<T>(*mut T);

impl<T> SendPtr<T> {
    fn get(&self) -> *mut T {
        self.0
    }

    /// # Safety
    /// The values exist, and nobody else reads or writes them as long as the slice lives.
    unsafe fn slice_mut<'a>(&self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

// SAFETY: users derive disjoint exclusive parts from it, of types that are `Send`.
unsafe impl<T: Send> Sync for SendPtr<T> {}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn ranges_cover_rows_once() {
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads).unwrap();
            for (rows, row_len, unit) in [(1, 1, 1), (1, 100, 16), (3, 10, 4), (4, 48, 1), (2, 5, 9), (0, 4, 2)] {
                let mut out = vec![usize::MAX; rows * row_len];
                pool.run_ranges(&mut out, row_len, RowSplit::Every(1), unit, || (), &|row, mut view| {
                    let first = view.columns().start;
                    assert!(first.is_multiple_of(unit) && !view.columns().is_empty());
                    for (i, v) in view.row_mut(0).iter_mut().enumerate() {
                        assert_eq!(*v, usize::MAX);
                        *v = row * row_len + first + i;
                    }
                });
                assert!(out.iter().enumerate().all(|(i, &v)| v == i));
            }
        }
    }

    #[test]
    fn ranges_of_several_rows_cover_their_columns_once() {
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads).unwrap();
            let (mut out, mut own) = (vec![0; 7 * 50], false);
            let rows = [0..2, 2..2, 3..6];
            pool.run_ranges(&mut out, 50, RowSplit::Ranges(&rows), 16, || own = true, &|i, mut view| {
                let first = view.columns().start;
                assert!(first.is_multiple_of(16) && view.first_row() == rows[i].start && view.rows() == rows[i].len());
                for row in view.rows_mut() {
                    row.iter_mut().enumerate().for_each(|(c, v)| *v += 1000 * (i + 1) + first + c);
                }
            });
            assert!(own);
            for (row, values) in out.chunks(50).enumerate() {
                let range = rows.iter().position(|rows| rows.contains(&row));
                let want = |c| range.map_or(0, |i| 1000 * (i + 1) + c);
                assert!(values.iter().enumerate().all(|(c, v)| *v == want(c)), "row {row}");
            }
        }
    }

    #[test]
    fn columns_are_split_and_rows_kept() {
        let pool = Pool::new(2).unwrap();
        let mut out = vec![0.0; 3 * 10];
        pool.run_tiles(&mut out, 10, RowSplit::All, 4, &|_, mut view| {
            for row in 0..view.rows() {
                let first = view.columns().start;
                for (c, v) in view.row_mut(row).iter_mut().enumerate() {
                    *v = (row * 10 + first + c) as f32;
                }
            }
        });
        assert!(out.iter().enumerate().all(|(i, &v)| v == i as f32));
    }

    #[test]
    fn columns_of_some_rows_leave_the_others_alone() {
        let pool = Pool::new(2).unwrap();
        let mut out = vec![0.0; 6 * 10];
        pool.run_tiles(&mut out, 10, RowSplit::Ranges(&[0..1, 2..2, 3..5]), 4, &|range, mut view| {
            for row in 0..view.rows() {
                view.row_mut(row).fill(range as f32 + 1.0);
            }
        });
        let rows: Vec<f32> = out.chunks(10).map(|row| row.iter().sum::<f32>() / 10.0).collect();
        assert_eq!(rows, [1.0, 0.0, 0.0, 3.0, 3.0, 0.0]);
        for bad in [&[0..2, 1..3][..], &[4..5, 5..7], &[3..4, 0..1]] {
            let run = || pool.run_tiles(&mut [0.0; 60], 10, RowSplit::Ranges(bad), 4, &|_, _| ());
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err(), "{bad:?}");
        }
    }
}
