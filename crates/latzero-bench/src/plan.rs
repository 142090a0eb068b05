//! The request to a caller process, and its result.

use crate::failure::Failure;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// How many calls a caller has in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// The next call is sent when the last one is answered; each is timed.
    OneAtATime,
    /// This many are kept in flight; calls per second are counted.
    InFlight(u64),
}

/// One run of one caller process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) load: Load,
    /// Calls before the measurement begins.
    pub(crate) warmup: u64,
    /// Calls measured.
    pub(crate) calls: u64,
}

/// The result of one run of a caller. The caller process sends it as one line of JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Calls sent, including the warm-up.
    pub(crate) asked: u64,
    /// Calls with the expected answer.
    pub(crate) answered: u64,
    /// Calls within the measurement.
    pub(crate) measured: u64,
    /// The total time of the measured calls, in nanoseconds.
    pub(crate) elapsed_ns: u64,
    /// Present if each call was timed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) latency: Option<Latency>,
}

/// The time of single calls, in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Latency {
    pub(crate) p50_ns: u64,
    pub(crate) p99_ns: u64,
    pub(crate) mean_ns: f64,
    pub(crate) max_ns: u64,
}

impl Outcome {
    pub(crate) fn calls_per_second(&self) -> f64 {
        self.measured as f64 / Duration::from_nanos(self.elapsed_ns.max(1)).as_secs_f64()
    }
}

/// Times calls made one at a time.
pub(crate) struct LatencyClock {
    plan: Plan,
    answered: u64,
    histogram: Histogram<u64>,
    elapsed: Duration,
}

impl LatencyClock {
    pub(crate) fn new(plan: &Plan) -> Self {
        // A minute is longer than any caller's timeout; longer times count as a minute.
        let histogram = Histogram::new_with_bounds(1, 60_000_000_000, 3)
            .expect("the bounds are far apart and three significant digits are few enough");
        Self {
            plan: *plan,
            answered: 0,
            histogram,
            elapsed: Duration::ZERO,
        }
    }

    /// Whether there are more calls to make.
    pub(crate) fn wants_call(&self) -> bool {
        self.answered < self.plan.warmup + self.plan.calls
    }

    /// Records a call that was answered after `took`.
    pub(crate) fn answered(&mut self, took: Duration) {
        self.answered += 1;
        if self.answered > self.plan.warmup {
            self.elapsed += took;
            self.histogram.saturating_record(nanos(took));
        }
    }

    pub(crate) fn outcome(self) -> Outcome {
        Outcome {
            asked: self.answered,
            answered: self.answered,
            measured: self.histogram.len(),
            elapsed_ns: nanos(self.elapsed),
            latency: Some(Latency {
                p50_ns: self.histogram.value_at_quantile(0.50),
                p99_ns: self.histogram.value_at_quantile(0.99),
                mean_ns: self.histogram.mean(),
                max_ns: self.histogram.max(),
            }),
        }
    }
}

/// Times each call of `plan`, made by `call`.
pub(crate) fn time_each(
    plan: &Plan,
    mut call: impl FnMut() -> Result<(), Failure>,
) -> Result<Outcome, Failure> {
    let mut clock = LatencyClock::new(plan);
    while clock.wants_call() {
        let begin = Instant::now();
        call()?;
        clock.answered(begin.elapsed());
    }
    Ok(clock.outcome())
}

/// Counts calls per second while a window of calls is kept full.
///
/// The time is measured from the answer that ends the warm-up to the one that completes the calls.
/// Sending continues after that, so the window stays full during the whole measurement; at the end
/// every call sent must be answered.
pub(crate) struct RateClock {
    plan: Plan,
    window: u64,
    asked: u64,
    answered: u64,
    begin: Option<(Instant, u64)>,
    measured: Option<(Duration, u64)>,
}

impl RateClock {
    pub(crate) fn new(plan: &Plan, window: u64) -> Self {
        Self {
            plan: *plan,
            window,
            asked: 0,
            answered: 0,
            begin: None,
            measured: None,
        }
    }

    /// How many calls must be sent now to fill the window; they count as sent.
    pub(crate) fn ask(&mut self) -> u64 {
        let room = self.window - (self.asked - self.answered);
        let count = room.min(self.total() - self.asked);
        self.asked += count;
        count
    }

    /// Records `count` more answers.
    pub(crate) fn answered(&mut self, count: u64) {
        self.answered += count;
        match (self.begin, self.measured) {
            (None, _) if self.answered >= self.plan.warmup => {
                self.begin = Some((Instant::now(), self.answered));
            }
            (Some((begin, first)), None) if self.answered >= first + self.plan.calls => {
                self.measured = Some((begin.elapsed(), self.answered - first));
            }
            _ => {}
        }
    }

    /// Whether every call of the plan has been answered.
    pub(crate) fn is_over(&self) -> bool {
        self.answered == self.total()
    }

    pub(crate) fn outcome(&self) -> Outcome {
        let (elapsed, measured) = self.measured.unwrap_or_default();
        Outcome {
            asked: self.asked,
            answered: self.answered,
            measured,
            elapsed_ns: nanos(elapsed),
            latency: None,
        }
    }

    /// Answers arrive in batches of at most one window: one may exceed the warm-up, one the
    /// measured calls.
    fn total(&self) -> u64 {
        self.plan.warmup + self.plan.calls + 2 * self.window
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_stays_full_until_the_measured_calls_are_answered() {
        for batch in [1, 3, 8] {
            let plan = Plan {
                load: Load::InFlight(8),
                warmup: 10,
                calls: 100,
            };
            let mut clock = RateClock::new(&plan, 8);
            let mut unanswered = clock.ask();
            while !clock.is_over() {
                if clock.measured.is_none() {
                    assert_eq!(unanswered, 8, "batches of {batch}");
                }
                let count = batch.min(unanswered);
                clock.answered(count);
                unanswered = unanswered - count + clock.ask();
            }
            let outcome = clock.outcome();
            assert_eq!((outcome.asked, outcome.answered), (126, 126));
            assert!((100..100 + batch).contains(&outcome.measured));
        }
    }

    #[test]
    fn the_warm_up_is_not_in_the_figures() {
        let plan = Plan {
            load: Load::OneAtATime,
            warmup: 2,
            calls: 3,
        };
        let mut clock = LatencyClock::new(&plan);
        for micros in [9_000, 9_000, 10, 20, 30] {
            assert!(clock.wants_call());
            clock.answered(Duration::from_micros(micros));
        }
        assert!(!clock.wants_call());
        let outcome = clock.outcome();
        assert_eq!(
            (outcome.answered, outcome.measured, outcome.elapsed_ns),
            (5, 3, 60_000)
        );
        let Latency {
            p50_ns,
            p99_ns,
            mean_ns,
            max_ns,
        } = outcome.latency.unwrap();
        assert_eq!([p50_ns, p99_ns, max_ns].map(|ns| ns / 100), [200, 300, 300]);
        assert!((19_900.0..20_100.0).contains(&mean_ns), "{mean_ns}");
    }
}
