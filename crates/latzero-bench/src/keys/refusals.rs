//! How long the server takes to refuse a proof, by what is wrong with it: whoever measures that
//! should learn nothing.

use std::time::Instant;

use latzero::blocking::App;
use latzero_crypto::keys::Roles;
use latzero_crypto::proof::{ChannelBinding, Exchange, Joining};
use latzero_crypto::text;
use serde_json::{Value, json};

use super::{failed, key_set, keys};
use crate::failure::Failure;
use crate::report::median;
use crate::server::Running;
use crate::stream::Transport;
use crate::wire::Wire;

/// The pool, the AppID that the proof is for, and whether only its last signature is wrong.
const CAUSES: [(&str, &str, bool); 3] = [
    ("sealed", "another", false),
    ("sealed", "asker", true),
    ("missing", "asker", false),
];

/// The slowest cause of a refusal as a multiple of the fastest, each by its median.
pub(super) fn measure(is_quick: bool) -> Result<f64, Failure> {
    let server = Running::start(&[])?;
    let socket = server.address(Transport::Unix);
    let maker = App::connect(&format!("latzero://maker?socket={socket}"));
    let maker = maker.map_err(failed("connect"))?;
    let request = keys()?.pool_create("sealed", false);
    let request = request.map_err(failed("descriptor"))?;
    maker.request(&request).map_err(failed("pool_create"))?;
    let mut times = [const { Vec::new() }; CAUSES.len()];
    // In turn, so that whatever else the machine does affects all of them.
    for _ in 0..if is_quick { 3 } else { 300 } {
        for (cause, times) in CAUSES.into_iter().zip(&mut times) {
            times.push(refuse(&server, cause)?);
        }
    }
    let medians = times.map(|times| median(times).expect("there is a round"));
    let least = medians.into_iter().fold(f64::INFINITY, f64::min);
    Ok(medians.into_iter().fold(0.0, f64::max) / least)
}

/// The seconds from a wrong proof to its refusal, on a connection of its own: three refusals would
/// end it.
fn refuse(server: &Running, (pool, app, is_last): (&str, &str, bool)) -> Result<f64, Failure> {
    let asker = json!({"app_id": "asker", "pools": [], "transient": true});
    let mut wire = Wire::connect(server, Transport::Unix, asker)?;
    let asked = json!({"action": "pool_challenge", "pool": pool, "id": "c"});
    let challenge = wire.ask(&asked.to_string())?["response"].take();
    let joining = Joining {
        pool,
        pool_id: binary(&challenge["pool_id"])?,
        epoch: challenge["epoch"].as_u64().unwrap_or_default() as u32,
        suite: challenge["suite"].as_u64().unwrap_or_default() as u16,
        app_id: app,
        exchange: Exchange {
            client_nonce: [3; 32],
            server_nonce: binary(&challenge["server_nonce"])?,
            server_instance: binary(&challenge["server_instance"])?,
            binding: ChannelBinding::Unix {
                uid: rustix::process::geteuid().as_raw(),
                pid: server.pid(),
            },
        },
    };
    let proof = joining.prove(&key_set(), Roles::Write);
    let proof = proof.map_err(|error| Failure::said(format!("a proof: {error}")))?;
    let proof = serde_json::from_str::<Value>(&proof.to_json());
    let mut proof = proof.map_err(|error| Failure::said(format!("a proof: {error}")))?;
    if is_last {
        proof["sig_write"] = proof["sig_read"].clone();
    }
    let request = json!({"action": "pool_join", "pool": pool, "id": "p", "proof": proof});
    let request = request.to_string();
    let began = Instant::now();
    let reply = wire.ask(&request)?;
    let took = began.elapsed().as_secs_f64();
    match reply["error"]["code"].as_str() {
        Some("unauthenticated") => Ok(took),
        _ => Err(Failure::said(format!("a wrong proof was answered {reply}"))),
    }
}

/// Decodes a binary field of a challenge.
fn binary<const N: usize>(field: &Value) -> Result<[u8; N], Failure> {
    let bytes = field.as_str().and_then(text::decode);
    bytes.ok_or_else(|| Failure::said("the challenge lacks a field"))
}
