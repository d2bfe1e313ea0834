//! The server for gdb as Python sees it, and a policy in Python as the server sees it. What the policy does not override
//! never enters Python.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};

use pyo3::prelude::*;

use super::breakpoint::{CompiledParts, program};
use super::callbacks::{Kept, PyPredicate, Raised};
use super::errors::{detached, to_python};
use super::machine::{Interrupted, PyMachine, deadline, thread_wrapper};
use crate::debug::breakpoints::{Breakpoint, Condition};
use crate::debug::condition::Program;
use crate::debug::stop::Stop;
use crate::gdb::address::Address;
use crate::gdb::policy::{Answer, Decision, Failure, Policy, ThreadInfo};
use crate::gdb::server::Server;
use crate::registers::RegisterId;
use crate::vm::Machine;

/// A policy that lives in Python: an object of the package that the server asks.
struct PyPolicy {
    /// The object, in the table of the VM's callables: who closes the VM lets go of it.
    kept: Mutex<Arc<Kept>>,
    /// The methods that the user's policy has overridden.
    overridden: HashSet<String>,
    failures: Arc<Mutex<Vec<PyErr>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// A thread as Python gives it: number, name, what `info threads` adds, vCPU, registers that differ from the vCPU's.
type ThreadParts = (u32, String, String, u32, Vec<(String, u64)>);

impl PyPolicy {
    /// Calls `f` with the policy's object, unless the VM is closed.
    fn with<T>(&self, f: impl FnOnce(Python<'_>, &Bound<'_, PyAny>) -> PyResult<T>) -> Option<Result<T, Failure>> {
        Python::attach(|py| {
            let kept = lock(&self.kept).clone();
            let object = kept.get(py)?;
            Some(f(py, object.bind(py)).map_err(|error| failure(py, error)))
        })
    }

    fn ask<T>(&self, method: &str, f: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<T>) -> Answer<T> {
        if !self.overridden.contains(method) {
            return None;
        }
        self.with(|_, object| f(object))
    }

    /// The text of a failure alone, for what the client asked itself.
    fn answer<T>(&self, f: impl FnOnce(Python<'_>, &Bound<'_, PyAny>) -> PyResult<T>) -> Result<T, String> {
        match self.with(f) {
            Some(result) => result.map_err(|failure| failure.text),
            None => Err("the VM is closed".into()),
        }
    }
}

fn failure(py: Python<'_>, error: PyErr) -> Failure {
    // The exception travels as a value; before Python 3.12 its traceback is not a part of that.
    if let Some(traceback) = error.traceback(py) {
        let _ = error.value(py).setattr("__traceback__", traceback);
    }
    let name = error.get_type(py).name().map_or_else(|_| "an exception".to_owned(), |name| name.to_string());
    Failure { text: format!("{name}: {}", error.value(py)), error: Arc::new(Raised(error)) }
}

fn decision(word: &str) -> PyResult<Decision> {
    match word {
        "report" => Ok(Decision::Report),
        "resume" => Ok(Decision::Resume),
        "step" => Ok(Decision::Step),
        "end" => Ok(Decision::End),
        other => Err(pyo3::exceptions::PyValueError::new_err(format!("{other:?} is no decision"))),
    }
}

fn thread((id, name, extra, vcpu, registers): ThreadParts) -> PyResult<ThreadInfo> {
    let saved = registers.into_iter().map(|(register, value)| match RegisterId::from_name(&register) {
        Some(id) => Ok((id, value)),
        None => Err(pyo3::exceptions::PyValueError::new_err(format!("thread {id}: there is no register {register:?}"))),
    });
    Ok(ThreadInfo { id, name, extra, vcpu, saved: saved.collect::<PyResult<_>>()? })
}

impl Policy for PyPolicy {
    fn judges(&self) -> bool {
        self.overridden.contains("on_stop")
    }

    fn on_stop(&self, _stop: &Stop) -> Answer<Decision> {
        self.ask("on_stop", |object| decision(&object.call_method0("on_stop")?.extract::<String>()?))
    }

    fn threads(&self) -> Answer<Vec<ThreadInfo>> {
        self.ask("threads", |object| {
            let parts: Vec<ThreadParts> = object.call_method0("threads")?.extract()?;
            parts.into_iter().map(thread).collect()
        })
    }

    fn on_attach(&self, client: &str) -> Answer<()> {
        self.ask("on_attach", |object| object.call_method1("on_attach", (client,)).map(drop))
    }

    fn on_detach(&self, client: &str) -> Answer<()> {
        self.ask("on_detach", |object| object.call_method1("on_detach", (client,)).map(drop))
    }

    fn on_disconnect(&self, client: &str) -> Answer<Decision> {
        self.ask("on_disconnect", |object| {
            decision(&object.call_method1("on_disconnect", (client,))?.extract::<String>()?)
        })
    }

    fn monitor(&self, command: &str, arguments: &str) -> Answer<String> {
        self.ask("monitor", |object| object.call_method1("monitor", (command, arguments))?.extract::<Option<String>>())
            .and_then(Result::transpose)
    }

    fn monitor_commands(&self) -> Vec<(String, String)> {
        let commands = self.ask("monitor", |object| object.call_method0("monitor_commands")?.extract());
        commands.and_then(Result::ok).unwrap_or_default()
    }

    fn bind(&self, breakpoint: &Arc<Breakpoint>, name: &str) -> Result<(), String> {
        let kept = lock(&self.kept).clone();
        let callable = self.answer(|_, object| Ok(object.call_method1("callable", (name,))?.unbind()))?;
        let predicate = Arc::new(PyPredicate::new(kept.sibling(callable)));
        let compiled = breakpoint.condition().compiled;
        breakpoint.set_condition(Condition { compiled, predicate: Some(predicate), ..Condition::default() });
        Ok(())
    }

    fn compile(&self, text: &str) -> Result<Program, String> {
        let parts: CompiledParts = self.answer(|_, object| object.call_method1("compile", (text,))?.extract())?;
        program(parts).map(|(_, program)| Arc::unwrap_or_clone(program)).map_err(|error| error.to_string())
    }

    fn restart(&self, arguments: Option<Vec<String>>) -> Result<Arc<Machine>, Failure> {
        let restarted = self.with(|_, object| {
            let fresh = object.call_method1("restart", (arguments,))?;
            let fresh = fresh.cast::<PyMachine>()?.get();
            *lock(&self.kept) = fresh.callbacks().keep(object.clone().unbind());
            Ok(fresh.machine()?.clone())
        });
        restarted.unwrap_or_else(|| {
            let error: Arc<dyn std::any::Any + Send + Sync> = Arc::new(());
            Err(Failure { text: "the VM is closed".into(), error })
        })
    }

    fn keep(&self, failure: Failure) {
        if let Some(raised) = failure.error.downcast_ref::<Raised>() {
            let copy = Python::attach(|py| raised.0.clone_ref(py));
            lock(&self.failures).push(copy);
        }
    }
}

/// A server for gdb. The package's `GdbServer` is made of this.
#[pyclass(name = "GdbServer", frozen, module = "uhyve._core")]
pub struct PyGdbServer {
    server: Server,
    failures: Arc<Mutex<Vec<PyErr>>>,
}

#[pymethods]
impl PyGdbServer {
    /// Listens at `address`. `bridge` answers for the policy; `overridden` names the methods that it is asked.
    #[new]
    fn new(
        py: Python<'_>,
        machine: &PyMachine,
        address: &str,
        bridge: Py<PyAny>,
        overridden: HashSet<String>,
    ) -> PyResult<Self> {
        let address = Address::parse(address).map_err(|e| to_python(py, e))?;
        let failures = Arc::new(Mutex::new(Vec::new()));
        let kept = Mutex::new(machine.callbacks().keep(bridge));
        let policy: Arc<dyn Policy> = Arc::new(PyPolicy { kept, overridden, failures: failures.clone() });
        let machine = machine.machine()?.clone();
        let server = detached(py, || Server::start(machine, &address, Some(policy), Some(thread_wrapper())))?;
        Ok(Self { server, failures })
    }

    /// Where it listens: "HOST:PORT", a path, or "-".
    #[getter]
    fn address(&self) -> &str {
        self.server.address()
    }

    /// The client that is attached.
    #[getter]
    fn client(&self) -> Option<String> {
        self.server.client()
    }

    /// Waits until the guest has ended and no client is attached, or the server is closed. False: the time is over.
    #[pyo3(signature = (timeout = None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let deadline = timeout.map(deadline).transpose().map_err(|e| to_python(py, e))?;
        let mut check = || Python::attach(|py| py.check_signals()).map_err(Interrupted::Raised);
        py.detach(|| self.server.wait(deadline, &mut check)).map_err(|e| match e {
            Interrupted::Raised(error) => error,
            Interrupted::Failed(error) => to_python(py, error),
        })
    }

    /// The oldest exception that the policy has raised and nobody has seen.
    fn take_failure(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        let mut failures = lock(&self.failures);
        (!failures.is_empty()).then(|| failures.remove(0).into_value(py).into_any())
    }

    /// Stops listening and drops the client.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.server.close());
    }
}

impl Drop for PyGdbServer {
    fn drop(&mut self) {
        // The server's thread may want the interpreter before it ends.
        Python::try_attach(|py| py.detach(|| self.server.close()));
    }
}
