//! A plain client for `scripts/bench.sh`: puts the blocks of a file over a number of connections,
//! as fast as they are taken, and prints the seconds from the first byte to the last answer.
//!
//! `put_load` ADDRESS FILE CONNECTIONS

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use fspfs::model::{BLOCK_SIZE, BLOCK_SIZE_U64, BlockIndex, Digest, Digester};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args().collect();
    let [_, address, path, connections] = &arguments[..] else {
        bail!("put_load ADDRESS FILE CONNECTIONS");
    };
    let connections: usize = connections.parse()?;
    let file = File::open(path)?;
    let blocks = u32::try_from(file.metadata()?.len() / BLOCK_SIZE_U64)?;
    let gib = u64::from(blocks).div_ceil(2048);
    let (mut digests, mut all) = (Vec::new(), Digester::default());
    let mut block = vec![0; BLOCK_SIZE];
    for n in 0..blocks {
        file.read_exact_at(&mut block, BlockIndex(n).offset())?;
        digests.push(Digest::of(&block));
        all.update(digests[n as usize].0);
    }
    let body = format!("{{\"VolumeSize\":{gib}}}");
    let answer = ask(
        address,
        &format!(
            "POST /snapshots HTTP/1.1\r\nhost: {address}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        ),
    )?;
    let id = answer.split("\"SnapshotId\":\"").nth(1).and_then(|rest| rest.split('"').next());
    let id = id.with_context(|| format!("no snapshot was started: {answer}"))?;
    let next = AtomicU32::new(0);
    let began = Instant::now();
    std::thread::scope(|scope| {
        let put = || put_some(address, id, &file, &digests, &next);
        let threads: Vec<_> = (0..connections).map(|_| scope.spawn(put)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let checksum = all.finish().to_base64();
    let answer = ask(
        address,
        &format!(
            "POST /snapshots/completion/{id} HTTP/1.1\r\nhost: {address}\r\ncontent-length: 0\r\nconnection: close\r\nx-amz-changedblockscount: {blocks}\r\nx-amz-checksum: {checksum}\r\nx-amz-checksum-algorithm: SHA256\r\nx-amz-checksum-aggregation-method: LINEAR\r\n\r\n"
        ),
    )?;
    ensure!(answer.starts_with("HTTP/1.1 202"), "it was not completed: {answer}");
    println!("{seconds:.6}");
    Ok(())
}

/// Sends a request over a connection of its own; gives the whole answer.
fn ask(address: &str, request: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Puts whatever block is next, until there is none.
fn put_some(
    address: &str,
    id: &str,
    file: &File,
    digests: &[Digest],
    next: &AtomicU32,
) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let (mut block, mut answer) = (vec![0; BLOCK_SIZE], [0; 4096]);
    loop {
        let index = BlockIndex(next.fetch_add(1, Ordering::Relaxed));
        let Some(digest) = digests.get(index.0 as usize) else { return Ok(()) };
        file.read_exact_at(&mut block, index.offset())?;
        let head = format!(
            "PUT /snapshots/{id}/blocks/{index} HTTP/1.1\r\nhost: {address}\r\ncontent-length: {BLOCK_SIZE}\r\nx-amz-data-length: {BLOCK_SIZE}\r\nx-amz-checksum: {}\r\nx-amz-checksum-algorithm: SHA256\r\n\r\n",
            digest.to_base64()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(&block)?;
        let len = stream.read(&mut answer)?;
        let answer = &answer[..len];
        ensure!(answer.starts_with(b"HTTP/1.1 201"), "block {index}: {}", answer.escape_ascii());
    }
}
