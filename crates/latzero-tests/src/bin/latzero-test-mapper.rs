//! A client that maps block `m` of pool `base`, for tests to kill. A `writer` publishes versions
//! under the lock; a `reader` checks that each version is whole. Arguments: the role, the socket,
//! the AppID, the block's kind, a number.
//!
//! All words of a version are equal: the fence under which it was written (32 bits), the writer's
//! number (8) and a counter (24).

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use latzero_shm::{Access, Attachment, Expected, Geometry, ReadError};
use latzero_tests::Wire;
use serde_json::{Value, json};

/// Bytes of the block.
const SIZE: u64 = 24 * 1024;

/// The longest that one read may take.
const READ_TIME_MAX: Duration = Duration::from_secs(1);

/// Reads to try after the server has ended.
const TRIES_AFTER: usize = 200;

/// The server closed the connection, or refused what cannot be refused.
struct Ended(String);

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [role, socket, app, kind, number] = args.as_slice() else {
        eprintln!("usage: latzero-test-mapper writer|reader|half SOCKET APP KIND NUMBER");
        std::process::exit(2);
    };
    let number: u64 = number.parse().unwrap_or(0);
    let Ok(wire) = Wire::try_unix(Path::new(socket)) else {
        return;
    };
    let mut client = Client {
        wire,
        kind: kind.clone(),
        has_moved: false,
    };
    let ended = client.join(app).and_then(|()| match role.as_str() {
        "writer" => client.write(number),
        "half" => client.write_half(number),
        _ => client.read(),
    });
    if let Err(Ended(why)) = ended
        && !why.is_empty()
    {
        say(&format!("fault {why}"));
        std::process::exit(1);
    }
}

/// Prints a line; ends the process if the output is closed.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

fn fault(what: impl std::fmt::Display) -> Ended {
    Ended(what.to_string())
}

struct Client {
    wire: Wire,
    kind: String,
    has_moved: bool,
}

impl Client {
    fn join(&mut self, app: &str) -> Result<(), Ended> {
        self.ask(
            json!({"action": "handshake", "app_id": app, "pools": ["base"],
            "features": ["attachments", "fd_passing"]}),
        )?;
        Ok(())
    }

    /// Sends a request and returns the reply. If the connection ends, the error has no text.
    fn ask(&mut self, mut message: Value) -> Result<Value, Ended> {
        message["id"] = "r".into();
        if self.wire.try_send(&message).is_err() {
            return Err(Ended(String::new()));
        }
        loop {
            let got = self.wire.try_receive();
            let Some((reply, _)) = got.map_err(|error| fault(format!("{message}: {error}")))?
            else {
                return Err(Ended(String::new()));
            };
            if reply["in_reply_to"] == "r" {
                // A client that was kicked is no longer a member, even while its connection is
                // still open.
                return match reply["error"]["code"] == "not_member" {
                    true => Err(Ended(String::new())),
                    false => Ok(reply),
                };
            }
            self.note(&reply);
        }
    }

    fn note(&mut self, event: &Value) {
        self.has_moved |= event["event"] == "block_moved" || event["event"] == "block_removed";
    }

    fn attach(&mut self, mode: &str) -> Result<Arc<Attachment>, Ended> {
        self.has_moved = false;
        let create = json!({"action": "memory_create", "block_id": "m", "size": SIZE,
            "kind": self.kind,
            "if_exists": "attach", "mode": mode});
        let mut reply = self.ask(create)?;
        // The name is reserved for the owner, which has not reconnected yet.
        if reply["error"]["code"] == "forbidden" {
            return Err(Ended(String::new()));
        }
        if mode == "read" && reply["status"] == "ok" && reply["response"]["mode"] != "read" {
            self.wire.take_descriptors();
            reply = self.ask(json!({"action": "memory_attach", "block_id": "m", "mode": mode}))?;
        }
        let description = &reply["response"];
        let descriptor = self.wire.take_descriptors().pop();
        let Some(descriptor) = descriptor else {
            return Err(fault(format!("no descriptor: {reply}")));
        };
        let slots = description["slots"].as_u64().unwrap_or(0) as u32;
        let expected = Expected {
            generation: description["generation"].as_u64().unwrap_or(0),
            geometry: match description.get("spare_slots") {
                None => Geometry::new(SIZE, slots),
                Some(_) => Geometry::with_spares(SIZE, slots),
            }
            .map_err(fault)?,
            is_persistent: description["kind"] == "persistent",
            access: match description["mode"].as_str() {
                Some("read") => Access::Read,
                _ => Access::Write,
            },
        };
        Ok(Arc::new(
            Attachment::new(descriptor, &expected).map_err(fault)?,
        ))
    }

    fn lock(&mut self) -> Result<Option<(Value, u64)>, Ended> {
        let reply = self.ask(json!({"action": "memory_lock", "block_id": "m", "wait": 5000}))?;
        let granted = &reply["response"];
        Ok(granted["fence"]
            .as_u64()
            .map(|fence| (granted["lock"].clone(), fence)))
    }

    fn write(&mut self, number: u64) -> Result<(), Ended> {
        let mut block = self.attach("write")?;
        let mut count = 0;
        loop {
            let Some((lock, fence)) = self.lock()? else {
                continue;
            };
            say(&format!("lock {fence}"));
            if self.has_moved {
                block = self.attach("write")?;
            }
            for _ in 0..1 + (number + fence) % 6 {
                count += 1;
                if !publish(&block, fence, number, count) {
                    break;
                }
                let notify =
                    json!({"action": "memory_notify", "block_id": "m", "version": block.version()});
                if let Err(ended) = self.ask(notify) {
                    return after(&block, fence, number, count).and(Err(ended));
                }
            }
            if let Err(ended) =
                self.ask(json!({"action": "memory_unlock", "block_id": "m", "lock": lock}))
            {
                return after(&block, fence, number, count).and(Err(ended));
            }
        }
    }

    /// Stops in the middle of a version until a line arrives, and then continues as if nothing had
    /// happened.
    fn write_half(&mut self, number: u64) -> Result<(), Ended> {
        let block = self.attach("write")?;
        let Some((_, fence)) = self.lock()? else {
            return Err(fault("the lock is not to be had"));
        };
        let mut writing = block.begin(fence).map_err(fault)?;
        let bytes = content(fence, number, 1);
        let (first, second) = bytes.split_at(bytes.len() / 2);
        writing.write(0, first).map_err(fault)?;
        say(&format!("half {fence}"));
        let mut line = String::new();
        let _ = std::io::stdin().read_line(&mut line);
        let written = writing.write(first.len() as u64, second);
        let published = writing.publish();
        say(&format!("late {written:?} {published:?}"));
        Ok(())
    }

    fn read(&mut self) -> Result<(), Ended> {
        let mut block = self.attach("read")?;
        say("reads");
        let mut look = Look::default();
        loop {
            for _ in 0..32 {
                look.at(&block)?;
            }
            while self.wire.has_more(Duration::ZERO) {
                match self.wire.try_receive().map_err(fault)? {
                    Some((event, _)) => self.note(&event),
                    None => {
                        // The mapping outlives the server.
                        for _ in 0..TRIES_AFTER {
                            look.at(&block)?;
                        }
                        say(&format!(
                            "reads {} contended {}",
                            look.reads, look.contended
                        ));
                        return Ok(());
                    }
                }
            }
            if self.has_moved {
                block = self.attach("read")?;
                look = Look {
                    reads: look.reads,
                    contended: look.contended,
                    ..Look::default()
                };
            }
        }
    }
}

fn content(fence: u64, number: u64, count: u64) -> Vec<u8> {
    let word = fence << 32 | (number & 0xff) << 24 | (count & 0xff_ffff);
    word.to_le_bytes()
        .into_iter()
        .cycle()
        .take(SIZE as usize)
        .collect()
}

/// Publishes a version, and prints its line only after that.
fn publish(block: &Arc<Attachment>, fence: u64, number: u64, count: u64) -> bool {
    let Ok(mut writing) = block.begin(fence) else {
        return false;
    };
    if writing.write(0, &content(fence, number, count)).is_err() {
        return false;
    }
    match writing.publish() {
        Ok(version) => {
            say(&format!("wrote {version} {fence}"));
            true
        }
        Err(_) => false,
    }
}

/// Keeps writing after the connection has ended, as a lock holder would that did not notice the
/// end.
fn after(block: &Arc<Attachment>, fence: u64, number: u64, mut count: u64) -> Result<(), Ended> {
    for _ in 0..TRIES_AFTER {
        count += 1;
        if !publish(block, fence, number, count) {
            break;
        }
    }
    Ok(())
}

/// What a reader saw of one generation.
#[derive(Default)]
struct Look {
    reads: u64,
    contended: u64,
    version: u64,
    fence: u64,
}

impl Look {
    fn at(&mut self, block: &Attachment) -> Result<(), Ended> {
        let begun = Instant::now();
        let read = block.read();
        let took = begun.elapsed();
        if took > READ_TIME_MAX {
            return Err(fault(format!("a read took {took:?}")));
        }
        self.reads += 1;
        let (bytes, version) = match read {
            Ok(read) => read,
            Err(ReadError::Contended) => {
                self.contended += 1;
                return Ok(());
            }
            Err(error) => return Err(fault(error)),
        };
        let mut words = bytes
            .chunks_exact(8)
            .filter_map(|word| word.try_into().ok())
            .map(u64::from_le_bytes);
        let first = words.next().unwrap_or(0);
        if let Some(other) = words.find(|word| *word != first) {
            return Err(fault(format!(
                "torn: version {version} has {first:#x} and {other:#x}"
            )));
        }
        let fence = first >> 32;
        if version < self.version || fence < self.fence {
            return Err(fault(format!(
                "version {version} under fence {fence} after version {} under {}",
                self.version, self.fence
            )));
        }
        (self.version, self.fence) = (version, fence);
        Ok(())
    }
}
