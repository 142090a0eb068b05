//! File descriptors over Unix sockets (unix(7), SCM_RIGHTS).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Most descriptors that are sent or received with one message.
pub const DESCRIPTORS_MAX: usize = 64;

/// Sends as much of `bytes` as fits, with `descriptors` at the first byte.
///
/// # Errors
/// As sendmsg(2); more descriptors than [`DESCRIPTORS_MAX`] are refused.
pub fn send_with_fds(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    // The control buffer may have room for one more, for its alignment; the receiver's may not.
    let fits = descriptors.len() <= DESCRIPTORS_MAX
        && (descriptors.is_empty() || control.push(SendAncillaryMessage::ScmRights(descriptors)));
    if !fits {
        return Err(io::Error::other(format!(
            "a message cannot carry more than {DESCRIPTORS_MAX} descriptors"
        )));
    }
    let sent = sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(sent)
}

/// Receives bytes, and appends the descriptors that came with them to `descriptors`; each is closed
/// on exec.
///
/// # Errors
/// As recvmsg(2); and if more than `max` descriptors came, which are all closed then.
pub fn recv_with_fds(
    socket: impl AsFd,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
    max: usize,
) -> io::Result<usize> {
    receive(socket, buffer, descriptors, max, RecvFlags::empty())
}

/// As [`recv_with_fds`], without waiting.
///
/// # Errors
/// As [`recv_with_fds`]; `WouldBlock` if nothing is there.
pub fn try_recv_with_fds(
    socket: impl AsFd,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
    max: usize,
) -> io::Result<usize> {
    receive(socket, buffer, descriptors, max, RecvFlags::DONTWAIT)
}

fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
    max: usize,
    flags: RecvFlags,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(
        socket,
        &mut [IoSliceMut::new(buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | flags,
    )?;
    let mut came: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            came.extend(fds);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) || came.len() > max {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "too many file descriptors were received; all of them were closed",
        ));
    }
    descriptors.append(&mut came);
    Ok(got.bytes)
}
