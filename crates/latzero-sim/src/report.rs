//! Runs a simulation from a seed, and reports its result.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use latzero_fabric::Limits;

use crate::check::Checker;
use crate::durable::DurableScript;
use crate::hostile::Hostile;
use crate::line::{Bounds, Event, Totals};
use crate::script::Script;
use crate::vault::Vault;
use crate::world::World;

/// The subject of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Theme {
    /// Calls, emits, pools and presence, by rude clients.
    Calls,
    /// Calls that outlive connections and servers, by clients that connect and leave.
    Durable,
    /// Strangers that try to exhaust the server, next to a well-behaved pair.
    Hostile,
    /// An encrypted pool, among apps with all of its keys, some, old ones or wrong ones.
    Vault,
}

/// Clients with a script, and a model of what they may expect.
pub(crate) trait Scenario {
    /// Performs one step; returns its description.
    fn step(&mut self, world: &mut World) -> String;

    /// Checks what happened against the model.
    fn check(&mut self, log: &[Event], world: &World) -> Result<(), String>;

    /// Performs step `at` after the last one of the script; `None` if everything is done.
    fn end(&mut self, at: u32, world: &mut World) -> Result<Option<String>, String>;

    /// Checks the state that remains after that.
    fn at_end(&self, world: &World) -> Result<(), String>;

    /// What of it happened, and how often.
    fn reached(&self) -> Reached {
        Reached::new()
    }
}

/// What a run reached, by name, and how often.
pub type Reached = BTreeMap<&'static str, u64>;

/// The parameters of a run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The seed, which determines everything.
    pub seed: u64,
    /// The subject.
    pub theme: Theme,
    /// The number of steps.
    pub steps: u32,
    /// The number of clients.
    pub clients: usize,
    /// The core's limits: small, so that runs reach them.
    pub limits: Limits,
    /// The sizes of the outboxes.
    pub bounds: Bounds,
}

/// The default number of steps.
pub const STEPS_DEFAULT: u32 = 2000;

/// Steps of a run with calls that outlive connections; each step takes longer.
const LASTING_STEPS: u32 = 300;

/// Steps of a run with an encrypted pool.
const VAULT_STEPS: u32 = 1000;

/// The number of clients.
const CLIENTS: usize = 20;

/// How many steps are shown of a run that failed.
const SHOWN: usize = 30;

impl Plan {
    /// A run of `seed` about calls that outlive connections and servers.
    #[must_use]
    pub fn durable(seed: u64) -> Self {
        Plan {
            theme: Theme::Durable,
            steps: LASTING_STEPS,
            limits: Limits {
                in_flight_max: [1024, 6][(seed % 2) as usize],
                parked_max: [100_000, 25][(seed / 2 % 2) as usize],
                parked_per_app_max: [50_000, 8][(seed / 4 % 2) as usize],
                repeats_max: [10_000, 4][(seed / 8 % 2) as usize],
                ..Limits::default()
            },
            bounds: Bounds {
                outbox_bytes: [1024, 64][(seed % 3 / 2) as usize] * 1024,
                headroom_bytes: 64 * 1024,
                // Data in a socket's buffer is lost when its client dies; the checker does not
                // model such a loss.
                socket_bytes: 0,
            },
            ..Plan::new(seed)
        }
    }

    /// A run of `seed` with hostile strangers, on a server with small limits.
    #[must_use]
    pub fn hostile(seed: u64) -> Self {
        Plan {
            theme: Theme::Hostile,
            steps: LASTING_STEPS,
            limits: Limits {
                memory_max: [256, 1024][(seed % 2) as usize] * 1024,
                outbox_total_bytes_max: [64, 256][(seed / 2 % 2) as usize] * 1024,
                max_frame: 16 * 1024,
                in_flight_max: 32,
                in_flight_per_handler_max: 16,
                pending_max: 64,
                apps_max: 40,
                pools_max: 40,
                parked_max: 50,
                parked_bytes_max: 128 * 1024,
                repeats_bytes_max: 32 * 1024,
                served_per_app_max: 64,
                blocks_max: 20,
                memory_bytes_max: 256 * 1024,
                ..Limits::default()
            },
            bounds: Bounds {
                outbox_bytes: 16 * 1024,
                headroom_bytes: 16 * 1024,
                socket_bytes: 4096,
            },
            ..Plan::new(seed)
        }
    }

    /// A run of `seed` with an encrypted pool.
    #[must_use]
    pub fn vault(seed: u64) -> Self {
        Plan {
            theme: Theme::Vault,
            steps: VAULT_STEPS,
            limits: Limits::default(),
            bounds: Bounds::default(),
            ..Plan::new(seed)
        }
    }

    /// The usual run of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Plan {
            seed,
            theme: Theme::Calls,
            steps: STEPS_DEFAULT,
            clients: CLIENTS,
            limits: Limits {
                in_flight_max: 1 + (seed % 5) as u32 * 3,
                pending_max: 8 + (seed % 7) as usize * 8,
                ..Limits::default()
            },
            bounds: Bounds {
                outbox_bytes: [2, 4, 16][(seed % 3) as usize] * 1024,
                headroom_bytes: [3, 6][(seed % 2) as usize] * 1024,
                socket_bytes: [0, 512, 4096][(seed / 6 % 3) as usize],
            },
        }
    }
}

/// The result of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// Steps run.
    pub steps: u32,
    /// A hash of everything that was sent: equal for equal plans.
    pub hash: u64,
    /// Totals.
    pub totals: Totals,
    /// What of its theme it reached.
    pub reached: Reached,
}

impl Outcome {
    /// The outcome as JSON.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let t = &self.totals;
        serde_json::json!({
            "seed": self.seed, "steps": self.steps, "hash": format!("{:016x}", self.hash),
            "frames": t.frames,
            "calls": t.calls_started, "timeouts": t.timeouts, "refusals": t.refusals,
            "lost": t.lost,
            "overflowed": t.overflowed, "reached": self.reached,
        })
    }
}

/// A run in which a check failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The seed.
    pub seed: u64,
    /// The subject of the run.
    pub theme: Theme,
    /// The step at which the check failed.
    pub step: u32,
    /// What failed.
    pub what: String,
    /// The last steps, as text.
    pub trace: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.trace {
            writeln!(f, "{line}")?;
        }
        writeln!(f, "seed {}, step {}: {}", self.seed, self.step, self.what)?;
        let theme = match self.theme {
            Theme::Calls => "",
            Theme::Durable => " --durable",
            Theme::Hostile => " --hostile",
            Theme::Vault => " --vault",
        };
        write!(
            f,
            "replay with: cargo xtask sim{theme} --seed {}",
            self.seed
        )
    }
}

impl std::error::Error for Violation {}

/// Runs a plan to its end, with every check after every step.
///
/// # Errors
/// The first check that failed.
pub fn run(plan: &Plan) -> Result<Outcome, Violation> {
    let scenario: Box<dyn Scenario> = match plan.theme {
        Theme::Calls => Box::new(Calls::new(plan.seed, plan.clients)),
        Theme::Durable => Box::new(DurableScript::new(plan.seed)),
        Theme::Hostile => Box::new(Hostile::new(plan.seed)),
        Theme::Vault => Box::new(Vault::new(plan.seed)),
    };
    let mut run = Run {
        world: World::new(plan.seed, plan.limits.clone(), plan.bounds),
        scenario,
        recent: VecDeque::new(),
    };
    let mut step = 0;
    // A broken invariant of the fabric is a panic; catching it preserves the trace.
    let ended = catch_unwind(AssertUnwindSafe(|| {
        while step < plan.steps {
            step += 1;
            run.step()?;
        }
        step += 1;
        run.finish()
    }));
    let what = match ended {
        Ok(Ok(())) => {
            return Ok(Outcome {
                seed: plan.seed,
                steps: plan.steps,
                hash: run.world.hash(),
                totals: run.world.totals(),
                reached: run.scenario.reached(),
            });
        }
        Ok(Err(what)) => what,
        Err(panic) => panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
            .unwrap_or_else(|| "a panic without a message".into()),
    };
    if let Some(unfinished) = Some(run.world.take_log()).filter(|log| !log.is_empty()) {
        run.remember("(the step that failed)".into(), unfinished);
    }
    Err(Violation {
        seed: plan.seed,
        theme: plan.theme,
        step,
        what,
        trace: run.recent.iter().flat_map(Shown::lines).collect(),
    })
}

struct Run {
    world: World,
    scenario: Box<dyn Scenario>,
    recent: VecDeque<Shown>,
}

/// Rude clients, and a model of every message.
struct Calls {
    script: Script,
    checker: Checker,
}

impl Calls {
    fn new(seed: u64, clients: usize) -> Calls {
        Calls {
            script: Script::new(seed ^ 0x5eed, clients),
            checker: Checker::default(),
        }
    }
}

impl Scenario for Calls {
    fn step(&mut self, world: &mut World) -> String {
        self.script.step(world)
    }

    fn check(&mut self, log: &[Event], world: &World) -> Result<(), String> {
        self.checker.step(log, world)
    }

    /// The script ends: calls finish, then everybody disconnects.
    fn end(&mut self, at: u32, world: &mut World) -> Result<Option<String>, String> {
        Ok(match at {
            0 => {
                self.script.settle(world);
                Some("all write out, and time passes".into())
            }
            1 if world.calls_in_flight() > 0 => {
                return Err("calls are left after the longest ttl".into());
            }
            1 => {
                self.script.leave(world);
                Some("all hang up".into())
            }
            _ => None,
        })
    }

    /// Checks that nothing is left.
    fn at_end(&self, world: &World) -> Result<(), String> {
        self.checker.at_end()?;
        if world.counts().instances > 0 {
            return Err("instances are left".into());
        }
        let kept = |name: &String| {
            matches!(
                name.as_str(),
                "default" | "system" | "gamma" | "delta" | "made"
            )
        };
        match world.pool_names().iter().find(|name| !kept(name)) {
            Some(name) => Err(format!("pool '{name}' was left by all and is still there")),
            None => Ok(()),
        }
    }
}

impl Run {
    fn step(&mut self) -> Result<(), String> {
        let what = self.scenario.step(&mut self.world);
        self.check(what)
    }

    fn finish(&mut self) -> Result<(), String> {
        let mut at = 0;
        while let Some(what) = self.scenario.end(at, &mut self.world)? {
            self.check(what)?;
            at += 1;
        }
        self.scenario.at_end(&self.world)
    }

    fn check(&mut self, what: String) -> Result<(), String> {
        let log = self.world.take_log();
        let held = self.scenario.check(&log, &self.world);
        self.remember(what, log);
        held?;
        self.world.check();
        Ok(())
    }

    fn remember(&mut self, what: String, log: Vec<Event>) {
        if self.recent.len() == SHOWN {
            self.recent.pop_front();
        }
        let now_us = self.world.now().0;
        self.recent.push_back(Shown { now_us, what, log });
    }
}

/// A step, described only when it is shown.
struct Shown {
    now_us: u64,
    what: String,
    log: Vec<Event>,
}

impl Shown {
    fn lines(&self) -> Vec<String> {
        let (ms, us) = (self.now_us / 1000, self.now_us % 1000);
        let mut lines = vec![format!("{ms:>6}.{us:03} ms  {}", self.what)];
        let text = |bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes);
            let mut shown: String = text.chars().take(300).collect();
            shown.retain(|c| !c.is_control());
            shown
        };
        for event in &self.log {
            let line = match event {
                Event::Handling { peer, json, .. } => format!("> {} {}", peer.0, text(json)),
                Event::Rejecting(peer) => format!("> {} no frame", peer.0),
                Event::Sent { peer, frame, .. } => {
                    format!("< {} {}", peer.0, text(frame.get(4..).unwrap_or_default()))
                }
                Event::Lost(peer) => format!("< {} (lost: its outbox is full)", peer.0),
                Event::Closed(peer) => format!("x {} closed", peer.0),
                Event::Departed(peer) => format!("x {} departed", peer.0),
                Event::DiskFull(true) => "the disk is full".into(),
                Event::DiskFull(false) => "the disk has room again".into(),
                Event::Restarted(_) => "the server restarts".into(),
                Event::Now(_)
                | Event::Handled(_)
                | Event::Held(_)
                | Event::Refused(_)
                | Event::Counted(_) => {
                    continue;
                }
            };
            lines.push(format!("               {line}"));
        }
        lines
    }
}
