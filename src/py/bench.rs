//! What `uhyve.bench` needs of the core: the clock, the floor, and latencies as numbers.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use super::errors::{detached, to_python};
use crate::bench::crowd;
use crate::bench::floor::{self, Kind};
use crate::error::Error;
use crate::stats::clock;
use crate::stats::latency::{ReasonLatency, Recorded};

/// What a summary has besides its count and its mean.
const PERCENTILES: [(&str, f64); 6] =
    [("min", 0.0), ("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p999", 99.9), ("max", 100.0)];

/// The clock of all measurements, and what it costs.
#[pyfunction]
pub fn bench_clock(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let found = py.detach(clock::describe);
    let dict = PyDict::new(py);
    dict.set_item("source", found.source)?;
    dict.set_item("invariant", found.invariant)?;
    dict.set_item("tried", found.tried)?;
    dict.set_item("kernel", found.kernel)?;
    dict.set_item("ticks_per_ns", found.ticks_per_ns)?;
    dict.set_item("cost_min_ns", found.cost_ns.0)?;
    dict.set_item("cost_p50_ns", found.cost_ns.1)?;
    Ok(dict)
}

/// Times `count` exits of one kind without any VMM, on a thread of its own that may be bound to a host CPU.
#[pyfunction]
#[pyo3(signature = (backend, kind, count, skip, cpu = None))]
pub fn bench_floor(
    py: Python<'_>,
    backend: String,
    kind: &str,
    count: u64,
    skip: u64,
    cpu: Option<usize>,
) -> PyResult<Vec<(f64, u64)>> {
    let kind = Kind::from_name(kind)
        .ok_or_else(|| to_python(py, Error::Config(format!("there is no floor of the kind {kind:?}"))))?;
    let body = move || {
        if let Some(cpu) = cpu {
            let mut set = nix::sched::CpuSet::new();
            set.set(cpu)
                .and_then(|()| nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set))
                .map_err(|e| Error::Config(format!("the floor can't run on host CPU {cpu}: {e}")))?;
        }
        floor::measure(&backend, kind, count, skip)
    };
    let measured = detached(py, || {
        let thread = std::thread::Builder::new().name("uhyve-floor".into()).spawn(body);
        let thread = thread.map_err(|source| Error::Host { what: "can't start a thread".into(), source })?;
        thread.join().unwrap_or_else(|_| Err(Error::VmState("the floor's thread has panicked".into())))
    })?;
    Ok(measured.buckets())
}

/// Kicks so many threads in bare KVM_RUN loops together: nanoseconds until the caller is told that all are out.
#[pyfunction]
pub fn bench_crowd(py: Python<'_>, cpus: u32, rounds: u32) -> PyResult<Vec<f64>> {
    detached(py, || crowd::measure(cpus, rounds))
}

/// Latencies of each vCPU: reason, part, and its numbers.
pub fn summaries<'py>(py: Python<'py>, found: Vec<Vec<ReasonLatency>>) -> PyResult<Bound<'py, PyList>> {
    by_reason(py, found, |recorded| {
        let dict = PyDict::new(py);
        dict.set_item("count", recorded.count())?;
        dict.set_item("mean", recorded.mean())?;
        PERCENTILES.iter().try_for_each(|(name, percent)| dict.set_item(*name, recorded.percentile(*percent)))?;
        Ok(dict.into_any())
    })
}

/// Latencies of each vCPU: reason, part, and all that was recorded.
pub fn buckets<'py>(py: Python<'py>, found: Vec<Vec<ReasonLatency>>) -> PyResult<Bound<'py, PyList>> {
    by_reason(py, found, |recorded| recorded.buckets().into_pyobject(py))
}

fn by_reason<'py>(
    py: Python<'py>,
    found: Vec<Vec<ReasonLatency>>,
    mut shape: impl FnMut(&Recorded) -> PyResult<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for vcpu in found {
        let reasons = PyDict::new(py);
        for ReasonLatency { reason, parts } in vcpu {
            let dict = PyDict::new(py);
            for (part, recorded) in &parts {
                dict.set_item(*part, shape(recorded)?)?;
            }
            reasons.set_item(reason, dict)?;
        }
        list.append(reasons)?;
    }
    Ok(list)
}
