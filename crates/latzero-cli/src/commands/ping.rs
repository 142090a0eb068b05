//! `ping`: the server's response time.

use std::time::Duration;

use serde_json::json;

use crate::args::PingArgs;
use crate::connect::ConnectOptions;
use crate::exit::{CommandResult, Exit};
use crate::output::{Output, time};

pub(crate) fn run(args: &PingArgs, output: &Output) -> CommandResult {
    let connection = args.reach.connect(&ConnectOptions::once("ping"))?;
    let place = connection.place();
    let mut times = Vec::new();
    for n in 1..=args.count {
        let took = connection.app.ping()?;
        times.push(took);
        match output.json {
            true => output.line(json!({"seq": n, "us": us(took)}))?,
            false => output.line(format_args!(
                "answer from {place}: seq={n} time={}",
                time(took)
            ))?,
        }
    }
    times.sort();
    let mean = times.iter().sum::<Duration>() / args.count;
    let median = times[times.len() / 2];
    let (min, max) = (times[0], times[times.len() - 1]);
    match output.json {
        true => output.line(json!({
            "count": args.count, "min_us": us(min), "median_us": us(median), "mean_us": us(mean),
            "max_us": us(max),
        }))?,
        false => output.line(format_args!(
            "{} answered: min {}, median {}, mean {}, max {}",
            args.count,
            time(min),
            time(median),
            time(mean),
            time(max)
        ))?,
    }
    Ok(Exit::Ok)
}

fn us(duration: Duration) -> f64 {
    (duration.as_nanos() as f64 / 100.0).round() / 10.0
}
