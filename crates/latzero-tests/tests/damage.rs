//! Damage: whatever happens to a file in the data directory, the server starts, serves the rest,
//! and `health` names what is missing. Also a directory that disappears while the server runs.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use latzero_tests::Wire;
use latzero_tests::site::{Daemon, Site};
use serde_json::{Value, json};

const TIMEOUT: Duration = Duration::from_secs(20);

/// The number of regions of each file, which are damaged in turn. `DAMAGE_REGIONS` sets another
/// number.
const REGIONS: u64 = 10;

/// Bytes at the start of a region that are damaged separately.
const FEW_BYTES: u64 = 64;

const APPS: [&str; 4] = ["one", "two", "three", "four"];
const BLOCKS: [&str; 2] = ["first", "second"];

fn ok(reply: &Value) -> &Value {
    assert_eq!(reply["status"], "ok", "{reply}");
    &reply["response"]
}

fn health(wire: &mut Wire) -> Value {
    ok(&wire.request(json!({"action": "health"}))).clone()
}

fn until<R>(what: &str, mut look: impl FnMut() -> Option<R>) -> R {
    let end = Instant::now() + TIMEOUT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what}");
        std::thread::yield_now();
    }
}

/// A directory with a little of everything. Its server was killed, so the database's log is there.
fn filled() -> Site {
    let (site, server) = fill();
    server.kill();
    site
}

/// The same after an orderly stop: everything is in the database, and the log is empty.
fn filled_and_stopped() -> Site {
    let (site, server) = fill();
    assert!(server.stop().success());
    site
}

fn fill() -> (Site, Daemon) {
    let site = Site::new();
    let server = site.start();
    let mut wires = Vec::new();
    for app in APPS {
        let (mut wire, _) = server.app(json!({"app_id": app, "triggers": ["t"]}));
        let pool = json!({"action": "pool_create", "pool": format!("pool-{app}"), "durable": true});
        ok(&wire.request(pool));
        wires.push(wire);
    }
    for block in BLOCKS {
        let made = json!({
            "action": "memory_create", "block_id": block, "size": 9000, "kind": "persistent",
        });
        ok(&wires[0].request(made));
        let write = json!({"action": "memory_write", "block_id": block, "data": "AQID"});
        ok(&wires[0].request(write));
        ok(&wires[0].request(json!({"action": "memory_flush", "block_id": block})));
    }
    // The rows of blocks are not acknowledged; this request is, and it is written after them.
    let register = json!({"action": "trigger_register", "triggers": ["last"]});
    ok(&wires[0].request(register));
    (site, server)
}

fn regions() -> u64 {
    std::env::var("DAMAGE_REGIONS").map_or(REGIONS, |number| number.parse().unwrap())
}

/// The names of everything that is missing.
fn missing(server: &Daemon) -> Vec<String> {
    let mut missing = Vec::new();
    for app in APPS {
        let (wire, ack) = server.app(json!({"app_id": app, "transient": true}));
        drop(wire);
        if ack["rehydrated"] != true {
            missing.push(format!("app {app}"));
        }
    }
    let (mut wire, _) = server.app(json!({"app_id": "look", "transient": true}));
    for app in APPS {
        let info = json!({"action": "pool_info", "pool": format!("pool-{app}")});
        if wire.request(info)["status"] != "ok" {
            missing.push(format!("pool pool-{app}"));
        }
    }
    for block in BLOCKS {
        let read = json!({"action": "memory_read", "block_id": block, "length": 3});
        if wire.request(read)["status"] != "ok" {
            missing.push(format!("block {block}"));
        }
    }
    missing
}

/// Starts on damaged files: the server serves, and health reports a loss if something is missing.
fn check(site: &Site, what: &str) {
    let server = site.start();
    let missing = missing(&server);
    let (mut wire, _) = server.app(json!({"app_id": "look"}));
    let health = health(&mut wire);
    if !missing.is_empty() {
        assert_eq!(health["status"], "degraded", "{what}: {missing:?} {health}");
        let corrupt = &health["components"]["memory"]["seen"]["corrupt_total"];
        let is_named = health["losses_total"] != 0 || *corrupt != 0;
        assert!(is_named, "{what}: {missing:?} {health}");
    }
    for loss in health["losses"].as_array().unwrap() {
        for field in ["affected", "happened", "remedy"] {
            assert!(!loss[field].as_str().unwrap().is_empty(), "{what}: {loss}");
        }
    }
    // It continues to work.
    let register = json!({"action": "trigger_register", "triggers": ["later"]});
    ok(&wire.request(register));
    server.kill();
}

fn find(dir: &Path, ending: &str) -> PathBuf {
    let entries = fs::read_dir(dir).unwrap().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    let found = paths
        .into_iter()
        .find(|path| path.to_string_lossy().ends_with(ending));
    found.unwrap_or_else(|| panic!("no {ending} in {}", dir.display()))
}

#[test]
fn every_region_of_every_file() {
    let blocks = [("memory", ".json"), ("memory", ".lzb")];
    let log = [("", "data.db"), ("", "data.db-wal"), ("", "data.db.mark")];
    walk(&filled(), log.into_iter().chain(blocks));
    let database = [("", "data.db"), ("", "data.db.mark")];
    walk(&filled_and_stopped(), database.into_iter().chain(blocks));
}

/// Damages each region of each of these files of `origin` in turn.
fn walk<'a>(origin: &Site, files: impl Iterator<Item = (&'a str, &'a str)>) {
    for (dir, ending) in files {
        let name = find(&origin.data_dir().join(dir), ending);
        let name = name.strip_prefix(origin.data_dir()).unwrap().to_owned();
        let length = fs::metadata(origin.data_dir().join(&name)).unwrap().len();
        let with = |what: &str, damage: &dyn Fn(&Path)| {
            let copy = origin.copied();
            damage(&copy.data_dir().join(&name));
            check(&copy, &format!("{} {what}", name.display()));
        };
        with("removed", &|path| fs::remove_file(path).unwrap());
        with("emptied", &|path| fs::write(path, "").unwrap());
        let regions = regions().min(length);
        for n in 0..regions {
            let (begin, end) = (n * length / regions, (n + 1) * length / regions);
            with(&format!("cut at {begin}"), &|path| {
                let file = fs::File::options().write(true).open(path).unwrap();
                file.set_len(begin).unwrap();
            });
            // Together, the regions cover every byte of the file.
            for end in [end, end.min(begin + FEW_BYTES)] {
                with(&format!("noise from {begin} to {end}"), &|path| {
                    let file = fs::File::options().write(true).open(path).unwrap();
                    let noise = vec![0xa5; usize::try_from(end - begin).unwrap()];
                    file.write_all_at(&noise, begin).unwrap();
                });
            }
        }
        println!("{}: {length} bytes in {regions} regions", name.display());
    }
}

#[test]
fn a_block_record_is_loaded_from_the_database() {
    let origin = filled();
    for damage in ["removed", "garbage", "another owner"] {
        let site = origin.copied();
        let record = find(&site.data_dir().join("memory"), ".json");
        match damage {
            "removed" => fs::remove_file(&record).unwrap(),
            "garbage" => fs::write(&record, "{").unwrap(),
            _ => {
                let text = fs::read_to_string(&record).unwrap();
                fs::write(
                    &record,
                    text.replace("\"owner\":\"one\"", "\"owner\":\"two\""),
                )
                .unwrap();
            }
        }
        let server = site.start();
        assert_eq!(missing(&server), [""; 0], "{damage}");
        let (mut wire, _) = server.app(json!({"app_id": "look"}));
        let health = health(&mut wire);
        assert!(
            health["losses"].to_string().contains("from the database"),
            "{damage}: {health}"
        );
        for block in BLOCKS {
            let info = wire.request(json!({"action": "memory_info", "block_id": block}));
            assert_eq!(ok(&info)["owner"], "one", "{damage}");
        }
        assert!(server.stop().success());
        let server = site.start();
        let (mut wire, _) = server.app(json!({"app_id": "look"}));
        assert_eq!(self::health(&mut wire)["status"], "ok", "{damage}");
    }
}

#[test]
fn a_directory_that_is_moved_away_keeps_its_server_and_its_path() {
    let site = Site::new();
    let server = site.start();
    let (mut wire, _) = server.app(json!({"app_id": "a"}));
    let (data, moved) = (site.data_dir(), site.data_dir().with_file_name("moved"));
    let mut register =
        |trigger: &str| wire.request(json!({"action": "trigger_register", "triggers": [trigger]}));
    ok(&register("before"));
    fs::rename(&data, &moved).unwrap();
    let refused = register("while");
    assert_eq!(refused["error"]["code"], "storage", "{refused}");
    // The path is locked too, and a second server creates nothing there.
    let another = site.start_with(&latzero_tests::site::Start::default());
    let refused = another.err().expect("no second server at the path");
    assert_eq!(refused.status.code(), Some(75), "{refused:?}");
    assert!(!data.exists(), "a directory was made");
    let losses = until("the loss is named", || {
        let health = health(&mut wire);
        (health["losses_total"] != 0).then(|| health["losses"].to_string())
    });
    assert!(losses.contains("moved or removed"), "{losses}");
    fs::rename(&moved, &data).unwrap();
    let end = Instant::now() + TIMEOUT;
    loop {
        let health = health(&mut wire);
        if health["status"] == "ok" {
            break;
        }
        assert!(Instant::now() < end, "it has not recovered: {health}");
    }
    let again = json!({"action": "trigger_register", "triggers": ["after"]});
    ok(&wire.request(again));
    server.kill();
    let server = site.start();
    let (_, ack) = server.app(json!({"app_id": "a"}));
    let known = ack.to_string();
    assert!(
        known.contains("before") && known.contains("after"),
        "{known}"
    );
}

#[test]
fn files_removed_from_the_directory_are_created_again() {
    let site = Site::new();
    let server = site.start();
    let (mut wire, _) = server.app(json!({"app_id": "a", "triggers": ["t"]}));
    let made =
        json!({"action": "memory_create", "block_id": "b", "size": 9000, "kind": "persistent"});
    ok(&wire.request(made));
    ok(&wire.request(json!({"action": "memory_write", "block_id": "b", "data": "AQID"})));
    let block = find(&site.data_dir().join("memory"), ".lzb");
    for file in ["data.db", "data.db-wal", "lock", "admin.token"] {
        fs::remove_file(site.data_dir().join(file)).unwrap();
    }
    fs::remove_file(&block).unwrap();
    until("the files are there again", || {
        let files = ["data.db", "lock", "admin.token"];
        let are_there = files.iter().all(|file| site.data_dir().join(file).exists());
        are_there.then_some(())
    });
    until("only the file of the block is missed", || {
        let losses = health(&mut wire)["losses"].to_string();
        let is_it = losses.contains("file of block 'b'") && !losses.contains("data.db");
        is_it.then_some(())
    });
    let flush = wire.request(json!({"action": "memory_flush", "block_id": "b"}));
    assert_eq!(flush["error"]["code"], "storage", "{flush}");
    assert!(
        site.start_with(&latzero_tests::site::Start::default())
            .is_err(),
        "the lock is renewed"
    );
    let register = json!({"action": "trigger_register", "triggers": ["later"]});
    until("the store is writing again", || {
        (wire.request(register.clone())["status"] == "ok").then_some(())
    });
    assert!(server.stop().success());
    assert!(block.exists());
    let server = site.start();
    let (mut wire, ack) = server.app(json!({"app_id": "a"}));
    assert_eq!(ack["rehydrated"], true, "{ack}");
    let read = wire.request(json!({"action": "memory_read", "block_id": "b", "length": 3}));
    assert_eq!(ok(&read)["data"], "AQID");
}

#[test]
fn a_backup_of_a_clock_that_was_ahead_is_not_the_newest() {
    let site = Site::new();
    let server = site.start();
    let (mut admin, _) = server.app(json!({"app_id": "admin"}));
    let mut backup = || {
        let reply = admin.request(json!({"action": "backup"}));
        PathBuf::from(ok(&reply)["file"].as_str().unwrap())
    };
    let first = backup();
    // Dates the backup years ahead, as if the clock had been wrong.
    let name = first.file_name().unwrap().to_str().unwrap().to_owned();
    let (number, _) = name
        .strip_prefix("latzero-")
        .unwrap()
        .split_once('-')
        .unwrap();
    let ahead = first.with_file_name(format!("latzero-{number}-20990101-000000.db"));
    let ahead_unnumbered = first.with_file_name("latzero-20990102-000000.db");
    fs::copy(&first, &ahead_unnumbered).unwrap();
    fs::rename(&first, &ahead).unwrap();
    drop(server.app(json!({"app_id": "later", "triggers": ["t"]})));
    let newest = backup();
    server.kill();
    fs::write(site.data_dir().join("data.db"), "garbage".repeat(2000)).unwrap();
    let _ = fs::remove_file(site.data_dir().join("data.db-wal"));
    let server = site.start();
    let (mut wire, ack) = server.app(json!({"app_id": "later"}));
    assert_eq!(ack["rehydrated"], true, "{ack}");
    let losses = health(&mut wire)["losses"].to_string();
    assert!(
        losses.contains(newest.file_name().unwrap().to_str().unwrap()),
        "{losses}"
    );
}

#[test]
fn backups_next_to_a_writer_all_succeed() {
    let site = Site::new();
    let server = site.start();
    let (mut writer, _) = server.app(json!({"app_id": "writer"}));
    let made =
        json!({"action": "memory_create", "block_id": "b", "size": 1 << 20, "kind": "persistent"});
    ok(&writer.request(made));
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let write = json!({"action": "memory_write", "block_id": "b", "data": "AQIDBAUGBwg="});
            let (begun, mut versions) = (Instant::now(), 0);
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                versions = ok(&writer.request(write.clone()))["version"]
                    .as_u64()
                    .unwrap();
            }
            let rate = versions as f64 / begun.elapsed().as_secs_f64();
            println!("{versions} versions meanwhile, {rate:.0} a second");
        });
        let (mut admin, _) = server.app(json!({"app_id": "admin"}));
        let made = (0..20).filter(|_| {
            let reply = admin.request(json!({"action": "backup"}));
            reply["response"]["block_files"] == 1
        });
        let made = made.count();
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(made, 20);
    });
}
