//! The cost of changing one chunk of a large sealed block: all other chunks are reused, so the time
//! should be that of the chunk alone.

use std::time::{Duration, Instant};

use latzero::blocking::App;
use latzero_crypto::Suite;
use latzero_crypto::block::{BlockId, CHUNK_BYTES, ChunkKey};
use latzero_crypto::keys::EpochId;

use super::{failed, key_set, keys};
use crate::failure::Failure;
use crate::report::median;
use crate::server::Running;
use crate::stream::Transport;

/// The size of the block in bytes.
const BLOCK_BYTES: u64 = 64 * 1024 * 1024;

/// The time to publish a version with one new chunk, and to seal the chunk alone, in microseconds.
pub(super) fn measure(is_quick: bool) -> Result<(f64, f64), Failure> {
    let server = Running::start(&[])?;
    let scratch = tempfile::tempdir().map_err(|e| Failure::said(e.to_string()))?;
    let address = server.address(Transport::Unix);
    let maker = App::connect(&format!("latzero://maker?socket={address}"));
    let request = keys()?.pool_create("sealed", false);
    let request = request.map_err(failed("descriptor"))?;
    let made = maker.and_then(|maker| maker.request(&request));
    made.map_err(failed("pool_create"))?;
    let builder = latzero::App::builder(&format!("latzero://writer?socket={address}"));
    let builder = builder.keys("sealed", keys()?).state_dir(scratch.path());
    let app = App::connect_with(builder).map_err(failed("connect"))?;
    let block = app.block("large").create(BLOCK_BYTES).send();
    let block = block.map_err(failed("memory_create"))?;
    let mut writer = block
        .writer(Duration::from_secs(1))
        .map_err(failed("lock"))?;
    writer.tell_server(false);
    let mut chunk = vec![7; CHUNK_BYTES];
    let write = |n: u64, chunk: &[u8]| {
        // Chunks that are far apart.
        let at = n * 257 % (BLOCK_BYTES / CHUNK_BYTES as u64) * CHUNK_BYTES as u64;
        writer.write(at, chunk).map_err(failed("write"))
    };
    // The first version seals every chunk, and the next one fills the other slot.
    write(0, &chunk)?;
    write(1, &chunk)?;
    let key = key_set()
        .pool_key(&EpochId {
            pool_id: [1; 16],
            epoch: 1,
            salt: [2; 32],
        })
        .expect("all keys are here");
    let id = BlockId {
        pool_id: [1; 16],
        suite: Suite::Sealed,
        uid: [3; 16],
        name: "large",
    };
    let key = ChunkKey::new(&key, &id, 1);
    let (mut publishing, mut sealing) = (Vec::new(), Vec::new());
    for n in 0..if is_quick { 10 } else { 1_000 } {
        chunk[0] = chunk[0].wrapping_add(1);
        let begin = Instant::now();
        write(2 + n, &chunk)?;
        publishing.push(begin.elapsed().as_secs_f64() * 1e6);
        let begin = Instant::now();
        drop(std::hint::black_box(key.seal(1, n + 1, [4; 24], &chunk)));
        sealing.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    let middle = |times| median(times).expect("there is at least one");
    Ok((middle(publishing), middle(sealing)))
}
