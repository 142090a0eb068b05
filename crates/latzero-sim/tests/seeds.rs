//! A seed replays to the same bytes, and no check fails.

use latzero_sim::{Plan, run};

#[test]
fn a_seed_replays_to_the_same_bytes() {
    for plan in [Plan::new, Plan::lasting, Plan::hostile] {
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
