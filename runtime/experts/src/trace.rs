//! Routing traces: which experts the routers chose, as text, one line per token and layer.
//!
//! ```text
//! # routing n_layers=32 n_experts=32 expert_bytes=1990656 other_bytes=402653184
//! 0 0 3,17,8,30 prompt
//! 1 0 3,5,8,12 prompt
//! 0 1 5,2,9,11 prompt
//! 1 1 5,2,0,11 prompt
//! 2 0 3,17,8,12 decode
//! ```
//! that is token, layer, the chosen experts in the router's order, and whether the token was read or made, which decides what a cache
//! keeps. Lines without the last word are those of earlier versions: tokens that went together are a prompt's there. Lines stand in the order in which the model ran: a
//! layer's lines that follow each other are tokens that went through it together, as tokens 0 and 1 here, so that their
//! experts were asked for together. Lines that begin with `#` are comments; the first one as above lets a reader turn slots
//! into bytes. The reader takes any file and refuses what is not a whole trace, naming the line; what it holds in memory is
//! proportional to what it has read.

use crate::place::Use;
use std::io::{self, BufRead, Read, Write};
use thiserror::Error;

/// Longest line that is read, in bytes; a line of 512 experts has a tenth of it.
const MAX_LINE: u64 = 1 << 15;

/// Layers and experts are numbered below this.
const MAX_ID: u32 = 1 << 16;

/// Why a file is not a routing trace.
#[derive(Debug, Error)]
pub enum TraceError {
    /// The file could not be read.
    #[error("cannot read the routing trace")]
    Io(#[from] io::Error),
    /// A line is not what it should be.
    #[error("line {line} of the routing trace {problem}")]
    Malformed {
        /// Counted from 1.
        line: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// There is no line with a choice of experts.
    #[error("the routing trace is empty: no line names a token's experts")]
    Empty,
}

/// What a trace's first line says about the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceHeader {
    /// Layers with experts.
    pub n_layers: u32,
    /// Experts per layer.
    pub n_experts: u32,
    /// Bytes that one expert takes in the cache.
    pub expert_bytes: u64,
    /// Bytes that the process took beside the cache: program, dense weights, KV cache, buffers. `None` where nobody knows.
    pub other_bytes: Option<u64>,
}

/// Writes a trace as a model runs.
#[derive(Debug)]
pub struct TraceWriter<W: Write> {
    out: W,
}

impl<W: Write> TraceWriter<W> {
    /// Begins a trace. `out` should be buffered.
    ///
    /// # Errors
    /// What `out` reports.
    pub fn new(mut out: W, header: &TraceHeader) -> io::Result<Self> {
        let TraceHeader { n_layers, n_experts, expert_bytes, other_bytes } = header;
        write!(out, "# routing n_layers={n_layers} n_experts={n_experts} expert_bytes={expert_bytes}")?;
        if let Some(other_bytes) = other_bytes {
            write!(out, " other_bytes={other_bytes}")?;
        }
        writeln!(out)?;
        Ok(Self { out })
    }

    /// Adds the experts `ids` that the router of `layer` chose for token number `token` of the run, and how they were used.
    ///
    /// # Errors
    /// What the output reports.
    pub fn record(&mut self, token: u64, layer: usize, ids: &[u32], how: Use) -> io::Result<()> {
        write!(self.out, "{token} {layer} ")?;
        for (i, id) in ids.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(self.out, "{comma}{id}")?;
        }
        writeln!(self.out, " {}", name_of(how))
    }

    /// Ends the trace and gives the output back, flushed.
    ///
    /// # Errors
    /// What the output reports.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.flush()?;
        Ok(self.out)
    }
}

/// One line of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceRow<'a> {
    /// The token's number in the run.
    pub token: u64,
    /// The layer.
    pub layer: u32,
    /// The experts chosen, distinct, in the router's order.
    pub ids: &'a [u32],
    /// How they were used, where the line says so.
    pub how: Option<Use>,
}

/// The last word of a line.
fn name_of(how: Use) -> &'static str {
    match how {
        Use::Sweep => "prompt",
        Use::Keep => "decode",
    }
}

/// A trace in memory.
#[derive(Debug, Clone, Default)]
pub struct RoutingTrace {
    header: Option<TraceHeader>,
    /// Per row: token, layer, where its experts end in `ids`, and how they were used.
    rows: Vec<(u64, u32, usize, Option<Use>)>,
    ids: Vec<u32>,
}

impl RoutingTrace {
    /// A trace of a model that is known, without lines.
    pub fn new(header: TraceHeader) -> Self {
        Self { header: Some(header), ..Self::default() }
    }

    /// Adds a line: the experts `ids`, distinct and of the model, that the router of `layer` chose for a token.
    pub fn push(&mut self, token: u64, layer: u32, ids: &[u32], how: Use) {
        self.ids.extend_from_slice(ids);
        self.rows.push((token, layer, self.ids.len(), Some(how)));
    }

    /// Reads a trace to its end.
    ///
    /// # Errors
    /// [`TraceError`]; nothing in a file makes it panic.
    pub fn read(mut input: impl BufRead) -> Result<Self, TraceError> {
        let mut trace = Self::default();
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            let n = (&mut input).take(MAX_LINE).read_until(b'\n', &mut line)? as u64;
            if n == 0 {
                break;
            }
            let malformed = |problem| TraceError::Malformed { line: number, problem };
            if !line.ends_with(b"\n") {
                // Half a list of experts looks like a whole one.
                return Err(malformed(if n == MAX_LINE { "is too long" } else { "is cut off" }));
            }
            let text = std::str::from_utf8(&line).map_err(|_| malformed("is not text"))?.trim();
            match text.strip_prefix('#').map(str::trim_start) {
                Some(comment) if number == 1 && comment.starts_with("routing ") => {
                    trace.header = Some(parse_header(comment).map_err(malformed)?);
                }
                Some(_) => {}
                None if text.is_empty() => {}
                None => trace.push_line(text).map_err(malformed)?,
            }
        }
        if trace.rows.is_empty() { Err(TraceError::Empty) } else { Ok(trace) }
    }

    fn push_line(&mut self, text: &str) -> Result<(), &'static str> {
        let mut fields = text.split_ascii_whitespace();
        let (Some(token), Some(layer), Some(ids)) = (fields.next(), fields.next(), fields.next()) else {
            return Err("is not TOKEN LAYER EXPERT,EXPERT,… KIND");
        };
        let how = match fields.next() {
            None => None,
            Some(name) => [Use::Sweep, Use::Keep]
                .into_iter()
                .find(|&how| name_of(how) == name)
                .map(Some)
                .ok_or("is of no kind")?,
        };
        if fields.next().is_some() {
            return Err("goes on after its kind");
        }
        let token = token.parse().map_err(|_| "has no number for its token")?;
        let below_max = |text: &str| text.parse().ok().filter(|&id: &u32| id < MAX_ID);
        let layer = below_max(layer).ok_or("has no valid layer")?;
        let (n_layers, n_experts) = self.header.map_or((MAX_ID, MAX_ID), |header| (header.n_layers, header.n_experts));
        if layer >= n_layers {
            return Err("names a layer that the first line does not allow");
        }
        let start = self.ids.len();
        for id in ids.split(',') {
            let id = below_max(id).ok_or("has no valid list of experts")?;
            if id >= n_experts {
                return Err("names an expert that the first line does not allow");
            }
            if self.ids[start..].contains(&id) {
                return Err("names an expert twice");
            }
            self.ids.push(id);
        }
        self.rows.push((token, layer, self.ids.len(), how));
        Ok(())
    }

    /// What the first line says, where there was one that does.
    pub fn header(&self) -> Option<TraceHeader> {
        self.header
    }

    /// The lines in order.
    pub fn rows(&self) -> impl Iterator<Item = TraceRow<'_>> {
        self.rows.iter().scan(0, |start, &(token, layer, end, how)| {
            let ids = &self.ids[*start..end];
            *start = end;
            Some(TraceRow { token, layer, ids, how })
        })
    }
}

/// The values of `routing n_layers=… n_experts=… expert_bytes=… [other_bytes=…]`.
fn parse_header(comment: &str) -> Result<TraceHeader, &'static str> {
    const PROBLEM: &str = "is not # routing n_layers=N n_experts=N expert_bytes=N";
    let mut fields = comment.split_ascii_whitespace().skip(1);
    let mut value = |name: &str| fields.next()?.strip_prefix(name)?.strip_prefix('=')?.parse::<u64>().ok();
    let count = |n: Option<u64>| n.and_then(|n| u32::try_from(n).ok()).filter(|n| (1..=MAX_ID).contains(n));
    Ok(TraceHeader {
        n_layers: count(value("n_layers")).ok_or(PROBLEM)?,
        n_experts: count(value("n_experts")).ok_or(PROBLEM)?,
        expert_bytes: value("expert_bytes").ok_or(PROBLEM)?,
        other_bytes: value("other_bytes"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &[u8]) -> Result<RoutingTrace, TraceError> {
        RoutingTrace::read(text)
    }

    #[test]
    fn what_is_written_is_read() {
        for other_bytes in [None, Some(77)] {
            round_trip(&TraceHeader { n_layers: 2, n_experts: 9, expert_bytes: 4096, other_bytes });
        }
    }

    fn round_trip(header: &TraceHeader) {
        let mut writer = TraceWriter::new(Vec::new(), header).unwrap();
        let rows = [(0, 0, vec![8, 1], Use::Sweep), (0, 1, vec![3, 2], Use::Sweep), (1, 0, vec![0], Use::Keep)];
        for (token, layer, ids, how) in &rows {
            writer.record(*token, *layer, ids, *how).unwrap();
        }
        let text = writer.finish().unwrap();
        assert!(text.ends_with(b"0 0 8,1 prompt\n0 1 3,2 prompt\n1 0 0 decode\n"));
        let trace = read(&text).unwrap();
        assert_eq!(trace.header().as_ref(), Some(header));
        let how = |row: &TraceRow<'_>| row.how.expect("a kind");
        let got: Vec<_> =
            trace.rows().map(|row| (row.token, row.layer as usize, row.ids.to_vec(), how(&row))).collect();
        assert_eq!(got, rows);
    }

    #[test]
    fn what_is_no_trace_is_refused_by_line() {
        let long = [b"0 0 ".as_slice(), b"1,".repeat(20_000).as_slice()].concat();
        for (text, line) in [
            (b"0 0 1\nx\n".as_slice(), 2),
            (b"0 0 1 2\n", 1),
            (b"0 0 1 decode\n0 0 1 prompts\n", 2),
            (b"0 0 1 decode x\n", 1),
            (b"0 0\n", 1),
            (b"-1 0 1\n", 1),
            (b"0 65536 1\n", 1),
            (b"0 0 1,,2\n", 1),
            (b"0 0 1,2,\n", 1),
            (b"0 0 70000\n", 1),
            (b"0 0 1,2,1\n", 1),
            (b"\n\xff\xfe\n", 2),
            (b"0 0 1\n0 1 1", 2),
            (b"# routing n_layers=x\n0 0 1\n", 1),
            (b"# routing n_layers=2 n_experts=0 expert_bytes=1\n0 0 1\n", 1),
            (b"# routing n_layers=2 n_experts=99999999 expert_bytes=1\n0 0 1\n", 1),
            (b"# routing n_layers=2 n_experts=3 expert_bytes=1\n0 2 1\n", 2),
            (b"# routing n_layers=2 n_experts=3 expert_bytes=1\n0 1 2,3\n", 2),
            (&long, 1),
        ] {
            match read(text) {
                Err(TraceError::Malformed { line: at, .. }) => assert_eq!(at, line),
                other => panic!("{other:?} for {:?}", String::from_utf8_lossy(text)),
            }
        }
        assert!(matches!(read(b""), Err(TraceError::Empty)));
        assert!(matches!(read(b"# only a comment\n"), Err(TraceError::Empty)));
        assert_eq!(read(b"# by hand\n0 0 1\n").unwrap().header(), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), lines in "([0-9,# a-z=]{0,12}\n){0,8}") {
            let _ = read(&bytes);
            let _ = read(lines.as_bytes());
        }
    }
}
