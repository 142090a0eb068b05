//! The record that restores a block after a restart.

use super::*;
use crate::memory::SPARE_SLOTS;

/// A block of an earlier run: a file, or memory that a client kept.
#[derive(Debug)]
pub struct Found<'a> {
    /// Its record, as [`Making::record`] gave it.
    pub record: &'a str,
    /// Greater than any fence of its lock so far: fences continue from there.
    pub fence: u64,
}

impl Found<'_> {
    /// The app that created it.
    ///
    /// # Errors
    /// If the record is invalid.
    pub fn owner(&self) -> Result<AppId, Refusal> {
        let record: Value =
            serde_json::from_str(self.record).map_err(|_| refusals::block_record_is_invalid())?;
        Ok(AppId::new(
            record["owner"]
                .as_str()
                .ok_or_else(refusals::block_record_is_invalid)?,
        )?)
    }

    /// The pool and the block of a record.
    ///
    /// # Errors
    /// If it is invalid.
    pub fn name(&self) -> Result<(PoolName, BlockId), Refusal> {
        let record: Value =
            serde_json::from_str(self.record).map_err(|_| refusals::block_record_is_invalid())?;
        let text = |name: &str| {
            record[name]
                .as_str()
                .ok_or_else(refusals::block_record_is_invalid)
        };
        let pool = PoolName::new(text("pool")?)?;
        Ok((pool, BlockId::new(text("block_id")?)?))
    }

    /// The block, without any reservation yet.
    pub(super) fn read(&self, account: &Arc<Account>) -> Result<Block, Refusal> {
        use latzero_protocol::memory::Apps;
        let record: Value =
            serde_json::from_str(self.record).map_err(|_| refusals::block_record_is_invalid())?;
        let number = |name: &str| {
            record[name]
                .as_u64()
                .ok_or_else(refusals::block_record_is_invalid)
        };
        let word = |name: &str| record[name].as_str();
        let apps = |name: &str| -> Result<Apps, Refusal> {
            let names = record["permissions"][name].as_array();
            let names = names.ok_or_else(refusals::block_record_is_invalid)?.iter();
            let names: Vec<&str> = names.filter_map(Value::as_str).collect();
            if names.contains(&"*") {
                return Ok(Apps::All);
            }
            let apps = names.into_iter().map(|name| Ok(AppId::new(name)?));
            Ok(Apps::These(apps.collect::<Result<_, Refusal>>()?))
        };
        let layout = match &record["layout"] {
            Value::Null => None,
            layout => {
                let text = layout.to_string();
                let raw = latzero_protocol::Raw::new(&text)
                    .map_err(|_| refusals::block_record_is_invalid())?;
                Some(Layout::parse(raw)?)
            }
        };
        let (_, id) = self.name()?;
        let sealed = match &record["sealed"] {
            Value::Null => None,
            sealed => {
                let uid = sealed["block_uid"].as_str().and_then(text::decode);
                let content = SealedContent::new(
                    uid.ok_or_else(refusals::block_record_is_invalid)?,
                    sealed["size"]
                        .as_u64()
                        .ok_or_else(refusals::block_record_is_invalid)?,
                );
                let capacity = |content: &SealedContent| content.geometry.capacity();
                let content = content.filter(|content| record["size"] == capacity(content));
                Some(content.ok_or_else(refusals::block_record_is_invalid)?)
            }
        };
        let kind = word("kind").map_or(Some(Kind::Persistent), Kind::parse);
        let kind = kind.ok_or_else(refusals::block_record_is_invalid)?;
        let permissions = Permissions {
            read: apps("read")?,
            write: apps("write")?,
        };
        let owner = self.owner()?;
        let mut about = account.hold(Resource::Registrations);
        about.force(about_bytes((&id, &owner), &permissions, layout.as_ref()));
        Ok(Block {
            id,
            storage: StorageId(0),
            kind,
            account: Arc::clone(account),
            _place: account.hold(Resource::BlockCount),
            room: Room::new(account, kind, 0)?,
            geometry: Geometry {
                size: number("size")?,
                slots: u32::try_from(number("slots")?)
                    .ok()
                    .filter(|slots| (1..=4).contains(slots))
                    .ok_or_else(refusals::block_record_is_invalid)?,
                spares: match record.get("spares") {
                    None => 0,
                    Some(spares) if *spares == SPARE_SLOTS => SPARE_SLOTS,
                    Some(_) => return Err(refusals::block_record_is_invalid()),
                },
            },
            sealed,
            layout,
            permissions,
            owner,
            about,
            // Nobody has attached yet, so a block that ends with its attachments would end at once.
            lifetime: Lifetime::Pool,
            generation: number("generation")?,
            created: record["created"].as_u64().unwrap_or(0),
            phase: Phase::Live,
            attachments: Vec::new(),
            subscribers: BTreeMap::new(),
            involved: BTreeSet::new(),
            lock: Lock::after(self.fence),
            due: None,
            waiting: Vec::new(),
            flushing: Vec::new(),
            announced: (0, 0),
            move_due: None,
        })
    }
}

/// The record of a block, and whether it is kept beyond this run.
pub(super) fn record(pool: &PoolInfo, block: &Block) -> Value {
    let mut record = json!({
        "pool": pool.name, "block_id": block.id, "kind": block.kind.as_str(),
        "size": block.geometry.size,
        "slots": block.geometry.slots, "owner": block.owner, "generation": block.generation,
        "created": block.created,
        "lifetime": block.lifetime.as_str(),
        "permissions": {"read": block.permissions.read.names(),
        "write": block.permissions.write.names()},
    });
    if block.geometry.spares > 0 {
        record["spares"] = block.geometry.spares.into();
    }
    if let Some(sealed) = &block.sealed {
        record["sealed"] = json!({"block_uid": text::encode(&sealed.uid), "size": sealed.size});
    }
    if !pool.outlives {
        record["outlives"] = false.into();
    }
    if let Some(layout) = &block.layout {
        record["layout"] = serde_json::from_str(&layout.to_json()).expect("a layout writes JSON");
    }
    record
}
