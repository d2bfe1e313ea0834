//! Rust's errors as the exceptions of `uhyve.errors`: the one place where they meet.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyModule};

use crate::error::{Crash, Error};
use crate::registers::GENERAL_NAMES;

static MODULE: PyOnceLock<Py<PyModule>> = PyOnceLock::new();

fn class<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    MODULE.get_or_try_init(py, || PyModule::import(py, "uhyve.errors").map(Bound::unbind))?.bind(py).getattr(name)
}

/// An exception of the class `name`, with keyword arguments for its fields.
fn raise<'py>(py: Python<'py>, name: &str, text: String, fields: &Bound<'py, PyDict>) -> PyErr {
    match class(py, name).and_then(|class| class.call((text,), Some(fields))) {
        Ok(value) => PyErr::from_value(value),
        Err(error) => error,
    }
}

/// The exception for an error.
pub fn to_python(py: Python<'_>, error: Error) -> PyErr {
    build(py, error).unwrap_or_else(|e| e)
}

fn build(py: Python<'_>, error: Error) -> PyResult<PyErr> {
    let fields = PyDict::new(py);
    let text = error.to_string();
    let name = match error {
        Error::Config(_) => "ConfigError",
        Error::Image { .. } => "ImageError",
        Error::HypervisorUnavailable(_) => "HypervisorUnavailableError",
        Error::Hypervisor { call, source } => {
            fields.set_item("errno", source.raw_os_error())?;
            fields.set_item("ioctl", call)?;
            "HypervisorError"
        }
        Error::GuestFault(fault) => {
            fields.set_item("address", fault.address)?;
            fields.set_item("length", fault.length)?;
            "GuestFaultError"
        }
        Error::GuestCrash(crash) => return crashed(py, &crash),
        Error::VmState(_) => "VmStateError",
        Error::Breakpoint(_) => "BreakpointError",
        Error::Condition(_) => "ConditionError",
        Error::Timeout { seconds } => {
            fields.set_item("timeout", seconds)?;
            "TimeoutExpired"
        }
        Error::Host { source, what } => {
            return Ok(match source.raw_os_error() {
                Some(errno) => pyo3::exceptions::PyOSError::new_err((errno, format!("{what}: {source}"))),
                None => pyo3::exceptions::PyOSError::new_err(text),
            });
        }
    };
    Ok(raise(py, name, text, &fields))
}

/// The exception for a crashed guest.
pub fn crashed(py: Python<'_>, crash: &Crash) -> PyResult<PyErr> {
    let fields = PyDict::new(py);
    let registers = PyDict::new(py);
    for (name, value) in GENERAL_NAMES.iter().zip(crash.registers.general) {
        registers.set_item(name, value)?;
    }
    registers.set_item("rip", crash.registers.rip)?;
    registers.set_item("rflags", crash.registers.rflags)?;
    fields.set_item("vcpu", crash.vcpu)?;
    fields.set_item("reason", crash.reason.to_string())?;
    fields.set_item("registers", registers)?;
    fields.set_item("symbol", crash.symbol.as_deref())?;
    Ok(raise(py, "GuestCrashError", crash.to_string(), &fields))
}

/// Runs `f` without the interpreter, and maps its error.
pub fn detached<T: Send>(py: Python<'_>, f: impl FnOnce() -> Result<T, Error> + Send) -> PyResult<T> {
    py.detach(f).map_err(|e| to_python(py, e))
}
