//! The checker in Python, which shares no code with this crate: it computes the vectors again, and
//! opens what this crate creates.
//!
//! It runs in a virtual environment under the target directory. If there is no Python, or its
//! packages cannot be installed, the test is skipped with a line on standard error; in continuous
//! integration (`CI` is set) that is a failure.

mod common;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

use common::*;
use latzero_crypto::block::{CHUNK_BYTES, Geometry, Next, Verified};
use latzero_crypto::descriptor::{Descriptor, History, NewEpoch, NewPool, OldContent};
use latzero_crypto::envelope::Body;
use latzero_crypto::epochs::Epochs;
use latzero_crypto::events::{Act, Action, Answer, Incoming, Outgoing, Receiver, ReplyTo, Sender};
use latzero_crypto::keys::{KeySet, Kind, NewKeys, Secret};
use latzero_crypto::meta::{AnswerMeta, CallFrame, CallMeta};
use latzero_crypto::{Suite, block::BlockId};
use serde_json::{Value, json};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../conformance/keys")
}

/// The interpreter of the environment, created once.
static PYTHON: LazyLock<Result<PathBuf, String>> = LazyLock::new(|| {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("keys-checker");
    let python = dir.join("bin/python");
    let requirements = folder().join("requirements.txt");
    let run = |command: &mut Command| match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        )),
        Err(error) => Err(format!("{command:?}: {error}")),
    };
    // Created once for each list of packages.
    let stamp = dir.join("requirements.txt");
    let wanted = std::fs::read(&requirements).map_err(|error| error.to_string())?;
    if std::fs::read(&stamp).is_ok_and(|made| made == wanted) {
        return Ok(python);
    }
    run(Command::new("python3").args(["-m", "venv"]).arg(&dir))?;
    run(Command::new(&python)
        .args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--requirement",
        ])
        .arg(&requirements))?;
    std::fs::write(&stamp, wanted).map_err(|error| error.to_string())?;
    Ok(python)
});

/// Runs the checker; `None` if it is skipped.
fn checker(args: &[&str], input: &str) -> Option<Output> {
    let python = match &*PYTHON {
        Ok(python) => python,
        Err(why) => {
            assert!(
                std::env::var_os("CI").is_none(),
                "the checker must run here: {why}"
            );
            // Not captured with the test's output: a reader of the results must see it.
            let _ = writeln!(std::io::stderr(), "LEFT OUT: the checker in Python: {why}");
            return None;
        }
    };
    let mut child = Command::new(python)
        .arg(folder().join("check.py"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the interpreter starts");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin
        .write_all(input.as_bytes())
        .expect("the checker reads its input");
    drop(stdin);
    Some(child.wait_with_output().expect("the checker ends"))
}

#[test]
fn vectors() {
    let vectors = folder().join("vectors.json");
    let Some(output) = checker(&["vectors", &vectors.to_string_lossy()], "") else {
        return;
    };
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(said.contains("106 values agree"), "{said}");
}

const NOW: u64 = 1_800_000_000_000;

/// A pool with an owner key that was rotated twice, a block of three versions, and messages of
/// every kind.
struct Made {
    json: Value,
    plain: Vec<u8>,
    bodies: Vec<&'static str>,
}

/// Bytes that differ from each other, but not from run to run.
fn random<const N: usize>(seed: u32) -> [u8; N] {
    let mut out = [0; N];
    for (i, part) in (0u32..).zip(out.chunks_mut(32)) {
        let input = [seed.to_be_bytes(), i.to_be_bytes()].concat();
        let hash = latzero_crypto::backend::preferred().sha256(&[&input]);
        part.copy_from_slice(&hash[..part.len()]);
    }
    out
}

fn make() -> Made {
    let keys = KeySet::new_pool(NewKeys {
        sigil: Secret::new(random(1)),
        shard: Secret::new(random(2)),
        seal: Secret::new(random(3)),
        owner: Some(Secret::new(random(4))),
    });
    let pool = NewPool {
        name: "Schatzkammer-ü",
        suite: Suite::Sealed,
        pool_id: random(5),
        salt: random(6),
        created_ms: NOW,
        wrap_nonce: random(7),
    };
    let one = Descriptor::create(&keys, &pool).expect("all keys are here");
    let rotate = |from: &Descriptor, seed| {
        let to = NewEpoch {
            salt: random(seed),
            created_ms: NOW,
            wrap_nonce: random(seed + 1),
            content: OldContent::AsBefore,
            history: History::Kept(random(seed + 2)),
        };
        from.rotate(&keys, &keys, &to).expect("all keys are here")
    };
    let two = rotate(&one, 10);
    let three = rotate(&two, 20);
    let key = |descriptor: &Descriptor| pool_key(&keys, descriptor);
    let mut epochs = Epochs::new(two.clone(), key(&two), NOW);

    let (slot, plain) = make_slot(&keys, &epochs, pool.pool_id);
    let (mut envelopes, mut bodies) = make_messages(&keys, &epochs, 100);
    epochs.advance(three.clone(), key(&three), NOW);
    let (more, more_bodies) = make_messages(&keys, &epochs, 200);
    envelopes.extend(more);
    bodies.extend(more_bodies);
    let token = |kind| keys.token(kind).expect("the key is here").to_string();
    let json = json!({
        "tokens": [token(Kind::Sigil), token(Kind::Shard)],
        "name": pool.name,
        "descriptors": [hex(one.as_bytes()), hex(two.as_bytes()), hex(three.as_bytes())],
        "slots": [slot],
        "envelopes": envelopes,
    });
    Made {
        json,
        plain,
        bodies,
    }
}

fn make_slot(keys: &KeySet, epochs: &Epochs, pool_id: [u8; 16]) -> (Value, Vec<u8>) {
    let size = 5 * CHUNK_BYTES as u64 + 1;
    let id = BlockId {
        pool_id,
        suite: Suite::Sealed,
        uid: random(30),
        name: "kept/config",
    };
    let geometry = Geometry::of(size).expect("a small block");
    let (epoch, seal) = (
        epochs.current().descriptor().epoch(),
        keys.seal_key().expect("it is present"),
    );
    let chunk_key = epochs.chunk_key(&id, epoch).expect("the epoch is known");
    let mut plain: Vec<u8> = (0..3 * CHUNK_BYTES + 77)
        .map(|i| (i * i % 251) as u8)
        .collect();
    let next = Next {
        id,
        geometry,
        epoch,
        length: plain.len() as u64,
        written_ms: NOW,
        session: random(31),
    };
    let mut slot =
        vec![0; usize::try_from(geometry.slot_len(next.length).expect("it fits")).expect("small")];
    let mut base: Option<Verified> = None;
    // All chunks, then single chunks.
    for (version, changes) in [(1, 0..4u32), (2, 2..3), (3, 3..4)] {
        let mut changed = Vec::new();
        for i in changes {
            let start = i as usize * CHUNK_BYTES;
            plain[start] ^= version as u8;
            let end = plain.len().min(start + CHUNK_BYTES);
            let nonce = random(1000 * version as u32 + i);
            let (entry, sealed) = chunk_key.seal(i, version, nonce, &plain[start..end]);
            let at = geometry
                .chunk(i, next.length)
                .expect("it has this chunk")
                .start;
            let at = usize::try_from(at).expect("small");
            slot[at..at + sealed.len()].copy_from_slice(&sealed);
            changed.push((i, entry));
        }
        base = Some(
            next.sign(base.as_ref(), &changed, &seal)
                .expect("all chunks are here"),
        );
    }
    let head = base.expect("three versions").head();
    slot[..head.len()].copy_from_slice(&head);
    let slot = json!({"name": id.name, "uid": hex(&id.uid), "size": size, "hex": hex(&slot)});
    (slot, plain)
}

fn make_messages(keys: &KeySet, epochs: &Epochs, seed: u32) -> (Vec<String>, Vec<&'static str>) {
    let seal = keys.seal_key().expect("it is present");
    let (mut caller, mut handler) = (
        Sender::new("anrufer", random(seed)),
        Sender::new("b", random(seed + 1)),
    );
    let mut handled = Receiver::new("b", NOW);
    let (mut envelopes, mut bodies) = (Vec::new(), Vec::new());
    for (i, act) in (seed + 2..).zip([Act::Emit, Act::Call, Act::DeferredCall]) {
        for (j, seal) in [None, Some(&seal)].into_iter().enumerate() {
            let id = 10 * i + u32::from(j == 1);
            let meta = CallMeta {
                idempotency_key: (act == Act::DeferredCall).then(|| "order-17".to_owned()),
                ..CallMeta::default()
            };
            let out = Outgoing {
                act,
                name: "summe/ü",
                destination: "b",
                msg_id: random(id),
                now_ms: NOW,
                meta: &meta,
                body: Body::Json("{\"grüße\":[1,2]}"),
                nonce: random(id + 1_000_000),
            };
            let call = caller.seal(epochs, &out, seal).expect("small");
            envelopes.push(hex(&call));
            bodies.push("{\"grüße\":[1,2]}");
            if act == Act::Emit {
                continue;
            }
            let frame = Incoming {
                action: Action::Trigger,
                process: out.name,
                origin: "anrufer",
                destination: "b",
                frame: CallFrame {
                    idempotency_key: meta.idempotency_key.as_deref(),
                    ..CallFrame::default()
                },
                privileged: false,
            };
            let to: ReplyTo = handled
                .receive(epochs, &frame, &call, NOW)
                .unwrap_or_else(|why| panic!("the call was dropped: {why}"))
                .reply_to;
            let meta = AnswerMeta {
                status: "ok".into(),
                ..AnswerMeta::default()
            };
            let answer = Answer {
                msg_id: random(id + 2_000_000),
                now_ms: NOW,
                meta: &meta,
                body: Body::Bytes("drei".as_bytes()),
                nonce: random(id + 3_000_000),
            };
            envelopes.push(hex(&handler
                .answer(epochs, &to, &answer, seal)
                .expect("small")));
            bodies.push("drei");
        }
    }
    (envelopes, bodies)
}

#[test]
fn the_checker_opens_what_this_crate_creates() {
    let made = make();
    let Some(output) = checker(&["open"], &made.json.to_string()) else {
        return;
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let opened: Value = serde_json::from_slice(&output.stdout).expect("the checker prints JSON");
    assert_eq!(opened["slots"][0].as_str(), Some(hex(&made.plain).as_str()));
    let bodies = opened["envelopes"].as_array().expect("a list");
    assert_eq!(bodies.len(), made.bodies.len());
    for (opened, body) in bodies.iter().zip(&made.bodies) {
        assert_eq!(
            opened["body"].as_str(),
            Some(hex(body.as_bytes()).as_str()),
            "{opened}"
        );
    }
    let kinds: std::collections::BTreeSet<_> = bodies.iter().map(|e| e["kind"].as_u64()).collect();
    assert_eq!(kinds.len(), 7, "every kind is present: {kinds:?}");
}

/// The checker can refuse: each part with one bit changed.
#[test]
fn changed_parts_are_refused() {
    let made = make();
    let flip = |text: &Value, at: usize| {
        let mut text = text.as_str().expect("hex").to_owned();
        let digit = if &text[at..=at] == "0" { "1" } else { "0" };
        text.replace_range(at..=at, digit);
        json!(text)
    };
    for (pointer, at) in [
        ("/descriptors/0", 80),
        ("/descriptors/1", 900),
        ("/slots/0/hex", 300),
        ("/slots/0/hex", 20_000),
        ("/envelopes/0", 120),
        ("/envelopes/7", 420),
    ] {
        let mut changed = made.json.clone();
        let place = changed.pointer_mut(pointer).expect("it exists");
        *place = flip(place, at);
        let Some(output) = checker(&["open"], &changed.to_string()) else {
            return;
        };
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && said.contains("refused:"),
            "{pointer}: {said}"
        );
    }
}
