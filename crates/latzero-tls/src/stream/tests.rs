//! Reads that are bounded, failures that come last, and bytes that are owed: over wires in memory.

#![allow(clippy::unwrap_used, reason = "a test says where by panicking")]

use std::collections::VecDeque;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::client::{self, Trust};
use crate::pem::Origin;
use crate::server::{Acceptor, self_signed};

/// One direction of a socket.
#[derive(Default)]
struct Wire {
    bytes: VecDeque<u8>,
    /// What it takes before it says `full`.
    room: Option<usize>,
    /// What it says then; nothing is `WouldBlock`.
    full: Option<io::ErrorKind>,
    /// What it says once it is empty; nothing is `WouldBlock`.
    empty: Option<io::ErrorKind>,
}

impl Read for Wire {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.bytes.is_empty() {
            return Err(self.empty.unwrap_or(io::ErrorKind::WouldBlock).into());
        }
        self.bytes.read(buf)
    }
}

impl Write for Wire {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = buf.len().min(self.room.unwrap_or(usize::MAX));
        if n == 0 {
            return Err(self.full.unwrap_or(io::ErrorKind::WouldBlock).into());
        }
        self.room = self.room.map(|room| room - n);
        self.bytes.extend(&buf[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn pair() -> (Stream, Stream) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name| dir.path().join(name);
    let made = self_signed(vec!["localhost".to_owned()]).unwrap();
    fs::write(path("cert"), made.certificate).unwrap();
    fs::write(path("key"), made.key).unwrap();
    fs::set_permissions(path("key"), Permissions::from_mode(0o600)).unwrap();
    let acceptor = Acceptor::load(&path("cert"), &path("key"), None, Origin::Own).unwrap();
    let (client, _) = client::begin("localhost", &Trust::Anybody, None).unwrap();
    (client, acceptor.begin().unwrap())
}

/// A client and a server that have agreed, and nothing on the way.
fn agreed() -> (Stream, Stream) {
    let (mut client, mut server) = pair();
    let (mut up, mut down) = (Wire::default(), Wire::default());
    client.flush(&mut up).unwrap();
    while client.is_handshaking() || server.is_handshaking() || !up.bytes.is_empty() {
        server.agree(&mut up, &mut down).unwrap();
        client.agree(&mut down, &mut up).unwrap();
        let read = server.read(&mut up, &mut down, &mut [0; 8]);
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
    assert!(down.bytes.is_empty());
    (client, server)
}

/// Reads until the wire is empty, and returns what came and in how many reads.
fn read_all(server: &mut Stream, up: &mut Wire) -> (Vec<u8>, usize) {
    let (mut all, mut buf) = (Vec::new(), vec![0; 256 * 1024]);
    for reads in 1.. {
        let before = up.bytes.len();
        let read = server.read(up, &mut Wire::default(), &mut buf);
        // What one read takes is bounded, whatever comes of it.
        assert!(before - up.bytes.len() <= WIRE_BYTES_PER_READ + 4096);
        match read {
            Ok(n) => all.extend(&buf[..n]),
            Err(error) if Unfinished::is(&error) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        if up.bytes.is_empty() {
            return (all, reads);
        }
        assert!(!server.is_drained());
    }
    unreachable!("it ends earlier");
}

#[test]
fn a_read_of_tiny_records_is_bounded() {
    let (mut client, mut server) = agreed();
    let mut up = Wire::default();
    for i in 0..5000 {
        assert_eq!(client.write(&mut up, &[i as u8]).unwrap(), 1);
    }
    let (all, reads) = read_all(&mut server, &mut up);
    assert!(all.iter().enumerate().all(|(i, byte)| *byte == i as u8));
    // The wire gives 4096 bytes at once, which are 186 of them.
    assert!(all.len() == 5000 && reads >= 5000 / (256 + 186), "{reads}");
}

#[test]
fn a_read_of_new_keys_again_and_again_is_bounded() {
    let (mut client, mut server) = agreed();
    let mut up = Wire::default();
    for _ in 0..2000 {
        client.connection.refresh_traffic_keys().unwrap();
        assert_eq!(client.write(&mut up, b"x").unwrap(), 1);
    }
    let (all, reads) = read_all(&mut server, &mut up);
    assert!(all.len() == 2000 && reads >= 4000 / (256 + 186), "{reads}");
}

#[test]
fn a_read_without_a_message_is_bounded_and_reported() {
    let (mut client, mut server) = pair();
    let mut hello = Wire::default();
    client.flush(&mut hello).unwrap();
    // The first message of a client, in records of one byte (RFC 8446, section 5.1).
    let whole: Vec<u8> = hello.bytes.drain(..).collect();
    assert!(whole.len() > 1000, "{}", whole.len());
    let mut up = Wire::default();
    for byte in &whole[HEAD_BYTES..] {
        up.bytes.extend([0x16, 3, 1, 0, 1, *byte]);
    }
    let mut down = Wire::default();
    let error = server.read(&mut up, &mut down, &mut [0; 100]).unwrap_err();
    assert!(Unfinished::is(&error) && !server.is_drained(), "{error}");
    assert!(up.bytes.len() > 3000 && down.bytes.is_empty());
    // And the next one continues where it was.
    while !up.bytes.is_empty() {
        server.read(&mut up, &mut down, &mut [0; 100]).unwrap_err();
    }
    assert!(down.bytes.len() > 500, "the server's part of the handshake");
}

#[test]
fn a_batch_of_large_records_arrives_complete() {
    let (mut client, mut server) = agreed();
    let mut up = Wire::default();
    let sent: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
    let mut rest = &sent[..];
    while !rest.is_empty() {
        let n = client.write(&mut up, rest).unwrap();
        rest = &rest[n..];
    }
    assert_eq!(read_all(&mut server, &mut up).0, sent);
}

#[test]
fn messages_before_a_failure_are_delivered_first() {
    let (mut client, mut server) = agreed();
    let mut up = Wire::default();
    client.write(&mut up, b"last words").unwrap();
    up.bytes.extend([0x17, 3, 3, 0, 20]);
    up.bytes.extend([0; 20]);
    let mut buf = [0; 100];
    // The failure makes an alert, which nobody takes: that is no failure of reading.
    let mut down = Wire {
        room: Some(0),
        full: Some(io::ErrorKind::BrokenPipe),
        ..Wire::default()
    };
    assert_eq!(server.read(&mut up, &mut down, &mut buf).unwrap(), 10);
    assert!(&buf[..10] == b"last words" && !server.is_drained() && server.has_buffered());
    for _ in 0..2 {
        let error = server.read(&mut up, &mut down, &mut buf).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    let (mut client, mut server) = agreed();
    let mut up = Wire {
        empty: Some(io::ErrorKind::ConnectionReset),
        ..Wire::default()
    };
    client.write(&mut up, &[7; 4096]).unwrap();
    let mut buf = [0; 8192];
    let n = server.read(&mut up, &mut down, &mut buf).unwrap();
    assert!(n == 4096 || server.read(&mut up, &mut down, &mut buf).unwrap() == 4096 - n);
    let error = server.read(&mut up, &mut down, &mut buf).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn a_partly_sent_piece_counts_as_written() {
    let piece = [7; PLAIN_BYTES_MAX];
    // Nothing has left, the first of its two records has, and half of the second.
    for (room, written) in [(0, None), (17_000, Some(())), (30_000, Some(()))] {
        let (mut client, mut server) = agreed();
        let mut up = Wire {
            room: Some(room),
            full: Some(io::ErrorKind::ConnectionReset),
            ..Wire::default()
        };
        let wrote = client.write(&mut up, &piece);
        assert_eq!(wrote.ok(), written.map(|()| piece.len()), "{room}");
        assert!(client.write(&mut up, &piece).is_err());
        up.room = None;
        client.flush(&mut up).ok();
        // What was refused as a whole does not leave later.
        let (all, _) = match up.bytes.is_empty() {
            true => (Vec::new(), 0),
            false => read_all(&mut server, &mut up),
        };
        assert_eq!(all.is_empty(), written.is_none(), "{room}");
    }
}

#[test]
fn the_withheld_byte_stays_pending_until_it_is_reported() {
    let (mut client, mut server) = agreed();
    let mut up = Wire {
        room: Some(10),
        ..Wire::default()
    };
    assert_eq!(client.write(&mut up, b"a call").unwrap(), 5);
    assert!(client.owes_byte());
    // What the protocol has to say takes the rest along: all of it is there, and one is owed.
    up.room = None;
    client.flush(&mut up).unwrap();
    assert_eq!(read_all(&mut server, &mut up).0, b"a call");
    assert!(client.owes_byte());
    assert_eq!(client.write(&mut up, b"l").unwrap(), 1);
    assert!(!client.owes_byte() && up.bytes.is_empty());
}
