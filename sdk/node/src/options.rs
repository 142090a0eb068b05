//! Options, as `lib/` passes them: one JSON text.

use std::collections::BTreeMap;
use std::time::Duration;

use latzero::{Call, Emit, InstanceId, Strategy};
use napi::Result;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::errors::misuse;

pub(crate) fn read<T: DeserializeOwned>(json: &str) -> Result<T> {
    serde_json::from_str(json).map_err(|e| {
        let text = e.to_string();
        let place = text.rfind(" at line ").unwrap_or(text.len());
        misuse(format!("options: {}", &text[..place]))
    })
}

/// A time in milliseconds.
pub(crate) fn time(milliseconds: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(milliseconds / 1000.0).map_err(|_| {
        misuse(format!(
            "a time is a number of milliseconds from 0 on, not {milliseconds}"
        ))
    })
}

/// How an app connects.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub(crate) struct Connect {
    pools: Vec<String>,
    exclusive: bool,
    takeover: bool,
    rehydrate: bool,
    transient: bool,
    meta: Option<Value>,
    reconnect: bool,
    connect_timeout_ms: f64,
    call_timeout_ms: f64,
}

impl Default for Connect {
    fn default() -> Self {
        Connect {
            pools: Vec::new(),
            exclusive: false,
            takeover: false,
            rehydrate: false,
            transient: false,
            meta: None,
            reconnect: true,
            connect_timeout_ms: 5_000.0,
            call_timeout_ms: 30_000.0,
        }
    }
}

impl Connect {
    pub(crate) fn builder(self, url: &str) -> Result<latzero::Builder> {
        let builder = latzero::App::builder(url)
            .exclusive(self.exclusive)
            .takeover(self.takeover)
            .rehydrate(self.rehydrate)
            .transient(self.transient)
            .pools(self.pools)
            .connect_timeout(time(self.connect_timeout_ms)?)
            .call_timeout(time(self.call_timeout_ms)?)
            .reconnect(latzero::Reconnect {
                enabled: self.reconnect,
                ..latzero::Reconnect::default()
            });
        Ok(match self.meta {
            Some(meta) => builder.meta(meta),
            None => builder,
        })
    }
}

/// An app, or one instance of it.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum To {
    App(String),
    #[serde(rename_all = "camelCase")]
    Instance {
        app_id: String,
        instance: String,
    },
}

/// The options of a call or an emit.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub(crate) struct Send {
    timeout_ms: Option<f64>,
    to: Option<To>,
    pool: Option<String>,
    key: Option<String>,
    headers: BTreeMap<String, String>,
    idempotency_key: Option<String>,
    redeliver: bool,
    privileged: bool,
    attempts: Option<u32>,
    id: Option<String>,
    pub(crate) window: Option<u64>,
    pub(crate) one: bool,
    pub(crate) count: bool,
}

fn instance_id(text: &str) -> Result<InstanceId> {
    InstanceId::parse(text).ok_or_else(|| misuse(format!("'{text}' is no id of an instance")))
}

/// What calls and emits have in common: they are of two types.
macro_rules! address {
    ($sending:ident, $options:ident) => {
        match &$options.to {
            None => {}
            Some(To::App(app_id)) => $sending = $sending.to(app_id),
            Some(To::Instance { app_id, instance }) => {
                $sending = $sending.to_instance(app_id, instance_id(instance)?);
            }
        }
        if let Some(pool) = &$options.pool {
            $sending = $sending.pool(pool);
        }
        if let Some(key) = &$options.key {
            $sending = $sending.key(key);
        }
        for (name, value) in &$options.headers {
            $sending = $sending.header(name, value);
        }
        if $options.privileged {
            $sending = $sending.privileged();
        }
    };
}

impl Send {
    pub(crate) fn call(&self, mut call: Call) -> Result<Call> {
        address!(call, self);
        if let Some(timeout) = self.timeout_ms {
            call = call.timeout(time(timeout)?);
        }
        if let Some(key) = &self.idempotency_key {
            call = call.idempotency_key(key);
        }
        if self.redeliver {
            call = call.redeliver();
        }
        if let Some(attempts) = self.attempts {
            call = call.attempts(attempts);
        }
        if let Some(id) = &self.id {
            call = call.id(id);
        }
        Ok(call)
    }

    pub(crate) fn emit(&self, mut emit: Emit) -> Result<Emit> {
        address!(emit, self);
        Ok(if self.one { emit.one() } else { emit })
    }
}

/// How a trigger is served.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub(crate) struct Serve {
    pools: Option<Vec<String>>,
    strategy: Option<String>,
    concurrency: Option<u32>,
    doc: Option<String>,
    schema: Option<Value>,
    privileged: bool,
}

impl Serve {
    pub(crate) fn handler(self, mut handler: latzero::Handler) -> Result<latzero::Handler> {
        if let Some(strategy) = self.strategy {
            let known = Strategy::parse(&strategy)
                .ok_or_else(|| misuse(format!("there is no strategy '{strategy}'")))?;
            handler = handler.strategy(known);
        }
        if let Some(concurrency) = self.concurrency {
            handler = handler.concurrency(concurrency);
        }
        if let Some(doc) = self.doc {
            handler = handler.doc(&doc);
        }
        if let Some(schema) = self.schema {
            handler = handler.schema(schema);
        }
        if let Some(pools) = self.pools {
            handler = handler.pools(pools);
        }
        if self.privileged {
            handler = handler.privileged();
        }
        Ok(handler)
    }
}
