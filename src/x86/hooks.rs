//! How a CPU is looked at from outside: breakpoints, watchpoints, single steps, and hooks for tracing. None of it costs
//! anything while it is not set.

use crate::backend::DataAccess;

/// Which accesses a [`Watchpoint`] reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Both.
    ReadWrite,
}

/// A range of linear addresses whose accesses are reported after the instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watchpoint {
    /// Where it begins.
    pub address: u64,
    /// Bytes; at least 1.
    pub length: u64,
    /// What is reported.
    pub kind: WatchKind,
}

/// What the CPU looks out for. An empty one costs nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DebugOptions {
    /// Linear addresses of instructions before which the CPU leaves.
    pub breakpoints: Vec<u64>,
    /// Data accesses after which it leaves.
    pub watchpoints: Vec<Watchpoint>,
    /// Leave after one instruction (or one delivered interrupt or exception).
    pub single_step: bool,
    /// Leave at INT3 instead of giving the guest a #BP.
    pub stop_at_int3: bool,
    /// Take no interrupt while [`DebugOptions::single_step`] is set.
    pub block_interrupts: bool,
}

/// What a tracer or a coverage tool hears of. While hooks are set, the CPU goes instruction by instruction.
pub trait Hooks: Send {
    /// The instruction `code` at the linear address `address` is about to execute.
    fn instruction(&mut self, address: u64, code: &[u8]);

    /// An instruction has accessed data. Called for each access, in order, at linear addresses.
    fn access(&mut self, access: DataAccess) {
        let _ = access;
    }
}
