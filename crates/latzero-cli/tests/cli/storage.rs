//! What is kept: apps that are away, backups, restoring, looking for damage.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::program::{Server, eventually, latzero, run};

/// The apps that the server lists with these options, but for its own.
fn apps(server: &Server, options: &[&str]) -> Vec<String> {
    let listed = server.run(&[&["apps", "--json"], options].concat());
    let listed = listed.ended_with(0).json();
    let names = listed["apps"].as_array().into_iter().flatten();
    let names = names.filter_map(|app| app["app_id"].as_str());
    let names = names.filter(|name| *name != "latzero");
    names.map(str::to_owned).collect()
}

/// Overwrites the second half of a file.
fn damage(file: &Path) {
    let length = fs::metadata(file).expect("it exists").len();
    let half = length / 2 / 4096 * 4096;
    let junk = vec![0xa5; usize::try_from(length - half).expect("it is small")];
    let file = fs::OpenOptions::new().write(true).open(file);
    let written = file.and_then(|file| file.write_all_at(&junk, half));
    written.expect("the test created it");
}

/// The files of a directory whose names start so.
fn starting(dir: &Path, start: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("it exists").flatten();
    let found = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(start));
    found.map(|entry| entry.path()).collect()
}

#[test]
fn an_offline_app_is_listed_and_can_be_forgotten() {
    let server = Server::start();
    let serving = server.serve(&["alpha/x", "--app", "worker", "--", "cat"]);
    assert_eq!(apps(&server, &["--offline"]), [""; 0]);
    let ran = server.run(&["apps", "forget", "worker"]).ended_with(5);
    ran.said("app_in_use").said("latzero kick worker");
    drop(serving);
    eventually(|| apps(&server, &["--offline"]) == ["worker"]);
    assert!(!apps(&server, &["--live"]).contains(&"worker".to_owned()));
    let text = server.run(&["apps"]).ended_with(0).out;
    assert!(
        text.contains("worker\toffline\tjust now\talpha\tx\n"),
        "{text}"
    );
    let ran = server.run(&["apps", "--live", "--offline"]).ended_with(2);
    ran.said("cannot be used with");

    // It is known after a restart too.
    let server = Server::in_home(server.stop(), &[]);
    assert_eq!(apps(&server, &["--offline"]), ["worker"]);
    let ran = server.run(&["apps", "forget", "wroker"]).ended_with(5);
    ran.said("no_app").said("did you mean worker?");
    let elsewhere = tempfile::tempdir().unwrap();
    let args = ["apps", "forget", "worker", "--port", &server.port()];
    run(&mut latzero(elsewhere.path(), &args))
        .ended_with(77)
        .said("forbidden");
    let forgotten = server
        .run(&["apps", "forget", "worker", "--json"])
        .ended_with(0);
    assert_eq!(forgotten.json(), json!({"forgotten": "worker"}));
    assert_eq!(apps(&server, &["--offline"]), [""; 0]);
    let server = Server::in_home(server.stop(), &[]);
    assert_eq!(apps(&server, &["--offline"]), [""; 0]);
}

#[test]
fn a_command_leaves_no_registration() {
    let server = Server::start();
    let serving = server.serve(&["alpha/x", "--app", "worker", "--", "cat"]);
    server.run(&["call", "alpha/x", "1"]).ended_with(0);
    server
        .run(&["call", "alpha/x", "1", "--app", "visitor"])
        .ended_with(0);
    server
        .run(&["call", "alpha/x", "1", "--idempotency-key", "k"])
        .ended_with(0);
    server
        .run(&["call", "alpha/x", "1", "--park"])
        .ended_with(0);
    server.run(&["bench", "call", "--calls", "1"]).ended_with(0);
    drop(serving);
    // They are gone once the server has seen the end of their connections.
    eventually(|| apps(&server, &["--offline"]) == ["worker"] && apps(&server, &[]).len() == 2);
}

#[test]
fn a_backup_is_made_and_listed_and_found_damaged() {
    let server = Server::start();
    let dir = server.data_dir();
    let ls = |args: &[&str]| server.run(&[&["backup", "ls"], args].concat());
    assert_eq!(ls(&[]).ended_with(0).out, "");
    let create = ["block", "create", "alpha/frame", "64KiB", "--persistent"];
    server.run(&create).ended_with(0);

    let made = server.run(&["backup", "--json"]).ended_with(0).json();
    let file = PathBuf::from(made["file"].as_str().unwrap());
    assert_eq!(file.parent().unwrap(), dir.join("backups"));
    assert_eq!(made["bytes"], fs::metadata(&file).unwrap().len());
    assert_eq!(
        (&made["block_files"], &made["block_bytes"]),
        (&json!(1), &json!(65536))
    );

    // A path of one's own is meant from where one is.
    let mut command = server.command(&["backup", "--to", "mine.db"]);
    let text = run(command.current_dir(server.home())).ended_with(0).out;
    let own = server.home().join("mine.db");
    assert!(
        text.starts_with(&format!("backup\t{}\nsize\t", own.display())),
        "{text}"
    );
    assert!(text.contains("1 persistent block (64.0 KiB)\n"), "{text}");
    let ran = server
        .run(&["backup", "--to", own.to_str().unwrap()])
        .ended_with(5);
    ran.said("already exists").said("help: choose another file");

    let listed = ls(&["--json"]).ended_with(0).json();
    let listed = listed["backups"].as_array().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (&listed[0]["ok"], &listed[0]["verified"]),
        (&json!(true), &json!(false))
    );
    let text = ls(&["--verify"]).ended_with(0).out;
    assert!(
        text.contains("\tjust now\t") && text.contains("\tverified\t"),
        "{text}"
    );

    damage(&file);
    let listed = ls(&["--verify", "--json"]).ended_with(4).json();
    assert_eq!(listed["backups"][0]["ok"], false, "{listed}");
    let text = ls(&["--verify"]).ended_with(4).out;
    assert!(text.contains("\tdamaged\t"), "{text}");
}

#[test]
fn a_backup_is_restored_with_its_blocks_and_parked_calls() {
    let server = Server::start();
    let write = |server: &Server, data: &str| {
        server
            .run(&["block", "write", "alpha/frame", data])
            .ended_with(0);
    };
    let park = |server: &Server, id: &str| {
        let args = [
            "call",
            "alpha/job",
            &format!("\"{id}\""),
            "--park",
            "--no-wait",
        ];
        let args = [&args, &["--app", "shop", "--id", id][..]].concat();
        server.run(&args).ended_with(0);
    };
    let create = ["block", "create", "alpha/frame", "5", "--persistent"];
    server.run(&create).ended_with(0);
    write(&server, "first");
    park(&server, "one");
    let backup = server.home().join("mine.db");
    let backup = backup.to_str().unwrap().to_owned();
    server.run(&["backup", "--to", &backup]).ended_with(0);
    write(&server, "later");
    park(&server, "two");

    let ran = server.run(&["restore", &backup]).ended_with(75);
    ran.said(&format!("pid {}", server.pid()))
        .said("latzero stop");
    server.run(&["ping", "-c", "1"]).ended_with(0);

    let home = server.stop();
    let dir = home.path().join(".latzero");
    let restored = run(&mut latzero(home.path(), &["restore", &backup, "--json"]));
    let restored = restored.ended_with(0).json();
    assert_eq!(
        (
            &restored["holds"]["calls"],
            &restored["holds"]["block_files"]
        ),
        (&json!(1), &json!(1))
    );
    assert_eq!(restored["blocks_set_aside"], 1);
    let former = PathBuf::from(restored["set_aside"][0].as_str().unwrap());
    assert!(former.exists() && starting(&dir, "replaced-").contains(&former));
    assert_eq!(
        fs::read_dir(dir.join("memory/.orphans")).unwrap().count(),
        2
    );

    let server = Server::in_home(home, &[]);
    let read = server.run(&["block", "read", "alpha/frame"]).ended_with(0);
    assert_eq!(read.out, "first");
    let _serving = server.serve(&["alpha/job", "--app", "worker", "--", "cat"]);
    let answers = ["answers", "--app", "shop", "--wait", "30s", "--count", "1"];
    let answer = server.run(&answers).ended_with(0).json();
    assert_eq!(
        (&answer["id"], &answer["data"]),
        (&json!("one"), &json!("one"))
    );
    assert_eq!(
        server.run(&["answers", "--app", "shop"]).ended_with(0).out,
        ""
    );
    assert_eq!(
        server.run(&["health", "--json"]).ended_with(0).json()["status"],
        "ok"
    );
}

#[test]
fn a_backup_restores_to_a_new_directory() {
    let server = Server::start();
    let create = ["block", "create", "alpha/frame", "5", "--persistent"];
    server.run(&create).ended_with(0);
    server
        .run(&["block", "write", "alpha/frame", "bytes"])
        .ended_with(0);
    let backup = server.home().join("mine.db");
    server
        .run(&["backup", "--to", backup.to_str().unwrap()])
        .ended_with(0);

    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("new");
    let args = [
        "restore",
        backup.to_str().unwrap(),
        "-d",
        dir.to_str().unwrap(),
        "--yes",
    ];
    let text = run(&mut latzero(home.path(), &args)).ended_with(0).out;
    assert!(
        text.contains("into\t") && !text.contains("kept\t"),
        "{text}"
    );
    let other = Server::in_home(home, &["-d", dir.to_str().unwrap()]);
    let read = ["block", "read", "alpha/frame", "-d", dir.to_str().unwrap()];
    assert_eq!(other.run(&read).ended_with(0).out, "bytes");
}

#[test]
fn an_invalid_backup_changes_nothing() {
    let server = Server::start();
    let backup = server.home().join("mine.db");
    let create = ["block", "create", "alpha/frame", "1MiB", "--persistent"];
    server.run(&create).ended_with(0);
    server
        .run(&["block", "write", "alpha/frame", "bytes"])
        .ended_with(0);
    server
        .run(&["backup", "--to", backup.to_str().unwrap()])
        .ended_with(0);
    let home = server.stop();
    let dir = home.path().join(".latzero");
    let before = fs::read(dir.join("data.db")).unwrap();
    let memory = starting(&dir.join("memory"), "").len();
    let check = |file: &Path, code: i32, said: &str| {
        let args = ["restore", file.to_str().unwrap(), "--yes"];
        run(&mut latzero(home.path(), &args))
            .ended_with(code)
            .said(said);
        assert_eq!(fs::read(dir.join("data.db")).unwrap(), before);
        assert!(starting(&dir, "replaced-").is_empty());
        assert_eq!(starting(&dir.join("memory"), "").len(), memory);
    };
    check(&home.path().join("nothing.db"), 2, "No such file");
    let text = home.path().join("text.db");
    fs::write(&text, "a text and no database ".repeat(100)).unwrap();
    check(&text, 4, "is not a valid backup");
    check(&dir.join("data.db"), 4, "is not a valid backup");
    damage(&backup);
    check(&backup, 4, "is not a valid backup");
    // The directory is free again.
    drop(Server::in_home(home, &[]));
}

#[test]
fn damage_is_found_with_and_without_a_server() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join(".latzero");
    let named = dir.to_str().unwrap().to_owned();
    let check = |home: &Path, args: &[&str]| {
        run(&mut latzero(
            home,
            &[&["db", "check", "-d", &named], args].concat(),
        ))
    };
    // Where there is no database, none is made for the look.
    check(home.path(), &[]).ended_with(3).said("not running");
    assert!(!dir.exists());

    let server = Server::in_home(home, &[]);
    for args in [&["--json"][..], &["--json", "--full"]] {
        let looked = check(server.home(), args).ended_with(0).json();
        assert_eq!(
            (&looked["ok"], &looked["online"]),
            (&json!(true), &json!(true))
        );
        assert_eq!(looked["full"], args.len() == 2);
    }
    // Killed: what it wrote last lies in the log beside the database.
    let home = server.crash();
    let looked = check(home.path(), &["--json", "--full"])
        .ended_with(0)
        .json();
    assert_eq!(
        (&looked["ok"], &looked["online"]),
        (&json!(true), &json!(false))
    );

    let server = Server::in_home(home, &[]);
    server.run(&["backup"]).ended_with(0);
    let home = server.stop();
    damage(&dir.join("data.db"));
    let before = fs::read(dir.join("data.db")).unwrap();
    let ran = check(home.path(), &["--full"]).ended_with(4);
    assert!(ran.out.starts_with("database\tdamaged\n"), "{}", ran.out);
    assert!(ran.out.contains("data.db is damaged ("), "{}", ran.out);
    let looked = check(home.path(), &["--json", "--full"])
        .ended_with(4)
        .json();
    assert_eq!(looked["ok"], false);
    // A look changes nothing, and leaves nothing.
    assert_eq!(fs::read(dir.join("data.db")).unwrap(), before);
    assert!(starting(&dir, "corrupt-").is_empty());
    assert!(starting(&dir, ".check").is_empty());

    // The start that follows restores the backup, and everything that looks at it says so.
    let server = Server::in_home(home, &[]);
    let said = "was restored instead";
    let health = server.run(&["health"]).ended_with(4).out;
    assert!(
        health.contains("store\tdegraded\tdata.db: ") && health.contains(said),
        "{health}"
    );
    let status = server.run(&["status"]).ended_with(0).out;
    assert!(
        status.contains("lost\tdata.db: ") && status.contains(said),
        "{status}"
    );
    let status = server.run(&["status", "--json"]).ended_with(0).json();
    assert_eq!(status["store"]["status"], "degraded");
    let doctor = server
        .run(&["doctor", "--port", "0", "--json"])
        .ended_with(0)
        .json();
    let find = |name: &str| -> Value {
        let findings = doctor["findings"].as_array().unwrap().iter();
        let mut found = findings.filter(|finding| finding["name"] == name);
        found.next().cloned().unwrap()
    };
    assert_eq!(find("store")["status"], "warn");
    assert!(find("store")["what"].as_str().unwrap().contains(said));
    assert_eq!(find("backups")["status"], "ok");
    server.run(&["backup"]).ended_with(0);
    let status = server.run(&["status"]).ended_with(0).out;
    assert!(status.contains("last backup just now"), "{status}");
}

#[test]
fn the_database_can_be_queried_with_and_without_a_server() {
    let server = Server::start();
    drop(server.serve(&["alpha/x", "--app", "worker", "--", "cat"]));
    let ask = [
        "db",
        "query",
        "SELECT app_id, 1 + 1 AS two FROM app_registry",
    ];
    let rows = |ran: Value| -> Vec<Value> { ran["rows"].as_array().unwrap().clone() };
    let asked = server
        .run(&[&ask[..], &["--json"]].concat())
        .ended_with(0)
        .json();
    assert_eq!(asked["columns"], json!(["app_id", "two"]));
    assert!(rows(asked).contains(&json!(["worker", 2])));
    server
        .run(&["db", "query", "DELETE FROM app_registry"])
        .ended_with(5)
        .said("SELECT");
    let text = server.run(&["db", "dump"]).ended_with(0).out;
    assert!(
        text.contains("INSERT INTO \"app_registry\" VALUES('worker'"),
        "{text}"
    );
    let left = starting(&server.data_dir().join("backups"), ".tmp-");
    assert!(left.is_empty(), "{left:?}");
    let home = server.stop();
    let offline = |args: &[&str]| run(&mut latzero(home.path(), args));
    let asked = offline(&[&ask[..], &["--json"]].concat())
        .ended_with(0)
        .json();
    assert!(rows(asked).contains(&json!(["worker", 2])));
    assert!(
        offline(&["db", "dump"])
            .ended_with(0)
            .out
            .contains("'worker'")
    );
}
