//! The cost of TLS: a call compared with the same call over plain TCP, and the time that a
//! handshake takes on the server's loop.

use std::collections::VecDeque;
use std::fs::Permissions;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use latzero::blocking::App;
use latzero::{Bytes, HandlerError};
use latzero_tls::client::{self, Trust};
use latzero_tls::pem::Origin;
use latzero_tls::server::{Acceptor, self_signed};
use serde_json::json;

use super::{SMALL, failed};
use crate::failure::Failure;
use crate::plan::{Load, Outcome, Plan, time_each};
use crate::report::median;
use crate::server::Running;
use crate::stream::Transport;

/// Times calls over plain TCP and over TLS, on two servers in turn, the plain one first.
pub(super) fn measure(rounds: u64, calls: u64) -> Result<[Vec<Outcome>; 2], Failure> {
    let servers = [
        Running::start(&[])?,
        Running::start(&["enable_tls=true".to_owned()])?,
    ];
    let mut apps = Vec::new();
    for server in &servers {
        let socket = server.address(Transport::Unix);
        let looks = App::connect(&format!("latzero://looks?socket={socket}"));
        let stats = looks.and_then(|looks| looks.request(&json!({"action": "stats"})));
        let stats = stats.map_err(failed("stats"))?;
        let pin = stats["server"]["pin"].as_str();
        let tls = pin.map_or_else(String::new, |pin| format!("tls&pin={pin}&"));
        let tcp = server.address(Transport::Tcp);
        let connect = |app: &str| {
            App::connect(&format!("latzero://{app}@{tcp}?{tls}pool=p")).map_err(failed("connect"))
        };
        let handler = connect("handler")?;
        let echo = handler.serve("echo", |request| {
            let bytes: Bytes = request.data()?;
            Ok::<_, HandlerError>(bytes)
        });
        echo.map_err(failed("serve"))?;
        apps.push((connect("caller")?, handler));
    }
    let plan = Plan {
        load: Load::OneAtATime,
        warmup: calls / 10,
        calls,
    };
    let body = Bytes(vec![7; SMALL]);
    let mut cells = [Vec::new(), Vec::new()];
    for round in 1..=rounds {
        eprintln!("TLS: round {round} of {rounds}");
        for ((caller, _), outcomes) in apps.iter().zip(&mut cells) {
            outcomes.push(time_each(&plan, || {
                let answer = caller.call("echo", &body).bytes();
                answer.map(drop).map_err(failed("call"))
            })?);
        }
    }
    Ok(cells)
}

/// One direction between the two sides.
#[derive(Default)]
struct Pipe(VecDeque<u8>);

impl Read for Pipe {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buf) {
            Ok(0) => Err(io::ErrorKind::WouldBlock.into()),
            other => other,
        }
    }
}

impl Write for Pipe {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The server's time for a handshake, and for its longest step, in microseconds.
pub(super) fn handshake(times: u32) -> Result<(f64, f64), Failure> {
    let fault = |error: &dyn std::fmt::Display| Failure::said(format!("handshake: {error}"));
    let dir = tempfile::tempdir().map_err(|error| fault(&error))?;
    let made = self_signed(vec!["localhost".to_owned()]).map_err(|error| fault(&error))?;
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&cert, made.certificate).map_err(|error| fault(&error))?;
    std::fs::write(&key, made.key).map_err(|error| fault(&error))?;
    std::fs::set_permissions(&key, Permissions::from_mode(0o600)).map_err(|error| fault(&error))?;
    let acceptor =
        Acceptor::load(&cert, &key, None, Origin::Given).map_err(|error| fault(&error))?;
    let trust = Trust::Pin(acceptor.pin());
    let (mut totals, mut longest) = (Vec::new(), Vec::new());
    for _ in 0..times {
        let begun = client::begin("localhost", &trust, None);
        let (mut client, _) = begun.map_err(|error| fault(&error))?;
        let (mut up, mut down) = (Pipe::default(), Pipe::default());
        let mut steps = Vec::new();
        let begin = Instant::now();
        let mut server = acceptor.begin().map_err(|error| fault(&error))?;
        let beginning = begin.elapsed();
        while server.is_handshaking() {
            client.flush(&mut up).map_err(|error| fault(&error))?;
            client
                .agree(&mut down, &mut up)
                .map_err(|error| fault(&error))?;
            let begin = Instant::now();
            server
                .agree(&mut up, &mut down)
                .map_err(|error| fault(&error))?;
            steps.push(begin.elapsed());
        }
        steps.push(beginning);
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        totals.push(micros(steps.iter().sum()));
        longest.push(micros(steps.into_iter().max().unwrap_or_default()));
    }
    let middle = |values| median(values).expect("there is at least one");
    Ok((middle(totals), middle(longest)))
}
