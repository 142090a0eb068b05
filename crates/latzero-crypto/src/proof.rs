//! Proofs: joining a pool, being an app, being an administrator. Each is bound to both nonces, to
//! the server's instance and to the channel, so that nobody can carry it elsewhere.

use std::collections::VecDeque;
use std::sync::LazyLock;

use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use crate::PROTO;
use crate::bytes::Bytes;
use crate::descriptor::{Descriptor, PublicKeys};
use crate::hash;
use crate::keys::{KeyError, KeySet, Kind, Roles};
use crate::sign::{PublicKey, SignatureBytes, SigningKey};
use crate::text;

/// How long a challenge holds.
pub const CHALLENGE_MS: u64 = 30_000;

/// How many challenges for pools a connection has; the oldest is forgotten.
pub const CHALLENGES_MAX: usize = 16;

/// What the channel says of itself to both of its ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelBinding {
    /// Unix socket: who the server is, as the client's kernel says.
    Unix {
        /// The server's user.
        uid: u32,
        /// The server's process.
        pid: u32,
    },
    /// TLS 1.3: the exporter of RFC 9266.
    TlsExporter([u8; 32]),
    /// Nothing. A relay of such a proof cannot be detected.
    None,
}

impl ChannelBinding {
    /// The name on the wire.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            ChannelBinding::Unix { .. } => "unix",
            ChannelBinding::TlsExporter(_) => "tls-exporter",
            ChannelBinding::None => "none",
        }
    }

    fn append(&self, to: Bytes) -> Bytes {
        let data = match self {
            ChannelBinding::Unix { uid, pid } => Bytes::new().u32(*uid).u32(*pid),
            ChannelBinding::TlsExporter(exporter) => Bytes::new().raw(exporter),
            ChannelBinding::None => Bytes::new(),
        };
        to.prefixed(self.name().as_bytes())
            .prefixed(data.as_slice())
    }
}

/// What makes a proof good once, on one channel to one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exchange {
    /// Random, from the client, new for each proof.
    pub client_nonce: [u8; 32],
    /// Random, from the server's challenge.
    pub server_nonce: [u8; 32],
    /// Random, drawn at each start of the server.
    pub server_instance: [u8; 16],
    /// The channel, as this side sees it.
    pub binding: ChannelBinding,
}

impl Exchange {
    fn append(&self, to: Bytes) -> Bytes {
        self.binding.append(
            to.raw(&self.client_nonce)
                .raw(&self.server_nonce)
                .raw(&self.server_instance),
        )
    }
}

/// What a proof for a pool says beside the exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Joining<'a> {
    /// The pool's name.
    pub pool: &'a str,
    /// The challenge's pool id.
    pub pool_id: [u8; 16],
    /// The challenge's epoch.
    pub epoch: u32,
    /// The challenge's suite.
    pub suite: u16,
    /// Who joins.
    pub app_id: &'a str,
    /// The exchange.
    pub exchange: Exchange,
}

/// The signatures of a proof, by role.
#[derive(Clone, Copy)]
enum Role {
    Join,
    Read,
    Write,
}

impl Joining<'_> {
    /// What the key of `role` signs: each signature says which set of roles is asked for.
    fn transcript(&self, role: Role, roles: Roles) -> Bytes {
        let label = match role {
            Role::Join => "auth/join",
            Role::Read => "auth/read",
            Role::Write => "auth/write",
        };
        let head = Bytes::label(label)
            .prefixed(self.pool.as_bytes())
            .raw(&self.pool_id)
            .u32(self.epoch)
            .u16(self.suite)
            .u16(PROTO)
            .u8(roles.number())
            .prefixed(self.app_id.as_bytes());
        self.exchange.append(head)
    }

    /// The transcripts of join, read and write, for vectors.
    #[doc(hidden)]
    #[must_use]
    pub fn transcripts(&self, roles: Roles) -> [Vec<u8>; 3] {
        [Role::Join, Role::Read, Role::Write].map(|role| self.transcript(role, roles).into_vec())
    }

    /// Signs for `roles`.
    ///
    /// # Errors
    /// If a key is missing.
    pub fn prove(&self, keys: &KeySet, roles: Roles) -> Result<JoinProof, KeyError> {
        let sign = |role, key: Option<SigningKey>, kind| {
            let key = key.ok_or(KeyError::Missing(kind))?;
            Ok(key.sign(self.transcript(role, roles).as_slice()))
        };
        let sig_join = sign(Role::Join, keys.join_key(), Kind::Sigil)?;
        let sig_read = match roles {
            Roles::Join => None,
            Roles::Read | Roles::Write => Some(sign(Role::Read, keys.read_key(), Kind::Shard)?),
        };
        let sig_write = match roles {
            Roles::Join | Roles::Read => None,
            Roles::Write => Some(sign(Role::Write, keys.write_key(), Kind::Seal)?),
        };
        Ok(JoinProof {
            client_nonce: self.exchange.client_nonce,
            signatures: Signatures::new(roles, sig_join, sig_read, sig_write)
                .expect("they were made for these roles"),
            cb_type: self.exchange.binding.name().to_owned(),
        })
    }

    /// Whether `signatures` prove their roles in a pool with these public keys. All of them are
    /// verified always; for a name that is unknown (`None`) against keys that nobody has, so that
    /// it takes as long.
    #[must_use]
    pub fn verify(&self, signatures: &Signatures, keys: Option<&PublicKeys>) -> bool {
        let [join, read, write] = keys.map_or(*NOBODYS, |keys| [keys.join, keys.read, keys.write]);
        let roles = signatures.roles();
        let good = |role, key: PublicKey, signature: &SignatureBytes| {
            key.verify(self.transcript(role, roles).as_slice(), signature)
        };
        let results = match signatures {
            Signatures::Join(sig_join) => [good(Role::Join, join, sig_join), true, true],
            Signatures::Read(sig_join, sig_read) => [
                good(Role::Join, join, sig_join),
                good(Role::Read, read, sig_read),
                true,
            ],
            Signatures::Write(sig_join, sig_read, sig_write) => [
                good(Role::Join, join, sig_join),
                good(Role::Read, read, sig_read),
                good(Role::Write, write, sig_write),
            ],
        };
        results == [true; 3] && keys.is_some()
    }
}

/// What the server knows when a proof comes.
#[derive(Debug, Clone, Copy)]
pub struct ProofRequest<'a> {
    /// The pool's name in the request.
    pub pool: &'a str,
    /// Who the connection is.
    pub app_id: &'a str,
    /// The server's own instance.
    pub server_instance: [u8; 16],
    /// The channel, as the server sees it.
    pub binding: ChannelBinding,
    /// The pool's current descriptor; `None` for an unknown name and for a plain pool.
    pub current: Option<&'a Descriptor>,
}

/// Decides on a proof. `challenge` is what [`Challenges::take`] gave. The caller learns whether it
/// is accepted and not why it is refused, and so nobody else learns it.
#[must_use]
pub fn verify_join(
    proof: &JoinProof,
    challenge: Option<Challenge>,
    asked: &ProofRequest<'_>,
) -> Option<Roles> {
    let challenge = challenge?;
    if proof.cb_type != asked.binding.name() {
        return None;
    }
    let joining = Joining {
        pool: asked.pool,
        pool_id: challenge.pool_id,
        epoch: challenge.epoch,
        suite: challenge.suite,
        app_id: asked.app_id,
        exchange: Exchange {
            client_nonce: proof.client_nonce,
            server_nonce: challenge.server_nonce,
            server_instance: asked.server_instance,
            binding: asked.binding,
        },
    };
    let good = joining.verify(&proof.signatures, asked.current.map(Descriptor::keys));
    // A pool that was rotated, or removed and recreated, in between is another than the one that
    // was proved.
    let unchanged = asked.current.is_some_and(|now| {
        (now.pool_id(), now.epoch(), now.suite().number())
            == (challenge.pool_id, challenge.epoch, challenge.suite)
    });
    (good && unchanged).then(|| proof.signatures.roles())
}

/// Public keys whose secret nobody has: hashes that happen to be points.
static NOBODYS: LazyLock<[PublicKey; 3]> = LazyLock::new(|| {
    let mut points = (0..).filter_map(|i| PublicKey::parse(&hash(&Bytes::label("nobody").u32(i))));
    std::array::from_fn(|_| points.next().expect("every second hash is a point"))
});

/// What `pool_challenge` says of a pool that is not there, or is a plain one: the same at each
/// asking.
#[must_use]
pub fn decoy_pool_id(server_secret: &[u8; 32], name: &str) -> [u8; 16] {
    let message = Bytes::label("no-pool").prefixed(name.as_bytes());
    let mac = hmac(server_secret, message.as_slice())
        .finalize()
        .into_bytes();
    mac[..16].try_into().expect("half of a hash")
}

/// The signatures of a proof: exactly those that its roles ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signatures {
    /// For the role join.
    Join(SignatureBytes),
    /// For the roles join and read.
    Read(SignatureBytes, SignatureBytes),
    /// For the roles join, read and write.
    Write(SignatureBytes, SignatureBytes, SignatureBytes),
}

impl Signatures {
    fn new(
        roles: Roles,
        join: SignatureBytes,
        read: Option<SignatureBytes>,
        write: Option<SignatureBytes>,
    ) -> Option<Self> {
        match (roles, read, write) {
            (Roles::Join, None, None) => Some(Signatures::Join(join)),
            (Roles::Read, Some(read), None) => Some(Signatures::Read(join, read)),
            (Roles::Write, Some(read), Some(write)) => Some(Signatures::Write(join, read, write)),
            _ => None,
        }
    }

    /// What they prove.
    #[must_use]
    pub fn roles(&self) -> Roles {
        match self {
            Signatures::Join(_) => Roles::Join,
            Signatures::Read(..) => Roles::Read,
            Signatures::Write(..) => Roles::Write,
        }
    }

    fn parts(
        &self,
    ) -> (
        SignatureBytes,
        Option<SignatureBytes>,
        Option<SignatureBytes>,
    ) {
        match *self {
            Signatures::Join(join) => (join, None, None),
            Signatures::Read(join, read) => (join, Some(read), None),
            Signatures::Write(join, read, write) => (join, Some(read), Some(write)),
        }
    }
}

/// The `proof` of a `pool_join`, as the client sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinProof {
    /// The client's nonce.
    pub client_nonce: [u8; 32],
    /// The signatures, and so the roles.
    pub signatures: Signatures,
    /// The kind of channel binding that it is bound to.
    pub cb_type: String,
}

/// The object on the wire.
#[derive(Serialize, Deserialize)]
struct WireProof {
    client_nonce: String,
    roles: u64,
    sig_join: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sig_read: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sig_write: Option<String>,
    cb_type: String,
}

impl JoinProof {
    /// Reads the object; the error names the field, for `bad_message`.
    ///
    /// # Errors
    /// If a field is missing, has another size, or does not belong to the roles.
    pub fn from_json(json: &str) -> Result<Self, ShapeError> {
        let wire: WireProof = serde_json::from_str(json).map_err(|_| ShapeError("proof"))?;
        let roles = Roles::from_number(wire.roles).ok_or(ShapeError("roles"))?;
        let signature = |text: &str, field| text::decode(text).ok_or(ShapeError(field));
        let sig_read = wire
            .sig_read
            .as_deref()
            .map(|text| signature(text, "sig_read"));
        let sig_write = wire
            .sig_write
            .as_deref()
            .map(|text| signature(text, "sig_write"));
        Ok(JoinProof {
            client_nonce: text::decode(&wire.client_nonce).ok_or(ShapeError("client_nonce"))?,
            signatures: Signatures::new(
                roles,
                signature(&wire.sig_join, "sig_join")?,
                sig_read.transpose()?,
                sig_write.transpose()?,
            )
            .ok_or(ShapeError("roles"))?,
            cb_type: wire.cb_type,
        })
    }

    /// Writes the object.
    #[must_use]
    pub fn to_json(&self) -> String {
        let (join, read, write) = self.signatures.parts();
        let wire = WireProof {
            client_nonce: text::encode(&self.client_nonce),
            roles: self.signatures.roles().number().into(),
            sig_join: text::encode(&join),
            sig_read: read.map(|signature| text::encode(&signature)),
            sig_write: write.map(|signature| text::encode(&signature)),
            cb_type: self.cb_type.clone(),
        };
        serde_json::to_string(&wire).expect("strings and a number")
    }
}

/// A field of a proof that is missing, malformed, or does not belong there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is missing, is not of its size in base64url, or does not fit the roles")]
pub struct ShapeError(pub &'static str);

/// A challenge for a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Challenge {
    /// The server's nonce.
    pub server_nonce: [u8; 32],
    /// What was said of the pool.
    pub pool_id: [u8; 16],
    /// Its epoch then. A rotation in between refuses the proof.
    pub epoch: u32,
    /// Its suite.
    pub suite: u16,
}

/// The challenges of one connection. Each is good for one proof.
#[derive(Debug, Default)]
pub struct Challenges(VecDeque<(String, u64, Challenge)>);

impl Challenges {
    /// Takes down a challenge that is about to be sent. A newer one for the same name takes its
    /// place.
    pub fn put(&mut self, pool: &str, challenge: Challenge, now_ms: u64) {
        self.0.retain(|(name, ..)| name != pool);
        if self.0.len() == CHALLENGES_MAX {
            self.0.pop_front();
        }
        self.0.push_back((pool.to_owned(), now_ms, challenge));
    }

    /// Takes the challenge of a proof, which is spent by it, whatever comes of the proof.
    pub fn take(&mut self, pool: &str, now_ms: u64) -> Option<Challenge> {
        let at = self.0.iter().position(|(name, ..)| name == pool)?;
        let (_, issued_ms, challenge) = self.0.remove(at)?;
        (now_ms.saturating_sub(issued_ms) <= CHALLENGE_MS).then_some(challenge)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What an app signs to be itself.
#[must_use]
pub fn app_transcript(app_id: &str, app_key: &[u8; 32], exchange: &Exchange) -> Vec<u8> {
    let head = Bytes::label("app")
        .prefixed(app_id.as_bytes())
        .raw(app_key)
        .u16(PROTO);
    exchange.append(head).into_vec()
}

/// Whether `signature` proves the app. `app_key` comes from the message; whether it is the app's,
/// the caller knows.
#[must_use]
pub fn verify_app(
    app_id: &str,
    app_key: &[u8; 32],
    exchange: &Exchange,
    signature: &SignatureBytes,
) -> bool {
    let Some(key) = PublicKey::parse(app_key) else {
        return false;
    };
    key.verify(&app_transcript(app_id, app_key, exchange), signature)
}

/// Who speaks, in the mutual proof of administrators.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The client, first.
    Client,
    /// The server, in its reply: without it the client sends no request.
    Server,
}

fn admin_hmac(token: &[u8; 32], side: Side, exchange: &Exchange) -> Hmac<Sha256> {
    let label = match side {
        Side::Client => "admin/client",
        Side::Server => "admin/server",
    };
    let message = exchange.append(Bytes::label(label).u16(PROTO));
    hmac(token, message.as_slice())
}

fn hmac(key: &[u8; 32], message: &[u8]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("a key of any length will do");
    mac.update(message);
    mac
}

/// The MAC by which one side shows that it has the administrators' token.
#[must_use]
pub fn admin_mac(token: &[u8; 32], side: Side, exchange: &Exchange) -> [u8; 32] {
    admin_hmac(token, side, exchange)
        .finalize()
        .into_bytes()
        .into()
}

/// Whether `mac` is that of `side`, compared in constant time.
#[must_use]
pub fn verify_admin(token: &[u8; 32], side: Side, exchange: &Exchange, mac: &[u8; 32]) -> bool {
    admin_hmac(token, side, exchange).verify_slice(mac).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn challenge(byte: u8) -> Challenge {
        Challenge {
            server_nonce: [byte; 32],
            pool_id: [0; 16],
            epoch: 1,
            suite: 1,
        }
    }

    #[test]
    fn a_challenge_is_good_once_and_for_30_seconds() {
        let mut challenges = Challenges::default();
        challenges.put("vault", challenge(1), 1000);
        assert_eq!(challenges.take("other", 1000), None);
        assert_eq!(challenges.take("vault", 31_000), Some(challenge(1)));
        assert_eq!(challenges.take("vault", 31_000), None, "it is spent");
        challenges.put("vault", challenge(2), 1000);
        assert_eq!(challenges.take("vault", 31_001), None, "it is too old");
        assert_eq!(challenges.take("vault", 1000), None, "and spent");
    }

    #[test]
    fn a_newer_challenge_takes_the_place_and_the_oldest_is_forgotten() {
        let mut challenges = Challenges::default();
        challenges.put("p0", challenge(1), 0);
        challenges.put("p0", challenge(2), 0);
        assert_eq!(challenges.len(), 1);
        for i in 1..=CHALLENGES_MAX {
            challenges.put(&format!("p{i}"), challenge(3), 0);
        }
        assert_eq!(challenges.len(), CHALLENGES_MAX);
        assert_eq!(challenges.take("p0", 0), None);
        assert_eq!(challenges.take("p1", 0), Some(challenge(3)));
    }

    #[test]
    fn the_shape_of_a_proof_is_checked_to_the_field() {
        let (sig, nonce) = (text::encode(&[0; 64]), text::encode(&[0; 32]));
        let check = |fields: &str, expected: Result<Roles, &'static str>| {
            let json = format!(r#"{{"cb_type":"unix","client_nonce":"{nonce}",{fields}}}"#);
            let got = JoinProof::from_json(&json).map(|proof| proof.signatures.roles());
            assert_eq!(got, expected.map_err(ShapeError), "{fields}");
        };
        let (join, read) = (
            format!(r#""sig_join":"{sig}""#),
            format!(r#""sig_read":"{sig}""#),
        );
        let write = format!(r#""sig_write":"{sig}""#);
        check(&format!(r#""roles":1,{join}"#), Ok(Roles::Join));
        check(&format!(r#""roles":3,{join},{read}"#), Ok(Roles::Read));
        check(
            &format!(r#""roles":7,{join},{read},{write}"#),
            Ok(Roles::Write),
        );
        for roles in [0, 2, 4, 5, 6, 8, 263] {
            check(
                &format!(r#""roles":{roles},{join},{read},{write}"#),
                Err("roles"),
            );
        }
        check(&format!(r#""roles":1,{join},{read}"#), Err("roles"));
        check(&format!(r#""roles":3,{join}"#), Err("roles"));
        check(&format!(r#""roles":3,{join},{read},{write}"#), Err("roles"));
        check(&format!(r#""roles":7,{join},{write}"#), Err("roles"));
        check(
            &format!(r#""roles":1,"sig_join":"{sig}=""#),
            Err("sig_join"),
        );
        check(
            &format!(r#""roles":1,"sig_join":"{nonce}""#),
            Err("sig_join"),
        );
        check(
            &format!(r#""roles":3,{join},"sig_read":"""#),
            Err("sig_read"),
        );
        check(&format!(r#""roles":-1,{join}"#), Err("proof"));
        check(&format!(r#""roles":"1",{join}"#), Err("proof"));
        check(r#""roles":1"#, Err("proof"));
        check(
            &format!(r#""roles":1,{join},"client_nonce":"x""#),
            Err("proof"),
        );
    }

    #[test]
    fn a_proof_reads_as_it_was_written() {
        let signatures = Signatures::Write([1; 64], [2; 64], [3; 64]);
        let proof = JoinProof {
            client_nonce: [9; 32],
            signatures,
            cb_type: "none".into(),
        };
        assert_eq!(JoinProof::from_json(&proof.to_json()), Ok(proof));
    }

    #[test]
    fn an_unknown_pool_looks_the_same_each_time_and_to_each_name_another() {
        let id = decoy_pool_id(&[7; 32], "vault");
        assert_eq!(id, decoy_pool_id(&[7; 32], "vault"));
        assert_ne!(id, decoy_pool_id(&[7; 32], "vaulT"));
        assert_ne!(id, decoy_pool_id(&[8; 32], "vault"));
    }
}
