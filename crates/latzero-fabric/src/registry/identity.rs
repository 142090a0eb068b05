//! The owners of AppIDs.
//!
//! An AppID belongs to the user of this machine who first used it over the Unix socket, as long as
//! the app is remembered, or permanently to the holder of the key bound to it. Nobody else may use
//! it.

use latzero_protocol::limits::SYSTEM_APP;
use latzero_protocol::policy::Actor;
use latzero_protocol::{AppId, Refusal};

use super::Registry;
use crate::driver::{Driver, Transport};
use crate::refusals;
use crate::rows::{BindingRow, StoreChange};
use crate::turn::Turn;

/// The AppID of a server that takes over.
const TAKEOVER_APP: &str = "latzero-takeover";

/// What is known about the other end of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Who {
    /// The user of this machine, if the kernel reports it.
    pub uid: Option<u32>,
    /// Whether it is the server's own user.
    pub is_own: bool,
    /// The AppID whose key was proved, and the key.
    pub proved: Option<(AppId, [u8; 32])>,
    /// The AppIDs that its TLS certificate names, if it has presented one: it may use no others.
    pub certified: Option<Vec<AppId>>,
}

impl Who {
    /// An app on this connection, as policies know it.
    pub(crate) fn actor<'a>(&'a self, app: &'a AppId) -> Actor<'a> {
        let key = self.proved.as_ref().filter(|(of, _)| of == app);
        Actor {
            app,
            uid: self.uid,
            key: key.map(|(_, key)| key),
        }
    }
}

/// The owner of an AppID.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Binding {
    /// The user that owns it while the app is remembered.
    uid: Option<u32>,
    /// The key that must be proved for it.
    key: Option<[u8; 32]>,
    /// Since when it is owned, in milliseconds since the Unix epoch.
    since: u64,
    /// Whether it outlives the server.
    is_kept: bool,
}

impl<D: Driver> Registry<D> {
    /// Restores the owner of an AppID from an earlier run.
    pub fn restore_binding(&mut self, row: &BindingRow) {
        let binding = Binding {
            uid: row.uid,
            key: row.key,
            since: row.since,
            is_kept: true,
        };
        self.keys += usize::from(binding.key.is_some());
        self.bindings.insert(row.app_id.clone(), binding);
    }

    /// Checks whether a client may use an AppID.
    ///
    /// # Errors
    /// `forbidden`, `unauthenticated`.
    pub(super) fn check_identity(
        &self,
        app_id: &AppId,
        who: &Who,
        transport: Transport,
    ) -> Result<(), Refusal> {
        if transport == Transport::BuiltIn {
            return Ok(());
        }
        check_name(app_id, who)?;
        check_certificate(app_id, who)?;
        let key = self.key_of(app_id);
        match (key, who.proves(app_id)) {
            (Some(key), Some(proved)) if key == proved => return Ok(()),
            (Some(_), _) => {
                return Err(refusals::key_not_proved(app_id));
            }
            (None, Some(_)) => self.check_new_key(app_id, who)?,
            (None, None) => {}
        }
        let uid = self.bindings.get(app_id).and_then(|binding| binding.uid);
        if uid.is_some() && uid != who.uid {
            return Err(refusals::name_of_other_user(app_id));
        }
        Ok(())
    }

    /// The key that is bound to an AppID.
    #[must_use]
    pub fn key_of(&self, app_id: &AppId) -> Option<[u8; 32]> {
        self.bindings.get(app_id)?.key
    }

    /// Checks whether a key may be bound to an AppID without a key: it must be new or owned by that
    /// user.
    ///
    /// # Errors
    /// `unauthenticated`, `quota`.
    pub fn check_new_key(&self, app_id: &AppId, who: &Who) -> Result<(), Refusal> {
        check_certificate(app_id, who)?;
        let owner = self.bindings.get(app_id).and_then(|binding| binding.uid);
        let is_free = match owner {
            Some(owner) => who.uid == Some(owner),
            None => who.uid.is_some() || !self.apps.contains_key(app_id),
        };
        if !is_free {
            return Err(Refusal::unproved());
        }
        let max = self.limits.app_keys_max;
        if self.keys >= max {
            return Err(refusals::too_many_keys(max));
        }
        Ok(())
    }

    /// Records the owner of an admitted AppID; returns whether earlier instances had no owner and
    /// must be removed.
    pub(super) fn bind(
        &mut self,
        app_id: &AppId,
        who: &Who,
        is_persistent: bool,
        turn: &mut Turn<'_, D>,
    ) -> bool {
        let key = who.proves(app_id);
        if who.uid.is_none() && key.is_none() {
            return false;
        }
        let since = turn.unix_ms();
        let known = self.bindings.get(app_id).cloned();
        let was = known.clone().unwrap_or_default();
        let binding = Binding {
            uid: was.uid.or(who.uid),
            key: was.key.or(key),
            since: known.as_ref().map_or(since, |known| known.since),
            // A key binding is permanent.
            is_kept: was.is_kept || is_persistent || key.is_some(),
        };
        if known.as_ref() == Some(&binding) {
            return false;
        }
        self.keys += usize::from(binding.key.is_some() && was.key.is_none());
        if binding.is_kept {
            turn.store(StoreChange::Binding(Box::new(binding.row(app_id))), None);
        }
        self.bindings.insert(app_id.clone(), binding);
        (was.uid, was.key) == (None, None)
    }

    /// An app is forgotten: its AppID becomes free, unless it has a key.
    pub(super) fn unbind(&mut self, app_id: &AppId, turn: &mut Turn<'_, D>) {
        let Some(binding) = self.bindings.get_mut(app_id) else {
            return;
        };
        binding.uid = None;
        let (is_kept, is_over) = (binding.is_kept, binding.key.is_none());
        let row = binding.row(app_id);
        if is_over {
            self.bindings.remove(app_id);
        }
        if is_kept {
            let change = if is_over {
                StoreChange::ForgetBinding(app_id.clone())
            } else {
                StoreChange::Binding(Box::new(row))
            };
            turn.store(change, None);
        }
    }

    /// Removes the key of an AppID, for an administrator.
    ///
    /// # Errors
    /// `no_app` if it has none.
    pub fn remove_key(
        &mut self,
        app_id: &AppId,
        promise: &D::Peer,
        turn: &mut Turn<'_, D>,
    ) -> Result<(), Refusal> {
        let Some(binding) = self.bindings.get_mut(app_id).filter(|b| b.key.is_some()) else {
            return Err(refusals::no_key(app_id));
        };
        binding.key = None;
        self.keys -= 1;
        let change = if binding.uid.is_some() {
            StoreChange::Binding(Box::new(binding.row(app_id)))
        } else {
            self.bindings.remove(app_id);
            StoreChange::ForgetBinding(app_id.clone())
        };
        turn.store(change, Some(promise));
        Ok(())
    }

    /// Something of an app outlives its last instance, such as a waiting call. So the app is
    /// remembered, and its AppID keeps its owner.
    pub fn outlast(&mut self, app_id: &AppId, turn: &mut Turn<'_, D>) {
        let is_users = self.bindings.get(app_id).is_some_and(|b| b.uid.is_some());
        let Some(app) = self.apps.get_mut(app_id).filter(|app| !app.is_persistent) else {
            return;
        };
        // The AppIDs of a user's tools belong to that user permanently.
        if !is_users || tool_of(app_id).is_some() {
            return;
        }
        app.is_persistent = true;
        app.store(app_id, None, turn);
        if let Some(binding) = self.bindings.get_mut(app_id) {
            binding.is_kept = true;
            turn.store(StoreChange::Binding(Box::new(binding.row(app_id))), None);
        }
    }
}

impl Who {
    /// The key that was proved for an AppID.
    fn proves(&self, app_id: &AppId) -> Option<[u8; 32]> {
        let (of, key) = self.proved.as_ref()?;
        (of == app_id).then_some(*key)
    }
}

impl Binding {
    fn row(&self, app_id: &AppId) -> BindingRow {
        BindingRow {
            app_id: app_id.clone(),
            uid: self.uid,
            key: self.key,
            since: self.since,
        }
    }
}

/// Checks names that are reserved for the server or for a user.
fn check_name(app_id: &AppId, who: &Who) -> Result<(), Refusal> {
    let name = app_id.as_str();
    // A server that takes over asks the running one, as the same user.
    if name == TAKEOVER_APP && who.is_own {
        return Ok(());
    }
    let is_servers = name
        .strip_prefix(SYSTEM_APP)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'));
    if is_servers {
        return Err(refusals::name_of_server(app_id));
    }
    match tool_of(app_id) {
        Some(uid) if who.uid != Some(uid) => Err(refusals::name_of_tool(app_id, uid)),
        _ => Ok(()),
    }
}

/// A certificate says which AppIDs its holder may use.
fn check_certificate(app_id: &AppId, who: &Who) -> Result<(), Refusal> {
    let Some(certified) = &who.certified else {
        return Ok(());
    };
    if certified.contains(app_id) {
        return Ok(());
    }
    let names: Vec<&str> = certified.iter().map(AppId::as_str).collect();
    let names = match names.is_empty() {
        true => "no AppID".to_owned(),
        false => names.join(", "),
    };
    Err(refusals::name_not_certified(app_id, names))
}

/// The user whose tools an AppID is reserved for: `cli-1000`, and `cli-1000-` followed by more.
fn tool_of(app_id: &AppId) -> Option<u32> {
    let rest = app_id.as_str().strip_prefix("cli-")?;
    let uid = rest.split_once('-').map_or(rest, |(uid, _)| uid);
    uid.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_server_and_of_tools_are_reserved() {
        let check = |name: &str, uid| {
            let who = Who {
                uid,
                ..Who::default()
            };
            check_name(&AppId::new(name).unwrap(), &who).is_ok()
        };
        assert!(!check("latzero", Some(0)) && !check("latzero-x", None));
        assert!(check("latzerox", None) && check("my-latzero", None));
        assert!(check("cli-7", Some(7)) && check("cli-7-00ff", Some(7)));
        assert!(!check("cli-7", Some(8)) && !check("cli-7-00ff", None));
        assert!(check("cli-x", None) && check("cli", None) && check("cli-", None));
    }
}
