//! Shared by `call`, `emit`, `serve` and `on`: joining the pool, and suggestions for wrong names.

use latzero::blocking::App;
use latzero::{Code, Error};
use serde_json::{Value, json};

use crate::connect::{Connection, ListKind, ServerArgs, list};
use crate::exit::Failure;
use crate::names::{did_you_mean, nearest};
use crate::parse::Target;

/// The pool of a trigger that names none.
pub(crate) const POOL_DEFAULT: &str = "default";

/// Joins the pool of `target`, which must exist: a wrong name is reported, not created. Returns the
/// pool to name in the message; none if the address names the pools.
pub(crate) fn enter(
    connection: &Connection,
    reach: &ServerArgs,
    target: &Target,
) -> Result<Option<String>, Failure> {
    let Some(pool) = pool_of(reach, target) else {
        return Ok(None);
    };
    let app = &connection.app;
    if !app.joined().iter().any(|joined| joined == pool) {
        match app.request(&json!({"action": "pool_info", "pool": pool})) {
            Ok(_) => app.join(pool)?,
            Err(error) if error.kind() == Code::NoPool => {
                let pools =
                    list(app, &json!({"action": "pool_list"}), ListKind::Pools).unwrap_or_default();
                let known: Vec<&str> = pools
                    .iter()
                    .filter_map(|pool| pool["pool"].as_str())
                    .collect();
                return Err(suggest(error, &nearest(pool, known)));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Some(pool.to_owned()))
}

/// Like [`enter`], but creates the pool if it does not exist.
pub(crate) fn enter_or_make(
    connection: &Connection,
    reach: &ServerArgs,
    target: &Target,
) -> Result<Option<String>, Failure> {
    let Some(pool) = pool_of(reach, target) else {
        return Ok(None);
    };
    if !connection.app.joined().iter().any(|joined| joined == pool) {
        connection.app.join(pool)?;
    }
    Ok(Some(pool.to_owned()))
}

/// The pool to join while connecting: joining an encrypted one takes a proof.
pub(crate) fn proved<'a>(reach: &ServerArgs, target: &'a Target) -> Option<&'a str> {
    pool_of(reach, target).filter(|pool| reach.key_file(pool).is_some())
}

/// The pool to use; none if the address names the pools.
fn pool_of<'a>(reach: &ServerArgs, target: &'a Target) -> Option<&'a str> {
    match &target.pool {
        Some(pool) => Some(pool.as_str()),
        None if reach.names_pools() => None,
        None => Some(POOL_DEFAULT),
    }
}

/// The failure of a call or an emit, with similar names as suggestions.
pub(crate) fn explain(
    connection: &Connection,
    target: &Target,
    pool: Option<&str>,
    to: Option<&str>,
    error: Error,
) -> Failure {
    let is_of_policy = error.message().starts_with("the policy of pool");
    if error.kind() == Code::Forbidden
        && !is_of_policy
        && is_privileged(&connection.app, target, pool)
    {
        return Failure::from(error).with_help(format!(
            "trigger '{}' is privileged: sign the call or emit with --privileged, and with keys \
            that may write",
            target.trigger
        ));
    }
    if !matches!(
        error.kind(),
        Code::NoHandler | Code::NoApp | Code::NotMember | Code::Offline
    ) {
        return error.into();
    }
    let apps = known_apps(&connection.app);
    match (error.kind(), to) {
        (Code::NoApp | Code::NotMember | Code::Offline, Some(to)) => {
            let live = apps.iter().filter(|app| app["live"] == true);
            let names = live.filter_map(|app| app["app_id"].as_str());
            // Do not suggest the app that was typed.
            let names: Vec<&str> = names.filter(|name| *name != to).collect();
            suggest(error, &nearest(to, names))
        }
        _ => {
            let triggers = live_triggers(&apps);
            let here = format!("{}/", pool.unwrap_or(POOL_DEFAULT));
            let wanted = format!("{here}{}", target.trigger);
            let near = nearest(
                &target.trigger,
                triggers.iter().map(|(_, name)| name.as_str()),
            );
            // For each similar name: the pools that serve it, this pool first.
            let mut names: Vec<&str> = Vec::new();
            for name in near {
                let served = triggers.iter().filter(|(_, trigger)| trigger == name);
                let mut places: Vec<&str> = served.map(|(full, _)| full.as_str()).collect();
                places.sort_by_key(|full| !full.starts_with(&here));
                // Do not suggest the name that was typed.
                names.extend(places.into_iter().filter(|full| *full != wanted));
            }
            names.dedup();
            names.truncate(3);
            suggest(error, &names)
        }
    }
}

/// Whether the trigger takes only what is signed; false if that is unknown.
pub(crate) fn is_privileged(app: &App, target: &Target, pool: Option<&str>) -> bool {
    let Some(pool) = pool else { return false };
    let trigger = app.trigger(pool, &target.trigger).ok().flatten();
    trigger.is_some_and(|trigger| trigger["privileged"] == true)
}

fn suggest(error: Error, names: &[&str]) -> Failure {
    let mut failure = Failure::from(error);
    if let Some(hint) = did_you_mean(names) {
        failure.help = Some(hint);
    }
    failure
}

fn known_apps(app: &App) -> Vec<Value> {
    // Without the list there is no suggestion, but the error is still reported.
    list(app, &json!({"action": "app_list"}), ListKind::Apps).unwrap_or_default()
}

/// Each trigger that a connected app serves, as `POOL/TRIGGER` and as `TRIGGER`.
fn live_triggers(apps: &[Value]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for app in apps.iter().filter(|app| app["live"] == true) {
        for trigger in app["triggers"].as_array().into_iter().flatten() {
            let Some(name) = trigger["name"].as_str() else {
                continue;
            };
            // A trigger that names no pools is served in every pool of its app.
            let own = trigger["pools"]
                .as_array()
                .filter(|pools| !pools.is_empty());
            let pools = own.or(app["pools"].as_array()).into_iter().flatten();
            for pool in pools.filter_map(Value::as_str) {
                found.push((format!("{pool}/{name}"), name.to_owned()));
            }
        }
    }
    found
}
