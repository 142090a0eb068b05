//! A stored call: its message and its state.

use latzero_protocol::encode::append_str;
use latzero_protocol::frame::Frame;
use latzero_protocol::limits::{ATTEMPTS_DEFAULT, ListBounds};
use latzero_protocol::message::{Request, Trigger};
use latzero_protocol::{AppId, Body, Envelope, InstanceId, Raw};

use super::super::repeats::scoped_key;
use crate::ledger::Reservation;
use crate::now::Time;

/// A call that outlives its first attempt.
pub(in crate::pool) struct DurableCall {
    /// The call as its caller sent it, without the fields that only the first attempt needed.
    pub(super) message: Box<str>,
    pub(super) attachment: Option<Box<[u8]>>,
    pub(super) caller: AppId,
    pub(super) instance: InstanceId,
    pub(super) deadline: Time,
    pub(super) attempt: u32,
    /// Most attempts.
    pub(super) attempts: u32,
    /// Items that the next handler may send if the caller set a window: those that earlier attempts
    /// did not use.
    pub(in crate::pool) window: Option<u64>,
    /// Whether it may be given to another handler after the first one died.
    pub(in crate::pool) redeliver: bool,
    /// Whether it may wait for a handler.
    pub(super) may_park: bool,
    /// The key, in the form of [`scoped_key`].
    pub(super) idempotency_key: Option<Box<str>>,
    /// Its number, if it is parked.
    pub(in crate::pool) number: Option<u64>,
    /// Its reservation, if it is not parked.
    pub(in crate::pool) held: Option<Reservation>,
}

impl DurableCall {
    pub(in crate::pool) fn new(
        (caller, instance): (&AppId, InstanceId),
        deadline: Time,
        trigger: &Trigger<'_>,
        held: Option<Reservation>,
    ) -> Box<DurableCall> {
        Box::new(DurableCall {
            message: message(trigger).into(),
            attachment: match trigger.body {
                Body::Bytes(bytes) => Some(bytes.into()),
                _ => None,
            },
            caller: caller.clone(),
            instance,
            deadline,
            attempt: 1,
            attempts: trigger.attempts,
            window: trigger.window,
            redeliver: trigger.redeliver,
            may_park: trigger.park.is_allowed(),
            idempotency_key: scoped_key(trigger),
            number: None,
            held,
        })
    }

    pub(super) fn bytes(&self) -> usize {
        let key = self.idempotency_key.as_ref().map_or(0, |key| key.len());
        self.message.len() + self.attachment.as_ref().map_or(0, |b| b.len()) + key + OVERHEAD
    }

    /// Decodes the call and passes it to `f`; `None` if the stored row is invalid.
    pub(super) fn read<R>(&self, f: impl FnOnce(&Trigger<'_>) -> R) -> Option<R> {
        let frame = Frame {
            json: self.message.as_bytes(),
            attachment: self.attachment.as_deref(),
        };
        let envelope = Envelope::parse(frame).ok()?.ok()?;
        match Request::decode(&envelope, &ListBounds::NONE).ok()? {
            Request::Trigger(mut trigger) => {
                trigger.window = self.window;
                Some(f(&trigger))
            }
            _ => None,
        }
    }
}

/// The approximate bytes of a stored call.
pub(in crate::pool) fn bytes(trigger: &Trigger<'_>) -> usize {
    let raw = |raw: Option<Raw<'_>>| raw.map_or(0, |raw| raw.text().len());
    let text = |text: &Option<std::borrow::Cow<'_, str>>| text.as_ref().map_or(0, |t| t.len());
    let destination = trigger.destination.as_ref().map(|d| d.raw);
    // Names and ids are in several tables, and so is a key with the names of its trigger.
    let names = trigger.process.len() + raw(destination) + text(&trigger.id);
    let key = text(&trigger.idempotency_key);
    trigger.body.len() + raw(trigger.headers) + text(&trigger.key) + 3 * names + 2 * key + OVERHEAD
}

/// Bytes of a stored call in addition to its message: what each of 100,000 small ones takes.
const OVERHEAD: usize = 840;

/// The message of a call as it is stored, with the original text of its payload.
fn message(trigger: &Trigger<'_>) -> String {
    let mut out = Vec::with_capacity(128 + trigger.body.len());
    out.extend_from_slice(b"{\"action\":\"trigger\",\"process\":");
    append_str(&mut out, &trigger.process);
    if let Some(id) = &trigger.id {
        out.extend_from_slice(b",\"id\":");
        append_str(&mut out, id);
    }
    if let Some(key) = &trigger.key {
        out.extend_from_slice(b",\"key\":");
        append_str(&mut out, key);
    }
    let mut raw = |name: &str, raw: Option<Raw<'_>>| {
        if let Some(raw) = raw {
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(raw.text().as_bytes());
        }
    };
    raw(
        ",\"destination\":",
        trigger.destination.as_ref().map(|d| d.raw),
    );
    raw(",\"headers\":", trigger.headers);
    if let Body::Json(json) = trigger.body {
        raw(",\"data\":", Some(json));
    }
    if trigger.redeliver {
        out.extend_from_slice(b",\"redeliver\":true");
    }
    if trigger.attempts != ATTEMPTS_DEFAULT {
        out.extend_from_slice(format!(",\"attempts\":{}", trigger.attempts).as_bytes());
    }
    if trigger.park.is_allowed() {
        out.extend_from_slice(b",\"park\":true");
    }
    out.push(b'}');
    String::from_utf8(out).expect("it was created from text")
}

/// The parts of a row's envelope: the caller's instance, and the call.
pub(super) fn split_envelope(envelope: &str) -> Option<(InstanceId, &str)> {
    let rest = envelope.strip_prefix("{\"instance\":\"")?;
    let (instance, rest) = rest.split_at_checked(16)?;
    let call = rest.strip_prefix("\",\"call\":")?.strip_suffix('}')?;
    Some((InstanceId(u64::from_str_radix(instance, 16).ok()?), call))
}
