//! Starting, finding, stopping: and every way in which a start is refused.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::program::{Running, Server, eventually, latzero, rest, run};

#[test]
fn the_server_starts_and_the_suggested_command_works() {
    let server = Server::start();
    for part in [
        concat!("latzero ready ", env!("CARGO_PKG_VERSION"), " "),
        &format!("pid {}", server.pid()),
        &format!("data {}", server.data_dir().display()),
        "tcp://127.0.0.1:",
        &format!("unix:{}/latzero.sock", server.data_dir().display()),
    ] {
        assert!(
            server.ready.contains(part),
            "{part} is not in {}",
            server.ready
        );
    }
    let line = server.try_line.strip_prefix("try: ").unwrap();
    let mut shell = Command::new("sh");
    let ran = run(shell.args(["-c", line]).env("HOME", server.home()));
    assert_eq!(ran.ended_with(0).out, "{\"x\":42}\n");
}

#[test]
fn the_suggested_command_names_another_directory() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("a b");
    let server = Server::with(&["--data-dir", dir.to_str().unwrap()]);
    let line = server.try_line.strip_prefix("try: ").unwrap();
    assert!(line.contains("--data-dir '"), "{line}");
    let ran = run(Command::new("sh")
        .args(["-c", line])
        .env("HOME", server.home()));
    assert_eq!(ran.ended_with(0).out, "{\"x\":42}\n");
}

#[test]
fn the_suggested_command_works_without_a_socket() {
    let server = Server::with(&["--socket", "off"]);
    let line = server.try_line.strip_prefix("try: ").unwrap();
    assert!(
        line.contains(&format!("--port {}", server.port())),
        "{line}"
    );
    let ran = run(Command::new("sh")
        .args(["-c", line])
        .env("HOME", server.home()));
    assert_eq!(ran.ended_with(0).out, "{\"x\":42}\n");
    // The lock file says where it listens, so no option is needed either.
    server.run(&["ping", "-c", "1"]).ended_with(0);
}

#[test]
fn the_ready_line_can_be_json() {
    let home = tempfile::tempdir().unwrap();
    let server = Running::start(&mut latzero(
        home.path(),
        &["start", "-p", "0", "--json", "--log-level", "warn"],
    ));
    let ready: serde_json::Value = serde_json::from_str(&server.line()).unwrap();
    assert_eq!(
        (&ready["ready"], &ready["pid"]),
        (&true.into(), &server.pid().into())
    );
    assert_eq!(ready["addresses"].as_array().unwrap().len(), 2);
}

#[test]
fn every_way_to_name_the_server_finds_it() {
    let server = Server::start();
    let port = server.port();
    let dir = server.data_dir();
    let dir = dir.to_str().unwrap();
    let socket = format!("{dir}/latzero.sock");
    let url = format!("latzero://me@127.0.0.1:{port}");
    let elsewhere = tempfile::tempdir().unwrap();
    for args in [
        ["--data-dir", dir],
        ["-d", dir],
        ["--socket", &socket],
        ["--port", &port],
        ["-p", &port],
        ["--url", &url],
    ] {
        let args = [&["call", "system/echo", "1"], &args[..]].concat();
        let ran = run(&mut latzero(elsewhere.path(), &args)).ended_with(0);
        assert_eq!(ran.out, "1\n", "{args:?}");
    }
    for (variable, value) in [
        ("LATZERO_DATA_DIR", dir),
        ("LATZERO_SOCKET", &socket),
        ("LATZERO_PORT", &port),
        ("LATZERO_URL", &url),
    ] {
        let mut command = latzero(elsewhere.path(), &["call", "system/echo", "1"]);
        let ran = run(command.env(variable, value)).ended_with(0);
        assert_eq!(ran.out, "1\n", "{variable}");
    }
}

#[test]
fn status_and_stop() {
    let mut server = Server::start();
    let status = server.run(&["status", "--json"]).ended_with(0).json();
    assert_eq!(status["running"], true);
    assert_eq!(status["pid"], server.pid());
    assert_eq!(status["health"], "ok");
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    for field in [
        "uptime_ms",
        "addresses",
        "data_dir",
        "apps_live",
        "pools",
        "connections",
        "calls_per_second",
    ] {
        assert!(!status[field].is_null(), "{field}: {status}");
    }
    let text = server.run(&["status"]).ended_with(0).out;
    assert!(text.contains(&format!("pid\t{}\n", server.pid())), "{text}");

    let stopped = server.run(&["stop", "--json"]).ended_with(0).json();
    assert_eq!(
        (&stopped["stopped"], &stopped["pid"]),
        (&true.into(), &server.pid().into())
    );
    assert_eq!(server.running.exit_code(), 0);

    let dir = server.data_dir();
    let dir = dir.to_str().unwrap();
    for args in [
        &["stop"][..],
        &["status"],
        &["call", "x"],
        &["ping"],
        &["apps"],
    ] {
        // Named, so that no server of this machine is found in its place.
        let ran = server.run(&[args, &["-d", dir]].concat()).ended_with(3);
        ran.said("error: the server is not running")
            .said("latzero start")
            .said("latzero.sock");
    }
    let status = server
        .run(&["status", "--json", "-d", dir])
        .ended_with(3)
        .json();
    assert_eq!(
        (&status["running"], &status["lock_held"]),
        (&false.into(), &false.into())
    );
}

#[test]
fn the_token_of_the_directory_is_proved_on_its_socket_alone() {
    let mut server = Server::start();
    let elsewhere = tempfile::tempdir().unwrap();
    let port = server.port();
    // Without the token: forbidden.
    run(&mut latzero(elsewhere.path(), &["stop", "--port", &port]))
        .ended_with(77)
        .said("forbidden");
    let dir = server.data_dir();
    let dir = dir.to_str().unwrap();
    // Nor does another program that took the port get it.
    let args = ["stop", "--port", &port, "--data-dir", dir];
    run(&mut latzero(elsewhere.path(), &args))
        .ended_with(77)
        .said("use the server's Unix socket");
    run(&mut latzero(elsewhere.path(), &["stop", "--data-dir", dir])).ended_with(0);
    assert_eq!(server.running.exit_code(), 0);
}

#[test]
fn a_second_server_gets_the_pid_of_the_first() {
    let server = Server::start();
    let ran = server.run(&["start", "--port", "0"]).ended_with(75);
    ran.said("another server uses")
        .said(&format!("pid {}", server.pid()))
        .said("help: ")
        .said("latzero stop");
    server.run(&["ping", "-c", "1"]).ended_with(0);
}

#[test]
fn a_port_in_use_is_named_with_the_remedy() {
    let home = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let ran = run(&mut latzero(home.path(), &["start", "--port", &port])).ended_with(75);
    ran.said(&format!("error: port {port} on 127.0.0.1 is in use by"))
        .said(&format!("pid {}", std::process::id()))
        .said("help: choose another with --port");
}

#[test]
fn a_directory_writable_by_others_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("open");
    std::fs::create_dir(&dir).unwrap();
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).unwrap();
    let ran = run(&mut latzero(
        home.path(),
        &["start", "-p", "0", "-d", dir.to_str().unwrap()],
    ));
    ran.ended_with(77)
        .said(dir.to_str().unwrap())
        .said("help: run `chmod 700");
}

#[test]
fn a_server_starts_after_a_kill() {
    let server = Server::start();
    let socket = server.data_dir().join("latzero.sock");
    let home = server.crash();
    assert!(socket.exists(), "a killed server cleans nothing up");
    let dir = home.path().join(".latzero");
    let args = ["status", "-d", dir.to_str().unwrap()];
    let ran = run(&mut latzero(home.path(), &args)).ended_with(3);
    ran.said("the server is not running")
        .said("connection refused");
    let server = Server::in_home(home, &[]);
    server.run(&["ping", "-c", "1"]).ended_with(0);
}

#[test]
fn unimplemented_settings_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let ran = run(&mut latzero(home.path(), &["start", "--cluster"])).ended_with(2);
    ran.said("command line --cluster")
        .said("not implemented yet");
    let variable = "LATZERO_CLUSTER_MODE";
    let ran = run(latzero(home.path(), &["start"]).env(variable, "true")).ended_with(2);
    ran.said(variable).said("not implemented yet");
    let dir = home.path().join(".latzero/config");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("a.toml"), "cluster_mode = true\n").unwrap();
    let ran = run(&mut latzero(home.path(), &["start"])).ended_with(2);
    ran.said("a.toml:1:").said("not implemented yet");
}

#[test]
fn sigterm_lets_a_running_call_end() {
    // Longer than anything here takes on the slowest machine: the call must end by its answer.
    let mut server = Server::with(&["--set", "drain_timeout=10m"]);
    let gate = server.home().join("gate");
    assert!(
        Command::new("mkfifo")
            .arg(&gate)
            .status()
            .unwrap()
            .success()
    );
    let gate = gate.to_str().unwrap();
    // It says that it runs, and answers once the gate opens.
    let script = "echo running >&2; read x < \"$0\"; echo '\"done\"'";
    let serving = server.serve(&["alpha/slow", "--", "sh", "-c", script, gate]);
    let calling = server
        .command(&["call", "alpha/slow"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    serving.line_with("running");
    server.running.signal(Signal::TERM);
    // New calls are refused from here on: the first that is says that the signal arrived.
    let dir = server.data_dir();
    let dir = dir.to_str().unwrap();
    eventually(|| server.run(&["call", "system/echo", "-d", dir]).code != 0);
    std::fs::write(gate, "open\n").unwrap();
    let done = calling.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(done.stdout).unwrap(), "\"done\"\n");
    assert_eq!(server.running.exit_code(), 0);
}

#[test]
fn reload_changes_what_can_change() {
    let server = Server::start();
    let config = server.data_dir().join("config");
    std::fs::write(
        config.join("a.toml"),
        "drain_timeout = \"1s\"\nio_threads = 3\n",
    )
    .unwrap();
    let done = server.run(&["reload", "--json"]).ended_with(0).json();
    assert_eq!(done["applied"][0]["name"], "drain_timeout");
    assert_eq!(done["needs_restart"][0]["name"], "io_threads");

    std::fs::write(config.join("a.toml"), "drain_timeot = \"1s\"\n").unwrap();
    let ran = server.run(&["reload"]).ended_with(2);
    ran.said("the settings were not reloaded")
        .said("drain_timeout");
}

#[test]
fn sighup_changes_the_log_level() {
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join(".latzero/config");
    std::fs::create_dir_all(&config).unwrap();
    std::fs::set_permissions(
        home.path().join(".latzero"),
        std::fs::Permissions::from_mode(0o700),
    )
    .unwrap();
    std::fs::write(config.join("a.toml"), "log_level = \"info\"\n").unwrap();
    let mut command = latzero(home.path(), &["start", "-p", "0"]);
    let server = Running::start_err(command.stdout(Stdio::null()));
    server.line_with("ready");
    std::fs::write(config.join("a.toml"), "log_level = \"debug\"\n").unwrap();
    server.signal(Signal::HUP);
    let line = server.line_with("settings reloaded");
    assert!(line.contains("debug"), "{line}");
}

#[test]
fn a_server_runs_with_its_output_closed() {
    let home = tempfile::tempdir().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = latzero(home.path(), &["start", "-p", "0"]);
    let server = Running::start_err(command.stdout(writer));
    server.line_with("ready");
    run(&mut latzero(home.path(), &["ping", "-c", "1"])).ended_with(0);
}

#[test]
fn a_closed_pipe_is_not_an_error() {
    let server = Server::start();
    for args in [
        &["apps"][..],
        &["stats"],
        &["config", "show"],
        &["config", "default"],
        &["completion", "bash"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ran = run(server.command(args).stdout(writer)).ended_with(0);
        assert_eq!(ran.err, "", "{args:?}");
    }
}

#[test]
fn no_server_is_advised_on_a_privileged_port() {
    let home = tempfile::tempdir().unwrap();
    let ran = run(&mut latzero(home.path(), &["ping", "--port", "1"])).ended_with(3);
    assert!(
        ran.err.ends_with("help: correct the address\n"),
        "{}",
        ran.err
    );
}

#[test]
fn wrong_usage_ends_with_2() {
    let home = tempfile::tempdir().unwrap();
    let check = |args: &[&str], text: &str| {
        run(&mut latzero(home.path(), args))
            .ended_with(2)
            .said(text);
    };
    check(&["start", "--prot", "5"], "--port");
    check(
        &["start", "--port", "70000"],
        "command line --port: `port` must be",
    );
    check(&["start", "--set", "prot=5"], "the nearest is `port`");
    check(
        &["start", "--set", "limits.max_frme=5"],
        "the nearest is `limits.max_frame`",
    );
    check(&["start", "--set", "port"], "expected NAME=VALUE");
    check(
        &["start", "--config", "/nowhere/x.toml"],
        "/nowhere/x.toml: cannot be read",
    );
    check(&["strat"], "start");
    check(&["call"], "TRIGGER");
    check(&["call", "x", "--timeout", "5"], "a duration with its unit");
    check(
        &["call", "x", "--port", "5", "--url", "latzero://x"],
        "cannot be used with",
    );
    check(&["call", "x", "--url", "http://x"], "latzero://APP_ID");
    check(&["call", "a/", "1"], "is not a complete name");
    check(&["call", "x", "{x:1}"], "is not JSON");
    check(&["ping", "-c", "0"], "--count");
    check(&[], "Usage");
    let ran = run(latzero(home.path(), &["start"]).env("LATZERO_IO_THREADS", "x")).ended_with(2);
    ran.said("LATZERO_IO_THREADS");
    let ran = run(&mut latzero(home.path(), &["start", "-h"])).ended_with(2);
    ran.said("Start the server")
        .said("-h needs a value here")
        .said("`latzero start --help` prints the whole help");
    let ran = run(latzero(home.path(), &["ping"]).env("LATZERO_PORT", "x")).ended_with(2);
    ran.said("LATZERO_PORT");
}

#[test]
fn help_lists_the_exit_codes() {
    let home = tempfile::tempdir().unwrap();
    let help = run(&mut latzero(home.path(), &["--help"]))
        .ended_with(0)
        .out;
    for part in [
        "start",
        "call",
        "Exit codes:",
        "  3",
        "no server answers",
        "  130",
    ] {
        assert!(help.contains(part), "{part} is not in {help}");
    }
    let help = run(&mut latzero(home.path(), &["start", "--help"]))
        .ended_with(0)
        .out;
    for part in [
        "-p, --port",
        "-h, --host",
        "-d, --data-dir",
        "--cluster",
        "--tls",
        "--log-level",
    ] {
        assert!(help.contains(part), "{part} is not in {help}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&mut latzero(home.path(), &["completion", shell]))
            .ended_with(0)
            .out;
        assert!(script.contains("latzero"), "{shell}");
    }
}

#[test]
fn errors_can_be_json() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().to_str().unwrap();
    let ran = run(&mut latzero(home.path(), &["ping", "--json", "-d", dir])).ended_with(3);
    let error: serde_json::Value = serde_json::from_str(&ran.err).unwrap();
    assert_eq!(error["error"]["code"], "not_running");
    assert_eq!(error["exit_code"], 3);
    let mut child = latzero(home.path(), &["completion", "bash"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(rest(child.stdout.take().unwrap()).contains("latzero"));
    assert!(child.wait().unwrap().success());
}

#[test]
fn an_unknown_variable_is_a_warning() {
    let home = tempfile::tempdir().unwrap();
    let mut command = latzero(home.path(), &["start", "--port", "0"]);
    let running = Running::start_err(command.env("LATZERO_PROT", "1"));
    let line = running.line_with("warning: ");
    assert!(line.contains("the nearest is `LATZERO_PORT`"), "{line}");
    running.line_with("ready");
}

#[test]
fn a_failed_start_leaves_nothing_behind() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("a/b");
    let dir = dir.to_str().unwrap();
    for more in [&[][..], &["--detach"]] {
        let args = [&["start", "--port", &port, "--data-dir", dir], more].concat();
        run(&mut latzero(home.path(), &args))
            .ended_with(75)
            .said(&format!("port {port} on 127.0.0.1 is in use"));
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0);
    }
}

#[test]
fn doctor_finds_what_start_refuses() {
    let home = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("nowhere", home.path().join("dangling")).unwrap();
    std::fs::write(home.path().join("file"), "").unwrap();
    std::fs::create_dir(home.path().join("odd")).unwrap();
    std::fs::write(home.path().join("odd/logs"), "").unwrap();
    for dir in [
        "dangling/x",
        "dangling",
        "file/x",
        "odd",
        "/proc/x",
        "/sys/x/y",
    ] {
        let dir = home.path().join(dir);
        let dir = dir.to_str().unwrap();
        let end = |command: &str| {
            let args = [command, "--port", "0", "--data-dir", dir];
            run(&mut latzero(home.path(), &args)).code
        };
        assert!(end("start") != 0, "{dir}");
        assert_eq!(end("doctor"), 4, "{dir}");
    }
}

#[test]
fn a_detached_server_keeps_running_and_its_log_is_printed() {
    let home = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| run(&mut latzero(home.path(), args));
    run(&["logs"]).ended_with(1).said("does not exist");
    let ran = run(&["start", "--detach", "--port", "0"]).ended_with(0);
    assert!(ran.out.starts_with("latzero ready "), "{}", ran.out);
    assert_eq!(ran.out.lines().count(), 2);
    run(&["status"]).ended_with(0);
    run(&["start", "--detach", "--port", "0"])
        .ended_with(75)
        .said("another server uses");
    let log = run(&["logs"]).ended_with(0).out;
    assert!(log.contains("INFO  ready addresses="), "{log}");
    let last = run(&["logs", "-n", "1", "--json"]).ended_with(0).json();
    assert_eq!(last["level"], "INFO");
    let following = Running::start(&mut latzero(home.path(), &["logs", "-f"]));
    following.line_with("ready");
    run(&["stop"]).ended_with(0);
    following.line_with("stopped");
}

#[test]
fn a_wrong_address_does_not_blame_the_directory_s_server() {
    let server = Server::start();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port().to_string();
    drop(free);
    for args in [
        &["status", "--port", &port][..],
        &["status", "--socket", "/nowhere/s"],
        &["ping", "--host", "127.0.0.1", "--port", &port],
    ] {
        let ran = server.run(args).ended_with(3);
        assert!(!ran.err.contains("end that process"), "{}", ran.err);
        ran.said("cannot connect to ").said("the server of ");
    }
    // The variable counts where no flag does, also beside a server that is found without it.
    for (value, code) in [(port.as_str(), 3), ("x", 2), ("0", 0), (&server.port(), 0)] {
        let ran = run(server.command(&["status"]).env("LATZERO_PORT", value));
        ran.ended_with(code);
    }
}

#[test]
fn the_variables_of_a_tls_server_lead_to_its_socket() {
    let server = Server::with(&["--tls"]);
    let mut status = server.command(&["status", "--json"]);
    status.env("LATZERO_ENABLE_TLS", "1");
    status.env("LATZERO_PORT", server.port());
    assert_eq!(run(&mut status).ended_with(0).json()["pid"], server.pid());
    // Only there is it known who asks.
    run(server
        .command(&["reload"])
        .env("LATZERO_PORT", server.port()))
    .ended_with(0);
}

#[test]
fn a_suspended_server_causes_a_timeout() {
    let server = Server::start();
    server.running.signal(Signal::STOP);
    for args in [
        &["call", "system/echo", "1", "--timeout", "200ms"][..],
        &["stop", "--timeout", "200ms"],
    ] {
        server.run(args).ended_with(6).said("does not respond");
    }
    server.running.signal(Signal::CONT);
    server.run(&["ping", "-c", "1"]).ended_with(0);
}

#[test]
fn pools_are_created_shown_and_removed() {
    let server = Server::start();
    let args = [
        "pools",
        "create",
        "lab",
        "--durable",
        "--policy",
        "join=bob",
        "--property",
        "a=b",
    ];
    assert_eq!(server.run(&args).ended_with(0).out, "created pool lab\n");
    let info = server.run(&["pools", "info", "lab"]).ended_with(0).out;
    assert!(info.contains("policy\tjoin: bob\n"), "{info}");
    assert!(info.contains("property\ta: b\n"), "{info}");
    server
        .run(&["pools", "info", "labb"])
        .ended_with(5)
        .said("did you mean lab?");
    server
        .run(&["pools", "create", "x", "--policy", "rule=bob"])
        .ended_with(2)
        .said("there is no right 'rule'");
    let args = [
        "pools", "create", "y", "--deny", "call=bob", "--policy", "emit=",
    ];
    server.run(&args).ended_with(0);
    let info = server.run(&["pools", "info", "y"]).ended_with(0).out;
    assert!(
        info.contains("policy\tcall: everybody except bob\n"),
        "{info}"
    );
    assert!(info.contains("policy\temit: nobody\n"), "{info}");
    server.run(&["pools", "remove", "lab"]).ended_with(0);
    server.run(&["pools", "info", "lab"]).ended_with(5);
}

#[test]
fn a_server_that_is_not_trusted_is_an_error_with_its_own_remedy() {
    let server = Server::with(&["--tls"]);
    let url = format!("latzero://x@127.0.0.1:{}?tls", server.port());
    let call = |url: &str| server.run(&["call", "system/echo", "1", "--url", url]);
    let port = server.port();
    let plain = server.run(&["call", "system/echo", "1", "--port", &port]);
    let plain = plain.ended_with(3).said("the server speaks TLS there\n");
    plain.said(&format!("help: run `latzero trust 127.0.0.1:{port}`"));
    let unknown = call(&url).ended_with(77).said("is not trusted yet\n");
    let unknown = unknown.said("help: run `latzero trust 127.0.0.1:");
    assert!(!unknown.err.contains("--keys"), "{}", unknown.err);
    let pin = format!("{url}&pin={}", "A".repeat(43));
    let other = call(&pin)
        .ended_with(77)
        .said("is not the one that you trust");
    let other = other.said("help: this may be another server");
    assert!(!other.err.contains("--keys"), "{}", other.err);
}

#[test]
fn only_administrators_are_told_the_paths_of_the_server() {
    let server = Server::start();
    let stats = server.run(&["stats", "--json"]).ended_with(0).json();
    let dir = server.data_dir();
    let dir = dir.to_str().unwrap();
    assert_eq!(stats["server"]["data_dir"], dir);
    let port = server.port();
    for ask in [
        &["stats", "--json"][..],
        &["call", "system/stats"],
        &["status"],
        &["status", "--json"],
    ] {
        let told = server
            .run(&[ask, &["--port", &port]].concat())
            .ended_with(0);
        assert!(!told.out.contains(dir), "{ask:?}: {}", told.out);
    }
}
