//! Answers to calls that nobody here waits for: a parked call outlives the process that made it,
//! and its answer reaches the app after it has reconnected.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::task::{Context, Poll, Waker};

use crate::error::Error;
use crate::payload::{FromPayload, Reply};
use crate::sync::{lock, set_waker};

/// How many answers wait to be read through [`App::answers`](crate::App::answers). Beyond that the
/// oldest are dropped and counted.
pub const ANSWERS_MAX: usize = 1024;

/// How many bytes of answers wait to be read through [`App::answers`](crate::App::answers). Beyond
/// that the oldest are dropped and counted; the newest is kept whatever its size.
pub const ANSWERS_BYTES_MAX: usize = 64 * 1024 * 1024;

/// The answer to a call that nobody in this process waits for; returned by
/// [`App::answers`](crate::App::answers).
#[derive(Debug, Clone)]
pub struct Answer {
    id: Box<str>,
    pool: Option<Box<str>>,
    result: Result<Reply, Error>,
    lost: u64,
}

impl Answer {
    pub(crate) fn new(id: &str, pool: Option<&str>, result: Result<Reply, Error>) -> Self {
        Answer {
            id: id.into(),
            pool: pool.map(Into::into),
            result,
            lost: 0,
        }
    }

    /// The id of the call, as it was given to [`Call::id`](crate::Call::id) or read from
    /// [`Parked::id`](crate::Parked::id).
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The pool of the call, if the server names it.
    #[must_use]
    pub fn pool(&self) -> Option<&str> {
        self.pool.as_deref()
    }

    /// The handler's answer, or why there is none: a handler's error, `timeout` if none arrived
    /// within the call's time, `cancelled`.
    ///
    /// # Errors
    /// The error with which the handler or the server ended the call.
    pub fn result(&self) -> Result<&Reply, &Error> {
        self.result.as_ref()
    }

    /// The answer as `R`.
    ///
    /// # Errors
    /// The error with which the handler or the server ended the call; `bad_message` if the answer
    /// is not an `R`.
    pub fn into<R: FromPayload>(self) -> Result<R, Error> {
        self.result.and_then(Reply::into)
    }

    /// The answer as received, with its headers.
    ///
    /// # Errors
    /// The error with which the handler or the server ended the call.
    pub fn into_reply(self) -> Result<Reply, Error> {
        self.result
    }

    /// How many answers were dropped just before this one, because they were not read.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Approximately how much memory it uses, in bytes.
    fn bytes(&self) -> usize {
        let result = match &self.result {
            Ok(reply) => reply.payload.len() + reply.headers.as_ref().map_or(0, |h| h.len()),
            Err(error) => error.message().len(),
        };
        size_of::<Answer>() + self.id.len() + result
    }
}

#[derive(Debug, Default)]
struct Inner {
    answers: VecDeque<Answer>,
    bytes: usize,
    lost: u64,
    lost_ever: u64,
    /// The number of the reader that may take answers.
    taker: u64,
    is_closed: bool,
    waker: Option<Waker>,
}

/// Answers that wait to be taken.
#[derive(Debug, Default)]
pub(crate) struct Unclaimed(Mutex<Inner>);

impl Unclaimed {
    /// Keeps an answer, and drops the oldest ones if there is no room. Returns who waits for it.
    #[must_use]
    pub(crate) fn push(&self, answer: Answer) -> Option<Waker> {
        let mut inner = lock(&self.0);
        let bytes = answer.bytes();
        while inner.answers.len() >= ANSWERS_MAX
            || (inner.bytes + bytes > ANSWERS_BYTES_MAX && !inner.answers.is_empty())
        {
            let dropped = inner.answers.pop_front();
            inner.bytes -= dropped.map_or(0, |answer| answer.bytes());
            inner.lost += 1;
            inner.lost_ever += 1;
        }
        inner.bytes += bytes;
        inner.answers.push_back(answer);
        inner.waker.take()
    }

    /// No more answers will arrive. Returns who waits for one.
    #[must_use]
    pub(crate) fn close(&self) -> Option<Waker> {
        let mut inner = lock(&self.0);
        inner.is_closed = true;
        inner.waker.take()
    }

    /// How many were dropped so far.
    pub(crate) fn lost_ever(&self) -> u64 {
        lock(&self.0).lost_ever
    }

    /// The number of the next reader; the previous reader gets no more answers.
    pub(crate) fn next_taker(&self) -> u64 {
        let (taker, before) = {
            let mut inner = lock(&self.0);
            inner.taker += 1;
            (inner.taker, inner.waker.take())
        };
        if let Some(before) = before {
            before.wake();
        }
        taker
    }

    pub(crate) fn poll_next(&self, taker: u64, cx: &mut Context<'_>) -> Poll<Option<Answer>> {
        let mut inner = lock(&self.0);
        if inner.taker != taker {
            return Poll::Ready(None);
        }
        if let Some(mut answer) = inner.answers.pop_front() {
            inner.bytes -= answer.bytes();
            answer.lost = std::mem::take(&mut inner.lost);
            return Poll::Ready(Some(answer));
        }
        if inner.is_closed {
            return Poll::Ready(None);
        }
        set_waker(&mut inner.waker, cx.waker());
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::payload::Payload;

    fn answer(n: usize, bytes: usize) -> Answer {
        let reply = Reply {
            payload: Payload::Bytes(vec![0; bytes]),
            headers: None,
            beside: None,
            epoch: 0,
        };
        Answer::new(&n.to_string(), None, Ok(reply))
    }

    fn next(unclaimed: &Unclaimed, taker: u64) -> Option<(String, u64)> {
        match unclaimed.poll_next(taker, &mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Some(answer)) => Some((answer.id().to_owned(), answer.lost())),
            _ => None,
        }
    }

    #[test]
    fn the_oldest_make_room_and_are_counted() {
        let unclaimed = Unclaimed::default();
        for n in 0..ANSWERS_MAX + 3 {
            assert!(unclaimed.push(answer(n, 1)).is_none());
        }
        let taker = unclaimed.next_taker();
        assert_eq!(next(&unclaimed, taker), Some(("3".into(), 3)));
        assert_eq!(next(&unclaimed, taker), Some(("4".into(), 0)));
        // One that is as large as all of them has the place for itself.
        let _ = unclaimed.push(answer(7777, ANSWERS_BYTES_MAX));
        let rest = ANSWERS_MAX as u64 - 2;
        assert_eq!(next(&unclaimed, taker), Some(("7777".into(), rest)));
        assert_eq!(lock(&unclaimed.0).bytes, 0);
    }

    #[test]
    fn only_the_newest_taker_gets_answers() {
        let unclaimed = Unclaimed::default();
        let (first, second) = (unclaimed.next_taker(), unclaimed.next_taker());
        let _ = unclaimed.push(answer(1, 1));
        let cx = &mut Context::from_waker(Waker::noop());
        assert!(matches!(unclaimed.poll_next(first, cx), Poll::Ready(None)));
        assert_eq!(next(&unclaimed, second), Some(("1".into(), 0)));
        assert!(unclaimed.poll_next(second, cx).is_pending());
        assert!(unclaimed.close().is_some());
        assert!(matches!(unclaimed.poll_next(second, cx), Poll::Ready(None)));
    }
}
