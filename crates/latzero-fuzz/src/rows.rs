//! Untrusted rows of a database: which are restored, and what clients then see.

use latzero_fabric::rows::{AnswerRow, AppRow, CallRow, Death, PoolRow};
use latzero_fabric::{Limits, Transport};
use latzero_protocol::{AppId, PoolName};
use latzero_sim::{Bounds, Rows, World, encode_frame};
use serde_json::Value;

/// Starts a server with rows, each a line of JSON with the field `table`: `app`, `pool`, `call` or
/// `answer`. Then apps that the rows may refer to connect, and answer the calls that they receive.
///
/// # Panics
/// If an invariant is broken, or something is left after all apps have left.
pub fn rows(data: &[u8]) {
    let mut rows = Rows::default();
    for line in data.split(|&b| b == b'\n').take(50) {
        if let Ok(row) = serde_json::from_slice::<Value>(line) {
            put(&mut rows, &row);
        }
    }
    let limits = Limits {
        apps_max: 8,
        pools_max: 8,
        repeats_max: 4,
        ..Limits::default()
    };
    let mut world = World::new(1, limits, Bounds::default());
    let all = rows.apps.len() + rows.pools.len() + rows.calls.len() + rows.answers.len();
    assert!(world.restart_with(1, rows) <= all);
    world.check();
    let mut peers = Vec::new();
    for hello in [
        r#"{"action":"handshake","app_id":"h","pools":["default","p"],"triggers":["t"]}"#,
        r#"{"action":"handshake","app_id":"a"}"#,
        r#"{"action":"handshake","app_id":"b","pools":["p"]}"#,
    ] {
        let peer = world.connect(Transport::Unix);
        world.feed(peer, &encode_frame(hello, None));
        peers.push(peer);
        world.check();
    }
    for message in world.messages(peers[0]) {
        if message.json["action"] == "trigger" {
            let answer = serde_json::json!({
                "action": "response", "in_reply_to": message.json["id"], "status": "ok",
                "response": 1,
            });
            world.feed(peers[0], &encode_frame(&answer.to_string(), None));
            world.check();
        }
    }
    // Past every time that a row may contain.
    for _ in 0..3 {
        world.advance(latzero_protocol::limits::PARKED_TTL_MAX_MS);
        world.check();
    }
    for peer in peers {
        world.hang_up(peer);
    }
    world.check();
    assert_eq!(world.counts().instances, 0);
}

fn put(rows: &mut Rows, row: &Value) {
    let text = |name: &str| row[name].as_str().unwrap_or_default().to_owned();
    let some = |name: &str| row[name].as_str().map(str::to_owned);
    let number = |name: &str| row[name].as_u64().unwrap_or(0);
    let pool = PoolName::new(&text("pool"));
    let app = |name: &str| AppId::new(&text(name));
    match (row["table"].as_str(), pool, app("app")) {
        (Some("app"), _, Ok(app_id)) => {
            let row = AppRow {
                app_id: app_id.clone(),
                pools: text("pools"),
                triggers: text("triggers"),
                watches: text("watches"),
                meta: some("meta"),
                registered: number("registered"),
                last_seen: number("last_seen"),
            };
            rows.apps.insert(app_id, row);
        }
        (Some("pool"), Ok(name), owner) => {
            let row = PoolRow {
                name: name.clone(),
                owner: owner.ok(),
                policy: text("policy"),
                properties: some("properties"),
                created: number("created"),
                is_durable: true,
                descriptor: None,
            };
            rows.pools.insert(name, row);
        }
        (Some("call"), Ok(pool), Ok(caller)) => {
            let row = CallRow {
                number: number("number"),
                pool,
                process: text("process"),
                destination: some("destination"),
                caller,
                id: text("id"),
                envelope: text("envelope"),
                attachment: some("attachment").map(String::into_bytes),
                idempotency_key: some("key"),
                expires: number("expires"),
                attempt: u32::try_from(number("attempt")).unwrap_or(u32::MAX),
                parked: number("parked"),
                death: some("cause").map(|cause| Death {
                    at: number("died"),
                    cause,
                }),
            };
            rows.calls.insert(row.number, row);
        }
        (Some("answer"), Ok(pool), Ok(caller)) => {
            let row = AnswerRow {
                number: number("number"),
                pool,
                process: text("process"),
                caller,
                id: text("id"),
                idempotency_key: some("key"),
                frame: text("frame").chars().map(|c| c as u8).collect(),
                expires: number("expires"),
            };
            // A call and its answer never exist at the same time.
            rows.calls.remove(&row.number);
            rows.answers.insert(row.number, row);
        }
        _ => {}
    }
}
