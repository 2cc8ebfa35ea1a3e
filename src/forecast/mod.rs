//! How fast a model will be on this machine, before it runs, and often before it is here.
//!
//! A forecast is made of what was measured (memory, disk, the time of a layer of that shape), of the memory plan, and of routing that was
//! recorded: how many experts a cache of that size would have held. It names what it is made of, and a range. Nothing in here decides
//! anything about a run.

mod machine;
pub(crate) mod made;
mod routing;
mod speed;
mod weights;

pub(crate) use machine::{Disk, LayerSpeed, Machine};
pub(crate) use routing::{Routing, builtin};
pub(crate) use speed::{Between, Forecast, LIVE, speed_at};
pub(crate) use weights::Weights;

use std::path::Path;

use st_model::Engine;

/// The forecast of a model that is loaded, by what is known of this machine; `None` where it was not measured.
pub(crate) fn known(home: &Path, weights: &Weights, engine: &Engine, threads: usize) -> Option<Forecast> {
    let machine = Machine::load(home, threads, engine.isa())?;
    let layer = machine.known_layer(&weights.shape)?;
    let routing = Routing::Curve(machine.routing.clone());
    Forecast::of(weights, engine.plan(), &machine, layer, &routing)
}
