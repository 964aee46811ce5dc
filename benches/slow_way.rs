//! A slow way to a service for `scripts/bench.sh`: so many MiB a second in each direction, for all connections
//! together, and so many milliseconds until an answer is there. It prints where it listens, and goes on until it is ended.
//!
//! `slow_way` HOST:PORT MIB/S MILLISECONDS

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use anyhow::bail;

/// Bytes that are passed on at once.
const PIECE: usize = 64 * 1024;

/// Pieces of one connection that are on the way, at most.
const ON_THE_WAY: usize = 256;

/// A direction: when the next byte may pass.
struct Lane {
    bytes_per_second: f64,
    free: Mutex<Instant>,
}

impl Lane {
    fn new(mib: f64) -> Arc<Self> {
        Arc::new(Self {
            bytes_per_second: mib * f64::from(1 << 20),
            free: Mutex::new(Instant::now()),
        })
    }

    /// Waits until so many bytes have passed.
    #[allow(clippy::cast_precision_loss)]
    fn pass(&self, bytes: usize) {
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
        let until = {
            let mut free = self.free.lock().expect("nobody panics");
            *free = (*free).max(Instant::now()) + takes;
            *free
        };
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
    }
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args().collect();
    let [_, to, mib, latency] = &arguments[..] else {
        bail!("slow_way HOST:PORT MIB/S MILLISECONDS")
    };
    let (there, back) = (Lane::new(mib.parse()?), Lane::new(mib.parse()?));
    let latency = Duration::from_millis(latency.parse()?);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("http://{}", listener.local_addr()?);
    for client in listener.incoming() {
        let (client, server) = (client?, TcpStream::connect(to)?);
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let ends = (client.try_clone()?, server.try_clone()?);
        let (there, back) = (Arc::clone(&there), Arc::clone(&back));
        std::thread::spawn(move || carry(client, server, &there, Duration::ZERO));
        std::thread::spawn(move || carry(ends.1, ends.0, &back, latency));
    }
    Ok(())
}

/// Carries one direction of a connection to its end.
fn carry(mut from: TcpStream, mut to: TcpStream, lane: &Lane, latency: Duration) {
    let (sender, pieces) = mpsc::sync_channel::<(Instant, Vec<u8>)>(ON_THE_WAY);
    let end = to.try_clone();
    let writing = std::thread::spawn(move || {
        for (due, piece) in pieces {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&piece).is_err() {
                return;
            }
        }
    });
    loop {
        let mut piece = vec![0; PIECE];
        let read = from.read(&mut piece).unwrap_or(0);
        if read == 0 {
            break;
        }
        lane.pass(read);
        piece.truncate(read);
        if sender.send((Instant::now() + latency, piece)).is_err() {
            break;
        }
    }
    drop(sender);
    let _ = writing.join();
    let _ = end.and_then(|to| to.shutdown(Shutdown::Write));
}
