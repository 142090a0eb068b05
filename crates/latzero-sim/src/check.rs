//! The checkers: a model of what the server owes its clients, compared with everything that
//! happens.
//!
//! The model shares no code with the fabric. It learns only from the log: what the server received
//! and sent, and when. After every step it must account for each message that was sent, and no
//! message may be missing.
//!
//! Messages carry a tag in their headers, which the server forwards. The tag links a delivery to
//! its call.

macro_rules! ensure {
    ($holds:expr, $($what:tt)*) => {
        if !$holds {
            return Err(format!($($what)*));
        }
    };
}

mod requests;
mod written;

use std::collections::{BTreeMap, BTreeSet};

use latzero_fabric::rows::AppRow;
use latzero_fabric::{Count, Limits, Time};
use latzero_protocol::Code;
use latzero_protocol::limits::SYSTEM_POOL;
use serde_json::Value;

use crate::client::strings;
use crate::line::{Event, Peer};
use crate::world::{self, Message, World};

/// A description of the mismatch that a checker found.
pub(crate) type Found = String;

/// A trigger as it was registered.
#[derive(Debug, Clone, Default, PartialEq)]
struct Spec {
    pools: Option<BTreeSet<String>>,
    concurrency: Option<u64>,
}

/// What an app registered last.
#[derive(Debug, Clone, Default)]
struct Registered {
    pools: BTreeSet<String>,
    triggers: BTreeMap<String, Spec>,
    watches: BTreeMap<String, Option<Vec<String>>>,
}

#[derive(Debug, Default)]
struct Conn {
    is_open: bool,
    app: Option<String>,
    instance: String,
    attachments: bool,
    pools: BTreeSet<String>,
    triggers: BTreeMap<String, Spec>,
    watches: BTreeMap<String, Option<Vec<String>>>,
    /// Its calls in flight, by id.
    calls: BTreeMap<String, u64>,
    /// The newest call that it sent to each handler.
    newest: BTreeMap<Peer, u64>,
    /// How many times it registered each trigger again, by pool and trigger.
    epochs: BTreeMap<(String, String), u64>,
}

impl Conn {
    fn serves(&self, pool: &str, process: &str) -> bool {
        self.is_open
            && pool != SYSTEM_POOL
            && self.pools.contains(pool)
            && self
                .triggers
                .get(process)
                .is_some_and(|spec| is_for(spec, pool))
    }

    fn presence(&self) -> Presence {
        let serves = |pool: &String| {
            let served = self.triggers.keys().filter(|name| self.serves(pool, name));
            let served: Vec<_> = served
                .map(|name| (pool.clone(), Some(name.clone())))
                .collect();
            served
        };
        let served = self.pools.iter().flat_map(serves);
        served
            .chain(self.pools.iter().map(|pool| (pool.clone(), None)))
            .collect()
    }

    fn watches(&self, pool: &str, event: &str) -> bool {
        let wanted = self.watches.get(pool);
        let wants = |events: &Option<Vec<String>>| {
            events
                .as_ref()
                .is_none_or(|events| events.iter().any(|e| e == event))
        };
        self.is_open && self.pools.contains(pool) && wanted.is_some_and(wants)
    }

    fn is_meant(&self, destination: &Value) -> bool {
        let app = self.app.as_deref();
        match destination {
            Value::Null => true,
            Value::String(wanted) => app == Some(wanted),
            _ => {
                let instance = destination["instance"].as_str();
                destination["app_id"].as_str() == app
                    && instance.is_none_or(|wanted| wanted == self.instance)
            }
        }
    }

    /// Leaves a pool, and serves nothing there any more.
    fn leave(&mut self, pool: &str) {
        self.pools.remove(pool);
        self.watches.remove(pool);
        for ((_, _), epoch) in self.epochs.iter_mut().filter(|((p, _), _)| p == pool) {
            *epoch += 1;
        }
    }
}

fn is_for(spec: &Spec, pool: &str) -> bool {
    spec.pools
        .as_ref()
        .is_none_or(|pools| pools.iter().any(|p| p == pool))
}

/// A call in flight.
#[derive(Debug)]
struct Call {
    caller: Peer,
    id: Option<String>,
    pool: String,
    process: String,
    request: Message,
    deadline: Time,
    handler: Option<Peer>,
    /// The id of the call at its handler.
    handle: String,
    epoch: u64,
    window: Option<u64>,
    acknowledged: u64,
    items: u64,
    /// Its handler was notified that the call ended.
    is_cancelled: bool,
}

/// The pools that a connection is a member of (`None`), and the triggers that it serves in each.
type Presence = BTreeSet<(String, Option<String>)>;

/// The frame that is being handled.
#[derive(Debug)]
struct Current {
    peer: Peer,
    message: Option<Message>,
    /// The call that it makes, if any.
    call: Option<u64>,
    /// It has the id of a call that is already in flight.
    is_duplicate: bool,
    /// Its replies, `error` messages among them.
    replies: Vec<Value>,
    errors: u64,
    /// The connections that got its emit, or lost it.
    recipients: Vec<Peer>,
    /// The connections that should get it.
    meant: BTreeSet<Peer>,
    lost: Vec<Peer>,
    is_refused: bool,
    /// It took effect, but could not be stored.
    is_unstored: bool,
    /// The sender's pools and triggers before it.
    presence: Presence,
    /// The notices that were sent: to whom, and of which change.
    notices: BTreeSet<(Peer, String, String, Option<String>)>,
    /// The handler's answer was forwarded, or its call ended in another way.
    is_answered: bool,
}

/// The model.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    now: Time,
    conns: BTreeMap<Peer, Conn>,
    apps: BTreeMap<String, Registered>,
    calls: BTreeMap<u64, Call>,
    handles: BTreeMap<String, u64>,
    /// Calls that wait in their sessions, by caller and id.
    held: BTreeSet<(Peer, String)>,
    current: Option<Current>,
    untagged: u64,
    reported: u64,
    delivered: u64,
    /// The disk refuses writes, and may lack everything since then.
    is_disk_full: bool,
    may_miss: bool,
}

impl Checker {
    /// Checks one step's log against the model.
    pub(crate) fn step(&mut self, log: &[Event], world: &World) -> Result<(), Found> {
        let limits = world.bounds_of_core();
        for event in log {
            self.event(event, limits)?;
        }
        self.after(world)
    }

    /// Whether every call has ended and every connection is gone.
    pub(crate) fn at_end(&self) -> Result<(), Found> {
        ensure!(self.calls.is_empty(), "calls are left: {:?}", self.calls);
        ensure!(
            self.reported == self.delivered,
            "reported {} deliveries of {}",
            self.reported,
            self.delivered
        );
        Ok(())
    }

    fn event(&mut self, event: &Event, limits: &Limits) -> Result<(), Found> {
        let now = self.now;
        match event {
            Event::Now(now) => {
                self.now = *now;
                Ok(())
            }
            Event::Handling {
                peer,
                json,
                attachment,
                came,
            } => {
                let json = serde_json::from_slice(json).ok();
                let attachment = attachment.clone();
                let message = json.map(|json| Message { json, attachment });
                if came.is_some()
                    && let Some(id) = message.as_ref().and_then(|m| m.json["id"].as_str())
                {
                    self.held.remove(&(*peer, id.to_owned()));
                }
                self.begin(*peer, message, came.unwrap_or(now))
            }
            Event::Held(peer) => self.held(*peer),
            Event::Rejecting(_) => Ok(()),
            // A change that could not be stored takes effect all the same.
            Event::Refused(Code::Storage) => {
                if let Some(current) = &mut self.current {
                    current.is_unstored = true;
                }
                Ok(())
            }
            Event::Refused(_) => {
                if let Some(current) = &mut self.current {
                    current.is_refused = true;
                }
                Ok(())
            }
            Event::Handled(peer) => self.handled(*peer),
            Event::Sent { peer, class, frame } => {
                let Some((message, used)) = world::decode(frame) else {
                    return Err(format!("half a frame was sent to {peer:?}"));
                };
                ensure!(
                    used == frame.len(),
                    "more than a frame was sent to {peer:?}"
                );
                self.sent(*peer, *class, &message, now, limits)
            }
            Event::Lost(peer) => {
                if let Some(current) = &mut self.current {
                    current.lost.push(*peer);
                }
                Ok(())
            }
            Event::Closed(peer) => {
                self.conn(*peer).is_open = false;
                Ok(())
            }
            Event::Departed(peer) => self.departed(*peer),
            Event::Counted(Count::Delivered) => {
                self.delivered += 1;
                Ok(())
            }
            Event::Counted(_) => Ok(()),
            Event::DiskFull(is_full) => {
                self.is_disk_full = *is_full;
                self.may_miss |= *is_full;
                Ok(())
            }
            Event::Restarted(rows) => self.restarted(rows),
        }
    }

    /// After a kill, everything acknowledged is on the disk, unless the disk was full at some time.
    fn restarted(&mut self, rows: &crate::store::Rows) -> Result<(), Found> {
        let list = |text: &str| -> Value { serde_json::from_str(text).unwrap_or_default() };
        let read = |row: &AppRow| Registered {
            pools: strings(&list(&row.pools)).into_iter().collect(),
            triggers: specs(&list(&row.triggers)),
            watches: list(&row.watches)["events"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|pair| (text_of(&pair[0]), Some(strings(&pair[1]))))
                .collect(),
        };
        let stored: BTreeMap<String, Registered> = rows
            .apps
            .values()
            .map(|row| (row.app_id.to_string(), read(row)))
            .collect();
        if !self.may_miss {
            let same = |a: &Registered, b: &Registered| {
                a.pools == b.pools
                    && a.triggers == b.triggers
                    && a.watches.keys().eq(b.watches.keys())
            };
            for (app, known) in &self.apps {
                let row = stored.get(app);
                ensure!(
                    row.is_some_and(|row| same(row, known)),
                    "app '{app}' was acknowledged with {known:?}, and {row:?} is on the disk"
                );
            }
        }
        *self = Checker {
            now: self.now,
            untagged: self.untagged,
            apps: stored,
            is_disk_full: self.is_disk_full,
            may_miss: self.is_disk_full,
            ..Checker::default()
        };
        Ok(())
    }

    fn conn(&mut self, peer: Peer) -> &mut Conn {
        self.conns.entry(peer).or_insert_with(|| Conn {
            is_open: true,
            ..Conn::default()
        })
    }

    // What the server receives.

    // How the server handled it.

    // What the server sends.

    // What ends.

    fn departed(&mut self, peer: Peer) -> Result<(), Found> {
        self.held.retain(|(of, _)| *of != peer);
        let Some(gone) = self.conns.remove(&peer) else {
            return Ok(());
        };
        for tag in gone.calls.values() {
            if let Some(call) = self.calls.remove(tag) {
                let is_informed = call.is_cancelled
                    || call.handler.is_none_or(|handler| {
                        // A handler that left the pool needs no notice.
                        let handler = self.conns.get(&handler);
                        !handler.is_some_and(|h| h.is_open && h.pools.contains(&call.pool))
                    });
                ensure!(
                    is_informed,
                    "the handler of a call was not told that its caller has gone"
                );
                self.handles.remove(&call.handle);
            }
        }
        Ok(())
    }

    /// A call has ended.
    fn forget(&mut self, tag: u64) {
        let Some(call) = self.calls.remove(&tag) else {
            return;
        };
        self.handles.remove(&call.handle);
        if let Some(id) = &call.id
            && let Some(conn) = self.conns.get_mut(&call.caller)
        {
            conn.calls.remove(id);
        }
    }

    /// Checks what must be true after each step.
    fn after(&mut self, world: &World) -> Result<(), Found> {
        ensure!(self.current.is_none(), "a frame was not handled to its end");
        let is_in = |peer: Peer, pool: &str| {
            self.conns
                .get(&peer)
                .is_some_and(|conn| conn.pools.contains(pool))
        };
        // The caller of a call without an id gets no notice when its handler leaves.
        let silent: Vec<u64> = self
            .calls
            .iter()
            .filter(|(_, call)| {
                call.id.is_none()
                    && call
                        .handler
                        .is_none_or(|handler| !is_in(handler, &call.pool))
            })
            .map(|(&tag, _)| tag)
            .collect();
        silent.into_iter().for_each(|tag| self.forget(tag));
        for call in self.calls.values() {
            let handler = call.handler.ok_or("a call neither began nor ended")?;
            ensure!(
                call.deadline > world.now(),
                "a call outlives its ttl: {call:?}"
            );
            ensure!(
                !call.is_cancelled,
                "a call ended and its caller was not told: {call:?}"
            );
            for side in [handler, call.caller] {
                let conn = self.conns.get(&side);
                let stays =
                    conn.is_some_and(|conn| conn.is_open && conn.pools.contains(&call.pool));
                ensure!(stays, "a call lives on without {side:?}: {call:?}");
            }
        }
        let (model, real) = (self.calls.len(), world.calls_in_flight());
        ensure!(
            model == real,
            "{real} calls are in flight, {model} should be"
        );
        Ok(())
    }
}

fn text(json: &Value, name: &str) -> String {
    json[name].as_str().unwrap_or_default().to_owned()
}

/// Whether a response ends its call.
fn is_last(response: &Value) -> bool {
    matches!(response["status"].as_str(), Some("ok" | "error"))
}

fn tag(json: &Value) -> Option<u64> {
    json["headers"]["tag"].as_str()?.parse().ok()
}

/// Parses trigger specifications of a client; of two with one name, the last applies.
fn specs(list: &Value) -> BTreeMap<String, Spec> {
    let spec = |item: &Value| match item.as_str() {
        Some(name) => (name.to_owned(), Spec::default()),
        None => {
            // A pool that is listed twice counts once.
            let named = || strings(&item["pools"]).into_iter().collect();
            let pools = item["pools"].is_array().then(named);
            let concurrency = item["concurrency"].as_u64();
            (text(item, "name"), Spec { pools, concurrency })
        }
    };
    list.as_array().into_iter().flatten().map(spec).collect()
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
