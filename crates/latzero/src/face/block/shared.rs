//! The state that all handles of one block share, and how events from the server reach it.

use std::any::Any;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Waker};

use latzero_protocol::memory::{Access, Kind};
use latzero_protocol::{Code, Ran};
use latzero_shm::{Attachment, Expected, Geometry, OwnedView};
use serde_json::{Value, json};

use super::message;
use super::sealed::{self, SealedAs, SealedBlock};
use super::waiter::Waiters;
use crate::drive::core::{Core, Resources};
use crate::error::Error;
use crate::face::app::App;
use crate::face::outgoing::Calling;
use crate::payload::Reply;
use crate::sync::lock;
use crate::wire::message::Message;

/// The server's description of a block.
#[derive(Debug, Clone)]
pub(crate) struct Described {
    pub(crate) id: String,
    pub(crate) pool: String,
    pub(crate) size: u64,
    pub(crate) slots: u32,
    /// Spare slots, which a persistent block has.
    pub(crate) spare_slots: u32,
    pub(crate) generation: u64,
    pub(crate) version: u64,
    pub(crate) kind: Kind,
    pub(crate) access: Access,
    pub(crate) layout: Option<Value>,
    /// Its identity in a sealed pool.
    pub(crate) sealed: Option<SealedAs>,
    is_mapped: bool,
    slot_offset: u64,
    slot_stride: u64,
}

impl Described {
    fn of(value: &Value) -> Option<Described> {
        let number = |name: &str| value[name].as_u64();
        let word = |name: &str| value[name].as_str();
        let sealed = match value["sealed"] == true {
            true => Some(SealedAs::of(value)?),
            false => None,
        };
        Some(Described {
            sealed,
            id: word("block_id")?.to_owned(),
            pool: word("pool")?.to_owned(),
            size: number("size")?,
            slots: u32::try_from(number("slots")?).ok()?,
            spare_slots: number("spare_slots").map_or(Some(0), |n| u32::try_from(n).ok())?,
            generation: number("generation")?,
            version: number("version")?,
            kind: Kind::parse(word("kind")?)?,
            access: Access::parse(word("mode")?)?,
            layout: value.get("layout").cloned(),
            is_mapped: word("access") == Some("mapped"),
            slot_offset: number("slot_offset")?,
            slot_stride: number("slot_stride")?,
        })
    }
}

/// An attached generation of a block.
#[derive(Debug)]
pub(crate) struct Current {
    pub(crate) described: Arc<Described>,
    pub(crate) attachment: Option<Arc<Attachment>>,
    /// The mapped shared memory, to offer it to a server that restarted without it.
    memory: Option<Arc<OwnedFd>>,
    /// The connection that it was attached over.
    pub(crate) epoch: u32,
}

/// The memory that a reader or writer keeps using, whatever happens to the handle in the
/// meantime.
#[derive(Debug, Clone)]
pub(super) struct LockState {
    pub(super) described: Arc<Described>,
    pub(super) attachment: Option<Arc<Attachment>>,
    pub(super) epoch: u32,
}

/// The pool and the name of the block that was asked for.
type Asked<'a> = (Option<&'a str>, &'a str);

impl Current {
    /// Takes a description with its descriptor.
    pub(super) fn of_reply(core: &Core, reply: Reply, asked: Asked<'_>) -> Result<Current, Error> {
        let epoch = reply.epoch;
        let descriptor = reply.take_descriptors().into_iter().next();
        let value: Value = reply.into()?;
        Current::new(core, &value, descriptor, epoch, asked)
    }

    /// Takes a description, and the descriptor that came with it.
    pub(crate) fn new(
        core: &Core,
        value: &Value,
        descriptor: Option<OwnedFd>,
        epoch: u32,
        (pool, id): Asked<'_>,
    ) -> Result<Current, Error> {
        let described = Described::of(value).ok_or_else(super::unreadable)?;
        // Under another name, what is written to an encrypted pool would be readable.
        if pool.is_some_and(|pool| pool != described.pool) || id != described.id {
            let text = format!("the server describes another block than '{id}'");
            return Err(Error::new(Code::Integrity, text));
        }
        sealed::check(core, &described.pool, described.sealed.as_ref())?;
        let size = described.sealed.map_or(described.size, SealedAs::capacity);
        let memory = match (&descriptor, described.kind) {
            // If this process may open no more descriptors, the block works, but cannot be offered
            // to a restarted server.
            (Some(descriptor), Kind::Shared) => descriptor.try_clone().ok().map(Arc::new),
            _ => None,
        };
        let attachment = match (described.is_mapped, descriptor) {
            (true, Some(descriptor)) => {
                let geometry = match described.spare_slots {
                    0 => Geometry::new(size, described.slots),
                    _ => Geometry::with_spares(size, described.slots),
                };
                let geometry = geometry
                    .ok()
                    .filter(|g| {
                        (g.slot_offset, g.slot_stride, g.spares)
                            == (
                                described.slot_offset,
                                described.slot_stride,
                                described.spare_slots,
                            )
                    })
                    .ok_or_else(super::unreadable)?;
                let expected = Expected {
                    generation: described.generation,
                    geometry,
                    is_persistent: described.kind == Kind::Persistent,
                    access: match described.access {
                        Access::Read => latzero_shm::Access::Read,
                        Access::Write => latzero_shm::Access::Write,
                    },
                };
                let attachment = Attachment::new(descriptor, &expected).map_err(|e| {
                    let text = format!("block '{}' can't be mapped: {e}", described.id);
                    Error::new(Code::Storage, text)
                        .with_ran(Ran::No)
                        .with_source(e)
                })?;
                Some(Arc::new(attachment))
            }
            (false, None) => None,
            _ => return Err(super::unreadable()),
        };
        Ok(Current {
            described: Arc::new(described),
            attachment,
            memory,
            epoch,
        })
    }

    /// The memory in which a view lies.
    pub(super) fn memory_of(&self, view: &OwnedView) -> Option<Arc<OwnedFd>> {
        let attachment = self.attachment.as_ref()?;
        let memory = self.memory.as_ref()?;
        view.is_of(attachment).then(|| memory.clone())
    }

    pub(super) fn held(&self) -> LockState {
        LockState {
            described: self.described.clone(),
            attachment: self.attachment.clone(),
            epoch: self.epoch,
        }
    }
}

/// The state that all handles of one attached block share.
#[derive(Debug)]
pub(crate) struct BlockState {
    pub(super) id: String,
    pub(super) pool: String,
    pub(super) current: Mutex<Current>,
    /// The newest version that the server announced.
    pub(super) newest: AtomicU64,
    /// Whether this app attached explicitly, rather than for a call.
    pub(super) is_attached: AtomicBool,
    /// It moved, or may have moved: it must be attached again before the next use.
    pub(super) must_attach: AtomicBool,
    /// It was removed, or the server is a different one now.
    pub(super) is_gone: AtomicBool,
    /// How many subscribers there are.
    pub(super) subscribers: AtomicU64,
    /// Who waits for a change.
    pub(super) wakers: Mutex<Vec<Waker>>,
    /// Fences of locks that this app lost.
    pub(super) lost_locks: Mutex<Vec<u64>>,
    /// An error that could not be returned.
    pub(super) fault: Mutex<Option<Error>>,
    /// What was verified of the block, in a sealed pool.
    pub(super) sealed: Option<SealedBlock>,
    /// The fence of the exclusive lock that a guard of it holds; 0 is none.
    exclusive: AtomicU64,
}

/// Whether there is a later connection than `epoch`, and it passes descriptors: what came over
/// `epoch` can be offered.
fn passes_descriptors_since(app: &App, epoch: u32) -> bool {
    let link = app.core().outbox.link();
    link.is_some_and(|link| link.epoch != epoch && link.takes_descriptors)
}

/// How many lost locks are remembered; older ones belong to guards that no longer exist.
const LOST_LOCKS_MAX: usize = 64;

impl BlockState {
    pub(super) fn new(core: &Core, current: Current, is_attached: bool) -> BlockState {
        let described = &current.described;
        let sealed = described.sealed.map(|said| {
            let (pool, id) = (&described.pool, &described.id);
            SealedBlock::new(core, pool, id, described.size, said)
        });
        BlockState {
            sealed,
            exclusive: AtomicU64::new(0),
            is_attached: AtomicBool::new(is_attached),
            id: current.described.id.clone(),
            pool: current.described.pool.clone(),
            newest: AtomicU64::new(current.described.version),
            current: Mutex::new(current),
            must_attach: AtomicBool::new(false),
            is_gone: AtomicBool::new(false),
            subscribers: AtomicU64::new(0),
            wakers: Mutex::default(),
            lost_locks: Mutex::default(),
            fault: Mutex::default(),
        }
    }

    pub(super) fn message(&self, action: &str, more: &Value) -> Message {
        message(action, Some(&self.pool), &self.id, more)
    }

    pub(super) fn heard(&self, version: u64) {
        self.newest.fetch_max(version, Ordering::AcqRel);
    }

    /// From here on it may be another block, whose versions start again.
    fn restart(&self) {
        self.newest.store(0, Ordering::Release);
    }

    /// Has a task woken at the next change.
    pub(super) fn wake_at_change(&self, cx: &Context<'_>) {
        let mut wakers = lock(&self.wakers);
        if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            wakers.push(cx.waker().clone());
        }
    }

    /// Wakes everyone who waits for a change.
    pub(super) fn wake_waiting(&self) {
        let wakers = std::mem::take(&mut *lock(&self.wakers));
        wakers.into_iter().for_each(Waker::wake);
    }

    /// The fence of the exclusive lock that a guard holds.
    pub(super) fn exclusive(&self) -> Option<u64> {
        Some(self.exclusive.load(Ordering::Acquire)).filter(|fence| *fence != 0)
    }

    /// A guard holds the exclusive lock.
    pub(super) fn locked(&self, fence: u64) {
        self.exclusive.store(fence, Ordering::Release);
    }

    /// A guard was dropped.
    pub(super) fn unlocked(&self, fence: u64) {
        let (order, otherwise) = (Ordering::AcqRel, Ordering::Acquire);
        let _ = self.exclusive.compare_exchange(fence, 0, order, otherwise);
    }

    /// Whether the server describes the block that this handle was created for.
    fn check_same(&self, current: Current) -> Result<Current, Error> {
        if self.sealed.as_ref().map(|sealed| sealed.said) == current.described.sealed {
            return Ok(current);
        }
        let text = format!(
            "block '{}' was replaced by another sealed block; attach to it again",
            self.id
        );
        Err(Error::new(Code::Integrity, text))
    }

    fn is_same(&self, other: &BlockState) -> bool {
        self.id == other.id && self.pool == other.pool
    }

    /// Attaches again.
    pub(super) async fn attach(
        self: &Arc<Self>,
        app: &App,
        access: Access,
    ) -> Result<LockState, Error> {
        // Before the request: a later move is seen next time.
        self.must_attach.store(false, Ordering::Release);
        // Before the answer: another attach of this handle may record that the block is back.
        let (memory, epoch) = {
            let current = lock(&self.current);
            (current.memory.clone(), current.epoch)
        };
        let mut attached = self.ask_attach(app, access).await;
        if attached.as_ref().is_err_and(|e| e.kind() == Code::NoBlock)
            && let Some(memory) = memory
            && passes_descriptors_since(app, epoch)
        {
            // Whatever the result: another client may have been faster.
            self.offer(app, memory).await;
            attached = self.ask_attach(app, access).await;
        }
        match attached {
            Ok(current) => {
                self.is_attached.store(true, Ordering::Release);
                self.is_gone.store(false, Ordering::Release);
                let held = current.held();
                let old = std::mem::replace(&mut *lock(&self.current), current);
                self.heard(held.described.version);
                if old.memory.is_some() && old.epoch != held.epoch {
                    self.subscribe_again(app).await;
                }
                self.wake_waiting();
                Ok(held)
            }
            Err(e) if e.kind() == Code::NoBlock => {
                // Requested again only over another connection.
                if let Some(epoch) = app.core().epoch_now() {
                    lock(&self.current).epoch = epoch;
                }
                self.is_gone.store(true, Ordering::Release);
                self.wake_waiting();
                Err(e)
            }
            Err(e) => {
                self.must_attach.store(true, Ordering::Release);
                Err(e)
            }
        }
    }

    async fn ask_attach(&self, app: &App, access: Access) -> Result<Current, Error> {
        let more = json!({"mode": access.as_str()});
        let message = self.message("memory_attach", &more);
        let reply = Calling::of_message(app, message, Ok).await?;
        let asked = (Some(&*self.pool), &*self.id);
        self.check_same(Current::of_reply(app.core(), reply, asked)?)
    }

    /// Offers the server its memory, if the server restarted and expects it.
    async fn offer(&self, app: &App, memory: Arc<OwnedFd>) {
        let mut message = self.message("memory_reoffer", &json!({}));
        message.carry(memory);
        // The server refuses it if it does not expect it: then the attach that follows returns the
        // current block.
        let _ = Calling::of_message(app, message, Ok).await;
    }

    /// Subscribes again if there are subscribers: the first request of a new connection may have
    /// been handled before a client offered the block.
    async fn subscribe_again(&self, app: &App) {
        if self.subscribers.load(Ordering::Acquire) == 0 {
            return;
        }
        let message = self.message("memory_subscribe", &json!({}));
        let subscribed = Calling::of_message(app, message, Reply::into::<Value>).await;
        if let Ok(reply) = subscribed {
            self.heard(super::number(&reply, "version"));
        }
        // The subscriber may have been dropped in the meantime.
        let core = app.core();
        Blocks::of(core).settle_subscription(core, self);
    }

    fn wake(&self, wake: &mut Vec<Waker>) {
        wake.append(&mut lock(&self.wakers));
    }

    /// Takes an event about the block.
    fn event(&self, event: &str, fields: &Value, wake: &mut Vec<Waker>) {
        match event {
            "block_changed" => self.heard(super::number(fields, "version")),
            "block_moved" => self.must_attach.store(true, Ordering::Release),
            "block_removed" => {
                self.is_gone.store(true, Ordering::Release);
                self.restart();
            }
            "lock_lost" => {
                let fence: Option<u64> = fields["lock"].as_str().and_then(|text| text.parse().ok());
                let mut lost = lock(&self.lost_locks);
                lost.extend(fence);
                let excess = lost.len().saturating_sub(LOST_LOCKS_MAX);
                lost.drain(..excess);
            }
            _ => return,
        }
        self.wake(wake);
    }
}

#[derive(Debug)]
struct Known {
    shared: Weak<BlockState>,
    access: Access,
    is_lent: bool,
}

/// The blocks that an app is attached to. The server has one attachment and one subscription for
/// all handles of a block, so dropping the last handle ends them.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    state: Mutex<State>,
    pub(super) waiters: Waiters,
}

#[derive(Debug, Default)]
struct State {
    known: Vec<Known>,
    /// Names of blocks that are being attached. A detach of such a name now would affect the new
    /// attachment.
    opening: Vec<String>,
    /// Detaches that were deferred for that reason.
    owed: Vec<(String, String)>,
}

impl State {
    fn live(&self) -> impl Iterator<Item = (Arc<BlockState>, Access)> {
        let own = self.known.iter().filter(|k| !k.is_lent);
        own.filter_map(|k| Some((k.shared.upgrade()?, k.access)))
    }

    /// Whether a handle refers to the block that the server has attached.
    fn has(&self, pool: &str, id: &str) -> bool {
        self.live().any(|(s, _)| s.id == id && s.pool == pool)
    }
}

/// A block that is being attached.
#[derive(Debug)]
pub(super) struct Opening<'a> {
    core: &'a Core,
    pool: Option<&'a str>,
    id: &'a str,
    /// Whether the server has answered: if it is dropped before that, the block may be attached
    /// without a handle that detaches it.
    pub(super) is_answered: bool,
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        let mut state = lock(&Blocks::of(self.core).state);
        if let Some(at) = state.opening.iter().position(|id| id == self.id) {
            state.opening.swap_remove(at);
        }
        if state.opening.iter().any(|id| id == self.id) {
            return;
        }
        let (ours, others) = std::mem::take(&mut state.owed)
            .into_iter()
            .partition::<Vec<_>, _>(|(_, id)| id == self.id);
        state.owed = others;
        let mut given_up: Vec<_> = ours
            .iter()
            .filter(|(pool, id)| !state.has(pool, id))
            .map(|(pool, _)| Some(pool.as_str()))
            .collect();
        let is_used = |(s, _): (Arc<BlockState>, Access)| {
            s.id == self.id && self.pool.is_none_or(|pool| s.pool == pool)
        };
        if !self.is_answered && !given_up.contains(&self.pool) && !state.live().any(is_used) {
            given_up.push(self.pool);
        }
        for pool in &given_up {
            let message = message("memory_detach", *pool, self.id, &json!({}));
            self.core.append(message);
        }
        let is_silent = given_up.is_empty();
        drop(state);
        if !is_silent {
            self.core.flush_soon();
        }
    }
}

impl Blocks {
    /// The blocks of an app.
    pub(super) fn of(core: &Core) -> &Blocks {
        let resources: &dyn Any = &*core.resources;
        resources.downcast_ref().expect("the builder passes them")
    }

    /// A guard to hold while a block is attached, until its handle is added.
    pub(super) fn open<'a>(
        &self,
        core: &'a Core,
        pool: Option<&'a str>,
        id: &'a str,
    ) -> Opening<'a> {
        lock(&self.state).opening.push(id.to_owned());
        Opening {
            core,
            pool,
            id,
            is_answered: false,
        }
    }

    pub(super) fn add(&self, shared: &Arc<BlockState>, access: Access, is_lent: bool) {
        lock(&self.state).known.push(Known {
            shared: Arc::downgrade(shared),
            access,
            is_lent,
        });
    }

    /// Removes a handle's block. Detaches if `is_attached` and no other handle needs the
    /// attachment.
    pub(super) fn forget(&self, core: &Core, gone: &Arc<BlockState>, is_attached: bool) {
        let mut state = lock(&self.state);
        state
            .known
            .retain(|k| !std::ptr::eq(k.shared.as_ptr(), Arc::as_ptr(gone)));
        if !is_attached || state.has(&gone.pool, &gone.id) {
            return;
        }
        if state.opening.contains(&gone.id) {
            state.owed.push((gone.pool.clone(), gone.id.clone()));
            return;
        }
        // Appended under the lock, so that a later attach is sent after it.
        core.append(gone.message("memory_detach", &json!({})));
        drop(state);
        core.flush_soon();
    }

    /// Adds a subscriber, before the server is asked.
    pub(super) fn begin_subscription(&self, shared: &BlockState) {
        let _order = lock(&self.state);
        shared.subscribers.fetch_add(1, Ordering::AcqRel);
    }

    /// Removes a subscriber, and ends the subscription after the last one.
    pub(super) fn end_subscription(&self, core: &Core, shared: &BlockState) {
        shared.subscribers.fetch_sub(1, Ordering::AcqRel);
        self.settle_subscription(core, shared);
    }

    /// Ends an unused subscription.
    fn settle_subscription(&self, core: &Core, shared: &BlockState) {
        let state = lock(&self.state);
        let is_wanted = |other: &Known| {
            let other = other.shared.upgrade();
            other.is_some_and(|o| o.is_same(shared) && o.subscribers.load(Ordering::Acquire) > 0)
        };
        let has_own = shared.subscribers.load(Ordering::Acquire) > 0;
        if has_own || state.known.iter().any(is_wanted) {
            return;
        }
        core.append(shared.message("memory_unsubscribe", &json!({})));
        drop(state);
        core.flush_soon();
    }
}

impl Resources for Blocks {
    /// The first messages over a new connection, which renew the attachments and subscriptions.
    fn renewal(&self) -> Vec<Message> {
        let mut messages = Vec::new();
        let live: Vec<_> = lock(&self.state).live().collect();
        for (shared, access) in live {
            shared.restart();
            let more = json!({"mode": access.as_str()});
            messages.push(shared.message("memory_attach", &more));
            if shared.subscribers.load(Ordering::Acquire) > 0 {
                messages.push(shared.message("memory_subscribe", &json!({})));
            }
        }
        messages
    }

    /// Attaches every block over a new connection, so that mappings, versions and removed blocks
    /// are known before anybody needs them. Waits for the server.
    fn restore(&self, core: &Arc<Core>) {
        let live: Vec<_> = lock(&self.state).live().collect();
        if live.is_empty() || core.is_ended() {
            return;
        }
        let app = App::lent(core);
        for (shared, access) in live {
            let mut attaching = pin!(shared.attach(&app, access));
            let attached = core.block_on(None, |cx| attaching.as_mut().poll(cx));
            if let Some(Err(error)) = attached
                && error.kind() == Code::Disconnected
            {
                // The connection was lost again: the next reconnect continues.
                return;
            }
        }
    }

    /// Takes an event about a block.
    fn event(&self, event: &str, pool: &str, text: &str, wake: &mut Vec<Waker>) {
        let known: Vec<Arc<BlockState>> = lock(&self.state)
            .known
            .iter()
            .filter_map(|k| k.shared.upgrade())
            .filter(|s| s.pool == pool)
            .collect();
        if known.is_empty() {
            return;
        }
        let fields: Value = serde_json::from_str(text).unwrap_or_default();
        for shared in known {
            if fields["block_id"] == shared.id {
                shared.event(event, &fields, wake);
            }
        }
    }

    /// Wakes everybody, at the end of the connection or of the app.
    fn wake_all(&self, wake: &mut Vec<Waker>) {
        let known: Vec<_> = lock(&self.state)
            .known
            .iter()
            .filter_map(|k| k.shared.upgrade())
            .collect();
        for shared in known {
            shared.wake(wake);
        }
    }
}
