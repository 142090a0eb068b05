//! Listings are split into pages, each limited in bytes and in the number of entries examined.

mod net;

use latzero_fabric::Transport;
use latzero_sim::{Peer, encode_frame};
use net::Net;
use serde_json::Value;

/// The limit for the entries of a page, plus room for the enclosing message.
const PAGE_BYTES_MAX: usize = 128 * 1024 + 256;

/// The names on all pages of a listing, and the number of pages.
fn walk(net: &mut Net, peer: Peer, request: &str, list: &str, name: &str) -> (Vec<String>, usize) {
    let (mut names, mut pages, mut after) = (Vec::new(), 0, String::new());
    loop {
        net.world
            .feed(peer, &encode_frame(&format!("{{{request}{after}}}"), None));
        let page = net.messages(peer).remove(0).json["response"].take();
        assert!(
            page.to_string().len() <= PAGE_BYTES_MAX,
            "{}",
            page.to_string().len()
        );
        let entries = page[list].as_array().expect("a list");
        names.extend(
            entries
                .iter()
                .map(|entry| entry[name].as_str().expect("a name").to_owned()),
        );
        pages += 1;
        let Value::String(last) = &page["after"] else {
            assert_eq!(page["more"], false);
            return (names, pages);
        };
        assert_eq!(page["more"], true);
        after = format!(r#","after":"{last}""#);
    }
}

fn visit(net: &mut Net, app: &str, more: &str) {
    let peer = net.world.connect(Transport::Unix);
    let hello = format!(r#"{{"action":"handshake","app_id":"{app}"{more}}}"#);
    net.world.feed(peer, &encode_frame(&hello, None));
    assert!(net.sees(peer).starts_with("hello"), "{app}");
    net.world.hang_up(peer);
}

#[test]
fn a_page_is_bounded_in_bytes() {
    let mut net = Net::new();
    let me = net.app("me", "");
    let meta = format!(r#","meta":{{"text":"{}"}}"#, "m".repeat(900));
    for n in 0..600 {
        visit(&mut net, &format!("app{n:03}"), &meta);
    }
    let (names, pages) = walk(
        &mut net,
        me,
        r#""action":"app_list","id":"1""#,
        "apps",
        "app_id",
    );
    assert_eq!((names.len(), pages), (601, 5));
    assert!(names.is_sorted());
}

#[test]
fn an_entry_that_is_too_long_is_shortened() {
    let mut net = Net::with(|limits| {
        limits.meta_bytes_max = 1 << 20;
        limits.served_per_app_max = 1 << 20;
        limits.memory_max = 64 << 30;
        limits.registration_bytes_max = 1 << 20;
    });
    let me = net.app("me", "");
    let doc = "d".repeat(1000);
    let triggers: Vec<String> = (0..230)
        .map(|n| format!(r#"{{"name":"t{n}","doc":"{doc}","pools":["{:064}"]}}"#, 1))
        .collect();
    let pools: Vec<String> = (0..256).map(|n| format!("\"{n:064}\"")).collect();
    for n in 0..3 {
        let more = format!(
            r#""meta":{{"m":"{}"}},"pools":[{}]"#,
            "m".repeat(40_000),
            pools.join(",")
        );
        // The instances stay connected, and each is in all pools.
        let peers: Vec<Peer> = (0..10)
            .map(|_| net.app(&format!("big{n}"), &more))
            .collect();
        let triggers = triggers.join(",");
        let register =
            format!(r#"{{"action":"trigger_register","id":"1","triggers":[{triggers}]}}"#);
        let seen = net.ask(peers[0], &register);
        assert!(seen.starts_with("1 ok"), "{seen}");
    }
    let (names, pages) = walk(
        &mut net,
        me,
        r#""action":"app_list","id":"1""#,
        "apps",
        "app_id",
    );
    assert_eq!((names.len(), pages), (4, 3));
    let seen = net.ask(me, r#"{"action":"app_list","id":"1","limit":1}"#);
    let app: Value = serde_json::from_str(seen.strip_prefix("1 ok: ").unwrap()).unwrap();
    let app = &app["apps"][0];
    assert_eq!(
        (&app["shortened"], &app["meta"]),
        (&true.into(), &Value::Null)
    );
    assert_eq!(app["pools"].as_array().unwrap().len(), 256);
    assert_eq!(app["instances_total"], 10);
    let shown = |list: &str| app[list].as_array().unwrap().len();
    assert!((1..10).contains(&shown("instances")) && (40..230).contains(&shown("triggers")));
    let seen = net.ask(me, r#"{"action":"pool_create","id":"1","pool":"wide"}"#);
    assert!(seen.starts_with("1 ok"), "{seen}");
    let long = format!(
        r#""pool":"long","properties":{{"p":"{}"}}"#,
        "p".repeat(300_000)
    );
    net.say(
        me,
        &format!(r#"{{"action":"pool_create","id":"1",{long}}}"#),
    );
    net.sees(me);
    let (names, _) = walk(
        &mut net,
        me,
        r#""action":"pool_list","id":"1""#,
        "pools",
        "pool",
    );
    assert_eq!(names.len(), 2 + 256 + 2);
    let seen = net.ask(
        me,
        &format!(r#"{{"action":"pool_info","id":"1","pool":"{:064}"}}"#, 1),
    );
    assert!(seen.len() < PAGE_BYTES_MAX && seen.contains(r#""triggers_total":230"#));
}

#[test]
fn a_page_ends_once_enough_entries_were_examined() {
    let mut net = Net::new();
    let me = net.app("me", "");
    for n in 0..6000 {
        visit(&mut net, &format!("app{n:04}"), "");
    }
    net.app("zoe", r#""pools":["rare"]"#);
    let request = r#""action":"app_list","id":"1","pool":"rare""#;
    let (names, pages) = walk(&mut net, me, request, "apps", "app_id");
    assert_eq!((names, pages), (vec!["zoe".to_owned()], 2));
}

#[test]
fn a_page_of_blocks_is_bounded_in_bytes() {
    let mut net = Net::new();
    let me = net.app("me", r#""pools":["p"]"#);
    let names: Vec<String> = (0..90).map(|n| format!("\"{n:015}\"")).collect();
    let layout = format!(
        r#"{{"dtype":"|u1","shape":[90],"fields":[{}]}}"#,
        names.join(",")
    );
    for n in 0..120 {
        let more = format!(r#""pool":"p","block_id":"b{n:03}","size":90,"layout":{layout}"#);
        net.say(me, &format!(r#"{{"action":"memory_create",{more}}}"#));
    }
    net.sees(me);
    let request = r#""action":"memory_list","id":"1","pool":"p""#;
    let (names, pages) = walk(&mut net, me, request, "blocks", "block_id");
    assert_eq!((names.len(), pages), (120, 2));
    assert!(names.is_sorted());
}
