//! Python callables that the guest calls for. Their only strong references are in a table that the `Machine` object shows to
//! the garbage collector, so that a callback that refers to its own debugger does not keep it alive for ever.

use std::any::Any;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use super::hit::PyHit;
use crate::debug::breakpoints::{Hit, Predicate};

/// The callables of one VM, by number.
#[derive(Default)]
pub struct Callbacks {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    next: u64,
    callables: HashMap<u64, Py<PyAny>>,
    /// What a console callback raised.
    console_error: Option<PyErr>,
}

impl Callbacks {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Keeps a callable; it is dropped with the returned key's last clone.
    pub fn keep(self: &Arc<Self>, callable: Py<PyAny>) -> Arc<Kept> {
        let mut table = self.lock();
        table.next += 1;
        let key = table.next;
        table.callables.insert(key, callable);
        Arc::new(Kept { callbacks: self.clone(), key })
    }

    /// Shows the callables to the garbage collector.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        // A table that is in use just now is reachable from its user.
        if let Ok(table) = self.table.try_lock() {
            for callable in table.callables.values() {
                visit.call(callable)?;
            }
        }
        Ok(())
    }

    /// Lets go of all of them.
    pub fn clear(&self) {
        let callables = std::mem::take(&mut self.lock().callables);
        drop(callables);
    }

    /// What a console callback raised, once.
    pub fn take_console_error(&self) -> Option<PyErr> {
        self.lock().console_error.take()
    }
}

/// A callable in the table.
pub struct Kept {
    callbacks: Arc<Callbacks>,
    key: u64,
}

impl Kept {
    /// Keeps another callable in the same table.
    pub fn sibling(&self, callable: Py<PyAny>) -> Arc<Kept> {
        self.callbacks.keep(callable)
    }

    /// The callable; `None` when the VM is closed.
    pub fn get(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.callbacks.lock().callables.get(&self.key).map(|c| c.clone_ref(py))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let callable = self.callbacks.lock().callables.remove(&self.key);
        // Dropped outside of the lock: a finaliser may come back here.
        if let Some(callable) = callable {
            Python::try_attach(|_| drop(callable));
        }
    }
}

/// A Python callable as a breakpoint's condition.
pub struct PyPredicate {
    kept: Arc<Kept>,
}

impl PyPredicate {
    /// A predicate that calls what is kept.
    pub fn new(kept: Arc<Kept>) -> Self {
        Self { kept }
    }

    /// The callable itself.
    pub fn callable(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.kept.get(py)
    }
}

impl Predicate for PyPredicate {
    fn evaluate(&self, hit: &Hit) -> Result<bool, Arc<dyn Any + Send + Sync>> {
        let verdict = Python::try_attach(|py| {
            let Some(callable) = self.kept.get(py) else { return Ok(false) };
            let verdict =
                Bound::new(py, PyHit::new(hit.clone())).and_then(|hit| callable.bind(py).call1((hit,))?.is_truthy());
            verdict.map_err(|error| {
                note(py, &error, hit);
                let error: Arc<dyn Any + Send + Sync> = Arc::new(Raised(error));
                error
            })
        });
        verdict.unwrap_or(Ok(false))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// An exception on its way from a callback to the call that let the guest run.
pub struct Raised(pub PyErr);

fn note(py: Python<'_>, error: &PyErr, hit: &Hit) {
    // The exception travels as a value; before Python 3.12 its traceback is not a part of that.
    if let Some(traceback) = error.traceback(py) {
        let _ = error.value(py).setattr("__traceback__", traceback);
    }
    let symbol = hit.machine.symbol_at(hit.pc).map(|s| format!(" ({s})")).unwrap_or_default();
    let what = if hit.touch.is_some() { "watchpoint" } else { "breakpoint" };
    let text = format!(
        "raised by the callback of {what} {} on vCPU {} at pc {:#x}{symbol}",
        hit.breakpoint.id, hit.vcpu, hit.pc
    );
    // An exception type that refuses notes stays as it is.
    let _ = error.value(py).call_method1("add_note", (text,));
}

/// A console sink that calls a Python callable with bytes.
pub fn console(callbacks: Arc<Callbacks>, kept: Arc<Kept>) -> crate::devices::serial::Callback {
    Box::new(move |text| {
        Python::try_attach(|py| {
            let Some(callable) = kept.get(py) else { return Ok(()) };
            callable.call1(py, (pyo3::types::PyBytes::new(py, text),)).map(drop).map_err(|error| {
                let what = error.to_string();
                callbacks.lock().console_error = Some(error);
                io::Error::other(what)
            })
        })
        .unwrap_or(Ok(()))
    })
}
