//! Random bytes, from the kernel alone.

use rustix::rand::{GetRandomFlags, getrandom};

/// Random bytes. Without them no proof can be asked for, so a kernel that has none ends the server.
pub(crate) fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(cause) => panic!("the kernel gives no random bytes: {cause}"),
        }
    }
    bytes
}
