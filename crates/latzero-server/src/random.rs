//! Random bytes from the kernel.

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// Random bytes. Challenges need them, so the server ends if the kernel provides none.
pub(crate) fn bytes<const N: usize>() -> [u8; N] {
    fill(|rest| getrandom(rest, GetRandomFlags::empty()))
}

/// Bytes of a source that may give fewer than asked for, or be interrupted.
fn fill<const N: usize>(mut source: impl FnMut(&mut [u8]) -> Result<usize, Errno>) -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match source(&mut bytes[filled..]) {
            Ok(count) => filled += count,
            Err(Errno::INTR) => {}
            Err(cause) => panic!("the kernel returned no random bytes: {cause}"),
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_is_interrupted_or_slow_is_asked_again() {
        let mut answers = [Err(Errno::INTR), Ok(3), Err(Errno::INTR), Ok(5)].into_iter();
        let bytes: [u8; 8] = fill(|rest| {
            let count = answers.next().expect("it has all")?;
            rest[..count].fill(count as u8);
            Ok(count)
        });
        assert_eq!(bytes, [3, 3, 3, 5, 5, 5, 5, 5]);
    }

    #[test]
    #[should_panic(expected = "the kernel returned no random bytes")]
    fn nothing_replaces_the_kernel_as_source() {
        let _: [u8; 8] = fill(|_| Err(Errno::NOSYS));
    }

    /// Whoever draws bytes elsewhere may fall back to something that can be guessed.
    #[test]
    fn no_other_module_reads_random_bytes() {
        let mut directories = vec![std::path::PathBuf::from(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/src"
        ))];
        let mut users = Vec::new();
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(directory).expect("the sources are there") {
                let path = entry.expect("it can be read").path();
                if path.is_dir() {
                    directories.push(path);
                } else if std::fs::read_to_string(&path)
                    .is_ok_and(|text| text.contains("getrandom"))
                {
                    users.push(path.file_name().map(ToOwned::to_owned));
                }
            }
        }
        assert_eq!(users, [Some("random.rs".into())]);
    }
}
