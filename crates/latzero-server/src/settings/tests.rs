//! Tests of settings from every source, and of errors in them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::machine_limits::{Bound, MachineLimits, Origin};

use super::*;

fn environment(pairs: &[(&str, &str)]) -> Environment {
    pairs
        .iter()
        .copied()
        .chain([("HOME", "/home/u"), ("PATH", "/bin")])
        .collect()
}

fn file(name: &str, text: &str) -> ConfigFile {
    ConfigFile {
        path: PathBuf::from(name),
        text: text.to_owned(),
        found: Found::InDataDir,
    }
}

fn inputs(files: &[&str], env: &[(&str, &str)], flags: &[(&str, &str)]) -> Inputs {
    Inputs {
        environment: environment(env),
        files: files
            .iter()
            .enumerate()
            .map(|(index, text)| file(&format!("/c/{index}.toml"), text))
            .collect(),
        command_line: flags
            .iter()
            .map(|(name, value)| {
                Override::new(*name, *value, format!("--{}", name.replace('_', "-")))
            })
            .collect(),
    }
}

fn check_error(inputs: &Inputs, expected: &str) {
    let errors = resolve(inputs).expect_err("these settings are wrong");
    assert_eq!(errors.to_string(), expected);
}

fn show(resolved: &Resolved) -> Vec<Shown> {
    resolved.show(&MachineLimits {
        memory: Bound {
            max: 1 << 30,
            from: Origin::Machine,
        },
        descriptors: None,
        file_size: None,
    })
}

fn source_of(resolved: &Resolved, name: &str) -> String {
    show(resolved)
        .into_iter()
        .find(|shown| shown.name == name)
        .unwrap()
        .source
}

#[test]
fn defaults() {
    let Settings {
        port,
        host,
        data_dir,
        socket,
        log_level,
        drain_timeout,
        limits,
        ..
    } = resolve(&inputs(&[], &[], &[])).unwrap().settings;
    assert_eq!((port, host.as_str()), (45227, "127.0.0.1"));
    assert_eq!(data_dir, Path::new("/home/u/.latzero"));
    assert_eq!((socket, log_level), (SocketChoice::Auto, LogLevel::Info));
    assert_eq!(drain_timeout.as_millis(), 10_000);
    assert_eq!((limits.max_frame, limits.meta_bytes_max), (16 << 20, 8192));
    assert_eq!(
        (limits.outbox_total_bytes_max, limits.read_budget_bytes),
        (0, 262_144)
    );
}

#[test]
fn each_source_overrides_the_previous_one() {
    let files = [
        "port = 1\nhost = 'a'\nio_threads = 2",
        "port = 2\nhost = 'b'",
    ];
    let all = inputs(
        &files,
        &[("LATZERO_PORT", "3"), ("LATZERO_LIMITS_MAX_FRAME", "1 MiB")],
        &[("port", "4")],
    );
    let resolved = resolve(&all).unwrap();
    assert_eq!(resolved.settings.port, 4);
    assert_eq!(resolved.settings.host, "b");
    assert_eq!(resolved.settings.io_threads, 2);
    assert_eq!(resolved.settings.limits.max_frame, 1 << 20);
    for (name, source) in [
        ("port", "command line --port"),
        ("host", "file /c/1.toml"),
        ("io_threads", "file /c/0.toml"),
        ("limits.max_frame", "environment LATZERO_LIMITS_MAX_FRAME"),
        ("log_level", "default"),
    ] {
        assert_eq!(source_of(&resolved, name), source, "{name}");
    }
    let without_flag = resolve(&Inputs {
        command_line: vec![],
        ..all
    })
    .unwrap();
    assert_eq!(without_flag.settings.port, 3);
}

#[test]
fn every_setting_has_a_variable_and_a_flag() {
    for setting in SETTINGS.iter() {
        let default = setting.kind.render(&setting.default);
        let env = [(setting.variable(), default.clone())];
        let resolved = resolve(&Inputs {
            environment: env
                .into_iter()
                .chain([("HOME".into(), "/h".into())])
                .collect(),
            ..Inputs::default()
        })
        .unwrap();
        assert!(source_of(&resolved, setting.name).starts_with("environment LATZERO_"));
        let resolved = resolve(&inputs(&[], &[], &[(setting.name, &default)])).unwrap();
        assert!(source_of(&resolved, setting.name).starts_with("command line --"));
    }
}

#[test]
fn variables_of_others_are_left_alone() {
    let env = [
        ("LATZERO_URL", "latzero://x"),
        ("LATZERO_ADMIN_TOKEN", "t"),
        ("LATZERO_SOCKET", "off"),
    ];
    let resolved = resolve(&inputs(&[], &env, &[])).unwrap();
    assert_eq!(resolved.settings.socket, SocketChoice::Off);
}

#[test]
fn unknown_variables_are_warnings() {
    let check = |name: &str, expected: &[&str]| {
        let environment = environment(&[(name, "1")]);
        assert_eq!(unknown_variables(&environment), expected);
        resolve(&Inputs {
            environment,
            ..Inputs::default()
        })
        .unwrap();
    };
    for name in SDK_VARIABLES {
        check(name, &[]);
    }
    check("LATZERO_KEYS", &[]);
    check("LATZERO_KEY_FILE", &[]);
    check("LATZERO_LOCKS", &[]);
    check("OTHER_PORT", &[]);
    check(
        "LATZERO_PROT",
        &[
            "environment variable LATZERO_PROT is not a setting and is ignored; \
           the nearest is `LATZERO_PORT`",
        ],
    );
    check(
        "LATZERO_XYZ",
        &["environment variable LATZERO_XYZ is not a setting and is ignored"],
    );
}

#[test]
fn errors_of_variables() {
    check_error(
        &inputs(&[], &[("LATZERO_PORT", "70000")], &[]),
        "environment variable LATZERO_PORT: `port` must be an integer from 0 to 65535, \
         not \"70000\"",
    );
    check_error(
        &inputs(&[], &[("LATZERO_ENABLE_TLS", "maybe")], &[]),
        "environment variable LATZERO_ENABLE_TLS: `enable_tls` must be true or false, \
         not \"maybe\"",
    );
    check_error(
        &inputs(&[], &[("LATZERO_HOST", "")], &[]),
        "environment variable LATZERO_HOST: `host` must be text that is not empty, not \"\"",
    );
}

#[cfg(unix)]
#[test]
fn a_variable_that_is_not_utf8_is_refused() {
    use std::os::unix::ffi::OsStringExt;
    let environment = [("LATZERO_HOST", OsString::from_vec(vec![0xff]))]
        .into_iter()
        .collect();
    let errors = resolve(&Inputs {
        environment,
        ..Inputs::default()
    })
    .unwrap_err();
    assert!(
        errors.to_string().contains("bytes that are not UTF-8"),
        "{errors}"
    );
}

#[test]
fn errors_of_flags() {
    check_error(
        &inputs(&[], &[], &[("log_level", "loud")]),
        "command line --log-level: `log_level` must be one of error, warn, info, debug, \
         trace, not \"loud\"",
    );
    check_error(
        &inputs(&[], &[], &[("prot", "1")]),
        "command line --prot: there is no setting `prot`; the nearest is `port`",
    );
    check_error(
        &inputs(&[], &[], &[("zzz", "1")]),
        "command line --zzz: there is no setting `zzz`; `latzero config show` lists them all",
    );
}

#[test]
fn errors_of_files() {
    for (text, expected) in [
        (
            "prot = 1",
            "/c/0.toml:1:1: there is no setting `prot`; the nearest is `port`",
        ),
        (
            "\n[limits]\nport = 1",
            "/c/0.toml:3:1: there is no setting `limits.port`; the nearest is `port`",
        ),
        (
            "max_frame = 1",
            "/c/0.toml:1:1: there is no setting `max_frame`; the nearest is `limits.max_frame`",
        ),
        (
            "[limit]\nmax_frame = 1",
            "/c/0.toml:2:1: there is no setting `limit.max_frame`; \
             the nearest is `limits.max_frame`",
        ),
        (
            "# é\nport = 'abc'",
            "/c/0.toml:2:8: `port` must be an integer from 0 to 65535, not \"abc\"",
        ),
        (
            "port = -1",
            "/c/0.toml:1:8: `port` must be an integer from 0 to 65535, not -1",
        ),
        (
            "enable_tls = 1",
            "/c/0.toml:1:14: `enable_tls` must be true or false, not 1",
        ),
        (
            "[port]",
            "/c/0.toml:1:2: `port` must be an integer from 0 to 65535, not a table",
        ),
        (
            "limits = 3",
            "/c/0.toml:1:10: `limits` must be a table of settings, not 3",
        ),
        (
            "data_dir = '/x'",
            "/c/0.toml:1:1: `data_dir` cannot be set by a file inside the data directory; \
             use --data-dir, LATZERO_DATA_DIR or a file named with --config",
        ),
    ] {
        check_error(&inputs(&[text], &[], &[]), expected);
    }
    let broken = resolve(&inputs(&["port = 1\nhost = \n"], &[], &[])).unwrap_err();
    assert!(
        broken
            .to_string()
            .starts_with("/c/0.toml:2:8: not valid TOML: "),
        "{broken}"
    );
    let twice = resolve(&inputs(&["port = 1\nport = 2"], &[], &[])).unwrap_err();
    assert!(
        twice
            .to_string()
            .starts_with("/c/0.toml:2:1: not valid TOML: "),
        "{twice}"
    );
}

#[test]
fn all_errors_are_reported_at_once() {
    let errors = resolve(&inputs(
        &["prot = 1\nhost = 3", "port = 'x'"],
        &[("LATZERO_PORT", "x")],
        &[("host", "")],
    ))
    .unwrap_err();
    assert_eq!(errors.errors().len(), 5, "{errors}");
}

#[test]
fn a_named_file_may_set_the_data_dir() {
    let mut inputs = inputs(&["data_dir = '~/x'"], &[], &[]);
    inputs.files[0].found = Found::Named;
    assert_eq!(
        resolve(&inputs).unwrap().settings.data_dir,
        Path::new("/home/u/x")
    );
}

#[test]
fn home_directory() {
    let inputs = Inputs::default();
    check_error(
        &inputs,
        "default: `data_dir` begins with ~, but HOME is not set; set HOME or use an absolute path",
    );
    let elsewhere = Inputs {
        command_line: vec![Override::new("data_dir", "/srv/~x", "--data-dir")],
        ..Inputs::default()
    };
    assert_eq!(
        resolve(&elsewhere).unwrap().settings.data_dir,
        Path::new("/srv/~x")
    );
}

#[test]
fn a_reload_applies_settings_that_can_change_at_runtime() {
    let old = resolve(&inputs(&["port = 1\nlog_level = 'info'"], &[], &[])).unwrap();
    let fresh = resolve(&inputs(
        &["port = 2\nlog_level = 'debug'\n[limits]\nconnections_max = 5"],
        &[],
        &[],
    ))
    .unwrap();
    let (now, reload) = old.reload(&fresh);
    assert_eq!(now.settings.port, 1);
    assert_eq!(now.settings.log_level, LogLevel::Debug);
    assert_eq!(now.settings.limits.connections_max, 5);
    let names = |changes: &[SettingChange]| changes.iter().map(|c| c.name).collect::<Vec<_>>();
    assert_eq!(
        names(&reload.applied),
        ["log_level", "limits.connections_max"]
    );
    assert_eq!(names(&reload.needs_restart), ["port"]);
    assert_eq!(
        (
            reload.needs_restart[0].from.as_str(),
            reload.needs_restart[0].to.as_str()
        ),
        ("1", "2")
    );
    assert_eq!(now.reload(&now).1, Reload::default());
}

#[test]
fn unsupported_features_are_refused_by_name() {
    let resolved = resolve(&inputs(&[], &[("LATZERO_CLUSTER_MODE", "yes")], &[])).unwrap();
    assert_eq!(
        resolved.check_available().unwrap_err().to_string(),
        "environment variable LATZERO_CLUSTER_MODE: `cluster_mode` is not implemented yet; \
         remove it, or set it to false"
    );
    assert_eq!(
        resolve(&inputs(&[], &[], &[])).unwrap().check_available(),
        Ok(())
    );
}

#[test]
fn shown_as_json() {
    let shown = show(&resolve(&inputs(&[], &[], &[])).unwrap());
    assert_eq!(shown.len(), SETTINGS.len());
    let json = serde_json::to_value(&shown[0]).unwrap();
    assert_eq!(json["name"], "port");
    assert_eq!(json["value"], 45227);
    assert_eq!(json["source"], "default");
    assert!(json.get("in_force").is_none());
    let memory = shown.iter().find(|s| s.name == "limits.memory_max");
    let json = serde_json::to_value(memory).unwrap();
    assert_eq!(
        (&json["value"], &json["in_force"]["text"]),
        (&0.into(), &"512 MiB".into())
    );
    assert_eq!(json["in_force"]["from"], "1 GiB of memory (machine)");
    let frame = shown.iter().find(|s| s.name == "limits.max_frame").unwrap();
    assert_eq!((frame.text.as_str(), frame.unit), ("16 MiB", "bytes"));
}
