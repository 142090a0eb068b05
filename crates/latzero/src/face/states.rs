//! Reading the changes of an app's connection.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use crate::drive::core::Core;
use crate::drive::states::{State, Unread};
use crate::sync::{lock, set_waker};

/// The changes of an app's connection from now on, ending with [`State::Displaced`] or
/// [`State::Closed`]; returned by [`App::states`](crate::App::states). It does not keep the app
/// open.
#[derive(Debug)]
pub struct States {
    pub(crate) core: Arc<Core>,
    unread: Arc<Mutex<Unread>>,
    is_over: bool,
}

impl States {
    pub(crate) fn new(core: &Arc<Core>) -> Self {
        States {
            unread: lock(&core.followers).follow(),
            core: core.clone(),
            is_over: false,
        }
    }

    /// The next change; `None` after the last one.
    pub async fn next(&mut self) -> Option<State> {
        std::future::poll_fn(|cx| self.poll_next_state(cx)).await
    }

    /// Like [`futures_core::Stream::poll_next`], without the pin.
    pub fn poll_next_state(&mut self, cx: &mut Context<'_>) -> Poll<Option<State>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let mut unread = lock(&self.unread);
        if let Some(state) = unread.states.pop_front() {
            self.is_over = state.is_final();
            return Poll::Ready(Some(state));
        }
        set_waker(&mut unread.waker, cx.waker());
        Poll::Pending
    }
}

impl futures_core::Stream for States {
    type Item = State;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<State>> {
        self.poll_next_state(cx)
    }
}
