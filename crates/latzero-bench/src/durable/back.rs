//! Many apps reconnect at once after their server was killed, with only their AppID.
//!
//! Each app has two pools and four triggers. The time is measured from the ready line of the new
//! server until the last app has its acknowledgement. One thread plays all apps. With the default
//! limits the server refuses some of the burst of connects, and they retry as the client libraries
//! do; with high limits it refuses none.

use super::{DurableArgs, Found};
use crate::failure::{During, Failure};
use crate::report::median;
use crate::results::{Finding, Unit};
use crate::server::Running;
use crate::stream::Transport;
use crate::wire::{Fill, Wire, handshake_json, parse};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

const BACK_MS_MAX: f64 = 2_000.0;

/// A turn that takes longer than this has failed.
const WAIT_MAX: Duration = Duration::from_secs(20);

/// The pause before another attempt is a random part of this, doubled with each attempt as in the
/// client libraries.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How many connections may be in their handshake at the same time.
#[derive(Clone, Copy)]
enum Admission {
    Wide,
    Usual,
}

impl Admission {
    const ALL: [Self; 2] = [Self::Wide, Self::Usual];

    fn describe(self) -> &'static str {
        match self {
            Self::Wide => "with wide limits",
            Self::Usual => "with the usual limits",
        }
    }

    fn settings(self, apps: u64) -> Vec<String> {
        match self {
            Self::Usual => Vec::new(),
            Self::Wide => [
                "connections_unauthenticated_max",
                "connections_unauthenticated_per_user_max",
            ]
            .map(|name| format!("limits.{name}={apps}"))
            .into(),
        }
    }
}

/// One turn in which all apps reconnect.
#[derive(Clone, Copy, Debug, Serialize)]
struct Turn {
    start_ms: f64,
    first_ms: f64,
    half_ms: f64,
    last_ms: f64,
    /// Attempts that were refused because of the limit.
    sent_away: u64,
}

pub(super) fn run(args: &DurableArgs) -> Result<Found, Failure> {
    let apps = args.or(args.back, 1_000, 100);
    let rounds = args.rounds();
    let mut turns: [Vec<Turn>; Admission::ALL.len()] = Default::default();
    for round in 1..=rounds {
        eprintln!("apps that come back: round {round} of {rounds}");
        for (admission, turns) in Admission::ALL.into_iter().zip(&mut turns) {
            turns.push(take_turn(admission, apps)?);
        }
    }
    let mut findings = Vec::new();
    for (admission, turns) in Admission::ALL.into_iter().zip(&turns) {
        let name = format!("{apps} apps back {}", admission.describe());
        let last = turns.iter().map(|turn| turn.last_ms);
        let middle = median(last.clone().collect()).expect("there was a round");
        findings.extend([
            Finding::new(&name, middle, Unit::Millis).expect_at_most(BACK_MS_MAX),
            Finding::new(
                format!("{name}: longest"),
                last.fold(0.0, f64::max),
                Unit::Millis,
            ),
        ]);
    }
    let by_admission = Admission::ALL
        .iter()
        .zip(&turns)
        .map(|(admission, turns)| json!({"admission": admission.describe(), "turns": turns}));
    Ok(Found {
        findings,
        rounds: json!({"apps": apps, "limits": by_admission.collect::<Vec<_>>()}),
    })
}

fn app_id(number: usize) -> String {
    format!("app-{number:04}")
}

/// Registers all apps, kills the server, and times their reconnection to the next one.
fn take_turn(admission: Admission, apps: u64) -> Result<Turn, Failure> {
    let scratch = tempfile::tempdir().during("make a directory for the server")?;
    let settings = admission.settings(apps);
    let server = Running::start_in(scratch.path(), &settings)?;
    let apps = usize::try_from(apps).expect("it was bounded");
    let mut registered = Vec::new();
    for number in 0..apps {
        // A ring: each pool is shared by two apps.
        let pools = [number, (number + 1) % apps].map(|n| format!("pool-{n:04}"));
        let triggers = ["load", "save", "list", "drop"];
        let handshake = json!({"app_id": app_id(number), "pools": pools, "triggers": triggers});
        registered.push(Wire::connect(&server, Transport::Unix, handshake)?);
    }
    // The server is killed while all apps are connected.
    drop(server);
    drop(registered);
    let begin = Instant::now();
    let server = Running::start_in(scratch.path(), &settings)?;
    let start_ms = millis(begin.elapsed());
    let mut crowd = Crowd::new(&server, apps)?;
    crowd.come_back()?;
    let Crowd {
        arrived, sent_away, ..
    } = crowd;
    let at = |place: usize| millis(arrived[place].0);
    Ok(Turn {
        start_ms,
        first_ms: at(0),
        half_ms: at(apps / 2),
        last_ms: at(apps - 1),
        sent_away,
    })
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// What one app is doing.
enum State {
    /// The app will connect; the number counts its attempts.
    Away(u32),
    Asking(u32, Wire),
    Back,
}

/// Apps that are reconnecting.
struct Crowd<'s> {
    server: &'s Running,
    poll: Poll,
    states: Vec<State>,
    /// When each app connects next.
    due: BTreeSet<(Instant, usize)>,
    begin: Instant,
    /// When each app was acknowledged, in order, and its connection, which stays open.
    arrived: Vec<(Duration, Wire)>,
    sent_away: u64,
    random: u64,
}

impl<'s> Crowd<'s> {
    fn new(server: &'s Running, apps: usize) -> Result<Self, Failure> {
        let begin = Instant::now();
        Ok(Self {
            server,
            poll: Poll::new().during("make a poll")?,
            states: (0..apps).map(|_| State::Away(0)).collect(),
            due: (0..apps).map(|number| (begin, number)).collect(),
            begin,
            arrived: Vec::with_capacity(apps),
            sent_away: 0,
            random: 1,
        })
    }

    fn come_back(&mut self) -> Result<(), Failure> {
        let mut events = Events::with_capacity(1024);
        while self.arrived.len() < self.states.len() {
            if self.begin.elapsed() > WAIT_MAX {
                return Err(Failure::said(format!(
                    "{} of {} apps were back after {} s",
                    self.arrived.len(),
                    self.states.len(),
                    WAIT_MAX.as_secs()
                )));
            }
            let now = Instant::now();
            while let Some(&(at, number)) = self.due.first()
                && at <= now
            {
                self.due.pop_first();
                self.dial(number)?;
            }
            let next = self
                .due
                .first()
                .map(|(at, _)| at.saturating_duration_since(now));
            self.poll
                .poll(&mut events, Some(next.unwrap_or(WAIT_MAX)))
                .during("wait for the server")?;
            for event in &events {
                self.hear(event.token().0)?;
            }
        }
        Ok(())
    }

    fn dial(&mut self, number: usize) -> Result<(), Failure> {
        let State::Away(attempt) = self.states[number] else {
            return Ok(());
        };
        let mut wire = Wire::open(self.server, Transport::Unix)?;
        wire.set_nonblocking()?;
        self.poll
            .registry()
            .register(
                &mut SourceFd(&wire.as_raw_fd()),
                Token(number),
                Interest::READABLE,
            )
            .during("watch a connection")?;
        wire.append(&handshake_json(json!({"app_id": app_id(number)})));
        // If the server has refused it already, the next read shows that.
        let _ = wire.flush();
        self.states[number] = State::Asking(attempt, wire);
        Ok(())
    }

    fn hear(&mut self, number: usize) -> Result<(), Failure> {
        let State::Asking(attempt, wire) = &mut self.states[number] else {
            return Ok(());
        };
        let attempt = *attempt;
        let filled = wire.fill()?;
        let Some(message) = wire.received()? else {
            if filled == Fill::End {
                self.send_away(number, attempt);
            }
            return Ok(());
        };
        let reply: Value = parse(message)?;
        if reply["error"]["code"] == "overloaded" {
            self.send_away(number, attempt);
            return Ok(());
        }
        if reply["status"] != "ok" || reply["rehydrated"] != true {
            return Err(Failure::said(format!(
                "an app was not restored but told {reply}"
            )));
        }
        if let State::Asking(_, wire) = std::mem::replace(&mut self.states[number], State::Back) {
            self.arrived.push((self.begin.elapsed(), wire));
        }
        Ok(())
    }

    /// Schedules another attempt after a random pause.
    fn send_away(&mut self, number: usize, attempt: u32) {
        self.sent_away += 1;
        let most = PAUSE_MIN
            .saturating_mul(1 << attempt.min(20))
            .min(PAUSE_MAX);
        // The multiplier of Knuth's MMIX: its upper bits are random enough to spread the attempts.
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let pause = most.mul_f64((self.random >> 11) as f64 / (1_u64 << 53) as f64);
        self.states[number] = State::Away(attempt + 1);
        self.due.insert((Instant::now() + pause, number));
    }
}
