//! Runs a server from its settings to its end: bind, run, drain.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;

use crate::audit::AuditLog;
use crate::blocks::{Blocks, Rows};
use crate::event_loop::{EventLoop, Front};
use crate::handover::{self, Inherited};
use crate::listener::Listener;
use crate::logging::{LogError, LogOptions, Logs};
use crate::machine_limits::survive_file_size_limit;
use crate::persistence::Persistence;
use crate::proofs::Verifier;
use crate::settings::{Environment, Override, Resolved, SettingsErrors, load};
use crate::shared::{Identity, Parts, ServerState};
use crate::startup::data_dir::DataDir;
use crate::startup::lock::InstanceLock;
use crate::startup::sockets::SocketFile;
use crate::startup::systemd::{Activation, Notifier, watchdog_interval};
use crate::startup::{StartupError, prepare};
use crate::tls::Tls;
use crate::watch::Watch;

/// How often to report the progress of writing blocks to disk.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// By how much the service manager is asked to extend its timeout, each time that there is
/// progress.
const EXTENSION: Duration = Duration::from_secs(30);

/// The sources of a server's settings, so that it can reload them.
#[derive(Debug, Clone, Default)]
pub struct Origins {
    /// The environment.
    pub environment: Environment,
    /// The settings on the command line.
    pub overrides: Vec<Override>,
    /// The file that the command line names instead of those in the data directory.
    pub file: Option<PathBuf>,
    /// Take over from the server that runs on the data directory, if there is one.
    pub takes_over: bool,
}

impl Origins {
    /// Reads the settings.
    ///
    /// # Errors
    /// Every invalid setting, with its source.
    pub fn load(&self) -> Result<Resolved, SettingsErrors> {
        load(&self.environment, &self.overrides, self.file.as_deref())
    }
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The settings are invalid.
    #[error(transparent)]
    Settings(#[from] SettingsErrors),
    /// A step of the start failed.
    #[error(transparent)]
    Startup(#[from] StartupError),
    /// The log cannot be started.
    #[error(transparent)]
    Logs(#[from] LogError),
    /// The kernel refused a resource that the loops need.
    #[error("cannot set up the event loop: {0}")]
    Loop(#[source] io::Error),
}

impl ServerError {
    /// The exit code of a program that ends with this error.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            ServerError::Settings(_) => crate::settings::EXIT_SETTINGS,
            ServerError::Startup(error) => error.exit_code(),
            ServerError::Logs(_) | ServerError::Loop(_) => 1,
        }
    }
}

/// A server that listens and is about to run.
pub struct Server {
    shared: Arc<ServerState>,
    loops: Vec<EventLoop>,
    notifier: Option<Notifier>,
    signals: Signals,
    logs: Arc<Logs>,
    // Dropped last, in this order: the sockets' files, then the lock that guards them.
    files: Vec<SocketFile>,
    _data_dir: DataDir,
    lock: Arc<Mutex<InstanceLock>>,
    /// Whether the previous server left its blocks to be written to disk.
    takes_over: bool,
}

impl Server {
    /// Takes the data directory, the lock and the sockets, and sets up the loops. Connections wait
    /// from here on.
    ///
    /// # Errors
    /// The first step that fails; everything is released.
    pub fn bind(origins: Origins) -> Result<Server, ServerError> {
        survive_file_size_limit().map_err(ServerError::Loop)?;
        let resolved = origins.load()?;
        resolved.check_available()?;
        let settings = resolved.settings.clone();
        let environment = origins.environment.clone();
        let activation = Activation::of_process(&environment)?;
        let inherited = if origins.takes_over {
            handover::ask(&settings, &environment, activation)?
        } else {
            Inherited::nothing(activation)
        };
        let Inherited {
            sockets,
            blocks: given_blocks,
            lock,
            before,
        } = inherited;
        // A write beyond the limit on file sizes is to fail, and not to end the server
        // (setrlimit(2)).
        let beyond = Arc::new(std::sync::atomic::AtomicBool::new(false));
        signal_hook::flag::register(SIGXFSZ, beyond).map_err(ServerError::Loop)?;
        let started = prepare(&settings, &environment, sockets, lock)?;
        let logs = Arc::new(Logs::begin(
            &LogOptions::new(&settings, &environment),
            &started.data_dir.logs(),
        )?);
        before.log();
        let takes_over = before.is_handed_over();
        let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(ServerError::Loop)?;
        let notifier = || match Notifier::new(&environment) {
            Ok(notifier) => notifier,
            Err(error) => {
                tracing::warn!(%error, "cannot reach the service manager");
                None
            }
        };

        let scheme = if settings.enable_tls { "tls" } else { "tcp" };
        let mut addresses: Vec<String> = started
            .tcp_addresses()
            .iter()
            .map(|a| format!("{scheme}://{a}"))
            .collect();
        addresses.extend(
            started
                .unix
                .iter()
                .map(|s| format!("unix:{}", s.file.path().display())),
        );
        started.lock.record(&addresses);
        let identity = Identity {
            node: rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            addresses,
            data_dir: started.data_dir.path().display().to_string(),
        };
        let tls = Tls::load(&settings, started.data_dir.path())?;
        let addresses = started.tcp_addresses();
        if tls.is_none() && addresses.iter().any(|a| !a.ip().is_loopback()) {
            tracing::warn!(
                "the server is reachable from other machines without TLS; anyone who connects \
                 can use any AppID"
            );
        }
        let keeper = Persistence::open(started.data_dir.path(), &settings)?;
        let directory = started.data_dir.path().join("memory");
        let rows = Rows::new(keeper.store().clone(), keeper.boot_id());
        let blocks = Blocks::new(&directory, rows).map_err(|source| {
            ServerError::Startup(StartupError::System {
                action: "opening",
                path: directory,
                source,
            })
        })?;
        let audit_log = AuditLog::open(&started.data_dir.logs(), &settings)?;
        let lost = Arc::clone(&logs);
        let shared = ServerState::new(Parts {
            identity,
            token: started.token,
            tls,
            verifier: Verifier::new().map_err(ServerError::Loop)?,
            seed: seed(),
            reload: reload(origins, resolved, Arc::clone(&logs)),
            log_lines_lost: Box::new(move || {
                let lost = lost.lost();
                lost.stderr + lost.file
            }),
            blocks,
            keeper,
            audit_log,
            settings,
        });
        let mut listeners: Vec<Listener> = started.tcp.into_iter().map(Listener::Tcp).collect();
        let (mut files, mut passed) = (Vec::new(), Vec::new());
        for bound in started.unix {
            listeners.push(Listener::Unix(bound.listener));
            if bound.file.is_foreign() {
                passed.push(bound.file.path().to_owned());
            }
            files.push(bound.file);
        }
        let front = Front {
            listeners,
            passed,
            spare: started.spare,
            notifier: notifier(),
            watchdog: watchdog_interval(&environment),
        };
        let mut loops = vec![EventLoop::new(&shared, 0, Some(front)).map_err(ServerError::Loop)?];
        loops[0].take_over(given_blocks);
        for index in 1..shared.loops.mailboxes.len() {
            loops.push(EventLoop::new(&shared, index, None).map_err(ServerError::Loop)?);
        }
        Ok(Server {
            shared,
            loops,
            notifier: notifier(),
            signals,
            logs,
            files,
            _data_dir: started.data_dir,
            lock: Arc::new(Mutex::new(started.lock)),
            takes_over,
        })
    }

    /// The pin of the TLS port, if there is one.
    #[must_use]
    pub fn pin(&self) -> Option<String> {
        self.shared
            .access
            .tls
            .as_ref()
            .map(|tls| tls.pin().to_string())
    }

    /// Where the server listens: `tcp://HOST:PORT`, or `tls://HOST:PORT`, and `unix:PATH`.
    #[must_use]
    pub fn addresses(&self) -> &[String] {
        &self.shared.config.identity.addresses
    }

    /// The data directory.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        Path::new(&self.shared.config.identity.data_dir)
    }

    /// Runs until a signal or an administrator ends it. `SIGTERM` and `SIGINT` drain, and a second
    /// one ends it at once; `SIGHUP` reloads the settings.
    ///
    /// # Errors
    /// If the kernel's poll fails.
    pub fn run(mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let mut signals = self.signals;
        let handle = signals.handle();
        let by_signal = Arc::clone(&self.shared);
        let watcher = std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                let asked = AtomicU32::new(0);
                for signal in signals.forever() {
                    match signal {
                        SIGHUP => match (by_signal.config.reload)(&by_signal) {
                            Ok(done) => tracing::info!(%done, "settings reloaded"),
                            Err(error) => {
                                tracing::error!(%error, "the new settings are invalid; the \
                                    current ones stay in force")
                            }
                        },
                        _ if asked.fetch_add(1, Relaxed) == 0 => {
                            tracing::info!("stopping: received a signal");
                            by_signal.drain();
                        }
                        _ => {
                            tracing::warn!("stopping at once: received a second signal");
                            std::process::exit(1);
                        }
                    }
                }
            })?;
        if let Some(notifier) = &self.notifier
            && let Err(error) = notifier.notify("READY=1")
        {
            tracing::warn!(%error, "cannot notify the service manager that the server is ready");
        }
        let version = env!("CARGO_PKG_VERSION");
        let pin = shared.access.tls.as_ref().map(|tls| tls.pin().to_string());
        tracing::info!(addresses = ?shared.config.identity.addresses, pin, version, "ready");
        let watch = Watch::begin(&shared, &self.lock)?;
        if self.takes_over {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("flush".into())
                .spawn(move || shared.storage.blocks.sync_all(Progress::new(None).report()))?;
        }
        let first = self.loops.remove(0);
        let mut others = Vec::new();
        for (i, event_loop) in self.loops.drain(..).enumerate() {
            let together = Together(Arc::clone(&shared));
            let run = move || {
                let _together = together;
                event_loop.run()
            };
            others.push(
                std::thread::Builder::new()
                    .name(format!("io-{}", i + 1))
                    .spawn(run)?,
            );
        }
        let together = Together(Arc::clone(&shared));
        let mut result = first.run();
        drop(together);
        for other in others {
            let ended = other
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a loop panicked")));
            result = result.and(ended);
        }
        drop(watch);
        shared.storage.blocks.end_writes();
        // The server that takes over has the same files and flushes them itself, so nothing waits
        // for that.
        if !shared.loops.handover.is_taken() {
            shared
                .storage
                .blocks
                .sync_all(Progress::new(self.notifier.as_ref()).report());
        }
        shared.storage.persistence.close();
        if shared.loops.handover.is_taken() {
            // They are in use.
            std::mem::forget(std::mem::take(&mut self.files));
        }
        handle.close();
        let _ = watcher.join();
        tracing::info!("stopped");
        self.logs.flush();
        result
    }
}

/// Reports the progress of writing blocks to disk, if that takes long.
struct Progress<'n> {
    notifier: Option<&'n Notifier>,
    since: Instant,
    reported: Instant,
}

impl<'n> Progress<'n> {
    fn new(notifier: Option<&'n Notifier>) -> Progress<'n> {
        let now = Instant::now();
        Progress {
            notifier,
            since: now,
            reported: now,
        }
    }

    fn report(mut self) -> impl FnMut(usize, usize) {
        move |done, of| {
            if self.reported.elapsed() < TELL_EVERY {
                return;
            }
            self.reported = Instant::now();
            let seconds = self.since.elapsed().as_secs();
            tracing::info!(done, of, seconds, "writing persistent blocks to disk");
            if let Some(notifier) = self.notifier {
                // The service manager waits on for as long as there is progress (sd_notify(3)).
                let state = format!(
                    "STATUS=Writing blocks to disk: {done} of {of}\nEXTEND_TIMEOUT_USEC={}",
                    EXTENSION.as_micros()
                );
                let _ = notifier.notify(&state);
            }
        }
    }
}

/// Ends all loops if one ends without a drain, by an error or a bug: the connections of an ended
/// loop would hang.
struct Together(Arc<ServerState>);

impl Drop for Together {
    fn drop(&mut self) {
        if !self.0.core.context.is_draining() {
            self.0.loops.is_over.store(true, Relaxed);
            self.0.wake_all();
        }
    }
}

/// Sixty-four bits that differ at each start, as the seed of random choices. They are not used for
/// secrets.
fn seed() -> u64 {
    u64::from_le_bytes(crate::random::bytes())
}

/// Reloads the settings and applies those that can change.
fn reload(origins: Origins, resolved: Resolved, logs: Arc<Logs>) -> Box<crate::shared::Reload> {
    let current = std::sync::Mutex::new(resolved);
    Box::new(move |shared| {
        let fresh = origins.load().map_err(|errors| errors.to_string())?;
        let mut current = current
            .lock()
            .expect("no panic happens while settings are read");
        let (merged, mut done) = current.reload(&fresh);
        if let Some(tls) = &shared.access.tls {
            // Before anything else is applied: if it fails, nothing has changed.
            let dir = Path::new(&shared.config.identity.data_dir);
            let pin = tls.reload(&merged.settings, dir);
            done.pin = Some(pin.map_err(|error| error.to_string())?.to_string());
        }
        logs.apply(&merged.settings);
        *shared
            .config
            .settings
            .lock()
            .expect("no panic happens under the settings' lock") =
            Arc::new(merged.settings.clone());
        *current = merged;
        shared.check_all_liveness();
        serde_json::to_string(&done).map_err(|error| error.to_string())
    })
}
