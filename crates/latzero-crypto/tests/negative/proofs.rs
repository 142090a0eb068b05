//! N10: proofs.

use latzero_crypto::descriptor::Descriptor;
use latzero_crypto::keys::{KeyError, Kind, Roles};
use latzero_crypto::proof::{
    Challenge, Challenges, ChannelBinding, JoinProof, Joining, ProofRequest, Side, Signatures,
    admin_mac, app_transcript, verify_admin, verify_app, verify_join,
};
use latzero_crypto::sign::SigningKey;

use crate::common::*;

fn challenge() -> Challenge {
    let joining = joining(unix());
    Challenge {
        server_nonce: joining.exchange.server_nonce,
        pool_id: joining.pool_id,
        epoch: joining.epoch,
        suite: joining.suite,
    }
}

fn asked(current: Option<&Descriptor>) -> ProofRequest<'_> {
    let joining = joining(unix());
    ProofRequest {
        pool: joining.pool,
        app_id: joining.app_id,
        server_instance: joining.exchange.server_instance,
        binding: joining.exchange.binding,
        current,
    }
}

fn prove(joining: &Joining<'_>, roles: Roles) -> JoinProof {
    joining
        .prove(&keys(false), roles)
        .expect("all keys are here")
}

#[test]
fn n10_a_proof_is_valid_only_for_what_it_states() {
    let current = descriptor1();
    let good = joining(unix());
    let decide = |proof: &JoinProof| verify_join(proof, Some(challenge()), &asked(Some(&current)));
    for roles in [Roles::Join, Roles::Read, Roles::Write] {
        assert_eq!(decide(&prove(&good, roles)), Some(roles));
    }
    // Signed for other values than the server sees.
    let mut others = vec![
        Joining {
            app_id: "app-2",
            ..good
        },
        Joining {
            pool: "beta",
            ..good
        },
        Joining {
            pool_id: [0; 16],
            ..good
        },
        Joining { epoch: 2, ..good },
        Joining {
            suite: 0x0101,
            ..good
        },
        joining(ChannelBinding::Unix {
            uid: 1001,
            pid: 4242,
        }),
        joining(ChannelBinding::Unix {
            uid: 1000,
            pid: 4243,
        }),
        joining(ChannelBinding::None),
        joining(ChannelBinding::TlsExporter([0; 32])),
    ];
    for change in 0..2 {
        let mut other = good;
        match change {
            0 => other.exchange.server_nonce[31] ^= 1,
            _ => other.exchange.server_instance[0] ^= 1,
        }
        others.push(other);
    }
    for other in others {
        assert_eq!(decide(&prove(&other, Roles::Write)), None, "{other:?}");
        // Also if it claims to be for this transport.
        let claimed = JoinProof {
            cb_type: "unix".into(),
            ..prove(&other, Roles::Write)
        };
        assert_eq!(decide(&claimed), None, "{other:?}");
    }
    // Valid, but for another transport.
    let proof = JoinProof {
        cb_type: "none".into(),
        ..prove(&good, Roles::Join)
    };
    assert_eq!(decide(&proof), None);
    // Another nonce than the one that was signed.
    let proof = JoinProof {
        client_nonce: [0; 32],
        ..prove(&good, Roles::Join)
    };
    assert_eq!(decide(&proof), None);
}

#[test]
fn n10_a_signature_for_one_role_is_invalid_for_another() {
    let current = descriptor1();
    let decide = |signatures: Signatures| {
        let proof = JoinProof {
            signatures,
            ..prove(&joining(unix()), Roles::Join)
        };
        verify_join(&proof, Some(challenge()), &asked(Some(&current)))
    };
    let Signatures::Write(join, read, write) = prove(&joining(unix()), Roles::Write).signatures
    else {
        panic!("it was created for all roles");
    };
    let Signatures::Join(join_alone) = prove(&joining(unix()), Roles::Join).signatures else {
        panic!("it was created for one role");
    };
    assert_eq!(
        decide(Signatures::Write(join, read, write)),
        Some(Roles::Write)
    );
    for signatures in [
        Signatures::Write(join, read, join),
        Signatures::Write(join, join, write),
        Signatures::Write(read, read, write),
        Signatures::Write(join, write, read),
        Signatures::Write(join_alone, read, write),
        // The roles are signed: fewer of them need other signatures.
        Signatures::Read(join, read),
        Signatures::Join(join),
    ] {
        assert_eq!(decide(signatures), None, "{:?}", signatures.roles());
    }
}

#[test]
fn n10_a_challenge_is_used_up_and_expires() {
    let current = descriptor1();
    let mut challenges = Challenges::default();
    let proof = prove(&joining(unix()), Roles::Join);
    challenges.put("alpha", challenge(), 0);
    let taken = challenges.take("alpha", 30_000);
    assert_eq!(
        verify_join(&proof, taken, &asked(Some(&current))),
        Some(Roles::Join)
    );
    let again = challenges.take("alpha", 30_000);
    assert_eq!(verify_join(&proof, again, &asked(Some(&current))), None);
    challenges.put("alpha", challenge(), 0);
    let late = challenges.take("alpha", 31_000);
    assert_eq!(verify_join(&proof, late, &asked(Some(&current))), None);
}

#[test]
fn n10_a_rotation_in_between_refuses() {
    let proof = prove(&joining(unix()), Roles::Join);
    // The keys are the same, but the epoch is not.
    assert_eq!(
        verify_join(&proof, Some(challenge()), &asked(Some(&descriptor2()))),
        None
    );
    assert_eq!(verify_join(&proof, Some(challenge()), &asked(None)), None);
}

#[test]
fn a_role_cannot_be_proved_without_its_key() {
    let joiner = only(&keys(false), &[Kind::Sigil]);
    let reader = only(&keys(false), &[Kind::Sigil, Kind::Shard]);
    let writer = only(&keys(false), &[Kind::Shard, Kind::Seal]);
    let joining = joining(unix());
    let prove = |keys, roles| joining.prove(keys, roles).err();
    assert_eq!(prove(&joiner, Roles::Join), None);
    assert_eq!(
        prove(&joiner, Roles::Read),
        Some(KeyError::Missing(Kind::Shard))
    );
    assert_eq!(
        prove(&reader, Roles::Write),
        Some(KeyError::Missing(Kind::Seal))
    );
    assert_eq!(
        prove(&writer, Roles::Join),
        Some(KeyError::Missing(Kind::Sigil))
    );
    assert_eq!(writer.roles(), None);
}

#[test]
fn an_app_s_proof_is_bound_to_all_of_it() {
    let key = SigningKey::from_seed(&[5; 32]);
    let public = key.public().to_bytes();
    let good = exchange(unix());
    let signature = key.sign(&app_transcript("app-1", &public, &good));
    assert!(verify_app("app-1", &public, &good, &signature));
    let mut other = good;
    other.client_nonce[0] ^= 1;
    assert!(!verify_app("app-1", &public, &other, &signature));
    assert!(!verify_app(
        "app-1",
        &public,
        &exchange(ChannelBinding::None),
        &signature
    ));
    assert!(!verify_app("app-1", &[0; 32], &good, &signature));
    // Lengths precede names, so that no other name gives the same bytes.
    assert!(!verify_app("app-", &public, &good, &signature));
    for bad in crate::signatures::bad_public_keys() {
        assert!(!verify_app("app-1", &bad, &good, &signature));
    }
}

#[test]
fn an_administrator_s_proof_is_bound_to_all_of_it() {
    let (token, good) = ([3; 32], exchange(unix()));
    let mac = admin_mac(&token, Side::Client, &good);
    assert!(verify_admin(&token, Side::Client, &good, &mac));
    assert!(!verify_admin(&[4; 32], Side::Client, &good, &mac));
    assert!(!verify_admin(
        &token,
        Side::Client,
        &exchange(ChannelBinding::None),
        &mac
    ));
    for bit in 0..256 {
        let mut changed = mac;
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(
            !verify_admin(&token, Side::Client, &good, &changed),
            "bit {bit}"
        );
    }
}
