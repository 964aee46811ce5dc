//! What stands between the program and a service: it sees the head of every request, and may change it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
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

impl Between {
    /// One to a service at this URL, whose heads of requests `change` may change. It ends with the process.
    pub fn new(to: &str, change: fn(String) -> String) -> Self {
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
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut answers, &mut back);
                    let _ = back.shutdown(Shutdown::Both);
                });
                let seen = Arc::clone(&seen);
                std::thread::spawn(move || {
                    let _ = pass(client, &server, change, &seen);
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

/// Passes on what one connection asks.
fn pass(
    client: TcpStream,
    mut server: &TcpStream,
    change: fn(String) -> String,
    seen: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
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
        seen.lock().unwrap().push(Request { line: format!("{line}{range}"), body });
        server.write_all(change(head).as_bytes())?;
        std::io::copy(&mut client.by_ref().take(body), &mut server)?;
    }
}
