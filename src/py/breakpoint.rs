//! A breakpoint as Python sees it.

use std::sync::Arc;

use pyo3::prelude::*;

use super::callbacks::PyPredicate;
use super::errors::detached;
use crate::debug::breakpoints::{Breakpoint, Condition};
use crate::debug::condition::Program;
use crate::error::Error;
use crate::vm::Machine;

/// A breakpoint of a VM.
#[pyclass(name = "Breakpoint", frozen, module = "uhyve._core")]
pub struct PyBreakpoint {
    machine: Arc<Machine>,
    /// The breakpoint.
    pub inner: Arc<Breakpoint>,
}

impl PyBreakpoint {
    /// A handle for `inner`.
    pub fn new(machine: Arc<Machine>, inner: Arc<Breakpoint>) -> Self {
        Self { machine, inner }
    }
}

/// Source, code and constants of a compiled condition.
pub type CompiledParts = (String, Vec<u8>, Vec<i128>);

/// Verifies a compiled condition.
pub fn program(parts: CompiledParts) -> Result<(String, Arc<Program>), Error> {
    let (source, code, constants) = parts;
    match Program::verify(&code, &constants) {
        Ok(program) => Ok((source, Arc::new(program))),
        Err(error) => Err(Error::Condition(format!("the bytecode of condition {source:?} is not valid: {error}"))),
    }
}

#[pymethods]
impl PyBreakpoint {
    #[getter]
    fn id(&self) -> u32 {
        self.inner.id
    }

    #[getter]
    fn address(&self) -> u64 {
        self.inner.address
    }

    #[getter]
    fn location(&self) -> &str {
        &self.inner.options.location
    }

    #[getter]
    fn name(&self) -> Option<&str> {
        self.inner.options.name.as_deref()
    }

    #[getter]
    fn temporary(&self) -> bool {
        self.inner.options.temporary
    }

    #[getter]
    fn vcpu(&self) -> Option<u32> {
        self.inner.options.vcpu
    }

    #[getter]
    fn reached(&self) -> u64 {
        self.inner.reached()
    }

    #[getter]
    fn hits(&self) -> u64 {
        self.inner.hits()
    }

    #[getter]
    fn ignore(&self) -> u64 {
        self.inner.ignore()
    }

    #[setter]
    fn set_ignore(&self, count: u64) {
        self.inner.set_ignore(count);
    }

    #[getter]
    fn enabled(&self) -> bool {
        self.inner.is_enabled()
    }

    #[getter]
    fn deleted(&self) -> bool {
        self.inner.is_deleted()
    }

    #[setter]
    fn set_enabled(&self, py: Python<'_>, enabled: bool) -> PyResult<()> {
        detached(py, || self.machine.enable_breakpoint(&self.inner, enabled))
    }

    fn delete(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.machine.delete_breakpoint(&self.inner))
    }

    /// Bytes that a watchpoint watches; None for a breakpoint.
    #[getter]
    fn size(&self) -> Option<u64> {
        self.inner.watch.as_ref().map(|w| w.length)
    }

    /// What fires a watchpoint: "write", "read" or "access"; None for a breakpoint.
    #[getter]
    fn access(&self) -> Option<&'static str> {
        self.inner.watch.as_ref().map(|w| w.access.name())
    }

    /// How the guest is made to stop there: "int3", "debug register" or "single-step"; None while disabled.
    #[getter]
    fn kind(&self) -> Option<&'static str> {
        use crate::debug::breakpoints::SiteKind;
        use crate::debug::watchpoints::WatchKind;
        if self.inner.watch.is_some() {
            return Some(match self.machine.watch_kind(&self.inner)? {
                WatchKind::Hardware(_) => "debug register",
                WatchKind::Stepped => "single-step",
            });
        }
        Some(match self.machine.site_at(self.inner.address)? {
            SiteKind::Planted(_) => "int3",
            SiteKind::Hardware => "debug register",
            SiteKind::Stepped => "single-step",
        })
    }

    /// The condition as it was given: a string, a callable, or None.
    #[getter]
    fn condition(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let condition = self.inner.condition();
        if let Some((source, _)) = condition.compiled {
            return Ok(Some(source.into_pyobject(py)?.into_any().unbind()));
        }
        Ok(condition.predicate.and_then(|p| p.as_any().downcast_ref::<PyPredicate>().and_then(|p| p.callable(py))))
    }

    fn __repr__(&self) -> String {
        let what = if self.inner.watch.is_some() { "Watchpoint" } else { "Breakpoint" };
        format!("<{what} {} at {} ({:#x})>", self.inner.id, self.inner.options.location, self.inner.address)
    }

    fn __eq__(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    fn __hash__(&self) -> isize {
        // The address of what is shared, as for any object without equality of its own.
        Arc::as_ptr(&self.inner) as isize
    }
}

/// Watched bytes as Python sees them: a number of up to eight bytes, else bytes; None if they are not mapped.
pub fn watched<'py>(py: Python<'py>, bytes: &[u8]) -> PyResult<Option<Bound<'py, PyAny>>> {
    match bytes.len() {
        0 => Ok(None),
        1..=8 => {
            let number = bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
            Ok(Some(number.into_pyobject(py)?.into_any()))
        }
        _ => Ok(Some(pyo3::types::PyBytes::new(py, bytes).into_any())),
    }
}

impl PyBreakpoint {
    /// Replaces the condition.
    pub fn replace_condition(&self, condition: Condition) {
        self.inner.set_condition(condition);
    }
}
