//! To whom an AppID belongs, and what strangers see of pools that are closed to them.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use latzero_tests::{Server, Via, Wire};
use serde_json::{Value, json};

fn code(reply: &Value) -> &str {
    reply["error"]["code"].as_str().unwrap_or("ok")
}

/// The result of a handshake over `via`.
#[allow(
    clippy::needless_pass_by_value,
    reason = "json!({…}) reads best as it is"
)]
fn hello(server: &Server, via: Via, handshake: Value) -> (Wire, Value) {
    let mut wire = server.connect(via);
    let mut message = handshake;
    message["action"] = "handshake".into();
    wire.send(&message);
    let ack = wire.receive();
    (wire, ack)
}

/// Creates a pool that is open only to the app `shop`.
fn vault(server: &Server, durable: bool) -> Wire {
    let mut owner = server.app(Via::Unix, json!({"app_id": "shop"}));
    let made = owner.request(json!({
        "action": "pool_create", "pool": "vault", "durable": durable,
        "policy": {"join": ["shop"], "serve": ["shop"]}, "properties": {"note": "private"},
    }));
    assert_eq!(made["status"], "ok", "{made}");
    let joined = owner.request(json!({"action": "pool_join", "pool": "vault"}));
    assert_eq!(joined["status"], "ok", "{joined}");
    let trigger = json!([{"name": "charge", "pools": ["vault"], "doc": "private"}]);
    let served = owner.request(json!({"action": "trigger_register", "triggers": trigger}));
    assert_eq!(served["status"], "ok", "{served}");
    owner
}

#[test]
fn an_app_id_belongs_to_its_first_user() {
    let mut server = Server::start();
    let owner = server.app(
        Via::Unix,
        json!({"app_id": "bank", "pools": ["p"], "triggers": ["t"]}),
    );
    for more in [
        json!({}),
        json!({"takeover": true}),
        json!({"transient": true}),
    ] {
        let mut handshake = more.clone();
        handshake["app_id"] = "bank".into();
        let (mut wire, ack) = hello(&server, Via::Tcp, handshake);
        assert_eq!(code(&ack), "unauthenticated", "{ack}");
        wire.wait_closed();
    }
    drop(owner);
    // Neither a disconnect nor a crash releases it.
    server.kill();
    server.restart();
    let (_, ack) = hello(&server, Via::Tcp, json!({"app_id": "bank"}));
    assert_eq!(code(&ack), "unauthenticated", "{ack}");
    let (_, ack) = hello(&server, Via::Unix, json!({"app_id": "bank"}));
    assert_eq!(ack["triggers"], json!(["t"]), "{ack}");
}

#[test]
fn an_app_id_is_free_again_when_the_app_is_forgotten() {
    let server = Server::start();
    drop(server.app(Via::Unix, json!({"app_id": "bank"})));
    let mut admin = server.app(Via::Unix, json!({"app_id": "admin"}));
    let forgotten = admin.request(json!({"action": "app_forget", "app_id": "bank"}));
    assert_eq!(forgotten["status"], "ok", "{forgotten}");
    drop(server.app(Via::Tcp, json!({"app_id": "bank"})));
    // A transient tool leaves nothing behind.
    drop(server.app(Via::Unix, json!({"app_id": "tool", "transient": true})));
    while code(&hello(&server, Via::Tcp, json!({"app_id": "tool"})).1) != "ok" {}
}

#[test]
fn a_parked_call_for_a_tool_reserves_its_name() {
    let server = Server::start();
    let mut tool = server.app(
        Via::Unix,
        json!({"app_id": "tool", "pools": ["p"], "transient": true}),
    );
    let call = json!({
        "action": "trigger", "id": "c", "process": "later", "park": true, "ttl": 60000,
    });
    tool.send(&call);
    assert_eq!(tool.receive()["status"], "parked");
    drop(tool);
    let mut worker = server.app(
        Via::Unix,
        json!({"app_id": "w", "pools": ["p"], "triggers": ["later"]}),
    );
    let call = worker.receive();
    let answer = json!({
        "action": "response", "in_reply_to": call["id"], "status": "ok", "response": "secret",
    });
    worker.send(&answer);
    worker.request(json!({"action": "ping"}));
    let (_, ack) = hello(&server, Via::Tcp, json!({"app_id": "tool", "pools": ["p"]}));
    assert_eq!(code(&ack), "unauthenticated", "{ack}");
    let (mut tool, _) = hello(
        &server,
        Via::Unix,
        json!({"app_id": "tool", "pools": ["p"]}),
    );
    assert_eq!(tool.receive()["response"], "secret");
}

#[test]
fn a_stranger_that_came_before_the_user_is_displaced() {
    let server = Server::start();
    let mut squatter = server.app(Via::Tcp, json!({"app_id": "bank", "exclusive": true}));
    let _owner = server.app(Via::Unix, json!({"app_id": "bank", "pools": ["p"]}));
    assert_eq!(squatter.receive()["event"], "displaced");
    squatter.wait_closed();
}

#[test]
fn names_of_the_server_and_of_tools_are_reserved() {
    let server = Server::start();
    let uid = rustix::process::geteuid().as_raw();
    for (via, name) in [
        (Via::Tcp, "latzero".into()),
        (Via::Unix, "latzero-x".into()),
        (Via::Tcp, format!("cli-{uid}")),
        (Via::Tcp, format!("cli-{uid}-00")),
        (Via::Unix, format!("cli-{}", uid + 1)),
    ] {
        let (_, ack) = hello(&server, via, json!({"app_id": name}));
        assert_eq!(code(&ack), "forbidden", "{ack}");
    }
    drop(server.app(Via::Unix, json!({"app_id": format!("cli-{uid}")})));
}

#[test]
fn a_closed_pool_looks_missing_to_those_it_excludes() {
    let server = Server::start();
    let mut owner = vault(&server, false);
    let mut stranger = server.app(Via::Tcp, json!({"app_id": "stranger"}));
    let asked = [
        (json!({"action": "pool_info", "pool": "vault"}), "no_pool"),
        (json!({"action": "app_list", "pool": "vault"}), "no_pool"),
        (
            json!({"action": "pool_remove", "pool": "vault", "force": true}),
            "no_pool",
        ),
        (json!({"action": "pool_join", "pool": "vault"}), "forbidden"),
        (
            json!({"action": "pool_create", "pool": "vault"}),
            "forbidden",
        ),
        (
            json!({"action": "trigger_register", "triggers": [{"name": "x", "pools": ["vault"]}]}),
            "forbidden",
        ),
        (json!({"action": "watch", "pool": "vault"}), "not_member"),
        (
            json!({"action": "trigger", "process": "charge", "pool": "vault"}),
            "not_member",
        ),
        (
            json!({"action": "memory_list", "pool": "vault"}),
            "not_member",
        ),
        (json!({"action": "pool_list"}), "ok"),
        (json!({"action": "app_list"}), "ok"),
        (
            json!({"action": "trigger", "process": "pools", "pool": "system"}),
            "not_member",
        ),
    ];
    for (request, expected) in asked {
        let reply = stranger.request(request.clone());
        assert_eq!(code(&reply), expected, "{request}: {reply}");
        let mut said = reply.to_string();
        if expected != "ok" {
            // The text may repeat only the requested name.
            said = said.replace("'vault'", "");
        }
        for secret in ["vault", "private", "charge"] {
            assert!(!said.contains(secret), "{request}: {reply}");
        }
        if expected != "ok" {
            assert!(!said.contains("shop"), "{request}: {reply}");
        }
    }
    let pools = |wire: &mut Wire| {
        wire.request(json!({"action": "stats"}))["response"]["pools"]["pools"].clone()
    };
    assert_eq!(
        (pools(&mut owner), pools(&mut stranger)),
        (json!(3), json!(2))
    );
    stranger.request(json!({"action": "pool_join", "pool": "system"}));
    for process in ["pools", "apps"] {
        let call = json!({"action": "trigger", "process": process, "pool": "system"});
        let reply = stranger.request(call);
        assert_eq!(reply["status"], "ok", "{reply}");
        assert!(!reply.to_string().contains("vault"), "{reply}");
    }
    let reply = owner.request(json!({"action": "pool_info", "pool": "vault"}));
    assert_eq!(reply["response"]["properties"]["note"], "private");
}

#[test]
fn the_server_never_listens_beyond_this_machine_by_accident() {
    latzero::testing::server_with(&["--host", "0.0.0.0"]).unwrap_err();
    latzero::testing::server_with(&["--host", "0.0.0.0", "--insecure"]).unwrap();
    latzero::testing::server_with(&["--host", "localhost"]).unwrap();
}

#[test]
fn names_stay_reserved_for_their_users_over_a_restart() {
    let mut server = Server::start();
    let owner = vault(&server, false);
    let mut camera = server.app(
        Via::Unix,
        json!({
            "app_id": "camera", "pools": ["studio"], "features": ["attachments", "fd_passing"],
        }),
    );
    let block = json!({
        "action": "memory_create", "pool": "studio", "block_id": "frame", "size": 64,
        "permissions": {"read": ["camera"], "write": ["camera"]},
    });
    assert_eq!(camera.request(block.clone())["status"], "ok");
    // Rows are written in order: once this one is on the disk, the earlier ones are too.
    let last = json!({"action": "pool_create", "pool": "last", "durable": true});
    assert_eq!(camera.request(last)["status"], "ok");
    server.kill();
    server.restart();
    drop((owner, camera));
    let mut stranger = server.app(Via::Tcp, json!({"app_id": "stranger", "pools": ["studio"]}));
    for attach in [json!(null), json!("attach")] {
        let mut mine = block.clone();
        mine["permissions"] = json!({});
        mine["if_exists"] = attach;
        mine.as_object_mut()
            .unwrap()
            .retain(|_, value| !value.is_null());
        let reply = stranger.request(mine);
        assert_eq!(code(&reply), "forbidden", "{reply}");
    }
    for (action, pool) in [
        ("pool_join", "vault"),
        ("pool_create", "vault"),
        ("pool_create", "studio"),
    ] {
        let reply = stranger.request(json!({"action": action, "pool": pool}));
        assert!(
            ["forbidden", "pool_exists"].contains(&code(&reply)),
            "{action} {pool}: {reply}"
        );
    }
    let (_, ack) = hello(
        &server,
        Via::Tcp,
        json!({"app_id": "other", "pools": ["vault"]}),
    );
    assert_eq!(code(&ack), "forbidden", "{ack}");
    let mut owner = server.app(Via::Unix, json!({"app_id": "shop", "pools": ["p"]}));
    let again = owner
        .request(json!({"action": "pool_create", "pool": "vault", "policy": {"join": ["shop"]}}));
    assert_eq!(again["status"], "ok", "{again}");
}
