//! The peer of the shared scenarios in Rust: it reads one command per line and writes one answer
//! per line. The peers of the other languages are `sdk/python/tests/peer.py` and
//! `sdk/node/test/peer.mjs`; `conformance/scenarios/README.md` lists the commands.
//!
//! It uses only what the crate `latzero` offers to everybody.

#![allow(
    clippy::unwrap_used,
    reason = "a command that is wrong ends the peer, and the test with it"
)]

use std::collections::HashMap;
use std::io::Write as _;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use latzero::blocking::{
    Answers, App, Block, BlockLock, BlockWriter, Changes, Draft, Events, Parked, Request, Stream,
};
use latzero::{
    Bytes, Calling, Data, Emission, Error, HandlerError, LockMode, OwnedView, Presence, Reconnect,
    Strategy,
};
use serde_json::{Map, Value, json};

/// How long a wait without a timeout lasts.
const LONG: Duration = Duration::from_secs(3600);
/// How often a handler looks whether its call was cancelled.
const LOOK: Duration = Duration::from_millis(2);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What commands and handlers share.
#[derive(Default)]
struct Board {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    notes: HashMap<String, Vec<Value>>,
    permits: HashMap<String, u32>,
    is_over: bool,
}

impl Board {
    fn note(&self, of: &str, note: Value) {
        let mut state = lock(&self.state);
        state.notes.entry(of.to_owned()).or_default().push(note);
    }

    fn set(&self, of: &str, note: Value) {
        lock(&self.state).notes.insert(of.to_owned(), vec![note]);
    }

    fn release(&self, of: &str) {
        *lock(&self.state).permits.entry(of.to_owned()).or_default() += 1;
        self.changed.notify_all();
    }

    /// Waits for `release`; whether that came before `is_cancelled`.
    fn wait(&self, of: &str, is_cancelled: impl Fn() -> bool) -> bool {
        let mut state = lock(&self.state);
        loop {
            if let Some(permits) = state.permits.get_mut(of).filter(|permits| **permits > 0) {
                *permits -= 1;
                return true;
            }
            if state.is_over || is_cancelled() {
                return false;
            }
            let waited = self.changed.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A thing that a later command names.
enum Thing {
    Submitted(App, Box<Calling<Data>>),
    Answered(Result<Data, Error>),
    Parked(Parked),
    Stream(Box<Stream<Data>>),
    Events(Events<Emission>),
    Presence(Events<Presence>),
    Answers(Answers),
    Changes(Changes),
    View(OwnedView, Block),
    Lock(BlockLock),
}

#[derive(Default)]
struct Peer {
    board: Arc<Board>,
    apps: Mutex<HashMap<String, App>>,
    blocks: Mutex<HashMap<String, Block>>,
    things: Mutex<HashMap<String, Thing>>,
}

/// What a command fails with.
enum Fault {
    Ours(Error),
    Other(String),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Fault::Ours(error)
    }
}

type Done = Result<Value, Fault>;

/// A payload to send, with the blocks in it.
struct Outgoing {
    data: Data,
    blocks: Vec<(Block, bool)>,
}

fn hex(bytes: &[u8]) -> Value {
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    json!({ "$bytes": text })
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    let bytes = digits.map(|two| u8::from_str_radix(str::from_utf8(two).unwrap(), 16).unwrap());
    bytes.collect()
}

/// The name of a tagged value, such as `{"$bytes": "00ff"}`, and what it has.
fn tag(value: &Value) -> Option<(&str, &Value)> {
    let map = value.as_object().filter(|map| map.len() == 1)?;
    let (name, inside) = map.iter().next()?;
    Some((name.strip_prefix('$')?, inside))
}

fn seconds(of: &Value, name: &str) -> Option<Duration> {
    of[name].as_u64().map(Duration::from_millis)
}

fn text<'a>(of: &'a Value, name: &str) -> &'a str {
    let found = of[name].as_str();
    found.unwrap_or_else(|| panic!("the command {of} has no text '{name}'"))
}

impl Peer {
    fn app(&self, command: &Value) -> App {
        let name = text(command, "app");
        let found = lock(&self.apps).get(name).cloned();
        found.unwrap_or_else(|| panic!("there is no app '{name}'"))
    }

    fn block(&self, name: &str) -> Block {
        let found = lock(&self.blocks).get(name).cloned();
        found.unwrap_or_else(|| panic!("there is no block '{name}'"))
    }

    fn keep(&self, command: &Value, thing: Thing) -> Done {
        lock(&self.things).insert(text(command, "as").to_owned(), thing);
        Ok(Value::Null)
    }

    fn take(&self, name: &str) -> Thing {
        let found = lock(&self.things).remove(name);
        found.unwrap_or_else(|| panic!("there is no '{name}'"))
    }

    /// Writes a value as JSON text; tags become what they stand for.
    fn write(&self, value: &Value, out: &mut String, blocks: &mut Vec<(Block, bool)>) {
        match (tag(value), value) {
            (Some(("int", digits)), _) => out.push_str(digits.as_str().unwrap()),
            (Some(("float", name)), _) => {
                let float: f64 = name.as_str().unwrap().parse().unwrap();
                out.push_str(&serde_json::to_string(&float).unwrap());
            }
            (Some((kind @ ("block" | "writable"), name)), _) => {
                let block = self.block(name.as_str().unwrap());
                out.push_str(&block.reference().to_string());
                blocks.push((block, kind == "writable"));
            }
            (Some(("nested", depth)), _) => {
                let depth = usize::try_from(depth.as_u64().unwrap()).unwrap();
                out.push_str(&"[".repeat(depth));
                out.push_str(&"]".repeat(depth));
            }
            (_, Value::Array(items)) => {
                let ends = ["[", "]"];
                self.write_all(items.iter().map(|item| (None, item)), ends, out, blocks);
            }
            (_, Value::Object(map)) => {
                let items = map.iter().map(|(key, item)| (Some(key), item));
                self.write_all(items, ["{", "}"], out, blocks);
            }
            (_, other) => out.push_str(&other.to_string()),
        }
    }

    fn write_all<'a>(
        &self,
        items: impl Iterator<Item = (Option<&'a String>, &'a Value)>,
        ends: [&str; 2],
        out: &mut String,
        blocks: &mut Vec<(Block, bool)>,
    ) {
        out.push_str(ends[0]);
        for (at, (key, item)) in items.enumerate() {
            if at > 0 {
                out.push(',');
            }
            if let Some(key) = key {
                out.push_str(&json!(key).to_string());
                out.push(':');
            }
            self.write(item, out, blocks);
        }
        out.push_str(ends[1]);
    }

    fn outgoing(&self, value: &Value) -> Outgoing {
        if let Some(("bytes", digits)) = tag(value) {
            return Outgoing {
                data: Data::Bytes(Bytes(unhex(digits.as_str().unwrap()))),
                blocks: Vec::new(),
            };
        }
        let (mut json, mut blocks) = (String::new(), Vec::new());
        self.write(value, &mut json, &mut blocks);
        Outgoing {
            data: Data::Json(json),
            blocks,
        }
    }

    fn call(&self, command: &Value) -> latzero::blocking::Call {
        let out = self.outgoing(&command["data"]);
        let mut call = self.app(command).call(text(command, "name"), &out.data);
        for (block, is_writable) in &out.blocks {
            call = match is_writable {
                true => call.block_writable(block),
                false => call.block(block),
            };
        }
        if let Some(timeout) = seconds(command, "timeout_ms") {
            call = call.timeout(timeout);
        }
        for name in ["to", "pool", "key", "idempotency_key", "id"] {
            let Some(value) = command[name].as_str() else {
                continue;
            };
            call = match name {
                "to" => call.to(value),
                "pool" => call.pool(value),
                "key" => call.key(value),
                "id" => call.id(value),
                _ => call.idempotency_key(value),
            };
        }
        for (name, value) in command["headers"].as_object().into_iter().flatten() {
            call = call.header(name, value.as_str().unwrap());
        }
        if command["privileged"] == true {
            call = call.privileged();
        }
        if let Some(attempts) = command["attempts"].as_u64() {
            call = call.attempts(attempts as u32);
        }
        match command["redeliver"] == true {
            true => call.redeliver(),
            false => call,
        }
    }

    fn connect(&self, command: &Value) -> Done {
        let options = &command["options"];
        let is = |name: &str| options[name] == true;
        let pools = options["pools"].as_array().into_iter().flatten();
        let reconnect = Reconnect {
            enabled: options["reconnect"] != false,
            ..Reconnect::default()
        };
        let mut builder = latzero::App::builder(text(command, "url"))
            .exclusive(is("exclusive"))
            .takeover(is("takeover"))
            .rehydrate(is("rehydrate"))
            .transient(is("transient"))
            .reconnect(reconnect)
            .pools(pools.map(|pool| pool.as_str().unwrap()));
        if let Some(timeout) = seconds(options, "call_timeout_ms") {
            builder = builder.call_timeout(timeout);
        }
        if options["meta"].is_object() {
            builder = builder.meta(options["meta"].clone());
        }
        let app = App::connect_with(builder)?;
        let app_id = app.app_id().to_owned();
        lock(&self.apps).insert(text(command, "app").to_owned(), app);
        Ok(json!({ "app_id": app_id }))
    }

    fn serve(&self, command: &Value) -> Done {
        let name = text(command, "name");
        let mut handler = self.app(command).handler(name);
        if let Some(strategy) = command["strategy"].as_str().and_then(Strategy::parse) {
            handler = handler.strategy(strategy);
        }
        if let Some(calls) = command["concurrency"].as_u64() {
            handler = handler.concurrency(u32::try_from(calls).unwrap());
        }
        if command["privileged"] == true {
            handler = handler.privileged();
        }
        if let Some(doc) = command["doc"].as_str() {
            handler = handler.doc(doc);
        }
        if let Some(schema) = command.get("schema") {
            handler = handler.schema(schema.clone());
        }
        if let Some(pools) = command["pools"].as_array() {
            handler = handler.pools(pools.iter().map(|pool| pool.as_str().unwrap()));
        }
        let (board, way) = (self.board.clone(), text(command, "as").to_owned());
        let name = name.to_owned();
        handler.serve(move |request| answer(&board, &name, &way, &request))?;
        Ok(Value::Null)
    }

    fn emit(&self, command: &Value) -> Done {
        let out = self.outgoing(&command["data"]);
        let mut emit = self.app(command).emit(text(command, "name"), &out.data);
        if command["one"] == true {
            emit = emit.one();
        }
        if command["privileged"] == true {
            emit = emit.privileged();
        }
        if let Some(to) = command["to"].as_str() {
            emit = emit.to(to);
        }
        if let Some(pool) = command["pool"].as_str() {
            emit = emit.pool(pool);
        }
        for (name, value) in command["headers"].as_object().into_iter().flatten() {
            emit = emit.header(name, value.as_str().unwrap());
        }
        if command["count"] == true {
            return Ok(emit.counted()?.into());
        }
        emit.send()?;
        Ok(Value::Null)
    }

    fn next(&self, command: &Value) -> Done {
        let name = text(command, "of");
        let mut thing = self.take(name);
        let next: Result<Option<Value>, Error> = match &mut thing {
            Thing::Stream(stream) => stream.next().transpose().map(|item| item.map(show)),
            Thing::Events(events) => Ok(events.recv().map(|event| {
                json!({
                    "name": event.name(), "pool": event.pool(), "data": shown(event.data()),
                    "origin": event.origin().app_id, "lost": event.lost(),
                    "headers": headers(event.headers()),
                })
            })),
            Thing::Presence(events) => Ok(events.recv().map(|event| {
                json!({
                    "event": event.event(), "pool": event.pool(), "app_id": event.app_id(),
                    "name": event.fields().get("name"),
                })
            })),
            Thing::Answers(answers) => Ok(answers.recv().map(|answer| {
                let id = answer.id().to_owned();
                match answer.into::<Data>() {
                    Ok(data) => json!({"id": id, "result": show(data)}),
                    Err(error) => json!({"id": id, "error": describe(&error)}),
                }
            })),
            Thing::Changes(changes) => Ok(changes.next().map(Value::from)),
            _ => panic!("'{name}' has no items"),
        };
        lock(&self.things).insert(name.to_owned(), thing);
        Ok(match next? {
            Some(item) => json!({ "item": item }),
            None => json!({"over": true}),
        })
    }

    fn open(&self, command: &Value) -> Done {
        let mut name = self.app(command).block(text(command, "id"));
        if let Some(pool) = command["pool"].as_str() {
            name = name.pool(pool);
        }
        let size = match command["dtype"].as_str() {
            Some(dtype) => {
                let of = &command["shape"];
                let lengths = of.as_array().cloned().unwrap_or_else(|| vec![of.clone()]);
                let shape: Vec<u64> = lengths.iter().map(|n| n.as_u64().unwrap()).collect();
                name = name.layout(dtype, &shape);
                let bytes: u64 = dtype
                    .trim_start_matches(|c: char| !c.is_ascii_digit())
                    .parse()
                    .unwrap();
                shape.iter().product::<u64>() * bytes
            }
            None => command["size"].as_u64().unwrap_or_default(),
        };
        let create = &command["create"];
        let block = if *create == true || create == "new" {
            let mut new = name.create(size);
            let apps = |of: &str| -> Option<Vec<&str>> {
                let apps = command[of].as_array()?;
                Some(apps.iter().map(|app| app.as_str().unwrap()).collect())
            };
            if *create == true {
                new = new.or_attach();
            }
            if command["kind"] == "persistent" {
                new = new.persistent();
            }
            if command["lifetime"] == "attached" {
                new = new.while_attached();
            }
            if let Some(slots) = command["slots"].as_u64() {
                new = new.slots(u32::try_from(slots).unwrap());
            }
            if let Some(readers) = apps("readable_by") {
                new = new.readable_by(&readers);
            }
            if let Some(writers) = apps("writable_by") {
                new = new.writable_by(&writers);
            }
            new.send()?
        } else if command["write"] == false {
            name.attach()?
        } else {
            name.attach_writable()?
        };
        lock(&self.blocks).insert(text(command, "as").to_owned(), block);
        Ok(Value::Null)
    }

    fn write_block(&self, command: &Value) -> Done {
        let block = self.block(text(command, "block"));
        let wait = seconds(command, "wait_ms").unwrap_or(Duration::from_secs(1));
        let mut draft: Draft = block.write(wait)?;
        let values = command["values"].as_array().unwrap();
        let bytes = to_bytes(values, &dtype(&block));
        let row = bytes.len() / values.len().max(1);
        let at = command["at"].as_u64().unwrap_or_default() as usize;
        if command["keep"] == false && draft.is_in_place() {
            draft.expose(0, block.size(), false)?;
        }
        draft.write((at * row) as u64, &bytes)?;
        if let Some(hold) = command["hold"].as_str() {
            self.board.note(hold, json!("holds"));
            self.board.wait(hold, || false);
        }
        if command["fail"] == true {
            draft.abandon();
            return Err(Fault::Other("told to fail".into()));
        }
        Ok(draft.commit()?.into())
    }

    fn run(&self, command: &Value) -> Done {
        let of = |name: &str| self.block(text(command, name));
        Ok(match text(command, "do") {
            "connect" => self.connect(command)?,
            "state" => {
                let app = self.app(command);
                json!({
                    "app_id": app.app_id(), "joined": app.joined(),
                    "is_connected": app.is_connected(), "is_stored": app.is_stored(),
                })
            }
            "instance" => json!(self.app(command).instance().map(|of| of.to_string())),
            "close" => {
                let app = lock(&self.apps).remove(text(command, "app")).unwrap();
                app.close()?;
                Value::Null
            }
            "join" => {
                self.app(command).join(text(command, "pool"))?;
                Value::Null
            }
            "leave" => {
                self.app(command).leave(text(command, "pool"))?;
                Value::Null
            }
            "apps" => self.app(command).apps()?,
            "pools" => self.app(command).pools()?,
            "trigger" => {
                let (pool, name) = (text(command, "pool"), text(command, "name"));
                self.app(command).trigger(pool, name)?.into()
            }
            "request" => self.app(command).request(&command["message"])?,
            "ping" => json!(self.app(command).ping()? < LONG),
            "call" => show(self.call(command).send()?),
            "reply" => {
                let reply = self.call(command).reply()?;
                let of = headers(reply.headers());
                json!({"data": show(reply.into()?), "headers": of})
            }
            "submit" => {
                let app = self.app(command);
                let out = self.outgoing(&command["data"]);
                let call = app.as_async().call(text(command, "name"), &out.data);
                let mut calling = Box::new(call.send::<Data>());
                let thing = match app.run(Some(Instant::now()), &mut *calling) {
                    None => Thing::Submitted(app, calling),
                    Some(answer) => Thing::Answered(answer),
                };
                self.keep(command, thing)?
            }
            "result" => match self.take(text(command, "of")) {
                Thing::Submitted(app, mut calling) => match app.run(None, &mut *calling) {
                    Some(answer) => show(answer?),
                    None => return Err(Fault::Other("the wait was interrupted".into())),
                },
                Thing::Answered(answer) => show(answer?),
                _ => panic!("{command}: not submitted"),
            },
            "park" => {
                let parked = self.call(command).send_parked()?;
                let id = parked.id().to_owned();
                self.keep(command, Thing::Parked(parked))?;
                id.into()
            }
            "answer" => match self.take(text(command, "of")) {
                Thing::Parked(parked) => show(parked.answer()?),
                _ => panic!("{command}: not parked"),
            },
            "answers" => self.keep(command, Thing::Answers(self.app(command).answers()))?,
            "stream" => {
                let mut call = self.call(command);
                if let Some(window) = command["window"].as_u64() {
                    call = call.window(window);
                }
                self.keep(command, Thing::Stream(Box::new(call.stream())))?
            }
            "next" => self.next(command)?,
            "progress" => match self.take(text(command, "of")) {
                Thing::Stream(mut stream) => {
                    let progress = stream.progress::<Value>().transpose()?;
                    lock(&self.things).insert(text(command, "of").into(), Thing::Stream(stream));
                    json!(progress)
                }
                _ => panic!("{command}: no stream"),
            },
            "end" => match &lock(&self.things)[text(command, "of")] {
                Thing::Stream(stream) => match stream.end() {
                    Some(end) => show(end.clone().into()?),
                    None => Value::Null,
                },
                _ => panic!("{command}: no stream"),
            },
            "cancel" => {
                match self.take(text(command, "of")) {
                    Thing::Parked(parked) => parked.cancel(),
                    // Dropping a call or a stream cancels it.
                    other => drop(other),
                }
                Value::Null
            }
            "forget" => {
                drop(self.take(text(command, "of")));
                Value::Null
            }
            "emit" => self.emit(command)?,
            "events" => {
                let events = self.app(command).on(text(command, "name"))?;
                self.keep(command, Thing::Events(events))?
            }
            "listen" => {
                let mut events = self.app(command).on(text(command, "name"))?;
                let (board, of) = (self.board.clone(), text(command, "as").to_owned());
                std::thread::spawn(move || {
                    while let Some(event) = events.recv() {
                        board.note(&of, shown(event.data()));
                    }
                });
                Value::Null
            }
            "watch" => {
                let pool = text(command, "pool");
                self.keep(command, Thing::Presence(self.app(command).watch(pool)?))?
            }
            "serve" => self.serve(command)?,
            "unserve" => {
                self.app(command).unserve(text(command, "name"))?;
                Value::Null
            }
            "notes" => {
                let state = lock(&self.board.state);
                json!(
                    state
                        .notes
                        .get(text(command, "of"))
                        .cloned()
                        .unwrap_or_default()
                )
            }
            "release" => {
                self.board.release(text(command, "of"));
                Value::Null
            }
            "block" => self.open(command)?,
            "blocks" => {
                let blocks = self.app(command).blocks(command["pool"].as_str())?;
                let ids = blocks.iter().map(|block| block["block_id"].clone());
                ids.collect()
            }
            "about" => {
                let block = of("block");
                let layout = block.layout().unwrap_or_default();
                json!({
                    "id": block.id(), "pool": block.pool(), "nbytes": block.size(),
                    "version": block.version(), "generation": block.generation(),
                    "is_live": block.is_live(), "is_mapped": block.is_viewable(),
                    "dtype": layout["dtype"], "shape": layout["shape"],
                })
            }
            "read" => {
                let block = of("block");
                numbers(&block.read()?.0, &dtype(&block))
            }
            "read_at" => {
                let length = usize::try_from(command["length"].as_u64().unwrap()).unwrap();
                let mut bytes = vec![0; length];
                of("block").read_into(command["offset"].as_u64().unwrap(), &mut bytes)?;
                hex(&bytes)
            }
            "view" => {
                let block = of("block");
                let view = block.owned_view()?;
                let version = view.get().version();
                self.keep(command, Thing::View(view, block))?;
                json!({ "version": version })
            }
            "seen" => match &lock(&self.things)[text(command, "of")] {
                Thing::View(view, block) => {
                    let mut bytes = vec![0; usize::try_from(view.get().len()).unwrap()];
                    view.get().copy_to(0, &mut bytes).unwrap();
                    json!({
                        "values": numbers(&bytes, &dtype(block)),
                        "valid": view.get().is_valid(), "stale": view.is_stale(),
                    })
                }
                _ => panic!("{command}: no view"),
            },
            "write" => self.write_block(command)?,
            "write_many" => {
                let block = of("block");
                let writer: BlockWriter = block.writer(Duration::from_secs(1))?;
                let mut version = 0;
                for values in command["versions"].as_array().unwrap() {
                    let bytes = to_bytes(values.as_array().unwrap(), &dtype(&block));
                    version = writer.write(0, &bytes)?;
                }
                version.into()
            }
            "write_at" => {
                let (offset, out) = (
                    command["offset"].as_u64().unwrap(),
                    unhex(text(&command["data"], "$bytes")),
                );
                match command["if_version"].as_u64() {
                    Some(version) => of("block").write_if(version, offset, &out)?,
                    None => of("block").write_at(offset, &out)?,
                }
                .into()
            }
            "cas" => {
                let [expected, data] =
                    ["expected", "data"].map(|of| unhex(text(&command[of], "$bytes")));
                let offset = command["offset"].as_u64().unwrap();
                match of("block").cas(offset, &expected, &data)? {
                    Ok(_) => Value::Null,
                    Err(found) => hex(&found),
                }
            }
            "lock" => {
                let mode = match command["shared"] == true {
                    true => LockMode::Shared,
                    false => LockMode::Exclusive,
                };
                let wait = seconds(command, "wait_ms").unwrap_or(Duration::from_secs(1));
                let lock = match seconds(command, "lease_ms") {
                    Some(lease) => of("block").lock_for(mode, wait, lease)?,
                    None => of("block").lock(mode, wait)?,
                };
                let fence = lock.fence();
                self.keep(command, Thing::Lock(lock))?;
                json!({ "fence": fence })
            }
            "renew" | "holds" => match &lock(&self.things)[text(command, "of")] {
                Thing::Lock(lock) => {
                    if command["do"] == "renew" {
                        lock.renew(seconds(command, "lease_ms"))?;
                    }
                    lock.is_held().into()
                }
                _ => panic!("{command}: no lock"),
            },
            "unlock" => match self.take(text(command, "of")) {
                Thing::Lock(lock) => {
                    lock.unlock()?;
                    Value::Null
                }
                _ => panic!("{command}: no lock"),
            },
            "wait" => {
                let block = of("block");
                let beyond = command["beyond"]
                    .as_u64()
                    .unwrap_or_else(|| block.version());
                let timeout = seconds(command, "timeout_ms").unwrap_or(LONG);
                block.wait_for(beyond, timeout)?.into()
            }
            "changes" => self.keep(command, Thing::Changes(of("block").changes()?))?,
            "resize" => {
                of("block").resize(command["size"].as_u64().unwrap())?;
                Value::Null
            }
            "flush" => of("block").flush()?.into(),
            "remove" => {
                of("block").remove()?;
                Value::Null
            }
            "info" => of("block").info()?,
            "close_block" => {
                lock(&self.blocks).remove(text(command, "block"));
                Value::Null
            }
            "reset" => {
                lock(&self.board.state).is_over = true;
                self.board.changed.notify_all();
                lock(&self.things).clear();
                lock(&self.blocks).clear();
                let apps = std::mem::take(&mut *lock(&self.apps));
                for app in apps.into_values() {
                    // The server may have been killed.
                    let _ = app.close();
                }
                *lock(&self.board.state) = State::default();
                Value::Null
            }
            other => panic!("there is no command '{other}'"),
        })
    }
}

fn dtype(block: &latzero::Block) -> String {
    let layout = block.layout().unwrap_or_default();
    layout["dtype"].as_str().unwrap_or("|u1").to_owned()
}

fn to_bytes(values: &[Value], dtype: &str) -> Vec<u8> {
    let each = values.iter().map(|value| value.as_f64().unwrap());
    match dtype {
        "<f4" => each.flat_map(|x| (x as f32).to_le_bytes()).collect(),
        "<f8" => each.flat_map(f64::to_le_bytes).collect(),
        "<i4" => each.flat_map(|x| (x as i32).to_le_bytes()).collect(),
        _ => each.map(|x| x as u8).collect(),
    }
}

fn numbers(bytes: &[u8], dtype: &str) -> Value {
    let four = |x: &[u8]| <[u8; 4]>::try_from(x).unwrap();
    match dtype {
        "<f4" => bytes
            .chunks_exact(4)
            .map(|x| json!(f32::from_le_bytes(four(x))))
            .collect(),
        "<i4" => bytes
            .chunks_exact(4)
            .map(|x| json!(i32::from_le_bytes(four(x))))
            .collect(),
        "<f8" => {
            let eight = bytes.chunks_exact(8);
            eight
                .map(|x| json!(f64::from_le_bytes(x.try_into().unwrap())))
                .collect()
        }
        _ => bytes.iter().map(|x| json!(x)).collect(),
    }
}

fn headers(of: Vec<(String, String)>) -> Value {
    let map: Map<String, Value> = of.into_iter().map(|(k, v)| (k, v.into())).collect();
    map.into()
}

/// A received payload, with tags for what JSON can't say everywhere.
fn show(data: Data) -> Value {
    match data {
        Data::Bytes(Bytes(bytes)) => hex(&bytes),
        Data::Json(json) => tagged(latzero_tests::read_deep(&json).unwrap()),
    }
}

fn shown<E>(data: Result<Data, E>) -> Value {
    data.map_or(json!("not a payload"), show)
}

fn tagged(value: Value) -> Value {
    const EXACT: u64 = (1 << 53) - 1;
    match value {
        Value::Number(number) => {
            let is_long = number.as_u64().is_some_and(|n| n > EXACT)
                || number.as_i64().is_some_and(|n| n.unsigned_abs() > EXACT);
            match is_long {
                true => json!({"$int": number.to_string()}),
                false => Value::Number(number),
            }
        }
        Value::Array(items) => items.into_iter().map(tagged).collect(),
        Value::Object(map) => map.into_iter().map(|(k, v)| (k, tagged(v))).collect(),
        other => other,
    }
}

fn describe(error: &Error) -> Value {
    json!({
        "code": error.code(), "message": error.message(), "data": error.data(),
        "ran": error.ran().map(latzero::Ran::as_str),
    })
}

/// What a handler of the kind `way` answers.
fn answer(board: &Board, name: &str, way: &str, request: &Request) -> Result<Data, HandlerError> {
    let json = |value: Value| Ok(Data::Json(value.to_string()));
    let given = || request.data::<Value>();
    match way {
        "echo" => request.data(),
        "double" => json(json!(given()?["n"].as_i64().unwrap_or_default() * 2)),
        "typed" => {
            let fields: HashMap<String, i64> = request.data()?;
            json(json!(fields.get("n").copied().unwrap_or_default() * 2))
        }
        "about" => json(json!({
            "name": request.name(), "pool": request.pool(), "origin": request.origin().app_id,
            "headers": headers(request.headers()), "key": request.key(),
            "attempt": request.attempt(), "data": shown(request.data()),
            "has_time": request.time_left().is_some_and(|left| left < LONG),
        })),
        "fail" => {
            let why = given()?["message"].as_str().unwrap_or_default().to_owned();
            Err(std::io::Error::other(why).into())
        }
        "refuse" => {
            let of = given()?;
            let error = HandlerError::new(text(&of, "code").to_owned(), text(&of, "message"));
            Err(match &of["data"] {
                Value::Null => error,
                data => error.with_data(data.clone()),
            })
        }
        "hold" => {
            board.note(name, json!({"started": request.attempt()}));
            if board.wait(name, || request.is_cancelled()) {
                return json(json!({"attempt": request.attempt()}));
            }
            board.note(name, json!("cancelled"));
            Err(HandlerError::new("cancelled", "nobody wants the answer"))
        }
        "count" => {
            let of = given()?;
            let n = of["n"].as_u64().unwrap_or_default();
            for i in 0..n {
                if of["fail_at"] == i {
                    return Err(std::io::Error::other("told to fail").into());
                }
                if of["progress"] == true {
                    request.progress(&json!({"of": n, "done": i}))?;
                }
                request.partial(&json!({ "i": i }))?;
            }
            json(json!({ "sent": n }))
        }
        "bytes" => {
            for i in 0..3_u8 {
                request.partial(&Bytes(vec![i; 2]))?;
            }
            Ok(Data::Bytes(Bytes(vec![0xff])))
        }
        "endless" => {
            let mut sent = 0_u64;
            let error = loop {
                match request.partial(&sent) {
                    Ok(()) => sent += 1,
                    Err(error) => break error,
                }
                board.set(name, json!(sent));
            };
            board.note(name, json!("closed"));
            Err(error.into())
        }
        "record" => {
            let note = json!({
                "data": shown(request.data()), "origin": request.origin().app_id,
                "headers": headers(request.headers()),
            });
            board.note(name, note);
            json(Value::Null)
        }
        "via" => {
            let of = given()?;
            let data: Value = request.app().call(text(&of, "name"), &of["data"]).send()?;
            json(json!({ "via": data }))
        }
        "sum" => {
            let of = given()?;
            let block = request.block(text(&of["frame"], "$block"))?;
            let values = numbers(&block.read()?.0, &dtype(&block));
            let each = values.as_array().into_iter().flatten();
            let sum: f64 = each.filter_map(Value::as_f64).sum();
            json(json!({"sum": sum, "is_mapped": block.is_viewable()}))
        }
        "fill" => {
            let of = given()?;
            let block = request.block(text(&of["frame"], "$block"))?;
            let count = block.size() as usize / 4;
            let bytes = to_bytes(&vec![of["value"].clone(); count], &dtype(&block));
            let mut draft = block.write(Duration::from_secs(1))?;
            draft.write(0, &bytes)?;
            json(json!(draft.commit()?))
        }
        other => Err(HandlerError::new("no_way", other.to_owned())),
    }
}

fn main() {
    let peer = Arc::new(Peer::default());
    for line in std::io::stdin().lines() {
        let Ok(line) = line else { break };
        let command: Value = serde_json::from_str(&line).unwrap();
        let peer = peer.clone();
        std::thread::spawn(move || {
            let run = AssertUnwindSafe(|| peer.run(&command));
            let mut answer = match std::panic::catch_unwind(run) {
                Ok(Ok(value)) => json!({ "ok": value }),
                Ok(Err(Fault::Ours(error))) => json!({"error": describe(&error)}),
                Ok(Err(Fault::Other(why))) => json!({"error": {"code": "other", "message": why}}),
                Err(_) => json!({"error": {"code": "peer", "message": "it panicked"}}),
            };
            answer["number"] = command["number"].clone();
            let mut out = std::io::stdout().lock();
            writeln!(out, "{answer}")
                .and_then(|()| out.flush())
                .unwrap();
        });
    }
}
