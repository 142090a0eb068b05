//! Node's event loop drives an app: it watches the descriptor of the client's driver, and calls
//! JavaScript once for all that arrived at a time.
//!
//! The functions of libuv are looked up when they are needed. The addon loads without them, and
//! where they are missing a thread drives the app. `lib/` asks for the loop only in Node: other
//! runtimes have functions of these names that abort.

#![allow(
    unsafe_code,
    reason = "libuv and Node-API take pointers, and call back with them"
)]

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::{NonNull, null_mut};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Wake, Waker};
use std::time::Instant;

use latzero::Driver;
use napi::bindgen_prelude::FunctionRef;
use napi::{Env, JsValue, sys};

use crate::mailbox::Mailbox;

/// How often in a row the loop reads and runs JavaScript before it looks at other events.
const TURNS_MAX: usize = 4;

/// Kinds of handles and events, as `uv.h` numbers them; they are the same in every libuv 1.
const UV_POLL: c_int = 8;
const UV_TIMER: c_int = 13;
const UV_READABLE: c_int = 1;

type Loop = *mut c_void;
type RawHandle = *mut c_void;
type OnPoll = unsafe extern "C" fn(RawHandle, c_int, c_int);
type OnHandle = unsafe extern "C" fn(RawHandle);

/// The address of a function of this process.
fn symbol(name: &CStr) -> Option<NonNull<c_void>> {
    // SAFETY: the name is a C string, and nothing is loaded or called.
    NonNull::new(unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr().cast::<c_char>()) })
}

/// The functions of libuv that are used here, as `uv.h` declares them.
macro_rules! functions {
    ($($field:ident: $name:literal, $type:ty;)*) => {
        struct Functions {
            $($field: $type,)*
        }

        impl Functions {
            /// Looks them up in a process that has libuv 1.
            fn look_up() -> Option<Functions> {
                Some(Functions {
                    $($field: {
                        let found = symbol($name)?;
                        // SAFETY: this is the function's type in every libuv 1, and pointers to
                        // functions have the size of others.
                        unsafe { std::mem::transmute::<NonNull<c_void>, $type>(found) }
                    },)*
                })
            }
        }
    };
}

functions! {
    handle_size: c"uv_handle_size", unsafe extern "C" fn(c_int) -> usize;
    set_data: c"uv_handle_set_data", unsafe extern "C" fn(RawHandle, *mut c_void);
    get_data: c"uv_handle_get_data", unsafe extern "C" fn(RawHandle) -> *mut c_void;
    unref: c"uv_unref", unsafe extern "C" fn(RawHandle);
    close: c"uv_close", unsafe extern "C" fn(RawHandle, OnHandle);
    poll_init: c"uv_poll_init", unsafe extern "C" fn(Loop, RawHandle, c_int) -> c_int;
    poll_start: c"uv_poll_start", unsafe extern "C" fn(RawHandle, c_int, OnPoll) -> c_int;
    timer_init: c"uv_timer_init", unsafe extern "C" fn(Loop, RawHandle) -> c_int;
    timer_start: c"uv_timer_start", unsafe extern "C" fn(RawHandle, OnHandle, u64, u64) -> c_int;
}

impl Functions {
    fn find() -> Option<Functions> {
        type Version = unsafe extern "C" fn() -> c_uint;
        let found = symbol(c"uv_version")?;
        // SAFETY: it is of this type in every version, and returns a constant.
        let version = unsafe { std::mem::transmute::<NonNull<c_void>, Version>(found)() };
        match version >> 16 {
            1 => Functions::look_up(),
            _ => None,
        }
    }

    fn get() -> Option<&'static Functions> {
        static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();
        FUNCTIONS.get_or_init(Functions::find).as_ref()
    }
}

/// Whether there is a libuv whose loop could drive an app.
pub(crate) fn is_there() -> bool {
    Functions::get().is_some()
}

/// The memory of a handle.
struct Handle {
    words: *mut [u128],
}

impl Handle {
    fn new(uv: &Functions, kind: c_int) -> Handle {
        // SAFETY: it only returns a number.
        let bytes = unsafe { (uv.handle_size)(kind) };
        let words = vec![0; bytes.div_ceil(size_of::<u128>())];
        let words = Box::into_raw(words.into_boxed_slice());
        Handle { words }
    }

    fn raw(&self) -> RawHandle {
        self.words.cast()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: it was made from such a box. Whoever drops it knows that libuv has no use for it
        // any more: it was never initialized, or `on_closed` was called for it.
        drop(unsafe { Box::from_raw(self.words) });
    }
}

/// Wakes the loop for what the client wants done. During a turn that is done at its end.
struct Due {
    is_due: AtomicBool,
    is_in_turn: AtomicBool,
    mailbox: Arc<Mailbox>,
}

impl Due {
    /// What there is to do is being done from now on.
    fn take(&self) {
        self.is_due.store(false, Ordering::SeqCst);
    }

    fn set_in_turn(&self, is_in_turn: bool) {
        self.is_in_turn.store(is_in_turn, Ordering::SeqCst);
        // Of two threads, one that leaves a turn and one that has something to do, one sees what
        // the other did.
        if !is_in_turn && self.is_due.load(Ordering::SeqCst) {
            self.mailbox.ring();
        }
    }
}

impl Wake for Due {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.is_due.swap(true, Ordering::SeqCst) && !self.is_in_turn.load(Ordering::SeqCst) {
            self.mailbox.ring();
        }
    }
}

/// What a connection is driven with. It stays on the JavaScript thread.
pub(crate) struct Looping {
    uv: &'static Functions,
    env: Env,
    wake: RefCell<Option<FunctionRef<(), ()>>>,
    context: sys::napi_async_context,
    hook: Cell<sys::napi_async_cleanup_hook_handle>,
    poll: Handle,
    timer: Handle,
    /// Handles that libuv has; each keeps this in place.
    handles: Cell<u32>,
    driver: RefCell<Option<Driver>>,
    due: Arc<Due>,
    mailbox: Arc<Mailbox>,
    is_closing: Cell<bool>,
    is_timer_on: Cell<bool>,
}

impl Looping {
    /// Lets the loop of `env` drive an app; `wake` is called when `drain` has something to do.
    /// `None` where that can't be: the driver is dropped then, and a thread drives the app.
    pub(crate) fn start(
        env: Env,
        mut driver: Driver,
        mailbox: Arc<Mailbox>,
        wake: FunctionRef<(), ()>,
    ) -> Option<Rc<Looping>> {
        let uv = Functions::get()?;
        let mut uv_loop = null_mut();
        let mut context = null_mut();
        let name = env.create_string("latzero").ok()?;
        // The context is made last: only `Looping` destroys it.
        // SAFETY: the environment is that of the JavaScript function that is running on this
        // thread, and the results are written to places of their types.
        let is_made = unsafe {
            sys::napi_get_uv_event_loop(env.raw(), &raw mut uv_loop) == sys::Status::napi_ok
                && sys::napi_async_init(env.raw(), null_mut(), name.raw(), &raw mut context)
                    == sys::Status::napi_ok
        };
        if !is_made {
            return None;
        }
        let due = Arc::new(Due {
            is_due: AtomicBool::new(false),
            is_in_turn: AtomicBool::new(false),
            mailbox: mailbox.clone(),
        });
        driver.on_wake(&Waker::from(due.clone()));
        let descriptor = driver.as_fd().as_raw_fd();
        let looping = Rc::new(Looping {
            uv,
            env,
            wake: RefCell::new(Some(wake)),
            context,
            hook: Cell::new(null_mut()),
            poll: Handle::new(uv, UV_POLL),
            timer: Handle::new(uv, UV_TIMER),
            handles: Cell::new(0),
            driver: RefCell::new(Some(driver)),
            due,
            mailbox,
            is_closing: Cell::new(false),
            is_timer_on: Cell::new(false),
        });
        let uv_loop = uv_loop.cast();
        // SAFETY: the loop is that of this thread, and the memory of the handles is large enough,
        // aligned, and in place until they are closed: they keep `looping`. The descriptor stays
        // open for as long, or at least until `close` has stopped to watch it.
        let is_started = unsafe {
            looping.keep(
                (uv.timer_init)(uv_loop, looping.timer.raw()),
                &looping.timer,
            ) && looping.keep(
                (uv.poll_init)(uv_loop, looping.poll.raw(), descriptor),
                &looping.poll,
            ) && (uv.poll_start)(looping.poll.raw(), UV_READABLE, on_poll) == 0
        };
        let mut hook = null_mut();
        // SAFETY: `on_cleanup` gets the pointer at most until the hook is removed, which is done
        // when the last handle is closed, and the handles keep `looping`.
        let is_hooked = unsafe {
            let data = Rc::as_ptr(&looping).cast_mut().cast();
            is_started
                && sys::napi_add_async_cleanup_hook(
                    looping.env.raw(),
                    Some(on_cleanup),
                    data,
                    &raw mut hook,
                ) == sys::Status::napi_ok
        };
        if !is_hooked {
            looping.close();
            return None;
        }
        looping.hook.set(hook);
        Some(looping)
    }

    /// Notes that libuv has a handle, if it could be initialized. It keeps nothing alive: what is
    /// pending does, and JavaScript counts that.
    fn keep(self: &Rc<Self>, initialized: c_int, handle: &Handle) -> bool {
        if initialized != 0 {
            return false;
        }
        let data = Rc::into_raw(self.clone());
        // SAFETY: the handle is initialized, and `on_closed` takes back what it keeps here.
        unsafe {
            (self.uv.set_data)(handle.raw(), data.cast_mut().cast());
            (self.uv.unref)(handle.raw());
        }
        self.handles.set(self.handles.get() + 1);
        true
    }

    /// Reads what has arrived, and sends what waits. Whether JavaScript has something to do.
    fn step(&self) -> bool {
        // Also where nothing can be done any more: else it would wake the loop again and again.
        self.due.take();
        let mut place = self.driver.borrow_mut();
        let Some(driver) = place.as_mut().filter(|_| !self.is_closing.get()) else {
            return false;
        };
        self.due.set_in_turn(true);
        let was_signalled = self.mailbox.begin_turn();
        let goes_on = driver.turn();
        let has_news = self.mailbox.end_turn(was_signalled);
        let deadline = driver.next_deadline();
        drop(place);
        match goes_on {
            true => self.set_timer(deadline),
            false => self.close(),
        }
        has_news
    }

    /// What the loop does when the descriptor is readable or the time has come.
    fn run(&self) {
        for _ in 0..TURNS_MAX {
            if self.step() {
                self.call();
            }
            if !self.due.is_due.load(Ordering::SeqCst) || self.is_closing.get() {
                break;
            }
        }
        self.due.set_in_turn(false);
    }

    /// As `run`, where JavaScript runs already and looks at the mailbox next.
    pub(crate) fn run_inside(&self) {
        if self.due.is_due.load(Ordering::SeqCst) && !self.due.is_in_turn.load(Ordering::SeqCst) {
            self.step();
            self.due.set_in_turn(false);
        }
    }

    fn set_timer(&self, deadline: Option<Instant>) {
        let Some(deadline) = deadline.filter(|_| !self.is_timer_on.get()) else {
            return;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        // SAFETY: the handle is initialized and not closed.
        let started =
            unsafe { (self.uv.timer_start)(self.timer.raw(), on_timer, ms.saturating_add(1), 0) };
        self.is_timer_on.set(started == 0);
    }

    /// Calls JavaScript, as the event loop does: what its functions have promised is done when this
    /// returns.
    fn call(&self) {
        let env = self.env.raw();
        let mut scope = null_mut();
        // SAFETY: the environment is that of this thread, and no JavaScript runs. Values are used
        // within the scope that is open.
        unsafe {
            if sys::napi_open_handle_scope(env, &raw mut scope) != sys::Status::napi_ok {
                return;
            }
            let (mut global, mut result) = (null_mut(), null_mut());
            sys::napi_get_global(env, &raw mut global);
            let wake = self.wake.borrow();
            let function = wake.as_ref().and_then(|it| it.borrow_back(&self.env).ok());
            let function = function.map(|function| function.raw());
            drop(wake);
            if let Some(function) = function {
                sys::napi_make_callback(
                    env,
                    self.context,
                    global,
                    function,
                    0,
                    std::ptr::null(),
                    &raw mut result,
                );
                let mut is_pending = false;
                sys::napi_is_exception_pending(env, &raw mut is_pending);
                let mut error = null_mut();
                // As an exception of any other function that the loop calls.
                if is_pending
                    && sys::napi_get_and_clear_last_exception(env, &raw mut error)
                        == sys::Status::napi_ok
                {
                    sys::napi_fatal_exception(env, error);
                }
            }
            sys::napi_close_handle_scope(env, scope);
        }
    }

    /// Stops watching. What is not sent yet, a thread sends, unless the app has ended.
    pub(crate) fn close(&self) {
        self.stop();
        // During a turn it is dropped with this.
        if let Ok(mut driver) = self.driver.try_borrow_mut() {
            drop(driver.take());
        }
    }

    fn stop(&self) {
        if self.is_closing.replace(true) {
            return;
        }
        let initialized = [&self.timer, &self.poll].into_iter();
        for handle in initialized.take(self.handles.get() as usize) {
            // SAFETY: the handle is initialized, and closed once, on its loop's thread.
            unsafe { (self.uv.close)(handle.raw(), on_closed) };
        }
        if self.handles.get() == 0 {
            self.closed();
        }
    }

    /// Nothing of libuv refers to this any more.
    fn closed(&self) {
        drop(self.wake.take());
        let hook = self.hook.replace(null_mut());
        // SAFETY: the context and the hook were made with this environment, are given back once, on
        // its thread, and it is not over before the hook is removed.
        unsafe {
            sys::napi_async_destroy(self.env.raw(), self.context);
            if !hook.is_null() {
                sys::napi_remove_async_cleanup_hook(hook);
            }
        }
    }
}

/// What a handle belongs to, kept for the time of a callback.
///
/// # Safety
/// The handle is one that `Looping::keep` was called with, and is not closed.
unsafe fn owner(handle: RawHandle) -> Option<Rc<Looping>> {
    let uv = Functions::get()?;
    // SAFETY: the data is what `keep` made of an `Rc`, of which the handle keeps one count.
    unsafe {
        let data: *const Looping = (uv.get_data)(handle).cast_const().cast();
        Rc::increment_strong_count(data);
        Some(Rc::from_raw(data))
    }
}

unsafe extern "C" fn on_poll(handle: RawHandle, status: c_int, _events: c_int) {
    // SAFETY: libuv calls this for a handle that was started and is not closed.
    let Some(looping) = (unsafe { owner(handle) }) else {
        return;
    };
    match status {
        0 => looping.run(),
        // The descriptor can't be watched any more: a thread goes on.
        _ => looping.close(),
    }
}

unsafe extern "C" fn on_timer(handle: RawHandle) {
    // SAFETY: as above.
    let Some(looping) = (unsafe { owner(handle) }) else {
        return;
    };
    looping.is_timer_on.set(false);
    looping.run();
}

unsafe extern "C" fn on_closed(handle: RawHandle) {
    let Some(uv) = Functions::get() else { return };
    // SAFETY: the data is what `keep` made of an `Rc`; this is the last use of the handle, so the
    // count that it kept is taken back once.
    let looping = unsafe {
        let data: *const Looping = (uv.get_data)(handle).cast_const().cast();
        Rc::from_raw(data)
    };
    looping.handles.set(looping.handles.get() - 1);
    if looping.handles.get() == 0 {
        looping.closed();
    }
}

/// The environment ends, for example that of a worker thread: it waits until the hook is removed.
unsafe extern "C" fn on_cleanup(_hook: sys::napi_async_cleanup_hook_handle, data: *mut c_void) {
    // SAFETY: the hook was not removed yet, so a handle keeps it; for the time of this call it is
    // kept by one more count.
    let looping = unsafe {
        let data: *const Looping = data.cast_const().cast();
        Rc::increment_strong_count(data);
        Rc::from_raw(data)
    };
    // The driver stays until the app has ended with its environment: no thread has to go on.
    looping.stop();
}
