//! What the registry tells of itself: apps and pools, in pages.

use latzero_protocol::message::{Page, TriggerSpec};
use latzero_protocol::{AppId, PoolName, Refusal};
use serde_json::{Value, json};

use super::{App, Instance, PoolEntry, Registry, no_pool};
use crate::driver::Driver;
use crate::now::Time;

/// Bytes of a listing after which it goes on on the next page: far below what a frame may have.
const PAGE_BYTES_MAX: usize = 1024 * 1024;

/// Instances of one app that a listing shows one by one.
const INSTANCES_SHOWN_MAX: usize = 100;

/// What the registry holds, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Apps that are remembered.
    pub apps_known: usize,
    /// Apps with a live instance.
    pub apps_live: usize,
    /// Live instances.
    pub instances: usize,
    /// Pools.
    pub pools: usize,
}

impl<D: Driver> Registry<D> {
    /// A pool's handle and what the registry knows of it.
    ///
    /// # Errors
    /// `no_pool`.
    pub fn describe_pool(&self, name: &PoolName) -> Result<(D::Pool, Value), Refusal> {
        let entry = self.pools.get(name).ok_or_else(|| no_pool(name))?;
        Ok((entry.pool.clone(), pool_json(name, entry)))
    }

    /// The pools, a page of them.
    #[must_use]
    pub fn list_pools(&self, page: &Page<'_>) -> Value {
        let rest = self
            .pools
            .iter()
            .filter(|(name, _)| is_after(name.as_str(), page))
            .map(|(name, entry)| pool_json(name, entry));
        let (pools, more) = fill_page(rest, page.limit);
        json!({"pools": pools, "more": more})
    }

    /// The apps, a page of them: of one pool, or all.
    ///
    /// # Errors
    /// `no_pool`.
    pub fn list_apps(
        &self,
        pool: Option<&PoolName>,
        page: &Page<'_>,
        unix_ms: impl Fn(Time) -> u64,
    ) -> Result<Value, Refusal> {
        if let Some(name) = pool.filter(|name| !self.pools.contains_key(*name)) {
            return Err(no_pool(name));
        }
        let is_in = |app: &App<D>| {
            pool.is_none_or(|pool| {
                app.registration.get().pools.contains(pool)
                    || app
                        .instances
                        .iter()
                        .any(|i| i.memberships.iter().any(|m| m.name == *pool))
            })
        };
        let rest = self
            .apps
            .iter()
            .filter(|(id, app)| is_after(id.as_str(), page) && is_in(app))
            .map(|(id, app)| app_json(id, app, &unix_ms));
        let (apps, more) = fill_page(rest, page.limit);
        Ok(json!({"apps": apps, "more": more}))
    }

    /// How many apps are known, how many of them live, and how many instances and pools there are.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            apps_known: self.apps.len(),
            apps_live: self.apps.len() - self.offline.len(),
            instances: self.instances,
            pools: self.pools.len(),
        }
    }
}

/// Takes entries until there are `limit` of them or they fill a reply; says whether there are more.
fn fill_page(mut rest: impl Iterator<Item = Value>, limit: usize) -> (Vec<Value>, bool) {
    let mut page = Vec::new();
    let mut bytes = 0;
    for entry in rest.by_ref() {
        bytes += entry.to_string().len();
        page.push(entry);
        if page.len() == limit || bytes >= PAGE_BYTES_MAX {
            break;
        }
    }
    (page, rest.next().is_some())
}

fn is_after(name: &str, page: &Page<'_>) -> bool {
    page.after.as_deref().is_none_or(|after| name > after)
}

fn pool_json<D: Driver>(name: &PoolName, entry: &PoolEntry<D>) -> Value {
    json!({
        "pool": name, "kind": "local", "durable": entry.durable, "encrypted": false, "owner": entry.owner,
        "policy": {"join": entry.policy.join.names(), "serve": entry.policy.serve.names()},
        "properties": entry.properties, "members": entry.members, "created": entry.created,
    })
}

fn app_json<D: Driver>(id: &AppId, app: &App<D>, unix_ms: impl Fn(Time) -> u64) -> Value {
    let instance = |i: &Instance<D>| {
        let pools: Vec<_> = i.memberships.iter().map(|m| &m.name).collect();
        json!({"instance": i.id, "pools": pools, "since": unix_ms(i.since)})
    };
    let registration = app.registration.get();
    json!({
        "app_id": id,
        "live": !app.instances.is_empty(),
        "instances": app.instances.iter().take(INSTANCES_SHOWN_MAX).map(instance).collect::<Vec<_>>(),
        "instances_total": app.instances.len(),
        "pools": registration.pools,
        "triggers": registration.triggers.iter().map(TriggerSpec::to_json).collect::<Vec<_>>(),
        "meta": registration.meta,
        "registered": app.registered,
        "last_seen": app.last_seen,
    })
}
