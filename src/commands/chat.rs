//! The chat: lines typed at a terminal, answers, and the commands that begin with `/`.

use std::io::{self, BufReader, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use rustyline::Editor;
use rustyline::config::{Behavior, Config};
use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use st_gguf::{FileSource, Kind, OutputFile, ReadAt as _};
use st_model::chat::Message;
use st_model::{Chat, FinishReason, GenerateStats, ModelError, Prompt};

use super::answer::Out;
use super::stats;
use crate::context::Context;
use crate::report::{self, Interrupted, is_closed_output};
use crate::size::show_size;
use crate::text::{MAX_PROMPT, MORE_THAN_A_CONTEXT};

const HELP: &str = "\
/help          this list
/clear         forget the conversation
/stats         speed and memory of the latest answer
/stats live    the same in a line that moves while an answer is made; once more ends that
/system TEXT   set the system message, for all answers from now on
/save FILE     write the conversation to FILE
/load FILE     go on with a conversation from FILE
/quit          leave, as does Ctrl-D
A message that begins with such a word needs a space before it.
Ctrl-C stops an answer.";

/// A conversation as it is saved.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    messages: Vec<Message>,
}

/// What a typed line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Nothing,
    Say(&'a str),
    Help,
    Clear,
    Stats,
    Live,
    System(&'a str),
    Save(&'a str),
    Load(&'a str),
    Quit,
    Unknown(&'a str),
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Self {
        let said = line.trim();
        if said.is_empty() {
            return Self::Nothing;
        }
        let (command, argument) = line.trim_end().split_once(char::is_whitespace).unwrap_or((line.trim_end(), ""));
        // A command is a slash and a word; code, comments and paths are none, and neither is what a space stands before.
        let is_word = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphabetic());
        if !command.strip_prefix('/').is_some_and(is_word) {
            return Self::Say(said);
        }
        match (command, argument.trim()) {
            ("/help", "") => Self::Help,
            ("/clear", "") => Self::Clear,
            ("/stats", "") => Self::Stats,
            ("/stats", "live") => Self::Live,
            ("/system", text) => Self::System(text),
            ("/save", file) if !file.is_empty() => Self::Save(file),
            ("/load", file) if !file.is_empty() => Self::Load(file),
            ("/quit" | "/exit", "") => Self::Quit,
            _ => Self::Unknown(said),
        }
    }
}

/// A conversation at a terminal.
pub(crate) struct Dialog<'a> {
    chat: &'a mut Chat,
    /// Every line is a text to continue.
    raw: bool,
    out: Out<'a>,
    context: &'a Context,
    latest: Option<GenerateStats>,
}

impl<'a> Dialog<'a> {
    /// Goes on with `chat`; with `raw` every line is a text to continue.
    pub(crate) fn new(chat: &'a mut Chat, raw: bool, out: Out<'a>) -> anyhow::Result<Self> {
        let engine = chat.session().engine();
        engine.tokenizer().ok_or(ModelError::NoTokenizer)?;
        if !raw {
            engine.chat_template().map_err(ModelError::from)?.ok_or(ModelError::NoChatTemplate)?;
        }
        Ok(Self { chat, raw, context: out.context, out, latest: None })
    }

    /// Answers lines until the person leaves.
    pub(crate) fn run(mut self) -> anyhow::Result<ExitCode> {
        // The prompt goes to the terminal even where stdout is a file, so that the file holds answers only.
        let config = Config::builder().behavior(Behavior::PreferTerm).auto_add_history(true).build();
        let mut editor: Editor<(), MemHistory> = Editor::with_history(config, MemHistory::new())?;
        self.context.ui.note("/help lists what can be typed besides messages; Ctrl-D leaves");
        loop {
            let Some(line) = self.context.interrupt.while_idle(|| editor.readline("> ")) else {
                return Err(Interrupted.into());
            };
            match line {
                Ok(line) => {
                    if self.act(&line)?.is_none() {
                        return Ok(ExitCode::SUCCESS);
                    }
                }
                Err(ReadlineError::Interrupted) => self.context.ui.note("Ctrl-D leaves"),
                Err(ReadlineError::Eof) => return Ok(ExitCode::SUCCESS),
                Err(ReadlineError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
                    // The rest of what was pasted is no line of its own.
                    st_sys::discard_typed();
                    self.context
                        .ui
                        .say("a byte that is not UTF-8: the line is dropped (is the terminal set to UTF-8?)");
                }
                Err(error) => return Err(error).context("cannot read from the terminal"),
            }
            if self.context.interrupt.terminating() {
                return Err(Interrupted.into());
            }
            self.context.interrupt.clear();
        }
    }

    /// Does what a line asks for; `None` where it asks to leave. What fails is shown, and the chat goes on.
    fn act(&mut self, line: &str) -> anyhow::Result<Option<()>> {
        let ui = self.context.ui;
        let done = match Line::parse(line) {
            Line::Nothing => Ok(()),
            Line::Quit => return Ok(None),
            Line::Say(text) => self.say(text),
            Line::Help => {
                ui.say(HELP);
                Ok(())
            }
            Line::Clear => {
                self.chat.clear();
                Ok(())
            }
            Line::Stats => {
                match &self.latest {
                    Some(latest) => ui.say(stats::lines(latest, self.chat.session().engine())),
                    None => ui.say("there is no answer yet"),
                }
                Ok(())
            }
            Line::Live => {
                self.out.style.live = !self.out.style.live;
                Ok(())
            }
            Line::System(text) => {
                self.chat.set_system(Some(text).filter(|text| !text.is_empty()));
                Ok(())
            }
            Line::Save(file) => self.save(Path::new(file)),
            Line::Load(file) => self.load(Path::new(file)),
            Line::Unknown(line) => {
                ui.say(format_args!(
                    "{line:?} is no command; /help lists them; with a space before it, it is a message"
                ));
                Ok(())
            }
        };
        match done {
            Err(error) if is_closed_output(&error) => Err(error),
            Err(error) => {
                report::print(&error, ui.color);
                Ok(Some(()))
            }
            Ok(()) => Ok(Some(())),
        }
    }

    fn say(&mut self, text: &str) -> anyhow::Result<()> {
        let prompt = if self.raw { Prompt::Text(text) } else { Prompt::Message(text) };
        let answer = self.out.answer(self.chat, prompt)?;
        self.latest = Some(answer.stats);
        let session = self.chat.session();
        if answer.finish_reason == FinishReason::Length && session.len() == session.ctx() {
            self.context.ui.note("note: the context is full; /clear begins anew");
        }
        if answer.is_cut_off() && answer.text.is_empty() {
            self.context.ui.note("stopped before an answer began: the message is forgotten");
        }
        Ok(())
    }

    fn save(&self, path: &Path) -> anyhow::Result<()> {
        let saved = Saved { messages: self.chat.messages().to_vec() };
        let mut json = serde_json::to_vec_pretty(&saved)?;
        json.push(b'\n');
        write_whole(path, &json)?;
        self.context.ui.note(format_args!("{}: {} messages", path.display(), saved.messages.len()));
        Ok(())
    }

    fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        let messages = read_saved(path)?.messages;
        self.chat.session().engine().check_texts(messages.iter().map(|message| message.content.as_str()))?;
        self.context.ui.note(format_args!("{}: {} messages", path.display(), messages.len()));
        *self.chat.messages_mut() = messages;
        Ok(())
    }
}

/// What a saved conversation is known by; the messages are not kept.
const CONVERSATION: Kind = Kind {
    name: "a saved conversation",
    recognizes: |bytes| {
        #[derive(Deserialize)]
        struct Any {
            #[serde(rename = "messages")]
            _messages: Vec<IgnoredAny>,
        }
        match serde_json::from_reader::<_, Any>(BufReader::new(bytes)) {
            Err(error) if error.is_io() => Err(error.into()),
            read => Ok(read.is_ok()),
        }
    },
};

fn read_saved(path: &Path) -> anyhow::Result<Saved> {
    let file = FileSource::open(path)?;
    ensure!(
        file.len() <= MAX_PROMPT,
        "{} is longer than {}, {MORE_THAN_A_CONTEXT}",
        path.display(),
        show_size(MAX_PROMPT)
    );
    // Piece by piece, so that what is no conversation is not read to its end.
    serde_json::from_reader(BufReader::new(file.file()))
        .with_context(|| format!("{} is no saved conversation", path.display()))
}

fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut file = OutputFile::create(path, CONVERSATION, true)?;
    file.write_all(bytes).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(file.finish()?)
}

#[cfg(test)]
mod tests {
    use st_model::chat::Role;

    use super::*;

    #[test]
    fn lines_are_messages_or_commands() {
        for (line, parsed) in [
            ("  ", Line::Nothing),
            (" hello /help ", Line::Say("hello /help")),
            ("// adds\nfn add() {}", Line::Say("// adds\nfn add() {}")),
            ("/usr/bin is full", Line::Say("/usr/bin is full")),
            ("/* a */", Line::Say("/* a */")),
            ("/", Line::Say("/")),
            (" /help", Line::Say("/help")),
            ("/help ", Line::Help),
            ("/system Be brief,\nand kind.", Line::System("Be brief,\nand kind.")),
            ("/help", Line::Help),
            ("/clear", Line::Clear),
            ("/clear now", Line::Unknown("/clear now")),
            ("/system  Be brief. ", Line::System("Be brief.")),
            ("/system", Line::System("")),
            ("/save a b.json", Line::Save("a b.json")),
            ("/save", Line::Unknown("/save")),
            ("/quit", Line::Quit),
            ("/nonsense", Line::Unknown("/nonsense")),
        ] {
            assert_eq!(Line::parse(line), parsed, "{line:?}");
        }
    }

    #[test]
    fn conversations_are_written_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("chat.json");
        let saved = Saved { messages: vec![Message::new(Role::User, "hé")] };
        write_whole(&path, &serde_json::to_vec(&saved).expect("JSON")).expect("written");
        assert_eq!(read_saved(&path).expect("read").messages, saved.messages);
        assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 1);
        write_whole(&path, b"{}").expect("replaced");
        assert!(read_saved(&path).is_err() && write_whole(&path, b"{}").is_err(), "what is no conversation");
    }
}
