//! `emit`: sends an event to the apps that handle it.

use serde_json::json;

use crate::args::EmitArgs;
use crate::connect::ConnectOptions;
use crate::exit::{CommandResult, Exit};
use crate::output::{Output, count};

use super::trigger::{enter, explain, is_privileged, proved};

pub(crate) fn run(args: &EmitArgs, output: &Output) -> CommandResult {
    let target = args.target.parse()?;
    let data = args.payload.read()?;
    let options = ConnectOptions::once("emit").in_pool(proved(&args.reach, &target));
    let connection = args.reach.connect(&options)?;
    let pool = enter(&connection, &args.reach, &target)?;
    let mut emit = connection.app.emit(&target.trigger, &data);
    if let Some(pool) = &pool {
        emit = emit.pool(pool);
    }
    if let Some(app) = &args.delivery.to {
        emit = emit.to(app);
    }
    if args.one {
        emit = emit.one();
    }
    if let Some(key) = &args.delivery.key {
        emit = emit.key(key);
    }
    for (name, value) in &args.delivery.header {
        emit = emit.header(name, value);
    }
    if args.delivery.privileged {
        emit = emit.privileged();
    }
    let delivered = emit.counted().map_err(|error| {
        explain(
            &connection,
            &target,
            pool.as_deref(),
            args.delivery.to.as_deref(),
            error,
        )
    })?;
    // A privileged handler drops an emit without a signature, and the server can't tell. If nobody
    // received it, there is nothing to explain.
    let is_encrypted = proved(&args.reach, &target).is_some();
    if delivered > 0
        && is_encrypted
        && !args.delivery.privileged
        && is_privileged(&connection.app, &target, pool.as_deref())
    {
        output.note("the trigger is privileged: its handlers drop emits without --privileged");
    }
    match output.json {
        true => output.value(&json!({"delivered": delivered}))?,
        false => output.line(format_args!("delivered to {}", count(delivered, "handler")))?,
    }
    Ok(Exit::Ok)
}
