//! The schemas of triggers with the Rust client and the real server.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::time::Instant;

use latzero::Code;
use latzero::blocking::App;
use latzero_tests::vault::{READ, WRITE, keys, member, vault};
use latzero_tests::{Server, TIMEOUT, Via};
use serde_json::{Value, json};

fn schema(app: &App, pool: &str, trigger: &str) -> Value {
    let trigger = app.trigger(pool, trigger).unwrap();
    trigger.map_or(Value::Null, |trigger| trigger["schema"].clone())
}

fn serve(app: &App, trigger: &str, schema: &Value) {
    let handler = app.handler(trigger).schema(schema.clone());
    handler.serve(|_| Ok(1)).unwrap();
}

#[test]
fn a_schema_is_read_back_and_survives_the_server() {
    let mut server = Server::start();
    let app = App::connect(&server.0.url("worker")).unwrap();
    let number = json!({"type": "integer"});
    serve(&app, "t", &number);
    assert_eq!(schema(&app, "default", "t"), number);
    assert_eq!(app.trigger("default", "other").unwrap(), None);
    app.close().unwrap();
    server.kill();
    server.restart();
    let reader = App::connect(&server.0.url("reader")).unwrap();
    let restored = server.app(Via::Unix, json!({"app_id": "worker"}));
    assert_eq!(schema(&reader, "default", "t"), number);
    drop(restored);
    while reader.trigger("default", "t").unwrap().is_some() {}
    let builder = latzero::App::builder(&server.0.url("worker")).rehydrate(true);
    let app = App::connect_with(builder).unwrap();
    // Held until it is served again.
    assert_eq!(reader.trigger("default", "t").unwrap(), None);
    app.serve("t", |_| Ok(2)).unwrap();
    assert_eq!(schema(&reader, "default", "t"), Value::Null);
}

#[test]
fn members_of_an_encrypted_pool_see_schemas() {
    let (server, set) = vault();
    let worker = member(&server, "worker", keys(&set, WRITE));
    let reader = member(&server, "reader", keys(&set, READ));
    serve(&worker, "t", &json!({"title": "secret"}));
    assert_eq!(schema(&reader, "vault", "t")["title"], "secret");
    // An administrator sees that the pool exists, others not even that.
    let admin = App::connect(&server.0.url("admin")).unwrap();
    assert_eq!(admin.trigger("vault", "t").unwrap(), None);
    let outside = App::connect(&server.0.tcp_url("outside")).unwrap();
    let error = outside.trigger("vault", "t").unwrap_err();
    assert_eq!(error.kind(), Code::NoPool);
}

/// What is too long for the handshake is registered right after it.
#[test]
fn an_app_with_many_large_schemas_reconnects() {
    let server = Server::start();
    let app = App::connect(&server.0.url("worker")).unwrap();
    let large = json!({"description": "d".repeat(4000)});
    for n in 0..40 {
        serve(&app, &format!("t{n}"), &large);
    }
    let other = App::connect(&server.0.url("other")).unwrap();
    let instance = app.instance();
    other
        .request(&json!({"action": "kick", "app_id": "worker"}))
        .unwrap();
    let end = Instant::now() + TIMEOUT;
    let is_back = |n: usize| {
        let trigger = other.trigger("default", &format!("t{n}")).unwrap();
        trigger.is_some_and(|trigger| trigger["schema"] == large)
    };
    while app.instance() == instance || !(0..40).all(is_back) {
        assert!(Instant::now() < end, "triggers are missing");
    }
    assert_eq!(other.call("t39", &()).send::<u64>().unwrap(), 1);
}

#[test]
fn a_refused_registration_leaves_the_earlier_handler_in_its_place() {
    let server = Server::start();
    let app = App::connect(&server.0.url("worker")).unwrap();
    app.serve("t", |_| Ok(1)).unwrap();
    let huge = json!({"description": "x".repeat(5000)});
    let refused = app.handler("t").schema(huge.clone()).serve(|_| Ok(2));
    assert_eq!(refused.unwrap_err().kind(), Code::TooLarge);
    assert_eq!(app.call("t", &()).send::<u8>().unwrap(), 1);
    let refused = app.handler("new").schema(huge).serve(|_| Ok(2));
    assert_eq!(refused.unwrap_err().kind(), Code::TooLarge);
    let error = app.call("new", &()).send::<u8>().unwrap_err();
    assert_eq!(error.kind(), Code::NoHandler);
}
