//! The chat as a person meets it: `st-tool run` at a terminal of its own.

use std::fs::Permissions;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use pty_process::blocking::{Pty, open};
use rustix::fs::{CWD, FileType, mknodat};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use serde_json::{Value as Json, json};
use st_gguf::{Array, Value};
use tempfile::{TempDir, tempdir};

use crate::common::repo;
use crate::program::{arg, names, program, run};
use crate::reject::altered;

/// What the program writes when it begins to wait for a line, and when it has one.
const WAITS: &str = "\x1b[?2004h";
const TAKES: &str = "\x1b[?2004l";
const CTRL_C: &[u8] = b"\x03";
const CTRL_D: &[u8] = b"\x04";

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
        // Ctrl-C throws away nothing that was written, so that texts can be compared.
        let mut modes = tcgetattr(&terminal).expect("settings");
        modes.local_modes |= LocalModes::NOFLSH;
        tcsetattr(&terminal, OptionalActions::Now, &modes).expect("set");
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

    /// Types a line; what it is answered, once the next one can be typed.
    fn say(&mut self, line: &str) -> String {
        self.press(format!("{line}\r").as_bytes());
        self.until(TAKES);
        self.until(WAITS).trim().to_owned()
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

fn messages(file: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(file).expect("read");
    let saved: Json = serde_json::from_str(&text).expect("JSON");
    let messages = saved["messages"].as_array().expect("messages");
    messages.iter().map(|message| message["content"].as_str().expect("text").to_owned()).collect()
}

#[test]
fn lines_are_answered_and_ctrl_d_leaves() {
    let mut chat = Chat::begin(&["tiny"]);
    assert_eq!(chat.say("What is 27 + 45?"), "27 + 45 = 72");
    let help = chat.say("/help");
    for part in ["/save FILE", "/load FILE", "Ctrl-C stops an answer."] {
        assert!(help.contains(part), "{help}");
    }
    // At the prompt it stops nothing and ends nothing.
    chat.press(CTRL_C);
    chat.until(WAITS);
    assert_eq!(chat.say("What is 27 + 45?"), "27 + 45 = 72");
    chat.press(CTRL_D);
    assert_eq!(chat.end(), 0);
}

#[test]
fn a_saved_conversation_goes_on_in_another_process() {
    let folder = tempdir().expect("a folder");
    let [half, whole, again] = ["half", "whole", "again"].map(|name| folder.path().join(name));
    let mut first = Chat::begin(&["tiny", "--system", "Be kind."]);
    let story = first.say("Tell me a story.");
    first.say(&format!("/save {}", arg(&half)));
    assert_eq!(messages(&half), ["Be kind.", "Tell me a story.", &story]);
    let more = first.say("What happened then?");
    first.say(&format!("/save {}", arg(&whole)));
    first.press(b"/quit\r");
    assert_eq!(first.end(), 0);

    let mut second = Chat::begin(&["tiny"]);
    second.say(&format!("/load {}", arg(&half)));
    assert_eq!(second.say("What happened then?"), more);
    second.say(&format!("/save {}", arg(&again)));
    assert_eq!(messages(&again), messages(&whole));
    // Without what came before, the same words are answered otherwise.
    second.say("/clear");
    assert_ne!(second.say("What happened then?"), more);
    second.press(CTRL_D);
    assert_eq!(second.end(), 0);
}

#[test]
fn ctrl_c_ends_the_answer_and_not_the_program() {
    // A model whose only end is a token that it never makes, so that no answer comes to its end first.
    let (_folder, endless) = altered(|metadata, _| {
        metadata.insert("tokenizer.ggml.eos_token_id", 3_u32);
        metadata.insert("tokenizer.ggml.eos_token_ids", vec![3_u32]);
        metadata.insert("smallthinker.context_length", 1_u32 << 16);
    });
    let story = run(["run", "tiny", "-q", "--temp", "0", "--raw", "-p", "Once"]).ok();
    let begins: String = story.chars().take(20).collect();
    let mut chat = Chat::begin(&[arg(&endless), "--raw"]);
    for _ in 0..2 {
        chat.press(b"Once\r");
        chat.until(TAKES);
        assert_eq!(chat.until(&begins).trim(), "");
        chat.press(CTRL_C);
        // The terminal shows the key as well.
        let rest = chat.until(WAITS).replace("^C", "");
        let shown = format!("{begins}{rest}");
        let (shown, story) = (shown.trim_end(), story.trim_end());
        assert!(story.starts_with(shown) || shown.starts_with(story), "{shown:?}");
        chat.say("/clear");
    }
    chat.press(CTRL_D);
    assert_eq!(chat.end(), 0);
}

/// A message whose answer never began is no part of the conversation.
#[test]
fn ctrl_c_while_the_prompt_is_read_forgets_the_message() {
    let (_folder, long) = altered(|metadata, _| {
        metadata.insert("smallthinker.context_length", 1_u32 << 17);
    });
    let folder = tempdir().expect("a folder");
    let [before, after] = ["before", "after"].map(|name| folder.path().join(name));
    let words = "Once upon a time there was a fox. ".repeat(8000);
    let saved = json!({"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": "Yes."}]});
    std::fs::write(&before, saved.to_string()).expect("written");
    let mut chat = Chat::begin(&[arg(&long)]);
    chat.say(&format!("/load {}", arg(&before)));
    chat.press(b"And then?\r");
    chat.until(TAKES);
    chat.press(CTRL_C);
    assert_eq!(chat.until(WAITS).replace("^C", "").trim(), "");
    chat.say(&format!("/save {}", arg(&after)));
    assert_eq!(messages(&after), messages(&before));
    chat.press(CTRL_D);
    assert_eq!(chat.end(), 0);
}

/// What is no saved conversation is neither read nor written over, and the chat goes on.
/// Texts that no context holds are refused before anything is made of them, and the chat goes on.
#[test]
fn conversations_that_no_context_holds_are_refused() {
    let folder = tempdir().expect("a folder");
    let [long, longer] = ["long.json", "longer.json"].map(|name| folder.path().join(name));
    let text = "Once upon a time. ".repeat(20_000);
    let messages = json!({"messages": [{"role": "user", "content": text}]});
    std::fs::write(&long, messages.to_string()).expect("written");
    std::fs::write(&longer, messages.to_string() + &" ".repeat(16 << 20)).expect("written");
    let system = "Once upon a time. ".repeat(5000);
    let mut chat = Chat::begin(&["-n", "2", "--system", &system]);
    assert!(chat.say(&format!("/load {}", arg(&long))).contains("the context holds"));
    assert!(chat.say(&format!("/load {}", arg(&longer))).contains("longer than 16.0 MiB"));
    assert!(chat.say("Hi").contains("the context holds"));
    chat.say("/system");
    assert!(!chat.say("Hi").contains("error"));
    chat.press(CTRL_D);
    assert_eq!(chat.end(), 0);
}

#[test]
fn only_conversations_are_saved_over_and_loaded() {
    let folder = tempdir().expect("a folder");
    let [fifo, text, saved, model] = ["fifo", "text", "saved", "m.gguf"].map(|name| folder.path().join(name));
    mknodat(CWD, &fifo, FileType::Fifo, 0o600.into(), 0).expect("a pipe");
    std::fs::write(&text, "mine").expect("written");
    std::fs::copy(repo("models/tiny/tiny-q4_0.gguf"), &model).expect("copied");
    let mut chat = Chat::begin(&["tiny"]);
    for command in ["/save", "/load"] {
        for (name, words) in [
            (arg(&fifo), "not a regular file"),
            ("/dev/zero", "not a regular file"),
            (arg(folder.path()), "not a regular file"),
            (arg(&text), "saved conversation"),
            (arg(&model), "saved conversation"),
        ] {
            let refused = chat.say(&format!("{command} {name}"));
            assert!(refused.contains("error") && refused.contains(words), "{command} {name}: {refused}");
        }
    }
    assert_eq!(std::fs::read(&text).expect("read"), b"mine");
    chat.say(&format!("/save {}", arg(&saved)));
    let private = Permissions::from_mode(0o600);
    std::fs::set_permissions(&saved, private.clone()).expect("set");
    chat.say(&format!("/save {}", arg(&saved)));
    assert_eq!(std::fs::metadata(&saved).expect("there").permissions().mode() & 0o777, private.mode());
    assert_eq!(names(folder.path()), ["fifo", "m.gguf", "saved", "text"]);
    chat.press(CTRL_D);
    assert_eq!(chat.end(), 0);
}

#[test]
fn what_is_no_command_is_a_message() {
    let mut chat = Chat::begin(&["tiny"]);
    for message in ["// What is 27 + 45?", " /quit now", "/ what", "/tmp/file is here"] {
        let answer = chat.say(message);
        assert!(!answer.is_empty() && !answer.contains("no command"), "{message}: {answer}");
    }
    let told = chat.say("/nonsense");
    assert!(told.contains("no command") && told.contains("with a space before it"), "{told}");
    chat.press(CTRL_D);
    assert_eq!(chat.end(), 0);
}

#[test]
fn a_byte_that_is_not_utf_8_costs_a_line_and_no_more() {
    let mut chat = Chat::begin(&["tiny"]);
    chat.say("Hello.");
    chat.press(b"caf\xe9\r");
    let told = chat.until(WAITS);
    assert!(told.contains("not UTF-8"), "{told}");
    assert_eq!(chat.say("/stats").lines().count(), 3);
    chat.press(CTRL_D);
    assert_eq!(chat.end(), 0);
}

/// The bundled model with another text for token `id`.
fn that_says(id: usize, text: &str) -> (TempDir, PathBuf) {
    // Bytes as the vocabulary writes them: those that are no visible character of Latin-1 have one from U+0100 on.
    let is_plain = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..);
    let letter = |byte: u8| match is_plain(byte) {
        true => char::from(byte),
        false => char::from_u32(256 + (0..byte).filter(|&b| !is_plain(b)).count() as u32).expect("a character"),
    };
    altered(|metadata, _| {
        let list = |key: &str| match metadata.get(key) {
            Some(Value::Array(Array::String(list))) => list.iter().map(str::to_owned).collect::<Vec<_>>(),
            other => panic!("{key}: {other:?}"),
        };
        let (mut tokens, mut merges) = (list("tokenizer.ggml.tokens"), list("tokenizer.ggml.merges"));
        let old = std::mem::replace(&mut tokens[id], text.bytes().map(letter).collect());
        merges.retain(|merge| merge.replace(' ', "") != old && !merge.split(' ').any(|part| part == old));
        for (key, list) in [("tokenizer.ggml.tokens", tokens), ("tokenizer.ggml.merges", merges)] {
            metadata.insert(key, Value::Array(Array::String(list.into_iter().collect())));
        }
    })
}

/// At a terminal what a model says is seen and not obeyed; elsewhere it is what it is.
#[test]
fn an_answer_steers_no_terminal() {
    const ASKS: &str = "Tell me a story.";
    let object = run(["run", "tiny", "-q", "--temp", "0", "-p", ASKS, "-n", "1", "--json"]).ok();
    let id = serde_json::from_str::<Json>(&object).expect("JSON")["ids"][0].as_u64().expect("an id");
    // The title, the screen, a control of 8 bits, one that turns text around.
    let says = "\x1b]0;t\x07\x1b[2J\u{9b}2J\u{202e}";
    let (_folder, model) = that_says(id as usize, says);
    let mut chat = Chat::begin(&[arg(&model), "-n", "1"]);
    let shown = chat.say(ASKS);
    assert_eq!(shown, "\u{fffd}]0;t\u{fffd}\u{fffd}[2J\u{fffd}2J\u{fffd}");
    chat.press(CTRL_D);
    assert_eq!(chat.end(), 0);

    let mut piped = program();
    let piped = piped.args(["run", arg(&model), "-q", "--temp", "0", "-n", "1", "-p", ASKS]);
    assert_eq!(piped.output().expect("it runs").stdout, format!("{says}\n").as_bytes());
    let object = piped.arg("--json").output().expect("it runs").stdout;
    assert_eq!(serde_json::from_slice::<Json>(&object).expect("JSON")["text"], says);
}

/// Where a text is typed before there is a model, too.
#[test]
#[cfg(target_os = "linux")]
fn ctrl_c_ends_the_wait_for_a_text() {
    for args in [&["run", "-p", "-"][..], &["run", "-f", "-"], &["perplexity", "tiny", "-f", "-"], &["cache-sim", "-"]]
    {
        let (terminal, programs_end) = open().expect("a terminal");
        let mut command = program();
        command.args(args);
        let mut program = pty_process::blocking::Command::from(command).spawn(programs_end).expect("it starts");
        (&terminal).write_all(b"# routing n_layers=2 n_experts=4 expert_bytes=4096\r").expect("it is typed");
        // Once it listens to the signal, whether it reads already or is about to.
        crate::program::patiently(|| {
            let status = std::fs::read_to_string(format!("/proc/{}/status", program.id())).expect("it runs");
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).expect("the signals it catches");
            u64::from_str_radix(caught.trim(), 16).expect("a mask") & 1 << (2 - 1) != 0
        });
        (&terminal).write_all(CTRL_C).expect("it is pressed");
        let ended = patiently(|wait| {
            thread::sleep(wait);
            program.try_wait().expect("it can be waited for")
        });
        assert_eq!(ended.expect("it ends").code(), Some(130), "{args:?}");
    }
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

#[test]
fn a_line_moves_while_an_answer_is_made_and_gives_its_row_back() {
    let mut chat = Chat::begin(&["tiny", "--stats=live"]);
    chat.terminal.resize(pty_process::Size::new(24, 100)).expect("resized");
    let told = chat.say("What is 27 + 45?");
    assert!(told.contains("tokens/s") && told.contains("memory"), "{told:?}");
    // The answer stands above the line, which is drawn between saved and restored places of the cursor.
    let mut above = String::new();
    for (i, part) in told.split("\u{1b}7").enumerate() {
        above += if i == 0 { part } else { part.split_once("\u{1b}8").map_or("", |(_, after)| after) };
    }
    assert!(above.contains("27 + 45 = 72"), "{above:?}");
    assert!(told.contains("\u{1b}[1;23r") && told.contains("\u{1b}[r"), "the rows come back: {told:?}");
    chat.say("/stats live");
    assert_eq!(chat.say("What is 27 + 45?").lines().next(), Some("27 + 45 = 72"));
    chat.press(CTRL_D);
    assert_eq!(chat.end(), 0);
}
