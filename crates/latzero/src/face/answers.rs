//! Reading the answers to calls that nobody here waits for.

use std::pin::Pin;
use std::task::{Context, Poll};

use crate::drive::answers::Answer;
use crate::face::app::App;

/// Answers to calls that nobody here waits for, as they arrive, until the app is closed; returned
/// by [`App::answers`]. Answers that were not read when it is dropped wait for the next reader.
#[derive(Debug)]
pub struct Answers {
    pub(crate) app: App,
    taker: u64,
}

impl Answers {
    pub(crate) fn new(app: &App) -> Self {
        Answers {
            taker: app.core().answers.next_taker(),
            app: app.clone(),
        }
    }

    /// The next answer; `None` after the app was closed, or [`App::answers`] was called again.
    pub async fn next(&mut self) -> Option<Answer> {
        std::future::poll_fn(|cx| self.poll_next_answer(cx)).await
    }

    /// Like [`futures_core::Stream::poll_next`], without the pin.
    pub fn poll_next_answer(&mut self, cx: &mut Context<'_>) -> Poll<Option<Answer>> {
        self.app.core().answers.poll_next(self.taker, cx)
    }
}

impl futures_core::Stream for Answers {
    type Item = Answer;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Answer>> {
        self.poll_next_answer(cx)
    }
}
