//! `block dump` and `block load`: a block's content to and from files.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{self, Cursor, Read, Seek as _, Write};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use latzero::Code;
use latzero::blocking::{Block, BlockWriter};
use serde_json::{Value, json};

use super::npy::Array;
use super::{BlockHandle, LOCK_TIME, array_bytes, make, report};
use crate::args::{BlockFileArgs, BlockLoadArgs};
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Output, bytes};

/// Bytes moved at a time, between two reports of progress.
const PIECE_BYTES: usize = 4 << 20;

/// How many times a dump restarts because the block was written in the meantime.
const DUMPS_MAX: usize = 10;

/// The most bytes that are loaded from a pipe, whose length is unknown until its end.
const PIPE_BYTES_MAX: u64 = 1 << 30;

/// Progress of a large transfer.
struct Progress<'a> {
    output: &'a Output,
    what: &'static str,
    total: u64,
    since: Instant,
}

impl<'a> Progress<'a> {
    fn new(output: &'a Output, what: &'static str, total: u64) -> Progress<'a> {
        Progress {
            output,
            what,
            total,
            since: Instant::now(),
        }
    }

    fn show(&self, done: u64) {
        const CELLS: u64 = 30;
        let full = done * CELLS / self.total.max(1);
        let cell = |n| if n < full { '█' } else { '░' };
        let bar: String = (0..CELLS).map(cell).collect();
        let rate = done as f64 / self.since.elapsed().as_secs_f64().max(1e-9);
        self.output.progress(format_args!(
            "{} {bar} {:3} %  {} of {}  {}/s",
            self.what,
            done * 100 / self.total.max(1),
            bytes(done),
            bytes(self.total),
            bytes(rate as u64)
        ));
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        self.output.progress_done();
    }
}

fn is_npy(file: &Path) -> bool {
    file.extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("npy"))
}

fn file_failure(file: &Path, what: &str, error: &io::Error) -> Failure {
    let exit = match error.kind() {
        io::ErrorKind::NotFound => Exit::Usage,
        _ => Exit::of_io(error),
    };
    let text = format!("the file '{}' cannot be {what}: {error}", file.display());
    Failure::new(exit, text)
}

/// The destination of a dump.
enum Sink {
    Stdout,
    /// An existing file that is written to directly: a device, a pipe, or the target of a link.
    Through(PathBuf),
    /// A regular or a new file, which is replaced as a whole.
    Replace(PathBuf, Option<Metadata>),
}

impl Sink {
    fn of(file: &Path) -> Result<Sink, Failure> {
        let failed = |error| file_failure(file, "written", &error);
        if file.as_os_str() == "-" {
            return Ok(Sink::Stdout);
        }
        // `/dev/stdout` may be a file that another program has open; replacing the file would not
        // reach that program.
        if file.starts_with("/dev") || file.starts_with("/proc") {
            return Ok(Sink::Through(file.to_owned()));
        }
        match file.metadata() {
            Ok(metadata) if metadata.is_file() => {
                let real = file.canonicalize().map_err(failed)?;
                Ok(Sink::Replace(real, Some(metadata)))
            }
            Ok(metadata) if metadata.is_dir() => Err(Failure::usage(format!(
                "'{}' is a directory",
                file.display()
            ))
            .with_help("name a file in it")),
            Ok(_) => Ok(Sink::Through(file.to_owned())),
            // A link whose target is missing: the target is created.
            Err(e) if e.kind() == io::ErrorKind::NotFound && file.is_symlink() => {
                Ok(Sink::Through(file.to_owned()))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Ok(Sink::Replace(file.to_owned(), None))
            }
            Err(error) => Err(failed(error)),
        }
    }
}

pub(super) fn dump(args: &BlockFileArgs, output: &Output) -> CommandResult {
    let sink = Sink::of(&args.file)?;
    let at = BlockHandle::once(&args.at, &args.reach)?;
    let block = at.name().attach()?;
    let header = match is_npy(&args.file) {
        true => npy_header(&block),
        false => Vec::new(),
    };
    let version = match sink {
        Sink::Stdout => {
            output.bytes(&block.read()?.0)?;
            return Ok(Exit::Ok);
        }
        Sink::Through(file) => write_through(&block, &header, &file)?,
        Sink::Replace(file, former) => replace(&block, &header, &file, former.as_ref(), output)?,
    };
    if output.json {
        output.value(&json!({"file": args.file, "version": version, "bytes": block.size()}))?;
    } else if output.is_terminal {
        output.line(format_args!(
            "wrote {} of {}/{} (version {version}) to {}",
            bytes(block.size()),
            block.pool(),
            at.id,
            args.file.display()
        ))?;
    }
    Ok(Exit::Ok)
}

fn npy_header(block: &Block) -> Vec<u8> {
    let array = match block.layout() {
        Some(layout) => array_of(&layout),
        // A block without a layout is an array of bytes.
        None => Array {
            dtype: "|u1".into(),
            shape: vec![block.size()],
            ..Array::default()
        },
    };
    array.header()
}

fn array_of(layout: &Value) -> Array {
    let items = |name: &str| layout[name].as_array().into_iter().flatten();
    let fields = items("fields").filter_map(Value::as_str);
    Array {
        dtype: layout["dtype"].as_str().unwrap_or("|u1").to_owned(),
        shape: items("shape").filter_map(Value::as_u64).collect(),
        fields: fields.map(str::to_owned).collect(),
    }
}

/// Bytes of a block that a dump has. With a header, those of its array: the block may be larger.
fn dumped_bytes(block: &Block, header: &[u8]) -> u64 {
    match block.layout().filter(|_| !header.is_empty()) {
        Some(layout) => {
            array_bytes(&array_of(&layout)).map_or(block.size(), |bytes| bytes.min(block.size()))
        }
        None => block.size(),
    }
}

/// One complete version of a block.
fn read_whole(block: &Block, header: &[u8]) -> Result<(Vec<u8>, u64), Failure> {
    let size = dumped_bytes(block, header);
    let (mut all, version) = block.read()?;
    all.truncate(usize::try_from(size).unwrap_or(usize::MAX));
    Ok((all, version))
}

/// Writes a version to an existing device or pipe.
fn write_through(block: &Block, header: &[u8], file: &Path) -> Result<u64, Failure> {
    let failed = |error| file_failure(file, "written", &error);
    // Bytes written to a pipe cannot be taken back, so the dump cannot restart.
    let (all, version) = read_whole(block, header)?;
    let mut out = OpenOptions::new()
        .write(true)
        .create(file.is_symlink() && !file.exists())
        .truncate(true)
        .open(file)
        .map_err(failed)?;
    out.write_all(header).map_err(failed)?;
    out.write_all(&all).map_err(failed)?;
    out.flush().map_err(failed)?;
    Ok(version)
}

/// Writes a version to a new file, which then replaces the old one atomically.
fn replace(
    block: &Block,
    header: &[u8],
    file: &Path,
    former: Option<&Metadata>,
    output: &Output,
) -> Result<u64, Failure> {
    let failed = |error: io::Error| file_failure(file, "written", &error);
    let dir = match file.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".latzero-").suffix(".part");
    if former.is_none() {
        // The mode of any new file; the umask applies.
        builder.permissions(Permissions::from_mode(0o666));
    }
    let mut part = match builder.tempfile_in(dir) {
        Ok(part) => part,
        // A file may be writable even if its directory is not.
        Err(_) if former.is_some() => return write_through(block, header, file),
        Err(error) => return Err(failed(error)),
    };
    if let Some(former) = former {
        // First the owner: changing it clears bits of the mode. Only root may give files away.
        let (uid, gid) = (former.uid(), former.gid());
        let _ = std::os::unix::fs::fchown(part.as_file(), Some(uid), Some(gid));
        let mode = Permissions::from_mode(former.mode() & 0o7777);
        part.as_file().set_permissions(mode).map_err(failed)?;
    }
    let version = write_out(block, header, part.as_file_mut(), file, output)?;
    part.as_file().sync_data().map_err(failed)?;
    part.persist(file).map_err(|error| failed(error.error))?;
    Ok(version)
}

/// Writes one version of a block to a new file.
fn write_out(
    block: &Block,
    header: &[u8],
    out: &mut File,
    file: &Path,
    output: &Output,
) -> Result<u64, Failure> {
    let failed = |error: io::Error| file_failure(file, "written", &error);
    let size = dumped_bytes(block, header);
    for _ in 0..DUMPS_MAX {
        restart(out, header).map_err(failed)?;
        let progress = Progress::new(output, "dumping", size);
        let mut piece = vec![0; PIECE_BYTES];
        let (mut done, mut first) = (0, None);
        while done < size {
            let n = usize::try_from(size - done).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
            let version = block.read_into(done, &mut piece[..n])?;
            if *first.get_or_insert(version) != version {
                break;
            }
            out.write_all(&piece[..n]).map_err(failed)?;
            done += n as u64;
            progress.show(done);
        }
        if done == size {
            return Ok(first.unwrap_or(0));
        }
    }
    // The block is written all the time: read it at once, however much memory that takes.
    let (all, version) = read_whole(block, header)?;
    restart(out, header).map_err(failed)?;
    out.write_all(&all).map_err(failed)?;
    Ok(version)
}

fn restart(out: &mut File, header: &[u8]) -> io::Result<()> {
    out.set_len(0)?;
    out.rewind()?;
    out.write_all(header)
}

/// What is loaded.
struct Source {
    reader: Box<dyn Read>,
    size: u64,
    /// What the header of a .npy file says.
    array: Option<Array>,
}

impl Source {
    fn open(file: &Path) -> Result<Source, Failure> {
        let failed = |error| file_failure(file, "read", &error);
        let (mut reader, length): (Box<dyn Read>, Option<u64>) = if file.as_os_str() == "-" {
            (Box::new(io::stdin()), None)
        } else {
            let opened = File::open(file).map_err(failed)?;
            let metadata = opened.metadata().map_err(failed)?;
            let length = metadata.is_file().then_some(metadata.len());
            (Box::new(opened), length)
        };
        if is_npy(file) {
            let array = Array::read(&mut reader).map_err(|why| {
                Failure::usage(format!("'{}' cannot be loaded: {why}", file.display()))
            })?;
            let size = array_bytes(&array)?;
            return Ok(Source {
                reader,
                size,
                array: Some(array),
            });
        }
        if let Some(size) = length {
            return Ok(Source {
                reader,
                size,
                array: None,
            });
        }
        let mut all = Vec::new();
        let mut limited = reader.take(PIPE_BYTES_MAX + 1);
        limited.read_to_end(&mut all).map_err(failed)?;
        let size = all.len() as u64;
        if size > PIPE_BYTES_MAX {
            let text = format!("the input is longer than {}", bytes(PIPE_BYTES_MAX));
            return Err(Failure::usage(text).with_help("write it to a file and load the file"));
        }
        Ok(Source {
            reader: Box::new(Cursor::new(all)),
            size,
            array: None,
        })
    }
}

pub(super) fn load(args: &BlockLoadArgs, output: &Output) -> CommandResult {
    let mut source = Source::open(&args.file)?;
    if source.size == 0 && !args.empty.allow_empty {
        let name = match args.file.as_os_str() == "-" {
            true => "standard input".to_owned(),
            false => format!("'{}'", args.file.display()),
        };
        return Err(Failure::usage(format!("{name} is empty")).with_help(
            "check the command that produced it, or use --allow-empty to load it anyway",
        ));
    }
    if args.offset.is_some() && source.array.is_some() {
        return Err(Failure::usage("--offset cannot be used with a .npy file")
            .with_help("a .npy file holds a whole array; load it without --offset"));
    }
    let (at, block) = match args.offset {
        // Write a part of the block.
        Some(_) => {
            let at = BlockHandle::once(&args.at, &args.reach)?;
            let block = at.name().attach_writable()?;
            (at, block)
        }
        None => whole(args, &source)?,
    };
    let writer = block.writer(LOCK_TIME)?;
    let offset = args.offset.unwrap_or(0);
    match args.offset {
        Some(_) if source.size > block.size().saturating_sub(offset) => {
            let text = format!(
                "'{}' has {} bytes, but the block has only {} from offset {offset} on",
                args.file.display(),
                source.size,
                block.size().saturating_sub(offset)
            );
            return Err(Failure::usage(text).with_help(
                "choose another --offset, or make it larger with `latzero block resize`",
            ));
        }
        // No old content may remain after the end of the new one.
        None if source.array.is_none() && source.size > 0 && block.size() != source.size => {
            block.resize(source.size)?;
        }
        _ => {}
    }
    if source.size == 0 && args.offset.is_none() {
        // A block has at least one byte, so empty content becomes zeros.
        source.size = block.size();
        source.reader = Box::new(io::repeat(0));
    }
    write_in(writer, &mut source, offset, &args.file, output)?;
    report(&at, &block, "loaded", output)
}

/// The block that a file is loaded into; it is created if it does not exist.
fn whole(args: &BlockLoadArgs, source: &Source) -> Result<(BlockHandle, Block), Failure> {
    let at = BlockHandle::to_make(&args.at, &args.reach)?;
    let mut name = at.name();
    if let Some(array) = &source.array {
        name = array.layout_of(name);
    }
    let block = match name.attach_writable() {
        Ok(block) => block,
        Err(error) if error.kind() == Code::NoBlock && source.size > 0 => {
            make(&at, source.size, source.array.as_ref(), &args.kind, true)?
        }
        Err(error) => return Err(error.into()),
    };
    Ok((at, block))
}

/// Writes the source as one version. If the block is not mapped, a version must fit into one
/// message (`limits.max_frame`).
fn write_in(
    writer: BlockWriter,
    source: &mut Source,
    offset: u64,
    file: &Path,
    output: &Output,
) -> Result<(), Failure> {
    let progress = Progress::new(output, "loading", source.size);
    let mut draft = writer.into_draft()?;
    let mut piece = vec![0; PIECE_BYTES];
    let mut done = 0;
    while done < source.size {
        let left = source.size - done;
        let n = usize::try_from(left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        let step = source
            .reader
            .read_exact(&mut piece[..n])
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => {
                    Failure::usage(format!("the file '{}' is truncated", file.display()))
                }
                _ => file_failure(file, "read", &error),
            })
            .and_then(|()| Ok(draft.write(offset + done, &piece[..n])?));
        if let Err(failure) = step {
            draft.abandon();
            return Err(failure);
        }
        done += n as u64;
        progress.show(done);
    }
    draft.commit()?;
    Ok(())
}
