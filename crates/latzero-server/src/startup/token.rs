//! The admin token: anyone who can read it in the data directory may administer the server over any
//! transport.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use super::StartupError;

/// The token's file inside the data directory.
pub const TOKEN_NAME: &str = "admin.token";

/// The token's length in random bytes; it is written as twice as many hexadecimal digits.
const TOKEN_BYTES: usize = 32;

/// 32 random bytes in hexadecimal digits. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct AdminToken(String);

impl fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AdminToken(..)")
    }
}

impl AdminToken {
    /// Reads the token of a data directory, or creates it, with mode 0600. The caller holds the
    /// instance lock.
    ///
    /// # Errors
    /// If the file cannot be read or written, has no token, or others can read it.
    pub fn load_or_create(data_dir: &Path) -> Result<AdminToken, StartupError> {
        match AdminToken::load(data_dir)? {
            Some(token) => Ok(token),
            None => AdminToken::create(data_dir),
        }
    }

    /// Reads the token of a data directory; `None` if no server ever started there.
    ///
    /// # Errors
    /// As [`AdminToken::load_or_create`].
    pub fn load(data_dir: &Path) -> Result<Option<AdminToken>, StartupError> {
        let path = data_dir.join(TOKEN_NAME);
        let file = match OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(&path)
        {
            Ok(file) => file,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(StartupError::of_io("reading", &path, cause)),
        };
        let unreadable = |cause| StartupError::of_io("reading", &path, cause);
        let bad = |reason| StartupError::BadToken {
            path: path.clone(),
            reason,
        };
        let metadata = file.metadata().map_err(unreadable)?;
        if !metadata.is_file() {
            return Err(bad("is not a regular file"));
        }
        if metadata.mode() & 0o077 != 0 {
            return Err(bad("can be read by other users, who may have copied it"));
        }
        let mut bytes = Vec::new();
        file.take(4 * TOKEN_BYTES as u64)
            .read_to_end(&mut bytes)
            .map_err(unreadable)?;
        let digits = bytes.trim_ascii();
        if digits.len() != 2 * TOKEN_BYTES || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(bad("is not 64 hexadecimal digits"));
        }
        let token = String::from_utf8(digits.to_vec()).expect("hexadecimal digits are ASCII");
        Ok(Some(AdminToken(token)))
    }

    fn create(data_dir: &Path) -> Result<AdminToken, StartupError> {
        let token = AdminToken::random();
        token.write(data_dir)?;
        Ok(token)
    }

    /// Writes the token to its file.
    pub(crate) fn write(&self, data_dir: &Path) -> Result<(), StartupError> {
        let path = data_dir.join(TOKEN_NAME);
        // Written to a new file and renamed, so that a crash leaves a complete token or none.
        let beside = data_dir.join(".admin.token.new");
        let write = || -> io::Result<()> {
            match fs::remove_file(&beside) {
                Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(cause),
                _ => {}
            }
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&beside)?;
            file.write_all(self.0.as_bytes())?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(&beside, &path)
        };
        write().map_err(|cause| StartupError::of_io("writing", &path, cause))
    }

    fn random() -> AdminToken {
        let bytes: [u8; TOKEN_BYTES] = crate::random::bytes();
        AdminToken(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Whether `given` is the token, compared in constant time.
    #[must_use]
    pub fn matches(&self, given: &str) -> bool {
        let (ours, given) = (self.0.as_bytes(), given.as_bytes());
        ours.len() == given.len()
            && ours
                .iter()
                .zip(given)
                .fold(0, |differ, (a, b)| differ | (a ^ b))
                == 0
    }

    /// The token itself, for a client that proves that it has it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The bytes of the token.
    #[must_use]
    pub fn bytes(&self) -> [u8; TOKEN_BYTES] {
        let digit = |at: usize| char::from(self.0.as_bytes()[at]).to_digit(16).unwrap_or(0) as u8;
        std::array::from_fn(|at| digit(2 * at) << 4 | digit(2 * at + 1))
    }

    /// Replaces the token with a new one.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn renew(data_dir: &Path) -> Result<AdminToken, StartupError> {
        AdminToken::load(data_dir)?;
        AdminToken::create(data_dir)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_token_is_created_once_and_private() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(AdminToken::load(dir.path()).unwrap(), None);
        let token = AdminToken::load_or_create(dir.path()).unwrap();
        assert_eq!(AdminToken::load_or_create(dir.path()).unwrap(), token);
        assert_eq!(token.reveal().len(), 64);
        let mode = fs::metadata(dir.path().join(TOKEN_NAME)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(format!("{token:?}"), "AdminToken(..)");

        let other = tempfile::tempdir().unwrap();
        assert_ne!(AdminToken::load_or_create(other.path()).unwrap(), token);
    }

    #[test]
    fn only_the_token_matches() {
        let dir = tempfile::tempdir().unwrap();
        let token = AdminToken::load_or_create(dir.path()).unwrap();
        assert!(token.matches(token.reveal()));
        let zeros = "0".repeat(64);
        for wrong in [
            "",
            &token.reveal()[1..],
            &format!("{}0", token.reveal()),
            &zeros,
        ] {
            assert!(!token.matches(wrong));
        }
    }

    #[test]
    fn a_file_that_is_no_token_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(TOKEN_NAME);
        AdminToken::load_or_create(dir.path()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = AdminToken::load_or_create(dir.path())
            .unwrap_err()
            .to_string();
        assert!(error.contains("can be read by other users"), "{error}");
        assert!(
            error.ends_with("remove it, and the next start writes a new one"),
            "{error}"
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        for text in ["", "abc", &"g".repeat(64), &"a".repeat(1000)] {
            fs::write(&path, text).unwrap();
            let error = AdminToken::load_or_create(dir.path())
                .unwrap_err()
                .to_string();
            assert!(error.contains("is not 64 hexadecimal digits"), "{error}");
        }
    }
}
