//! Messages about memory blocks, decoded and validated, and the layout of a block.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::envelope::{Envelope, Raw, missing, mistyped};
use crate::error::{Code, Refusal};
use crate::limits::{
    CALL_BLOCKS_MAX, CAS_BYTES_MAX, LAYOUT_BYTES_MAX, PERMISSION_APPS_MAX, SLOTS, TTL_MAX_MS,
};
use crate::message::{Fields, Page, items, page, unknown};
use crate::name::{AppId, BlockId};

/// A request about one block or about all blocks of a pool.
#[derive(Debug)]
pub struct Memory<'a> {
    /// The pool, if the sender names one.
    pub pool: Option<Cow<'a, str>>,
    /// What to do.
    pub action: Action<'a>,
}

/// What to do with a block.
#[derive(Debug)]
pub enum Action<'a> {
    /// Create it.
    Create(Box<Create>),
    /// Attach to it.
    Attach {
        /// The block.
        block: BlockId,
        /// Whether to read only, or to write too.
        mode: Access,
        /// The layout that the block must have.
        layout: Option<Layout>,
    },
    /// Detach from it.
    Detach(BlockId),
    /// Copy its bytes into the reply.
    Read {
        /// The block.
        block: BlockId,
        /// The first byte.
        offset: u64,
        /// The number of bytes; if absent, up to the end.
        length: Option<u64>,
        /// The version that the block must have.
        if_version: Option<u64>,
    },
    /// Write bytes into it.
    Write(Write<'a>),
    /// Write bytes if it has the expected ones: a compare-and-swap.
    Cas {
        /// The block.
        block: BlockId,
        /// The first byte.
        offset: u64,
        /// The bytes that the block must have there.
        expected: Vec<u8>,
        /// The bytes that replace them; as long as `expected`.
        data: Cow<'a, [u8]>,
        /// The fence of the lock to write under.
        lock: Option<u64>,
    },
    /// Take its lock.
    Lock {
        /// The block.
        block: BlockId,
        /// Exclusive or shared.
        mode: LockMode,
        /// How long to wait for the lock, in milliseconds; 0 is not at all.
        wait_ms: u64,
        /// How long the lock is held unless renewed, in milliseconds; if absent, until its holder
        /// disconnects.
        lease_ms: Option<u64>,
    },
    /// Release the lock with this fence.
    Unlock(BlockId, u64),
    /// Renew the lease of a lock.
    Renew {
        /// The block.
        block: BlockId,
        /// The lock's fence.
        lock: u64,
        /// The new lease in milliseconds; if absent, until its holder disconnects.
        lease_ms: Option<u64>,
    },
    /// Send a push for each new version.
    Subscribe(BlockId),
    /// Stop sending pushes.
    Unsubscribe(BlockId),
    /// Report the version after a write through a mapping.
    Notify(BlockId, u64),
    /// Offer the memory of a block that the server lost when it ended, with a descriptor of it.
    Reoffer(BlockId),
    /// Change its size.
    Resize {
        /// The block.
        block: BlockId,
        /// The new size in bytes.
        size: u64,
        /// The fence of the lock to do it under.
        lock: Option<u64>,
    },
    /// Wait until its content is on disk.
    Flush(BlockId),
    /// Remove it.
    Remove {
        /// The block.
        block: BlockId,
        /// The fence of the lock to do it under.
        lock: Option<u64>,
    },
    /// List the blocks of a pool.
    List(Page<'a>),
    /// Describe it.
    Info(BlockId),
}

impl Action<'_> {
    /// Whether it has no effect but its reply.
    #[must_use]
    pub fn is_question(&self) -> bool {
        matches!(
            self,
            Action::Read { .. } | Action::List(_) | Action::Info(_)
        )
    }
}

/// A write to a block.
#[derive(Debug)]
pub struct Write<'a> {
    /// The block.
    pub block: BlockId,
    /// The first byte.
    pub offset: u64,
    /// The bytes.
    pub data: Cow<'a, [u8]>,
    /// The version that the block must have.
    pub if_version: Option<u64>,
    /// The fence of the lock to write under.
    pub lock: Option<u64>,
}

/// A block to create.
#[derive(Debug, Clone)]
pub struct Create {
    /// Its name.
    pub block: BlockId,
    /// Its size in bytes.
    pub size: u64,
    /// Where it is stored.
    pub kind: Kind,
    /// Number of slots: a block with 1 is written in place (`raw`), one with more has snapshots.
    pub slots: u32,
    /// The array that its bytes are.
    pub layout: Option<Layout>,
    /// Who may read and write it.
    pub permissions: Permissions,
    /// When it is removed.
    pub lifetime: Lifetime,
    /// If the block exists, attach to it.
    pub or_attach: bool,
    /// Whether its creator is attached at once, and with which access.
    pub attach: Option<Access>,
    /// The id to which its content is bound in a sealed pool: 16 bytes in base64url.
    pub block_uid: Option<Box<str>>,
}

macro_rules! words {
    (
        $(#[$doc:meta])*
        $type:ident { $($(#[$variant_doc:meta])* $variant:ident $word:literal,)* }
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
        pub enum $type {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $type {
            /// The word on the wire.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $($type::$variant => $word,)* }
            }

            /// Reads the word on the wire.
            #[must_use]
            pub fn parse(word: &str) -> Option<Self> {
                match word { $($word => Some($type::$variant),)* _ => None }
            }

            /// A field that holds one of the words; absent is the default.
            fn field(fields: &Fields<'_>, name: &str) -> Result<Self, Refusal> {
                let Some(raw) = fields.field(name) else { return Ok(Self::default()) };
                let word = raw.as_short_str();
                word.as_deref().and_then(Self::parse).ok_or_else(|| {
                    mistyped(name, concat!("one of", $(" \"", $word, "\"",)*), raw)
                })
            }
        }
    };
}

words! {
    /// Where a block is stored.
    Kind {
        /// In memory: it is lost when both the server and its last holder have ended.
        #[default]
        Shared "shared",
        /// In a file of the data directory.
        Persistent "persistent",
    }
}

words! {
    /// What a client may do with a block.
    Access {
        /// Read.
        #[default]
        Read "read",
        /// Read and write.
        Write "write",
    }
}

words! {
    /// Whether a lock may have several holders.
    LockMode {
        /// A single holder.
        #[default]
        Exclusive "exclusive",
        /// Any number of holders, which only read.
        Shared "shared",
    }
}

words! {
    /// When a block is removed.
    Lifetime {
        /// When a client removes it or its pool.
        #[default]
        Pool "pool",
        /// Once no client is attached.
        Attached "attached",
    }
}

/// Which apps may do something.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Apps {
    /// Every member of the pool.
    #[default]
    All,
    /// Only these.
    These(Vec<AppId>),
}

impl Apps {
    /// Whether `app` is among them.
    #[must_use]
    pub fn contain(&self, app: &AppId) -> bool {
        match self {
            Apps::All => true,
            Apps::These(apps) => apps.contains(app),
        }
    }

    /// The list on the wire.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        match self {
            Apps::All => vec!["*"],
            Apps::These(apps) => apps.iter().map(AppId::as_str).collect(),
        }
    }
}

/// Which apps may read and write a block. The app that created it always may.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Permissions {
    /// Who may read.
    pub read: Apps,
    /// Who may write; they may read too.
    pub write: Apps,
}

/// The type of a block's content: an array in numpy's notation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The element type, such as `<f4`. `bf16` is bfloat16, little-endian.
    pub dtype: String,
    /// The length of each dimension.
    pub shape: Vec<u64>,
    /// Names for the indices of the last dimension.
    pub fields: Vec<String>,
}

impl Layout {
    /// Reads a layout from JSON text.
    ///
    /// # Errors
    /// `bad_message` or `too_large`, with the field named.
    pub fn parse(raw: Raw<'_>) -> Result<Layout, Refusal> {
        if !raw.is_object() {
            let expected = "an object like {\"dtype\":\"<f4\",\"shape\":[1080,1920]}";
            return Err(mistyped("layout", expected, raw));
        }
        if raw.text().len() > LAYOUT_BYTES_MAX {
            return Err(Refusal::new(
                Code::TooLarge,
                format!("field 'layout' has more than {LAYOUT_BYTES_MAX} bytes"),
            ));
        }
        let fields = Fields::of(raw.text())?;
        let dtype = fields.required_string("dtype")?.into_owned();
        if item_size(&dtype).is_none() {
            let expected = "one of numpy's simple types, such as \"<f4\" or \"|u1\", or \"bf16\"";
            return Err(mistyped(
                "dtype",
                expected,
                fields.field("dtype").expect("it was read"),
            ));
        }
        let mut shape = Vec::new();
        if let Some(raw) = fields.field("shape") {
            items(raw, "shape", |item| {
                let length = item.as_u64();
                shape.push(length.ok_or_else(|| mistyped("shape", "an array of lengths", item))?);
                Ok(())
            })?;
        }
        let mut names = Vec::new();
        fields.each_string("fields", |name| {
            names.push(name.to_owned());
            Ok(())
        })?;
        let layout = Layout {
            dtype,
            shape,
            fields: names,
        };
        if layout.bytes().is_none() {
            return Err(Refusal::new(
                Code::BadMessage,
                "field 'layout' describes too many bytes",
            ));
        }
        let places = layout.shape.last().copied().unwrap_or(0);
        if !layout.fields.is_empty() && layout.fields.len() as u64 != places {
            return Err(Refusal::new(
                Code::BadMessage,
                format!(
                    "field 'fields' has {} names for a last dimension of {places}",
                    layout.fields.len()
                ),
            ));
        }
        Ok(layout)
    }

    /// Size of the whole array in bytes; `None` if it overflows.
    #[must_use]
    pub fn bytes(&self) -> Option<u64> {
        let item = item_size(&self.dtype)?;
        if self.shape.contains(&0) {
            return Some(0);
        }
        self.shape
            .iter()
            .try_fold(item, |bytes, n| bytes.checked_mul(*n))
    }

    /// The layout as JSON text; equal layouts give equal text.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut out = serde_json::json!({"dtype": self.dtype, "shape": self.shape});
        if !self.fields.is_empty() {
            out["fields"] = self.fields.as_slice().into();
        }
        out.to_string()
    }
}

/// Bytes of one element of a simple type in numpy's notation (its array interface, `typestr`), or
/// of `bf16`, for which numpy has no name.
fn item_size(dtype: &str) -> Option<u64> {
    if dtype == "bf16" {
        return Some(2);
    }
    let rest = dtype.strip_prefix(['<', '>', '|', '='])?;
    let kind = rest.chars().next()?;
    let bytes: u64 = rest.get(1..)?.parse().ok()?;
    let fits = match kind {
        'b' => bytes == 1,
        'i' | 'u' => matches!(bytes, 1 | 2 | 4 | 8),
        'f' => matches!(bytes, 2 | 4 | 8 | 16),
        'c' => matches!(bytes, 8 | 16 | 32),
        'M' | 'm' => bytes == 8,
        'S' | 'V' => (1..=65_536).contains(&bytes),
        _ => false,
    };
    fits.then_some(bytes)
}

/// A block as the argument of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockUse {
    /// The block.
    pub block: BlockId,
    /// What the handler may do with it.
    pub mode: Access,
}

/// The field `blocks` of a call: names, or objects with a mode.
pub(crate) fn block_uses(raw: Raw<'_>) -> Result<Vec<BlockUse>, Refusal> {
    let mut uses: Vec<BlockUse> = Vec::new();
    if raw.is_null() {
        return Ok(uses);
    }
    items(raw, "blocks", |item| {
        if uses.len() == CALL_BLOCKS_MAX {
            return Err(Refusal::new(
                Code::TooLarge,
                format!("field 'blocks' names more than {CALL_BLOCKS_MAX} blocks"),
            ));
        }
        let (block, mode) = match item.as_short_str() {
            Some(name) => (BlockId::new(&name)?, Access::Read),
            None if item.is_object() => {
                let fields = Fields::of_item(item)?;
                let block = BlockId::new(&fields.required_string("block_id")?)?;
                (block, Access::field(&fields, "mode")?)
            }
            None => return Err(mistyped("blocks", "an array of block ids", item)),
        };
        if uses.iter().any(|known| known.block == block) {
            return Err(Refusal::new(
                Code::BadMessage,
                format!("field 'blocks' names '{block}' twice"),
            ));
        }
        uses.push(BlockUse { block, mode });
        Ok(())
    })?;
    Ok(uses)
}

/// Decodes a `memory_*` message.
pub(crate) fn decode<'a>(e: &Envelope<'a>, action: &str) -> Result<Memory<'a>, Refusal> {
    let fields = Fields::of_message(e)?;
    let block =
        || -> Result<BlockId, Refusal> { Ok(BlockId::new(&fields.required_string("block_id")?)?) };
    let number = |name: &str| Envelope::number(fields.field(name), name, 0..=u64::MAX);
    let required = |name: &str| number(name)?.ok_or_else(|| missing(name, "a whole number"));
    let action = match action {
        "memory_create" => Action::Create(Box::new(create(&fields, block()?)?)),
        "memory_attach" => Action::Attach {
            block: block()?,
            mode: Access::field(&fields, "mode")?,
            layout: layout(&fields)?,
        },
        "memory_detach" => Action::Detach(block()?),
        "memory_read" => Action::Read {
            block: block()?,
            offset: number("offset")?.unwrap_or(0),
            length: number("length")?,
            if_version: number("if_version")?,
        },
        "memory_write" => Action::Write(Write {
            block: block()?,
            offset: number("offset")?.unwrap_or(0),
            data: bytes(e)?,
            if_version: number("if_version")?,
            lock: lock(&fields)?,
        }),
        "memory_cas" => {
            let expected = fields
                .field("expected")
                .ok_or_else(|| missing("expected", "base64 text"))?;
            if [Some(expected), e.data]
                .into_iter()
                .flatten()
                .any(is_beyond_cas)
            {
                return Err(too_much_for_cas());
            }
            let expected = base64("expected", expected)?;
            let data = bytes(e)?;
            if expected.len() != data.len() {
                let message = format!(
                    "'expected' has {} bytes and 'data' {}; the lengths must be equal",
                    expected.len(),
                    data.len()
                );
                return Err(Refusal::new(Code::BadMessage, message));
            }
            if data.len() > CAS_BYTES_MAX {
                return Err(too_much_for_cas());
            }
            Action::Cas {
                block: block()?,
                offset: number("offset")?.unwrap_or(0),
                expected,
                data,
                lock: lock(&fields)?,
            }
        }
        "memory_lock" => Action::Lock {
            block: block()?,
            mode: LockMode::field(&fields, "mode")?,
            wait_ms: Envelope::number(fields.field("wait"), "wait", 0..=TTL_MAX_MS)?.unwrap_or(0),
            lease_ms: lease(&fields)?,
        },
        "memory_unlock" => Action::Unlock(block()?, required_lock(&fields)?),
        "memory_renew" => Action::Renew {
            block: block()?,
            lock: required_lock(&fields)?,
            lease_ms: lease(&fields)?,
        },
        "memory_subscribe" => Action::Subscribe(block()?),
        "memory_unsubscribe" => Action::Unsubscribe(block()?),
        "memory_notify" => Action::Notify(block()?, required("version")?),
        "memory_reoffer" => Action::Reoffer(block()?),
        "memory_resize" => Action::Resize {
            block: block()?,
            size: required("size")?,
            lock: lock(&fields)?,
        },
        "memory_flush" => Action::Flush(block()?),
        "memory_remove" => Action::Remove {
            block: block()?,
            lock: lock(&fields)?,
        },
        "memory_list" => Action::List(page(e)?),
        "memory_info" => Action::Info(block()?),
        other => return Err(unknown(other)),
    };
    Ok(Memory {
        pool: Envelope::string(e.pool, "pool")?,
        action,
    })
}

fn create(fields: &Fields<'_>, block: BlockId) -> Result<Create, Refusal> {
    let size = Envelope::number(fields.field("size"), "size", 0..=u64::MAX)?;
    let size = size.ok_or_else(|| missing("size", "a whole number of bytes"))?;
    let named = Envelope::number(fields.field("slots"), "slots", 1..=*SLOTS.end())?;
    let slots = match (fields.string("consistency")?.as_deref(), named) {
        (Some("raw"), None | Some(1)) => 1,
        (Some("raw"), Some(_)) => {
            return Err(Refusal::new(
                Code::BadMessage,
                "a block with \"consistency\":\"raw\" has one slot",
            ));
        }
        (None | Some("snapshot"), None) => *SLOTS.start(),
        (None | Some("snapshot"), Some(n)) if SLOTS.contains(&n) => n,
        (None | Some("snapshot"), Some(_)) => {
            return Err(Refusal::new(
                Code::BadMessage,
                "a block with snapshots has 2 to 4 slots; \"consistency\":\"raw\" has one",
            ));
        }
        (Some(_), _) => {
            return Err(mistyped(
                "consistency",
                "\"snapshot\" or \"raw\"",
                fields.field("consistency").expect("it was read"),
            ));
        }
    };
    let or_attach = match fields.string("if_exists")?.as_deref() {
        None | Some("error") => false,
        Some("attach") => true,
        Some(_) => {
            return Err(mistyped(
                "if_exists",
                "\"error\" or \"attach\"",
                fields.field("if_exists").expect("it was read"),
            ));
        }
    };
    let layout = layout(fields)?;
    if let Some(needed) = layout.as_ref().and_then(Layout::bytes)
        && needed > size
    {
        return Err(Refusal::new(
            Code::LayoutMismatch,
            format!("the layout needs {needed} bytes and the block has {size}"),
        ));
    }
    let attach = match fields.field("attach") {
        Some(raw) if !Envelope::flag(Some(raw), "attach")? => None,
        _ => Some(match fields.field("mode") {
            None => Access::Write,
            Some(_) => Access::field(fields, "mode")?,
        }),
    };
    Ok(Create {
        block,
        size,
        kind: Kind::field(fields, "kind")?,
        slots: u32::try_from(slots).expect("checked to be 4 at most"),
        layout,
        permissions: permissions(fields.field("permissions"))?,
        lifetime: Lifetime::field(fields, "lifetime")?,
        or_attach,
        attach,
        block_uid: fields.string("block_uid")?.map(|uid| uid.as_ref().into()),
    })
}

fn permissions(raw: Option<Raw<'_>>) -> Result<Permissions, Refusal> {
    let Some(raw) = raw else {
        return Ok(Permissions::default());
    };
    if !raw.is_object() {
        let expected = "an object like {\"read\":[\"*\"],\"write\":[\"me\"]}";
        return Err(mistyped("permissions", expected, raw));
    }
    let fields = Fields::of(raw.text())?;
    Ok(Permissions {
        read: apps(&fields, "read")?,
        write: apps(&fields, "write")?,
    })
}

/// Reads a field that lists apps; `"*"` or an absent field means all apps.
pub(crate) fn apps(fields: &Fields<'_>, name: &str) -> Result<Apps, Refusal> {
    let (mut apps, mut is_all) = (Vec::new(), false);
    let is_there = fields.each_string(name, |app| {
        is_all |= app == "*";
        if is_all {
            return Ok(());
        }
        if apps.len() == PERMISSION_APPS_MAX {
            return Err(Refusal::new(
                Code::TooLarge,
                format!("field '{name}' names more than {PERMISSION_APPS_MAX} apps; use \"*\""),
            ));
        }
        apps.push(AppId::new(app)?);
        Ok(())
    })?;
    Ok(if is_all || !is_there {
        Apps::All
    } else {
        Apps::These(apps)
    })
}

fn layout(fields: &Fields<'_>) -> Result<Option<Layout>, Refusal> {
    fields.field("layout").map(Layout::parse).transpose()
}

fn lease(fields: &Fields<'_>) -> Result<Option<u64>, Refusal> {
    Envelope::number(fields.field("lease"), "lease", 1..=TTL_MAX_MS)
}

fn lock(fields: &Fields<'_>) -> Result<Option<u64>, Refusal> {
    let Some(raw) = fields.field("lock") else {
        return Ok(None);
    };
    let fence = raw.as_short_str().and_then(|text| text.parse().ok());
    match fence {
        Some(fence) => Ok(Some(fence)),
        None => Err(mistyped(
            "lock",
            "the \"lock\" that memory_lock returned",
            raw,
        )),
    }
}

fn required_lock(fields: &Fields<'_>) -> Result<u64, Refusal> {
    lock(fields)?.ok_or_else(|| missing("lock", "the \"lock\" that memory_lock returned"))
}

/// The bytes of a message: its attachment, or base64 text in `data`.
fn bytes<'a>(e: &Envelope<'a>) -> Result<Cow<'a, [u8]>, Refusal> {
    match (e.attachment, e.data) {
        (Some(_), Some(_)) => Err(Refusal::new(
            Code::BadMessage,
            "the attachment replaces field 'data', which must be absent",
        )),
        (Some(bytes), None) => Ok(Cow::Borrowed(bytes)),
        (None, Some(raw)) => base64("data", raw).map(Cow::Owned),
        (None, None) => Err(missing("data", "base64 text, or an attachment")),
    }
}

/// Whether base64 text is too long for a compare-and-swap, however it is escaped. Checked before
/// the text is decoded.
fn is_beyond_cas(raw: Raw<'_>) -> bool {
    /// Bytes of the longest escape of one character, times the characters of four thirds of the
    /// bytes, and quotes.
    const TEXT_BYTES_MAX: usize = 6 * (CAS_BYTES_MAX / 3 * 4 + 4) + 2;
    raw.text().len() > TEXT_BYTES_MAX
}

fn too_much_for_cas() -> Refusal {
    Refusal::new(
        Code::TooLarge,
        format!("a compare-and-swap takes at most {CAS_BYTES_MAX} bytes"),
    )
}

fn base64(name: &str, raw: Raw<'_>) -> Result<Vec<u8>, Refusal> {
    let text = raw.as_str();
    text.and_then(|text| STANDARD.decode(text.as_bytes()).ok())
        .ok_or_else(|| {
            Refusal::new(
                Code::BadMessage,
                format!("field '{name}' must be base64 text (RFC 4648, padded)"),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Frame;
    use crate::limits::ListBounds;
    use crate::message::Request;

    fn check(json: &str, expected: &str) {
        let frame = Frame {
            json: json.as_bytes(),
            attachment: None,
        };
        let envelope = Envelope::parse(frame).unwrap().unwrap();
        let got = match Request::decode(&envelope, &ListBounds::NONE) {
            Ok(request) => format!("{request:?}"),
            Err(refusal) => refusal.to_string(),
        };
        assert!(
            got.contains(expected),
            "{json}\n got {got}\nwant {expected}"
        );
    }

    #[test]
    fn requests_decode() {
        check(
            r#"{"action":"memory_create","pool":"a","block_id":"f","size":10}"#,
            "size: 10, kind: Shared, slots: 2, layout: None, permissions: Permissions { read: \
             All, write: All }, \
             lifetime: Pool, or_attach: false, attach: Some(Write)",
        );
        check(
            r#"{"action":"memory_create","block_id":"f","size":10,"consistency":"raw","attach":false}"#,
            "slots: 1, layout: None",
        );
        for empty in [
            r#"{"action":"memory_create","block_id":"f","size":0}"#,
            r#"{"action":"memory_create","block_id":"f","size":0,"layout":{"dtype":"<f4","shape":[0,4]}}"#,
            r#"{"action":"memory_create","block_id":"f","size":0,"layout":{"dtype":"<f8","shape":[9223372036854775807,9,0]}}"#,
        ] {
            check(empty, "size: 0, kind: Shared");
        }
        check(
            r#"{"action":"memory_create","block_id":"f","size":8,"layout":{"dtype":"bf16","shape":[2,2],"fields":["x","y"]}}"#,
            r#"Layout { dtype: "bf16", shape: [2, 2], fields: ["x", "y"] }"#,
        );
        check(
            r#"{"action":"memory_create","block_id":"f","size":8,"layout":{"dtype":"bf16","shape":[8]}}"#,
            "layout",
        );
        check(
            r#"{"action":"memory_write","block_id":"f","data":"AP8=","lock":"7"}"#,
            "offset: 0, data: [0, 255], if_version: None, lock: Some(7)",
        );
        check(
            r#"{"action":"memory_lock","block_id":"f"}"#,
            "mode: Exclusive, wait_ms: 0, lease_ms: None",
        );
        check(
            r#"{"action":"trigger","process":"t","blocks":["f",{"block_id":"g","mode":"write"}]}"#,
            r#"blocks: [BlockUse { block: "f", mode: Read }, BlockUse { block: "g", mode: Write }]"#,
        );
    }

    #[test]
    fn refusals_name_the_field() {
        let create =
            |more: &str| format!(r#"{{"action":"memory_create","block_id":"f","size":8,{more}}}"#);
        check(
            r#"{"action":"memory_create","block_id":"f"}"#,
            "field 'size' is missing",
        );
        check(
            r#"{"action":"memory_create","block_id":"f f","size":1}"#,
            "invalid_name: 'f f' is not a valid block id",
        );
        check(
            &create(r#""kind":"eternal""#),
            r#"field 'kind' must be one of "shared" "persistent", not"#,
        );
        check(
            &create(r#""layout":{"dtype":"float"}"#),
            "field 'dtype' must be one of numpy's simple types",
        );
        check(
            &create(r#""layout":{"dtype":"<f4","shape":[3]}"#),
            "layout_mismatch: the layout needs 12 bytes and the block has 8",
        );
        check(
            &create(r#""layout":{"dtype":"<f4","shape":[2],"fields":["x"]}"#),
            "1 names for a last dimension of 2",
        );
        check(
            &create(r#""layout":{"dtype":"<f8","shape":[9223372036854775807,9]}"#),
            "too many bytes",
        );
        check(&create(r#""slots":5"#), "field 'slots' must be");
        check(&create(r#""slots":2,"consistency":"raw""#), "has one slot");
        check(
            r#"{"action":"memory_write","block_id":"f","data":"A"}"#,
            "field 'data' must be base64",
        );
        check(
            r#"{"action":"memory_cas","block_id":"f","expected":"","data":"AA=="}"#,
            "the lengths must be equal",
        );
        check(
            r#"{"action":"memory_unlock","block_id":"f","lock":7}"#,
            "field 'lock' must be the \"lock\" that memory_lock returned",
        );
        check(
            r#"{"action":"memory_melt","block_id":"f"}"#,
            "unknown_action: unknown action 'memory_melt'",
        );
        check(
            r#"{"action":"trigger","process":"t","blocks":["f","f"]}"#,
            "field 'blocks' names 'f' twice",
        );
    }

    #[test]
    fn layouts_read_back() {
        let text = r#"{"dtype":"<f4","shape":[2,3],"fields":["x","y","z"]}"#;
        let layout = Layout::parse(Raw::new(text).unwrap()).unwrap();
        assert_eq!(layout.bytes(), Some(24));
        let again = layout.to_json();
        assert_eq!(Layout::parse(Raw::new(&again).unwrap()).unwrap(), layout);
    }
}
