//! Futures that wait for versions of blocks: few threads for many of them. One test in this file,
//! since it counts the threads of its process.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::fs;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use latzero::blocking::App;
use latzero::{Code, Error, testing};
use latzero_tests::TIMEOUT;

type Waiting = Pin<Box<dyn Future<Output = Result<u64, Error>> + Send>>;

/// How many threads wait for blocks.
fn threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names
        .filter(|name| name.trim_end() == "latzero-blocks")
        .count()
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < TIMEOUT, "{what}");
        std::thread::yield_now();
    }
}

fn poll(waiting: &mut Waiting) -> Poll<Result<u64, Error>> {
    waiting
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
}

fn begin(block: &latzero::Block, beyond: u64, time: Duration) -> Waiting {
    let block = block.clone();
    let mut waiting: Waiting = Box::pin(async move { block.wait_for(beyond, time).await });
    assert!(poll(&mut waiting).is_pending());
    waiting
}

#[test]
fn one_thread_waits_for_many_blocks() {
    let server = testing::server().unwrap();
    let app = App::connect(&format!("{}&pool=p", server.url("a"))).unwrap();
    let make = |i: usize| app.block(&format!("b{i}")).create(8).send().unwrap();
    let blocks: Vec<_> = (0..100).map(make).collect();
    let wait = |block: &latzero::blocking::Block| begin(block, 0, TIMEOUT);
    let mut waits: Vec<_> = blocks.iter().map(wait).collect();
    until("one thread waits", || threads() == 1);

    // Each ends with the version of its block, and the others go on.
    for (i, waiting) in waits.iter_mut().enumerate().rev().step_by(7) {
        blocks[i].write_at(0, &[1]).unwrap();
        assert_eq!(app.run(None, waiting).unwrap().unwrap(), 1);
        assert!(poll(&mut wait(&blocks[(i + 1) % 7])).is_pending());
    }

    // Waits for one block, more than a thread takes; the newest of them does not wake the oldest.
    let common = make(1000);
    let mut many: Vec<_> = (0..200).map(|i| begin(&common, i % 2, TIMEOUT)).collect();
    let expected = (waits.len() + many.len()).div_ceil(127);
    assert!(threads() <= expected, "{} of {expected}", threads());
    common.write_at(0, &[1]).unwrap();
    for (i, waiting) in many.iter_mut().enumerate() {
        if i % 2 == 0 {
            assert_eq!(app.run(None, waiting).unwrap().unwrap(), 1);
        } else {
            assert!(poll(waiting).is_pending());
        }
    }
    drop(many);

    // A removal ends a wait, and so does its time, for a block that is not mapped too.
    let mut removed = begin(&blocks[0], 0, TIMEOUT);
    app.block("b0").remove().unwrap();
    let error = app.run(None, &mut removed).unwrap().unwrap_err();
    assert_eq!(error.kind(), Code::NoBlock);
    // Also of a block that was resized before, which this handle never saw.
    let other = App::connect(&format!("{}&pool=p", server.url("other"))).unwrap();
    let resized = other.block("b1").attach_writable().unwrap();
    resized.resize(16).unwrap();
    resized.remove().unwrap();
    let mut removed: Waiting = Box::pin({
        let block = latzero::Block::clone(&blocks[1]);
        async move { block.wait_for(9, TIMEOUT).await }
    });
    let error = app.run(None, &mut removed).unwrap().unwrap_err();
    assert_eq!(error.kind(), Code::NoBlock);
    let far = App::connect(&format!("{}&pool=p", server.tcp_url("far"))).unwrap();
    let copied = far.block("b1000").attach().unwrap();
    for block in [&copied, &common] {
        let time = Duration::from_millis(20);
        let begun = Instant::now();
        let error = app.run(
            None,
            &mut Box::pin(latzero::Block::wait_for(block, 9, time)),
        );
        assert_eq!(error.unwrap().unwrap_err().kind(), Code::Timeout);
        assert!(begun.elapsed() >= time);
    }
    let mut copied = begin(&copied, 1, TIMEOUT);
    common.write_at(0, &[2]).unwrap();
    assert_eq!(far.run(None, &mut copied).unwrap().unwrap(), 2);

    // Too many are refused, and the refusal ends with them.
    drop(waits);
    let all: Vec<_> = (0..1024).map(|_| begin(&common, 9, TIMEOUT)).collect();
    let error = app.run(
        None,
        &mut Box::pin(latzero::Block::wait_for(&common, 9, TIMEOUT)),
    );
    assert_eq!(error.unwrap().unwrap_err().kind(), Code::Overloaded);
    drop(all);
    drop(begin(&common, 9, TIMEOUT));

    // The threads end without waits, and at once with the app.
    until("one thread is left at most", || threads() <= 1);
    drop(begin(&common, 9, TIMEOUT));
    drop((blocks, common, app, copied, far));
    until("no thread is left", || threads() == 0);
}
