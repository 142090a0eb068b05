//! Replies that wait until what they promise is on disk.

use latzero_protocol::encode;
use latzero_protocol::frame::Frame;
use latzero_protocol::limits::ListBounds;
use latzero_protocol::message::Request;
use latzero_protocol::{Envelope, PoolName, Refusal};

use super::entry::StoredRegistration;
use super::{Flow, Session};
use crate::driver::Driver;
use crate::outbox::Class;
use crate::turn::Turn;

/// A reply that waits until what it promises is on disk.
pub(super) enum Awaited<D: Driver> {
    /// A call that waits for its handler.
    Parked {
        id: Option<Box<str>>,
        pool: D::Pool,
        number: u64,
    },
    /// A handshake, as it came; nothing more is read before it is answered.
    Handshake { json: Box<[u8]>, rehydrated: bool },
    /// The reply, and what is to be done where the promise can't be kept.
    Reply {
        id: Option<Box<str>>,
        reply: Box<str>,
        promise: PendingReply,
    },
}

/// What a reply promises to outlive the server.
pub(super) enum PendingReply {
    /// What the app registered.
    Registration,
    /// A pool that was made.
    Pool(PoolName),
    /// That something is gone for good.
    Removal,
}

/// A reply to a request: at once, or when what it promises is on disk.
pub(super) enum Reply {
    Now(String),
    Kept(String, PendingReply),
    /// The turn gives it.
    Later,
}

impl Reply {
    pub(super) fn kept_if(is_promised: bool, reply: String, promise: PendingReply) -> Reply {
        if is_promised {
            Reply::Kept(reply, promise)
        } else {
            Reply::Now(reply)
        }
    }
}

impl<D: Driver> Session<D> {
    /// The first promise that was made to this connection is kept, or can't be.
    pub fn handle_stored(&mut self, result: Result<(), Refusal>, turn: &mut Turn<'_, D>) -> Flow {
        match self.awaited.pop_front() {
            None => self.flow(),
            Some(Awaited::Handshake { json, rehydrated }) => {
                let frame = Frame {
                    json: &json,
                    attachment: None,
                };
                let envelope = Envelope::parse(frame).ok().and_then(Result::ok);
                let envelope = envelope.expect("it was read before");
                let id = envelope.correlation_id().ok().flatten();
                let request = Request::decode(&envelope, &ListBounds::NONE);
                let Ok(Request::Handshake(handshake)) = request else {
                    unreachable!("it was a handshake before");
                };
                if result.is_err() {
                    turn.with_registry(|registry, turn| {
                        registry.store_app(&handshake.app_id, turn)
                    });
                }
                let stored = Some(StoredRegistration {
                    is_on_disk: result.is_ok(),
                    rehydrated,
                });
                match self.admit(id.as_deref(), &handshake, stored, turn) {
                    Ok(_) if self.ready.is_some() => Flow::Continue,
                    Ok(_) => Flow::Close,
                    Err(refusal) => {
                        self.refuse(id.as_deref(), &refusal, turn);
                        Flow::Close
                    }
                }
            }
            Some(Awaited::Parked { id, pool, number }) => {
                match result {
                    Ok(()) => {
                        // Where its answer came first there is nothing more to say.
                        let waits = turn.with_pool(&pool, |pool, _| pool.is_parked(number));
                        if let Some(id) = id.filter(|_| waits) {
                            self.send(Class::Control, 256, turn, |out| encode::parked(out, &id));
                        }
                    }
                    Err(refusal) => {
                        if turn.with_pool(&pool, |pool, turn| pool.unpark(number, turn)) {
                            let message = format!("{}; the call was not parked", refusal.message);
                            let refusal = Refusal::new(refusal.code, message);
                            self.refuse(id.as_deref(), &refusal, turn);
                        }
                    }
                }
                self.flow()
            }
            Some(Awaited::Reply { id, reply, promise }) => {
                match result {
                    Ok(()) => self.reply(id.as_deref(), &reply, turn),
                    Err(refusal) => self.break_promise(id.as_deref(), &promise, &refusal, turn),
                }
                self.flow()
            }
        }
    }

    /// Something could not be written down: it is undone where nobody could count on it otherwise, and the asker is told.
    pub(super) fn break_promise(
        &mut self,
        id: Option<&str>,
        promise: &PendingReply,
        refusal: &Refusal,
        turn: &mut Turn<'_, D>,
    ) {
        let holds = match promise {
            PendingReply::Registration => {
                if let Some(ready) = &self.ready {
                    turn.with_registry(|registry, turn| registry.store_app(&ready.app, turn));
                }
                "the change is in force and is stored as soon as the disk accepts writes"
            }
            PendingReply::Pool(name) => {
                if let Some(pool) = turn.with_registry(|registry, _| registry.release_pool(name)) {
                    turn.with_pool(&pool, |pool, _| pool.set_outlives(false));
                }
                "the pool is not durable and is removed with its last member"
            }
            PendingReply::Removal => {
                "it was removed, but may reappear after the next start of the \
                server"
            }
        };
        let message = format!("{}; {holds}", refusal.message);
        self.refuse(id, &Refusal::new(refusal.code, message), turn);
    }
}
