//! What stops the world, and what a front end is told about it.

use std::any::Any;
use std::sync::Arc;

use super::breakpoints::Breakpoint;
use super::engine::End;
use super::watchpoints::Touch;
use crate::error::Crash;

/// Why the world stands still.
#[derive(Clone)]
pub enum StopReason {
    /// Before the first instruction.
    Entry,
    /// A breakpoint's decision chain said so. `error` tells of a condition that could not be evaluated.
    Breakpoint {
        /// The breakpoint.
        breakpoint: Arc<Breakpoint>,
        /// Why its condition has no value, if that is why it stopped.
        error: Option<String>,
    },
    /// A watchpoint's decision chain said so, after an access to what it watches. `error` as for a breakpoint.
    Watchpoint {
        /// The watchpoint.
        breakpoint: Arc<Breakpoint>,
        /// The access, and what it did.
        touch: Touch,
        /// Why its condition has no value, if that is why it stopped.
        error: Option<String>,
    },
    /// A hypercall that is to be caught: it is about to be answered, or was.
    Hypercall {
        /// Its port or address.
        number: u64,
        /// Before the answer.
        entry: bool,
    },
    /// A step is done.
    Step,
    /// Somebody asked for it.
    Interrupt,
    /// The time that `cont` was given is over.
    Timeout,
    /// The guest ended itself.
    Exit {
        /// Its exit code.
        code: i32,
    },
    /// The guest can't go on.
    Crash(Arc<Crash>),
    /// A callback failed; the front end that owns it raises its error.
    Exception {
        /// The breakpoint whose callback it was.
        breakpoint: Arc<Breakpoint>,
        /// The front end's own error value.
        error: Arc<dyn Any + Send + Sync>,
    },
}

impl StopReason {
    /// The name that scripts see.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Entry => "entry",
            Self::Breakpoint { .. } => "breakpoint",
            Self::Watchpoint { .. } => "watchpoint",
            Self::Hypercall { .. } => "hypercall",
            Self::Step => "step",
            Self::Interrupt => "interrupt",
            Self::Timeout => "timeout",
            Self::Exit { .. } => "exit",
            Self::Crash(_) => "crash",
            Self::Exception { .. } => "exception",
        }
    }

    /// The breakpoint or watchpoint that it is about.
    pub fn breakpoint(&self) -> Option<&Arc<Breakpoint>> {
        match self {
            Self::Breakpoint { breakpoint, .. }
            | Self::Watchpoint { breakpoint, .. }
            | Self::Exception { breakpoint, .. } => Some(breakpoint),
            _ => None,
        }
    }

    /// How the VM ends by this if nobody debugs it.
    pub fn end(&self) -> Option<End> {
        match self {
            Self::Exit { code } => Some(End::Exit(*code)),
            Self::Crash(crash) => Some(End::Crash(crash.clone())),
            _ => None,
        }
    }

    /// After this the guest can't be resumed.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Exit { .. } | Self::Crash(_))
    }
}

/// One stop of the world.
#[derive(Clone)]
pub struct Stop {
    /// Why.
    pub reason: StopReason,
    /// What else was found at the same arrival, or by the same access.
    pub others: Vec<StopReason>,
    /// The vCPU that it is about.
    pub vcpu: u32,
    /// Where that vCPU is.
    pub pc: u64,
    /// Counts the stops of a VM, from 1.
    pub number: u64,
}

/// What a vCPU found, before it is reported.
#[derive(Clone)]
pub struct Event {
    /// The vCPU.
    pub vcpu: u32,
    /// Where it is.
    pub pc: u64,
    /// What it found.
    pub reason: StopReason,
    /// What it found besides, at the same arrival or by the same access. All of it is one stop; these count when the
    /// first reason's breakpoint is gone before it was reported.
    pub others: Vec<StopReason>,
}

impl Event {
    /// An event with one reason.
    pub fn new(vcpu: u32, pc: u64, reason: StopReason) -> Self {
        Self { vcpu, pc, reason, others: Vec::new() }
    }
}
