//! A whole session: any messages of one client, in a world with two others.

use latzero_fabric::{Limits, Transport};
use latzero_sim::{Bounds, Peer, World, encode_frame};

/// The bytes of one client, in a world with a handler that answers and a caller that calls. If the
/// first byte is `!`, the rest is wire bytes. Otherwise each line is the JSON of a frame, in which
/// `$CALL` stands for the id of the call that the client received last; a line `#` advances time by
/// a second.
///
/// # Panics
/// If an invariant is broken, or something is left after all clients have left.
pub fn session(data: &[u8]) {
    let limits = Limits {
        max_frame: 64 * 1024,
        in_flight_max: 8,
        pending_max: 16,
        apps_max: 8,
        pools_max: 8,
        pools_per_app_max: 4,
        triggers_per_app_max: 8,
        ..Limits::default()
    };
    let bounds = Bounds {
        outbox_bytes: 64 * 1024,
        headroom_bytes: 64 * 1024,
        socket_bytes: 4096,
    };
    let mut scene = Scene::new(World::new(1, limits, bounds));
    match data.split_first() {
        Some((b'!', wire)) => {
            let (head, tail) = wire.split_at(wire.len() / 2);
            scene.feed(head);
            scene.feed(tail);
        }
        _ => data
            .split(|&b| b == b'\n')
            .take(200)
            .for_each(|line| scene.line(line)),
    }
    scene.end();
}

struct Scene {
    world: World,
    handler: Peer,
    caller: Peer,
    stranger: Peer,
    last_call: String,
    calls: u32,
    may_displace: bool,
}

impl Scene {
    fn new(mut world: World) -> Self {
        let [handler, caller, stranger] = [0; 3].map(|_| world.connect(Transport::Tcp));
        let hello = r#"{"action":"handshake","app_id":"h","pools":["default","p"],"triggers":["t","u"],"features":["attachments"]}"#;
        world.feed(handler, &encode_frame(hello, None));
        let hello = r#"{"action":"handshake","app_id":"c","pools":["default","p"]}"#;
        world.feed(caller, &encode_frame(hello, None));
        for pool in ["default", "p"] {
            let watch = format!(r#"{{"action":"watch","pool":"{pool}"}}"#);
            world.feed(caller, &encode_frame(&watch, None));
        }
        Scene {
            world,
            handler,
            caller,
            stranger,
            last_call: String::new(),
            calls: 0,
            may_displace: false,
        }
    }

    fn line(&mut self, line: &[u8]) {
        if line == b"#" {
            self.world.advance(1000);
        } else if let Ok(text) = std::str::from_utf8(line) {
            let text = text.replace("$CALL", &self.last_call);
            self.feed(&encode_frame(&text, None));
        } else {
            let mut frame = u32::try_from(line.len())
                .unwrap_or(0)
                .to_be_bytes()
                .to_vec();
            frame.extend_from_slice(line);
            self.feed(&frame);
        }
    }

    /// Passes the stranger's bytes to the server, then lets the others act.
    fn feed(&mut self, bytes: &[u8]) {
        self.world.feed(self.stranger, bytes);
        self.world.check();
        // An app that takes over an AppID closes its instances; nothing else may.
        self.may_displace |= bytes
            .windows(8)
            .any(|at| at == b"takeover" || at.starts_with(b"\\u"));
        assert!(
            self.may_displace
                || (self.world.is_open(self.handler) && self.world.is_open(self.caller)),
            "the attacker disturbed another client"
        );
        for message in self.world.messages(self.handler) {
            if let Some(call) = message.json["id"]
                .as_str()
                .filter(|_| message.json["action"] == "trigger")
            {
                let answers: &[&str] = match message.json["process"].as_str() {
                    Some("t") => &["ok"],
                    _ => &["partial", "progress", "error"],
                };
                for status in answers {
                    let answer = format!(
                        r#"{{"action":"response","in_reply_to":"{call}","status":"{status}"}}"#
                    );
                    self.world.feed(self.handler, &encode_frame(&answer, None));
                }
            }
        }
        for message in self.world.messages(self.stranger) {
            if let Some(call) = message.json["id"]
                .as_str()
                .filter(|_| message.json["action"] == "trigger")
            {
                call.clone_into(&mut self.last_call);
            }
        }
        for process in ["t", "mine"] {
            self.calls += 1;
            let id = self.calls;
            let call = format!(
                r#"{{"action":"trigger","process":"{process}","pool":"p","id":"{id}","ttl":900,"window":2}}"#
            );
            self.world.feed(self.caller, &encode_frame(&call, None));
        }
        self.world.messages(self.caller);
        self.world.take_log();
        self.world.check();
    }

    /// All clients leave, and nothing is left.
    fn end(mut self) {
        self.world.hang_up(self.stranger);
        self.world.advance(latzero_protocol::limits::TTL_MAX_MS);
        self.world.check();
        assert_eq!(self.world.calls_in_flight(), 0, "calls outlive their ttl");
        for peer in [self.handler, self.caller] {
            self.world.hang_up(peer);
        }
        self.world.check();
        assert_eq!(self.world.counts().instances, 0);
    }
}
