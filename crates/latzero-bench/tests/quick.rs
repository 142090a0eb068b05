//! The benchmark as a smoke test: a few hundred calls through every contestant that needs nothing installed.

use serde_json::Value;
use std::process::Command;

const PEERS: [&str; 4] = ["relay-tcp", "relay-unix", "json-tcp", "json-unix"];

fn bench(args: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_latzero-bench"))
        .args(args)
        .output()
        .expect("the benchmark starts")
}

/// Checks every cell that `placement` should have, and that each call in it was answered.
fn check(placement: &str) {
    let peers = PEERS.join(",");
    let output = bench(&[
        "rpc",
        "--quick",
        "--json",
        "--peers",
        &peers,
        "--placement",
        placement,
    ]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON on stdout");
    let results = report["results"].as_array().expect("a list of results");
    for peer in PEERS {
        for in_flight in [1, 64, 256, 1024] {
            let is_it = |it: &&Value| it["peer"] == peer && it["in_flight"] == in_flight;
            let cell = results
                .iter()
                .find(is_it)
                .unwrap_or_else(|| panic!("no cell for {peer}"));
            assert_eq!(cell["placement"], placement);
            let round = &cell["rounds"][0];
            assert!(round["asked"].as_u64() >= Some(300), "{cell}");
            assert_eq!(round["asked"], round["answered"], "{cell}");
            assert!(round["measured"].as_u64() >= Some(300), "{cell}");
            let figure = if in_flight == 1 {
                "p50_us"
            } else {
                "calls_per_second"
            };
            assert!(cell["median"][figure].as_f64() > Some(0.0), "{cell}");
            assert!(
                cell["ratio_to"]["relay"][figure].as_f64() > Some(0.0),
                "{cell}"
            );
        }
    }
    assert_eq!(results.len(), PEERS.len() * 4);
}

#[test]
fn every_call_is_answered_where_the_scheduler_puts_it() {
    check("free");
}

#[test]
#[cfg(target_os = "linux")]
fn every_call_is_answered_on_one_cpu() {
    check("one-cpu");
}

#[test]
fn an_unknown_contestant_is_named_with_those_there_are() {
    let output = bench(&["rpc", "--quick", "--peers", "relay-tpc"]);
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("'relay-tpc'") && stderr.contains("relay-tcp"),
        "{stderr}"
    );
}
