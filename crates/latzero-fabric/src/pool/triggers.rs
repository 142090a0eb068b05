//! The triggers of a pool, and their handlers.

use std::cell::Cell;

use hashbrown::HashMap;
use latzero_protocol::message::{Strategy, TriggerSpec};
use latzero_protocol::{AppId, InstanceId, TriggerName};

use super::calls::Calls;
use super::members::{MemberKey, Members};
use crate::driver::Driver;
use crate::slab::{Key, Slab};

/// How many triggers of a pool, and handlers of each, its description lists.
const TRIGGERS_SHOWN_MAX: usize = 1000;
/// Leaves room on a page for the rest of the description.
const TRIGGERS_SHOWN_BYTES_MAX: usize = crate::registry::PAGE_BYTES_MAX / 2;
const HANDLERS_SHOWN_MAX: usize = 20;

pub(super) type HandlerKey = Key<Handler>;

/// One instance as the handler of one trigger.
pub(super) struct Handler {
    pub(super) member: MemberKey,
    pub(super) process: TriggerName,
    pub(super) in_flight: u32,
    pub(super) concurrency: u32,
    /// Whether it takes only what members that may write send.
    is_privileged: bool,
}

impl Handler {
    /// Whether it may take one more call.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        self.in_flight < self.concurrency
    }
}

/// A named handler in the pool.
pub(super) struct Served {
    pub(super) name: TriggerName,
    pub(super) strategy: Strategy,
    doc: Option<String>,
    pub(super) handlers: Vec<HandlerKey>,
    /// Their instances, side by side, because a sticky trigger compares all of them for each call.
    pub(super) instances: Vec<InstanceId>,
    /// Where the next turn begins.
    pub(super) turn: Cell<usize>,
}

/// The triggers of a pool.
#[derive(Default)]
pub(super) struct Triggers {
    served: HashMap<TriggerName, Served>,
    handlers: Slab<Handler>,
}

impl Triggers {
    /// Triggers with at least one handler.
    pub(super) fn len(&self) -> usize {
        self.served.len()
    }

    #[inline]
    pub(super) fn get(&self, name: &str) -> Option<&Served> {
        self.served.get(name)
    }

    #[inline]
    pub(super) fn handler(&self, key: HandlerKey) -> Option<&Handler> {
        self.handlers.at(key)
    }

    #[inline]
    pub(super) fn handler_mut(&mut self, key: HandlerKey) -> Option<&mut Handler> {
        self.handlers.at_mut(key)
    }

    /// The handlers of a trigger.
    #[inline]
    pub(super) fn handlers_of<'a>(
        &'a self,
        served: &'a Served,
    ) -> impl Iterator<Item = &'a Handler> {
        let handlers = served.handlers.iter();
        handlers.filter_map(|&handler| self.handlers.at(handler))
    }

    /// Whether any handler of a trigger registered it as privileged.
    pub(super) fn is_privileged(&self, name: &str) -> bool {
        let served = self.get(name);
        served.is_some_and(|served| self.handlers_of(served).any(|h| h.is_privileged))
    }

    /// Adds a member's handler, or changes the settings of the one that it `has`. Returns the
    /// handler's key if it is new.
    pub(super) fn serve(
        &mut self,
        (member, instance): (MemberKey, InstanceId),
        has: Option<HandlerKey>,
        spec: &TriggerSpec,
    ) -> Option<HandlerKey> {
        let concurrency = spec.concurrency.unwrap_or(u32::MAX);
        let served = self
            .served
            .entry(spec.name.clone())
            .or_insert_with(|| Served {
                name: spec.name.clone(),
                strategy: spec.strategy,
                doc: None,
                handlers: Vec::new(),
                instances: Vec::new(),
                turn: Cell::new(0),
            });
        // The latest registration decides: a new version of an app may change how its calls are
        // spread.
        served.strategy = spec.strategy;
        if spec.doc.is_some() {
            served.doc.clone_from(&spec.doc);
        }
        if let Some(handler) = has.and_then(|h| self.handlers.at_mut(h)) {
            handler.concurrency = concurrency;
            handler.is_privileged = spec.privileged;
            return None;
        }
        let key = self.handlers.insert(Handler {
            member,
            process: spec.name.clone(),
            in_flight: 0,
            concurrency,
            is_privileged: spec.privileged,
        });
        served.handlers.push(key);
        served.instances.push(instance);
        Some(key)
    }

    /// Removes a handler.
    pub(super) fn unserve(&mut self, key: HandlerKey) {
        let Some(handler) = self.handlers.remove(key) else {
            return;
        };
        let served = self.served.get_mut(&handler.process);
        let served = served.expect("the trigger of a handler is served");
        let at = served.handlers.iter().position(|h| *h == key);
        let at = at.expect("a trigger knows its handlers");
        served.handlers.remove(at);
        served.instances.remove(at);
        if served.turn.get() > at {
            served.turn.set(served.turn.get() - 1);
        }
        if served.handlers.is_empty() {
            self.served.remove(&handler.process);
        }
    }

    /// Whether a handler of the trigger may take a call, by its concurrency.
    pub(super) fn has_room<D: Driver>(
        &self,
        name: &str,
        app: Option<&AppId>,
        members: &Members<D>,
    ) -> bool {
        let is_app = |handler: &Handler, app: &AppId| {
            members.at(handler.member).is_some_and(|m| m.app == *app)
        };
        self.get(name).is_some_and(|served| {
            self.handlers_of(served)
                .any(|h| h.has_room() && app.is_none_or(|app| is_app(h, app)))
        })
    }

    /// The triggers as JSON: names, strategies and who serves them, in the order of their names.
    pub(super) fn to_json<D: Driver>(&self, members: &Members<D>) -> Vec<serde_json::Value> {
        let mut names: Vec<&Served> = self.served.values().collect();
        if names.len() > TRIGGERS_SHOWN_MAX {
            names.select_nth_unstable_by(TRIGGERS_SHOWN_MAX, |a, b| a.name.cmp(&b.name));
            names.truncate(TRIGGERS_SHOWN_MAX);
        }
        names.sort_by(|a, b| a.name.cmp(&b.name));
        let mut bytes = 0;
        let fits = |trigger: &serde_json::Value| {
            bytes += trigger.to_string().len();
            bytes <= TRIGGERS_SHOWN_BYTES_MAX
        };
        let trigger = |served: &Served| self.one_to_json(served, members);
        names.into_iter().map(trigger).take_while(fits).collect()
    }

    /// One trigger as JSON.
    pub(super) fn one_to_json<D: Driver>(
        &self,
        served: &Served,
        members: &Members<D>,
    ) -> serde_json::Value {
        let handlers: Vec<_> = self
            .handlers_of(served)
            .filter_map(|h| Some((h, members.at(h.member)?)))
            .take(HANDLERS_SHOWN_MAX)
            .map(|(h, member)| {
                serde_json::json!({
                    "app_id": member.app, "instance": member.instance, "in_flight": h.in_flight,
                })
            })
            .collect();
        let mut json = serde_json::json!({
            "name": served.name, "strategy": served.strategy.as_str(), "doc": served.doc,
            "handlers": handlers,
            "handlers_total": served.handlers.len(),
        });
        if self.handlers_of(served).any(|h| h.is_privileged) {
            json["privileged"] = true.into();
        }
        json
    }

    /// The apps of the newest handlers of a trigger, the newest first.
    pub(super) fn newest_handlers<D: Driver>(
        &self,
        name: &TriggerName,
        members: &Members<D>,
    ) -> Vec<AppId> {
        let handlers = self.get(name.as_str()).map(|served| &served.handlers);
        let handlers = handlers.into_iter().flatten().rev();
        let apps = handlers.filter_map(|&handler| {
            let member = self.handlers.at(handler)?.member;
            Some(members.at(member)?.app.clone())
        });
        apps.take(HANDLERS_SHOWN_MAX).collect()
    }

    pub(super) fn check<D: Driver>(&self, members: &Members<D>, calls: &Calls) {
        for (key, member) in members.iter() {
            for (name, handler) in &member.handlers {
                let served = self.get(name.as_str());
                let served = served.expect("a member's trigger is served");
                let at = served.handlers.iter().position(|known| known == handler);
                let instance = at.map(|at| served.instances[at]);
                assert_eq!(instance, Some(member.instance));
                let own = self.handlers_of(served).filter(|h| h.member == key);
                assert_eq!(own.count(), 1);
            }
        }
        let handlers: usize = self.served.values().map(|t| t.handlers.len()).sum();
        assert_eq!(handlers, self.handlers.len());
        for (key, handler) in self.handlers.iter() {
            let in_flight = calls.iter().filter(|(_, c)| c.handler == key).count();
            // Not compared with the concurrency, which a registration may lower while calls are in
            // progress.
            assert_eq!(in_flight, handler.in_flight as usize);
        }
    }
}
