//! Replies that wait until their changes are on disk.

use latzero_protocol::encode;
use latzero_protocol::frame::Frame;
use latzero_protocol::limits::ListBounds;
use latzero_protocol::message::Request;
use latzero_protocol::{Envelope, PoolName, Ran, Refusal};

use super::entry::StoredRegistration;
use super::{Flow, Session};
use crate::Pool;
use crate::driver::Driver;
use crate::outbox::Class;
use crate::turn::Turn;

/// A reply that waits until its change is on disk.
pub(super) enum Awaited<D: Driver> {
    /// A call that waits for its handler.
    Parked {
        id: Option<Box<str>>,
        pool: D::Pool,
        number: u64,
        /// Whether it was parked by this request, and not before.
        is_new: bool,
    },
    /// A handshake, as received; nothing more is read before it is answered.
    Handshake { json: Box<[u8]>, rehydrated: bool },
    /// The reply, and what to undo if the change cannot be stored.
    Reply {
        id: Option<Box<str>>,
        reply: Box<str>,
        promise: PendingReply,
    },
}

/// The change that a reply waits for.
pub(super) enum PendingReply {
    /// The app's registration.
    Registration,
    /// A new pool.
    Pool(PoolName),
    /// A removal.
    Removal,
}

/// When the reply to a request is sent: at once, or when its change is on disk.
pub(super) enum Reply {
    Now(String),
    Kept(String, PendingReply),
    /// The reply is sent now.
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
    /// Sends a reply, now or when its change is on disk.
    pub(super) fn answer(&mut self, id: Option<&str>, reply: Reply, turn: &mut Turn<'_, D>) {
        match reply {
            Reply::Now(reply) => self.reply(id, &reply, turn),
            Reply::Later => {}
            Reply::Kept(reply, promise) => self.awaited.push_back(Awaited::Reply {
                id: id.map(Into::into),
                reply: reply.into(),
                promise,
            }),
        }
    }

    /// The first pending change of this connection is stored, or cannot be stored.
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
            Some(Awaited::Parked {
                id,
                pool,
                number,
                is_new,
            }) => {
                // The answer, if it came first, is the reply, unless another instance gets it.
                let holds_answers = self.ready.as_ref().is_some_and(|r| r.holds_answers);
                match result {
                    Ok(()) => {
                        let waits = holds_answers
                            || turn.with_pool(&pool, |pool, _| pool.durable().is_parked(number));
                        if let Some(id) = id.filter(|_| waits) {
                            self.send(Class::Control, 256, turn, |out| encode::parked(out, &id));
                        }
                    }
                    Err(refusal) => {
                        // One that was parked before still waits for its answer.
                        let unpark = |pool: &mut Pool<D>, turn: &mut Turn<'_, D>| {
                            is_new && pool.durable().unpark(number, turn)
                        };
                        if turn.with_pool(&pool, unpark) {
                            let message = format!("{}; the call was not parked", refusal.message);
                            let refusal = Refusal::new(refusal.code, message);
                            self.refuse(id.as_deref(), &refusal, turn);
                        } else if holds_answers {
                            let message = format!("{}; the call may run", refusal.message);
                            let refusal = Refusal::new(refusal.code, message);
                            let refusal = refusal.with_ran(Ran::Unknown);
                            self.refuse(id.as_deref(), &refusal, turn);
                        }
                    }
                }
                self.flow()
            }
            Some(Awaited::Reply { id, reply, promise }) => {
                match result {
                    Ok(()) => self.reply(id.as_deref(), &reply, turn),
                    Err(refusal) => self.refuse_unstored(id.as_deref(), &promise, &refusal, turn),
                }
                self.flow()
            }
        }
    }

    /// A change could not be stored: undoes it if nobody could rely on it, and answers with the
    /// error.
    pub(super) fn refuse_unstored(
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
