//! Listings of apps and pools, in pages.
//!
//! A page is bounded in entries, in bytes and in what is examined to fill it, so that a listing
//! never delays others.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use latzero_protocol::message::{Page, TriggerSpec};
use latzero_protocol::policy::Actor;
use latzero_protocol::{AppId, InstanceId, PoolName, Refusal, TriggerName};
use serde::Serialize;
use serde_json::{Value, json};

use super::{App, Instance, PoolEntry, Registry};
use crate::driver::Driver;
use crate::now::Time;
use crate::refusals;
use crate::registration::Remembered;

/// Bytes of the entries on one page.
pub(crate) const PAGE_BYTES_MAX: usize = 128 * 1024;

/// Memberships examined for one page. A page that reaches this ends early, and says where the next
/// one begins.
const LOOKED_AT_MAX: usize = 10_000;

/// How many instances of one app a listing shows.
const INSTANCES_SHOWN_MAX: usize = 100;

/// Most bytes of one entry, so that each fits on a page.
const ENTRY_BYTES_MAX: usize = PAGE_BYTES_MAX - 1024;

/// Where the first parts of an app's entry end, in bytes from its beginning: each leaves room for
/// the next.
const META_END: usize = 24 * 1024;
const POOLS_END: usize = 48 * 1024;
const INSTANCES_END: usize = 80 * 1024;

/// Counters of the registry.
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

/// The client that requests a listing: it does not see pools that it may not join.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// Its app.
    pub app: &'a AppId,
    /// Its user, if that is known.
    pub uid: Option<u32>,
    /// Whether it may see what administrators may.
    pub is_admin: bool,
    /// Its instance, if any: an encrypted pool is visible to the instance that proved it.
    pub instance: Option<InstanceId>,
}

impl<D: Driver> Registry<D> {
    /// Whether a pool is visible to this connection.
    pub(super) fn shows(&self, entry: &PoolEntry<D>, view: &View<'_>) -> bool {
        view.is_admin
            || (entry.sealed.is_none() && self.may_see(entry, view))
            || self.is_member(entry, view)
    }

    fn may_see(&self, entry: &PoolEntry<D>, view: &View<'_>) -> bool {
        // An app with a key has proved it.
        let key = self.key_of(view.app);
        let (app, uid, key) = (view.app, view.uid, key.as_ref());
        entry.admits(&Actor { app, uid, key })
    }

    fn is_member(&self, entry: &PoolEntry<D>, view: &View<'_>) -> bool {
        let instances = self.apps.get(view.app).map(|app| &app.instances[..]);
        let mut own = instances.unwrap_or_default().iter();
        let own = own.find(|instance| Some(instance.id) == view.instance);
        own.is_some_and(|own| own.memberships.iter().any(|m| m.number == entry.number))
    }

    /// A pool that is visible to this connection.
    ///
    /// # Errors
    /// `no_pool` if it does not exist or is hidden.
    pub(super) fn shown_pool(
        &self,
        name: &PoolName,
        view: &View<'_>,
    ) -> Result<&PoolEntry<D>, Refusal> {
        let entry = self.pools.get(name).filter(|entry| self.shows(entry, view));
        entry.ok_or_else(|| refusals::no_pool(name))
    }

    /// Whether the content of a visible pool is visible too: administrators see only that an
    /// encrypted pool exists.
    fn is_inside(&self, entry: &PoolEntry<D>, view: &View<'_>) -> bool {
        entry.sealed.is_none() || self.is_member(entry, view)
    }

    /// The reply to the creator of a pool.
    #[must_use]
    pub fn describe_new_pool(&self, name: &PoolName) -> Option<(D::Pool, Value)> {
        let entry = self.pools.get(name)?;
        Some((entry.pool.clone(), pool_json(name, entry, true)))
    }

    /// Whether no hidden pool has this name.
    fn is_shown(&self, name: &PoolName, view: &View<'_>) -> bool {
        self.pools
            .get(name)
            .is_none_or(|entry| self.shows(entry, view))
    }

    /// A pool's handle and what the registry knows about it.
    ///
    /// # Errors
    /// `no_pool`.
    pub fn describe_pool(
        &self,
        name: &PoolName,
        view: &View<'_>,
    ) -> Result<(D::Pool, Value), Refusal> {
        let entry = self.shown_pool(name, view)?;
        Ok((
            entry.pool.clone(),
            pool_json(name, entry, self.is_inside(entry, view)),
        ))
    }

    /// The schema of a trigger in a pool: that of the first of `apps` that registered one.
    #[must_use]
    pub fn schema_of(
        &self,
        pool: &PoolName,
        trigger: &TriggerName,
        apps: &[AppId],
    ) -> Option<Arc<str>> {
        apps.iter().find_map(|app| {
            let registration = self.apps.get(app)?.registration.get();
            let sealed = registration.sealed_in(pool);
            let mut triggers = sealed.unwrap_or(&registration.triggers).iter();
            let spec = triggers.find(|spec| spec.name == *trigger && spec.is_for(pool))?;
            spec.schema.clone()
        })
    }

    /// The pools, a page of them as JSON text.
    #[must_use]
    pub fn list_pools(&self, page: &Page<'_>, view: &View<'_>) -> String {
        let mut text = PageText::new("pools", page.limit);
        for (looked_at, (name, entry)) in self.pools.range::<str, _>(behind(page)).enumerate() {
            if looked_at >= LOOKED_AT_MAX {
                text.is_more = true;
                break;
            }
            if !self.shows(entry, view) {
                text.passed(name.as_str());
                continue;
            }
            let write = |out: &mut String| {
                let mut pool = pool_json(name, entry, self.is_inside(entry, view));
                let text = pool.to_string();
                if text.len() <= ENTRY_BYTES_MAX {
                    out.push_str(&text);
                } else {
                    pool["properties"] = Value::Null;
                    pool["shortened"] = true.into();
                    append(out, &pool);
                }
            };
            if !text.add(name.as_str(), write) {
                break;
            }
        }
        text.finish()
    }

    /// The apps, a page of them as JSON text: of one pool, or all.
    ///
    /// # Errors
    /// `no_pool`.
    pub fn list_apps(
        &self,
        pool: Option<&PoolName>,
        page: &Page<'_>,
        view: &View<'_>,
        unix_ms: impl Fn(Time) -> u64,
    ) -> Result<String, Refusal> {
        if let Some(name) = pool {
            self.shown_pool(name, view)?;
        }
        let hides = self.pools.values().any(|entry| !self.shows(entry, view));
        let mut text = PageText::new("apps", page.limit);
        let mut looked_at = 0;
        for (id, app) in self.apps.range::<str, _>(behind(page)) {
            if looked_at >= LOOKED_AT_MAX {
                text.is_more = true;
                break;
            }
            if let Some(pool) = pool {
                let (is_in, cost) = app.is_in(pool);
                looked_at += cost;
                if !is_in {
                    text.passed(id.as_str());
                    continue;
                }
            }
            let shown = Shown {
                registry: self,
                view,
                is_own: id == view.app,
                hides,
            };
            if !text.add(id.as_str(), |out| app_json(out, id, app, &shown, &unix_ms)) {
                break;
            }
        }
        Ok(text.finish())
    }

    /// The visible pools, and how many of them are encrypted.
    pub fn seen_pools(&self, view: &View<'_>) -> (Vec<D::Pool>, usize) {
        let seen = || self.pools.values().filter(|entry| self.shows(entry, view));
        let encrypted = seen().filter(|entry| entry.sealed.is_some()).count();
        (seen().map(|entry| entry.pool.clone()).collect(), encrypted)
    }

    /// The numbers of known apps, connected apps, instances and pools.
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

/// The pools that a client sees in the entry of an app.
struct Shown<'a, D: Driver> {
    registry: &'a Registry<D>,
    view: &'a View<'a>,
    is_own: bool,
    /// Whether any pool is hidden from it.
    hides: bool,
}

impl<D: Driver> Shown<'_, D> {
    /// Its own pools are there for an app, but for encrypted ones that it has not proved.
    fn shows(&self, name: &PoolName) -> bool {
        !self.hides
            || (self.is_own && !self.is_sealed(name))
            || self.registry.is_shown(name, self.view)
    }

    fn is_sealed(&self, name: &PoolName) -> bool {
        self.registry.is_sealed(name)
    }

    fn exists(&self, name: &PoolName) -> bool {
        self.registry.pools.contains_key(name)
    }
}

impl<D: Driver> App<D> {
    /// Whether the app registered for a pool or is in it, and how much was examined to find out.
    fn is_in(&self, pool: &PoolName) -> (bool, usize) {
        let (registered, mut cost) = match &self.registration {
            Remembered::Read(registration) => (
                registration.pools.contains(pool),
                1 + registration.pools.len(),
            ),
            // Names need no escapes in JSON, so a quoted name in the text of a list is an entry of
            // the list.
            Remembered::Text(row) => {
                let is_in = row.pools.contains(&format!("\"{pool}\""));
                (is_in, 1 + row.pools.len() / 64)
            }
        };
        if registered {
            return (true, cost);
        }
        for instance in &self.instances {
            cost += instance.memberships.len();
            if instance.memberships.iter().any(|m| m.name == *pool) {
                return (true, cost);
            }
        }
        (false, cost)
    }
}

/// A page of a listing while it is written: entries until there are enough of them or it is full.
pub(crate) struct PageText {
    text: String,
    entries: usize,
    limit: usize,
    is_more: bool,
    /// The last name that the page covers, listed or skipped.
    last: String,
}

impl PageText {
    /// A page of the list `field` with at most `limit` entries.
    pub(crate) fn new(field: &str, limit: usize) -> PageText {
        PageText {
            text: format!("{{\"{field}\":["),
            entries: 0,
            limit,
            is_more: false,
            last: String::new(),
        }
    }

    /// Appends the entry `name`, which `write` writes; false if the page has no room for it. A
    /// first entry always has room: every entry is smaller than a page.
    pub(crate) fn add(&mut self, name: &str, write: impl FnOnce(&mut String)) -> bool {
        let before = self.text.len();
        if self.entries < self.limit {
            if self.entries > 0 {
                self.text.push(',');
            }
            write(&mut self.text);
            if self.entries == 0 || self.text.len() <= PAGE_BYTES_MAX {
                self.entries += 1;
                self.passed(name);
                return true;
            }
        }
        self.text.truncate(before);
        self.is_more = true;
        false
    }

    /// Skips an entry that is not listed.
    fn passed(&mut self, name: &str) {
        self.last.clear();
        self.last.push_str(name);
    }

    /// The page, and where the next one begins: after `after`.
    pub(crate) fn finish(self) -> String {
        let mut text = self.text;
        text.push(']');
        if self.is_more {
            text.push_str(",\"more\":true,\"after\":");
            append(&mut text, &self.last);
        } else {
            text.push_str(",\"more\":false");
        }
        text.push('}');
        text
    }
}

/// The names after the one at which a page continues.
fn behind<'p>(page: &'p Page<'_>) -> (Bound<&'p str>, Bound<&'p str>) {
    let start = page
        .after
        .as_deref()
        .map_or(Bound::Unbounded, Bound::Excluded);
    (start, Bound::Unbounded)
}

/// Appends a value as JSON text.
pub(crate) fn append(out: &mut String, value: &impl Serialize) {
    let text = serde_json::to_string(value).expect("a listing has only string keys");
    out.push_str(&text);
}

fn pool_json<D: Driver>(name: &PoolName, entry: &PoolEntry<D>, is_inside: bool) -> Value {
    let mut description = json!({
        "pool": name, "kind": "local", "durable": entry.durable, "encrypted": false,
        "owner": entry.owner,
        "policy": entry.policy.to_json(),
        "properties": entry.properties, "members": entry.members, "created": entry.created,
    });
    if let Some(sealed) = &entry.sealed {
        sealed.describe(&mut description);
    }
    if !is_inside {
        for private in ["owner", "policy", "properties"] {
            description[private] = Value::Null;
        }
    }
    description
}

/// Appends the entry of one app. An entry that is too long is shortened, and says so.
fn app_json<D: Driver>(
    out: &mut String,
    id: &AppId,
    app: &App<D>,
    view: &Shown<'_, D>,
    unix_ms: impl Fn(Time) -> u64,
) {
    let registration = app.registration.get();
    let start = out.len();
    let mut is_cut = false;
    let head = json!({
        "app_id": id,
        "live": !app.instances.is_empty(),
        "instances_total": app.instances.len(),
        "registered": app.registered,
        "last_seen": app.last_seen,
    });
    append(out, &head);
    out.pop();
    out.push_str(",\"meta\":");
    let before = out.len();
    append(out, &registration.meta);
    if out.len() - start > META_END {
        out.truncate(before);
        out.push_str("null");
        is_cut = true;
    }
    out.push_str(",\"pools\":");
    let pools = registration.pools.iter().filter(|pool| view.shows(pool));
    is_cut |= array(out, start + POOLS_END, pools);
    out.push_str(",\"instances\":");
    let instance = |i: &Instance<D>| {
        let pools = i.memberships.iter().map(|m| &m.name);
        let pools: Vec<_> = pools.filter(|pool| view.shows(pool)).collect();
        json!({"instance": i.id, "pools": pools, "since": unix_ms(i.since)})
    };
    let shown = app.instances.iter().take(INSTANCES_SHOWN_MAX);
    is_cut |= array(out, start + INSTANCES_END, shown.map(instance));
    out.push_str(",\"triggers\":");
    // Triggers that are served only in hidden pools are hidden too, and so are those for pools that
    // may not exist: a hidden pool must not differ from them.
    let sealed = registration.sealed.iter();
    let sealed = sealed.filter(|(pool, _)| view.shows(pool));
    let mut inside: BTreeMap<_, &TriggerSpec> = BTreeMap::new();
    for spec in sealed.flat_map(|(_, specs)| specs) {
        inside.entry(&spec.name).or_insert(spec);
    }
    let is_outside = |pool: &&PoolName| view.shows(pool) && !view.is_sealed(pool);
    let is_served = |pool: &&PoolName| {
        is_outside(pool) && (view.exists(pool) || registration.pools.contains(pool))
    };
    let is_anywhere = registration.pools.iter().any(|pool| is_outside(&pool));
    let outside = registration.triggers.iter().filter_map(|spec| {
        let is_known = inside
            .get(&spec.name)
            .is_some_and(|known| known.is_same(spec));
        let pools = spec.pools.as_ref();
        let pools = pools.map(|pools| pools.iter().filter(is_served).cloned().collect::<Vec<_>>());
        let is_shown = pools
            .as_ref()
            .map_or(is_anywhere, |pools| !pools.is_empty());
        (is_shown && !is_known).then_some((spec, pools))
    });
    let inside = inside.values().map(|&spec| {
        let shown = |pools: &Vec<PoolName>| {
            let shown = pools.iter().filter(|pool| view.shows(pool));
            shown.cloned().collect()
        };
        (spec, spec.pools.as_ref().map(shown))
    });
    let triggers = outside.chain(inside).map(|(spec, pools)| {
        let spec = spec.clone();
        TriggerSpec { pools, ..spec }.to_json()
    });
    is_cut |= array(out, start + ENTRY_BYTES_MAX, triggers);
    if is_cut {
        out.push_str(",\"shortened\":true");
    }
    out.push('}');
}

/// Appends an array of those entries that end before `end`; true if some are left out.
fn array(out: &mut String, end: usize, entries: impl Iterator<Item = impl Serialize>) -> bool {
    out.push('[');
    let mut is_cut = false;
    for (index, entry) in entries.enumerate() {
        let before = out.len();
        if index > 0 {
            out.push(',');
        }
        append(out, &entry);
        if out.len() > end {
            out.truncate(before);
            is_cut = true;
            break;
        }
    }
    out.push(']');
    is_cut
}
