"""Checks encrypted pools without a line of LatZero's own code.

    check.py vectors FILE     computes every vector of FILE anew
    check.py open < JSON      opens what a pool made: {"tokens": [...], "name": "...",
                              "descriptors": [hex...], "slots": [{"name", "uid", "hex"}...],
                              "envelopes": [hex...]}; prints what was in it

Needs Python 3.9 and the packages of requirements.txt. It is written from the description of the
formats, for reading rather than for speed, and checks less than a client must: who uses it has
the keys.
"""

import base64
import hashlib
import hmac
import json
import struct
import sys

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

CHUNK = 65536
PREFIXES = {"sigil": "lzs1_", "shard": "lzc1_", "seal": "lzo1_", "owner": "lzw1_"}


class Refused(Exception):
    """Something does not verify."""


def need(condition, what):
    if not condition:
        raise Refused(what)


# --- encoding -----------------------------------------------------------------------------------


def label(purpose):
    return b"latzero/v1/" + purpose.encode() + b"\0"


def lp(data):
    return struct.pack(">I", len(data)) + data


def sha256(data):
    return hashlib.sha256(data).digest()


def b64(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        need(self.at + n <= len(self.data), "cut off")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code):
        return struct.unpack(">" + code, self.take(struct.calcsize(">" + code)))[0]

    def prefixed(self):
        return self.take(self.number("I"))

    def end(self):
        need(self.at == len(self.data), "bytes follow the end")


# --- primitives ---------------------------------------------------------------------------------


def derive(salt, ikm, info):
    return HKDF(hashes.SHA256(), 32, salt, info).derive(ikm)


def expand(key, info):
    return HKDFExpand(hashes.SHA256(), 32, info).derive(key)


def aes_block(key, block):
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return encryptor.update(block) + encryptor.finalize()


def xaes(key, nonce):
    doubled = int.from_bytes(aes_block(key, bytes(16)), "big") << 1
    if doubled >> 128:
        doubled = (doubled & ((1 << 128) - 1)) ^ 0x87
    k1 = doubled.to_bytes(16, "big")
    halves = []
    for i in (1, 2):
        block = bytes([0, i, 0x58, 0]) + nonce[:12]
        halves.append(aes_block(key, bytes(a ^ b for a, b in zip(block, k1))))
    return AESGCM(b"".join(halves)), nonce[12:]


def seal(key, nonce, plain, aad):
    gcm, rest = xaes(key, nonce)
    return gcm.encrypt(rest, plain, aad)


def unseal(key, nonce, sealed, aad):
    gcm, rest = xaes(key, nonce)
    try:
        return gcm.decrypt(rest, sealed, aad)
    except InvalidTag:
        raise Refused("the seal is broken") from None


def signer(seed):
    return Ed25519PrivateKey.from_private_bytes(seed)


def public(key):
    return key.public_key().public_bytes_raw()


P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P


def point(data):
    """Decodes a point by the strict rules: on the curve, in its only encoding."""
    number = int.from_bytes(data, "little")
    sign, y = number >> 255, number & ((1 << 255) - 1)
    need(y < P, "a point is not canonical")
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    need((x * x - square) % P == 0, "a point is not on the curve")
    need(x or not sign, "a point is not canonical")
    return (P - x if x & 1 != sign else x), y


def add(a, b):
    (x1, y1), (x2, y2) = a, b
    t = D * x1 * x2 * y1 * y2 % P
    return (
        (x1 * y2 + x2 * y1) * pow(1 + t, -1, P) % P,
        (y1 * y2 + x1 * x2) * pow(1 - t, -1, P) % P,
    )


def check_point(data):
    eighth = point(data)
    for _ in range(3):
        eighth = add(eighth, eighth)
    need(eighth != (0, 1), "a point has small order")


def verify(key, message, signature):
    check_point(key)
    check_point(signature[:32])
    need(int.from_bytes(signature[32:], "little") < ORDER, "a signature is malleable")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except InvalidSignature:
        raise Refused("a signature is wrong") from None


# --- keys ---------------------------------------------------------------------------------------


class Keys:
    """What somebody holds: sigil, shard, seal, owner; those that are not there are None."""

    def __init__(self, sigil=None, shard=None, seal=None, owner=None, pin=None):
        self.sigil, self.shard, self.seal, self.owner, self.pin = sigil, shard, seal, owner, pin

    @classmethod
    def of_tokens(cls, tokens):
        held, pins = {}, set()
        for token in tokens:
            kind = next((k for k, p in PREFIXES.items() if token.startswith(p)), None)
            need(kind and kind not in held and len(token) == 75, "not a token, or twice")
            raw = base64.urlsafe_b64decode(token[5:] + "=" * (-len(token[5:]) % 4))
            need(b64(raw) == token[5:], "not a token")
            need(sha256(token[:5].encode() + raw[:48])[:4] == raw[48:], "the checksum is wrong")
            held[kind] = raw[:32]
            pins.add(raw[32:48])
        need(len(pins) == 1, "tokens of several owners")
        return cls(**held, pin=pins.pop())

    def token(self, kind, pin):
        prefix = PREFIXES[kind]
        body = getattr(self, kind) + pin
        return prefix + b64(body + sha256(prefix.encode() + body)[:4])

    def ikm2(self):
        return lp(self.sigil) + lp(self.shard)

    def ikm3(self):
        return self.ikm2() + lp(self.seal)

    def key(self, purpose):
        secret = {
            "sig/join": lambda: self.sigil,
            "sig/read": lambda: self.shard,
            "sig/write": lambda: self.seal,
            "sig/seal": lambda: self.seal,
            "sig/owner": lambda: self.owner or self.ikm3(),
        }[purpose]()
        return signer(derive(bytes(32), secret, label(purpose)))

    def pool_key(self, salt, pool_id, epoch):
        return derive(salt, self.ikm3(), label("pool-key") + pool_id + struct.pack(">I", epoch))

    def read_kek(self, salt, pool_id, epoch):
        return derive(salt, self.ikm2(), label("read-kek") + pool_id + struct.pack(">I", epoch))


def pin_of(owner):
    return sha256(label("pin") + owner)[:16]


# --- descriptors --------------------------------------------------------------------------------


def make_descriptor(keys, given, name, pool_id, epoch, suite, previous=None, old_owner=None):
    salt, pool_key = given["salt"], keys.pool_key(given["salt"], pool_id, epoch)
    bound = b"LZPD" + struct.pack(">HH", 1, suite) + pool_id
    bound += struct.pack(">IIQ", epoch, given["min_content_epoch"], given["created_ms"]) + salt
    for purpose in ("sig/owner", "sig/join", "sig/read", "sig/write", "sig/seal"):
        bound += public(keys.key(purpose))
    bound += expand(pool_key, label("key-check"))
    bound += sha256(previous[0]) if previous else bytes(32)
    kek = keys.read_kek(salt, pool_id, epoch)
    nonce = given["wrap_nonce"]
    body = bound + nonce + seal(kek, nonce, pool_key, label("wrap") + bound)
    if previous:
        nonce = given["prev_nonce"]
        kek = expand(pool_key, label("prev-wrap"))
        body += nonce + seal(kek, nonce, previous[1], label("prev-wrap") + bound)
    else:
        body += bytes(72)
    body += struct.pack(">H", len(name)) + name
    message = label("descriptor") + body
    body += keys.key("sig/owner").sign(message)
    return body + (old_owner.sign(message) if old_owner else bytes(64)), pool_key


class Descriptor:
    def __init__(self, data):
        self.data = data
        r = Reader(data)
        need(r.take(4) == b"LZPD" and r.number("H") == 1, "no descriptor")
        self.suite, self.pool_id = r.number("H"), r.take(16)
        self.epoch, self.min_content_epoch, self.created_ms = (
            r.number("I"),
            r.number("I"),
            r.number("Q"),
        )
        self.salt = r.take(32)
        self.owner, self.join, self.read, self.write, self.seal = (r.take(32) for _ in range(5))
        self.kcv, self.prev_hash = r.take(32), r.take(32)
        self.wrap, self.prev_wrap = r.take(72), r.take(72)
        self.name = r.take(r.number("H")).decode()
        self.sig_owner, self.sig_prev = r.take(64), r.take(64)
        r.end()
        self.message = label("descriptor") + data[:-128]
        verify(self.owner, self.message, self.sig_owner)

    def open(self, keys):
        kek = keys.read_kek(self.salt, self.pool_id, self.epoch)
        aad = label("wrap") + self.data[:296]
        key = unseal(kek, self.wrap[:24], self.wrap[24:], aad)
        need(expand(key, label("key-check")) == self.kcv, "another pool key")
        return key

    def open_previous(self, key, previous):
        need(sha256(previous.data) == self.prev_hash, "another descriptor before")
        aad = label("prev-wrap") + self.data[:296]
        kek = expand(key, label("prev-wrap"))
        opened = unseal(kek, self.prev_wrap[:24], self.prev_wrap[24:], aad)
        need(expand(opened, label("key-check")) == previous.kcv, "another pool key")
        return opened

    def check_succession(self, previous):
        need(self.epoch == previous.epoch + 1, "an epoch is missing")
        need(self.prev_hash == sha256(previous.data), "another descriptor before")
        same = (self.pool_id, self.suite, self.name)
        need(same == (previous.pool_id, previous.suite, previous.name), "another pool")
        need(self.min_content_epoch >= previous.min_content_epoch, "old content comes back")
        verify(previous.owner, self.message, self.sig_prev)


# --- proofs -------------------------------------------------------------------------------------


def exchange(given, binding, data):
    nonces = given["client_nonce"] + given["server_nonce"] + given["server_instance"]
    return nonces + lp(binding.encode()) + lp(data)


def join_transcript(role, name, pool_id, epoch, suite, roles, app_id, tail):
    head = label("auth/" + role) + lp(name) + pool_id
    head += struct.pack(">IHHB", epoch, suite, 1, roles)
    return head + lp(app_id.encode()) + tail


# --- blocks -------------------------------------------------------------------------------------


def chunk_aad(pool_id, epoch, uid, i, version, length):
    place = struct.pack(">IQI", i, version, length)
    return label("chunk") + pool_id + struct.pack(">I", epoch) + uid + place


def leaf(i, version, nonce, sealed):
    return sha256(label("leaf") + struct.pack(">IQ", i, version) + nonce + lp(sealed))


def root(leaves):
    return sha256(label("root") + struct.pack(">I", len(leaves)) + b"".join(leaves))


def name_hash(pool_id, name):
    return sha256(label("block-name") + pool_id + lp(name.encode()))


def first_chunk_at(size):
    chunks = -(-size // CHUNK)
    return 4096 * -(-(256 + 64 * chunks) // 4096)


def read_slot(slot, size, name, uid, descriptors, keys_by_epoch):
    r = Reader(slot[:256])
    need(r.take(4) == b"LZMF" and r.number("H") == 1, "no manifest")
    suite, pool_id, block = r.number("H"), r.take(16), r.take(16)
    epoch, chunk_size = r.number("I"), r.number("I")
    version, length = r.number("Q"), r.number("Q")
    count, flags, _written, _session = r.number("I"), r.number("I"), r.number("Q"), r.take(16)
    root_, _previous, hash_, signature = r.take(32), r.take(32), r.take(32), r.take(64)
    descriptor = descriptors[epoch]
    need((suite, pool_id, block) == (descriptor.suite, descriptor.pool_id, uid), "another block")
    need(chunk_size == CHUNK and flags == 0 and count == -(-length // CHUNK), "a bad layout")
    need(hash_ == name_hash(pool_id, name), "another name")
    verify(descriptor.seal, label("manifest") + slot[:192], signature)
    table = [slot[256 + 64 * i :][:64] for i in range(count)]
    need(root_ == root([line[32:] for line in table]), "another table")
    key = expand(keys_by_epoch[epoch], label("block") + uid)
    plain, start = b"", first_chunk_at(size)
    for i, line in enumerate(table):
        written, nonce = struct.unpack(">Q", line[:8])[0], line[8:32]
        need(1 <= written <= version, "a chunk is newer than its block")
        bytes_ = min(CHUNK, length - CHUNK * i)
        sealed = slot[start + 65552 * i :][: bytes_ + 16]
        need(leaf(i, written, nonce, sealed) == line[32:], "another chunk")
        aad = chunk_aad(pool_id, epoch, uid, i, written, bytes_)
        plain += unseal(key, nonce, sealed, aad)
    return plain


# --- events -------------------------------------------------------------------------------------


def open_envelope(data, descriptors, keys_by_epoch):
    r = Reader(data)
    need(r.take(4) == b"LZEV" and r.number("H") == 1, "no envelope")
    suite, pool_id, epoch = r.number("H"), r.take(16), r.number("I")
    kind, flags, zero = r.number("B"), r.number("B"), r.number("H")
    session, seq, sent_ms = r.take(16), r.number("Q"), r.number("Q")
    msg_id, in_reply_to = r.take(16), r.take(16)
    name, sender, destination = (r.prefixed().decode() for _ in range(3))
    expires_ms = r.number("Q") if kind in (6, 7) else 0
    header = data[: r.at]
    nonce, sealed = r.take(24), r.prefixed()
    descriptor = descriptors[epoch]
    need((suite, pool_id, zero) == (descriptor.suite, descriptor.pool_id, 0), "another pool")
    need((in_reply_to != bytes(16)) == (kind in (3, 7)) and seq > 0, "a bad header")
    if kind in (4, 5) or flags & 4:
        message = label("event-sig") + header + nonce + sha256(sealed)
        verify(descriptor.seal, message, r.take(64))
    r.end()
    key = expand(keys_by_epoch[epoch], label("event"))
    plain = unseal(key, nonce, sealed, label("event-aad") + header)
    meta = None
    if flags & 1:
        meta = Reader(plain).prefixed()
        plain = plain[4 + len(meta) :]
        need(isinstance(json.loads(meta), dict), "meta is no object")
    return {
        "kind": kind,
        "name": name,
        "sender": sender,
        "destination": destination,
        "seq": seq,
        "sent_ms": sent_ms,
        "expires_ms": expires_ms,
        "session": session.hex(),
        "msg_id": msg_id.hex(),
        "in_reply_to": in_reply_to.hex(),
        "meta": meta and meta.decode(),
        "body": plain.hex(),
    }


# --- vectors ------------------------------------------------------------------------------------


def unhexed(given):
    """Hex of 16 bytes and more becomes bytes."""
    is_hex = lambda v: isinstance(v, str) and len(v) >= 32 and not set(v) - set("0123456789abcdef")
    return {k: bytes.fromhex(v) if is_hex(v) else v for k, v in given.items()}


class Vectors:
    def __init__(self, path):
        with open(path, encoding="utf-8") as file:
            self.v = json.load(file)
        self.checked = 0

    def same(self, got, wanted, what):
        got = got.hex() if isinstance(got, bytes) else got
        if got != wanted:
            raise Refused(f"{what}: {got} instead of {wanted}")
        self.checked += 1

    def refused(self, what, test):
        try:
            test()
        except Refused:
            self.checked += 1
            return
        raise Refused(f"{what} was accepted")

    def run(self):
        self.ciphers()
        self.keys()
        self.descriptors()
        self.proofs()
        self.block()
        self.events()
        return self.checked

    def ciphers(self):
        for i, v in enumerate(self.v["xaes_256_gcm"]):
            key, nonce, plain, aad = (
                bytes.fromhex(v[k]) for k in ("key", "nonce", "plaintext", "aad")
            )
            self.same(seal(key, nonce, plain, aad), v["sealed"], f"xaes {i}")
        stream = hashlib.shake_128(b"").digest(10_000 * (32 + 24 + 2 + 2 * 255))
        r, sealed = Reader(stream), []
        accumulated = self.v["xaes_256_gcm_accumulated"]
        for _ in range(accumulated["rounds"]):
            key, nonce = r.take(32), r.take(24)
            plain = r.take(r.number("B"))
            aad = r.take(r.number("B"))
            sealed.append(seal(key, nonce, plain, aad))
        got = hashlib.shake_128(b"".join(sealed)).digest(32)
        self.same(got, accumulated["shake128"], "xaes accumulated")

        given, expect = self.v["passphrase"]["given"], self.v["passphrase"]["expect"]
        salt = label("passphrase") + bytes([given["role"]]) + lp(given["pool"].encode())
        salt = sha256(salt)[:16]
        self.same(salt, expect["salt"], "passphrase salt")
        kdf = Argon2id(salt=salt, length=32, iterations=3, lanes=4, memory_cost=65536)
        self.same(kdf.derive(given["passphrase"].encode()), expect["key"], "passphrase key")

    def keys(self):
        given, expect = unhexed(self.v["keys"]["given"]), self.v["keys"]["expect"]
        three = (given["sigil_key"], given["cipher_shard"], given["oblivion_seal"])
        self.plain, self.owned = Keys(*three), Keys(*three, owner=given["owner_key"])
        for role in ("owner", "join", "read", "write", "seal"):
            got = public(self.plain.key("sig/" + role))
            self.same(got, expect["pk_" + role], role)
        owner = public(self.owned.key("sig/owner"))
        self.same(owner, expect["pk_owner_w"], "owner key")
        pin, pin_w = pin_of(public(self.plain.key("sig/owner"))), pin_of(owner)
        self.same(pin, expect["pin"], "pin")
        self.same(pin_w, expect["pin_w"], "pin of the owner key")
        for kind in ("sigil", "shard", "seal"):
            self.same(self.plain.token(kind, pin), expect["token_" + kind], kind)
        self.same(self.owned.token("owner", pin_w), expect["token_owner"], "owner token")
        self.same(self.owned.token("sigil", pin_w), expect["token_sigil_w"], "sigil token")
        self.refused("two pins", lambda: Keys.of_tokens(
            [expect["token_shard"], expect["token_sigil_w"]]
        ))

    def descriptors(self):
        d = self.v["descriptors"]
        name, pool_id = d["pool"]["name"].encode(), bytes.fromhex(d["pool"]["pool_id"])
        self.name, self.pool_id = name, pool_id
        one, expect = unhexed(d["epoch1"]["given"]), d["epoch1"]["expect"]
        first = make_descriptor(self.plain, one, name, pool_id, 1, 1)
        self.pool_key = first[1]
        self.same(first[1], expect["pool_key"], "pool key")
        kek = self.plain.read_kek(one["salt"], pool_id, 1)
        self.same(kek, expect["read_kek"], "read kek")
        self.same(first[0][232:264], expect["check_value"], "check value")
        self.same(expand(first[1], label("event")), expect["event_key"], "event key")
        uid = bytes.fromhex(self.v["block"]["given"]["block_id"])
        self.same(expand(first[1], label("block") + uid), expect["block_key"], "block key")
        self.same(first[0][320:368], expect["wrap"], "wrap")
        self.same(first[0][447:511], expect["sig_owner"], "sig_owner")
        self.same(len(first[0]), expect["bytes"], "length")
        self.same(sha256(first[0]), expect["sha256"], "epoch 1")
        gated = make_descriptor(self.plain, one, name, pool_id, 1, 0x0101)
        self.same(sha256(gated[0]), d["epoch1_gated"]["expect"]["sha256"], "gated")

        two, expect = unhexed(d["epoch2"]["given"]), d["epoch2"]["expect"]
        owner = self.plain.key("sig/owner")
        second = make_descriptor(self.plain, two, name, pool_id, 2, 1, first, owner)
        self.same(second[1], expect["pool_key"], "pool key of epoch 2")
        kek = self.plain.read_kek(two["salt"], pool_id, 2)
        self.same(kek, expect["read_kek"], "read kek of epoch 2")
        self.same(second[0][392:440], expect["prev_wrap"], "prev wrap")
        self.same(sha256(second[0]), expect["sha256"], "epoch 2")

        three, expect = unhexed(d["epoch3"]["given"]), d["epoch3"]["expect"]
        keys = Keys(three["sigil_key"], three["cipher_shard"], three["oblivion_seal"])
        third = make_descriptor(keys, three, name, pool_id, 3, 1, second, owner)
        self.same(third[0][447:511], expect["sig_owner"], "sig_owner of epoch 3")
        self.same(third[0][511:575], expect["sig_prev"], "sig_prev of epoch 3")
        self.same(sha256(third[0]), expect["sha256"], "epoch 3")
        read = [Descriptor(data) for data, _ in (first, second, third)]
        read[1].check_succession(read[0])
        read[2].check_succession(read[1])
        self.refused("a skipped epoch", lambda: read[2].check_succession(read[0]))
        self.same(read[1].open_previous(read[1].open(self.plain), read[0]), first[1].hex(), "prev")
        self.descriptor = read[0]

    def proofs(self):
        p = self.v["proofs"]
        given, app_id = unhexed(p["exchange"]), p["app_id"]
        data = {
            "unix": struct.pack(">II", p["unix"]["uid"], p["unix"]["pid"]),
            "tls-exporter": bytes.fromhex(p["tls_exporter"]),
            "none": b"",
        }
        for binding, roles in p["join"].items():
            number = 7 if binding == "unix" else 1
            tail = exchange(given, binding, data[binding])
            for role, expect in roles.items():
                transcript = join_transcript(
                    role, self.name, self.pool_id, 1, 1, number, app_id, tail
                )
                what = f"{role} by {binding}"
                self.same(sha256(transcript), expect["transcript_sha256"], what)
                signature = self.plain.key("sig/" + role).sign(transcript)
                self.same(signature, expect["signature"], what)
                if (binding, role) == ("unix", "join"):
                    self.lax(transcript)
        tail = exchange(given, "unix", data["unix"])
        app, expect = p["app"], p["app"]["expect"]
        seed = bytes.fromhex(app["given"]["seed"])
        text = "lza1_" + b64(seed + sha256(b"lza1_" + seed)[:4])
        self.same(text, expect["text"], "app key")
        key = signer(seed)
        self.same(public(key), expect["public"], "public app key")
        transcript = label("app") + lp(app_id.encode()) + public(key) + struct.pack(">H", 1) + tail
        self.same(sha256(transcript), expect["transcript_sha256"], "app transcript")
        self.same(key.sign(transcript), expect["signature"], "app proof")
        token = bytes.fromhex(p["admin"]["given"]["token"])
        for side in ("client", "server"):
            message = label("admin/" + side) + struct.pack(">H", 1) + tail
            mac = hmac.new(token, message, "sha256").digest()
            self.same(mac, p["admin"]["expect"][side], side)

    def lax(self, transcript):
        bad, key = self.v["must_fail"], public(self.plain.key("sig/join"))
        for name in ("signature_with_s_plus_l", "signature_with_small_order_r"):
            signature = bytes.fromhex(bad[name])
            self.refused(name, lambda: verify(key, transcript, signature))
        small = unhexed(bad["small_order_key"])
        check = lambda: verify(small["key"], transcript, small["signature"])
        self.refused("small_order_key", check)

    def block(self):
        given, expect = unhexed(self.v["block"]["given"]), self.v["block"]["expect"]
        uid, version, length = given["block_id"], given["version"], given["length"]
        plain = bytes(i % 256 for i in range(length))
        key = expand(self.pool_key, label("block") + uid)
        start, leaves, table, chunks = first_chunk_at(given["size"]), [], b"", []
        count = -(-given["size"] // CHUNK)
        self.same(start + count * 65552, expect["capacity"], "capacity")
        for i, wanted in enumerate(expect["chunks"]):
            part = plain[i * CHUNK :][:CHUNK]
            nonce = bytes.fromhex(given["chunk_nonces"][i])
            aad = chunk_aad(self.pool_id, 1, uid, i, version, len(part))
            sealed = seal(key, nonce, part, aad)
            self.same(sha256(sealed), wanted["sealed_sha256"], f"chunk {i}")
            self.same(sealed[-16:], wanted["tag"], f"tag {i}")
            leaves.append(leaf(i, version, nonce, sealed))
            self.same(leaves[-1], wanted["leaf"], f"leaf {i}")
            table += struct.pack(">Q", version) + nonce + leaves[-1]
            chunks.append((sealed, nonce, aad))
        self.same(root(leaves), expect["root"], "root")
        self.same(root([]), expect["empty_root"], "empty root")
        hash_ = name_hash(self.pool_id, given["name"])
        self.same(hash_, expect["name_hash"], "name hash")
        signed = b"LZMF" + struct.pack(">HH", 1, 1) + self.pool_id + uid
        signed += struct.pack(">IIQQII", 1, CHUNK, version, length, len(leaves), 0)
        signed += struct.pack(">Q", given["written_ms"]) + given["session"]
        signed += root(leaves) + bytes(32) + hash_
        signature = self.plain.key("sig/seal").sign(label("manifest") + signed)
        self.same(signature, expect["signature"], "manifest")
        self.same(sha256(label("manifest") + signed), expect["manifest_hash"], "manifest hash")
        slot = (signed + signature + table).ljust(start, b"\0")
        for i, (sealed, _, _) in enumerate(chunks):
            slot = slot.ljust(start + i * 65552, b"\0") + sealed
        self.same(len(slot), expect["slot_len"], "slot length")
        self.same(sha256(slot), expect["slot_sha256"], "slot")
        args = (given["size"], given["name"], uid, {1: self.descriptor}, {1: self.pool_key})
        self.same(read_slot(slot, *args), plain.hex(), "slot read back")

        sealed, nonce, aad = chunks[0]
        bad, forged = self.v["must_fail"]["chunk_with_the_same_tag"], bytearray(sealed)
        forged[0] ^= int(bad["xor_byte_0"], 16)
        for i, byte in enumerate(bytes.fromhex(bad["xor_bytes_16_to_31"])):
            forged[16 + i] ^= byte
        self.same(sha256(bytes(forged)), bad["sha256"], "forged chunk")
        unseal(key, nonce, bytes(forged), aad)  # The tag alone lets it pass.
        swapped = slot[:start] + bytes(forged) + slot[start + len(forged) :]
        self.refused("the same tag", lambda: read_slot(swapped, *args))

    def events(self):
        key = expand(self.pool_key, label("event"))
        for event in self.v["events"]:
            # Texts stay texts; ids and nonces are bytes.
            g, expect, what = event["given"], event["expect"], event["name"]
            raw = lambda field: bytes.fromhex(g[field])
            header = b"LZEV" + struct.pack(">HH", 1, 1) + self.pool_id
            header += struct.pack(">IBBH", 1, g["kind"], g["flags"], 0) + raw("session")
            header += struct.pack(">QQ", g["seq"], g["sent_ms"]) + raw("msg_id")
            header += raw("in_reply_to")
            for field in ("name", "sender", "destination"):
                header += lp(g[field].encode())
            if g["kind"] in (6, 7):
                header += struct.pack(">Q", g["expires_ms"])
            self.same(sha256(header), expect["header_sha256"], what)
            plain = g["body"].encode()
            if g["flags"] & 1:
                plain = lp(g["meta"].encode()) + plain
            sealed = seal(key, raw("nonce"), plain, label("event-aad") + header)
            self.same(sealed, expect["sealed"], what)
            envelope = header + raw("nonce") + lp(sealed)
            if "signature" in expect:
                message = label("event-sig") + header + raw("nonce") + sha256(sealed)
                signature = self.plain.key("sig/seal").sign(message)
                self.same(signature, expect["signature"], what)
                envelope += signature
            if "envelope_sha256" in expect:
                self.same(sha256(envelope), expect["envelope_sha256"], what)
            opened = open_envelope(envelope, {1: self.descriptor}, {1: self.pool_key})
            self.same(bytes.fromhex(opened["body"]), g["body"].encode().hex(), what)
            self.same(opened["meta"], g["meta"], what)


# --- what a pool made ---------------------------------------------------------------------------


def open_all(made):
    keys = Keys.of_tokens(made["tokens"])
    chain = [Descriptor(bytes.fromhex(data)) for data in made["descriptors"]]
    need(any(pin_of(d.owner) == keys.pin for d in chain), "another owner")
    need(all(d.name == made["name"] for d in chain), "another pool")
    for previous, descriptor in zip(chain, chain[1:]):
        descriptor.check_succession(previous)
    pool_keys = {chain[-1].epoch: chain[-1].open(keys)}
    for previous, descriptor in reversed(list(zip(chain, chain[1:]))):
        if any(descriptor.prev_wrap):
            key = pool_keys[descriptor.epoch]
            pool_keys[previous.epoch] = descriptor.open_previous(key, previous)
        else:
            break
    descriptors = {d.epoch: d for d in chain}
    slots = [
        read_slot(
            bytes.fromhex(slot["hex"]),
            slot["size"],
            slot["name"],
            bytes.fromhex(slot["uid"]),
            descriptors,
            pool_keys,
        ).hex()
        for slot in made.get("slots", [])
    ]
    envelopes = [
        open_envelope(bytes.fromhex(data), descriptors, pool_keys)
        for data in made.get("envelopes", [])
    ]
    return {"slots": slots, "envelopes": envelopes}


def main(args):
    try:
        if args[:1] == ["vectors"] and len(args) == 2:
            print(f"{Vectors(args[1]).run()} values agree")
        elif args == ["open"]:
            json.dump(open_all(json.load(sys.stdin)), sys.stdout)
        else:
            sys.exit(__doc__)
    except Refused as why:
        sys.exit(f"refused: {why}")


if __name__ == "__main__":
    main(sys.argv[1:])
