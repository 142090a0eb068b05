//! `kick`: closes the connections of an app.

use serde_json::json;

use crate::args::KickArgs;
use crate::exit::{Done, Exit};
use crate::output::{Output, count};
use crate::reach::Wish;

pub(crate) fn run(args: &KickArgs, output: &Output) -> Done {
    let reached = args.reach.connect(&Wish::once("kick"))?;
    let mut request = json!({"action": "kick", "app_id": args.kicked});
    if let Some(instance) = &args.instance {
        request["instance"] = json!(instance);
    }
    let done = reached.administer(&request)?;
    match output.json {
        true => output.value(&done)?,
        false => {
            let n = done["kicked"].as_u64().unwrap_or(0);
            output.line(format_args!(
                "closed {} of {}",
                count(n, "connection"),
                args.kicked
            ))?;
        }
    }
    Ok(Exit::Ok)
}
