//! State shared by the loops, in groups.
//!
//! Lock order: built-in app, registry, pool, outbox. The timers, the statistics, the hand-over, and
//! the table and ledger of blocks are leaves. No lock here is held during IO.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use latzero_fabric::driver::Context;
use latzero_fabric::ledger::{Account, Ledger};
use latzero_fabric::outbox::Bounds;
use latzero_fabric::{Registry, Time};

use crate::attempts::Attempts;
use crate::audit::AuditLog;
use crate::blocks::Blocks;
use crate::builtin::BuiltIn;
use crate::clock::Clock;
use crate::handover::Handover;
use crate::host::IoHost;
use crate::listener::Unauthenticated;
use crate::machine_limits::{Derived, InForce, MachineLimits};
use crate::mailbox::{Command, Mailbox};
use crate::peer::Peer;
use crate::persistence::Persistence;
use crate::proofs::Verifier;
use crate::settings::Settings;
use crate::socket::Socket;
use crate::startup::token::AdminToken;
use crate::stats::Stats;
use crate::timers::Timers;
use crate::tls::Tls;

/// The server's addresses and identity, for `status` and the logs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Identity {
    pub(crate) node: String,
    pub(crate) addresses: Vec<String>,
    pub(crate) data_dir: String,
}

/// Reloads the settings; returns what it did as JSON text, or what is wrong with them.
pub(crate) type Reload = dyn Fn(&ServerState) -> Result<String, String> + Send + Sync;

/// What the operator decided, and what the machine allows.
pub(crate) struct Config {
    pub(crate) settings: Mutex<Arc<Settings>>,
    pub(crate) reload: Box<Reload>,
    pub(crate) machine: MachineLimits,
    /// Limits whose value in force differs from the setting.
    pub(crate) derived: Vec<Derived>,
    pub(crate) read_budget: usize,
    pub(crate) identity: Identity,
}

/// Who gets in: TLS, proofs, and connections before their handshake.
pub(crate) struct Access {
    pub(crate) token: AdminToken,
    /// The TLS configuration of the TCP port.
    pub(crate) tls: Option<Tls>,
    pub(crate) verifier: Verifier,
    /// Refused proofs by user.
    attempts: Mutex<Attempts>,
    /// Counts the connections, and those without a handshake, of all loops.
    unauthenticated: Mutex<Unauthenticated>,
}

/// The core, as far as it belongs to no single loop.
pub(crate) struct Core {
    pub(crate) context: Arc<Context>,
    pub(crate) registry: Mutex<Registry<IoHost>>,
    /// When pools have to be called.
    pub(crate) timers: Timers,
    pub(crate) builtin: Mutex<Option<BuiltIn>>,
    next_peer: AtomicU64,
}

/// The memory of blocks, and the database.
pub(crate) struct Storage {
    pub(crate) blocks: Blocks,
    pub(crate) persistence: Persistence,
    /// A backup or database check is running.
    pub(crate) is_in_upkeep: AtomicBool,
}

/// What the server records about itself.
pub(crate) struct Books {
    pub(crate) started: Time,
    pub(crate) stats: Stats,
    pub(crate) audit_log: AuditLog,
    pub(crate) log_lines_lost: Box<dyn Fn() -> u64 + Send + Sync>,
}

/// How to reach the loops, and how they end.
pub(crate) struct Loops {
    pub(crate) mailboxes: Vec<Mailbox>,
    /// The state of a hand-over.
    pub(crate) handover: Handover,
    /// Set when all loops must end at once.
    pub(crate) is_over: AtomicBool,
    /// How many connections without a handshake wait to be read, or for the loop that reads them.
    pub(crate) unread: AtomicUsize,
}

/// The state that the loops share.
pub(crate) struct ServerState {
    pub(crate) clock: Clock,
    pub(crate) config: Config,
    pub(crate) access: Access,
    pub(crate) core: Core,
    pub(crate) storage: Storage,
    pub(crate) books: Books,
    pub(crate) loops: Loops,
}

/// The parts of a server.
pub(crate) struct Parts {
    pub(crate) settings: Settings,
    pub(crate) identity: Identity,
    pub(crate) token: AdminToken,
    pub(crate) tls: Option<Tls>,
    pub(crate) verifier: Verifier,
    pub(crate) seed: u64,
    pub(crate) blocks: Blocks,
    pub(crate) keeper: Persistence,
    pub(crate) audit_log: AuditLog,
    pub(crate) reload: Box<Reload>,
    pub(crate) log_lines_lost: Box<dyn Fn() -> u64 + Send + Sync>,
}

impl ServerState {
    pub(crate) fn attempts(&self) -> MutexGuard<'_, Attempts> {
        self.access
            .attempts
            .lock()
            .expect("no thread panics while holding this lock")
    }

    pub(crate) fn new(parts: Parts) -> Arc<ServerState> {
        let Parts {
            settings,
            identity,
            token,
            tls,
            verifier,
            seed,
            blocks,
            keeper,
            audit_log,
            reload,
            log_lines_lost,
        } = parts;
        let clock = Clock::new();
        let started = clock.now();
        let surroundings = MachineLimits::of_process();
        let InForce { limits, derived } = surroundings.in_force(&settings.limits);
        if limits.connections_max < settings.limits.connections_max
            || limits.blocks_max < settings.limits.blocks_max
        {
            tracing::warn!(
                connections_max = limits.connections_max,
                blocks_max = limits.blocks_max,
                "the descriptor limit is too low for the connections and blocks that the \
                 settings allow; raise it with `ulimit -n`"
            );
        }
        let mailboxes = (0..settings.io_threads.max(1))
            .map(|_| Mailbox::new())
            .collect();
        let context = Arc::new(Context {
            ledger: Ledger::new(&limits),
            outbox: Bounds {
                bytes_max: settings.limits.outbox_bytes_max,
                headroom: settings.limits.outbox_headroom_bytes,
            },
            version: env!("CARGO_PKG_VERSION"),
            node: identity.node.clone(),
            instance: crate::random::bytes(),
            secret: keeper.pool_secret(),
            admin_over_plain_tcp: settings.admin_over_plain_tcp,
            require_channel_binding: settings.require_channel_binding,
            allow_pidns: settings.allow_pidns,
            is_draining: AtomicBool::new(false),
            limits: limits.clone(),
        });
        let shared = Arc::new(ServerState {
            core: Core {
                context,
                registry: Mutex::new(Registry::new(clock.unix_ms(started), limits, seed)),
                timers: Timers::default(),
                builtin: Mutex::new(None),
                next_peer: AtomicU64::new(0),
            },
            config: Config {
                read_budget: settings.limits.read_budget_bytes,
                settings: Mutex::new(Arc::new(settings)),
                reload,
                machine: surroundings,
                derived,
                identity,
            },
            access: Access {
                token,
                tls,
                verifier,
                attempts: Mutex::default(),
                unauthenticated: Mutex::new(Unauthenticated::default()),
            },
            storage: Storage {
                blocks,
                persistence: keeper,
                is_in_upkeep: AtomicBool::new(false),
            },
            books: Books {
                started,
                stats: Stats::new(),
                audit_log,
                log_lines_lost,
            },
            loops: Loops {
                mailboxes,
                handover: Handover::default(),
                is_over: AtomicBool::new(false),
                unread: AtomicUsize::new(0),
            },
            clock,
        });
        shared.storage.persistence.attach(&shared);
        shared
    }

    pub(crate) fn unauthenticated(&self) -> MutexGuard<'_, Unauthenticated> {
        self.access
            .unauthenticated
            .lock()
            .expect("no panic happens in the handshake")
    }

    pub(crate) fn settings(&self) -> Arc<Settings> {
        Arc::clone(
            &self
                .config
                .settings
                .lock()
                .expect("no panic happens under the settings' lock"),
        )
    }

    /// A connection of a user, with the user's account.
    pub(crate) fn new_peer(&self, socket: Option<Socket>, user: &Arc<Account>) -> Arc<Peer> {
        let id = self.core.next_peer.fetch_add(1, Relaxed);
        let home = match socket {
            Some(_) => usize::try_from(id).unwrap_or(0) % self.loops.mailboxes.len(),
            None => 0,
        };
        Peer::new(home, socket, self.core.context.ledger.connection(user))
    }

    /// Starts to drain: no new calls and connections; the loops end when the last call has ended.
    /// False if it is already draining.
    pub(crate) fn drain(&self) -> bool {
        let is_first = !self.core.context.is_draining.swap(true, Relaxed);
        if is_first {
            self.wake_all();
        }
        is_first
    }

    pub(crate) fn wake_all(&self) {
        for mailbox in &self.loops.mailboxes {
            mailbox.send(Command::Look);
        }
    }

    /// Makes every loop check the liveness of its connections.
    pub(crate) fn check_all_liveness(&self) {
        for mailbox in &self.loops.mailboxes {
            mailbox.send(Command::Judge);
        }
    }
}
