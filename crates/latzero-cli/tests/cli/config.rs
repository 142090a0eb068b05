//! Settings and what the machine has to say about them.

use std::net::TcpListener;

use rustix::process::Signal;
use serde_json::Value;

use crate::program::{Server, latzero, run};

fn setting<'a>(shown: &'a Value, name: &str) -> &'a Value {
    let mut all = shown.as_array().into_iter().flatten();
    all.find(|setting| setting["name"] == name)
        .expect("every setting is shown")
}

#[test]
fn each_source_overrides_the_next() {
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join(".latzero/config");
    std::fs::create_dir_all(&config).unwrap();
    std::fs::write(
        config.join("10.toml"),
        "host = \"::1\"\nport = 1\nio_threads = 2\ndrain_timeout = \"1s\"\n",
    )
    .unwrap();
    std::fs::write(config.join("20.toml"), "port = 2\nio_threads = 3\n").unwrap();
    let mut command = latzero(
        home.path(),
        &[
            "config",
            "show",
            "--json",
            "--port",
            "4",
            "--set",
            "log_level=debug",
        ],
    );
    command
        .env("LATZERO_PORT", "3")
        .env("LATZERO_IO_THREADS", "4")
        .env("LATZERO_LIMITS_MAX_FRAME", "1MiB");
    let shown = run(&mut command).ended_with(0).json();
    let check = |name: &str, text: &str, source: &str| {
        let setting = setting(&shown, name);
        assert_eq!(setting["text"], text, "{setting}");
        let from = setting["source"].as_str().unwrap();
        assert!(
            from.starts_with(source.split('*').next().unwrap()),
            "{setting}"
        );
        assert!(
            from.ends_with(source.split('*').next_back().unwrap()),
            "{setting}"
        );
    };
    check("port", "4", "command line --port");
    check("log_level", "debug", "command line --set log_level");
    check("io_threads", "4", "environment LATZERO_IO_THREADS");
    check(
        "limits.max_frame",
        "1 MiB",
        "environment LATZERO_LIMITS_MAX_FRAME",
    );
    check("host", "::1", "file *config/10.toml");
    check("cluster_mode", "false", "default");

    let changed = run(&mut latzero(home.path(), &["config", "show", "--changed"]))
        .ended_with(0)
        .out;
    let names: Vec<&str> = changed
        .lines()
        .filter_map(|line| line.split('\t').next())
        .collect();
    assert_eq!(names, ["port", "host", "io_threads", "drain_timeout"]);

    // A file that is named stands for all others.
    let named = home.path().join("one.toml");
    std::fs::write(&named, "port = 9\n").unwrap();
    let args = [
        "config",
        "show",
        "--json",
        "--config",
        named.to_str().unwrap(),
    ];
    let shown = run(&mut latzero(home.path(), &args)).ended_with(0).json();
    assert_eq!(setting(&shown, "port")["text"], "9");
    assert_eq!(setting(&shown, "host")["source"], "default");
}

#[test]
fn errors_in_files_have_a_position() {
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join(".latzero/config");
    std::fs::create_dir_all(&config).unwrap();
    std::fs::write(
        config.join("a.toml"),
        "# mine\nprot = 5\nio_threads = \"many\"\n",
    )
    .unwrap();
    for args in [&["config", "show"][..], &["start"]] {
        let ran = run(&mut latzero(home.path(), args)).ended_with(2);
        ran.said("a.toml:2:1: there is no setting `prot`; the nearest is `port`")
            .said("a.toml:3:14: `io_threads` must be");
    }
    let found = run(&mut latzero(home.path(), &["doctor", "--json"]))
        .ended_with(4)
        .json();
    assert_eq!(found["status"], "fail");
}

#[test]
fn the_default_file_is_a_settings_file() {
    let home = tempfile::tempdir().unwrap();
    let text = run(&mut latzero(home.path(), &["config", "default"]))
        .ended_with(0)
        .out;
    let file = home.path().join("default.toml");
    std::fs::write(&file, &text).unwrap();
    let args = [
        "config",
        "show",
        "--changed",
        "--config",
        file.to_str().unwrap(),
    ];
    assert_eq!(run(&mut latzero(home.path(), &args)).ended_with(0).out, "");
    assert!(text.contains("#port = 45227"), "{text}");
}

#[test]
fn doctor_names_problems_and_fixes() {
    let home = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let args = ["doctor", "--json", "--port", &port];
    let found = run(&mut latzero(home.path(), &args)).ended_with(4).json();
    let findings = found["findings"].as_array().unwrap();
    let finding = findings
        .iter()
        .find(|finding| finding["name"] == "port")
        .unwrap();
    assert_eq!(finding["status"], "fail");
    assert!(
        finding["command"]
            .as_str()
            .unwrap()
            .starts_with("latzero start --port ")
    );

    let found = run(&mut latzero(home.path(), &["doctor", "--port", "0"]))
        .ended_with(0)
        .out;
    assert!(found.contains("ok\tport\t"), "{found}");

    let server = Server::start();
    let found = server.run(&["doctor", "--port", "0"]).ended_with(0).out;
    assert!(found.contains(&format!("pid {}", server.pid())), "{found}");
    server.running.signal(Signal::STOP);
    let found = server.run(&["doctor", "--port", "0"]).ended_with(4).out;
    server.running.signal(Signal::CONT);
    assert!(found.contains("fail\tserver\t"), "{found}");
}

#[test]
fn doctor_puts_a_refusal_where_it_belongs() {
    let home = tempfile::tempdir().unwrap();
    let check = |row: &str, args: &[&str]| {
        let args = [&["doctor"], args].concat();
        let found = run(&mut latzero(home.path(), &args)).ended_with(4).out;
        assert!(found.contains(&format!("fail\t{row}\t")), "{found}");
        let failed = found.lines().filter(|line| line.starts_with("fail"));
        assert_eq!(failed.count(), 1, "{found}");
    };
    check("port", &["--host", "300.1.1.1"]);
    check("socket", &["--socket", "/dev/null"]);
    check("tls", &["--tls", "--tls-cert", "/nosuch"]);
    check("data directory", &["--data-dir", "/dev/null"]);
}
