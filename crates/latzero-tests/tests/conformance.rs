//! The vectors of `conformance/vectors`, over every transport. They are extracted from
//! `docs/protocol.md`.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::collections::HashMap;
use std::path::Path;

use latzero_tests::{Server, Via, Wire, fill, matches};
use serde_json::Value;

#[test]
fn every_vector_over_tcp() {
    run_all(Via::Tcp);
}

#[test]
fn every_vector_over_the_unix_socket() {
    run_all(Via::Unix);
}

#[test]
fn every_vector_over_tls() {
    run_all(Via::Tls);
}

fn run_all(via: Via) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../conformance/vectors");
    let mut ran = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        run(&serde_json::from_str(&text).unwrap(), via);
        ran += 1;
    }
    assert!(ran >= 20, "only {ran} vectors were found");
}

/// Runs one vector against a new server.
fn run(vector: &Value, via: Via) {
    let name = &vector["name"];
    let server = match via {
        Via::Tls => Server::with(&["enable_tls=true"]),
        Via::Tcp | Via::Unix => Server::start(),
    };
    let mut connections: HashMap<String, Wire> = HashMap::new();
    let mut bound = HashMap::new();
    for (i, step) in vector["steps"].as_array().unwrap().iter().enumerate() {
        let who = step["connection"].as_str().unwrap();
        let wire = connections
            .entry(who.to_owned())
            .or_insert_with(|| server.connect(via));
        let raw = step.get("raw_hex").map(bytes_of);
        if let Some(message) = step.get("send") {
            match raw {
                Some(raw) => wire.send_attachment(&fill(message, &bound), &raw),
                None => wire.send(&fill(message, &bound)),
            }
        } else if let Some(hex) = step.get("send_hex") {
            wire.send_bytes(&bytes_of(hex));
        } else if let Some(expected) = step.get("receive") {
            let (got, attachment) = wire.receive_whole();
            assert_eq!(attachment, raw, "{name}, step {}: raw bytes", i + 1);
            assert!(
                matches(expected, &got, &mut bound),
                "{name}, step {}: {who} got\n{got}\nnot\n{expected}",
                i + 1
            );
        } else if step.get("closed").is_some() {
            let more = wire.try_receive().unwrap();
            assert!(
                more.is_none(),
                "{name}, step {}: {who} got {more:?} where the connection should end",
                i + 1
            );
        } else if step.get("disconnect").is_some() {
            // Waits until the server has processed it: what other connections send next may reach
            // another IO thread earlier.
            let mut wire = connections.remove(who).unwrap();
            wire.shut();
            wire.wait_closed();
        } else {
            panic!("{name}, step {}: not a step", i + 1);
        }
    }
}

fn bytes_of(hex: &Value) -> Vec<u8> {
    let hex = hex.as_str().unwrap();
    (0..hex.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap())
        .collect()
}
