//! App keys: an AppID with a key belongs to the holder of the key.

use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use crate::keys::{KeyError, Secret, checksum, with_checksum};
use crate::sign::SigningKey;
use crate::text;

/// The prefix of an app key's text.
pub const PREFIX: &str = "lza1_";

/// The secret key of an app.
pub struct AppKey(Secret);

impl AppKey {
    /// A key of 32 random bytes.
    #[must_use]
    pub fn new(seed: Secret) -> Self {
        AppKey(seed)
    }

    /// Parses the line of an app-key file, with or without a line end.
    ///
    /// # Errors
    /// If it is not a valid app key.
    pub fn parse(line: &str) -> Result<Self, KeyError> {
        let line = line.strip_suffix('\n').unwrap_or(line);
        let encoded = line.strip_prefix(PREFIX).ok_or(KeyError::AppKey)?;
        let bytes = text::decode_secret::<36>(encoded).ok_or(KeyError::AppKey)?;
        let (seed, check) = bytes.split_at(32);
        if !bool::from(checksum(PREFIX, seed).ct_eq(check)) {
            return Err(KeyError::Checksum);
        }
        Ok(AppKey(Secret::copied(seed)))
    }

    /// The line of an app-key file, without a line end.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        with_checksum(PREFIX, &*self.0)
    }

    /// The signing key.
    #[must_use]
    pub fn signing_key(&self) -> SigningKey {
        SigningKey::from_seed(&self.0)
    }
}
