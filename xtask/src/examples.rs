//! The examples that take several languages, and the notebook: `examples/tests`.
//!
//! They run against the installed Python package and the npm packages. Where one of the languages
//! is missing they are left out, and a line says so; in continuous integration (`CI` is set) that
//! is a failure.

use std::process::Command;

use crate::{Done, cargo, node, python, root, run};

/// Builds what the examples need, and runs their tests.
pub(crate) fn test() -> Done {
    let ready = python::installed().and_then(|python| Ok((python, node::packages()?)));
    let (python, packages) = match ready {
        Ok(ready) => ready,
        Err(why) if std::env::var_os("CI").is_some() => {
            return Err(format!("the tests of the examples must run here: {why}"));
        }
        Err(why) => {
            println!("LEFT OUT: the tests of the examples: {why}");
            return Ok(());
        }
    };
    cargo(&["build", "--package", "latzero-examples", "--bins"])?;
    println!("$ pytest, in examples/tests");
    run(Command::new(python)
        .args(["-m", "pytest", "-p", "no:cacheprovider"])
        .current_dir(root().join("examples/tests"))
        .env_remove("LATZERO_BIN")
        .env("EXAMPLES_PROGRAMS", root().join("target/debug"))
        .env("EXAMPLES_PACKAGES", packages))
}
