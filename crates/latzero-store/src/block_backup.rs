//! The bytes of persistent blocks in a backup, in pieces, so that a large block need not fit into
//! memory.

use std::io::{self, Read};

use rusqlite::{Connection, OptionalExtension};

use crate::checksum::Crc;

/// Bytes in one row.
const CHUNK_BYTES: usize = 1 << 20;

/// The description of a block in a backup, without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockHead {
    /// The block's pool.
    pub pool: String,
    /// Its name in the pool.
    pub block_id: String,
    /// Its generation.
    pub generation: u64,
    /// The version that the bytes are.
    pub version: u64,
    /// How many bytes follow.
    pub size: u64,
    /// Its slots.
    pub slots: u32,
    /// The other data that is needed to recreate it, which is opaque here.
    pub description: Vec<u8>,
}

/// Why a block could not be added.
pub(crate) enum AddError {
    Read(io::Error),
    Sqlite(rusqlite::Error),
    /// The reader had this many bytes; one more than announced stands for "more".
    Length(u64),
}

impl From<rusqlite::Error> for AddError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

pub(crate) fn create_tables(conn: &Connection) -> rusqlite::Result<()> {
    conn.execute_batch(
        "CREATE TABLE block_files (
             pool        TEXT NOT NULL,
             block_id    TEXT NOT NULL,
             generation  INTEGER NOT NULL,
             version     INTEGER NOT NULL,
             size        INTEGER NOT NULL CHECK (size >= 0),
             slots       INTEGER NOT NULL CHECK (slots BETWEEN 0 AND 4294967295),
             description BLOB NOT NULL,
             checksum    INTEGER NOT NULL, -- CRC-32C of the bytes
             PRIMARY KEY (pool, block_id)
         ) STRICT;
         CREATE TABLE block_chunks (
             pool     TEXT NOT NULL,
             block_id TEXT NOT NULL,
             at       INTEGER NOT NULL,
             bytes    BLOB NOT NULL,
             PRIMARY KEY (pool, block_id, at)
         ) STRICT;",
    )
}

/// Adds a block inside the open transaction.
pub(crate) fn add(
    conn: &Connection,
    head: &BlockHead,
    bytes: &mut dyn Read,
) -> Result<(), AddError> {
    let mut insert = conn
        .prepare("INSERT INTO block_chunks (pool, block_id, at, bytes) VALUES (?1, ?2, ?3, ?4)")?;
    let mut crc = Crc::new();
    let mut at = 0;
    let mut chunk = Vec::new();
    while at < head.size {
        let wanted = (head.size - at).min(CHUNK_BYTES as u64);
        chunk.clear();
        bytes
            .take(wanted)
            .read_to_end(&mut chunk)
            .map_err(AddError::Read)?;
        if (chunk.len() as u64) < wanted {
            return Err(AddError::Length(at + chunk.len() as u64));
        }
        crc.add(&chunk);
        insert.execute((&head.pool, &head.block_id, at.cast_signed(), &chunk))?;
        at += wanted;
    }
    if bytes.read(&mut [0]).map_err(AddError::Read)? > 0 {
        return Err(AddError::Length(head.size + 1));
    }
    conn.execute(
        "INSERT INTO block_files (pool, block_id, generation, version, size, slots, description, \
         checksum)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        (
            &head.pool,
            &head.block_id,
            head.generation.cast_signed(),
            head.version.cast_signed(),
            head.size.cast_signed(),
            head.slots,
            &head.description,
            crc.value(),
        ),
    )?;
    Ok(())
}

/// The blocks of a backup, by pool and name; none in a backup without.
pub(crate) fn heads(conn: &Connection) -> rusqlite::Result<Vec<BlockHead>> {
    if !has_blocks(conn)? {
        return Ok(Vec::new());
    }
    conn.prepare(
        "SELECT pool, block_id, generation, version, size, slots, description FROM block_files
         ORDER BY pool, block_id",
    )?
    .query_map([], |row| {
        Ok(BlockHead {
            pool: row.get(0)?,
            block_id: row.get(1)?,
            generation: row.get::<_, i64>(2)?.cast_unsigned(),
            version: row.get::<_, i64>(3)?.cast_unsigned(),
            size: row.get::<_, i64>(4)?.cast_unsigned(),
            slots: row.get(5)?,
            description: row.get(6)?,
        })
    })?
    .collect()
}

fn has_blocks(conn: &Connection) -> rusqlite::Result<bool> {
    conn.query_row(
        "SELECT count(*) FROM sqlite_schema WHERE name = 'block_files'",
        [],
        |row| row.get::<_, i64>(0).map(|tables| tables > 0),
    )
}

/// Reads a block's bytes out of a backup. At their end the checksum is compared: `InvalidData` if
/// it differs.
#[derive(Debug)]
pub struct BlockReader<'b> {
    conn: &'b Connection,
    pool: String,
    block_id: String,
    size: u64,
    checksum: u32,
    crc: Crc,
    at: u64,
    chunk: Vec<u8>,
    given: usize,
}

impl<'b> BlockReader<'b> {
    pub(crate) fn new(conn: &'b Connection, head: &BlockHead) -> rusqlite::Result<Self> {
        let checksum = conn.query_row(
            "SELECT checksum FROM block_files WHERE pool = ?1 AND block_id = ?2",
            (&head.pool, &head.block_id),
            |row| row.get(0),
        )?;
        Ok(Self {
            conn,
            pool: head.pool.clone(),
            block_id: head.block_id.clone(),
            size: head.size,
            checksum,
            crc: Crc::new(),
            at: 0,
            chunk: Vec::new(),
            given: 0,
        })
    }

    fn next_chunk(&mut self) -> io::Result<()> {
        let spoilt = |why: &str| {
            let text = format!("block {} of pool {}: {why}", self.block_id, self.pool);
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        let bytes: Option<Vec<u8>> = self
            .conn
            .query_row(
                "SELECT bytes FROM block_chunks WHERE pool = ?1 AND block_id = ?2 AND at = ?3",
                (&self.pool, &self.block_id, self.at.cast_signed()),
                |row| row.get(0),
            )
            .optional()
            .map_err(io::Error::other)?;
        let bytes = bytes.ok_or_else(|| spoilt("a piece is missing"))?;
        let left = self.size - self.at;
        if bytes.is_empty() || bytes.len() as u64 > left {
            return Err(spoilt("a piece has the wrong length"));
        }
        self.crc.add(&bytes);
        if bytes.len() as u64 == left && self.crc.value() != self.checksum {
            return Err(spoilt("its checksum differs"));
        }
        self.at += bytes.len() as u64;
        self.chunk = bytes;
        self.given = 0;
        Ok(())
    }
}

impl Read for BlockReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.given == self.chunk.len() && self.at < self.size {
            self.next_chunk()?;
        }
        let rest = &self.chunk[self.given..];
        let count = rest.len().min(into.len());
        into[..count].copy_from_slice(&rest[..count]);
        self.given += count;
        Ok(count)
    }
}
