//! Benchmarks, with what they need besides the programs of this workspace.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Done, cargo, node, python, quiet, read, root};

pub(crate) fn bench(rest: &[&str]) -> Done {
    cargo(&["build", "--release", "--package", "latzero-cli"])?;
    let mut args = vec![
        "run",
        "--release",
        "--package",
        "latzero-bench",
        "--features",
        "nats",
        "--",
    ];
    args.extend(rest);
    let mut named = Vec::new();
    // Help needs no packages.
    if rest.first() == Some(&"sdk") && !rest.contains(&"--help") {
        named = packages()?;
    }
    args.extend(named.iter().map(String::as_str));
    cargo(&args)
}

/// The arguments that name a Python with the package and its peers, and a Node.
fn packages() -> Result<Vec<String>, String> {
    let mut named = Vec::new();
    match python::environment() {
        Ok(tools) => {
            let wheel = python::wheel_of(&tools, "release")?;
            let python = python_with_peers("bench", &mut Command::new("python3"), &wheel)?;
            named.extend(["--python".to_owned(), python.display().to_string()]);
            if let Some(version) = python::newest() {
                let mut newest = python::interpreter(version);
                let python = python_with_peers("bench-newest", &mut newest, &wheel)?;
                named.extend(["--newest-python".to_owned(), python.display().to_string()]);
            }
        }
        Err(why) => println!("LEFT OUT: Python: {why}"),
    }
    match node::suits() {
        Ok(()) => {
            node::build("release")?;
            named.extend(["--node".to_owned(), "node".to_owned()]);
        }
        Err(why) => println!("LEFT OUT: Node: {why}"),
    }
    Ok(named)
}

/// An environment with the optimized wheel and what it is compared with. Where an interpreter's
/// package can't be installed, its lines are left out.
fn python_with_peers(name: &str, from: &mut Command, wheel: &Path) -> Result<PathBuf, String> {
    let dir = root().join("target/python").join(name);
    let python = dir.join("bin/python");
    if !python.exists() {
        quiet(from.args(["-m", "venv"]).arg(&dir))?;
    }
    let install = ["install", "--quiet", "--no-index", "--no-deps"];
    quiet(
        python::pip(&python)
            .args(install)
            .arg("--force-reinstall")
            .arg(wheel),
    )?;
    let wanted = read(&root().join("crates/latzero-bench/sdk/requirements.txt"))?;
    for peer in wanted.lines().filter(|line| !line.starts_with('#')) {
        if let Err(why) = quiet(python::pip(&python).args(["install", "--quiet", peer])) {
            println!("LEFT OUT: {peer}: {why}");
        }
    }
    Ok(python)
}
