//! Memory of blocks as Python buffers. The pointers that Python gets lead into mappings that the
//! buffer's owner keeps, so they stay readable for as long as anything refers to the buffer.

#![allow(
    unsafe_code,
    reason = "Python's buffer protocol consists of raw pointers"
)]

use std::ffi::{CStr, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use latzero::{Code, Exposed, OwnedView};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::block::Layout;
use crate::errors;
use crate::share::Share;

/// Fills in `view` with `length` bytes that lie at `start` and belong to `owner`.
///
/// # Safety
/// `view` is what the interpreter passed to `__getbuffer__`, or null. The bytes stay mapped while
/// `owner` exists, and are writable unless `is_read_only`.
unsafe fn fill(
    owner: &Bound<'_, PyAny>,
    view: *mut ffi::Py_buffer,
    flags: c_int,
    (start, length): (*mut u8, usize),
    is_read_only: bool,
) -> PyResult<()> {
    if view.is_null() {
        return Err(PyBufferError::new_err("there is no view to fill in"));
    }
    if is_read_only && flags & ffi::PyBUF_WRITABLE == ffi::PyBUF_WRITABLE {
        // SAFETY: the view is not null; an error must leave no owner in it.
        unsafe { (*view).obj = std::ptr::null_mut() };
        return Err(PyBufferError::new_err(
            "this memory is read-only; use `with block.write()` to write it",
        ));
    }
    let length = ffi::Py_ssize_t::try_from(length)
        .map_err(|_| PyBufferError::new_err("the block is too large"))?;
    let start = start.cast::<c_void>();
    // SAFETY: the caller vouches for the view and for the bytes; the interpreter is attached, since
    // `owner` is bound. The call takes a reference to `owner`, given back with the buffer.
    let filled = unsafe {
        ffi::PyBuffer_FillInfo(
            view,
            owner.as_ptr(),
            start,
            length,
            c_int::from(is_read_only),
            flags,
        )
    };
    match filled {
        0 => Ok(()),
        _ => Err(PyErr::fetch(owner.py())),
    }
}

/// The element type and the shape of a buffer, as the buffer protocol takes them.
pub(crate) struct Form {
    format: &'static CStr,
    itemsize: ffi::Py_ssize_t,
    shape: Vec<ffi::Py_ssize_t>,
    strides: Vec<ffi::Py_ssize_t>,
}

impl Form {
    /// The form of `length` bytes with this layout; `None` if they are to be seen as bytes, because
    /// the `struct` module has no such type or the size does not fit.
    pub(crate) fn of(layout: &Layout, length: u64) -> Option<Form> {
        let (dtype, lengths, _) = layout.0.as_ref()?;
        let (format, itemsize) = match dtype.strip_prefix(['<', '|']).unwrap_or(dtype) {
            "b1" => (c"?", 1),
            "i1" => (c"b", 1),
            "u1" => (c"B", 1),
            "i2" => (c"h", 2),
            "u2" => (c"H", 2),
            "f2" => (c"e", 2),
            "i4" => (c"i", 4),
            "u4" => (c"I", 4),
            "f4" => (c"f", 4),
            "i8" => (c"q", 8),
            "u8" => (c"Q", 8),
            "f8" => (c"d", 8),
            "c8" => (c"Zf", 8),
            "c16" => (c"Zd", 16),
            _ => return None,
        };
        let mut shape = Vec::with_capacity(lengths.len());
        for length in lengths {
            shape.push(ffi::Py_ssize_t::try_from(*length).ok()?);
        }
        let mut size: ffi::Py_ssize_t = itemsize;
        let mut strides = vec![0; shape.len()];
        for (stride, length) in strides.iter_mut().zip(&shape).rev() {
            *stride = size;
            size = size.checked_mul(*length)?;
        }
        // The letters of `struct` mean the byte order of this machine.
        let fits = u64::try_from(size).is_ok_and(|size| size == length);
        (fits && cfg!(target_endian = "little")).then_some(Form {
            format,
            itemsize,
            shape,
            strides,
        })
    }

    /// Describes a filled buffer, as far as its consumer asked for that.
    ///
    /// # Safety
    /// `view` was filled with contiguous bytes of this form's size, whose owner keeps this form.
    unsafe fn describe(&self, view: *mut ffi::Py_buffer, flags: c_int) {
        let asks = |flag: c_int| flags & flag == flag;
        if !asks(ffi::PyBUF_ND) {
            return;
        }
        // SAFETY: the view is filled. Consumers only read the format, shape and strides, and the
        // owner, which they refer to, keeps them.
        unsafe {
            (*view).itemsize = self.itemsize;
            (*view).ndim = c_int::try_from(self.shape.len()).unwrap_or(0);
            (*view).shape = self.shape.as_ptr().cast_mut();
            if asks(ffi::PyBUF_FORMAT) {
                (*view).format = self.format.as_ptr().cast_mut();
            }
            if asks(ffi::PyBUF_STRIDES) {
                (*view).strides = self.strides.as_ptr().cast_mut();
            }
        }
    }
}

/// One version of a block in place, read-only. It has the buffer protocol, with the layout's
/// element type and shape. The memory stays readable for as long as this or an array of it exists.
/// Newer versions may overwrite it, which `valid` shows.
#[pyclass(name = "View", frozen, module = "latzero")]
pub(crate) struct PyView {
    pub(crate) id: String,
    pub(crate) view: OwnedView,
    pub(crate) layout: Layout,
    pub(crate) form: Option<Form>,
    /// A block of `share` is not filled again while there is a view of it.
    pub(crate) _share: Option<Share>,
}

#[pymethods]
impl PyView {
    /// The version as an array: numpy's if it is installed, else a `memoryview`.
    #[getter]
    fn array<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let layout = slf.get().layout.to_python(py)?;
        py.import("latzero._arrays")?
            .call_method1("array", (slf, layout))
    }

    /// The number of the version; 0 was never written.
    #[getter]
    fn version(&self) -> u64 {
        self.view.get().version()
    }

    /// Whether the version has not been overwritten.
    #[getter]
    fn valid(&self) -> bool {
        self.view.get().is_valid()
    }

    /// Whether the block was resized or removed since: then this no longer changes.
    #[getter]
    fn stale(&self) -> bool {
        self.view.is_stale()
    }

    fn __enter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        PyView::array(slf)
    }

    #[pyo3(signature = (*raised))]
    fn __exit__(&self, py: Python<'_>, raised: &Bound<'_, PyTuple>) -> PyResult<()> {
        let is_raised = raised.get_item(0).is_ok_and(|kind| !kind.is_none());
        if is_raised || self.valid() {
            return Ok(());
        }
        let message = format!(
            "version {} of block '{}' was overwritten during the view: discard what was computed \
             from it",
            self.version(),
            self.id
        );
        Err(errors::raised(py, Code::Contended, &message, None))
    }

    fn __repr__(&self) -> String {
        format!("<latzero.View of {} version {}>", self.id, self.version())
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let shown = slf.get().view.get();
        let length = usize::try_from(shown.len()).unwrap_or(usize::MAX);
        let bytes = (shown.as_ptr().cast_mut(), length);
        // SAFETY: the view comes from the interpreter; the owned view keeps the bytes mapped, and
        // they are given out only for reading.
        unsafe { fill(slf.as_any(), view, flags, bytes, true) }?;
        if let Some(form) = &slf.get().form {
            // SAFETY: it was just filled with that many bytes, and refers to this view.
            unsafe { form.describe(view, flags) };
        }
        Ok(())
    }

    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {}
}

/// Bytes of a version that is being written, in place.
#[pyclass(name = "Slot", frozen, module = "latzero._latzero")]
pub(crate) struct PySlot {
    exposed: Exposed,
    is_closed: AtomicBool,
}

impl PySlot {
    pub(crate) fn new(exposed: Exposed) -> Self {
        PySlot {
            exposed,
            is_closed: AtomicBool::new(false),
        }
    }
}

#[pymethods]
impl PySlot {
    /// Prevents further writable buffers.
    fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let this = slf.get();
        let bytes = (this.exposed.as_mut_ptr(), this.exposed.len());
        let is_closed = this.is_closed.load(Ordering::Acquire);
        // SAFETY: the view comes from the interpreter; what is exposed keeps the bytes mapped, and
        // a block that is written is mapped for writing.
        unsafe { fill(slf.as_any(), view, flags, bytes, is_closed) }
    }

    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {}
}

/// Calls `write` with the memory of a writable, contiguous buffer of bytes, without the GIL.
pub(crate) fn write_into<T: Send>(
    buffer: &Bound<'_, PyAny>,
    write: impl FnOnce(Python<'_>, Destination<'_>) -> PyResult<T>,
) -> PyResult<T> {
    let py = buffer.py();
    let buffer = PyBuffer::<u8>::get(buffer)?;
    if buffer.readonly() || !buffer.is_c_contiguous() {
        return Err(PyBufferError::new_err(
            "`out` must be writable and contiguous",
        ));
    }
    let (start, length) = (buffer.buf_ptr().cast::<u8>(), buffer.len_bytes());
    if length == 0 {
        return write(py, Destination(&mut []));
    }
    // SAFETY: the buffer holds that many bytes, and its owner keeps them in place until it is
    // released, after this call. As with `readinto` of files, who changes them meanwhile gets what
    // the two writes make of it.
    let bytes = unsafe { std::slice::from_raw_parts_mut(start, length) };
    let result = write(py, Destination(bytes));
    drop(buffer);
    result
}

/// Memory of a Python object.
pub(crate) struct Destination<'a>(pub(crate) &'a mut [u8]);
