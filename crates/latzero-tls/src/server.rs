//! The server's side: its certificate, and which clients it accepts.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{Error, ServerConfig, ServerConnection};

use crate::pem::{self, Origin, PemError};
use crate::{Pin, Stream, provider};

/// How long a self-signed certificate is valid. Clients recognise its key by the pin, so an expiry
/// date would only cause failures.
const VALID_UNTIL_YEAR: i32 = 9999;

/// The prefix of a client's address in a certificate: `latzero://APP_ID`.
const APP_PREFIX: &str = "latzero://";

/// The configuration of the server's connections.
#[derive(Debug, Clone)]
pub struct Acceptor {
    config: Arc<ServerConfig>,
    pin: Pin,
    /// Whether clients must have a certificate.
    is_mutual: bool,
}

impl Acceptor {
    /// Reads a certificate with its key, both of `origin`, and the authorities of clients if client
    /// certificates are required.
    ///
    /// # Errors
    /// If a file cannot be used, or the key does not belong to the certificate.
    pub fn load(
        certificate: &Path,
        key: &Path,
        client_ca: Option<&Path>,
        origin: Origin,
    ) -> Result<Acceptor, PemError> {
        let unfit = |path: &Path, source| PemError::Unfit {
            path: path.to_owned(),
            source,
        };
        let chain = pem::certificates(certificate, origin)?;
        let pin = Pin::of(&chain[0]).map_err(|error| unfit(certificate, error))?;
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unfit(certificate, error))?;
        let builder = match client_ca {
            None => builder.with_no_client_auth(),
            Some(file) => {
                let roots = Arc::new(pem::roots(file)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
                    .build()
                    .map_err(|error| unfit(file, Error::General(error.to_string())))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder
            .with_single_cert(chain, pem::key(key, origin)?)
            .map_err(|error| unfit(key, error))?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(Acceptor {
            config: Arc::new(config),
            pin,
            is_mutual: client_ca.is_some(),
        })
    }

    /// The pin of the server's key.
    #[must_use]
    pub fn pin(&self) -> Pin {
        self.pin
    }

    /// Whether clients must have a certificate.
    #[must_use]
    pub fn is_mutual(&self) -> bool {
        self.is_mutual
    }

    /// Begins a connection.
    ///
    /// # Errors
    /// If the settings do not fit together.
    pub fn begin(&self) -> Result<Stream, Error> {
        let connection = ServerConnection::new(Arc::clone(&self.config))?;
        Ok(Stream::new(connection.into()))
    }
}

/// The AppIDs that a client's certificate names: those of its addresses `latzero://APP_ID`, and its
/// host names unchanged (subjectAltName, RFC 5280, section 4.2.1.6).
#[must_use]
pub fn app_ids(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok(parsed) = webpki::EndEntityCert::try_from(certificate) else {
        return Vec::new();
    };
    let addresses = parsed
        .valid_uri_names()
        .filter_map(|address| address.strip_prefix(APP_PREFIX));
    addresses
        .chain(parsed.valid_dns_names())
        .map(str::to_owned)
        .collect()
}

/// A certificate in PEM form, and its key.
#[derive(Debug)]
pub struct SelfSigned {
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

/// Creates a key and a self-signed certificate.
///
/// # Errors
/// If a name cannot be in a certificate.
pub fn self_signed(names: Vec<String>) -> Result<SelfSigned, String> {
    let made = || {
        let key = rcgen::KeyPair::generate()?;
        let mut params = rcgen::CertificateParams::new(names)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "LatZero server");
        params.not_after = rcgen::date_time_ymd(VALID_UNTIL_YEAR, 12, 31);
        Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
    };
    let made: Result<_, rcgen::Error> = made();
    let (certificate, key) = made.map_err(|error| error.to_string())?;
    Ok(SelfSigned { certificate, key })
}
