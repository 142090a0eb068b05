//! A program that listens on the server's TCP port while nothing listens on the Unix socket: who
//! has keys or a token says nothing to it.
//!
//! Clients that name no server look for the default port, so the tests run in a network namespace
//! of their own, where that port is free.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};

use latzero::blocking::App;
use latzero::{AppKey, Code};
use latzero_crypto::app_key;
use latzero_crypto::keys::Secret;
use latzero_protocol::limits::DEFAULT_PORT;
use latzero_tests::vault::{WRITE, key_set, keys, private_file, vault};
use latzero_tests::{Server, TIMEOUT, site};
use serde_json::json;

/// The variable that makes this program the one in the namespace.
const INSIDE: &str = "TEST_INSIDE_NAMESPACE";

/// Why there is no network namespace, if none can be made.
fn namespace() -> Result<Command, String> {
    let mut command = Command::new("unshare");
    let script = "ip link set lo up && exec \"$0\" \"$@\"";
    command
        .args(["--user", "--map-root-user", "--net", "sh", "-c", script])
        .stdin(Stdio::null());
    let mut probe = Command::new("unshare");
    let probed = probe
        .args(["--user", "--map-root-user", "--net", "ip", "link", "set"])
        .args(["lo", "up"])
        .output()
        .map_err(|error| format!("unshare: {error}"))?;
    match probed.status.success() {
        true => Ok(command),
        false => Err(String::from_utf8_lossy(&probed.stderr).into_owned()),
    }
}

/// Listens on the default port in place of a server. Passes each connection on to another one, as
/// a relay of proofs would, and reports what the client sent once the client has closed it.
struct Squatter {
    heard: Receiver<Vec<u8>>,
}

impl Squatter {
    fn new(upstream: &Server) -> Squatter {
        let listener = TcpListener::bind(("127.0.0.1", DEFAULT_PORT)).unwrap();
        let (says, heard) = channel();
        let upstream = upstream.0.tcp().to_owned();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (says, upstream) = (says.clone(), upstream.clone());
                std::thread::spawn(move || pass_on(client.unwrap(), &upstream, &says));
            }
        });
        Squatter { heard }
    }

    /// What clients sent since the last time, for each connection.
    fn heard(&self) -> Vec<String> {
        // A connection of its own is accepted behind all others, which were closed before.
        let mut last = TcpStream::connect(("127.0.0.1", DEFAULT_PORT)).unwrap();
        last.write_all(b"last").unwrap();
        drop(last);
        let mut heard = Vec::new();
        loop {
            let sent = self.heard.recv_timeout(TIMEOUT).unwrap();
            if sent == b"last" {
                return heard;
            }
            heard.push(String::from_utf8_lossy(&sent).into_owned());
        }
    }
}

fn pass_on(mut client: TcpStream, upstream: &str, says: &Sender<Vec<u8>>) {
    // The last test stops the server.
    let server = TcpStream::connect(upstream).ok();
    if let Some(mut from) = server.as_ref().map(|server| server.try_clone().unwrap()) {
        let mut to = client.try_clone().unwrap();
        std::thread::spawn(move || {
            // Either side may be gone already.
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
        });
    }
    let (mut sent, mut piece) = (Vec::new(), [0; 4096]);
    while let Ok(read @ 1..) = client.read(&mut piece) {
        sent.extend_from_slice(&piece[..read]);
        // The client's side ends with the server's.
        let _ = server
            .as_ref()
            .map(|mut server| server.write_all(&piece[..read]));
    }
    let _ = server.map(|server| server.shutdown(Shutdown::Both));
    let _ = says.send(sent);
}

/// The output of the command line, as text.
fn run(args: &[&str], token: Option<&str>) -> (Option<i32>, String) {
    let mut command = Command::new(site::program());
    command.args(args).stdin(Stdio::null());
    if let Some(token) = token {
        command.env("LATZERO_ADMIN_TOKEN", token);
    }
    let ran = command.output().unwrap();
    let said = [ran.stdout, ran.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    (ran.status.code(), said)
}

/// Not a test: the process in the namespace.
#[test]
fn clients_of_another_test() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    // `admin_over_plain_tcp`: this server would take a token that somebody passes on.
    let upstream = Server::with(&["admin_over_plain_tcp=true"]);
    let squatter = Squatter::new(&upstream);
    let home = std::env::var("HOME").unwrap();
    let home = Path::new(&home);
    let config = home.join(".config/latzero");
    // Whoever has nothing to prove connects to the port, as documented.
    let app = App::connect("latzero://plain").unwrap();
    app.request(&json!({"action": "ping"})).unwrap();
    app.close().unwrap();
    drop(app);
    let heard = squatter.heard();
    assert_eq!(heard.len(), 1, "{heard:?}");
    assert!(heard[0].contains("\"plain\""), "{heard:?}");
    let stale = home.join(".latzero/admin.token");
    let token_of_the_past = std::fs::read_to_string(&stale).unwrap();
    std::fs::remove_file(&stale).unwrap();
    let (status, said) = run(&["ping", "-c", "1"], None);
    assert_eq!(status, Some(0), "{said}");
    let heard = squatter.heard();
    assert!(heard[0].contains("handshake"), "{heard:?}");
    // With a token, even one that no server takes, the port is not tried.
    private_file(&stale, &token_of_the_past);
    let (status, said) = run(&["ping", "-c", "1"], None);
    assert_eq!(status, Some(3), "{said}");
    assert!(said.contains("was not tried"), "{said}");
    std::fs::remove_file(&stale).unwrap();
    let (status, said) = run(&["ping", "-c", "1"], Some(token_of_the_past.trim()));
    assert_eq!(status, Some(3), "{said}");
    assert_eq!(squatter.heard(), [""; 0]);
    // Apps with a key or keys do not even connect.
    let line = app_key::AppKey::new(Secret::new([1; 32])).to_text();
    for folder in ["apps", "keys"] {
        std::fs::create_dir_all(config.join(folder)).unwrap();
    }
    private_file(&config.join("apps/shop"), line.as_str());
    let key = AppKey::from_file(config.join("apps/shop")).unwrap();
    let with_app_key = latzero::App::builder("latzero://shop").app_key(key);
    let set = key_set(1);
    let tokens: Vec<_> = WRITE.iter().map(|kind| set.token(*kind).unwrap()).collect();
    let tokens: Vec<_> = tokens.iter().map(|token| token.as_str()).collect();
    private_file(&config.join("keys/vault"), &tokens.join("\n"));
    let with_keys = latzero::App::builder("latzero://shop").keys("vault", keys(&set, WRITE));
    // `unbound` permits a proof over the connection that is asked for, not another connection.
    let builders = [with_app_key, with_keys];
    for builder in builders
        .iter()
        .flat_map(|b| [b.clone(), b.clone().unbound(true)])
    {
        let refused = App::connect_with(builder).map(drop);
        assert_eq!(refused.unwrap_err().kind(), Code::Disconnected);
        assert_eq!(squatter.heard(), [""; 0]);
    }
    // The CLI sends nothing either, whether it finds the key files or is given them.
    let keyed = [
        &["call", "--pool", "vault", "t", "1"][..],
        &["emit", "--pool", "vault", "t", "1"],
        &["call", "--app", "shop", "t", "1"],
        &["pools", "create", "vault", "--encrypted"],
    ];
    for args in keyed {
        let (status, said) = run(args, None);
        assert_ne!(status, Some(0), "{said}");
        assert_eq!(squatter.heard(), [""; 0], "{args:?}");
    }
    // Administrators say nothing, whether the token is in the file or the environment.
    let token = std::fs::read_to_string(upstream.0.data_dir().join("admin.token")).unwrap();
    private_file(&stale, token.trim());
    for token in [None, Some(token.trim())] {
        let (status, said) = run(&["stop"], token);
        assert_ne!(status, Some(0), "{said}");
        assert_eq!(squatter.heard(), [""; 0]);
        assert!(upstream.is_running());
    }
    // Where a person names the port, the token of the environment is proved: what was looked for
    // above is what is sent.
    let port = DEFAULT_PORT.to_string();
    let (status, said) = run(&["stop", "--port", &port], Some(token.trim()));
    assert_eq!(status, Some(0), "{said}");
    assert!(squatter.heard().concat().contains("admin_proof"));
    println!("the clients were tried");
}

#[test]
fn keys_and_tokens_are_not_proved_to_a_port_in_place_of_the_socket() {
    let mut command = match namespace() {
        Ok(command) => command,
        Err(why) => {
            eprintln!("LEFT OUT: no network namespace: {why}");
            return;
        }
    };
    // Once with the socket of a killed server, and once without the socket.
    for is_there in [true, false] {
        let (mut server, _) = vault();
        server.kill();
        if !is_there {
            std::fs::remove_file(server.0.socket()).unwrap();
        }
        assert_eq!(server.0.socket().exists(), is_there);
        let home = tempfile::tempdir().unwrap();
        std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let link = home.path().join(".latzero");
        std::os::unix::fs::symlink(server.0.data_dir(), link).unwrap();
        let mut ran = command
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "clients_of_another_test", "--nocapture"])
            .env(INSIDE, "1")
            .env("HOME", home.path());
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            if name.starts_with("XDG_") || name.starts_with("LATZERO_") && name != "LATZERO_BIN" {
                ran = ran.env_remove(name);
            }
        }
        let ran = ran.output().unwrap();
        let said = String::from_utf8_lossy(&[ran.stdout, ran.stderr].concat()).into_owned();
        assert!(ran.status.success(), "{said}");
        assert!(said.contains("the clients were tried"), "{said}");
        command = namespace().unwrap();
    }
}
