//! Messages that the server receives: the model records each request, and then checks that every
//! request was answered.

use std::collections::BTreeSet;

use latzero_fabric::Time;
use latzero_protocol::limits::{DEFAULT_POOL, TTL_DEFAULT_MS};
use serde_json::Value;

use super::{Call, Checker, Conn, Current, Found, is_for, is_last, specs, tag, text};
use crate::client::strings;
use crate::line::Peer;
use crate::world::Message;

impl Checker {
    pub(super) fn begin(
        &mut self,
        peer: Peer,
        message: Option<Message>,
        now: Time,
    ) -> Result<(), Found> {
        ensure!(self.current.is_none(), "two frames are handled at once");
        let mut current = Current {
            peer,
            message: None,
            call: None,
            is_duplicate: false,
            replies: Vec::new(),
            errors: 0,
            recipients: Vec::new(),
            meant: BTreeSet::new(),
            lost: Vec::new(),
            is_refused: false,
            is_unstored: false,
            presence: self.conn(peer).presence(),
            notices: BTreeSet::new(),
            is_answered: false,
        };
        ensure!(
            self.conn(peer).is_open,
            "a frame of closed {peer:?} is handled"
        );
        if let Some(message) = &message
            && message.json["action"] == "trigger"
            && self.conn(peer).app.is_some()
        {
            self.begin_call(&mut current, message, now);
        }
        if let Some(Message { json, .. }) = &message
            && json["action"] == "emit"
        {
            let (pool, process) = (text(json, "pool"), text(json, "process"));
            let is_meant =
                |conn: &Conn| conn.serves(&pool, &process) && conn.is_meant(&json["destination"]);
            let meant = self.conns.iter().filter(|(_, conn)| is_meant(conn));
            current.meant = meant.map(|(&peer, _)| peer).collect();
        }

        if let Some(message) = &message
            && message.json["action"] == "ack"
        {
            let id = message.json["id"].as_str().unwrap_or_default();
            let tag = self.conn(peer).calls.get(id).copied();
            if let Some(call) = tag.and_then(|tag| self.calls.get_mut(&tag)) {
                call.acknowledged += message.json["count"].as_u64().unwrap_or(0);
            }
        }
        current.message = message;
        self.current = Some(current);
        Ok(())
    }

    pub(super) fn begin_call(&mut self, current: &mut Current, message: &Message, now: Time) {
        let json = &message.json;
        let tag = tag(json).unwrap_or_else(|| {
            // An invalid message has no tag: it never becomes a call.
            self.untagged += 1;
            u64::MAX - self.untagged
        });
        let conn = self.conn(current.peer);
        let pool = match (json["pool"].as_str(), conn.pools.len()) {
            (Some(pool), _) => pool.to_owned(),
            (None, 1) => conn.pools.first().cloned().unwrap_or_default(),
            _ => DEFAULT_POOL.to_owned(),
        };
        let id = json["id"].as_str().map(str::to_owned);
        if let Some(id) = id.as_ref().filter(|id| !id.is_empty()) {
            if conn.calls.contains_key(id) {
                current.is_duplicate = true;
            } else {
                conn.calls.insert(id.clone(), tag);
            }
        }
        current.call = Some(tag);
        let ttl = json["ttl"].as_u64().unwrap_or(TTL_DEFAULT_MS);
        self.calls.insert(
            tag,
            Call {
                caller: current.peer,
                id: id.filter(|_| !current.is_duplicate),
                pool,
                process: json["process"].as_str().unwrap_or_default().to_owned(),
                request: message.clone(),
                deadline: now.after_ms(ttl),
                handler: None,
                handle: String::new(),
                epoch: 0,
                window: json["window"].as_u64(),
                acknowledged: 0,
                items: 0,
                is_cancelled: false,
            },
        );
    }

    /// The message waits in its session, as if it had not arrived yet.
    pub(super) fn held(&mut self, peer: Peer) -> Result<(), Found> {
        let current = self.current.take().ok_or("nothing was being handled")?;
        ensure!(
            current.replies.is_empty() && current.errors == 0,
            "what waits was answered"
        );
        let id = current.message.as_ref().and_then(|m| m.json["id"].as_str());
        if let Some(tag) = current.call {
            self.forget(tag);
            if let Some(id) = id {
                self.held.insert((peer, id.to_owned()));
            }
        }
        Ok(())
    }

    pub(super) fn handled(&mut self, peer: Peer) -> Result<(), Found> {
        let current = self.current.take().ok_or("nothing was being handled")?;
        ensure!(
            current.peer == peer,
            "another connection's frame was handled"
        );
        let is_open = self.conn(peer).is_open;
        let Some(message) = &current.message else {
            // Not JSON: one error message, then the end, which the session reports.
            ensure!(
                current.errors == 1 || !is_open,
                "what is no JSON got no error message"
            );
            return Ok(());
        };
        let json = &message.json;
        let (action, id) = (
            json["action"].as_str().unwrap_or_default(),
            json["id"].as_str(),
        );
        if let Some(tag) = current.call {
            let began = self
                .calls
                .get(&tag)
                .is_some_and(|call| call.handler.is_some());
            if !began {
                self.forget(tag);
                let replies = current.replies.len() as u64 + current.errors;
                ensure!(
                    replies == 1 || !is_open || current.is_answered,
                    "a call that did not begin was answered {replies} times"
                );
            }
            return Ok(());
        }
        let replies = current.replies.len();
        let expects_reply = id.is_some_and(|id| !id.is_empty() && id.len() <= 128)
            && !matches!(action, "cancel" | "ack" | "response" | "handshake");
        if expects_reply {
            let refused = current.errors as usize;
            ensure!(
                replies == 1 || (replies == 0 && refused == 1) || !is_open,
                "request {id:?} got {replies} replies"
            );
        } else if action != "handshake" {
            ensure!(
                replies == 0,
                "a message without a reply got {:?}",
                current.replies
            );
        }
        // The reply may not have fitted into the outbox, so it does not decide this.
        let succeeded = !current.is_refused;
        if let Some(reply) = current.replies.first() {
            ensure!(
                (reply["status"] == "ok") == (succeeded && !current.is_unstored),
                "a refusal was not counted: {reply}"
            );
        }
        if action == "emit" && succeeded && tag(json).is_some() {
            self.emitted(peer, json, &current)?;
        }
        if action == "response" {
            self.responded(peer, json, &current)?;
        }
        if succeeded && self.conn(peer).app.is_some() {
            self.apply(peer, action, json);
        }
        self.changes_told(peer, &current)
    }

    /// Checks that every watcher is notified of the sender's new pools and triggers.
    pub(super) fn changes_told(&mut self, peer: Peer, current: &Current) -> Result<(), Found> {
        let Some(conn) = self.conns.get(&peer).filter(|conn| conn.is_open) else {
            return Ok(());
        };
        let after = conn.presence();
        let come = after
            .difference(&current.presence)
            .map(|change| (change, ["app_online", "trigger_added"]));
        let gone = current
            .presence
            .difference(&after)
            .map(|change| (change, ["app_offline", "trigger_removed"]));
        let is_removal = current
            .message
            .as_ref()
            .is_some_and(|m| m.json["action"] == "pool_remove");
        for ((pool, trigger), [of_app, of_trigger]) in come.chain(gone.filter(|_| !is_removal)) {
            let event = if trigger.is_some() {
                of_trigger
            } else {
                of_app
            };
            let watchers = self.conns.iter().filter(|&(&watcher, conn)| {
                watcher != peer && conn.watches(pool, event) && !current.lost.contains(&watcher)
            });
            for (&watcher, _) in watchers {
                let notice = (watcher, event.to_owned(), pool.clone(), trigger.clone());
                ensure!(
                    current.notices.contains(&notice),
                    "{watcher:?} was not told of {event} in '{pool}'"
                );
            }
        }
        Ok(())
    }

    /// Checks that an emit is delivered once to each handler that it is meant for, and that its
    /// sender gets their number.
    pub(super) fn emitted(
        &mut self,
        peer: Peer,
        json: &Value,
        current: &Current,
    ) -> Result<(), Found> {
        let Some(pool) = json["pool"].as_str() else {
            return Ok(());
        };
        ensure!(
            self.conn(peer).pools.contains(pool),
            "{peer:?} emits into a pool that it is not in"
        );
        let got = &current.recipients;
        let distinct: BTreeSet<Peer> = got.iter().chain(&current.lost).copied().collect();
        ensure!(
            distinct.len() == got.len() + current.lost.len(),
            "an emit reached somebody twice"
        );
        let meant = &current.meant;
        ensure!(
            distinct.is_subset(meant),
            "an emit for {meant:?} reached {distinct:?}"
        );
        if json["deliver"] == "one" {
            let expected = usize::from(!meant.is_empty() && current.lost.is_empty());
            let most = usize::from(!meant.is_empty());
            ensure!(
                (expected..=most).contains(&got.len()),
                "an emit to one reached {}",
                got.len()
            );
        } else {
            ensure!(
                distinct == *meant,
                "an emit for {meant:?} reached only {distinct:?}"
            );
        }
        if let Some(reply) = current.replies.first() {
            let said = reply["response"]["delivered"].as_u64();
            ensure!(
                said == Some(got.len() as u64),
                "{} got an emit, told was {said:?}",
                got.len()
            );
        }
        self.reported += got.len() as u64;
        Ok(())
    }

    /// Checks that a handler's answer to a live call reaches the caller at once, or ends the call.
    pub(super) fn responded(
        &mut self,
        peer: Peer,
        json: &Value,
        current: &Current,
    ) -> Result<(), Found> {
        let handle = json["in_reply_to"].as_str().unwrap_or_default();
        let live = self
            .handles
            .get(handle)
            .and_then(|tag| self.calls.get(tag).map(|call| (*tag, call)));
        let Some((tag, call)) = live else {
            return Ok(());
        };
        if call.handler != Some(peer) || current.errors > 0 {
            return Ok(());
        }
        let is_final = is_last(json);
        let caller = call.caller;
        if call.id.is_none() || !self.conns.get(&caller).is_some_and(|conn| conn.is_open) {
            if is_final {
                self.forget(tag);
            }
            return Ok(());
        }
        ensure!(
            current.is_answered,
            "an answer to {handle} did not reach its caller"
        );
        Ok(())
    }

    /// Applies the changes of a request that succeeded.
    pub(super) fn apply(&mut self, peer: Peer, action: &str, json: &Value) {
        let conn = self.conns.entry(peer).or_default();
        let Some(app) = conn.app.clone() else { return };
        let registered = self.apps.entry(app.clone()).or_default();
        let pool = json["pool"].as_str().unwrap_or_default().to_owned();
        match action {
            // Joining again changes nothing, not even the stored registration.
            "pool_join" if conn.pools.contains(&pool) => {}
            "pool_join" => {
                conn.pools.insert(pool.clone());
                registered.pools.insert(pool);
            }
            "pool_leave" => {
                conn.leave(&pool);
                let stays = self
                    .conns
                    .values()
                    .any(|other| other.app.as_ref() == Some(&app) && other.pools.contains(&pool));
                if !stays {
                    registered.pools.remove(&pool);
                    registered.watches.remove(&pool);
                }
            }
            "pool_remove" => {
                for registered in self.apps.values_mut() {
                    registered.pools.remove(&pool);
                    registered.watches.remove(&pool);
                }
            }
            "trigger_register" => {
                for (name, spec) in specs(&json["triggers"]) {
                    for ((pool, _), epoch) in
                        conn.epochs.iter_mut().filter(|((_, n), _)| *n == name)
                    {
                        *epoch += u64::from(!is_for(&spec, pool));
                    }
                    conn.triggers.insert(name.clone(), spec.clone());
                    registered.triggers.insert(name, spec);
                }
            }
            "trigger_unregister" => {
                for (name, _) in specs(&json["triggers"]) {
                    conn.triggers.remove(&name);
                    registered.triggers.remove(&name);
                    for (_, epoch) in conn.epochs.iter_mut().filter(|((_, n), _)| *n == name) {
                        *epoch += 1;
                    }
                }
            }
            "watch" => {
                let events = json["events"].is_array().then(|| strings(&json["events"]));
                conn.watches.insert(pool.clone(), events.clone());
                registered.watches.insert(pool, events);
            }
            "unwatch" => {
                conn.watches.remove(&pool);
                registered.watches.remove(&pool);
            }
            _ => {}
        }
    }
}
