//! Driving an app from the program's own event loop: one descriptor to watch, and one function to
//! call when it is readable.
//!
//! The descriptor is an epoll set with the socket and an event descriptor in it. So it stays the
//! same when the app reconnects, and the loop need not know whether the app waits to read, to write
//! or for something that another thread did.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};
use std::time::Instant;

use latzero_protocol::{Code, Ran};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};

use crate::drive::core::{Core, TICK};
use crate::drive::handlers::HandlerJob;
use crate::error::Error;
use crate::wire::input::Received;
use crate::wire::link::Link;

/// How many reads are made in one turn before other parts of the program run.
const READS_MAX: usize = 16;

/// Makes the descriptor readable.
#[derive(Debug)]
struct Bell {
    fd: OwnedFd,
    /// Whether it is readable, or about to be.
    is_rung: AtomicBool,
}

impl Bell {
    fn ring(&self) {
        if !self.is_rung.swap(true, Ordering::AcqRel) {
            // A full counter is readable already.
            let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
        }
    }

    fn clear(&self) {
        // If nothing can be read, another thread is between the two steps of `ring`: the next turn
        // clears it.
        if self.is_rung.load(Ordering::Acquire) && rustix::io::read(&self.fd, &mut [0; 8]).is_ok() {
            self.is_rung.swap(false, Ordering::AcqRel);
        }
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ring();
    }
}

/// Drives an app from an event loop of the program; returned by
/// [`Builder::connect_driven`](crate::Builder::connect_driven).
///
/// The loop watches the descriptor of [`Driver::as_fd`] for reading, and calls [`Driver::turn`]
/// when it is readable and at [`Driver::next_deadline`]. Handlers run in `turn`, so they must not
/// block. Other threads may wait for calls of the app, but the thread of the loop must not, because
/// nobody else reads. If the driver is dropped before the app has ended, a thread drives it on.
#[derive(Debug)]
pub struct Driver {
    core: Arc<Core>,
    set: OwnedFd,
    bell: Arc<Bell>,
    /// The connection in the set, and for what it is watched.
    watched: Option<(Arc<Link>, EventFlags)>,
    jobs: Vec<HandlerJob>,
    tick: Option<Instant>,
}

impl AsFd for Driver {
    /// The descriptor to watch for reading; always the same.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.set.as_fd()
    }
}

impl Driver {
    pub(crate) fn new(core: &Arc<Core>) -> Result<Driver, Error> {
        let fault = |e: rustix::io::Errno| {
            let text = format!("cannot create a descriptor for the event loop: {e}");
            let error = Error::new(Code::Internal, text);
            error.with_ran(Ran::No).with_source(e)
        };
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(fault)?;
        let set = epoll::create(CreateFlags::CLOEXEC).map_err(fault)?;
        epoll::add(&set, &bell, EventData::new_u64(0), EventFlags::IN).map_err(fault)?;
        let bell = Arc::new(Bell {
            fd: bell,
            is_rung: AtomicBool::new(false),
        });
        core.drive_outside(&Waker::from(bell.clone()));
        let mut driver = Driver {
            core: core.clone(),
            set,
            bell,
            watched: None,
            jobs: Vec::new(),
            tick: None,
        };
        driver.watch();
        // Something may have come with the handshake.
        driver.bell.ring();
        Ok(driver)
    }

    /// From now on `waker` is woken where otherwise the descriptor would become readable without
    /// anything to read. The loop must then call [`Driver::turn`] soon. So calls that the loop
    /// itself makes leave in one write, without a system call to wake it.
    pub fn on_wake(&mut self, waker: &Waker) {
        self.core.drive_outside(waker);
        // What was signalled before is in the descriptor.
        self.bell.ring();
    }

    /// Reads what has arrived, runs handlers, and sends what waits. It never blocks. False once the
    /// app has ended, when there is nothing to drive any more.
    pub fn turn(&mut self) -> bool {
        self.bell.clear();
        if self.core.is_ended() {
            self.watched = None;
            return false;
        }
        self.check_time();
        self.core.run_jobs(&mut self.jobs);
        self.read();
        self.core.signal.flush_begins();
        self.core.outbox.flush();
        self.watch();
        true
    }

    /// When to call [`Driver::turn`] at the latest, even if nothing is readable.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.tick
    }

    fn check_time(&mut self) {
        let now = Instant::now();
        if self.tick.is_some_and(|tick| tick <= now) {
            self.tick = None;
            self.core.tick();
        }
        if self.tick.is_none() && self.core.is_tick_armed() {
            self.tick = Some(now + TICK);
        }
    }

    fn read(&mut self) {
        for _ in 0..READS_MAX {
            let Some(mut input) = self.core.reader.try_take() else {
                break;
            };
            if !input.attach(&self.core.outbox) {
                return;
            }
            let received = input.try_receive();
            // A read that did not fill the buffer emptied the socket.
            let is_empty = matches!(
                received,
                Received::Nothing | Received::Bytes { short: true }
            );
            self.core.settle(&mut input, received, &mut self.jobs);
            drop(input);
            self.core.run_jobs(&mut self.jobs);
            if is_empty {
                return;
            }
        }
        // There may be more, which the socket does not show if it was decrypted already.
        self.bell.ring();
    }

    /// Watches the present connection, for writing only while it accepts no more.
    fn watch(&mut self) {
        let link = self.core.outbox.link();
        let mut wanted = EventFlags::IN;
        wanted.set(EventFlags::OUT, self.core.outbox.is_blocked());
        let mut watched = self.watched.take();
        if let (Some((old, _)), now) = (&watched, &link)
            && now.as_ref().is_none_or(|now| !Arc::ptr_eq(old, now))
        {
            let _ = epoll::delete(&self.set, old);
            watched = None;
        }
        let Some(link) = link else { return };
        let data = EventData::new_u64(1);
        let changed = match watched {
            Some((_, for_what)) if for_what == wanted => Ok(()),
            Some(_) => epoll::modify(&self.set, &link, data, wanted),
            None => epoll::add(&self.set, &link, data, wanted),
        };
        match changed {
            Ok(()) => self.watched = Some((link, wanted)),
            // Without memory for it the connection cannot be used.
            Err(error) => self.core.lost(&link, &error.to_string()),
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.core.drive_on();
    }
}
