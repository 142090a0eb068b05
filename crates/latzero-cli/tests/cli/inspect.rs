//! Looking at a server, and measuring it.

use serde_json::Value;

use crate::program::{Running, Server, eventually};

#[test]
fn scripts_get_json() {
    let server = Server::start();
    let _serving = server.serve(&[
        "alpha/double",
        "--app",
        "calc",
        "--doc",
        "Doubles.",
        "--",
        "cat",
    ]);
    let apps = server.run(&["apps", "--json"]).ended_with(0).json();
    let apps = apps["apps"].as_array().unwrap();
    let calc = apps.iter().find(|app| app["app_id"] == "calc").unwrap();
    assert_eq!(calc["triggers"][0]["name"], "double");
    assert_eq!(calc["triggers"][0]["doc"], "Doubles.");
    let inside = server
        .run(&["apps", "--json", "--pool", "alpha", "--live"])
        .ended_with(0)
        .json();
    assert_eq!(inside["apps"].as_array().unwrap().len(), 1, "{inside}");
    let text = server.run(&["apps"]).ended_with(0).out;
    assert!(text.contains("calc\t1\tnow\talpha\tdouble\n"), "{text}");

    let pools = server.run(&["pools", "--json"]).ended_with(0).json();
    assert!(
        pools["pools"]
            .as_array()
            .unwrap()
            .iter()
            .any(|pool| pool["pool"] == "alpha")
    );
    let text = server.run(&["pools"]).ended_with(0).out;
    assert!(text.contains("alpha\t1\tlocal\t"), "{text}");

    let stats = server.run(&["stats", "--json"]).ended_with(0).json();
    for part in [
        "server",
        "transport",
        "apps",
        "pools",
        "triggers",
        "errors",
        "resources",
    ] {
        assert!(stats[part].is_object(), "{part}: {stats}");
    }
    let text = server.run(&["stats"]).ended_with(0).out;
    assert!(text.contains("triggers\tresponse_time_us.p99\t"), "{text}");
    assert_eq!(
        server.run(&["health", "--json"]).ended_with(0).json()["status"],
        "ok"
    );
    assert!(
        server
            .run(&["health"])
            .ended_with(0)
            .out
            .starts_with("server\tok")
    );
}

#[test]
fn a_server_at_a_limit_is_degraded() {
    let server = Server::with(&["--set", "limits.connections_max=1"]);
    // The one connection that there may be is the one that asks.
    let ran = server.run(&["health"]).ended_with(4);
    assert!(ran.out.contains("transport\tdegraded\t"), "{}", ran.out);
}

#[test]
fn ping_measures_round_trips() {
    let server = Server::start();
    let ran = server.run(&["ping", "-c", "3"]).ended_with(0);
    assert_eq!(ran.out.lines().count(), 4, "{}", ran.out);
    assert!(ran.out.contains("3 answered: min "), "{}", ran.out);
    let ran = server.run(&["ping", "-c", "2", "--json"]).ended_with(0);
    let lines: Vec<Value> = ran
        .out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        (&lines[1]["seq"], &lines[2]["count"]),
        (&2.into(), &2.into())
    );
    assert!(lines[2]["median_us"].as_f64().unwrap() > 0.0);
}

#[test]
fn bench_measures_calls_and_events() {
    let server = Server::start();
    let check = |args: &[&str]| {
        let ran = server
            .run(&[&["bench"], args, &["--calls", "300", "--json"]].concat())
            .ended_with(0);
        let measured = ran.json();
        assert_eq!(
            (&measured["count"], &measured["delivered"]),
            (&300.into(), &300.into()),
            "{measured}"
        );
        let at = |field: &str| measured[field].as_f64().unwrap();
        assert!(
            at("per_second") > 0.0 && at("p50_us") <= at("p99_us") && at("p99_us") <= at("max_us"),
            "{measured}"
        );
    };
    check(&["call"]);
    check(&["call", "--in-flight", "16", "--size", "1KiB"]);
    check(&["call", "--to", "system/echo"]);
    check(&["emit"]);
    check(&["emit", "--in-flight", "16"]);
    let ran = server
        .run(&["bench", "call", "--to", "default/nobody", "--calls", "2"])
        .ended_with(5);
    ran.said("2 of 2 failed").said("no_handler");
    let text = server
        .run(&["bench", "call", "--calls", "10"])
        .ended_with(0)
        .out;
    assert!(text.contains("calls per second"), "{text}");
}

#[test]
fn bench_ends_when_the_server_does() {
    let check = |args: &[&str]| {
        let server = Server::start();
        let args = [&["bench", "call", "--calls", "1000000000"], args].concat();
        let mut measuring = Running::start_err(&mut server.command(&args));
        eventually(|| {
            let stats = server.run(&["stats", "--json"]).json();
            stats["triggers"]["calls"].as_u64().unwrap() > 100
        });
        let _home = server.crash();
        measuring.line_with("disconnected");
        assert_eq!(measuring.exit_code(), 3);
    };
    check(&[]);
    check(&["--in-flight", "16"]);
}

#[test]
fn kick_closes_connections() {
    let server = Server::start();
    let _serving = server.serve(&["alpha/x", "--app", "calc", "--", "cat"]);
    let done = server.run(&["kick", "calc", "--json"]).ended_with(0).json();
    assert_eq!(done["kicked"], 1);
    server
        .run(&["kick", "nobody"])
        .ended_with(5)
        .said("app 'nobody' is not connected");
    server
        .run(&["kick", "latzer"])
        .ended_with(5)
        .said("did you mean latzero?");
}
