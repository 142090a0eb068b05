//! The vectors of `conformance/keys`, on each library.

mod common;

use common::*;
use latzero_crypto::app_key::AppKey;
use latzero_crypto::block::{CHUNK_BYTES, ChunkKey, Geometry, Next, Seen, Verified};
use latzero_crypto::descriptor::{Descriptor, read_creation, read_rotation};
use latzero_crypto::envelope::{self, Body, Envelope, Header};
use latzero_crypto::keys::{KeySet, Kind, Roles, Secret};
use latzero_crypto::proof::{self, ChannelBinding, Side};
use latzero_crypto::xaes::Xaes;
use latzero_crypto::{Suite, passphrase};

#[test]
fn xaes_256_gcm() {
    on_each(|backend| {
        for i in 0..at("/xaes_256_gcm").as_array().expect("a list").len() {
            let of = |name| format!("/xaes_256_gcm/{i}/{name}");
            let key = Xaes::new(&array(&of("key")), backend);
            let (nonce, aad) = (array(&of("nonce")), bytes(&of("aad")));
            let sealed = key.seal(&nonce, &aad, &bytes(&of("plaintext")));
            same(&sealed, &of("sealed"));
            assert_eq!(
                key.open(&nonce, &aad, sealed),
                Some(bytes(&of("plaintext")))
            );
        }
    });
}

/// Ten thousand random messages of all lengths, hashed: the sequence is SHAKE-128's of nothing.
#[test]
fn xaes_256_gcm_accumulated() {
    use sha3::digest::{ExtendableOutput as _, Update as _, XofReader as _};
    on_each(|backend| {
        let mut random = sha3::Shake128::default().finalize_xof();
        let mut sum = sha3::Shake128::default();
        for _ in 0..number("/xaes_256_gcm_accumulated/rounds") {
            let (mut key, mut nonce, mut length) = ([0; 32], [0; 24], [0; 1]);
            let mut take = |into: &mut [u8]| random.read(into);
            take(&mut key);
            take(&mut nonce);
            take(&mut length);
            let mut plain = vec![0; length[0].into()];
            take(&mut plain);
            take(&mut length);
            let mut aad = vec![0; length[0].into()];
            take(&mut aad);
            let key = Xaes::new(&key, backend);
            let sealed = key.seal(&nonce, &aad, &plain);
            sum.update(&sealed);
            assert_eq!(key.open(&nonce, &aad, sealed), Some(plain));
        }
        let mut got = [0; 32];
        sum.finalize_xof().read(&mut got);
        same(&got, "/xaes_256_gcm_accumulated/shake128");
    });
}

#[test]
fn passphrases() {
    let (pool, words) = (
        text("/passphrase/given/pool"),
        text("/passphrase/given/passphrase"),
    );
    same(
        &passphrase::salt(Kind::Sigil, pool),
        "/passphrase/expect/salt",
    );
    let key = passphrase::key(Kind::Sigil, pool, words.as_bytes()).expect("64 MiB");
    same(&*key, "/passphrase/expect/key");
}

#[test]
fn keys_and_tokens() {
    let expect = |name: &str| format!("/keys/expect/{name}");
    let (plain, owned) = (keys(false), keys(true));
    let public = |key: Option<latzero_crypto::sign::SigningKey>| {
        key.expect("all keys are here").public().to_bytes()
    };
    same(&public(plain.owner_key()), &expect("pk_owner"));
    same(&public(plain.join_key()), &expect("pk_join"));
    same(&public(plain.read_key()), &expect("pk_read"));
    same(&public(plain.write_key()), &expect("pk_write"));
    same(&public(plain.seal_key()), &expect("pk_seal"));
    same(&public(owned.owner_key()), &expect("pk_owner_w"));
    same(&plain.pin().expect("new keys have a pin"), &expect("pin"));
    same(&owned.pin().expect("new keys have a pin"), &expect("pin_w"));
    for (keys, kind, name) in [
        (&plain, Kind::Sigil, "token_sigil"),
        (&plain, Kind::Shard, "token_shard"),
        (&plain, Kind::Seal, "token_seal"),
        (&owned, Kind::Owner, "token_owner"),
        (&owned, Kind::Sigil, "token_sigil_w"),
    ] {
        let token = text(&expect(name));
        assert_eq!(
            keys.token(kind).expect("the key is here").as_str(),
            token,
            "{name}"
        );
        let read = KeySet::from_tokens([token]).expect("a token");
        assert_eq!(
            read.token(kind).expect("the key is here").as_str(),
            token,
            "{name}"
        );
    }
}

#[test]
fn descriptors() {
    on_each(|backend| {
        let of = |epoch: &str, name: &str| format!("/descriptors/{epoch}/expect/{name}");
        let (keys, keys3) = (
            keys(false).with_backend(backend),
            keys3().with_backend(backend),
        );
        let one = Descriptor::create(&keys, &new_pool(Suite::Sealed)).expect("all keys are here");
        let key = pool_key(&keys, &one);
        same(key.bytes(), &of("epoch1", "pool_key"));
        let kek = keys
            .read_kek_bytes(one.epoch_id())
            .expect("the reader's keys are here");
        same(&*kek, &of("epoch1", "read_kek"));
        same(&key.check_value(), &of("epoch1", "check_value"));
        assert_eq!(one.as_bytes().len() as u64, number(&of("epoch1", "bytes")));
        same(&one.as_bytes()[320..368], &of("epoch1", "wrap"));
        same(&one.as_bytes()[447..511], &of("epoch1", "sig_owner"));
        same(&one.hash(), &of("epoch1", "sha256"));
        // Derived keys are tested through what they seal.
        let (event, block) = (
            array(&of("epoch1", "event_key")),
            array(&of("epoch1", "block_key")),
        );
        let seal = |key: Xaes| key.seal(&[0; 24], b"", b"x");
        assert_eq!(seal(key.event_key()), seal(Xaes::new(&event, backend)));
        assert_eq!(
            seal(key.block_key(&block_id().uid)),
            seal(Xaes::new(&block, backend))
        );

        let gated = Descriptor::create(&keys, &new_pool(Suite::Gated)).expect("all keys are here");
        same(&gated.hash(), "/descriptors/epoch1_gated/expect/sha256");

        let two = one
            .rotate(&keys, &keys, &new_epoch(2))
            .expect("all keys are here");
        let key2 = pool_key(&keys, &two);
        same(key2.bytes(), &of("epoch2", "pool_key"));
        let kek = keys
            .read_kek_bytes(two.epoch_id())
            .expect("the reader's keys are here");
        same(&*kek, &of("epoch2", "read_kek"));
        same(&two.as_bytes()[392..440], &of("epoch2", "prev_wrap"));
        same(&two.hash(), &of("epoch2", "sha256"));

        let three = two
            .rotate(&keys, &keys3, &new_epoch(3))
            .expect("all keys are here");
        same(&three.as_bytes()[447..511], &of("epoch3", "sig_owner"));
        same(&three.as_bytes()[511..575], &of("epoch3", "sig_prev"));
        same(&three.hash(), &of("epoch3", "sha256"));

        // A reader gets the same key, and can get the previous one from it; a joiner gets none.
        let reader = only(&keys, &[Kind::Sigil, Kind::Shard]).with_backend(backend);
        let joiner = only(&keys, &[Kind::Sigil]).with_backend(backend);
        let opened = two.accept(
            &reader,
            &expected(&two),
            std::slice::from_ref(&one),
            Some(&one),
        );
        let opened = opened.expect("it is valid").expect("readers have a key");
        assert!(opened.is(&key2));
        let older = two.open_previous(&opened, &one).expect("it is valid");
        assert!(older.expect("the history was kept").is(&key));
        assert!(
            two.accept(&joiner, &expected(&two), &[], None)
                .expect("it is valid")
                .is_none()
        );
        assert!(
            three
                .accept(&keys3, &expected(&three), &[], None)
                .expect("it is valid")
                .is_some()
        );

        // The server's checks.
        assert_eq!(read_creation(one.as_bytes(), "alpha").as_ref(), Ok(&one));
        assert_eq!(read_rotation(two.as_bytes(), &one).as_ref(), Ok(&two));
        assert_eq!(read_rotation(three.as_bytes(), &two).as_ref(), Ok(&three));
        assert!(one.is_signed() && two.is_signed_after(&one) && three.is_signed_after(&two));
    });
}

#[test]
fn proofs() {
    let exporter = ChannelBinding::TlsExporter(array("/proofs/tls_exporter"));
    let check = |binding: ChannelBinding, roles: Roles, names: &[&str]| {
        let joining = joining(binding);
        let proof = joining
            .prove(&keys(false), roles)
            .expect("all keys are here");
        let json: serde_json::Value = serde_json::from_str(&proof.to_json()).expect("JSON");
        let transcripts = joining.transcripts(roles);
        for (name, transcript) in names.iter().zip(&transcripts) {
            let of = format!("/proofs/join/{}/{name}", binding.name());
            assert_eq!(
                sha256(transcript),
                text(&format!("{of}/transcript_sha256")),
                "{of}"
            );
            let signature = json[format!("sig_{name}")].as_str().expect("a signature");
            let signature: [u8; 64] = latzero_crypto::text::decode(signature).expect("64 bytes");
            same(&signature, &format!("{of}/signature"));
        }
        assert!(joining.verify(&proof.signatures, Some(descriptor1().keys())));
        assert!(!joining.verify(&proof.signatures, Some(descriptor3().keys())));
        assert!(!joining.verify(&proof.signatures, None));
    };
    check(unix(), Roles::Write, &["join", "read", "write"]);
    check(exporter, Roles::Join, &["join"]);
    check(ChannelBinding::None, Roles::Join, &["join"]);
}

#[test]
fn app_keys() {
    let seed = array("/proofs/app/given/seed");
    let key = AppKey::new(Secret::new(seed));
    assert_eq!(key.to_text().as_str(), text("/proofs/app/expect/text"));
    let read = AppKey::parse(text("/proofs/app/expect/text")).expect("an app key");
    let public = read.signing_key().public().to_bytes();
    same(&public, "/proofs/app/expect/public");
    let (app, exchange) = (text("/proofs/app_id"), exchange(unix()));
    let transcript = proof::app_transcript(app, &public, &exchange);
    assert_eq!(
        sha256(&transcript),
        text("/proofs/app/expect/transcript_sha256")
    );
    let signature = read.signing_key().sign(&transcript);
    same(&signature, "/proofs/app/expect/signature");
    assert!(proof::verify_app(app, &public, &exchange, &signature));
    assert!(!proof::verify_app("app-2", &public, &exchange, &signature));
}

#[test]
fn administrators() {
    let (token, exchange) = (array("/proofs/admin/given/token"), exchange(unix()));
    let client = proof::admin_mac(&token, Side::Client, &exchange);
    let server = proof::admin_mac(&token, Side::Server, &exchange);
    same(&client, "/proofs/admin/expect/client");
    same(&server, "/proofs/admin/expect/server");
    assert!(proof::verify_admin(
        &token,
        Side::Client,
        &exchange,
        &client
    ));
    // A client's proof is not accepted as the server's.
    assert!(!proof::verify_admin(
        &token,
        Side::Server,
        &exchange,
        &client
    ));
    assert!(!proof::verify_admin(
        &token,
        Side::Client,
        &exchange,
        &server
    ));
}

#[test]
fn blocks() {
    on_each(|backend| {
        let expect = |name: &str| format!("/block/expect/{name}");
        let keys = keys(false).with_backend(backend);
        let (id, geometry, plain) = (block_id(), geometry(), plaintext());
        assert_eq!(geometry.capacity(), number(&expect("capacity")));
        assert_eq!(
            geometry.slot_len(plain.len() as u64),
            Some(number(&expect("slot_len")))
        );
        same(&id.name_hash(), &expect("name_hash"));
        let key = ChunkKey::new(&pool_key(&keys, &descriptor1()), &id, 1);
        let version = number("/block/given/version");
        let mut slot = vec![0; usize::try_from(number(&expect("slot_len"))).expect("small")];
        let mut changed = Vec::new();
        for (i, chunk) in (0..).zip(plain.chunks(CHUNK_BYTES)) {
            let nonce = array(&format!("/block/given/chunk_nonces/{i}"));
            let (entry, sealed) = key.seal(i, version, nonce, chunk);
            let of = |name: &str| format!("/block/expect/chunks/{i}/{name}");
            assert_eq!(sha256(&sealed), text(&of("sealed_sha256")));
            same(&sealed[sealed.len() - 16..], &of("tag"));
            same(&entry.leaf, &of("leaf"));
            let at = geometry
                .chunk(i, plain.len() as u64)
                .expect("it has this chunk");
            let start = usize::try_from(at.start).expect("small");
            slot[start..start + sealed.len()].copy_from_slice(&sealed);
            changed.push((i, entry));
        }
        let next = Next {
            id,
            geometry,
            epoch: 1,
            length: plain.len() as u64,
            written_ms: number("/block/given/written_ms"),
            session: array("/block/given/session"),
        };
        let seal = keys.seal_key().expect("all keys are here");
        let version7 = next
            .sign_as(version, None, &changed, &seal)
            .expect("all chunks are here");
        let head = version7.head();
        same(&head[96..128], &expect("root"));
        same(&head[192..256], &expect("signature"));
        same(&version7.manifest().hash(), &expect("manifest_hash"));
        slot[..head.len()].copy_from_slice(&head);
        assert_eq!(sha256(&slot), text(&expect("slot_sha256")));

        // Parsed again, as a reader and the server do.
        let checks = latzero_crypto::block::Checks {
            id,
            geometry,
            epoch: 1,
            min_content_epoch: 0,
        };
        let public = descriptor1().keys().seal;
        let verified = Verified::new(&head, version, &checks, None, |_| Some(public));
        let verified = verified.expect("it is valid");
        let mut read = Vec::new();
        for i in 0..verified.manifest().chunks() {
            let at = geometry
                .chunk(i, verified.manifest().length())
                .expect("it has this chunk");
            let range =
                usize::try_from(at.start).expect("small")..usize::try_from(at.end).expect("small");
            read.extend(
                key.open(&verified, i, slot[range].to_vec())
                    .expect("it is valid"),
            );
        }
        assert_eq!(read, plain);
        let seen = checks.written(&slot, version - 1, &public);
        assert_eq!(
            seen,
            Ok(Seen {
                version,
                hash: array(&expect("manifest_hash"))
            })
        );
        // An empty block.
        let empty = Next {
            length: 0,
            geometry: Geometry::of(0).expect("small"),
            ..next
        };
        let empty = empty.sign(None, &[], &seal).expect("nothing is missing");
        same(&empty.head()[96..128], &expect("empty_root"));
    });
}

#[test]
fn events() {
    on_each(|backend| {
        let descriptor = descriptor1();
        let keys = keys(false).with_backend(backend);
        let key = pool_key(&keys, &descriptor).event_key();
        let writer = keys.seal_key().expect("all keys are here");
        for i in 0..at("/events").as_array().expect("a list").len() {
            let given = |name: &str| format!("/events/{i}/given/{name}");
            let expect = |name: &str| format!("/events/{i}/expect/{name}");
            let signed = at(&format!("/events/{i}/expect"))
                .get("signature")
                .is_some();
            let kind = number(&given("kind"));
            let header = Header {
                suite: Suite::Sealed,
                pool_id: descriptor.pool_id(),
                epoch: 1,
                kind: kind_of(kind),
                session: array(&given("session")),
                seq: number(&given("seq")),
                sent_ms: number(&given("sent_ms")),
                msg_id: array(&given("msg_id")),
                in_reply_to: array(&given("in_reply_to")),
                name: text(&given("name")),
                sender: text(&given("sender")),
                destination: text(&given("destination")),
                expires_ms: number(&given("expires_ms")),
            };
            let meta = at(&given("meta")).as_str();
            let body = Body::Json(text(&given("body")));
            let nonce = array(&given("nonce"));
            let seal = signed.then_some(&writer);
            let sealed = envelope::seal(&header, meta, body, &nonce, &key, seal).expect("small");
            let envelope = Envelope::parse(&sealed).expect("an envelope");
            assert_eq!(envelope.header, header);
            assert_eq!(u64::from(sealed[29]), number(&given("flags")));
            assert_eq!(
                sha256(envelope.header_bytes()),
                text(&expect("header_sha256"))
            );
            let content = envelope.header_bytes().len() + 28;
            let signature = if signed { 64 } else { 0 };
            same(
                &sealed[content..sealed.len() - signature],
                &expect("sealed"),
            );
            if signed {
                same(&sealed[sealed.len() - 64..], &expect("signature"));
            }
            if at(&format!("/events/{i}/expect"))
                .get("envelope_sha256")
                .is_some()
            {
                assert_eq!(sha256(&sealed), text(&expect("envelope_sha256")));
            }
            assert!(latzero_crypto::text::encode(&sealed).starts_with(envelope::TEXT_START));
            let opened = envelope
                .open(&key, &descriptor.keys().seal)
                .expect("it is valid");
            assert_eq!((opened.meta(), opened.body()), (meta, body));
        }
    });
}

fn kind_of(number: u64) -> envelope::Kind {
    use envelope::Kind::*;
    let kinds = [
        Emit,
        Trigger,
        Response,
        PrivilegedEmit,
        PrivilegedTrigger,
        DeferredTrigger,
        DeferredResponse,
    ];
    kinds[usize::try_from(number).expect("small") - 1]
}
