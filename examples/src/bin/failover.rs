//! A worker is killed in the middle of a call, and a second worker takes over.
//!
//! Two processes serve `render` with one AppID. The caller learns from a progress report which of
//! them has its call, and kills that one. The call ends with `handler_gone` and `ran: unknown`. The
//! caller must decide what that means: rendering twice does no harm, so it calls again, and the
//! second worker answers.

use std::error::Error;
use std::time::Duration;

use latzero::blocking::App;
use latzero::{Code, ItemOrProgress};
use latzero_examples::{Worker, serve_for_ever};

/// A ttl longer than any rendering takes.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().nth(1).as_deref() {
        Some("worker") => work(),
        _ => call(),
    }
}

fn work() -> Result<(), Box<dyn Error>> {
    let app = App::connect("latzero://renderer")?;
    app.serve("render", |request| {
        let (picture, attempt): (String, u32) = request.data()?;
        // Tells the caller, which will kill this worker, which one has the call.
        request.progress(&std::process::id())?;
        // The first attempt never finishes, so that the kill is certain to interrupt it.
        while attempt == 1 && !request.is_cancelled() {
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(format!("{picture}, rendered by {}", std::process::id()))
    })?;
    serve_for_ever()
}

fn call() -> Result<(), Box<dyn Error>> {
    let mut twins = [Worker::start(&["worker"])?, Worker::start(&["worker"])?];
    let app = App::connect("latzero://failover")?;
    for attempt in 1.. {
        let mut call = app
            .call("render", &("sunset", attempt))
            .timeout(PATIENCE)
            .stream::<String>();
        while let Some(step) = call.next_or_progress() {
            match step {
                Ok(ItemOrProgress::Progress(report)) => {
                    let pid = report.as_u64().unwrap_or_default();
                    println!("attempt {attempt}: worker {pid} has the call");
                    if attempt == 1 {
                        let worker = twins
                            .iter_mut()
                            .find(|twin| u64::from(twin.pid()) == pid)
                            .ok_or("no such worker")?;
                        worker.kill();
                        println!("worker {pid} was killed");
                    }
                }
                Ok(ItemOrProgress::Item(item)) => println!("{item}"),
                Err(error) if error.kind() == Code::HandlerGone => {
                    let ran = error.ran().map_or("unknown", latzero::Ran::as_str);
                    println!("attempt {attempt} ended: {} (ran: {ran})", error.code());
                }
                Err(error) => return Err(error.into()),
            }
        }
        if let Some(answer) = call.end() {
            println!("{}", answer.clone().into::<String>()?);
            return Ok(());
        }
    }
    unreachable!("attempts continue until one is answered")
}
