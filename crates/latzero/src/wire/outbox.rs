//! The messages that wait to be sent, and whether there is a connection to send them over.
//!
//! A sender appends its message and tries to write at once. While one thread writes, others only
//! append, and that thread also writes their bytes. What the kernel does not accept stays here
//! until the socket is writable; above a limit, senders wait.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use latzero_protocol::{Code, Ran};

use crate::error::Error;
use crate::sync::lock;
use crate::wire::link::Link;
use crate::wire::message::Message;
use crate::wire::pending::{Id, Key, Name, OpenCall, Pending};

/// How many bytes may wait to be sent before callers wait too. One message may exceed it.
pub(crate) const OUTBOX_BYTES_MAX: usize = 8 * 1024 * 1024;

/// A send buffer above this size in bytes is freed once it is empty. It can hold one message of the
/// largest size that servers accept by default: otherwise each such message would need fresh
/// memory, which costs more than the copy.
const BUFFER_BYTES_KEPT: usize = 17 * 1024 * 1024;

/// Whether there is a connection.
#[derive(Debug, Clone)]
pub(crate) enum Phase {
    /// There is one.
    Up(Arc<Link>),
    /// Not now; the app reconnects.
    Down,
    /// Never again, for this reason.
    Ended(Error),
}

/// How a flush ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// Nothing is left, or another thread is writing and also writes this.
    Done,
    /// The socket accepts no more for now.
    Blocked,
}

/// Which connection a message may be sent over, and its purpose.
#[derive(Debug, Clone, Copy)]
pub(crate) enum By<'a> {
    /// Any: it has no reply.
    Any,
    /// Only this one: it belongs to a call that arrived over it.
    Connection(u32),
    /// Any: it is a call, which waits for its reply.
    Call {
        /// When to give up, if the server does not.
        deadline: Instant,
        /// How many items of a stream are kept, if it is one.
        window: Option<u64>,
        /// How it is named on the wire.
        name: Name<'a>,
    },
}

/// The result of sending a message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Submitted {
    /// The call's key, if it is a call.
    pub(crate) key: Option<Key>,
    /// Whether no other call was in flight.
    pub(crate) alone: bool,
}

/// A descriptor that waits to be sent.
#[derive(Debug)]
struct Carried {
    /// The position of the first byte of its message in the buffer.
    at: usize,
    descriptor: Arc<OwnedFd>,
}

#[derive(Debug)]
struct Inner {
    phase: Phase,
    buf: Vec<u8>,
    /// How many bytes of `buf` were already sent.
    head: usize,
    /// The descriptors of messages in `buf` that were not sent yet, in order.
    carried: VecDeque<Carried>,
    spare: Vec<u8>,
    writing: bool,
    /// Bytes appended on this connection so far.
    appended: u64,
    /// How many of them the kernel has accepted or is being offered.
    attempted: u64,
    /// Who waits for room or for a connection.
    waiting: Vec<Waker>,
}

/// The send side of an app.
#[derive(Debug)]
pub(crate) struct Outbox {
    inner: Mutex<Inner>,
    blocked: AtomicBool,
}

impl Inner {
    fn len(&self) -> usize {
        self.buf.len() - self.head
    }
}

impl Outbox {
    pub(crate) fn new() -> Self {
        Outbox {
            inner: Mutex::new(Inner {
                phase: Phase::Down,
                buf: Vec::new(),
                head: 0,
                carried: VecDeque::new(),
                spare: Vec::new(),
                writing: false,
                appended: 0,
                attempted: 0,
                waiting: Vec::new(),
            }),
            blocked: AtomicBool::new(false),
        }
    }

    /// Whether bytes wait for the socket to become writable.
    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked.load(Ordering::Acquire)
    }

    /// Whether everything was sent, or cannot be sent any more.
    pub(crate) fn poll_empty(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = lock(&self.inner);
        if (inner.len() == 0 && !inner.writing) || !matches!(inner.phase, Phase::Up(_)) {
            return Poll::Ready(());
        }
        inner.waiting.push(cx.waker().clone());
        Poll::Pending
    }

    pub(crate) fn phase(&self) -> Phase {
        lock(&self.inner).phase.clone()
    }

    /// The current connection.
    pub(crate) fn link(&self) -> Option<Arc<Link>> {
        match &lock(&self.inner).phase {
            Phase::Up(link) => Some(link.clone()),
            _ => None,
        }
    }

    /// Whether anyone waits for room or for a connection.
    pub(crate) fn has_waiting(&self) -> bool {
        !lock(&self.inner).waiting.is_empty()
    }

    /// Wakes everyone who waits, so that they check again, at least their deadlines.
    pub(crate) fn wake_waiting(&self) {
        let waiting = std::mem::take(&mut lock(&self.inner).waiting);
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Appends a message, if there is a connection and room. If `flush` says so, writes at once.
    pub(crate) fn poll_submit(
        &self,
        pending: &Mutex<Pending>,
        message: &mut Message,
        by: By<'_>,
        flush: impl FnOnce(&Submitted) -> bool,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(Submitted, Flushed), Error>> {
        let mut inner = lock(&self.inner);
        let link = match &inner.phase {
            Phase::Up(link) => link,
            Phase::Ended(error) => return Poll::Ready(Err(error.clone().with_ran(Ran::No))),
            Phase::Down if matches!(by, By::Connection(_)) => {
                return Poll::Ready(Err(disconnected()));
            }
            Phase::Down => {
                inner.waiting.push(cx.waker().clone());
                return Poll::Pending;
            }
        };
        if matches!(by, By::Connection(epoch) if epoch != link.epoch) {
            return Poll::Ready(Err(disconnected()));
        }
        if inner.len() >= OUTBOX_BYTES_MAX {
            inner.waiting.push(cx.waker().clone());
            return Poll::Pending;
        }
        if message.len_max() > link.max_frame {
            let text = format!(
                "a message of {} bytes is over the server's limit of {} bytes (limits.max_frame)",
                message.len_max(),
                link.max_frame
            );
            return Poll::Ready(Err(Error::new(Code::TooLarge, text)));
        }
        if message.descriptor.is_some() && !link.takes_descriptors {
            let text = "this connection cannot pass file descriptors; use the server's Unix socket";
            return Poll::Ready(Err(Error::new(Code::BadMessage, text).with_ran(Ran::No)));
        }
        let (attachments, epoch) = (link.attachments, link.epoch);
        let mut submitted = Submitted {
            key: None,
            alone: false,
        };
        match by {
            By::Any | By::Connection(_) => inner.append_message(message, None, attachments),
            By::Call {
                deadline,
                window,
                name,
            } => {
                let mut pending = lock(pending);
                if let Name::Chosen(id) = name
                    && pending.has_chosen(id)
                {
                    return Poll::Ready(Err(in_use(id)));
                }
                std::task::ready!(pending.poll_room(cx));
                submitted.alone = pending.waiting() == 0;
                let key = pending.insert(OpenCall::new(epoch, deadline, window, name));
                inner.append_message(message, pending.id(key, name), attachments);
                pending.set_end(key, inner.appended);
                submitted.key = Some(key);
            }
        }
        let flushed = if flush(&submitted) {
            self.flush_inner(inner)
        } else {
            Flushed::Done
        };
        Poll::Ready(Ok((submitted, flushed)))
    }

    /// Appends what `write` writes, even above the limit: for answers and other small or counted
    /// messages. Does nothing if connection `epoch` has ended.
    pub(crate) fn append(&self, epoch: u32, write: impl FnOnce(&mut Vec<u8>, &Link)) {
        let mut inner = lock(&self.inner);
        let inner = &mut *inner;
        if let Phase::Up(link) = &inner.phase
            && link.epoch == epoch
        {
            let before = inner.buf.len();
            write(&mut inner.buf, link);
            inner.appended += (inner.buf.len() - before) as u64;
        }
    }

    /// Writes as much as the socket accepts.
    pub(crate) fn flush(&self) -> Flushed {
        self.flush_inner(lock(&self.inner))
    }

    fn flush_inner<'a>(&'a self, mut inner: MutexGuard<'a, Inner>) -> Flushed {
        if inner.writing {
            return Flushed::Done;
        }
        inner.writing = true;
        let mut outcome = Flushed::Done;
        while inner.len() > 0 {
            let Phase::Up(link) = &inner.phase else { break };
            let link = link.clone();
            let spare = std::mem::take(&mut inner.spare);
            let mut chunk = std::mem::replace(&mut inner.buf, spare);
            let mut at = std::mem::take(&mut inner.head);
            let mut carried = std::mem::take(&mut inner.carried);
            inner.attempted += (chunk.len() - at) as u64;
            drop(inner);
            let blocked = loop {
                match send(&link, &chunk, at, &mut carried) {
                    Ok(n) => at += n,
                    Err(rustix::io::Errno::AGAIN) => break true,
                    // The reader will notice, after it has read the server's last messages.
                    Err(_) => break false,
                }
                if at == chunk.len() {
                    break false;
                }
            };
            inner = lock(&self.inner);
            let is_same = matches!(&inner.phase, Phase::Up(now) if now.epoch == link.epoch);
            if is_same {
                // Bytes that the kernel did not accept were certainly not sent.
                inner.attempted -= (chunk.len() - at) as u64;
            }
            if blocked && is_same {
                for mut later in inner.carried.drain(..) {
                    later.at += chunk.len();
                    carried.push_back(later);
                }
                inner.carried = carried;
                chunk.extend_from_slice(&inner.buf);
                inner.buf = chunk;
                inner.head = at;
                outcome = Flushed::Blocked;
                break;
            }
            chunk.clear();
            if chunk.capacity() <= BUFFER_BYTES_KEPT {
                inner.spare = chunk;
            }
        }
        inner.writing = false;
        self.blocked
            .store(outcome == Flushed::Blocked, Ordering::Release);
        let is_drained = inner.len() <= OUTBOX_BYTES_MAX / 2;
        let waiting = match is_drained && !inner.waiting.is_empty() {
            true => std::mem::take(&mut inner.waiting),
            false => Vec::new(),
        };
        drop(inner);
        waiting.into_iter().for_each(Waker::wake);
        outcome
    }

    /// Starts to use a new connection, with `first` as its first bytes. Refused after the end.
    pub(crate) fn up(&self, link: Arc<Link>, first: &[u8]) -> Result<(), Error> {
        let mut inner = lock(&self.inner);
        if let Phase::Ended(error) = &inner.phase {
            return Err(error.clone());
        }
        inner.phase = Phase::Up(link);
        (inner.appended, inner.attempted) = (0, 0);
        inner.append(first);
        drop(inner);
        Ok(())
    }

    /// Gives a connection up. Returns how many of its bytes may have been sent; `None` if it was
    /// given up before.
    pub(crate) fn down(&self, epoch: u32) -> Option<u64> {
        let mut inner = lock(&self.inner);
        match &inner.phase {
            Phase::Up(link) if link.epoch == epoch => {}
            _ => return None,
        }
        Some(inner.discard(Phase::Down))
    }

    /// Ends permanently. Returns the connection that was up, with how many of its bytes may have
    /// been sent.
    pub(crate) fn end(&self, error: Error) -> Option<(Arc<Link>, u64)> {
        let mut inner = lock(&self.inner);
        let ended = match &inner.phase {
            Phase::Ended(_) => return None,
            Phase::Up(link) => Some(link.clone()),
            Phase::Down => None,
        };
        let attempted = inner.discard(Phase::Ended(error));
        drop(inner);
        self.wake_waiting();
        ended.map(|link| (link, attempted))
    }
}

/// Sends from `chunk[at]` on, up to the next message with a descriptor: bytes before that have
/// none.
fn send(
    link: &Link,
    chunk: &[u8],
    at: usize,
    carried: &mut VecDeque<Carried>,
) -> rustix::io::Result<usize> {
    let Some(next) = carried.front() else {
        return link.try_send(&chunk[at..]);
    };
    if at < next.at {
        return link.try_send(&chunk[at..next.at]);
    }
    let end = carried.get(1).map_or(chunk.len(), |after| after.at);
    let sent = match link.try_send_with(&chunk[at..end], &next.descriptor) {
        // Too many descriptors of this user are in flight (unix(7)), and nothing reports when that
        // ends. So the message is sent without its descriptor: the server refuses it, and
        // everything after it continues.
        Err(rustix::io::Errno::TOOMANYREFS) => link.try_send(&chunk[at..end]),
        sent => sent,
    }?;
    carried.pop_front();
    Ok(sent)
}

fn disconnected() -> Error {
    Error::new(
        Code::Disconnected,
        "the connection that the call arrived over has ended",
    )
}

fn in_use(id: &str) -> Error {
    let text = format!(
        "id '{id}' is in use by another call of this app in flight; wait for its answer, or \
        choose another"
    );
    Error::new(Code::BadMessage, text).with_ran(Ran::No)
}

impl Inner {
    fn append_message(&mut self, message: &mut Message, id: Option<Id>, attachments: bool) {
        let before = self.buf.len();
        if let Some(descriptor) = message.descriptor.take() {
            self.carried.push_back(Carried {
                at: before,
                descriptor,
            });
        }
        message.finish(id, attachments, &mut self.buf);
        self.appended += (self.buf.len() - before) as u64;
    }

    fn append(&mut self, frame: &[u8]) {
        self.buf.extend_from_slice(frame);
        self.appended += frame.len() as u64;
    }

    /// Returns how many bytes of the connection that was up may have been sent.
    fn discard(&mut self, phase: Phase) -> u64 {
        let owed = match &self.phase {
            Phase::Up(link) => link.owed(),
            Phase::Down | Phase::Ended(_) => 0,
        };
        self.phase = phase;
        self.buf = Vec::new();
        self.head = 0;
        self.carried = VecDeque::new();
        self.attempted + owed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::tls::tests::{Clients, connection};

    #[test]
    fn a_byte_buffered_by_tls_may_have_been_sent() {
        let (link, server) = connection(Clients::All);
        let _theirs = server.join().unwrap();
        let outbox = Outbox::new();
        outbox.up(Arc::new(link), &[]).unwrap();
        // One chunk, of which the socket accepts a part.
        let piece = [7; latzero_tls::PLAIN_BYTES_MAX];
        outbox.append(1, |out, _| out.extend_from_slice(&piece));
        assert_eq!(outbox.flush(), Flushed::Blocked);
        assert_eq!(lock(&outbox.inner).len(), 1);
        // The rest may leave with an answer to the server's own messages, unknown to the outbox.
        assert_eq!(outbox.down(1), Some(piece.len() as u64));
    }
}
