//! The benchmark as a smoke test: a few hundred calls through every contestant that needs no
//! installation.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

const PEERS: [&str; 4] = ["relay-tcp", "relay-unix", "json-tcp", "json-unix"];

fn bench(args: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_latzero-bench"))
        .args(args)
        .output()
        .expect("the benchmark starts")
}

/// Checks every cell that `placement` should have, and that each of its calls was answered.
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
fn every_call_is_answered_with_free_placement() {
    check("free");
}

#[test]
#[cfg(target_os = "linux")]
fn every_call_is_answered_on_one_cpu() {
    check("one-cpu");
}

#[test]
fn an_unknown_peer_is_refused_with_a_list_of_known_peers() {
    let output = bench(&["rpc", "--quick", "--peers", "relay-tpc"]);
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("'relay-tpc'") && stderr.contains("relay-tcp"),
        "{stderr}"
    );
}

/// The server, if there is one.
fn program() -> PathBuf {
    let beside = Path::new(env!("CARGO_BIN_EXE_latzero-bench")).with_file_name("latzero");
    std::env::var_os("LATZERO_BIN").map_or(beside, PathBuf::from)
}

/// Runs `bench --quick --json`; prints a message and returns `None` if there is no server.
fn with_server(bench_name: &str) -> Option<Value> {
    with_server_and(bench_name, &[])
}

/// As [`with_server`], with additional arguments.
fn with_server_and(bench_name: &str, more: &[&str]) -> Option<Value> {
    let program = program();
    if !program.is_file() {
        eprintln!(
            "skipped `{bench_name}`: {} is not built (`cargo build -p latzero-cli`, or name the \
             program in LATZERO_BIN)",
            program.display()
        );
        return None;
    }
    let output = bench(&[&[bench_name, "--quick", "--json"], more].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    Some(serde_json::from_slice(&output.stdout).expect("JSON on stdout"))
}

/// Checks that the benchmark has `count` figures, each a number above `least`, and `bounded` of
/// them with a limit.
fn check_findings(report: &Value, count: usize, bounded: usize, least: f64) {
    let findings = report["findings"].as_array().expect("a list of findings");
    assert_eq!(findings.len(), count, "{findings:?}");
    for finding in findings {
        assert!(finding["value"].as_f64() >= Some(least), "{finding}");
        let has_bound = finding["at_most"].is_f64() || finding["at_least"].is_f64();
        assert_eq!(finding["met"].is_boolean(), has_bound);
    }
    let with_bound = findings.iter().filter(|it| it["met"].is_boolean());
    assert_eq!(with_bound.count(), bounded);
}

#[test]
#[cfg(target_os = "linux")]
fn idle_connections_are_measured() {
    if let Some(report) = with_server("idle") {
        check_findings(&report, 12, 4, 0.0);
        assert_eq!(report["rounds"][0]["connections"], 200);
    }
}

#[test]
fn every_trigger_of_every_size_answers() {
    if let Some(report) = with_server("lookup") {
        check_findings(&report, 18, 8, f64::MIN_POSITIVE);
        for cell in report["rounds"].as_array().expect("a list of cells") {
            assert_eq!(cell["rounds"][0]["measured"], 100, "{cell}");
        }
    }
}

#[test]
#[cfg(target_os = "linux")]
fn calls_are_answered_next_to_readers_that_stopped() {
    if let Some(report) = with_server("slow-reader") {
        check_findings(&report, 18, 4, 0.0);
        assert_eq!(report["rounds"][4]["readers"]["stopped"], 100);
    }
}

#[test]
fn starts_are_timed() {
    if let Some(report) = with_server("start") {
        check_findings(&report, 7, 5, f64::MIN_POSITIVE);
        assert_eq!(
            report["rounds"]["again_ms"].as_array().map(Vec::len),
            Some(2)
        );
    }
}

#[test]
#[cfg(target_os = "linux")]
fn durability_is_measured() {
    if let Some(report) = with_server("durable") {
        // A few apps may fit into memory that the server has anyway.
        check_findings(&report, 25, 7, 0.0);
        let parts = &report["rounds"];
        assert_eq!(parts["known"]["rounds"]["known"], 500);
        assert_eq!(parts["back"]["rounds"]["apps"], 100);
        for crowd in parts["parked"]["rounds"]["crowds"]
            .as_array()
            .expect("a list of crowds")
        {
            assert!(crowd["turns"][0]["parked"].as_u64() > Some(0), "{crowd}");
        }
    }
}

#[test]
#[cfg(target_os = "linux")]
fn calls_are_compared_with_another_servers() {
    let program = program();
    let before = program.to_str().expect("the path is UTF-8");
    if let Some(report) = with_server_and("durable", &["--part", "calls", "--before", before]) {
        check_findings(&report, 12, 1, f64::MIN_POSITIVE);
        let pair = &report["rounds"]["calls"]["rounds"][0]["pairs"][0];
        assert!(pair["now"]["p50"].as_f64() > Some(0.0), "{pair}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn blocks_are_compared_with_another_servers() {
    let program = program();
    let before = program.to_str().expect("the path is UTF-8");
    if let Some(report) = with_server_and("block", &["--before", before]) {
        check_findings(&report, 30, 6, f64::MIN_POSITIVE);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn all_benchmarks_run_in_turn() {
    if let Some(report) = with_server("all") {
        let benches = report["benches"].as_array().expect("a list of reports");
        let names: Vec<_> = benches.iter().map(|it| it["bench"].as_str()).collect();
        let expected = [
            "start",
            "idle",
            "lookup",
            "keys",
            "slow-reader",
            "block",
            "durable",
            "rpc",
        ];
        assert_eq!(names, expected.map(Some));
    }
}
