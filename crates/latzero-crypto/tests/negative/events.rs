//! N17 and N19: events, calls and answers.

use std::collections::BTreeSet;

use latzero_crypto::descriptor::{History, OldContent};
use latzero_crypto::envelope::{self, Body, Envelope, Header, Kind};
use latzero_crypto::epochs::{EPOCHS_MAX, Epochs, GRACE_MS};
use latzero_crypto::events::{
    Act, Action, Answer, CLOCK_MS_MAX, DEFERRED_MAX, DEFERRED_MS_MAX, Dropped, Incoming,
    IncomingAnswer, Outgoing, PendingCall, Received, Receiver, ReplyTo, SESSION_MS, SESSIONS_MAX,
    Sender, WAITING_MAX, WINDOW,
};
use latzero_crypto::meta::{AnswerMeta, CallFrame, CallMeta};
use latzero_crypto::sign::SigningKey;
use proptest::prelude::*;

use crate::common::*;

/// The time of the tests.
const NOW: u64 = 1_700_000_000_000;

fn writer() -> SigningKey {
    keys(false).seal_key().expect("all keys are here")
}

fn frame() -> Incoming<'static> {
    Incoming {
        action: Action::Trigger,
        process: "sum",
        origin: "caller",
        destination: "",
        frame: CallFrame::default(),
        privileged: false,
    }
}

/// A valid header of a call; tests change it.
fn header() -> Header<'static> {
    Header {
        suite: latzero_crypto::Suite::Sealed,
        pool_id: descriptor1().pool_id(),
        epoch: 1,
        kind: Kind::Trigger,
        session: [1; 16],
        seq: 1,
        sent_ms: NOW,
        msg_id: [2; 16],
        in_reply_to: [0; 16],
        name: "sum",
        sender: "caller",
        destination: "",
        expires_ms: 0,
    }
}

fn sealed(
    epochs: &Epochs,
    header: &Header<'_>,
    meta: Option<&str>,
    seal: Option<&SigningKey>,
) -> Vec<u8> {
    let key = epochs.current().event_key();
    envelope::seal(header, meta, Body::Json("42"), &[3; 24], key, seal).expect("small")
}

struct Pair {
    epochs: Epochs,
    handler: Receiver,
}

fn pair() -> Pair {
    Pair {
        epochs: epochs(NOW),
        handler: Receiver::new("handler", NOW),
    }
}

impl Pair {
    fn receive(
        &mut self,
        frame: &Incoming<'_>,
        envelope: &[u8],
        now_ms: u64,
    ) -> Result<Received, Dropped> {
        self.handler.receive(&self.epochs, frame, envelope, now_ms)
    }

    /// Receives a message with this header, sealed with a key of this pool.
    fn take(&mut self, frame: &Incoming<'_>, header: &Header<'_>) -> Option<Dropped> {
        let envelope = sealed(&self.epochs, header, None, None);
        self.receive(frame, &envelope, NOW).err()
    }
}

#[test]
fn n17_no_bit_of_an_envelope_can_change() {
    for (kind, seal) in [
        (Kind::Trigger, None),
        (Kind::PrivilegedTrigger, Some(writer())),
    ] {
        let mut pair = pair();
        let good = sealed(
            &pair.epochs,
            &Header { kind, ..header() },
            Some("{}"),
            seal.as_ref(),
        );
        for bit in 0..good.len() * 8 {
            let mut changed = good.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(pair.receive(&frame(), &changed, NOW).is_err(), "bit {bit}");
        }
        for length in 0..good.len() {
            let cut = pair.receive(&frame(), &good[..length], NOW).err();
            assert_eq!(cut, Some(Dropped::Layout), "{length}");
        }
        let longer = pair
            .receive(&frame(), &[&good[..], &[0]].concat(), NOW)
            .err();
        assert_eq!(longer, Some(Dropped::Layout));
        assert_eq!(
            pair.handler.drops().total(),
            good.len() as u64 * 9 + 1,
            "all were counted"
        );
        assert!(
            pair.receive(&frame(), &good, NOW).is_ok(),
            "and none was remembered"
        );
    }
}

#[test]
fn n17_the_frame_must_agree_with_the_header() {
    let check = |frame: Incoming<'_>, header: Header<'_>, why| {
        assert_eq!(pair().take(&frame, &header), why, "{frame:?}");
    };
    check(frame(), header(), None);
    check(
        Incoming {
            process: "product",
            ..frame()
        },
        header(),
        Some(Dropped::Frame),
    );
    check(
        Incoming {
            origin: "other",
            ..frame()
        },
        header(),
        Some(Dropped::Frame),
    );
    check(
        Incoming {
            destination: "handler",
            ..frame()
        },
        header(),
        Some(Dropped::Frame),
    );
    check(
        Incoming {
            action: Action::Emit,
            ..frame()
        },
        header(),
        Some(Dropped::Kind),
    );
    check(
        frame(),
        Header {
            kind: Kind::Emit,
            ..header()
        },
        Some(Dropped::Kind),
    );
    let emit = Incoming {
        action: Action::Emit,
        ..frame()
    };
    check(
        emit.clone(),
        Header {
            kind: Kind::Emit,
            ..header()
        },
        None,
    );
    check(
        frame(),
        Header {
            kind: Kind::Response,
            in_reply_to: [1; 16],
            ..header()
        },
        Some(Dropped::Kind),
    );
    let to = |destination: &'static str| {
        (
            Incoming {
                destination,
                ..frame()
            },
            Header {
                destination,
                ..header()
            },
        )
    };
    let (frame_to, header_to) = to("handler");
    check(frame_to, header_to, None);
    let (frame_to, header_to) = to("somebody");
    check(frame_to, header_to, Some(Dropped::Frame));
    check(frame(), header_to, Some(Dropped::Frame));
    check(
        frame(),
        Header {
            pool_id: [0; 16],
            ..header()
        },
        Some(Dropped::Pool),
    );
    let gated = latzero_crypto::Suite::Gated;
    check(
        frame(),
        Header {
            suite: gated,
            ..header()
        },
        Some(Dropped::Pool),
    );
}

#[test]
fn n17_the_frame_must_agree_with_the_meta() {
    let mut pair = pair();
    let meta = r#"{"ttl":1000,"idempotency_key":"order-17"}"#;
    let good = sealed(&pair.epochs, &header(), Some(meta), None);
    let say = |ttl, idempotency_key| Incoming {
        frame: CallFrame {
            ttl,
            idempotency_key,
            ..CallFrame::default()
        },
        ..frame()
    };
    let mut receive = |frame: &Incoming<'_>| pair.receive(frame, &good, NOW).err();
    assert_eq!(
        receive(&say(Some(1001), Some("order-17"))),
        Some(Dropped::Frame)
    );
    assert_eq!(receive(&say(None, Some("order-17"))), Some(Dropped::Frame));
    assert_eq!(receive(&say(Some(1000), None)), Some(Dropped::Frame));
    assert_eq!(
        receive(&say(Some(1000), Some("order-18"))),
        Some(Dropped::Frame)
    );
    assert_eq!(receive(&say(Some(1000), Some("order-17"))), None);
    let mut fresh = self::pair();
    let malformed = sealed(&fresh.epochs, &header(), Some("[]"), None);
    assert_eq!(
        fresh.receive(&frame(), &malformed, NOW).err(),
        Some(Dropped::Content)
    );
}

#[test]
fn n17_a_privileged_handler_accepts_only_signed_calls() {
    let privileged = Incoming {
        privileged: true,
        ..frame()
    };
    let check = |kind, expires_ms, seal: Option<SigningKey>, why| {
        let mut pair = pair();
        let header = Header {
            kind,
            expires_ms,
            ..header()
        };
        let envelope = sealed(&pair.epochs, &header, None, seal.as_ref());
        assert_eq!(
            pair.receive(&privileged, &envelope, NOW).err(),
            why,
            "{kind:?}"
        );
    };
    check(Kind::Trigger, 0, None, Some(Dropped::Unprivileged));
    check(
        Kind::Trigger,
        0,
        Some(writer()),
        Some(Dropped::Unprivileged),
    );
    check(Kind::PrivilegedTrigger, 0, Some(writer()), None);
    check(
        Kind::DeferredTrigger,
        NOW + 1,
        None,
        Some(Dropped::Unprivileged),
    );
    check(Kind::DeferredTrigger, NOW + 1, Some(writer()), None);
    let other = [keys(false).write_key(), keys(false).join_key()];
    for key in other {
        check(Kind::PrivilegedTrigger, 0, key, Some(Dropped::Signature));
    }
}

#[test]
fn n17_times_are_within_30_seconds_and_not_before_joining() {
    let check = |sent_ms, now_ms, joined_ms, why| {
        let epochs = epochs(joined_ms);
        let mut handler = Receiver::new("handler", joined_ms);
        let envelope = sealed(
            &epochs,
            &Header {
                sent_ms,
                ..header()
            },
            None,
            None,
        );
        assert_eq!(
            handler.receive(&epochs, &frame(), &envelope, now_ms).err(),
            why,
            "{sent_ms} {now_ms}"
        );
    };
    let late = Some(Dropped::Time);
    check(NOW, NOW + CLOCK_MS_MAX, 0, None);
    check(NOW, NOW + CLOCK_MS_MAX + 1, 0, late);
    check(NOW + CLOCK_MS_MAX, NOW, 0, None);
    check(NOW + CLOCK_MS_MAX + 1, NOW, 0, late);
    check(NOW - 2000, NOW, NOW, None);
    check(NOW - 2001, NOW, NOW, late);
    check(0, NOW, 0, late);
    check(u64::MAX, NOW, 0, late);
    check(u64::MAX, u64::MAX, NOW, None);
}

#[test]
fn n17_a_message_is_accepted_once() {
    let mut pair = pair();
    let good = sealed(&pair.epochs, &header(), None, None);
    assert!(pair.receive(&frame(), &good, NOW).is_ok());
    assert_eq!(
        pair.receive(&frame(), &good, NOW).err(),
        Some(Dropped::Replay)
    );
    assert_eq!(
        pair.take(
            &frame(),
            &Header {
                msg_id: [9; 16],
                ..header()
            }
        ),
        Some(Dropped::Replay)
    );
    assert_eq!(
        pair.take(
            &frame(),
            &Header {
                seq: 1025,
                ..header()
            }
        ),
        None
    );
    // Within the window, not before it.
    assert_eq!(pair.take(&frame(), &Header { seq: 2, ..header() }), None);
    assert_eq!(
        pair.take(
            &frame(),
            &Header {
                seq: 1026,
                ..header()
            }
        ),
        None
    );
    assert_eq!(pair.take(&frame(), &Header { seq: 3, ..header() }), None);
    assert_eq!(
        pair.take(&frame(), &Header { seq: 2, ..header() }),
        Some(Dropped::Replay)
    );
    assert_eq!(
        pair.take(
            &frame(),
            &Header {
                seq: u64::MAX,
                ..header()
            }
        ),
        None
    );
    assert_eq!(
        pair.take(
            &frame(),
            &Header {
                seq: 2000,
                ..header()
            }
        ),
        Some(Dropped::Replay)
    );
    assert_eq!(pair.handler.drops().of(Dropped::Replay), 4);
    // Another session has its own numbers.
    assert_eq!(
        pair.take(
            &frame(),
            &Header {
                session: [7; 16],
                ..header()
            }
        ),
        None
    );
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Compared with a plain set: a number is accepted if it was not seen and is within the window.
    #[test]
    fn the_window_is_a_set(steps in prop::collection::vec((0u8..4, 1u64..1500), 1..60)) {
        let mut pair = pair();
        let (mut seen, mut highest) = (BTreeSet::new(), 0u64);
        for (direction, distance) in steps {
            let seq = match direction {
                0 => highest.saturating_sub(distance).max(1),
                1 => highest.saturating_sub(distance % 8).max(1),
                2 => highest + distance % 8 + 1,
                _ => highest + distance,
            };
            let fresh = (seq > highest || highest - seq < WINDOW) && !seen.contains(&seq);
            let got = pair.take(&frame(), &Header { seq, ..header() });
            prop_assert_eq!(got.is_none(), fresh, "{} after {}", seq, highest);
            seen.insert(seq);
            highest = highest.max(seq);
        }
    }
}

#[test]
fn sessions_are_bounded_and_forgotten_after_silence() {
    let mut pair = pair();
    let session = |i: usize| {
        let mut session = [0; 16];
        session[..8].copy_from_slice(&(i as u64).to_be_bytes());
        session
    };
    for i in 0..SESSIONS_MAX {
        assert_eq!(
            pair.take(
                &frame(),
                &Header {
                    session: session(i),
                    ..header()
                }
            ),
            None
        );
    }
    let one_more = Header {
        session: session(SESSIONS_MAX),
        ..header()
    };
    assert_eq!(pair.take(&frame(), &one_more), Some(Dropped::Limit));
    // Known sessions continue.
    assert_eq!(
        pair.take(
            &frame(),
            &Header {
                session: session(0),
                seq: 2,
                ..header()
            }
        ),
        None
    );
    let later = |pair: &mut Pair, now_ms| {
        let envelope = sealed(
            &pair.epochs,
            &Header {
                sent_ms: now_ms,
                ..one_more
            },
            None,
            None,
        );
        pair.receive(&frame(), &envelope, now_ms).err()
    };
    assert_eq!(later(&mut pair, NOW + SESSION_MS), Some(Dropped::Limit));
    assert_eq!(later(&mut pair, NOW + SESSION_MS + 1000), None);
}

fn deferred(sent_ms: u64, expires_ms: u64) -> Header<'static> {
    Header {
        kind: Kind::DeferredTrigger,
        sent_ms,
        expires_ms,
        ..header()
    }
}

#[test]
fn n17_a_deferred_call_expires() {
    let check = |header: Header<'_>, now_ms, why| {
        let mut pair = pair();
        let envelope = sealed(&pair.epochs, &header, None, None);
        assert_eq!(
            pair.receive(&frame(), &envelope, now_ms).err(),
            why,
            "{header:?}"
        );
    };
    let day = 24 * 60 * 60 * 1000;
    check(deferred(NOW, NOW + day), NOW + day, None);
    check(
        deferred(NOW, NOW + day),
        NOW + day + 1,
        Some(Dropped::Expired),
    );
    check(deferred(NOW, NOW + 30 * day), NOW + 29 * day, None);
    check(
        deferred(NOW, NOW + 30 * day + 1),
        NOW,
        Some(Dropped::Expired),
    );
    check(deferred(NOW, NOW + 31 * day), NOW, Some(Dropped::Expired));
    check(deferred(NOW, NOW - 1), NOW, Some(Dropped::Expired));
    check(deferred(NOW, NOW), NOW, None);
    check(deferred(NOW + 30_000, NOW + 30_000), NOW, None);
    check(
        deferred(NOW + 30_001, NOW + 30_001),
        NOW,
        Some(Dropped::Time),
    );
    check(deferred(u64::MAX, 0), NOW, Some(Dropped::Time));
    check(deferred(0, u64::MAX), NOW, Some(Dropped::Expired));
    // It may be older than the receiver.
    check(deferred(NOW - day, NOW + day), NOW, None);
}

#[test]
fn n17_a_deferred_call_runs_once_also_after_a_restart() {
    let mut pair = pair();
    let envelope = sealed(&pair.epochs, &deferred(NOW, NOW + 1000), None, None);
    let received = pair
        .receive(&frame(), &envelope, NOW)
        .expect("it is valid")
        .reply_to;
    assert_eq!(
        pair.receive(&frame(), &envelope, NOW).err(),
        Some(Dropped::Replay),
        "under way"
    );
    // Its handler left, so another delivery is accepted.
    pair.handler.abandon(&received);
    let received = pair
        .receive(&frame(), &envelope, NOW)
        .expect("it is valid")
        .reply_to;
    let kept = pair.handler.finish(&received);
    assert_eq!(kept, Some(([2; 16], NOW + 1000)));
    assert_eq!(pair.handler.finish(&received), None);
    assert_eq!(
        pair.receive(&frame(), &envelope, NOW).err(),
        Some(Dropped::Replay),
        "finished"
    );
    let mut restarted = self::pair();
    restarted.handler.restore(kept, NOW + 500);
    assert_eq!(
        restarted.receive(&frame(), &envelope, NOW + 500).err(),
        Some(Dropped::Replay)
    );
}

#[test]
fn finished_calls_are_bounded_until_they_expire() {
    let mut pair = pair();
    let id = |i: usize| {
        let mut id = [0xff; 16];
        id[..8].copy_from_slice(&(i as u64).to_be_bytes());
        id
    };
    pair.handler
        .restore((0..2 * DEFERRED_MAX).map(|i| (id(i), NOW + 1500)), NOW);
    let call = |pair: &mut Pair, now_ms| {
        let envelope = sealed(&pair.epochs, &deferred(NOW, NOW + 5000), None, None);
        pair.receive(&frame(), &envelope, now_ms).err()
    };
    assert_eq!(call(&mut pair, NOW), Some(Dropped::Limit));
    assert_eq!(call(&mut pair, NOW + 1500), Some(Dropped::Limit));
    assert_eq!(call(&mut pair, NOW + 2500), None);
}

/// Epochs after a rotation at `NOW`.
fn rotated(content: OldContent, new_members: bool) -> Epochs {
    let (one, old) = (descriptor1(), keys(false));
    let new = if new_members { keys3() } else { keys(false) };
    let mut to = new_epoch(2);
    to.content = content;
    let two = one.rotate(&old, &new, &to).expect("all keys are here");
    let key = pool_key(&new, &two);
    let mut epochs = epochs(0);
    epochs.advance(two, key, NOW);
    epochs
}

#[test]
fn n17_messages_of_an_epoch_before_count_while_nobody_was_removed() {
    let old = epochs(0);
    let call = sealed(&old, &header(), None, None);
    let parked = sealed(&old, &deferred(NOW, NOW + DEFERRED_MS_MAX), None, None);
    let check = |epochs: &Epochs, envelope: &[u8], now_ms, why| {
        let mut handler = Receiver::new("handler", NOW);
        assert_eq!(
            handler.receive(epochs, &frame(), envelope, now_ms).err(),
            why,
            "at {now_ms}"
        );
    };
    let refreshed = rotated(OldContent::AsBefore, false);
    check(&refreshed, &call, NOW + GRACE_MS, None);
    let epoch = Some(Dropped::Epoch);
    assert_eq!(
        refreshed
            .of_message(1, Kind::Trigger, NOW + GRACE_MS + 1)
            .map(|_| ()),
        None
    );
    check(&refreshed, &parked, NOW + DEFERRED_MS_MAX, None);
    // A member was removed, or old content was refused: older messages are no longer accepted.
    for over in [
        rotated(OldContent::AsBefore, true),
        rotated(OldContent::Refused, false),
    ] {
        check(&over, &call, NOW, epoch);
        check(&over, &parked, NOW, epoch);
    }
    // An epoch that does not exist yet.
    let two = sealed(
        &refreshed,
        &Header {
            epoch: 2,
            ..header()
        },
        None,
        None,
    );
    check(&old, &two, NOW, epoch);
    check(&refreshed, &two, NOW, None);
    for other in [0, 3, u32::MAX] {
        check(
            &refreshed,
            &sealed(
                &old,
                &Header {
                    epoch: other,
                    ..header()
                },
                None,
                None,
            ),
            NOW,
            epoch,
        );
    }
}

#[test]
fn n17_two_epochs_before_only_deferred_messages_count_and_a_gap_ends_them() {
    let (one, keys) = (descriptor1(), keys(false));
    let two = descriptor2();
    let three = two
        .rotate(&keys, &keys, &new_epoch(2))
        .expect("all keys are here");
    let mut epochs = epochs(0);
    epochs.advance(two.clone(), pool_key(&keys, &two), NOW);
    epochs.advance(three.clone(), pool_key(&keys, &three), NOW);
    let counts = |epochs: &Epochs, kind| epochs.of_message(1, kind, NOW).is_some();
    assert!(counts(&epochs, Kind::DeferredTrigger) && counts(&epochs, Kind::DeferredResponse));
    assert!(!counts(&epochs, Kind::Trigger) && !counts(&epochs, Kind::PrivilegedEmit));
    // A client that missed epoch 2 does not know who was a member then, until it gets the
    // descriptor.
    let mut missed = Epochs::new(three.clone(), pool_key(&keys, &three), NOW);
    assert!(!counts(&missed, Kind::DeferredTrigger));
    assert!(missed.add_older(one.clone()).is_err());
    assert_eq!(missed.add_older(two), Ok(true));
    assert_eq!(missed.add_older(one), Ok(true));
    assert!(counts(&missed, Kind::DeferredTrigger));
    // A descriptor older than the current one is not accepted.
    let before = missed.current().descriptor().epoch();
    missed.advance(descriptor1(), pool_key(&keys, &descriptor1()), NOW);
    assert_eq!(missed.current().descriptor().epoch(), before);
}

#[test]
fn epochs_are_bounded_and_a_cut_history_ends() {
    let keys = keys(false);
    let (mut epochs, mut last) = (epochs(0), descriptor1());
    for _ in 0..EPOCHS_MAX {
        last = last
            .rotate(&keys, &keys, &new_epoch(2))
            .expect("all keys are here");
        epochs.advance(last.clone(), pool_key(&keys, &last), NOW);
    }
    assert!(epochs.find(1).is_none() && epochs.find(2).is_some());
    assert_eq!(epochs.add_older(descriptor1()), Ok(false));
    let mut to = new_epoch(2);
    to.history = History::Cut;
    let cut = descriptor1()
        .rotate(&keys, &keys, &to)
        .expect("all keys are here");
    let mut epochs = Epochs::new(cut.clone(), pool_key(&keys, &cut), NOW);
    assert_eq!(epochs.add_older(descriptor1()), Ok(false));
    assert!(epochs.seal_of(1).is_none() && epochs.chunk_key(&block_id(), 1).is_none());
}

/// A caller and a handler that exchange messages.
struct Talk {
    epochs: Epochs,
    caller: Sender,
    calls: Receiver,
    handler: Sender,
    handled: Receiver,
}

fn talk() -> Talk {
    Talk {
        epochs: epochs(NOW),
        caller: Sender::new("caller", [1; 16]),
        calls: Receiver::new("caller", NOW),
        handler: Sender::new("handler", [2; 16]),
        handled: Receiver::new("handler", NOW),
    }
}

impl Talk {
    /// Makes a call; returns what the handler needs to answer.
    fn call(
        &mut self,
        act: Act,
        msg_id: [u8; 16],
        key: Option<&str>,
        seal: Option<&SigningKey>,
    ) -> ReplyTo {
        let meta = CallMeta {
            idempotency_key: key.map(Into::into),
            ..CallMeta::default()
        };
        let out = Outgoing {
            act,
            name: "sum",
            destination: "",
            msg_id,
            now_ms: NOW,
            meta: &meta,
            body: Body::Json("[1,2]"),
            nonce: [5; 24],
        };
        let envelope = self.caller.seal(&self.epochs, &out, seal).expect("small");
        let waiting = PendingCall {
            name: "sum".into(),
            destination: None,
            idempotency_key: key.map(Into::into),
            deferred: act == Act::DeferredCall,
            signed: seal.is_some(),
            items: 0,
        };
        assert!(self.calls.wait(msg_id, waiting));
        let frame = Incoming {
            frame: CallFrame {
                idempotency_key: key,
                ..CallFrame::default()
            },
            ..frame()
        };
        let received = self.handled.receive(&self.epochs, &frame, &envelope, NOW);
        let received = received.unwrap_or_else(|why| panic!("the call was dropped: {why}"));
        assert_eq!(received.opened.body(), Body::Json("[1,2]"));
        received.reply_to
    }

    fn answer(
        &mut self,
        to: &ReplyTo,
        status: &str,
        index: Option<u64>,
        seal: Option<&SigningKey>,
    ) -> Vec<u8> {
        let meta = AnswerMeta {
            status: status.into(),
            index,
            ..AnswerMeta::default()
        };
        let out = Answer {
            msg_id: [6; 16],
            now_ms: NOW,
            meta: &meta,
            body: Body::Bytes(b"\xff"),
            nonce: [7; 24],
        };
        self.handler
            .answer(&self.epochs, to, &out, seal)
            .expect("small")
    }

    fn take(&mut self, call: [u8; 16], status: &str, envelope: &[u8]) -> Option<Dropped> {
        let frame = IncomingAnswer {
            call,
            process: Some("sum"),
            origin: Some("handler"),
            status,
        };
        self.calls
            .receive_answer(&self.epochs, &frame, envelope, NOW)
            .err()
    }
}

#[test]
fn an_answer_is_accepted_once() {
    for act in [Act::Call, Act::DeferredCall] {
        let mut talk = talk();
        let to = talk.call(act, [9; 16], None, None);
        let answer = talk.answer(&to, "ok", None, None);
        assert_eq!(talk.take([9; 16], "ok", &answer), None);
        assert_eq!(talk.take([9; 16], "ok", &answer), Some(Dropped::NotAwaited));
    }
}

#[test]
fn n17_an_answer_belongs_to_its_call() {
    let mut talk = talk();
    let (first, second) = (
        talk.call(Act::Call, [8; 16], None, None),
        talk.call(Act::Call, [9; 16], None, None),
    );
    let answer = talk.answer(&first, "ok", None, None);
    assert_eq!(
        talk.take([9; 16], "ok", &answer),
        Some(Dropped::NotAwaited),
        "another call's"
    );
    assert_eq!(
        talk.take([7; 16], "ok", &answer),
        Some(Dropped::NotAwaited),
        "nobody's"
    );
    assert_eq!(
        talk.take([8; 16], "error", &answer),
        Some(Dropped::Frame),
        "another status"
    );
    let say = |process, origin| IncomingAnswer {
        call: [8; 16],
        process,
        origin,
        status: "ok",
    };
    for frame in [say(Some("product"), None), say(None, Some("other"))] {
        let got = talk
            .calls
            .receive_answer(&talk.epochs, &frame, &answer, NOW)
            .err();
        assert_eq!(got, Some(Dropped::Frame));
    }
    // A call is not accepted as an answer, and neither is the answer to somebody else.
    let call = sealed(&talk.epochs, &header(), None, None);
    assert_eq!(talk.take([8; 16], "ok", &call), Some(Dropped::Kind));
    let mut other = Receiver::new("other", NOW);
    assert!(other.wait([8; 16], talk.calls.forget(&[8; 16]).expect("it waits")));
    let got = other
        .receive_answer(&talk.epochs, &say(None, None), &answer, NOW)
        .err();
    assert_eq!(got, Some(Dropped::Frame));
    let answer = talk.answer(&second, "ok", None, None);
    assert_eq!(talk.take([9; 16], "ok", &answer), None);
}

#[test]
fn n17_an_answer_has_the_properties_of_its_call() {
    let waits = |change: &dyn Fn(&mut PendingCall)| {
        let mut talk = talk();
        let to = talk.call(Act::Call, [9; 16], None, None);
        let mut waiting = talk.calls.forget(&[9; 16]).expect("it waits");
        change(&mut waiting);
        assert!(talk.calls.wait([9; 16], waiting));
        let answer = talk.answer(&to, "ok", None, None);
        talk.take([9; 16], "ok", &answer)
    };
    assert_eq!(waits(&|_| {}), None);
    assert_eq!(
        waits(&|waiting| waiting.destination = Some("handler".into())),
        None
    );
    for change in [
        (|waiting| waiting.name = "product".into()) as fn(&mut PendingCall),
        |waiting| waiting.destination = Some("other".into()),
        |waiting| waiting.deferred = true,
        |waiting| waiting.signed = true,
        |waiting| waiting.idempotency_key = Some("order-17".into()),
    ] {
        assert_eq!(waits(&change), Some(Dropped::NotAwaited));
    }
}

#[test]
fn a_signed_call_gets_a_signed_answer() {
    let seal = writer();
    for act in [Act::Call, Act::DeferredCall] {
        let mut talk = talk();
        let to = talk.call(act, [9; 16], None, Some(&seal));
        assert!(to.is_signed());
        let answer = talk.answer(&to, "ok", None, Some(&seal));
        assert!(Envelope::parse(&answer).expect("an envelope").is_signed());
        assert_eq!(talk.take([9; 16], "ok", &answer), None);
        // A handler without the seal cannot answer.
        let to = talk.call(act, [8; 16], None, Some(&seal));
        let meta = AnswerMeta {
            status: "ok".into(),
            ..AnswerMeta::default()
        };
        let out = Answer {
            msg_id: [1; 16],
            now_ms: NOW,
            meta: &meta,
            body: Body::Empty,
            nonce: [1; 24],
        };
        assert!(talk.handler.answer(&talk.epochs, &to, &out, None).is_err());
        let forged = talk.answer(&to, "ok", None, keys(false).write_key().as_ref());
        assert_eq!(talk.take([8; 16], "ok", &forged), Some(Dropped::Signature));
    }
}

#[test]
fn a_repeat_accepts_the_answer_to_the_first_call_only_by_its_key() {
    let mut talk = talk();
    let first = talk.call(Act::DeferredCall, [8; 16], Some("order-17"), None);
    let answer = talk.answer(&first, "ok", None, None);
    assert!(talk.calls.forget(&[8; 16]).is_some());
    // The caller lost its connection and repeats the call; the server returns the stored answer.
    let again = talk.call(Act::DeferredCall, [9; 16], Some("order-17"), None);
    assert_eq!(talk.take([9; 16], "ok", &answer), None);
    // With another key, or without one.
    let _ = again;
    let other = talk.call(Act::DeferredCall, [7; 16], Some("order-18"), None);
    assert_eq!(talk.take([7; 16], "ok", &answer), Some(Dropped::NotAwaited));
    talk.call(Act::DeferredCall, [6; 16], None, None);
    assert_eq!(talk.take([6; 16], "ok", &answer), Some(Dropped::NotAwaited));
    let answer = talk.answer(&other, "ok", None, None);
    assert_eq!(talk.take([7; 16], "ok", &answer), None);
}

#[test]
fn items_of_a_stream_are_in_order_and_the_last_one_has_their_count() {
    let mut talk = talk();
    let to = talk.call(Act::Call, [9; 16], None, None);
    let items: Vec<_> = (0..4)
        .map(|i| talk.answer(&to, "partial", Some(i), None))
        .collect();
    assert_eq!(
        talk.take([9; 16], "partial", &items[1]),
        Some(Dropped::Index),
        "a gap"
    );
    assert_eq!(talk.take([9; 16], "partial", &items[0]), None);
    assert_eq!(
        talk.take([9; 16], "partial", &items[0]),
        Some(Dropped::Replay)
    );
    assert_eq!(talk.take([9; 16], "partial", &items[1]), None);
    let unnumbered = talk.answer(&to, "partial", None, None);
    assert_eq!(
        talk.take([9; 16], "partial", &unnumbered),
        Some(Dropped::Index)
    );
    let last = talk.answer(&to, "ok", Some(2), None);
    assert_eq!(talk.take([9; 16], "ok", &last), None);

    // The server withholds items: the call ends with `integrity`, and does not wait any longer.
    for index in [None, Some(0), Some(1), Some(3)] {
        let to = talk.call(Act::Call, [8; 16], None, None);
        for i in 0..2 {
            let item = talk.answer(&to, "partial", Some(i), None);
            assert_eq!(talk.take([8; 16], "partial", &item), None);
        }
        let last = talk.answer(&to, "ok", index, None);
        assert_eq!(
            talk.take([8; 16], "ok", &last),
            Some(Dropped::Index),
            "{index:?}"
        );
        assert_eq!(talk.calls.forget(&[8; 16]), None);
    }
    // Items of a parked call may be lost.
    let to = talk.call(Act::DeferredCall, [7; 16], None, None);
    let item = talk.answer(&to, "partial", Some(5), None);
    assert_eq!(talk.take([7; 16], "partial", &item), None);
    let last = talk.answer(&to, "ok", Some(9), None);
    assert_eq!(talk.take([7; 16], "ok", &last), None);
}

#[test]
fn waiting_calls_are_bounded() {
    let mut calls = Receiver::new("caller", NOW);
    let waiting = PendingCall {
        name: "sum".into(),
        destination: None,
        idempotency_key: None,
        deferred: false,
        signed: false,
        items: 0,
    };
    let id = |i: usize| (i as u128).to_be_bytes();
    assert!((0..WAITING_MAX).all(|i| calls.wait(id(i), waiting.clone())));
    assert!(!calls.wait(id(WAITING_MAX), waiting.clone()));
    assert!(calls.forget(&id(0)).is_some());
    assert!(calls.wait(id(WAITING_MAX), waiting));
}

#[test]
fn a_sender_numbers_its_messages_and_keeps_its_limits() {
    let mut talk = talk();
    let epochs = &talk.epochs;
    let meta = CallMeta {
        ttl: DEFERRED_MS_MAX + 1,
        ..CallMeta::default()
    };
    let out = Outgoing {
        act: Act::DeferredCall,
        name: "sum",
        destination: "",
        msg_id: [9; 16],
        now_ms: NOW,
        meta: &meta,
        body: Body::Empty,
        nonce: [5; 24],
    };
    let seal = |sender: &mut Sender, out: &Outgoing<'_>| sender.seal(epochs, out, None);
    let error =
        |sender: &mut Sender, out: &Outgoing<'_>| seal(sender, out).err().map(|e| e.to_string());
    assert!(error(&mut talk.caller, &out).is_some_and(|error| error.contains("30 days")));
    let long = "x".repeat(129);
    let plain = CallMeta::default();
    let good = Outgoing {
        act: Act::Call,
        meta: &plain,
        ..out
    };
    for bad in [
        Outgoing { name: "", ..good },
        Outgoing {
            name: &long,
            ..good
        },
        Outgoing {
            name: "a\nb",
            ..good
        },
        Outgoing {
            destination: &long,
            ..good
        },
    ] {
        assert!(error(&mut talk.caller, &bad).is_some_and(|error| error.contains("128 bytes")));
    }
    let mut headers = serde_json::Map::new();
    headers.insert("x".into(), "y".repeat(33 << 10).into());
    let large = CallMeta {
        headers,
        ..CallMeta::default()
    };
    let bad = Outgoing {
        meta: &large,
        ..good
    };
    assert!(error(&mut talk.caller, &bad).is_some_and(|error| error.contains("32 KiB")));
    let huge = vec![0; (16 << 20) - 15];
    let bad = Outgoing {
        body: Body::Bytes(&huge),
        ..good
    };
    assert!(error(&mut talk.caller, &bad).is_some_and(|error| error.contains("16 MiB")));
    let most = Outgoing {
        body: Body::Bytes(&huge[..huge.len() - 1]),
        ..good
    };
    assert!(seal(&mut talk.caller, &most).is_ok());
    // A failed message used no number.
    let sealed = seal(&mut talk.caller, &good).expect("small");
    assert_eq!(Envelope::parse(&sealed).expect("an envelope").header.seq, 2);
}

#[test]
fn n19_lengths_of_an_envelope_are_checked_before_anything_is_allocated() {
    let good = sealed(&epochs(NOW), &header(), None, None);
    let name = 96;
    let sender = name + 4 + 3;
    let destination = sender + 4 + 6;
    let content = destination + 4 + 24;
    assert_eq!(good[name..name + 4], 3u32.to_be_bytes());
    assert_eq!(good[content..content + 4], 18u32.to_be_bytes());
    for at in [name, sender, destination, content] {
        for length in [
            0,
            1,
            2,
            4,
            7,
            19,
            127,
            128,
            129,
            1 << 24,
            u32::MAX / 2,
            u32::MAX - 1,
            u32::MAX,
        ] {
            let mut changed = good.clone();
            if changed[at..at + 4] == length.to_be_bytes() {
                continue;
            }
            changed[at..at + 4].copy_from_slice(&length.to_be_bytes());
            assert!(Envelope::parse(&changed).is_none(), "{length} at {at}");
        }
    }
}

#[test]
fn fields_that_do_not_belong_to_a_kind_are_refused() {
    let parse = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = sealed(&epochs(NOW), &header(), None, None);
        change(&mut bytes);
        Envelope::parse(&bytes).is_some()
    };
    assert!(parse(&|_| {}));
    for (at, byte) in [
        (0, 0),
        (5, 2),
        (7, 2),
        (28, 0),
        (28, 8),
        (28, 3),
        (29, 4),
        (29, 8),
        (29, 0x80),
        (30, 1),
        (31, 1),
        (55, 0),
        (80, 1),
        (100, 0x1f),
        (100, 0xff),
    ] {
        assert!(!parse(&|bytes| bytes[at] = byte), "{byte} at {at}");
    }
}

#[test]
fn content_that_contradicts_its_flags_is_refused() {
    let epochs = epochs(NOW);
    let key = epochs.current().event_key();
    let check = |flags: u8, plain: &[u8], good: bool| {
        // Sealed by hand, because `seal` creates no such message.
        let template = sealed(&epochs, &header(), None, None);
        let header_len = Envelope::parse(&template)
            .expect("an envelope")
            .header_bytes()
            .len();
        let mut header = template[..header_len].to_vec();
        header[29] = flags;
        let aad = [b"latzero/v1/event-aad\0", &header[..]].concat();
        let content = key.seal(&[1; 24], &aad, plain);
        let length = u32::try_from(content.len()).expect("small").to_be_bytes();
        let bytes = [&header[..], &[1; 24], &length, &content].concat();
        let envelope = Envelope::parse(&bytes).expect("its layout is good");
        let opened = envelope.open(key, &descriptor1().keys().seal);
        assert_eq!(opened.is_ok(), good, "{flags} {plain:?}");
    };
    check(0, b"", true);
    check(0, b"{}", true);
    check(0, b"\xff", false);
    check(2, b"\xff", true);
    check(1, b"", false);
    check(1, b"\0\0\0", false);
    check(1, b"\0\0\0\x01", false);
    check(1, b"\xff\xff\xff\xff{}", false);
    check(1, b"\0\0\0\x02{}", true);
    check(1, b"\0\0\0\x01\xff", false);
    check(1, b"\0\0\0\x02{}\xff", false);
    check(3, b"\0\0\0\x02{}\xff", true);
    check(
        1,
        &[
            &(META_MAX + 1).to_be_bytes()[..],
            &[b' '; META_MAX as usize + 1],
        ]
        .concat(),
        false,
    );
    check(
        1,
        &[&META_MAX.to_be_bytes()[..], &[b' '; META_MAX as usize]].concat(),
        true,
    );
}

const META_MAX: u32 = 32 << 10;
