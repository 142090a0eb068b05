//! `serve`: turns any program into a handler.
//!
//! Calls wait in a bounded queue. A few threads take them, and each runs one program at a time. The
//! future that waits for an answer owns its program: when the call is cancelled or times out, the
//! client drops the future, which ends the program.

mod program;
mod queue;

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use latzero::Strategy;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::ServeArgs;
use crate::connect::ConnectOptions;
use crate::executor::block_on;
use crate::exit::{CommandResult, Exit, Failure};
use crate::launch;
use crate::output::{Output, count};
use crate::parse::{self, Target};

use self::program::ProgramSpec;
use self::queue::Queue;
use super::trigger::POOL_DEFAULT;
use super::watch::{left, over};

pub(crate) fn run(args: ServeArgs, output: &Output) -> CommandResult {
    let names_pools = args.reach.names_pools();
    launch::check(&args.command[0])?;
    let mut options = ConnectOptions::continuous("serve");
    options.app_id = Some(app_id(&args.command[0].to_string_lossy()));
    let mut targets = args.targets.parse()?;
    for target in &mut targets {
        if target.pool.is_none() && !names_pools {
            target.pool = Some(POOL_DEFAULT.to_owned());
        }
        if let Some(pool) = target
            .pool
            .clone()
            .filter(|pool| !options.pools.contains(pool))
        {
            options.pools.push(pool);
        }
    }
    if args.lines && targets.len() > 1 {
        return Err(Failure::usage(
            "--lines accepts only one trigger, because the program cannot tell several apart",
        )
        .with_help("start one `latzero serve --lines` per trigger"));
    }
    let workers = match (args.lines, args.concurrency) {
        (true, _) => 1,
        (false, Some(n)) => usize::from(n),
        (false, None) => thread::available_parallelism().map_or(1, usize::from),
    };
    let schema = args.schema.as_deref().map(parse::json_file).transpose()?;
    let connection = args.reach.connect(&options)?;
    connection.report_losses(output);
    // Before anything is served, so that no program outlives a Ctrl-C.
    let signals = Signals::new([SIGINT, SIGTERM]).map_err(|error| {
        Failure::new(
            Exit::Failure,
            format!("signals cannot be received: {error}"),
        )
    })?;
    let recipe = ProgramSpec {
        command: args.command,
        environment: args.reach.environment(),
        lines: args.lines.then(|| targets[0].clone()),
        stream: args.stream,
        printed: args.output,
    };
    let queue = Queue::start(recipe, workers).map_err(|error| {
        Failure::new(
            Exit::Failure,
            format!("cannot start a thread or process: {error}"),
        )
    })?;
    // Ends when the connection is closed permanently.
    let mut departures = connection.app.as_async().departures();
    for target in &targets {
        let in_queue = Arc::clone(&queue);
        let mut handler = connection
            .app
            .as_async()
            .handler(&target.trigger)
            .strategy(Strategy::LeastBusy)
            // A call that waits here cannot go to an idle handler elsewhere.
            .concurrency(u32::try_from(workers).unwrap_or(u32::MAX))
            .pools(target.pool.clone());
        if let Some(doc) = &args.doc {
            handler = handler.doc(doc);
        }
        if let Some(schema) = &schema {
            handler = handler.schema(schema.clone());
        }
        if args.privileged {
            handler = handler.privileged();
        }
        block_on(handler.serve(move |request| {
            let waiting = in_queue.push(request);
            async move { waiting?.await }
        }))?;
    }
    let asked = Arc::new(AtomicI32::new(0));
    end_on_signal(signals, &connection.app, &targets, &queue, &asked)?;
    let names: Vec<String> = targets
        .iter()
        .map(|t| format!("{}/{}", t.pool.as_deref().unwrap_or("*"), t.trigger))
        .collect();
    output.note(format_args!(
        "serving {} as {} at {}; press Ctrl-C to stop",
        names.join(" "),
        connection.app.app_id(),
        connection.place()
    ));
    // Not a blocking call of the client, which would read the socket here as well.
    let departure = block_on(departures.next());
    queue.end();
    let dropped = queue.events_dropped();
    if dropped > 0 {
        output.note(format_args!("dropped {}", count(dropped, "event")));
    }
    match asked.load(Ordering::Acquire) {
        0 => Err(departure.map_or_else(over, |departure| left(&departure))),
        SIGINT => Ok(Exit::Interrupted),
        _ => Ok(Exit::Ok),
    }
}

/// Starts a thread that closes the app at the first signal: running calls get some time to finish.
/// A second signal ends everything at once.
fn end_on_signal(
    mut signals: Signals,
    app: &latzero::blocking::App,
    targets: &[Target],
    queue: &Arc<Queue>,
    asked: &Arc<AtomicI32>,
) -> Result<(), Failure> {
    let (app, queue, asked) = (app.clone(), Arc::clone(queue), Arc::clone(asked));
    let names: Vec<String> = targets
        .iter()
        .map(|target| target.trigger.clone())
        .collect();
    let closing = move || {
        for signal in signals.forever() {
            if asked.swap(signal, Ordering::AcqRel) != 0 {
                queue.end();
                std::process::exit(i32::from(Exit::Interrupted.code()));
            }
            let (app, names) = (app.clone(), names.clone());
            let close = move || {
                for name in &names {
                    // If the server is gone, no more calls can arrive.
                    let _ = app.unserve(name);
                }
                let _ = app.close();
            };
            // On a separate thread, so that a second signal is still received.
            if thread::Builder::new()
                .name("closing".into())
                .spawn(close)
                .is_err()
            {
                queue.end();
                std::process::exit(i32::from(Exit::Interrupted.code()));
            }
        }
    };
    let spawned = thread::Builder::new().name("signals".into()).spawn(closing);
    spawned
        .map(drop)
        .map_err(|error| Failure::new(Exit::Failure, format!("cannot start a thread: {error}")))
}

/// The AppID of a program: the name of its file, without characters that an AppID cannot have.
fn app_id(command: &str) -> String {
    let name = command.rsplit('/').next().unwrap_or(command);
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let id: String = name.chars().filter(|&c| allowed(c)).take(128).collect();
    match id.is_empty() {
        true => "serve".to_owned(),
        false => id,
    }
}

/// Describes how a program ended, for people.
fn how_it_ended(command: &str, status: std::process::ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("{command} ended with exit code {code}"),
        (None, Some(signal)) => format!("{command} was ended by signal {signal}"),
        (None, None) => format!("{command} ended"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn app_ids_of_programs() {
        assert_eq!(app_id("./hello.sh"), "hello.sh");
        assert_eq!(app_id("/usr/bin/tr"), "tr");
        assert_eq!(app_id("a b"), "ab");
        assert_eq!(app_id("/"), "serve");
    }
}
