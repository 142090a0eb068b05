//! Proofs on a new connection: the app's key before the handshake, encrypted pools after it.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use latzero_crypto::descriptor::{Descriptor, DescriptorError, Expected, check_reply};
use latzero_crypto::keys::Roles;
use latzero_crypto::proof::{self, ChannelBinding, Exchange, Joining};
use latzero_crypto::text;
use latzero_protocol::frame::{self, Accept, Frame};
use latzero_protocol::{Code, Envelope, Ran};
use rustix::net::sockopt;
use serde_json::{Value, json};

use crate::error::Error;
use crate::interrupt;
use crate::keys::{AppKey, Keys, now_ms, random};
use crate::wire::link::Link;
use crate::wire::sealed::{Joined, SealedPool};
use crate::wire::wait::{HandshakeTimeout, RECV_TIMEOUT};

/// Bytes of messages that are kept while a reply is awaited here: calls, events and emits of what
/// the handshake named. Beyond them the connection is given up.
const EARLY_BYTES_MAX: usize = 64 << 20;

/// How many of these bytes may be emits. Nobody limits those who send them, and the server's outbox
/// is filled again while it is read: more are dropped and counted, as by a server whose outbox is
/// full.
const EARLY_EMIT_BYTES_MAX: usize = 16 << 20;

/// A connection that is not in use yet: it sends requests one at a time and waits for each reply.
pub(crate) struct Talk<'a> {
    link: &'a Link,
    deadline: Instant,
    accept: Accept,
    buf: Vec<u8>,
    /// Complete frames that answer none of its requests, in order.
    early: Vec<u8>,
    /// How many bytes of them are emits.
    emit_bytes: usize,
    /// How many emits were dropped after them.
    lost: u64,
    descriptors: Vec<OwnedFd>,
}

/// Whether a message is an emit. One with file descriptors does not count: it can't be dropped
/// without them.
fn is_emit(frame: Frame<'_>) -> bool {
    let envelope = Envelope::parse(frame).and_then(|envelope| envelope);
    envelope.is_ok_and(|e| {
        e.action.is_some_and(|action| action.text() == "\"emit\"") && e.descriptors.is_none()
    })
}

fn lost(what: String) -> Error {
    Error::new(Code::Disconnected, what).with_ran(Ran::No)
}

fn no_server(why: impl std::fmt::Display) -> Error {
    lost(format!(
        "the program at this address is not a LatZero server: {why}"
    ))
}

/// How many descriptors of a pool a client asks for, to follow its history. A pool whose keys
/// changed more often since the client knew it has to be accepted anew.
const CHAIN_MAX: usize = 1024;

impl<'a> Talk<'a> {
    pub(crate) fn new(link: &'a Link, deadline: Instant, max_frame: usize) -> Self {
        Talk {
            link,
            deadline,
            accept: Accept {
                max_frame,
                attachments: false,
            },
            buf: Vec::new(),
            early: Vec::new(),
            emit_bytes: 0,
            lost: 0,
            descriptors: Vec::new(),
        }
    }

    /// From now on received frames may have attachments.
    pub(crate) fn accept(&mut self, accept: Accept) {
        self.accept = accept;
    }

    /// The bytes and descriptors of other messages that arrived.
    pub(crate) fn finish(mut self) -> (Vec<u8>, Vec<OwnedFd>) {
        let mut chunk = [0; 4096];
        while self.link.has_buffered() {
            // An error will occur again at the next read.
            match self.link.try_recv(&mut chunk, &mut self.descriptors) {
                Ok(n @ 1..) => self.buf.extend_from_slice(&chunk[..n]),
                Ok(0) | Err(_) => break,
            }
        }
        if self.lost > 0 {
            // As the server says it: the gap is before what follows.
            let lost = json!({"action": "event", "event": "lost", "count": self.lost}).to_string();
            frame::append(&mut self.early, |out| {
                out.extend_from_slice(lost.as_bytes());
            });
        }
        self.early.append(&mut self.buf);
        (self.early, self.descriptors)
    }

    /// Keeps the message in the first bytes of the buffer for later reads, or drops it if it is one
    /// of too many emits.
    fn keep(&mut self, used: usize, is_emit: bool) -> Result<(), Error> {
        // After the first one that was dropped all are, so that there is one gap.
        let is_full = self.lost > 0 || self.emit_bytes + used > EARLY_EMIT_BYTES_MAX;
        if is_emit && is_full {
            self.lost += 1;
            self.buf.drain(..used);
            return Ok(());
        }
        if self.early.len() + used > EARLY_BYTES_MAX {
            let text = "the server sent too much before it answered a proof";
            return Err(lost(text.into()));
        }
        self.emit_bytes += if is_emit { used } else { 0 };
        self.early.extend(self.buf.drain(..used));
        Ok(())
    }

    pub(crate) fn say(&self, json: &str) -> Result<(), Error> {
        let mut out = Vec::new();
        frame::append(&mut out, |out| out.extend_from_slice(json.as_bytes()));
        let sent = self.link.send_all(&out, self.deadline);
        sent.map_err(|error| self.explain_send(error))
    }

    /// Why nothing can be sent. The server may have sent the reason before it closed the
    /// connection, so it has to be read.
    fn explain_send(&self, error: io::Error) -> Error {
        let read = self.link.try_recv(&mut [0; 4096], &mut Vec::new());
        let known = read.err().and_then(|read| self.link.explain(&read));
        known.unwrap_or_else(|| lost(format!("the handshake failed: {error}")).with_source(error))
    }

    /// The next message that `wanted` accepts; others are kept for later reads, within limits.
    pub(crate) fn hear<T>(
        &mut self,
        wanted: impl Fn(&[u8]) -> Result<Option<T>, Error>,
    ) -> Result<T, Error> {
        let mut chunk = [0; 4096];
        loop {
            if latzero_tls::is_tls(&self.buf) {
                let text = "the server speaks TLS there; run `latzero trust HOST:PORT`, and add \
                            `?tls` to the address";
                return Err(lost(text.into()));
            }
            while let Some((frame, used)) =
                frame::decode(&self.buf, self.accept).map_err(no_server)?
            {
                let found = match frame.attachment {
                    None => wanted(frame.json)?,
                    Some(_) => None,
                };
                if let Some(found) = found {
                    self.buf.drain(..used);
                    return Ok(found);
                }
                let is_emit = is_emit(frame);
                self.keep(used, is_emit)?;
            }
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || interrupt::is_due() {
                let late = io::Error::new(io::ErrorKind::TimedOut, HandshakeTimeout);
                return Err(lost(HandshakeTimeout.to_string()).with_source(late));
            }
            let left = left.clamp(Duration::from_millis(1), RECV_TIMEOUT);
            sockopt::set_socket_timeout(self.link.as_fd(), sockopt::Timeout::Recv, Some(left))
                .map_err(|e| lost(format!("the handshake failed: {e}")))?;
            match self.link.recv(&mut chunk, &mut self.descriptors) {
                Ok(0) => {
                    let text = "the server closed the connection during the handshake";
                    return Err(lost(text.into()));
                }
                Ok(n) => self.buf.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => {
                    let known = self.link.explain(&e);
                    let other = || lost(format!("the handshake failed: {e}"));
                    return Err(known.unwrap_or_else(other));
                }
            }
        }
    }

    /// Sends a request; returns the reply's `response`.
    fn ask(&mut self, mut request: Value) -> Result<Value, Error> {
        const ID: &str = "proof";
        request["id"] = ID.into();
        self.say(&request.to_string())?;
        let reply: Value = self.hear(|json| {
            let message: Value = serde_json::from_slice(json).map_err(no_server)?;
            let is_it = message["in_reply_to"] == ID || message["action"] == "error";
            Ok(is_it.then_some(message))
        })?;
        match &reply["error"] {
            Value::Null => Ok(reply["response"].clone()),
            error => Err(Error::from_wire(&error.to_string()).with_ran(Ran::No)),
        }
    }

    /// The channel binding of this connection's proofs.
    fn binding(&self, may_be_unbound: bool) -> Result<ChannelBinding, Error> {
        check_bound(self.link.binding, may_be_unbound)
    }

    /// Proves the app's key.
    pub(crate) fn prove_app(
        &mut self,
        app_id: &str,
        key: &AppKey,
        may_be_unbound: bool,
    ) -> Result<(), Error> {
        let binding = self.binding(may_be_unbound)?;
        let challenge = self.ask(json!({"action": "challenge"}))?;
        let exchange = exchange(&challenge, binding)?;
        let key = key.0.signing_key();
        let public = key.public().to_bytes();
        let sig = key.sign(&proof::app_transcript(app_id, &public, &exchange));
        self.ask(json!({
            "action": "app_proof", "app_id": app_id, "app_key": text::encode(&public),
            "client_nonce": text::encode(&exchange.client_nonce), "sig": text::encode(&sig),
            "cb_type": binding.name(),
        }))
        .map(drop)
    }

    /// Proves an encrypted pool, and accepts the server's data only if the keys match.
    pub(crate) fn prove_pool(
        &mut self,
        app_id: &str,
        pool: &SealedPool,
        may_be_unbound: bool,
    ) -> Result<(), Error> {
        let binding = self.binding(may_be_unbound)?;
        let asked = json!({"action": "pool_challenge", "pool": pool.name()});
        let challenge = self.ask(asked)?;
        let request = answer(&challenge, pool.name(), app_id, pool.keys(), binding)?;
        let (request, expected, roles) = request;
        let reply = self.ask(request)?;
        let mut joined = read_joined(&reply, &expected, roles)?;
        let accepted = loop {
            match pool.accept(&joined)? {
                Err(DescriptorError::Missing(_) | DescriptorError::OtherOwner)
                    if self.lengthen(pool.name(), &mut joined)? => {}
                accepted => break accepted,
            }
        };
        pool.joined(app_id, &joined, accepted)
    }

    /// Asks for descriptors from before the known ones; returns whether there were any.
    fn lengthen(&mut self, pool: &str, joined: &mut Joined) -> Result<bool, Error> {
        let first = joined.chain.first().unwrap_or(&joined.descriptor);
        if first.epoch() <= 1 || joined.chain.len() >= CHAIN_MAX {
            return Ok(false);
        }
        let asked = json!({"action": "pool_chain", "pool": pool, "before": first.epoch()});
        let mut earlier = read_chain(&self.ask(asked)?)?;
        let has_more = !earlier.is_empty();
        earlier.append(&mut joined.chain);
        joined.chain = earlier;
        Ok(has_more)
    }
}

/// Refuses to send a proof that is not bound to the connection, unless that was allowed.
pub(crate) fn check_bound(
    binding: ChannelBinding,
    may_be_unbound: bool,
) -> Result<ChannelBinding, Error> {
    if binding == ChannelBinding::None && !may_be_unbound {
        let text = "a proof cannot be bound to a plain TCP connection, so another program on that \
        port could forward it: use the Unix socket or TLS, or add `&unbound` to the address";
        return Err(Error::new(Code::Downgrade, text));
    }
    Ok(binding)
}

/// A binary field of a reply.
pub(crate) fn binary<const N: usize>(reply: &Value, field: &str) -> Result<[u8; N], Error> {
    let bytes = reply[field].as_str().and_then(text::decode);
    bytes.ok_or_else(|| no_server(format!("its '{field}' is not of its size")))
}

pub(crate) fn exchange(challenge: &Value, binding: ChannelBinding) -> Result<Exchange, Error> {
    Ok(Exchange {
        client_nonce: random()?,
        server_nonce: binary(challenge, "server_nonce")?,
        server_instance: binary(challenge, "server_instance")?,
        binding,
    })
}

/// The challenge for a pool.
struct Said {
    name: String,
    pool_id: [u8; 16],
    epoch: u32,
    suite: u16,
}

/// The `pool_join` that answers a challenge, and what its reply must contain.
fn answer(
    challenge: &Value,
    pool: &str,
    app_id: &str,
    keys: &Keys,
    binding: ChannelBinding,
) -> Result<(Value, Said, Roles), Error> {
    let no_key = |e: latzero_crypto::keys::KeyError| Error::new(Code::KeyFormat, e.to_string());
    let number = |field: &str| challenge[field].as_u64().unwrap_or(0);
    let said = Said {
        name: pool.to_owned(),
        pool_id: binary(challenge, "pool_id")?,
        epoch: u32::try_from(number("epoch")).unwrap_or(0),
        suite: u16::try_from(number("suite")).unwrap_or(0),
    };
    let joining = Joining {
        pool,
        pool_id: said.pool_id,
        epoch: said.epoch,
        suite: said.suite,
        app_id,
        exchange: exchange(challenge, binding)?,
    };
    let roles = keys.0.roles().unwrap_or(Roles::Join);
    let proof = joining.prove(&keys.0, roles).map_err(no_key)?;
    let proof: Value = serde_json::from_str(&proof.to_json()).unwrap_or_default();
    let request = json!({"action": "pool_join", "pool": pool, "proof": proof});
    Ok((request, said, roles))
}

/// The bytes of a descriptor.
pub(super) fn descriptor_bytes(value: &Value) -> Option<Vec<u8>> {
    text::decode_within(value.as_str()?, latzero_crypto::descriptor::BYTES_MAX)
}

/// Earlier descriptors, in ascending order.
fn read_chain(reply: &Value) -> Result<Vec<Descriptor>, Error> {
    let chain = reply["chain"].as_array().into_iter().flatten();
    let chain = chain.map(|one| Descriptor::parse(&descriptor_bytes(one).unwrap_or_default()));
    chain
        .collect::<Result<_, _>>()
        .map_err(|error| unfit(&error))
}

fn read_joined(reply: &Value, said: &Said, asked: Roles) -> Result<Joined, Error> {
    let descriptor = descriptor_bytes(&reply["descriptor"]);
    let descriptor = check_reply(asked, reply["roles"].as_u64(), descriptor.as_deref())
        .map_err(|error| unfit(&error))?;
    let descriptor = Descriptor::parse(descriptor).map_err(|error| unfit(&error))?;
    let chain = read_chain(reply)?;
    let expected = Expected {
        name: &said.name,
        pool_id: said.pool_id,
        epoch: said.epoch,
        suite: said.suite,
    };
    // The name belongs to the pool; the rest is compared where the keys are.
    if (descriptor.pool_id(), descriptor.epoch()) != (expected.pool_id, expected.epoch)
        || descriptor.suite().number() != expected.suite
    {
        return Err(Error::new(
            Code::Integrity,
            "the pool's descriptor is not the one of the server's challenge",
        ));
    }
    Ok(Joined {
        descriptor,
        chain,
        at_ms: now_ms(),
        restored_ms: reply["restored_ms"].as_u64(),
    })
}

/// The error for a descriptor that is not accepted.
pub(crate) fn unfit(error: &DescriptorError) -> Error {
    let code = match error {
        DescriptorError::Invalid(_) | DescriptorError::Missing(_) | DescriptorError::OtherOwner => {
            Code::Integrity
        }
        DescriptorError::Rollback(_) => Code::Rollback,
        DescriptorError::Fork(_) => Code::Fork,
        _ => Code::Downgrade,
    };
    Error::new(code, error.to_string())
}
