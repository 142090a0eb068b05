//! A minimal executor for the client's futures on this thread: one at a time, or several together.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a future on this thread.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut cx = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut cx) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

/// The slots whose future is ready to be polled.
#[derive(Default)]
struct Ready {
    slots: Mutex<Vec<usize>>,
    signal: Condvar,
}

struct SlotWaker {
    slot: usize,
    ready: Arc<Ready>,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        let mut slots = self
            .ready
            .slots
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        slots.push(self.slot);
        drop(slots);
        self.ready.signal.notify_one();
    }
}

/// Runs the futures that `next` returns until it returns none, `side_by_side` at a time, and passes
/// each result to `done`.
pub(crate) fn run_many<F: Future>(
    side_by_side: usize,
    mut next: impl FnMut() -> Option<F>,
    mut done: impl FnMut(F::Output),
) {
    let ready = Arc::new(Ready::default());
    let mut slots: Vec<(Option<Pin<Box<F>>>, Waker)> = Vec::new();
    let mut running = 0;
    for slot in 0..side_by_side {
        let Some(future) = next() else { break };
        let waker = Waker::from(Arc::new(SlotWaker {
            slot,
            ready: Arc::clone(&ready),
        }));
        slots.push((Some(Box::pin(future)), waker.clone()));
        running += 1;
        waker.wake();
    }
    let mut turn = Vec::new();
    while running > 0 {
        let mut queue = ready.slots.lock().unwrap_or_else(PoisonError::into_inner);
        while queue.is_empty() {
            queue = ready
                .signal
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::swap(&mut turn, &mut *queue);
        drop(queue);
        for slot in turn.drain(..) {
            let (place, waker) = &mut slots[slot];
            // A future that is ready at once is replaced by the next one, which has not been woken
            // yet.
            while let Some(future) = place {
                let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(waker))
                else {
                    break;
                };
                done(output);
                *place = next().map(Box::pin);
                running -= usize::from(place.is_none());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_futures_run_side_by_side() {
        let mut left = 0..100;
        let mut sum = 0;
        let make = || {
            let n = left.next()?;
            let mut has_waited = false;
            Some(std::future::poll_fn(move |cx| {
                if std::mem::replace(&mut has_waited, n % 2 == 0) || n % 2 == 1 {
                    return Poll::Ready(n);
                }
                cx.waker().wake_by_ref();
                Poll::Pending
            }))
        };
        run_many(7, make, |n| sum += n);
        assert_eq!(sum, 4950);
        assert_eq!(block_on(std::future::ready(5)), 5);
    }
}
