//! Runs each example as its documentation describes, against a private server.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use latzero::testing::{Server, server};

fn example(name: &str) -> PathBuf {
    match name {
        "wordcount" => env!("CARGO_BIN_EXE_wordcount").into(),
        "tail" => env!("CARGO_BIN_EXE_tail").into(),
        "failover" => env!("CARGO_BIN_EXE_failover").into(),
        other => panic!("no example is called {other}"),
    }
}

fn command(server: &Server, program: impl AsRef<Path>, args: &[&str]) -> Command {
    let mut command = Command::new(program.as_ref());
    command
        .args(args)
        .env("LATZERO_DATA_DIR", server.data_dir())
        .stdin(Stdio::null());
    command
}

fn run(server: &Server, name: &str, args: &[&str]) -> Output {
    command(server, example(name), args)
        .output()
        .expect("the example starts")
}

fn stdout(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout.clone()).expect("examples print text")
}

/// A process that ends with the test.
struct Background(Child);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn words_are_counted_as_sort_and_uniq_count_them() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("text");
    let mut text = String::new();
    for i in 0..60_000_u32 {
        let _ = write!(
            text,
            "word{} {}\n\tünder{} ",
            i % 997,
            i % 13,
            i.wrapping_mul(2_654_435_761) % 101
        );
    }
    std::fs::write(&file, text).unwrap();
    let server = server().unwrap();
    let counted = run(&server, "wordcount", &[file.to_str().unwrap()]);
    let progress = String::from_utf8_lossy(&counted.stderr).into_owned();
    let script = "tr -s '[:space:]' '\\n' < \"$0\" | grep -v '^$' | LC_ALL=C sort | uniq -c";
    let expected = Command::new("sh")
        .args(["-c", script])
        .arg(&file)
        .output()
        .unwrap();
    assert_eq!(stdout(&counted), stdout(&expected));
    assert!(progress.contains("pieces"), "{progress}");
}

#[test]
fn a_file_is_followed_while_it_grows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut file = std::fs::File::create(&path).unwrap();
    writeln!(file, "existed before").unwrap();
    let server = server().unwrap();
    let mut serving = command(&server, example("tail"), &["serve"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    BufReader::new(serving.stdout.take().unwrap())
        .read_line(&mut ready)
        .unwrap();
    let _serving = Background(serving);
    assert_eq!(ready, "ready\n");

    let args = ["follow", path.to_str().unwrap(), "4"];
    let mut follow = command(&server, example("tail"), &args)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    let mut follow = Background(follow);
    assert_eq!(lines.next().unwrap().unwrap(), "existed before");
    for i in 0..3 {
        // Two writes, to detect a reader that takes half a line for a complete one.
        write!(file, "line ").unwrap();
        writeln!(file, "{i}").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), format!("line {i}"));
    }
    assert!(follow.0.wait().unwrap().success());

    let missing = run(&server, "tail", &["follow", "/no/such/file"]);
    assert!(
        String::from_utf8_lossy(&missing.stderr).contains("no_file"),
        "{missing:?}"
    );
}

#[test]
fn the_second_worker_takes_over() {
    let server = server().unwrap();
    let text = stdout(&run(&server, "failover", &[]));
    let lines: Vec<&str> = text.lines().collect();
    let killed = lines[0]
        .strip_prefix("attempt 1: worker ")
        .unwrap()
        .strip_suffix(" has the call")
        .unwrap();
    assert_eq!(lines[1], format!("worker {killed} was killed"));
    assert_eq!(lines[2], "attempt 1 ended: handler_gone (ran: unknown)");
    let by = lines
        .last()
        .unwrap()
        .strip_prefix("sunset, rendered by ")
        .unwrap();
    assert_ne!(by, killed, "{text}");
}

#[test]
fn a_shell_script_is_a_handler() {
    let server = server().unwrap();
    let latzero = std::env::var_os("LATZERO_BIN")
        .map_or_else(|| example("tail").with_file_name("latzero"), PathBuf::from);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("textstat.sh");
    let args = ["serve", "textstat", "--", script.to_str().unwrap()];
    let mut serving = command(&server, &latzero, &args)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut told = String::new();
    BufReader::new(serving.stderr.take().unwrap())
        .read_line(&mut told)
        .unwrap();
    let _serving = Background(serving);
    assert!(told.contains("serving default/textstat"), "{told}");

    let good = command(
        &server,
        &latzero,
        &["call", "textstat", "\"one two three\""],
    )
    .output()
    .unwrap();
    assert_eq!(stdout(&good).trim(), r#"{"words":3,"characters":13}"#);
    let bad = command(&server, &latzero, &["call", "textstat", "[1]"])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&bad.stderr).into_owned();
    assert!(
        bad.status.code() == Some(5) && told.contains("handler_error"),
        "{bad:?}"
    );
}
