//! What stands between the program and a service: it sees the head of every request, and may change it,
//! answer itself, or cut the answer short.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A way to a service that keeps the requests.
pub struct Between {
    /// `http://127.0.0.1:PORT`
    pub url: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

/// What was asked.
#[derive(Clone, Debug)]
pub struct Request {
    /// The method and the path, and the range where there is one.
    pub line: String,
    /// Bytes that were sent with it.
    pub body: u64,
}

impl Request {
    /// What S3 calls it.
    pub fn kind(&self) -> &'static str {
        let (method, path) = self.line.split_once(' ').unwrap();
        match method {
            "GET" if path.contains("list-type=2") => "LIST",
            "GET" => "GET",
            "HEAD" => "HEAD",
            "PUT" => "PUT",
            "DELETE" => "DELETE",
            "POST" if path.contains("?delete") => "DELETE",
            _ => panic!("{self:?}"),
        }
    }
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// The service gets it with this head.
    Pass(String),
    /// The service does not get it; this is the answer, with its head.
    Answer(String),
    /// The service gets it with this head, and the connection ends after so many bytes of the answer.
    Cut(String, u64),
}

impl Act {
    /// An answer of S3 that is an error, whose connection goes on.
    pub fn error(status: &str, code: &str) -> Self {
        let body = format!("<Error><Code>{code}</Code><Message>As the test says</Message></Error>");
        let (len, of) = (body.len(), "Content-Type: application/xml");
        Self::Answer(format!("HTTP/1.1 {status}\r\n{of}\r\nContent-Length: {len}\r\n\r\n{body}"))
    }
}

/// What is done with a request of this head; it is asked for one after the other.
type Rule = Box<dyn FnMut(&Request, String) -> Act + Send>;

impl Between {
    /// One to a service at this URL, whose heads of requests `change` may change. It ends with the process.
    pub fn new(to: &str, change: fn(String) -> String) -> Self {
        Self::with_rule(to, move |_, head| Act::Pass(change(head)))
    }

    /// One to a service at this URL, which does with each request what `rule` says.
    pub fn with_rule(to: &str, rule: impl FnMut(&Request, String) -> Act + Send + 'static) -> Self {
        let rule: Arc<Mutex<Rule>> = Arc::new(Mutex::new(Box::new(rule)));
        let to = to.trim_start_matches("http://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(&to) else { return };
                let (mut answers, mut back) =
                    (server.try_clone().unwrap(), client.try_clone().unwrap());
                let left = Arc::new(AtomicU64::new(u64::MAX));
                let most = Arc::clone(&left);
                std::thread::spawn(move || {
                    let _ = answer(&mut answers, &mut back, &most);
                    let _ = back.shutdown(Shutdown::Both);
                });
                let (seen, rule) = (Arc::clone(&seen), Arc::clone(&rule));
                std::thread::spawn(move || {
                    let _ = pass(client, &server, &rule, &seen, &left);
                    let _ = server.shutdown(Shutdown::Write);
                });
            }
        });
        Self { url, requests }
    }

    /// One that changes nothing.
    pub fn counting(to: &str) -> Self {
        Self::new(to, |head| head)
    }

    /// What was asked since the last time, in order.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.requests.lock().unwrap())
    }
}

/// Passes on what one connection is answered, as far as it may.
fn answer(from: &mut TcpStream, to: &mut TcpStream, left: &AtomicU64) -> std::io::Result<()> {
    let mut buffer = [0; 16 * 1024];
    loop {
        let read = from.read(&mut buffer)?;
        let most = usize::try_from(left.load(Ordering::SeqCst)).unwrap();
        to.write_all(&buffer[..read.min(most)])?;
        if read == 0 || read >= most {
            return Ok(());
        }
        if most < usize::MAX {
            left.fetch_sub(read as u64, Ordering::SeqCst);
        }
    }
}

/// Passes on what one connection asks.
fn pass(
    client: TcpStream,
    mut server: &TcpStream,
    rule: &Mutex<Rule>,
    seen: &Mutex<Vec<Request>>,
    left: &AtomicU64,
) -> std::io::Result<()> {
    let mut back = client.try_clone()?;
    let mut client = BufReader::new(client);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if client.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        let value = |name: &str| {
            let mut lines = head.lines().filter_map(|line| line.split_once(':'));
            let found = lines.find(|(known, _)| known.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.trim().to_owned())
        };
        let line = head.lines().next().unwrap_or_default();
        let line = line.rsplit_once(' ').map_or(line, |(line, _)| line);
        let range = value("range").map_or(String::new(), |range| format!(" {range}"));
        let body = value("content-length").map_or(0, |len| len.parse().unwrap());
        let request = Request { line: format!("{line}{range}"), body };
        seen.lock().unwrap().push(request.clone());
        let act = (*rule.lock().unwrap())(&request, head);
        let mut body = client.by_ref().take(body);
        match act {
            Act::Answer(answer) => {
                std::io::copy(&mut body, &mut std::io::sink())?;
                back.write_all(answer.as_bytes())?;
                continue;
            }
            Act::Cut(head, after) => {
                left.store(after, Ordering::SeqCst);
                server.write_all(head.as_bytes())?;
            }
            Act::Pass(head) => {
                left.store(u64::MAX, Ordering::SeqCst);
                server.write_all(head.as_bytes())?;
            }
        }
        std::io::copy(&mut body, &mut server)?;
    }
}
