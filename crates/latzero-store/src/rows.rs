//! The records, and their tables.
//!
//! A row type lists its columns once, in the order of its fields. The statements that read and
//! write it are generated from that list.

use rusqlite::types::ToSqlOutput;
use rusqlite::{Row, Statement, ToSql};

/// A row type and its table.
pub(crate) trait Record: Sized {
    const TABLE: &'static str;
    /// How many of the first columns are the primary key.
    const KEYS: usize;
    const COLUMNS: &'static [&'static str];
    /// Columns of JSON that grow and shrink a little at a time.
    const LISTS: &'static [&'static str] = &[];

    fn read(row: &Row<'_>) -> rusqlite::Result<Self>;
    fn write(&self, statement: &mut Statement<'_>) -> rusqlite::Result<usize>;

    /// Reads all rows, ordered by primary key.
    fn select() -> String {
        format!(
            "SELECT {} FROM {} ORDER BY {}",
            Self::COLUMNS.join(", "),
            Self::TABLE,
            Self::COLUMNS[..Self::KEYS].join(", ")
        )
    }

    /// Adds a row or overwrites the one with its key, in place.
    fn upsert() -> String {
        let marks: Vec<_> = (1..=Self::COLUMNS.len()).map(|i| format!("?{i}")).collect();
        let sets: Vec<_> = Self::COLUMNS[Self::KEYS..]
            .iter()
            .map(|column| {
                let new = format!("excluded.{column}");
                let new = match Self::LISTS.contains(column) {
                    true => with_room(&format!("{}.{column}", Self::TABLE), &new),
                    false => new,
                };
                format!("{column} = {new}")
            })
            .collect();
        format!(
            "INSERT INTO {} ({}) VALUES ({}) ON CONFLICT ({}) DO UPDATE SET {}",
            Self::TABLE,
            Self::COLUMNS.join(", "),
            marks.join(", "),
            Self::COLUMNS[..Self::KEYS].join(", "),
            sets.join(", ")
        )
    }
}

/// A new value of a JSON column, padded with blanks to about the length of the old one, or with
/// room to grow.
///
/// If the size of a row changes, SQLite rewrites the whole row; if not, only the pages that differ.
pub(crate) fn with_room(old: &str, new: &str) -> String {
    format!(
        "printf('%-*s', CASE \
         WHEN octet_length({old}) BETWEEN octet_length({new}) AND 2 * octet_length({new}) + 1024 \
         THEN octet_length({old}) \
         ELSE octet_length({new}) * 9 / 8 + 256 END, {new})"
    )
}

/// A number whose order matters: refused above `i64::MAX`, the largest that SQLite orders rightly.
pub(crate) struct Ordered(pub(crate) u64);

impl ToSql for Ordered {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        let value = i64::try_from(self.0).map_err(|_| {
            let text = format!("{} is above the maximum, {}", self.0, i64::MAX);
            rusqlite::Error::ToSqlConversionFailure(text.into())
        })?;
        Ok(value.into())
    }
}

/// Text without the blanks at its end ([`with_room`]).
fn list(row: &Row<'_>, at: usize) -> rusqlite::Result<String> {
    let mut text: String = row.get(at)?;
    text.truncate(text.trim_end_matches(' ').len());
    Ok(text)
}

fn ordered(row: &Row<'_>, at: usize) -> rusqlite::Result<u64> {
    let value: i64 = row.get(at)?;
    u64::try_from(value).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(at, value))
}

/// An app that the server knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppRow {
    /// Its id.
    pub app_id: String,
    /// The pools it is in, as JSON.
    pub pools: String,
    /// Its triggers, as JSON.
    pub triggers: String,
    /// What it watches and subscribed to, as JSON.
    pub watches: String,
    /// Its metadata, as JSON.
    pub meta: Option<String>,
    /// The protocol version that it last used.
    pub protocol_version: u32,
    /// When it was first seen, unix ms.
    pub registered: i64,
    /// When it was last seen, unix ms.
    pub last_seen: i64,
}

impl Record for AppRow {
    const TABLE: &'static str = "app_registry";
    const KEYS: usize = 1;
    const COLUMNS: &'static [&'static str] = &[
        "app_id",
        "pools",
        "triggers",
        "watches",
        "meta",
        "protocol_version",
        "registered",
        "last_seen",
    ];
    const LISTS: &'static [&'static str] = &["pools", "triggers", "watches"];

    /// In the order of the file: sorting 100,000 names would cost more than reading them.
    fn select() -> String {
        format!("SELECT {} FROM {}", Self::COLUMNS.join(", "), Self::TABLE)
    }

    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            app_id: row.get(0)?,
            pools: list(row, 1)?,
            triggers: list(row, 2)?,
            watches: list(row, 3)?,
            meta: row.get(4)?,
            protocol_version: row.get(5)?,
            registered: row.get(6)?,
            last_seen: row.get(7)?,
        })
    }

    fn write(&self, statement: &mut Statement<'_>) -> rusqlite::Result<usize> {
        statement.execute((
            &self.app_id,
            &self.pools,
            &self.triggers,
            &self.watches,
            &self.meta,
            self.protocol_version,
            self.registered,
            self.last_seen,
        ))
    }
}

/// A durable pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolRow {
    /// Its name.
    pub name: String,
    /// Its kind, in the protocol's word.
    pub kind: String,
    /// Whether its traffic is encrypted.
    pub encrypted: bool,
    /// The app that owns it.
    pub owner: Option<String>,
    /// Its policy, as JSON.
    pub policy: Option<String>,
    /// Its properties, as JSON.
    pub properties: Option<String>,
    /// Its key descriptor.
    pub descriptor: Option<Vec<u8>>,
    /// When it was made, unix ms.
    pub created: i64,
    /// When it was last changed, unix ms.
    pub updated: i64,
}

impl Record for PoolRow {
    const TABLE: &'static str = "pool_metadata";
    const KEYS: usize = 1;
    const COLUMNS: &'static [&'static str] = &[
        "name",
        "kind",
        "encrypted",
        "owner",
        "policy",
        "properties",
        "descriptor",
        "created",
        "updated",
    ];

    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            name: row.get(0)?,
            kind: row.get(1)?,
            encrypted: row.get(2)?,
            owner: row.get(3)?,
            policy: row.get(4)?,
            properties: row.get(5)?,
            descriptor: row.get(6)?,
            created: row.get(7)?,
            updated: row.get(8)?,
        })
    }

    fn write(&self, statement: &mut Statement<'_>) -> rusqlite::Result<usize> {
        statement.execute((
            &self.name,
            &self.kind,
            self.encrypted,
            &self.owner,
            &self.policy,
            &self.properties,
            &self.descriptor,
            self.created,
            self.updated,
        ))
    }
}

/// A memory block's record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockRow {
    /// The block's pool.
    pub pool: String,
    /// Its name in the pool.
    pub block_id: String,
    /// `shared` or `persistent`.
    pub kind: String,
    /// Bytes of its contents.
    pub size: u64,
    /// Its slots.
    pub slots: u32,
    /// Its layout, as text.
    pub layout: Option<String>,
    /// Its permissions, as JSON.
    pub permissions: String,
    /// The app that owns it.
    pub owner: String,
    /// Its lifetime, as the protocol names it.
    pub lifetime: String,
    /// Its generation.
    pub generation: u64,
    /// Its newest version that is known here.
    pub version: u64,
    /// The newest fence of its lock.
    pub fence: u64,
    /// The boot in which its memory was created; for shared blocks.
    pub boot_id: Option<String>,
    /// The device of its file; all 64 bits are kept.
    pub dev: Option<u64>,
    /// The inode of its file; all 64 bits are kept.
    pub ino: Option<u64>,
    /// The name of its file's record without the ending; for persistent blocks.
    pub file: Option<String>,
    /// When it was made, unix ms.
    pub created: i64,
    /// When its record was last changed, unix ms.
    pub updated: i64,
    /// The identity that its content is bound to in a sealed pool, as JSON.
    pub sealed: Option<String>,
}

impl Record for BlockRow {
    const TABLE: &'static str = "memory_blocks";
    const KEYS: usize = 2;
    const COLUMNS: &'static [&'static str] = &[
        "pool",
        "block_id",
        "kind",
        "size",
        "slots",
        "layout",
        "permissions",
        "owner",
        "lifetime",
        "generation",
        "version",
        "fence",
        "boot_id",
        "dev",
        "ino",
        "file",
        "created",
        "updated",
        "sealed",
    ];

    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            pool: row.get(0)?,
            block_id: row.get(1)?,
            kind: row.get(2)?,
            size: ordered(row, 3)?,
            slots: row.get(4)?,
            layout: row.get(5)?,
            permissions: row.get(6)?,
            owner: row.get(7)?,
            lifetime: row.get(8)?,
            generation: ordered(row, 9)?,
            version: ordered(row, 10)?,
            fence: ordered(row, 11)?,
            boot_id: row.get(12)?,
            dev: row.get::<_, Option<i64>>(13)?.map(i64::cast_unsigned),
            ino: row.get::<_, Option<i64>>(14)?.map(i64::cast_unsigned),
            file: row.get(15)?,
            created: row.get(16)?,
            updated: row.get(17)?,
            sealed: row.get(18)?,
        })
    }

    fn write(&self, statement: &mut Statement<'_>) -> rusqlite::Result<usize> {
        let values: [&dyn ToSql; 19] = [
            &self.pool,
            &self.block_id,
            &self.kind,
            &Ordered(self.size),
            &self.slots,
            &self.layout,
            &self.permissions,
            &self.owner,
            &self.lifetime,
            &Ordered(self.generation),
            &Ordered(self.version),
            &Ordered(self.fence),
            &self.boot_id,
            &self.dev.map(u64::cast_signed),
            &self.ino.map(u64::cast_signed),
            &self.file,
            &self.created,
            &self.updated,
            &self.sealed,
        ];
        statement.execute(&values[..])
    }
}

/// A call that waits for a handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallRow {
    /// Its number; calls are delivered in this order. At most `i64::MAX`.
    pub number: u64,
    /// The pool in which it was made.
    pub pool: String,
    /// The trigger that it calls.
    pub process: String,
    /// The app that must handle it; without one, any handler may.
    pub destination: Option<String>,
    /// The app that made it.
    pub caller: String,
    /// The id that the caller gave it.
    pub call_id: String,
    /// The call itself, as JSON.
    pub envelope: String,
    /// Its attachment.
    pub attachment: Option<Vec<u8>>,
    /// The key by which a repeat is recognised.
    pub idempotency_key: Option<String>,
    /// When it expires, unix ms.
    pub expires: i64,
    /// How many times it was delivered.
    pub attempt: u32,
    /// When it was parked, unix ms.
    pub parked: i64,
    /// When its last attempt failed, unix ms.
    pub died: Option<i64>,
    /// Why.
    pub cause: Option<String>,
}

impl Record for CallRow {
    const TABLE: &'static str = "parked_calls";
    const KEYS: usize = 1;
    const COLUMNS: &'static [&'static str] = &[
        "number",
        "pool",
        "process",
        "destination",
        "caller",
        "call_id",
        "envelope",
        "attachment",
        "idempotency_key",
        "expires",
        "attempt",
        "parked",
        "died",
        "cause",
    ];

    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            number: ordered(row, 0)?,
            pool: row.get(1)?,
            process: row.get(2)?,
            destination: row.get(3)?,
            caller: row.get(4)?,
            call_id: row.get(5)?,
            envelope: row.get(6)?,
            attachment: row.get(7)?,
            idempotency_key: row.get(8)?,
            expires: row.get(9)?,
            attempt: row.get(10)?,
            parked: row.get(11)?,
            died: row.get(12)?,
            cause: row.get(13)?,
        })
    }

    fn write(&self, statement: &mut Statement<'_>) -> rusqlite::Result<usize> {
        statement.execute((
            Ordered(self.number),
            &self.pool,
            &self.process,
            &self.destination,
            &self.caller,
            &self.call_id,
            &self.envelope,
            &self.attachment,
            &self.idempotency_key,
            self.expires,
            self.attempt,
            self.parked,
            self.died,
            &self.cause,
        ))
    }
}

/// An answer that waits for its caller, or for a repeat of its call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerRow {
    /// Its number. At most `i64::MAX`.
    pub number: u64,
    /// The app that it is for.
    pub caller: String,
    /// The id that the caller gave the call.
    pub call_id: String,
    /// The pool of the call.
    pub pool: String,
    /// The key by which a repeat of the call is recognised.
    pub idempotency_key: Option<String>,
    /// The answer's bytes.
    pub frame: Vec<u8>,
    /// When it expires, unix ms.
    pub expires: i64,
    /// The trigger that was called; empty in rows of schemas before 5.
    pub process: String,
}

impl Record for AnswerRow {
    const TABLE: &'static str = "parked_answers";
    const KEYS: usize = 1;
    const COLUMNS: &'static [&'static str] = &[
        "number",
        "caller",
        "call_id",
        "pool",
        "idempotency_key",
        "frame",
        "expires",
        "process",
    ];

    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            number: ordered(row, 0)?,
            caller: row.get(1)?,
            call_id: row.get(2)?,
            pool: row.get(3)?,
            idempotency_key: row.get(4)?,
            frame: row.get(5)?,
            expires: row.get(6)?,
            process: row.get(7)?,
        })
    }

    fn write(&self, statement: &mut Statement<'_>) -> rusqlite::Result<usize> {
        statement.execute((
            Ordered(self.number),
            &self.caller,
            &self.call_id,
            &self.pool,
            &self.idempotency_key,
            &self.frame,
            self.expires,
            &self.process,
        ))
    }
}

/// The owner of an AppID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindingRow {
    /// The AppID.
    pub app_id: String,
    /// The user of this machine that owns it.
    pub uid: Option<u32>,
    /// The key that must be proved for it.
    pub public_key: Option<Vec<u8>>,
    /// Since when it is owned, unix ms.
    pub since: i64,
}

impl Record for BindingRow {
    const TABLE: &'static str = "app_bindings";
    const KEYS: usize = 1;
    const COLUMNS: &'static [&'static str] = &["app_id", "uid", "public_key", "since"];

    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            app_id: row.get(0)?,
            uid: row.get(1)?,
            public_key: row.get(2)?,
            since: row.get(3)?,
        })
    }

    fn write(&self, statement: &mut Statement<'_>) -> rusqlite::Result<usize> {
        statement.execute((&self.app_id, self.uid, &self.public_key, self.since))
    }
}

/// The descriptor of one epoch of an encrypted pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DescriptorRow {
    /// The pool.
    pub pool: String,
    /// The epoch.
    pub epoch: u32,
    /// The descriptor's bytes.
    pub descriptor: Vec<u8>,
}

impl Record for DescriptorRow {
    const TABLE: &'static str = "pool_descriptors";
    const KEYS: usize = 2;
    const COLUMNS: &'static [&'static str] = &["pool", "epoch", "descriptor"];

    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            pool: row.get(0)?,
            epoch: row.get(1)?,
            descriptor: row.get(2)?,
        })
    }

    fn write(&self, statement: &mut Statement<'_>) -> rusqlite::Result<usize> {
        statement.execute((&self.pool, self.epoch, &self.descriptor))
    }
}
