//! The crash test: many clients send random requests; the server and clients are killed at random
//! moments and at failpoints, and restarted. Then it checks that everything acknowledged is there
//! and that nothing else is left.
//!
//! `CRASH_ROUNDS` sets the number of lives of a server (50), and `CRASH_SEED` the seed;
//! `cargo xtask crash` sets both. A seed decides what is requested and after how many steps of all
//! clients together the server dies. The system decides how the clients' steps interleave, so a
//! failing seed may need several tries.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

mod actor;
mod calls;
mod files;
mod left_behind;
mod mapped;
mod random;
mod round;

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::panic::AssertUnwindSafe;
use std::time::Instant;

use latzero_tests::site::{Daemon, Site, Start};
use serde_json::{Value, json};

use actor::Actor;
use calls::Calls;
use mapped::Mapped;
use random::Random;
use round::{Round, ok};

const ROUNDS: u64 = 50;
const SEED: u64 = 1;

/// Lives of servers on one directory.
const LIVES: u64 = 10;

const ACTORS: u64 = 3;

/// Failpoints that a running server passes, and the most times that it passes each before it dies
/// there.
const WORKING: &[(&str, u64)] = &[
    ("store.begin", 12),
    ("store.before_commit", 12),
    ("store.after_commit", 12),
    ("store.before_tell", 12),
    ("backup.step", 2),
    ("backup.copied", 1),
    ("backup.before_rename", 1),
    ("backup.after_rename", 1),
];

/// Failpoints that it passes when it stops.
const STOPPING: &[&str] = &["store.before_checkpoint", "store.after_checkpoint"];

/// Failpoints that it passes when it starts for the first time.
const FIRST: &[&str] = &["migrate.before_commit", "migrate.after_commit"];

/// Failpoints that it passes when it replaces a damaged database by a backup.
const RESTORING: &[&str] = &[
    "restore.built",
    "restore.decided",
    "restore.set_aside",
    "restore.renamed",
];

fn number(name: &str, default: u64) -> u64 {
    let set = std::env::var(name).ok();
    set.map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number"))
    })
}

/// Counters of what happened, printed for a person to read.
#[derive(Default)]
struct Tally {
    lives: u64,
    power_losses: u64,
    steps: u64,
    reads: u64,
    parked: usize,
    answers: usize,
    failpoints: BTreeMap<&'static str, u64>,
}

#[test]
fn nothing_acknowledged_is_lost_and_nothing_is_left() {
    let rounds = number("CRASH_ROUNDS", ROUNDS);
    let first = number("CRASH_SEED", SEED);
    let begun = Instant::now();
    let mut tally = Tally::default();
    for site in 0..rounds.div_ceil(LIVES) {
        let lives = LIVES.min(rounds - site * LIVES);
        let seed = first + site;
        let run = std::panic::catch_unwind(AssertUnwindSafe(|| one_site(seed, lives, &mut tally)));
        if let Err(panic) = run {
            eprintln!("seed {seed} failed: cargo xtask crash --rounds {lives} --seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
    println!(
        "{} lives, {} ends of the machine, {} steps, {} calls parked, {} answers, {} reads of a \
         mapped block, {:.1} s; failpoints: {:?}",
        tally.lives,
        tally.power_losses,
        tally.steps,
        tally.parked,
        tally.answers,
        tally.reads,
        begun.elapsed().as_secs_f64(),
        tally.failpoints
    );
}

fn at_failpoint(name: &str, pass: u64) -> Start {
    Start {
        failpoint: Some(format!("{name}:{pass}")),
        ..settings()
    }
}

fn settings() -> Start {
    Start {
        // A handler with an open call delays no stop. Backups are made only on request.
        settings: vec!["drain_timeout=1ms".into(), "backup_interval=0".into()],
        ..Start::default()
    }
}

fn one_site(seed: u64, lives: u64, tally: &mut Tally) {
    let mut random = Random::new(seed);
    let site = Site::new();
    let mut world = World {
        actors: (0..ACTORS)
            .map(|n| Actor::new(n, random.branch(n)))
            .collect(),
        calls: Calls::default(),
        mapped: Mapped::new(random.pick(&["shared", "persistent"])),
    };
    if random.one_in(2) {
        let name = random.pick(FIRST);
        die_at_start(&site, name, tally);
    }
    {
        let server = site.start_with(&settings()).unwrap();
        let (mut admin, _) = server.app(json!({"app_id": "admin"}));
        let made = admin.request(json!({"action": "pool_create", "pool": "base", "durable": true}));
        ok("base", &made);
        server.kill();
    }
    for _ in 0..lives {
        world.live(&site, &mut random, tally);
        tally.lives += 1;
        match random.below(8) {
            0 => move_directory(&site),
            1 => remove_database(&site),
            2 => let_clock_jump(&site),
            _ => {}
        }
    }
    world.end(&site, &mut random, tally);
    (tally.parked, tally.answers) = {
        let (parked, answers) = world.calls.counts();
        (tally.parked + parked, tally.answers + answers)
    };
    tally.reads += world.mapped.reads;
}

/// Starts a server that dies before it is ready.
fn die_at_start(site: &Site, name: &'static str, tally: &mut Tally) {
    let Err(refused) = site.start_with(&at_failpoint(name, 1)) else {
        panic!("{name} is not passed at the start")
    };
    assert_eq!(refused.status.signal(), Some(9), "{name}: {refused:?}");
    *tally.failpoints.entry(name).or_default() += 1;
}

struct World {
    actors: Vec<Actor>,
    calls: Calls,
    mapped: Mapped,
}

impl World {
    /// One life: verify what was acknowledged, work, die.
    fn live(&mut self, site: &Site, random: &mut Random, tally: &mut Tally) {
        if random.one_in(3) {
            site.lose_power().unwrap();
            self.actors.iter_mut().for_each(Actor::lose_power);
            self.mapped.has_lost_power = true;
            tally.power_losses += 1;
        }
        let mut server = site.start_with(&settings()).unwrap();
        self.verify(&server);
        let named = random.one_in(2).then(|| random.pick(WORKING));
        let stops = named.is_none() && random.one_in(6);
        let has_backup =
            named.is_some_and(|(name, _)| name.starts_with("backup.")) || random.one_in(8);
        if let Some((name, passes)) = named {
            server.kill();
            let start = at_failpoint(name, 1 + random.below(passes));
            server = match site.start_with(&start) {
                Ok(server) => server,
                // It wrote something during its start already.
                Err(refused) => {
                    assert_eq!(refused.status.signal(), Some(9), "{name}: {refused:?}");
                    *tally.failpoints.entry(name).or_default() += 1;
                    return;
                }
            };
        } else if stops && random.one_in(2) {
            let name = random.pick(STOPPING);
            server.kill();
            server = site.start_with(&at_failpoint(name, 1)).unwrap();
            let mut status = server;
            status.ask_to_stop();
            let ended = status.wait();
            assert_eq!(ended.signal(), Some(9), "{name}: {ended}");
            *tally.failpoints.entry(name).or_default() += 1;
            return;
        } else if stops {
            let ended = server.stop();
            assert!(ended.success(), "{ended}");
            return;
        }
        self.calls.new_life();
        let strike_at = match random.below(4) {
            0 => u64::MAX,
            _ => 1 + random.below(90),
        };
        let round = Round::new(&server, strike_at, self.actors.len() + 1);
        // Without a handler, every call waits for another life.
        let has_handler = random.one_in(2);
        let (calling, handling, mapping) = (random.branch(1), random.branch(2), random.branch(3));
        let World {
            actors,
            calls,
            mapped,
        } = self;
        let (calls, round) = (&*calls, &round);
        std::thread::scope(|scope| {
            for actor in actors {
                scope.spawn(move || actor.run(round));
            }
            scope.spawn(move || calls.call(round, calling));
            if has_handler {
                scope.spawn(move || calls.handle(round, handling));
            }
            scope.spawn(move || mapped.run(round, mapping));
            if has_backup {
                scope.spawn(move || backup(round));
            }
        });
        tally.steps += round.steps();
        if let Some((name, _)) = named.filter(|_| !round.was_killed()) {
            *tally.failpoints.entry(name).or_default() += 1;
        }
        let ended = server.wait();
        assert_eq!(ended.signal(), Some(9), "the server ended with {ended}");
    }

    fn verify(&mut self, server: &Daemon) {
        let (mut admin, _) = server.app(json!({"app_id": "admin"}));
        check(&mut admin, "ok");
        for actor in &mut self.actors {
            actor.verify(server);
        }
        self.mapped.verify(server);
    }

    /// Ends everything in order: nothing waits, and no file is left that should not be.
    fn end(&mut self, site: &Site, random: &mut Random, tally: &mut Tally) {
        self.calls.new_life();
        let server = site.start_with(&settings()).unwrap();
        self.verify(&server);
        self.calls.settle(&server);
        let (mut admin, _) = server.app(json!({"app_id": "admin"}));
        // The ends of calls are not acknowledged, but this is, and it is written after them.
        let register = json!({"action": "trigger_register", "triggers": ["end"]});
        ok("end", &admin.request(register));
        ok("backup", &admin.request(json!({"action": "backup"})));
        server.kill();
        if random.one_in(2) {
            // The backup has everything, so nothing is lost with the database.
            damage(site);
            let name = random.pick(RESTORING);
            die_at_start(site, name, tally);
            let server = site.start_with(&settings()).unwrap();
            let (mut admin, _) = server.app(json!({"app_id": "admin"}));
            check(&mut admin, "degraded");
            // After a kill, the next start would report the loss again.
            assert!(server.stop().success());
        }
        let server = site.start_with(&settings()).unwrap();
        self.verify(&server);
        self.calls.none_left(&server);
        let (mut overseer, _) = server.app(json!({"app_id": "overseer", "pools": ["base"]}));
        let mut blocks: usize = self.actors.iter().map(Actor::blocks).sum();
        let listed = overseer.request(json!({"action": "memory_info", "block_id": "m"}));
        blocks += usize::from(listed["response"]["kind"] == "persistent");
        assert!(server.stop().success());
        files::check(&site.data_dir(), blocks);
        // The lock is free.
        assert!(site.start_with(&settings()).unwrap().stop().success());
    }
}

/// Checks that the database is intact, and that health reports this state of the store.
fn check(admin: &mut latzero_tests::Wire, store: &str) {
    let checked = admin.request(json!({"action": "db_check", "full": true}));
    assert_eq!(ok("db_check", &checked)["ok"], true, "{checked}");
    let health = admin.request(json!({"action": "health"}));
    let parts = &ok("health", &health)["components"];
    let seen: [&Value; 2] = [&parts["store"]["status"], &parts["memory"]["status"]];
    assert_eq!(seen, [&json!(store), &json!("ok")], "{health}");
}

/// Makes a backup while the clients work.
fn backup(round: &Round<'_>) {
    let came = round.server.try_app(json!({"app_id": "admin"})).unwrap();
    if let Some((mut admin, _)) = came
        && let Ok(reply) = round::ask(&mut admin, json!({"action": "backup"}))
    {
        ok("backup", &reply);
    }
}

/// Moves the directory of a running server away and back. In between nothing is acknowledged, and
/// nothing is lost.
fn move_directory(site: &Site) {
    let server = site.start_with(&settings()).unwrap();
    let (mut admin, _) = server.app(json!({"app_id": "admin"}));
    let (data, moved) = (site.data_dir(), site.data_dir().with_file_name("moved"));
    std::fs::rename(&data, &moved).unwrap();
    // The name must be new: a request that changes nothing needs no write and succeeds.
    let name = format!("away-{}", server.pid());
    let register = json!({"action": "trigger_register", "triggers": [name]});
    let refused = admin.request(register);
    assert_eq!(refused["error"]["code"], "storage", "{refused}");
    assert!(site.start_with(&settings()).is_err(), "a second server");
    std::fs::rename(&moved, &data).unwrap();
    until_ok(&mut admin);
    server.kill();
}

/// Removes the database of a running server, which creates it again.
fn remove_database(site: &Site) {
    let server = site.start_with(&settings()).unwrap();
    let (mut admin, _) = server.app(json!({"app_id": "admin"}));
    std::fs::remove_file(site.data_dir().join("data.db")).unwrap();
    until_ok(&mut admin);
    server.kill();
    let left = std::fs::read_dir(site.data_dir()).unwrap().flatten();
    for left in left.filter(|left| left.file_name().to_string_lossy().starts_with("replaced-")) {
        std::fs::remove_file(left.path()).unwrap();
    }
}

/// Makes a backup and dates it years ahead, as after a jump of the clock: later backups are still
/// newer.
fn let_clock_jump(site: &Site) {
    let server = site.start_with(&settings()).unwrap();
    let (mut admin, _) = server.app(json!({"app_id": "admin"}));
    let made = admin.request(json!({"action": "backup"}));
    let made = std::path::PathBuf::from(ok("backup", &made)["file"].as_str().unwrap());
    let name = made.file_name().unwrap().to_str().unwrap();
    let number = name.split('-').nth(1).unwrap();
    let ahead = format!("latzero-{number}-20990101-000000.db");
    std::fs::rename(&made, made.with_file_name(ahead)).unwrap();
    server.kill();
}

/// Waits until the server can store changes again.
fn until_ok(admin: &mut latzero_tests::Wire) {
    let end = Instant::now() + std::time::Duration::from_secs(30);
    // A request that changes nothing needs no write, so one of the two alone proves little.
    let mut does = |action: &str| {
        let reply = admin.request(json!({"action": action, "triggers": ["back"]}));
        reply["status"] == "ok"
    };
    while !(does("trigger_register") && does("trigger_unregister")) {
        assert!(Instant::now() < end, "the store does not write again");
        std::thread::yield_now();
    }
}

/// Damages the database except for its first bytes.
fn damage(site: &Site) {
    let path = site.data_dir().join("data.db");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.iter_mut().skip(100).for_each(|byte| *byte = 0x5a);
    std::fs::write(&path, bytes).unwrap();
    let _ = std::fs::remove_file(site.data_dir().join("data.db-wal"));
}
