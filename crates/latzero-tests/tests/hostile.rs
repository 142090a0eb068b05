//! Clients that try to exhaust the server, one kind at a time: what each holds stays within its
//! limit and matches the server's accounting, and a well-behaved client is served.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use latzero_tests::Server;
use latzero_tests::hostile::{
    Innocent, KINDS, Kind, MEMORY_MAX, RESIDENT_MAX, resident, resident_peak,
};
use rustix::process::Signal;

const MIB: f64 = (1 << 20) as f64;

/// Whether the accounting and the kernel agree, within 16 MiB and a tenth.
fn is_alike(counted: f64, grown: f64) -> bool {
    (counted - grown).abs() <= 16.0 * MIB + 0.1 * grown.max(counted)
}

/// Runs a kind next to a well-behaved client, and checks the server's memory while everything is
/// still held.
fn stand(kind: &Kind) {
    let server = Server::with(&[MEMORY_MAX]);
    let mut innocent = Innocent::new(&server);
    let before = resident(&server);
    let (held_before, _) = innocent.books();
    let is_over = AtomicBool::new(false);
    let held = std::thread::scope(|scope| {
        let attack = scope.spawn(|| {
            let held = (kind.attack)(&server);
            is_over.store(true, Ordering::Release);
            held
        });
        let mut calls = 0;
        while !is_over.load(Ordering::Acquire) {
            innocent.call();
            calls += 1;
        }
        assert!(calls > 0, "{}: no call succeeded beside it", kind.name);
        attack.join().unwrap()
    });
    let look = |innocent: &mut Innocent| {
        let (held, blocks) = innocent.books();
        let counted = held as f64 - held_before as f64 - blocks as f64;
        (counted, resident(&server) as f64 - before as f64)
    };
    // What is being written to the disk is soon there.
    let end = Instant::now() + Duration::from_secs(5);
    let (mut counted, mut grown) = look(&mut innocent);
    while !is_alike(counted, grown) && Instant::now() < end {
        innocent.call();
        (counted, grown) = look(&mut innocent);
    }
    let peak = resident_peak(&server);
    println!(
        "{}: {} connections, counted {:.1} MiB, resident +{:.1} MiB, peak {:.1} MiB",
        kind.name,
        held.len(),
        counted / MIB,
        grown / MIB,
        peak as f64 / MIB
    );
    assert!(peak <= RESIDENT_MAX, "{}: {peak} bytes at most", kind.name);
    if kind.is_compared {
        assert!(
            is_alike(counted, grown),
            "{}: the ledger counts {counted}, the kernel {grown}",
            kind.name
        );
    }
    // It ends when it is asked to, even with clients connected.
    server.signal(Signal::TERM);
    assert!(server.has_ended(), "{}: it does not end", kind.name);
    drop(held);
}

#[test]
fn the_server_withstands_every_kind_of_attack() {
    let mut failed = Vec::new();
    for kind in KINDS {
        let stood = std::panic::catch_unwind(|| stand(kind));
        if stood.is_err() {
            failed.push(kind.name);
        }
    }
    assert_eq!(failed, Vec::<&str>::new());
}
