//! Random bytes from the kernel.

use rustix::rand::{GetRandomFlags, getrandom};

/// Random bytes. Challenges need them, so the server ends if the kernel provides none.
pub(crate) fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(cause) => panic!("the kernel returned no random bytes: {cause}"),
        }
    }
    bytes
}
