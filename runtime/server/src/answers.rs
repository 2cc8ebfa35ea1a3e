//! The events of the jobs of one request: taken in as one, waited for, or sent on as they come.

use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use hyper::body::{Bytes, Frame};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::error::ApiError;
use crate::job::{Event, Failure, Finished, JobHandle, Proof, Token};

/// The jobs of one request. Dropped, they end.
pub(crate) struct Answers {
    jobs: Vec<Option<JobHandle>>,
    /// Which is asked first.
    turn: usize,
}

impl Answers {
    pub(crate) fn new(jobs: Vec<JobHandle>) -> Self {
        Self { jobs: jobs.into_iter().map(Some).collect(), turn: 0 }
    }

    /// The next event of any of the jobs, with the job's index; `None` once all have ended.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<(usize, Event)>> {
        let n = self.jobs.len();
        let mut all_ended = true;
        for index in (0..n).map(|i| (self.turn + i) % n) {
            let Some(job) = &mut self.jobs[index] else { continue };
            all_ended = false;
            let Poll::Ready(event) = job.poll(cx) else { continue };
            self.turn = index + 1;
            // Without a last event, the engine's thread is no more.
            let event = event.unwrap_or(Event::Failed(Failure::Ending));
            if matches!(event, Event::Finished(_) | Event::Failed(_)) {
                self.jobs[index] = None;
            }
            return Poll::Ready(Some((index, event)));
        }
        if all_ended { Poll::Ready(None) } else { Poll::Pending }
    }

    /// Waits for all answers.
    ///
    /// # Errors
    /// Where one fails; the others end.
    pub(crate) async fn collect(mut self) -> Result<Vec<Whole>, ApiError> {
        let mut wholes: Vec<Whole> = self.jobs.iter().map(|_| Whole::default()).collect();
        while let Some((index, event)) = poll_fn(|cx| self.poll(cx)).await {
            let whole = &mut wholes[index];
            match event {
                Event::Begun => {}
                Event::Piece(piece) => {
                    whole.text.push_str(&piece.text);
                    whole.tokens.extend(piece.tokens);
                }
                Event::Proven(proof) => whole.proof = Some(proof),
                Event::Finished(finished) => whole.finished = Some(finished),
                Event::Failed(failure) => return Err(failure.into()),
            }
        }
        Ok(wholes)
    }
}

/// A whole answer.
#[derive(Debug, Default)]
pub(crate) struct Whole {
    pub(crate) text: String,
    /// Where logprobs were asked for.
    pub(crate) tokens: Vec<Token>,
    /// Where a receipt was asked for.
    pub(crate) proof: Option<Box<Proof>>,
    /// How it ended; there unless a job ended without a word.
    pub(crate) finished: Option<Finished>,
}

/// Makes an API's events of the events of jobs.
pub(crate) trait Encoder: Send + 'static {
    /// What comes first.
    fn begin(&mut self, out: &mut Events);
    /// What follows from an event of the job of that index; failures come to [`Encoder::fail`] instead.
    fn event(&mut self, index: usize, event: Event, out: &mut Events);
    /// What comes last, where all has gone well.
    fn end(&mut self, out: &mut Events);
    /// What comes last otherwise.
    fn fail(&mut self, error: &ApiError, out: &mut Events);
}

/// Server-sent events that wait to be sent.
#[derive(Default)]
pub(crate) struct Events(String);

impl Events {
    /// An event without a name.
    pub(crate) fn data(&mut self, data: impl std::fmt::Display) {
        use std::fmt::Write as _;
        let _ = write!(self.0, "data: {data}\n\n");
    }

    /// An event with a name.
    pub(crate) fn named(&mut self, name: &str, data: impl std::fmt::Display) {
        self.0 += &format!("event: {name}\n");
        self.data(data);
    }
}

/// How long nothing may come before a comment does, so that nobody in between takes the connection for dead.
const SILENCE: Duration = Duration::from_secs(1);

/// A body of server-sent events.
struct Stream<E> {
    answers: Answers,
    encoder: E,
    comment: Pin<Box<Sleep>>,
    begun: bool,
    ended: bool,
}

/// A response that sends the events of `answers` on as `encoder` puts them.
pub(crate) fn stream(answers: Answers, encoder: impl Encoder + Unpin) -> Response {
    let comment = Box::pin(sleep_until(Instant::now() + SILENCE));
    event_stream(Body::new(Stream { answers, encoder, comment, begun: false, ended: false }))
}

/// A response of server-sent events.
pub(crate) fn event_stream(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would keep events back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl<E: Encoder> Stream<E> {
    /// The next events to be sent, as few as there are: what a client does not take waits with the jobs.
    fn next(&mut self, cx: &mut Context<'_>) -> Poll<Option<String>> {
        let mut out = Events::default();
        if !std::mem::replace(&mut self.begun, true) {
            self.encoder.begin(&mut out);
        }
        while out.0.is_empty() && !self.ended {
            match self.answers.poll(cx) {
                Poll::Pending => break,
                Poll::Ready(Some((_, Event::Failed(failure)))) => {
                    self.encoder.fail(&failure.into(), &mut out);
                    self.answers.jobs.clear();
                    self.ended = true;
                }
                Poll::Ready(Some((index, event))) => self.encoder.event(index, event, &mut out),
                Poll::Ready(None) => {
                    self.encoder.end(&mut out);
                    self.ended = true;
                }
            }
        }
        if out.0.is_empty() && !self.ended {
            if self.comment.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            out.0.push_str(": at work\n\n");
        }
        self.comment.as_mut().reset(Instant::now() + SILENCE);
        Poll::Ready(Some(out.0).filter(|out| !out.is_empty()))
    }
}

impl<E: Encoder + Unpin> hyper::body::Body for Stream<E> {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.next(cx).map(|out| out.map(|out| Ok(Frame::data(Bytes::from(out)))))
    }
}
