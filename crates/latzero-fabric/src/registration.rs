//! The last registration of an app, restored when it reconnects with only its AppID.

use latzero_protocol::message::{EventSet, TriggerSpec, triggers};
use latzero_protocol::{AppId, BlockId, PoolName, Raw};
use serde_json::{Value, json};

use crate::rows::AppRow;

/// What an app last registered.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Registration {
    pub(crate) pools: Vec<PoolName>,
    pub(crate) triggers: Vec<TriggerSpec>,
    pub(crate) watches: Vec<(PoolName, EventSet)>,
    /// Blocks that it subscribed to.
    pub(crate) subscriptions: Vec<(PoolName, BlockId)>,
    /// Its triggers in each encrypted pool, as connections that proved the pool registered them.
    /// Others change only `triggers`.
    pub(crate) sealed: Vec<(PoolName, Vec<TriggerSpec>)>,
    pub(crate) meta: Option<Value>,
}

/// A registration, parsed when it is first needed: a server that starts with a hundred thousand
/// apps need not parse them all before it listens.
#[derive(Debug, Clone)]
pub(crate) enum Remembered {
    Read(Registration),
    Text(Box<AppRow>),
}

impl Remembered {
    /// The registration, parsed again if the parsed form was not kept.
    pub(crate) fn get(&self) -> std::borrow::Cow<'_, Registration> {
        match self {
            Remembered::Read(registration) => std::borrow::Cow::Borrowed(registration),
            Remembered::Text(row) => std::borrow::Cow::Owned(Registration::read(row)),
        }
    }

    /// About how many bytes of memory it takes.
    pub(crate) fn bytes(&self) -> u64 {
        let text = match self {
            Remembered::Read(registration) => registration.bytes(),
            Remembered::Text(row) => {
                let meta = row.meta.as_deref().map_or(0, str::len);
                row.pools.len() + row.triggers.len() + row.watches.len() + meta
            }
        };
        (text + APP_BYTES) as u64
    }

    /// The registration, parsed and kept.
    pub(crate) fn get_mut(&mut self) -> &mut Registration {
        if let Remembered::Text(row) = self {
            *self = Remembered::Read(Registration::read(row));
        }
        match self {
            Remembered::Read(registration) => registration,
            Remembered::Text(_) => unreachable!("read just now"),
        }
    }
}

/// About how many bytes of memory a value takes, which may be many times its text: each number is
/// as large as an empty list, and each field of an object has a text of its own.
pub(crate) fn json_bytes(value: &Value) -> usize {
    let inner = match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        Value::String(text) => text.len() + 16,
        Value::Array(items) => 16 + items.iter().map(json_bytes).sum::<usize>(),
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| name.len() + 72 + json_bytes(value))
            .sum(),
    };
    size_of::<Value>() + inner
}

/// Bytes that an app takes in addition to its registration.
const APP_BYTES: usize = 768;

/// Bytes that each name of a registration takes in addition to its text, and each pool, and each
/// trigger of a live instance in a pool.
const NAME_BYTES: usize = 96;
const SERVED_BYTES: u64 = 400;
const MEMBER_BYTES: u64 = 512;

impl Registration {
    /// About how many bytes of memory it takes.
    fn bytes(&self) -> usize {
        let name = |text: &str| text.len() + NAME_BYTES;
        let pools = |pools: &[PoolName]| pools.iter().map(|p| name(p.as_str())).sum::<usize>();
        let trigger = |spec: &TriggerSpec| {
            name(spec.name.as_str())
                + spec.doc.as_ref().map_or(0, String::len)
                + spec.schema.as_ref().map_or(0, |schema| schema.len())
                + spec.pools.as_deref().map_or(0, pools)
        };
        let blocks = self.subscriptions.iter();
        let meta = self.meta.as_ref().map_or(0, json_bytes);
        pools(&self.pools)
            + self.triggers.iter().map(trigger).sum::<usize>()
            + self
                .sealed
                .iter()
                .map(|(pool, specs)| name(pool.as_str()) + specs.iter().map(trigger).sum::<usize>())
                .sum::<usize>()
            + blocks
                .map(|(pool, block)| name(pool.as_str()) + name(block.as_str()))
                .sum::<usize>()
            + self.watches.len() * NAME_BYTES
            + meta
    }

    /// The number of its handlers: the sum of its triggers over the pools that they are served in.
    pub(crate) fn served(&self) -> usize {
        let everywhere = self.triggers.iter().filter(|spec| spec.pools.is_none());
        let named = self.triggers.iter().filter_map(|spec| spec.pools.as_ref());
        let sealed = self.sealed.iter().map(|(_, specs)| specs.len());
        // Each encrypted pool of `sealed` is also one of `pools`.
        let others = self.pools.len().saturating_sub(self.sealed.len());
        everywhere.count() * others + named.map(Vec::len).sum::<usize>() + sealed.sum::<usize>()
    }

    /// Its triggers in an encrypted pool.
    pub(crate) fn sealed_in(&self, pool: &PoolName) -> Option<&[TriggerSpec]> {
        let mut sealed = self.sealed.iter();
        sealed.find_map(|(name, specs)| (name == pool).then_some(&specs[..]))
    }

    /// A trigger with the schema that it was registered with.
    pub(crate) fn with_schema(&self, spec: &TriggerSpec) -> TriggerSpec {
        let sealed = self.sealed.iter().flat_map(|(_, specs)| specs);
        let mut known = self.triggers.iter().chain(sealed);
        let known = known.find(|known| known.name == spec.name && known.is_same(spec));
        TriggerSpec {
            schema: known.and_then(|known| known.schema.clone()),
            ..spec.clone()
        }
    }

    /// About how many bytes a live instance takes in the pools.
    pub(crate) fn live(&self) -> u64 {
        self.served() as u64 * SERVED_BYTES + self.pools.len() as u64 * MEMBER_BYTES
    }

    /// Reads a row and ignores invalid parts. The next registration of the app repairs it.
    fn read(row: &AppRow) -> Registration {
        let list = |text: &str| match serde_json::from_str(text) {
            Ok(Value::Array(list)) => list,
            _ => Vec::new(),
        };
        let pool = |value: &Value| PoolName::new(value.as_str()?).ok();
        let events: Value = serde_json::from_str(&row.watches).unwrap_or_default();
        let pairs = |name: &str| events[name].as_array().cloned().unwrap_or_default();
        let watch = |pair: &Value| {
            let names = pair[1].as_array()?;
            let events = EventSet::of(names.iter().filter_map(Value::as_str));
            Some((pool(&pair[0])?, events))
        };
        let subscription =
            |pair: &Value| Some((pool(&pair[0])?, BlockId::new(pair[1].as_str()?).ok()?));
        let sealed = |pair: &Value| {
            let specs = triggers(Raw::new(pair[1].as_str()?).ok()?).ok()?;
            Some((pool(&pair[0])?, specs))
        };
        Registration {
            pools: list(&row.pools).iter().filter_map(pool).collect(),
            triggers: Raw::new(&row.triggers)
                .ok()
                .and_then(|raw| triggers(raw).ok())
                .unwrap_or_default(),
            watches: pairs("events").iter().filter_map(watch).collect(),
            subscriptions: pairs("blocks").iter().filter_map(subscription).collect(),
            sealed: pairs("triggers").iter().filter_map(sealed).collect(),
            meta: row
                .meta
                .as_deref()
                .and_then(|meta| serde_json::from_str(meta).ok()),
        }
    }

    /// What the app watches, subscribes to and serves in encrypted pools, in the form of its row.
    pub(crate) fn watches_json(&self) -> String {
        let events: Vec<_> = self
            .watches
            .iter()
            .map(|(pool, events)| json!([pool, events.names()]))
            .collect();
        let mut json = json!({"events": events, "blocks": self.subscriptions});
        if !self.sealed.is_empty() {
            let sealed = self.sealed.iter();
            // As text, because schemas stay as they were registered.
            json["triggers"] = sealed
                .map(|(pool, specs)| json!([pool, text_of(specs)]))
                .collect();
        }
        json.to_string()
    }

    /// The row of an app with this registration.
    pub(crate) fn row(&self, app_id: &AppId, registered: u64, last_seen: u64) -> AppRow {
        AppRow {
            app_id: app_id.clone(),
            pools: json!(self.pools).to_string(),
            triggers: text_of(&self.triggers),
            watches: self.watches_json(),
            meta: self.meta.as_ref().map(Value::to_string),
            registered,
            last_seen,
        }
    }
}

/// Triggers as the text of a list.
fn text_of(triggers: &[TriggerSpec]) -> String {
    let triggers: Vec<String> = triggers.iter().map(TriggerSpec::to_text).collect();
    format!("[{}]", triggers.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_round_trips() {
        let pool = |name: &str| PoolName::new(name).unwrap();
        let triggers = triggers(
            Raw::new(r#"["t",{"name":"u","pools":["p"],"strategy":"sticky","concurrency":0,"doc":"d\"q","schema":{"b":1, "a":[1]}}]"#)
                .unwrap(),
        );
        let registration = Registration {
            pools: vec![pool("p"), pool("q")],
            sealed: vec![(pool("q"), triggers.clone().unwrap())],
            triggers: triggers.unwrap(),
            watches: vec![(
                pool("p"),
                EventSet::of(["app_online", "pool_removed"].into_iter()),
            )],
            subscriptions: vec![(pool("q"), BlockId::new("b").unwrap())],
            meta: Some(json!({"v": 1})),
        };
        let row = registration.row(&AppId::new("a").unwrap(), 5, 0);
        assert_eq!(Registration::read(&row), registration);
        let mut remembered = Remembered::Text(Box::new(row));
        assert_eq!(*remembered.get(), registration);
        assert_eq!(*remembered.get_mut(), registration);
    }

    #[test]
    fn invalid_rows_are_skipped() {
        let row = AppRow {
            app_id: AppId::new("a").unwrap(),
            pools: r#"["p", 7, "no good", "q"]"#.into(),
            triggers: "[7]".into(),
            watches: "{".into(),
            meta: Some("nonsense".into()),
            registered: 0,
            last_seen: 0,
        };
        let registration = Registration::read(&row);
        assert_eq!(json!(registration.pools).to_string(), r#"["p","q"]"#);
        assert_eq!(registration.triggers, []);
        assert_eq!((registration.watches.len(), registration.meta), (0, None));
    }
}
