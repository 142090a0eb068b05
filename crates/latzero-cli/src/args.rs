//! The command line: commands, arguments and their help.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use latzero_server::settings::Override;

use crate::connect::ServerArgs;
use crate::exit::{self, Failure};
use crate::output::Color;
use crate::parse::{self, Target};

/// The commands in groups, which clap cannot do by itself.
const HELP: &str = "\
{about}

{usage-heading} {usage}

Server:
  start       Start the server
  status      Show whether the server is running, where, and how busy it is
  stop        Stop the server once its running calls are finished
  reload      Reload the settings
  logs        Print the server's log
  service     Run the server as a systemd user service
  doctor      Diagnose why the server cannot start, and how to fix it
  config      Show the settings and where each one comes from
  kick        Close an app's connections
  trust       Trust the certificate of a TLS server

Calls and events:
  call        Call a trigger and print the answer
  answers     Print the answers to parked calls
  parked      List, show, cancel and retry parked calls
  emit        Send an event to the apps that handle it
  serve       Run a program for each call of a trigger
  on          Print events as they arrive

Memory:
  block       Work with memory blocks: create, read, write, watch, lock, dump, load

Storage:
  backup      Back up the database and the persistent blocks
  restore     Restore a backup; the server must be stopped
  db          Check the database, query it or print it as SQL

Keys:
  keys        Create, show, export and check the keys of a pool
  app         Create and show the key of an app

Inspect:
  apps        List the apps that the server knows, and forget offline ones
  pools       List, create, inspect and remove pools
  watch       Print the presence events of a pool
  stats       Show counters, response times, errors and resource usage
  health      Check the health of every component
  ping        Measure the server's response time
  bench       Measure calls or events per second

Other:
  completion  Print a completion script for a shell
  help        Show the help of a command

Options:
{options}{after-help}";

const ABOUT: &str =
    "LatZero: call functions of other programs, send them events, and share memory with them";

const AFTER_HELP: &str = "\
Try it:
  latzero start --detach
  latzero call system/echo '{\"x\":42}'

Each command has its own help with examples: latzero call --help

On a terminal, control characters in text from other programs are escaped.";

#[derive(Debug, Parser)]
#[command(
    name = "latzero", version, about = ABOUT, propagate_version = false,
    arg_required_else_help = true, help_template = HELP,
    after_help = format!("{AFTER_HELP}\n\n{}", exit::TABLE), max_term_width = 100,
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Print JSON, for scripts; errors as well, on stderr
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// When to use colours: auto, always, never
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        hide_possible_values = true
    )]
    pub(crate) color: Color,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start the server
    // `-h` is the host for this command; only `--help` prints the help.
    #[command(disable_help_flag = true, mut_arg("host", |arg| arg.short('h')), after_help = "\
Examples:
  latzero start
  latzero start --detach                      in the background; returns once it is ready
  latzero start --port 0 --data-dir /tmp/lz   a free port, and a directory of its own
  latzero start --set limits.max_frame=4MiB   any setting; `latzero config show` lists them
  latzero start --log-level debug             log more

Once the server listens, it prints `latzero ready` with its addresses. It runs until
`latzero stop`, SIGTERM or Ctrl-C; a second signal ends it at once. SIGHUP reloads the settings.
It logs to stderr and to DIR/logs/server.log; `latzero logs` prints the latter.")]
    Start(StartArgs),
    /// Show whether the server is running, where, and how busy it is
    #[command(after_help = "\
Examples:
  latzero status
  latzero status --json | jq .pid

Exit code 0 if it is running, 3 if not, 6 if it does not respond.")]
    Status(ServerArgs),
    /// Stop the server once its running calls are finished
    #[command(after_help = "\
Examples:
  latzero stop
  latzero stop --timeout 5s   stop waiting after 5 s; the server still stops later")]
    Stop(StopArgs),
    /// Reload the settings
    #[command(after_help = "\
Settings that need a restart are listed and keep their current value.")]
    Reload(ServerArgs),
    /// Print the server's log
    #[command(after_help = "\
Examples:
  latzero logs               the last 20 lines
  latzero logs -n 100 -f     the last 100, and new ones as they are written
  latzero logs --json | jq 'select(.level == \"WARN\")'

It reads DIR/logs/server.log, so it works while the server is down. --json prints the lines as they
are in the file.")]
    Logs(LogsArgs),
    /// Run the server as a systemd user service
    #[command(after_help = "\
Examples:
  latzero service show                    print the unit file
  latzero service install                 write it, enable it and start the server
  latzero service install --port 45228 --set log_level=debug
  latzero service uninstall               stop the server and remove the unit file

Every step is printed. The service runs as long as you are logged in; to keep it running:
loginctl enable-linger")]
    Service(ServiceArgs),
    /// Close an app's connections
    #[command(after_help = "\
Examples:
  latzero kick worker
  latzero kick worker --instance 00000000000000ff   `latzero apps --json` lists instances

Exit code 5 if the app has no such connection.")]
    Kick(KickArgs),
    /// Trust the certificate of a TLS server, known by its pin
    #[command(after_help = "\
Examples:
  latzero trust db.example               show the server's pin and ask
  latzero trust db.example --pin PIN     trust it without asking if this is its pin
  latzero trust --replace db.example     after its certificate was replaced on purpose

The pin is the fingerprint of the certificate; `latzero status` on the server's machine shows it.
From then on every command that connects to this host uses TLS, and refuses a server with another
certificate. Pins are kept in ~/.config/latzero/known_hosts.")]
    Trust(TrustArgs),
    /// Back up the database and the persistent blocks
    #[command(
        args_conflicts_with_subcommands = true,
        after_help = "\
Examples:
  latzero backup                      into DIR/backups; old backups there are removed over time
  latzero backup --to /mnt/lz.db      into this file on the server's machine
  latzero backup ls --verify          list the backups and check them

The server keeps running. The backup is verified before it appears under its name."
    )]
    Backup(BackupArgs),
    /// Restore a backup; the server must be stopped
    #[command(after_help = "\
Examples:
  latzero stop && latzero restore ~/.latzero/backups/latzero-20260102-030405.db && latzero start
  latzero restore lz.db --data-dir /var/lib/latzero --yes

The whole backup is verified before anything changes. The former database is kept beside the new
one as replaced-…, and replaced blocks are kept under memory/.orphans. If a restore is interrupted,
run it again. On a terminal it asks for confirmation.
Exit code 75 while a server runs on the directory, 4 if the backup is damaged.")]
    Restore(RestoreArgs),
    /// Check the database for damage
    #[command(after_help = "\
Examples:
  latzero db check          the structure; quick
  latzero db check --full   every record and reference as well

Exit code 0 if no damage was found, 4 otherwise. A running server does the check; without one, the
files are checked, and nothing is changed.")]
    Db(DbArgs),
    /// Call a trigger and print the answer
    #[command(after_help = "\
Examples:
  latzero call system/echo '{\"x\":42}'
  latzero call alpha/resize @request.json          payload from a file
  date +%s | latzero call alpha/at -               payload from stdin
  latzero call alpha/store --bytes @photo.jpg      raw bytes instead of JSON
  latzero call --pool alpha files/list '\"/tmp\"'    the trigger `files/list` in the pool alpha
  latzero call alpha/tail '{}' --stream            items as they arrive, one line each
  latzero call jobs/run '{}' --park --ttl 1h       wait until a handler takes it
  latzero call jobs/run '{}' --park --no-wait      return at once; see `latzero answers`

The part before the first / is the pool, unless --pool names it; with neither, it is `default`.
An answer of raw bytes is written to stdout unchanged, unless stdout is a terminal; with --json it
is printed as {\"hex\":\"…\"}.
With --stream, items are lines on stdout. The final answer is a line on stderr if it is not null;
without items it is printed as usual. With --json each line is {\"item\":…}, {\"progress\":…}
or {\"end\":…}.
With --park the pool is created if necessary, and the call survives a restart of the server and the
end of this command: Ctrl-C leaves it parked. Unless --app is given, this command uses a unique
AppID, so that no other command receives the answer.
Exit code 5 if the answer is an error, 6 if no answer arrives in time.")]
    Call(CallArgs),
    /// Print the answers to parked calls
    #[command(after_help = "\
Examples:
  latzero answers --app shop
  latzero answers --app shop --pool orders --wait 1h --count 1     wait for one

One JSON line per answer: id, pool, and data, hex (raw bytes) or error. Without --pool, the app
joins every pool that has answers for it, and encrypted pools in which a command of this user parked
calls with --app. The server deletes an answer once this command has it, so --count may be exceeded:
what has arrived is printed.
Exit code 6 if --wait was given and too few answers arrived.")]
    Answers(AnswersArgs),
    /// Send an event to the apps that handle it
    #[command(after_help = "\
Examples:
  latzero emit alpha/saved '{\"id\":7}'     to one handler of each app that handles `saved`
  latzero emit alpha/saved '{}' --one     to a single handler

The part before the first / is the pool, unless --pool names it; with neither, it is `default`.")]
    Emit(EmitArgs),
    /// Run a program for each call of a trigger
    #[command(after_help = "\
Examples:
  latzero serve alpha/upper -- tr a-z A-Z              run `tr` for each call
  latzero serve sum avg --pool alpha -- ./math.sh      $LATZERO_TRIGGER is sum or avg
  latzero serve alpha/infer --lines -- ./model.py      one process for all calls
  latzero serve alpha/tail --stream -- tail -n 5 log   each line is an item of the answer

Input: the program reads the payload from stdin: JSON text, or raw bytes if bytes were sent.
Output: what it prints is the answer. JSON stays JSON, other UTF-8 text becomes a JSON string
without its last line break, and anything else is sent as raw bytes. --output overrides this.
With --stream each line is one item; with --stream=length each item is preceded by its length, as
four bytes, most significant first. With --lines the program gets each payload as a line on
stdin and prints one line for it.
An exit code other than 0 is the error `handler_error`, with the code and the end of its stderr.
When a call is cancelled or times out, its program and its process group are killed. The same
happens when this command ends, even by SIGKILL.
Environment: LATZERO_TRIGGER, LATZERO_POOL, LATZERO_CALLER (AppID), LATZERO_CALLER_INSTANCE,
LATZERO_HEADERS (a JSON object), LATZERO_DEADLINE (Unix time in ms), LATZERO_ATTEMPT, LATZERO_ID.
Of other LATZERO_ variables only those that say where the server is and how the client libraries
work are passed on: URL, SOCKET, HOST, PORT, DATA_DIR, BIN, DEBUG, NODE_DRIVER and NO_EXTERNAL.
A variable whose value contains the admin token, a pool key or an app key is never passed on.
The server does not remember this handler unless --app is given. After Ctrl-C it takes no new calls,
waits up to 5 seconds for the running ones, and exits.
Exit code 1 if one of its pools is removed or gets other keys.")]
    Serve(ServeArgs),
    /// Print events as they arrive
    #[command(after_help = "\
Examples:
  latzero on alpha/saved
  latzero on alpha/saved --count 1 | jq .data     wait for one

One JSON line per event: trigger, pool, from and data, and lost (how many) if events before it were
dropped. If no event follows the dropped ones, the line {\"trigger\":…,\"lost\":N} reports them.
The data of raw bytes is {\"hex\":\"…\"}.
Exit code 1 if one of its pools is removed or gets other keys.")]
    On(OnArgs),
    /// List the apps that the server knows, and forget offline ones
    #[command(
        args_conflicts_with_subcommands = true,
        after_help = "\
Examples:
  latzero apps
  latzero apps --offline                      known and not connected
  latzero apps forget worker                  delete its registration
  latzero apps forget --offline --older 7d    of every app that has been offline for a week

An offline app gets its pools and triggers back when it returns, and parked calls wait for it."
    )]
    Apps(AppsArgs),
    /// List, show, cancel and retry parked calls
    #[command(after_help = "\
Examples:
  latzero parked ls                        all parked calls and waiting answers
  latzero parked ls --dead                 those whose attempts have all failed
  latzero parked show 17                   one of them, with its payload if that is JSON
  latzero parked retry --dead --pool lab   run the dead calls of a pool again
  latzero parked cancel 17 18
  latzero parked purge --dead              delete the dead calls

A call is waiting (for a handler), paused (its last attempt failed), running, dead (every attempt
failed), or answered (the caller has not fetched the answer yet). An administrator sees all calls,
the owner of a pool sees the calls in it, and an app sees its own.")]
    Parked(ParkedArgs),
    /// List, create, inspect and remove pools
    #[command(
        args_conflicts_with_subcommands = true,
        after_help = "\
Examples:
  latzero pools
  latzero pools create lab --durable
  latzero pools create lab --policy join=alice,bob --policy serve=alice
  latzero pools create lab --policy write=uid:1000 --deny call=bob
  latzero pools info lab
  latzero pools remove lab

A policy says who may join, serve, call, emit, read blocks, and write them. It names apps by AppID,
users as uid:NUMBER, and apps with a key as key:PUBLIC-KEY; `*` means everybody. Everybody may do
what it does not mention, and the pool's owner everything. A denied user is also denied over TCP,
where the server does not know who connects."
    )]
    Pools(PoolsArgs),
    /// Print the presence events of a pool
    #[command(after_help = "\
Examples:
  latzero watch alpha
  latzero watch alpha --count 1 --json

It prints apps that join and leave, triggers that are added and removed, and changes to blocks.")]
    Watch(WatchArgs),
    /// Show counters, response times, errors and resource usage
    Stats(ServerArgs),
    /// Work with memory blocks: create, read, write, watch, lock, dump, load
    #[command(after_help = "\
Examples:
  latzero block create alpha/frame --dtype f4 --shape 1080,1920
  latzero block ls alpha
  latzero block write alpha/frame --offset 16 @pixels.bin
  latzero block read alpha/frame --offset 16 --length 64 | xxd
  latzero block watch alpha/frame
  latzero block lock alpha/frame -- ./update.sh
  latzero block dump alpha/frame frame.npy
  latzero block load alpha/frame frame.npy")]
    Block(BlockArgs),
    /// Check the health of every component
    #[command(
        after_help = "Exit code 0 if every component is healthy, 4 otherwise, 3 if no server runs."
    )]
    Health(ServerArgs),
    /// Measure the server's response time
    Ping(PingArgs),
    /// Measure calls or events per second
    #[command(after_help = "\
Examples:
  latzero bench call                        one at a time, to a handler in this program
  latzero bench call --in-flight 64         64 at a time
  latzero bench call --to system/echo       to the server's built-in echo
  latzero bench emit --in-flight 64 --size 1KiB

To compare with other systems, see `cargo xtask bench`.")]
    Bench(BenchArgs),
    /// Diagnose why the server cannot start, and how to fix it
    #[command(after_help = "\
It changes nothing. It takes the options of `start`: pass the same ones.
Exit code 4 if it finds a problem.")]
    Doctor(SettingsArgs),
    /// Show the settings and where each one comes from
    #[command(after_help = "\
Examples:
  latzero config show
  latzero config show --changed      settings that are not at their default
  latzero config default > ~/.latzero/config/mine.toml

Flags override environment variables, which override files, which override the defaults.")]
    Config(ConfigArgs),
    /// Create, show, export and check the keys of encrypted pools
    #[command(after_help = "\
Examples:
  latzero keys new vault                               all keys, in ~/.config/latzero/keys/vault
  latzero pools create vault --encrypted               a pool that uses them
  latzero keys export vault --role read --to reader    only the keys that a reader needs
  latzero keys rotate vault --remove-reader            new keys, which former readers do not have

Key files are private (mode 0600), and keys are never printed or sent to the server. Only `rotate`
contacts a server.")]
    Keys(crate::commands::keys::KeysArgs),
    /// Create and show the key of an app
    #[command(after_help = "\
Examples:
  latzero app key new worker     in ~/.config/latzero/apps/worker
  latzero app key show worker    its public key
  latzero serve --app worker alpha/resize -- ./resize    connects with the key

The first connection with the key reserves the AppID: after that the server accepts the AppID only
with this key.")]
    App(crate::commands::keys::AppArgs),
    /// Print a completion script for a shell
    #[command(after_help = "\
Examples:
  latzero completion bash > ~/.local/share/bash-completion/completions/latzero
  latzero completion zsh > ~/.zfunc/_latzero
  latzero completion fish > ~/.config/fish/completions/latzero.fish")]
    Completion(CompletionArgs),
}

/// The settings that can be typed.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct SettingsArgs {
    /// TCP port; 0 lets the system choose [default: 45227]
    #[arg(short, long)]
    port: Option<String>,
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long)]
    host: Option<String>,
    /// Directory of the server's files [default: ~/.latzero]
    #[arg(short, long, value_name = "DIR")]
    data_dir: Option<String>,
    /// Unix socket: a path, auto or off [default: auto]
    #[arg(long, value_name = "PATH")]
    socket: Option<String>,
    /// Join other servers in a cluster (not implemented yet)
    #[arg(long)]
    cluster: bool,
    /// Use TLS on the TCP port
    #[arg(long)]
    tls: bool,
    /// TLS certificate and chain, in PEM format [default: self-signed]
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<String>,
    /// Private key of the certificate, in PEM format
    #[arg(long, value_name = "FILE")]
    tls_key: Option<String>,
    /// Require client certificates that are signed by one of these CAs, in PEM format
    #[arg(long, value_name = "FILE")]
    tls_client_ca: Option<String>,
    /// Allow listening on other addresses than loopback without TLS: traffic is not encrypted
    #[arg(long)]
    insecure: bool,
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
    /// The settings that were typed. Their values are checked with those of files and variables, in
    /// one place.
    pub(crate) fn overrides(&self) -> Vec<Override> {
        let texts = [
            ("port", &self.port, "--port"),
            ("host", &self.host, "--host"),
            ("data_dir", &self.data_dir, "--data-dir"),
            ("socket", &self.socket, "--socket"),
            ("tls_cert", &self.tls_cert, "--tls-cert"),
            ("tls_key", &self.tls_key, "--tls-key"),
            ("tls_client_ca", &self.tls_client_ca, "--tls-client-ca"),
            ("log_level", &self.log_level, "--log-level"),
            ("log_format", &self.log_format, "--log-format"),
        ];
        let flags = [
            ("cluster_mode", self.cluster, "--cluster"),
            ("enable_tls", self.tls, "--tls"),
            ("insecure", self.insecure, "--insecure"),
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
    /// Run in the background; return once the server is ready
    #[arg(long, conflicts_with = "takeover")]
    pub(crate) detach: bool,
    /// This process is the background of `--detach`
    #[arg(long, hide = true)]
    pub(crate) background: bool,
    /// Replace the server that runs on the data directory: it hands over its sockets and blocks
    #[arg(long)]
    pub(crate) takeover: bool,
    #[command(flatten)]
    pub(crate) settings: SettingsArgs,
    /// Print help
    #[arg(long, action = ArgAction::Help)]
    help: Option<bool>,
}

#[derive(Args, Debug)]
pub(crate) struct StopArgs {
    /// How long to wait for the server to stop
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse::duration)]
    pub(crate) timeout: Duration,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct LogsArgs {
    /// Number of lines to print
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    pub(crate) lines: u32,
    /// Keep printing lines as they are written
    #[arg(short, long)]
    pub(crate) follow: bool,
    #[command(flatten)]
    pub(crate) dir: DataDir,
}

#[derive(Args, Debug)]
pub(crate) struct ServiceArgs {
    #[command(subcommand)]
    pub(crate) command: ServiceCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServiceCommand {
    /// Write the unit file, enable the service and start it
    Install(SettingsArgs),
    /// Stop the service and remove the unit file
    Uninstall,
    /// Print the unit file that `install` writes
    Show(SettingsArgs),
}

#[derive(Args, Debug)]
pub(crate) struct TrustArgs {
    /// The host; the default port is 45227
    #[arg(value_name = "HOST[:PORT]")]
    pub(crate) host: String,
    /// Trust the server without asking if it has this pin
    #[arg(long, value_name = "PIN", allow_hyphen_values = true)]
    pub(crate) pin: Option<latzero::known_hosts::Pin>,
    /// Replace the pin that was trusted before
    #[arg(long)]
    pub(crate) replace: bool,
}

#[derive(Args, Debug)]
pub(crate) struct KickArgs {
    /// The AppID
    #[arg(value_name = "APP")]
    pub(crate) kicked: String,
    /// Disconnect only this instance
    #[arg(long, value_name = "INSTANCE")]
    pub(crate) instance: Option<String>,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

/// A trigger and its pool.
#[derive(Args, Debug)]
pub(crate) struct TargetArgs {
    /// The trigger
    #[arg(value_name = "[POOL/]TRIGGER")]
    target: String,
    /// The pool; TRIGGER is then the whole name of the trigger
    #[arg(long)]
    pool: Option<String>,
}

impl TargetArgs {
    pub(crate) fn parse(&self) -> Result<Target, Failure> {
        Target::parse(&self.target, self.pool.as_deref())
    }
}

/// Several triggers, in one pool if it is named.
#[derive(Args, Debug)]
pub(crate) struct TargetsArgs {
    /// The triggers
    #[arg(value_name = "[POOL/]TRIGGER", required = true)]
    targets: Vec<String>,
    /// The pool; each TRIGGER is then the whole name of a trigger
    #[arg(long)]
    pool: Option<String>,
}

impl TargetsArgs {
    pub(crate) fn parse(&self) -> Result<Vec<Target>, Failure> {
        let mut targets: Vec<Target> = Vec::new();
        for target in &self.targets {
            let target = Target::parse(target, self.pool.as_deref())?;
            if !targets.contains(&target) {
                targets.push(target);
            }
        }
        Ok(targets)
    }
}

/// The destination of a message, and options sent with it.
#[derive(Args, Debug)]
pub(crate) struct DeliveryArgs {
    /// Only to this app, even if others handle the trigger
    #[arg(long, value_name = "APP")]
    pub(crate) to: Option<String>,
    /// The key that a sticky trigger uses to choose a handler
    #[arg(long)]
    pub(crate) key: Option<String>,
    /// A header for the handler; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse::pair)]
    pub(crate) header: Vec<(String, String)>,
    /// Sign it with the OblivionSeal of an encrypted pool, for privileged triggers
    #[arg(long)]
    pub(crate) privileged: bool,
}

/// The payload of a call or an event.
#[derive(Args, Debug)]
pub(crate) struct PayloadArgs {
    /// The payload: JSON, - for stdin, @FILE for a file [default: null]
    #[arg(value_name = "JSON", allow_negative_numbers = true)]
    data: Option<String>,
    /// Send the payload as raw bytes: text, - for stdin, @FILE for a file
    #[arg(long, requires = "data")]
    bytes: bool,
}

impl PayloadArgs {
    pub(crate) fn read(&self) -> Result<latzero::Data, Failure> {
        match (&self.data, self.bytes) {
            (Some(data), true) => {
                let bytes = parse::bytes(data, parse::INPUT_BYTES_MAX)?;
                Ok(latzero::Data::Bytes(latzero::Bytes(bytes)))
            }
            (data, _) => {
                let json = parse::payload(data.as_deref())?;
                Ok(latzero::Data::Json(json.get().to_owned()))
            }
        }
    }
}

/// When a command that prints events as they happen ends.
#[derive(Args, Debug)]
pub(crate) struct CountArgs {
    /// Stop after this many
    #[arg(long, value_name = "N", value_parser = parse::count)]
    pub(crate) count: Option<u64>,
}

impl CountArgs {
    /// Whether more are wanted than were `seen`.
    pub(crate) fn wants_more(&self, seen: u64) -> bool {
        self.count.is_none_or(|count| seen < count)
    }
}

#[derive(Args, Debug)]
pub(crate) struct CallArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    #[command(flatten)]
    pub(crate) payload: PayloadArgs,
    #[command(flatten)]
    pub(crate) delivery: DeliveryArgs,
    /// How long to wait for the answer, connecting included [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) timeout: Option<Duration>,
    /// If no handler can take the call now, keep it on the server's disk until one can
    #[arg(long, conflicts_with = "stream")]
    pub(crate) park: bool,
    /// How long a parked call may wait and run in total, at most 30d [default: 24h]
    #[arg(
        long,
        value_name = "DURATION",
        value_parser = parse::long_duration,
        requires = "park",
        conflicts_with = "timeout"
    )]
    pub(crate) ttl: Option<Duration>,
    /// With --park, park the call in any case and return once it is on disk; `latzero answers`
    /// prints the answer
    #[arg(long, requires = "park")]
    pub(crate) no_wait: bool,
    /// If the handler dies, give the call to another one: it may run more than once
    #[arg(long)]
    pub(crate) redeliver: bool,
    /// How many times the call may be delivered before it fails [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) attempts: Option<u32>,
    /// Calls with the same key run once; repeats get the first call's answer
    #[arg(long, value_name = "KEY")]
    pub(crate) idempotency_key: Option<String>,
    /// The id of the call in the output of `latzero answers`
    #[arg(long, value_name = "ID")]
    pub(crate) id: Option<String>,
    /// Print the items of a streamed answer as they arrive, one line each; progress on stderr
    #[arg(long)]
    pub(crate) stream: bool,
    /// Print strings without quotes and bytes unchanged; nothing is escaped, even on a terminal
    #[arg(long, conflicts_with = "json")]
    pub(crate) raw: bool,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct AnswersArgs {
    /// Calls in this pool; may be repeated [default: every pool]
    #[arg(long)]
    pub(crate) pool: Vec<String>,
    /// How long to wait for answers that have not arrived yet
    #[arg(long, value_name = "DURATION", value_parser = parse::long_duration)]
    pub(crate) wait: Option<Duration>,
    #[command(flatten)]
    pub(crate) limit: CountArgs,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct EmitArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    #[command(flatten)]
    pub(crate) payload: PayloadArgs,
    #[command(flatten)]
    pub(crate) delivery: DeliveryArgs,
    /// To a single handler, instead of one of each app
    #[arg(long)]
    pub(crate) one: bool,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

/// How the items of a streamed answer are separated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Framing {
    /// Each line is an item
    Lines,
    /// Each item follows its length, four bytes with the most significant first
    Length,
}

/// What a program prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputKind {
    /// JSON if it is JSON, text if it is UTF-8, raw bytes otherwise
    Auto,
    /// JSON; anything else is an error
    Json,
    /// Text, even if it looks like JSON
    Text,
    /// Raw bytes
    Bytes,
}

#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) targets: TargetsArgs,
    /// The program and its arguments
    #[arg(value_name = "COMMAND", last = true, required = true)]
    pub(crate) command: Vec<OsString>,
    /// How many programs run at a time; further calls go to other handlers, wait if they are
    /// parked, or are refused as overloaded [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) concurrency: Option<u16>,
    /// Run one process for all calls, and exchange one line per call with it
    #[arg(long, conflicts_with_all = ["concurrency", "stream"])]
    pub(crate) lines: bool,
    /// Send each item that the program prints as it is printed: lines, or length
    #[arg(
        long,
        value_name = "FRAMING",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "lines",
        hide_possible_values = true
    )]
    pub(crate) stream: Option<Framing>,
    /// What the program prints: auto, json, text, bytes
    #[arg(
        long,
        value_name = "KIND",
        default_value = "auto",
        hide_possible_values = true
    )]
    pub(crate) output: OutputKind,
    /// Description of the triggers, shown when they are listed
    #[arg(long, value_name = "TEXT")]
    pub(crate) doc: Option<String>,
    /// File with the JSON Schema of what the triggers take, shown by `pools info --trigger`
    #[arg(long, value_name = "FILE")]
    pub(crate) schema: Option<PathBuf>,
    /// Take only calls and emits that a writer of an encrypted pool signed
    #[arg(long)]
    pub(crate) privileged: bool,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct OnArgs {
    #[command(flatten)]
    pub(crate) targets: TargetsArgs,
    #[command(flatten)]
    pub(crate) limit: CountArgs,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct AppsArgs {
    #[command(subcommand)]
    pub(crate) command: Option<AppsCommand>,
    /// Only apps in this pool
    #[arg(long)]
    pub(crate) pool: Option<String>,
    /// Only apps that are connected
    #[arg(long)]
    pub(crate) live: bool,
    /// Only apps that are known and not connected
    #[arg(long, conflicts_with = "live")]
    pub(crate) offline: bool,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AppsCommand {
    /// Delete an offline app's registration
    Forget(ForgetArgs),
}

#[derive(Args, Debug)]
pub(crate) struct ForgetArgs {
    /// The AppID
    #[arg(value_name = "APP", required_unless_present = "offline")]
    pub(crate) forgotten: Option<String>,
    /// Forget every offline app
    #[arg(long, conflicts_with = "forgotten")]
    pub(crate) offline: bool,
    /// Only apps that have been offline for longer than this
    #[arg(
        long,
        value_name = "DURATION",
        value_parser = parse::age,
        requires = "offline"
    )]
    pub(crate) older: Option<Duration>,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

/// A data directory, for commands that need no server.
#[derive(Args, Debug)]
pub(crate) struct DataDir {
    /// The data directory [env: LATZERO_DATA_DIR] [default: ~/.latzero]
    #[arg(short, long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

impl DataDir {
    /// The directory that the flag, the variable or the default names.
    pub(crate) fn path(&self) -> PathBuf {
        let reach = ServerArgs {
            data_dir: self.data_dir.clone(),
            ..ServerArgs::default()
        };
        reach.data_dir().0
    }
}

#[derive(Args, Debug)]
pub(crate) struct BackupArgs {
    #[command(subcommand)]
    pub(crate) command: Option<BackupCommand>,
    /// The file to create; it must not exist [default: a new one in DIR/backups]
    #[arg(long, value_name = "FILE")]
    pub(crate) to: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BackupCommand {
    /// List the backups of the data directory, newest first; exit code 4 if one is damaged
    Ls(BackupListArgs),
}

#[derive(Args, Debug)]
pub(crate) struct BackupListArgs {
    /// Read each backup completely
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
    /// Do not ask for confirmation
    #[arg(short, long)]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) dir: DataDir,
}

#[derive(Args, Debug)]
pub(crate) struct DbArgs {
    #[command(subcommand)]
    pub(crate) command: DbCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DbCommand {
    /// Check for damage; exit code 4 if there is any
    Check(DbCheckArgs),
    /// Run one SELECT on a copy of the database; at most 10000 rows, 1 MiB and 5 s
    Query(DbQueryArgs),
    /// Write the database to stdout as SQL text that `sqlite3` can load
    Dump(DbDumpArgs),
}

#[derive(Args, Debug)]
pub(crate) struct DbQueryArgs {
    /// The query, such as "SELECT name FROM sqlite_schema"
    #[arg(value_name = "SQL")]
    pub(crate) sql: String,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct DbDumpArgs {
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct DbCheckArgs {
    /// Read every record and follow every reference
    #[arg(long)]
    pub(crate) full: bool,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct PoolsArgs {
    #[command(subcommand)]
    pub(crate) command: Option<PoolsCommand>,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct ParkedArgs {
    #[command(subcommand)]
    pub(crate) command: ParkedCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ParkedCommand {
    /// List parked calls
    #[command(after_help = "\
Examples:
  latzero parked ls
  latzero parked ls --trigger jobs/run --dead
  latzero parked ls --json | jq '.parked[].number'")]
    Ls(ParkedListArgs),
    /// Show a parked call with its payload: JSON of at most 64 KiB; of others only the size
    Show(ParkedShowArgs),
    /// Cancel parked calls; their callers get the error `cancelled`
    Cancel(ParkedNumbersArgs),
    /// Run dead calls again; their callers already got an error and get no further answer
    Retry(ParkedRetryArgs),
    /// Delete dead calls, and answers that were not fetched
    Purge(ParkedNumbersArgs),
}

/// The state of a parked call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ParkedStateArg {
    Waiting,
    Paused,
    Running,
    Dead,
    Answered,
}

impl ParkedStateArg {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            ParkedStateArg::Waiting => "waiting",
            ParkedStateArg::Paused => "paused",
            ParkedStateArg::Running => "running",
            ParkedStateArg::Dead => "dead",
            ParkedStateArg::Answered => "answered",
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct ParkedFilterArgs {
    /// Only calls in this pool; TRIGGER is then the whole name of the trigger
    #[arg(long)]
    pub(crate) pool: Option<String>,
    /// Only calls of this trigger
    #[arg(long, value_name = "[POOL/]TRIGGER")]
    pub(crate) trigger: Option<String>,
    /// Only calls that this app made
    #[arg(long, value_name = "APP")]
    pub(crate) caller: Option<String>,
    /// Only calls in this state
    #[arg(long, value_enum)]
    pub(crate) state: Option<ParkedStateArg>,
    /// Only calls whose attempts have all failed, like --state dead
    #[arg(long, conflicts_with = "state")]
    pub(crate) dead: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ParkedListArgs {
    #[command(flatten)]
    pub(crate) filter: ParkedFilterArgs,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct ParkedShowArgs {
    /// The number of the call, as `latzero parked ls` prints it
    #[arg(value_parser = parse::parked_number)]
    pub(crate) number: u64,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct ParkedNumbersArgs {
    /// The numbers of the calls, as `latzero parked ls` prints them
    #[arg(
        value_name = "NUMBER",
        value_parser = parse::parked_number,
        conflicts_with_all = ["pool", "trigger", "caller", "state", "dead"]
    )]
    pub(crate) numbers: Vec<u64>,
    #[command(flatten)]
    pub(crate) filter: ParkedFilterArgs,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct ParkedRetryArgs {
    #[command(flatten)]
    pub(crate) which: ParkedNumbersArgs,
    /// How long each call may take [default: 24h]
    #[arg(long, value_name = "DURATION", value_parser = parse::long_duration)]
    pub(crate) ttl: Option<Duration>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PoolsCommand {
    /// Create a pool that stays until it is removed
    #[command(after_help = "\
Examples:
  latzero pools create lab --durable
  latzero pools create lab --policy join=alice,bob --policy serve=alice --deny call=bob
  latzero pools create vault --encrypted            `latzero keys new vault` created its keys")]
    Create(PoolCreateArgs),
    /// Show a pool with its members and triggers, or one trigger with its schema
    Info(PoolInfoArgs),
    /// Encrypt the blocks of an encrypted pool again, with its current keys
    Reencrypt(PoolReencryptArgs),
    /// Remove a pool
    Remove(PoolRemoveArgs),
}

#[derive(Args, Debug)]
pub(crate) struct PoolArgs {
    /// The pool
    #[arg(value_name = "POOL")]
    pub(crate) pool: String,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct PoolInfoArgs {
    #[command(flatten)]
    pub(crate) pool: PoolArgs,
    /// Show only this trigger, with its schema
    #[arg(long, value_name = "TRIGGER")]
    pub(crate) trigger: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct PoolReencryptArgs {
    #[command(flatten)]
    pub(crate) pool: PoolArgs,
    /// Keep content from before a writer was removed, although that writer may have changed it
    #[arg(long)]
    pub(crate) keep_stale: bool,
}

#[derive(Args, Debug)]
pub(crate) struct PoolCreateArgs {
    #[command(flatten)]
    pub(crate) pool: PoolArgs,
    /// Keep it on disk: it survives a restart of the server
    #[arg(long)]
    pub(crate) durable: bool,
    /// Encrypt the pool with the keys that `latzero keys new` created; it is always durable
    #[arg(long)]
    pub(crate) encrypted: bool,
    /// Like --encrypted, but blocks are not encrypted; the keys decide who can open them
    #[arg(long)]
    pub(crate) gated: bool,
    /// Limit a right (join, serve, call, emit, read, write) to these, like join=alice,uid:1000; may
    /// be repeated
    #[arg(long, value_name = "RIGHT=WHO,…", value_parser = parse::pair)]
    pub(crate) policy: Vec<(String, String)>,
    /// Deny a right to these, like call=bob; may be repeated
    #[arg(long, value_name = "RIGHT=WHO,…", value_parser = parse::pair)]
    pub(crate) deny: Vec<(String, String)>,
    /// A property that every app can see; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse::pair)]
    pub(crate) property: Vec<(String, String)>,
}

#[derive(Args, Debug)]
pub(crate) struct PoolRemoveArgs {
    #[command(flatten)]
    pub(crate) pool: PoolArgs,
    /// Remove it even if it has members
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Args, Debug)]
pub(crate) struct WatchArgs {
    /// The pool
    #[arg(default_value = "default")]
    pub(crate) pool: String,
    #[command(flatten)]
    pub(crate) limit: CountArgs,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct PingArgs {
    /// Number of requests
    #[arg(
        short,
        long,
        value_name = "N",
        default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub(crate) count: u32,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchKind {
    /// Calls, each with its answer
    Call,
    /// Events; the server answers each with the number of handlers it was sent to
    Emit,
}

#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    /// What to measure
    #[arg(value_enum)]
    pub(crate) measured: BenchKind,
    /// Number of calls or events in total
    #[arg(
        long,
        value_name = "N",
        default_value_t = 20_000,
        value_parser = clap::value_parser!(u64).range(1..=1_000_000_000)
    )]
    pub(crate) calls: u64,
    /// Number of calls or events in flight at a time
    #[arg(
        long,
        value_name = "W",
        default_value_t = 1,
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    pub(crate) in_flight: u16,
    /// Size of each payload
    #[arg(long, value_name = "BYTES", default_value = "64", value_parser = parse::size)]
    pub(crate) size: usize,
    /// Use this trigger instead of a handler in this program
    #[arg(long, value_name = "[POOL/]TRIGGER")]
    pub(crate) to: Option<String>,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    pub(crate) what: ConfigCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Show the settings in force and where each one comes from
    Show(Box<ShowArgs>),
    /// Print a settings file with every setting at its default, explained
    Default,
}

#[derive(Args, Debug)]
pub(crate) struct ShowArgs {
    /// Only settings that are not at their default
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

#[derive(Args, Debug)]
pub(crate) struct BlockArgs {
    #[command(subcommand)]
    pub(crate) command: BlockCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BlockCommand {
    /// List the blocks of a pool
    Ls(BlockListArgs),
    /// Show a block's sizes, who is attached, and who holds its lock
    Info(BlockOne),
    /// Create a block
    #[command(after_help = "\
Examples:
  latzero block create alpha/buffer 64KiB
  latzero block create alpha/frame --dtype f4 --shape 1080,1920     the size follows
  latzero block create alpha/table 1MiB --persistent --writer alice")]
    Create(BlockCreateArgs),
    /// Print a block's bytes: unchanged, or as hex on a terminal
    Read(BlockReadArgs),
    /// Write bytes into a block, as one version
    #[command(after_help = "\
Examples:
  latzero block write alpha/buffer hello
  latzero block write alpha/buffer @part.bin --offset 4096
  date | latzero block write alpha/buffer - --if-version 7")]
    Write(BlockWriteArgs),
    /// Write DATA only if the block has the EXPECTED bytes; exit code 4 if not
    #[command(after_help = "\
Examples:
  latzero block cas alpha/state idle busy
  latzero block cas alpha/state @old.bin @new.bin --offset 16")]
    Cas(BlockCasArgs),
    /// Print each new version's number as it appears
    Watch(BlockWatchArgs),
    /// Run a command while holding the lock of a block
    #[command(after_help = "\
Examples:
  latzero block lock alpha/frame -- ./update.sh
  latzero block lock alpha/frame -- latzero block write alpha/frame hello

The command and the programs that it starts write the block under the lock: the LatZero client finds
the lock in LATZERO_LOCKS. LATZERO_BLOCK and LATZERO_FENCE name the block and the lock's fence.
The lock is held until the command ends. Signals are passed on to the command; if this program is
killed with SIGKILL, the command is killed too. If the lock is lost, the command gets SIGTERM, and
SIGKILL after 5 s.
The exit code is the command's, or 128 plus the signal's number; 5 if the lock was lost or not
obtained in time, 2 if there is no such command.")]
    Lock(BlockLockArgs),
    /// Change the size of a block; it gets a new generation
    Resize(BlockResizeArgs),
    /// Write a persistent block's newest version to the disk, and wait until it is there
    Flush(BlockOne),
    /// Remove a block, even if others are attached
    Rm(BlockOne),
    /// Write a block to a file; a .npy file gets the layout as well
    #[command(after_help = "\
Examples:
  latzero block dump alpha/frame frame.npy
  latzero block dump alpha/frame - | sha256sum

A regular file is replaced atomically once the whole block is written; it keeps its mode, and
symbolic links are followed. Devices and pipes are written to directly.
A .npy file has named fields as the fields of a record, and bf16, for which numpy has no name, as
<V2: two bytes each.")]
    Dump(BlockFileArgs),
    /// Replace a block's content with a file's; the block is created if necessary
    #[command(after_help = "\
Examples:
  latzero block load alpha/frame frame.npy
  latzero block load alpha/frame part.bin --offset 4096     write a part

The block gets the size of the file, unless --offset is given. A .npy file sets the layout too;
fields of records must all have the same type. <V2 becomes bf16.")]
    Load(BlockLoadArgs),
}

/// A block and its pool.
#[derive(Args, Debug)]
pub(crate) struct BlockAt {
    /// The block
    #[arg(value_name = "[POOL/]BLOCK")]
    pub(crate) block: String,
    /// The pool; BLOCK is then the whole name of the block
    #[arg(long)]
    pub(crate) pool: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct BlockListArgs {
    /// The pool
    #[arg(default_value = "default")]
    pub(crate) pool: String,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct BlockOne {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

/// How a block is created.
#[derive(Args, Debug)]
pub(crate) struct BlockKind {
    /// Keep the block in a file in the server's data directory, so that it survives restarts
    #[arg(long)]
    pub(crate) persistent: bool,
    /// Write in place, without snapshots: writers and readers must hold the lock
    #[arg(long, conflicts_with = "slots")]
    pub(crate) raw: bool,
    /// Number of slots: how many versions the block holds at a time
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
    /// The size, like 4096, 64KiB or 1GiB; not needed with --shape
    #[arg(value_parser = parse::block_size, required_unless_present = "shape")]
    pub(crate) size: Option<u64>,
    /// The type of the elements, in numpy's notation: f4, u1, >i8, …; or bf16
    #[arg(long, value_name = "DTYPE", requires = "shape")]
    pub(crate) dtype: Option<String>,
    /// The length of each dimension, like 1080,1920
    #[arg(long, value_name = "N,…", value_delimiter = ',', requires = "dtype")]
    pub(crate) shape: Vec<u64>,
    /// Use the block if it already exists
    #[arg(long)]
    pub(crate) or_attach: bool,
    #[command(flatten)]
    pub(crate) kind: BlockKind,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

/// A position in a block.
#[derive(Args, Debug)]
pub(crate) struct OffsetArgs {
    /// The first byte
    #[arg(long, value_name = "BYTE", default_value_t = 0)]
    pub(crate) offset: u64,
}

#[derive(Args, Debug)]
pub(crate) struct BlockReadArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    #[command(flatten)]
    pub(crate) from: OffsetArgs,
    /// Number of bytes [default: to the end]
    #[arg(long, value_parser = parse::block_size)]
    pub(crate) length: Option<u64>,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

/// Whether empty input is allowed.
#[derive(Args, Debug)]
pub(crate) struct AllowEmpty {
    /// Allow empty input
    #[arg(long)]
    pub(crate) allow_empty: bool,
}

#[derive(Args, Debug)]
pub(crate) struct BlockWriteArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    /// The bytes: text, - for stdin, @FILE for a file
    #[arg(value_name = "DATA")]
    pub(crate) data: String,
    #[command(flatten)]
    pub(crate) from: OffsetArgs,
    /// Write only if the block has this version
    #[arg(long, value_name = "VERSION")]
    pub(crate) if_version: Option<u64>,
    #[command(flatten)]
    pub(crate) empty: AllowEmpty,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct BlockCasArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    /// The bytes that must be in the block: text, or @FILE
    pub(crate) expected: String,
    /// The new bytes, of the same length: text, or @FILE
    #[arg(value_name = "DATA")]
    pub(crate) data: String,
    #[command(flatten)]
    pub(crate) from: OffsetArgs,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct BlockWatchArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    #[command(flatten)]
    pub(crate) limit: CountArgs,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct BlockLockArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    /// Share the lock with other readers; the command cannot write
    #[arg(long)]
    pub(crate) shared: bool,
    /// How long to wait for the lock
    #[arg(long, value_name = "DURATION", value_parser = parse::duration, default_value = "10s")]
    pub(crate) wait: Duration,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct BlockResizeArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    /// The new size
    #[arg(value_parser = parse::block_size)]
    pub(crate) size: u64,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
}

#[derive(Args, Debug)]
pub(crate) struct BlockFileArgs {
    #[command(flatten)]
    pub(crate) at: BlockAt,
    /// The file; - for stdout
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) reach: ServerArgs,
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
    pub(crate) reach: ServerArgs,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn clap_accepts_the_definition() {
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
    fn start_uses_h_for_the_host() {
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
            panic!("the command is `start`")
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
