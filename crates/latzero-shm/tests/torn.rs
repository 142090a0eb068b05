//! Writers and readers as processes, with the writers killed at random points: no reader ever sees
//! a torn version.
//!
//! The test starts its own program again in other roles and passes the path of the block's
//! descriptor. A version's content follows only from its number, whoever wrote it: version v sets
//! one quarter of the block to v. So each slot is updated by ranges, and an error in that is as
//! visible as a torn copy.
//!
//! `TORN_READS` sets the number of reads (1,000,000), `TORN_KILLS` the number of
//! deaths (200).

mod common;

use std::io::Read;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use latzero_shm::{Access, Attachment, Custodian, ReadError, State};
use rustix::fs::{Mode, OFlags};

const SIZE: u64 = 1000;
const QUARTERS: u64 = 4;
const WORDS: u64 = SIZE / 8;
const READERS: u64 = 2;
const FENCE: u64 = 3;

/// Environment variables of the processes that this test starts: the block's path, the role, and
/// the work to do.
const ROLE: &str = "TORN_ROLE";

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// The words of quarter `quarter`.
fn words_of(quarter: u64) -> std::ops::Range<u64> {
    let each = WORDS.div_ceil(QUARTERS);
    quarter * each..((quarter + 1) * each).min(WORDS)
}

/// The content of a quarter in version `version`: the last version that set it.
fn expected(version: u64, quarter: u64) -> u64 {
    version.saturating_sub((version + QUARTERS - quarter) % QUARTERS)
}

fn check(bytes: &[u8], version: u64) {
    for quarter in 0..QUARTERS {
        let expected = expected(version, quarter);
        for word in words_of(quarter) {
            let at = word as usize * 8;
            let found = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
            assert_eq!(found, expected, "TORN: word {word} of version {version}");
        }
    }
}

/// The change of version `version`: its offset and its bytes.
fn change(version: u64) -> (u64, Vec<u8>) {
    let words = words_of(version % QUARTERS);
    let bytes = words.clone().flat_map(|_| version.to_le_bytes()).collect();
    (words.start * 8, bytes)
}

fn attach(path: &str, access: Access, slots: u32) -> Arc<Attachment> {
    let flags = match access {
        Access::Read => OFlags::RDONLY,
        Access::Write => OFlags::RDWR,
    };
    let file = rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).expect("it exists");
    let description = common::description(SIZE, slots, false);
    let expected = latzero_shm::Expected {
        generation: description.generation,
        geometry: description.geometry,
        is_persistent: false,
        access,
    };
    Arc::new(Attachment::new(file, &expected).expect("it is the block"))
}

fn write_for_ever(block: &Arc<Attachment>) {
    loop {
        let Ok(mut writing) = block.begin(FENCE) else {
            return; // the test ended
        };
        let (offset, bytes) = change(writing.version());
        writing.write(offset, &bytes).expect("it is in range");
        if writing.publish().is_err() {
            return;
        }
    }
}

fn read_until_closed(block: &Attachment, reads: u64) -> (u64, u64) {
    let (mut done, mut contended, mut newest) = (0, 0, 0);
    let mut bytes = vec![0; SIZE as usize];
    while done < reads || block.state() == State::Live {
        let version = if done % 4 == 3 {
            let view = block.view().expect("it is mapped");
            view.copy_to(0, &mut bytes).expect("it is in range");
            if !view.is_valid() {
                continue;
            }
            view.version()
        } else {
            match block.read_into(0, &mut bytes) {
                Ok(version) => version,
                Err(ReadError::Contended) => {
                    contended += 1;
                    continue;
                }
                Err(error) => panic!("{error}"),
            }
        };
        check(&bytes, version);
        assert!(version >= newest, "TORN: version {version} after {newest}");
        newest = version;
        done += 1;
    }
    (done, contended)
}

fn start(role: &str, block: &Custodian, slots: u32) -> Child {
    let file = match role {
        "writer" => block.lend(Access::Write),
        _ => block.lend(Access::Read),
    };
    // Open as long as the test runs: the other process opens it through this process's number.
    let file = Box::leak(Box::new(file.expect("/proc is mounted")));
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    Command::new(std::env::current_exe().expect("it runs"))
        .args([
            "--exact",
            "no_version_is_torn",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(ROLE, format!("{role} {slots} {path}"))
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts")
}

/// A child that is killed if the test fails.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(slots: u32, reads: u64, kills: u64) {
    let description = common::description(SIZE, slots, false);
    let block = Custodian::create_shared("lz:torn", &description).expect("there is memory");
    block.set_lease(FENCE, true).expect("it is mapped");
    let own = common::attach(&block, Access::Read);
    let mut readers: Vec<Killed> = (0..READERS)
        .map(|_| Killed(start("reader", &block, slots)))
        .collect();
    let mut random = 0x9e37_79b9_7f4a_7c15u64 ^ u64::from(std::process::id());
    let mut bytes = vec![0; SIZE as usize];
    for kill in 0..kills {
        let before = own.version();
        let mut writer = Killed(start("writer", &block, slots));
        // The writer is killed at any step of any of its versions.
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let beyond = before + (random >> 33) % 3_000;
        while own.version() <= beyond {
            let woken = own.wait(own.version(), Some(Duration::from_secs(60)));
            assert!(
                matches!(woken, latzero_shm::Waited::Newer(_)),
                "the writer is stopped"
            );
        }
        writer.0.kill().expect("it runs");
        writer.0.wait().expect("it ends");
        // The server continues where the dead writer stopped, with pwrite and pread.
        let head = block.version().expect("it is complete");
        assert!(head > before);
        if kill % 2 == 0 {
            let (offset, data) = change(head + 1);
            let version = block
                .write(offset, &data, Some(head))
                .expect("nobody else writes");
            assert_eq!(version, head + 1);
        }
        let version = block.read(0, &mut bytes, None).expect("nobody writes");
        check(&bytes, version);
    }
    // Readers complete their reads with no writer running, so that the test ends.
    block.set_state(State::Closed).expect("it is mapped");
    let mut total = 0;
    for reader in &mut readers {
        let mut output = String::new();
        let stdout = reader.0.stdout.as_mut().expect("it is piped");
        stdout.read_to_string(&mut output).expect("it is text");
        assert!(reader.0.wait().expect("it ends").success(), "{output}");
        let (_, figures) = output.split_once("READS ").expect("it reports its end");
        let mut figures = figures
            .split_whitespace()
            .map(|n| n.parse::<u64>().expect("a number"));
        total += figures.next().expect("reads");
        println!("contended: {}", figures.next().expect("contended"));
    }
    println!(
        "{slots} slots: {total} reads, {} versions, {kills} kills",
        own.version()
    );
    assert!(total >= reads);
}

#[test]
fn no_version_is_torn() {
    if let Ok(role) = std::env::var(ROLE) {
        let mut words = role.split(' ');
        let mut next = || words.next().expect("three words");
        let (role, slots, path) = (next(), next().parse().expect("a number"), next());
        if role == "writer" {
            write_for_ever(&attach(path, Access::Write, slots));
        } else {
            let reads = number("TORN_READS", 1_000_000) / 2 / READERS;
            let (done, contended) = read_until_closed(&attach(path, Access::Read, slots), reads);
            println!("READS {done} {contended}");
        }
        return;
    }
    let (reads, kills) = (number("TORN_READS", 1_000_000), number("TORN_KILLS", 200));
    for slots in [2, 3] {
        run(slots, reads / 2, kills / 2);
    }
}
