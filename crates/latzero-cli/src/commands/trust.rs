//! `trust`: stores the pin of a TLS server after a person or a script has compared it.

use std::io::IsTerminal as _;

use latzero::{Code, known_hosts};
use serde_json::json;

use crate::args::TrustArgs;
use crate::connect::{CONNECT_TIMEOUT, PORT_DEFAULT};
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::Output;

pub(crate) fn run(args: &TrustArgs, output: &Output) -> CommandResult {
    let (host, port) = parse(&args.host)?;
    let known = known_hosts::find(&host, port)?;
    let place = format!("{host}:{port}");
    let pin = known_hosts::fetch_pin(&host, port, CONNECT_TIMEOUT).map_err(|error| {
        let unreachable = matches!(error.kind(), Code::Disconnected | Code::Timeout);
        let exit = if unreachable {
            Exit::NotRunning
        } else {
            Exit::Failure
        };
        // What comes after a semicolon is advice for clients of a known server.
        let why = error.message().split(';').next().unwrap_or_default();
        Failure::new(exit, format!("cannot get the pin of {place}: {why}"))
            .with_help("start the server there with --tls, or correct the address")
    })?;
    if let Some(wanted) = args.pin.filter(|wanted| *wanted != pin) {
        let text = format!("the server at {place} has the pin {pin}, not {wanted}");
        return Err(Failure::new(Exit::Denied, text).with_help(
            "compare it with `latzero status` on the server's machine: this may be another server",
        ));
    }
    if let Some(before) = known.filter(|before| *before != pin && !args.replace) {
        let text = format!("the server at {place} has the pin {pin}, but {before} is trusted");
        return Err(Failure::new(Exit::Denied, text).with_help(
            "this may be another server; if its certificate was replaced on purpose, add --replace",
        ));
    }
    if known != Some(pin) {
        if args.pin.is_none() && !is_wanted(&place, pin, output)? {
            return Err(Failure::new(
                Exit::Failure,
                "cancelled; nothing was changed",
            ));
        }
        known_hosts::add(&host, port, pin)?;
    }
    match output.json {
        true => output.value(&json!({"host": host, "port": port, "pin": pin.to_string()}))?,
        false => output.line(format_args!("{place} is trusted with the pin {pin}"))?,
    }
    Ok(Exit::Ok)
}

fn is_wanted(place: &str, pin: known_hosts::Pin, output: &Output) -> Result<bool, Failure> {
    if !std::io::stdin().is_terminal() {
        let text =
            format!("the server at {place} has the pin {pin}; stdin is no terminal to confirm it");
        return Err(Failure::usage(&text).with_help("give the expected pin with --pin"));
    }
    output.note(format_args!(
        "The server at {place} has the pin\n  {pin}\n`latzero status` on the server's machine \
         shows the right one."
    ));
    Ok(output.asks("Are they the same?")?)
}

/// A host, and its port or the default one.
fn parse(text: &str) -> Result<(String, u16), Failure> {
    let text = text.strip_prefix("tls://").unwrap_or(text);
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, port)) => (host, port.strip_prefix(':').or(Some(port))),
        None => match text.rsplit_once(':') {
            // An IPv6 address without brackets has no port.
            Some((host, port)) if !host.contains(':') => (host, Some(port)),
            _ => (text, None),
        },
    };
    let port = match port {
        None => Some(PORT_DEFAULT),
        Some(port) => port.parse().ok().filter(|port| *port > 0),
    };
    match (host, port) {
        ("", _) | (_, None) => Err(Failure::usage(format!(
            "'{text}' is not HOST or HOST:PORT, with a port from 1 to 65535"
        ))),
        (host, Some(port)) => Ok((host.to_owned(), port)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_ports() {
        for (text, host, port) in [
            ("h", "h", PORT_DEFAULT),
            ("h:1", "h", 1),
            ("tls://h:1", "h", 1),
            ("::1", "::1", PORT_DEFAULT),
            ("[::1]", "::1", PORT_DEFAULT),
            ("[::1]:1", "::1", 1),
        ] {
            assert_eq!(parse(text).unwrap(), (host.to_owned(), port), "{text}");
        }
        for bad in ["", ":1", "h:0", "h:x", "[::1]x"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
