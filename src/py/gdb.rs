//! The server for gdb as Python sees it, and a policy in Python as the server sees it. What the policy does not override
//! never enters Python.

use std::any::Any;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};

use pyo3::prelude::*;

use super::breakpoint::{CompiledParts, program};
use super::callbacks::{Kept, PyPredicate, Raised};
use super::errors::{detached, to_python};
use super::machine::{Interrupted, PyMachine, check_signals, deadline, is_interpreter_ending, thread_wrapper};
use crate::debug::breakpoints::{Breakpoint, Condition, Predicate};
use crate::debug::condition::Program;
use crate::debug::stop::Stop;
use crate::gdb::address::Address;
use crate::gdb::breakpoints::{Key, WatchKey};
use crate::gdb::policy::{Answer, Decision, Failure, Policy, Request, ThreadInfo, Wish};
use crate::gdb::server::Server;
use crate::registers::RegisterId;
use crate::vm::Machine;

/// A policy that lives in Python: an object of the package that the server asks.
struct PyPolicy {
    /// The object, in the table of the VM's callables: who closes the VM lets go of it.
    kept: Mutex<Arc<Kept>>,
    /// The methods that the user's policy has overridden.
    overridden: HashSet<String>,
    failures: Arc<Mutex<Vec<KeptFailure>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// What was raised, and the number of the stop that raised it too, if there is one.
type KeptFailure = (PyErr, Option<u64>);

/// How Python wants a breakpoint: why not, name, compiled condition, callable, hits to ignore, vCPU.
type WishParts = (Option<String>, Option<String>, Option<CompiledParts>, Option<Py<PyAny>>, u64, Option<u32>);

/// A thread as Python gives it: number, name, what `info threads` adds, vCPU, registers that differ from the vCPU's.
type ThreadParts = (u32, String, String, u32, Vec<(String, u64)>);

impl PyPolicy {
    /// Calls `f` with the policy's object, unless the VM is closed.
    fn with<T>(&self, f: impl FnOnce(Python<'_>, &Bound<'_, PyAny>) -> PyResult<T>) -> Option<Result<T, Failure>> {
        let answer = Python::try_attach(|py| {
            let kept = lock(&self.kept).clone();
            let object = kept.get(py)?;
            Some(f(py, object.bind(py)).map_err(|error| failure(py, error)))
        });
        answer.flatten()
    }

    fn ask<T>(&self, method: &str, f: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<T>) -> Answer<T> {
        if !self.overridden.contains(method) {
            return None;
        }
        self.with(|_, object| f(object))
    }

    fn keep_raised(&self, failure: &Failure, stop: Option<u64>) {
        if let Some(raised) = failure.error.downcast_ref::<Raised>() {
            let copy = Python::attach(|py| raised.0.clone_ref(py));
            lock(&self.failures).push((copy, stop));
        }
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
    Failure { text: text_of(py, &error), error: Arc::new(Raised(error)) }
}

fn text_of(py: Python<'_>, error: &PyErr) -> String {
    let name = error.get_type(py).name().map_or_else(|_| "an exception".to_owned(), |name| name.to_string());
    format!("{name}: {}", error.value(py))
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

/// A request as Python takes it: kind, address, size, whether it has a condition.
fn request_parts(request: &Request) -> (&'static str, u64, u64, bool) {
    let (kind, address, size) = match request.key {
        Key::Software(address) => ("breakpoint", address, 1),
        Key::Hardware(address) => ("hardware", address, 1),
        Key::Watch(address, size, WatchKey::Write) => ("write", address, size),
        Key::Watch(address, size, WatchKey::Read) => ("read", address, size),
        Key::Watch(address, size, WatchKey::ReadWrite) => ("access", address, size),
    };
    (kind, address, size, request.is_conditional)
}

impl Policy for PyPolicy {
    fn judges(&self) -> bool {
        self.overridden.contains("on_stop")
    }

    fn on_stop(&self, _stop: &Stop) -> Answer<Decision> {
        self.ask("on_stop", |object| decision(&object.call_method0("on_stop")?.extract::<String>()?))
    }

    fn on_insert(&self, request: &Request) -> Answer<Wish> {
        self.ask("on_insert", |object| {
            let parts: WishParts = object.call_method1("on_insert", request_parts(request))?.extract()?;
            let (refusal, name, compiled, callable, ignore, vcpu) = parts;
            let compiled = compiled.map(program).transpose().map_err(|error| to_python(object.py(), error))?;
            let kept = lock(&self.kept).clone();
            let predicate = callable.map(|callable| {
                let predicate: Arc<dyn Predicate> = Arc::new(PyPredicate::new(kept.sibling(callable)));
                predicate
            });
            Ok(Wish { refusal, name, compiled, predicate, ignore, vcpu })
        })
    }

    fn on_remove(&self, request: &Request) -> Answer<()> {
        self.ask("on_remove", |object| object.call_method1("on_remove", request_parts(request)).map(drop))
    }

    fn describe(&self, error: &Arc<dyn Any + Send + Sync>) -> Option<String> {
        let raised = error.downcast_ref::<Raised>()?;
        Some(Python::attach(|py| text_of(py, &raised.0)))
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
        breakpoint.set_condition(Condition { predicate: Some(predicate), ..breakpoint.condition() });
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
            let error: Arc<dyn Any + Send + Sync> = Arc::new(());
            Err(Failure { text: "the VM is closed".into(), error })
        })
    }

    fn keep(&self, failure: Failure) {
        self.keep_raised(&failure, None);
    }

    fn keep_of_stop(&self, failure: Failure, stop: u64) {
        self.keep_raised(&failure, Some(stop));
    }
}

/// A server for gdb. The package's `GdbServer` is made of this.
#[pyclass(name = "GdbServer", frozen, module = "uhyve._core")]
pub struct PyGdbServer {
    server: Server,
    failures: Arc<Mutex<Vec<KeptFailure>>>,
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
        let mut check = check_signals;
        py.detach(|| self.server.wait(deadline, &mut check)).map_err(|e| match e {
            Interrupted::Raised(error) => error,
            Interrupted::Failed(error) => to_python(py, error),
        })
    }

    /// The oldest exception that the policy or a callback has raised and nobody has seen; and the number of the stop that
    /// raises it too, if there is one.
    fn take_failure(&self, py: Python<'_>) -> Option<(Py<PyAny>, Option<u64>)> {
        let mut failures = lock(&self.failures);
        let (error, stop) = (!failures.is_empty()).then(|| failures.remove(0))?;
        Some((error.into_value(py).into_any(), stop))
    }

    /// Stops listening and drops the client.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.server.close());
    }
}

impl Drop for PyGdbServer {
    fn drop(&mut self) {
        if is_interpreter_ending() {
            self.server.abandon();
            return;
        }
        // The server's thread may want the interpreter before it ends.
        Python::try_attach(|py| py.detach(|| self.server.close()));
    }
}
