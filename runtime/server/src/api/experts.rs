//! What the machine does, as it does it: an event a quarter of a second, for the page.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use hyper::body::{Bytes, Frame};
use serde_json::{Value, json};
use st_model::Engine;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::answers::event_stream;
use crate::app::App;
use crate::error::Form;

/// Between two events.
const STEP: Duration = Duration::from_millis(250);

/// `GET /experts`: server-sent events, each with the figures as they stand and the experts that were used and read since the one
/// before.
pub(crate) async fn handle(State(app): State<Arc<App>>) -> Response {
    let engine = match app.engine() {
        Ok(engine) => Arc::clone(engine),
        Err(error) => return error.response(Form::OpenAi),
    };
    let mut ticks = interval(STEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let before = engine.expert_activity();
    event_stream(Body::new(Steps { app, engine, ticks, began: Instant::now(), before }))
}

/// The events, made when the client takes them.
struct Steps {
    app: Arc<App>,
    engine: Arc<Engine>,
    ticks: Interval,
    began: Instant,
    /// Uses and reads as they were told.
    before: (Vec<u32>, Vec<u32>),
}

impl Steps {
    fn step(&mut self) -> Value {
        let (app, engine) = (&self.app, &self.engine);
        let now = engine.expert_activity();
        let more = |now: &[u32], before: &[u32]| -> Vec<(usize, u32)> {
            let more = now.iter().zip(before).map(|(now, before)| now.wrapping_sub(*before)).enumerate();
            more.filter(|&(_, times)| times > 0).collect()
        };
        let used = more(&now.0, &self.before.0);
        let read: Vec<usize> = more(&now.1, &self.before.1).into_iter().map(|(cell, _)| cell).collect();
        let (store, config) = (engine.store_stats(), engine.config());
        let step = json!({
            "ms": self.began.elapsed().as_millis() as u64,
            "layers": config.n_layers,
            "experts": config.n_experts,
            "used": used,
            "read": read,
            "made": app.metrics.made_tokens.get(),
            "prompt": app.metrics.read_tokens.get(),
            "lookups": store.lookups,
            "hits": store.hits,
            "bytes_read": store.bytes_read,
            "resident": st_sys::resident(),
            "budget": engine.plan().budget,
            "busy": app.slots.busy(),
            "parallel": app.settings.parallel,
            "waiting": app.queue.len(),
        });
        self.before = now;
        step
    }
}

impl hyper::body::Body for Steps {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.ticks.poll_tick(cx).is_pending() {
            return Poll::Pending;
        }
        if self.app.is_ending() {
            return Poll::Ready(None);
        }
        let event = format!("data: {}\n\n", self.step());
        Poll::Ready(Some(Ok(Frame::data(Bytes::from(event)))))
    }
}
