//! Messages from the server: replies find their call, triggers become jobs, the rest is handled at
//! once.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::Instant;

use latzero_crypto::events::Action;
use latzero_protocol::{Code, Envelope, Ran, Raw, Refusal, encode, frame};
use serde_json::{Map, Value};

use crate::drive::answers::Answer;
use crate::drive::core::Core;
use crate::drive::events::{Emission, Full, Lossy, Presence, Queue};
use crate::drive::handlers::{self, Entry, HandlerJob};
use crate::drive::request::{self, Request};
use crate::error::{Error, HandlerError};
use crate::payload::{Beside, Payload, Reply};
use crate::sync::lock;
use crate::wire::input::{Input, Received};
use crate::wire::pending::{Key, Pending};

impl Core {
    /// Handles what was read, or the loss of the connection. Calls and emits are added to `jobs`.
    pub(crate) fn settle(
        self: &Arc<Self>,
        input: &mut Input,
        received: Received,
        jobs: &mut Vec<HandlerJob>,
    ) {
        let lost = match received {
            Received::Nothing => return,
            Received::Bytes { .. } => {
                let processed = self.process(input, jobs);
                // Here, so that they are taken in the order that they came in.
                for job in jobs.extract_if(.., |job| job.is_detached()) {
                    self.note(&job);
                    handlers::run(self, job, Instant::now());
                }
                processed.err().or_else(|| input.lost.take())
            }
            Received::Lost(why) => Some(why),
        };
        if let Some(why) = lost
            && let Some(link) = input.detach()
        {
            self.lost(&link, &why);
        }
    }

    /// Handles every complete message: replies are delivered to callers.
    fn process(
        self: &Arc<Self>,
        input: &mut Input,
        jobs: &mut Vec<HandlerJob>,
    ) -> Result<(), String> {
        let Some(epoch) = input.link.as_ref().map(|link| link.epoch) else {
            return Ok(());
        };
        let mut batch = Batch {
            core: self,
            epoch,
            now: Instant::now(),
            jobs,
            wake: Vec::new(),
            must_flush: false,
            entry: None,
        };
        let result = input.decode(|message, descriptors| batch.message(message, descriptors));
        let must_flush = batch.must_flush;
        batch.wake.into_iter().for_each(Waker::wake);
        if must_flush {
            self.flush();
        }
        result
    }
}

struct Batch<'a> {
    core: &'a Arc<Core>,
    epoch: u32,
    /// When the batch was read, which is precise enough for the messages in it.
    now: Instant,
    jobs: &'a mut Vec<HandlerJob>,
    wake: Vec<Waker>,
    must_flush: bool,
    /// The handler that was looked up last: most messages of a batch have the same one.
    entry: Option<Arc<Entry>>,
}

/// The parts that few replies have in addition to the payload.
fn beside(e: &Envelope<'_>, descriptors: Vec<OwnedFd>) -> Option<Box<Beside>> {
    let json = e.attachment.and(e.response);
    if json.is_none() && descriptors.is_empty() {
        return None;
    }
    Some(Box::new(Beside {
        json: json.map_or("", Raw::text).into(),
        descriptors: Arc::new(Mutex::new(descriptors)),
    }))
}

/// What a response means for its call.
enum CallEvent {
    Item(Payload),
    Progress(Payload),
    /// The server has stored it; the answer arrives when a handler has run.
    Parked,
    End(Result<Reply, Error>),
}

fn is(field: Option<Raw<'_>>, quoted: &str) -> bool {
    field.is_some_and(|raw| raw.text() == quoted)
}

impl Batch<'_> {
    fn message(&mut self, e: &Envelope<'_>, descriptors: Vec<OwnedFd>) -> Result<(), String> {
        let action = e.action.map_or("", Raw::text);
        match action {
            "\"response\"" => self.response(e, descriptors),
            "\"trigger\"" => self.trigger(e, descriptors),
            "\"emit\"" => self.emit(e),
            "\"ack\"" => {
                let count = e.count.and_then(Raw::as_u64).unwrap_or(0);
                if let Some(id) = e.id.and_then(Raw::as_str) {
                    self.core.handlers.grant(&id, count);
                }
            }
            "\"cancel\"" => {
                if let Some(id) = e.id.and_then(Raw::as_str) {
                    // The call may have arrived with the same read.
                    self.jobs.retain(|job| !job.is_start_of(&id));
                    self.core.workers.drop_queued(&id);
                    self.core.handlers.cancel(&id);
                }
            }
            "\"event\"" => self.event(e),
            "\"ping\"" => {
                if let Some(id) = e.id.and_then(Raw::as_str) {
                    self.core
                        .outbox
                        .append(self.epoch, |out, _| encode::reply(out, &id, "{}"));
                    self.must_flush = true;
                }
            }
            // The server closes the connection after most of these; the others concern a request
            // without an id.
            "\"error\"" => {
                let error = Error::from_wire(e.error.map_or("", Raw::text));
                if matches!(error.kind(), Code::BadFrame | Code::FrameTooLarge) {
                    return Err(error.to_string());
                }
            }
            // A newer server may send messages that this client does not know.
            _ => {}
        }
        Ok(())
    }

    fn response(&mut self, e: &Envelope<'_>, descriptors: Vec<OwnedFd>) {
        let Some(id) = e.in_reply_to else { return };
        let inner = id
            .text()
            .strip_prefix('"')
            .and_then(|t| t.strip_suffix('"'));
        let place = inner.and_then(Key::parse);
        let payload = || Payload::received(e, e.response);
        let word = if is(e.status, "\"partial\"") {
            CallEvent::Item(payload())
        } else if is(e.status, "\"progress\"") {
            CallEvent::Progress(payload())
        } else if is(e.status, "\"parked\"") {
            CallEvent::Parked
        } else if is(e.status, "\"error\"") {
            CallEvent::End(Err(Error::from_wire(e.error.map_or("", Raw::text))))
        } else {
            CallEvent::End(Ok(Reply {
                payload: payload(),
                headers: e.headers.map(|raw| raw.text().into()),
                beside: beside(e, descriptors),
                epoch: self.epoch,
            }))
        };
        // An id that is not an index was chosen, or belongs to a call that may be from an earlier
        // process.
        let Some(key) = place else {
            return self.parked_event(e, id, word);
        };
        self.notify(&mut lock(&self.core.pending), key, word);
    }

    fn parked_event(&mut self, e: &Envelope<'_>, id: Raw<'_>, word: CallEvent) {
        let Some(id) = id.as_str() else { return };
        let mut pending = lock(&self.core.pending);
        // Under one lock: a call is detached either before or after this, so the answer is not
        // lost.
        if let Some(key) = pending.find_lasting(&id) {
            self.notify(&mut pending, key, word);
            return;
        }
        drop(pending);
        if let CallEvent::End(result) = word {
            let pool = e.pool.and_then(Raw::as_str);
            let result = self.core.open_late(pool.as_deref(), &id, result);
            let answer = Answer::new(&id, pool.as_deref(), result);
            self.wake.extend(self.core.answers.push(answer));
        }
    }

    fn notify(&mut self, pending: &mut Pending, key: Key, word: CallEvent) {
        match word {
            CallEvent::Item(item) => pending.item(key, item, &mut self.wake),
            CallEvent::Progress(report) => pending.progress(key, report, &mut self.wake),
            CallEvent::Parked => pending.parked(key, &mut self.wake),
            CallEvent::End(result) => pending.complete(key, result, &mut self.wake),
        }
    }

    /// The handler of `name`.
    fn find(&mut self, name: &str) -> Option<&Arc<Entry>> {
        let is_it = |entry: &Arc<Entry>| *entry.name == *name;
        if !self.entry.as_ref().is_some_and(is_it) {
            self.entry = self.core.handlers.find(name);
        }
        self.entry.as_ref()
    }

    /// A call or an emit as a handler sees it: decrypted, if it came in an encrypted pool. An app
    /// that has keys takes nothing from pools in which it does not serve: with a pool's name alone,
    /// the server could have an unencrypted call answered.
    fn request(&mut self, action: Action, e: &Envelope<'_>) -> Option<Request> {
        let core = self.core;
        if !core.has_sealed() {
            return Request::received(core, self.epoch, self.now, e);
        }
        let pool = e.pool.and_then(Raw::as_str).unwrap_or_default();
        let name = e.process.and_then(Raw::as_str).unwrap_or_default();
        let entry = self.find(&name);
        let is_served = match entry {
            Some(entry) if !entry.spec.pools.is_empty() => {
                entry.spec.pools.iter().any(|served| *served == *pool)
            }
            _ => core.has_named(&pool),
        };
        let is_privileged = entry.is_some_and(|entry| entry.spec.is_privileged);
        if !is_served {
            let request = Request::received(core, self.epoch, self.now, e)?;
            let text = format!("this app has keys, and does not serve '{name}' in pool '{pool}'");
            request.refuse(&Refusal::new(Code::NoHandler, text));
            self.must_flush = true;
            return None;
        }
        let Some(pool) = core.sealed_pool(&pool).cloned() else {
            return Request::received(core, self.epoch, self.now, e);
        };
        let plain = pool.open(action, is_privileged, e)?;
        let attachment = plain.bytes.as_deref();
        let envelope = match &plain.text {
            None => Envelope { attachment, ..*e },
            Some(text) => {
                let json = text.as_bytes();
                Envelope::parse(frame::Frame { json, attachment })
                    .ok()?
                    .ok()?
            }
        };
        let request = Request::received(core, self.epoch, self.now, &envelope)?;
        // Nobody else has the request yet.
        let _ = request.ticket.sealed.set(plain.reply);
        if plain.is_unprivileged {
            let text = format!(
                "trigger '{name}' takes only privileged calls: send it as one (this needs the key \
                OblivionSeal)"
            );
            let refused = Err(HandlerError::new(Code::Forbidden.as_str(), text));
            request::answer(core, &request.ticket, refused);
            self.must_flush = true;
            return None;
        }
        Some(request)
    }

    fn trigger(&mut self, e: &Envelope<'_>, descriptors: Vec<OwnedFd>) {
        let Some(request) = self.request(Action::Trigger, e) else {
            return;
        };
        if let Some(blocks) = e.blocks {
            request.lend(blocks, descriptors);
        }
        match self.find(request.name()).cloned() {
            // In a pool that is not encrypted, or opened before the trigger became privileged.
            Some(entry) if entry.spec.is_privileged && !request.is_privileged() => {
                let text = format!(
                    "trigger '{}' takes only privileged calls, and only in encrypted pools",
                    request.name()
                );
                request.refuse(&Refusal::new(Code::Forbidden, text));
                self.must_flush = true;
            }
            Some(entry) => self.jobs.push(HandlerJob::Start(entry, request)),
            None => {
                let text = format!(
                    "this instance has no handler for trigger '{}'",
                    request.name()
                );
                request.refuse(&Refusal::new(Code::NoHandler, text));
                self.must_flush = true;
            }
        }
    }

    fn emit(&mut self, e: &Envelope<'_>) {
        let Some(request) = self.request(Action::Emit, e) else {
            return;
        };
        let queues = self.core.handlers.listeners(request.name());
        if queues.is_empty() {
            // A server could pass an emit off as one of an unencrypted pool.
            let may = |entry: &&Arc<Entry>| !entry.spec.is_privileged || request.is_privileged();
            let entry = self.find(request.name()).filter(may).cloned();
            if let Some(entry) = entry {
                self.jobs.push(HandlerJob::Start(entry, request));
            }
            return;
        }
        let emission = Emission::from_request(&request, self.core.lost.swap(0, Ordering::Relaxed));
        let Some((last, others)) = queues.split_last() else {
            return;
        };
        for queue in others {
            self.push(queue, emission.clone());
        }
        self.push(last, emission);
    }

    fn push<T: Lossy>(&mut self, queue: &Queue<T>, item: T) {
        match queue.push(item) {
            Ok(waker) => self.wake.extend(waker),
            Err(Full) => {
                self.core.lost_ever.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Reports that the app is no longer in a pool, if the event says so.
    fn departure(&mut self, event: &str, text: &str) {
        if !matches!(event, "pool_removed" | "pool_rotated") {
            return;
        }
        let fields: Map<String, Value> = serde_json::from_str(text).unwrap_or_default();
        if fields.get("member").is_some_and(|member| member == true) {
            return;
        }
        let presence = Presence {
            event: event.to_owned(),
            pool: fields
                .get("pool")
                .and_then(Value::as_str)
                .map(str::to_owned),
            lost: 0,
            fields,
        };
        let departures = lock(&self.core.departures);
        let queues: Vec<_> = departures
            .iter()
            .filter_map(std::sync::Weak::upgrade)
            .collect();
        drop(departures);
        for queue in queues {
            self.push(&queue, presence.clone());
        }
    }

    fn event(&mut self, e: &Envelope<'_>) {
        let event = e.event.and_then(Raw::as_str).unwrap_or_default();
        if event == "lost" {
            // Reported with the next emit or push: the gap is before it.
            let count = e.count.and_then(Raw::as_u64).unwrap_or(0);
            self.core.lost.fetch_add(count, Ordering::Relaxed);
            self.core.lost_ever.fetch_add(count, Ordering::Relaxed);
            return;
        }
        if event == "displaced" {
            self.core.end(
                &Error::new(
                    Code::AppInUse,
                    "another instance took this app over; this one does not reconnect",
                )
                .with_ran(Ran::Unknown),
            );
            return;
        }
        let pool = e.pool.and_then(Raw::as_str);
        if event == "pool_rotated"
            && let Some(sealed) = pool.as_deref().and_then(|pool| self.core.sealed_pool(pool))
        {
            sealed.rotated(&serde_json::from_str(e.text).unwrap_or_default());
        }
        if let Some(pool) = &pool
            && (event.starts_with("block_") || event.starts_with("lock_"))
        {
            self.core
                .resources
                .event(&event, pool, e.text, &mut self.wake);
        }
        self.departure(&event, e.text);
        let watchers = lock(&self.core.watchers);
        // An event without a pool (draining) is for every watcher.
        let queues: Vec<_> = match &pool {
            Some(pool) => watchers
                .get(&**pool)
                .into_iter()
                .flatten()
                .filter_map(std::sync::Weak::upgrade)
                .collect(),
            None => watchers
                .values()
                .flatten()
                .filter_map(std::sync::Weak::upgrade)
                .collect(),
        };
        drop(watchers);
        if queues.is_empty() {
            return;
        }
        let presence = Presence {
            event: event.into_owned(),
            pool: pool.map(std::borrow::Cow::into_owned),
            lost: self.core.lost.swap(0, Ordering::Relaxed),
            fields: serde_json::from_str(e.text).unwrap_or_default(),
        };
        for queue in queues {
            self.push(&queue, presence.clone());
        }
    }
}
