//! Messages from clients, decoded from their envelope into borrowed, validated values.
//!
//! Every field is validated here, so the fabric only sees valid messages.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use crate::envelope::{
    Body, Envelope, Raw, field_name, id_field, missing, mistyped, shorten, stored_object, unescape,
};
use crate::error::{Code, Refusal};
use crate::id::InstanceId;
use crate::limits::{
    ATTEMPTS_DEFAULT, ATTEMPTS_MAX, DOC_BYTES_MAX, KEY_BYTES_MAX, ListBounds, PARKED_TTL_MAX_MS,
    TTL_DEFAULT_MS, TTL_MAX_MS, WINDOW_MAX,
};
use crate::name::{AppId, PoolName, TriggerName};
use crate::policy::Policy;
use crate::proof::{self, AdminProof, AppProof, Chain, Sealed};
use crate::scan;

/// One message from a client.
#[derive(Debug)]
pub enum Request<'a> {
    /// Names the app of a connection.
    Handshake(Box<Handshake<'a>>),
    /// Calls a trigger.
    Trigger(Trigger<'a>),
    /// Answers a call, or a ping of the server.
    Response(Response<'a>),
    /// Sends an event to the handlers of a trigger, without an answer.
    Emit(Emit<'a>),
    /// Cancels a call of the sender.
    Cancel(CallRef<'a>),
    /// Allows further items of a stream.
    Ack(CallRef<'a>, u64),
    /// Adds triggers that the app serves.
    TriggerRegister(Vec<TriggerSpec>),
    /// Removes triggers that the app serves.
    TriggerUnregister(Vec<TriggerSpec>),
    /// Creates a pool.
    PoolCreate(PoolCreate<'a>),
    /// Asks for a challenge, to prove an app or an administrator.
    Challenge,
    /// Proves an app by its key.
    AppProof(Box<AppProof<'a>>),
    /// Proves an administrator.
    AdminProof(Box<AdminProof<'a>>),
    /// Asks for a challenge, to prove an encrypted pool.
    PoolChallenge(PoolName),
    /// Joins an encrypted pool with a proof.
    PoolProve(PoolName, Raw<'a>),
    /// Asks for descriptors of earlier epochs.
    PoolChain(Chain),
    /// Moves an encrypted pool to the epoch of a descriptor.
    PoolRotate(PoolName, Cow<'a, str>),
    /// Joins a pool.
    PoolJoin(PoolName),
    /// Leaves a pool.
    PoolLeave(PoolName),
    /// Lists the pools.
    PoolList(Page<'a>),
    /// Describes a pool.
    PoolInfo(PoolName, Option<TriggerName>),
    /// Removes a pool; with `force` even if it has members.
    PoolRemove(PoolName, bool),
    /// Lists the apps, of one pool or of all.
    AppList(Option<PoolName>, Page<'a>),
    /// Subscribes to a pool's events.
    Watch(PoolName, EventSet),
    /// Unsubscribes from a pool's events.
    Unwatch(PoolName),
    /// A request about memory blocks.
    Memory(Box<crate::memory::Memory<'a>>),
    /// Checks that the server responds.
    Ping,
    /// Asks for statistics.
    Stats,
    /// Asks for the health of the server's parts.
    Health,
    /// A request about parked calls.
    Parked(Box<crate::parked::Parked>),
    /// A request only for administrators.
    Admin(Admin),
}

/// The first message of a connection.
#[derive(Debug)]
pub struct Handshake<'a> {
    /// The AppID.
    pub app_id: AppId,
    /// Pools to join; if absent, the app rejoins the pools that it had.
    pub pools: Option<Vec<PoolName>>,
    /// Whether the list names encrypted pools, for which the app sends proofs later.
    pub names_encrypted: bool,
    /// Triggers to serve; if absent, the app serves the triggers that it had.
    pub triggers: Option<Vec<TriggerSpec>>,
    /// What the app says about itself, shown when apps are listed.
    pub meta: Option<Raw<'a>>,
    /// The protocol version that the client speaks.
    pub protocol: u64,
    /// Features that the client offers.
    pub features: Features,
    /// Fail if another instance is connected.
    pub exclusive: bool,
    /// Displace other instances.
    pub takeover: bool,
    /// The app is forgotten when its last instance disconnects.
    pub transient: bool,
    /// Restored triggers are served only once the app registers them again.
    pub hold_triggers: bool,
    /// This instance gets no answers to parked calls.
    pub hold_answers: bool,
}

/// Optional parts of the protocol, which are used if both sides named them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features {
    /// Attachment frames.
    pub attachments: bool,
    /// File descriptors over a Unix socket.
    pub fd_passing: bool,
}

impl Features {
    /// The features as the wire lists them.
    #[must_use]
    pub fn names(self) -> Vec<&'static str> {
        let all = [
            (self.attachments, "attachments"),
            (self.fd_passing, "fd_passing"),
        ];
        all.into_iter()
            .filter_map(|(on, name)| on.then_some(name))
            .collect()
    }

    /// The features that both sides have.
    #[must_use]
    pub fn and(self, other: Features) -> Features {
        Features {
            attachments: self.attachments && other.attachments,
            fd_passing: self.fd_passing && other.fd_passing,
        }
    }
}

/// How a call finds one handler among several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strategy {
    /// Each handler in turn.
    #[default]
    RoundRobin,
    /// A random one.
    Random,
    /// The one with the fewest calls in flight.
    LeastBusy,
    /// The same one for the same `key`, as long as it is connected.
    Sticky,
}

impl Strategy {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Strategy::RoundRobin => "round_robin",
            Strategy::Random => "random",
            Strategy::LeastBusy => "least_busy",
            Strategy::Sticky => "sticky",
        }
    }

    /// Reads the word on the wire.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        [
            Strategy::RoundRobin,
            Strategy::Random,
            Strategy::LeastBusy,
            Strategy::Sticky,
        ]
        .into_iter()
        .find(|s| s.as_str() == text)
    }
}

/// A trigger that an app offers to serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TriggerSpec {
    /// Its name.
    pub name: TriggerName,
    /// The pools it is served in; absent means every pool that the app is in.
    pub pools: Option<Vec<PoolName>>,
    /// How calls are spread over its handlers.
    pub strategy: Strategy,
    /// Maximum calls at a time for one instance; 0 for only emits.
    pub concurrency: Option<u32>,
    /// What it does, for people.
    pub doc: Option<String>,
    /// Whether only writers of an encrypted pool may call it or emit to it. It is served only
    /// in encrypted pools.
    pub privileged: bool,
    /// What its payloads look like, for people and programs: the text of a JSON object, which the
    /// server keeps and shows. Copies of the trigger share it.
    pub schema: Option<Arc<str>>,
}

impl TriggerSpec {
    /// A trigger that is served in every pool, by each handler in turn.
    #[must_use]
    pub fn new(name: TriggerName) -> Self {
        TriggerSpec {
            name,
            pools: None,
            strategy: Strategy::default(),
            concurrency: None,
            doc: None,
            privileged: false,
            schema: None,
        }
    }

    /// The trigger as an object on the wire, without its schema.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let mut json = serde_json::json!({
            "name": self.name, "pools": self.pools, "strategy": self.strategy.as_str(),
            "concurrency": self.concurrency, "doc": self.doc,
        });
        if self.privileged {
            json["privileged"] = true.into();
        }
        json
    }

    /// The text of the trigger as an object on the wire.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = self.to_json().to_string();
        if let Some(schema) = &self.schema {
            push_field(&mut text, "schema", schema);
        }
        text
    }

    /// A copy without the schema, for those who only serve the trigger.
    #[must_use]
    pub fn without_schema(&self) -> TriggerSpec {
        TriggerSpec {
            schema: None,
            ..self.clone()
        }
    }

    /// How many of the bytes that an app may register it uses: name, pools, doc and schema.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let pools = self.pools.iter().flatten().map(|name| name.as_str().len());
        let doc = self.doc.as_ref().map_or(0, String::len);
        let schema = self.schema.as_ref().map_or(0, |schema| schema.len());
        self.name.as_str().len() + doc + schema + pools.sum::<usize>()
    }

    /// Whether the trigger is served in `pool`.
    #[must_use]
    pub fn is_for(&self, pool: &PoolName) -> bool {
        self.pools.as_ref().is_none_or(|pools| pools.contains(pool))
    }

    /// Whether another trigger is the same but for the pools that it names, and its schema.
    #[must_use]
    pub fn is_same(&self, other: &TriggerSpec) -> bool {
        let all = |spec: &TriggerSpec| TriggerSpec {
            pools: None,
            ..spec.without_schema()
        };
        all(self) == all(other)
    }
}

/// Adds a field, whose value is JSON text, to the text of an object that has fields.
pub fn push_field(object: &mut String, name: &str, value: &str) {
    object.pop();
    object.extend([",\"", name, "\":", value, "}"]);
}

/// The app that a message is for, and optionally the instance.
#[derive(Debug, Clone)]
pub struct Destination<'a> {
    /// The AppID.
    pub app_id: Cow<'a, str>,
    /// The only instance that may get the message.
    pub instance: Option<InstanceId>,
    /// The field as it was received.
    pub raw: Raw<'a>,
}

/// Whether a call may wait on disk for a handler.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Park {
    /// It may not.
    #[default]
    No,
    /// It may, if no handler can take it now.
    IfNeeded,
    /// Always: it is on disk before a handler gets it, so its caller may disconnect.
    Always,
}

impl Park {
    /// Whether the call may be parked.
    #[must_use]
    pub fn is_allowed(self) -> bool {
        self != Park::No
    }
}

/// A trigger call.
#[derive(Debug)]
pub struct Trigger<'a> {
    /// The caller's id; without one it gets no answer.
    pub id: Option<Cow<'a, str>>,
    /// The trigger's name, not yet checked: a name that is found is valid.
    pub process: Cow<'a, str>,
    /// The pool, if the caller names one.
    pub pool: Option<Cow<'a, str>>,
    /// The app to call, if the caller names one.
    pub destination: Option<Destination<'a>>,
    /// Time to live in milliseconds.
    pub ttl_ms: u64,
    /// The key of a sticky trigger.
    pub key: Option<Cow<'a, str>>,
    /// How many items of a stream may be sent without acknowledgement.
    pub window: Option<u64>,
    /// Whether it may wait on disk for a handler.
    pub park: Park,
    /// If a handler's connection ends before it answers, give the call to the next handler.
    pub redeliver: bool,
    /// How many times it is delivered at most.
    pub attempts: u32,
    /// The header `idempotency-key`, by which repeats of the call are recognised.
    pub idempotency_key: Option<Cow<'a, str>>,
    /// Blocks that the handler may use during the call; empty for most calls.
    pub blocks: Vec<crate::memory::BlockUse>,
    /// Headers, passed on.
    pub headers: Option<Raw<'a>>,
    /// The payload, passed on.
    pub body: Body<'a>,
}

/// An event that gets no answer.
#[derive(Debug)]
pub struct Emit<'a> {
    /// The trigger's name, not yet checked: a name that is found is valid.
    pub process: Cow<'a, str>,
    /// The pool, if the sender names one.
    pub pool: Option<Cow<'a, str>>,
    /// The app to send it to, if the sender names one.
    pub destination: Option<Destination<'a>>,
    /// Whether it goes to one handler rather than to all.
    pub one: bool,
    /// The key by which a sticky trigger chooses a handler.
    pub key: Option<Cow<'a, str>>,
    /// Headers, passed on.
    pub headers: Option<Raw<'a>>,
    /// The payload, passed on.
    pub body: Body<'a>,
}

/// What a response says about its call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It succeeded.
    Ok,
    /// It failed.
    Error,
    /// One item of a stream.
    Partial,
    /// A progress report.
    Progress,
}

impl Status {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Error => "error",
            Status::Partial => "partial",
            Status::Progress => "progress",
        }
    }

    /// Reads the word on the wire.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "ok" => Some(Status::Ok),
            "error" => Some(Status::Error),
            "partial" => Some(Status::Partial),
            "progress" => Some(Status::Progress),
            _ => None,
        }
    }

    /// Whether it ends the call.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Status::Ok | Status::Error)
    }
}

/// A handler's answer.
#[derive(Debug)]
pub struct Response<'a> {
    /// The id that the server gave the call.
    pub in_reply_to: Cow<'a, str>,
    /// What it says about the call.
    pub status: Status,
    /// The error object of a failed call.
    pub error: Option<Raw<'a>>,
    /// Headers, passed on.
    pub headers: Option<Raw<'a>>,
    /// The payload, passed on.
    pub body: Body<'a>,
}

/// A call, identified by its caller's id.
#[derive(Debug)]
pub struct CallRef<'a> {
    /// The id that the caller gave it.
    pub id: Cow<'a, str>,
}

/// A page of a long list, so that replies stay far below a frame's limit.
#[derive(Debug)]
pub struct Page<'a> {
    /// Only names after this one.
    pub after: Option<Cow<'a, str>>,
    /// Most entries in the reply.
    pub limit: usize,
}

impl Page<'_> {
    /// Maximum and default number of entries of one page.
    pub const LIMIT_MAX: usize = 1000;
}

/// A pool to create.
#[derive(Debug)]
pub struct PoolCreate<'a> {
    /// Its name.
    pub pool: PoolName,
    /// Properties for people and programs; the server keeps and shows them.
    pub properties: Option<Raw<'a>>,
    /// Whether it survives a restart of the server.
    pub durable: bool,
    /// Who may do what in it.
    pub policy: Policy,
    /// The descriptor of an encrypted pool.
    pub sealed: Option<Sealed<'a>>,
}

/// Which events a watcher wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventSet(u16);

macro_rules! events {
    ($($name:ident $wire:literal $bit:literal,)*) => {
        /// An event of a pool.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Event {
            $(#[doc = concat!("`", $wire, "`.")] $name = 1 << $bit,)*
        }

        impl Event {
            /// Every event.
            pub const ALL: &[Event] = &[$(Event::$name),*];

            /// The word on the wire.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Event::$name => $wire,)* }
            }
        }
    };
}

events! {
    AppOnline "app_online" 0,
    AppOffline "app_offline" 1,
    TriggerAdded "trigger_added" 2,
    TriggerRemoved "trigger_removed" 3,
    BlockCreated "block_created" 4,
    BlockChanged "block_changed" 5,
    BlockRemoved "block_removed" 6,
    PoolRemoved "pool_removed" 7,
}

impl EventSet {
    /// Every event.
    pub const ALL: EventSet = EventSet(u16::MAX);

    /// Whether `event` is wanted.
    #[must_use]
    pub fn has(self, event: Event) -> bool {
        self.0 & event as u16 != 0
    }

    /// The events' words on the wire.
    #[must_use]
    pub fn names(self) -> Vec<&'static str> {
        let wanted = Event::ALL.iter().filter(|event| self.has(**event));
        wanted.map(|event| event.as_str()).collect()
    }

    /// The set of the known events in `names`.
    #[must_use]
    pub fn of<'a>(names: impl Iterator<Item = &'a str>) -> EventSet {
        let known = |name: &str| Event::ALL.iter().find(|event| event.as_str() == name);
        EventSet(
            names
                .filter_map(known)
                .fold(0, |set, event| set | *event as u16),
        )
    }
}

/// A request only for administrators.
#[derive(Debug)]
pub struct Admin {
    /// What is asked for.
    pub action: AdminAction,
}

/// What administrators may ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdminAction {
    /// Drain and stop.
    Shutdown,
    /// Reload the settings.
    Reload,
    /// Close the connections of an app, or of one instance.
    Kick(AppId, Option<InstanceId>),
    /// Delete the registration of an offline app.
    Forget(AppId),
    /// Remove an app's key.
    RemoveKey(AppId),
    /// Write a backup to a file.
    Backup {
        /// A path on the server's machine; if absent, a new file in its backup directory.
        to: Option<String>,
        /// Leave out the content of blocks.
        without_blocks: bool,
    },
    /// Hand over sockets and blocks to a server that takes over; or, once that is done, stop.
    HandOver {
        /// Whether it has taken them.
        taken: bool,
    },
    /// Check the database, completely or only its structure.
    CheckDatabase(bool),
    /// Run an SQL query on the database.
    QueryDatabase(String),
}

impl<'a> Request<'a> {
    /// Whether it has no effect but its reply.
    #[must_use]
    pub fn is_question(&self) -> bool {
        if let Request::Parked(parked) = self {
            return !matches!(parked.action, crate::parked::ParkedAction::Change(_));
        }
        matches!(
            self,
            Request::PoolList(_)
                | Request::PoolInfo(..)
                | Request::PoolChain(_)
                | Request::AppList(..)
                | Request::Ping
                | Request::Stats
                | Request::Health
        )
    }

    /// Decodes a message. Its lists are bounded while they are read, so that no message costs more
    /// than its bytes.
    ///
    /// # Errors
    /// `bad_message`, `invalid_name`, `unknown_action`, `too_large`, `quota` or
    /// `unsupported_protocol`, with the field or the limit named.
    #[inline]
    pub fn decode(e: &Envelope<'a>, bounds: &ListBounds) -> Result<Self, Refusal> {
        let action = Envelope::required_string(e.action, "action")?;
        Ok(match &*action {
            "trigger" => Request::Trigger(trigger(e)?),
            "response" => Request::Response(response(e)?),
            "emit" => Request::Emit(emit(e)?),
            "ack" => {
                let count = Envelope::number(e.count, "count", 1..=WINDOW_MAX)?;
                Request::Ack(
                    call_ref(e)?,
                    count.ok_or_else(|| missing("count", "a whole number"))?,
                )
            }
            "cancel" => Request::Cancel(call_ref(e)?),
            "handshake" => Request::Handshake(Box::new(handshake(e, bounds)?)),
            "trigger_register" => Request::TriggerRegister(triggers_field(e, bounds)?),
            "trigger_unregister" => Request::TriggerUnregister(triggers_field(e, bounds)?),
            "pool_create" => Request::PoolCreate(pool_create(e)?),
            "challenge" => Request::Challenge,
            "app_proof" => proof::app_proof(e)?,
            "admin_proof" => proof::admin_proof(e)?,
            "pool_challenge" => Request::PoolChallenge(pool_field(e)?),
            "pool_join" => proof::pool_join(e)?,
            "pool_chain" => proof::pool_chain(e)?,
            "pool_rotate" => proof::pool_rotate(e)?,
            "pool_leave" => Request::PoolLeave(pool_field(e)?),
            "pool_list" => Request::PoolList(page(e)?),
            "pool_info" => {
                let trigger = Fields::of_message(e)?.string("trigger")?;
                let trigger = trigger.map(|name| TriggerName::new(&name)).transpose()?;
                Request::PoolInfo(pool_field(e)?, trigger)
            }
            "pool_remove" => {
                let fields = Fields::of_message(e)?;
                Request::PoolRemove(pool_field(e)?, fields.flag("force")?)
            }
            "app_list" => Request::AppList(optional_pool(e)?, page(e)?),
            "watch" => Request::Watch(pool_field(e)?, events(&Fields::of_message(e)?)?),
            "unwatch" => Request::Unwatch(pool_field(e)?),
            "ping" => Request::Ping,
            "stats" => Request::Stats,
            "health" => Request::Health,
            "shutdown" => admin(AdminAction::Shutdown),
            "reload" => admin(AdminAction::Reload),
            "hand_over" => {
                let taken = Fields::of_message(e)?.flag("taken")?;
                admin(AdminAction::HandOver { taken })
            }
            "kick" => {
                let fields = Fields::of_message(e)?;
                let app = AppId::new(&fields.required_string("app_id")?)?;
                let instance = fields.string("instance")?;
                let instance = instance.map(|text| instance_id(&text)).transpose()?;
                admin(AdminAction::Kick(app, instance))
            }
            "app_forget" => {
                let fields = Fields::of_message(e)?;
                let app = AppId::new(&fields.required_string("app_id")?)?;
                admin(AdminAction::Forget(app))
            }
            "app_key_remove" => {
                let fields = Fields::of_message(e)?;
                let app = AppId::new(&fields.required_string("app_id")?)?;
                admin(AdminAction::RemoveKey(app))
            }
            "backup" => {
                let fields = Fields::of_message(e)?;
                let to = fields.string("to")?.map(Cow::into_owned);
                let without_blocks = fields.flag("without_blocks")?;
                admin(AdminAction::Backup { to, without_blocks })
            }
            "db_check" => {
                let is_thorough = Fields::of_message(e)?.flag("full")?;
                admin(AdminAction::CheckDatabase(is_thorough))
            }
            "db_query" => {
                let sql = Fields::of_message(e)?.required_string("sql")?.into_owned();
                admin(AdminAction::QueryDatabase(sql))
            }
            action if action.starts_with("parked_") => {
                Request::Parked(Box::new(crate::parked::decode(e, action)?))
            }
            action if action.starts_with("memory_") => {
                Request::Memory(Box::new(crate::memory::decode(e, action)?))
            }
            other => {
                return Err(unknown(other));
            }
        })
    }
}

pub(crate) fn unknown(action: &str) -> Refusal {
    Refusal::new(
        Code::UnknownAction,
        format!("unknown action '{}'", shorten(action)),
    )
}

fn handshake<'a>(e: &Envelope<'a>, bounds: &ListBounds) -> Result<Handshake<'a>, Refusal> {
    let fields = Fields::of_message(e)?;
    let mut features = Features::default();
    fields.each_string("features", |name| {
        features.attachments |= name == "attachments";
        features.fd_passing |= name == "fd_passing";
        Ok(())
    })?;
    let triggers = fields.field("triggers");
    let triggers = triggers
        .map(|raw| triggers_within(raw, bounds))
        .transpose()?;
    let meta = stored_object(fields.field("meta"), "meta")?;
    let protocol = fields.field("protocol").map_or(Ok(Some(1)), |raw| {
        Envelope::number(Some(raw), "protocol", 1..=u64::MAX)
    })?;
    Ok(Handshake {
        app_id: AppId::new(&fields.required_string("app_id")?)?,
        pools: pools(&fields, "pools", bounds)?,
        names_encrypted: pools(&fields, "encrypted_pools", bounds)?
            .is_some_and(|named| !named.is_empty()),
        triggers,
        meta,
        protocol: protocol.unwrap_or(1),
        features,
        exclusive: fields.flag("exclusive")?,
        takeover: fields.flag("takeover")?,
        transient: fields.flag("transient")?,
        hold_triggers: fields.flag("hold_triggers")?,
        hold_answers: fields.flag("hold_answers")?,
    })
}

/// The header by which repeats of a call are recognised.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";

fn idempotency_key<'a>(headers: Option<Raw<'a>>) -> Result<Option<Cow<'a, str>>, Refusal> {
    let Some(headers) = headers.filter(|raw| raw.text().contains(IDEMPOTENCY_KEY)) else {
        return Ok(None);
    };
    // The size of headers is bounded, not their number.
    let mut found = None;
    let _ = scan::object::<scan::ScanError>(headers.text(), |name, value| {
        if unescape(name).as_deref() == Some(IDEMPOTENCY_KEY) {
            found = Some(Raw::scanned(value));
        }
        Ok(())
    });
    let key = Envelope::string(found, IDEMPOTENCY_KEY)?;
    match &key {
        Some(key) if key.is_empty() || key.len() > KEY_BYTES_MAX => Err(Refusal::new(
            Code::BadMessage,
            format!("header '{IDEMPOTENCY_KEY}' must have 1 to {KEY_BYTES_MAX} bytes"),
        )),
        _ => Ok(key),
    }
}

fn trigger<'a>(e: &Envelope<'a>) -> Result<Trigger<'a>, Refusal> {
    let headers = e.checked_headers()?;
    let park = park(e)?;
    let ttl_max = if park.is_allowed() {
        PARKED_TTL_MAX_MS
    } else {
        TTL_MAX_MS
    };
    Ok(Trigger {
        id: e.correlation_id()?,
        process: Envelope::required_string(e.process, "process")?,
        pool: Envelope::string(e.pool, "pool")?,
        destination: destination(e)?,
        ttl_ms: Envelope::number(e.ttl, "ttl", 1..=ttl_max)?.unwrap_or(TTL_DEFAULT_MS),
        key: key(e)?,
        window: Envelope::number(e.window, "window", 1..=WINDOW_MAX)?,
        park,
        redeliver: Envelope::flag(e.redeliver, "redeliver")?,
        attempts: attempts(e)?,
        idempotency_key: idempotency_key(headers)?,
        blocks: e.blocks.map_or(Ok(Vec::new()), crate::memory::block_uses)?,
        headers,
        body: e.body(e.data, "data")?,
    })
}

fn park(e: &Envelope<'_>) -> Result<Park, Refusal> {
    let Some(raw) = e.park.filter(|raw| !raw.is_null()) else {
        return Ok(Park::No);
    };
    match (raw.as_bool(), raw.as_str()) {
        (Some(false), _) => Ok(Park::No),
        (Some(true), _) => Ok(Park::IfNeeded),
        (None, Some(word)) if word == "always" => Ok(Park::Always),
        _ => Err(mistyped("park", "true, false or \"always\"", raw)),
    }
}

fn attempts(e: &Envelope<'_>) -> Result<u32, Refusal> {
    let range = 1..=u64::from(ATTEMPTS_MAX);
    let attempts = Envelope::number(e.attempts, "attempts", range)?;
    Ok(attempts.map_or(ATTEMPTS_DEFAULT, |n| {
        u32::try_from(n).unwrap_or(ATTEMPTS_MAX)
    }))
}

fn emit<'a>(e: &Envelope<'a>) -> Result<Emit<'a>, Refusal> {
    let one = match Envelope::string(e.deliver, "deliver")?.as_deref() {
        None | Some("all") => false,
        Some("one") => true,
        Some(_) => {
            return Err(mistyped(
                "deliver",
                "\"all\" or \"one\"",
                e.deliver.expect("it was read"),
            ));
        }
    };
    Ok(Emit {
        process: Envelope::required_string(e.process, "process")?,
        pool: Envelope::string(e.pool, "pool")?,
        destination: destination(e)?,
        one,
        key: key(e)?,
        headers: e.checked_headers()?,
        body: e.body(e.data, "data")?,
    })
}

fn response<'a>(e: &Envelope<'a>) -> Result<Response<'a>, Refusal> {
    let in_reply_to = id_field(e.in_reply_to, "in_reply_to")?
        .ok_or_else(|| missing("in_reply_to", "a string"))?;
    let status = Envelope::required_string(e.status, "status")?;
    let Some(status) = Status::parse(&status) else {
        let expected = "one of \"ok\", \"error\", \"partial\", \"progress\"";
        return Err(mistyped("status", expected, e.status.expect("it was read")));
    };
    let error = match (status, e.error) {
        (Status::Error, Some(raw)) => Some(checked_error(raw)?),
        _ => None,
    };
    Ok(Response {
        in_reply_to,
        status,
        error,
        headers: e.checked_headers()?,
        body: e.body(e.response, "response")?,
    })
}

/// A handler's error object: a `code` that is a string, whatever else it holds.
fn checked_error(raw: Raw<'_>) -> Result<Raw<'_>, Refusal> {
    if !raw.is_object() {
        return Err(mistyped(
            "error",
            "an object with 'code' and 'message'",
            raw,
        ));
    }
    Fields::of(raw.text())?.required_string("code").map(|_| raw)
}

fn destination<'a>(e: &Envelope<'a>) -> Result<Option<Destination<'a>>, Refusal> {
    let Some(raw) = e.destination.filter(|raw| !raw.is_null()) else {
        return Ok(None);
    };
    if let Some(app_id) = raw.as_short_str() {
        return Ok(Some(Destination {
            app_id,
            instance: None,
            raw,
        }));
    }
    if !raw.is_object() {
        return Err(mistyped(
            "destination",
            "an AppID or {\"app_id\":…,\"instance\":…}",
            raw,
        ));
    }
    let fields = Fields::of_item(raw)?;
    let app_id = fields.required_string("app_id")?;
    let instance = fields
        .string("instance")?
        .map(|text| instance_id(&text))
        .transpose()?;
    Ok(Some(Destination {
        app_id,
        instance,
        raw,
    }))
}

fn instance_id(text: &str) -> Result<InstanceId, Refusal> {
    InstanceId::parse(text).ok_or_else(|| {
        Refusal::new(
            Code::BadMessage,
            format!(
                "field 'instance' must be sixteen hex digits, not {}",
                shorten(text)
            ),
        )
    })
}

fn key<'a>(e: &Envelope<'a>) -> Result<Option<Cow<'a, str>>, Refusal> {
    let key = Envelope::string(e.key, "key")?;
    if key.as_ref().is_some_and(|key| key.len() > KEY_BYTES_MAX) {
        return Err(Refusal::new(
            Code::TooLarge,
            format!("field 'key' has more than {KEY_BYTES_MAX} bytes"),
        ));
    }
    Ok(key)
}

fn call_ref<'a>(e: &Envelope<'a>) -> Result<CallRef<'a>, Refusal> {
    let id = e
        .correlation_id()?
        .ok_or_else(|| missing("id", "the id of a call"))?;
    Ok(CallRef { id })
}

pub(crate) fn pool_field(e: &Envelope<'_>) -> Result<PoolName, Refusal> {
    Ok(PoolName::new(&Envelope::required_string(e.pool, "pool")?)?)
}

pub(crate) fn optional_pool(e: &Envelope<'_>) -> Result<Option<PoolName>, Refusal> {
    Ok(Envelope::string(e.pool, "pool")?
        .map(|name| PoolName::new(&name))
        .transpose()?)
}

pub(crate) fn page<'a>(e: &Envelope<'a>) -> Result<Page<'a>, Refusal> {
    let fields = Fields::of_message(e)?;
    let limit = Envelope::number(fields.field("limit"), "limit", 1..=Page::LIMIT_MAX as u64)?;
    let limit = limit.map_or(Page::LIMIT_MAX, |n| n as usize);
    Ok(Page {
        after: fields.string("after")?,
        limit,
    })
}

fn pool_create<'a>(e: &Envelope<'a>) -> Result<PoolCreate<'a>, Refusal> {
    let fields = Fields::of_message(e)?;
    // Kinds that are not implemented are refused, so that no client relies on them.
    match fields.string("kind")?.as_deref() {
        None | Some("local") => {}
        Some("global") => return Err(not_here("'kind':\"global\"")),
        Some(_) => {
            return Err(mistyped(
                "kind",
                "\"local\" or \"global\"",
                fields.field("kind").expect("it was read"),
            ));
        }
    }
    let sealed = proof::sealed(&fields)?;
    let policy = fields.field("policy").map(Policy::parse).transpose()?;
    let properties = stored_object(fields.field("properties"), "properties")?;
    Ok(PoolCreate {
        pool: pool_field(e)?,
        properties,
        durable: fields.flag("durable")? || sealed.is_some(),
        policy: policy.unwrap_or_default(),
        sealed,
    })
}

fn not_here(what: &str) -> Refusal {
    Refusal::new(
        Code::BadMessage,
        format!("{what} is not available in this version of the server"),
    )
}

fn events(fields: &Fields<'_>) -> Result<EventSet, Refusal> {
    let mut set = EventSet(0);
    let is_there = fields.each_string("events", |name| {
        let event = Event::ALL.iter().find(|event| event.as_str() == name);
        let event = event.ok_or_else(|| {
            let known: Vec<_> = Event::ALL.iter().map(|e| e.as_str()).collect();
            Refusal::new(
                Code::BadMessage,
                format!(
                    "field 'events' names '{}'; known are {}",
                    shorten(name),
                    known.join(", ")
                ),
            )
        })?;
        set.0 |= *event as u16;
        Ok(())
    })?;
    Ok(if is_there { set } else { EventSet::ALL })
}

fn admin<'a>(action: AdminAction) -> Request<'a> {
    Request::Admin(Admin { action })
}

fn triggers_field(e: &Envelope<'_>, bounds: &ListBounds) -> Result<Vec<TriggerSpec>, Refusal> {
    let raw = Fields::of_message(e)?.field("triggers");
    triggers_within(raw.ok_or_else(|| missing("triggers", "an array"))?, bounds)
}

/// Reads a list of triggers that was checked when it arrived; each is a name or an object.
///
/// # Errors
/// `bad_message`, `invalid_name`, `too_large`.
pub fn triggers(raw: Raw<'_>) -> Result<Vec<TriggerSpec>, Refusal> {
    triggers_within(raw, &ListBounds::NONE)
}

fn triggers_within(raw: Raw<'_>, bounds: &ListBounds) -> Result<Vec<TriggerSpec>, Refusal> {
    let mut specs = Vec::new();
    let mut bytes = 0;
    items(raw, "triggers", |item| {
        if specs.len() == bounds.triggers_max {
            return Err(too_many("triggers", bounds.triggers_max));
        }
        let spec = trigger_spec(item, bounds)?;
        bytes += spec.bytes();
        if bytes > bounds.bytes_max {
            return Err(too_many_bytes(bounds.bytes_max));
        }
        specs.push(spec);
        Ok(())
    })?;
    Ok(specs)
}

/// The refusal if an app would have more pools or triggers than it may.
#[must_use]
pub fn too_many(what: &str, max: usize) -> Refusal {
    Refusal::new(
        Code::Quota,
        format!("an app may have {max} {what} (limits.{what}_per_app_max)"),
    )
}

/// The refusal if an app's registration would be larger than it may be.
#[must_use]
pub fn too_many_bytes(max: usize) -> Refusal {
    Refusal::new(
        Code::Quota,
        format!(
            "an app may register {max} bytes of names, pools, docs and schemas \
             (limits.registration_bytes_max)"
        ),
    )
}

/// How many times as long as its limit a list with repetitions may be.
const REPEATED_MAX: usize = 16;

/// A list of pools, without duplicates.
fn pools(
    fields: &Fields<'_>,
    field: &str,
    bounds: &ListBounds,
) -> Result<Option<Vec<PoolName>>, Refusal> {
    let (mut names, mut seen, mut count) = (Vec::new(), BTreeSet::new(), 0);
    let is_there = fields.each_string(field, |name| {
        // Repetitions cost time, but no memory.
        if count == bounds.pools_max.saturating_mul(REPEATED_MAX) {
            return Err(too_many("pools", bounds.pools_max));
        }
        count += 1;
        PoolName::check(name)?;
        if !seen.contains(name) {
            if names.len() == bounds.pools_max {
                return Err(too_many("pools", bounds.pools_max));
            }
            let name = PoolName::new(name)?;
            seen.insert(name.clone());
            names.push(name);
        }
        Ok(())
    })?;
    Ok(is_there.then_some(names))
}

fn trigger_spec(raw: Raw<'_>, bounds: &ListBounds) -> Result<TriggerSpec, Refusal> {
    if let Some(name) = raw.as_short_str() {
        return Ok(TriggerSpec::new(TriggerName::new(&name)?));
    }
    if !raw.is_object() {
        return Err(mistyped("triggers", "an array of names or objects", raw));
    }
    let fields = Fields::of_item(raw)?;
    let strategy = match fields.string("strategy")? {
        None => Strategy::default(),
        Some(word) => Strategy::parse(&word).ok_or_else(|| {
            let expected = "one of \"round_robin\", \"random\", \"least_busy\", \"sticky\"";
            mistyped(
                "strategy",
                expected,
                fields.field("strategy").expect("it was read"),
            )
        })?,
    };
    let concurrency = Envelope::number(
        fields.field("concurrency"),
        "concurrency",
        0..=u64::from(u32::MAX),
    )?;
    let doc = fields.string("doc")?.map(Cow::into_owned);
    if doc.as_ref().is_some_and(|doc| doc.len() > DOC_BYTES_MAX) {
        return Err(Refusal::new(
            Code::TooLarge,
            format!("field 'doc' has more than {DOC_BYTES_MAX} bytes"),
        ));
    }
    Ok(TriggerSpec {
        name: TriggerName::new(&fields.required_string("name")?)?,
        pools: pools(&fields, "pools", bounds)?,
        strategy,
        concurrency: concurrency.and_then(|n| u32::try_from(n).ok()),
        doc,
        privileged: fields.flag("privileged")?,
        schema: fields
            .field("schema")
            .map(|raw| schema(raw, bounds))
            .transpose()?,
    })
}

/// The schema of a trigger, which is checked to be JSON that every client can read.
fn schema(raw: Raw<'_>, bounds: &ListBounds) -> Result<Arc<str>, Refusal> {
    stored_object(Some(raw), "schema")?;
    let text = raw.text();
    if text.len() > bounds.schema_bytes_max {
        let message = format!(
            "the schema of a trigger has {} bytes; the maximum is {} \
             (limits.trigger_schema_bytes_max)",
            text.len(),
            bounds.schema_bytes_max
        );
        return Err(Refusal::new(Code::TooLarge, message));
    }
    match serde_json::from_str::<serde_json::Value>(text) {
        Ok(_) => Ok(text.into()),
        Err(error) => Err(not_storable("schema", error.column())),
    }
}

/// The refusal of JSON that the server cannot store.
#[must_use]
pub fn not_storable(field: &str, byte: usize) -> Refusal {
    let text = format!(
        "field '{field}' cannot be stored: at byte {byte} it has half a surrogate pair, or a \
         number that is out of range"
    );
    Refusal::new(Code::BadMessage, text)
}

/// Calls `on_item` with each item of an array.
pub(crate) fn items<'a>(
    raw: Raw<'a>,
    name: &str,
    on_item: impl FnMut(Raw<'a>) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    struct Failed(Option<Refusal>);
    impl From<scan::ScanError> for Failed {
        fn from(_: scan::ScanError) -> Self {
            Failed(None)
        }
    }
    let mut on_item = on_item;
    scan::array(raw.text(), |item| {
        on_item(Raw::scanned(item)).map_err(|refusal| Failed(Some(refusal)))
    })
    .map_err(|failed| failed.0.unwrap_or_else(|| mistyped(name, "an array", raw)))
}

/// The fields of an object that is not on the fast path.
pub struct Fields<'a>(Vec<(Cow<'a, str>, Raw<'a>)>);

impl<'a> Fields<'a> {
    /// Most fields of one object: each is compared with all others to find duplicates.
    const MAX: usize = 256;

    /// Most fields of an object that is an item of a list or a field of a message.
    const OF_ITEM_MAX: usize = 32;

    /// Reads the fields of the object `text`.
    ///
    /// # Errors
    /// `bad_message` if it is not an object, or has duplicate or too many fields.
    pub fn of(text: &'a str) -> Result<Self, Refusal> {
        Self::at_most(Self::MAX, text, &[])
    }

    /// Reads the fields of a message.
    pub(crate) fn of_message(e: &Envelope<'a>) -> Result<Self, Refusal> {
        Self::at_most(Self::MAX, e.text, e.long)
    }

    /// Reads the fields of an object that is part of a message, of which there may be many.
    pub(crate) fn of_item(raw: Raw<'a>) -> Result<Self, Refusal> {
        Self::at_most(Self::OF_ITEM_MAX, raw.text(), &[])
    }

    fn at_most(max: usize, text: &'a str, long: &[(usize, usize)]) -> Result<Self, Refusal> {
        struct Failed(Refusal);
        impl From<scan::ScanError> for Failed {
            fn from(error: scan::ScanError) -> Self {
                Failed(Refusal::new(Code::BadMessage, error.to_string()))
            }
        }
        let mut fields: Vec<(Cow<'a, str>, Raw<'a>)> = Vec::new();
        scan::fields(text, long, |key, value| {
            let key = field_name(key.text()).map_err(Failed)?;
            if fields.iter().any(|(known, _)| *known == key) {
                return Err(Failed(Refusal::new(
                    Code::BadMessage,
                    format!("field '{}' occurs twice", shorten(&key)),
                )));
            }
            if fields.len() == max {
                return Err(Failed(Refusal::new(
                    Code::BadMessage,
                    format!("an object may have at most {max} fields here"),
                )));
            }
            fields.push((key, Raw::scanned(value)));
            Ok(())
        })
        .map_err(|Failed(refusal)| refusal)?;
        Ok(Fields(fields))
    }

    /// Checks that there are no fields but these, where one that is misspelt would do harm.
    ///
    /// # Errors
    /// `bad_message`.
    pub(crate) fn check_names(&self, of: &str, known: &[&str]) -> Result<(), Refusal> {
        let unknown = self.0.iter().find(|(name, _)| !known.contains(&&**name));
        let Some((name, _)) = unknown else {
            return Ok(());
        };
        let text = format!(
            "there is no '{}' in {of}, only: {}",
            shorten(name),
            known.join(", ")
        );
        Err(Refusal::new(Code::BadMessage, text))
    }

    /// A field with a value; `null` counts as absent.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<Raw<'a>> {
        self.0
            .iter()
            .find(|(key, raw)| key == name && !raw.is_null())
            .map(|(_, raw)| *raw)
    }

    /// An optional string.
    ///
    /// # Errors
    /// `bad_message` if it is present and not a string.
    pub fn string(&self, name: &str) -> Result<Option<Cow<'a, str>>, Refusal> {
        Envelope::string(self.field(name), name)
    }

    /// A string that must be there.
    ///
    /// # Errors
    /// `bad_message` if it is missing or not a string.
    pub fn required_string(&self, name: &str) -> Result<Cow<'a, str>, Refusal> {
        Envelope::required_string(self.field(name), name)
    }

    /// An optional true or false.
    ///
    /// # Errors
    /// `bad_message` if it is present and neither.
    pub fn flag(&self, name: &str) -> Result<bool, Refusal> {
        Envelope::flag(self.field(name), name)
    }

    /// Calls `on_string` with each string of an optional array; false if it is absent.
    ///
    /// # Errors
    /// `bad_message` if it is present and not an array of strings, or what `on_string` returned.
    pub(crate) fn each_string(
        &self,
        name: &str,
        mut on_string: impl FnMut(&str) -> Result<(), Refusal>,
    ) -> Result<bool, Refusal> {
        let Some(raw) = self.field(name) else {
            return Ok(false);
        };
        items(raw, name, |item| {
            let text = item.as_short_str();
            on_string(&text.ok_or_else(|| mistyped(name, "an array of strings", item))?)
        })?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Frame;

    const BOUNDS: ListBounds = ListBounds {
        pools_max: 3,
        triggers_max: 4,
        bytes_max: 100,
        schema_bytes_max: 80,
    };

    fn check(json: &str, expected: &str) {
        let frame = Frame {
            json: json.as_bytes(),
            attachment: None,
        };
        let envelope = Envelope::parse(frame).unwrap().unwrap();
        let got = match Request::decode(&envelope, &BOUNDS) {
            Ok(request) => format!("{request:?}"),
            Err(refusal) => refusal.to_string(),
        };
        assert!(
            got.starts_with(expected),
            "{json}\n got {got}\nwant {expected}"
        );
    }

    #[test]
    fn requests_decode() {
        check(r#"{"action":"ping"}"#, "Ping");
        check(
            r#"{"action":"trigger","process":"foo"}"#,
            "Trigger(Trigger { id: None, process: \"foo\", pool: None, destination: None, \
             ttl_ms: 30000",
        );
        check(
            r#"{"action":"pool_remove","pool":"a","force":true}"#,
            "PoolRemove(\"a\", true)",
        );
        check(
            r#"{"action":"kick","app_id":"a","instance":"00000000000000ff"}"#,
            "Admin(Admin { action: Kick(\"a\", Some(00000000000000ff))",
        );
        check(
            r#"{"action":"ack","id":"1","count":3}"#,
            "Ack(CallRef { id: \"1\" }, 3)",
        );
    }

    #[test]
    fn lists_are_bounded_while_they_are_read() {
        // Items after the limit are not read, so an invalid one is not noticed.
        check(
            r#"{"action":"trigger_register","triggers":["a","b","c","d","e",7]}"#,
            "quota: an app may have 4 triggers (limits.triggers_per_app_max)",
        );
        check(
            r#"{"action":"trigger_unregister","triggers":["a","b","c","d","e",7]}"#,
            "quota: an app may have 4 triggers",
        );
        check(
            r#"{"action":"handshake","app_id":"a","pools":["a","b","c","d",7]}"#,
            "quota: an app may have 3 pools (limits.pools_per_app_max)",
        );
        check(
            r#"{"action":"trigger_register","triggers":[{"name":"t","pools":["a","b","c","d",7]}]}"#,
            "quota: an app may have 3 pools (limits.pools_per_app_max)",
        );
        check(
            r#"{"action":"handshake","app_id":"a","pools":["a","b","a","a","b","c"]}"#,
            "Handshake(Handshake { app_id: \"a\", pools: Some([\"a\", \"b\", \"c\"])",
        );
        let long = "x".repeat(60);
        check(
            &format!(r#"{{"action":"trigger_register","triggers":["{long}","{long}",7]}}"#),
            "quota: an app may register 100 bytes of names, pools, docs and schemas",
        );
        // A schema is measured before it is read.
        let long = "x".repeat(80);
        check(
            &format!(
                r#"{{"action":"trigger_register","triggers":[{{"name":"t","schema":{{"{long}":1}}}}]}}"#
            ),
            "too_large: the schema of a trigger has 86 bytes; the maximum is 80 \
             (limits.trigger_schema_bytes_max)",
        );
        let apps = |last: &str| {
            let names: Vec<String> = (0..64).map(|n| format!("\"a{n}\"")).collect();
            let names = names.join(",");
            format!(
                r#"{{"action":"pool_create","pool":"p","policy":{{"join":[{names},"{last}",7]}}}}"#
            )
        };
        check(
            &apps("a64"),
            "too_large: field 'join' of a policy names more than 64",
        );
        // Repetitions are bounded too.
        let pools = ["\"a\""; 49].join(",");
        check(
            &format!(r#"{{"action":"handshake","app_id":"a","pools":[{pools}]}}"#),
            "quota: an app may have 3 pools",
        );
    }

    #[test]
    fn oversized_texts_are_refused_before_they_are_copied() {
        let long = "\\n".repeat(5000);
        let named = r#","process":"t""#;
        for (field, more) in [
            ("id", named),
            ("process", ""),
            ("pool", named),
            ("key", named),
        ] {
            let json = format!(r#"{{"action":"trigger"{more},"{field}":"{long}"}}"#);
            let expected = format!("too_large: field '{field}' has more than 8192 bytes");
            check(&json, &expected);
        }
        let name = "n".repeat(257);
        check(
            &format!(r#"{{"action":"watch","pool":"p","events":[{{"{name}":1}}]}}"#),
            "bad_message: field 'events' must be an array of strings",
        );
        check(
            &format!(r#"{{"action":"trigger_register","triggers":[{{"{name}":1}}]}}"#),
            "bad_message: a field name may have at most 256 bytes; 'nnnn",
        );
        let fields: Vec<String> = (0..33).map(|n| format!("\"f{n}\":1")).collect();
        check(
            &format!(
                r#"{{"action":"trigger_register","triggers":[{{{}}}]}}"#,
                fields.join(",")
            ),
            "bad_message: an object may have at most 32 fields here",
        );
    }

    #[test]
    fn refusals_name_the_field() {
        check(
            r#"{"id":"1"}"#,
            "bad_message: field 'action' is missing: expected a string",
        );
        check(
            r#"{"action":"fly"}"#,
            "unknown_action: unknown action 'fly'",
        );
        check(
            r#"{"action":"trigger"}"#,
            "bad_message: field 'process' is missing: expected a string",
        );
        check(
            r#"{"action":"trigger","process":"a","ttl":0}"#,
            "bad_message: field 'ttl' must be a whole number from 1 to 86400000, not 0",
        );
        check(
            r#"{"action":"trigger","process":"a","destination":7}"#,
            "bad_message: field 'destination' must be an AppID",
        );
        check(
            r#"{"action":"emit","process":"a","deliver":"some"}"#,
            "bad_message: field 'deliver' must be \"all\" or \"one\"",
        );
        check(
            r#"{"action":"handshake","app_id":"a b"}"#,
            "invalid_name: 'a b' is not a valid AppID",
        );
        check(
            r#"{"action":"handshake","app_id":"a","pools":["x",3]}"#,
            "bad_message: field 'pools' must be an array of strings, not 3",
        );
        check(
            r#"{"action":"handshake","app_id":"a","triggers":[{"name":"t","strategy":"best"}]}"#,
            "bad_message: field 'strategy' must be one of",
        );
        check(
            r#"{"action":"watch","pool":"a","events":["app_up"]}"#,
            "bad_message: field 'events' names 'app_up'; known are app_online",
        );
        check(
            r#"{"action":"response","in_reply_to":"1","status":"fine"}"#,
            "bad_message: field 'status' must be one of",
        );
        check(
            r#"{"action":"response","in_reply_to":"1","status":"error","error":{}}"#,
            "bad_message: field 'code' is missing",
        );
        check(
            r#"{"action":"pool_create","pool":"a","encrypted":true}"#,
            "bad_message: an encrypted pool is made of its 'descriptor'",
        );
    }
}
