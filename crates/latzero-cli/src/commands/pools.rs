//! `pools`: lists, creates, shows and removes pools.

use latzero::Right;
use latzero_crypto::text;
use serde_json::{Map, Value, json};

use crate::args::{
    PoolArgs, PoolCreateArgs, PoolInfoArgs, PoolReencryptArgs, PoolRemoveArgs, PoolsArgs,
    PoolsCommand,
};
use crate::connect::{ConnectOptions, Connection, ListKind, list};
use crate::exit::{CommandResult, Exit, Failure};
use crate::names::{did_you_mean, nearest};
use crate::output::{Cell, Output, Tone, ago, count, toned};

pub(crate) fn run(args: &PoolsArgs, output: &Output) -> CommandResult {
    match &args.command {
        None => list_all(args, output),
        Some(PoolsCommand::Create(args)) => create(args, output),
        Some(PoolsCommand::Info(args)) => info(args, output),
        Some(PoolsCommand::Remove(args)) => remove(args, output),
        Some(PoolsCommand::Reencrypt(args)) => reencrypt(args, output),
    }
}

fn list_all(args: &PoolsArgs, output: &Output) -> CommandResult {
    let connection = args.reach.connect(&ConnectOptions::once("pools"))?;
    let pools = all(&connection)?;
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
                encryption(pool).into(),
                text("owner").into(),
            ]
        })
        .collect();
    output.table(&["POOL", "MEMBERS", "KIND", "ENCRYPTED", "OWNER"], &rows)?;
    Ok(Exit::Ok)
}

/// Whether a pool is encrypted, what of it, and in which epoch.
fn encryption(pool: &Value) -> String {
    match (pool["encrypted"] == true, pool["memory"].as_str()) {
        (false, _) => "no".to_owned(),
        (true, Some("gated")) => format!("only messages, epoch {}", pool["epoch"]),
        (true, _) => format!("yes, epoch {}", pool["epoch"]),
    }
}

fn all(connection: &Connection) -> Result<Vec<Value>, latzero::Error> {
    list(
        &connection.app,
        &json!({"action": "pool_list"}),
        ListKind::Pools,
    )
}

fn create(args: &PoolCreateArgs, output: &Output) -> CommandResult {
    let name = &args.pool.pool;
    let mut request = json!({"action": "pool_create", "pool": name});
    if args.encrypted || args.gated {
        let file = args.pool.reach.key_file(name).ok_or_else(|| {
            Failure::usage(format!("pool {name} has no key file")).with_help(format!(
                "make keys with `latzero keys new {name}`, or name a file with --keys"
            ))
        })?;
        request = super::keys::of_pool(&file)?.pool_create(name, args.gated)?;
    } else if args.durable {
        request["durable"] = true.into();
    }
    if let Some(policy) = policy(&args.policy, &args.deny)? {
        request["policy"] = policy;
    }
    if !args.property.is_empty() {
        let property = |(name, value): &(String, String)| (name.clone(), json!(value));
        request["properties"] = args
            .property
            .iter()
            .map(property)
            .collect::<Map<_, _>>()
            .into();
    }
    let options = ConnectOptions {
        holds_keys: args.encrypted,
        ..ConnectOptions::once("pools create")
    };
    let connection = args.pool.reach.connect(&options)?;
    let pool = connection.app.request(&request)?;
    match output.json {
        true => output.value(&pool)?,
        false => output.line(format_args!("created pool {}", args.pool.pool))?,
    }
    Ok(Exit::Ok)
}

/// Checks whom a rule of a policy names; the server checks AppIDs.
fn check_subject(who: &str) -> Result<(), Failure> {
    let is_fine = match who.split_once(':') {
        Some(("uid", uid)) => uid.parse::<u32>().is_ok(),
        Some(("key", key)) => text::decode_within(key, 32).is_some_and(|key| key.len() == 32),
        _ => true,
    };
    if is_fine {
        return Ok(());
    }
    let text = format!("'{who}' names nobody in a policy");
    Err(Failure::usage(text).with_help(
        "write an AppID, uid:NUMBER, or key: and the public key that `latzero app key show` prints",
    ))
}

/// The policy that allows and denies these rights, if any.
fn policy(allow: &[(String, String)], deny: &[(String, String)]) -> Result<Option<Value>, Failure> {
    let mut policy: Map<String, Value> = Map::new();
    for (list, rights) in [("allow", allow), ("deny", deny)] {
        for (right, who) in rights {
            if !Right::ALL.iter().any(|known| known.as_str() == right) {
                let text = format!("there is no right '{right}' in a policy");
                let rights = Right::ALL.map(Right::as_str).join(", ");
                return Err(Failure::usage(text).with_help(format!("the rights are {rights}")));
            }
            let who: Vec<_> = who.split(',').filter(|who| !who.is_empty()).collect();
            who.iter().try_for_each(|who| check_subject(who))?;
            let rule = policy.entry(right.clone()).or_insert_with(|| json!({}));
            let mut all = rule[list].as_array().cloned().unwrap_or_default();
            all.extend(who.into_iter().map(Value::from));
            rule[list] = all.into();
        }
    }
    Ok((!policy.is_empty()).then(|| policy.into()))
}

fn info(args: &PoolInfoArgs, output: &Output) -> CommandResult {
    let PoolArgs { pool: name, reach } = &args.pool;
    let mut options = ConnectOptions::once("pools info");
    // Only members can see an encrypted pool.
    if reach.key_file(name).is_some() {
        options = options.in_pool(Some(name));
    }
    let connection = reach.connect(&options)?;
    let request = json!({"action": "pool_info", "pool": name, "trigger": args.trigger});
    let pool = connection.app.request(&request);
    let pool = pool.map_err(|error| with_suggestion(error.into(), name, &connection))?;
    if let Some(trigger) = &args.trigger {
        return show_trigger(&pool["triggers"][0], (name, trigger), output);
    }
    if output.json {
        output.value(&pool)?;
        return Ok(Exit::Ok);
    }
    let mut facts: Vec<(&str, Cell)> = vec![("pool", toned(name, Tone::Strong))];
    for name in ["owner", "kind", "members", "durable"] {
        if let Some(value) = pool.get(name).filter(|value| !value.is_null()) {
            facts.push((name, plain(value).into()));
        }
    }
    facts.push(("encrypted", encryption(&pool).into()));
    if let Some(at) = pool["restored_ms"].as_u64() {
        facts.push(("restored", ago(at).into()));
    }
    for (right, rule) in pool["policy"].as_object().into_iter().flatten() {
        facts.push(("policy", format!("{right}: {}", rule_text(rule)).into()));
    }
    for (name, value) in pool["properties"].as_object().into_iter().flatten() {
        facts.push(("property", format!("{name}: {}", plain(value)).into()));
    }
    for trigger in pool["triggers"].as_array().into_iter().flatten() {
        let handlers = trigger["handlers_total"].as_u64().unwrap_or(0);
        let name = trigger["name"].as_str().unwrap_or("-");
        let mark = match trigger["privileged"] == true {
            true => ", privileged",
            false => "",
        };
        facts.push((
            "trigger",
            format!("{name}, handlers: {handlers}{mark}").into(),
        ));
    }
    output.facts(&facts)?;
    Ok(Exit::Ok)
}

/// Shows one trigger of a pool.
fn show_trigger(trigger: &Value, (pool, name): (&str, &str), output: &Output) -> CommandResult {
    if trigger.is_null() {
        let text = format!("no app serves trigger '{name}' in pool '{pool}'");
        return Err(Failure::new(Exit::Answered, text).with_help(format!(
            "list the triggers with `latzero pools info {pool}`"
        )));
    }
    if output.json {
        output.value(trigger)?;
        return Ok(Exit::Ok);
    }
    let mut facts: Vec<(&str, Cell)> = vec![("trigger", toned(name, Tone::Strong))];
    let shown = [
        ("doc", "doc"),
        ("strategy", "strategy"),
        ("handlers", "handlers_total"),
        ("privileged", "privileged"),
        ("schema", "schema"),
    ];
    for (label, field) in shown {
        if let Some(value) = trigger.get(field).filter(|value| !value.is_null()) {
            facts.push((label, plain(value).into()));
        }
    }
    output.facts(&facts)?;
    Ok(Exit::Ok)
}

/// Who has a right, in words.
fn rule_text(rule: &Value) -> String {
    let allow = rule.get("allow").unwrap_or(rule);
    let who = match allow.as_array().map(Vec::as_slice) {
        Some([]) => "nobody".to_owned(),
        Some(_) => plain(allow),
        None => "everybody".to_owned(),
    };
    match rule.get("deny") {
        Some(deny) => format!("{who} except {}", plain(deny)),
        None => who,
    }
}

/// Encrypts each block again whose content is of an earlier epoch.
fn reencrypt(args: &PoolReencryptArgs, output: &Output) -> CommandResult {
    let name = &args.pool.pool;
    // Without keys this would join, and so create, a plain pool.
    if args.pool.reach.key_file(name).is_none() {
        let text = format!("there are no keys of pool '{name}'");
        return Err(Failure::usage(text).with_help("name the key file of the pool with --keys"));
    }
    let options = ConnectOptions::once("pools reencrypt").in_pool(Some(name));
    let connection = args.pool.reach.connect(&options)?;
    let (mut done, mut left) = (Vec::new(), 0);
    for block in connection.app.blocks(Some(name))? {
        let id = block["block_id"].as_str().unwrap_or_default();
        let block = connection.app.block(id).pool(name).attach_writable()?;
        let Some(version) = block.reencrypt(args.keep_stale)? else {
            left += 1;
            continue;
        };
        done.push(json!({"block_id": id, "version": version}));
    }
    if output.json {
        output.value(&json!({"reencrypted": done, "left": left}))?;
    } else {
        let text = count(done.len() as u64, "block");
        output.line(format_args!("{text} encrypted again, {left} unchanged"))?;
    }
    Ok(Exit::Ok)
}

/// A value as plain text: a string without its quotes.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

fn remove(args: &PoolRemoveArgs, output: &Output) -> CommandResult {
    let name = &args.pool.pool;
    let connection = args
        .pool
        .reach
        .connect(&ConnectOptions::once("pools remove"))?;
    let mut request = json!({"action": "pool_remove", "pool": name});
    if args.force {
        request["force"] = true.into();
    }
    let removed = connection.administer(&request);
    removed.map_err(|failure| with_suggestion(failure, name, &connection))?;
    match output.json {
        true => output.value(&json!({"removed": name}))?,
        false => output.line(format_args!("removed pool {name}"))?,
    }
    Ok(Exit::Ok)
}

fn with_suggestion(mut failure: Failure, name: &str, connection: &Connection) -> Failure {
    let code = failure.wire.as_ref().and_then(|wire| wire["code"].as_str());
    if code == Some("no_pool") {
        // Without the list there is no suggestion, but the error is still reported.
        let pools = all(connection).unwrap_or_default();
        let known = pools.iter().filter_map(|pool| pool["pool"].as_str());
        if let Some(hint) = did_you_mean(&nearest(name, known)) {
            failure.help = Some(hint);
        }
    }
    failure
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_shown_in_words() {
        let text = |rule: Value| rule_text(&rule);
        assert_eq!(text(json!([])), "nobody");
        assert_eq!(text(json!(["a", "uid:7"])), "a, uid:7");
        assert_eq!(text(json!({"deny": ["b"]})), "everybody except b");
        assert_eq!(text(json!({"allow": ["a"], "deny": ["b"]})), "a except b");
    }

    #[test]
    fn policies_are_parsed() {
        let pairs = |rights: &[(&str, &str)]| {
            let pairs = rights.iter().map(|&(a, b)| (a.to_owned(), b.to_owned()));
            pairs.collect::<Vec<_>>()
        };
        let read = |allow: &[_], deny: &[_]| policy(&pairs(allow), &pairs(deny));
        assert_eq!(read(&[], &[]).unwrap(), None);
        let some = read(
            &[("join", "a,uid:7"), ("serve", "a"), ("join", "c")],
            &[("join", "d"), ("call", "b")],
        );
        let expected = json!({
            "join": {"allow": ["a", "uid:7", "c"], "deny": ["d"]}, "serve": {"allow": ["a"]},
            "call": {"deny": ["b"]},
        });
        assert_eq!(some.unwrap(), Some(expected));
        let unknown = read(&[], &[("rule", "a")]).unwrap_err();
        assert_eq!(unknown.exit, Exit::Usage);
    }
}
