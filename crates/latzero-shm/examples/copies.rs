//! How fast versions are read and written, against memcpy in the same run: `cargo run --release
//! --example copies`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use latzero_shm::{Access, Attachment, Custodian, Description, Expected, Geometry};

const ROUNDS: u32 = 9;

/// The median time of one go, of several rounds of `times` goes each.
fn median(times: u32, mut go: impl FnMut()) -> Duration {
    let mut rounds: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..times {
                go();
            }
            start.elapsed() / times
        })
        .collect();
    rounds.sort();
    rounds[rounds.len() / 2]
}

fn attached(size: u64) -> (Custodian, Arc<Attachment>) {
    let geometry = Geometry::new(size, 2).expect("a size in bounds");
    let description = Description {
        block_id: [1; 16],
        pool_id: [2; 16],
        generation: 1,
        geometry,
        is_persistent: false,
        created_unix_ns: 0,
    };
    let block = Custodian::create_shared("lz:copies", &description).expect("there is memory");
    let file = block
        .lend(Access::Write)
        .expect("it may be written")
        .try_clone()
        .expect("descriptors are left");
    let expected = Expected {
        generation: 1,
        geometry,
        is_persistent: false,
        access: Access::Write,
    };
    let attachment = Attachment::new(file, &expected).expect("it is the block");
    (block, Arc::new(attachment))
}

fn main() {
    for size in [4096usize, 65_536, 1 << 20, 16 << 20, 64 << 20] {
        let times = u32::try_from((256 << 20) / size)
            .expect("small")
            .clamp(4, 20_000);
        let (_block, block) = attached(size as u64);
        let from = vec![7u8; size];
        let mut to = vec![1u8; size];
        for _ in 0..2 {
            let mut writing = block.begin(0).expect("nobody else writes");
            writing.write(0, &from).expect("it is in range");
            writing.publish().expect("nobody else writes");
        }
        let memcpy = median(times, || {
            black_box(&mut to).copy_from_slice(black_box(&from))
        });
        let read_into = median(times, || {
            block
                .read_into(0, black_box(&mut to))
                .expect("nobody writes");
        });
        let read = median(times, || {
            drop(black_box(block.read().expect("nobody writes")))
        });
        let to_vec = median(times, || drop(black_box(black_box(&from).to_vec())));
        let rate = |time: Duration| size as f64 / time.as_secs_f64() / 1e9;
        println!(
            "{size:>9} bytes: memcpy {:5.1} GB/s, read_into {:5.1} ({:.2}x); to_vec {:5.1}, read \
             {:5.1} ({:.2}x)",
            rate(memcpy),
            rate(read_into),
            memcpy.as_secs_f64() / read_into.as_secs_f64(),
            rate(to_vec),
            rate(read),
            to_vec.as_secs_f64() / read.as_secs_f64(),
        );
    }
    let mut small = Vec::new();
    for size in [1u64 << 20, 1 << 30] {
        let (_block, block) = attached(size);
        let mut offset = 0;
        let mut write = || {
            let mut writing = block.begin(0).expect("nobody else writes");
            writing.write(offset, &[5; 100]).expect("it is in range");
            writing.publish().expect("nobody else writes");
            // As many pages in both, all of them touched by then.
            offset = (offset + 4096) % ((1 << 20) - 100);
        };
        for _ in 0..2_000 {
            write();
        }
        small.push(median(5_000, write));
    }
    println!(
        "100 bytes written into 1 MiB {:?}, into 1 GiB {:?} ({:.2}x)",
        small[0],
        small[1],
        small[1].as_secs_f64() / small[0].as_secs_f64()
    );
}
