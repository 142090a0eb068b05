//! `pools`: the pools there are.

use serde_json::json;

use crate::args::PoolsArgs;
use crate::exit::{Done, Exit};
use crate::output::Output;
use crate::reach::{Listed, Wish, list};

pub(crate) fn run(args: &PoolsArgs, output: &Output) -> Done {
    let reached = args.reach.connect(&Wish::once("pools"))?;
    let pools = list(&reached.app, &json!({"action": "pool_list"}), Listed::Pools)?;
    if output.json {
        output.value(&json!({"pools": pools}))?;
        return Ok(Exit::Ok);
    }
    let rows: Vec<_> = pools
        .iter()
        .map(|pool| {
            let text = |field: &str| pool[field].as_str().unwrap_or("-").to_owned();
            vec![
                text("pool").into(),
                pool["members"].as_u64().unwrap_or(0).into(),
                text("kind").into(),
                text("owner").into(),
            ]
        })
        .collect();
    output.table(&["POOL", "MEMBERS", "KIND", "OWNER"], &rows)?;
    Ok(Exit::Ok)
}
