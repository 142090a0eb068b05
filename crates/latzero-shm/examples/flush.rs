//! What a flush and a write of a persistent block take, in microseconds, in turn with a block whose
//! file has no spare slots: `flush DIRECTORY [SECONDS]`.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use latzero_shm::{Custodian, Description, Geometry};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().unwrap_or_else(|| ".".into());
    let seconds = arguments.next().and_then(|text| text.parse().ok());
    let time = Duration::from_secs(seconds.unwrap_or(4));
    for size in [64 << 10, 1 << 20, 64 << 20] {
        for written in [100, size] {
            for per_flush in [1, 10] {
                measure(Path::new(&directory), time, size, written, per_flush);
            }
        }
    }
}

/// A block, and the times of its writes and flushes.
struct Measured {
    block: Custodian,
    writes: Vec<Duration>,
    flushes: Vec<Duration>,
}

impl Measured {
    fn new(directory: &Path, geometry: Geometry) -> Measured {
        let open = File::open(directory).expect("the directory exists");
        let description = Description {
            block_id: [1; 16],
            pool_id: [2; 16],
            generation: 1,
            geometry,
            is_persistent: true,
            created_unix_ns: 0,
        };
        let name = format!("flush-{}.lzb", std::process::id());
        let block = Custodian::create_persistent(open.as_fd(), &name, &description);
        std::fs::remove_file(directory.join(&name)).expect("it was just made");
        Measured {
            block: block.expect("it fits"),
            writes: Vec::new(),
            flushes: Vec::new(),
        }
    }

    fn median(times: &mut [Duration]) -> f64 {
        times.sort();
        times[times.len() / 2].as_secs_f64() * 1e6
    }
}

fn measure(directory: &Path, time: Duration, size: u64, written: u64, per_flush: u32) {
    let mut both = [Geometry::new(size, 2), Geometry::with_spares(size, 2)]
        .map(|geometry| Measured::new(directory, geometry.expect("a size in bounds")));
    let bytes = vec![7; usize::try_from(written).expect("it fits")];
    let end = Instant::now() + time;
    let mut n = 0;
    while Instant::now() < end || n < 80 {
        let begun = n;
        for one in &mut both {
            n = begun;
            for _ in 0..per_flush {
                n += 1;
                let at = match written < size {
                    true => n * 7919 % (size - written),
                    false => 0,
                };
                let began = Instant::now();
                one.block.write(at, &bytes, None).expect("it is written");
                one.writes.push(began.elapsed());
            }
            let began = Instant::now();
            one.block.sync().expect("it is flushed");
            one.flushes.push(began.elapsed());
        }
    }
    let [without, with] = &mut both;
    let write = [&mut without.writes, &mut with.writes].map(|times| Measured::median(times));
    let flush = [&mut without.flushes, &mut with.flushes].map(|times| Measured::median(times));
    println!(
        "{:6} KiB, {written:8} bytes {per_flush:2} times a flush: write {:7.0} and {:7.0} \
         ({:.2}), flush {:8.0} and {:8.0} ({:.2})",
        size >> 10,
        write[0],
        write[1],
        write[1] / write[0],
        flush[0],
        flush[1],
        flush[1] / flush[0]
    );
}
