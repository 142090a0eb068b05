//! Processes that map one block: writers under its lock, which are killed or disconnected, and
//! readers, which must never see a torn version.

use std::collections::BTreeSet;

use latzero_tests::Wire;
use latzero_tests::site::{ControlledProcess, Daemon};
use serde_json::{Value, json};

use crate::random::Random;
use crate::round::{Gone, Round, ask, ok, reply};

/// The client process that maps the block.
const MAPPER: &str = env!("CARGO_BIN_EXE_latzero-test-mapper");

/// How many writers work at the same time.
const WRITERS: usize = 2;

/// The mapped block over all lives of the server.
pub(crate) struct Mapped {
    pub(crate) kind: &'static str,
    /// Fences that were granted for the current block.
    fences: BTreeSet<u64>,
    /// The newest version that a writer has completed.
    version: u64,
    number: u64,
    pub(crate) has_lost_power: bool,
    pub(crate) reads: u64,
}

/// A writer, and the newest fence that it was granted.
struct Writer {
    process: ControlledProcess,
    app: String,
    fence: u64,
}

impl Mapped {
    pub(crate) fn new(kind: &'static str) -> Mapped {
        Mapped {
            kind,
            fences: BTreeSet::new(),
            version: 0,
            number: 0,
            has_lost_power: false,
            reads: 0,
        }
    }

    pub(crate) fn start(&mut self, server: &Daemon, role: &str, app: &str) -> ControlledProcess {
        self.number += 1;
        let socket = server.socket().to_str().unwrap_or_default();
        ControlledProcess::start(
            MAPPER,
            &[role, socket, app, self.kind, &self.number.to_string()],
        )
    }

    fn writer(&mut self, server: &Daemon, n: usize) -> Writer {
        let app = format!("writer{n}");
        Writer {
            process: self.start(server, "writer", &app),
            app,
            fence: 0,
        }
    }

    /// Checks what was published, after a restart.
    pub(crate) fn verify(&mut self, server: &Daemon) {
        let (mut wire, _) = overseer(server);
        let Ok(info) = ask(&mut wire, json!({"action": "memory_info", "block_id": "m"})) else {
            panic!("the server ends by itself");
        };
        if self.kind == "shared" {
            // Nobody offers the block again, so the next one is another block.
            (self.version, self.fences) = (0, BTreeSet::new());
            return;
        }
        if std::mem::take(&mut self.has_lost_power) {
            self.version = 0;
        }
        if self.version == 0 && info["status"] != "ok" {
            return;
        }
        let version = ok("the mapped block", &info)["version"]
            .as_u64()
            .unwrap_or(0);
        assert!(
            version >= self.version,
            "version {version} of the mapped block after {}",
            self.version
        );
        self.version = version;
        let Ok((content, _)) = read(&mut wire) else {
            panic!("the server ends by itself");
        };
        whole(&content);
    }

    /// Runs writers and readers until the server is gone.
    pub(crate) fn run(&mut self, round: &Round<'_>, mut random: Random) {
        let mut writers: Vec<Writer> = (0..WRITERS).map(|n| self.writer(round.server, n)).collect();
        let mut readers: Vec<ControlledProcess> = (0..2)
            .map(|n| self.start(round.server, "reader", &format!("reader{n}")))
            .collect();
        let mut next = 0;
        'life: loop {
            let n = next % WRITERS;
            next += 1;
            for _ in 0..random.below(20) {
                let Some(line) = writers[n].process.line() else {
                    break 'life;
                };
                self.note(&mut writers[n], &line);
            }
            match random.below(6) {
                0 => {
                    // The writer dies in the middle of whatever it does.
                    writers[n].process.kill();
                    while let Some(line) = writers[n].process.line() {
                        self.note(&mut writers[n], &line);
                    }
                    writers[n] = self.writer(round.server, n);
                }
                1 => {
                    if self.cut_off(round, &mut writers[n]).is_err() {
                        break;
                    }
                    writers[n] = self.writer(round.server, n);
                }
                _ => {}
            }
        }
        for writer in &mut writers {
            let (status, lines) = writer.process.wait();
            lines.iter().for_each(|line| self.note(writer, line));
            assert!(status.success(), "a writer ended with {status}");
        }
        for reader in &mut readers {
            let (status, lines) = reader.wait();
            assert!(status.success(), "a reader ended with {status}: {lines:?}");
            let last = lines.last().map(String::as_str).unwrap_or_default();
            self.reads += last
                .split(' ')
                .nth(1)
                .and_then(|reads| reads.parse::<u64>().ok())
                .unwrap_or(0);
        }
    }

    fn note(&mut self, writer: &mut Writer, line: &str) {
        let mut words = line.split(' ');
        let what = words.next();
        let number = words.next().and_then(|word| word.parse::<u64>().ok());
        match (what, number) {
            (Some("lock"), Some(fence)) => {
                assert!(fence > writer.fence, "fence {fence} after {}", writer.fence);
                assert!(self.fences.insert(fence), "fence {fence} was granted twice");
                writer.fence = fence;
            }
            // A disconnected writer may publish a version in a generation that nobody sees any
            // more.
            (Some("wrote"), Some(version)) if words.next() == Some(&writer.fence.to_string()) => {
                self.version = self.version.max(version);
            }
            _ => panic!("{} said: {line}", writer.app),
        }
    }

    /// Ends a writer's connection while its process continues: from then on only the next
    /// lock holder's writes are visible.
    fn cut_off(&mut self, round: &Round<'_>, writer: &mut Writer) -> Result<(), Gone> {
        let Some((mut wire, _)) = try_overseer(round.server) else {
            return Err(Gone);
        };
        let before = self.version;
        ok(
            "kick",
            &ask(&mut wire, json!({"action": "kick", "app_id": writer.app}))?,
        );
        let granted = ask(
            &mut wire,
            json!({"action": "memory_lock", "block_id": "m", "wait": 10_000}),
        )?;
        if granted["error"]["code"] == "no_block" {
            // The block did not exist yet.
            writer.process.kill();
            return Ok(());
        }
        let lock = ok("lock", &granted);
        let fence = lock["fence"].as_u64().unwrap_or(0);
        assert!(self.fences.insert(fence), "fence {fence} was granted twice");
        let (old, _) = read(&mut wire)?;
        let word = fence << 32 | 0xff << 24;
        let bytes: Vec<u8> = word
            .to_le_bytes()
            .into_iter()
            .cycle()
            .take(old.len())
            .collect();
        let header =
            json!({"action": "memory_write", "id": "r", "block_id": "m", "lock": lock["lock"]});
        let mut frame = Vec::new();
        latzero_protocol::frame::append_attachment(&mut frame, &bytes, |out| {
            out.extend_from_slice(header.to_string().as_bytes());
        });
        wire.try_send_bytes(&frame).map_err(|_| Gone)?;
        let written = reply(&mut wire, &header)?;
        let written = ok("write", &written)["version"].as_u64().unwrap_or(0);
        // The disconnected writer continues to write, and nobody sees it.
        let (status, lines) = writer.process.wait();
        assert!(status.success(), "{status}: {lines:?}");
        for line in lines {
            self.note(writer, &line);
        }
        let (content, version) = read(&mut wire)?;
        assert_eq!(
            (whole(&content), version),
            (word, written),
            "version {before} before"
        );
        ok(
            "unlock",
            &ask(
                &mut wire,
                json!({"action": "memory_unlock", "block_id": "m", "lock": lock["lock"]}),
            )?,
        );
        // Its own versions were of the generation that was left behind.
        self.version = before.max(written.min(self.version));
        self.version = self.version.min(written);
        Ok(())
    }
}

fn overseer(server: &Daemon) -> (Wire, Value) {
    try_overseer(server).unwrap_or_else(|| panic!("the server ends by itself"))
}

fn try_overseer(server: &Daemon) -> Option<(Wire, Value)> {
    let handshake = json!({"app_id": "overseer", "pools": ["base"], "features": ["attachments"]});
    let came = server.try_app(handshake);
    came.unwrap_or_else(|error| panic!("no acknowledgement: {error}"))
}

/// The block's bytes and their version, read through the server.
pub(crate) fn read(wire: &mut Wire) -> Result<(Vec<u8>, u64), Gone> {
    wire.try_send(&json!({"action": "memory_read", "id": "r", "block_id": "m"}))
        .map_err(|_| Gone)?;
    loop {
        let got = wire
            .try_receive()
            .unwrap_or_else(|error| panic!("no reply: {error}"));
        let (reply, bytes) = got.ok_or(Gone)?;
        if reply["in_reply_to"] == "r" {
            let version = ok("read", &reply)["version"].as_u64().unwrap_or(0);
            return Ok((bytes.unwrap_or_default(), version));
        }
    }
}

/// The word that fills a whole version.
pub(crate) fn whole(content: &[u8]) -> u64 {
    let mut words = content
        .chunks_exact(8)
        .filter_map(|word| word.try_into().ok())
        .map(u64::from_le_bytes);
    let first = words.next().unwrap_or(0);
    assert!(words.all(|word| word == first), "a version is torn");
    first
}
