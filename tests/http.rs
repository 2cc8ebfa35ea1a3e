//! A server of the program and a client that speaks HTTP/1.1 by hand, so that it can also speak it badly.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::program::program;

/// The program as a server, ended with the test.
pub(crate) struct Server {
    pub(crate) child: Child,
    /// `127.0.0.1:PORT`.
    pub(crate) address: String,
    /// What it has written to stderr.
    pub(crate) notes: Arc<Mutex<String>>,
}

impl Server {
    /// Serves the bundled model, and waits until it answers.
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::of(program().args(["serve", "tiny", "--port", "0"]).args(args))
    }

    /// A prepared command, waited for until it answers.
    pub(crate) fn of(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
        let notes = Arc::new(Mutex::new(String::new()));
        let (stderr, kept) = (child.stderr.take().expect("piped"), Arc::clone(&notes));
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                *kept.lock().unwrap_or_else(PoisonError::into_inner) += &format!("{line}\n");
            }
        });
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("read");
        let address = line.trim().strip_prefix("http://").map(str::to_owned);
        let said = || notes.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let address = address.unwrap_or_else(|| panic!("no address: {line:?}\n{}", said()));
        Self { child, address, notes }
    }

    /// Connects.
    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).expect("connected");
        stream.set_read_timeout(Some(Duration::from_secs(300))).expect("set");
        stream.set_nodelay(true).expect("set");
        stream
    }

    /// Sends a request whose head has `headers` besides the usual ones, and reads its answer.
    pub(crate) fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Answer {
        let mut stream = self.connect();
        stream.write_all(&request(method, path, headers, body)).expect("sent");
        Answer::read(&mut BufReader::new(stream))
    }

    /// Posts JSON.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, "content-type: application/json\r\n", body.to_string().as_bytes())
    }

    /// Posts JSON to an address that takes it.
    #[track_caller]
    pub(crate) fn ask(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{body}\n{}", answer.text());
        answer.json()
    }

    /// Gets an address.
    pub(crate) fn get(&self, path: &str) -> Answer {
        self.send("GET", path, "", b"")
    }

    /// A number of `/metrics`.
    #[track_caller]
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let value = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        value.unwrap_or_else(|| panic!("{name} is not in\n{text}")).parse().expect("a number")
    }

    /// Opens a stream, of which the head is read.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Stream {
        self.stream_with("POST", path, body.to_string().as_bytes())
    }

    /// Opens a stream that nothing is sent to.
    pub(crate) fn stream_of(&self, method: &str, path: &str) -> Stream {
        self.stream_with(method, path, b"")
    }

    fn stream_with(&self, method: &str, path: &str, body: &[u8]) -> Stream {
        let mut stream = self.connect();
        let head = "content-type: application/json\r\n";
        stream.write_all(&request(method, path, head, body)).expect("sent");
        let mut reader = BufReader::new(stream);
        let (status, headers) = read_head(&mut reader);
        assert!(status == 200 && headers.contains("text/event-stream"), "{status} {headers}");
        Stream { reader, ahead: Vec::new() }
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([format!("-{signal}"), self.child.id().to_string()]).status();
        assert!(status.expect("kill runs").success());
    }

    /// What it wrote to stderr so far.
    pub(crate) fn said(&self) -> String {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let said = self.said();
        if !thread::panicking() {
            assert!(!said.contains("panicked"), "{said}");
        }
    }
}

/// A request as it is sent.
pub(crate) fn request(method: &str, path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let host = if headers.to_lowercase().contains("host:") { "" } else { "host: localhost\r\n" };
    let length = match (method, headers.to_lowercase().contains("content-length:")) {
        ("GET", _) | (_, true) => String::new(),
        _ => format!("content-length: {}\r\n", body.len()),
    };
    let mut bytes = format!("{method} {path} HTTP/1.1\r\n{host}{headers}{length}\r\n").into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// In lower case.
    pub(crate) headers: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// Reads one response.
    pub(crate) fn read(reader: &mut BufReader<TcpStream>) -> Self {
        let (status, headers) = read_head(reader);
        let length = headers.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = Vec::new();
        match length.map(|length| length.parse::<usize>().expect("a length")) {
            Some(length) => {
                body.resize(length, 0);
                reader.read_exact(&mut body).expect("a body");
            }
            None if headers.contains("transfer-encoding: chunked") => {
                while let Some(chunk) = read_chunk(reader) {
                    body.extend(chunk);
                }
            }
            None => {}
        }
        Self { status, headers, body }
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }

    /// It is an error of that status that names that field.
    #[track_caller]
    pub(crate) fn fails(&self, status: u16, param: Option<&str>) -> Value {
        assert_eq!(self.status, status, "{}", self.text());
        let error = self.json()["error"].clone();
        assert!(error["message"].is_string() && error["type"].is_string(), "{error}");
        assert_eq!(error["param"].as_str(), param, "{error}");
        error
    }
}

fn read_head(reader: &mut BufReader<TcpStream>) -> (u16, String) {
    let mut head = String::new();
    loop {
        let mut line = String::new();
        let n = reader.read_line(&mut line).expect("a head");
        assert!(n > 0, "the connection ended in the head: {head:?}");
        if line.trim().is_empty() {
            break;
        }
        head += &line.to_lowercase();
    }
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("no status: {head}")), head.replace("\r\n", "\n"))
}

fn read_chunk(reader: &mut BufReader<TcpStream>) -> Option<Vec<u8>> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let length = usize::from_str_radix(line.trim(), 16).ok()?;
    let mut chunk = vec![0; length + 2];
    reader.read_exact(&mut chunk).ok()?;
    chunk.truncate(length);
    if chunk.is_empty() { None } else { Some(chunk) }
}

/// A stream of events that is read as it comes.
pub(crate) struct Stream {
    reader: BufReader<TcpStream>,
    ahead: Vec<u8>,
}

impl Stream {
    /// The next event or comment, without the empty line after it; `None` at the end.
    pub(crate) fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.ahead.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = self.ahead.drain(..end + 2).collect();
                return Some(String::from_utf8(event).expect("UTF-8").trim_end().to_owned());
            }
            self.ahead.extend(read_chunk(&mut self.reader)?);
        }
    }

    /// All data to the end, `[DONE]` checked and left out.
    #[track_caller]
    pub(crate) fn all(mut self) -> Vec<Value> {
        let mut data = Vec::new();
        let mut done = false;
        while let Some(event) = self.next() {
            assert!(!done, "an event after the last: {event}");
            let Some(json) = event.strip_prefix("data: ") else { continue };
            match json {
                "[DONE]" => done = true,
                json => data.push(serde_json::from_str(json).expect("JSON")),
            }
        }
        assert!(done, "no last event: {data:?}");
        data
    }
}
