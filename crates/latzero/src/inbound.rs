//! Messages from the server: replies find their call, triggers become jobs, the rest is dealt with on the spot.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::Instant;

use latzero_protocol::{Code, Envelope, Ran, Raw, Refusal, encode, frame};

use crate::core::Core;
use crate::error::Error;
use crate::events::{Emission, Presence};
use crate::handlers::{Entry, Job};
use crate::payload::{Beside, Payload, Reply};
use crate::pending::Key;
use crate::reader::Input;
use crate::request::Request;
use crate::sync::lock;

/// Descriptors that wait for their message, at most: a message whose frame is not whole yet may have some.
const DESCRIPTORS_KEPT_MAX: usize = 1024;

/// Decodes every whole frame of `input`. What it brings callers is delivered; what it asks of handlers goes to `jobs`.
///
/// # Errors
/// Why the bytes can't be what a server sends: the connection has no use any more.
pub(crate) fn process(
    core: &Arc<Core>,
    input: &mut Input,
    jobs: &mut Vec<Job>,
) -> Result<(), String> {
    let Some(link) = input.link.clone() else {
        return Ok(());
    };
    let mut batch = Batch {
        core,
        epoch: link.epoch,
        now: Instant::now(),
        jobs,
        wake: Vec::new(),
        must_flush: false,
        entry: None,
    };
    let accept = link.accept();
    let mut descriptors = std::mem::take(&mut input.descriptors);
    let result = loop {
        match frame::decode(&input.buf[input.start..input.end], accept) {
            Ok(None) => break Ok(()),
            Err(e) => break Err(format!("it sent what is not a frame: {e}")),
            Ok(Some((frame, used))) => {
                let message = Envelope::parse(frame).and_then(|envelope| envelope);
                let handled = message.map(|envelope| -> Result<(), String> {
                    let is_last = input.start + used == input.end;
                    let own = own_descriptors(&envelope, &mut descriptors, is_last)?;
                    batch.message(&envelope, own)
                });
                input.start += used;
                match handled {
                    Ok(Ok(())) => {}
                    Ok(Err(why)) => break Err(why),
                    Err(e) => break Err(format!("it sent what is not a message: {e}")),
                }
            }
        }
    };
    input.descriptors = descriptors;
    let must_flush = batch.must_flush;
    batch.wake.into_iter().for_each(Waker::wake);
    if must_flush {
        core.flush();
    }
    result
}

/// Takes the descriptors that travel with a message from those that came. They come with a message's first byte, so behind the
/// last one that was received none can be left.
fn own_descriptors(
    e: &Envelope<'_>,
    came: &mut Vec<OwnedFd>,
    is_last: bool,
) -> Result<Vec<OwnedFd>, String> {
    let named = match e.descriptors.and_then(Raw::as_u64) {
        None if came.is_empty() => return Ok(Vec::new()),
        named => named.unwrap_or(0),
    };
    let count = usize::try_from(named).unwrap_or(usize::MAX);
    if count > came.len() || came.len() - count > DESCRIPTORS_KEPT_MAX {
        let text = format!(
            "a message names {named} file descriptors, and {} came",
            came.len()
        );
        return Err(text);
    }
    let own = came.drain(..count).collect();
    match came.is_empty() || !is_last {
        true => Ok(own),
        false => Err("it sent more file descriptors than its messages name".into()),
    }
}

struct Batch<'a> {
    core: &'a Arc<Core>,
    epoch: u32,
    /// When the batch was read: near enough for what arrived in it.
    now: Instant,
    jobs: &'a mut Vec<Job>,
    wake: Vec<Waker>,
    must_flush: bool,
    /// The handler of the call before: most calls of a batch have the same.
    entry: Option<Arc<Entry>>,
}

/// What comes with few replies besides their payload.
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
            // The server closes after most of these; those of one message alone concern a request without an id.
            "\"error\"" => {
                let error = Error::from_wire(e.error.map_or("", Raw::text));
                if matches!(error.kind(), Code::BadFrame | Code::FrameTooLarge) {
                    return Err(error.to_string());
                }
            }
            // A newer server may say more than this client knows.
            _ => {}
        }
        Ok(())
    }

    fn response(&mut self, e: &Envelope<'_>, descriptors: Vec<OwnedFd>) {
        let inner = e
            .in_reply_to
            .and_then(|raw| raw.text().strip_prefix('"')?.strip_suffix('"'));
        let Some(key) = inner.and_then(Key::parse) else {
            return;
        };
        let payload = |e: &Envelope<'_>| Payload::received(e, e.response);
        if is(e.status, "\"partial\"") {
            lock(&self.core.pending).item(key, payload(e), &mut self.wake);
            return;
        }
        if is(e.status, "\"progress\"") {
            lock(&self.core.pending).progress(key, payload(e), &mut self.wake);
            return;
        }
        let result = if is(e.status, "\"error\"") {
            Err(Error::from_wire(e.error.map_or("", Raw::text)))
        } else {
            Ok(Reply {
                payload: payload(e),
                headers: e.headers.map(|raw| raw.text().into()),
                beside: beside(e, descriptors),
                epoch: self.epoch,
            })
        };
        lock(&self.core.pending).complete(key, result, &mut self.wake);
    }

    fn trigger(&mut self, e: &Envelope<'_>, descriptors: Vec<OwnedFd>) {
        let Some(request) = Request::received(self.core, self.epoch, self.now, e) else {
            return;
        };
        if let Some(blocks) = e.blocks {
            request.lend(blocks, descriptors);
        }
        if self
            .entry
            .as_ref()
            .is_none_or(|entry| *entry.name != *request.name())
        {
            self.entry = self.core.handlers.find(request.name());
        }
        match &self.entry {
            Some(entry) => self.jobs.push(Job::Start(entry.clone(), request)),
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
        let Some(request) = Request::received(self.core, self.epoch, self.now, e) else {
            return;
        };
        let queues = self.core.handlers.listeners(request.name());
        if queues.is_empty() {
            if let Some(entry) = self.core.handlers.find(request.name()) {
                self.jobs.push(Job::Start(entry, request));
            }
            return;
        }
        let emission = Emission::from_request(&request, self.core.lost.swap(0, Ordering::Relaxed));
        let Some((last, others)) = queues.split_last() else {
            return;
        };
        for queue in others {
            self.wake.extend(queue.push(emission.clone()));
        }
        self.wake.extend(last.push(emission));
    }

    fn event(&mut self, e: &Envelope<'_>) {
        let event = e.event.and_then(Raw::as_str).unwrap_or_default();
        if event == "lost" {
            // Told to whoever receives the next emit or push: the gap is before it.
            let count = e.count.and_then(Raw::as_u64).unwrap_or(0);
            self.core.lost.fetch_add(count, Ordering::Relaxed);
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
        if let Some(pool) = &pool
            && (event.starts_with("block_") || event.starts_with("lock_"))
        {
            self.core.blocks.event(&event, pool, e.text, &mut self.wake);
        }
        let watchers = lock(&self.core.watchers);
        // What names no pool (draining) concerns every watcher.
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
            self.wake.extend(queue.push(presence.clone()));
        }
    }
}
