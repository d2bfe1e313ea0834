//! A running VM as Python sees it. The package's `Vm` and `Debugger` are made of this.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use pyo3::{PyTraverseError, PyVisit};

use super::bench;
use super::breakpoint::{CompiledParts, PyBreakpoint, program, watched};
use super::callbacks::{self, Callbacks, PyPredicate, Raised};
use super::errors::{crashed, detached, to_python};
use super::hit::Reach;
use super::image::PyImage;
use super::memory::PyMemory;
use super::registers::PyRegisters;
use crate::backend::soft::clock::ClockKind;
use crate::debug::backtrace::{self, Frame};
use crate::debug::breakpoints::{BreakpointOptions, Condition};
use crate::debug::engine::{End, Plan, Status};
use crate::debug::stop::{Stop, StopReason};
use crate::debug::watchpoints::WatchAccess;
use crate::devices::serial::Output;
use crate::error::{Error, Result};
use crate::isolation::landlock::FileIsolation;
use crate::isolation::{IoMode, Source};
use crate::memory::Backing;
use crate::stats::latency::Sampling;
use crate::vm::{Config, Machine, Measure, SoftConfig, ThreadWrapper};

/// A VM from its start to its end.
#[pyclass(name = "Machine", frozen, module = "uhyve._core")]
pub struct PyMachine {
    machine: Arc<Machine>,
    callbacks: Arc<Callbacks>,
}

/// What a file of the guest is made from.
#[derive(FromPyObject)]
enum FileSource {
    Bytes(Vec<u8>),
    Path(std::path::PathBuf),
}

/// The keyword arguments of `Machine`, in one struct.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Arguments {
    memory: Option<u64>,
    cpus: Option<u32>,
    kernel_args: Option<Vec<String>>,
    args: Option<Vec<String>>,
    env: Vec<(String, String)>,
    files: Vec<(String, FileSource)>,
    output: Py<PyAny>,
    output_limit: usize,
    backend: String,
    aslr: bool,
    guest_address: Option<u64>,
    thp: bool,
    ksm: bool,
    pit: bool,
    cpu_pm: bool,
    affinity: Vec<usize>,
    tempdir: Option<std::path::PathBuf>,
    file_isolation: String,
    io_direct: bool,
    io_sync: bool,
    seed: Option<u64>,
    quantum: Option<u64>,
    clock: Option<String>,
    debugging: bool,
    sampling: u32,
    sampling_skip: u32,
    firmware_exits: bool,
}

fn output(py: Python<'_>, arguments: &Arguments, callbacks: &Arc<Callbacks>) -> PyResult<Output> {
    let wanted = arguments.output.bind(py);
    if wanted.is_callable() {
        let kept = callbacks.keep(wanted.clone().unbind());
        return Ok(Output::Callback(callbacks::console(callbacks.clone(), kept)));
    }
    if let Ok(word) = wanted.extract::<String>() {
        return match word.as_str() {
            "stdout" => Ok(Output::Stdout),
            "stderr" => {
                let same = std::io::stderr().as_fd().try_clone_to_owned();
                same.map(|fd| Output::File(fd.into())).map_err(|source| {
                    to_python(py, Error::Host { what: "the standard error output is not open".into(), source })
                })
            }
            "capture" => Ok(Output::Capture { limit: arguments.output_limit }),
            "none" => Ok(Output::Discard),
            _ => Err(to_python(
                py,
                Error::Config(format!(
                    "output {word:?} is unknown; choose \"capture\", \"stdout\", \"stderr\", \"none\", a callable, or a pathlib.Path for a file"
                )),
            )),
        };
    }
    let path: std::path::PathBuf = wanted.extract()?;
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(&path);
    file.map(Output::File).map_err(|source| {
        to_python(py, Error::Host { what: format!("can't create the output file {}", path.display()), source })
    })
}

fn soft(arguments: &Arguments) -> Result<SoftConfig> {
    let clock = |word: &String| {
        ClockKind::from_name(word)
            .ok_or_else(|| Error::Config(format!("clock {word:?} is unknown; choose \"virtual\" or \"host\"")))
    };
    let clock = arguments.clock.as_ref().map(clock).transpose()?;
    Ok(SoftConfig { seed: arguments.seed, quantum: arguments.quantum, clock })
}

fn isolation(word: &str) -> Result<FileIsolation> {
    match word {
        "none" => Ok(FileIsolation::None),
        "normal" => Ok(FileIsolation::Normal),
        "strict" => Ok(FileIsolation::Strict),
        _ => {
            Err(Error::Config(format!("file isolation {word:?} is unknown; choose \"none\", \"normal\" or \"strict\"")))
        }
    }
}

impl PyMachine {
    /// The callables that its VM holds.
    pub(super) fn callbacks(&self) -> &Arc<Callbacks> {
        &self.callbacks
    }

    /// A fork has copied this object, but not the VM's threads.
    pub(super) fn machine(&self) -> PyResult<&Arc<Machine>> {
        match self.machine.check_owner() {
            Ok(()) => Ok(&self.machine),
            Err(error) => Python::attach(|py| Err(to_python(py, error))),
        }
    }

    fn stop_dict<'py>(&self, py: Python<'py>, stop: Stop) -> PyResult<Bound<'py, PyDict>> {
        let stop = py.detach(|| self.machine.describe(stop));
        let dict = PyDict::new(py);
        dict.set_item("reason", stop.reason.name())?;
        dict.set_item("vcpu", stop.vcpu)?;
        dict.set_item("pc", stop.pc)?;
        dict.set_item("number", stop.number)?;
        dict.set_item("symbol", self.machine.symbol_at(stop.pc))?;
        match &stop.reason {
            StopReason::Breakpoint { breakpoint, error } => {
                dict.set_item("breakpoint", PyBreakpoint::new(self.machine.clone(), breakpoint.clone()))?;
                dict.set_item("message", error.as_deref())?;
            }
            StopReason::Watchpoint { breakpoint, touch, error } => {
                dict.set_item("breakpoint", PyBreakpoint::new(self.machine.clone(), breakpoint.clone()))?;
                dict.set_item("message", error.as_deref())?;
                dict.set_item("address", touch.address)?;
                dict.set_item("access", touch.access())?;
                dict.set_item("old", watched(py, &touch.old)?)?;
                dict.set_item("new", watched(py, &touch.new)?)?;
            }
            StopReason::Exception { breakpoint, error } => {
                dict.set_item("breakpoint", PyBreakpoint::new(self.machine.clone(), breakpoint.clone()))?;
                if let Some(raised) = error.downcast_ref::<Raised>() {
                    dict.set_item("exception", raised.0.value(py))?;
                }
            }
            StopReason::Exit { code } => dict.set_item("code", code)?,
            StopReason::Crash(crash) => {
                dict.set_item("message", crash.to_string())?;
                dict.set_item("crash", crashed(py, crash)?.value(py))?;
            }
            _ => {}
        }
        Ok(dict)
    }

    fn status_dict<'py>(&self, py: Python<'py>, status: Status) -> PyResult<Option<Bound<'py, PyDict>>> {
        let dict = PyDict::new(py);
        match status {
            Status::Running => return Ok(None),
            Status::Stopped(stop) => return self.stop_dict(py, stop).map(Some),
            Status::Ended(end) => match &*end {
                End::Exit(code) => dict.set_item("ended", code)?,
                End::Crash(crash) => return Err(crashed(py, crash)?),
                End::Killed => dict.set_item("ended", py.None())?,
                End::Failed(error) => return Err(self.failure(py, error)),
            },
        }
        Ok(Some(dict))
    }

    /// The host's failure that ended the VM; of a console callback, its own exception.
    fn failure(&self, py: Python<'_>, error: &Error) -> PyErr {
        if let Some(raised) = self.callbacks.take_console_error() {
            return raised;
        }
        let copy = match error {
            Error::Host { what, source } => Error::Host { what: what.clone(), source: copy_io(source) },
            Error::Hypervisor { call, source } => Error::Hypervisor { call, source: copy_io(source) },
            Error::Config(text) => Error::Config(text.clone()),
            other => Error::VmState(other.to_string()),
        };
        to_python(py, copy)
    }
}

fn copy_io(error: &std::io::Error) -> std::io::Error {
    match error.raw_os_error() {
        Some(errno) => std::io::Error::from_raw_os_error(errno),
        None => std::io::Error::other(error.to_string()),
    }
}

#[pymethods]
impl PyMachine {
    /// Builds a machine and starts it. `arguments` has a key for each field of the VM's configuration.
    #[new]
    fn new(py: Python<'_>, image: &PyImage, arguments: Arguments) -> PyResult<Self> {
        if is_interpreter_ending() {
            // The module of our exceptions may be gone.
            return Err(PyRuntimeError::new_err("Python is ending: no VM can be started any more"));
        }
        let callbacks = Arc::new(Callbacks::default());
        let output = output(py, &arguments, &callbacks)?;
        let isolation = isolation(&arguments.file_isolation).map_err(|e| to_python(py, e))?;
        let soft = soft(&arguments).map_err(|e| to_python(py, e))?;
        let files = arguments.files.into_iter().map(|(guest, source)| {
            (
                guest,
                match source {
                    FileSource::Bytes(data) => Source::Bytes(data.into()),
                    FileSource::Path(path) => Source::Host(path),
                },
            )
        });
        let config = Config {
            image: image.inner.clone(),
            memory: arguments.memory,
            cpus: arguments.cpus,
            kernel_args: arguments.kernel_args,
            args: arguments.args,
            environment: arguments.env,
            files: files.collect(),
            output,
            backend: arguments.backend,
            aslr: arguments.aslr,
            backing: Backing { huge_pages: arguments.thp, merge_pages: arguments.ksm },
            pit: arguments.pit,
            cpu_pm: arguments.cpu_pm,
            affinity: arguments.affinity,
            tempdir: arguments.tempdir,
            isolation,
            io_mode: IoMode { direct: arguments.io_direct, sync: arguments.io_sync },
            soft,
            debugging: arguments.debugging,
            wrapper: Some(thread_wrapper()),
            measure: Measure {
                sampling: Sampling { every: arguments.sampling, skip: arguments.sampling_skip },
                firmware_exits: arguments.firmware_exits,
            },
        };
        let machine = detached(py, || Machine::start_at(config, arguments.guest_address))?;
        Ok(Self { machine, callbacks })
    }

    /// The current state: None while running, otherwise what `wait` returns.
    fn status<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let status = self.machine()?.engine.status();
        self.status_dict(py, status)
    }

    /// Waits for a stop or the end, `timeout` seconds at most (for ever, if None). None: the time is over.
    /// A signal handler that raises ends the wait with its exception.
    #[pyo3(signature = (timeout = None))]
    fn wait<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let machine = self.machine()?;
        let deadline = match timeout {
            None => None,
            Some(seconds) => Some(deadline(seconds).map_err(|e| to_python(py, e))?),
        };
        let mut check = check_signals;
        let status = py.detach(|| machine.wait(deadline, &mut check)).map_err(|e| match e {
            Interrupted::Raised(error) => error,
            Interrupted::Failed(error) => self.callbacks.take_console_error().unwrap_or_else(|| to_python(py, error)),
        })?;
        match status {
            Some(status) => self.status_dict(py, status),
            None => Ok(None),
        }
    }

    /// Starts the world: `step` is a vCPU that executes one instruction (or as many as leave the addresses of `range`) while
    /// the others hold, or None for all to run.
    #[pyo3(signature = (step = None, range = None))]
    fn resume(&self, py: Python<'_>, step: Option<u32>, range: Option<(u64, u64)>) -> PyResult<()> {
        let machine = self.machine()?;
        if step.is_some_and(|n| n >= machine.cpus()) {
            let text = format!("there is no vCPU {}; this VM has {}", step.unwrap_or(0), machine.cpus());
            return Err(to_python(py, Error::VmState(text)));
        }
        detached(py, || {
            machine.resume(|n| match step {
                None => Plan::Run,
                Some(chosen) if chosen == n => match range {
                    Some((start, end)) => Plan::StepRange { start, end },
                    None => Plan::Step,
                },
                Some(_) => Plan::Hold,
            })
        })
    }

    /// Asks for a stop; `timed_out` names the reason. False if there is nothing to stop.
    #[pyo3(signature = (timed_out = false))]
    fn interrupt(&self, py: Python<'_>, timed_out: bool) -> PyResult<bool> {
        let machine = self.machine()?;
        let reason = if timed_out { StopReason::Timeout } else { StopReason::Interrupt };
        Ok(py.detach(|| machine.engine.interrupt(reason)))
    }

    /// Ends the VM without waiting for its threads.
    fn end(&self, py: Python<'_>) -> PyResult<()> {
        let machine = self.machine()?;
        py.detach(|| machine.kill());
        Ok(())
    }

    /// Lets go of all breakpoints and runs on; the guest's end is then the VM's.
    fn detach(&self, py: Python<'_>) -> PyResult<()> {
        let machine = self.machine()?;
        detached(py, || machine.detach())
    }

    /// Ends the VM and waits for its threads.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if self.machine.check_owner().is_err() {
            return Ok(());
        }
        if is_interpreter_ending() {
            self.machine.engine.end(End::Killed);
            return Ok(());
        }
        py.detach(|| self.machine.close());
        if crate::vcpu::is_own_thread(&self.machine) {
            return Ok(());
        }
        self.callbacks.clear();
        // A console callback may have raised after everybody stopped waiting.
        self.callbacks.take_console_error().map_or(Ok(()), Err)
    }

    #[pyo3(signature = (addresses, *, location, compiled, predicate, ignore, temporary, vcpu, enabled, name, hardware))]
    #[allow(clippy::too_many_arguments)]
    fn add_breakpoint(
        &self,
        py: Python<'_>,
        addresses: Vec<u64>,
        location: String,
        compiled: Option<CompiledParts>,
        predicate: Option<Py<PyAny>>,
        ignore: u64,
        temporary: bool,
        vcpu: Option<u32>,
        enabled: bool,
        name: Option<String>,
        hardware: bool,
    ) -> PyResult<PyBreakpoint> {
        let machine = self.machine()?;
        let condition = self.condition(py, compiled, predicate)?;
        let Some((&address, also)) = addresses.split_first() else {
            return Err(to_python(py, Error::Breakpoint("a breakpoint needs an address".into())));
        };
        let also = also.to_vec();
        let options = BreakpointOptions {
            location,
            also,
            name,
            ignore,
            temporary,
            vcpu,
            disabled: !enabled,
            hardware,
            internal: None,
        };
        let inner = detached(py, || machine.add_breakpoint(address, options, condition))?;
        Ok(PyBreakpoint::new(machine.clone(), inner))
    }

    #[pyo3(signature = (address, size, access, *, location, compiled, predicate, ignore, temporary, vcpu, enabled, name))]
    #[allow(clippy::too_many_arguments)]
    fn add_watchpoint(
        &self,
        py: Python<'_>,
        address: u64,
        size: u64,
        access: &str,
        location: String,
        compiled: Option<CompiledParts>,
        predicate: Option<Py<PyAny>>,
        ignore: u64,
        temporary: bool,
        vcpu: Option<u32>,
        enabled: bool,
        name: Option<String>,
    ) -> PyResult<PyBreakpoint> {
        let machine = self.machine()?;
        let access = WatchAccess::from_name(access).ok_or_else(|| {
            let text = format!("access {access:?} is unknown; choose \"write\", \"read\" or \"access\"");
            to_python(py, Error::Breakpoint(text))
        })?;
        let condition = self.condition(py, compiled, predicate)?;
        let options =
            BreakpointOptions { location, name, ignore, temporary, vcpu, disabled: !enabled, ..Default::default() };
        let inner = detached(py, || machine.add_watchpoint(address, size, access, options, condition))?;
        Ok(PyBreakpoint::new(machine.clone(), inner))
    }

    /// Replaces a breakpoint's condition.
    fn set_condition(
        &self,
        py: Python<'_>,
        breakpoint: &PyBreakpoint,
        compiled: Option<CompiledParts>,
        predicate: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        self.machine()?;
        let condition = self.condition(py, compiled, predicate)?;
        breakpoint.replace_condition(condition);
        Ok(())
    }

    fn breakpoints(&self) -> PyResult<Vec<PyBreakpoint>> {
        let machine = self.machine()?;
        Ok(machine.breakpoints().into_iter().map(|b| PyBreakpoint::new(machine.clone(), b)).collect())
    }

    fn instructions(&self, py: Python<'_>, vcpu: u32) -> PyResult<Option<u64>> {
        let machine = self.machine()?.clone();
        detached(py, || machine.with_vcpu(vcpu, |context| Ok(context.cpu.instructions())))
    }

    fn halted(&self, py: Python<'_>, vcpu: u32) -> PyResult<bool> {
        let machine = self.machine()?.clone();
        detached(py, || machine.with_vcpu(vcpu, |context| context.cpu.is_halted()))
    }

    fn registers(&self, vcpu: u32) -> PyResult<PyRegisters> {
        Ok(PyRegisters::new(Reach::Stopped(self.machine()?.clone(), vcpu)))
    }

    fn memory(&self, vcpu: u32) -> PyResult<PyMemory> {
        Ok(PyMemory::new(Reach::Stopped(self.machine()?.clone(), vcpu), false))
    }

    /// The address that a location names: "symbol", "symbol+0x10", "0x1234".
    fn resolve(&self, py: Python<'_>, location: &str) -> PyResult<u64> {
        let machine = self.machine()?;
        detached(py, || machine.symbols().resolve(location))
    }

    /// The addresses of a place: a source line's, `file.c:123`, or the one that `resolve` gives.
    fn resolve_place(&self, py: Python<'_>, place: &str) -> PyResult<Vec<u64>> {
        let machine = self.machine()?;
        detached(py, || machine.resolve(place))
    }

    /// Frames of a vCPU, the innermost first, as `describe` gives them.
    fn backtrace(&self, py: Python<'_>, vcpu: u32, limit: usize) -> PyResult<Vec<FrameParts>> {
        let machine = self.machine()?;
        let frames = detached(py, || machine.backtrace(vcpu, limit))?;
        Ok(frames.into_iter().map(frame_parts).collect())
    }

    /// The functions that an address lies in, the innermost first: pc, CFA (None), function, symbol and offset, file and
    /// line, whether it was inlined into the next.
    fn describe(&self, py: Python<'_>, pc: u64) -> PyResult<Vec<FrameParts>> {
        let machine = self.machine()?;
        let frames = py.detach(|| backtrace::describe_address(machine, pc));
        Ok(frames.into_iter().map(frame_parts).collect())
    }

    /// The canonical frame address of a vCPU's innermost frame, and where that returns to.
    fn caller(&self, py: Python<'_>, vcpu: u32) -> PyResult<Option<(u64, u64)>> {
        let machine = self.machine()?;
        detached(py, || machine.caller(vcpu))
    }

    /// The addresses around one that belong to the same source line.
    fn line_range(&self, py: Python<'_>, address: u64) -> PyResult<Option<(u64, u64)>> {
        let machine = self.machine()?;
        Ok(py.detach(|| machine.line_range(address)).map(|range| (range.start, range.end)))
    }

    /// Makes a vCPU stop, as after a step, at one of these addresses with a stack pointer of at least `stack`.
    fn stop_at(&self, py: Python<'_>, vcpu: u32, addresses: Vec<u64>, stack: u64) -> PyResult<PyBreakpoint> {
        let machine = self.machine()?;
        let inner = detached(py, || machine.stop_at(vcpu, &addresses, stack))?;
        Ok(PyBreakpoint::new(machine.clone(), inner))
    }

    /// Name and offset of the symbol at an address.
    fn symbolize(&self, address: u64) -> PyResult<Option<(String, u64)>> {
        Ok(self.machine()?.symbols().symbolize(address).map(|(symbol, offset)| (symbol.name, offset)))
    }

    /// What was captured of the console, and whether the limit cut it.
    fn output<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyBytes>, bool)> {
        let machine = self.machine()?;
        let text = py.detach(|| machine.console.captured());
        Ok((PyBytes::new(py, &text), machine.console.truncated()))
    }

    /// Counters of each vCPU: exits and hypercalls by kind.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let snapshot = self.machine()?.stats.snapshot();
        snapshot
            .into_iter()
            .map(|vcpu| {
                let (dict, exits, hypercalls) = (PyDict::new(py), PyDict::new(py), PyDict::new(py));
                vcpu.exits.into_iter().try_for_each(|(name, count)| exits.set_item(name, count))?;
                vcpu.hypercalls.into_iter().try_for_each(|(name, count)| hypercalls.set_item(name, count))?;
                dict.set_item("exits", exits)?;
                dict.set_item("hypercalls", hypercalls)?;
                Ok(dict)
            })
            .collect()
    }

    /// How long the exits of each vCPU took that were timed: reason, part (`total`, `run`, `vmm`, `dispatch`, `handler`,
    /// `script`), and its count, min, p50, p90, p99, p999, max and mean in nanoseconds.
    fn latencies<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let machine = self.machine()?;
        bench::summaries(py, py.detach(|| machine.stats.latencies.snapshot()))
    }

    /// The same as values in nanoseconds and how often each was seen.
    fn latency_buckets<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let machine = self.machine()?;
        bench::buckets(py, py.detach(|| machine.stats.latencies.snapshot()))
    }

    /// Forgets what was timed. From each vCPU's next resume on, one exit in `every` is timed, behind `skip`.
    #[pyo3(signature = (every, skip = 0))]
    fn restart_sampling(&self, every: u32, skip: u32) -> PyResult<()> {
        self.machine()?.stats.latencies.restart(Sampling { every, skip });
        Ok(())
    }

    /// Resumes the stopped world, stops it again after `seconds`, `rounds` times: nanoseconds until the first and the
    /// last vCPU had come to its safe point, until the caller was told, and for the resume before.
    fn time_stops(&self, py: Python<'_>, rounds: u32, seconds: f64) -> PyResult<Vec<(f64, f64, f64, f64)>> {
        let machine = self.machine()?;
        let between = Duration::try_from_secs_f64(seconds)
            .map_err(|_| to_python(py, Error::Config(format!("{seconds} is not a number of seconds"))))?;
        let found = detached(py, || crate::bench::stops::measure(machine, rounds, between))?;
        Ok(found.into_iter().map(|t| (t.first, t.last, t.stop, t.resume)).collect())
    }

    #[getter]
    fn cpus(&self) -> u32 {
        self.machine.cpus()
    }

    #[getter]
    fn backend(&self) -> &'static str {
        self.machine.backend_name()
    }

    /// What to add to an address of the image's file to get its address in the guest.
    #[getter]
    fn load_bias(&self) -> u64 {
        self.machine.layout.load_bias()
    }

    /// Guest-physical start and size of RAM in bytes.
    #[getter]
    fn ram(&self) -> (u64, u64) {
        (self.machine.memory.range().start, self.machine.memory.size())
    }

    /// Seconds from the start to now, or to the end.
    #[getter]
    fn elapsed(&self) -> f64 {
        self.machine.elapsed().as_secs_f64()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.callbacks.traverse(&visit)
    }

    fn __clear__(&self) {
        self.callbacks.clear();
    }
}

/// A frame as a tuple.
type FrameParts = (u64, Option<u64>, Option<String>, Option<(String, u64)>, Option<(String, u32)>, bool);

fn frame_parts(frame: Frame) -> FrameParts {
    let source = frame.source.map(|source| (source.file, source.line));
    (frame.pc, frame.cfa, frame.function, frame.symbol, source, frame.is_inlined)
}

impl PyMachine {
    fn condition(
        &self,
        py: Python<'_>,
        compiled: Option<CompiledParts>,
        predicate: Option<Py<PyAny>>,
    ) -> PyResult<Condition> {
        let compiled = compiled.map(program).transpose().map_err(|e| to_python(py, e))?;
        let predicate = predicate.map(|callable| Arc::new(PyPredicate::new(self.callbacks.keep(callable))) as Arc<_>);
        Ok(Condition { compiled, predicate, ..Default::default() })
    }
}

impl Drop for PyMachine {
    fn drop(&mut self) {
        if self.machine.check_owner().is_err() {
            return;
        }
        self.machine.engine.end(End::Killed);
        if is_interpreter_ending() {
            return;
        }
        // The last reference may go on a thread of the VM itself, and callbacks may want the interpreter: never join attached.
        Python::try_attach(|py| py.detach(|| self.machine.close()));
    }
}

/// How a wait ends early: by a Python exception of a signal handler, or by our own error.
pub(super) enum Interrupted {
    Raised(PyErr),
    Failed(Error),
}

impl From<Error> for Interrupted {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

pub(super) fn deadline(seconds: f64) -> Result<Instant> {
    let duration = Duration::try_from_secs_f64(seconds).map_err(|_| {
        Error::Config(format!("timeout {seconds} is not a number of seconds (0 or more, or None for no limit)"))
    })?;
    Instant::now()
        .checked_add(duration)
        .ok_or_else(|| Error::Config(format!("timeout {seconds} s is too far away; use None for no limit")))
}

/// What a wait does when a signal has arrived.
pub(super) fn check_signals() -> Result<(), Interrupted> {
    Python::try_attach(|py| py.check_signals()).unwrap_or(Ok(())).map_err(Interrupted::Raised)
}

/// Whether the interpreter clears its modules, behind `atexit`: a thread that wants it then waits for ever, and who joins
/// that thread, too. The end of the process takes it.
pub(super) fn is_interpreter_ending() -> bool {
    // SAFETY: needs neither an interpreter nor a thread state.
    unsafe { pyo3::ffi::Py_IsInitialized() == 0 }
}

/// Gives a thread one Python thread state for its life: attaching for a callback then costs 0.3 µs instead of 13.
pub(super) fn thread_wrapper() -> ThreadWrapper {
    Arc::new(|body: &mut dyn FnMut()| {
        let attached = Python::try_attach(|py| {
            let body = std::panic::AssertUnwindSafe(SendPtr(&mut *body));
            py.detach(move || body.0.call());
        });
        if attached.is_none() {
            body();
        }
    })
}

/// The body of a thread, carried through `Python::detach`, which runs it on the same thread.
struct SendPtr<'a>(&'a mut dyn FnMut());

// SAFETY: `detach` calls its closure on the calling thread, before it returns; nothing is sent anywhere.
unsafe impl Send for SendPtr<'_> {}

impl SendPtr<'_> {
    fn call(self) {
        (self.0)();
    }
}
