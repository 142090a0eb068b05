//! Proofs with delayed results: who waits, who does not, and what can happen in between.

mod net;
use latzero_crypto::block::{BlockId, Geometry, Next};
use latzero_crypto::descriptor::{Descriptor, History, NewEpoch, NewPool, OldContent};
use latzero_crypto::keys::{KeySet, NewKeys, Roles, Secret};
use latzero_crypto::proof::{ChannelBinding, Exchange, Joining};
use latzero_crypto::{Suite, text};
use latzero_fabric::ledger::Resource;
use latzero_sim::Peer;
use net::Net;
use serde_json::Value;

fn keys(seed: u8) -> KeySet {
    KeySet::new_pool(NewKeys {
        sigil: Secret::new([seed; 32]),
        shard: Secret::new([seed + 1; 32]),
        seal: Secret::new([seed + 2; 32]),
        owner: None,
    })
}

fn first(keys: &KeySet) -> Descriptor {
    made(keys, "vault", 5)
}

/// The first descriptor of a pool.
fn made(keys: &KeySet, name: &str, id: u8) -> Descriptor {
    let pool = NewPool {
        name,
        suite: Suite::Sealed,
        pool_id: [id; 16],
        salt: [6; 32],
        created_ms: 1,
        wrap_nonce: [7; 24],
    };
    Descriptor::create(keys, &pool).expect("all keys are here")
}

/// The descriptor that follows, with the same keys.
fn next(current: &Descriptor) -> Descriptor {
    next_with(current, 1)
}

/// The descriptor that follows, with the keys of this seed.
fn next_with(current: &Descriptor, seed: u8) -> Descriptor {
    let to = NewEpoch {
        salt: [8; 32],
        created_ms: 2,
        wrap_nonce: [9; 24],
        history: History::Cut,
        content: OldContent::AsBefore,
    };
    let next = current.rotate(&keys(1), &keys(seed), &to);
    next.expect("all keys are here")
}

/// The request that creates the pool `vault`.
fn creation(descriptor: &[u8], id: &str) -> String {
    let descriptor = text::encode(descriptor);
    format!(
        r#"{{"action":"pool_create","pool":"vault","encrypted":true,"id":"{id}",
            "descriptor":"{descriptor}"}}"#
    )
}

/// The request that moves the pool `vault` to its next epoch.
fn rotation(descriptor: &[u8]) -> String {
    let descriptor = text::encode(descriptor);
    format!(r#"{{"action":"pool_rotate","pool":"vault","id":"r","descriptor":"{descriptor}"}}"#)
}

/// A server with an encrypted pool, and the pool's only member.
fn vault() -> (Net, Descriptor, Peer) {
    let mut net = Net::new();
    let descriptor = first(&keys(1));
    let app = net.app("owner", "");
    let seen = net.ask(app, &creation(descriptor.as_bytes(), "c"));
    assert!(seen.starts_with("c ok"), "{seen}");
    let proof = proof(&mut net, app, "owner", &keys(1));
    let seen = net.ask(app, &proof);
    assert!(seen.starts_with("p ok"), "{seen}");
    (net, descriptor, app)
}

/// The message that proves the role write, with a new challenge.
fn proof(net: &mut Net, peer: Peer, app: &str, keys: &KeySet) -> String {
    proof_in(net, peer, "vault", app, keys)
}

/// As [`proof`], of another pool.
fn proof_in(net: &mut Net, peer: Peer, pool: &str, app: &str, keys: &KeySet) -> String {
    proof_of(net, peer, pool, app, keys, Roles::Write)
}

/// The message that proves roles in a pool.
fn proof_of(
    net: &mut Net,
    peer: Peer,
    pool: &str,
    app: &str,
    keys: &KeySet,
    roles: Roles,
) -> String {
    net.say(
        peer,
        &format!(r#"{{"action":"pool_challenge","pool":"{pool}","id":"n"}}"#),
    );
    let challenge = net.messages(peer).pop().expect("an answer").json["response"].clone();
    fn binary<const N: usize>(value: &Value) -> [u8; N] {
        let text = value.as_str().expect("text");
        text::decode(text).expect("base64url")
    }
    let joining = Joining {
        pool,
        pool_id: binary(&challenge["pool_id"]),
        epoch: challenge["epoch"].as_u64().expect("a number") as u32,
        suite: 1,
        app_id: app,
        exchange: Exchange {
            client_nonce: [9; 32],
            server_nonce: binary(&challenge["server_nonce"]),
            server_instance: binary(&challenge["server_instance"]),
            binding: ChannelBinding::None,
        },
    };
    let proof = joining.prove(keys, roles).expect("all keys are here");
    let proof = proof.to_json();
    format!(r#"{{"action":"pool_join","pool":"{pool}","id":"p","proof":{proof}}}"#)
}

const PING: &str = r#"{"action":"ping","id":"later"}"#;

#[test]
fn waiting_proofs_delay_only_their_senders() {
    let (mut net, _, _) = vault();
    let handler = net.app("handler", r#""triggers":["t"]"#);
    let caller = net.app("caller", "");
    net.world.hold_proofs(true);
    let crowd: Vec<Peer> = (0..16)
        .map(|n| {
            let app = format!("crowd-{n}");
            let peer = net.app(&app, "");
            // These keys are not the pool's.
            let wrong = proof(&mut net, peer, &app, &keys(100));
            assert_eq!(net.ask(peer, &wrong), "", "no verdict yet");
            assert_eq!(net.ask(peer, PING), "", "what comes behind it waits");
            peer
        })
        .collect();
    // Calls of others are not delayed.
    for n in 0..3 {
        assert_eq!(net.call(caller, &format!("{n}"), r#""data":1"#), "");
        assert_eq!(net.answer(handler, r#""status":"ok","response":2"#), "");
        assert_eq!(net.sees(caller), format!("{n} ok: 2"));
    }
    // One more proof does not wait: its sender is asked to retry later.
    let late = net.app("late", "");
    let good = proof(&mut net, late, "late", &keys(1));
    assert_eq!(net.ask(late, &good), "p failed: overloaded ran=no");
    assert!(net.ask(late, PING).starts_with("later ok"), "it continues");
    assert!(net.world.check_proof());
    let good = proof(&mut net, late, "late", &keys(1));
    assert_eq!(net.ask(late, &good), "");
    assert_eq!(net.ask(late, PING), "");
    while net.world.check_proof() {}
    for peer in crowd {
        let seen = net.sees(peer);
        let (verdict, rest) = seen.split_once("; ").expect("two answers");
        assert_eq!(verdict, "p failed: unauthenticated ran=no");
        assert!(rest.starts_with("later ok"), "{rest}");
    }
    let seen = net.sees(late);
    assert!(
        seen.starts_with("p ok") && seen.contains("; later ok"),
        "{seen}"
    );
}

/// Proofs may wait for the disk together. Each of them is decided by its own result.
#[test]
fn a_good_proof_does_not_decide_on_a_wrong_one_behind_it() {
    let mut net = Net::with(|limits| limits.in_flight_max = 1);
    let owner = net.app("owner", "");
    let vault = first(&keys(1));
    assert!(
        net.ask(owner, &creation(vault.as_bytes(), "c"))
            .starts_with("c ok")
    );
    let thief = net.app("thief", "");
    let mine = made(&keys(50), "mine", 15);
    let create = creation(mine.as_bytes(), "c").replace("vault", "mine");
    assert!(net.ask(thief, &create).starts_with("c ok"));
    let good = proof_in(&mut net, thief, "mine", "thief", &keys(50));
    let wrong = proof(&mut net, thief, "thief", &keys(50));
    net.world.hold_disk(true);
    net.world.hold_proofs(true);
    let parked = r#"{"action":"trigger","process":"t","park":true,"id":"t"}"#;
    for message in [parked, &good, &wrong] {
        assert_eq!(net.ask(thief, message), "");
    }
    net.world.hold_disk(false);
    assert_eq!(net.sees(thief), "t parked: null");
    assert!(net.world.check_proof());
    assert!(net.sees(thief).starts_with("p ok"), "of its own pool");
    assert!(net.world.check_proof());
    assert_eq!(net.sees(thief), "p failed: unauthenticated ran=no");
    assert!(!net.world.check_proof());
    let members = net.world.pool_stats("vault").expect("it exists").members;
    assert_eq!(members, 0);
}

#[test]
fn a_rotation_before_the_result_refuses_the_proof() {
    let (mut net, current, owner) = vault();
    let late = net.app("late", "");
    let proof = proof(&mut net, late, "late", &keys(1));
    net.world.hold_proofs(true);
    let rotate = rotation(next(&current).as_bytes());
    assert_eq!(net.ask(owner, &rotate), "");
    assert_eq!(net.ask(late, &proof), "");
    assert!(net.world.check_proof());
    let seen = net.sees(owner);
    assert!(seen.contains("r ok"), "{seen}");
    assert!(net.world.check_proof());
    assert_eq!(net.sees(late), "p failed: unauthenticated ran=no");
}

#[test]
fn a_pool_is_created_once_its_signature_is_checked() {
    let mut net = Net::new();
    let (first_app, second) = (net.app("first", ""), net.app("second", ""));
    net.world.hold_proofs(true);
    let descriptor = first(&keys(1));
    let mut forged = descriptor.as_bytes().to_vec();
    // A byte of the wrapped key.
    forged[296] ^= 1;
    assert_eq!(net.ask(first_app, &creation(&forged, "f")), "");
    assert!(net.world.check_proof());
    assert_eq!(net.sees(first_app), "f failed: bad_message ran=no");
    // Both may be checked, and one of them creates the pool.
    let create = creation(descriptor.as_bytes(), "c");
    assert_eq!(net.ask(first_app, &create), "");
    assert_eq!(net.ask(second, &create), "");
    assert!(net.world.check_proof() && net.world.check_proof());
    assert!(net.sees(first_app).starts_with("c ok"));
    assert_eq!(net.sees(second), "c failed: unauthenticated ran=no");
}

#[test]
fn a_rotation_with_another_signature_is_refused() {
    let (mut net, current, owner) = vault();
    net.world.hold_proofs(true);
    let next = next(&current);
    let mut forged = next.as_bytes().to_vec();
    // The last byte of the owner's signature.
    *forged.last_mut().expect("it has bytes") ^= 1;
    assert_eq!(net.ask(owner, &rotation(&forged)), "");
    assert!(net.world.check_proof());
    assert_eq!(net.sees(owner), "r failed: unauthenticated ran=no");
    assert_eq!(net.ask(owner, &rotation(next.as_bytes())), "");
    assert!(net.world.check_proof());
    assert!(net.sees(owner).contains("r ok"));
}

#[test]
fn a_client_that_leaves_before_the_result_does_not_join() {
    let (mut net, _, _) = vault();
    let late = net.app("late", "");
    let proof = proof(&mut net, late, "late", &keys(1));
    net.world.hold_proofs(true);
    net.say(late, &proof);
    net.hang_up(late);
    assert!(net.world.check_proof());
    let members = net.world.pool_stats("vault").expect("it exists").members;
    assert_eq!(members, 1, "only the owner");
}

#[test]
fn a_member_removed_by_a_rotation_loses_access_at_once() {
    let (mut net, current, owner) = vault();
    let to = NewEpoch {
        salt: [8; 32],
        created_ms: 2,
        wrap_nonce: [9; 24],
        history: History::Cut,
        content: OldContent::Refused,
    };
    let next = current
        .rotate(&keys(1), &keys(100), &to)
        .expect("all keys are here");
    let rotate = format!(
        r#"{{"action":"pool_rotate","pool":"vault","descriptor":"{}","id":"r"}}"#,
        text::encode(next.as_bytes())
    );
    let seen = net.ask(owner, &rotate);
    assert!(
        seen.contains("pool_rotated") && seen.contains("r ok"),
        "{seen}"
    );
    for action in ["memory_list", "pool_chain", "watch", "pool_leave"] {
        let ask = format!(r#"{{"action":"{action}","pool":"vault","id":"{action}"}}"#);
        let seen = net.ask(owner, &ask);
        assert_eq!(seen, format!("{action} failed: not_member ran=no"));
    }
    let seen = net.ask(owner, r#"{"action":"app_list","id":"l"}"#);
    assert!(
        seen.starts_with("l ok") && !seen.contains("vault"),
        "{seen}"
    );
}

/// The content of block `b` as a slot with nothing but a manifest.
fn slot(descriptor: &Descriptor, version: u64, signer: &KeySet) -> Vec<u8> {
    let next = Next {
        id: BlockId {
            pool_id: descriptor.pool_id(),
            suite: Suite::Sealed,
            uid: [4; 16],
            name: "b",
        },
        geometry: Geometry::of(1000).expect("it is small"),
        epoch: descriptor.epoch(),
        length: 0,
        written_ms: 1,
        session: [5; 16],
    };
    let seal = signer.seal_key().expect("all keys are here");
    let signed = next.sign_as(version, None, &[], &seal);
    signed.expect("nothing is missing").head()
}

/// A writer that holds the lock of block `b`, with a lease of a second; and the lock.
fn holder(net: &mut Net) -> (Peer, String) {
    let writer = net.app("writer", r#""features":["attachments"]"#);
    let proof = proof(net, writer, "writer", &keys(1));
    assert!(net.ask(writer, &proof).starts_with("p ok"));
    let uid = text::encode(&[4; 16]);
    let create = format!(
        r#"{{"action":"memory_create","pool":"vault","block_id":"b","size":1000,"id":"b",
            "block_uid":"{uid}"}}"#
    );
    let seen = net.ask(writer, &create);
    assert!(seen.starts_with("b ok"), "{seen}");
    let lock = r#"{"action":"memory_lock","pool":"vault","block_id":"b","id":"l","lease":1000}"#;
    net.say(writer, lock);
    let reply = net.messages(writer).pop().expect("an answer").json;
    let lock = reply["response"]["lock"].as_str().expect("it is free");
    (writer, lock.to_owned())
}

/// Writes a slot; returns what the writer sees at once.
fn write(net: &mut Net, (writer, lock): &(Peer, String), slot: &[u8]) -> String {
    let write = format!(
        r#"{{"action":"memory_write","pool":"vault","block_id":"b","id":"w","lock":"{lock}"}}"#
    );
    net.say_raw(*writer, &write, slot);
    net.sees(*writer)
}

#[test]
fn a_sealed_block_is_written_once_its_signature_is_checked() {
    let (mut net, descriptor, _) = vault();
    let writer = holder(&mut net);
    net.world.hold_proofs(true);
    let forged = slot(&descriptor, 1, &keys(100));
    assert_eq!(write(&mut net, &writer, &forged), "");
    assert_eq!(net.ask(writer.0, PING), "", "what comes behind it waits");
    assert!(net.world.check_proof());
    let seen = net.sees(writer.0);
    assert!(
        seen.starts_with("w failed: bad_message ran=no; later ok"),
        "{seen}"
    );
    let good = slot(&descriptor, 1, &keys(1));
    assert_eq!(write(&mut net, &writer, &good), "");
    assert!(net.world.check_proof());
    assert_eq!(net.sees(writer.0), r#"w ok: {"version":1}"#);
    // What needs no key is refused at once.
    let seen = write(&mut net, &writer, &good);
    assert_eq!(seen, "w failed: version_conflict ran=no");
    let cut = &slot(&descriptor, 2, &keys(1))[1..];
    let seen = write(&mut net, &writer, cut);
    assert_eq!(seen, "w failed: bad_message ran=no");
    assert!(!net.world.check_proof(), "no signature was checked for it");
}

#[test]
fn a_sealed_block_is_not_written_if_its_lock_or_epoch_ended_before_the_result() {
    let (mut net, descriptor, owner) = vault();
    let writer = holder(&mut net);
    net.world.hold_proofs(true);
    let good = slot(&descriptor, 1, &keys(1));
    assert_eq!(write(&mut net, &writer, &good), "");
    net.advance(1001);
    assert!(net.world.check_proof());
    let seen = net.sees(writer.0);
    assert!(seen.ends_with("w failed: lock_lost ran=unknown"), "{seen}");
    net.say(
        writer.0,
        r#"{"action":"memory_lock","pool":"vault","block_id":"b","id":"l"}"#,
    );
    let reply = net.messages(writer.0).pop().expect("an answer").json;
    let lock = reply["response"]["lock"].as_str().expect("it is free");
    let writer = (writer.0, lock.to_owned());
    let rotate = rotation(next(&descriptor).as_bytes());
    assert_eq!(net.ask(owner, &rotate), "");
    assert_eq!(write(&mut net, &writer, &good), "");
    assert!(net.world.check_proof() && net.world.check_proof());
    let seen = net.sees(writer.0);
    assert!(seen.ends_with("w failed: stale_epoch ran=no"), "{seen}");
}

#[test]
fn a_client_that_leaves_before_the_result_writes_nothing() {
    let (mut net, descriptor, owner) = vault();
    let writer = holder(&mut net);
    net.world.hold_proofs(true);
    let good = slot(&descriptor, 1, &keys(1));
    assert_eq!(write(&mut net, &writer, &good), "");
    net.hang_up(writer.0);
    assert!(net.world.check_proof());
    let info = r#"{"action":"memory_info","pool":"vault","block_id":"b","id":"i"}"#;
    let seen = net.ask(owner, info);
    assert!(
        seen.contains("no_block") || seen.contains(r#""version":0"#),
        "{seen}"
    );
}

#[test]
fn a_rotation_during_a_slow_write_moves_the_block_after_it() {
    let (mut net, descriptor, owner) = vault();
    let writer = holder(&mut net);
    net.world.limit_copies(0);
    net.world.hold_jobs(true);
    let good = slot(&descriptor, 1, &keys(1));
    assert_eq!(write(&mut net, &writer, &good), "");
    assert_eq!(net.ask(writer.0, PING), "", "what comes behind it waits");
    let next = next_with(&descriptor, 100);
    let seen = net.ask(owner, &rotation(next.as_bytes()));
    assert!(seen.contains("r ok"), "{seen}");
    net.world.hold_jobs(false);
    let seen = net.sees(writer.0);
    assert!(seen.contains(r#"w ok: {"version":1}"#), "{seen}");
    assert!(seen.contains("later ok"), "{seen}");
    let info = r#"{"action":"memory_info","pool":"vault","block_id":"b","id":"i"}"#;
    let late = net.app("late", "");
    let proof = proof(&mut net, late, "late", &keys(100));
    assert!(net.ask(late, &proof).starts_with("p ok"));
    let seen = net.ask(late, info);
    assert!(
        seen.contains(r#""version":1"#) && seen.contains(r#""generation":2"#),
        "{seen}"
    );
    net.world.check_ledger();
}

#[test]
fn the_descriptors_of_earlier_epochs_count_as_memory() {
    let (mut net, mut current, owner) = vault();
    let before = net.world.held(Resource::Registrations);
    let mut bytes = 0;
    for _ in 0..20 {
        bytes += current.as_bytes().len() as u64;
        current = next(&current);
        let seen = net.ask(owner, &rotation(current.as_bytes()));
        assert!(seen.contains("r ok"), "{seen}");
    }
    let held = net.world.held(Resource::Registrations) - before;
    assert!((bytes..2 * bytes).contains(&held), "{held} of {bytes}");
    net.ask(
        owner,
        r#"{"action":"pool_remove","pool":"vault","force":true}"#,
    );
    assert!(net.world.held(Resource::Registrations) < before);
}

/// The triggers of the pool `vault` that a member sees.
fn triggers_of(net: &mut Net, member: Peer) -> Value {
    net.say(member, r#"{"action":"pool_info","pool":"vault","id":"i"}"#);
    let info = net.messages(member).pop().expect("an answer").json;
    let mut triggers = info["response"]["triggers"].clone();
    for trigger in triggers.as_array_mut().expect("a list") {
        trigger["handlers"].take();
    }
    triggers
}

/// Whoever uses an app's AppID without the keys neither sees nor changes what it serves in an
/// encrypted pool.
#[test]
fn triggers_in_an_encrypted_pool_are_changed_only_with_a_proof() {
    let (mut net, _, owner) = vault();
    let worker = net.stranger(
        "worker",
        r#""encrypted_pools":["vault"],"triggers":[{"name":"t","privileged":true,"doc":"d"}]"#,
    );
    let proved = proof(&mut net, worker, "worker", &keys(1));
    assert!(net.ask(worker, &proved).starts_with("p ok"));
    let served = triggers_of(&mut net, owner);
    assert_eq!(served[0]["privileged"], true);
    let attacks: [(&str, &[&str]); 5] = [
        (
            "",
            &[
                r#"{"action":"trigger_unregister","triggers":["t"],"id":"x"}"#,
                r#"{"action":"pool_join","pool":"open","id":"x"}"#,
            ],
        ),
        (r#""triggers":[]"#, &[]),
        (r#""pools":["open"],"triggers":["t"]"#, &[]),
        (
            r#""encrypted_pools":["vault"],"triggers":["t","u"]"#,
            &[r#"{"action":"trigger_register","id":"x",
                    "triggers":[{"name":"t","pools":["vault"]}]}"#],
        ),
        (r#""triggers":["u"],"takeover":true"#, &[]),
    ];
    for (handshake, requests) in attacks {
        let thief = net.connect_stranger();
        let more = if handshake.is_empty() { "" } else { "," };
        let hello = format!(r#"{{"action":"handshake","app_id":"worker"{more}{handshake}}}"#);
        net.say(thief, &hello);
        let ack = net.messages(thief).remove(0).json;
        if handshake.is_empty() {
            assert_eq!(ack["triggers"], serde_json::json!([]), "{ack}");
        }
        for request in requests {
            assert!(net.ask(thief, request).starts_with("x ok"), "{request}");
        }
        let seen = net.ask(thief, r#"{"action":"app_list","id":"l"}"#);
        assert!(!seen.contains(r#""doc":"d""#), "{seen}");
        net.hang_up(thief);
    }
    // The app comes back, and so does what it served.
    let worker = net.stranger("worker", "");
    let proved = proof(&mut net, worker, "worker", &keys(1));
    let seen = net.ask(worker, &proved);
    assert!(seen.contains(r#""triggers":["t"]"#), "{seen}");
    assert_eq!(triggers_of(&mut net, owner), served);
    let again = proof(&mut net, worker, "worker", &keys(1));
    assert!(net.ask(worker, &again).contains(r#""triggers":["t"]"#));
    assert_eq!(triggers_of(&mut net, owner), served);
    // A member of the pool sees it in the listing, nobody else does.
    let list = r#"{"action":"app_list","id":"l"}"#;
    assert!(net.ask(owner, list).contains(r#""doc":"d""#));
    let stranger = net.stranger("stranger", "");
    assert!(!net.ask(stranger, list).contains(r#""doc":"d""#));
}

/// What an app has in encrypted pools counts as what it has elsewhere.
#[test]
fn triggers_in_an_encrypted_pool_have_limits() {
    let (mut net, _, _) = vault();
    let worker = member(&mut net, "worker", Roles::Write);
    let doc = "d".repeat(1000);
    let mut register = |from: usize, to: usize| {
        let specs = (from..to).map(|n| format!(r#"{{"name":"t{n}","doc":"{doc}"}}"#));
        let specs = specs.collect::<Vec<_>>().join(",");
        let register = format!(r#"{{"action":"trigger_register","triggers":[{specs}],"id":"x"}}"#);
        net.ask(worker, &register)
    };
    assert!(register(0, 200).starts_with("x ok"));
    let refused = register(200, 400);
    assert_eq!(refused, "x failed: quota ran=no");
    assert!(register(200, 210).starts_with("x ok"));
}

/// Triggers for all pools are shown where the app is, and nowhere else.
#[test]
fn what_is_served_only_in_an_encrypted_pool_is_never_listed_outside() {
    let (mut net, _, _) = vault();
    let stranger = net.stranger("stranger", "");
    let list = r#"{"action":"app_list","id":"l"}"#;
    let worker = net.app(
        "worker",
        r#""encrypted_pools":["vault"],"triggers":["secret"]"#,
    );
    assert!(
        !net.ask(stranger, list).contains("secret"),
        "before the proof"
    );
    let proved = proof(&mut net, worker, "worker", &keys(1));
    assert!(net.ask(worker, &proved).starts_with("p ok"));
    assert!(!net.ask(stranger, list).contains("secret"), "with it");
    assert!(net.ask(worker, list).contains("secret"));
    let leave = r#"{"action":"pool_leave","pool":"vault","id":"x"}"#;
    assert!(net.ask(worker, leave).contains("x ok"));
    assert!(!net.ask(stranger, list).contains("secret"), "after it left");
    // In an open pool it is served, and remembered.
    let join = r#"{"action":"pool_join","pool":"open","id":"x"}"#;
    assert!(net.ask(worker, join).contains("x ok"));
    net.hang_up(worker);
    let (_, seen) = net.hello("worker", "");
    assert!(seen.contains("open"), "{seen}");
}

/// The entry of an app does not tell whether a name that it guessed is that of an encrypted pool.
#[test]
fn a_trigger_for_a_hidden_pool_looks_like_one_for_a_missing_pool() {
    let (mut net, _, _) = vault();
    let guess = |net: &mut Net, app: &str, pool: &str| {
        let peer = net.stranger(app, "");
        let spec = format!(r#"{{"name":"t","pools":["{pool}"]}}"#);
        let register = format!(r#"{{"action":"trigger_register","triggers":[{spec}],"id":"r"}}"#);
        let mut seen = net.ask(peer, &register);
        net.say(peer, r#"{"action":"app_list","id":"l"}"#);
        let list = net.messages(peer).pop().expect("an answer").json;
        let apps = list["response"]["apps"].as_array().expect("a list");
        let own = apps.iter().find(|entry| entry["app_id"] == app);
        seen += &own.expect("it is there")["triggers"].to_string();
        seen
    };
    let missing = guess(&mut net, "one", "nothing");
    let hidden = guess(&mut net, "two", "vault");
    assert_eq!(missing, hidden);
}

/// A member of the pool `vault` with these roles.
fn member(net: &mut Net, app: &str, roles: Roles) -> Peer {
    let peer = net.app(app, r#""encrypted_pools":["vault"]"#);
    prove(net, peer, app, roles);
    peer
}

fn prove(net: &mut Net, peer: Peer, app: &str, roles: Roles) {
    let proof = proof_of(net, peer, "vault", app, &keys(1), roles);
    let seen = net.ask(peer, &proof);
    assert!(seen.contains("p ok"), "{seen}");
}

/// The beginning of an envelope, which is all that the server looks at.
const SEALED: &str = "TFpFVgABAA";

#[test]
fn a_removed_reader_is_not_told_which_triggers_are_privileged() {
    let (mut net, descriptor, owner) = vault();
    let reader = member(&mut net, "reader", Roles::Read);
    let spec =
        r#"{"action":"trigger_register","triggers":[{"name":"t","privileged":true}],"id":"x"}"#;
    assert!(net.ask(owner, spec).starts_with("x ok"));
    let send = |net: &mut Net, action: &str| {
        let more = format!(r#""process":"t","pool":"vault","data":"{SEALED}","id":"x""#);
        net.ask(reader, &format!(r#"{{"action":"{action}",{more}}}"#))
    };
    for action in ["emit", "trigger"] {
        assert_eq!(send(&mut net, action), "x failed: forbidden ran=no");
    }
    let next = next_with(&descriptor, 100);
    assert!(net.ask(owner, &rotation(next.as_bytes())).contains("r ok"));
    net.sees(reader);
    let proof = proof(&mut net, owner, "owner", &keys(100));
    assert!(net.ask(owner, &proof).starts_with("p ok"));
    assert!(triggers_of(&mut net, owner)[0]["privileged"] == true);
    for action in ["emit", "trigger"] {
        assert_eq!(send(&mut net, action), "x failed: not_member ran=no");
    }
}

/// A member that may only join neither sees nor ends the calls that its app parked.
#[test]
fn parked_calls_of_an_encrypted_pool_are_for_readers() {
    let (mut net, _, _) = vault();
    let reader = member(&mut net, "caller", Roles::Read);
    let more = format!(r#""park":true,"pool":"vault","data":"{SEALED}""#);
    assert!(net.call(reader, "1", &more).starts_with("1 parked"));
    let joined = member(&mut net, "caller", Roles::Join);
    let ask = |net: &mut Net, peer, action: &str, more: &str| {
        net.ask(peer, &format!(r#"{{"action":"{action}","id":"x"{more}}}"#))
    };
    for action in ["parked_list", "parked_cancel", "parked_purge"] {
        let seen = ask(&mut net, joined, action, r#","pool":"vault""#);
        assert_eq!(seen, "x failed: forbidden ran=no", "{action}");
    }
    let seen = ask(&mut net, joined, "parked_list", "");
    assert!(seen.contains(r#""parked":[]"#), "{seen}");
    let seen = ask(&mut net, joined, "parked_cancel", r#","process":"t""#);
    assert!(seen.contains(r#""changed":0"#), "{seen}");
    let seen = ask(&mut net, reader, "parked_cancel", r#","process":"t""#);
    assert!(seen.contains(r#""changed":1"#), "{seen}");
}

/// Nothing that a handler says of a failure in an encrypted pool is in the clear.
#[test]
fn a_failed_answer_in_an_encrypted_pool_is_sealed() {
    let (mut net, _, owner) = vault();
    let register = r#"{"action":"trigger_register","triggers":["t"],"id":"x"}"#;
    assert!(net.ask(owner, register).starts_with("x ok"));
    let caller = member(&mut net, "caller", Roles::Read);
    let call = format!(r#""pool":"vault","data":"{SEALED}""#);
    assert_eq!(net.call(caller, "1", &call), "");
    let error = |more: &str| {
        format!(r#""status":"error","error":{{"code":"sealed","message":"sealed"{more}}}"#)
    };
    let plain = error(r#","data":{"secret":1}"#);
    assert_eq!(net.answer(owner, &plain), "error bad_message");
    let plain = error("") + r#","response":"secret""#;
    assert_eq!(net.answer(owner, &plain), "error bad_message");
    assert_eq!(net.sees(caller), "");
    let sealed = error(&format!(r#","data":"{SEALED}""#));
    assert_eq!(net.answer(owner, &sealed), "");
    assert_eq!(net.sees(caller), "1 failed: sealed");
}

/// Whoever proves fewer keys than before keeps nothing that needs the others.
#[test]
fn lower_roles_end_locks_and_subscriptions() {
    let (mut net, _, _) = vault();
    let (writer, _) = holder(&mut net);
    let lock = r#"{"action":"memory_lock","pool":"vault","block_id":"b","id":"l"}"#;
    let shared =
        r#"{"action":"memory_lock","pool":"vault","block_id":"b","mode":"shared","id":"l"}"#;
    let subscribe = r#"{"action":"memory_subscribe","pool":"vault","block_id":"b","id":"s"}"#;
    assert!(net.ask(writer, subscribe).starts_with("s ok"));
    let other = member(&mut net, "other", Roles::Write);
    assert_eq!(net.ask(other, lock), "l failed: locked ran=no");
    // A reader keeps its subscription, but not the lock of a writer.
    let proof = proof_of(&mut net, writer, "vault", "writer", &keys(1), Roles::Read);
    let seen = net.ask(writer, &proof);
    assert!(
        seen.contains("p ok") && seen.contains("lock_lost"),
        "{seen}"
    );
    net.say(other, lock);
    let reply = net.messages(other).pop().expect("an answer").json;
    let fence = reply["response"]["lock"].as_str().expect("it is free");
    let unlock = format!(
        r#"{{"action":"memory_unlock","pool":"vault","block_id":"b","id":"u","lock":"{fence}"}}"#
    );
    assert!(net.ask(other, &unlock).starts_with("u ok"));
    // Whoever may only join keeps neither.
    assert!(net.ask(writer, shared).starts_with("l ok"));
    let info = r#"{"action":"memory_info","pool":"vault","block_id":"b","id":"i"}"#;
    assert!(net.ask(other, info).contains(r#""subscribers":1"#));
    let proof = proof_of(&mut net, writer, "vault", "writer", &keys(1), Roles::Join);
    let seen = net.ask(writer, &proof);
    assert!(
        seen.contains("p ok") && seen.contains("lock_lost"),
        "{seen}"
    );
    assert!(net.ask(other, info).contains(r#""subscribers":0"#));
    // They come back with the keys.
    prove(&mut net, writer, "writer", Roles::Read);
    assert!(net.ask(other, info).contains(r#""subscribers":1"#));
}

/// A request that names an encrypted pool without its proof counts as a wrong one.
#[test]
fn guessed_names_count_as_refused_proofs() {
    let (mut net, _, _) = vault();
    let guesser = net.app("guesser", "");
    let join = r#"{"action":"pool_join","pool":"vault","id":"x"}"#;
    let create = r#"{"action":"pool_create","pool":"vault","id":"x"}"#;
    for guess in [join, create] {
        assert_eq!(net.ask(guesser, guess), "x failed: unauthenticated ran=no");
    }
    let seen = net.ask(guesser, join);
    assert_eq!(seen, "x failed: unauthenticated ran=no; (closed)");
}
