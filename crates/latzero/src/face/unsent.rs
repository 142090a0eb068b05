//! A message before it is sent, with its options.

use std::time::{Duration, Instant};

use latzero_crypto::envelope::Body;
use latzero_crypto::events::Act;
use latzero_crypto::meta::{CallMeta, LentBlock};
use latzero_crypto::text;
use latzero_protocol::encode::append_str;
use latzero_protocol::limits::ID_BYTES_MAX;
use latzero_protocol::message::{IDEMPOTENCY_KEY, Park};
use latzero_protocol::{Code, InstanceId, Ran};
use serde_json::Value;

use crate::error::Error;
use crate::face::app::App;
use crate::keys::random;
use crate::payload::{IntoPayload, Payload};
use crate::wire::message::Message;
use crate::wire::pending::{Id, Name};
use crate::wire::sealed::{SEALED_ID, SealedCall, Unsealed};

/// How long to wait for the server's `timeout` after a call's time has ended: half of that time,
/// within these bounds.
pub(super) const GRACE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// A message that is being built, or waits to be sent. Boxed from the start, so that builders and
/// futures are cheap to move.
#[derive(Debug)]
pub(super) struct Unsent {
    pub(super) app: App,
    pub(super) message: Message,
    pub(super) headers: Vec<u8>,
    pub(super) timeout: Duration,
    pub(super) deadline: Option<Instant>,
    pub(super) window: Option<u64>,
    /// Blocks that are passed with a call, as JSON.
    pub(super) blocks: Vec<Value>,
    pub(super) parking: ParkOptions,
    /// Whether it is signed, which it can be only in an encrypted pool.
    pub(super) is_privileged: bool,
    /// Its destination; only for an app with keys, which may have to seal it.
    pub(super) route: Option<Box<Route>>,
    /// The keys to open its answer.
    pub(super) sealed: Option<SealedCall>,
    pub(super) failure: Option<Error>,
}

/// The fields of its envelope in addition to the content.
#[derive(Debug, Default)]
pub(super) struct Route {
    pub(super) name: String,
    pub(super) pool: Option<String>,
    pub(super) destination: String,
    pub(super) key: Option<String>,
}

/// Options of a call that may outlive an attempt.
#[derive(Debug, Default)]
pub(super) struct ParkOptions {
    pub(super) park: Park,
    pub(super) redeliver: bool,
    pub(super) attempts: Option<u32>,
    pub(super) idempotency_key: Option<String>,
    pub(super) id: Option<Box<str>>,
}

impl ParkOptions {
    pub(super) fn name(&self) -> Name<'_> {
        match &self.id {
            Some(id) => Name::Chosen(id),
            None if self.park.is_allowed() => Name::Durable,
            None => Name::Slot,
        }
    }
}

/// Checks an id that a caller chose.
pub(super) fn check_id(id: &str) -> Result<(), Error> {
    let text = if id.is_empty() || id.len() > ID_BYTES_MAX {
        format!(
            "a call's id must have 1 to {ID_BYTES_MAX} bytes; this one has {}",
            id.len()
        )
    } else if Id::parse(id).is_some() {
        format!("id '{id}' has the form of generated ids; choose another")
    } else {
        return Ok(());
    };
    Err(Error::new(Code::BadMessage, text))
}

impl Unsent {
    pub(super) fn new(app: &App, message: Message) -> Box<Self> {
        Box::new(Unsent {
            app: app.clone(),
            message,
            headers: Vec::new(),
            timeout: app.core().config.call_timeout,
            deadline: None,
            window: None,
            blocks: Vec::new(),
            parking: ParkOptions::default(),
            is_privileged: false,
            route: None,
            sealed: None,
            failure: None,
        })
    }

    pub(super) fn with_data<T: IntoPayload + ?Sized>(
        app: &App,
        action: &str,
        name: &str,
        data: &T,
    ) -> Box<Self> {
        let mut message = Message::new(action);
        message.string("process", name);
        let failure = message.body("data", data).err();
        let mut unsent = Self::new(app, message);
        unsent.failure = failure;
        unsent.route = app.core().has_sealed().then(|| {
            let name = name.to_owned();
            Box::new(Route {
                name,
                ..Route::default()
            })
        });
        unsent
    }

    pub(super) fn set_bytes(&mut self, bytes: Vec<u8>) {
        self.message.replace_body("data", bytes);
        // The data, which could not be written, is not sent.
        self.failure
            .take_if(|error| error.kind() == Code::BadMessage);
    }

    pub(super) fn set_pool(&mut self, pool: &str) {
        if let Some(route) = &mut self.route {
            route.pool = Some(pool.to_owned());
        }
        self.message.string("pool", pool);
    }

    pub(super) fn set_key(&mut self, key: &str) {
        if let Some(route) = &mut self.route {
            route.key = Some(key.to_owned());
        }
        self.message.string("key", key);
    }

    /// Seals a message to an encrypted pool: data, headers, and a copy of the fields that the
    /// server reads.
    pub(super) fn seal(&mut self, act: Act, ttl: Option<u64>) {
        let Some(route) = self.route.take() else {
            return self.check_plain();
        };
        let core = self.app.core().clone();
        let pool = match core.pool_of(route.pool.as_deref()) {
            Ok(pool) => pool.unwrap_or_default(),
            Err(error) => {
                self.failure.get_or_insert(error);
                return;
            }
        };
        if route.pool.is_none() {
            self.message.string("pool", &pool);
        }
        let Some(pool) = core.sealed_pool(&pool) else {
            return self.check_plain();
        };
        let mut headers = match self.take_headers() {
            Ok(headers) => headers,
            Err(error) => {
                self.failure.get_or_insert(error);
                return;
            }
        };
        let is_parkable = self.parking.park.is_allowed();
        if is_parkable && self.parking.id.is_none() {
            match random::<16>() {
                Ok(id) => self.set_id(&format!("{SEALED_ID}{}", text::encode(&id))),
                Err(error) => {
                    self.failure.get_or_insert(error);
                }
            }
        }
        let key = headers.remove(IDEMPOTENCY_KEY);
        let idempotency_key = key.and_then(|key| key.as_str().map(str::to_owned));
        if let Some(key) = &idempotency_key {
            // The server recognises repeats by this header.
            self.header(IDEMPOTENCY_KEY, key);
        }
        let blocks = self.blocks.iter().map(|block| LentBlock {
            block_id: block["block_id"].as_str().unwrap_or_default().to_owned(),
            mode: block["mode"].as_str().unwrap_or_default().to_owned(),
            block_uid: block["block_uid"].as_str().map(str::to_owned),
        });
        let meta = CallMeta {
            headers,
            ttl: ttl.unwrap_or(CallMeta::default().ttl),
            window: self.window,
            key: route.key.clone(),
            idempotency_key,
            blocks: blocks.collect(),
        };
        let body = self.message.take_body("data");
        let unsealed = Unsealed {
            act,
            name: &route.name,
            destination: &route.destination,
            meta,
            body: match &body {
                Payload::None => Body::Empty,
                Payload::Json(json) => Body::Json(json),
                Payload::Bytes(bytes) => Body::Bytes(bytes),
            },
            is_privileged: self.is_privileged,
            parked_as: self.parking.id.as_deref().filter(|_| is_parkable),
        };
        match pool.seal(&unsealed) {
            Ok((envelope, call)) => {
                self.message.replace_body("data", envelope);
                self.sealed = call;
            }
            Err(error) => {
                self.failure.get_or_insert(error);
            }
        }
    }

    /// Checks a message to a pool that is not encrypted.
    fn check_plain(&mut self) {
        if self.is_privileged {
            let text = "only a message to an encrypted pool can be privileged";
            let refused = Error::new(Code::BadMessage, text).with_ran(Ran::No);
            self.failure.get_or_insert(refused);
        }
    }

    fn set_id(&mut self, id: &str) {
        self.message.string("id", id);
        self.parking.id = Some(id.into());
    }

    pub(super) fn set_app(&mut self, app_id: &str) {
        self.set_destination(app_id);
        self.message.string("destination", app_id);
    }

    pub(super) fn set_destination(&mut self, app_id: &str) {
        if let Some(route) = &mut self.route {
            app_id.clone_into(&mut route.destination);
        }
    }

    pub(super) fn set_instance(&mut self, app_id: &str, instance: InstanceId) {
        self.set_destination(app_id);
        let destination = serde_json::json!({ "app_id": app_id, "instance": instance });
        self.message
            .json("destination", destination.to_string().as_bytes());
    }

    pub(super) fn header(&mut self, name: &str, value: &str) {
        self.headers
            .push(if self.headers.is_empty() { b'{' } else { b',' });
        append_str(&mut self.headers, name);
        self.headers.push(b':');
        append_str(&mut self.headers, value);
    }

    /// The headers so far; none are left.
    fn take_headers(&mut self) -> Result<serde_json::Map<String, Value>, Error> {
        if self.headers.is_empty() {
            return Ok(serde_json::Map::new());
        }
        self.headers.push(b'}');
        serde_json::from_slice(&std::mem::take(&mut self.headers)).map_err(|error| {
            let text = format!("the headers cannot be sealed: {error}");
            Error::new(Code::BadMessage, text)
        })
    }

    /// Adds the headers, once all are known.
    pub(super) fn finish(&mut self) {
        if !self.headers.is_empty() {
            self.headers.push(b'}');
            self.message.json("headers", &self.headers);
        }
        if !self.blocks.is_empty() {
            let blocks = Value::Array(std::mem::take(&mut self.blocks));
            self.message.json("blocks", blocks.to_string().as_bytes());
        }
    }
}

pub(super) fn grace(timeout: Duration) -> Duration {
    (timeout / 2).clamp(GRACE.0, GRACE.1)
}

pub(super) fn too_late(is_connected: bool) -> Error {
    let error = match is_connected {
        true => Error::new(
            Code::Overloaded,
            "the call's time ended while it waited to be sent: too many calls are waiting",
        ),
        false => Error::new(
            Code::Disconnected,
            "there was no connection to the server within the call's time; is it running?",
        ),
    };
    error.with_ran(Ran::No)
}
