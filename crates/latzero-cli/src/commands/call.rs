//! `call`: calls a trigger and prints the answer.

use latzero::blocking::Call;
use latzero::{ItemOrProgress, Reply};
use serde_json::value::RawValue;

use crate::args::CallArgs;
use crate::exit::{Done, Exit, Failure};
use crate::output::{Output, bytes};
use crate::parse::{Target, payload};
use crate::reach::Wish;

use super::trigger::{enter, explain};

pub(crate) fn run(args: &CallArgs, output: &Output) -> Done {
    let target = Target::parse(&args.target, args.pool.as_deref())?;
    let data = payload(args.data.as_deref())?;
    let reached = args.reach.connect(&Wish::once("call"))?;
    let pool = enter(&reached, &args.reach, &target)?;
    let mut call = reached
        .app
        .call(&target.trigger, &data)
        .timeout(args.timeout);
    if let Some(pool) = &pool {
        call = call.pool(pool);
    }
    if let Some(app) = &args.to {
        call = call.to(app);
    }
    if let Some(key) = &args.key {
        call = call.key(key);
    }
    for (name, value) in &args.header {
        call = call.header(name, value);
    }
    let explained = |error| {
        explain(
            &reached,
            &target,
            pool.as_deref(),
            args.to.as_deref(),
            error,
        )
    };
    match args.stream {
        true => stream(call, args, output, explained),
        false => {
            let reply = call.reply().map_err(explained)?;
            print(&reply, args, output)?;
            Ok(Exit::Ok)
        }
    }
}

fn stream(
    call: Call,
    args: &CallArgs,
    output: &Output,
    explained: impl Fn(latzero::Error) -> Failure,
) -> Done {
    let mut stream = call.stream::<Box<RawValue>>();
    while let Some(next) = stream.next_or_progress() {
        match next {
            Ok(ItemOrProgress::Item(item)) => {
                output.progress_done();
                item_line(item.get(), args, output)?;
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
    // What the handler answers behind the last item is often nothing; where it is something, it is the last line.
    if let Some(end) = stream
        .end()
        .and_then(Reply::json)
        .filter(|end| *end != "null")
    {
        item_line(end, args, output)?;
    }
    Ok(Exit::Ok)
}

fn item_line(json: &str, args: &CallArgs, output: &Output) -> std::io::Result<()> {
    match text_of(json).filter(|_| args.raw) {
        Some(text) => output.line(text),
        None => output.json_line(json),
    }
}

fn print(reply: &Reply, args: &CallArgs, output: &Output) -> Result<(), Failure> {
    if let Some(raw) = reply.bytes() {
        if output.is_terminal && !args.raw {
            let size = bytes(raw.len() as u64);
            output.note(format_args!(
                "the answer is {size} of raw bytes; --raw prints them, > FILE keeps them"
            ));
            return Ok(());
        }
        return Ok(output.bytes(raw)?);
    }
    let json = reply.json().unwrap_or("null");
    match text_of(json).filter(|_| args.raw) {
        Some(text) => output.line(text)?,
        None => output.json_text(json)?,
    }
    Ok(())
}

/// The text of a JSON string.
fn text_of(json: &str) -> Option<String> {
    serde_json::from_str(json).ok()
}
