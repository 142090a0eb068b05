//! `on`: prints events as they come, one JSON line each.

use std::future::poll_fn;
use std::task::Poll;

use latzero::{Emission, Events};
use serde_json::{Map, Value, json};

use crate::args::OnArgs;
use crate::executor::block_on;
use crate::exit::{Done, Exit};
use crate::output::{Output, compact};
use crate::parse::Target;
use crate::reach::Wish;

use super::trigger::POOL_DEFAULT;
use super::watch::over;

pub(crate) fn run(args: &OnArgs, output: &Output) -> Done {
    let names_pools = args.reach.names_pools();
    let mut wish = Wish::lasting("on");
    let mut targets = Vec::new();
    for target in &args.targets {
        let mut target = Target::parse(target, args.pool.as_deref())?;
        if target.pool.is_none() && !names_pools {
            target.pool = Some(POOL_DEFAULT.to_owned());
        }
        wish = wish.in_pool(target.pool.as_deref());
        targets.push(target);
    }
    let reached = args.reach.connect(&wish)?;
    let mut listening: Vec<(Target, Events<Emission>)> = Vec::new();
    for target in targets {
        let events = block_on(reached.app.as_async().on(&target.trigger))?;
        listening.push((target, events));
    }
    if output.is_for_people() {
        output.note(format_args!(
            "listening at {}; Ctrl-C ends it",
            reached.place()
        ));
    }
    let mut seen = 0;
    while args.count.is_none_or(|count| seen < count) {
        let Some(emission) = block_on(next(&mut listening)) else {
            return Err(over());
        };
        seen += 1;
        output.line(line(&emission))?;
    }
    Ok(Exit::Ok)
}

/// The next event of any; none once the connection is over.
async fn next(listening: &mut [(Target, Events<Emission>)]) -> Option<Emission> {
    poll_fn(|cx| {
        for (target, events) in listening.iter_mut() {
            while let Poll::Ready(emission) = events.poll_next_event(cx) {
                // The app hears the name in every pool that it is in, and it may be in more than this one's.
                let is_meant = |emission: &Emission| {
                    target
                        .pool
                        .as_deref()
                        .is_none_or(|pool| pool == emission.pool())
                };
                match emission {
                    Some(emission) if !is_meant(&emission) => {}
                    ended_or_meant => return Poll::Ready(ended_or_meant),
                }
            }
        }
        Poll::Pending
    })
    .await
}

fn line(emission: &Emission) -> String {
    let origin = emission.origin();
    let mut head = json!({
        "trigger": emission.name(),
        "pool": emission.pool(),
        "from": {"app_id": origin.app_id, "instance": origin.instance},
    });
    let headers: Map<String, Value> = emission
        .headers()
        .into_iter()
        .map(|(name, value)| (name, Value::String(value)))
        .collect();
    if !headers.is_empty() {
        head["headers"] = Value::Object(headers);
    }
    if emission.lost() > 0 {
        head["lost"] = json!(emission.lost());
    }
    let mut line = head.to_string();
    line.pop();
    // The payload's own text: nothing of it is reordered or rounded.
    let data = emission.json().map_or_else(|| "null".to_owned(), compact);
    line.push_str(&format!(",\"data\":{data}}}"));
    line
}
