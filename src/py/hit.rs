//! A vCPU at a breakpoint, as a callback sees it; and how a script reaches a vCPU: while the world is stopped, or
//! inside its callback.

use std::sync::Arc;

use pyo3::prelude::*;

use super::breakpoint::{PyBreakpoint, watched};
use super::errors::to_python;
use super::memory::PyMemory;
use super::registers::PyRegisters;
use crate::debug::breakpoints::Hit;
use crate::error::Result;
use crate::registers::ARGUMENTS;
use crate::vcpu::Context;
use crate::vm::Machine;

/// The right to use a vCPU.
#[derive(Clone)]
pub enum Reach {
    /// While the world is stopped.
    Stopped(Arc<Machine>, u32),
    /// While its callback runs.
    Hit(Hit),
}

impl Reach {
    /// Uses the vCPU.
    pub fn with<T>(&self, f: impl FnOnce(&mut Context) -> Result<T>) -> Result<T> {
        match self {
            Self::Stopped(machine, vcpu) => machine.with_vcpu(*vcpu, f),
            Self::Hit(hit) => hit.machine.with_hit(hit, f),
        }
    }

    /// The VM.
    pub fn machine(&self) -> &Arc<Machine> {
        match self {
            Self::Stopped(machine, _) => machine,
            Self::Hit(hit) => &hit.machine,
        }
    }

    /// The vCPU's number.
    pub fn vcpu(&self) -> u32 {
        match self {
            Self::Stopped(_, vcpu) => *vcpu,
            Self::Hit(hit) => hit.vcpu,
        }
    }
}

/// A vCPU that met a breakpoint. Usable only inside the callback that got it.
#[pyclass(name = "Hit", frozen, module = "uhyve._core")]
pub struct PyHit {
    hit: Hit,
}

impl PyHit {
    /// A hit for a callback.
    pub fn new(hit: Hit) -> Self {
        Self { hit }
    }
}

#[pymethods]
impl PyHit {
    #[getter]
    fn vcpu(&self) -> u32 {
        self.hit.vcpu
    }

    #[getter]
    fn pc(&self) -> u64 {
        self.hit.pc
    }

    #[getter]
    fn breakpoint(&self) -> PyBreakpoint {
        PyBreakpoint::new(self.hit.machine.clone(), self.hit.breakpoint.clone())
    }

    /// Of a watchpoint: the first watched byte that was accessed.
    #[getter]
    fn address(&self) -> Option<u64> {
        self.hit.touch.as_ref().map(|t| t.address)
    }

    /// Of a watchpoint: "write" or "read".
    #[getter]
    fn access(&self) -> Option<&'static str> {
        self.hit.touch.as_ref().map(|t| t.access())
    }

    /// Of a watchpoint: what was there before.
    #[getter]
    fn get_old<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.hit.touch.as_ref().map_or(Ok(None), |t| watched(py, &t.old))
    }

    /// Of a watchpoint: what is there now.
    #[getter]
    fn get_new<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.hit.touch.as_ref().map_or(Ok(None), |t| watched(py, &t.new))
    }

    #[getter]
    fn symbol(&self) -> Option<String> {
        self.hit.machine.symbol_at(self.hit.pc)
    }

    #[getter]
    fn registers(&self) -> PyRegisters {
        PyRegisters::new(Reach::Hit(self.hit.clone()))
    }

    #[getter]
    fn memory(&self) -> PyMemory {
        PyMemory::new(Reach::Hit(self.hit.clone()), false)
    }

    /// The n-th integer argument, 0 to 5, of the System V calling convention.
    fn arg(&self, py: Python<'_>, n: usize) -> PyResult<u64> {
        let register = *ARGUMENTS.get(n).ok_or_else(|| {
            pyo3::exceptions::PyIndexError::new_err(format!("argument {n} is not in a register; 0 to 5 are (System V)"))
        })?;
        Reach::Hit(self.hit.clone()).with(|c| Ok(c.cpu.registers()?.general[register])).map_err(|e| to_python(py, e))
    }

    fn __repr__(&self) -> String {
        let at = self.hit.machine.symbol_at(self.hit.pc).unwrap_or_else(|| format!("{:#x}", self.hit.pc));
        let what = if self.hit.touch.is_some() { "watchpoint" } else { "breakpoint" };
        format!("<Hit of {what} {} on vCPU {} at {at}>", self.hit.breakpoint.id, self.hit.vcpu)
    }
}
