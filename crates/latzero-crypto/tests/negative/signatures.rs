//! N11: the edge cases of Ed25519 in which implementations are known to differ.

use curve25519_dalek::constants::{ED25519_BASEPOINT_POINT, EIGHT_TORSION};
use curve25519_dalek::edwards::EdwardsPoint;
use curve25519_dalek::scalar::Scalar;
use latzero_crypto::keys::Roles;
use latzero_crypto::sign::{PublicKey, SigningKey};
use sha2::{Digest as _, Sha512};

use crate::common::*;

/// The order of the base point, little-endian.
const ORDER: [u8; 32] = [
    0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
];

/// A number below 32 in a non-canonical encoding: p + `small`, with a sign bit.
fn not_canonical(small: u8, sign: bool) -> [u8; 32] {
    let mut bytes = [0xff; 32];
    bytes[0] = 0xed + small;
    bytes[31] = if sign { 0xff } else { 0x7f };
    bytes
}

/// Public keys that must be refused, although some implementations decode them.
pub(crate) fn bad_public_keys() -> Vec<[u8; 32]> {
    let mut bad: Vec<_> = EIGHT_TORSION
        .iter()
        .map(|point| point.compress().to_bytes())
        .collect();
    // The same points with a sign bit that zero does not have, and unreduced numbers.
    bad.push({
        let mut minus_zero = [0; 32];
        (minus_zero[0], minus_zero[31]) = (1, 0x80);
        minus_zero
    });
    bad.extend(
        (0..=0x12).flat_map(|small| [not_canonical(small, false), not_canonical(small, true)]),
    );
    // Not on the curve.
    bad.push({
        let mut off = [0; 32];
        off[0] = 2;
        off
    });
    bad
}

/// Adds the order to the number in the second half.
fn plus_order(signature: &[u8; 64], times: u32) -> [u8; 64] {
    let mut out = *signature;
    for _ in 0..times {
        let mut carry = 0;
        for (byte, order) in out[32..].iter_mut().zip(ORDER) {
            let sum = u16::from(*byte) + u16::from(order) + carry;
            *byte = sum.to_le_bytes()[0];
            carry = sum >> 8;
        }
    }
    out
}

fn challenge(r: &EdwardsPoint, a: &EdwardsPoint, message: &[u8]) -> Scalar {
    let hash = Sha512::new()
        .chain_update(r.compress().as_bytes())
        .chain_update(a.compress().as_bytes())
        .chain_update(message);
    Scalar::from_bytes_mod_order_wide(&hash.finalize().into())
}

#[test]
fn n11_public_keys_of_small_order_or_in_another_encoding_are_refused() {
    for bad in bad_public_keys() {
        assert_eq!(PublicKey::parse(&bad), None, "{}", hex(&bad));
    }
    let good = SigningKey::from_seed(&[1; 32]).public();
    assert_eq!(PublicKey::parse(&good.to_bytes()), Some(good));
}

#[test]
fn n11_the_vectors_of_lax_verification_are_refused() {
    let joining = joining(unix());
    // They are for the transcript with roles 7.
    let [transcript, ..] = joining.transcripts(Roles::Write);
    let join = descriptor1().keys().join;
    same(&join.to_bytes(), "/keys/expect/pk_join");
    assert!(join.verify(&transcript, &array("/proofs/join/unix/join/signature")));
    assert!(!join.verify(&transcript, &array("/must_fail/signature_with_s_plus_l")));
    assert!(!join.verify(
        &transcript,
        &array("/must_fail/signature_with_small_order_r")
    ));
    assert_eq!(
        PublicKey::parse(&array("/must_fail/small_order_key/key")),
        None
    );
}

#[test]
fn n11_a_number_above_the_order_is_refused() {
    let key = SigningKey::from_seed(&[1; 32]);
    let signature = key.sign(b"message");
    assert!(key.public().verify(b"message", &signature));
    for times in 1..15 {
        let malleated = plus_order(&signature, times);
        assert_ne!(malleated, signature);
        assert!(!key.public().verify(b"message", &malleated), "{times}");
    }
    for high in 1..8u8 {
        let mut malleated = signature;
        malleated[63] |= high << 5;
        assert!(!key.public().verify(b"message", &malleated), "{high}");
    }
    let mut order = signature;
    order[32..].copy_from_slice(&ORDER);
    assert!(!key.public().verify(b"message", &order));
    order[32..].fill(0xff);
    assert!(!key.public().verify(b"message", &order));
}

#[test]
fn n11_points_of_small_order_in_a_signature_are_refused() {
    // A signature that satisfies the equation: R of small order, S computed to match.
    let secret = Scalar::from(12_345u64);
    let a = secret * ED25519_BASEPOINT_POINT;
    let key = PublicKey::parse(a.compress().as_bytes()).expect("a point of large order");
    let mut fitting = 0;
    for torsion in EIGHT_TORSION {
        for message in 0..64u8 {
            let k = challenge(&torsion, &a, &[message]);
            let s = k * secret;
            let difference = s * ED25519_BASEPOINT_POINT - k * a - torsion;
            fitting += u32::from(difference.is_small_order());
            let mut signature = [0; 64];
            signature[..32].copy_from_slice(torsion.compress().as_bytes());
            signature[32..].copy_from_slice(s.as_bytes());
            assert!(!key.verify(&[message], &signature));
        }
    }
    assert_eq!(
        fitting,
        8 * 64,
        "a verification with the cofactor would take all of them"
    );
    // R in another encoding.
    for small in 0..=0x12 {
        for sign in [false, true] {
            let mut signature = SigningKey::from_seed(&[1; 32]).sign(b"x");
            signature[..32].copy_from_slice(&not_canonical(small, sign));
            assert!(
                !SigningKey::from_seed(&[1; 32])
                    .public()
                    .verify(b"x", &signature)
            );
        }
    }
}

#[test]
fn n11_a_signature_that_satisfies_only_the_cofactored_equation_is_refused() {
    // A public key with a component of small order is acceptable, but its signatures must be valid
    // without the cofactor.
    let (secret, nonce) = (Scalar::from(77u64), Scalar::from(99u64));
    let a = secret * ED25519_BASEPOINT_POINT + EIGHT_TORSION[1];
    let key = PublicKey::parse(a.compress().as_bytes()).expect("a point of large order");
    let r = nonce * ED25519_BASEPOINT_POINT;
    let (mut taken, mut refused) = (0, 0);
    for message in 0..64u8 {
        let k = challenge(&r, &a, &[message]);
        let s = nonce + k * secret;
        let mut signature = [0; 64];
        signature[..32].copy_from_slice(r.compress().as_bytes());
        signature[32..].copy_from_slice(s.as_bytes());
        let fits = s * ED25519_BASEPOINT_POINT == r + k * a;
        assert_eq!(key.verify(&[message], &signature), fits, "{message}");
        if fits { taken += 1 } else { refused += 1 }
    }
    assert!(taken > 0 && refused > 0, "{taken} and {refused}");
}

#[test]
fn any_changed_bit_makes_the_signature_invalid() {
    let key = SigningKey::from_seed(&[1; 32]);
    let signature = key.sign(b"message");
    for bit in 0..512 {
        let mut changed = signature;
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(!key.public().verify(b"message", &changed), "bit {bit}");
    }
    assert!(!key.public().verify(b"massage", &signature));
    assert!(
        !SigningKey::from_seed(&[2; 32])
            .public()
            .verify(b"message", &signature)
    );
    assert!(!key.public().verify(b"message", &[0; 64]));
}
