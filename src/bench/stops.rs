//! What it takes to stop a running world and to start it again, by the clock of those who do it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::debug::engine::{Plan, Status};
use crate::debug::stop::StopReason;
use crate::error::{Error, Result};
use crate::stats::clock;
use crate::vm::Machine;

/// A world that takes longer than this to stop has not stopped.
const DEADLINE: Duration = Duration::from_secs(10);

/// One stop and the resume before it, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StopTiming {
    /// From the request to the first vCPU's arrival at its safe point.
    pub first: f64,
    /// From the request to the last vCPU's arrival.
    pub last: f64,
    /// From the request until the one who asked for it is told.
    pub stop: f64,
    /// From the resume until the last vCPU has left its safe point.
    pub resume: f64,
}

/// Resumes a stopped world, lets it run for a while, and stops it, so many times. It is stopped again afterwards.
pub fn measure(machine: &Arc<Machine>, rounds: u32, between: Duration) -> Result<Vec<StopTiming>> {
    (0..rounds).map(|_| round(machine, between)).collect()
}

fn round(machine: &Machine, between: Duration) -> Result<StopTiming> {
    let latencies = &machine.stats.latencies;
    let resumed = clock::now();
    machine.resume(|_| Plan::Run)?;
    let running = Instant::now();
    // All have left their safe points, and then run for a while.
    while (0..machine.cpus()).any(|n| latencies.marks(n).1 < resumed) {
        if running.elapsed() > DEADLINE {
            return Err(Error::VmState("a vCPU did not leave its safe point".into()));
        }
        std::thread::sleep(between / 8);
    }
    std::thread::sleep(between);
    let asked = clock::now();
    machine.engine.interrupt(StopReason::Interrupt);
    let status = machine.wait::<Error>(Some(Instant::now() + DEADLINE), &mut || Ok(()))?;
    let told = clock::now();
    let Some(Status::Stopped(stop)) = status else {
        return Err(Error::VmState("the world did not stop".into()));
    };
    if stop.reason.is_final() {
        return Err(Error::VmState(format!("the guest has ended: {}", stop.reason.name())));
    }
    let rate = clock::ticks_per_ns();
    let since = |start: u64, end: u64| end.saturating_sub(start) as f64 / rate;
    let came = || (0..machine.cpus()).map(|n| latencies.marks(n).0);
    let left = (0..machine.cpus()).map(|n| latencies.marks(n).1);
    Ok(StopTiming {
        first: since(asked, came().min().unwrap_or(asked)),
        last: since(asked, came().max().unwrap_or(asked)),
        stop: since(asked, told),
        resume: since(resumed, left.max().unwrap_or(resumed)),
    })
}
