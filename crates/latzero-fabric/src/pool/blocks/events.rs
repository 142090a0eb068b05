//! Listings, descriptions and events of blocks.

use latzero_protocol::message::Page;

use super::*;
use crate::memory::VersionNotice;
use crate::registry::{PageText, append};

/// How many attachments a block's description lists.
const ATTACHMENTS_SHOWN_MAX: usize = 100;

impl Blocks {
    pub(super) fn version_of<D: Driver>(&self, key: BlockKey, turn: &mut Turn<'_, D>) -> u64 {
        self.blocks
            .at(key)
            .map_or(0, |block| turn.block_version(block.storage))
    }

    pub(super) fn describe<D: Driver>(
        &self,
        key: BlockKey,
        mode: Option<(Access, bool)>,
        pool: &PoolInfo,
        turn: &mut Turn<'_, D>,
    ) -> Value {
        let version = self.version_of(key, turn);
        let block = self.at(key).expect("its caller looked it up");
        let mut description = block.description(pool.name.as_str(), version);
        if let Some((access, is_mapped)) = mode {
            description["mode"] = access.as_str().into();
            description["access"] = if is_mapped { "mapped" } else { "copied" }.into();
        }
        description
    }
}

impl<D: Driver> PoolBlocks<'_, D> {
    /// The pool's blocks in the order of their names, a page of them as JSON text.
    pub fn list(&self, page: &Page<'_>, turn: &mut Turn<'_, D>) -> String {
        let after = page.after.as_deref();
        let mut found: Vec<&Block> = self
            .blocks
            .blocks
            .iter()
            .map(|(_, block)| block)
            .filter(|block| !matches!(block.phase, Phase::New))
            .filter(|block| after.is_none_or(|after| block.id.as_str() > after))
            .collect();
        // One more than the page takes, so that it knows whether there are more.
        if found.len() > page.limit + 1 {
            found.select_nth_unstable_by(page.limit, |a, b| a.id.cmp(&b.id));
            found.truncate(page.limit + 1);
        }
        found.sort_by(|a, b| a.id.cmp(&b.id));
        let mut text = PageText::new("blocks", page.limit);
        for block in found {
            let write = |out: &mut String| {
                let version = turn.block_version(block.storage);
                let mut description = block.description(self.info.name.as_str(), version);
                description["attachments"] = block.attachments.len().into();
                description["bytes"] = block.total().into();
                description["locked"] = (!block.lock.holders().is_empty()).into();
                append(out, &description);
            };
            if !text.add(block.id.as_str(), write) {
                break;
            }
        }
        text.finish()
    }

    /// The full description of a block.
    ///
    /// # Errors
    /// `no_block`, `not_member`.
    pub fn info(
        &self,
        member: MemberKey,
        id: &BlockId,
        turn: &mut Turn<'_, D>,
    ) -> Result<Value, Refusal> {
        self.asker(member)?;
        let (_, block) = self.blocks.find(id, self.info)?;
        let version = turn.block_version(block.storage);
        let mut description = block.description(self.info.name.as_str(), version);
        let who = |member: MemberKey| {
            let member = self.members.at(member);
            member.map(|m| json!({"app_id": m.app, "instance": m.instance}))
        };
        let attachments = block.attachments.iter().filter_map(|a| {
            let mut shown = who(a.member)?;
            shown["mode"] = a.access().as_str().into();
            shown["calls"] = a.calls().into();
            Some(shown)
        });
        description["attachments"] = attachments.take(ATTACHMENTS_SHOWN_MAX).collect();
        description["attachments_total"] = block.attachments.len().into();
        let holders: Vec<Value> = block
            .lock
            .holders()
            .iter()
            .filter_map(|held| {
                let mut shown = who(held.member)?;
                shown["fence"] = held.fence.into();
                Some(shown)
            })
            .collect();
        if let Some(first) = block.lock.holders().first() {
            description["lock"] = json!({
                "mode": first.mode.as_str(), "holders": holders, "waiting": block.lock.waiting(),
            });
        }
        description["subscribers"] = block.subscribers.len().into();
        description["bytes"] = block.total().into();
        description["created"] = block.created.into();
        description["permissions"] = json!({
            "read": block.permissions.read.names(), "write": block.permissions.write.names(),
        });
        Ok(description)
    }

    /// Replies with a block's description, and with its descriptor if the member is attached and
    /// accepts descriptors.
    pub(super) fn answer_description(
        &self,
        key: BlockKey,
        member: MemberKey,
        id: Option<&str>,
        access: Option<Access>,
        turn: &mut Turn<'_, D>,
    ) {
        let (Some(to), Some(id)) = (self.members.at(member), id) else {
            return;
        };
        let storage = self
            .blocks
            .at(key)
            .expect("its caller looked it up")
            .storage;
        // If there is no descriptor, now or ever, the block is read and written by copies.
        let descriptor = access
            .filter(|_| to.takes_descriptors && to.check_descriptors(self.info).is_ok())
            .and_then(|access| turn.driver.descriptor(storage, access));
        let is_mapped = descriptor.is_some();
        let mode = access.map(|access| (access, is_mapped));
        let description = self.blocks.describe(key, mode, self.info, turn).to_string();
        let descriptors: Vec<D::Fd> = descriptor.into_iter().collect();
        let count = descriptors.len();
        turn.send_descriptors(
            &to.peer,
            Class::Control,
            description.len() + 256,
            descriptors,
            |out| encode::reply_with(out, id, &description, count),
        );
    }

    pub(super) fn notify_attached(&self, key: BlockKey, json: &str, turn: &mut Turn<'_, D>) {
        let Some(block) = self.blocks.at(key) else {
            return;
        };
        for attachment in &block.attachments {
            if let Some(member) = self.members.at(attachment.member) {
                turn.send(&member.peer, Class::Control, json.len(), |out| {
                    encode::message(out, json);
                });
            }
        }
    }

    /// Notifies subscribers and watchers of a new version of a block. An older version that arrives
    /// late is not announced.
    pub(super) fn notify_change(&mut self, key: BlockKey, version: u64, turn: &mut Turn<'_, D>) {
        let Some(block) = self.blocks.at_mut(key) else {
            return;
        };
        let news = (block.generation, version);
        if news <= block.announced {
            return;
        }
        block.announced = news;
        let block = self.blocks.at(key).expect("just found");
        let change = VersionNotice {
            topic: (self.info.number, key.slot),
            pool: &self.info.name,
            block: &block.id,
            version,
            generation: block.generation,
        };
        for &subscriber in block.subscribers.keys() {
            if let Some(member) = self.members.at(subscriber) {
                turn.block_changed(&member.peer, &change);
            }
        }
        for (key, member) in self.members.watchers(Event::BlockChanged, None) {
            if !block.subscribers.contains_key(&key) {
                turn.block_changed(&member.peer, &change);
            }
        }
    }

    /// An event about a block.
    pub(super) fn event_json(&self, event: &str, key: BlockKey, more: &str) -> String {
        let Some(block) = self.blocks.at(key) else {
            return String::new();
        };
        format!(
            "{{\"action\":\"event\",\"event\":\"{event}\",\"pool\":\"{}\",\"block_id\":\"{}\",\
            \"generation\":{}{more}}}",
            self.info.name, block.id, block.generation
        )
    }
}
