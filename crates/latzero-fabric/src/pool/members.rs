//! The members of a pool, and the events that they watch.

use std::collections::BTreeMap;
use std::sync::Arc;

use latzero_protocol::encode::{self, Attachments, Origin};
use latzero_protocol::message::{Event, EventSet};
use latzero_protocol::{AppId, InstanceId, PoolName, Refusal, TriggerName};

use super::PoolInfo;
use super::triggers::HandlerKey;
use crate::driver::{Driver, Peer};
use crate::ledger::{Reservation, Resource};
use crate::outbox::Class;
use crate::refusals;
use crate::slab::{Key, Slab};
use crate::turn::Turn;
use latzero_protocol::memory::Access;
use latzero_protocol::policy::{Right, Rights};

/// The key of a member in its pool.
pub type MemberKey = Key<MemberTag>;

/// Marks keys of members. A member is generic over its connection; its key is not.
#[derive(Debug)]
pub enum MemberTag {}

/// The caller of a call without a connection: a parked call, or one with an idempotency key.
pub(super) const NOBODY: MemberKey = Key::new(u32::MAX, u32::MAX);

/// From this many bytes on, no further event is sent with those before it. A watcher gets all of
/// them or none.
const EVENTS_BYTES: usize = 64 * 1024;

/// An instance that joins a pool.
#[derive(Debug, Clone)]
pub struct Joining<D: Driver> {
    /// The connection.
    pub peer: D::Peer,
    /// The app.
    pub app: AppId,
    /// The instance.
    pub instance: InstanceId,
    /// Whether it takes attachment frames.
    pub attachments: Attachments,
    /// Whether file descriptors can be passed to it.
    pub takes_descriptors: bool,
    /// What the pool's policy lets the app do.
    pub rights: Rights,
    /// Whether it may have answers to parked calls of its app: not if it may only join.
    pub takes_answers: bool,
}

/// An app that wants something of a block.
#[derive(Clone, Copy)]
pub(super) struct Claimant<'a> {
    pub(super) app: &'a AppId,
    pub(super) rights: Rights,
}

impl Claimant<'_> {
    /// The most that the pool's policy lets it do with a block.
    pub(super) fn most(self) -> Option<Access> {
        match (
            self.rights.have(Right::Write),
            self.rights.have(Right::Read),
        ) {
            (true, _) => Some(Access::Write),
            (false, true) => Some(Access::Read),
            (false, false) => None,
        }
    }
}

/// One instance in the pool.
pub(super) struct Member<D: Driver> {
    pub(super) peer: D::Peer,
    pub(super) app: AppId,
    pub(super) instance: InstanceId,
    /// The user of its connection, and whether that user is untrusted.
    pub(super) user: u64,
    pub(super) is_stranger: bool,
    pub(super) attachments: Attachments,
    /// The triggers that it serves.
    pub(super) handlers: BTreeMap<TriggerName, HandlerKey>,
    /// Calls it made and calls it serves; at zero, no search is needed when it leaves.
    pub(super) calling: u32,
    pub(super) serving: u32,
    /// Whether file descriptors can be passed to it.
    pub(super) takes_descriptors: bool,
    rights: Rights,
    pub(super) takes_answers: bool,
    /// It is gone for all others, and what it leaves behind is being ended.
    pub(super) is_leaving: bool,
}

impl<D: Driver> Member<D> {
    /// What blocks ask about it.
    pub(super) fn claimant(&self) -> Claimant<'_> {
        Claimant {
            app: &self.app,
            rights: self.rights,
        }
    }

    pub(super) fn origin(&self) -> Origin<'_> {
        Origin {
            app_id: self.app.as_str(),
            instance: self.instance,
        }
    }

    /// Counts something of its app.
    pub(super) fn reserve(&self, what: Resource) -> Result<Reservation, Refusal> {
        Ok(self.peer.link().account().app().reserve(what, 1)?)
    }

    /// Whether it has room for one more descriptor that it has not read.
    pub(super) fn check_descriptors(&self, pool: &PoolInfo) -> Result<(), Refusal> {
        let max = pool.limits.descriptors_unread_max;
        if !self.takes_descriptors || self.peer.link().outbox.descriptors() < max {
            return Ok(());
        }
        Err(refusals::too_many_descriptors(max))
    }

    /// Refuses a request that it sent.
    pub(super) fn refuse(&self, id: &str, refusal: &Refusal, turn: &mut Turn<'_, D>) {
        let length = refusal.message.len() + 256;
        turn.send(&self.peer, Class::Control, length, |out| {
            encode::refusal(out, Some(id), refusal);
        });
    }
}

/// The members of a pool.
pub(super) struct Members<D: Driver> {
    members: Slab<Member<D>, MemberTag>,
    /// Those that watch the pool, and what they watch.
    watching: BTreeMap<MemberKey, EventSet>,
}

impl<D: Driver> Default for Members<D> {
    fn default() -> Self {
        Members {
            members: Slab::default(),
            watching: BTreeMap::new(),
        }
    }
}

impl<D: Driver> Members<D> {
    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    #[inline]
    pub(super) fn at(&self, key: MemberKey) -> Option<&Member<D>> {
        self.members.at(key)
    }

    #[inline]
    pub(super) fn at_mut(&mut self, key: MemberKey) -> Option<&mut Member<D>> {
        self.members.at_mut(key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (MemberKey, &Member<D>)> {
        self.members.iter()
    }

    /// The sender of a request.
    pub(super) fn asker(&self, key: MemberKey, pool: &PoolName) -> Result<&Member<D>, Refusal> {
        let member = self.at(key).filter(|member| !member.is_leaving);
        member.ok_or_else(|| refusals::not_member(pool))
    }

    pub(super) fn insert(&mut self, joining: Joining<D>) -> MemberKey {
        let (user, is_stranger) = {
            let link = joining.peer.link();
            let user = link.account().user();
            (user.id(), user.is_stranger())
        };
        self.members.insert(Member {
            peer: joining.peer,
            app: joining.app,
            instance: joining.instance,
            user,
            is_stranger,
            attachments: joining.attachments,
            handlers: BTreeMap::new(),
            calling: 0,
            serving: 0,
            takes_descriptors: joining.takes_descriptors,
            rights: joining.rights,
            takes_answers: joining.takes_answers,
            is_leaving: false,
        })
    }

    pub(super) fn remove(&mut self, key: MemberKey) -> Option<Member<D>> {
        self.watching.remove(&key);
        self.members.remove(key)
    }

    /// Sends the pool's events to a member; `None` stops them. False if the membership has ended.
    pub(super) fn watch(&mut self, key: MemberKey, events: Option<EventSet>) -> bool {
        if self.at(key).is_none() {
            return false;
        }
        match events {
            Some(events) => self.watching.insert(key, events),
            None => self.watching.remove(&key),
        };
        true
    }

    /// The members that watch for an event, but for the one that it is about.
    pub(super) fn watchers(
        &self,
        event: Event,
        about: Option<MemberKey>,
    ) -> impl Iterator<Item = (MemberKey, &Member<D>)> {
        let watching = self.watching.iter();
        let wanted = watching.filter(move |(key, set)| set.has(event) && Some(**key) != about);
        wanted.filter_map(|(key, _)| Some((*key, self.at(*key)?)))
    }

    /// Answers a deferred request.
    pub(super) fn answer(
        &self,
        member: MemberKey,
        id: Option<&str>,
        result: Result<Option<String>, Refusal>,
        turn: &mut Turn<'_, D>,
    ) {
        if let Err(refusal) = &result {
            turn.refused(refusal.code);
        }
        let (Some(to), Some(id)) = (self.at(member), id) else {
            return;
        };
        match result {
            Ok(None) => {}
            Ok(Some(reply)) => {
                turn.send(&to.peer, Class::Control, reply.len() + 256, |out| {
                    encode::reply(out, id, &reply);
                });
            }
            Err(refusal) => to.refuse(id, &refusal, turn),
        }
    }

    /// Notifies the watchers.
    pub(super) fn notify(&self, event: Event, json: &str, turn: &mut Turn<'_, D>) {
        for (_, member) in self.watchers(event, None) {
            turn.send(&member.peer, Class::Event, json.len(), |out| {
                encode::message(out, json)
            });
        }
    }

    /// Notifies the watchers, except the member itself, that it came or left.
    pub(super) fn notify_presence(
        &self,
        event: Event,
        pool: &PoolName,
        key: MemberKey,
        turn: &mut Turn<'_, D>,
    ) {
        self.notify_all(event, pool, key, std::iter::once(None), turn);
    }

    /// Notifies the watchers, except the member itself, about triggers of it.
    pub(super) fn notify_triggers(
        &self,
        event: Event,
        pool: &PoolName,
        key: MemberKey,
        triggers: &[TriggerName],
        turn: &mut Turn<'_, D>,
    ) {
        self.notify_all(event, pool, key, triggers.iter().map(Some), turn);
    }

    /// A message can come with thousands of events, for thousands of watchers. So the events are
    /// encoded once, and a watcher gets many at a time, or loses them.
    fn notify_all<'t>(
        &self,
        event: Event,
        pool: &PoolName,
        key: MemberKey,
        triggers: impl Iterator<Item = Option<&'t TriggerName>>,
        turn: &mut Turn<'_, D>,
    ) {
        let Some(member) = self.at(key) else {
            return;
        };
        if self.watchers(event, Some(key)).next().is_none() {
            return;
        }
        let account = Arc::clone(member.peer.link().account());
        let mut triggers = triggers.peekable();
        let (mut frames, mut count) = (Vec::new(), 0);
        while let Some(trigger) = triggers.next() {
            let trigger = trigger.map_or(String::new(), |t| format!(",\"trigger\":\"{t}\""));
            let json = format!(
                "{{\"action\":\"event\",\"event\":\"{}\",\"pool\":\"{pool}\",\"app_id\":\"{}\",\
                \"instance\":\"{}\"{trigger}}}",
                event.as_str(),
                member.app,
                member.instance,
            );
            encode::message(&mut frames, &json);
            count += 1;
            if triggers.peek().is_none() || frames.len() >= EVENTS_BYTES {
                let to = self.watchers(event, Some(key));
                turn.send_events(to.map(|(_, to)| &to.peer), (&frames, count), &account);
                frames.clear();
                count = 0;
            }
        }
    }

    pub(super) fn check(&self) {
        for key in self.watching.keys() {
            assert!(self.at(*key).is_some(), "only members watch");
        }
    }
}
