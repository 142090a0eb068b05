//! One run of the server, and how it ends.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};

use latzero_tests::Wire;
use latzero_tests::site::Daemon;
use serde_json::Value;

/// The server ended before it replied.
pub(crate) struct Gone;

/// One life of the server.
pub(crate) struct Round<'a> {
    pub(crate) server: &'a Daemon,
    /// The number of steps of all clients together after which it is killed; if they perform fewer,
    /// it is killed when they end.
    strike_at: u64,
    steps: AtomicU64,
    /// Clients that still perform steps.
    active: AtomicUsize,
    was_killed: AtomicBool,
}

impl<'a> Round<'a> {
    pub(crate) fn new(server: &'a Daemon, strike_at: u64, active: usize) -> Round<'a> {
        Round {
            server,
            strike_at,
            steps: AtomicU64::new(0),
            active: AtomicUsize::new(active),
            was_killed: AtomicBool::new(false),
        }
    }

    /// Counts a step of a client.
    pub(crate) fn step(&self) {
        if self.steps.fetch_add(1, SeqCst) + 1 == self.strike_at {
            self.send_kill();
        }
    }

    /// A client has finished. The last one ends the life.
    pub(crate) fn done(&self) {
        if self.active.fetch_sub(1, SeqCst) == 1 {
            self.send_kill();
        }
    }

    pub(crate) fn steps(&self) -> u64 {
        self.steps.load(SeqCst)
    }

    /// Whether the test killed it; false if it killed itself at a failpoint.
    pub(crate) fn was_killed(&self) -> bool {
        self.was_killed.load(SeqCst)
    }

    fn send_kill(&self) {
        self.was_killed.store(true, SeqCst);
        self.server.send_kill();
    }
}

/// Sends a request and waits for its reply; messages that arrive before it are skipped.
pub(crate) fn ask(wire: &mut Wire, mut message: Value) -> Result<Value, Gone> {
    message["id"] = "r".into();
    wire.try_send(&message).map_err(|_| Gone)?;
    reply(wire, &message)
}

/// Waits for the reply to the request with id `r`.
pub(crate) fn reply(wire: &mut Wire, asked: &Value) -> Result<Value, Gone> {
    loop {
        let got = wire.try_receive();
        let (message, _) = got
            .unwrap_or_else(|error| panic!("no reply to {asked}: {error}"))
            .ok_or(Gone)?;
        if message["in_reply_to"] == "r" {
            return Ok(message);
        }
    }
}

/// The response to a request that can't be refused.
pub(crate) fn ok<'v>(asked: &str, reply: &'v Value) -> &'v Value {
    assert_eq!(reply["status"], "ok", "{asked}: {reply}");
    &reply["response"]
}
