//! The end of the process where there is no memory left: one error, as for everything else that fails.

use std::io::{self, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use st_sys::Allocator;

use crate::report::NO_MEMORY;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator::new(none_left);

/// Says so and ends the process. Nothing here may ask for memory, so this is not an error that is handed up.
#[allow(clippy::exit, reason = "who asked for memory takes no error")]
fn none_left(bytes: usize) {
    static TOLD: AtomicBool = AtomicBool::new(false);
    if TOLD.swap(true, Ordering::Relaxed) {
        // Another thread is about to end the process.
        loop {
            thread::park();
        }
    }
    // In one piece, between which nobody else can write.
    const ROOM: usize = 512;
    let mut text = [0; ROOM];
    let mut rest = &mut text[..];
    let _ = writeln!(rest, "error: not enough memory: {bytes} bytes more are not to be had\nhint: {NO_MEMORY}");
    let len = ROOM - rest.len();
    // With stderr gone there is nobody left to tell.
    let _ = io::stderr().lock().write_all(&text[..len]);
    std::process::exit(1);
}
