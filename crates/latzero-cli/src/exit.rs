//! How the program ends: the table of exit codes, and error messages.

use std::fmt;
use std::io;
use std::process::ExitCode;

use latzero::{Code, Error};
use latzero_server::ServerError;
use latzero_server::maintenance::{BackupError, MaintenanceError, OpenError};
use latzero_server::settings::SettingsErrors;
use serde_json::{Value, json};

macro_rules! exits {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal, $word:literal;)*) => {
        /// How the program ends.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Exit {
            $($(#[doc = $doc])+ $name,)*
        }

        impl Exit {
            const ALL: &[Exit] = &[$(Exit::$name),*];

            /// The exit code.
            pub(crate) fn code(self) -> u8 {
                match self { $(Exit::$name => $code,)* }
            }

            /// The code as a word, for errors in JSON.
            pub(crate) fn word(self) -> &'static str {
                match self { $(Exit::$name => $word,)* }
            }
        }

        /// The table as `--help` shows it.
        pub(crate) const TABLE: &str = concat!(
            "Exit codes:\n",
            $(table_line!($code, $($doc),+),)*
        );
    };
}

macro_rules! table_line {
    ($code:literal, $($doc:literal),+) => {
        concat!("  ", $code, "\t", $($doc),+, "\n")
    };
}

exits! {
    /// done
    Ok = 0, "ok";
    /// any other failure
    Failure = 1, "failure";
    /// a flag, an argument or a setting is wrong
    Usage = 2, "usage";
    /// no server answers
    NotRunning = 3, "not_running";
    /// a problem was found: `health`, `doctor`, `db check`, `backup ls`, `block cas`
    Unhealthy = 4, "unhealthy";
    /// the server or the handler answered with an error
    Answered = 5, "answered";
    /// no answer in time
    Timeout = 6, "timeout";
    /// the port, the socket or the data directory is in use
    InUse = 75, "in_use";
    /// permission denied
    Denied = 77, "permission_denied";
    /// interrupted (Ctrl-C)
    Interrupted = 130, "interrupted";
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}

impl Exit {
    /// The exit code for a file or directory that cannot be used.
    pub(crate) fn of_io(error: &io::Error) -> Exit {
        match error.kind() {
            io::ErrorKind::PermissionDenied => Exit::Denied,
            _ => Exit::Failure,
        }
    }

    /// The exit code that the server's library gives for an error.
    fn of_library(code: u8) -> Exit {
        match code {
            2 => Exit::Usage,
            75 => Exit::InUse,
            77 => Exit::Denied,
            _ => Exit::Failure,
        }
    }
}

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    /// What happened, one line each.
    pub(crate) errors: Vec<String>,
    /// More about it, one line each.
    pub(crate) details: Vec<String>,
    /// What to do about it.
    pub(crate) help: Option<String>,
    /// The error of a call, as the wire has it.
    pub(crate) wire: Option<Value>,
    /// No message is printed, because the reader of the output closed it.
    pub(crate) is_quiet: bool,
}

/// The result of a command.
pub(crate) type CommandResult = Result<Exit, Failure>;

impl Failure {
    pub(crate) fn new(exit: Exit, error: impl fmt::Display) -> Failure {
        Failure {
            exit,
            errors: vec![error.to_string()],
            details: Vec::new(),
            help: None,
            wire: None,
            is_quiet: false,
        }
    }

    pub(crate) fn with_help(mut self, help: impl Into<String>) -> Failure {
        self.help = Some(help.into());
        self
    }

    /// An argument that clap accepted and that is wrong nevertheless.
    pub(crate) fn usage(error: impl fmt::Display) -> Failure {
        Failure::new(Exit::Usage, error)
    }

    /// The library's messages say what to do after a semicolon.
    fn of_message(exit: Exit, message: &str) -> Failure {
        match message.split_once("; ") {
            Some((what, help)) => Failure::new(exit, what).with_help(help),
            None => Failure::new(exit, message),
        }
    }

    /// The failure that another process of this program printed with `--json`.
    pub(crate) fn of_json(json: &Value) -> Option<Failure> {
        let error = json.get("error")?;
        let code = json["exit_code"].as_u64()?;
        let exit = Exit::ALL
            .iter()
            .find(|exit| u64::from(exit.code()) == code)?;
        let texts = |value: &Value| -> Vec<String> {
            let values = value.as_array().into_iter().flatten();
            values
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect()
        };
        Some(Failure {
            errors: error["message"]
                .as_str()?
                .lines()
                .map(str::to_owned)
                .collect(),
            details: texts(&error["details"]),
            help: error["help"].as_str().map(str::to_owned),
            ..Failure::new(*exit, "")
        })
    }

    /// The failure as `--json` prints it.
    pub(crate) fn to_json(&self) -> Value {
        let mut error = match &self.wire {
            Some(wire) => wire.clone(),
            None => json!({"code": self.exit.word(), "message": self.errors.join("\n")}),
        };
        if !self.details.is_empty() {
            error["details"] = json!(self.details);
        }
        if let Some(help) = &self.help {
            error["help"] = json!(help);
        }
        json!({"error": error, "exit_code": self.exit.code()})
    }
}

impl From<io::Error> for Failure {
    /// An error in writing the program's own output.
    fn from(error: io::Error) -> Failure {
        let is_quiet = error.kind() == io::ErrorKind::BrokenPipe;
        Failure {
            // `latzero apps | head -1` has done what it was asked for.
            exit: if is_quiet { Exit::Ok } else { Exit::Failure },
            is_quiet,
            ..Failure::new(
                Exit::Failure,
                format!("the output cannot be written: {error}"),
            )
        }
    }
}

impl From<SettingsErrors> for Failure {
    fn from(errors: SettingsErrors) -> Failure {
        if errors.is_denied() {
            return Failure::new(Exit::Denied, &errors)
                .with_help("run this as the directory's owner, or choose another with --data-dir");
        }
        if let [error] = errors.errors() {
            let failure = Failure::of_message(Exit::Usage, &error.to_string());
            if failure.help.is_some() {
                return failure;
            }
        }
        let lines: Vec<String> = errors.errors().iter().map(ToString::to_string).collect();
        Failure {
            errors: lines,
            help: Some(
                "`latzero config show` lists every setting and where it comes from".to_owned(),
            ),
            ..Failure::new(Exit::Usage, "")
        }
    }
}

impl From<ServerError> for Failure {
    fn from(error: ServerError) -> Failure {
        let exit = Exit::of_library(error.exit_code());
        match error {
            ServerError::Settings(errors) => errors.into(),
            other => {
                let failure = Failure::of_message(exit, &other.to_string());
                match failure.help {
                    Some(_) => failure,
                    None => failure.with_help(
                        "`latzero doctor` looks for the cause; \
                         `latzero start --log-level debug` logs more",
                    ),
                }
            }
        }
    }
}

impl From<MaintenanceError> for Failure {
    fn from(error: MaintenanceError) -> Failure {
        let exit = match &error {
            MaintenanceError::Startup(error) => Exit::of_library(error.exit_code()),
            MaintenanceError::Backup(BackupError::Bad { .. }) => Exit::Unhealthy,
            MaintenanceError::Store(OpenError::InUse { .. }) => Exit::InUse,
            MaintenanceError::System { source, .. } => Exit::of_io(source),
            _ => Exit::Failure,
        };
        Failure::of_message(exit, &error.to_string())
    }
}

impl From<Error> for Failure {
    /// What a request or a call was answered with.
    fn from(error: Error) -> Failure {
        let is_own = Code::parse(error.code()).is_none();
        let exit = match error.kind() {
            // A handler's own code says nothing about this program.
            _ if is_own => Exit::Answered,
            Code::Disconnected => Exit::NotRunning,
            Code::Timeout => Exit::Timeout,
            Code::Forbidden | Code::Unauthenticated => Exit::Denied,
            Code::InvalidName => Exit::Usage,
            _ => Exit::Answered,
        };
        let mut wire = json!({"code": error.code(), "message": error.message()});
        if let Some(ran) = error.ran() {
            wire["ran"] = json!(ran.as_str());
        }
        if let Some(data) = error.data() {
            wire["data"] = data.clone();
        }
        // There is no known remedy for a handler's own code.
        let of_tls = of_tls(error.kind(), error.message()).filter(|_| !is_own);
        let help = match error.message() {
            _ if of_tls.is_some() => of_tls.map(|(_, help)| help),
            message if !is_own && message.contains(FORCE) => {
                Some("--force removes it anyway".into())
            }
            _ => {
                let has_remedy = !is_own && error.kind() != Code::HandlerError;
                has_remedy.then(|| remedy(error.kind(), error.message()))
            }
        };
        let shown = match plain(error.kind(), error.message()).filter(|_| !is_own) {
            Some(message) => {
                let shown = format!("{}: {message}", error.code());
                wire["message"] = message.into();
                shown
            }
            None => error.to_string(),
        };
        Failure {
            wire: Some(wire),
            help,
            ..Failure::new(exit, shown)
        }
    }
}

/// What to do about an error, in terms of this program's flags and commands.
fn remedy(code: Code, message: &str) -> String {
    let text = match code {
        Code::BadMessage
            if PRIVILEGED_IN_PLAIN
                .iter()
                .any(|text| message.contains(text)) =>
        {
            "--privileged works only in encrypted pools: leave it out, or name such a pool"
        }
        Code::AppInUse => "stop the other instance, or connect as another app with --app",
        Code::NotMember => "name a pool that the app is in; `latzero pools` lists them",
        Code::Unauthenticated => {
            "give the keys of the pool with --keys FILE, or the key of the app with --app-key FILE"
        }
        Code::Forbidden if !needs_admin(message) => {
            "use an app, keys or a user that may do it; `latzero pools info` shows the policy"
        }
        Code::Forbidden => {
            "connect over the Unix socket as the server's user, or over TLS with \
             LATZERO_ADMIN_TOKEN set"
        }
        Code::Timeout => "allow more time with --timeout, or find out why the handler is slow",
        Code::Cancelled => "repeat the call if it should not have been cancelled",
        Code::Draining => "the server is stopping; try again once it runs",
        Code::NoBlock => {
            "check the name with `latzero block ls`, or create it with `latzero block create`"
        }
        Code::BlockExists => "use the existing block with --or-attach, or choose another name",
        Code::OutOfRange => {
            "keep --offset plus the length within the size that `latzero block info` shows"
        }
        Code::VersionConflict => "read the block again and repeat the change",
        Code::LayoutMismatch => "use the layout that `latzero block info` shows",
        Code::Contended => "try again, or recreate the block with more --slots",
        Code::Locked if message.contains("under a shared lock") => {
            "use `latzero block lock` without --shared for a command that writes"
        }
        Code::Locked => {
            "`latzero block info` shows who holds the lock; wait for it with `latzero block lock \
             --wait`"
        }
        Code::LockLost => "take the lock again and check what was written",
        Code::Disconnected => {
            "check `latzero status`; the call may have run, so repeat it if that is safe"
        }
        Code::BadMessage => "fix what the message names",
        // Like the others here, without a capital and a full stop.
        other => {
            let text = other.remedy().trim_end_matches('.');
            // Not "appIDs".
            return match text.chars().nth(1) {
                Some(second) if second.is_lowercase() && !text.starts_with("AppID") => {
                    text[..1].to_lowercase() + &text[1..]
                }
                _ => text.to_owned(),
            };
        }
    };
    text.to_owned()
}

/// How the messages about a privileged trigger or message in a pool that is not encrypted end.
const PRIVILEGED_IN_PLAIN: [&str; 2] = [
    "serve it only in encrypted pools",
    "only a message to an encrypted pool can be privileged",
];

/// What is wrong with the identity of a server or a client in TLS, and what to do about it. These
/// messages of the client say both.
fn of_tls(code: Code, message: &str) -> Option<(String, String)> {
    if code != Code::Unauthenticated {
        return None;
    }
    let known = [
        ("is not trusted yet", "; "),
        ("is not the one that you trust", ". "),
        ("refused the TLS handshake", "; "),
    ];
    if let Some((_, end)) = known.iter().find(|(text, _)| message.contains(text)) {
        let (what, help) = message.split_once(end)?;
        let help = match help.strip_prefix("This") {
            Some(rest) => format!("this{rest}"),
            None => help.to_owned(),
        };
        return Some((what.to_owned(), help));
    }
    let help = "name the authority that signed it with `&ca=FILE` in the address, or the pin of \
                the server with `&pin=PIN`";
    let is_other = message.starts_with("the certificate of the server");
    is_other.then(|| (message.to_owned(), help.to_owned()))
}

/// Whether only administrators may do what was refused.
fn needs_admin(message: &str) -> bool {
    let beginnings = [
        "only an administrator",
        "only the server's user",
        "nobody administers",
    ];
    beginnings.iter().any(|text| message.starts_with(text))
}

/// The field that the server suggests for a pool with members.
const FORCE: &str = "\"force\":true";

/// The message in terms of this program, if the server's message names fields of the protocol.
fn plain(code: Code, message: &str) -> Option<String> {
    let cut = |at: &str| message.split(at).next().map(str::to_owned);
    if let Some((what, _)) = of_tls(code, message) {
        return Some(what);
    }
    match code {
        Code::BlockExists => cut("; attach it"),
        Code::Locked => cut("; wait for its lock"),
        Code::AppInUse | Code::NotMember | Code::NoBlock | Code::NoPool => cut("; "),
        Code::TooLarge => cut(", with \"if_version\""),
        _ if message.contains(FORCE) => cut("; "),
        _ if message.contains("\"durable\":true") => {
            Some(message.replace("\"durable\":true", "--durable"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lists_every_code_once() {
        for exit in Exit::ALL {
            let start = format!("  {}\t", exit.code());
            let lines = TABLE.lines().filter(|line| line.starts_with(&start));
            assert_eq!(lines.count(), 1, "{exit:?}");
            let same = Exit::ALL
                .iter()
                .filter(|other| other.code() == exit.code() || other.word() == exit.word());
            assert_eq!(same.count(), 1, "{exit:?}");
        }
    }

    #[test]
    fn messages_are_split_into_cause_and_remedy() {
        let failure = Failure::of_message(Exit::InUse, "port 5 is in use; choose another; or not");
        assert_eq!(failure.errors, ["port 5 is in use"]);
        assert_eq!(failure.help.as_deref(), Some("choose another; or not"));
    }

    #[test]
    fn a_closed_pipe_is_not_an_error() {
        let failure = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!((failure.exit, failure.is_quiet), (Exit::Ok, true));
    }
}
