//! A writer whose server was killed while it was writing.

use std::os::fd::{AsFd, OwnedFd};

use latzero_tests::Wire;
use latzero_tests::site::{Daemon, Site};
use serde_json::json;

use crate::mapped::{Mapped, read, whole};
use crate::round::{ok, reply};

/// A writer stopped in the middle of a version when the server was killed, and continues when
/// another server has the block: nobody sees what it still writes.
#[test]
fn writes_of_a_writer_from_before_a_kill_are_never_visible() {
    for kind in ["persistent", "shared"] {
        let site = Site::new();
        let server = site.start();
        let mut mapped = Mapped::new(kind);
        let mut holder = Holder::new(&server, kind);
        let mut half = mapped.start(&server, "half", "half");
        let line = half.line().unwrap_or_default();
        let fence = line
            .strip_prefix("half ")
            .and_then(|fence| fence.parse::<u64>().ok());
        let fence = fence.unwrap_or_else(|| panic!("it printed: {line}"));
        server.kill();
        let server = site.start();
        holder.come_back(&server);
        let word = holder.write(fence);
        half.send(&json!("go on"));
        let (status, lines) = half.wait();
        assert!(status.success(), "{status}: {lines:?}");
        for _ in 0..3 {
            assert_eq!(holder.read(), word, "{kind}: {lines:?}");
        }
        let next = holder.write(word >> 32);
        assert_eq!(holder.read(), next, "{kind}");
    }
}

/// An app that holds a descriptor of the block, and writes the block through the server.
pub(crate) struct Holder {
    wire: Wire,
    held: OwnedFd,
    kind: &'static str,
}

impl Holder {
    /// Creates the block.
    pub(crate) fn new(server: &Daemon, kind: &'static str) -> Holder {
        let mut wire = Holder::join(server);
        let size = 24 * 1024;
        let create = json!({"action": "memory_create", "block_id": "m", "size": size, "kind": kind,
            "mode": "read"});
        ok("create", &wire.request(create));
        let held = wire.take(1).remove(0);
        Holder { wire, held, kind }
    }

    fn join(server: &Daemon) -> Wire {
        let features = ["attachments", "fd_passing"];
        server
            .app(json!({"app_id": "holder", "pools": ["base"], "features": features}))
            .0
    }

    /// Connects to the next server and offers what the last one left.
    pub(crate) fn come_back(&mut self, server: &Daemon) {
        self.wire = Holder::join(server);
        if self.kind == "shared" {
            let offer =
                json!({"action": "memory_reoffer", "id": "r", "block_id": "m", "descriptors": 1});
            self.wire
                .send_with_descriptors(&offer, &[self.held.as_fd()]);
            let Ok(taken) = reply(&mut self.wire, &offer) else {
                panic!("the server ends by itself");
            };
            ok("reoffer", &taken);
        }
    }

    /// Writes a version under a new lock whose fence is greater than `before`; returns its word.
    pub(crate) fn write(&mut self, before: u64) -> u64 {
        let granted = self
            .wire
            .request(json!({"action": "memory_lock", "block_id": "m", "wait": 20_000}));
        let lock = ok("lock", &granted).clone();
        let fence = lock["fence"].as_u64().unwrap_or(0);
        assert!(fence > before, "fence {fence} after {before}");
        let word = fence << 32;
        let bytes: Vec<u8> = word
            .to_le_bytes()
            .into_iter()
            .cycle()
            .take(24 * 1024)
            .collect();
        let header =
            json!({"action": "memory_write", "id": "r", "block_id": "m", "lock": lock["lock"]});
        self.wire.send_attachment(&header, &bytes);
        let Ok(written) = reply(&mut self.wire, &header) else {
            panic!("the server ends by itself");
        };
        ok("write", &written);
        let unlock = json!({"action": "memory_unlock", "block_id": "m", "lock": lock["lock"]});
        ok("unlock", &self.wire.request(unlock));
        word
    }

    /// The word that fills the whole block.
    pub(crate) fn read(&mut self) -> u64 {
        let Ok((content, _)) = read(&mut self.wire) else {
            panic!("the server ends by itself");
        };
        whole(&content)
    }
}
