//! `keys` and `app key`: key files of encrypted pools and of apps. Only `keys rotate` contacts a
//! server.

use std::fmt::Write as _;
use std::fs::{DirBuilder, File, Permissions};
use std::io::{IsTerminal as _, Read as _, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use latzero::Keys;
use latzero_crypto::app_key::AppKey;
use latzero_crypto::keys::{
    KEY_FILE_BYTES_MAX, KeyError, KeySet, Kind, NewKeys, Roles, Secret, Token,
};
use latzero_crypto::{Zeroizing, passphrase, text};
use rustix::fs::OFlags;
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use serde_json::json;

use super::trigger::POOL_DEFAULT;
use crate::connect::{ConnectOptions, ServerArgs};
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Cell, Output};

/// The longest passphrase in bytes.
const PASSPHRASE_BYTES_MAX: u64 = 1024;

#[derive(Args, Debug)]
pub(crate) struct KeysArgs {
    #[command(subcommand)]
    command: KeysCommand,
}

/// The commands for the keys of a pool.
#[derive(Debug, Subcommand)]
enum KeysCommand {
    /// Create the keys of a new encrypted pool
    #[command(after_help = "\
Examples:
  latzero keys new vault                        in ~/.config/latzero/keys/vault
  latzero keys new vault --owner-key            only the holder of the owner key can rotate
  latzero keys new vault --file ./vault.keys")]
    New(NewArgs),
    /// Show which keys a file has, without printing them
    Show(FileArgs),
    /// Write the keys that one role needs to a new file, to give to somebody
    Export(ExportArgs),
    /// Check that a key file is well formed and private; exit code 4 if not
    Check(FileArgs),
    /// Start the next epoch of a pool, with new keys to remove readers or writers
    #[command(after_help = "\
Examples:
  latzero keys rotate vault --remove-reader                 former readers read nothing new
  latzero keys rotate vault --remove-writer --cut-history")]
    Rotate(RotateArgs),
    /// Accept an older state of a pool once, after a backup was restored
    AcceptRestore(FileArgs),
    /// Derive the keys of a new pool from a passphrase that is read from stdin
    FromPassphrase(FileArgs),
}

#[derive(Args, Debug)]
struct FileArgs {
    /// The pool
    pool: String,
    /// The key file [default: ~/.config/latzero/keys/POOL]
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct NewArgs {
    #[command(flatten)]
    file: FileArgs,
    /// Also create an owner key; only its holder can rotate the keys
    #[arg(long)]
    owner_key: bool,
}

#[derive(Args, Debug)]
struct RotateArgs {
    /// The pool
    pool: String,
    /// Replace the keys for joining and reading: holders of the old keys cannot read new content
    #[arg(long)]
    remove_reader: bool,
    /// Replace all keys: holders of the old keys cannot write either, and old content is no
    /// longer accepted
    #[arg(long, conflicts_with = "remove_reader")]
    remove_writer: bool,
    /// Do not let holders of only the new keys read content from before
    #[arg(long)]
    cut_history: bool,
    #[command(flatten)]
    reach: ServerArgs,
}

#[derive(Args, Debug)]
struct ExportArgs {
    #[command(flatten)]
    file: FileArgs,
    /// What the exported keys allow
    #[arg(long)]
    role: Role,
    /// The file to write; it must not exist
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
}

/// What keys allow.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Role {
    /// Join the pool
    Join,
    /// Join and read
    Read,
    /// Join, read and write
    Write,
}

impl Role {
    fn kinds(self) -> &'static [Kind] {
        match self {
            Role::Join => &[Kind::Sigil],
            Role::Read => &[Kind::Sigil, Kind::Shard],
            Role::Write => &[Kind::Sigil, Kind::Shard, Kind::Seal],
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct AppArgs {
    #[command(subcommand)]
    command: AppCommand,
}

/// The commands for the identity of an app.
#[derive(Debug, Subcommand)]
enum AppCommand {
    /// Create or show the key that reserves an AppID for its holder
    #[command(subcommand)]
    Key(AppKeyCommand),
}

#[derive(Debug, Subcommand)]
enum AppKeyCommand {
    /// Create the key of an app
    New(AppFileArgs),
    /// Show the public key of an app, without printing the private key
    Show(AppFileArgs),
}

#[derive(Args, Debug)]
struct AppFileArgs {
    /// The AppID
    app_id: String,
    /// The key file [default: ~/.config/latzero/apps/APPID]
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

pub(crate) fn run(args: &KeysArgs, output: &Output) -> CommandResult {
    match &args.command {
        KeysCommand::New(args) => new(args, output),
        KeysCommand::Show(args) => show(args, output),
        KeysCommand::Export(args) => export(args, output),
        KeysCommand::Check(args) => check(args, output),
        KeysCommand::Rotate(args) => rotate(args, output),
        KeysCommand::AcceptRestore(args) => accept_restore(args, output),
        KeysCommand::FromPassphrase(args) => from_passphrase(args, output),
    }
}

pub(crate) fn run_app(args: &AppArgs, output: &Output) -> CommandResult {
    let AppCommand::Key(command) = &args.command;
    match command {
        AppKeyCommand::New(args) => {
            check_app(&args.app_id)?;
            let path = args.path()?;
            let key = AppKey::new(random()?);
            let line = Zeroizing::new(format!("{}\n", key.to_text().as_str()));
            write_new(&path, line.as_bytes())?;
            args.report(&path, &key, output)
        }
        AppKeyCommand::Show(args) => {
            let path = args.path()?;
            args.report(&path, &read_app_key(&path)?, output)
        }
    }
}

impl AppFileArgs {
    fn path(&self) -> Result<PathBuf, Failure> {
        place(self.file.as_deref(), "apps", &self.app_id)
    }

    fn report(&self, path: &Path, key: &AppKey, output: &Output) -> CommandResult {
        let public = text::encode(&key.signing_key().public().to_bytes());
        if output.json {
            let value = json!({"app_id": self.app_id, "file": path, "public_key": public});
            output.value(&value)?;
            return Ok(Exit::Ok);
        }
        output.facts(&[
            ("app", self.app_id.as_str().into()),
            ("public key", public.into()),
            ("file", path.display().into()),
        ])?;
        Ok(Exit::Ok)
    }
}

impl FileArgs {
    fn path(&self) -> Result<PathBuf, Failure> {
        place(self.file.as_deref(), "keys", &self.pool)
    }

    fn report(&self, path: &Path, keys: &KeySet, output: &Output) -> CommandResult {
        let kinds: Vec<_> = Kind::ALL
            .into_iter()
            .filter(|kind| keys.has(*kind))
            .map(Kind::name)
            .collect();
        let role = match keys.roles() {
            None => "nothing without the SigilKey",
            Some(Roles::Join) => "join",
            Some(Roles::Read) => "join and read",
            Some(Roles::Write) => "join, read and write",
        };
        let pin = keys.pin().map(|pin| text::encode(&pin));
        if output.json {
            let roles = keys.roles().map(Roles::number);
            let value = json!({
                "pool": self.pool, "file": path, "keys": kinds, "roles": roles, "pin": pin,
            });
            output.value(&value)?;
            return Ok(Exit::Ok);
        }
        let mut facts: Vec<(&str, Cell)> = vec![
            ("pool", self.pool.as_str().into()),
            ("keys", kinds.join(", ").into()),
            ("allow", role.into()),
        ];
        facts.extend(pin.map(|pin| ("pin", pin.into())));
        facts.push(("file", path.display().into()));
        output.facts(&facts)?;
        Ok(Exit::Ok)
    }
}

fn new(args: &NewArgs, output: &Output) -> CommandResult {
    check_pool(&args.file.pool)?;
    let path = args.file.path()?;
    let owner = if args.owner_key {
        Some(random()?)
    } else {
        None
    };
    let keys = KeySet::new_pool(NewKeys {
        sigil: random()?,
        shard: random()?,
        seal: random()?,
        owner,
    });
    write_keys(&args.file.pool, &keys, &held(&keys), &path)?;
    args.file.report(&path, &keys, output)
}

/// The files of a pool's keys during a rotation. The new keys are on disk before the pool needs
/// them, and the old ones stay beside them.
struct KeyFiles {
    current: PathBuf,
    /// The keys of a rotation whose result is not known yet.
    next: PathBuf,
}

impl KeyFiles {
    fn of(current: PathBuf) -> KeyFiles {
        let next = Self::beside(&current, "next");
        KeyFiles { current, next }
    }

    fn beside(path: &Path, ending: &str) -> PathBuf {
        PathBuf::from(format!("{}.{ending}", path.display()))
    }

    /// A name beside the file that nothing has: keys are never overwritten, whatever a server says.
    fn unused_name(&self, ending: &str) -> PathBuf {
        let numbered = (2..).map(|n| Self::beside(&self.current, &format!("{ending}.{n}")));
        let mut names = std::iter::once(Self::beside(&self.current, ending)).chain(numbered);
        let free = names.find(|name| !name.exists());
        free.expect("there are fewer files than numbers")
    }

    /// The pool has the new keys, in this epoch.
    fn advance(&self, epoch: u64) -> Result<(), Failure> {
        let old = format!("epoch-{}", epoch.saturating_sub(1));
        // There is a key file at any time, so that the command can be killed and run again.
        std::fs::hard_link(&self.current, self.unused_name(&old))
            .and_then(|()| std::fs::rename(&self.next, &self.current))
            .map_err(|error| {
                let text = format!(
                    "the new keys are in {}, and can't be moved: {error}",
                    self.next.display()
                );
                Failure::new(Exit::Failure, text)
            })
    }
}

fn rotating(pool: &str) -> ConnectOptions {
    ConnectOptions::once("keys rotate").in_pool(Some(pool))
}

/// Ends a rotation of which only the server knows the result: the command was killed, or the reply
/// was lost. Only the server's acceptance proves that the new keys are the pool's, and nothing
/// proves that they are not, so they are never deleted.
fn resume(args: &RotateArgs, files: &KeyFiles, output: &Output) -> CommandResult {
    let mut reach = args.reach.clone();
    reach.keys = Some(files.next.clone());
    let next = files.next.display();
    match reach.connect(&rotating(&args.pool)) {
        Ok(connection) => {
            let asked = json!({"action": "pool_info", "pool": args.pool});
            let pool = connection.app.request(&asked)?;
            let epoch = pool["epoch"].as_u64().unwrap_or(0);
            files.advance(epoch)?;
            output.note("an earlier rotation had reached the server, so no new one was made");
            if output.json {
                output.value(&json!({"epoch": epoch, "resumed": true}))?;
                return Ok(Exit::Ok);
            }
            output.facts(&[
                ("pool", args.pool.as_str().into()),
                ("epoch", epoch.into()),
                ("new keys", files.current.display().into()),
            ])?;
            Ok(Exit::Ok)
        }
        Err(failure) if failure.exit == Exit::Denied => {
            let unused = files.unused_name("unused");
            std::fs::rename(&files.next, &unused)?;
            output.note(format_args!(
                "an earlier rotation did not happen: its keys were moved from {next} to {}",
                unused.display()
            ));
            rotate(args, output)
        }
        Err(failure) => Err(failure),
    }
}

fn rotate(args: &RotateArgs, output: &Output) -> CommandResult {
    let path = args.reach.key_file(&args.pool).ok_or_else(|| {
        Failure::usage(format!("pool {} has no key file", args.pool))
            .with_help("name it with --keys")
    })?;
    let files = KeyFiles::of(path);
    if files.next.exists() {
        return resume(args, &files, output);
    }
    let old = read_keys(&files.current)?;
    let again = |kind: Kind| -> Result<Secret, Failure> {
        let missing = || Failure::usage("a rotation needs the keys of a writer");
        let token = old.token(kind).ok_or_else(missing)?;
        Ok(Token::parse(&token)
            .map_err(|error| refused(&files.current, error))?
            .secret)
    };
    let is_new = args.remove_reader || args.remove_writer;
    let new = KeySet::new_pool(NewKeys {
        sigil: if is_new {
            random()?
        } else {
            again(Kind::Sigil)?
        },
        shard: if is_new {
            random()?
        } else {
            again(Kind::Shard)?
        },
        seal: if args.remove_writer {
            random()?
        } else {
            again(Kind::Seal)?
        },
        owner: old
            .has(Kind::Owner)
            .then(|| again(Kind::Owner))
            .transpose()?,
    });
    let connection = args.reach.connect(&rotating(&args.pool))?;
    if is_new {
        write_keys(&args.pool, &new, &held(&new), &files.next)?;
    }
    let keys = of_pool(if is_new { &files.next } else { &files.current })?;
    let done = connection
        .app
        .rotate_pool(&args.pool, &keys, args.cut_history);
    let done = done.map_err(|error| match is_new {
        true => Failure::from(error).with_help(format!(
            "the new keys stay in {}: the next rotation finds out whether the pool has them",
            files.next.display()
        )),
        false => error.into(),
    })?;
    let epoch = done["epoch"].as_u64().unwrap_or(0);
    if is_new {
        files.advance(epoch)?;
    }
    if output.json {
        output.value(&done)?;
        return Ok(Exit::Ok);
    }
    let mut facts: Vec<(&str, Cell)> = vec![
        ("pool", args.pool.as_str().into()),
        ("epoch", epoch.into()),
        (
            "members kept",
            done["members_kept"].as_u64().unwrap_or(0).into(),
        ),
        (
            "members removed",
            done["members_dropped"].as_u64().unwrap_or(0).into(),
        ),
    ];
    if is_new {
        facts.push(("new keys", files.current.display().into()));
    }
    output.facts(&facts)?;
    Ok(Exit::Ok)
}

fn accept_restore(args: &FileArgs, output: &Output) -> CommandResult {
    let path = args.path()?;
    read(&path)?;
    let forgotten = of_pool(&path)?.accept_restore(&args.pool)?;
    if output.json {
        output.value(&json!({"pool": args.pool, "forgotten": forgotten}))?;
    } else if forgotten {
        output.line(format_args!(
            "the next state of pool {} will be accepted, even if it is older",
            args.pool
        ))?;
    } else {
        output.note(format_args!("nothing was known of pool {}", args.pool));
    }
    Ok(Exit::Ok)
}

fn show(args: &FileArgs, output: &Output) -> CommandResult {
    let path = args.path()?;
    args.report(&path, &read_keys(&path)?, output)
}

fn check(args: &FileArgs, output: &Output) -> CommandResult {
    let path = args.path()?;
    let keys = read_keys(&path).map_err(|failure| match path.exists() {
        true => Failure {
            exit: Exit::Unhealthy,
            ..failure
        },
        false => failure,
    })?;
    args.report(&path, &keys, output)
}

fn export(args: &ExportArgs, output: &Output) -> CommandResult {
    let keys = read_keys(&args.file.path()?)?;
    let kinds = args.role.kinds();
    write_keys(&args.file.pool, &keys, kinds, &args.to)?;
    let exported = read_keys(&args.to)?;
    args.file.report(&args.to, &exported, output)
}

fn from_passphrase(args: &FileArgs, output: &Output) -> CommandResult {
    check_pool(&args.pool)?;
    let path = args.path()?;
    let words = read_passphrase(output)?;
    output.note(format!("warning: {}", passphrase::WARNING));
    let keys = passphrase::keys(&args.pool, words.as_bytes())
        .map_err(|error| Failure::new(Exit::Failure, error))?;
    write_keys(&args.pool, &keys, &held(&keys), &path)?;
    args.report(&path, &keys, output)
}

fn held(keys: &KeySet) -> Vec<Kind> {
    Kind::ALL
        .into_iter()
        .filter(|kind| keys.has(*kind))
        .collect()
}

/// One line from stdin, without its end; a terminal does not show it.
fn read_passphrase(output: &Output) -> Result<Zeroizing<String>, Failure> {
    let cannot = |error| Failure::new(Exit::Failure, format!("stdin cannot be read: {error}"));
    let stdin = std::io::stdin();
    let hidden = stdin.is_terminal().then(|| tcgetattr(&stdin)).transpose();
    let hidden = hidden.map_err(|error| cannot(error.into()))?;
    if let Some(shown) = &hidden {
        output.note("passphrase (it is not shown):");
        let mut silent = shown.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&stdin, OptionalActions::Flush, &silent).map_err(|error| cannot(error.into()))?;
    }
    // Large enough at once, so that growing leaves no copy behind.
    let mut line = Zeroizing::new(Vec::with_capacity(2 * PASSPHRASE_BYTES_MAX as usize));
    let mut bytes = stdin.lock().take(PASSPHRASE_BYTES_MAX + 2).bytes();
    let read = loop {
        match bytes.next() {
            None | Some(Ok(b'\n')) => break Ok(()),
            Some(Ok(byte)) => line.push(byte),
            Some(Err(error)) => break Err(cannot(error)),
        }
    };
    if let Some(shown) = &hidden {
        tcsetattr(&stdin, OptionalActions::Now, shown).map_err(|error| cannot(error.into()))?;
    }
    read?;
    if line.len() as u64 > PASSPHRASE_BYTES_MAX {
        return Err(Failure::usage("a passphrase has at most 1024 bytes"));
    }
    let words =
        std::str::from_utf8(&line).map_err(|_| Failure::usage("a passphrase is UTF-8 text"))?;
    if words.is_empty() {
        let help = "type it, or pipe it in: `latzero keys from-passphrase POOL < FILE`";
        return Err(Failure::usage("stdin has no passphrase").with_help(help));
    }
    Ok(Zeroizing::new(words.to_owned()))
}

/// Refuses new keys for the pools that exist without any.
fn check_pool(pool: &str) -> Result<(), Failure> {
    match pool {
        "system" | POOL_DEFAULT => {
            let text = format!("pool '{pool}' is built in and cannot be encrypted");
            Err(Failure::usage(text).with_help("choose another name"))
        }
        _ => Ok(()),
    }
}

/// Refuses a new key for an AppID that no app can have.
fn check_app(app_id: &str) -> Result<(), Failure> {
    if app_id == "latzero" || app_id.starts_with("latzero-") {
        let text = format!("AppID '{app_id}' is reserved for the server");
        return Err(Failure::usage(text).with_help("choose another AppID"));
    }
    Ok(())
}

/// A new secret from the system's random number generator.
fn random() -> Result<Secret, Failure> {
    Secret::filled(|bytes| {
        let mut filled = 0;
        while filled < bytes.len() {
            match rustix::rand::getrandom(
                &mut bytes[filled..],
                rustix::rand::GetRandomFlags::empty(),
            ) {
                Ok(count) => filled += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    let text = format!("the system returned no random numbers: {error}");
                    return Err(Failure::new(Exit::Failure, text));
                }
            }
        }
        Ok(())
    })
}

/// The file given with `--file`, or the default file for the name. It is never in the data
/// directory: a copy of that directory must not contain the keys.
fn place(named: Option<&Path>, folder: &str, name: &str) -> Result<PathBuf, Failure> {
    let is_file_name = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty()
        || name.len() > 128
        || !name.chars().all(is_file_name)
        || name.starts_with('.')
    {
        return Err(Failure::usage(format!(
            "'{}' is not a name for a key file",
            name.escape_debug()
        ))
        .with_help("use 1 to 128 of A-Z a-z 0-9 . _ -, and do not start with '.'"));
    }
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    default_file(folder, name).ok_or_else(|| {
        Failure::usage("HOME is not set, so there is no default directory for keys")
            .with_help("name a file with --file")
    })
}

/// The key file that a pool or an app has by default.
pub(crate) fn default_file(folder: &str, name: &str) -> Option<PathBuf> {
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let config = absolute("XDG_CONFIG_HOME").or_else(|| Some(absolute("HOME")?.join(".config")));
    Some(config?.join("latzero").join(folder).join(name))
}

fn write_keys(pool: &str, keys: &KeySet, kinds: &[Kind], path: &Path) -> Result<(), Failure> {
    let tokens = keys
        .to_file(kinds)
        .map_err(|error| Failure::new(Exit::Failure, error))?;
    let mut text = Zeroizing::new(String::with_capacity(256 + pool.len() + tokens.len()));
    writeln!(
        text,
        "# Keys of the pool {pool}. Anyone who can read this file can use them."
    )
    .expect("memory");
    text.push_str(&tokens);
    write_new(path, text.as_bytes())
}

/// Writes a private file, completely or not at all; never overwrites one.
fn write_new(path: &Path, content: &[u8]) -> Result<(), Failure> {
    let cannot = |error: std::io::Error| {
        Failure::new(
            Exit::Failure,
            format!("{} cannot be written: {error}", path.display()),
        )
    };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(parent)
        .map_err(cannot)?;
    let mut file = tempfile::Builder::new()
        .prefix(".latzero-")
        .permissions(Permissions::from_mode(0o600))
        .tempfile_in(parent)
        .map_err(cannot)?;
    file.write_all(content).map_err(cannot)?;
    file.as_file().sync_all().map_err(cannot)?;
    file.persist_noclobber(path)
        .map_err(|error| match error.error.kind() {
            std::io::ErrorKind::AlreadyExists => Failure::new(
                Exit::Failure,
                format!("{} exists; keys are never overwritten", path.display()),
            )
            .with_help("move it away first, or name another file"),
            _ => cannot(error.error),
        })?;
    File::open(parent)
        .and_then(|dir| dir.sync_all())
        .map_err(cannot)
}

/// The keys in the file of a pool.
pub(crate) fn of_pool(path: &Path) -> Result<Keys, Failure> {
    // What is wrong with a file is said the same way everywhere.
    Keys::from_file(path).map_err(|error| read_keys(path).err().unwrap_or_else(|| error.into()))
}

/// The key in the file of an app.
pub(crate) fn of_app(path: &Path) -> Result<latzero::AppKey, Failure> {
    let key = latzero::AppKey::from_file(path);
    key.map_err(|error| read_app_key(path).err().unwrap_or_else(|| error.into()))
}

fn read_app_key(path: &Path) -> Result<AppKey, Failure> {
    let text = read(path)?;
    let line = std::str::from_utf8(&text).map_err(|_| refused(path, KeyError::AppKey))?;
    AppKey::parse(line).map_err(|error| refused(path, error))
}

fn read_keys(path: &Path) -> Result<KeySet, Failure> {
    KeySet::from_file(&read(path)?).map_err(|error| refused(path, error))
}

fn refused(path: &Path, error: KeyError) -> Failure {
    let failure = Failure::usage(format!("{}: {error}", path.display()));
    failure.with_help(match error {
        KeyError::AppKey => "`latzero app key new APPID` creates an app key",
        _ => "`latzero keys new POOL` creates a key file; `latzero keys check POOL` checks one",
    })
}

/// Reads a key file, which must be a private regular file of this user.
fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let bad = |what: &str| Failure::usage(format!("the key file {} {what}", path.display()));
    // Links are not followed, and opening a pipe does not block.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let flags = i32::try_from(flags.bits()).expect("flags fit");
    let opened = File::options().read(true).custom_flags(flags).open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(code) if code == rustix::io::Errno::LOOP.raw_os_error() => {
            bad("is a link").with_help("name the file itself")
        }
        _ => bad(&format!("cannot be opened: {error}")).with_help(
            "check the path; `latzero keys new POOL` creates the keys of a pool, and `latzero app \
             key new APPID` the key of an app",
        ),
    })?;
    let facts = file
        .metadata()
        .map_err(|error| bad(&format!("cannot be examined: {error}")))?;
    if !facts.is_file() {
        return Err(bad("is not a regular file"));
    }
    if facts.uid() != rustix::process::geteuid().as_raw() {
        return Err(bad("belongs to another user").with_help("copy it to a file of your own"));
    }
    if facts.mode() & 0o077 != 0 {
        let help = format!(
            "run `chmod 600 {}`, and make new keys if others may have read it",
            path.display()
        );
        return Err(bad("can be read by others").with_help(help));
    }
    let max = KEY_FILE_BYTES_MAX as u64;
    if facts.len() > max {
        return Err(bad("is larger than 64 KiB"));
    }
    let length = usize::try_from(facts.len()).unwrap_or_default();
    let mut content = Zeroizing::new(Vec::with_capacity(length + 1));
    file.take(max + 1)
        .read_to_end(&mut content)
        .map_err(|error| bad(&format!("cannot be read: {error}")))?;
    Ok(content)
}
