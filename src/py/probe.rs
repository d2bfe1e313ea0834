//! What KVM on this machine can do, and which back end is chosen for it, for `uhyve doctor`.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::errors::detached;
use crate::backend::{self, Capabilities, Int3, kvm, soft};

/// The back end that a VM with `backend=name` gets, and why. Raises ConfigError for an unknown name.
#[pyfunction]
pub fn choose_backend(py: Python<'_>, name: &str) -> PyResult<(&'static str, String)> {
    let choice = detached(py, || backend::choose(name))?;
    Ok((choice.name, choice.reason))
}

/// Probes KVM with small guests. Raises HypervisorUnavailableError, with advice, where there is none.
#[pyfunction]
pub fn probe_kvm(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let found = detached(py, kvm::probe::capabilities)?;
    dictionary(py, &found)
}

/// What the software CPU can do, in the same form.
#[pyfunction]
pub fn probe_soft(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    dictionary(py, &soft::CAPABILITIES)
}

fn dictionary<'py>(py: Python<'py>, found: &Capabilities) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("native_ring0", found.native_ring0)?;
    dict.set_item("single_step", found.single_step)?;
    dict.set_item("block_interrupts", found.block_interrupts)?;
    dict.set_item(
        "int3",
        match found.int3 {
            Int3::DebugExit => "debug exit",
            Int3::Unemulated => "internal error",
            Int3::NotIntercepted => "not intercepted",
        },
    )?;
    dict.set_item("hardware_breakpoints", found.hardware_breakpoints)?;
    dict.set_item("watchpoints", found.watchpoints)?;
    Ok(dict)
}
