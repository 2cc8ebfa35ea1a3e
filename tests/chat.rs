//! The chat as a person meets it: `st-tool run` at a terminal of its own.

use std::io::{Read as _, Write as _};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use pty_process::blocking::{Pty, open};
use rustix::termios::tcgetattr;

use crate::program::program;

/// What the program writes when it begins to wait for a line, and when it has one.
const WAITS: &str = "\x1b[?2004h";
const TAKES: &str = "\x1b[?2004l";

/// A chat, and the terminal that it runs at.
struct Chat {
    terminal: Arc<Pty>,
    program: Child,
    /// What appears on the terminal, piece by piece.
    appears: Receiver<Vec<u8>>,
    /// What has appeared and was not looked at yet.
    ahead: Vec<u8>,
    /// The terminal's settings before the program began.
    settings: String,
}

impl Chat {
    /// Begins a chat, and waits until it waits for a line.
    fn begin(args: &[&str]) -> Self {
        let (terminal, programs_end) = open().expect("a terminal");
        let (settings, terminal) = (settings(&terminal), Arc::new(terminal));
        let mut command = program();
        command.args(["run", "-q", "--temp", "0"]).args(args).env("TERM", "xterm");
        let program = pty_process::blocking::Command::from(command).spawn(programs_end).expect("the program starts");
        let (appeared, appears) = channel();
        let screen = Arc::clone(&terminal);
        // Ends when the program has, since then there is nothing more to read, or with the test.
        thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(n @ 1..) = (&*screen).read(&mut piece) {
                if appeared.send(piece[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        let mut chat = Self { terminal, program, appears, ahead: Vec::new(), settings };
        chat.until(WAITS);
        chat
    }

    fn press(&self, keys: &[u8]) {
        (&*self.terminal).write_all(keys).expect("it is typed");
    }

    /// What appears before `mark` does.
    fn until(&mut self, mark: &str) -> String {
        loop {
            let found = self.ahead.windows(mark.len()).position(|bytes| bytes == mark.as_bytes());
            if let Some(at) = found {
                let shown: Vec<u8> = self.ahead.drain(..at + mark.len()).take(at).collect();
                return String::from_utf8(shown).expect("UTF-8").replace("\r\n", "\n");
            }
            let piece = patiently(|wait| match self.appears.recv_timeout(wait) {
                Ok(piece) => Some(piece),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => panic!("it ended before {mark:?}: {:?}", self.shown()),
            });
            let piece = piece.unwrap_or_else(|| panic!("there is no {mark:?}: {:?}", self.shown()));
            self.ahead.extend(piece);
        }
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(&self.ahead).into_owned()
    }

    /// How the program ends, which it does by itself.
    fn end(mut self) -> i32 {
        let ended = patiently(|wait| {
            let ended = self.program.try_wait().expect("it can be waited for");
            if ended.is_none() {
                thread::sleep(wait);
            }
            ended
        });
        let ended = ended.unwrap_or_else(|| panic!("it goes on: {:?}", self.shown()));
        assert_eq!(settings(&self.terminal), self.settings, "the terminal is left as it was");
        ended.code().unwrap_or_else(|| panic!("ended by a signal: {ended}"))
    }
}

impl Drop for Chat {
    fn drop(&mut self) {
        // Where a test failed; it has ended otherwise.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// Asks `look`, which waits up to as long as it is told, until there is something; `None` if that never comes. In short
/// steps, so that a pause of the whole machine counts as one.
fn patiently<T>(mut look: impl FnMut(Duration) -> Option<T>) -> Option<T> {
    let steps = 60_000;
    (0..steps).find_map(|_| look(Duration::from_millis(5)))
}

/// The settings of a terminal, for comparing.
fn settings(terminal: &Pty) -> String {
    format!("{:?}", tcgetattr(terminal).expect("settings"))
}

fn send(signal: &str, chat: &Chat) {
    let sent = Command::new("kill").args([format!("-{signal}"), chat.program.id().to_string()]).status();
    assert!(sent.expect("kill runs").success());
}

/// With half a line typed; [`Chat::end`] compares the settings.
#[test]
fn a_process_that_is_told_to_end_gives_the_terminal_back() {
    for (signal, status) in [("TERM", 143), ("HUP", 129)] {
        let mut chat = Chat::begin(&["tiny"]);
        chat.press(b"T");
        chat.until("T");
        assert_ne!(settings(&chat.terminal), chat.settings, "a line is being edited");
        send(signal, &chat);
        chat.until(TAKES);
        assert_eq!(chat.end(), status, "{signal}");
    }
}
