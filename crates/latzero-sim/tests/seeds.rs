//! A seed replays to the same bytes, and no check fails.

use latzero_sim::{Plan, run};

#[test]
fn a_seed_replays_to_the_same_bytes() {
    for plan in [Plan::new, Plan::durable, Plan::hostile, Plan::vault] {
        for seed in 0..4 {
            let first = run(&plan(seed)).unwrap();
            assert_eq!(first, run(&plan(seed)).unwrap());
            assert_ne!(first.hash, run(&plan(seed + 100)).unwrap().hash);
        }
    }
}

#[test]
fn runs_reach_the_intended_states() {
    let totals: Vec<_> = (0..12)
        .map(|seed| run(&Plan::new(seed)).unwrap().totals)
        .collect();
    let sum = |of: fn(&latzero_sim::Totals) -> u64| totals.iter().map(of).sum::<u64>();
    assert!(sum(|t| t.calls_started) > 1000);
    assert!(sum(|t| t.timeouts) > 100);
    assert!(sum(|t| t.lost) > 100);
    assert!(sum(|t| t.overflowed) > 0);
    assert!(
        totals
            .iter()
            .fold([0; 6], |sum, t| std::array::from_fn(
                |k| sum[k] + t.counts[k]
            ))
            .iter()
            .all(|&n| n > 0)
    );
}

#[test]
fn runs_with_an_encrypted_pool_reach_what_they_are_meant_to_reach() {
    let mut sum = std::collections::BTreeMap::new();
    for seed in 0..12 {
        for (what, count) in run(&Plan::vault(seed)).unwrap().reached {
            *sum.entry(what).or_insert(0) += count;
        }
    }
    for what in [
        "proved",
        "refused",
        "rehydrated",
        "rotations",
        "dropped",
        "calls",
        "emits",
        "answers",
    ] {
        assert!(
            sum.get(what).is_some_and(|count| *count > 10),
            "{what}: {sum:?}"
        );
    }
}
