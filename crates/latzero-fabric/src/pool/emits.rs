//! Emits on their way to handlers: each is encoded once for all receivers of the same form.

use std::sync::Arc;

use latzero_protocol::encode::{self, Attachments};
use latzero_protocol::message::Emit;
use latzero_protocol::{Refusal, TriggerName};

use super::Pool;
use super::members::{Member, MemberKey};
use super::pick::{self, Offer};
use super::routing::{forwarded_length, matches, raw_length, sticky, too_large};
use crate::driver::{Driver, Peer};
use crate::effects::Count;
use crate::ledger::Full;
use crate::outbox::{Class, SHARE_BYTES, Sent, SharedBody};
use crate::turn::Turn;

/// An emit, encoded for all receivers of the same form.
enum Encoded {
    /// A large one for a single receiver, in its outbox.
    Once,
    /// In the pool's scratch buffer.
    Here(std::ops::Range<usize>),
    Shared(SharedBody),
    /// There is no memory for it.
    Refused(Full),
}

impl<D: Driver> Pool<D> {
    /// Sends an emit to the trigger's handlers; returns how many it was appended for.
    ///
    /// # Errors
    /// If the sender is not a member, or the name is invalid.
    pub fn emit(
        &mut self,
        from: MemberKey,
        emit: &Emit<'_>,
        turn: &mut Turn<'_, D>,
    ) -> Result<usize, Refusal> {
        let sender = self.members.asker(from, &self.info.name)?;
        turn.count(Count::Emit);
        self.emits_total += 1;
        let Some(served) = self.triggers.get(&emit.process) else {
            TriggerName::check(&emit.process)?;
            return Ok(0);
        };
        let notice = encode::Notice {
            process: served.name.as_str(),
            pool: self.info.name.as_str(),
            origin: sender.origin(),
            destination: emit.destination.as_ref().map(|d| d.raw),
            headers: emit.headers,
            body: emit.body,
        };
        let mut delivered = 0;
        // Encoded once for all receivers of the same form, and shared if it is large.
        let mut encoded: [Option<Encoded>; 2] = [None, None];
        let account = Arc::clone(sender.peer.link().account());
        let is_large = emit.body.len() >= SHARE_BYTES;
        let is_alone = served.handlers.len() == 1;
        let around = raw_length(notice.destination) + raw_length(notice.headers);
        let mut refused = None;
        let scratch = &mut self.scratch;
        scratch.clear();
        let max_frame = self.info.limits.max_frame;
        let mut deliver = |to: &Member<D>| {
            if !matches(emit.destination.as_ref(), to)
                || (to.attachments == Attachments::NotTaken && too_large(emit.body, max_frame))
            {
                return Offer::NotMeant;
            }
            let length = around + forwarded_length(emit.body, to.attachments);
            let encode = |out: &mut Vec<u8>| encode::notice(out, &notice, to.attachments);
            let form = usize::from(to.attachments == Attachments::Taken);
            let frame = encoded[form].get_or_insert_with(|| {
                if is_large && is_alone {
                    return Encoded::Once;
                }
                if is_large {
                    let shared = SharedBody::encode(length, &account, encode);
                    return shared.map_or_else(Encoded::Refused, Encoded::Shared);
                }
                let start = scratch.len();
                encode(scratch);
                Encoded::Here(start..scratch.len())
            });
            let sent = match frame {
                Encoded::Once => turn.send(&to.peer, Class::Emit, length, encode),
                Encoded::Here(range) => {
                    let bytes = &scratch[range.clone()];
                    turn.send(&to.peer, Class::Emit, bytes.len(), |out| {
                        out.extend_from_slice(bytes)
                    })
                }
                Encoded::Shared(frame) => turn.send_shared(&to.peer, Class::Emit, frame),
                Encoded::Refused(full) => {
                    refused = Some(*full);
                    Sent::Full
                }
            };
            delivered += usize::from(sent == Sent::Queued);
            if sent == Sent::Queued {
                Offer::Taken
            } else {
                Offer::Busy
            }
        };
        if emit.one {
            let start = pick::start(served, &mut self.prng);
            let chosen = pick::each(
                served,
                &self.triggers,
                &self.members,
                start,
                || sticky(self.hash_seed, emit.key.as_deref(), sender.instance),
                |_, to| deliver(to),
            );
            if let Some((position, _)) = chosen {
                served.turn.set(position + 1);
            }
        } else {
            for handler in self.triggers.handlers_of(served) {
                let member = self.members.at(handler.member);
                deliver(member.expect("a handler's member lives"));
            }
        }
        for _ in 0..delivered {
            turn.count(Count::Delivered);
        }
        if let Some(full) = refused.filter(|_| delivered == 0) {
            return Err(full.into());
        }
        Ok(delivered)
    }
}
