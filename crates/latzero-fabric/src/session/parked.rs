//! Requests about parked calls: an app's own, all in a pool for its owner, and all for
//! administrators.

use latzero_crypto::keys::Roles;
use latzero_protocol::Refusal;
use latzero_protocol::parked::{Parked, ParkedAction, ParkedChange, ParkedFilter, ParkedState};
use serde_json::{Value, json};

use super::Session;
use super::pending::{PendingReply, Reply};
use crate::driver::Driver;
use crate::refusals;
use crate::registry::{Membership, PAGE_BYTES_MAX};
use crate::rows::StoreChange;
use crate::turn::Turn;

/// How many calls one request changes at most.
const CHANGED_AT_ONCE_MAX: usize = 1000;

/// A call or an answer, and its pool.
struct Found<D: Driver> {
    number: u64,
    pool: D::Pool,
}

impl<D: Driver> Session<D> {
    pub(super) fn parked(&self, parked: &Parked, turn: &mut Turn<'_, D>) -> Result<Reply, Refusal> {
        let is_admin = self.terms.is_admin;
        self.check_reader(&parked.filter, turn)?;
        match parked.action {
            ParkedAction::List { after, limit } => {
                let found = self.find(&parked.filter, is_admin, (after, limit), &|_| true, turn);
                Ok(Reply::Now(page(&found, limit, turn)))
            }
            ParkedAction::Show => {
                let found = self.find(&parked.filter, is_admin, (0, 1), &|_| true, turn);
                let shown = found.first().and_then(|found| {
                    turn.with_pool(&found.pool, |pool, turn| {
                        pool.durable()
                            .describe_parked(found.number, true, &turn.now)
                    })
                });
                shown
                    .map(Reply::Now)
                    .ok_or_else(|| not_found(&parked.filter))
            }
            ParkedAction::Change(change) => self.change(change, &parked.filter, is_admin, turn),
        }
    }

    fn change(
        &self,
        change: ParkedChange,
        filter: &ParkedFilter,
        is_admin: bool,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        // One that is named is found in any state, to say why nothing was changed.
        let may = |state| filter.number.is_some() || change.applies_to(state);
        let found = self.find(filter, is_admin, (0, CHANGED_AT_ONCE_MAX + 1), &may, turn);
        if filter.number.is_some() && found.is_empty() {
            return Err(not_found(filter));
        }
        let is_more = found.len() > CHANGED_AT_ONCE_MAX;
        let mut changed = 0;
        for found in found.into_iter().take(CHANGED_AT_ONCE_MAX) {
            let is_changed = turn.with_pool(&found.pool, |pool, turn| {
                pool.change_parked(found.number, change, turn)
            });
            changed += usize::from(is_changed);
        }
        if let Some(number) = filter.number.filter(|_| changed == 0) {
            return Err(match change {
                ParkedChange::Cancel => refusals::parked_call_has_ended(number),
                ParkedChange::Retry(_) => refusals::parked_call_not_dead(number),
                ParkedChange::Purge => refusals::parked_call_not_ended(number),
            });
        }
        if let Some(ready) = &self.ready {
            let what = match change {
                ParkedChange::Cancel => "parked_cancel",
                ParkedChange::Retry(_) => "parked_retry",
                ParkedChange::Purge => "parked_purge",
            };
            let detail = json!({"action": what, "calls": changed, "of": filter.app});
            self.audit("parked_changed", (&ready.app, ready.instance), detail, turn);
        }
        let reply = json!({"changed": changed, "more": is_more}).to_string();
        if changed == 0 {
            return Ok(Reply::Now(reply));
        }
        // Nothing has this number: the reply waits until everything before it is on disk.
        turn.store(StoreChange::EndAnswer(0), Some(&self.peer));
        Ok(Reply::Kept(reply, PendingReply::Removal))
    }

    /// Calls of an encrypted pool are for readers: a member that may only join is told so if it
    /// names the pool, and otherwise sees none.
    fn check_reader(&self, filter: &ParkedFilter, turn: &mut Turn<'_, D>) -> Result<(), Refusal> {
        let named = |m: &&Membership<D>| filter.pool.as_ref() == Some(&m.name);
        match self.memberships.iter().find(named) {
            Some(m) if turn.with_pool(&m.pool, |pool, _| pool.has_member(m.member)) => {
                m.check_roles(Roles::Read)
            }
            _ => Ok(()),
        }
    }

    /// The calls and answers that match a filter, may be in their state, and that this connection
    /// may see.
    fn find(
        &self,
        filter: &ParkedFilter,
        is_admin: bool,
        (after, limit): (u64, usize),
        may: &dyn Fn(ParkedState) -> bool,
        turn: &mut Turn<'_, D>,
    ) -> Vec<Found<D>> {
        let view = self.view();
        let pools = turn.with_registry(|registry, _| registry.owned(filter.pool.as_ref(), &view));
        let mut found: Vec<Found<D>> = Vec::new();
        for (pool, is_own) in pools {
            let viewer = (!is_admin && !is_own).then_some(view.app);
            let numbers = turn.with_pool(&pool, |pool, _| {
                pool.durable()
                    .find_parked(filter, viewer, (after, limit), may)
            });
            found.extend(numbers.into_iter().map(|number| Found {
                number,
                pool: pool.clone(),
            }));
        }
        found.sort_unstable_by_key(|found| found.number);
        found.truncate(limit);
        found
    }
}

fn page<D: Driver>(found: &[Found<D>], limit: usize, turn: &mut Turn<'_, D>) -> String {
    let mut entries = Vec::new();
    let (mut bytes, mut last) = (0, None);
    let mut is_more = found.len() == limit;
    for found in found {
        let shown = turn.with_pool(&found.pool, |pool, turn| {
            pool.durable()
                .describe_parked(found.number, false, &turn.now)
        });
        if let Some(shown) = shown {
            bytes += shown.len() + 1;
            if bytes > PAGE_BYTES_MAX {
                is_more = true;
                break;
            }
            entries.push(shown);
        }
        last = Some(found.number);
    }
    let after = Value::from(last.filter(|_| is_more));
    format!("{{\"parked\":[{}],\"after\":{after}}}", entries.join(","))
}

fn not_found(filter: &ParkedFilter) -> Refusal {
    refusals::no_parked_call(filter.number.unwrap_or_default())
}
