//! 16 bytes at a time: what arranging blocks of codes is made of, written once for every instruction set.

/// What a code's bits are moved with. All of it is exact, so every implementation does the same.
pub(crate) trait Bytes16: Copy {
    fn load(bytes: &[u8; 16]) -> Self;
    fn store(self, to: &mut [u8; 16]);
    /// Stores a line.
    #[inline(always)]
    fn store_line(line: [Self; 4], to: &mut [u8; 64]) {
        line.into_iter().zip(to.as_chunks_mut().0).for_each(|(part, to)| part.store(to));
    }
    /// Stores a line past the caches, where that can be: nobody reads what it held, so it need not be fetched, and who reads it next may be
    /// another core. [`Self::settle`] comes after the last one.
    #[inline(always)]
    fn stream(line: [Self; 4], to: &mut [u8; 64]) {
        Self::store_line(line, to);
    }
    /// What was streamed is there before what is stored from now on.
    #[inline(always)]
    fn settle() {}
    fn or(self, other: Self) -> Self;
    /// With `mask` in every byte.
    fn and(self, mask: u8) -> Self;
    /// Up by some bits; what a byte loses may come into the next one.
    fn up<const BITS: i32>(self) -> Self;
    /// Down by some bits; what a byte loses may come into the one before.
    fn down<const BITS: i32>(self) -> Self;
    /// Bytes of both in turn: of the first halves, and of the last.
    fn zip8(self, other: Self) -> (Self, Self);
    /// Words of 32 bits of both in turn.
    fn zip32(self, other: Self) -> (Self, Self);
}

impl Bytes16 for [u8; 16] {
    fn load(bytes: &[u8; 16]) -> Self {
        *bytes
    }

    fn store(self, to: &mut [u8; 16]) {
        *to = self;
    }

    fn or(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] | other[i])
    }

    fn and(self, mask: u8) -> Self {
        self.map(|byte| byte & mask)
    }

    fn up<const BITS: i32>(self) -> Self {
        self.map(|byte| byte << BITS)
    }

    fn down<const BITS: i32>(self) -> Self {
        self.map(|byte| byte >> BITS)
    }

    fn zip8(self, other: Self) -> (Self, Self) {
        let zip = |first: usize| std::array::from_fn(|i| if i % 2 == 0 { self } else { other }[first + i / 2]);
        (zip(0), zip(8))
    }

    fn zip32(self, other: Self) -> (Self, Self) {
        let zip = |first: usize| {
            std::array::from_fn(|i| if i / 4 % 2 == 0 { self } else { other }[first + i / 8 * 4 + i % 4])
        };
        (zip(0), zip(8))
    }
}

/// Byte by byte those of 16 rows.
#[inline(always)]
pub(crate) fn transpose<V: Bytes16>(rows: &[V; 16], columns: &mut [V; 16]) {
    // With the row number as the upper and the byte number as the lower four bits of an index, each round rotates it by one bit.
    let (mut once, mut twice) = (*rows, *rows);
    rotate(rows, &mut once);
    rotate(&once, &mut twice);
    rotate(&twice, &mut once);
    rotate(&once, columns);
}

#[inline(always)]
fn rotate<V: Bytes16>(from: &[V; 16], to: &mut [V; 16]) {
    for i in 0..8 {
        (to[2 * i], to[2 * i + 1]) = from[i].zip8(from[i + 8]);
    }
}

/// Word by word, of 32 bits, those of four rows.
#[inline(always)]
pub(crate) fn transpose_quads<V: Bytes16>(rows: [V; 4]) -> [V; 4] {
    let (first, second) = (rows[0].zip32(rows[2]), rows[1].zip32(rows[3]));
    let (low, high) = (first.0.zip32(second.0), first.1.zip32(second.1));
    [low.0, low.1, high.0, high.1]
}

/// Bytes of `P` slots of `8 / P` bits: slot `i` of what was vector `j` becomes slot `j` of vector `i`.
#[inline(always)]
pub(crate) fn exchange_slots<V: Bytes16, const P: usize>(vectors: &mut [V; P]) {
    exchange_bits::<V, 4>(vectors, P / 2, 0x0f);
    if P >= 4 {
        exchange_bits::<V, 2>(vectors, P / 4, 0x33);
    }
    if P >= 8 {
        exchange_bits::<V, 1>(vectors, P / 8, 0x55);
    }
}

/// Exchanges what `below` does not select, of `BITS` bits, with what it selects of the vector `step` further.
#[inline(always)]
fn exchange_bits<V: Bytes16, const BITS: i32>(vectors: &mut [V], step: usize, below: u8) {
    for i in 0..vectors.len() {
        if i & step != 0 {
            continue;
        }
        let (low, high) = (vectors[i], vectors[i + step]);
        vectors[i] = low.and(below).or(high.and(below).up::<BITS>());
        vectors[i + step] = low.down::<BITS>().and(below).or(high.and(!below));
    }
}

/// [`transpose`] for bytes in memory.
#[inline(always)]
pub(crate) fn transpose_bytes<V: Bytes16>(rows: &[[u8; 16]; 16]) -> [[u8; 16]; 16] {
    let mut out = [[0; 16]; 16];
    let mut vectors = [V::load(&[0; 16]); 16];
    for (vector, row) in vectors.iter_mut().zip(rows) {
        *vector = V::load(row);
    }
    let mut columns = vectors;
    transpose(&vectors, &mut columns);
    for (column, out) in columns.iter().zip(&mut out) {
        column.store(out);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "aarch64")]
    use crate::aarch64::neon::Neon as Here;
    #[cfg(target_arch = "x86_64")]
    use crate::x86_64::sse2::Sse2 as Here;

    const ROWS: [[u8; 16]; 16] = {
        let (mut rows, mut i) = ([[0; 16]; 16], 0);
        while i < 256 {
            rows[i / 16][i % 16] = (i * 151 + i * i / 7) as u8;
            i += 1;
        }
        rows
    };

    fn stored<V: Bytes16, const N: usize>(vectors: [V; N]) -> [[u8; 16]; N] {
        vectors.map(|vector| {
            let mut bytes = [0; 16];
            vector.store(&mut bytes);
            bytes
        })
    }

    fn loaded<V: Bytes16, const N: usize>() -> [V; N] {
        std::array::from_fn(|i| V::load(&ROWS[i]))
    }

    #[test]
    fn rows_become_columns() {
        let columns: [[u8; 16]; 16] = std::array::from_fn(|i| ROWS.map(|row| row[i]));
        assert_eq!(transpose_bytes::<[u8; 16]>(&ROWS), columns);
        let quads = |i: usize| std::array::from_fn(|n| ROWS[n / 4][4 * i + n % 4]);
        assert_eq!(transpose_quads::<[u8; 16]>(loaded()), std::array::from_fn(quads));
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        {
            assert_eq!(transpose_bytes::<Here>(&ROWS), columns);
            assert_eq!(stored(transpose_quads::<Here>(loaded())), std::array::from_fn(quads));
        }
    }

    #[test]
    fn slots_are_exchanged() {
        fn check<V: Bytes16, const P: usize>() {
            let (width, mask) = (8 / P, ((1u16 << (8 / P)) - 1) as u8);
            let mut vectors = loaded::<V, P>();
            exchange_slots(&mut vectors);
            for (i, bytes) in stored(vectors).into_iter().enumerate() {
                for (n, byte) in bytes.into_iter().enumerate() {
                    for (j, row) in ROWS[..P].iter().enumerate() {
                        assert_eq!(byte >> (j * width) & mask, row[n] >> (i * width) & mask, "{P} slots");
                    }
                }
            }
        }
        fn check_all<V: Bytes16>() {
            check::<V, 2>();
            check::<V, 4>();
            check::<V, 8>();
        }
        check_all::<[u8; 16]>();
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        check_all::<Here>();
    }
}
