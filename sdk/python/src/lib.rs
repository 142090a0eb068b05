//! The private part of the Python package `latzero`: connections, calls, handlers, events and
//! blocks. The public API is `python/latzero`.

mod app;
mod block;
mod buffer;
mod codec;
mod errors;
mod event_loop;
mod gil;
mod handlers;
mod op;
mod pool;
mod share;
mod streams;

use pyo3::prelude::*;

/// Every code of the protocol with the class of its exception.
#[pyfunction]
fn families() -> Vec<(&'static str, &'static str)> {
    let codes = latzero::Code::ALL.iter();
    codes
        .map(|&code| (code.as_str(), errors::family(code)))
        .collect()
}

/// The private half of `latzero`; it has no stable interface.
#[pymodule(gil_used = false)]
fn _latzero(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<app::PyApp>()?;
    module.add_class::<app::PyParked>()?;
    module.add_class::<block::PyBlock>()?;
    module.add_class::<block::PyDraft>()?;
    module.add_class::<block::PyLock>()?;
    module.add_class::<block::PyVersion>()?;
    module.add_class::<block::PyWritable>()?;
    module.add_class::<block::PyWriter>()?;
    module.add_class::<buffer::PySlot>()?;
    module.add_class::<buffer::PyView>()?;
    module.add_class::<handlers::PyAnswer>()?;
    module.add_class::<handlers::PyRequest>()?;
    module.add(
        "AioRequest",
        module.py().get_type::<handlers::PyAioRequest>(),
    )?;
    module.add_class::<event_loop::Loop>()?;
    module.add_class::<op::Op>()?;
    module.add_class::<codec::PyJson>()?;
    module.add_class::<streams::Inflow>()?;
    module.add_class::<streams::PyItems>()?;
    module.add_function(wrap_pyfunction!(app::connect, module)?)?;
    module.add_function(wrap_pyfunction!(app::connecting, module)?)?;
    module.add_function(wrap_pyfunction!(app::forked, module)?)?;
    module.add_function(wrap_pyfunction!(codec::json, module)?)?;
    module.add_function(wrap_pyfunction!(families, module)?)?;
    module.add_function(wrap_pyfunction!(gil::check_interpreter, module)?)?;
    Ok(())
}
