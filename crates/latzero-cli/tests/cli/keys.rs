//! Key files: made whole or not at all, private, and never shown.

use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use crate::program::{Running, Server, eventually, latzero, run, run_with};

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path)
        .expect("it exists")
        .permissions()
        .mode()
        & 0o7777
}

/// No token and no app key in what was printed.
#[track_caller]
fn shows_no_key(ran: &crate::program::Ran) {
    let is_of_token = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    for text in [&ran.out, &ran.err] {
        // Messages say how tokens begin, and nothing of what comes behind.
        for prefix in ["lzs1_", "lzc1_", "lzo1_", "lzw1_", "lza1_"] {
            for rest in text.split(prefix).skip(1) {
                assert!(!rest.starts_with(is_of_token), "{}{}", ran.out, ran.err);
            }
        }
    }
}

#[test]
fn keys_are_private_and_not_printed() {
    let home = tempfile::tempdir().unwrap();
    let made = run(&mut latzero(
        home.path(),
        &["keys", "new", "vault", "--json"],
    ))
    .ended_with(0);
    shows_no_key(&made);
    let file = home.path().join(".config/latzero/keys/vault");
    assert_eq!(made.json()["roles"], 7);
    assert_eq!(made.json()["file"], file.to_str().unwrap());
    assert_eq!((mode(&file), mode(file.parent().unwrap())), (0o600, 0o700));
    let text = std::fs::read_to_string(&file).unwrap();
    let tokens = text.lines().filter(|line| !line.starts_with('#'));
    assert_eq!(tokens.map(str::len).collect::<Vec<_>>(), [75, 75, 75]);
    for command in ["show", "check"] {
        let shown = run(&mut latzero(
            home.path(),
            &["keys", command, "vault", "--json"],
        ));
        let shown = shown.ended_with(0);
        shows_no_key(&shown);
        assert_eq!(shown.json(), made.json());
    }
    // Nothing else is left in the folder, and another run makes other keys.
    assert_eq!(
        std::fs::read_dir(file.parent().unwrap()).unwrap().count(),
        1
    );
    let other = run(&mut latzero(
        home.path(),
        &["keys", "new", "other", "--owner-key", "--json"],
    ));
    let other = other.ended_with(0).json();
    assert_ne!(other["pin"], made.json()["pin"]);
    assert_eq!(other["keys"].as_array().unwrap().len(), 4);
    assert!(
        !home.path().join(".latzero").exists(),
        "no key is where the server's data is"
    );
}

#[test]
fn keys_are_never_overwritten() {
    let home = tempfile::tempdir().unwrap();
    for command in [
        ["keys", "new", "vault"].as_slice(),
        &["app", "key", "new", "worker"],
    ] {
        run(&mut latzero(home.path(), command)).ended_with(0);
        let name = command.last().unwrap();
        let folder = home.path().join(".config/latzero");
        let file = ["keys", "apps"].map(|kind| folder.join(kind).join(name));
        let file = file.iter().find(|file| file.exists()).unwrap();
        let before = std::fs::read(file).unwrap();
        let again = run(&mut latzero(home.path(), command)).ended_with(1);
        let again = again.said("never overwritten");
        shows_no_key(&again);
        assert_eq!(std::fs::read(file).unwrap(), before);
        assert_eq!(
            std::fs::read_dir(file.parent().unwrap()).unwrap().count(),
            1
        );
    }
}

#[test]
fn a_role_is_exported_with_only_its_keys() {
    let home = tempfile::tempdir().unwrap();
    let owner = ["keys", "new", "vault", "--owner-key", "--json"];
    let pin = run(&mut latzero(home.path(), &owner)).ended_with(0).json()["pin"].clone();
    for (role, number, prefixes) in [
        ("join", 1, ["lzs1_"].as_slice()),
        ("read", 3, &["lzs1_", "lzc1_"]),
        ("write", 7, &["lzs1_", "lzc1_", "lzo1_"]),
    ] {
        let file = home.path().join(role);
        let to = file.to_str().unwrap();
        let args = [
            "keys", "export", "vault", "--role", role, "--to", to, "--json",
        ];
        let done = run(&mut latzero(home.path(), &args)).ended_with(0);
        shows_no_key(&done);
        assert_eq!(
            (&done.json()["roles"], &done.json()["pin"]),
            (&number.into(), &pin)
        );
        assert_eq!(mode(&file), 0o600);
        let text = std::fs::read_to_string(&file).unwrap();
        let tokens = text.lines().filter(|line| !line.starts_with('#'));
        assert_eq!(tokens.map(|line| &line[..5]).collect::<Vec<_>>(), prefixes);
        // A reader cannot give away what it does not have.
        if role == "read" {
            let more = home.path().join("more");
            let more = more.to_str().unwrap();
            let args = [
                "keys", "export", "vault", "--file", to, "--role", "write", "--to", more,
            ];
            run(&mut latzero(home.path(), &args))
                .ended_with(1)
                .said("OblivionSeal is missing");
            assert!(!Path::new(more).exists());
        }
    }
}

#[test]
fn a_key_file_accessible_to_others_is_refused() {
    let home = tempfile::tempdir().unwrap();
    run(&mut latzero(home.path(), &["keys", "new", "vault"])).ended_with(0);
    let file = home.path().join(".config/latzero/keys/vault");
    let good = std::fs::read_to_string(&file).unwrap();
    let check = |file: &Path, said: &str| {
        let args = ["keys", "check", "vault", "--file", file.to_str().unwrap()];
        let checked = run(&mut latzero(home.path(), &args))
            .ended_with(4)
            .said(said);
        shows_no_key(&checked);
    };
    let private = |name: &str, text: &[u8]| {
        let path = home.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        path
    };
    for open in [0o640, 0o604, 0o620, 0o610] {
        std::fs::set_permissions(&file, Permissions::from_mode(open)).unwrap();
        check(&file, "can be read by others");
    }
    std::fs::set_permissions(&file, Permissions::from_mode(0o400)).unwrap();
    run(&mut latzero(home.path(), &["keys", "check", "vault"])).ended_with(0);
    let link = home.path().join("link");
    symlink(&file, &link).unwrap();
    check(&link, "is a link");
    check(home.path(), "is not a regular file");
    check(Path::new("/dev/null"), "is not a regular file");
    let none = home.path().join("none");
    let args = ["keys", "check", "vault", "--file", none.to_str().unwrap()];
    let missing = run(&mut latzero(home.path(), &args)).ended_with(2);
    missing.said("cannot be opened");
    let pipe = home.path().join("pipe");
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, rustix::fs::Mode::RUSR, 0).unwrap();
    check(&pipe, "is not a regular file");
    check(
        &private("cut", &good.as_bytes()[..good.len() - 3]),
        "75 characters",
    );
    check(
        &private("typo", good.replace("lzs1_", "lzs1-").as_bytes()),
        "begins with",
    );
    check(
        &private("twice", good.repeat(2).as_bytes()),
        "two of the same kind",
    );
    check(&private("empty", b""), "missing");
    check(&private("binary", b"\xff\xfe"), "UTF-8");
    check(&private("large", &vec![b'#'; (64 << 10) + 1]), "64 KiB");
}

#[test]
fn a_passphrase_gives_the_same_keys_anywhere_and_a_warning() {
    let home = tempfile::tempdir().unwrap();
    let derive = |pool: &str, file: &str, words: &str| {
        let file = home.path().join(file);
        let args = [
            "keys",
            "from-passphrase",
            pool,
            "--file",
            file.to_str().unwrap(),
        ];
        let ran = run_with(&mut latzero(home.path(), &args), words).ended_with(0);
        let ran = ran.said("can guess");
        shows_no_key(&ran);
        assert!(!ran.err.contains(words.trim()) && !ran.out.contains(words.trim()));
        assert_eq!(mode(&file), 0o600);
        std::fs::read_to_string(&file).unwrap()
    };
    let words = "correct horse battery staple";
    let keys = derive("alpha", "a", words);
    assert_eq!(derive("alpha", "b", &format!("{words}\n")), keys);
    // The SigilKey of the published vector, under its pin.
    assert!(
        keys.contains("\nlzs1_Pne9TVhAxzlpK3ICREVFKR453wS9"),
        "{keys}"
    );
    assert_ne!(derive("beta", "c", words), keys);
    let args = ["keys", "from-passphrase", "gamma"];
    run_with(&mut latzero(home.path(), &args), "\n")
        .ended_with(2)
        .said("no passphrase");
    run_with(&mut latzero(home.path(), &args), &"x".repeat(1025))
        .ended_with(2)
        .said("1024 bytes");
}

#[test]
fn names_that_are_not_file_names_are_refused() {
    let home = tempfile::tempdir().unwrap();
    for name in [
        "",
        "..",
        ".hidden",
        "a/b",
        "../up",
        "a\nb",
        &"x".repeat(129),
    ] {
        for command in [
            ["keys", "new", name].as_slice(),
            &["app", "key", "new", name],
        ] {
            run(&mut latzero(home.path(), command))
                .ended_with(2)
                .said("is not a name");
        }
    }
    assert!(std::fs::read_dir(home.path()).unwrap().next().is_none());
}

#[test]
fn an_app_key_shows_its_public_key() {
    let home = tempfile::tempdir().unwrap();
    let made = run(&mut latzero(
        home.path(),
        &["app", "key", "new", "worker", "--json"],
    ));
    let made = made.ended_with(0);
    shows_no_key(&made);
    let shown = run(&mut latzero(
        home.path(),
        &["app", "key", "show", "worker", "--json"],
    ));
    assert_eq!(shown.ended_with(0).json(), made.json());
    assert_eq!(made.json()["public_key"].as_str().unwrap().len(), 43);
    let file = home.path().join(".config/latzero/apps/worker");
    assert_eq!(mode(&file), 0o600);
    let line = std::fs::read_to_string(&file).unwrap();
    assert!(line.starts_with("lza1_") && line.len() == 54, "one line");
    // The published vector.
    let vector = "lza1_kZKTlJWWl5iZmpucnZ6foKGio6SlpqeoqaqrrK2ur7BmrEe9";
    std::fs::write(&file, vector).unwrap();
    let shown = run(&mut latzero(
        home.path(),
        &["app", "key", "show", "worker", "--json"],
    ));
    let public = "ujxzXNvkI15srfgcQSuIOjRy0QRfrqGJ9YT4vspG40M";
    assert_eq!(shown.ended_with(0).json()["public_key"], public);
    // A key file of a pool is none.
    std::fs::write(&file, vector.replace("lza1_", "lzs1_")).unwrap();
    let shown = run(&mut latzero(home.path(), &["app", "key", "show", "worker"])).ended_with(2);
    shows_no_key(&shown);
}

#[test]
fn a_restored_pool_is_taken_after_a_decision_and_app_keys_stay() {
    let server = Server::start();
    let key = |app: &str| {
        server.run(&["app", "key", "new", app]).ended_with(0);
        let file = server.home().join(".config/latzero/apps").join(app);
        file.to_str().unwrap().to_owned()
    };
    let (early, late, other) = (key("early"), key("late"), key("other"));
    let call = |server: &Server, app: &str, with: &[&str]| {
        server.run(&[&["call", "system/echo", "1", "--app", app], with].concat())
    };
    server.run(&["keys", "new", "vault"]).ended_with(0);
    server
        .run(&["pools", "create", "vault", "--encrypted"])
        .ended_with(0);
    call(&server, "early", &["--app-key", &early]).ended_with(0);
    let backup = server.home().join("mine.db");
    let backup = backup.to_str().unwrap().to_owned();
    server.run(&["backup", "--to", &backup]).ended_with(0);
    // Afterwards the pool moves on, and another AppID gets a key.
    server.run(&["keys", "rotate", "vault"]).ended_with(0);
    let info = server.run(&["pools", "info", "vault"]).ended_with(0).out;
    assert!(
        info.contains("encrypted\tyes, epoch 2\n") && !info.contains("restored"),
        "{info}"
    );
    let pools = server.run(&["pools"]).ended_with(0).out;
    assert!(
        pools
            .lines()
            .any(|line| line.starts_with("vault\t") && line.contains("epoch 2"))
    );
    let status = server.run(&["status"]).ended_with(0).out;
    assert!(
        status.contains("1 encrypted") && status.contains("tls\toff\n"),
        "{status}"
    );
    call(&server, "late", &["--app-key", &late]).ended_with(0);
    let home = server.stop();
    run(&mut latzero(home.path(), &["restore", &backup, "--yes"])).ended_with(0);
    let server = Server::in_home(home, &[]);
    // The keys of both AppIDs: what the backup had, and what nobody has removed since.
    for (app, key) in [("early", &early), ("late", &late)] {
        let refused = call(&server, app, &["--app-key", &other]);
        assert_ne!(refused.code, 0, "{app} with another key: {}", refused.out);
        call(&server, app, &["--app-key", key]).ended_with(0);
    }
    // Who knew epoch 2 takes the older one only after a decision, once.
    let refused = server.run(&["pools", "info", "vault"]).ended_with(5);
    let refused = refused.said("restored from a backup");
    let refused = refused.said("latzero keys accept-restore vault");
    shows_no_key(&refused);
    let accepted = server
        .run(&["keys", "accept-restore", "vault", "--json"])
        .ended_with(0);
    assert_eq!(accepted.json()["forgotten"], true);
    let info = server.run(&["pools", "info", "vault"]).ended_with(0).out;
    assert!(
        info.contains("encrypted\tyes, epoch 1\n") && info.contains("restored\t"),
        "{info}"
    );
    // The decision was for that state: a later loss is found again.
    server.run(&["keys", "rotate", "vault"]).ended_with(0);
    let home = server.stop();
    run(&mut latzero(home.path(), &["restore", &backup, "--yes"])).ended_with(0);
    let server = Server::in_home(home, &[]);
    server
        .run(&["pools", "info", "vault"])
        .ended_with(5)
        .said("accept-restore");
    server
        .run(&["keys", "accept-restore", "vault"])
        .ended_with(0);
    let again = server
        .run(&["keys", "accept-restore", "vault", "--json"])
        .ended_with(0);
    assert_eq!(again.json()["forgotten"], false);
}

#[test]
fn blocks_are_sealed_anew_after_a_rotation() {
    let server = Server::start();
    server.run(&["keys", "new", "vault"]).ended_with(0);
    let create = ["pools", "create", "vault", "--encrypted"];
    server.run(&create).ended_with(0);
    let create = ["block", "create", "vault/b", "5", "--persistent"];
    server.run(&create).ended_with(0);
    let write = ["block", "write", "vault/b", "bytes"];
    server.run(&write).ended_with(0);
    let reencrypt = || {
        let done = server.run(&["pools", "reencrypt", "vault", "--json"]);
        done.ended_with(0).json()
    };
    let (none, left) = (serde_json::json!([]), serde_json::json!(1));
    assert_eq!(
        (&reencrypt()["reencrypted"], &reencrypt()["left"]),
        (&none, &left)
    );
    server.run(&["keys", "rotate", "vault"]).ended_with(0);
    let done = reencrypt();
    assert_eq!(done["reencrypted"][0]["block_id"], "b", "{done}");
    assert_eq!(reencrypt()["reencrypted"], none);
    let read = server.run(&["block", "read", "vault/b"]).ended_with(0);
    assert_eq!(read.out, "bytes");
}

#[test]
fn a_privileged_trigger_says_what_is_missing() {
    let server = Server::start();
    server.run(&["keys", "new", "vault"]).ended_with(0);
    let create = ["pools", "create", "vault", "--encrypted"];
    server.run(&create).ended_with(0);
    let read = server.home().join("read.keys");
    let read = read.to_str().unwrap();
    let export = ["keys", "export", "vault", "--role", "read", "--to", read];
    server.run(&export).ended_with(0);
    let serve = ["serve", "vault/admin", "--privileged", "--", "cat"];
    // Whoever may not serve is told so, instead of waiting for calls that never come.
    let plain = ["serve", "admin", "--privileged", "--", "cat"];
    let refused = server.run(&plain).ended_with(5);
    refused
        .said("serve it only in encrypted pools")
        .said("--privileged works only in encrypted pools");
    let with_read = ["serve", "vault/admin", "--keys", read, "--", "cat"];
    let refused = server.run(&with_read).ended_with(77);
    refused.said("needs the role 'write' in pool 'vault'");
    let serving = Running::start_err(&mut server.command(&serve));
    serving.line_with("serving ");
    let info = server.run(&["pools", "info", "vault"]).ended_with(0).out;
    assert!(
        info.contains("trigger\tadmin, handlers: 1, privileged\n"),
        "{info}"
    );
    let call = ["call", "vault/admin", "1"];
    let signed = server.run(&[&call[..], &["--privileged"]].concat());
    assert_eq!(signed.ended_with(0).out, "1\n");
    for keys in [&[][..], &["--keys", read]] {
        let refused = server.run(&[&call[..], keys].concat()).ended_with(77);
        refused.said("sign the call or emit with --privileged");
    }
    let emit = server.run(&["emit", "vault/admin", "1"]).ended_with(0);
    emit.said("drop emits without --privileged");
    let signed = server.run(&["emit", "vault/admin", "1", "--privileged"]);
    assert_eq!(signed.ended_with(0).err, "");
    let plain = server.run(&["call", "system/echo", "1", "--privileged"]);
    plain
        .ended_with(5)
        .said("only a message to an encrypted pool can be privileged")
        .said("--privileged works only in encrypted pools");
    // A signature is no help where the policy refuses.
    server.run(&["keys", "new", "closed"]).ended_with(0);
    let create = [
        "pools",
        "create",
        "closed",
        "--encrypted",
        "--policy",
        "call=boss",
        "--app",
        "boss",
    ];
    server.run(&create).ended_with(0);
    let serve = [
        "serve",
        "closed/admin",
        "--privileged",
        "--app",
        "closer",
        "--",
        "cat",
    ];
    let serving = Running::start_err(&mut server.command(&serve));
    serving.line_with("serving ");
    let call = ["call", "closed/admin", "1", "--privileged"];
    let refused = server.run(&call).ended_with(77);
    let refused = refused.said("does not give this app the right 'call'");
    assert!(!refused.err.contains("sign the call"), "{}", refused.err);
}

#[test]
fn listening_without_the_right_fails_at_once() {
    let server = Server::start();
    server.run(&["keys", "new", "vault"]).ended_with(0);
    let create = ["pools", "create", "vault", "--encrypted"];
    server.run(&create).ended_with(0);
    let key_file = |role: &str| {
        let file = server.home().join(role).to_str().unwrap().to_owned();
        let export = ["keys", "export", "vault", "--role", role, "--to", &file];
        server.run(&export).ended_with(0);
        file
    };
    let (join, read) = (key_file("join"), key_file("read"));
    let on = ["on", "vault/news", "--count", "1", "--keys"];
    let refused = server.run(&[&on[..], &[&join]].concat()).ended_with(77);
    refused.said("needs the role 'read' in pool 'vault'");
    for command in ["call", "emit"] {
        let send = [command, "vault/news", "1", "--keys", &join];
        let refused = server.run(&send).ended_with(77);
        refused.said("forbidden: this needs the role 'read' in pool 'vault'");
    }
    let create = ["pools", "create", "lab", "--policy", "serve=boss"];
    server.run(&create).ended_with(0);
    // The owner of the pool may do everything.
    let other = ["on", "lab/news", "--count", "1", "--app", "other"];
    let refused = server.run(&other).ended_with(77);
    refused.said("does not give this app the right 'serve'");
    // Whoever may listen hears what is emitted.
    let boss = ["on", "lab/news", "--count", "1", "--app", "boss"];
    for (on, emit) in [
        (&[&on[..], &[&read]].concat()[..], "vault/news"),
        (&boss, "lab/news"),
    ] {
        let mut hearing = Running::start(&mut server.command(on));
        eventually(|| {
            server.run(&["emit", emit, "1"]).ended_with(0);
            hearing.has_ended()
        });
        hearing.line_with("\"data\":1");
        assert_eq!(hearing.exit_code(), 0);
    }
}

#[test]
fn a_wrong_file_or_name_is_an_error_of_usage() {
    let server = Server::start();
    let none = ["--keys", "/nonexistent"];
    for command in [
        &["call", "vault/x", "1"][..],
        &["serve", "vault/x"],
        &["on", "vault/x"],
        &["watch", "vault"],
    ] {
        let mut args = [command, &none].concat();
        if command[0] == "serve" {
            args.extend(["--", "cat"]);
        }
        let missing = server.run(&args).ended_with(2);
        missing.said("the key file /nonexistent cannot be opened");
    }
    let app = ["call", "system/echo", "1", "--app-key", "/nonexistent"];
    server.run(&app).ended_with(2).said("cannot be opened");
    for who in ["uid:-1", "uid:99999999999", "key:abc", "a b"] {
        let rule = format!("join={who}");
        for flag in ["--policy", "--deny"] {
            let create = ["pools", "create", "lab", flag, &rule];
            server.run(&create).ended_with(2).said(who);
        }
    }
    let key = format!("join=key:{},uid:7,shop", "A".repeat(43));
    let create = ["pools", "create", "lab", "--policy", &key];
    server.run(&create).ended_with(0);
}

#[test]
fn what_is_known_of_encrypted_pools_is_private() {
    let server = Server::start();
    server.run(&["keys", "new", "vault"]).ended_with(0);
    let create = ["pools", "create", "vault", "--encrypted"];
    server.run(&create).ended_with(0);
    server.run(&["pools", "info", "vault"]).ended_with(0);
    let folder = server.home().join(".local/state/latzero/pools");
    let files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(!files.is_empty());
    let modes: Vec<u32> = files.iter().map(|file| mode(file)).collect();
    assert_eq!((mode(&folder), &modes), (0o700, &vec![0o600; files.len()]));
}

#[test]
fn names_that_no_key_can_have_are_refused() {
    let home = tempfile::tempdir().unwrap();
    for pool in ["system", "default"] {
        for command in ["new", "from-passphrase"] {
            let made = run(&mut latzero(home.path(), &["keys", command, pool]));
            made.ended_with(2).said("is built in");
        }
    }
    for app_id in ["latzero", "latzero-x"] {
        let made = run(&mut latzero(home.path(), &["app", "key", "new", app_id]));
        made.ended_with(2).said("is reserved for the server");
    }
    run(&mut latzero(
        home.path(),
        &["app", "key", "new", "latzerox"],
    ))
    .ended_with(0);
}

#[test]
fn serving_and_listening_end_with_the_pool() {
    let server = Server::start();
    server.run(&["keys", "new", "vault"]).ended_with(0);
    let create = ["pools", "create", "vault", "--encrypted"];
    server.run(&create).ended_with(0);
    let start = |args: &[&str]| Running::start_err(&mut server.command(args));
    let serving = start(&["serve", "lab/x", "--", "cat"]);
    serving.line_with("serving ");
    let listening = start(&["on", "lab/news"]);
    let sealed_serving = start(&["serve", "vault/x", "--app", "sealed", "--", "cat"]);
    sealed_serving.line_with("serving ");
    let sealed_listening = start(&["on", "vault/news"]);
    let listens = |pool: &str| {
        let info = server.run(&["pools", "info", pool]).ended_with(0).out;
        info.contains("trigger\tnews")
    };
    eventually(|| listens("lab") && listens("vault"));
    // Who keeps the same keys stays.
    server.run(&["keys", "rotate", "vault"]).ended_with(0);
    let called = server.run(&["call", "vault/x", "1"]).ended_with(0);
    assert_eq!(called.out, "1\n");
    let rotate = ["keys", "rotate", "vault", "--remove-reader"];
    server.run(&rotate).ended_with(0);
    server
        .run(&["pools", "remove", "lab", "--force"])
        .ended_with(0);
    for (mut running, said) in [
        (sealed_serving, "pool 'vault' has new keys"),
        (sealed_listening, "pool 'vault' has new keys"),
        (serving, "pool 'lab' was removed"),
        (listening, "pool 'lab' was removed"),
    ] {
        running.line_with(said);
        assert_eq!(running.exit_code(), 1);
    }
}

/// Until the server's reply is there, nobody knows whether the pool has the new keys: they stay.
#[test]
fn an_interrupted_rotation_is_ended_by_the_next_one() {
    let server = Server::start();
    server.run(&["keys", "new", "vault"]).ended_with(0);
    let create = ["pools", "create", "vault", "--encrypted"];
    server.run(&create).ended_with(0);
    let keys = server.home().join(".config/latzero/keys");
    let move_to = |from: &str, to: &str| std::fs::rename(keys.join(from), keys.join(to)).unwrap();
    let names = || {
        let names = std::fs::read_dir(&keys).unwrap();
        let mut names: Vec<_> = names.map(|name| name.unwrap().file_name()).collect();
        names.sort_unstable();
        names
    };
    let rotate = ["keys", "rotate", "vault", "--remove-reader"];
    server.run(&rotate).ended_with(0);
    assert_eq!(names(), ["vault", "vault.epoch-1"]);
    // As if the command had been killed before it heard of the server's reply.
    move_to("vault", "vault.next");
    move_to("vault.epoch-1", "vault");
    let resumed = server.run(&rotate).ended_with(0);
    let resumed = resumed.said("an earlier rotation had reached the server");
    assert!(
        resumed.out.starts_with("pool\tvault\nepoch\t2\n"),
        "{}",
        resumed.out
    );
    assert_eq!(names(), ["vault", "vault.epoch-1"]);
    server
        .run(&["pools", "info", "vault", "--json"])
        .ended_with(0);
    // As if it had been killed after it kept the old keys, and before it took the new ones.
    move_to("vault", "vault.next");
    std::fs::hard_link(keys.join("vault.epoch-1"), keys.join("vault")).unwrap();
    server.run(&rotate).ended_with(0);
    assert_eq!(names(), ["vault", "vault.epoch-1", "vault.epoch-1.2"]);
    std::fs::remove_file(keys.join("vault.epoch-1.2")).unwrap();
    // As if it had been killed before the server took the rotation.
    server.run(&["keys", "new", "other"]).ended_with(0);
    move_to("other", "vault.next");
    let resumed = server.run(&rotate).ended_with(0);
    resumed.said("an earlier rotation did not happen");
    assert_eq!(
        names(),
        ["vault", "vault.epoch-1", "vault.epoch-2", "vault.unused"]
    );
    server.run(&["call", "vault/x", "1"]).ended_with(5);
}

/// The cause of an error is not taken for that of a connection.
#[test]
fn a_missing_key_file_in_an_address_is_named() {
    let server = Server::start();
    let url = "latzero://shop?pool=vault&keys=/nosuch/file";
    let ran = server.run(&["call", "vault/x", "1", "--url", url]);
    let ran = ran.said("/nosuch/file can't be used as a key file: No such file or directory");
    assert!(!ran.err.contains("socket"), "{}", ran.err);
}

#[test]
fn tokens_in_the_wrong_place_are_not_repeated() {
    let server = Server::start();
    server.run(&["keys", "new", "vault"]).ended_with(0);
    let file = server.home().join(".config/latzero/keys/vault");
    let keys = std::fs::read_to_string(file).unwrap();
    let token = keys.lines().find(|line| line.starts_with("lzo1_")).unwrap();
    let url = format!("latzero://shop?pool=vault&keys={token}");
    let lines: [&[&str]; 8] = [
        &["keys", "show", "vault", "--file", token],
        &["keys", "check", "vault", "--file", token, "--json"],
        &["call", "vault/x", "1", "--keys", token],
        &["call", "vault/x", "1", "--url", &url],
        &["call", "vault/x", "1", "--app", token],
        &["ping", "--url", &url],
        &["call", token],
        &["keys", token],
    ];
    for line in lines {
        let ran = server.run(line);
        assert_ne!(ran.code, 0, "{line:?}");
        let said = format!("{}{}", ran.out, ran.err);
        assert!(!said.contains(&token[5..20]), "{line:?}: {said}");
    }
    let log = std::fs::read_to_string(server.home().join("data/logs/server.log"));
    assert!(!log.unwrap_or_default().contains(&token[5..20]));
}
