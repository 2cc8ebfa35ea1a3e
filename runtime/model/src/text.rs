//! Token bytes to text as it is generated.
//!
//! Owns two things that must wait for what comes next: a UTF-8 character split over tokens, and a stop string that
//! may be beginning. Text is given out as early as both allow and never taken back. Broken UTF-8 becomes U+FFFD, one
//! per maximal invalid part, as `String::from_utf8_lossy` does.

/// Text that can be given out now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step<'a> {
    /// New text, perhaps empty.
    pub text: &'a str,
    /// The stop string that was met, as an index into the list; nothing more will come.
    pub stopped: Option<usize>,
}

/// Turns the bytes of one token after the other into text, up to a stop string.
#[derive(Debug, Clone, Default)]
pub struct TextStream {
    utf8: Utf8Stream,
    stops: Vec<String>,
    /// Decoded text not given out yet.
    held: String,
    /// Text given out by the latest call.
    out: String,
    stopped: Option<usize>,
}

impl TextStream {
    /// A stream that ends before the first occurrence of any of `stops`; empty stop strings are ignored.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, ..Self::default() }
    }

    /// Takes the bytes of the next token.
    pub fn push(&mut self, bytes: &[u8]) -> Step<'_> {
        self.out.clear();
        if self.stopped.is_none() {
            self.utf8.push(bytes, &mut self.held);
            self.release(false);
        }
        self.step()
    }

    /// Ends the text: gives out what was held back. An incomplete character becomes U+FFFD.
    pub fn finish(&mut self) -> Step<'_> {
        self.out.clear();
        if self.stopped.is_none() {
            self.utf8.finish(&mut self.held);
            self.release(true);
        }
        self.step()
    }

    fn step(&self) -> Step<'_> {
        Step { text: &self.out, stopped: self.stopped }
    }

    /// Moves from `held` to `out` what no stop string can claim any more.
    fn release(&mut self, all: bool) {
        let found = self
            .stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .filter_map(|(i, stop)| Some((self.held.find(stop.as_str())?, i)))
            .min();
        if let Some((start, index)) = found {
            self.out.push_str(&self.held[..start]);
            self.held.clear();
            self.stopped = Some(index);
            return;
        }
        let keep = match all {
            true => 0,
            false => self.possible_stop(),
        };
        let give = self.held.len() - keep;
        self.out.push_str(&self.held[..give]);
        self.held.drain(..give);
    }

    /// Length of the longest end of `held` that some stop string begins with.
    fn possible_stop(&self) -> usize {
        let longest = |stop: &String| {
            stop.char_indices().map(|(at, _)| at).filter(|&at| at > 0 && self.held.ends_with(&stop[..at])).max()
        };
        self.stops.iter().filter_map(longest).max().unwrap_or(0)
    }
}

/// Bytes to characters, holding back an incomplete last character.
#[derive(Debug, Clone, Default)]
struct Utf8Stream {
    /// The beginning of a character: at most three bytes between calls.
    pending: Vec<u8>,
}

impl Utf8Stream {
    fn push(&mut self, bytes: &[u8], out: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(valid));
                    let Some(broken) = error.error_len() else {
                        rest = after;
                        break;
                    };
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[broken..];
                }
            }
        }
        let keep_from = self.pending.len() - rest.len();
        self.pending.drain(..keep_from);
    }

    fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Feeds `pieces` and returns what came out, piece by piece, the end last.
    fn feed<'a>(stream: &mut TextStream, pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
        let mut out: Vec<String> = pieces.into_iter().map(|piece| stream.push(piece).text.to_owned()).collect();
        out.push(stream.finish().text.to_owned());
        out
    }

    fn stream(stops: &[&str]) -> TextStream {
        TextStream::new(stops.iter().map(|&s| s.to_owned()).collect())
    }

    #[test]
    fn a_character_waits_for_its_last_byte() {
        let emoji = "😀".as_bytes();
        let got = feed(&mut stream(&[]), [b"a" as &[u8], &emoji[..1], &emoji[1..3], &emoji[3..]]);
        assert_eq!(got, ["a", "", "", "😀", ""]);
    }

    #[test]
    fn broken_bytes_become_replacement_characters() {
        assert_eq!(feed(&mut stream(&[]), [b"a\xffb" as &[u8]]), ["a\u{fffd}b", ""]);
        // A lead byte followed by text is broken at once; one at the end is only known broken at the end.
        assert_eq!(feed(&mut stream(&[]), [b"\xe4" as &[u8], b"x"]), ["", "\u{fffd}x", ""]);
        assert_eq!(feed(&mut stream(&[]), [b"\xe4\xbd" as &[u8]]), ["", "\u{fffd}"]);
    }

    #[test]
    fn a_possible_stop_is_held_until_decided() {
        let mut s = stream(&["###"]);
        assert_eq!(feed(&mut s, [b"a#" as &[u8], b"#", b"b#"]), ["a", "", "##b", "#"]);
        assert_eq!(s.push(b"").stopped, None);
    }

    #[test]
    fn nothing_from_the_stop_on_comes_out() {
        let mut s = stream(&["END"]);
        assert_eq!(s.push(b"one E").text, "one ");
        let step = s.push(b"ND two");
        assert_eq!((step.text, step.stopped), ("", Some(0)));
        assert_eq!(s.push(b"more"), Step { text: "", stopped: Some(0) });
        assert_eq!(s.finish(), Step { text: "", stopped: Some(0) });
    }

    #[test]
    fn the_earliest_stop_wins() {
        let mut s = stream(&["cd", "bc"]);
        let step = s.push(b"abcd");
        assert_eq!((step.text, step.stopped), ("a", Some(1)));
    }

    #[test]
    fn stops_may_overlap_themselves_and_be_cut_inside_characters() {
        let mut s = stream(&["aab"]);
        assert_eq!(s.push(b"aa").text, "");
        assert_eq!(s.push(b"a").text, "a");
        assert_eq!(s.push(b"b").stopped, Some(0));
        let mut s = stream(&["你好"]);
        assert_eq!(s.push("x你".as_bytes()).text, "x");
        assert_eq!(s.push(&"好".as_bytes()[..2]).text, "");
        assert_eq!(s.push(&"好".as_bytes()[2..]).stopped, Some(0));
    }

    #[test]
    fn an_empty_stop_string_stops_nothing() {
        assert_eq!(feed(&mut stream(&[""]), [b"ab" as &[u8]]), ["ab", ""]);
    }

    proptest! {
        /// However the bytes are cut, the text is the lossy decoding of the whole, up to the first stop.
        #[test]
        fn cuts_do_not_matter(bytes in "[aé😀b#]{0,24}", extra in proptest::collection::vec(any::<u8>(), 0..4),
                              sizes in proptest::collection::vec(1usize..4, 0..64), stop in "[aé#]{1,3}") {
            let mut bytes = bytes.into_bytes();
            bytes.extend(extra);
            let whole = String::from_utf8_lossy(&bytes).into_owned();
            let mut s = TextStream::new(vec![stop.clone()]);
            let mut got = String::new();
            let mut rest = bytes.as_slice();
            let mut sizes = sizes.into_iter();
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(sizes.next().unwrap_or(1).min(rest.len()));
                got.push_str(s.push(piece).text);
                rest = after;
            }
            got.push_str(s.finish().text);
            let expected = whole.find(&stop).map_or(whole.as_str(), |at| &whole[..at]);
            prop_assert_eq!(got, expected);
        }
    }
}
