//! The built-in app `latzero` in the pool `system`: an ordinary session whose connection is this
//! process.
//!
//! Messages in its outbox are read here, answered, and passed to its session. So the core needs no
//! special case, and every server has triggers to call.

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use latzero_crypto::proof::ChannelBinding;
use latzero_fabric::driver::{Driver as _, Report};
use latzero_fabric::outbox::PendingWrite;
use latzero_fabric::registry::View;
use latzero_fabric::session::Terms;
use latzero_fabric::{Session, Transport};
use latzero_protocol::frame::{self, Accept, Frame};
use latzero_protocol::limits::{SYSTEM_APP, SYSTEM_POOL};
use latzero_protocol::message::{Fields, Page};
use latzero_protocol::{AppId, Body, Code, Envelope, InstanceId, Refusal, encode};
use serde_json::json;

use crate::host::IoHost;
use crate::peer::Peer;

/// The built-in app.
pub(crate) struct BuiltIn {
    peer: Arc<Peer>,
    session: Session<IoHost>,
}

const TRIGGERS: [(&str, &str); 5] = [
    ("echo", "Returns its payload."),
    (
        "time",
        "Returns the server's time: {\"unix_ms\":…,\"uptime_ms\":…}.",
    ),
    (
        "apps",
        "Lists the apps that the server knows; {\"pool\":…,\"after\":…} selects a part.",
    ),
    ("pools", "Lists the pools; {\"after\":…} selects a part."),
    ("stats", "Returns the server's statistics."),
];

impl BuiltIn {
    /// Connects the app.
    pub(crate) fn start(host: &mut IoHost) -> BuiltIn {
        let user = host.shared.core.context.ledger.user(true);
        let peer = host.shared.new_peer(None, &user);
        let terms = Terms {
            transport: Transport::BuiltIn,
            is_own: false,
            binding: ChannelBinding::None,
            is_loopback: true,
            uid: None,
            is_admin: false,
            user,
            max_frame_before_handshake: usize::MAX,
        };
        let mut builtin = BuiltIn {
            session: Session::new(Arc::clone(&peer), terms),
            peer,
        };
        let triggers: Vec<_> = TRIGGERS
            .iter()
            .map(|(name, doc)| json!({"name": name, "doc": doc}))
            .collect();
        let handshake = json!({
            "action": "handshake", "app_id": SYSTEM_APP, "pools": [SYSTEM_POOL],
            "triggers": triggers,
            "features": ["attachments"], "meta": {"version": env!("CARGO_PKG_VERSION")},
        });
        let handshake = handshake.to_string();
        let _ = builtin.session.handle(
            Frame {
                json: handshake.as_bytes(),
                attachment: None,
            },
            &mut host.turn(),
        );
        assert!(
            builtin.session.is_ready(),
            "the built-in app's handshake is valid"
        );
        builtin
    }

    pub(crate) fn is(&self, peer: &Arc<Peer>) -> bool {
        Arc::ptr_eq(&self.peer, peer)
    }

    /// Reads and answers the messages that were appended for it.
    pub(crate) fn turn(&mut self, host: &mut IoHost) {
        // Messages that others append in the meantime are read too: the thread that is reading
        // handles them.
        loop {
            let Some(taken) = self.peer.link().outbox.take() else {
                return;
            };
            self.answer(taken, host);
        }
    }

    fn answer(&mut self, mut taken: PendingWrite<Arc<OwnedFd>>, host: &mut IoHost) {
        let accept = Accept {
            max_frame: usize::MAX,
            attachments: true,
        };
        let mut answer = Vec::new();
        // Frames are appended whole; one shared with other receivers is a separate piece.
        while !taken.is_done() {
            let (bytes, _) = taken.next();
            let Ok(Some((frame, used))) = frame::decode(bytes, accept) else {
                unreachable!("the core writes whole frames");
            };
            answer.clear();
            if let Ok(Ok(envelope)) = Envelope::parse(frame) {
                answer_to(&envelope, host, &mut answer);
            }
            taken.advance(used);
            if let Ok(Some((frame, _))) = frame::decode(&answer, accept) {
                let _ = self.session.handle(frame, &mut host.turn());
            }
        }
        if let Some(buf) = self.peer.link().outbox.put_back(taken) {
            host.effects.buffers.recycle(buf);
        }
    }
}

/// Appends the answer to a call; other messages get none.
fn answer_to(e: &Envelope<'_>, host: &mut IoHost, out: &mut Vec<u8>) {
    let text = |field: Option<latzero_protocol::Raw<'_>>| {
        field.and_then(|raw| raw.as_str().map(Cow::into_owned))
    };
    if text(e.action).as_deref() != Some("trigger") {
        return;
    }
    let Some(id) = text(e.id) else { return };
    let body = e.body(e.data, "data").unwrap_or(Body::None);
    let process = text(e.process).unwrap_or_default();
    let (app, instance) = caller(e);
    match reply(&process, body, (&app, instance), host) {
        Ok(Reply::Echo) => {
            let body = if body == Body::None {
                Body::Json(latzero_protocol::Raw::NULL)
            } else {
                body
            };
            let status = latzero_protocol::message::Status::Ok;
            let answer = encode::Answer {
                in_reply_to: &id,
                pool: None,
                status,
                error: None,
                headers: e.headers,
                body,
            };
            encode::answer(out, &answer, encode::Attachments::Taken);
        }
        Ok(Reply::Json(json)) => encode::reply(out, &id, &json),
        Err(refusal) => encode::refusal(out, Some(&id), &refusal),
    }
}

enum Reply {
    Echo,
    Json(String),
}

/// The AppID of the caller, and its instance.
fn caller(e: &Envelope<'_>) -> (AppId, InstanceId) {
    let origin = e.origin.and_then(|raw| Fields::of(raw.text()).ok());
    let named = origin.and_then(|fields| {
        let app_id = AppId::new(&fields.required_string("app_id").ok()?).ok()?;
        let instance = InstanceId::parse(&fields.required_string("instance").ok()?)?;
        Some((app_id, instance))
    });
    named.expect("the core names the caller")
}

fn reply(
    process: &str,
    body: Body<'_>,
    (app, instance): (&AppId, InstanceId),
    host: &mut IoHost,
) -> Result<Reply, Refusal> {
    let view = View {
        app,
        uid: host.with_registry(|registry, _| registry.uid_of(app, instance)),
        is_admin: false,
        instance: None,
    };
    let fields = match body {
        Body::Json(raw) if raw.is_object() && process != "echo" => Some(Fields::of(raw.text())?),
        _ => None,
    };
    let string = |name: &str| {
        fields
            .as_ref()
            .map_or(Ok(None), |fields| fields.string(name))
    };
    let json = match process {
        "echo" => return Ok(Reply::Echo),
        "time" => {
            let uptime = host
                .now
                .monotonic
                .since(host.shared.books.started)
                .as_millis() as u64;
            json!({"unix_ms": host.now.unix_ms, "uptime_ms": uptime}).to_string()
        }
        "stats" => IoHost::report(&mut host.turn(), Report::Stats, &view),
        "apps" => {
            let pool = string("pool")?
                .map(|name| latzero_protocol::PoolName::new(&name))
                .transpose()?;
            let page = Page {
                after: string("after")?,
                limit: Page::LIMIT_MAX,
            };
            let shared = Arc::clone(&host.shared);
            host.with_registry(|registry, _| {
                registry.list_apps(pool.as_ref(), &page, &view, |then| {
                    shared.clock.unix_ms(then)
                })
            })?
        }
        "pools" => {
            let page = Page {
                after: string("after")?,
                limit: Page::LIMIT_MAX,
            };
            host.with_registry(|registry, _| registry.list_pools(&page, &view))
        }
        _ => {
            return Err(Refusal::new(
                Code::NoHandler,
                "the built-in app does not serve this trigger",
            ));
        }
    };
    Ok(Reply::Json(json))
}
