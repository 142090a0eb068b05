//! Requests of administrators.

use super::*;

impl<D: Driver> Session<D> {
    pub(super) fn admin(
        &mut self,
        id: Option<&str>,
        admin: &Admin,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        if !self.terms.is_admin {
            return Err(refusals::not_admin());
        }
        let is_for_own = match &admin.action {
            AdminAction::HandOver { .. } => true,
            AdminAction::Backup { to, .. } => to.is_some(),
            _ => false,
        };
        if is_for_own && !self.terms.is_own {
            return Err(refusals::not_servers_user());
        }
        if let Some(ready) = &self.ready {
            let what = match &admin.action {
                AdminAction::Shutdown => json!({"action": "shutdown"}),
                AdminAction::Reload => json!({"action": "reload"}),
                AdminAction::HandOver { taken } => json!({"action": "hand_over", "taken": taken}),
                AdminAction::Kick(app, instance) => {
                    json!({"action": "kick", "of": app, "of_instance": instance})
                }
                AdminAction::Forget(app) => json!({"action": "app_forget", "of": app}),
                AdminAction::RemoveKey(app) => json!({"action": "app_key_remove", "of": app}),
                AdminAction::Backup { to, .. } => json!({"action": "backup", "to": to}),
                AdminAction::CheckDatabase(full) => json!({"action": "db_check", "full": full}),
                AdminAction::QueryDatabase(_) => json!({"action": "db_query"}),
            };
            self.audit("administered", (&ready.app, ready.instance), what, turn);
        }
        match &admin.action {
            AdminAction::Kick(app, instance) => {
                let gone =
                    turn.with_registry(|registry, turn| registry.evict(app, *instance, turn));
                expel(&gone, "kicked", turn);
                Ok(Reply::Now(format!("{{\"kicked\":{}}}", gone.len())))
            }
            AdminAction::Forget(app) => {
                let peer = self.peer.clone();
                turn.with_registry(|registry, turn| registry.forget_app(app, &peer, turn))?;
                Ok(Reply::Kept("{}".into(), PendingReply::Removal))
            }
            AdminAction::RemoveKey(app) => {
                let peer = self.peer.clone();
                turn.with_registry(|registry, turn| registry.remove_key(app, &peer, turn))?;
                Ok(Reply::Kept("{}".into(), PendingReply::Removal))
            }
            AdminAction::HandOver { .. } if !self.features.fd_passing => {
                Err(refusals::cannot_hand_over())
            }
            action => {
                let reply = turn.driver.admin(action, &self.peer, id)?;
                Ok(reply.map_or(Reply::Later, Reply::Now))
            }
        }
    }
}
