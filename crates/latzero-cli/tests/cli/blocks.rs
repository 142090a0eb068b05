//! `block`: blocks of memory by hand, over the Unix socket and over TCP.

use rustix::process::Signal;

use crate::program::{Running, Server, eventually, run, run_with};

#[test]
fn a_block_is_created_written_read_and_removed() {
    let server = Server::start();
    let ok = |args: &[&str]| server.run(&[&["block"], args].concat()).ended_with(0);
    let made = ok(&[
        "create", "alpha/f", "--dtype", "f4", "--shape", "2,3", "--json",
    ])
    .json();
    assert_eq!(
        (&made["size"], &made["pool"], &made["version"]),
        (&24.into(), &"alpha".into(), &0.into())
    );
    assert_eq!(
        ok(&["write", "alpha/f", "hello", "--offset", "3"]).out,
        "1\n"
    );
    assert_eq!(
        ok(&["read", "alpha/f", "--offset", "3", "--length", "5"]).out,
        "hello"
    );
    assert_eq!(
        ok(&["read", "alpha/f", "--length", "5", "--json"]).json()["hex"],
        "0000006865"
    );
    let wrote = run_with(
        &mut server.command(&["block", "write", "alpha/f", "-"]),
        "HEL",
    );
    assert_eq!(wrote.ended_with(0).out, "2\n");
    let listed = ok(&["ls", "alpha", "--json"]).json();
    assert_eq!(
        listed["blocks"][0]["layout"]["shape"],
        serde_json::json!([2, 3])
    );
    assert!(
        ok(&["ls", "alpha"])
            .out
            .starts_with("f\t24 B\t2\tshared\t<f4 2×3\t0\t-\t")
    );
    assert_eq!(ok(&["info", "alpha/f"]).json()["version"], 2);
    assert_eq!(ok(&["cas", "alpha/f", "HEL", "hel"]).out, "3\n");
    server
        .run(&["block", "cas", "alpha/f", "HEL", "hel"])
        .ended_with(4)
        .said("nothing was written");
    assert_eq!(
        ok(&["resize", "alpha/f", "4KiB", "--json"]).json()["generation"],
        2
    );
    ok(&["rm", "alpha/f"]);
    server
        .run(&["block", "read", "alpha/f"])
        .ended_with(5)
        .said("no_pool");
}

#[test]
fn a_block_of_an_encrypted_pool_is_used_the_same_way() {
    let server = Server::start();
    server.run(&["keys", "new", "vault"]).ended_with(0);
    server
        .run(&["pools", "create", "vault", "--encrypted"])
        .ended_with(0);
    let ok = |args: &[&str]| server.run(&[&["block"], args].concat()).ended_with(0);
    ok(&["create", "vault/f", "100KiB", "--persistent"]);
    assert_eq!(ok(&["write", "vault/f", "hello"]).out, "1\n");
    let key_file = server.home().join(".config/latzero/keys/vault");
    let elsewhere = server.home().join("vault.keys");
    std::fs::rename(key_file, &elsewhere).expect("it exists");
    server
        .run(&["block", "read", "vault/f", "--length", "5"])
        .ended_with(77);
    let ok = |args: &[&str]| {
        let keys = ["--keys", elsewhere.to_str().expect("it is UTF-8")];
        server
            .run(&[&["block"], args, &keys].concat())
            .ended_with(0)
    };
    assert_eq!(ok(&["read", "vault/f", "--length", "5"]).out, "hello");
    assert_eq!(ok(&["cas", "vault/f", "hello", "HELLO"]).out, "2\n");
    assert_eq!(ok(&["resize", "vault/f", "5"]).out, "3\n");
    assert_eq!(ok(&["dump", "vault/f", "-"]).out, "HELLO");
    let listed = ok(&["ls", "vault", "--json"]).json();
    assert_eq!(listed["blocks"][0]["sealed"], true);
    ok(&["rm", "vault/f"]);
}

#[test]
fn errors_say_what_to_do() {
    let server = Server::start();
    let fails = |args: &[&str], code: i32, said: &str| {
        server
            .run(&[&["block"], args].concat())
            .ended_with(code)
            .said(said);
    };
    server
        .run(&["block", "create", "alpha/f", "10"])
        .ended_with(0);
    fails(&["read", "alhpa/f"], 5, "did you mean alpha?");
    fails(&["create", "alpha/f", "10"], 5, "block_exists");
    fails(&["create", "alpha/g"], 2, "<SIZE>");
    fails(
        &["create", "alpha/g", "lots"],
        2,
        "expected a size like 4096, 64KiB or 1GiB",
    );
    fails(&["create", "alpha/g", "2GiB"], 5, "limits.block_bytes_max");
    fails(&["create", "alpha/a b", "1"], 2, "invalid_name");
    fails(
        &["write", "alpha/f", "more than ten bytes"],
        5,
        "out_of_range",
    );
    fails(
        &["write", "alpha/f", "x", "--if-version", "7"],
        5,
        "version_conflict",
    );
    fails(
        &["cas", "alpha/f", "ab", "c"],
        2,
        "the lengths must be equal",
    );
    fails(
        &["lock", "alpha/f", "--", "./nosuch"],
        2,
        "cannot be started",
    );
    fails(&["write", "alpha/f", ""], 2, "--allow-empty");
    fails(&["load", "alpha/f", "/dev/null"], 2, "--allow-empty");
    fails(&["load", "alpha/f", "/nosuch"], 2, "cannot be read");
    fails(&["write", "/f", "x"], 2, "POOL/BLOCK");
}

#[test]
fn arrays_go_to_files_and_come_back() {
    let server = Server::start();
    let file = server.home().join("array.npy");
    // As numpy writes arange(6, dtype='<i2').reshape(2, 3).
    let mut npy = b"\x93NUMPY\x01\x00\x46\x00".to_vec();
    npy.extend(b"{'descr': '<i2', 'fortran_order': False, 'shape': (2, 3), }          \n");
    npy.extend((0..6i16).flat_map(i16::to_le_bytes));
    std::fs::write(&file, &npy).unwrap();
    let path = file.to_str().unwrap();
    let port = server.port();
    for (name, reach) in [
        ("alpha/mapped", vec![]),
        ("alpha/copied", vec!["--port", &port]),
    ] {
        server
            .run(&[&["block", "load", name, path][..], &reach].concat())
            .ended_with(0);
        let info = server.run(&["block", "info", name]).ended_with(0).json();
        assert_eq!(
            info["layout"],
            serde_json::json!({"dtype": "<i2", "shape": [2, 3]})
        );
        let back = server.home().join("back.npy");
        server
            .run(&[&["block", "dump", name, back.to_str().unwrap()][..], &reach].concat())
            .ended_with(0);
        let back = std::fs::read(back).unwrap();
        assert!(back.ends_with(&npy[npy.len() - 12..]));
        assert_eq!(&back[..6], b"\x93NUMPY");
    }
    std::fs::write(&file, b"no array").unwrap();
    server
        .run(&["block", "load", "alpha/b", path])
        .ended_with(2)
        .said("it is not a .npy file");
    // Whatever does not end in .npy is bytes.
    let raw = server.home().join("bytes.bin");
    std::fs::write(&raw, vec![7; 100_000]).unwrap();
    server
        .run(&[
            "block",
            "load",
            "alpha/bytes",
            raw.to_str().unwrap(),
            "--persistent",
        ])
        .ended_with(0);
    let back = server.home().join("back.bin");
    server
        .run(&["block", "dump", "alpha/bytes", back.to_str().unwrap()])
        .ended_with(0);
    assert_eq!(std::fs::read(back).unwrap(), vec![7; 100_000]);
}

#[test]
fn layouts_that_numpy_has_no_type_for_go_to_files_and_come_back() {
    let server = Server::start();
    let ok = |args: &[&str]| server.run(&[&["block"], args].concat()).ended_with(0);
    let file = server.home().join("array.npy");
    let path = file.to_str().unwrap();
    let load_fails = |said: &str| {
        let ran = server.run(&["block", "load", "alpha/wrong", path]);
        ran.ended_with(2).said(said);
    };
    let save = |descr: &str, data: &[u8]| {
        let text = format!("{{'descr': {descr}, 'fortran_order': False, 'shape': (1,), }}\n");
        let length = (text.len() as u16).to_le_bytes();
        let parts = [b"\x93NUMPY\x01\x00", &length[..], text.as_bytes(), data];
        std::fs::write(&file, parts.concat()).unwrap();
    };
    let check = |name: &str, descr: &str, layout: serde_json::Value| {
        ok(&["dump", name, path]);
        let dumped = std::fs::read(&file).unwrap();
        let header = String::from_utf8_lossy(&dumped);
        assert!(header.contains(&format!("'descr': {descr},")), "{header}");
        let back = format!("{name}-back");
        ok(&["load", &back, path]);
        let info = ok(&["info", &back]).json();
        assert_eq!((&info["layout"], &info["size"]), (&layout, &6.into()));
    };
    ok(&["create", "alpha/bf16", "--dtype", "bf16", "--shape", "3"]);
    check(
        "alpha/bf16",
        "'<V2'",
        serde_json::json!({"dtype": "bf16", "shape": [3]}),
    );
    let fields = "[('x', '<i2'), ('y', '<i2'), ('z', '<i2')]";
    save(fields, &[1; 5]);
    load_fails("is truncated");
    save("[('x', '<i2'), ('y', '<i4')]", &[1; 6]);
    load_fails("the same simple type");
    save(fields, &[1; 6]);
    ok(&["load", "alpha/named", path]);
    check(
        "alpha/named",
        fields,
        serde_json::json!({"dtype": "<i2", "shape": [1, 3], "fields": ["x", "y", "z"]}),
    );
}

#[test]
fn a_command_runs_under_the_lock() {
    let server = Server::start();
    server
        .run(&["block", "create", "alpha/f", "10"])
        .ended_with(0);
    let ran = server
        .run(&[
            "block",
            "lock",
            "alpha/f",
            "--",
            "sh",
            "-c",
            "echo $LATZERO_BLOCK $LATZERO_FENCE; exit 7",
        ])
        .ended_with(7);
    assert_eq!(ran.out, "alpha/f 1\n");
    let held = Running::start(&mut server.command(&[
        "block",
        "lock",
        "alpha/f",
        "--",
        "sh",
        "-c",
        "echo held; exec sleep 60",
    ]));
    assert_eq!(held.line(), "held");
    server
        .run(&["block", "lock", "alpha/f", "--wait", "500ms", "--", "true"])
        .ended_with(5)
        .said("locked");
    let info = server.run(&["block", "info", "alpha/f"]).json();
    assert_eq!(info["lock"]["mode"], "exclusive");
    // Killed, it holds nothing any more.
    drop(held);
    server
        .run(&["block", "lock", "alpha/f", "--", "true"])
        .ended_with(0);
}

#[test]
fn versions_are_printed_as_they_appear() {
    let server = Server::start();
    server
        .run(&["block", "create", "alpha/f", "10"])
        .ended_with(0);
    let watching =
        Running::start(&mut server.command(&["block", "watch", "alpha/f", "--count", "2"]));
    eventually(|| {
        let info = run(&mut server.command(&["block", "info", "alpha/f"]));
        info.json()["subscribers"] == 1
    });
    server
        .run(&["block", "write", "alpha/f", "a"])
        .ended_with(0);
    assert_eq!(watching.line(), "1");
    server
        .run(&["block", "write", "alpha/f", "b"])
        .ended_with(0);
    assert_eq!(watching.line(), "2");
}

#[test]
fn a_dump_keeps_links_pipes_and_modes() {
    use std::os::unix::fs::PermissionsExt as _;
    let server = Server::start();
    server.run(&["block", "create", "lab/f", "5"]).ended_with(0);
    server
        .run(&["block", "write", "lab/f", "hello"])
        .ended_with(0);
    let path = |name: &str| server.home().join(name);
    let dump = |name: &str| {
        let file = path(name);
        server
            .run(&["block", "dump", "lab/f", file.to_str().unwrap()])
            .ended_with(0);
    };
    std::fs::write(path("target"), "longer than before").unwrap();
    std::fs::set_permissions(path("target"), std::fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink("target", path("link")).unwrap();
    dump("link");
    assert!(path("link").is_symlink());
    assert_eq!(std::fs::read(path("target")).unwrap(), b"hello");
    let mode = path("target").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);

    std::os::unix::fs::symlink("new", path("dangling")).unwrap();
    dump("dangling");
    assert_eq!(std::fs::read(path("new")).unwrap(), b"hello");

    let made = std::process::Command::new("mkfifo")
        .arg(path("pipe"))
        .status();
    assert!(made.unwrap().success());
    let pipe = path("pipe");
    let reader = std::thread::spawn(move || std::fs::read(pipe).unwrap());
    dump("pipe");
    assert_eq!(reader.join().unwrap(), b"hello");
    server
        .run(&["block", "dump", "lab/f", "/"])
        .ended_with(2)
        .said("is a directory");
    let left = std::fs::read_dir(server.home()).unwrap();
    assert_eq!(
        left.filter_map(Result::ok)
            .filter(|e| e.path().extension().is_some_and(|x| x == "part"))
            .count(),
        0
    );
}

#[test]
fn a_load_replaces_the_content() {
    let server = Server::start();
    let content = || server.run(&["block", "read", "lab/f"]).ended_with(0).out;
    let load = |input: &str, more: &[&str]| {
        let args = [&["block", "load", "lab/f", "-"], more].concat();
        run_with(&mut server.command(&args), input)
    };
    load("0123456789", &[]).ended_with(0);
    assert_eq!(content(), "0123456789");
    load("abc", &[]).ended_with(0);
    assert_eq!(content(), "abc");
    load("longer than all before", &[]).ended_with(0);
    assert_eq!(content(), "longer than all before");
    load("WIDER", &["--offset", "0"]).ended_with(0);
    assert_eq!(content(), "WIDERr than all before");
    load("x", &["--offset", "22"])
        .ended_with(2)
        .said("has only 0");
    load("", &[]).ended_with(2);
    load("", &["--allow-empty"]).ended_with(0);
    assert_eq!(content(), "\0".repeat(22));
}

#[test]
fn a_command_writes_under_the_lock_of_block_lock() {
    let server = Server::start();
    let latzero = env!("CARGO_BIN_EXE_latzero");
    server.run(&["block", "create", "lab/f", "5"]).ended_with(0);
    server.run(&["block", "create", "lab/g", "5"]).ended_with(0);
    let lock = |script: &str| {
        server.run(&[
            "block",
            "lock",
            "lab/f",
            "--",
            "sh",
            "-c",
            &script.replace("latzero", latzero),
        ])
    };
    lock("latzero block write lab/f hello && latzero block cas lab/f h H").ended_with(0);
    assert_eq!(server.run(&["block", "read", "lab/f"]).out, "Hello");
    // A lock within the lock, of the same block and of another.
    lock("latzero block lock lab/f -- latzero block write lab/f again").ended_with(0);
    lock(
        "latzero block lock lab/g -- sh -c 'latzero block write lab/g a; latzero block write \
          lab/f b'",
    )
    .ended_with(0);
    // Also what changes the block as a whole.
    lock("printf longer | latzero block load lab/f -").ended_with(0);
    assert_eq!(server.run(&["block", "read", "lab/f"]).out, "longer");
    lock("latzero block resize lab/f 5").ended_with(0);
    lock("latzero block rm lab/g; latzero block rm lab/f && exit 7").ended_with(7);
    server.run(&["block", "info", "lab/f"]).ended_with(5);
    server.run(&["block", "create", "lab/f", "5"]).ended_with(0);
    lock("exit 9").ended_with(9);
    lock("kill -TERM $$").ended_with(128 + 15);
    // Nobody else writes meanwhile, and a token that is over is refused.
    lock("LATZERO_LOCKS= latzero block cas lab/f b c")
        .ended_with(5)
        .said("locked");
    let stale = run(server
        .command(&["block", "write", "lab/f", "x"])
        .env("LATZERO_LOCKS", "lab/f=1"));
    stale.ended_with(5).said("lock_lost");
}

#[test]
fn a_command_under_a_shared_lock_only_reads() {
    let server = Server::start();
    server.run(&["block", "create", "lab/f", "2"]).ended_with(0);
    let lock = |args: &[&str]| {
        let latzero = env!("CARGO_BIN_EXE_latzero");
        let all = [&["block", "lock", "--shared", "lab/f", "--", latzero], args].concat();
        server.run(&all)
    };
    lock(&["block", "read", "lab/f"]).ended_with(0);
    lock(&["block", "lock", "--shared", "lab/f", "--", "true"]).ended_with(0);
    // It would wait for itself.
    let refused = lock(&["block", "write", "lab/f", "ab"]).ended_with(5);
    refused
        .said("runs under a shared lock")
        .said("without --shared");
}

#[test]
fn a_signal_does_not_release_the_lock_while_the_command_runs() {
    let server = Server::start();
    server.run(&["block", "create", "lab/f", "5"]).ended_with(0);
    let script = "trap 'echo told' TERM; echo runs; while :; do sleep 0.05; done";
    let mut locking =
        Running::start(&mut server.command(&["block", "lock", "lab/f", "--", "sh", "-c", script]));
    assert_eq!(locking.line(), "runs");
    locking.signal(Signal::TERM);
    assert_eq!(locking.line(), "told");
    server
        .run(&["block", "cas", "lab/f", "a", "b"])
        .ended_with(5)
        .said("locked");
    // Killed, it takes the command along, so nothing runs without the lock.
    locking.signal(Signal::KILL);
    locking.wait();
    eventually(|| server.run(&["block", "write", "lab/f", "free"]).code == 0);
}

#[test]
fn a_lost_lock_ends_the_command() {
    let server = Server::start();
    server.run(&["block", "create", "lab/f", "5"]).ended_with(0);
    let args = [
        "block",
        "lock",
        "lab/f",
        "--",
        "sh",
        "-c",
        "echo runs >&2; exec sleep 1000",
    ];
    let mut locking = Running::start_err(&mut server.command(&args));
    assert_eq!(locking.line(), "runs");
    let home = server.crash();
    locking.line_with("was lost while 'sh' ran");
    assert_eq!(locking.exit_code(), 5);
    drop(home);
}
