//! Everything that can be typed.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use latzero_server::settings::Override;

use crate::exit;
use crate::output::Color;
use crate::parse;
use crate::reach::Reach;

/// The commands by what they are for; clap itself would list them in one heap.
const HELP: &str = "\
{about}

{usage-heading} {usage}

The server:
  start       Start the server
  status      Is it running, where, and how busy is it
  stop        Stop it: running calls are finished first
  reload      Have it read its settings again
  doctor      What stands in the way of a start, and what mends it
  config      Show the settings, each with where it comes from
  kick        Close the connections of an app

What is kept:
  backup      Copy the database and the persistent blocks into one file
  restore     Make a backup the database; the server must be stopped
  db          Look for damage in the database

Calls and events:
  call        Call a trigger and print the answer
  answers     Print the answers to parked calls that came while nobody waited
  emit        Send an event to whoever handles it
  serve       Make any program a handler: JSON on its stdin, JSON from its stdout
  on          Print events as they come

Memory:
  block       Blocks of memory: list, make, read, write, watch, lock, dump, load

Looking at it:
  apps        The apps that the server knows, live or offline
  pools       The pools there are
  watch       Print who comes and goes in a pool
  stats       Counts, response times, errors, resources
  health      Is every part well
  ping        How long an answer takes
  bench       How many calls or events a second

Other:
  completion  Print a completion script for a shell
  help        Help on a command

Options:
{options}

{after-help}";

const ABOUT: &str =
    "LatZero: call functions of other programs, send them events, be called by them";

const AFTER_HELP: &str = "\
Try it:
  latzero start
  latzero call system/echo '{\"x\":42}'

Each command has its own help with examples: latzero call --help";

#[derive(Debug, Parser)]
#[command(
    name = "latzero", version, about = ABOUT, propagate_version = false, arg_required_else_help = true,
    help_template = HELP, after_help = format!("{AFTER_HELP}\n\n{}", exit::TABLE),
    max_term_width = 100,
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Print JSON, for scripts; errors too, on stderr
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// When to colour
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        hide_possible_values = true,
        help = "When to colour: auto, always, never"
    )]
    pub(crate) color: Color,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start the server
    // `-h` is the host here, as it always was; `--help` is the help.
    #[command(disable_help_flag = true, mut_arg("host", |arg| arg.short('h')), after_help = "\
Examples:
  latzero start
  latzero start --port 0 --data-dir /tmp/lz   a port the system chooses, files of its own
  latzero start --set limits.max_frame=4MiB   any setting; `latzero config show` lists them
  latzero start --log-level debug             say more

It prints `latzero ready` with its addresses once it listens, and runs until `latzero stop`,
SIGTERM or Ctrl-C; a second signal ends it at once. SIGHUP reads the settings again.
Logs go to stderr and to DIR/logs/server.log.")]
    Start(StartArgs),
    /// Is the server running, where, and how busy is it
    #[command(after_help = "\
Examples:
  latzero status
  latzero status --json | jq .pid

Exit code 0 if it runs, 3 if not.")]
    Status(StatusArgs),
    /// Stop the server: running calls are finished first
    #[command(after_help = "\
Examples:
  latzero stop
  latzero stop --timeout 5s   wait no longer; the server still stops when its calls are done")]
    Stop(StopArgs),
    /// Have the server read its settings again
    #[command(after_help = "What needs a restart to take effect is listed, and stays as it was.")]
    Reload(ReloadArgs),
    /// Close the connections of an app
    #[command(after_help = "\
Examples:
  latzero kick worker
  latzero kick worker --instance 00000000000000ff   `latzero apps --json` lists instances")]
    Kick(KickArgs),
    /// Copy the database and the persistent blocks into one file
    #[command(
        args_conflicts_with_subcommands = true,
        after_help = "\
Examples:
  latzero backup                      a file of its own in DIR/backups; old ones are thinned out
  latzero backup --to /mnt/lz.db      a file there, on the server's machine; it stays
  latzero backup ls --verify          are they still good

The server goes on meanwhile. The copy is checked before it gets its name."
    )]
    Backup(BackupArgs),
    /// Make a backup the database; the server must be stopped
    #[command(after_help = "\
Examples:
  latzero stop && latzero restore ~/.latzero/backups/latzero-20260102-030405.db && latzero start
  latzero restore lz.db --data-dir /var/lib/latzero --yes

The whole backup is verified before anything changes. The former database is kept as replaced-…
beside the new one, and blocks that are replaced are kept under memory/.orphans. Where it is
interrupted, restore again. On a terminal it asks first.
Exit code 75 while a server runs on the directory, 4 if the backup is not good.")]
    Restore(RestoreArgs),
    /// Look for damage in the database
    #[command(after_help = "\
Examples:
  latzero db check          structure; a moment
  latzero db check --full   every record and reference too

Exit code 0 if all is well, 4 if something was found. A running server is asked; without one the
files are looked at, and nothing is changed.")]
    Db(DbArgs),
    /// Call a trigger and print the answer
    #[command(after_help = "\
Examples:
  latzero call system/echo '{\"x\":42}'
  latzero call alpha/resize @request.json          the payload from a file
  date +%s | latzero call alpha/at -               the payload from stdin
  latzero call --pool alpha files/list '\"/tmp\"'    the trigger `files/list` in the pool alpha
  latzero call alpha/tail '{}' --stream            items as they come, one line each
  latzero call jobs/run '{}' --park --ttl 1h       wait until somebody handles it
  latzero call jobs/run '{}' --park --no-wait      leave it there; `latzero answers` gets the answer

With --park the pool is made where there is none, and the call outlives the server and this command:
Ctrl-C leaves it parked. Unless --app says otherwise it is sent under an AppID of its own, which is
told, so that no other command gets its answer.
The part before the first / is the pool, unless --pool names it; with neither, it is `default`.
Exit code 5 if the call is answered with an error, 6 if there is no answer in time.")]
    Call(CallArgs),
    /// Print the answers to parked calls that came while nobody waited
    #[command(after_help = "\
Examples:
  latzero answers --app shop
  latzero answers --app shop --pool orders --wait 1h --count 1     wait for one

One JSON line per answer: id, pool, and data or error. The app joins every pool that has one, or
those that --pool names; an answer that was printed is not kept any more.
Exit code 6 if --wait was given and not enough came.")]
    Answers(AnswersArgs),
    /// Send an event to whoever handles it
    #[command(after_help = "\
Examples:
  latzero emit alpha/saved '{\"id\":7}'     to one handler of each app that handles `saved`
  latzero emit alpha/saved '{}' --one     to one handler alone

The part before the first / is the pool, unless --pool names it; with neither, it is `default`.")]
    Emit(EmitArgs),
    /// Make any program a handler: JSON on its stdin, JSON from its stdout
    #[command(after_help = "\
Examples:
  latzero serve alpha/upper -- tr a-z A-Z          each call runs `tr`
  latzero serve sum avg --pool alpha -- ./math.sh  $LATZERO_TRIGGER says which
  latzero serve alpha/infer --lines -- ./model.py  one process for all calls, a JSON line each way

The program sees LATZERO_TRIGGER, LATZERO_POOL, LATZERO_CALLER and LATZERO_ID. What it prints is the
answer: as it is where it is JSON, else as a JSON string. An exit code other than 0 is the error
`handler_error` with the code and the end of its stderr. A call that is cancelled or out of time
ends the program, and what it started. Runs until Ctrl-C; calls that run are finished.")]
    Serve(ServeArgs),
    /// Print events as they come
    #[command(after_help = "\
Examples:
  latzero on alpha/saved
  latzero on alpha/saved --count 1 | jq .data     wait for one

One JSON line per event: trigger, pool, from, data, and how many were lost before it, if any.")]
    On(OnArgs),
    /// The apps that the server knows, live or offline
    #[command(
        args_conflicts_with_subcommands = true,
        after_help = "\
Examples:
  latzero apps
  latzero apps --offline           known, and not here
  latzero apps forget worker       what it registered is given up

An app that is offline has its pools and triggers again when it comes back; parked calls wait for it."
    )]
    Apps(AppsArgs),
    /// The pools there are
    Pools(PoolsArgs),
    /// Print who comes and goes in a pool
    Watch(WatchArgs),
    /// Counts, response times, errors, resources
    Stats(StatsArgs),
    /// Blocks of memory: list, make, read, write, watch, lock, dump, load
    #[command(after_help = "\
Examples:
  latzero block create alpha/frame 8MiB --dtype '<f4' --shape 1080,1920
  latzero block ls alpha
  latzero block write alpha/frame --offset 16 @pixels.bin
  latzero block read alpha/frame --offset 16 --length 64 | xxd
  latzero block watch alpha/frame
  latzero block lock alpha/frame -- ./update.sh
  latzero block dump alpha/frame frame.npy
  latzero block load alpha/frame frame.npy")]
    Block(BlockArgs),
    /// Is every part of the server well
    #[command(
        after_help = "Exit code 0 if every part is well, 4 if one is not, 3 if no server runs."
    )]
    Health(HealthArgs),
    /// How long an answer of the server takes
    Ping(PingArgs),
    /// How many calls or events a second this machine does
    #[command(after_help = "\
Examples:
  latzero bench call                        one at a time, to a handler in this program
  latzero bench call --in-flight 64         64 under way at a time
  latzero bench call --to system/echo       to the server's own echo: no handler's process
  latzero bench emit --in-flight 64 --size 1KiB

For figures that compare with other systems, see `cargo xtask bench`.")]
    Bench(BenchArgs),
    /// What stands in the way of a start, and what mends it
    #[command(after_help = "\
It looks and changes nothing. The options are those of `start`: give the same.
Exit code 4 if something would keep the server from starting or from running well.")]
    Doctor(DoctorArgs),
    /// Show the settings, each with where it comes from
    #[command(after_help = "\
Examples:
  latzero config show
  latzero config show --changed      what is not at its default
  latzero config default > ~/.latzero/config/mine.toml

The command line beats the environment, that beats files, and those beat the defaults.")]
    Config(ConfigArgs),
    /// Print a completion script for a shell
    #[command(after_help = "\
Examples:
  latzero completion bash > ~/.local/share/bash-completion/completions/latzero
  latzero completion zsh > ~/.zfunc/_latzero
  latzero completion fish > ~/.config/fish/completions/latzero.fish")]
    Completion(CompletionArgs),
}

/// What the server is told.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct SettingsArgs {
    /// TCP port; 0 lets the system choose [default: 45227]
    #[arg(short, long)]
    port: Option<String>,
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long)]
    host: Option<String>,
    /// Where the server keeps its files [default: ~/.latzero]
    #[arg(short, long, value_name = "DIR")]
    data_dir: Option<String>,
    /// Unix socket: a path, auto or off [default: auto]
    #[arg(long, value_name = "PATH")]
    socket: Option<String>,
    /// Join other servers in a cluster (not in this build yet)
    #[arg(long)]
    cluster: bool,
    /// Speak TLS on the TCP port (not in this build yet)
    #[arg(long)]
    tls: bool,
    /// error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// human, json, or auto: human on stderr, json in the file [default: auto]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// Read this settings file instead of those in DIR/config
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Any setting; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse::pair)]
    set: Vec<(String, String)>,
}

impl SettingsArgs {
    /// The settings that were typed. Their values are judged with those of files and variables, in one place.
    pub(crate) fn overrides(&self) -> Vec<Override> {
        let texts = [
            ("port", &self.port, "--port"),
            ("host", &self.host, "--host"),
            ("data_dir", &self.data_dir, "--data-dir"),
            ("socket", &self.socket, "--socket"),
            ("log_level", &self.log_level, "--log-level"),
            ("log_format", &self.log_format, "--log-format"),
        ];
        let flags = [
            ("cluster_mode", self.cluster, "--cluster"),
            ("enable_tls", self.tls, "--tls"),
        ];
        let texts = texts
            .into_iter()
            .filter_map(|(name, value, flag)| Some(Override::new(name, value.as_deref()?, flag)));
        let flags = flags
            .into_iter()
            .filter(|(_, is_set, _)| *is_set)
            .map(|(name, _, flag)| Override::new(name, "true", flag));
        let sets = self
            .set
            .iter()
            .map(|(name, value)| Override::new(name, value, format!("--set {name}")));
        texts.chain(flags).chain(sets).collect()
    }
}

#[derive(Args, Debug)]
pub(crate) struct StartArgs {
    /// Take over from the server that runs on the data directory: its sockets and blocks go over, clients reconnect
    #[arg(long)]
    pub(crate) takeover: bool,
    #[command(flatten)]
    pub(crate) settings: SettingsArgs,
    /// Print help
    #[arg(long, action = ArgAction::Help)]
    help: Option<bool>,
}

#[derive(Args, Debug)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct StopArgs {
    /// How long to wait until it has stopped
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse::duration)]
    pub(crate) timeout: Duration,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct ReloadArgs {
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct KickArgs {
    /// The AppID
    #[arg(value_name = "APP")]
    pub(crate) kicked: String,
    /// This instance alone
    #[arg(long, value_name = "INSTANCE")]
    pub(crate) instance: Option<String>,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct CallArgs {
    /// The trigger
    #[arg(value_name = "[POOL/]TRIGGER")]
    pub(crate) target: String,
    /// The payload: JSON, - for stdin, @FILE for a file [default: null]
    #[arg(value_name = "JSON", allow_negative_numbers = true)]
    pub(crate) data: Option<String>,
    /// The pool; the whole of TRIGGER is then the trigger's name
    #[arg(long)]
    pub(crate) pool: Option<String>,
    /// The app to call, whoever else serves the trigger
    #[arg(long, value_name = "APP")]
    pub(crate) to: Option<String>,
    /// How long the answer may take [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) timeout: Option<Duration>,
    /// What a sticky trigger goes by
    #[arg(long)]
    pub(crate) key: Option<String>,
    /// A header for the handler; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse::pair)]
    pub(crate) header: Vec<(String, String)>,
    /// Where nobody handles it, have it wait on the server's disk until somebody does
    #[arg(long, conflicts_with = "stream")]
    pub(crate) park: bool,
    /// How long it may wait and run in all, 30d at most [default: 24h]
    #[arg(long, value_name = "DURATION", value_parser = parse::long_duration, requires = "park", conflicts_with = "timeout")]
    pub(crate) ttl: Option<Duration>,
    /// Print where it is parked, and leave the answer to `latzero answers`
    #[arg(long, requires = "park")]
    pub(crate) no_wait: bool,
    /// Where its handler dies, give it to the next one: it may run more than once
    #[arg(long)]
    pub(crate) redeliver: bool,
    /// A repeat with the same key gets the first one's answer, and the handler runs once
    #[arg(long, value_name = "KEY")]
    pub(crate) idempotency_key: Option<String>,
    /// The call's id, by which `latzero answers` names it
    #[arg(long, value_name = "ID")]
    pub(crate) id: Option<String>,
    /// Print items of the answer as they come, one JSON line each; progress on stderr
    #[arg(long)]
    pub(crate) stream: bool,
    /// Print a text without its quotes, and bytes as they are
    #[arg(long, conflicts_with = "json")]
    pub(crate) raw: bool,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct AnswersArgs {
    /// Calls in this pool; may be repeated [default: every pool]
    #[arg(long)]
    pub(crate) pool: Vec<String>,
    /// Wait that long for answers that are not there yet
    #[arg(long, value_name = "DURATION", value_parser = parse::long_duration)]
    pub(crate) wait: Option<Duration>,
    /// End after so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct EmitArgs {
    /// The trigger
    #[arg(value_name = "[POOL/]TRIGGER")]
    pub(crate) target: String,
    /// The payload: JSON, - for stdin, @FILE for a file [default: null]
    #[arg(value_name = "JSON", allow_negative_numbers = true)]
    pub(crate) data: Option<String>,
    /// The pool; the whole of TRIGGER is then the trigger's name
    #[arg(long)]
    pub(crate) pool: Option<String>,
    /// To this app alone
    #[arg(long, value_name = "APP")]
    pub(crate) to: Option<String>,
    /// To one handler rather than to all
    #[arg(long)]
    pub(crate) one: bool,
    /// What a sticky trigger goes by, with --one
    #[arg(long)]
    pub(crate) key: Option<String>,
    /// A header for the handlers; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse::pair)]
    pub(crate) header: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    /// The triggers
    #[arg(value_name = "[POOL/]TRIGGER", required = true)]
    pub(crate) targets: Vec<String>,
    /// The program and its arguments
    #[arg(value_name = "COMMAND", last = true, required = true)]
    pub(crate) command: Vec<String>,
    /// The pool; the whole of each TRIGGER is then the trigger's name
    #[arg(long)]
    pub(crate) pool: Option<String>,
    /// Programs that run at a time [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) concurrency: Option<u16>,
    /// Keep one process, and exchange a JSON line per call with it
    #[arg(long, conflicts_with = "concurrency")]
    pub(crate) lines: bool,
    /// What the triggers do, for people who list them
    #[arg(long, value_name = "TEXT")]
    pub(crate) doc: Option<String>,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct OnArgs {
    /// The events
    #[arg(value_name = "[POOL/]TRIGGER", required = true)]
    pub(crate) targets: Vec<String>,
    /// The pool; the whole of each TRIGGER is then the event's name
    #[arg(long)]
    pub(crate) pool: Option<String>,
    /// End after so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct AppsArgs {
    #[command(subcommand)]
    pub(crate) command: Option<AppsCommand>,
    /// Those in this pool alone
    #[arg(long)]
    pub(crate) pool: Option<String>,
    /// Those that are connected alone
    #[arg(long)]
    pub(crate) live: bool,
    /// Those that are known and not connected alone
    #[arg(long, conflicts_with = "live")]
    pub(crate) offline: bool,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

/// What else can be done about apps.
#[derive(Debug, Subcommand)]
pub(crate) enum AppsCommand {
    /// Give up what an app that is offline registered
    Forget(ForgetArgs),
}

#[derive(Args, Debug)]
pub(crate) struct ForgetArgs {
    /// The AppID
    #[arg(value_name = "APP")]
    pub(crate) forgotten: String,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

/// A data directory, for what is done without its server.
#[derive(Args, Debug)]
pub(crate) struct DataDir {
    /// The data directory, ~/.latzero unless told otherwise [env: LATZERO_DATA_DIR]
    #[arg(short, long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

impl DataDir {
    /// The directory that is meant.
    pub(crate) fn path(&self) -> PathBuf {
        let reach = Reach {
            data_dir: self.data_dir.clone(),
            ..Reach::default()
        };
        reach.data_dir().0
    }
}

#[derive(Args, Debug)]
pub(crate) struct BackupArgs {
    #[command(subcommand)]
    pub(crate) command: Option<BackupCommand>,
    /// The file to make; it must not be there yet [default: one in DIR/backups]
    #[arg(long, value_name = "FILE")]
    pub(crate) to: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

/// What else can be done about backups.
#[derive(Debug, Subcommand)]
pub(crate) enum BackupCommand {
    /// The backups in the data directory, newest first; exit code 4 if one is not good
    Ls(BackupListArgs),
}

#[derive(Args, Debug)]
pub(crate) struct BackupListArgs {
    /// Read each of them whole
    #[arg(long)]
    pub(crate) verify: bool,
    #[command(flatten)]
    pub(crate) dir: DataDir,
}

#[derive(Args, Debug)]
pub(crate) struct RestoreArgs {
    /// The backup
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) dir: DataDir,
}

/// `db` and what it is to do.
#[derive(Args, Debug)]
pub(crate) struct DbArgs {
    #[command(subcommand)]
    pub(crate) command: DbCommand,
}

/// What can be done about the database.
#[derive(Debug, Subcommand)]
pub(crate) enum DbCommand {
    /// Look for damage; exit code 4 if there is any
    Check(DbCheckArgs),
}

#[derive(Args, Debug)]
pub(crate) struct DbCheckArgs {
    /// Read every record and follow every reference
    #[arg(long)]
    pub(crate) full: bool,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct PoolsArgs {
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct WatchArgs {
    /// The pool
    #[arg(default_value = "default")]
    pub(crate) pool: String,
    /// End after so many events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct StatsArgs {
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct HealthArgs {
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct PingArgs {
    /// How many times
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) count: u32,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Measured {
    /// Calls, each with its answer
    Call,
    /// Events, each with the server's word on how many handlers it went to
    Emit,
}

#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    /// What to measure
    #[arg(value_enum)]
    pub(crate) measured: Measured,
    /// How many in all
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub(crate) calls: u64,
    /// How many under way at a time
    #[arg(long, value_name = "W", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) in_flight: u16,
    /// Size of each payload
    #[arg(long, value_name = "BYTES", default_value = "64", value_parser = parse::size)]
    pub(crate) size: usize,
    /// A trigger of another app, instead of a handler in this program
    #[arg(long, value_name = "[POOL/]TRIGGER")]
    pub(crate) to: Option<String>,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) settings: SettingsArgs,
}

#[derive(Args, Debug)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    pub(crate) what: ConfigCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// The settings in force, each with where it comes from
    Show(Box<ShowArgs>),
    /// A settings file with every setting at its default, explained
    Default,
}

#[derive(Args, Debug)]
pub(crate) struct ShowArgs {
    /// Those that are not at their default alone
    #[arg(long)]
    pub(crate) changed: bool,
    #[command(flatten)]
    pub(crate) settings: SettingsArgs,
}

#[derive(Args, Debug)]
pub(crate) struct CompletionArgs {
    /// The shell
    pub(crate) shell: Shell,
}

/// `block` and what it is to do.
#[derive(Args, Debug)]
pub(crate) struct BlockArgs {
    #[command(subcommand)]
    pub(crate) command: BlockCommand,
}

/// What can be done about blocks.
#[derive(Debug, Subcommand)]
pub(crate) enum BlockCommand {
    /// The blocks of a pool
    Ls(BlockListArgs),
    /// All about one block: sizes, who is attached, who holds its lock
    Info(BlockOne),
    /// Make a block
    Create(BlockCreateArgs),
    /// Print a block's bytes: as they are, or as hex on a terminal
    Read(BlockReadArgs),
    /// Write bytes into a block, as one version
    Write(BlockWriteArgs),
    /// Write bytes where others are expected; exit code 4 if they are not there
    Cas(BlockCasArgs),
    /// Print each new version as it comes
    Watch(BlockWatchArgs),
    /// Run a command while holding the lock of a block
    #[command(after_help = "\
The command finds the block in LATZERO_BLOCK and the lock's fence in LATZERO_FENCE.
The exit code is the command's; 5 where the lock could not be had or was lost meanwhile.")]
    Lock(BlockLockArgs),
    /// Give a block another size: a new generation
    Resize(BlockResizeArgs),
    /// Remove a block, under everybody
    Rm(BlockOne),
    /// Write a block into a file: .npy with its layout, else its bytes
    Dump(BlockFileArgs),
    /// Fill a block from a file; it is made where there is none. .npy brings its layout
    Load(BlockLoadArgs),
}

/// Which block, and where.
#[derive(Args, Debug)]
pub(crate) struct BlockAt {
    /// The block
    #[arg(value_name = "[POOL/]BLOCK")]
    pub(crate) block: String,
    /// The pool; the whole of BLOCK is then the block's name
    #[arg(long)]
    pub(crate) pool: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct BlockListArgs {
    /// The pool
    #[arg(default_value = "default")]
    pub(crate) pool: String,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct BlockOne {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

/// What a block is made as.
#[derive(Args, Debug)]
pub(crate) struct BlockKind {
    /// As a file of the server's data directory, which outlives every process
    #[arg(long)]
    pub(crate) persistent: bool,
    /// Written in place, without snapshots: for users who take its lock
    #[arg(long, conflicts_with = "slots")]
    pub(crate) raw: bool,
    /// Room for that many versions
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=4))]
    pub(crate) slots: Option<u32>,
    /// Only these apps may read; may be repeated
    #[arg(long = "reader", value_name = "APP")]
    pub(crate) readers: Vec<String>,
    /// Only these apps may write; may be repeated
    #[arg(long = "writer", value_name = "APP")]
    pub(crate) writers: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct BlockCreateArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    /// Its size, like 4096, 64KiB or 1GiB; not needed with --shape
    #[arg(value_parser = parse::block_size, required_unless_present = "shape")]
    pub(crate) size: Option<u64>,
    /// The type of its numbers, in numpy's notation: <f4, |u1, <i8 …
    #[arg(long, value_name = "DTYPE", requires = "shape")]
    pub(crate) dtype: Option<String>,
    /// The length of each dimension, like 1080,1920
    #[arg(long, value_name = "N,…", value_delimiter = ',', requires = "dtype")]
    pub(crate) shape: Vec<u64>,
    /// Take the one that is there, where there is one
    #[arg(long)]
    pub(crate) or_attach: bool,
    #[command(flatten)]
    pub(crate) kind: BlockKind,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct BlockReadArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    /// The first byte
    #[arg(long, default_value_t = 0)]
    pub(crate) offset: u64,
    /// How many bytes [default: to the end]
    #[arg(long, value_parser = parse::block_size)]
    pub(crate) length: Option<u64>,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

/// Whether empty input is meant.
#[derive(Args, Debug)]
pub(crate) struct AllowEmpty {
    /// Accept empty input, which is refused otherwise
    #[arg(long)]
    pub(crate) allow_empty: bool,
}

#[derive(Args, Debug)]
pub(crate) struct BlockWriteArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    /// The bytes: text as it is, - for stdin, @FILE for a file
    #[arg(value_name = "DATA")]
    pub(crate) data: String,
    /// The first byte
    #[arg(long, default_value_t = 0)]
    pub(crate) offset: u64,
    /// Only if the block has this version
    #[arg(long, value_name = "VERSION")]
    pub(crate) if_version: Option<u64>,
    #[command(flatten)]
    pub(crate) empty: AllowEmpty,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct BlockCasArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    /// What must be there: text as it is, or @FILE
    pub(crate) expected: String,
    /// What takes its place, as many bytes
    #[arg(value_name = "DATA")]
    pub(crate) data: String,
    /// The first byte
    #[arg(long, default_value_t = 0)]
    pub(crate) offset: u64,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct BlockWatchArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    /// End after so many versions
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct BlockLockArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    /// Beside others who only read
    #[arg(long)]
    pub(crate) shared: bool,
    /// How long to wait for the lock
    #[arg(long, value_name = "TIME", value_parser = parse::duration, default_value = "10s")]
    pub(crate) wait: Duration,
    /// The command
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<std::ffi::OsString>,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct BlockResizeArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    /// The new size
    #[arg(value_parser = parse::block_size)]
    pub(crate) size: u64,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct BlockFileArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    /// The file; - for stdout
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct BlockLoadArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    /// The file; - for stdin
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Write a part of the block, from this byte on, instead of replacing its content
    #[arg(long, value_name = "BYTE")]
    pub(crate) offset: Option<u64>,
    #[command(flatten)]
    pub(crate) empty: AllowEmpty,
    #[command(flatten)]
    pub(crate) kind: BlockKind,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn clap_finds_nothing_wrong() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_lists_every_command() {
        let command = Cli::command();
        for command in command.get_subcommands() {
            let start = format!("\n  {} ", command.get_name());
            assert!(HELP.contains(&start), "{}", command.get_name());
        }
    }

    #[test]
    fn start_has_the_host_under_h() {
        let parse = |args: &[&str]| Cli::try_parse_from([&["latzero", "start"], args].concat());
        let Ok(cli) = parse(&[
            "-p",
            "0",
            "-h",
            "::1",
            "-d",
            "/d",
            "--set",
            "io_threads=2",
            "--tls",
        ]) else {
            panic!("these are flags of start");
        };
        let Command::Start(args) = cli.command else {
            panic!("it is start")
        };
        let got: Vec<(String, String, String)> = args
            .settings
            .overrides()
            .into_iter()
            .map(|o| (o.name, o.value, o.flag))
            .collect();
        let expected = [
            ("port", "0", "--port"),
            ("host", "::1", "--host"),
            ("data_dir", "/d", "--data-dir"),
            ("enable_tls", "true", "--tls"),
            ("io_threads", "2", "--set io_threads"),
        ];
        let expected = expected.map(|(a, b, c)| (a.to_owned(), b.to_owned(), c.to_owned()));
        assert_eq!(got, expected);
        let help = parse(&["--help"]).unwrap_err();
        assert_eq!(help.kind(), clap::error::ErrorKind::DisplayHelp);
    }
}
