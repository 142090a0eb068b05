//! Blocks through the Rust client, mapped over the Unix socket and copied over TCP: the same tests
//! for both.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use latzero::blocking::{App, Block};
use latzero::{Code, LockMode, testing};
use latzero_tests::TIMEOUT;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

const WAIT: Duration = Duration::from_secs(20);
const NOW: Duration = Duration::ZERO;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Via {
    Mapped,
    Copied,
}

const BOTH: [Via; 2] = [Via::Mapped, Via::Copied];

fn app(server: &testing::Server, via: Via, name: &str) -> App {
    let url = match via {
        Via::Mapped => server.url(name),
        Via::Copied => server.tcp_url(name),
    };
    App::connect(&format!("{url}&pool=p")).unwrap()
}

fn start() -> testing::Server {
    testing::server_with(&["--set", "limits.max_frame=64KiB"]).unwrap()
}

fn kind<T: std::fmt::Debug>(result: Result<T, latzero::Error>) -> Code {
    result.unwrap_err().kind()
}

#[test]
fn a_block_is_made_written_and_read() {
    for via in BOTH {
        let server = start();
        let a = app(&server, via, "a");
        let b = app(&server, via, "b");
        let size = 200_000;
        let block = a.block("frame").create(size).send().unwrap();
        assert_eq!(
            (block.is_mapped(), block.size(), block.version()),
            (via == Via::Mapped, size, 0)
        );
        let reader = b.block("frame").attach().unwrap();
        assert_eq!(
            reader.read().unwrap(),
            (vec![0; size as usize], 0),
            "{via:?}"
        );
        let mut model = vec![0u8; size as usize];
        // Small writes, writes that need several requests, and writes at both edges.
        for (version, (offset, length)) in [(0, 1), (10, 150_000), (199_999, 1), (65_535, 3)]
            .into_iter()
            .enumerate()
        {
            let bytes: Vec<u8> = (0..length).map(|i| (i * 31 + version + 1) as u8).collect();
            let mut draft = block.write(WAIT).unwrap();
            draft.write(offset as u64, &bytes).unwrap();
            assert_eq!(kind(draft.write(size, &[1])), Code::OutOfRange);
            draft.commit().unwrap();
            model[offset..offset + length].copy_from_slice(&bytes);
            assert!(
                reader.read().unwrap().0 == model,
                "{via:?} after write {version}"
            );
        }
        let mut part = [0; 4];
        reader.read_into(65_534, &mut part).unwrap();
        assert_eq!(part, model[65_534..65_538]);
        assert_eq!(kind(reader.read_into(size, &mut part)), Code::OutOfRange);
        let version = block.version();
        assert_eq!(kind(reader.cas(0, &[1], &[9])), Code::Forbidden);
        assert_eq!(kind(reader.write_if(version, 0, &[1])), Code::Forbidden);
        assert_eq!(kind(reader.write_at(0, &[1])), Code::Forbidden);
        assert_eq!(kind(reader.write(NOW)), Code::Forbidden);
        let writer = b.block("frame").attach_writable().unwrap();
        assert_eq!(writer.cas(0, &model[..1], &[9]).unwrap(), Ok(version + 1));
        assert_eq!(writer.cas(0, &[7], &[8]).unwrap(), Err(vec![9]));
        assert_eq!(
            kind(writer.write_if(version, 0, &[1])),
            Code::VersionConflict
        );
        assert_eq!(writer.write_at(0, &[1]).unwrap(), version + 2);
        assert_eq!(a.blocks(None).unwrap()[0]["block_id"], "frame");
        assert_eq!(kind(a.block("frame").create(1).send()), Code::BlockExists);
        assert_eq!(kind(a.block("none").attach()), Code::NoBlock);
        assert_eq!(kind(a.block("bad name").attach()), Code::InvalidName);
        block.remove().unwrap();
        assert_eq!(kind(b.block("frame").attach()), Code::NoBlock);
    }
}

#[test]
fn several_writes_become_one_version() {
    for via in BOTH {
        let server = start();
        let a = app(&server, via, "a");
        let block = a.block("b").create(10).send().unwrap();
        block.write_at(0, b"0123456789").unwrap();
        let mut draft = block.write(WAIT).unwrap();
        draft.write(1, b"x").unwrap();
        draft.write(8, b"y").unwrap();
        let version = draft.commit().unwrap();
        assert_eq!(block.read().unwrap(), (b"0x234567y9".to_vec(), version));
        assert_eq!(version, 2, "{via:?}");
        // Nobody sees an abandoned draft, and its lock is free again.
        let mut draft = block.write(WAIT).unwrap();
        draft.write(0, b"never").unwrap();
        draft.abandon();
        let draft = block.write(WAIT).unwrap();
        draft.commit().unwrap();
        assert_eq!(block.read().unwrap().0, b"0x234567y9");
    }
}

#[test]
fn a_dropped_draft_is_published_or_its_error_is_reported() {
    let server = start();
    let a = app(&server, Via::Mapped, "a");
    let block = a.block("b").create(4).send().unwrap();
    let mut draft = block.write(WAIT).unwrap();
    draft.write(0, b"kept").unwrap();
    drop(draft);
    assert_eq!(block.read().unwrap(), (b"kept".to_vec(), 1));
    let b = app(&server, Via::Copied, "b");
    let copied = b.block("b").attach_writable().unwrap();
    let mut draft = copied.write(WAIT).unwrap();
    draft.write(0, b"lost").unwrap();
    drop(draft);
    assert_eq!(kind(copied.read()), Code::Cancelled);
    assert_eq!(copied.read().unwrap().0, b"kept");
}

#[test]
fn a_writer_publishes_many_versions_and_readers_wait_for_them() {
    for via in BOTH {
        let server = start();
        let a = app(&server, via, "a");
        let b = app(&server, via, "b");
        let block = a.block("b").create(8).send().unwrap();
        let reader = b.block("b").attach().unwrap();
        let other = app(&server, Via::Copied, "c");
        let mut changes = other.block("b").attach().unwrap().changes().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut seen = 0;
                while seen < 100 {
                    seen = reader.wait_for(seen, WAIT).unwrap();
                    let (bytes, version) = reader.read().unwrap();
                    assert!(version >= seen);
                    assert_eq!(
                        u64::from_le_bytes(bytes.try_into().unwrap()),
                        version,
                        "{via:?}"
                    );
                }
            });
            let writer = block.writer(WAIT).unwrap();
            for n in 1..=100u64 {
                assert_eq!(writer.write(0, &n.to_le_bytes()).unwrap(), n);
            }
        });
        assert_eq!(
            kind(reader.wait_for(100, Duration::from_millis(1))),
            Code::Timeout
        );
        // The last version is always announced.
        let last = std::iter::from_fn(|| changes.recv_timeout(WAIT).unwrap()).find(|v| *v == 100);
        assert_eq!(last, Some(100));
        block.remove().unwrap();
        assert_eq!(kind(reader.wait_for(100, WAIT)), Code::NoBlock);
        assert_eq!(changes.recv_timeout(WAIT).unwrap(), None);
    }
}

#[test]
fn locks_exclude_and_are_lost_with_their_lease() {
    for via in BOTH {
        let server = start();
        let a = app(&server, via, "a");
        let b = app(&server, via, "b");
        let mine = a.block("b").create(4).send().unwrap();
        let theirs = b.block("b").attach_writable().unwrap();
        let held = mine.lock(LockMode::Exclusive, NOW).unwrap();
        assert_eq!(kind(theirs.lock(LockMode::Shared, NOW)), Code::Locked);
        assert_eq!(kind(theirs.write(Duration::from_millis(5))), Code::Locked);
        assert_eq!(kind(theirs.write_at(0, b"x")), Code::Locked);
        held.renew(None).unwrap();
        let first = held.fence();
        held.unlock().unwrap();
        let shared = [&mine, &theirs].map(|b| b.lock(LockMode::Shared, NOW).unwrap());
        assert!(shared[0].fence() > first && shared[1].fence() > shared[0].fence());
        drop(shared);
        let leased = mine
            .lock_for(LockMode::Exclusive, WAIT, Duration::from_millis(30))
            .unwrap();
        let writer = theirs.writer(WAIT).unwrap();
        assert!(writer.lock().fence() > leased.fence());
        assert_eq!(kind(leased.renew(None)), Code::LockLost);
        assert_eq!(writer.write(0, b"mine").unwrap(), 1);
        assert_eq!(mine.read().unwrap().0, b"mine");
        drop(writer);
        // A writer that lost its lock can write again under a new one.
        let mut draft = mine.write(WAIT).unwrap();
        draft.write(0, b"next").unwrap();
        assert_eq!(draft.commit().unwrap(), 2, "{via:?}");
        assert_eq!(theirs.read().unwrap().0, b"next");
    }
}

#[test]
fn writes_under_a_lost_lease_are_never_visible() {
    let server = start();
    let a = app(&server, Via::Mapped, "a");
    let b = app(&server, Via::Mapped, "b");
    let mine = a.block("b").create(4).send().unwrap();
    let theirs = b.block("b").attach_writable().unwrap();
    let leased = mine
        .lock_for(LockMode::Exclusive, WAIT, Duration::from_millis(20))
        .unwrap();
    drop(leased);
    let writer = mine.writer(WAIT).unwrap();
    let mut late = writer.begin().unwrap();
    late.write(0, b"late").unwrap();
    // Its lock ends with its connection, in the middle of its write.
    let admin = app(&server, Via::Mapped, "admin");
    admin
        .request(&json!({"action": "kick", "app_id": "a"}))
        .unwrap();
    let mut draft = theirs.write(WAIT).unwrap();
    draft.write(0, b"good").unwrap();
    draft.commit().unwrap();
    assert_eq!(kind(writer.publish(late)), Code::LockLost);
    assert_eq!(theirs.read().unwrap().0, b"good");
    assert_eq!(b.block("b").attach().unwrap().read().unwrap().0, b"good");
}

#[test]
fn a_resize_moves_all_clients_to_the_new_generation() {
    for via in BOTH {
        let server = start();
        let a = app(&server, via, "a");
        let b = app(&server, via, "b");
        let block = a.block("b").create(4).send().unwrap();
        block.write_at(0, b"four").unwrap();
        let reader = b.block("b").attach().unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| reader.wait_for(1, WAIT).unwrap());
            block.resize(6).unwrap();
            assert_eq!((block.size(), block.generation()), (6, 2));
            // Waiting readers continue with the new generation.
            block.write_at(4, b"!!").unwrap();
            assert_eq!(waiter.join().unwrap(), 2, "{via:?}");
        });
        assert_eq!(reader.read().unwrap(), (b"four!!".to_vec(), 2));
        assert_eq!(reader.size(), 6);
    }
}

#[test]
fn numbers_are_read_and_written_by_their_layout() {
    for via in BOTH {
        let server = start();
        let a = app(&server, via, "a");
        let block = a
            .block("m")
            .layout("<f4", &[2, 3])
            .create(24)
            .send()
            .unwrap();
        let typed = block.typed::<f32>().unwrap();
        assert_eq!((typed.shape(), typed.len()), (&[2, 3][..], 6));
        typed.write(1, &[1.5, -2.0], WAIT).unwrap();
        assert_eq!(typed.read().unwrap().0, [0.0, 1.5, -2.0, 0.0, 0.0, 0.0]);
        assert_eq!(typed.load(2).unwrap(), -2.0);
        assert_eq!(kind(typed.load(6)), Code::OutOfRange);
        assert_eq!(kind(typed.write(5, &[1.0, 2.0], WAIT)), Code::OutOfRange);
        assert_eq!(kind(block.typed::<f64>()), Code::LayoutMismatch);
        assert_eq!(
            kind(a.block("m").layout("<f4", &[3, 2]).attach()),
            Code::LayoutMismatch
        );
        if via == Via::Mapped {
            let sum = block
                .view(|view| (0..6).map(|i| view.load::<f32>(i).unwrap()).sum::<f32>())
                .unwrap();
            assert_eq!(sum, -0.5);
        } else {
            assert_eq!(kind(block.view(|_| ())), Code::Storage);
        }
    }
}

#[test]
fn a_block_is_an_argument_of_a_call() {
    for caller_via in BOTH {
        for handler_via in BOTH {
            let server = start();
            let handler = app(&server, handler_via, "handler");
            handler
                .serve("sum", |request| {
                    let name = request.data::<serde_json::Value>()?["of"]["$block"]
                        .as_str()
                        .unwrap()
                        .to_owned();
                    assert_eq!(request.block_ids(), [name.as_str()]);
                    let block = request.block(&name)?;
                    let sum: u64 = block.read()?.0.iter().map(|b| u64::from(*b)).sum();
                    block.write_at(0, &[100])?;
                    Ok(sum)
                })
                .unwrap();
            let caller = app(&server, caller_via, "caller");
            let block = caller
                .block("arg")
                .create(100_000)
                .readable_by(&["caller"])
                .writable_by(&["caller"])
                .send()
                .unwrap();
            block.write_at(7, &[1, 2, 3]).unwrap();
            let call = || caller.call("sum", &json!({"of": block.reference()}));
            let sum: u64 = call().block_writable(&block).send().unwrap();
            assert_eq!(sum, 6, "{caller_via:?} {handler_via:?}");
            assert_eq!(block.read().unwrap().0[0], 100);
            let error = call().block(&block).send::<u64>().unwrap_err();
            assert_eq!(error.kind(), Code::HandlerError);
            assert!(error.message().starts_with("forbidden: "), "{error}");
            assert_eq!(kind(handler.block("arg").attach()), Code::Forbidden);
            // Only the caller is still attached.
            assert_eq!(block.info().unwrap()["attachments_total"], 1);
        }
    }
}

#[test]
fn after_a_reconnect_blocks_and_subscriptions_come_back() {
    for via in BOTH {
        let server = start();
        let a = app(&server, via, "a");
        let b = app(&server, Via::Mapped, "b");
        let mine = a.block("b").create(4).send().unwrap();
        let theirs = b.block("b").attach_writable().unwrap();
        let mut changes = mine.changes().unwrap();
        let held = mine.lock(LockMode::Exclusive, NOW).unwrap();
        b.request(&json!({"action": "kick", "app_id": "a"}))
            .unwrap();
        let mut draft = theirs.write(WAIT).unwrap();
        draft.write(0, b"meet").unwrap();
        draft.commit().unwrap();
        let end = Instant::now() + TIMEOUT;
        while mine.info().is_err() || theirs.info().unwrap()["attachments_total"] != 2 {
            assert!(Instant::now() < end, "it stays removed");
        }
        assert!(!held.is_held());
        assert_eq!(mine.read().unwrap().0, b"meet", "{via:?}");
        theirs.write_at(0, b"next").unwrap();
        while changes.recv_timeout(WAIT).unwrap().unwrap() < 2 {}
        assert_eq!(mine.read().unwrap().0, b"next");
        assert!(mine.is_live());
    }
}

#[test]
fn a_mapping_outlives_the_server_and_reports_it() {
    let mut server = start();
    let a = app(&server, Via::Mapped, "a");
    let block = a.block("b").create(5).send().unwrap();
    block.write_at(0, b"still").unwrap();
    assert!(block.is_live());
    server.kill();
    let end = Instant::now() + TIMEOUT;
    while block.is_live() {
        assert!(Instant::now() < end, "it is not noticed");
        std::thread::yield_now();
    }
    assert_eq!(block.read().unwrap(), (b"still".to_vec(), 1));
    assert_eq!(block.wait_for(0, WAIT).unwrap(), 1);
}

/// Crashes and restarts the server, and waits until the handle's app has noticed.
fn crash(server: &mut testing::Server, handle: &Block) {
    server.kill();
    let end = Instant::now() + TIMEOUT;
    while handle.is_live() {
        assert!(Instant::now() < end, "it is not noticed");
        std::thread::yield_now();
    }
    server.restart().unwrap();
}

fn wait_live(handle: &Block) {
    let end = Instant::now() + TIMEOUT;
    while !handle.is_live() {
        assert!(Instant::now() < end, "it stays removed");
        std::thread::yield_now();
    }
}

#[test]
fn mapped_handles_work_after_a_crash_of_the_server() {
    for is_locked in [false, true] {
        let mut server = start();
        let a = app(&server, Via::Mapped, "a");
        let block = a.block("b").create(5).send().unwrap();
        // This is answered once it is stored, and the block's record is stored before it.
        let b = app(&server, Via::Mapped, "b");
        let reader = b.block("b").attach().unwrap();
        block.write_at(0, b"first").unwrap();
        block.write_at(0, b"still").unwrap();
        let mut changes = reader.changes().unwrap();
        let held = is_locked.then(|| block.writer(WAIT).unwrap());
        crash(&mut server, &block);
        // The lock is requested before the reconnect, and granted once the block is back.
        let mut draft = block.write(WAIT).unwrap();
        assert_eq!(block.read().unwrap(), (b"still".to_vec(), 2));
        if let Some(held) = held {
            assert!(!held.lock().is_held());
            assert_eq!(kind(held.write(0, b"never")), Code::LockLost);
        }
        draft.write(0, b"again").unwrap();
        assert_eq!(draft.commit().unwrap(), 3);
        assert!(block.is_live());
        assert_eq!(reader.wait_for(2, WAIT).unwrap(), 3);
        assert_eq!(reader.read().unwrap(), (b"again".to_vec(), 3));
        while changes.recv_timeout(WAIT).unwrap().unwrap() < 3 {}
        wait_live(&reader);
        assert_eq!(block.generation(), if is_locked { 2 } else { 1 });
        // The subscription came back with the block: a write through the server is announced.
        let c = app(&server, Via::Copied, "c");
        let other = c.block("b").attach_writable().unwrap();
        assert_eq!(other.write_at(0, b"final").unwrap(), 4);
        while changes.recv_timeout(WAIT).unwrap().unwrap() < 4 {}
        assert_eq!(reader.read().unwrap(), (b"final".to_vec(), 4));
    }
}

#[test]
fn a_reader_alone_keeps_a_block_over_a_crash() {
    let mut server = start();
    let a = app(&server, Via::Mapped, "a");
    let block = a.block("b").create(5).send().unwrap();
    block.write_at(0, b"still").unwrap();
    let b = app(&server, Via::Mapped, "b");
    let reader = b.block("b").attach().unwrap();
    drop((block, a));
    crash(&mut server, &reader);
    // The first request over the new connection makes the client offer the block again.
    assert_eq!(reader.info().unwrap()["version"], 1);
    wait_live(&reader);
    assert_eq!(reader.read().unwrap().1, 1);
    let maker = app(&server, Via::Mapped, "a");
    let block = maker.block("b").attach_writable().unwrap();
    assert_eq!(block.read().unwrap(), reader.read().unwrap());
    assert_eq!(block.write_at(0, &[7; 5]).unwrap(), 2);
    assert_eq!(reader.wait_for(1, WAIT).unwrap(), 2);
    assert_eq!(reader.read().unwrap().0, [7; 5]);
    // A block that nobody has mapped is gone.
    drop((block, reader, b));
    server.restart().unwrap();
    let c = app(&server, Via::Mapped, "c");
    assert_eq!(kind(c.block("b").attach()), Code::NoBlock);
}

#[test]
fn persistent_blocks_are_back_after_a_restart() {
    for via in BOTH {
        let mut server = start();
        let a = app(&server, via, "a");
        let block = a.block("b").create(5).persistent().send().unwrap();
        let mut draft = block.write(WAIT).unwrap();
        draft.write(0, b"still").unwrap();
        draft.commit().unwrap();
        assert_eq!(block.flush().unwrap(), 1);
        server.restart().unwrap();
        let b = app(&server, via, "b");
        assert_eq!(
            b.block("b").attach().unwrap().read().unwrap(),
            (b"still".to_vec(), 1)
        );
    }
}

/// The variable that makes this program a client of a test.
const ROLE: &str = "LATZERO_TEST_BLOCK_ROLE";

/// Not a test: the process that the tests below start.
#[test]
fn a_process_of_another_test() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let app = App::connect(&std::env::var("LATZERO_TEST_URL").unwrap()).unwrap();
    if role == "writer" {
        let block = app.block("b").attach_writable().unwrap();
        let mut writer = block.writer(WAIT).unwrap();
        writer.tell_server(false);
        let size = block.size() as usize;
        let mut n = block.version();
        loop {
            n += 1;
            let mut writing = writer.begin().unwrap();
            // Every word of a version is its number, so that a mixture of versions is visible.
            let bytes: Vec<u8> = n.to_le_bytes().into_iter().cycle().take(size).collect();
            writing.write(0, &bytes).unwrap();
            writer.publish(writing).unwrap();
        }
    }
    let reads: u64 = role.parse().unwrap();
    let block = app.block("b").attach().unwrap();
    let mut bytes = vec![0; block.size() as usize];
    let (mut newest, mut torn, mut contended) = (0, 0, 0u64);
    for _ in 0..reads {
        match block.read_into(0, &mut bytes) {
            Ok(version) => {
                let words = bytes
                    .chunks_exact(8)
                    .map(|w| u64::from_le_bytes(w.try_into().unwrap()));
                torn += u64::from(words.into_iter().any(|word| word != version));
                assert!(
                    version >= newest,
                    "versions go back from {newest} to {version}"
                );
                newest = version;
            }
            Err(error) if error.kind() == Code::Contended => contended += 1,
            Err(error) => panic!("{error}"),
        }
    }
    println!("torn {torn} contended {contended} newest {newest}");
}

fn spawn(role: &str, url: &str) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_process_of_another_test", "--nocapture"])
        .env(ROLE, role)
        .env("LATZERO_TEST_URL", url)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn no_read_is_ever_torn_by_writers_that_are_killed() {
    let server = start();
    let a = app(&server, Via::Mapped, "a");
    let block = a.block("b").create(512).send().unwrap();
    let url = |name: &str| format!("{}&pool=p", server.url(name));
    // A million reads in all.
    let mut readers: Vec<_> = (0..2)
        .map(|n| spawn("500000", &url(&format!("reader{n}"))))
        .collect();
    let mut kills = 0;
    let mut seed = 0x9e37_79b9_u64;
    while readers
        .iter_mut()
        .any(|reader| reader.try_wait().unwrap().is_none())
    {
        let mut writer = spawn("writer", &url("writer"));
        // The writer is killed wherever it is after this many more versions.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let until = block.version() + 1 + (seed >> 33) % 5000;
        while block.version() < until
            && readers
                .iter_mut()
                .any(|reader| reader.try_wait().unwrap().is_none())
        {
            let _ = block.wait_for(block.version(), Duration::from_millis(5));
        }
        kill_process(Pid::from_child(&writer), Signal::KILL).unwrap();
        writer.wait().unwrap();
        kills += 1;
    }
    for mut reader in readers {
        let mut said = String::new();
        reader
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        assert!(reader.wait().unwrap().success(), "{said}");
        assert!(said.contains("torn 0 "), "{said}");
    }
    assert!(kills >= 1);
    // Even if the writer died in the middle of a write, the next one can write.
    let mut draft = block.write(WAIT).unwrap();
    draft.write(0, &[7; 512]).unwrap();
    draft.commit().unwrap();
    assert_eq!(block.read().unwrap().0, [7; 512]);
}
