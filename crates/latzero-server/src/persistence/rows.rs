//! Conversion between the rows of the core and those of the store.

use latzero_fabric::rows::{AnswerRow, AppRow, BindingRow, CallRow, Death, PoolRow, StoreChange};
use latzero_protocol::{AppId, PoolName, Refusal};

/// The kind of a pool that ends with the server, but whose name is reserved.
const PASSING: &str = "passing";

pub(super) fn ms(unix_ms: i64) -> u64 {
    u64::try_from(unix_ms).unwrap_or(0)
}

fn time(unix_ms: u64) -> i64 {
    i64::try_from(unix_ms).unwrap_or(i64::MAX)
}

/// The stored time of an app that is connected. It is as long as a time, so that the row keeps its
/// size when the app connects and disconnects; times before 1970 are read as 0.
const LIVES: i64 = -(1 << 46);

fn seen(unix_ms: u64) -> i64 {
    match unix_ms {
        0 => LIVES,
        _ => time(unix_ms),
    }
}

pub(super) fn app_of(row: latzero_store::AppRow) -> Option<AppRow> {
    Some(AppRow {
        app_id: AppId::new(&row.app_id).ok()?,
        pools: row.pools,
        triggers: row.triggers,
        watches: row.watches,
        meta: row.meta,
        registered: ms(row.registered),
        last_seen: ms(row.last_seen),
    })
}

pub(super) fn binding_of(row: latzero_store::BindingRow) -> Option<BindingRow> {
    Some(BindingRow {
        app_id: AppId::new(&row.app_id).ok()?,
        uid: row.uid,
        // An invalid key matches nobody, which is safer than no key.
        key: row.public_key.map(|key| key.try_into().unwrap_or([0; 32])),
        since: ms(row.since),
    })
}

pub(super) fn pool_of(row: latzero_store::PoolRow) -> Result<PoolRow, Refusal> {
    let owner = row.owner.map(|owner| AppId::new(&owner)).transpose();
    let policy = row.policy.unwrap_or_else(|| "{}".into());
    Ok(PoolRow {
        name: PoolName::new(&row.name)?,
        // Without its owner, its policy would mean something else.
        policy: if owner.is_ok() { policy } else { String::new() },
        owner: owner.unwrap_or(None),
        properties: row.properties,
        created: ms(row.created),
        is_durable: row.kind != PASSING,
        // An encrypted pool without one must not open as a plain one.
        descriptor: row.descriptor.or_else(|| row.encrypted.then(Vec::new)),
    })
}

pub(super) fn call_of(row: latzero_store::CallRow) -> Result<CallRow, Refusal> {
    Ok(CallRow {
        number: row.number,
        pool: PoolName::new(&row.pool)?,
        process: row.process,
        destination: row.destination,
        caller: AppId::new(&row.caller)?,
        id: row.call_id,
        envelope: row.envelope,
        attachment: row.attachment,
        idempotency_key: row.idempotency_key,
        expires: ms(row.expires),
        attempt: row.attempt,
        parked: ms(row.parked),
        death: row.died.map(|at| Death {
            at: ms(at),
            cause: row.cause.unwrap_or_default(),
        }),
    })
}

pub(super) fn answer_of(row: latzero_store::AnswerRow) -> Result<AnswerRow, Refusal> {
    Ok(AnswerRow {
        number: row.number,
        pool: PoolName::new(&row.pool)?,
        process: row.process,
        caller: AppId::new(&row.caller)?,
        id: row.call_id,
        idempotency_key: row.idempotency_key,
        frame: row.frame,
        expires: ms(row.expires),
    })
}

/// A change in the form of the store.
pub(super) fn row(change: StoreChange) -> latzero_store::RowChange {
    use latzero_store::RowChange as Stored;
    match change {
        StoreChange::App(row) => Stored::PutApp(latzero_store::AppRow {
            app_id: row.app_id.as_str().into(),
            pools: row.pools,
            triggers: row.triggers,
            watches: row.watches,
            meta: row.meta,
            protocol_version: latzero_protocol::limits::PROTOCOL_VERSION
                .try_into()
                .unwrap_or(u32::MAX),
            registered: time(row.registered),
            last_seen: seen(row.last_seen),
        }),
        StoreChange::Watches(app, watches) => Stored::AppWatches {
            app_id: app.as_str().into(),
            watches,
        },
        StoreChange::Seen(app, unix_ms) => Stored::SeenApp {
            app_id: app.as_str().into(),
            last_seen: seen(unix_ms),
        },
        StoreChange::ForgetApp(app) => Stored::ForgetApp {
            app_id: app.as_str().into(),
        },
        StoreChange::Binding(row) => Stored::PutBinding(latzero_store::BindingRow {
            app_id: row.app_id.as_str().into(),
            uid: row.uid,
            public_key: row.key.map(Vec::from),
            since: time(row.since),
        }),
        StoreChange::ForgetBinding(app) => Stored::RemoveBinding {
            app_id: app.as_str().into(),
        },
        StoreChange::Descriptor(pool, epoch, descriptor) => {
            Stored::PutDescriptor(latzero_store::DescriptorRow {
                pool: pool.as_str().into(),
                epoch,
                descriptor,
            })
        }
        StoreChange::Pool(row) => Stored::PutPool(latzero_store::PoolRow {
            name: row.name.as_str().into(),
            kind: if row.is_durable { "local" } else { PASSING }.into(),
            encrypted: row.descriptor.is_some(),
            owner: row.owner.map(|owner| owner.as_str().into()),
            policy: Some(row.policy),
            properties: row.properties,
            descriptor: row.descriptor,
            created: time(row.created),
            updated: time(row.created),
        }),
        StoreChange::ForgetPool(name) => Stored::RemovePool {
            name: name.as_str().into(),
        },
        StoreChange::Call(row) => Stored::PutCall(latzero_store::CallRow {
            number: row.number,
            pool: row.pool.as_str().into(),
            process: row.process,
            destination: row.destination,
            caller: row.caller.as_str().into(),
            call_id: row.id,
            envelope: row.envelope,
            attachment: row.attachment,
            idempotency_key: row.idempotency_key,
            expires: time(row.expires),
            attempt: row.attempt,
            parked: time(row.parked),
            died: row.death.as_ref().map(|death| time(death.at)),
            cause: row.death.map(|death| death.cause),
        }),
        StoreChange::Attempt(number, attempt) => Stored::NoteAttempt { number, attempt },
        StoreChange::EndCall(number) => Stored::RemoveCall { number },
        StoreChange::EndParked(numbers) => Stored::RemoveParked { numbers },
        StoreChange::Answer(row) => Stored::PutAnswer {
            ends_call: Some(row.number),
            answer: latzero_store::AnswerRow {
                number: row.number,
                caller: row.caller.as_str().into(),
                call_id: row.id,
                pool: row.pool.as_str().into(),
                idempotency_key: row.idempotency_key,
                frame: row.frame,
                expires: time(row.expires),
                process: row.process,
            },
        },
        StoreChange::EndAnswer(number) => Stored::RemoveAnswer { number },
    }
}
