//! Runs from a seed, and what is told about them.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use latzero_fabric::Limits;

use crate::check::Checker;
use crate::outbox::{Bounds, Event, Totals};
use crate::script::Script;
use crate::world::World;

/// What a run is made of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What decides everything.
    pub seed: u64,
    /// How many steps.
    pub steps: u32,
    /// How many clients.
    pub clients: usize,
    /// The core's bounds: small, so that runs reach them.
    pub limits: Limits,
    /// The outboxes' bounds.
    pub bounds: Bounds,
}

/// Steps of a run unless told otherwise.
pub const STEPS_DEFAULT: u32 = 2000;

/// Clients of a run.
const CLIENTS: usize = 20;

/// Steps shown of a run that went wrong.
const SHOWN: usize = 30;

impl Plan {
    /// The usual run of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Plan {
            seed,
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
            },
        }
    }
}

/// What a run came to.
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
}

impl Outcome {
    /// The outcome as JSON.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let t = &self.totals;
        serde_json::json!({
            "seed": self.seed, "steps": self.steps, "hash": format!("{:016x}", self.hash), "frames": t.frames,
            "calls": t.calls_started, "timeouts": t.timeouts, "refusals": t.refusals, "lost": t.lost,
            "overflowed": t.overflowed,
        })
    }
}

/// A run in which something did not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The seed.
    pub seed: u64,
    /// The step at which it showed.
    pub step: u32,
    /// What did not hold.
    pub what: String,
    /// The last steps, readable.
    pub trace: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.trace {
            writeln!(f, "{line}")?;
        }
        writeln!(f, "seed {}, step {}: {}", self.seed, self.step, self.what)?;
        write!(f, "replay with: cargo xtask sim --seed {}", self.seed)
    }
}

impl std::error::Error for Violation {}

/// Runs a plan to its end, with every check after every step.
///
/// # Errors
/// The first thing that did not hold.
pub fn run(plan: &Plan) -> Result<Outcome, Violation> {
    let mut run = Run {
        world: World::new(plan.seed, plan.limits.clone(), plan.bounds),
        script: Script::new(plan.seed ^ 0x5eed, plan.clients),
        checker: Checker::default(),
        recent: VecDeque::new(),
    };
    let mut step = 0;
    // A broken invariant of the fabric is a panic; the trace is wanted there too.
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
        step,
        what,
        trace: run.recent.iter().flat_map(Shown::lines).collect(),
    })
}

struct Run {
    world: World,
    script: Script,
    checker: Checker,
    recent: VecDeque<Shown>,
}

impl Run {
    fn step(&mut self) -> Result<(), String> {
        let what = self.script.step(&mut self.world);
        self.check(what)
    }

    /// Quiet falls: calls end, then everybody leaves, and nothing may be left.
    fn finish(&mut self) -> Result<(), String> {
        self.script.settle(&mut self.world);
        self.check("all write out, and time passes".into())?;
        if self.world.calls_in_flight() > 0 {
            return Err("calls are left after the longest ttl".into());
        }
        self.script.leave(&mut self.world);
        self.check("all hang up".into())?;
        self.checker.at_end()?;
        if self.world.counts().instances > 0 {
            return Err("instances are left".into());
        }
        let kept = |name: &String| {
            matches!(
                name.as_str(),
                "default" | "system" | "gamma" | "delta" | "made"
            )
        };
        match self.world.pool_names().iter().find(|name| !kept(name)) {
            Some(name) => Err(format!("pool '{name}' was left by all and is still there")),
            None => Ok(()),
        }
    }

    fn check(&mut self, what: String) -> Result<(), String> {
        let log = self.world.take_log();
        let held = self.checker.step(&log, &self.world);
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

/// One step, to be shown where it matters.
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
                Event::Now(_) | Event::Handled(_) | Event::Refused(_) | Event::Counted(_) => {
                    continue;
                }
            };
            lines.push(format!("               {line}"));
        }
        lines
    }
}
