//! A VM as gdbstub's target: threads, registers, memory, breakpoints and resuming, each on the engine. All of it runs
//! with the world stopped. No handler fails fatally: what can't be done is an error of that one packet.

mod breakpoints;
mod extended;
mod queries;
mod resume;

pub(super) use resume::Reason;

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

use gdbstub::common::Tid;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{MultiThreadBase, MultiThreadResumeOps};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult, ext};

use super::breakpoints::Breakpoints;
use super::host_files::HostFiles;
use super::policy::{Failure, Policy, ThreadInfo};
use super::registers::{Amd64, Number, RegisterFile, VcpuState, target_description};
use crate::debug::agent::AgentProgram;
use crate::debug::engine::{Plan, Status};
use crate::debug::stop::{Stop, StopReason};
use crate::error::{Error, Result};
use crate::paging::PagingMode;
use crate::registers::Extensions;
use crate::vm::Machine;

/// Errors that a client gets, in Linux' numbers.
const EIO: u8 = 5;
const EFAULT: u8 = 14;
const EINVAL: u8 = 22;
const ESRCH: u8 = 3;

/// What a client asked for that ends its hold on the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// End the VM.
    Kill,
    /// Make a fresh VM, with these arguments if any.
    Restart(Option<Vec<String>>),
}

/// The state of one client's session with a VM.
pub struct GdbTarget {
    pub(super) machine: Arc<Machine>,
    policy: Option<Arc<dyn Policy>>,
    pub(super) breakpoints: Breakpoints,
    /// The conditions that came with the packet that is being handled.
    pub(super) conditions: Vec<Arc<AgentProgram>>,
    /// What each vCPU does after the next resume, as far as the client has said.
    actions: HashMap<u32, Plan>,
    /// vCPUs that were not named stay where they are.
    is_locked: bool,
    /// Set by a resume; what the engine said to it.
    resumed: Option<Result<()>>,
    /// The plan of the last resume, for a policy that resumes.
    pub(super) last_plan: Vec<Plan>,
    threads: Vec<ThreadInfo>,
    /// Text for the client's console that waits to be sent.
    pub(super) messages: String,
    /// Why the breakpoint of the packet that is being handled is refused.
    pub(super) refusal: Option<String>,
    pub(super) request: Option<Request>,
    has: Extensions,
    description: String,
    files: HostFiles,
    was_run: bool,
    /// The client has detached, and may attach or run anew: it knows of no process.
    pub(super) is_let_go: bool,
}

impl GdbTarget {
    /// A session's view of a VM that stands still.
    pub fn new(machine: Arc<Machine>, policy: Option<Arc<dyn Policy>>) -> Self {
        let has = machine.with_vcpu(0, |context| Ok(context.cpu.extensions())).unwrap_or_default();
        let files = HostFiles::new(machine.image.name(), machine.image.kernel().clone());
        let plan = vec![Plan::Run; machine.cpus() as usize];
        Self {
            machine,
            policy,
            breakpoints: Breakpoints::default(),
            conditions: Vec::new(),
            actions: HashMap::new(),
            is_locked: false,
            resumed: None,
            last_plan: plan,
            threads: Vec::new(),
            messages: String::new(),
            refusal: None,
            request: None,
            has,
            description: target_description(has),
            files,
            was_run: false,
            is_let_go: false,
        }
    }

    /// Exchanges the VM for a fresh one; breakpoints go with the old one.
    pub(super) fn replace_machine(&mut self, machine: Arc<Machine>) {
        let policy = self.policy.take();
        let messages = std::mem::take(&mut self.messages);
        *self = Self { messages, was_run: true, ..Self::new(machine, policy) };
    }

    /// The stop that the world is in.
    pub(super) fn stop(&self) -> Option<Stop> {
        self.machine.engine.check_stopped().ok()
    }

    /// Says something on the client's console.
    pub(super) fn say(&mut self, text: &str) {
        self.messages.push_str(text);
        self.messages.push('\n');
    }

    /// Says what a policy raised, and keeps it for the front end.
    pub(super) fn failed(&mut self, failure: Failure) {
        self.say(&failure.text);
        self.keep(failure);
    }

    /// Looks at the threads anew: the one that the stop is about first. A VM that is over has none, nor has
    /// one that the client has let go.
    pub(super) fn refresh_threads(&mut self) {
        if self.is_let_go || matches!(self.machine.engine.status(), Status::Ended(_)) {
            self.threads.clear();
            return;
        }
        let stop = self.stop();
        let mut threads = match self.policy.as_ref().and_then(|policy| policy.threads()) {
            Some(Ok(threads)) => self.checked(threads),
            Some(Err(failure)) => {
                self.failed(failure);
                self.default_threads(stop.as_ref())
            }
            None => self.default_threads(stop.as_ref()),
        };
        if let Some(stop) = stop {
            if matches!(stop.reason, StopReason::Exit { .. }) {
                threads.clear();
            }
            let first = threads.iter().position(|t| t.vcpu == stop.vcpu && t.saved.is_empty()).unwrap_or(0);
            if first > 0 {
                threads[..=first].rotate_right(1);
            }
        }
        self.threads = threads;
    }

    /// A policy's threads, without those that a client can't take; every vCPU is among them.
    fn checked(&mut self, mut threads: Vec<ThreadInfo>) -> Vec<ThreadInfo> {
        let cpus = self.machine.cpus();
        let mut seen = std::collections::HashSet::new();
        threads.retain(|t| t.vcpu < cpus && (1..=i32::MAX.unsigned_abs()).contains(&t.id) && seen.insert(t.id));
        for vcpu in 0..cpus {
            if !threads.iter().any(|t| t.vcpu == vcpu && t.saved.is_empty()) {
                let id = (1..).find(|id| !seen.contains(id)).unwrap_or(vcpu + 1);
                seen.insert(id);
                threads.push(ThreadInfo {
                    id,
                    name: format!("vCPU {vcpu}"),
                    extra: String::new(),
                    vcpu,
                    saved: vec![],
                });
            }
        }
        threads
    }

    fn default_threads(&self, stop: Option<&Stop>) -> Vec<ThreadInfo> {
        (0..self.machine.cpus())
            .map(|vcpu| {
                let halted = || {
                    let state = self.machine.with_vcpu(vcpu, |context| context.cpu.is_halted());
                    if state.unwrap_or(false) { "halted" } else { "running" }
                };
                let state = match stop {
                    Some(stop) if stop.vcpu == vcpu => format!("stopped: {}", stop.reason.name()),
                    _ => halted().to_owned(),
                };
                ThreadInfo { id: vcpu + 1, name: format!("vCPU {vcpu}"), extra: state, vcpu, saved: Vec::new() }
            })
            .collect()
    }

    /// The threads as they were when the world stopped.
    pub(super) fn threads(&self) -> &[ThreadInfo] {
        &self.threads
    }

    /// Who decides beside the client.
    pub(super) fn policy(&self) -> Option<&Arc<dyn Policy>> {
        self.policy.as_ref()
    }

    /// Keeps what a policy raised for the front end.
    pub(super) fn keep(&self, failure: Failure) {
        if let Some(policy) = &self.policy {
            policy.keep(failure);
        }
    }

    fn thread(&self, tid: Tid) -> Option<&ThreadInfo> {
        self.threads.iter().find(|thread| thread.id as usize == tid.get())
    }

    /// The thread that stands for a vCPU.
    pub(super) fn tid_of(&self, vcpu: u32) -> Tid {
        let found = self.threads.iter().find(|t| t.vcpu == vcpu && t.saved.is_empty());
        let id = found.map_or(vcpu + 1, |thread| thread.id);
        Tid::new(id as usize).expect("thread numbers begin at 1")
    }

    /// The registers of a thread.
    pub(super) fn state(&self, tid: Tid) -> TargetResult<VcpuState, Self> {
        let thread = self.thread(tid).ok_or(TargetError::Errno(ESRCH))?;
        let has = self.has;
        let mut state = self
            .machine
            .with_vcpu(thread.vcpu, |context| VcpuState::read(context.cpu.as_mut(), has))
            .map_err(|error| refused(&error))?;
        for (register, value) in &thread.saved {
            let _ = state.registers.set(*register, *value) || state.system.set(*register, *value);
        }
        Ok(state)
    }

    fn change_state(&mut self, tid: Tid, change: impl FnOnce(&mut VcpuState) -> bool) -> TargetResult<(), Self> {
        let thread = self.thread(tid).ok_or(TargetError::Errno(ESRCH))?;
        if !thread.saved.is_empty() {
            // The registers of a task that is not running lie in memory, in a form that only its kernel knows.
            return Err(TargetError::Errno(EINVAL));
        }
        let (vcpu, has) = (thread.vcpu, self.has);
        let changed = self.machine.with_vcpu(vcpu, |context| {
            let before = VcpuState::read(context.cpu.as_mut(), has)?;
            let mut after = before;
            if !change(&mut after) {
                return Ok(false);
            }
            after.write(&before, context.cpu.as_mut())?;
            Ok(true)
        });
        match changed {
            Ok(true) => Ok(()),
            Ok(false) => Err(TargetError::Errno(EINVAL)),
            Err(error) => Err(refused(&error)),
        }
    }

    fn paging_mode(&self, tid: Tid) -> TargetResult<PagingMode, Self> {
        let vcpu = self.thread(tid).map_or(0, |thread| thread.vcpu);
        let system = self.machine.with_vcpu(vcpu, |context| context.cpu.system_registers());
        system.map(|system| PagingMode::from(&system)).map_err(|error| refused(&error))
    }
}

/// An error of the VM as one that a client gets for its packet.
fn refused(error: &Error) -> TargetError<Infallible> {
    log::info!("refused to gdb: {error}");
    TargetError::Errno(match error {
        Error::GuestFault(_) | Error::Breakpoint(_) => EFAULT,
        _ => EIO,
    })
}

impl Target for GdbTarget {
    type Arch = Amd64;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn use_rle(&self) -> bool {
        false
    }

    fn use_lldb_register_info(&self) -> bool {
        false
    }

    fn use_fork_stop_reason(&self) -> bool {
        false
    }

    fn use_vfork_stop_reason(&self) -> bool {
        false
    }

    fn use_vforkdone_stop_reason(&self) -> bool {
        false
    }

    fn guard_rail_implicit_sw_breakpoints(&self) -> bool {
        true
    }

    fn support_breakpoints(&mut self) -> Option<ext::breakpoints::BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_extended_mode(&mut self) -> Option<ext::extended_mode::ExtendedModeOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<ext::monitor_cmd::MonitorCmdOps<'_, Self>> {
        Some(self)
    }

    fn support_section_offsets(&mut self) -> Option<ext::section_offsets::SectionOffsetsOps<'_, Self>> {
        Some(self)
    }

    fn support_target_description_xml_override(
        &mut self,
    ) -> Option<ext::target_description_xml_override::TargetDescriptionXmlOverrideOps<'_, Self>> {
        Some(self)
    }

    fn support_memory_map(&mut self) -> Option<ext::memory_map::MemoryMapOps<'_, Self>> {
        Some(self)
    }

    fn support_exec_file(&mut self) -> Option<ext::exec_file::ExecFileOps<'_, Self>> {
        Some(self)
    }

    fn support_host_io(&mut self) -> Option<ext::host_io::HostIoOps<'_, Self>> {
        Some(self)
    }

    fn support_auxv(&mut self) -> Option<ext::auxv::AuxvOps<'_, Self>> {
        Some(self)
    }

    fn support_host_info(&mut self) -> Option<ext::host_info::HostInfoOps<'_, Self>> {
        Some(self)
    }

    fn support_process_info(&mut self) -> Option<ext::process_info::ProcessInfoOps<'_, Self>> {
        Some(self)
    }

    fn support_catch_syscalls(&mut self) -> Option<ext::catch_syscalls::CatchSyscallsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for GdbTarget {
    fn read_registers(&mut self, regs: &mut RegisterFile, tid: Tid) -> TargetResult<(), Self> {
        *regs = RegisterFile::new(&self.state(tid)?, self.has);
        Ok(())
    }

    fn write_registers(&mut self, regs: &RegisterFile, tid: Tid) -> TargetResult<(), Self> {
        let has = self.has;
        self.change_state(tid, |state| regs.apply(state, has))
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start_addr: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let mode = self.paging_mode(tid)?;
        let read = self.machine.view().read_prefix(&mode, start_addr, data);
        if read == 0 && !data.is_empty() { Err(TargetError::Errno(EFAULT)) } else { Ok(read) }
    }

    fn write_addrs(&mut self, start_addr: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let mode = self.paging_mode(tid)?;
        self.machine.view().write(&mode, start_addr, data).map_err(|_| TargetError::Errno(EFAULT))
    }

    fn list_active_threads(&mut self, thread_is_active: &mut dyn FnMut(Tid)) -> Result<(), Self::Error> {
        for thread in &self.threads {
            thread_is_active(Tid::new(thread.id as usize).expect("checked when the threads were listed"));
        }
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for GdbTarget {
    fn read_register(&mut self, tid: Tid, reg_id: Number, buf: &mut [u8]) -> TargetResult<usize, Self> {
        let bytes = self.state(tid)?.get(reg_id.0);
        buf[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn write_register(&mut self, tid: Tid, reg_id: Number, val: &[u8]) -> TargetResult<(), Self> {
        self.change_state(tid, |state| state.set(reg_id.0, val))
    }
}

impl ThreadExtraInfo for GdbTarget {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Self::Error> {
        let text = self.thread(tid).map_or("gone", |thread| thread.extra.as_str());
        Ok(super::host_files::copy_from(text.as_bytes(), 0, text.len(), buf))
    }
}
