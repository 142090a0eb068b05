//! What a flush and a small write of a persistent block take, in microseconds: `flush DIRECTORY`.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use latzero_shm::{Custodian, Description, Geometry};

fn main() {
    let directory = std::env::args().nth(1).unwrap_or_else(|| ".".into());
    for size in [64 << 10, 1 << 20, 64 << 20] {
        for written in [100, size] {
            for per_flush in [1, 10] {
                measure(Path::new(&directory), size, written, per_flush);
            }
        }
    }
}

/// A block as the server makes it.
fn geometry(size: u64) -> Geometry {
    Geometry::with_spares(size, 2).expect("a size in bounds")
}

fn measure(directory: &Path, size: u64, written: u64, per_flush: u32) {
    let open = File::open(directory).expect("there is such a directory");
    let description = Description {
        block_id: [1; 16],
        pool_id: [2; 16],
        generation: 1,
        geometry: geometry(size),
        is_persistent: true,
        created_unix_ns: 0,
    };
    let name = format!("flush-{}.lzb", std::process::id());
    let block = Custodian::create_persistent(open.as_fd(), &name, &description);
    let block = block.expect("there is room for it");
    std::fs::remove_file(directory.join(&name)).expect("it was just made");
    let bytes = vec![7; usize::try_from(written).expect("it fits")];
    let (mut writes, mut flushes) = (Vec::new(), Vec::new());
    let end = Instant::now() + Duration::from_secs(3);
    let mut n = 0;
    while Instant::now() < end || flushes.len() < 8 {
        for _ in 0..per_flush {
            n += 1;
            let at = match written < size {
                true => n * 7919 % (size - written),
                false => 0,
            };
            let began = Instant::now();
            block.write(at, &bytes, None).expect("it is written");
            writes.push(began.elapsed());
        }
        let began = Instant::now();
        block.sync().expect("it is flushed");
        flushes.push(began.elapsed());
    }
    let median = |times: &mut Vec<Duration>| {
        times.sort();
        times[times.len() / 2].as_micros()
    };
    println!(
        "{:6} KiB, {written:8} bytes written {per_flush:2} times a flush: write {:6} us, flush {:7} us",
        size >> 10,
        median(&mut writes),
        median(&mut flushes)
    );
}
