//! Releases the GIL and takes it again, and checks which interpreter it is of.
//!
//! While the interpreter ends, threads that try to take the GIL are stopped: before Python 3.14 it
//! ends them by unwinding their stacks. No code of this module may run then, so such a thread stops
//! where it is. The process ends soon.

#![allow(
    unsafe_code,
    reason = "no frame with a destructor may stand between the interpreter and the guard"
)]

use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicI64, Ordering};

use pyo3::exceptions::PyImportError;
use pyo3::ffi;
use pyo3::marker::Ungil;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// Dropped by anything but a return or a panic, it stops the thread.
struct StopIfUnwound;

impl Drop for StopIfUnwound {
    fn drop(&mut self) {
        while !std::thread::panicking() {
            std::thread::park();
        }
    }
}

/// Runs `work`, in which the interpreter may end this thread.
fn guarded<T>(work: impl FnOnce() -> T) -> T {
    let stop = StopIfUnwound;
    let result = work();
    std::mem::forget(stop);
    result
}

/// Runs `work` without the GIL.
pub(crate) fn detach<T: Ungil>(py: Python<'_>, work: impl Ungil + FnOnce() -> T) -> T {
    guarded(|| py.detach(work))
}

/// The interpreter's state of a thread that is not Python's own, until that thread ends. A new one
/// for each call would take several times as long as a short handler.
struct Kept(Cell<Option<ffi::PyGILState_STATE>>);

thread_local! {
    static KEPT: Kept = const { Kept(Cell::new(None)) };
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(state) = self.0.take() {
            // SAFETY: it undoes the call in `attach`, on the same thread, which is attached.
            let release = |_: Python<'_>| unsafe { ffi::PyGILState_Release(state) };
            // If the interpreter ends, that frees the state.
            guarded(|| Python::try_attach(release));
        }
    }
}

/// Runs `work` with the GIL, on a thread that does not have it; `None` if the interpreter ends.
pub(crate) fn attach<T>(work: impl FnOnce(Python<'_>) -> T) -> Option<T> {
    // SAFETY: it reads a value of this thread, and may be called at any time.
    let is_new = unsafe { ffi::PyGILState_GetThisThreadState() }.is_null();
    let work = |py: Python<'_>| {
        if is_new {
            // SAFETY: the thread is attached. The additional count keeps its state when it is
            // detached.
            let state = unsafe { ffi::PyGILState_Ensure() };
            KEPT.with(|kept| kept.0.set(Some(state)));
        }
        work(py)
    };
    guarded(|| Python::try_attach(|py| guarded(|| work(py))))
}

unsafe extern "C-unwind" {
    /// The function of CPython. `pyo3::ffi` declares that it does not unwind, and an optimized
    /// build would then leave out what `guarded` does.
    fn PyObject_CallObject(
        callable: *mut ffi::PyObject,
        arguments: *mut ffi::PyObject,
    ) -> *mut ffi::PyObject;
}

/// Calls Python code that may run for long, and so while the interpreter ends.
pub(crate) fn call<'py>(
    function: &Bound<'py, PyAny>,
    arguments: Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyAny>> {
    let arguments = ManuallyDrop::new(arguments);
    // SAFETY: both are live objects, the second is a tuple, and the interpreter is attached, since
    // they are bound to it.
    let result = guarded(|| unsafe { PyObject_CallObject(function.as_ptr(), arguments.as_ptr()) });
    drop(ManuallyDrop::into_inner(arguments));
    // SAFETY: the call returned a reference of its own, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(function.py(), result) }
}

/// The interpreter that imported this module; -1 before that.
static OWNER: AtomicI64 = AtomicI64::new(-1);

/// Refuses to be used by a second interpreter of the process. Python itself does not call this
/// module again there: it copies the names that the first one has.
#[pyfunction]
pub(crate) fn check_interpreter(_py: Python<'_>) -> PyResult<()> {
    // SAFETY: this thread is attached to an interpreter, which `_py` proves.
    let this = unsafe { ffi::PyInterpreterState_GetID(ffi::PyInterpreterState_Get()) };
    match OWNER.compare_exchange(-1, this, Ordering::Relaxed, Ordering::Relaxed) {
        Err(owner) if owner != this => Err(PyImportError::new_err(
            "latzero does not work in subinterpreters: another interpreter of this process has \
             imported it",
        )),
        Ok(_) | Err(_) => Ok(()),
    }
}
