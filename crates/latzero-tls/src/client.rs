//! The client's side: which servers it accepts.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, Error, InvalidMessage,
    SignatureScheme,
};

use crate::pem::{self, Origin, PemError};
use crate::{Pin, Stream, provider};

/// Which server a client accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust<'a> {
    /// The one that has the key with this pin. Names and dates do not matter.
    Pin(Pin),
    /// One with a valid certificate for the name that is connected to, from an authority in this
    /// file.
    Authority(&'a Path),
    /// Any, to get its pin and ask a person.
    Anybody,
}

/// A client's own certificate: its file, and the file of its key.
pub type Certificate<'a> = (&'a Path, &'a Path);

/// Why a client cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A file.
    #[error(transparent)]
    Pem(#[from] PemError),
    /// The host cannot be a name in a certificate.
    #[error("'{0}' is neither a host name nor an address")]
    Name(String),
    /// A certificate or a key cannot be used.
    #[error("{0}")]
    Tls(#[from] Error),
}

/// What a failed handshake was about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The server does not use TLS.
    NoTls,
    /// The server's key is not the pinned one.
    OtherPin(Pin),
    /// The server's certificate is not acceptable.
    Certificate(String),
    /// The server requires a certificate of the client, or another one.
    Refused(String),
    /// Anything else.
    Other(String),
}

/// What a connection has learned about the server.
#[derive(Debug, Clone, Default)]
pub struct Seen(Arc<Mutex<Option<Pin>>>);

impl Seen {
    /// The pin of the server's key.
    #[must_use]
    pub fn pin(&self) -> Option<Pin> {
        *self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn note(&self, pin: Pin) {
        *self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = Some(pin);
    }
}

/// Begins a connection to `host`.
///
/// # Errors
/// If a file can't be used, or the host can't stand in a certificate.
pub fn begin(
    host: &str,
    trust: &Trust<'_>,
    own: Option<Certificate<'_>>,
) -> Result<(Stream, Seen), SetupError> {
    let seen = Seen::default();
    let verifier = Verifier {
        rule: match trust {
            Trust::Pin(pin) => Rule::Pin(*pin),
            Trust::Anybody => Rule::Anybody,
            Trust::Authority(file) => {
                let roots = Arc::new(pem::roots(file)?);
                let built = WebPkiServerVerifier::builder_with_provider(roots, provider()).build();
                Rule::Authority(built.map_err(|error| Error::General(error.to_string()))?)
            }
        },
        provider: provider(),
        seen: seen.clone(),
    };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match own {
        Some((certificate, key)) => builder.with_client_auth_cert(
            pem::certificates(certificate, Origin::Given)?,
            pem::key(key, Origin::Given)?,
        )?,
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    let name = ServerName::try_from(host.to_owned());
    let name = name.map_err(|_| SetupError::Name(host.to_owned()))?;
    let connection = ClientConnection::new(Arc::new(config), name)?;
    Ok((Stream::new(connection.into()), seen))
}

/// What a failed handshake was about.
#[must_use]
pub fn explain(error: &io::Error, seen: &Seen) -> Fault {
    let Some(tls) = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<Error>())
    else {
        return Fault::Other(error.to_string());
    };
    match (tls, seen.pin()) {
        (
            Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure),
            Some(pin),
        ) => Fault::OtherPin(pin),
        (Error::InvalidCertificate(why), _) => Fault::Certificate(why.to_string()),
        (Error::InvalidMessage(InvalidMessage::InvalidContentType), _) => Fault::NoTls,
        (Error::InvalidMessage(_), None) => Fault::NoTls,
        (Error::AlertReceived(alert), _) => Fault::Refused(format!("{alert:?}")),
        (other, _) => Fault::Other(other.to_string()),
    }
}

#[derive(Debug)]
enum Rule {
    Pin(Pin),
    Authority(Arc<WebPkiServerVerifier>),
    Anybody,
}

/// Checks a server's certificate, and records its pin.
#[derive(Debug)]
struct Verifier {
    rule: Rule,
    provider: Arc<CryptoProvider>,
    seen: Seen,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let pin = Pin::of(end_entity)?;
        self.seen.note(pin);
        match &self.rule {
            Rule::Anybody => Ok(ServerCertVerified::assertion()),
            Rule::Pin(wanted) if *wanted == pin => Ok(ServerCertVerified::assertion()),
            Rule::Pin(_) => Err(CertificateError::ApplicationVerificationFailure.into()),
            Rule::Authority(verifier) => verifier.verify_server_cert(
                end_entity,
                intermediates,
                server_name,
                ocsp_response,
                now,
            ),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not offered".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
