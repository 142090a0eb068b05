//! Drives the apps of an event loop of asyncio.
//!
//! A [`Loop`] does everything on the event loop's own thread: it reads the connections of its apps,
//! polls the operations that became ready, and begins handlers, all in one call for each time that
//! the event loop wakes.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use latzero::{Calling, Data, Driver, Error};
use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::app::{PyApp, ending};
use crate::codec::{self, Given};
use crate::errors::exception;
use crate::gil::detach;
use crate::handlers::{Incoming, Line, PyAnswer, Trigger};
use crate::op::{Make, Op, Running, State, lock, taken};

/// What the event loop has to do.
#[derive(Default)]
struct Ready {
    /// The indices of operations that can continue.
    woken: Vec<u32>,
    incoming: Line<Incoming>,
    /// Apps whose driver was woken.
    drivers: Vec<u64>,
    /// Whether the loop will look here without being woken.
    is_expected: bool,
}

impl Ready {
    fn is_empty(&self) -> bool {
        self.woken.is_empty() && self.incoming.is_empty() && self.drivers.is_empty()
    }
}

/// How an event loop is told what to do, from any thread.
pub(crate) struct Mailbox {
    ready: Mutex<Ready>,
    bell: UnixStream,
}

impl Mailbox {
    fn push(&self, add: impl FnOnce(&mut Ready)) {
        let mut ready = lock(&self.ready);
        add(&mut ready);
        if std::mem::replace(&mut ready.is_expected, true) {
            return;
        }
        drop(ready);
        // A full socket means that the loop has been woken.
        let _ = (&self.bell).write(&[1]);
    }

    pub(crate) fn push_incoming(&self, incoming: Incoming) {
        self.push(|ready| ready.incoming.push(incoming));
    }

    /// What there is to do; `None` if nothing, and from then on the loop must be woken.
    fn take(&self) -> Option<Ready> {
        let mut ready = lock(&self.ready);
        ready.is_expected = !ready.is_empty();
        ready.is_expected.then(|| Ready {
            is_expected: true,
            woken: std::mem::take(&mut ready.woken),
            incoming: std::mem::take(&mut ready.incoming),
            drivers: std::mem::take(&mut ready.drivers),
        })
    }
}

/// Wakes the operation at an index.
struct Bell {
    mailbox: Arc<Mailbox>,
    index: u32,
    is_queued: AtomicBool,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.is_queued.swap(true, Ordering::AcqRel) {
            self.mailbox.push(|ready| ready.woken.push(self.index));
        }
    }
}

/// Wakes the driver of one app.
struct DriverBell {
    mailbox: Arc<Mailbox>,
    key: u64,
}

impl Wake for DriverBell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.mailbox.push(|ready| {
            if !ready.drivers.contains(&self.key) {
                ready.drivers.push(self.key);
            }
        });
    }
}

/// What an operation in progress does.
enum Work {
    /// A call, the most frequent one, without the boxes of the others.
    Call(Calling<Data>),
    Any(Running),
}

/// The result of an operation, before it is a Python object.
enum Made {
    Data(Data),
    Any(Make),
}

impl Work {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Made, Error>> {
        match self {
            Work::Call(calling) => Pin::new(calling).poll(cx).map_ok(Made::Data),
            Work::Any(running) => running.as_mut().poll(cx).map_ok(Made::Any),
        }
    }
}

/// An operation in progress, with the asyncio future that waits for it.
struct Task {
    work: Work,
    /// Whether polling it takes so little time that the GIL is kept.
    is_short: bool,
    future: Py<PyAny>,
}

/// A place for a task. Its waker is made once: one that wakes a later task too early does no harm.
struct Slot {
    bell: Arc<Bell>,
    waker: Waker,
    /// How many tasks have left it, so that the token of a former one is recognised.
    generation: u32,
    /// None while it is polled, and if the slot is free.
    task: Option<Task>,
}

/// The operations in progress.
#[derive(Default)]
struct Tasks {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl Tasks {
    /// A free slot; returns its index and its generation.
    fn reserve(&mut self, mailbox: &Arc<Mailbox>) -> (u32, u32) {
        if let Some(index) = self.free.pop() {
            return (index, self.slots[index as usize].generation);
        }
        let index = u32::try_from(self.slots.len()).expect("memory ends before that");
        let bell = Arc::new(Bell {
            mailbox: mailbox.clone(),
            index,
            is_queued: AtomicBool::new(false),
        });
        self.slots.push(Slot {
            waker: Waker::from(bell.clone()),
            bell,
            generation: 0,
            task: None,
        });
        (index, 0)
    }

    /// Frees a slot after its task has ended.
    fn release(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
    }

    /// The task of a token is no longer wanted.
    fn cancel(&mut self, token: u64) -> Option<Task> {
        let (generation, index) = ((token >> 32) as u32, token as u32);
        let slot = self.slots.get_mut(index as usize)?;
        if slot.generation != generation {
            return None;
        }
        match slot.task.take() {
            Some(task) => {
                self.release(index);
                Some(task)
            }
            None => {
                // It is polled now, and dropped after that.
                slot.generation = generation.wrapping_add(1);
                None
            }
        }
    }
}

/// An app of the loop.
struct Driven {
    driver: Driver,
    /// Whether the loop calls `timed` for it later.
    has_timer: bool,
}

/// How often the loop looks for more to do before other parts of the program run.
const PASSES_MAX: usize = 4;

/// The operations and apps of an event loop. Its methods are called on the loop's thread.
#[pyclass(frozen, module = "latzero._latzero")]
pub(crate) struct Loop {
    pub(crate) mailbox: Arc<Mailbox>,
    inbox: UnixStream,
    /// A weak reference to the Python object that asks the event loop.
    owner: Py<PyAny>,
    tasks: Mutex<Tasks>,
    drivers: Mutex<HashMap<u64, Driven>>,
    next: AtomicU64,
}

/// Keeps the first error: the rest of what is ready has its turn all the same.
fn note(first: &mut PyResult<()>, result: PyResult<()>) {
    if first.is_ok() {
        *first = result;
    }
}

impl Loop {
    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn owner<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.owner.bind(py).call0()
    }

    /// Makes the event loop call `turn` soon, after what is ready now.
    fn turn_soon(&self, py: Python<'_>) -> PyResult<()> {
        let asked = self.owner(py)?.call_method0(intern!(py, "_soon"));
        if asked.is_err() {
            // The event loop was closed.
            lock(&self.mailbox.ready).is_expected = false;
        }
        asked.map(drop)
    }

    /// Does `work`. What it makes ready is done soon, together with what the program does until
    /// then, and needs no system call to wake the loop.
    fn gather<T>(&self, py: Python<'_>, work: impl FnOnce() -> T) -> PyResult<T> {
        let is_outermost = !std::mem::replace(&mut lock(&self.mailbox.ready).is_expected, true);
        let result = work();
        if is_outermost {
            let is_idle = {
                let mut ready = lock(&self.mailbox.ready);
                ready.is_expected = !ready.is_empty();
                !ready.is_expected
            };
            if !is_idle {
                self.turn_soon(py)?;
            }
        }
        Ok(result)
    }

    /// Starts an operation; returns its token.
    fn begin_task(&self, py: Python<'_>, task: Task) -> PyResult<u64> {
        let (index, generation) = lock(&self.tasks).reserve(&self.mailbox);
        self.gather(py, || self.poll(py, index, generation, task))??;
        Ok(u64::from(generation) << 32 | u64::from(index))
    }

    /// Polls the task at an index, if there is one.
    fn poll_woken(&self, py: Python<'_>, index: u32) -> PyResult<()> {
        let (task, generation) = {
            let slot = &mut lock(&self.tasks).slots[index as usize];
            slot.bell.is_queued.store(false, Ordering::Release);
            (slot.task.take(), slot.generation)
        };
        task.map_or(Ok(()), |task| self.poll(py, index, generation, task))
    }

    /// Polls a task; keeps it in its slot if it is not done.
    fn poll(&self, py: Python<'_>, index: u32, generation: u32, mut task: Task) -> PyResult<()> {
        let waker = lock(&self.tasks).slots[index as usize].waker.clone();
        let mut poll = || task.work.poll(&mut Context::from_waker(&waker));
        let polled = match task.is_short {
            true => poll(),
            false => detach(py, poll),
        };
        let Poll::Ready(result) = polled else {
            let mut tasks = lock(&self.tasks);
            let slot = &mut tasks.slots[index as usize];
            if slot.generation == generation {
                slot.task = Some(task);
                return Ok(());
            }
            tasks.free.push(index);
            drop(tasks);
            drop(task);
            return Ok(());
        };
        {
            let mut tasks = lock(&self.tasks);
            if tasks.slots[index as usize].generation == generation {
                tasks.release(index);
            } else {
                tasks.free.push(index);
            }
        }
        let future = task.future.bind(py);
        let made = match result {
            Ok(Made::Data(data)) => codec::read(py, &data).map(Bound::unbind),
            Ok(Made::Any(make)) => make(py),
            Err(error) => Err(exception(py, &error)),
        };
        let set = match made {
            Ok(object) => future.call_method1(intern!(py, "set_result"), (object,)),
            Err(error) => {
                let error = error.into_value(py);
                future.call_method1(intern!(py, "set_exception"), (error,))
            }
        };
        match set {
            Ok(_) => Ok(()),
            // It was cancelled.
            Err(_) if future.call_method0(intern!(py, "done"))?.is_truthy()? => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Lets the driver of an app read, write, and take requests.
    fn drive_on(&self, py: Python<'_>, key: u64) -> PyResult<()> {
        let Some(mut driven) = lock(&self.drivers).remove(&key) else {
            return Ok(());
        };
        let (is_live, driven) = detach(py, move || (driven.driver.turn(), driven));
        if !is_live {
            let fd = driven.driver.as_fd().as_raw_fd();
            let told = self.owner(py)?.call_method1(intern!(py, "_undrive"), (fd,));
            // After that, because another file may get its number.
            detach(py, move || drop(driven));
            return told.map(drop);
        }
        let mut driven = driven;
        let deadline = driven.driver.next_deadline().filter(|_| !driven.has_timer);
        driven.has_timer |= deadline.is_some();
        lock(&self.drivers).insert(key, driven);
        if let Some(deadline) = deadline {
            let wait = deadline.saturating_duration_since(Instant::now());
            let arguments = (wait.as_secs_f64(), key);
            self.owner(py)?
                .call_method1(intern!(py, "_later"), arguments)?;
        }
        Ok(())
    }

    /// Does what is ready, beginning with the driver of an app.
    fn run(&self, py: Python<'_>, first: Option<u64>) -> PyResult<()> {
        let mut done = Ok(());
        lock(&self.mailbox.ready).is_expected = true;
        if let Some(key) = first {
            note(&mut done, self.drive_on(py, key));
        }
        for _ in 0..PASSES_MAX {
            let Some(ready) = self.mailbox.take() else {
                return done;
            };
            for key in ready.drivers {
                note(&mut done, self.drive_on(py, key));
            }
            for index in ready.woken {
                note(&mut done, self.poll_woken(py, index));
            }
            for incoming in ready.incoming {
                note(&mut done, incoming.begin(py, self));
            }
        }
        note(&mut done, self.turn_soon(py));
        done
    }

    /// Calls a handler with a request and its payload. Returns the task that awaits its result, or
    /// `None` if the answer is already in its place.
    pub(crate) fn begin<'py>(
        &self,
        trigger: &Trigger,
        request: Bound<'py, PyAny>,
        data: Bound<'py, PyAny>,
        answer: &Bound<'py, PyAnswer>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = answer.py();
        let begin = match trigger.is_async {
            true => intern!(py, "_begin_async"),
            false => intern!(py, "_begin"),
        };
        let arguments = (trigger.handler.bind(py), request, data, answer);
        self.owner(py)?.call_method1(begin, arguments)
    }

    /// Cancels the task of a handler.
    pub(crate) fn cancel_handler(&self, task: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = task.py();
        let told = self
            .owner(py)?
            .call_method1(intern!(py, "_cancel"), (task,));
        told.map(drop)
    }
}

#[pymethods]
impl Loop {
    #[new]
    fn new(owner: Py<PyAny>) -> PyResult<Loop> {
        let (bell, inbox) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        inbox.set_nonblocking(true)?;
        Ok(Loop {
            mailbox: Arc::new(Mailbox {
                ready: Mutex::default(),
                bell,
            }),
            inbox,
            owner,
            tasks: Mutex::default(),
            drivers: Mutex::default(),
            next: AtomicU64::new(1),
        })
    }

    /// Readable when another thread has something for `rung` to do.
    fn fileno(&self) -> i32 {
        self.inbox.as_raw_fd()
    }

    /// How many apps it drives.
    #[getter]
    fn apps(&self) -> usize {
        lock(&self.drivers).len()
    }

    /// Drives an app from now on: the loop calls `turn_of` with the number that this returns, when
    /// the descriptor is readable.
    fn drive(&self, app: &PyApp) -> PyResult<(i32, u64)> {
        let driver = app.take_driver();
        let mut driver =
            driver.ok_or_else(|| PyRuntimeError::new_err("another loop drives this app"))?;
        let key = self.number();
        let bell = DriverBell {
            mailbox: self.mailbox.clone(),
            key,
        };
        driver.on_wake(&Waker::from(Arc::new(bell)));
        let fd = driver.as_fd().as_raw_fd();
        let driven = Driven {
            driver,
            has_timer: false,
        };
        lock(&self.drivers).insert(key, driven);
        Ok((fd, key))
    }

    /// Starts an operation, whose result is set on `future`; returns its number, for `cancel`.
    fn start(&self, py: Python<'_>, op: &Op, future: Py<PyAny>) -> PyResult<u64> {
        op.check(py)?;
        let running = match op.take()? {
            State::Running(running) => running,
            State::Ready(result) => Box::pin(std::future::ready(result)),
            State::Taken | State::Dropped => return Err(taken()),
        };
        let task = Task {
            work: Work::Any(running),
            is_short: op.is_short,
            future,
        };
        self.begin_task(py, task)
    }

    /// Like `start`, for a call.
    fn call(
        &self,
        app: &PyApp,
        name: Given<&str>,
        data: &Bound<'_, PyAny>,
        options: &Bound<'_, PyDict>,
        future: Py<PyAny>,
    ) -> PyResult<u64> {
        let py = data.py();
        let (call, lent) = app.calling(name.0, data, options)?;
        let calling = call.send::<Data>();
        let work = match lent.is_empty() {
            true => Work::Call(calling),
            false => Work::Any(Box::pin(async move {
                let data = ending(calling, lent).await?;
                let make: Make = Box::new(move |py| Ok(codec::read(py, &data)?.unbind()));
                Ok(make)
            })),
        };
        let task = Task {
            work,
            is_short: true,
            future,
        };
        self.begin_task(py, task)
    }

    /// Ends an operation early, if it is in progress.
    fn cancel(&self, py: Python<'_>, token: u64) -> PyResult<()> {
        let task = lock(&self.tasks).cancel(token);
        let Some(Task { work, .. }) = task else {
            return Ok(());
        };
        self.gather(py, || detach(py, || drop(work)))
    }

    /// Answers a request.
    fn send(&self, answer: &PyAnswer, result: &Bound<'_, PyAny>) -> PyResult<()> {
        self.gather(result.py(), || answer.send(result))
    }

    /// Answers a request with what its handler raised.
    fn fail(&self, answer: &PyAnswer, raised: Bound<'_, PyAny>) -> PyResult<()> {
        self.gather(raised.py(), || answer.fail(raised.clone()))
    }

    /// Does what is ready.
    fn turn(&self, py: Python<'_>) -> PyResult<()> {
        self.run(py, None)
    }

    /// Does what is ready, because another thread has woken the loop.
    fn rung(&self, py: Python<'_>) -> PyResult<()> {
        // Before that is read: later entries wake the loop again.
        let _ = (&self.inbox).read(&mut [0; 64]);
        self.run(py, None)
    }

    /// Does what is ready, because the descriptor of an app is readable.
    fn turn_of(&self, py: Python<'_>, key: u64) -> PyResult<()> {
        self.run(py, Some(key))
    }

    /// Checks the deadlines of an app.
    fn timed(&self, py: Python<'_>, key: u64) -> PyResult<()> {
        if let Some(driven) = lock(&self.drivers).get_mut(&key) {
            driven.has_timer = false;
        }
        self.run(py, Some(key))
    }

    /// Keeps everything as it is for ever, in a forked child: it is the parent's.
    fn leak(slf: Py<Self>) {
        std::mem::forget(slf);
    }

    /// Drops all operations. A thread drives the apps on that are still open.
    fn close(&self, py: Python<'_>) {
        let tasks = {
            let mut tasks = lock(&self.tasks);
            let slots = tasks.slots.iter_mut();
            slots
                .filter_map(|slot| slot.task.take())
                .collect::<Vec<_>>()
        };
        let drivers = std::mem::take(&mut *lock(&self.drivers));
        let incoming = std::mem::take(&mut lock(&self.mailbox.ready).incoming);
        let work: Vec<_> = tasks.into_iter().map(|task| task.work).collect();
        detach(py, || drop((work, incoming, drivers)));
    }
}
