//! One connection: a socket left in blocking mode.
//!
//! Non-blocking calls pass `MSG_DONTWAIT` (recv(2)), so one thread can simply wait in `recv` while
//! others try to write. A receive timeout lets such a thread check its deadlines with one system
//! call per wakeup.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::time::Instant;

use latzero_crypto::proof::ChannelBinding;
use latzero_protocol::frame::Accept;
use latzero_protocol::limits::FORWARD_SLACK;
use latzero_shm::fds;
use rustix::event::PollFlags;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, sendmsg,
};
use serde::Deserialize;

use crate::error::Error;
use crate::wire::tls::Tls;
use crate::wire::wait::wait;

/// Most descriptors that one read can receive.
const DESCRIPTORS_MAX: usize = fds::DESCRIPTORS_MAX;

/// A connection whose handshake is done.
#[derive(Debug)]
pub(crate) struct Link {
    pub(super) socket: OwnedFd,
    pub(super) tls: Option<Tls>,
    pub(crate) epoch: u32,
    /// Its channel binding for proofs.
    pub(crate) binding: ChannelBinding,
    pub(crate) ack: Ack,
    /// Whether attachment frames may be used.
    pub(crate) attachments: bool,
    /// Whether file descriptors may be passed, in both directions.
    pub(crate) takes_descriptors: bool,
    /// Descriptors that arrived right after the handshake's acknowledgement.
    pub(crate) early_descriptors: Mutex<Vec<OwnedFd>>,
    /// The largest payload that the server accepts, in bytes.
    pub(crate) max_frame: usize,
    /// Bytes that arrived right after the handshake's acknowledgement.
    pub(crate) early: Mutex<Vec<u8>>,
}

/// The server's acknowledgement of the handshake.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Ack {
    pub(super) status: String,
    pub(crate) instance: String,
    pub(crate) pools: Vec<String>,
    pub(crate) triggers: Vec<serde_json::Value>,
    pub(crate) rehydrated: bool,
    /// Absent if the registration is stored.
    pub(crate) stored: Option<bool>,
    pub(super) features: Vec<String>,
    pub(crate) limits: AckLimits,
    pub(super) error: Option<Box<serde_json::value::RawValue>>,
}

/// The server's limits.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct AckLimits {
    pub(super) max_frame: Option<usize>,
    pub(crate) max_in_flight: Option<usize>,
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Link {
    /// The frames that are accepted from the server: as large as other clients may send, plus what
    /// the server adds.
    pub(crate) fn accept(&self) -> Accept {
        Accept {
            max_frame: self.max_frame.saturating_add(FORWARD_SLACK),
            attachments: self.attachments,
        }
    }

    /// Sends as much as the kernel accepts without blocking.
    pub(crate) fn try_send(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        if let Some(tls) = &self.tls {
            return tls.send(self.as_fd(), bytes);
        }
        rustix::io::retry_on_intr(|| {
            rustix::net::send(
                &self.socket,
                bytes,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            )
        })
    }

    /// Sends as much as the kernel accepts without blocking, with a descriptor at the first byte
    /// (unix(7), `SCM_RIGHTS`).
    pub(crate) fn try_send_with(
        &self,
        bytes: &[u8],
        descriptor: &OwnedFd,
    ) -> rustix::io::Result<usize> {
        let descriptors = [descriptor.as_fd()];
        rustix::io::retry_on_intr(|| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let has_room = control.push(SendAncillaryMessage::ScmRights(&descriptors));
            debug_assert!(has_room, "there is space for one");
            sendmsg(
                &self.socket,
                &[IoSlice::new(bytes)],
                &mut control,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            )
        })
    }

    /// How many bytes may have been sent although no send reported them.
    pub(crate) fn owed(&self) -> u64 {
        self.tls.as_ref().map_or(0, Tls::owed)
    }

    /// Receives available bytes and the descriptors that came with them; 0 is the end.
    pub(crate) fn try_recv(
        &self,
        buf: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> io::Result<usize> {
        self.receive(buf, descriptors, RecvFlags::DONTWAIT)
    }

    /// Waits up to [`RECV_TIMEOUT`](crate::wire::wait::RECV_TIMEOUT) for bytes.
    pub(crate) fn recv(&self, buf: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
        self.receive(buf, descriptors, RecvFlags::empty())
    }

    fn receive(
        &self,
        buf: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
        flags: RecvFlags,
    ) -> io::Result<usize> {
        if let Some(tls) = &self.tls {
            return tls.recv(self.as_fd(), buf, flags);
        }
        loop {
            let received = if !self.takes_descriptors {
                rustix::net::recv(&self.socket, &mut *buf, flags)
                    .map(|(n, _)| n)
                    .map_err(io::Error::from)
            } else if flags.contains(RecvFlags::DONTWAIT) {
                fds::try_recv_with_fds(&self.socket, buf, descriptors, DESCRIPTORS_MAX)
            } else {
                fds::recv_with_fds(&self.socket, buf, descriptors, DESCRIPTORS_MAX)
            };
            match received {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    // A waiting thread checks whether the signal ends its wait.
                    if !flags.contains(RecvFlags::DONTWAIT) {
                        return Err(io::ErrorKind::WouldBlock.into());
                    }
                }
                other => return other,
            }
        }
    }

    /// Whether there is data that polling the socket does not report, because it was already read.
    pub(crate) fn has_buffered(&self) -> bool {
        self.tls.as_ref().is_some_and(Tls::has_buffered)
    }

    /// Whether TLS has left something in the socket, as far as it knows.
    pub(crate) fn may_have_more(&self) -> bool {
        self.tls.as_ref().is_some_and(Tls::may_have_more)
    }

    pub(crate) fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Sends all of it, for a connection that nobody else uses yet.
    pub(crate) fn send_all(&self, bytes: &[u8], deadline: Instant) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.try_send(rest) {
                Ok(n) => rest = &rest[n..],
                Err(rustix::io::Errno::AGAIN) => wait(self.as_fd(), PollFlags::OUT, deadline)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The cause of a failed read, if more is known than the error says.
    pub(crate) fn explain(&self, error: &io::Error) -> Option<Error> {
        self.tls.as_ref()?.refusal(error)
    }

    /// Ends the sending side.
    pub(crate) fn finish_sending(&self) {
        if let Some(tls) = &self.tls {
            tls.finish(self.as_fd());
        }
        // A socket that the peer closed is finished already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
    }

    /// Ends the connection for everyone who waits on it.
    pub(crate) fn end(&self) {
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }
}

#[cfg(test)]
impl Link {
    /// A connection before the server's first message.
    pub(crate) fn of(socket: OwnedFd, tls: Tls) -> Link {
        Link {
            socket,
            tls: Some(tls),
            epoch: 1,
            binding: ChannelBinding::None,
            ack: Ack::default(),
            attachments: false,
            takes_descriptors: false,
            early_descriptors: Mutex::default(),
            max_frame: latzero_protocol::limits::MAX_FRAME_DEFAULT,
            early: Mutex::default(),
        }
    }
}
