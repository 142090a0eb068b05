//! `block`: memory blocks, inspected and changed from the command line.

mod file;
mod lock;
mod npy;

use std::time::Duration;

use latzero::blocking::{Block, BlockName};
use serde_json::{Value, json};

use crate::args::{
    BlockAt, BlockCasArgs, BlockCommand, BlockCreateArgs, BlockKind, BlockListArgs, BlockOne,
    BlockReadArgs, BlockResizeArgs, BlockWatchArgs, BlockWriteArgs,
};
use crate::connect::{ConnectOptions, Connection, ServerArgs};
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Cell, Output, Tone, bytes, hex, toned};
use crate::parse::{self, Target};

use super::trigger::{enter, proved};
use npy::Array;

/// How many bytes of a block are shown on a terminal.
const SHOWN_BYTES: usize = 256;

/// How long a write waits for the block's lock.
const LOCK_TIME: Duration = Duration::from_secs(10);

pub(crate) fn run(command: &BlockCommand, output: &Output) -> CommandResult {
    match command {
        BlockCommand::Ls(args) => list(args, output),
        BlockCommand::Info(args) => info(args, output),
        BlockCommand::Create(args) => create(args, output),
        BlockCommand::Read(args) => read(args, output),
        BlockCommand::Write(args) => write(args, output),
        BlockCommand::Cas(args) => cas(args, output),
        BlockCommand::Watch(args) => watch(args, output),
        BlockCommand::Lock(args) => lock::run(args),
        BlockCommand::Resize(args) => resize(args, output),
        BlockCommand::Flush(args) => flush(args, output),
        BlockCommand::Rm(args) => remove(args, output),
        BlockCommand::Dump(args) => file::dump(args, output),
        BlockCommand::Load(args) => file::load(args, output),
    }
}

/// A connection that has joined the block's pool, and the block's name in it.
struct BlockHandle {
    connection: Connection,
    pool: Option<String>,
    id: String,
}

impl BlockHandle {
    fn find(
        at: &BlockAt,
        reach: &ServerArgs,
        options: ConnectOptions,
    ) -> Result<BlockHandle, Failure> {
        let target = BlockHandle::target(at)?;
        let connection = reach.connect(&options.in_pool(proved(reach, &target)))?;
        let pool = enter(&connection, reach, &target)?;
        Ok(BlockHandle {
            connection,
            pool,
            id: target.trigger,
        })
    }

    fn once(at: &BlockAt, reach: &ServerArgs) -> Result<BlockHandle, Failure> {
        BlockHandle::find(at, reach, ConnectOptions::once("block"))
    }

    /// Like [`At::once`], but creates the pool if it does not exist, for a block that will be
    /// created.
    fn to_make(at: &BlockAt, reach: &ServerArgs) -> Result<BlockHandle, Failure> {
        let target = BlockHandle::target(at)?;
        // A pool whose keys are here was already created.
        let made = target.pool.as_deref();
        let made = made.filter(|_| proved(reach, &target).is_none());
        BlockHandle::find(at, reach, ConnectOptions::once("block").in_pool(made))
    }

    fn target(at: &BlockAt) -> Result<Target, Failure> {
        Target::parse(&at.block, at.pool.as_deref())
            .map_err(|failure| failure.with_help("write BLOCK, POOL/BLOCK, or --pool POOL BLOCK"))
    }

    fn name(&self) -> BlockName {
        let name = self.connection.app.block(&self.id);
        match &self.pool {
            Some(pool) => name.pool(pool),
            None => name,
        }
    }

    fn ask(&self, action: &str) -> Result<Value, Failure> {
        let mut request = json!({"action": action, "block_id": self.id});
        if let Some(pool) = &self.pool {
            request["pool"] = pool.as_str().into();
        }
        Ok(self.connection.app.request(&request)?)
    }
}

fn list(args: &BlockListArgs, output: &Output) -> CommandResult {
    let target = Target {
        pool: Some(args.pool.clone()),
        trigger: String::new(),
    };
    let options = ConnectOptions::once("block").in_pool(proved(&args.reach, &target));
    let connection = args.reach.connect(&options)?;
    let pool = enter(&connection, &args.reach, &target)?;
    let blocks = connection.app.blocks(pool.as_deref())?;
    if output.json {
        output.value(&json!({"blocks": blocks}))?;
        return Ok(Exit::Ok);
    }
    let rows: Vec<Vec<Cell>> = blocks
        .iter()
        .map(|block| {
            let text = |field: &str| block[field].as_str().unwrap_or("-").to_owned();
            let number = |field: &str| block[field].as_u64().unwrap_or(0);
            let locked = block["locked"] == true;
            vec![
                text("block_id").into(),
                bytes(number("size")).into(),
                number("version").into(),
                text("kind").into(),
                layout(&block["layout"]).into(),
                number("attachments").into(),
                match locked {
                    true => toned("locked", Tone::Warn),
                    false => "-".into(),
                },
                text("owner").into(),
            ]
        })
        .collect();
    if rows.is_empty() && output.is_for_people() {
        output.note(format_args!(
            "pool {} has no blocks; `latzero block create {}/NAME SIZE` makes one",
            args.pool, args.pool
        ));
        return Ok(Exit::Ok);
    }
    let head = [
        "BLOCK", "SIZE", "VERSION", "KIND", "LAYOUT", "ATTACHED", "LOCK", "OWNER",
    ];
    output.table(&head, &rows)?;
    Ok(Exit::Ok)
}

/// A layout in a few characters: `<f4 1080×1920`.
fn layout(layout: &Value) -> String {
    let Some(dtype) = layout["dtype"].as_str() else {
        return "-".into();
    };
    let shape = layout["shape"].as_array().into_iter().flatten();
    let shape: Vec<String> = shape.map(Value::to_string).collect();
    format!("{dtype} {}", shape.join("×"))
}

fn info(args: &BlockOne, output: &Output) -> CommandResult {
    let at = BlockHandle::once(&args.at, &args.reach)?;
    let block = at.ask("memory_info")?;
    if output.json || !output.is_terminal {
        output.value(&block)?;
        return Ok(Exit::Ok);
    }
    let text = |field: &str| block[field].as_str().unwrap_or("-").to_owned();
    let number = |field: &str| block[field].as_u64().unwrap_or(0);
    let names = |value: &Value| {
        let names = value.as_array().into_iter().flatten();
        let names: Vec<&str> = names.filter_map(Value::as_str).collect();
        names.join(", ")
    };
    let who = |value: &Value| {
        let text = |name: &str| value[name].as_str().unwrap_or("-").to_owned();
        format!("{} ({})", text("app_id"), text("instance"))
    };
    let mut facts: Vec<(&str, Cell)> = vec![
        ("block", toned(text("block_id"), Tone::Strong)),
        ("pool", text("pool").into()),
        (
            "size",
            format!(
                "{} ({} including {} slots and the header)",
                bytes(number("size")),
                bytes(number("bytes")),
                number("slots")
            )
            .into(),
        ),
        (
            "version",
            format!("{}, generation {}", number("version"), number("generation")).into(),
        ),
        (
            "kind",
            format!(
                "{}, {}, kept {}",
                text("kind"),
                text("consistency"),
                match block["lifetime"].as_str() {
                    Some("attached") => "while an app is attached",
                    _ => "until it is removed",
                }
            )
            .into(),
        ),
        ("layout", layout(&block["layout"]).into()),
        ("owner", text("owner").into()),
        ("readers", names(&block["permissions"]["read"]).into()),
        ("writers", names(&block["permissions"]["write"]).into()),
    ];
    match block["lock"]["holders"].as_array() {
        Some(holders) => {
            for holder in holders {
                let mode = block["lock"]["mode"].as_str().unwrap_or("-");
                let fence = &holder["fence"];
                let held = format!("{mode}, held by {}, fence {fence}", who(holder));
                facts.push(("lock", toned(held, Tone::Warn)));
            }
            let waiting = block["lock"]["waiting"].as_u64().unwrap_or(0);
            facts.push(("waiting", waiting.into()));
        }
        None => facts.push(("lock", toned("free", Tone::Good))),
    }
    for attached in block["attachments"].as_array().into_iter().flatten() {
        let mode = attached["mode"].as_str().unwrap_or("-");
        facts.push(("attached", format!("{} to {mode}", who(attached)).into()));
    }
    facts.push(("subscribers", number("subscribers").into()));
    output.facts(&facts)?;
    Ok(Exit::Ok)
}

fn create(args: &BlockCreateArgs, output: &Output) -> CommandResult {
    let at = BlockHandle::to_make(&args.at, &args.reach)?;
    let array = args.dtype.as_ref().map(|dtype| Array {
        dtype: npy::with_order(dtype),
        shape: args.shape.clone(),
        ..Array::default()
    });
    let size = match (args.size, &array) {
        (Some(size), _) => size,
        (None, Some(array)) => array_bytes(array)?,
        (None, None) => {
            return Err(Failure::usage(
                "a block needs a size, or --dtype and --shape",
            ));
        }
    };
    let block = make(&at, size, array.as_ref(), &args.kind, args.or_attach)?;
    report(&at, &block, "created", output)
}

fn make(
    at: &BlockHandle,
    size: u64,
    array: Option<&Array>,
    kind: &BlockKind,
    or_attach: bool,
) -> Result<Block, Failure> {
    let mut name = at.name();
    if let Some(array) = array {
        name = array.layout_of(name);
    }
    let mut create = name.create(size);
    if kind.persistent {
        create = create.persistent();
    }
    if kind.raw {
        create = create.raw();
    }
    if let Some(slots) = kind.slots {
        create = create.slots(slots);
    }
    if !kind.readers.is_empty() {
        create = create.readable_by(&texts(&kind.readers));
    }
    if !kind.writers.is_empty() {
        create = create.writable_by(&texts(&kind.writers));
    }
    if or_attach {
        create = create.or_attach();
    }
    Ok(create.send()?)
}

fn texts(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

fn array_bytes(array: &Array) -> Result<u64, Failure> {
    let digits: String = array.dtype.chars().filter(char::is_ascii_digit).collect();
    let item: u64 = match array.dtype.as_str() {
        "bf16" => 2,
        dtype => digits.parse().map_err(|_| {
            Failure::usage(format!("'{dtype}' is not a valid data type"))
                .with_help("use numpy's notation: f4, u1, >i8, or bf16")
        })?,
    };
    if array.shape.contains(&0) {
        return Ok(0);
    }
    let bytes = array.shape.iter().try_fold(item, |b, n| b.checked_mul(*n));
    bytes.ok_or_else(|| Failure::usage("the array is too large"))
}

/// Reports what was done to a block.
fn report(at: &BlockHandle, block: &Block, done: &str, output: &Output) -> CommandResult {
    let version = block.version();
    if output.json {
        output.value(&json!({
            "block_id": block.id(), "pool": block.pool(), "size": block.size(), "version": version,
            "generation": block.generation(),
        }))?;
    } else if output.is_terminal {
        output.line(format_args!(
            "{done} {}/{}: {}, version {version}",
            block.pool(),
            at.id,
            bytes(block.size())
        ))?;
    } else {
        output.line(version)?;
    }
    Ok(Exit::Ok)
}

fn read(args: &BlockReadArgs, output: &Output) -> CommandResult {
    let at = BlockHandle::once(&args.at, &args.reach)?;
    let block = at.name().attach()?;
    let length = args
        .length
        .unwrap_or_else(|| block.size().saturating_sub(args.from.offset));
    let length = usize::try_from(length).map_err(|_| {
        Failure::usage(
            "the length is too large for \
        this machine",
        )
    })?;
    if output.is_terminal || output.json {
        let mut buffer = vec![0; length.min(if output.json { length } else { SHOWN_BYTES })];
        let version = block.read_into(args.from.offset, &mut buffer)?;
        if output.json {
            let digits = hex(&buffer);
            output
                .value(&json!({"version": version, "offset": args.from.offset, "hex": digits}))?;
            return Ok(Exit::Ok);
        }
        for (n, line) in buffer.chunks(16).enumerate() {
            output.line(hex_line(args.from.offset + 16 * n as u64, line))?;
        }
        let more = length - buffer.len();
        if more > 0 {
            output.note(format_args!(
                "{} more; redirect stdout to a file to get all of it, or use --offset and --length",
                bytes(more as u64)
            ));
        }
        return Ok(Exit::Ok);
    }
    let mut buffer = vec![0; length];
    block.read_into(args.from.offset, &mut buffer)?;
    output.bytes(&buffer)?;
    Ok(Exit::Ok)
}

fn hex_line(at: u64, line: &[u8]) -> String {
    let digits: Vec<String> = line.iter().map(|b| format!("{b:02x}")).collect();
    let shown = |b: &u8| match *b {
        b' '..=b'~' => char::from(*b),
        _ => '.',
    };
    let text: String = line.iter().map(shown).collect();
    format!("{at:08x}  {:47}  {text}", digits.join(" "))
}

fn write(args: &BlockWriteArgs, output: &Output) -> CommandResult {
    let at = BlockHandle::once(&args.at, &args.reach)?;
    let block = at.name().attach_writable()?;
    let room = block.size().saturating_sub(args.from.offset);
    let data = parse::bytes(&args.data, room)?;
    if data.is_empty() && !args.empty.allow_empty {
        return Err(Failure::usage("the data is empty").with_help(
            "check the command that produced it, or use --allow-empty to write a version \
                 anyway",
        ));
    }
    match args.if_version {
        Some(version) => {
            block.write_if(version, args.from.offset, &data)?;
        }
        None => {
            let mut draft = block.write(LOCK_TIME)?;
            if let Err(error) = draft.write(args.from.offset, &data) {
                draft.abandon();
                return Err(error.into());
            }
            draft.commit()?;
        }
    }
    report(&at, &block, "wrote", output)
}

fn cas(args: &BlockCasArgs, output: &Output) -> CommandResult {
    let at = BlockHandle::once(&args.at, &args.reach)?;
    let block = at.name().attach_writable()?;
    let room = block.size().saturating_sub(args.from.offset);
    let expected = parse::bytes(&args.expected, room)?;
    let data = parse::bytes(&args.data, room)?;
    if expected.len() != data.len() {
        return Err(Failure::usage(format!(
            "the expected data has {} bytes and the new data {}; the lengths must be equal",
            expected.len(),
            data.len()
        )));
    }
    match block.cas(args.from.offset, &expected, &data)? {
        Ok(_) => report(&at, &block, "swapped", output),
        Err(current) => {
            let digits = hex(&current);
            if output.json {
                output.value(&json!({"swapped": false, "current": digits}))?;
            } else {
                output.note("the block does not have the EXPECTED bytes; nothing was written");
                for (n, line) in current.chunks(16).take(SHOWN_BYTES / 16).enumerate() {
                    output.line(hex_line(args.from.offset + 16 * n as u64, line))?;
                }
            }
            Ok(Exit::Unhealthy)
        }
    }
}

fn watch(args: &BlockWatchArgs, output: &Output) -> CommandResult {
    let at = BlockHandle::find(&args.at, &args.reach, ConnectOptions::continuous("block"))?;
    let block = at.name().attach()?;
    let mut changes = block.changes()?;
    if output.is_for_people() {
        output.note(format_args!(
            "watching {}/{} at version {}; press Ctrl-C to stop",
            block.pool(),
            at.id,
            block.version()
        ));
    }
    let mut seen = 0;
    while args.limit.wants_more(seen) {
        let Some(version) = changes.next() else {
            return Err(Failure::new(
                Exit::Failure,
                format!("block '{}' was removed", at.id),
            ));
        };
        seen += 1;
        match output.json {
            true => output.line(json!({"block_id": at.id, "version": version}))?,
            false => output.line(version)?,
        }
    }
    Ok(Exit::Ok)
}

fn resize(args: &BlockResizeArgs, output: &Output) -> CommandResult {
    let at = BlockHandle::once(&args.at, &args.reach)?;
    let block = at.name().attach_writable()?;
    block.resize(args.size)?;
    report(&at, &block, "resized", output)
}

fn flush(args: &BlockOne, output: &Output) -> CommandResult {
    let at = BlockHandle::once(&args.at, &args.reach)?;
    let version = at.name().attach()?.flush()?;
    if output.json {
        output.value(&json!({"flushed": at.id, "version": version}))?;
    } else if output.is_terminal {
        output.line(format_args!(
            "version {version} of {} is on the disk",
            at.id
        ))?;
    }
    Ok(Exit::Ok)
}

fn remove(args: &BlockOne, output: &Output) -> CommandResult {
    let at = BlockHandle::once(&args.at, &args.reach)?;
    at.name().remove()?;
    if output.json {
        output.value(&json!({"removed": at.id}))?;
    } else if output.is_terminal {
        output.line(format_args!("removed {}", at.id))?;
    }
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_as_hex_and_text() {
        assert_eq!(
            hex_line(16, b"A\x00z"),
            "00000010  41 00 7a                                         A.z"
        );
    }

    #[test]
    fn arrays_have_a_size() {
        let check = |dtype: &str, shape: &[u64], expected: Option<u64>| {
            let array = Array {
                dtype: dtype.into(),
                shape: shape.to_vec(),
                ..Array::default()
            };
            assert_eq!(array_bytes(&array).ok(), expected, "{dtype} {shape:?}");
        };
        check("<f4", &[2, 3], Some(24));
        check("|u1", &[], Some(1));
        check("bf16", &[3], Some(6));
        check("<f8", &[0], Some(0));
        check("float", &[2], None);
        check("<f8", &[u64::MAX, 2], None);
    }
}
