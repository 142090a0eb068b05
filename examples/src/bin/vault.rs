//! An encrypted pool: a Rust, a Python and a Node program share secrets that the server can't read.
//!
//! `vault KEYFILE` gives a secret to `vault/ledger.py`, has it checked by `vault/auditor.mjs`, and
//! parks a call, which the server stores on its disk. Then it shows that an app without the keys is
//! refused.

use std::error::Error;

use latzero::blocking::App;
use serde_json::{Value, json};

const SECRET: &str = "the third brick on the left";

fn main() -> Result<(), Box<dyn Error>> {
    let keys = std::env::args().nth(1).ok_or("usage: vault KEYFILE")?;
    let app = App::connect(&format!("latzero://owner?pool=vault&keys={keys}"))?;
    let entry = json!({"name": "door", "secret": SECRET});
    let count: u32 = app.call("keep", &entry).send()?;
    println!("the ledger has {count} secret");
    let audit: Value = app.call("audit", &json!({"name": "door"})).send()?;
    println!("the auditor says: {audit}");
    let error = app
        .call("reveal", &json!({"name": "window"}))
        .send::<String>()
        .err()
        .ok_or("there is no such secret")?;
    println!("the ledger says: {error}");

    // Nobody serves this yet, so it waits on the server's disk, sealed.
    let parked = app.call("bury", &entry).send_parked()?;
    println!("{} waits on the server's disk", parked.id());

    match App::connect("latzero://stranger?pool=vault") {
        Ok(_) => Err("an app without keys was let in".into()),
        Err(error) => {
            println!("an app without keys: {error}");
            Ok(())
        }
    }
}
