//! `call`: calls a trigger and prints the answer.

use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::time::{Duration, Instant};

use latzero::blocking::Call;
use latzero::{Bytes, Data, ItemOrProgress, Parked, Reply};
use serde_json::json;

use crate::args::CallArgs;
use crate::connect::{ConnectOptions, Connection};
use crate::executor::block_on;
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Output, bytes, compact, hex};
use crate::parse::Target;

use super::answers;
use super::trigger::{enter, enter_or_make, explain, proved};

/// How long an answer may take by default.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How long a call stays parked by default.
const TTL: Duration = Duration::from_secs(24 * 3600);

/// Applies the flags to a call, blocking or async.
macro_rules! with_flags {
    ($call:expr, $args:expr, $pool:expr) => {{
        let (mut call, args) = ($call, $args);
        if let Some(pool) = $pool {
            call = call.pool(pool);
        }
        if let Some(app) = &args.delivery.to {
            call = call.to(app);
        }
        if let Some(key) = &args.delivery.key {
            call = call.key(key);
        }
        for (name, value) in &args.delivery.header {
            call = call.header(name, value);
        }
        if args.delivery.privileged {
            call = call.privileged();
        }
        if args.redeliver {
            call = call.redeliver();
        }
        if let Some(attempts) = args.attempts {
            call = call.attempts(attempts);
        }
        if let Some(key) = &args.idempotency_key {
            call = call.idempotency_key(key);
        }
        if let Some(id) = &args.id {
            call = call.id(id);
        }
        call
    }};
}

pub(crate) fn run(args: &CallArgs, output: &Output) -> CommandResult {
    let target: Target = args.target.parse()?;
    let data = args.payload.read()?;
    let timeout = args.timeout.unwrap_or(TIMEOUT);
    let started = Instant::now();
    let mut options = match args.park {
        // The wait for a parked call continues over a restart of the server.
        true => ConnectOptions::continuous("call"),
        false => ConnectOptions::once("call").within(timeout),
    };
    let key = args.idempotency_key.as_deref();
    if args.park || key.is_some() {
        options.app_id = Some(args.reach.own_app_id(key));
    }
    options.takes_answers = args.park && !args.no_wait;
    let options = options.in_pool(proved(&args.reach, &target));
    let connection = args.reach.connect(&options)?;
    let pool = match args.park {
        // Its handler may never have been there yet.
        true => enter_or_make(&connection, &args.reach, &target)?,
        false => enter(&connection, &args.reach, &target)?,
    };
    let explained = |error| {
        explain(
            &connection,
            &target,
            pool.as_deref(),
            args.delivery.to.as_deref(),
            error,
        )
    };
    if args.park {
        let call = connection.app.as_async().call(&target.trigger, &data);
        let call = call.timeout(args.ttl.or(args.timeout).unwrap_or(TTL));
        let call = with_flags!(call, args, &pool);
        // A caller that does not wait needs the call on disk, even if a handler could take it at
        // once.
        let parking = match args.no_wait {
            true => call.always_park().send_parked(),
            false => call.send_parked(),
        };
        let parked = block_on(parking).map_err(explained)?;
        return match args.no_wait {
            true => leave(&parked, &connection, output),
            false => {
                let reply = wait(parked, &connection, output).map_err(explained);
                // With an AppID that others use, their answers may have come along.
                while let Ok(other) = connection.app.answers().recv_timeout(Duration::ZERO) {
                    output.note(answers::line(&other));
                }
                print(&reply?, args, output)?;
                Ok(Exit::Ok)
            }
        };
    }
    let call = connection.app.call(&target.trigger, &data);
    let left = timeout.saturating_sub(started.elapsed());
    let call = call.timeout(left.max(Duration::from_millis(1)));
    let call = with_flags!(call, args, &pool);
    match args.stream {
        true => stream(call, args, output, explained),
        false => {
            let reply = call.reply().map_err(explained)?;
            print(&reply, args, output)?;
            Ok(Exit::Ok)
        }
    }
}

/// Waits for the answer of a parked call, and says so on a terminal.
fn wait(parked: Parked, connection: &Connection, output: &Output) -> Result<Reply, latzero::Error> {
    let (id, app_id) = (parked.id().to_owned(), connection.app.app_id().to_owned());
    let mut reply = parked.reply();
    let mut is_announced = !output.shows_progress();
    block_on(poll_fn(|cx| {
        let polled = Pin::new(&mut reply).poll(cx);
        if polled.is_pending() && !std::mem::replace(&mut is_announced, true) {
            output.note(format_args!(
                "parked as {id}; waiting for the answer. Ctrl-C leaves the call parked; `latzero \
                 answers --app {app_id}` prints the answer later"
            ));
        }
        polled
    }))
}

/// Returns without waiting for a parked call.
fn leave(parked: &Parked, connection: &Connection, output: &Output) -> CommandResult {
    let (id, app_id) = (parked.id(), connection.app.app_id());
    if output.json {
        output.value(&json!({"parked": true, "id": id, "app_id": app_id}))?;
        return Ok(Exit::Ok);
    }
    output.facts(&[("parked", id.into()), ("app", app_id.into())])?;
    if output.is_for_people() {
        output.note(format_args!(
            "`latzero answers --app {app_id}` prints the answer later"
        ));
    }
    Ok(Exit::Ok)
}

fn stream(
    call: Call,
    args: &CallArgs,
    output: &Output,
    explained: impl Fn(latzero::Error) -> Failure,
) -> CommandResult {
    let mut stream = call.stream::<Data>();
    let mut has_items = false;
    while let Some(next) = stream.next_or_progress() {
        match next {
            Ok(ItemOrProgress::Item(item)) => {
                has_items = true;
                output.progress_done();
                print_item(&item, args, output)?;
            }
            Ok(ItemOrProgress::Progress(report)) if output.json => {
                output.json_line(&format!("{{\"progress\":{report}}}"))?;
            }
            Ok(ItemOrProgress::Progress(report)) if output.shows_progress() => {
                output.progress(format_args!("progress: {report}"));
            }
            Ok(ItemOrProgress::Progress(report)) => output.note(format_args!("progress: {report}")),
            Err(error) => {
                output.progress_done();
                return Err(explained(error));
            }
        }
    }
    output.progress_done();
    // The final answer is not an item.
    let raw = stream.end().and_then(Reply::bytes);
    let end = stream.end().and_then(Reply::json).unwrap_or("null");
    match raw {
        Some(raw) if output.json => output.value(&json!({"end": {"hex": hex(raw)}}))?,
        None if output.json => output.json_line(&format!("{{\"end\":{end}}}"))?,
        // A handler that does not stream: an answer like any other.
        Some(raw) if !has_items => print_bytes(raw, "answer", args, output)?,
        None if !has_items => line(end, args, output)?,
        Some(raw) => output.note(format_args!(
            "end: {} of raw bytes",
            bytes(raw.len() as u64)
        )),
        None if end != "null" => output.note(format_args!("end: {}", compact(end))),
        None => {}
    }
    Ok(Exit::Ok)
}

fn print_item(item: &Data, args: &CallArgs, output: &Output) -> std::io::Result<()> {
    match item {
        Data::Json(json) if output.json => output.json_line(&format!("{{\"item\":{json}}}")),
        Data::Json(json) => line(json, args, output),
        Data::Bytes(Bytes(raw)) if output.json => output.value(&json!({"item": {"hex": hex(raw)}})),
        Data::Bytes(Bytes(raw)) => print_bytes(raw, "item", args, output),
    }
}

/// JSON on one line; with `--raw` the text of a string.
fn line(json: &str, args: &CallArgs, output: &Output) -> std::io::Result<()> {
    match text_of(json).filter(|_| args.raw) {
        Some(text) => output.raw_line(text),
        None => output.json_line(json),
    }
}

/// Raw bytes as they are, but on a terminal only with `--raw`.
fn print_bytes(raw: &[u8], what: &str, args: &CallArgs, output: &Output) -> std::io::Result<()> {
    if output.is_terminal && !args.raw {
        let size = bytes(raw.len() as u64);
        output.note(format_args!(
            "the {what} is {size} of raw bytes; print them with --raw, or redirect stdout to a file"
        ));
        return Ok(());
    }
    output.bytes(raw)
}

fn print(reply: &Reply, args: &CallArgs, output: &Output) -> Result<(), Failure> {
    if let Some(raw) = reply.bytes() {
        match output.json {
            true => output.value(&json!({"hex": hex(raw)}))?,
            false => print_bytes(raw, "answer", args, output)?,
        }
        return Ok(());
    }
    let json = reply.json().unwrap_or("null");
    match text_of(json).filter(|_| args.raw) {
        Some(text) => output.raw_line(text)?,
        None => output.json_text(json)?,
    }
    Ok(())
}

/// The text of a JSON string.
fn text_of(json: &str) -> Option<String> {
    serde_json::from_str(json).ok()
}
