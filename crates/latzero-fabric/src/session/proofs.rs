//! Authentication by proof: an app by its key, an administrator by the token, a member of an
//! encrypted pool by the pool's keys.
//!
//! A challenge is valid for one proof on one connection. A refusal does not say what was wrong, and
//! the third one closes the connection. The driver may check signatures elsewhere: the session then
//! waits for the result, and handles nothing else that the client sent.

use std::collections::BTreeSet;
use std::sync::Arc;

use latzero_crypto::Suite;
use latzero_crypto::block::Manifest;
use latzero_crypto::descriptor::Descriptor;
use latzero_crypto::keys::Roles;
use latzero_crypto::proof::{
    self, CHALLENGE_MS, ChannelBinding, Exchange, JoinProof, ProofRequest,
};
use latzero_crypto::text;
use latzero_protocol::memory::Access;
use latzero_protocol::message::TriggerSpec;
use latzero_protocol::proof::{AdminProof, AppProof, Chain, PROOF_BYTES_MAX};
use latzero_protocol::{AppId, BlockId, Code, PoolName, Refusal, Request, encode};
use serde_json::json;

use super::memory::SlotWrite;
use super::pending::{PendingReply, Reply};
use super::{Earlier, Flow, Session, leave};
use crate::driver::{Check, Driver, Peer as _};
use crate::effects::Audit;
use crate::ledger::{Reservation, Resource};
use crate::now::Time;
use crate::outbox::Class;
use crate::pool::{Pool, Replied};
use crate::refusals;
use crate::registry::{NewPool, Proved, Rotated, Said, Successor, rotated_event};
use crate::turn::Turn;

/// Refused proofs after which a connection is closed.
const REFUSED_MAX: u32 = 3;

/// The challenges of a connection, and how many of its proofs were refused.
#[derive(Default)]
pub(super) struct Proofs {
    /// The challenge for an app or an administrator, and when it was issued.
    challenge: Option<([u8; 32], Time)>,
    /// The challenges for pools.
    pools: proof::Challenges,
    refused: u32,
    /// The proof that is being checked, and the id of its request.
    pending: Option<(Option<Box<str>>, Proof)>,
}

/// What a proof is for, and what was known when it came.
enum Proof {
    /// An AppID, with its key.
    App(AppId, [u8; 32]),
    /// Roles in a pool, by the descriptor of that moment.
    Pool(PoolName, Option<Arc<Descriptor>>, Roles),
    /// The descriptor of a new pool, and the memory that it takes.
    Creation(Box<NewPool>, Reservation),
    /// A pool's next descriptor.
    Rotation(PoolName, Successor),
    /// A slot of a sealed block.
    Write(Box<SlotWrite>),
}

impl<D: Driver> Session<D> {
    /// Handles the messages that are allowed before the handshake.
    pub(super) fn prove(
        &mut self,
        id: Option<&str>,
        request: &Request<'_>,
        length: usize,
        turn: &mut Turn<'_, D>,
    ) -> Flow {
        if self.ready.is_none() && length > PROOF_BYTES_MAX {
            return self.reject(&refusals::proof_too_large(PROOF_BYTES_MAX), turn);
        }
        let result = match request {
            Request::Challenge => Ok(Reply::Now(self.challenge(turn))),
            Request::AppProof(_) if self.ready.is_some() => Err(refusals::too_late_to_prove()),
            Request::AppProof(said) => self.app_proof(id, said, turn),
            Request::AdminProof(said) => self.admin_proof(said, turn).map(Reply::Now),
            _ => unreachable!("no other message arrives here"),
        };
        self.answer_request(id, result, turn)
    }

    /// Whether a proof is being checked: nothing else is handled until
    /// [`Session::handle_verified`].
    pub(super) fn is_proving(&self) -> bool {
        self.proofs.pending.is_some()
    }

    /// Bytes of the request whose proof is being checked.
    pub(super) fn proof_bytes(&self) -> usize {
        match &self.proofs.pending {
            Some((_, Proof::Creation(_, memory))) => memory.amount() as usize,
            Some((_, Proof::Write(slot))) => slot.bytes(),
            _ => 0,
        }
    }

    /// Has a proof checked, and decides on it where the verdict comes at once.
    fn verify(
        &mut self,
        id: Option<&str>,
        proof: Proof,
        check: Check,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        let is_guess = !matches!(proof, Proof::Write(_));
        debug_assert!(
            !self.is_proving(),
            "one proof at a time: the result of this one would decide on the other"
        );
        match turn.driver.verify(&self.peer, check, is_guess)? {
            Some(is_good) => self.decide(id, proof, is_good, turn),
            None => {
                self.proofs.pending = Some((id.map(Into::into), proof));
                Ok(Reply::Later)
            }
        }
    }

    /// The verdict on the proof that was being checked, or why it was not checked.
    pub fn handle_verified(
        &mut self,
        verdict: Result<bool, Refusal>,
        turn: &mut Turn<'_, D>,
    ) -> Flow {
        let Some((id, proof)) = self.proofs.pending.take() else {
            return Flow::Continue;
        };
        let id = id.as_deref();
        let result = verdict.and_then(|is_good| self.decide(id, proof, is_good, turn));
        self.answer_request(id, result, turn)
    }

    fn decide(
        &mut self,
        id: Option<&str>,
        proof: Proof,
        is_good: bool,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        match proof {
            Proof::Creation(..) if !is_good => Err(refusals::descriptor_not_signed()),
            Proof::Write(_) if !is_good => Err(refusals::block_not_signed()),
            _ if !is_good => Err(Refusal::unproved()),
            Proof::App(app, key) => self.seat_app(app, key, turn).map(Reply::Now),
            Proof::Pool(pool, descriptor, roles) => {
                let descriptor = descriptor.ok_or_else(Refusal::unproved)?;
                self.seat_member(id, &pool, &descriptor, roles, turn)?;
                Ok(Reply::Later)
            }
            Proof::Creation(pool, memory) => {
                // The pool counts by itself.
                drop(memory);
                self.create(*pool, turn)
            }
            Proof::Rotation(pool, next) => self.rotate(&pool, next, turn),
            Proof::Write(slot) => {
                let reply = self.write_slot(id, &slot, turn)?;
                Ok(reply.map_or(Reply::Later, Reply::Now))
            }
        }
    }

    /// Has the signature of a sealed block's new content checked.
    pub(super) fn verify_write(
        &mut self,
        id: Option<&str>,
        slot: SlotWrite,
        manifest: Manifest,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let seal = slot.seal;
        let check = move || manifest.is_signed(&seal);
        match self.verify(id, Proof::Write(Box::new(slot)), Box::new(check), turn)? {
            Reply::Now(reply) => Ok(Some(reply)),
            Reply::Later | Reply::Kept(..) => Ok(None),
        }
    }

    /// Has the signature of a new pool's descriptor checked.
    pub(super) fn prove_creation(
        &mut self,
        id: Option<&str>,
        pool: NewPool,
        descriptor: Arc<Descriptor>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        self.check_attempts(turn)?;
        let bytes = pool.bytes() as u64;
        let memory = self
            .peer
            .link()
            .account()
            .reserve(Resource::Inbound, bytes)?;
        let proof = Proof::Creation(Box::new(pool), memory);
        self.verify(id, proof, Box::new(move || descriptor.is_signed()), turn)
    }

    /// The refusal of a proof whose signatures are not looked at, or not what is wrong with it.
    fn refuse_proof(&self, turn: &mut Turn<'_, D>) -> Refusal {
        turn.driver.note_refused(&self.peer);
        Refusal::unproved()
    }

    /// The refusal of a request that named an encrypted pool without its proof. Whoever guesses
    /// names learns one from it, so it counts as a wrong proof.
    pub(super) fn refuse_guess(&self, refusal: Refusal, turn: &mut Turn<'_, D>) -> Refusal {
        if refusal != Refusal::unproved() {
            return refusal;
        }
        match self.check_attempts(turn) {
            Ok(()) => self.refuse_proof(turn),
            Err(too_many) => too_many,
        }
    }

    /// Issues a challenge, which replaces an earlier one.
    fn challenge(&mut self, turn: &mut Turn<'_, D>) -> String {
        let server_nonce = turn.driver.random();
        self.proofs.challenge = Some((server_nonce, turn.time()));
        let instance = turn.driver.context().instance;
        json!({
            "server_nonce": text::encode(&server_nonce), "server_instance": text::encode(&instance),
        })
        .to_string()
    }

    /// Takes the proof of an app's key.
    fn app_proof(
        &mut self,
        id: Option<&str>,
        said: &AppProof<'_>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        let app_key: [u8; 32] = binary("app_key", &said.app_key)?;
        let client_nonce = binary("client_nonce", &said.client_nonce)?;
        let sig = binary("sig", &said.sig)?;
        self.check_attempts(turn)?;
        let exchange = self.exchange(client_nonce, &said.cb_type, turn);
        let exchange = exchange.ok_or_else(|| self.refuse_proof(turn))?;
        let app = said.app_id.clone();
        let proof = Proof::App(app.clone(), app_key);
        let bindings = bindings(self.terms.binding, turn.driver.context().allow_pidns);
        let check = move || {
            let mut exchanges = bindings.map(|binding| Exchange {
                binding,
                ..exchange
            });
            exchanges.any(|exchange| proof::verify_app(app.as_str(), &app_key, &exchange, &sig))
        };
        self.verify(id, proof, Box::new(check), turn)
    }

    /// Marks an app's key as proved, until the handshake.
    fn seat_app(
        &mut self,
        app: AppId,
        app_key: [u8; 32],
        turn: &mut Turn<'_, D>,
    ) -> Result<String, Refusal> {
        let who = &self.who;
        let decided = turn.with_registry(|registry, _| match registry.key_of(&app) {
            Some(key) if key == app_key => Ok(()),
            Some(_) => Err(Refusal::unproved()),
            None => registry.check_new_key(&app, who),
        });
        // Its signature is good, and it is somebody else's.
        decided.map_err(|refusal| match refusal.code {
            Code::Unauthenticated => self.refuse_proof(turn),
            _ => refusal,
        })?;
        self.who.proved = Some((app, app_key));
        Ok("{}".into())
    }

    /// Gives this connection administrator rights, and proves that the server has the token too.
    fn admin_proof(
        &mut self,
        said: &AdminProof<'_>,
        turn: &mut Turn<'_, D>,
    ) -> Result<String, Refusal> {
        let client_nonce = binary("client_nonce", &said.client_nonce)?;
        let mac: [u8; 32] = binary("mac", &said.mac)?;
        let is_bound = self.terms.binding != ChannelBinding::None;
        if !is_bound && !turn.driver.context().admin_over_plain_tcp {
            return Err(refusals::no_admin_over_plain_tcp());
        }
        self.check_attempts(turn)?;
        let exchange = self.exchange(client_nonce, &said.cb_type, turn);
        let answer =
            exchange.and_then(|exchange| {
                let exchanges = bindings(self.terms.binding, turn.driver.context().allow_pidns)
                    .map(|binding| Exchange {
                        binding,
                        ..exchange
                    });
                let mut macs = exchanges.map(|exchange| turn.driver.admin_mac(&exchange, &mac));
                macs.find_map(|mac| mac)
            });
        let answer = answer.ok_or_else(|| self.refuse_proof(turn))?;
        self.terms.is_admin = true;
        Ok(json!({"mac": text::encode(&answer)}).to_string())
    }

    /// Issues a challenge for a pool. The challenge for another name looks the same.
    pub(super) fn pool_challenge(&mut self, pool: &PoolName, turn: &mut Turn<'_, D>) -> String {
        let current = turn.with_registry(|registry, _| registry.descriptor(pool));
        let site = turn.driver.context();
        let (instance, decoy) = (
            site.instance,
            proof::decoy_pool_id(&site.secret, pool.as_str()),
        );
        let server_nonce = turn.driver.random();
        let challenge = match current {
            Some(descriptor) => proof::Challenge {
                server_nonce,
                pool_id: descriptor.pool_id(),
                epoch: descriptor.epoch(),
                suite: descriptor.suite().number(),
            },
            None => proof::Challenge {
                server_nonce,
                pool_id: decoy,
                epoch: 1,
                suite: Suite::Sealed.number(),
            },
        };
        let now_ms = turn.time().0 / 1000;
        self.proofs.pools.put(pool.as_str(), challenge, now_ms);
        json!({
            "pool_id": text::encode(&challenge.pool_id), "epoch": challenge.epoch,
            "suite": challenge.suite, "server_nonce": text::encode(&server_nonce),
            "server_instance": text::encode(&instance),
        })
        .to_string()
    }

    /// Accepts the proof of roles in an encrypted pool.
    pub(super) fn pool_prove(
        &mut self,
        id: Option<&str>,
        pool: &PoolName,
        said: &str,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        let said = JoinProof::from_json(said)
            .map_err(|error| Refusal::new(Code::BadMessage, error.to_string()))?;
        self.check_attempts(turn)?;
        let now_ms = turn.time().0 / 1000;
        let challenge = self.proofs.pools.take(pool.as_str(), now_ms);
        let mut bindings = bindings(self.terms.binding, turn.driver.context().allow_pidns);
        let is_bound = said.cb_type == self.terms.binding.name() && self.takes_binding(turn);
        let challenge = challenge.filter(|_| is_bound);
        let challenge = challenge.ok_or_else(|| self.refuse_proof(turn))?;
        let current = turn.with_registry(|registry, _| registry.descriptor(pool));
        let proof = Proof::Pool(pool.clone(), current.clone(), said.signatures.roles());
        let app = self.app().expect("only a ready session joins").0.clone();
        let server_instance = turn.driver.context().instance;
        let pool = pool.clone();
        let check = move || {
            bindings.any(|binding| {
                let asked = ProofRequest {
                    pool: pool.as_str(),
                    app_id: app.as_str(),
                    server_instance,
                    binding,
                    current: current.as_deref(),
                };
                proof::verify_join(&said, Some(challenge), &asked).is_some()
            })
        };
        self.verify(id, proof, Box::new(check), turn)
    }

    /// Joins an encrypted pool, or changes the roles there. The reply is sent first, and then what
    /// waits for the app in the pool.
    fn seat_member(
        &mut self,
        id: Option<&str>,
        pool: &PoolName,
        descriptor: &Arc<Descriptor>,
        roles: Roles,
        turn: &mut Turn<'_, D>,
    ) -> Result<(), Refusal> {
        self.forget_left(turn);
        let is_member = self.memberships.iter().any(|m| m.name == *pool);
        if !is_member {
            crate::registry::check_pools(self.memberships.len() + 1, turn.limits())?;
        }
        let ready = self.ready.as_ref().expect("only a ready session joins");
        let Proved {
            entrance,
            chain,
            rehydrated,
            watch,
            mut subscriptions,
            triggers,
            restored_ms,
        } = turn.with_registry(|registry, turn| {
            let said = Said {
                triggers: &ready.triggers,
                replace: ready.earlier == Earlier::Replaced,
                is_inside: self.memberships.is_empty() || self.is_inside(),
                is_member,
            };
            registry.open_proved(
                (&ready.app, &self.who),
                pool,
                (descriptor, roles),
                &said,
                &self.peer,
                turn,
            )
        })?;
        let names: Vec<_> = triggers.iter().map(|spec| spec.name.clone()).collect();
        if !is_member {
            self.restore_triggers(pool, &triggers);
        }
        if roles == Roles::Join {
            // They stay remembered, for when it may read again.
            subscriptions.clear();
        }
        let mut reply = json!({
            "roles": roles.number(), "descriptor": text::encode(descriptor.as_bytes()),
            "rehydrated": rehydrated,
        });
        if !chain.is_empty() {
            reply["chain"] = chain.iter().map(|bytes| text::encode(bytes)).collect();
        }
        if let Some(unix_ms) = restored_ms {
            reply["restored_ms"] = unix_ms.into();
        }
        if rehydrated {
            reply["triggers"] = json!(names);
            reply["watching"] = watch.is_some().into();
            reply["subscriptions"] = json!(subscriptions);
        }
        self.reply(id, &reply.to_string(), turn);
        self.proofs.refused = 0;
        let Some(entrance) = entrance else {
            self.change_roles(pool, roles, turn);
            self.subscribe_again(pool, &subscriptions, turn);
            return Ok(());
        };
        self.enter(entrance, watch, turn);
        self.subscribe_again(pool, &subscriptions, turn);
        if !self.settle(turn) {
            let _ = self.overtaken(turn);
        }
        Ok(())
    }

    /// Serves again what the app had in a pool that was just proved.
    fn restore_triggers(&mut self, pool: &PoolName, triggers: &[TriggerSpec]) {
        let ready = self.ready.as_mut().expect("only a ready session joins");
        if ready.earlier != Earlier::Restored {
            return;
        }
        let own = ready.triggers.iter().filter(|spec| spec.is_for(pool));
        let own: BTreeSet<_> = own.map(|spec| spec.name.clone()).collect();
        let others = triggers.iter().filter(|spec| !own.contains(&spec.name));
        // They were proved for this pool only.
        let here = others.map(|spec| TriggerSpec {
            pools: Some(vec![pool.clone()]),
            ..spec.without_schema()
        });
        ready.triggers.extend(here);
    }

    /// Whether the connection is only in encrypted pools.
    pub(super) fn is_inside(&self) -> bool {
        !self.memberships.is_empty() && self.memberships.iter().all(|m| m.grant.is_some())
    }

    /// Restores the subscriptions of a member.
    fn subscribe_again(&self, pool: &PoolName, blocks: &[BlockId], turn: &mut Turn<'_, D>) {
        let Some(m) = self.memberships.iter().find(|m| m.name == *pool) else {
            return;
        };
        for block in blocks {
            // A removed block does not change any more.
            let _ = turn.with_pool(&m.pool, |pool, turn| {
                pool.blocks().subscribe(m.member, block, turn)
            });
        }
    }

    /// The descriptors of a pool's epochs before a given one.
    pub(super) fn pool_chain(
        &mut self,
        asked: &Chain,
        turn: &mut Turn<'_, D>,
    ) -> Result<String, Refusal> {
        self.checked_membership(Some(asked.pool.as_str()), turn)?;
        let (chain, more) = turn
            .with_registry(|registry, _| registry.chain(&asked.pool, asked.before, asked.limit));
        let chain: Vec<_> = chain.iter().map(|bytes| text::encode(bytes)).collect();
        Ok(json!({"chain": chain, "more": more}).to_string())
    }

    /// Leaves a member only what its present roles in a pool allow: triggers, subscriptions and
    /// locks of blocks.
    fn change_roles(&mut self, pool: &PoolName, roles: Roles, turn: &mut Turn<'_, D>) {
        let Some(m) = self.memberships.iter_mut().find(|m| m.name == *pool) else {
            return;
        };
        if let Some(grant) = &mut m.entrance.grant {
            grant.roles = roles;
        }
        let m = m.clone();
        let _ = self.settle(turn);
        let ready = self.ready.as_ref().expect("only a ready session joins");
        turn.with_pool(&m.pool, |pool, turn| {
            let here = || ready.triggers.iter().filter(|spec| spec.is_for(&m.name));
            let gone = here().filter(|spec| m.served_as(spec).is_none());
            pool.unserve(m.member, gone.map(|spec| &spec.name), turn);
            pool.serve(m.member, here().filter_map(|spec| m.served_as(spec)), turn);
            let takes_answers = !ready.holds_answers && m.takes_answers();
            pool.allow_answers(m.member, takes_answers, turn);
            let (most, missing) = match roles {
                Roles::Join => (None, "read"),
                Roles::Read => (Some(Access::Read), "write"),
                Roles::Write => return,
            };
            let why = refusals::role_not_proved(missing, &m.name);
            pool.blocks().lower(m.member, most, &why, turn);
        });
    }

    /// Whether a client whose proofs were refused may try again.
    fn check_attempts(&self, turn: &mut Turn<'_, D>) -> Result<(), Refusal> {
        match turn.driver.may_prove(&self.peer) {
            true => Ok(()),
            false => Err(Refusal::too_many_refused()),
        }
    }

    /// Counts a refused proof; the third ends the connection.
    pub(super) fn count_refused(&mut self, refusal: &Refusal, turn: &mut Turn<'_, D>) -> Flow {
        if refusal.code != Code::Unauthenticated {
            return Flow::Continue;
        }
        self.proofs.refused += 1;
        let audit = Audit {
            event: "proof_refused",
            app: self.ready.as_ref().map(|ready| &ready.app),
            instance: self.ready.as_ref().map(|ready| ready.instance),
            detail: json!({"refused": self.proofs.refused}),
        };
        turn.audit(&self.peer, &audit);
        if self.proofs.refused < REFUSED_MAX {
            Flow::Continue
        } else {
            Flow::Close
        }
    }

    /// The exchange that a proof refers to; this uses up the challenge.
    fn exchange(
        &mut self,
        client_nonce: [u8; 32],
        cb_type: &str,
        turn: &Turn<'_, D>,
    ) -> Option<Exchange> {
        let (server_nonce, given) = self.proofs.challenge.take()?;
        let is_in_time = turn.time() <= given.after_ms(CHALLENGE_MS);
        let is_bound = cb_type == self.terms.binding.name() && self.takes_binding(turn);
        (is_in_time && is_bound).then_some(Exchange {
            client_nonce,
            server_nonce,
            server_instance: turn.driver.context().instance,
            binding: self.terms.binding,
        })
    }

    /// Whether the channel binding of this connection is sufficient.
    fn takes_binding(&self, turn: &Turn<'_, D>) -> bool {
        match self.terms.binding {
            ChannelBinding::None => {
                self.terms.is_loopback && !turn.driver.context().require_channel_binding
            }
            ChannelBinding::Unix { .. } | ChannelBinding::TlsExporter(_) => true,
        }
    }

    /// Answers a request. A refused proof counts, and so does a request that names an encrypted
    /// pool without one.
    pub(super) fn answer_request(
        &mut self,
        id: Option<&str>,
        result: Result<Reply, Refusal>,
        turn: &mut Turn<'_, D>,
    ) -> Flow {
        match result {
            Ok(reply) => {
                self.answer(id, reply, turn);
                Flow::Continue
            }
            Err(refusal) => {
                self.refuse(id, &refusal, turn);
                self.count_refused(&refusal, turn)
            }
        }
    }

    /// Has the signatures of a pool's next descriptor checked.
    pub(super) fn pool_rotate(
        &mut self,
        id: Option<&str>,
        pool: &PoolName,
        said: &str,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        self.checked_membership(Some(pool.as_str()), turn)?
            .check_roles(Roles::Write)?;
        let next = turn.with_registry(|registry, _| registry.next_descriptor(pool, said))?;
        self.check_attempts(turn)?;
        let proof = Proof::Rotation(pool.clone(), next.clone());
        self.verify(id, proof, Box::new(move || next.is_signed()), turn)
    }

    /// Moves a pool to its next epoch, and notifies its members. Those whose keys changed must
    /// leave.
    fn rotate(
        &mut self,
        pool: &PoolName,
        next: Successor,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        // Its roles may have changed while the signatures were checked.
        self.checked_membership(Some(pool.as_str()), turn)?
            .check_roles(Roles::Write)?;
        let peer = self.peer.clone();
        let Rotated {
            descriptor,
            pool: handle,
            purges,
            moves,
            kept,
            dropped,
        } = turn.with_registry(|registry, turn| registry.rotate(pool, next, &peer, turn))?;
        let tell = |peer: &D::Peer, is_member, turn: &mut Turn<'_, D>| {
            let json = rotated_event(pool, &descriptor, is_member).to_string();
            turn.send(peer, Class::Control, json.len(), |out| {
                encode::message(out, &json)
            });
        };
        let before = turn.with_pool(&handle, |pool, _| in_use(pool));
        for (peer, membership) in &dropped {
            leave(membership, turn);
            tell(peer, false, turn);
        }
        for peer in &kept {
            tell(peer, true, turn);
        }
        let (purged, after) = turn.with_pool(&handle, |pool, turn| {
            if moves {
                pool.blocks().renew_all(turn);
            }
            let purged = purges.then(|| pool.purge(turn));
            (purged.unwrap_or_default(), in_use(pool))
        });
        let [calls, locks, loans] = [0, 1, 2].map(|at| before[at].saturating_sub(after[at]));
        let reply = json!({
            "epoch": descriptor.epoch(), "members_kept": kept.len(),
            "members_dropped": dropped.len(),
            "dropped": {
                "calls": calls, "parked": purged.parked, "answers": purged.answers,
                "repeats": purged.repeats, "locks": locks, "loans": loans,
                // What is queued for a member is sent to it before the notice.
                "events": 0,
            },
        });
        Ok(Reply::Kept(reply.to_string(), PendingReply::Registration))
    }
}

/// The calls in flight, the locks and the loans of a pool.
fn in_use<D: Driver>(pool: &mut Pool<D>) -> [u64; 3] {
    let calls = pool.stats().calls_in_flight as u64;
    let blocks = pool.blocks().counts();
    [calls, blocks.locks, blocks.loans]
}

/// What may identify a channel for its client, if the server sees it as `own`.
fn bindings(own: ChannelBinding, allow_pidns: bool) -> impl Iterator<Item = ChannelBinding> {
    let elsewhere = match own {
        ChannelBinding::Unix { uid, .. } if allow_pidns => {
            Some(ChannelBinding::Unix { uid, pid: 0 })
        }
        _ => None,
    };
    std::iter::once(own).chain(elsewhere)
}

/// A binary field of exactly `N` bytes.
fn binary<const N: usize>(field: &str, said: &str) -> Result<[u8; N], Refusal> {
    text::decode(said).ok_or_else(|| refusals::not_binary(field, N))
}
