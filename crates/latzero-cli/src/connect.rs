//! Where the server is, and a connection to it.
//!
//! Flags override the environment, which overrides the defaults. The first of these that is set is
//! used: a flag, `LATZERO_URL`, `LATZERO_SOCKET`, `LATZERO_DATA_DIR`, `LATZERO_HOST` and
//! `LATZERO_PORT`, `~/.latzero`, and then 127.0.0.1:45227. A variable with an invalid value is
//! refused, even if another one is used. A directory means the server that uses it: its Unix socket
//! by the rule of [`latzero_server::address`], else the addresses in the lock file.

use std::ffi::OsString;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use clap::Args;
use latzero::{
    Code, Error, FromPayload, HandshakeTimeout, Reconnect, State, blocking::App, known_hosts,
};
use latzero_server::address;
use latzero_server::startup::lock;
use serde_json::{Value, json};

use crate::commands::keys;
use crate::executor::block_on;
use crate::exit::{Exit, Failure};
use crate::output::Output;
use crate::parse::{self, shell};

/// Where servers listen by default.
const HOST_DEFAULT: &str = "127.0.0.1";
pub(crate) const PORT_DEFAULT: u16 = 45227;

/// The variables that say where the server is: its address, Unix socket, host, port and directory.
pub(crate) const SERVER_VARIABLES: [&str; 5] = [
    "LATZERO_URL",
    "LATZERO_SOCKET",
    "LATZERO_HOST",
    "LATZERO_PORT",
    "LATZERO_DATA_DIR",
];

/// The variable with the admin token.
pub(crate) const ADMIN_TOKEN: &str = "LATZERO_ADMIN_TOKEN";

/// How long connecting may take.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How the client's message about a server that speaks TLS begins.
const SPEAKS_TLS: &str = "the server speaks TLS there";

/// How long a connection may be lost, as when the server restarts, before a person is told.
const UNREPORTED_LOSS: Duration = Duration::from_secs(1);

/// How long requests may take that make the server read or write whole files.
const FILE_REQUEST_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// The server, and the AppID to use.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ServerArgs {
    /// The server that uses this data directory [env: LATZERO_DATA_DIR] [default: ~/.latzero]
    #[arg(short, long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// The server with this Unix socket [env: LATZERO_SOCKET]
    #[arg(long, value_name = "PATH", conflicts_with_all = ["host", "port"])]
    pub(crate) socket: Option<PathBuf>,
    /// The server on this TCP port [env: LATZERO_PORT]
    #[arg(short, long, value_name = "PORT", value_parser = parse::port)]
    pub(crate) port: Option<u16>,
    /// The server on this host, over TCP [env: LATZERO_HOST]
    #[arg(long, value_name = "HOST")]
    pub(crate) host: Option<String>,
    /// An app's address: latzero://APP_ID@HOST:PORT?pool=NAME [env: LATZERO_URL]
    #[arg(
        long,
        value_name = "URL",
        conflicts_with_all = ["data_dir", "socket", "host", "port", "app"]
    )]
    pub(crate) url: Option<String>,
    /// The AppID to connect as [default: cli-UID; for `serve` the program's name]
    #[arg(long, value_name = "ID")]
    pub(crate) app: Option<String>,
    /// The key file of the app [default: ~/.config/latzero/apps/APPID, if it exists]
    #[arg(long, value_name = "FILE")]
    pub(crate) app_key: Option<PathBuf>,
    /// The key file of the pool [default: ~/.config/latzero/keys/POOL, if it exists]
    #[arg(long, value_name = "FILE")]
    pub(crate) keys: Option<PathBuf>,
}

/// A possible address of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Address {
    Url(String),
    Socket(PathBuf),
    Tcp(String, u16),
    /// A TLS port, from a lock file.
    Tls(String, u16),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Url(url) => f.write_str(url),
            Address::Socket(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(host, port) if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Address::Tcp(host, port) => write!(f, "tcp://{host}:{port}"),
            Address::Tls(host, port) if host.contains(':') => write!(f, "tls://[{host}]:{port}"),
            Address::Tls(host, port) => write!(f, "tls://{host}:{port}"),
        }
    }
}

impl Address {
    /// The AppID to use there: `cli-UID` is only for the Unix socket, where the server knows the
    /// user.
    fn app_id(&self, app_id: &str) -> String {
        match (self, app_id.strip_prefix("cli-")) {
            (Address::Tcp(..) | Address::Tls(..), Some(user)) => format!("tcp-cli-{user}"),
            _ => app_id.to_owned(),
        }
    }

    fn url(&self, app_id: &str) -> String {
        match self {
            Address::Url(url) => url.clone(),
            Address::Socket(path) => format!("latzero://{app_id}?socket={}", escape(path)),
            Address::Tls(host, port) => format!("{}?tls", tcp_url(app_id, host, *port)),
            // A trusted server uses TLS. If the file cannot be read, TLS is used too, and the
            // client reports what is wrong with the file.
            Address::Tcp(host, port) => match known_hosts::find(host, *port) {
                Ok(None) => tcp_url(app_id, host, *port),
                Ok(Some(_)) | Err(_) => format!("{}?tls", tcp_url(app_id, host, *port)),
            },
        }
    }

    /// Whether both are the same port, with TLS or without.
    fn is_port_of(&self, other: &Address) -> bool {
        let port = |place: &Address| match place {
            Address::Tcp(host, port) | Address::Tls(host, port) => Some((host.clone(), *port)),
            Address::Url(_) | Address::Socket(_) => None,
        };
        port(self).is_some_and(|ours| port(other) == Some(ours))
    }

    /// Whether the connection itself identifies the user to the server.
    fn is_trusted(&self) -> bool {
        match self {
            Address::Url(url) => !url.contains('@'),
            Address::Socket(_) => true,
            Address::Tcp(..) | Address::Tls(..) => false,
        }
    }
}

fn tcp_url(app_id: &str, host: &str, port: u16) -> String {
    match host.contains(':') {
        true => format!("latzero://{app_id}@[{host}]:{port}"),
        false => format!("latzero://{app_id}@{host}:{port}"),
    }
}

/// Escapes a path for an address (RFC 3986, section 2.1).
fn escape(path: &Path) -> String {
    let mut out = String::new();
    for c in path.to_string_lossy().chars() {
        match c {
            '%' | '&' | '?' | '#' | ' ' => out.push_str(&format!("%{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out
}

/// What happens when the connection is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnDisconnect {
    /// The command is over.
    Ends,
    /// It reconnects and continues.
    Reconnects,
}

/// Where to look for a server that nothing names, and that is not in the default directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guess {
    Nothing,
    /// At the default port.
    Port,
}

/// The options of a connection.
#[derive(Clone, Debug)]
pub(crate) struct ConnectOptions {
    pub(crate) command: &'static str,
    pub(crate) loss: OnDisconnect,
    /// Pools to join; those that do not exist are created.
    pub(crate) pools: Vec<String>,
    /// The default AppID of the command, if `--app` is not given.
    pub(crate) app_id: Option<String>,
    /// Threads for handlers.
    pub(crate) handler_threads: Option<usize>,
    /// How long the server may take for a request, if that differs from other commands.
    pub(crate) request_time: Option<Duration>,
    /// The deadline of the command, including connecting.
    pub(crate) deadline: Option<Instant>,
    /// Whether the command uses keys of its own accord.
    pub(crate) holds_keys: bool,
    /// Whether the command prints answers to parked calls. From all others the server keeps them.
    pub(crate) takes_answers: bool,
}

impl ConnectOptions {
    pub(crate) fn once(command: &'static str) -> ConnectOptions {
        ConnectOptions {
            command,
            loss: OnDisconnect::Ends,
            pools: Vec::new(),
            app_id: None,
            handler_threads: None,
            request_time: None,
            deadline: None,
            holds_keys: false,
            takes_answers: false,
        }
    }

    /// Gives up after `timeout`, whatever it waits for.
    pub(crate) fn within(mut self, timeout: Duration) -> ConnectOptions {
        self.deadline = Some(Instant::now() + timeout);
        self.request_time = Some(timeout);
        self
    }

    /// Gives up connecting after `wait`, if that is how long the command may wait for something.
    pub(crate) fn waiting(mut self, wait: Duration) -> ConnectOptions {
        if !wait.is_zero() {
            self.deadline = Some(Instant::now() + wait);
        }
        self
    }

    /// For requests that wait for the server's disk.
    pub(crate) fn waiting_for_disk(mut self) -> ConnectOptions {
        self.request_time = Some(FILE_REQUEST_TIMEOUT);
        self
    }

    pub(crate) fn continuous(command: &'static str) -> ConnectOptions {
        ConnectOptions {
            loss: OnDisconnect::Reconnects,
            ..ConnectOptions::once(command)
        }
    }

    pub(crate) fn in_pool(mut self, pool: Option<&str>) -> ConnectOptions {
        self.pools.extend(pool.map(str::to_owned));
        self
    }
}

/// A connection and its address.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) app: App,
    place: Address,
    /// The admin token, for a connection that does not have administrator rights by itself.
    token: Option<String>,
    /// Whether there is a token that this server must not see.
    is_token_withheld: bool,
}

impl Connection {
    /// The address of the connection, for people.
    pub(crate) fn place(&self) -> String {
        self.place.to_string()
    }

    /// Starts a thread that tells a person when the connection is lost and when it is back.
    pub(crate) fn report_losses(&self, output: &Output) {
        if !output.is_watched() {
            return;
        }
        let (mut states, place, output) = (self.app.as_async().states(), self.place(), *output);
        let report = move || {
            while let Some(state) = block_on(states.next()) {
                if state != State::Disconnected {
                    continue;
                }
                std::thread::sleep(UNREPORTED_LOSS);
                let mut next = pin!(states.next());
                let mut cx = Context::from_waker(Waker::noop());
                if next.as_mut().poll(&mut cx).is_ready() {
                    continue;
                }
                output.note(format_args!("lost the connection to {place}; reconnecting"));
                if block_on(next) == Some(State::Connected) {
                    output.note(format_args!("connected to {place} again"));
                }
            }
        };
        // Without the thread only the notes are missing.
        let _ = std::thread::Builder::new()
            .name("states".into())
            .spawn(report);
    }

    /// Sends a request that only administrators may send.
    pub(crate) fn administer(&self, request: &Value) -> Result<Value, Failure> {
        self.administer_as(request)
    }

    /// As [`Connection::administer`], for the answer as another type.
    pub(crate) fn administer_as<R: FromPayload>(&self, request: &Value) -> Result<R, Failure> {
        let proved = match &self.token {
            // A second proof does no harm. The user who set the token decided which server gets the
            // proof.
            Some(token) => self.app.prove_admin(token, true),
            None => Ok(()),
        };
        proved
            .and_then(|()| self.app.request_as(request))
            .map_err(|error| {
                let mut failure = Failure::from(error);
                // It may not be the server that the user meant.
                failure
                    .details
                    .push(format!("asked the server at {}", self.place));
                if self.is_token_withheld {
                    failure.details.push(
                        "the admin token was not proved: over TCP only that of \
                     LATZERO_ADMIN_TOKEN is, to a server that is named; use the server's Unix \
                     socket"
                            .to_owned(),
                    );
                }
                failure
            })
    }
}

pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A path whose leading `~` is the home directory, as in settings.
pub(crate) fn expand_home(path: &str) -> PathBuf {
    match (path.strip_prefix('~'), variable("HOME")) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => {
            PathBuf::from(format!("{}{rest}", home.trim_end_matches('/')))
        }
        _ => PathBuf::from(path),
    }
}

impl ServerArgs {
    /// The data directory, and whether it was named explicitly.
    pub(crate) fn data_dir(&self) -> (PathBuf, Explicit) {
        let typed = self
            .data_dir
            .as_ref()
            .map(|path| path.to_string_lossy().into_owned());
        match typed.or_else(|| variable("LATZERO_DATA_DIR")) {
            Some(path) => (expand_home(&path), Explicit::Yes),
            None => (expand_home("~/.latzero"), Explicit::No),
        }
    }

    /// Where to look, in this order.
    fn places(&self, guess: Guess) -> Result<Vec<Address>, Failure> {
        let tcp_variables = tcp_variables()?;
        if let Some(url) = &self.url {
            return Ok(vec![Address::Url(url.clone())]);
        }
        if let Some(socket) = &self.socket {
            if socket == Path::new("auto") || socket == Path::new("off") {
                let text = format!("'{}' is no path of a socket", socket.display());
                return Err(Failure::usage(text).with_help(
                    "name the server's data directory with --data-dir; its socket is then found",
                ));
            }
            return Ok(vec![Address::Socket(socket.clone())]);
        }
        let tcp = |host: Option<&str>, port: Option<u16>| {
            // A server that listens on all addresses is reached over loopback.
            let host = match host {
                None | Some("0.0.0.0" | "::" | "[::]") => HOST_DEFAULT,
                Some(host) => host.trim_matches(['[', ']']),
            };
            Address::Tcp(host.to_owned(), port.unwrap_or(PORT_DEFAULT))
        };
        if self.port == Some(0) {
            return Err(Failure::usage("no server listens on port 0").with_help(
                "`latzero start --port 0` prints the port that the system chose; name that one",
            ));
        }
        if self.host.is_some() || self.port.is_some() {
            let host = self.host.as_deref().or(tcp_variables.0.as_deref());
            return Ok(vec![tcp(host, self.port.or(tcp_variables.1))]);
        }
        if self.data_dir.is_none() {
            if let Some(url) = variable("LATZERO_URL") {
                return Ok(vec![Address::Url(url)]);
            }
            // The variable is also a setting of the server, which allows two words instead of a
            // path.
            let socket = variable("LATZERO_SOCKET").filter(|s| s != "auto" && s != "off");
            if let Some(socket) = socket {
                return Ok(vec![Address::Socket(expand_home(&socket))]);
            }
        }
        let (dir, named) = self.data_dir();
        let mut places = of_data_dir(&dir);
        // If a directory was named, another server's port is not tried.
        if named == Explicit::Yes {
            return Ok(places);
        }
        let by_tcp = tcp(tcp_variables.0.as_deref(), tcp_variables.1);
        if places.iter().any(|place| place.is_port_of(&by_tcp)) {
            return Ok(places);
        }
        if tcp_variables != (None, None) {
            // The server of the default directory listens elsewhere, so another one is meant.
            return Ok(vec![by_tcp]);
        }
        if guess == Guess::Port {
            places.push(by_tcp);
        }
        Ok(places)
    }

    /// The flags as environment variables, with which programs that this one starts find the same
    /// server. A flag overrides every variable, so conflicting variables are emptied.
    pub(crate) fn environment(&self) -> Vec<(&'static str, OsString)> {
        let values = [
            self.url.clone().map(OsString::from),
            self.socket.clone().map(OsString::from),
            self.host.clone().map(OsString::from),
            self.port.map(|port| port.to_string().into()),
            self.data_dir.clone().map(OsString::from),
        ];
        let named = SERVER_VARIABLES.into_iter().zip(values);
        let named: Vec<(&str, Option<OsString>)> = named.collect();
        if named.iter().all(|(_, value)| value.is_none()) {
            return Vec::new();
        }
        let value = |(name, value): (_, Option<OsString>)| (name, value.unwrap_or_default());
        named.into_iter().map(value).collect()
    }

    /// The AppID to connect as.
    fn app_id(&self) -> String {
        self.app
            .clone()
            .unwrap_or_else(|| format!("cli-{}", rustix::process::geteuid().as_raw()))
    }

    /// A unique AppID for this command, or for each `key`, so that answers return to it.
    pub(crate) fn own_app_id(&self, key: Option<&str>) -> String {
        let number = match key {
            // FNV-1a, so equal keys give equal hashes in every process.
            Some(key) => key.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            }),
            None => RandomState::new().build_hasher().finish(),
        };
        format!("{}-{number:016x}", self.app_id())
    }

    /// Connects.
    ///
    /// # Errors
    /// Exit 3 if no server answers, with every address that was tried; 6 if a server accepts the
    /// connection but does not respond.
    pub(crate) fn connect(&self, options: &ConnectOptions) -> Result<Connection, Failure> {
        let app_id = match (&self.app, &options.app_id) {
            (None, Some(own)) => own.clone(),
            _ => self.app_id(),
        };
        let guess = self.guess(&app_id, options);
        let places = self.places(guess)?;
        let mut tried = Vec::new();
        for place in places {
            let left = options
                .deadline
                .map(|at| at.saturating_duration_since(Instant::now()));
            let mut builder = latzero::App::builder(&place.url(&place.app_id(&app_id)))
                .pools(&options.pools)
                .transient(self.is_transient(options))
                .hold_answers(!options.takes_answers)
                .connect_timeout(left.map_or(CONNECT_TIMEOUT, |left| left.min(CONNECT_TIMEOUT)))
                .reconnect(Reconnect {
                    enabled: options.loss == OnDisconnect::Reconnects,
                    ..Reconnect::default()
                })
                .meta(json!({"program": "latzero", "command": options.command,
                    "pid": std::process::id()}));
            for pool in &options.pools {
                if let Some(path) = self.key_file(pool) {
                    builder = builder.keys(pool, keys::of_pool(&path)?);
                }
            }
            if let Some(path) = self.app_key_file(&app_id) {
                builder = builder.app_key(keys::of_app(&path)?);
            }
            if let Some(threads) = options.handler_threads {
                builder = builder.handler_threads(threads);
            }
            if let Some(time) = left.or(options.request_time) {
                builder = builder.call_timeout(time.max(Duration::from_millis(1)));
            }
            match App::connect_with(builder) {
                Ok(app) => {
                    let (token, is_token_withheld) = self.token(&place);
                    return Ok(Connection {
                        app,
                        place,
                        token,
                        is_token_withheld,
                    });
                }
                Err(error) => tried.push((place.to_string(), self.classify(&place, error)?)),
            }
        }
        let mut failure = self.not_running(&tried);
        if guess == Guess::Nothing && !self.is_elsewhere() {
            failure.details.push(format!(
                "port {PORT_DEFAULT} was not tried: another program could listen there, and this \
                user has keys or an admin token"
            ));
        }
        Err(failure)
    }

    /// Who has something to prove does not look for another server by itself: whatever listens on
    /// the default port would learn of it.
    fn guess(&self, app_id: &str, options: &ConnectOptions) -> Guess {
        let (dir, _) = self.data_dir();
        let has_secrets = options.holds_keys
            || options
                .pools
                .iter()
                .any(|pool| self.key_file(pool).is_some())
            || self.app_key_file(app_id).is_some()
            || self.keys.is_some()
            || variable(ADMIN_TOKEN).is_some()
            || dir.join("admin.token").exists();
        match has_secrets {
            true => Guess::Nothing,
            false => Guess::Port,
        }
    }

    /// A command leaves no registration behind and does not change an existing one, unless it keeps
    /// running under a given AppID.
    fn is_transient(&self, options: &ConnectOptions) -> bool {
        let is_named = self.app.is_some() || self.url.is_some();
        options.loss == OnDisconnect::Ends || !is_named
    }

    /// The admin token for a server, and whether there is one that is withheld. A token in the
    /// environment is proved to any server that is named, but not to whatever has the default port
    /// while no server uses the directory. That of the data directory is proved only over the
    /// Unix socket, where the kernel identifies the server's user.
    fn token(&self, place: &Address) -> (Option<String>, bool) {
        if place.is_trusted() {
            return (None, false);
        }
        let (dir, _) = self.data_dir();
        if let Some(token) = variable(ADMIN_TOKEN) {
            let is_named = self.is_elsewhere() || of_data_dir(&dir).contains(place);
            return (Some(token).filter(|_| is_named), !is_named);
        }
        let text = std::fs::read_to_string(dir.join("admin.token"));
        let token = text.ok().map(|text| text.trim().to_owned());
        (None, token.is_some())
    }

    /// The key file of a pool, if it has one.
    pub(crate) fn key_file(&self, pool: &str) -> Option<PathBuf> {
        if let Some(path) = &self.keys {
            return Some(path.clone());
        }
        let path = keys::default_file("keys", pool)?;
        path.exists().then_some(path)
    }

    /// The key file of an app, if it has one.
    fn app_key_file(&self, app_id: &str) -> Option<PathBuf> {
        let by_default = || keys::default_file("apps", app_id);
        let path = self.app_key.clone().or_else(by_default)?;
        (self.app_key.is_some() || path.exists()).then_some(path)
    }

    fn not_running(&self, tried: &[(String, String)]) -> Failure {
        let (dir, named) = self.data_dir();
        let shown_dir = dir.display();
        if self.is_elsewhere() {
            let mut failure = match tried {
                [(place, why)] => {
                    let text = format!("cannot connect to {place}: {why}");
                    Failure::new(Exit::NotRunning, text)
                }
                _ => Failure::new(Exit::NotRunning, "cannot connect to any of the addresses"),
            };
            // A typing error is more likely than a server that is down.
            if let Some((pid, addresses)) = running_on(&dir) {
                failure.details.push(format!(
                    "the server of {shown_dir}, pid {pid}, listens at {}",
                    addresses.join(" and ")
                ));
            }
            if !failure.details.is_empty() {
                return failure
                    .with_help("correct the address, or leave it out to use that server");
            }
            let start = match (self.port, &self.socket) {
                // An unprivileged user cannot listen there.
                (Some(..1024), _) => return failure.with_help("correct the address"),
                (Some(port), _) => format!(" with `latzero start --port {port}`"),
                (_, Some(socket)) => {
                    let socket = shell(&socket.to_string_lossy());
                    format!(" with `latzero start --socket {socket}`")
                }
                _ => String::new(),
            };
            return failure.with_help(format!(
                "correct the address, or start a server there{start}"
            ));
        }
        let mut failure = Failure::new(Exit::NotRunning, "the server is not running");
        let looked = tried
            .iter()
            .map(|(place, why)| format!("cannot connect to {place}: {why}"));
        failure.details.extend(looked);
        if tried.is_empty() {
            failure
                .details
                .push(format!("no server has used {shown_dir} yet"));
        }
        let mut command = "latzero start".to_owned();
        if named == Explicit::Yes {
            command.push_str(&format!(" --data-dir {}", shell(&dir.to_string_lossy())));
        }
        failure.with_help(format!(
            "start it with `{command}`, or choose another server with --data-dir, --socket, \
             --port or --url"
        ))
    }

    /// Distinguishes addresses where no server answers, after which others are tried, from other
    /// errors.
    fn classify(&self, place: &Address, error: Error) -> Result<String, Failure> {
        // Other errors have causes too: a key file may be missing, for example.
        let source = std::error::Error::source(&error)
            .filter(|_| error.kind() == Code::Disconnected)
            .and_then(|cause| cause.downcast_ref::<io::Error>());
        let is_silent = |cause: &io::Error| {
            cause
                .get_ref()
                .and_then(|inner| inner.downcast_ref::<HandshakeTimeout>())
                .is_some()
        };
        match source {
            Some(cause) if is_silent(cause) => {
                let text = format!(
                    "the server at {place} accepts connections but does not \
                    respond"
                );
                let mut failure = Failure::new(Exit::Timeout, text);
                let (dir, _) = self.data_dir();
                let is_its_own = of_data_dir(&dir).contains(place);
                if let Some((pid, _)) = running_on(&dir).filter(|_| is_its_own) {
                    failure.details.push(format!("its pid is {pid}"));
                }
                Err(failure.with_help(
                    "it may be suspended or overloaded; check `latzero logs` and try again",
                ))
            }
            Some(cause) if cause.kind() == io::ErrorKind::PermissionDenied => {
                let text = format!("permission denied: {place}");
                let help = "run this as the server's user, or connect over TCP with --port";
                Err(Failure::new(Exit::Denied, text).with_help(help))
            }
            Some(cause) if cause.kind() == io::ErrorKind::NotFound => {
                Ok("there is no such socket".to_owned())
            }
            // Its own text would end with "(os error 111)".
            Some(cause) if cause.raw_os_error().is_some() => Ok(cause.kind().to_string()),
            Some(cause) => Ok(cause.to_string()),
            // The message says what to do about it.
            None if error.message().starts_with(SPEAKS_TLS) => {
                let text = format!("{place}: {SPEAKS_TLS}");
                let help = match place {
                    Address::Tcp(host, port) if host.contains(':') => {
                        format!("run `latzero trust [{host}]:{port}`, and this command again")
                    }
                    Address::Tcp(host, port) => {
                        format!("run `latzero trust {host}:{port}`, and this command again")
                    }
                    _ => "run `latzero trust HOST:PORT`, and add `?tls` to the address".to_owned(),
                };
                Err(Failure::new(Exit::NotRunning, text).with_help(help))
            }
            None if error.kind() == Code::Disconnected => {
                let text = format!("{place}: {}", error.message());
                let help = "check which program listens there, or choose another server with \
                    --port";
                Err(Failure::new(Exit::NotRunning, text).with_help(help))
            }
            None if matches!(error.kind(), Code::BadMessage | Code::InvalidName) => {
                Err(Failure::usage(error.message()))
            }
            None => Err(error.into()),
        }
    }

    /// Whether the server is named by something other than its data directory.
    pub(crate) fn is_elsewhere(&self) -> bool {
        let is_typed = self.url.is_some()
            || self.host.is_some()
            || self.port.is_some()
            || self.socket.is_some();
        let is_set = || {
            let names = [
                "LATZERO_URL",
                "LATZERO_SOCKET",
                "LATZERO_HOST",
                "LATZERO_PORT",
            ];
            let is_set = |name| variable(name).is_some_and(|v| v != "auto" && v != "off");
            let is_nearer = variable("LATZERO_DATA_DIR").is_some();
            names[..if is_nearer { 2 } else { 4 }]
                .iter()
                .any(|name| is_set(name))
        };
        is_typed || self.data_dir.is_none() && is_set()
    }

    /// Whether the address names pools, which are then used for a trigger without a pool.
    pub(crate) fn names_pools(&self) -> bool {
        let url = self
            .url
            .clone()
            .or_else(|| match self.places(Guess::Nothing) {
                Ok(places) => places.into_iter().find_map(|place| match place {
                    Address::Url(url) => Some(url),
                    _ => None,
                }),
                Err(_) => None,
            });
        url.is_some_and(|url| url.contains("pool="))
    }
}

/// Whether a value was given explicitly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Explicit {
    Yes,
    No,
}

/// Where the server of a data directory listens.
fn of_data_dir(dir: &Path) -> Vec<Address> {
    // A server would have created the directory.
    let Ok(dir) = dir.canonicalize() else {
        return Vec::new();
    };
    let uid = rustix::process::geteuid().as_raw();
    let runtime_dir = variable("XDG_RUNTIME_DIR").map(PathBuf::from);
    let mut places: Vec<Address> = address::socket_candidates(&dir, runtime_dir.as_deref(), uid)
        .into_iter()
        .filter(|socket| socket.parent() == Some(&dir) || is_private(socket.parent(), uid))
        .map(Address::Socket)
        .collect();
    let recorded = lock::holder(&dir).and_then(|holder| holder.record);
    for address in recorded.into_iter().flat_map(|record| record.addresses) {
        let tls = address.strip_prefix("tls://");
        let place = match (
            address.strip_prefix("unix:"),
            address.strip_prefix("tcp://").or(tls),
        ) {
            (Some(path), _) => Some(Address::Socket(PathBuf::from(path))),
            (None, Some(tcp)) => tcp.rsplit_once(':').and_then(|(host, port)| {
                let host = match host.trim_matches(['[', ']']) {
                    "0.0.0.0" | "::" => HOST_DEFAULT,
                    host => host,
                };
                let (host, port) = (host.to_owned(), port.parse().ok()?);
                Some(match tls {
                    None => Address::Tcp(host, port),
                    Some(_) => Address::Tls(host, port),
                })
            }),
            (None, None) => None,
        };
        places.extend(place.filter(|place| !places.contains(place)));
    }
    places
}

/// Whether a directory is private to this user: anyone may create a name in `/tmp`.
fn is_private(dir: Option<&Path>, uid: u32) -> bool {
    dir.and_then(|dir| dir.symlink_metadata().ok())
        .is_some_and(|m| m.is_dir() && m.uid() == uid && m.mode() & 0o777 == 0o700)
}

/// The host and the port that the environment names.
fn tcp_variables() -> Result<(Option<String>, Option<u16>), Failure> {
    let port = match variable("LATZERO_PORT") {
        None => None,
        Some(text) => match text.parse::<u16>() {
            Ok(port) => Some(port),
            Err(_) => {
                let text = format!("LATZERO_PORT must be a number from 0 to 65535, not '{text}'");
                return Err(Failure::usage(text).with_help("correct the variable, or unset it"));
            }
        },
    };
    // For a server, 0 means any port, so it does not say where the server listens.
    Ok((variable("LATZERO_HOST"), port.filter(|&port| port != 0)))
}

/// The server that runs on a directory: its pid and where it listens.
fn running_on(dir: &Path) -> Option<(u32, Vec<String>)> {
    let holder = lock::holder(&dir.canonicalize().ok()?)?;
    let addresses = holder.record.map(|record| record.addresses);
    Some((holder.pid?, addresses.filter(|all| !all.is_empty())?))
}

/// The apps or pools of a server, from all pages.
///
/// # Errors
/// The server's error.
pub(crate) fn list(app: &App, request: &Value, kind: ListKind) -> Result<Vec<Value>, Error> {
    let field = match kind {
        ListKind::Apps => "apps",
        ListKind::Pools => "pools",
    };
    let mut all = Vec::new();
    let mut request = request.clone();
    loop {
        let mut page = app.request(&request)?;
        if let Some(items) = page[field].as_array_mut() {
            all.append(items);
        }
        // An empty page may not be the last: a page ends when enough was examined.
        match page["after"].take() {
            after @ Value::String(_) => request["after"] = after,
            _ => return Ok(all),
        }
    }
}

/// What is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ListKind {
    Apps,
    Pools,
}

/// A command to try, with the flags to find this server.
pub(crate) fn try_line(program: &str, options: &[String]) -> String {
    let mut words = vec![program.to_owned(), "call".to_owned()];
    words.extend(options.iter().map(|option| shell(option)));
    words.push("system/echo".to_owned());
    words.push(parse::shell("{\"x\":42}"));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_addresses() {
        let check = |place: Address, url: &str, shown: &str| {
            assert_eq!(place.url("me"), url);
            assert_eq!(place.to_string(), shown);
        };
        check(
            Address::Socket("/a b/s".into()),
            "latzero://me?socket=/a%20b/s",
            "unix:/a b/s",
        );
        check(
            Address::Tcp("::1".into(), 5),
            "latzero://me@[::1]:5",
            "tcp://[::1]:5",
        );
        check(Address::Tcp("h".into(), 5), "latzero://me@h:5", "tcp://h:5");
    }

    #[test]
    fn a_port_is_the_same_with_tls() {
        let tcp = |port| Address::Tcp("h".into(), port);
        let tls = |port| Address::Tls("h".into(), port);
        assert!(tls(5).is_port_of(&tcp(5)) && tcp(5).is_port_of(&tcp(5)));
        assert!(!tls(5).is_port_of(&tcp(6)));
        assert!(!Address::Socket("/s".into()).is_port_of(&Address::Socket("/s".into())));
    }

    #[test]
    fn flags_override_other_sources() {
        let check = |reach: ServerArgs, expected: &[Address]| {
            assert_eq!(reach.places(Guess::Port).unwrap(), expected);
        };
        let reach = ServerArgs::default();
        check(
            ServerArgs {
                port: Some(5),
                ..reach.clone()
            },
            &[Address::Tcp("127.0.0.1".into(), 5)],
        );
        check(
            ServerArgs {
                socket: Some("/s".into()),
                ..reach.clone()
            },
            &[Address::Socket("/s".into())],
        );
        check(
            ServerArgs {
                url: Some("latzero://x".into()),
                ..reach.clone()
            },
            &[Address::Url("latzero://x".into())],
        );
        // A directory that is named and has no server is not replaced by another server.
        check(
            ServerArgs {
                data_dir: Some("/nowhere".into()),
                ..reach
            },
            &[],
        );
    }

    #[test]
    fn the_line_to_try_is_one_for_a_shell() {
        let options = ["--data-dir".to_owned(), "/a b".to_owned()];
        assert_eq!(
            try_line("target/release/latzero", &options),
            r#"target/release/latzero call --data-dir '/a b' system/echo '{"x":42}'"#
        );
    }
}
