//! Changes in any order have the same result as plain maps, durable or eventual, grouped or not,
//! and whether the store is closed or dropped.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;

use common::{TIMEOUT, answer, app, call, options, set};
use latzero_store::{AnswerRow, AppRow, CallRow, Faults, Lasts, Options, RowChange, open};
use proptest::prelude::*;

#[derive(Debug, Default)]
struct Model {
    apps: BTreeMap<String, AppRow>,
    calls: BTreeMap<u64, CallRow>,
    answers: BTreeMap<u64, AnswerRow>,
    settings: BTreeMap<String, String>,
}

impl Model {
    fn apply(&mut self, change: &RowChange) {
        match change {
            RowChange::PutApp(row) => drop(self.apps.insert(row.app_id.clone(), row.clone())),
            RowChange::SeenApp { app_id, last_seen } => {
                if let Some(row) = self.apps.get_mut(app_id) {
                    row.last_seen = *last_seen;
                }
            }
            RowChange::ForgetApp { app_id } => drop(self.apps.remove(app_id)),
            RowChange::PutCall(row) => drop(self.calls.insert(row.number, row.clone())),
            RowChange::NoteAttempt { number, attempt } => {
                if let Some(row) = self.calls.get_mut(number) {
                    row.attempt = *attempt;
                }
            }
            RowChange::RemoveCall { number } => drop(self.calls.remove(number)),
            RowChange::RemoveParked { numbers } => {
                self.calls.retain(|number, _| !numbers.contains(number));
                self.answers.retain(|number, _| !numbers.contains(number));
            }
            RowChange::RemovePool { name } => {
                self.calls.retain(|_, row| row.pool != *name);
                self.answers.retain(|_, row| row.pool != *name);
            }
            RowChange::PutAnswer { answer, ends_call } => {
                self.answers.insert(answer.number, answer.clone());
                ends_call.map(|number| self.calls.remove(&number));
            }
            RowChange::RemoveAnswer { number } => drop(self.answers.remove(number)),
            RowChange::PutSetting { key, value } => {
                self.settings.insert(key.clone(), value.clone());
            }
            other => panic!("{other:?} is not in the script"),
        }
    }
}

fn pool(number: u64) -> String {
    format!("pool-{}", number % 2)
}

fn change() -> impl Strategy<Value = RowChange> {
    let name = || (0..3_u8).prop_map(|n| format!("app-{n}"));
    let number = || 0..4_u64;
    prop_oneof![
        (name(), 0..9_i64).prop_map(|(name, seen)| {
            let mut row = app(&name);
            row.last_seen = seen;
            RowChange::PutApp(row)
        }),
        (name(), 0..9_i64).prop_map(|(app_id, last_seen)| RowChange::SeenApp { app_id, last_seen }),
        name().prop_map(|app_id| RowChange::ForgetApp { app_id }),
        number().prop_map(|number| {
            let mut row = call(number);
            row.pool = pool(number);
            RowChange::PutCall(row)
        }),
        proptest::collection::vec(number(), 0..3)
            .prop_map(|numbers| RowChange::RemoveParked { numbers }),
        number().prop_map(|number| RowChange::RemovePool { name: pool(number) }),
        (number(), 0..9_u32)
            .prop_map(|(number, attempt)| RowChange::NoteAttempt { number, attempt }),
        number().prop_map(|number| RowChange::RemoveCall { number }),
        (number(), proptest::option::of(number())).prop_map(|(number, ends_call)| {
            let mut answer = answer(number);
            answer.pool = pool(number);
            RowChange::PutAnswer { answer, ends_call }
        }),
        number().prop_map(|number| RowChange::RemoveAnswer { number }),
        (name(), 0..9_u8).prop_map(|(key, value)| set(&key, &value.to_string())),
    ]
}

#[derive(Debug, Clone, Copy)]
enum How {
    Promised,
    Eventual,
}

fn how() -> impl Strategy<Value = How> {
    prop_oneof![Just(How::Promised), Just(How::Eventual)]
}

fn run(script: &[(RowChange, How)], group_max: usize, fails_at: Option<u64>) {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path(), options().0).unwrap());
    let (options, _told) = options();
    let options = Options {
        group_max,
        faults: fails_at.map_or(Faults::none(), |at| Faults::at(at, Lasts::Once)),
        ..options
    };
    let mut model = Model::default();
    let store = open(dir.path(), options).unwrap().store;
    for (ticket, (change, how)) in (0..).zip(script) {
        model.apply(change);
        let ticket = matches!(how, How::Promised).then_some(ticket);
        store.submit(change.clone(), ticket).unwrap();
    }
    assert!(store.wait_settled(TIMEOUT));
    drop(store);
    let kept = open(dir.path(), common::options().0).unwrap().contents;
    let mut apps = kept.apps;
    apps.sort_by(|a, b| a.app_id.cmp(&b.app_id));
    assert_eq!(apps, model.apps.into_values().collect::<Vec<_>>());
    assert_eq!(kept.calls, model.calls.into_values().collect::<Vec<_>>());
    assert_eq!(
        kept.answers,
        model.answers.into_values().collect::<Vec<_>>()
    );
    assert_eq!(
        kept.settings,
        model.settings.into_iter().collect::<Vec<_>>()
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn any_script_matches_the_model(
        script in proptest::collection::vec((change(), how()), 0..40),
        group_max in 1..6_usize,
    ) {
        run(&script, group_max, None);
    }

    /// Without durable changes, a failure loses nothing either: the newest state of each row is
    /// finally stored.
    #[test]
    fn eventual_changes_match_the_model_after_disk_errors(
        script in proptest::collection::vec(change(), 0..40),
        group_max in 1..6_usize,
        fails_at in 1..60_u64,
    ) {
        let script: Vec<_> = script.into_iter().map(|change| (change, How::Eventual)).collect();
        run(&script, group_max, Some(fails_at));
    }
}
