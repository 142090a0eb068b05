//! TLS between a real server and real clients: who is accepted, what error the others get, and that
//! clients which stop halfway delay nobody.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use latzero::blocking::App;
use latzero::{AppKey, Code, Error, Reconnect};
use latzero_crypto::app_key;
use latzero_crypto::keys::Secret;
use latzero_tests::{Server, Via, Wire, eventually};
use latzero_tls::PLAIN_BYTES_MAX;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType, date_time_ymd,
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// The pin that the server reports over its Unix socket.
fn pin(server: &Server) -> String {
    let mut wire = server.app(Via::Unix, json!({"app_id": "looks"}));
    let stats = wire.request(json!({"action": "stats"}));
    stats["response"]["server"]["pin"]
        .as_str()
        .unwrap()
        .to_owned()
}

fn address(server: &Server, app: &str, options: &str) -> String {
    format!("latzero://{app}@{}?tls{options}", server.0.tcp())
}

fn connect(server: &Server, app: &str, options: &str) -> Result<App, Error> {
    let reconnect = Reconnect {
        enabled: false,
        ..Reconnect::default()
    };
    let builder = latzero::App::builder(&address(server, app, options)).reconnect(reconnect);
    App::connect_with(builder)
}

fn refused(server: &Server, app: &str, options: &str) -> Error {
    connect(server, app, options).map(drop).unwrap_err()
}

/// A server with TLS, and its pin as an option for addresses.
fn tls() -> (Server, String) {
    let server = Server::with(&["enable_tls=true"]);
    let pin = format!("&pin={}", pin(&server));
    (server, pin)
}

/// An authority for tests, in a directory of its own.
struct Authority {
    dir: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
        Authority { dir, issuer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self) -> String {
        self.path("ca.pem").display().to_string()
    }

    /// Writes `NAME.pem` and `NAME.key`: a certificate for these names.
    fn issue(&self, name: &str, names: Vec<SanType>, is_expired: bool) {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = names;
        if is_expired {
            params.not_before = date_time_ymd(2001, 1, 1);
            params.not_after = date_time_ymd(2002, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        self.write(&format!("{name}.key"), &key.serialize_pem());
        self.write(&format!("{name}.pem"), &certificate.pem());
    }

    fn write(&self, name: &str, text: &str) {
        write_private(&self.path(name), text);
    }

    fn settings(&self, name: &str) -> [String; 3] {
        [
            "enable_tls=true".to_owned(),
            format!("tls_cert={}", self.path(&format!("{name}.pem")).display()),
            format!("tls_key={}", self.path(&format!("{name}.key")).display()),
        ]
    }

    fn server(&self, name: &str, more: &[&str]) -> Server {
        let settings = self.settings(name);
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        Server::with(&[&settings, more].concat())
    }
}

fn write_private(path: &Path, text: &str) {
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

fn loopback() -> Vec<SanType> {
    vec![SanType::IpAddress("127.0.0.1".parse().unwrap())]
}

fn addresses(apps: &[&str]) -> Vec<SanType> {
    let address = |app: &&str| SanType::URI(format!("latzero://{app}").try_into().unwrap());
    apps.iter().map(address).collect()
}

#[test]
fn calls_of_every_size_are_answered_and_proofs_are_bound() {
    let (server, pin) = tls();
    let handler = connect(&server, "handler", &format!("{pin}&pool=p")).unwrap();
    handler.serve("echo", |req| req.data::<String>()).unwrap();
    let caller = connect(&server, "caller", &format!("{pin}&pool=p")).unwrap();
    // Sizes around the limits of records and buffers, and a frame that is read in many pieces.
    for size in [
        0, 1, 64, 16_000, 16_384, 16_385, 32_768, 40_000, 262_144, 3_000_000,
    ] {
        let text = "x".repeat(size);
        let answer = caller.call("echo", &text).send::<String>().unwrap();
        assert!(answer == text, "{size} bytes");
    }
    // Many calls at once: neither side can send everything at first.
    let text = "y".repeat(500_000);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert!(caller.call("echo", &text).send::<String>().unwrap() == text));
        }
    });
    // An app key is proved without `&unbound`, since TLS binds the proof.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key");
    let line = app_key::AppKey::new(Secret::new([7; 32])).to_text();
    write_private(&file, &line);
    let key = AppKey::from_file(&file).unwrap();
    let url = address(&server, "keyed", &pin);
    let keyed = App::connect_with(latzero::App::builder(&url).app_key(key)).unwrap();
    // The same holds for the admin token.
    let token = fs::read_to_string(server.0.data_dir().join("admin.token")).unwrap();
    keyed.prove_admin(token.trim(), false).unwrap();
}

#[test]
fn the_key_is_private_and_permanent() {
    use std::os::unix::fs::MetadataExt as _;
    let (mut server, before) = tls();
    let key = server.0.data_dir().join("config/tls/key.pem");
    assert_eq!(fs::metadata(&key).unwrap().mode() & 0o777, 0o600);
    server.kill();
    server.restart();
    assert_eq!(format!("&pin={}", pin(&server)), before);
}

#[test]
fn another_pin_is_refused_and_reported() {
    let (server, _) = tls();
    let (other, other_pin) = tls();
    let error = refused(&server, "a", &other_pin);
    let text = error.to_string();
    assert_eq!(error.kind(), Code::Unauthenticated, "{text}");
    for part in [&pin(&server), &pin(&other), "latzero status", "--replace"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn a_certificate_authority_confirms_names_and_dates() {
    let (ours, others) = (Authority::new(), Authority::new());
    ours.issue("good", loopback(), false);
    ours.issue("expired", loopback(), true);
    ours.issue(
        "elsewhere",
        vec![SanType::DnsName("elsewhere.example".try_into().unwrap())],
        false,
    );
    let good = ours.server("good", &[]);
    connect(&good, "a", &format!("&ca={}", ours.file())).unwrap();
    // A foreign authority, an expired certificate, and another host's certificate.
    for (server, ca) in [
        (&good, &others),
        (&ours.server("expired", &[]), &ours),
        (&ours.server("elsewhere", &[]), &ours),
    ] {
        let error = refused(server, "a", &format!("&ca={}", ca.file()));
        let text = error.to_string();
        assert_eq!(error.kind(), Code::Unauthenticated, "{text}");
        assert!(text.contains("is not accepted by"), "{text}");
    }
}

#[test]
fn a_reload_changes_the_certificate_and_keeps_connections() {
    let authority = Authority::new();
    authority.issue("server", loopback(), false);
    let server = authority.server("server", &[]);
    let before = pin(&server);
    let handler = connect(&server, "h", &format!("&pin={before}&pool=p")).unwrap();
    handler.serve("echo", |req| req.data::<i64>()).unwrap();
    authority.issue("server", loopback(), false);
    server.signal(Signal::HUP);
    while pin(&server) == before {}
    let after = pin(&server);
    // A client with the old key gets an error, one with the new key is admitted, and existing
    // connections stay.
    assert_eq!(
        refused(&server, "a", &format!("&pin={before}")).kind(),
        Code::Unauthenticated
    );
    let caller = connect(&server, "c", &format!("&pin={after}&pool=p")).unwrap();
    assert_eq!(caller.call("echo", &5).send::<i64>().unwrap(), 5);
    // A certificate that does not match its key is refused, and nothing changes.
    authority.write("server.pem", "no certificate");
    let mut admin = server.app(Via::Unix, json!({"app_id": "admin"}));
    let reply = admin.request(json!({"action": "reload"}));
    assert_eq!(reply["error"]["code"], "bad_message", "{reply}");
    assert_eq!(pin(&server), after);
    connect(&server, "d", &format!("&pin={after}")).unwrap();
}

#[test]
fn a_client_certificate_lists_its_holders_app_ids() {
    let (ours, others) = (Authority::new(), Authority::new());
    ours.issue("server", loopback(), false);
    ours.issue("shop", addresses(&["shop", "shop-2"]), false);
    ours.issue("nobody", loopback(), false);
    others.issue("shop", addresses(&["shop"]), false);
    let server = ours.server("server", &[&format!("tls_client_ca={}", ours.file())]);
    let with = |authority: &Authority, name: &str| {
        let path = |ending: &str| authority.path(&format!("{name}.{ending}"));
        let (cert, key) = (path("pem"), path("key"));
        format!(
            "&ca={}&cert={}&key={}",
            ours.file(),
            cert.display(),
            key.display()
        )
    };
    for app in ["shop", "shop-2"] {
        connect(&server, app, &with(&ours, "shop")).unwrap();
    }
    let error = refused(&server, "bank", &with(&ours, "shop"));
    assert_eq!(error.kind(), Code::Forbidden, "{error}");
    assert!(error.to_string().contains("shop, shop-2"), "{error}");
    let error = refused(&server, "shop", &with(&ours, "nobody"));
    assert_eq!(error.kind(), Code::Forbidden, "{error}");
    // Without a certificate, or with a foreign one, no message is accepted.
    for options in [format!("&ca={}", ours.file()), with(&others, "shop")] {
        let error = refused(&server, "shop", &options);
        assert_eq!(error.kind(), Code::Unauthenticated, "{error}");
        assert!(error.to_string().contains("&cert=FILE"), "{error}");
    }
    // The Unix socket works as before.
    drop(server.app(Via::Unix, json!({"app_id": "bank"})));
}

#[test]
fn each_kind_of_client_recognizes_the_other_kind_of_port() {
    let (server, pin) = tls();
    let plain = format!("latzero://a@{}", server.0.tcp());
    let error = App::connect(&plain).map(drop).unwrap_err().to_string();
    assert!(
        error.contains("speaks TLS") && error.contains("?tls"),
        "{error}"
    );
    // The server sends no LatZero message in the clear: an alert at most (RFC 8446, section 6).
    let mut wire = TcpStream::connect(server.0.tcp()).unwrap();
    wire.write_all(b"\0\0\0\x02{}").unwrap();
    let mut said = Vec::new();
    let _ = wire.read_to_end(&mut said);
    assert!(said.is_empty() || said[0] == 0x15, "{said:?}");

    let without = Server::start();
    let error = refused(&without, "a", &pin).to_string();
    assert!(error.contains("does not speak TLS"), "{error}");
}

/// The first bytes of a client that starts TLS.
fn client_hello() -> Vec<u8> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!(
        "latzero://a@{}?tls&pin={}",
        listener.local_addr().unwrap(),
        "A".repeat(43)
    );
    let client = std::thread::spawn(move || App::connect(&url).map(drop));
    let (mut stream, _) = listener.accept().unwrap();
    let mut hello = vec![0; 16 * 1024];
    let n = stream.read(&mut hello).unwrap();
    hello.truncate(n);
    drop(stream);
    client.join().unwrap().unwrap_err();
    hello
}

#[test]
fn a_client_that_stops_halfway_is_closed_in_time_and_delays_nobody() {
    let server = Server::with(&["enable_tls=true", "handshake_timeout=1s"]);
    let pin = format!("&pin={}", pin(&server));
    let handler = connect(&server, "h", &format!("{pin}&pool=p")).unwrap();
    handler.serve("echo", |req| req.data::<i64>()).unwrap();
    let caller = connect(&server, "c", &format!("{pin}&pool=p")).unwrap();
    let hello = client_hello();
    let began = Instant::now();
    // Nothing, half of the first message, and the whole first message without the second.
    let mut stalled: Vec<TcpStream> = [0, hello.len() / 2, hello.len()]
        .iter()
        .cycle()
        .take(24)
        .map(|&length| {
            let mut stream = TcpStream::connect(server.0.tcp()).unwrap();
            stream.write_all(&hello[..length]).unwrap();
            stream
        })
        .collect();
    let mut slowest = Duration::ZERO;
    for i in 0..200 {
        let asked = Instant::now();
        assert_eq!(caller.call("echo", &i).send::<i64>().unwrap(), i);
        slowest = slowest.max(asked.elapsed());
    }
    // Far less than the time until the others are closed, even on a busy machine.
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
    for stream in &mut stalled {
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        // The server's part of the handshake, and then the end.
        let mut said = Vec::new();
        match stream.read_to_end(&mut said) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
    assert!(began.elapsed() >= Duration::from_millis(900));
    assert_eq!(caller.call("echo", &1).send::<i64>().unwrap(), 1);
}

#[test]
fn a_first_message_in_tiny_records_is_understood() {
    let server = Server::with(&["enable_tls=true"]);
    // All of it arrives before the server reads: no later event announces the rest.
    let hello = client_hello();
    let tiny: Vec<u8> = hello[5..]
        .iter()
        .flat_map(|byte| [0x16, 3, 1, 0, 1, *byte])
        .collect();
    let mut stream = TcpStream::connect(server.0.tcp()).unwrap();
    stream.write_all(&tiny).unwrap();
    let mut said = [0; 1];
    stream.read_exact(&mut said).unwrap();
    assert_eq!(said, [0x16], "the server's part of the handshake");
}

#[test]
fn memory_of_tls_is_counted_and_released() {
    let (server, pin) = tls();
    let mut looks = server.app(Via::Unix, json!({"app_id": "looks"}));
    let mut inbound = || {
        let stats = looks.request(json!({"action": "stats"}));
        stats["response"]["ledger"]["inbound_bytes"]
            .as_u64()
            .unwrap()
    };
    let before = inbound();
    // A connection that has sent nothing, and one that is admitted.
    let silent = TcpStream::connect(server.0.tcp()).unwrap();
    while inbound() < before + 8192 {}
    let app = connect(&server, "a", &pin).unwrap();
    assert!(inbound() >= before + 2 * 8192, "a connection takes memory");
    drop((silent, app));
    while inbound() > before {}
}

#[test]
fn memory_of_tls_for_a_slow_reader_is_counted() {
    let (server, _) = tls();
    let mut looks = server.app(Via::Unix, json!({"app_id": "looks"}));
    let mut stats = || looks.request(json!({"action": "stats"}))["response"].take();
    let inbound = |stats: &Value| stats["ledger"]["inbound_bytes"].as_u64().unwrap();
    let before = inbound(&stats());
    let slow = json!({"app_id": "slow", "pools": ["p"], "triggers": ["t"]});
    let slow = server.app(Via::Tls, slow);
    let mut caller = server.app(Via::Unix, json!({"app_id": "caller", "pools": ["p"]}));
    // More than the kernel buffers for it; it sends nothing itself in the meantime.
    let data = "x".repeat(14_000_000);
    caller.send(&json!({"action": "trigger", "id": "a", "process": "t", "data": data}));
    eventually(|| stats()["transport"]["slow_readers"] == 1);
    // The decrypted input is gone by now; the encrypted output waits.
    let held = inbound(&stats()) - before;
    assert!(held >= 8192 + PLAIN_BYTES_MAX as u64, "{held}");
    drop((slow, caller));
    eventually(|| inbound(&stats()) == before);
}

/// Runs the program with a private home directory.
fn run(home: &Path, args: &[&str]) -> (i32, String) {
    run_with(home, args, &[])
}

fn run_with(home: &Path, args: &[&str], variables: &[(&str, &str)]) -> (i32, String) {
    let program = std::env::var_os("LATZERO_BIN").map(PathBuf::from);
    let beside = std::env::current_exe().unwrap();
    let beside = beside.ancestors().nth(2).unwrap().join("latzero");
    let out = Command::new(program.unwrap_or(beside))
        .args(args)
        .env("HOME", home)
        .env_remove("XDG_CONFIG_HOME")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = [out.stdout, out.stderr].concat();
    (out.status.code().unwrap(), String::from_utf8(text).unwrap())
}

#[test]
fn a_host_is_trusted_once_and_every_command_honours_it() {
    let (mut server, _) = tls();
    let home = tempfile::tempdir().unwrap();
    let tcp = server.0.tcp().to_owned();
    let port = tcp.rsplit_once(':').unwrap().1;
    let call = [
        "call",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "system/echo",
        "7",
    ];
    let (code, said) = run(home.path(), &call);
    assert!(code != 0 && said.contains("speaks TLS"), "{said}");
    // Nobody is there to confirm.
    let (code, said) = run(home.path(), &["trust", &tcp]);
    assert!(code == 2 && said.contains(&pin(&server)), "{said}");
    let (code, said) = run(home.path(), &["trust", &tcp, "--pin", &"A".repeat(43)]);
    assert!(
        code != 0 && said.contains("this may be another server"),
        "{said}"
    );
    let (code, said) = run(home.path(), &["trust", &tcp, "--pin", &pin(&server)]);
    assert!(code == 0, "{said}");
    let (code, said) = run(home.path(), &call);
    assert!(code == 0 && said.trim() == "7", "{said}");
    let (code, said) = run(
        home.path(),
        &["ping", "--url", &format!("latzero://x@{tcp}?tls")],
    );
    assert!(code == 0, "{said}");
    // Every command on a trusted host uses TLS, in whatever form the address is given.
    let plain = format!("latzero://x@{tcp}");
    for said in [
        run(home.path(), &["ping", "--url", &plain]),
        run_with(home.path(), &["ping"], &[("LATZERO_URL", &plain)]),
    ] {
        let (code, said) = said;
        let is_refused = said.contains("was trusted") && said.contains("?tls");
        assert!(code != 0 && is_refused, "{said}");
    }
    // Another key on the same port: every command refuses, and `trust` needs more than a yes.
    fs::remove_dir_all(server.0.data_dir().join("config/tls")).unwrap();
    let mut admin = server.app(Via::Unix, json!({"app_id": "admin"}));
    let reply: Value = admin.request(json!({"action": "reload"}));
    assert_eq!(reply["status"], "ok", "{reply}");
    let (code, said) = run(home.path(), &call);
    assert!(
        code != 0 && said.contains("not the one that you trust"),
        "{said}"
    );
    let new = pin(&server);
    let (code, said) = run(home.path(), &["trust", &tcp, "--pin", &new]);
    assert!(code != 0 && said.contains("--replace"), "{said}");
    let (code, said) = run(home.path(), &["trust", "--replace", &tcp, "--pin", &new]);
    assert!(code == 0, "{said}");
    let (code, said) = run(home.path(), &call);
    assert!(code == 0, "{said}");
    server.kill();
}

#[test]
fn beyond_loopback_tls_is_enough() {
    let server = latzero::testing::server_with(&["--host", "0.0.0.0", "--tls"]).unwrap();
    drop(Wire::unix(server.socket()));
}
