//! The caller and the handler in Rust, with which the other languages are compared.

use std::time::Instant;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use latzero::Data;
use latzero::blocking::App;
use serde_json::{Value, json};

use super::workers::{orders, serve};
use crate::failure::Failure;
use crate::process::end_with_parent;
use crate::report::median;

#[derive(Debug, clap::Args)]
pub(crate) struct RoleArgs {
    /// `caller` or `handler`
    kind: String,
    /// The path of the server's socket
    address: String,
    trigger: String,
}

#[allow(
    clippy::needless_pass_by_value,
    reason = "the errors that `map_err` gives are values"
)]
fn failed(error: latzero::Error) -> Failure {
    Failure::said(error.to_string())
}

/// Runs the role of one process.
pub(crate) fn play(args: &RoleArgs) -> Result<(), Failure> {
    end_with_parent()?;
    let RoleArgs {
        kind,
        address,
        trigger,
    } = args;
    let app = |id: &str| {
        let url = format!("latzero://{id}?socket={address}&pool=bench");
        App::connect_with(latzero::App::builder(&url).transient(true)).map_err(failed)
    };
    if kind == "handler" {
        let app = app(&format!("serves-{trigger}"))?;
        let echo = app.serve(trigger, |request| request.data::<Data>());
        echo.map_err(failed)?;
        return serve();
    }
    let app = app("rust-caller")?;
    let data = json!({"id": 1234, "name": "sensor-a", "values": [1.5, 2.5, 3.5], "ok": true});
    let call = || -> Result<(), Failure> {
        let answer = app.call(trigger, &data).send::<Value>();
        answer.map(drop).map_err(failed)
    };
    orders(|order| {
        let number = |name: &str| order[name].as_u64().unwrap_or_default();
        let (warmup, calls) = (number("warmup"), number("calls"));
        let window = number("window").max(1);
        match order["load"].as_str() {
            Some("in_flight") => {
                in_flight(&app, trigger, &data, warmup, window)?;
                let begin = Instant::now();
                in_flight(&app, trigger, &data, calls, window)?;
                Ok(rate(calls, begin))
            }
            Some("threads") => {
                threads(&call, warmup, window)?;
                let begin = Instant::now();
                threads(&call, calls, window)?;
                Ok(rate(calls, begin))
            }
            _ => {
                (0..warmup).try_for_each(|_| call())?;
                let times: Result<Vec<f64>, Failure> = (0..calls)
                    .map(|_| {
                        let begin = Instant::now();
                        call().map(|()| begin.elapsed().as_nanos() as f64)
                    })
                    .collect();
                Ok(json!({ "p50_ns": median(times?) }))
            }
        }
    })
}

fn rate(calls: u64, begin: Instant) -> Value {
    json!({ "per_second": calls as f64 / begin.elapsed().as_secs_f64() })
}

/// Makes calls, `window` of them in flight.
fn in_flight(
    app: &App,
    trigger: &str,
    data: &Value,
    calls: u64,
    window: u64,
) -> Result<(), Failure> {
    let caller = app.as_async();
    let mut turns = Box::pin(async {
        let turn = |_| async {
            for _ in 0..calls / window {
                caller.call(trigger, data).send::<Value>().await?;
            }
            Ok::<(), latzero::Error>(())
        };
        let mut turns: FuturesUnordered<_> = (0..window).map(turn).collect();
        while let Some(done) = turns.next().await {
            done?;
        }
        Ok(())
    });
    let done = app.run(None, &mut turns);
    done.expect("nothing interrupts it").map_err(failed)
}

/// Makes calls from `window` threads.
fn threads(
    call: &(impl Fn() -> Result<(), Failure> + Sync),
    calls: u64,
    window: u64,
) -> Result<(), Failure> {
    std::thread::scope(|scope| {
        let turn = || (0..calls / window).try_for_each(|_| call());
        let all: Vec<_> = (0..window).map(|_| scope.spawn(turn)).collect();
        all.into_iter()
            .try_for_each(|thread| thread.join().expect("it does not panic"))
    })
}
