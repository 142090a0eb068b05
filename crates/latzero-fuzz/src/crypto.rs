//! Untrusted input in encrypted pools: tokens, descriptors, blocks, events, proofs.
//!
//! The pool is the one of `conformance/keys/vectors.json`, so that parts of the corpus verify.

use std::sync::LazyLock;

use latzero_crypto::Suite;
use latzero_crypto::app_key::AppKey;
use latzero_crypto::block::{BlockId, Checks, Geometry, MANIFEST_BYTES, Manifest, Verified};
use latzero_crypto::descriptor::{Descriptor, Expected, NewPool, read_creation, read_rotation};
use latzero_crypto::envelope::{self, Body, Envelope};
use latzero_crypto::epochs::Epochs;
use latzero_crypto::events::{Action, Incoming, IncomingAnswer, PendingCall, Receiver};
use latzero_crypto::keys::{KeySet, NewKeys, Secret, Token};
use latzero_crypto::meta::{AnswerMeta, CallFrame, CallMeta};
use latzero_crypto::proof::JoinProof;

/// The time at which the messages of the corpus were sent.
const NOW: u64 = 1_700_000_000_456;

/// Bytes that count up from `from`.
fn count<const N: usize>(from: u8) -> [u8; N] {
    let mut next = from;
    [(); N].map(|()| {
        next = next.wrapping_add(1);
        next.wrapping_sub(1)
    })
}

fn keys() -> KeySet {
    KeySet::new_pool(NewKeys {
        sigil: Secret::new(count(0x00)),
        shard: Secret::new(count(0x20)),
        seal: Secret::new(count(0x40)),
        owner: None,
    })
}

static FIRST: LazyLock<Descriptor> = LazyLock::new(|| {
    let pool = NewPool {
        name: "alpha",
        suite: Suite::Sealed,
        pool_id: count(0xa0),
        salt: count(0xc0),
        created_ms: 1_700_000_000_000,
        wrap_nonce: count(0x10),
    };
    Descriptor::create(&keys(), &pool).expect("all keys are here")
});

/// Tokens, key files and app keys: whatever can be parsed is written back unchanged.
///
/// # Panics
/// If it is not.
pub fn tokens(data: &[u8]) {
    let file = KeySet::from_file(data);
    if let Err(error) = &file {
        assert!(!error.to_string().is_empty());
    }
    let Ok(text) = std::str::from_utf8(data) else {
        assert!(file.is_err(), "a key file is text");
        return;
    };
    if let Ok(token) = Token::parse(text) {
        assert_eq!(token.to_text().as_str(), text);
        assert!(file.is_ok(), "a token is a key file");
    }
    if let Ok(key) = AppKey::parse(text) {
        assert_eq!(
            key.to_text().as_str(),
            text.strip_suffix('\n').unwrap_or(text)
        );
        assert!(file.is_err(), "an app key is no token");
    }
    let _ = KeySet::from_variable(text);
}

/// Descriptors: clients and the server accept only the pool's own first one.
///
/// # Panics
/// If another one is accepted.
pub fn descriptor(data: &[u8]) {
    descriptor_verifies(data);
}

/// As [`descriptor`]; returns whether it verified.
fn descriptor_verifies(data: &[u8]) -> bool {
    let first = &*FIRST;
    let parsed = Descriptor::parse(data);
    let creation = read_creation(data, "alpha");
    let rotation = read_rotation(data, first);
    let Ok(descriptor) = parsed else {
        assert!(creation.is_err() && rotation.is_err());
        return false;
    };
    assert_eq!(descriptor.as_bytes(), data);
    let expected = Expected {
        name: descriptor.name(),
        pool_id: descriptor.pool_id(),
        epoch: descriptor.epoch(),
        suite: descriptor.suite().number(),
    };
    let chain = [first.clone()];
    let accepted = descriptor
        .accept(&keys(), &expected, &chain, Some(first))
        .is_ok();
    if accepted {
        let next = descriptor.epoch() == 2 && descriptor.succeeds(first);
        assert!(
            descriptor == *first || next,
            "a stranger's descriptor was accepted"
        );
        let is_signed = rotation.is_ok_and(|next| next.is_signed_after(first));
        assert_eq!(is_signed, next);
    }
    accepted
}

/// Heads and slots of blocks: whatever verifies equals what was signed.
///
/// # Panics
/// If it does not.
pub fn manifest(data: &[u8]) {
    manifest_verifies(data);
}

/// As [`manifest`]; returns whether it verified.
fn manifest_verifies(data: &[u8]) -> bool {
    let id = BlockId {
        pool_id: count(0xa0),
        suite: Suite::Sealed,
        uid: count(0xd0),
        name: "frame",
    };
    let geometry = Geometry::of(131_072).expect("a small block");
    let checks = Checks {
        id,
        geometry,
        epoch: 1,
        min_content_epoch: 0,
    };
    let seal = FIRST.keys().seal;
    let version = data
        .first_chunk::<MANIFEST_BYTES>()
        .and_then(|bytes| Manifest::parse(bytes).ok());
    let version = version.map_or(1, |manifest| manifest.version());
    let verified = Verified::new(data, version, &checks, None, |_| Some(seal));
    let written = checks.written(data, version - 1, &seal);
    let verifies = verified.is_ok();
    match verified {
        Ok(verified) => {
            assert!(data.starts_with(&verified.head()));
            assert!(written.is_err() || written == Ok(verified.seen()));
        }
        Err(_) => assert!(written.is_err(), "the server accepted what readers refuse"),
    }
    verifies
}

/// Envelopes: whatever can be parsed can be written again, and only the corpus's own messages can
/// be opened.
///
/// # Panics
/// If that is not true.
pub fn envelope(data: &[u8]) {
    envelope_verifies(data);
}

/// As [`envelope()`]; returns whether it verified.
fn envelope_verifies(data: &[u8]) -> bool {
    for text in [std::str::from_utf8(data).ok(), None] {
        let _ = (CallMeta::parse(text), AnswerMeta::parse(text));
    }
    let key = keys()
        .pool_key(FIRST.epoch_id())
        .expect("all keys are here");
    let epochs = Epochs::new(FIRST.clone(), key, NOW);
    let parsed = Envelope::parse(data);
    let (mut app, mut caller) = (Receiver::new("targetApp", NOW), Receiver::new("app-1", NOW));
    let action = match data.get(28) {
        Some(1 | 4) => Action::Emit,
        _ => Action::Trigger,
    };
    let header = parsed.as_ref().map(|envelope| envelope.header);
    let incoming = Incoming {
        action,
        process: header.map_or("foo", |header| header.name),
        origin: header.map_or("app-1", |header| header.sender),
        destination: header.map_or("", |header| header.destination),
        frame: CallFrame::default(),
        privileged: false,
    };
    let received = app.receive(&epochs, &incoming, data, NOW).is_ok();
    let waiting = PendingCall {
        name: "foo".into(),
        destination: None,
        idempotency_key: None,
        deferred: false,
        signed: false,
        items: 0,
    };
    assert!(caller.wait([0x90; 16], waiting));
    let answer = IncomingAnswer {
        call: [0x90; 16],
        process: None,
        origin: None,
        status: "ok",
    };
    let answered = caller.receive_answer(&epochs, &answer, data, NOW).is_ok();
    let Some(envelope) = parsed else {
        assert!(!received && !answered);
        return false;
    };
    // The written header is the same, except for flags that depend on the content.
    let event_key = epochs.current().event_key();
    let seal = keys().seal_key().filter(|_| envelope.is_signed());
    let again = envelope::seal(
        &envelope.header,
        None,
        Body::Empty,
        &[0; 24],
        event_key,
        seal.as_ref(),
    );
    let again = again.expect("the values read are within the limits");
    let again = Envelope::parse(&again).expect("written data can be read");
    assert_eq!(again.header, envelope.header);
    assert_eq!(again.header_bytes()[30..], envelope.header_bytes()[30..]);
    let opened = envelope.open(event_key, &FIRST.keys().seal).is_ok();
    assert!(
        opened || !(received || answered),
        "taken although it does not open"
    );
    received || answered
}

/// Proofs: whatever can be parsed is written so that it parses to the same value.
///
/// # Panics
/// If it is not.
pub fn proof(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match JoinProof::from_json(text) {
        Ok(proof) => assert_eq!(JoinProof::from_json(&proof.to_json()), Ok(proof)),
        Err(error) => assert!(error.to_string().len() < 256),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise the corpus would never reach the code behind the checks.
    #[test]
    fn parts_of_the_corpus_verify() {
        let file = |name: &str| {
            let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus");
            std::fs::read(format!("{corpus}/{name}")).expect("the file is there")
        };
        assert!(descriptor_verifies(&file("descriptor/epoch-1")));
        assert!(descriptor_verifies(&file("descriptor/epoch-2")));
        assert!(manifest_verifies(&file("manifest/head")));
        assert!(manifest_verifies(&file("manifest/small-slot")));
        for name in ["privileged-call", "plain-call", "emit", "answer-to-waiting"] {
            assert!(
                envelope_verifies(&file(&format!("envelope/{name}"))),
                "{name}"
            );
        }
    }
}
