//! Messages that the server sends: each must be one that the client may expect at that moment.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use latzero_fabric::{Class, Limits, Time};
use latzero_protocol::limits::DEFAULT_POOL;
use serde_json::Value;

use super::{Checker, Found, Registered, is_last, specs, tag, text};
use crate::client::strings;
use crate::line::Peer;
use crate::world::Message;

impl Checker {
    pub(super) fn sent(
        &mut self,
        to: Peer,
        class: Class,
        message: &Message,
        now: Time,
        limits: &Limits,
    ) -> Result<(), Found> {
        let json = &message.json;
        ensure!(self.conn(to).is_open, "closed {to:?} is sent {json}");
        let attachments = self.conn(to).attachments;
        ensure!(
            message.attachment.is_none() || attachments,
            "{to:?} takes no attachments"
        );
        match json["action"].as_str() {
            Some("handshake_ack") => self.acknowledged(to, json),
            Some("trigger") => {
                ensure!(class == Class::Call, "a call was sent as {class:?}");
                self.delivered_call(to, message, now, limits)
            }
            Some("emit") => {
                ensure!(class == Class::Emit, "an emit was sent as {class:?}");
                self.delivered_emit(to, message)
            }
            Some("response") => self.response(to, message, now),
            Some("error") => {
                if let Some(current) = &mut self.current
                    && current.peer == to
                {
                    current.errors += 1;
                }
                Ok(())
            }
            Some("cancel") => self.cancelled(to, json, now),
            Some("ack") => {
                let handle = json["id"].as_str().unwrap_or_default();
                let call = self.handles.get(handle).and_then(|tag| self.calls.get(tag));
                let fits =
                    call.is_some_and(|call| call.handler == Some(to) && call.window.is_some());
                ensure!(fits, "{to:?} got an ack for a call that is not its: {json}");
                Ok(())
            }
            Some("event") => self.pushed(to, json),
            other => Err(format!("{to:?} got a message of action {other:?}")),
        }
    }

    pub(super) fn acknowledged(&mut self, to: Peer, json: &Value) -> Result<(), Found> {
        let current = self
            .current
            .as_ref()
            .ok_or("an acknowledgement out of nowhere")?;
        let asked = current.message.as_ref().map(|message| message.json.clone());
        let asked = asked.filter(|asked| asked["action"] == "handshake" && current.peer == to);
        let asked = asked.ok_or("an acknowledgement of no handshake")?;
        let app = asked["app_id"].as_str().unwrap_or_default().to_owned();
        let known = self.apps.get(&app);
        let wants_back = asked["pools"].is_null() && asked["triggers"].is_null();
        let rehydrated = wants_back && known.is_some();
        ensure!(
            json["rehydrated"] == rehydrated,
            "rehydrated should be {rehydrated}: {json}"
        );
        let mut registered = match known {
            Some(known) if rehydrated => known.clone(),
            _ => Registered {
                pools: strings(&asked["pools"]).into_iter().collect(),
                triggers: specs(&asked["triggers"]),
                watches: BTreeMap::new(),
            },
        };
        if registered.pools.is_empty() {
            registered.pools.insert(DEFAULT_POOL.to_owned());
        }
        let pools: BTreeSet<String> = strings(&json["pools"]).into_iter().collect();
        let triggers: BTreeSet<String> = strings(&json["triggers"]).into_iter().collect();
        ensure!(
            pools == registered.pools,
            "pools {pools:?}, not {:?}",
            registered.pools
        );
        let expected: BTreeSet<String> = registered.triggers.keys().cloned().collect();
        ensure!(
            triggers == expected,
            "triggers {triggers:?}, not {expected:?}"
        );
        let attachments = strings(&asked["features"])
            .iter()
            .any(|f| f == "attachments");
        let exclusive_alone = asked["takeover"] != true
            && asked["exclusive"] == true
            && self
                .conns
                .values()
                .any(|c| c.is_open && c.app.as_ref() == Some(&app));
        ensure!(!exclusive_alone, "app '{app}' is not alone");
        let conn = self.conn(to);
        ensure!(conn.app.is_none(), "{to:?} is acknowledged twice");
        conn.app = Some(app.clone());
        conn.instance = json["instance"].as_str().unwrap_or_default().to_owned();
        conn.attachments = attachments;
        conn.pools.clone_from(&registered.pools);
        conn.triggers.clone_from(&registered.triggers);
        let watches = registered
            .watches
            .iter()
            .filter(|(pool, _)| registered.pools.contains(*pool));
        conn.watches = watches
            .map(|(pool, events)| (pool.clone(), events.clone()))
            .collect();
        self.apps.insert(app, registered);
        Ok(())
    }

    /// Checks that a call reaches a handler that serves it, is a member and is addressed: once,
    /// unchanged and in order.
    pub(super) fn delivered_call(
        &mut self,
        to: Peer,
        message: &Message,
        now: Time,
        limits: &Limits,
    ) -> Result<(), Found> {
        let json = &message.json;
        let current = self
            .current
            .as_ref()
            .map(|current| (current.peer, current.call, current.is_duplicate));
        let Some((caller, Some(tag), is_duplicate)) = current else {
            return Err(format!("{to:?} got a call that nobody made: {json}"));
        };
        ensure!(
            self::tag(json) == Some(tag),
            "{to:?} got another call than the one being made"
        );
        ensure!(!is_duplicate, "a call was taken whose id is in use");
        let (pool, process) = (text(json, "pool"), text(json, "process"));
        let handle = text(json, "id");
        ensure!(
            !self.handles.contains_key(&handle),
            "call id {handle} is used twice"
        );
        let destination = self.calls[&tag].request.json["destination"].clone();
        let conn = self.conn(to);
        ensure!(
            conn.pools.contains(&pool),
            "a call reached {to:?}, which is not in pool '{pool}'"
        );
        ensure!(
            conn.serves(&pool, &process),
            "a call reached {to:?}, which does not serve '{process}'"
        );
        let epoch = *conn
            .epochs
            .entry((pool.clone(), process.clone()))
            .or_default();
        let concurrency = conn.triggers[&process].concurrency;
        let is_meant = conn.is_meant(&destination);
        ensure!(is_meant, "a call reached {to:?}, for which it is not meant");
        let serving = self.calls.values().filter(|call| {
            call.handler == Some(to)
                && call.pool == pool
                && call.process == process
                && call.epoch == epoch
        });
        let serving = serving.count() as u64;
        ensure!(
            concurrency.is_none_or(|most| serving < most),
            "{to:?} serves {serving} calls of '{process}' with concurrency {concurrency:?}"
        );
        let in_pool = self
            .calls
            .values()
            .filter(|c| c.handler.is_some() && c.pool == pool)
            .count();
        ensure!(
            in_pool < limits.pending_max,
            "pool '{pool}' holds more than {in_pool} calls"
        );
        let from = self.conn(caller);
        ensure!(
            from.pools.contains(&pool),
            "{caller:?} calls in a pool that it is not in"
        );
        let origin = &json["origin"];
        ensure!(
            origin["app_id"].as_str() == from.app.as_deref()
                && origin["instance"] == *from.instance,
            "a call of {caller:?} claims to be of {origin}"
        );
        let before = from.newest.insert(to, tag);
        ensure!(
            before.is_none_or(|before| before < tag),
            "calls of {caller:?} reach {to:?} out of order"
        );
        let call = self
            .calls
            .get_mut(&tag)
            .ok_or("a call that is not in flight")?;
        ensure!(call.handler.is_none(), "a call was delivered twice");
        ensure!(
            call.pool == pool && call.process == process,
            "a call went astray: {json}"
        );
        let left = call.deadline.since(now).as_millis() as u64;
        ensure!(
            json["ttl"].as_u64().is_some_and(|ttl| ttl <= left),
            "a call's ttl grew: {json}"
        );
        ensure!(
            json["window"].as_u64() == call.window,
            "a window changed: {json}"
        );
        same_body(&call.request, message, "data")?;
        (call.handler, call.handle, call.epoch) = (Some(to), handle.clone(), epoch);
        self.handles.insert(handle, tag);
        Ok(())
    }

    pub(super) fn delivered_emit(&mut self, to: Peer, message: &Message) -> Result<(), Found> {
        let json = &message.json;
        let (pool, process) = (text(json, "pool"), text(json, "process"));
        ensure!(
            self.conn(to).serves(&pool, &process),
            "an emit reached {to:?}, which does not serve '{process}' in pool '{pool}'"
        );
        let current = self.current.as_mut().ok_or("an emit out of nowhere")?;
        let sender = current.peer;
        let asked = current.message.as_ref().ok_or("an emit that nobody sent")?;
        ensure!(
            tag(&asked.json) == tag(json),
            "{to:?} got another emit than the one being sent"
        );
        same_body(asked, message, "data")?;
        current.recipients.push(to);
        let from = self.conn(sender);
        let origin = &json["origin"];
        ensure!(
            origin["instance"] == *from.instance
                && origin["app_id"].as_str() == from.app.as_deref(),
            "an emit of {sender:?} claims to be another's"
        );
        Ok(())
    }

    pub(super) fn response(&mut self, to: Peer, message: &Message, now: Time) -> Result<(), Found> {
        let json = &message.json;
        let id = text(json, "in_reply_to");
        let is_final = is_last(json);
        let code = json["error"]["code"].as_str().unwrap_or_default();
        if let Some(current) = &mut self.current
            && current.peer == to
            && current
                .message
                .as_ref()
                .is_some_and(|m| m.json["id"] == *id)
            && !matches!(
                current
                    .message
                    .as_ref()
                    .map(|m| text(&m.json, "action"))
                    .as_deref(),
                Some("cancel" | "ack")
            )
        {
            // The server's own answer to the request that it is handling.
            let begun = current
                .call
                .and_then(|tag| self.calls.get(&tag))
                .and_then(|call| call.handler);
            if begun.is_none() || current.is_duplicate {
                ensure!(is_final, "a request was answered with {json}");
                current.replies.push(json.clone());
                if let Some(tag) = current.call {
                    ensure!(
                        json["status"] == "error",
                        "a call that did not begin ended well"
                    );
                    ensure!(
                        json["error"]["ran"] == "no",
                        "a call that did not begin may have run: {json}"
                    );
                    self.refused(to, tag, code)?;
                }
                return Ok(());
            }
        }
        // A call that waited did not run.
        if matches!(code, "cancelled" | "timeout")
            && json["error"]["ran"] == "no"
            && self.held.remove(&(to, id.clone()))
        {
            return Ok(());
        }
        let Some(&tag) = self.conn(to).calls.get(&id) else {
            return Err(format!("{to:?} got an answer to nothing: {json}"));
        };
        let call = self
            .calls
            .get_mut(&tag)
            .ok_or("an answer to a call that ended")?;
        let (handler, is_cancelled) = (call.handler, call.is_cancelled);
        let handler = handler.ok_or("an answer to a call that did not begin")?;
        let current = self.current.as_mut();
        // A handler whose last response could not be forwarded has no call left to be notified of.
        let mut has_finished = false;
        let answer = current.filter(|current| {
            current.peer == handler
                && current.message.as_ref().is_some_and(|m| {
                    m.json["action"] == "response" && m.json["in_reply_to"] == *call.handle
                })
        });
        if let Some(current) = answer {
            current.is_answered = true;
            has_finished = current.message.as_ref().is_some_and(|m| is_last(&m.json));
            let asked = current
                .message
                .as_ref()
                .ok_or("an answer that nobody gave")?;
            if asked.json["status"] == json["status"] && asked.json["headers"] == json["headers"] {
                same_body(asked, message, "response")?;
                if json["status"] == "partial" {
                    call.items += 1;
                    let most = call.window.map(|window| window + call.acknowledged);
                    ensure!(
                        most.is_none_or(|most| call.items <= most),
                        "item {} of {most:?}",
                        call.items
                    );
                }
                let error = &asked.json["error"];
                ensure!(
                    error.is_null() || json["error"] == *error,
                    "a handler's error changed: {json}"
                );
                if is_final {
                    self.forget(tag);
                }
                return Ok(());
            }
        }
        // The server ends the call itself.
        ensure!(json["status"] == "error", "nobody gave the answer {json}");
        ensure!(
            json["error"]["ran"] == "unknown",
            "the handler of this call may have run: {json}"
        );
        let handler_stays = self.conn(handler).is_open && code != "handler_gone";
        let call = &self.calls[&tag];
        match code {
            "timeout" => ensure!(
                now >= call.deadline,
                "a call ended {:?} early",
                call.deadline.since(now)
            ),
            "handler_error" => {
                let overrun = call
                    .window
                    .is_some_and(|window| call.items >= window + call.acknowledged);
                ensure!(overrun, "a stream was ended within its window: {call:?}");
            }
            "handler_gone" | "cancelled" | "overloaded" | "too_large" => {}
            _ => return Err(format!("a call in flight ended with {code}")),
        }
        ensure!(
            is_cancelled || has_finished || !handler_stays,
            "{handler:?} was not told that its call ended: {json}"
        );
        self.forget(tag);
        Ok(())
    }

    /// Checks that a refused call was refused for a valid reason.
    pub(super) fn refused(&mut self, caller: Peer, tag: u64, code: &str) -> Result<(), Found> {
        let Some(call) = self.calls.get(&tag) else {
            return Ok(());
        };
        let destination = &call.request.json["destination"];
        let handlers = self
            .conns
            .values()
            .filter(|conn| conn.serves(&call.pool, &call.process) && conn.is_meant(destination));
        let handlers = handlers.count();
        let is_in = self.conns[&caller].pools.contains(&call.pool);
        match code {
            "no_handler" => ensure!(
                handlers == 0 && is_in,
                "no_handler, with {handlers} of them"
            ),
            "no_app" | "offline" => {
                ensure!(handlers == 0 && is_in, "{code}, with {handlers} handlers")
            }
            "not_member" => ensure!(
                !is_in || handlers == 0,
                "not_member, with {handlers} handlers"
            ),
            "overloaded" | "draining" | "bad_message" | "invalid_name" => {}
            "timeout" => ensure!(
                call.deadline <= self.now,
                "a call that waited timed out before its time: {call:?}"
            ),
            _ => return Err(format!("a call was refused with {code}")),
        }
        Ok(())
    }

    pub(super) fn cancelled(&mut self, to: Peer, json: &Value, now: Time) -> Result<(), Found> {
        let handle = text(json, "id");
        let live = self.handles.get(&handle).copied();
        let Some((tag, call)) = live.and_then(|tag| Some((tag, self.calls.get_mut(&tag)?))) else {
            return Err(format!(
                "{to:?} was told of the end of no call of its: {json}"
            ));
        };
        ensure!(
            call.handler == Some(to),
            "{to:?} was told of another's call: {json}"
        );
        ensure!(!call.is_cancelled, "{to:?} was told twice: {json}");
        if json["reason"] == "timeout" {
            ensure!(now >= call.deadline, "a call timed out early");
        }
        call.is_cancelled = true;
        let (caller, has_id) = (call.caller, call.id.is_some());
        if !has_id || !self.conn(caller).is_open {
            self.forget(tag);
        }
        if let Some(current) = &mut self.current {
            current.is_answered = true;
        }
        Ok(())
    }

    pub(super) fn pushed(&mut self, to: Peer, json: &Value) -> Result<(), Found> {
        let (event, pool) = (text(json, "event"), text(json, "pool"));
        let conn = self.conn(to);
        match event.as_str() {
            "pool_removed" => conn.leave(&pool),
            "displaced" | "kicked" => {
                for pool in std::mem::take(&mut conn.pools) {
                    conn.leave(&pool);
                }
            }
            "draining" | "lost" => {}
            _ => {
                ensure!(
                    conn.pools.contains(&pool),
                    "{to:?} is told of a pool that it is not in: {json}"
                );
                let wanted = conn
                    .watches
                    .get(&pool)
                    .ok_or(format!("{to:?} does not watch: {json}"))?;
                let wants = wanted.as_ref().is_none_or(|events| events.contains(&event));
                ensure!(wants, "{to:?} does not watch this: {json}");
                ensure!(
                    json["instance"] != *conn.instance,
                    "{to:?} is told of itself: {json}"
                );
                if let Some(current) = &mut self.current {
                    let trigger = json["trigger"].as_str().map(str::to_owned);
                    current.notices.insert((to, event, pool, trigger));
                }
            }
        }
        Ok(())
    }
}

/// Whether a body arrived unchanged: as JSON, as raw bytes, or as base64 of them.
pub(super) fn same_body(sent: &Message, received: &Message, field: &str) -> Result<(), Found> {
    let arrived = &received.json[field];
    let is_same = match (&sent.attachment, &received.attachment) {
        (Some(sent), Some(received)) => sent == received,
        (Some(sent), None) => {
            let text = base64::engine::general_purpose::STANDARD.encode(sent);
            received.json["encoding"] == "base64" && *arrived == *text
        }
        (None, None) => sent.json[field] == *arrived,
        (None, Some(_)) => false,
    };
    ensure!(is_same, "a body changed on its way: {arrived}");
    ensure!(
        sent.json["headers"] == received.json["headers"],
        "headers changed on their way"
    );
    Ok(())
}
