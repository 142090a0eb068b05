//! Addresses: `latzero://APP_ID[@HOST[:PORT]][?socket=PATH][&pool=alpha…]`.

use std::path::PathBuf;

use latzero_protocol::limits::DEFAULT_PORT;
use latzero_protocol::{AppId, Code, PoolName};
use latzero_tls::Pin;

use crate::error::Error;

/// The address of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// The Unix socket of the default data directory, else the default port of this machine.
    Local,
    /// A Unix socket.
    Socket(PathBuf),
    /// A host and port.
    Tcp(String, u16),
    /// A host and port, with TLS.
    Tls(String, u16, TlsOptions),
}

/// What an address says about TLS.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TlsOptions {
    /// The server's key.
    pub(crate) pin: Option<Pin>,
    /// The authorities of the server's certificate.
    pub(crate) ca: Option<PathBuf>,
    /// The client's own certificate, and its key.
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
}

/// A parsed address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Url {
    pub(crate) app_id: AppId,
    pub(crate) place: Endpoint,
    pub(crate) pools: Vec<PoolName>,
    /// The key files of pools; each belongs to the pool that is named before it.
    pub(crate) keys: Vec<(PoolName, PathBuf)>,
    pub(crate) app_key: Option<PathBuf>,
    /// Whether proofs may be sent over a connection that they are not bound to.
    pub(crate) unbound: bool,
}

fn bad(url: &str, why: &str) -> Error {
    Error::new(
        Code::BadMessage,
        format!(
            "the address '{url}' {why}; expected latzero://APP_ID[@HOST[:PORT]][?socket=PATH][?tls]\
             [&pool=NAME[&keys=FILE]]"
        ),
    )
}

impl Url {
    pub(crate) fn parse(url: &str) -> Result<Self, Error> {
        let rest = url
            .strip_prefix("latzero://")
            .ok_or_else(|| bad(url, "does not begin with latzero://"))?;
        let (authority, query) = match rest.split_once('?') {
            Some((authority, query)) => (authority, Some(query)),
            None => (rest, None),
        };
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let (app_id, host) = match authority.split_once('@') {
            Some((app_id, host)) => (app_id, Some(host)),
            None => (authority, None),
        };
        let name_error =
            |e: latzero_protocol::NameError| Error::new(Code::InvalidName, e.to_string());
        let mut place = match host {
            None => Endpoint::Local,
            Some(host) => host_and_port(url, host)?,
        };
        let app_id = AppId::new(app_id).map_err(name_error)?;
        let mut pools: Vec<PoolName> = Vec::new();
        let (mut keys, mut app_key, mut unbound) = (Vec::new(), None, false);
        let (mut tls, mut options) = (false, TlsOptions::default());
        for pair in query
            .unwrap_or("")
            .split('&')
            .filter(|pair| !pair.is_empty())
        {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = unescape(url, value)?;
            match key {
                "pool" => {
                    let pool = PoolName::new(&value).map_err(name_error)?;
                    if !pools.contains(&pool) {
                        pools.push(pool);
                    }
                }
                "keys" => match pools.last() {
                    Some(pool) => keys.push((pool.clone(), PathBuf::from(value))),
                    None => return Err(bad(url, "names keys before the pool that they are of")),
                },
                "app_key" => app_key = Some(PathBuf::from(value)),
                "unbound" => unbound = true,
                "socket" if host.is_some() => {
                    return Err(bad(url, "names both a host and a socket"));
                }
                "socket" if value.is_empty() => return Err(bad(url, "names no socket path")),
                "socket" => place = Endpoint::Socket(PathBuf::from(value)),
                "tls" if ["", "true"].contains(&value.as_str()) => tls = true,
                "tls" if value == "false" => tls = false,
                "tls" => return Err(bad(url, "has `tls` that is neither true nor false")),
                "pin" => {
                    let pin = value.parse::<Pin>();
                    options.pin = Some(pin.map_err(|e| bad(url, &format!("has a bad pin: {e}")))?);
                }
                "ca" => options.ca = Some(PathBuf::from(value)),
                "cert" => options.cert = Some(PathBuf::from(value)),
                "key" => options.key = Some(PathBuf::from(value)),
                other => return Err(bad(url, &format!("has an unknown option '{other}'"))),
            }
        }
        place = with_tls(url, place, tls, options)?;
        Ok(Url {
            app_id,
            place,
            pools,
            keys,
            app_key,
            unbound,
        })
    }
}

/// The address, with TLS if the URL says so. A pin without `tls` would protect nothing.
fn with_tls(url: &str, place: Endpoint, tls: bool, options: TlsOptions) -> Result<Endpoint, Error> {
    if !tls && options != TlsOptions::default() {
        return Err(bad(url, "has an option of TLS without `tls`"));
    }
    if options.pin.is_some() && options.ca.is_some() {
        return Err(bad(
            url,
            "has both a pin and a ca; only the pin would count",
        ));
    }
    if options.cert.is_some() != options.key.is_some() {
        return Err(bad(url, "has one of `cert` and `key`, which go together"));
    }
    match place {
        Endpoint::Tcp(host, port) if tls => Ok(Endpoint::Tls(host, port, options)),
        _ if tls => Err(bad(url, "asks for TLS and names no host")),
        place => Ok(place),
    }
}

fn host_and_port(url: &str, text: &str) -> Result<Endpoint, Error> {
    // An IPv6 address is in brackets, because it contains colons.
    let (host, port) = match text.strip_prefix('[').and_then(|t| t.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, port)) => (host, Some(port.strip_prefix(':').unwrap_or(port))),
        None => match text.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    if host.is_empty() {
        return Err(bad(url, "has no host after '@'"));
    }
    let port = match port {
        None => DEFAULT_PORT,
        Some(port) => match port.parse() {
            Ok(port) if port > 0 => port,
            _ => return Err(bad(url, "has a port that is not a number from 1 to 65535")),
        },
    };
    Ok(Endpoint::Tcp(host.to_owned(), port))
}

/// Decodes percent-encoding (RFC 3986, section 2.1).
fn unescape(url: &str, text: &str) -> Result<String, Error> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || bytes.next().and_then(|b| (b as char).to_digit(16));
        let (Some(high), Some(low)) = (digit(), digit()) else {
            return Err(bad(url, "has a '%' without two hex digits"));
        };
        out.push((high * 16 + low) as u8);
    }
    String::from_utf8(out).map_err(|_| bad(url, "is not UTF-8 once its escapes are undone"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(url: &str, place: &Endpoint, pools: &[&str]) {
        let parsed = Url::parse(url).unwrap();
        assert_eq!(&parsed.place, place, "{url}");
        let got: Vec<&str> = parsed.pools.iter().map(PoolName::as_str).collect();
        assert_eq!(got, pools, "{url}");
    }

    #[test]
    fn addresses() {
        check("latzero://me", &Endpoint::Local, &[]);
        check(
            "latzero://me?pool=a&pool=b&pool=a",
            &Endpoint::Local,
            &["a", "b"],
        );
        check(
            "latzero://me@host",
            &Endpoint::Tcp("host".into(), DEFAULT_PORT),
            &[],
        );
        check(
            "latzero://me@1.2.3.4:99/?pool=a",
            &Endpoint::Tcp("1.2.3.4".into(), 99),
            &["a"],
        );
        check(
            "latzero://me@[::1]:99",
            &Endpoint::Tcp("::1".into(), 99),
            &[],
        );
        check(
            "latzero://me@[::1]",
            &Endpoint::Tcp("::1".into(), DEFAULT_PORT),
            &[],
        );
        check(
            "latzero://me?socket=/a%20b/s.sock",
            &Endpoint::Socket("/a b/s.sock".into()),
            &[],
        );
    }

    #[test]
    fn bad_addresses_say_why() {
        for (url, why) in [
            ("http://me", "does not begin with latzero://"),
            ("latzero://", "'' is not a valid AppID"),
            ("latzero://a b", "is not a valid AppID"),
            ("latzero://me@", "no host"),
            ("latzero://me@h:0", "port"),
            ("latzero://me@h:x", "port"),
            ("latzero://me@h?socket=/x", "both a host and a socket"),
            ("latzero://me?tls=true", "names no host"),
            ("latzero://me@h?tls=maybe", "neither true nor false"),
            ("latzero://me@h?ca=/x", "without `tls`"),
            ("latzero://me@h?tls&pin=x", "43 characters"),
            ("latzero://me@h?tls&cert=/x", "go together"),
            ("latzero://me?pol=a", "unknown option 'pol'"),
            ("latzero://me?pool=a%2", "two hex digits"),
            ("latzero://me?pool=a/b", "not a valid pool name"),
        ] {
            let error = Url::parse(url).unwrap_err().to_string();
            assert!(error.contains(why), "{url}: {error}");
        }
    }
}
