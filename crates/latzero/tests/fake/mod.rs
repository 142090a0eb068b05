//! A server small enough to trust: it routes by name, in order, and does nothing else. Tests that
//! need the wire to misbehave talk through a [`Peer`] themselves.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test program uses what it needs"
)]
#![allow(clippy::unwrap_used, reason = "a fake that fails fails its test")]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::{Value, json};

/// Either kind of socket.
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    fn clone(&self) -> Socket {
        match self {
            Socket::Tcp(s) => Socket::Tcp(s.try_clone().unwrap()),
            Socket::Unix(s) => Socket::Unix(s.try_clone().unwrap()),
        }
    }

    fn shutdown(&self) {
        let _ = match self {
            Socket::Tcp(s) => s.shutdown(Shutdown::Both),
            Socket::Unix(s) => s.shutdown(Shutdown::Both),
        };
    }

    fn io(&mut self) -> &mut dyn ReadWrite {
        match self {
            Socket::Tcp(s) => s,
            Socket::Unix(s) => s,
        }
    }
}

trait ReadWrite: Read + Write {}
impl<T: Read + Write> ReadWrite for T {}

/// The server's end of one connection.
pub struct Peer {
    pub socket: Socket,
}

/// A message, with the raw bytes that came beside it.
pub type Message = (Value, Option<Vec<u8>>);

/// A frame's bytes.
pub fn frame(message: &Value, raw: Option<&[u8]>) -> Vec<u8> {
    let text = message.to_string();
    let mut out = Vec::new();
    match raw {
        None => {
            out.extend_from_slice(&(text.len() as u32).to_be_bytes());
            out.extend_from_slice(text.as_bytes());
        }
        Some(raw) => {
            let length = (4 + text.len() + raw.len()) as u32 | 1 << 31;
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(&(text.len() as u32).to_be_bytes());
            out.extend_from_slice(text.as_bytes());
            out.extend_from_slice(raw);
        }
    }
    out
}

impl Peer {
    pub fn clone(&self) -> Peer {
        Peer {
            socket: self.socket.clone(),
        }
    }

    /// The next message; `None` at the end.
    pub fn read(&mut self) -> Option<Message> {
        let mut prefix = [0; 4];
        self.socket.io().read_exact(&mut prefix).ok()?;
        let length = u32::from_be_bytes(prefix);
        let mut payload = vec![0; (length & !(1 << 31)) as usize];
        self.socket.io().read_exact(&mut payload).ok()?;
        if length >> 31 == 0 {
            return Some((serde_json::from_slice(&payload).unwrap(), None));
        }
        let header = u32::from_be_bytes(payload[..4].try_into().unwrap()) as usize;
        let json = serde_json::from_slice(&payload[4..4 + header]).unwrap();
        Some((json, Some(payload[4 + header..].to_vec())))
    }

    pub fn write(&mut self, bytes: &[u8]) {
        let _ = self.socket.io().write_all(bytes);
    }

    pub fn send(&mut self, message: &Value) {
        self.write(&frame(message, None));
    }

    pub fn reply(&mut self, to: &Value, response: &Value) {
        self.send(
            &json!({"action":"response","in_reply_to":to["id"],"status":"ok","response":response}),
        );
    }

    /// Answers the handshake.
    pub fn welcome(&mut self) -> Value {
        let (hello, _) = self.read().expect("a handshake");
        self.send(&ack(&hello, 1, &json!({})));
        hello
    }

    pub fn close(&self) {
        self.socket.shutdown();
    }
}

/// The acknowledgement of a handshake.
pub fn ack(hello: &Value, instance: u64, limits: &Value) -> Value {
    json!({
        "action":"handshake_ack","in_reply_to":hello["id"],"status":"ok","app_id":hello["app_id"],
        "instance":format!("{instance:016x}"),
        "pools": hello.get("pools").cloned().unwrap_or(json!(["default"])),
        "triggers": names(&hello["triggers"]),"rehydrated":false,"protocol":1,
        "server":{"version":"0","node":"n"},"features":["attachments"],"limits":limits,
    })
}

/// How clients reach a fake.
#[derive(Clone, Copy)]
pub enum Over {
    Tcp,
    Unix,
}

/// A listening fake; it ends when it is dropped.
pub struct Fake {
    pub address: String,
    dir: tempfile::TempDir,
    path: PathBuf,
    tcp: Option<u16>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    pub connections: Arc<Mutex<Vec<Socket>>>,
}

impl Fake {
    /// Runs `serve` on its own thread for every connection, with the connection's number.
    pub fn scripted(over: Over, serve: impl Fn(usize, Peer) + Send + Sync + 'static) -> Fake {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let ended = Arc::new(AtomicBool::new(false));
        let connections = Arc::new(Mutex::new(Vec::new()));
        let (is_over, kept) = (ended.clone(), connections.clone());
        let serve = Arc::new(serve);
        let (accept, tcp): (Box<dyn FnMut() -> Socket + Send>, _) = match over {
            Over::Tcp => {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let port = listener.local_addr().unwrap().port();
                let accept = move || {
                    let socket = listener.accept().unwrap().0;
                    socket.set_nodelay(true).unwrap();
                    Socket::Tcp(socket)
                };
                (Box::new(accept), Some(port))
            }
            Over::Unix => {
                let listener = UnixListener::bind(&path).unwrap();
                (
                    Box::new(move || Socket::Unix(listener.accept().unwrap().0)),
                    None,
                )
            }
        };
        let address = match tcp {
            Some(port) => format!("@127.0.0.1:{port}?"),
            None => format!("?socket={}", path.display()),
        };
        let mut accept = accept;
        let thread = std::thread::spawn(move || {
            for n in 0.. {
                let socket = accept();
                if is_over.load(Ordering::SeqCst) {
                    return;
                }
                kept.lock().unwrap().push(socket.clone());
                let serve = serve.clone();
                std::thread::spawn(move || {
                    let peer = Peer { socket };
                    let end = peer.clone();
                    serve(n, peer);
                    end.close();
                });
            }
        });
        Fake {
            address,
            dir,
            path,
            tcp,
            ended,
            thread: Some(thread),
            connections,
        }
    }

    /// Routes calls and emits between its clients.
    pub fn broker(over: Over) -> Fake {
        Fake::broker_with(over, json!({}))
    }

    pub fn broker_with(over: Over, limits: Value) -> Fake {
        let state = Arc::new(Broker {
            limits,
            ..Broker::default()
        });
        Fake::scripted(over, move |n, peer| state.serve(n as u64 + 1, peer))
    }

    /// The address of `app` here.
    pub fn url(&self, app: &str) -> String {
        format!("latzero://{app}{}&pool=alpha", self.address)
    }

    /// Cuts every connection.
    pub fn cut(&self) {
        self.connections
            .lock()
            .unwrap()
            .drain(..)
            .for_each(|socket| socket.shutdown());
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        self.cut();
        match self.tcp {
            Some(port) => drop(TcpStream::connect(("127.0.0.1", port))),
            None => drop(UnixStream::connect(&self.path)),
        }
        self.thread.take().unwrap().join().unwrap();
    }
}

#[derive(Default)]
struct Broker {
    state: Mutex<State>,
    ids: AtomicU64,
    limits: Value,
}

#[derive(Default)]
struct State {
    peers: HashMap<u64, (Peer, String)>,
    served: HashMap<String, Vec<u64>>,
    /// By the id that the handler knows: the caller, its own id, the handler.
    calls: HashMap<String, (u64, Value, u64)>,
    watchers: Vec<(u64, String)>,
    turn: usize,
}

fn names(triggers: &Value) -> Vec<String> {
    let name = |t: &Value| {
        t.as_str()
            .or_else(|| t["name"].as_str())
            .unwrap()
            .to_owned()
    };
    triggers
        .as_array()
        .into_iter()
        .flatten()
        .map(name)
        .collect()
}

fn error(to: &Value, code: &str, ran: &str) -> Value {
    json!({"action":"response","in_reply_to":to,"status":"error",
        "error":{"code":code,"message":"the fake says so","ran":ran}})
}

impl Broker {
    fn serve(&self, me: u64, mut peer: Peer) {
        let Some((hello, _)) = peer.read() else {
            return;
        };
        {
            let mut state = self.state.lock().unwrap();
            peer.send(&ack(&hello, me, &self.limits));
            let app = hello["app_id"].as_str().unwrap().to_owned();
            state.peers.insert(me, (peer.clone(), app.clone()));
            for name in names(&hello["triggers"]) {
                state.served.entry(name).or_default().push(me);
            }
            state.tell("app_online", &app);
        }
        while let Some((message, raw)) = peer.read() {
            self.state
                .lock()
                .unwrap()
                .message(me, message, raw.as_deref(), &self.ids);
        }
        let mut state = self.state.lock().unwrap();
        let app = state
            .peers
            .remove(&me)
            .map_or(String::new(), |(_, app)| app);
        state
            .served
            .values_mut()
            .for_each(|served| served.retain(|n| *n != me));
        state.watchers.retain(|(n, _)| *n != me);
        state.tell("app_offline", &app);
        let gone: Vec<_> = state
            .calls
            .extract_if(|_, (_, _, handler)| *handler == me)
            .collect();
        for (_, (caller, id, _)) in gone {
            state.send(caller, &error(&id, "handler_gone", "unknown"), None);
        }
    }
}

impl State {
    fn send(&mut self, to: u64, message: &Value, raw: Option<&[u8]>) {
        if let Some((peer, _)) = self.peers.get_mut(&to) {
            peer.write(&frame(message, raw));
        }
    }

    fn tell(&mut self, event: &str, app: &str) {
        for (to, pool) in self.watchers.clone() {
            let push = json!({"action":"event","event":event,"pool":pool,"app_id":app});
            self.send(to, &push, None);
        }
    }

    fn message(&mut self, me: u64, mut m: Value, raw: Option<&[u8]>, ids: &AtomicU64) {
        let action = m["action"].as_str().unwrap().to_owned();
        let id = m["id"].clone();
        let ok = |value: Value| {
            let mut reply = json!({"action":"response","in_reply_to":id,"status":"ok"});
            reply["response"] = value;
            reply
        };
        let from = self.peers[&me].1.clone();
        let origin = json!({"app_id":from,"instance":format!("{me:016x}")});
        match action.as_str() {
            "trigger" => {
                let name = m["process"].as_str().unwrap();
                let mut served = self.served.get(name).cloned().unwrap_or_default();
                if let Some(to) = m["destination"].as_str() {
                    served.retain(|n| self.peers[n].1 == to);
                }
                if served.is_empty() {
                    return self.send(me, &error(&id, "no_handler", "no"), None);
                }
                self.turn += 1;
                let to = served[self.turn % served.len()];
                let call = format!("c{}", ids.fetch_add(1, Ordering::SeqCst));
                self.calls.insert(call.clone(), (me, id, to));
                m["id"] = json!(call);
                m["origin"] = origin;
                m["pool"] = json!("alpha");
                self.send(to, &m, raw);
            }
            "response" => {
                let call = m["in_reply_to"].as_str().unwrap().to_owned();
                let Some((caller, id, _)) = self.calls.get(&call).cloned() else {
                    return;
                };
                if matches!(m["status"].as_str(), Some("ok" | "error")) {
                    self.calls.remove(&call);
                }
                m["in_reply_to"] = id;
                self.send(caller, &m, raw);
            }
            "cancel" | "ack" => {
                let mine = |(_, (caller, own, _)): &(&String, &(u64, Value, u64))| {
                    *caller == me && *own == id
                };
                let Some((call, (_, own, to))) = self.calls.iter().find(mine) else {
                    return;
                };
                let (call, own, to) = (call.clone(), own.clone(), *to);
                m["id"] = json!(call);
                self.send(to, &m, None);
                if action == "cancel" {
                    self.calls.remove(&call);
                    self.send(me, &error(&own, "cancelled", "unknown"), None);
                }
            }
            "emit" => {
                let name = m["process"].as_str().unwrap();
                let mut served = self.served.get(name).cloned().unwrap_or_default();
                if let Some(to) = m["destination"].as_str() {
                    served.retain(|n| self.peers[n].1 == to);
                }
                if m["deliver"] == "one" {
                    served.truncate(1);
                }
                m.as_object_mut().unwrap().remove("id");
                m["origin"] = origin;
                m["pool"] = json!("alpha");
                for to in &served {
                    self.send(*to, &m, raw);
                }
                if !id.is_null() {
                    self.send(me, &ok(json!({"delivered":served.len()})), None);
                }
            }
            "trigger_register" | "trigger_unregister" => {
                for name in names(&m["triggers"]) {
                    let served = self.served.entry(name).or_default();
                    served.retain(|n| *n != me);
                    if action == "trigger_register" {
                        served.push(me);
                    }
                }
                if !id.is_null() {
                    self.send(me, &ok(json!({})), None);
                }
            }
            "watch" => {
                let pool = m["pool"].as_str().unwrap().to_owned();
                self.watchers.push((me, pool));
                if !id.is_null() {
                    self.send(me, &ok(json!({})), None);
                }
            }
            _ if id.is_null() => {}
            "app_list" => {
                let apps: Vec<_> = self.peers.values().map(|(_, app)| app.clone()).collect();
                self.send(me, &ok(json!(apps)), None);
            }
            "ping" | "pool_join" | "pool_leave" | "unwatch" => self.send(me, &ok(json!({})), None),
            _ => self.send(me, &error(&id, "unknown_action", "no"), None),
        }
    }
}
