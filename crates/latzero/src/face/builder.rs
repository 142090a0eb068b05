//! Connecting an app.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::task::{Poll, Waker};
use std::time::Duration;

use latzero_protocol::{Code, PoolName, Ran};
use serde_json::Value;

use crate::config::{Config, HANDLER_THREADS, Reconnect};
use crate::drive::core::Core;
use crate::drive::outside::Driver;
use crate::error::Error;
use crate::face::app::App;
use crate::face::block::Blocks;
use crate::keys::{AppKey, Keys};
use crate::sync::{lock, set_waker};
use crate::url::Url;

/// An app that is about to connect; created by [`App::builder`].
#[derive(Debug, Clone)]
pub struct Builder {
    config: Result<Config, Error>,
}

impl Builder {
    pub(crate) fn new(url: &str) -> Self {
        Builder {
            config: Url::parse(url).and_then(|url| {
                let app_key = url.app_key.as_ref().map(AppKey::from_file).transpose()?;
                let keys = url
                    .keys
                    .iter()
                    .map(|(pool, path)| Keys::from_file(path).map(|keys| (pool.clone(), keys)));
                let keys = keys.collect::<Result<Vec<_>, _>>()?;
                let keys = of_environment(&url, keys)?;
                Ok(Config {
                    unbound: url.unbound,
                    state_dir: None,
                    app_key,
                    keys,
                    url,
                    exclusive: false,
                    takeover: false,
                    rehydrate: false,
                    hold_answers: false,
                    transient: false,
                    meta: None,
                    reconnect: Reconnect::default(),
                    handler_threads: HANDLER_THREADS,
                    connect_timeout: Duration::from_secs(5),
                    call_timeout: Duration::from_millis(latzero_protocol::limits::TTL_DEFAULT_MS),
                })
            }),
        }
    }

    fn with(mut self, change: impl FnOnce(&mut Config)) -> Self {
        if let Ok(config) = &mut self.config {
            change(config);
        }
        self
    }

    /// Connect only if no other instance of the app is connected, and prevent others while this one
    /// is.
    #[must_use]
    pub fn exclusive(self, exclusive: bool) -> Self {
        self.with(|config| config.exclusive = exclusive)
    }

    /// Displace other instances of the app.
    #[must_use]
    pub fn takeover(self, takeover: bool) -> Self {
        self.with(|config| config.takeover = takeover)
    }

    /// Use the pools and triggers that the server remembers for this AppID, instead of naming any.
    /// A remembered trigger gets calls and emits once it is served again; until then, parked calls
    /// wait.
    #[must_use]
    pub fn rehydrate(self, rehydrate: bool) -> Self {
        self.with(|config| config.rehydrate = rehydrate)
    }

    /// Do not let the server remember the app after its last instance has disconnected: for
    /// short-lived tools.
    #[must_use]
    pub fn transient(self, transient: bool) -> Self {
        self.with(|config| config.transient = transient)
    }

    /// Leave answers to parked calls at the server, for another instance of the app: for programs
    /// that do not read [`App::answers`](crate::App::answers). An instance that holds answers does
    /// not even get those to calls that it parked itself.
    #[must_use]
    pub fn hold_answers(self, hold_answers: bool) -> Self {
        self.with(|config| config.hold_answers = hold_answers)
    }

    /// The app's metadata, shown in listings of apps: a JSON object.
    #[must_use]
    pub fn meta(self, meta: Value) -> Self {
        self.with(|config| config.meta = Some(meta))
    }

    /// Proves the app's identity with its key. The first proof binds the key to the AppID; from
    /// then on nobody can use the AppID without the key.
    #[must_use]
    pub fn app_key(self, key: AppKey) -> Self {
        self.with(|config| config.app_key = Some(key))
    }

    /// Joins an encrypted pool, with the roles that these keys prove. A pool of that name that is
    /// not encrypted, or not with these keys, is refused.
    #[must_use]
    pub fn keys(self, pool: &str, keys: Keys) -> Self {
        let Ok(pool) = PoolName::new(pool) else {
            return self.pools([pool]);
        };
        self.with(|config| {
            config.keys.retain(|(known, _)| *known != pool);
            config.keys.push((pool, keys));
        })
    }

    /// The directory that stores the accepted state of encrypted pools, so that an older state is
    /// detected [default: latzero/pools in `XDG_STATE_HOME`, else `~/.local/state`].
    #[must_use]
    pub fn state_dir(self, path: impl Into<PathBuf>) -> Self {
        self.with(|config| config.state_dir = Some(path.into()))
    }

    /// Sends proofs over plain TCP too, where they are not bound to the connection: another program
    /// that listens on the server's port could forward them.
    #[must_use]
    pub fn unbound(self, unbound: bool) -> Self {
        self.with(|config| config.unbound = unbound)
    }

    /// Joins further pools.
    #[must_use]
    pub fn pools<P: AsRef<str>>(mut self, pools: impl IntoIterator<Item = P>) -> Self {
        let Ok(config) = &mut self.config else {
            return self;
        };
        for pool in pools {
            match PoolName::new(pool.as_ref()) {
                Ok(pool) if config.url.pools.contains(&pool) => {}
                Ok(pool) => config.url.pools.push(pool),
                Err(e) => {
                    self.config = Err(Error::new(Code::InvalidName, e.to_string()));
                    return self;
                }
            }
        }
        self
    }

    /// Whether and how to reconnect after the connection was lost.
    #[must_use]
    pub fn reconnect(self, reconnect: Reconnect) -> Self {
        self.with(|config| config.reconnect = reconnect)
    }

    /// How many threads run blocking handlers at most (default 16). A handler that waits for the
    /// answer to its own call does not count.
    #[must_use]
    pub fn handler_threads(self, threads: usize) -> Self {
        self.with(|config| config.handler_threads = threads)
    }

    /// How long connecting may take (default 5 s).
    #[must_use]
    pub fn connect_timeout(self, timeout: Duration) -> Self {
        self.with(|config| config.connect_timeout = timeout)
    }

    /// How long calls may take by default (30 s).
    #[must_use]
    pub fn call_timeout(self, timeout: Duration) -> Self {
        self.with(|config| config.call_timeout = timeout)
    }

    /// Connects. On a tokio runtime a task there drives the app, elsewhere a background thread.
    ///
    /// # Errors
    /// If the address is wrong, no server answers, or it refuses the handshake.
    pub async fn connect(self) -> Result<App, Error> {
        let config = self.config?;
        // Resolving names and connecting sockets block, so a thread does it.
        let core = on_thread(move || Core::connect(config, Box::<Blocks>::default())).await?;
        core.start(true)?;
        Ok(App::owning(core))
    }

    /// Connects an app that an event loop of the program drives, without other threads; see
    /// [`Driver`].
    ///
    /// # Errors
    /// As [`Builder::connect`].
    pub async fn connect_driven(self) -> Result<(App, Driver), Error> {
        let config = self.config?;
        let connect = move || Core::connect(config, Box::<Blocks>::default());
        let core = on_thread(connect).await?;
        let driver = Driver::new(&core)?;
        Ok((App::owning(core), driver))
    }

    pub(crate) fn connect_blocking(self) -> Result<App, Error> {
        let core = Core::connect(self.config?, Box::<Blocks>::default())?;
        core.start(false)?;
        Ok(App::owning(core))
    }
}

/// Adds the keys from the environment for the one pool that is named, if the address has no keys
/// for it.
fn of_environment(
    url: &Url,
    mut keys: Vec<(PoolName, Keys)>,
) -> Result<Vec<(PoolName, Keys)>, Error> {
    let [pool] = &url.pools[..] else {
        return Ok(keys);
    };
    if keys.is_empty() {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let found = match (variable("LATZERO_KEY_FILE"), variable("LATZERO_KEYS")) {
            (Some(path), _) => Some(Keys::from_file(path)?),
            (None, Some(tokens)) => Some(Keys::from_tokens(tokens.split(' '))?),
            (None, None) => None,
        };
        keys.extend(found.map(|found| (pool.clone(), found)));
    }
    Ok(keys)
}

/// Runs `work` on a new thread.
pub(crate) async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let place = Arc::new(Mutex::new((None, None::<Waker>)));
    let theirs = place.clone();
    let spawned = std::thread::Builder::new()
        .name("latzero-connect".into())
        .spawn(move || {
            let result = work();
            let waker = {
                let mut place = lock(&theirs);
                place.0 = Some(result);
                place.1.take()
            };
            if let Some(waker) = waker {
                waker.wake();
            }
        });
    spawned.map_err(|e| {
        Error::new(Code::Internal, "cannot start a thread to connect")
            .with_ran(Ran::No)
            .with_source(e)
    })?;
    let wait = std::future::poll_fn(move |cx| {
        let mut place = lock(&place);
        if let Some(result) = place.0.take() {
            return Poll::Ready(result);
        }
        set_waker(&mut place.1, cx.waker());
        Poll::Pending
    });
    wait.await
}
