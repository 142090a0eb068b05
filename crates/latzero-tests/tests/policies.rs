//! Policies of pools, by AppID, user and key.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use latzero::AppKey;
use latzero::blocking::App;
use latzero_crypto::{app_key, keys::Secret, text};
use latzero_tests::vault::{builder, code, private_file};
use latzero_tests::{Server, Via, Wire};
use serde_json::{Value, json};

fn ask(wire: &mut Wire, mut request: Value) -> String {
    request["pool"] = "lab".into();
    code(&wire.request(request)).to_owned()
}

fn joins(wire: &mut Wire) -> bool {
    match ask(wire, json!({"action": "pool_join"})).as_str() {
        "ok" => true,
        "forbidden" => false,
        other => panic!("{other}"),
    }
}

fn lab(server: &Server, policy: &Value) -> Wire {
    let mut owner = server.app(Via::Unix, json!({"app_id": "owner"}));
    let create = json!({"action": "pool_create", "durable": true, "policy": policy});
    assert_eq!(ask(&mut owner, create), "ok");
    assert!(joins(&mut owner));
    owner
}

#[test]
fn each_right_is_checked_and_the_owner_has_all() {
    let mut server = Server::start();
    let policy = json!({
        "serve": ["owner"], "call": ["owner"], "emit": ["owner"], "read": ["owner"],
        "write": {"deny": ["guest"]},
    });
    let mut owner = lab(&server, &policy);
    let requests = [
        json!({"action": "trigger_register", "triggers": ["t"]}),
        json!({"action": "memory_create", "block_id": "b", "size": 8, "attach": false}),
        json!({"action": "memory_write", "block_id": "b", "data": "AAAA"}),
        json!({"action": "memory_attach", "block_id": "b", "mode": "read"}),
        json!({"action": "memory_read", "block_id": "b"}),
        json!({"action": "memory_subscribe", "block_id": "b"}),
        json!({"action": "memory_attach", "block_id": "b", "mode": "write"}),
        json!({"action": "memory_lock", "block_id": "b"}),
        json!({"action": "emit", "process": "t"}),
    ];
    for request in &requests {
        assert_eq!(ask(&mut owner, request.clone()), "ok", "{request}");
    }
    let specific =
        json!({"action": "trigger_register", "triggers": [{"name": "t", "pools": ["lab"]}]});
    for is_again in [false, true] {
        let mut guest = server.app(Via::Unix, json!({"app_id": "guest", "pools": ["lab"]}));
        for request in requests.iter().chain([&specific]) {
            assert_eq!(ask(&mut guest, request.clone()), "forbidden", "{request}");
        }
        let call = json!({"action": "trigger", "process": "t", "pool": "lab", "ttl": 1});
        assert_eq!(code(&guest.request(call)), "forbidden");
        let info = guest.request(json!({"action": "pool_info", "pool": "lab"}));
        assert_eq!(info["response"]["policy"], policy);
        drop(guest);
        if !is_again {
            server.kill();
            server.restart();
            let mut back = server.connect(Via::Unix);
            back.send(&json!({"action": "handshake", "app_id": "owner"}));
            back.receive();
            owner = back;
        }
    }
    drop(owner);
}

/// A call passes on what its caller may do, and no more.
#[test]
fn a_block_is_lent_only_by_whoever_may_use_it() {
    let server = Server::start();
    let policy = json!({"read": ["reader"], "write": []});
    let mut owner = lab(&server, &policy);
    let create = json!({"action": "memory_create", "block_id": "b", "size": 8, "attach": false});
    assert_eq!(ask(&mut owner, create), "ok");
    let [mut reader, mut guest] = ["reader", "guest"]
        .map(|app| server.app(Via::Tcp, json!({"app_id": app, "pools": ["lab"]})));
    let handler = json!({"app_id": "handler", "pools": ["lab"], "triggers": ["t"]});
    let mut handler = server.app(Via::Tcp, handler);
    let call = |mode: &str| {
        json!({"action": "trigger", "id": "c", "process": "t", "pool": "lab",
            "blocks": [{"block_id": "b", "mode": mode}]})
    };
    for mode in ["read", "write"] {
        assert_eq!(code(&guest.request(call(mode))), "forbidden", "{mode}");
    }
    assert_eq!(code(&reader.request(call("write"))), "forbidden");
    let read = json!({"action": "memory_read", "block_id": "b"});
    assert_eq!(ask(&mut handler, read.clone()), "forbidden");
    reader.send(&call("read"));
    let called = handler.receive();
    // For as long as the call lasts, and as far as it says.
    assert_eq!(ask(&mut handler, read.clone()), "ok");
    let write = json!({"action": "memory_write", "block_id": "b", "data": "AAAA"});
    assert_eq!(ask(&mut handler, write), "forbidden");
    let lock = json!({"action": "memory_lock", "block_id": "b", "mode": "shared"});
    assert_eq!(ask(&mut handler, lock), "ok");
    handler.send(&json!({"action": "response", "in_reply_to": called["id"], "status": "ok"}));
    assert_eq!(reader.receive()["status"], "ok");
    assert_eq!(ask(&mut handler, read), "forbidden");
    // Its lock ended with the call.
    let lock = json!({"action": "memory_lock", "block_id": "b"});
    assert_eq!(ask(&mut owner, lock), "ok");
}

#[test]
fn a_rule_names_users_whichever_app_they_use() {
    let server = Server::start();
    let uid = rustix::process::geteuid().as_raw();
    lab(&server, &json!({"join": [format!("uid:{uid}")]}));
    let mut here = server.app(Via::Unix, json!({"app_id": "here"}));
    assert!(joins(&mut here));
    let mut far = server.app(Via::Tcp, json!({"app_id": "far"}));
    assert!(!joins(&mut far));
    // Each way of listing shows the pool to those that may join it.
    for (wire, is_shown) in [(&mut here, true), (&mut far, false)] {
        let joined = wire.request(json!({"action": "pool_join", "pool": "system"}));
        assert_eq!(code(&joined), "ok");
        let call = |name| json!({"action": "trigger", "process": name, "pool": "system"});
        for request in [json!({"action": "pool_list"}), call("pools"), call("apps")] {
            let reply = wire.request(request);
            assert_eq!(reply.to_string().contains("lab"), is_shown, "{reply}");
        }
    }

    let server = Server::start();
    lab(&server, &json!({"join": {"deny": [format!("uid:{uid}")]}}));
    let mut here = server.app(Via::Unix, json!({"app_id": "here"}));
    assert!(!joins(&mut here));
    // That user could connect over TCP, where nobody knows.
    let mut far = server.app(Via::Tcp, json!({"app_id": "far"}));
    assert!(!joins(&mut far));

    let server = Server::start();
    lab(
        &server,
        &json!({"join": {"deny": [format!("uid:{}", uid + 1)]}}),
    );
    let mut here = server.app(Via::Unix, json!({"app_id": "here"}));
    assert!(joins(&mut here));
}

#[test]
fn a_rule_names_keys() {
    let server = Server::start();
    let key = app_key::AppKey::new(Secret::new([1; 32]));
    let public = text::encode(&key.signing_key().public().to_bytes());
    lab(&server, &json!({"join": [format!("key:{public}")]}));
    let path = private_file(
        &server.0.data_dir().join("shop.key"),
        key.to_text().as_str(),
    );
    let key = AppKey::from_file(&path).unwrap();
    let shop = App::connect_with(builder(&server, "shop").app_key(key)).unwrap();
    shop.join("lab").unwrap();
    // The built-in app knows no administrators.
    let listed = |app: &App| {
        app.join("system").unwrap();
        let pools: Value = app.call("pools", &json!({})).pool("system").send().unwrap();
        pools.to_string().contains("lab")
    };
    assert!(listed(&shop));
    let other = App::connect_with(builder(&server, "other")).unwrap();
    assert!(!listed(&other));
    assert!(other.join("lab").is_err());
    let mut far = server.app(Via::Tcp, json!({"app_id": "far"}));
    let pools = far.request(json!({"action": "pool_list"}));
    assert!(!pools.to_string().contains("lab"), "{pools}");
}
