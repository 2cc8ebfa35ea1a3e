//! Some bytes of a file, asked for by their place: headers of weights are read so, and nothing is stored.

use std::io::{self, Read as _};
use std::ops::Range;
use std::time::Duration;

use ureq::http::{StatusCode, header};

use crate::HubError;
use crate::http::{Answer, Client, Failure, Subject, bad_response};

impl Client<'_> {
    /// The bytes `range` of a body, attempted as often as the retry policy says. No more is read than those, whatever the
    /// server sends.
    pub(crate) fn get_part(
        &self,
        url: &str,
        range: &Range<u64>,
        subject: &Subject<'_>,
        notify: &dyn Fn(Duration, &HubError),
    ) -> Result<Vec<u8>, HubError> {
        let mut attempt = 0;
        loop {
            let from = Some(range.start).filter(|from| *from > 0);
            match self.get(url, from, subject).and_then(|answer| self.read_part(answer, range)) {
                Ok(body) => return Ok(body),
                Err(failure) => self.wait_to_retry(failure, &mut attempt, notify)?,
            }
        }
    }

    fn read_part(&self, answer: Answer, range: &Range<u64>) -> Result<Vec<u8>, Failure> {
        let skip = match answer.response.status() {
            // A server that ignores ranges sends all.
            StatusCode::OK => range.start,
            StatusCode::PARTIAL_CONTENT => {
                let stated = answer
                    .response
                    .headers()
                    .get(header::CONTENT_RANGE)
                    .and_then(|value| parse_content_range(value.to_str().ok()?));
                match stated {
                    Some((first, ..)) if first <= range.start => range.start - first,
                    _ => return Err(bad_response(&answer.url, "another part than was asked for").into()),
                }
            }
            _ => return Err(bad_response(&answer.url, "no part of the file").into()),
        };
        let wanted = range.end - range.start;
        let mut reader = answer.response.into_body().into_reader();
        let failed = |at: u64, e| self.read_failure(&answer.host, &answer.url, at, e);
        io::copy(&mut (&mut reader).take(skip), &mut io::sink()).map_err(|e| failed(0, e))?;
        let mut body = Vec::new();
        reader.take(wanted).read_to_end(&mut body).map_err(|e| failed(range.start, e))?;
        match body.len() as u64 == wanted {
            true => Ok(body),
            false => Err(failed(range.start + body.len() as u64, io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

/// First byte, last byte and total of `bytes first-last/total`.
pub(crate) fn parse_content_range(value: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes")?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last && last < u64::MAX).then_some((first, last, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_parse_and_nonsense_does_not() {
        assert_eq!(parse_content_range("bytes 5-9/10"), Some((5, 9, Some(10))));
        assert_eq!(parse_content_range("bytes 0-0/*"), Some((0, 0, None)));
        for bad in ["bytes */10", "5-9/10", "bytes 9-5/10", "bytes 0-18446744073709551615/*", "bytes -1-2/3", ""] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }
}
