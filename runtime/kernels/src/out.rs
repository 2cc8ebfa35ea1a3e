//! Views of outputs that several threads write at the same time, each its own columns.

use std::marker::PhantomData;
use std::ops::Range;

use crate::r16::R16_ROWS;

/// Exclusive access to some columns (of all or some rows) of a row-major matrix: the output of a matrix product, rows being tokens.
///
/// Made from a whole slice ([`Self::new`]) or by a [`crate::Pool`].
#[derive(Debug)]
pub struct ColumnsMut<'a, T = f32> {
    base: *mut T,
    first_row: usize,
    rows: usize,
    ld: usize,
    columns: Range<usize>,
    _out: PhantomData<&'a mut [T]>,
}

// SAFETY: the view has exclusive access to its elements, like the `&mut [T]` it was made from.
unsafe impl<T: Send> Send for ColumnsMut<'_, T> {}

impl<'a, T> ColumnsMut<'a, T> {
    /// All of `out`, rows of `ld` values.
    ///
    /// # Panics
    /// If `out` is not whole rows.
    pub fn new(out: &'a mut [T], ld: usize) -> Self {
        assert!(ld > 0 && out.len().is_multiple_of(ld), "{} values are not rows of {ld}", out.len());
        // SAFETY: the slice is exclusively borrowed for 'a and has rows * ld elements.
        unsafe { Self::from_raw(out.as_mut_ptr(), 0..out.len() / ld, ld, 0..ld) }
    }

    /// # Safety
    /// Row `r` begins `r * ld` values after `base`: `columns` of each of `rows` must be values of one allocation that live for 'a and
    /// that nobody else may touch; `columns` must lie in `0..ld`.
    pub(crate) unsafe fn from_raw(base: *mut T, rows: Range<usize>, ld: usize, columns: Range<usize>) -> Self {
        debug_assert!(columns.start <= columns.end && columns.end <= ld);
        Self { base, first_row: rows.start, rows: rows.len(), ld, columns, _out: PhantomData }
    }

    /// Which row of the whole matrix row 0 of this view is.
    pub fn first_row(&self) -> usize {
        self.first_row
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The columns of the whole matrix that this view may write.
    pub fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// This view's part of `row`: one value for each of [`Self::columns`].
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_mut(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: row is one of the view's rows and columns lie in 0..ld, so the part is inside the matrix; `&mut self` makes it exclusive.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.base.add((self.first_row + row) * self.ld + self.columns.start),
                self.columns.len(),
            )
        }
    }

    /// This view's parts of all rows, in order.
    pub(crate) fn rows_mut(&mut self) -> impl Iterator<Item = &mut [T]> {
        let (first, ld, columns) = (self.first_row, self.ld, self.columns.clone());
        let base = self.base;
        (0..self.rows).map(move |row| {
            // SAFETY: as in `row_mut`; each row is given out once while `self` is borrowed.
            unsafe { std::slice::from_raw_parts_mut(base.add((first + row) * ld + columns.start), columns.len()) }
        })
    }
}

impl ColumnsMut<'_> {
    /// Writes outputs from column `at` of this view's part of `row` on, as many as it has.
    ///
    /// # Panics
    /// If there is no such row, or no column `at`.
    pub(crate) fn put(&mut self, row: usize, at: usize, values: &[f32; R16_ROWS]) {
        let out = &mut self.row_mut(row)[at..];
        match out.first_chunk_mut() {
            // A length known beforehand is one store, not a call.
            Some(out) => *out = *values,
            None => out.copy_from_slice(&values[..out.len()]),
        }
    }
}
