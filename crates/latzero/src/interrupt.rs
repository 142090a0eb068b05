//! Waits that can be interrupted from outside, with which a language binding checks for signals.

use std::cell::RefCell;
use std::time::{Duration, Instant};

/// Checks are at least this far apart.
const PAUSE: Duration = Duration::from_millis(20);

/// The check that ends a wait, and when it was last called.
struct Check {
    wants_end: Box<dyn FnMut() -> bool>,
    asked: Option<Instant>,
}

thread_local! {
    static CHECK: RefCell<Option<Check>> = const { RefCell::new(None) };
}

/// Runs `work`. While it waits on this thread, `wants_end` is called about every 100 ms, and after
/// a signal that interrupted the wait. Once it returns true, the wait ends early, as if its time
/// were over, and the call that it waited for is cancelled.
pub fn interruptible<T>(wants_end: impl FnMut() -> bool + 'static, work: impl FnOnce() -> T) -> T {
    struct Restore(Option<Check>);
    impl Drop for Restore {
        fn drop(&mut self) {
            CHECK.set(self.0.take());
        }
    }
    let check = Check {
        wants_end: Box::new(wants_end),
        asked: None,
    };
    let _restore = Restore(CHECK.replace(Some(check)));
    work()
}

/// Whether the wait on this thread is to end early.
pub(crate) fn is_due() -> bool {
    // Removed during the check, which may run code that waits itself.
    let Some(mut check) = CHECK.take() else {
        return false;
    };
    let now = Instant::now();
    let is_asked = check.asked.is_none_or(|asked| now - asked >= PAUSE);
    let is_due = is_asked && (check.wants_end)();
    if is_asked {
        check.asked = Some(now);
    }
    CHECK.set(Some(check));
    is_due
}

/// Whether a wait until `deadline` is over.
pub(crate) fn is_over(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| deadline <= Instant::now()) || is_due()
}
