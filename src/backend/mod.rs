//! What the VMM needs of a CPU: two small traits, [`Backend`] and [`Vcpu`], and the values that cross them. Everything
//! above speaks these; what a kernel or an emulator calls its own structs stays below.

pub mod kvm;
pub(crate) mod signal;
pub mod soft;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::Result;
use crate::memory::GuestMemory;
use crate::registers::{ExtendedState, Extensions, FpuState, Registers, SystemRegisters};
use crate::x86;

/// What the VM asks of its back end before any vCPU exists.
#[derive(Debug, Clone, Default)]
pub struct MachineOptions {
    /// Number of vCPUs that will be made.
    pub cpus: u32,
    /// Emulate a programmable interval timer.
    pub pit: bool,
    /// Leave HLT, MWAIT and PAUSE to the guest: idle vCPUs then use their host CPU, and wake faster.
    pub cpu_pm: bool,
    /// Ports (and bytes a write) whose writes may be queued instead of leaving the guest one by one.
    pub coalesced_ports: Vec<(u16, u32)>,
    /// Put no memory where firmware tables would be: accesses leave the guest.
    pub firmware_exits: bool,
    /// What only the software back end has to choose.
    pub soft: soft::machine::SoftOptions,
}

/// One virtual machine of a hypervisor: memory, interrupt controllers, and a maker of vCPUs.
pub trait Backend: Send + Sync {
    /// `kvm` or `soft`.
    fn name(&self) -> &'static str;
    /// Makes vCPU `number`, with CPUID and MSRs set and all registers in their reset state.
    fn create_vcpu(&self, number: u32) -> Result<Box<dyn Vcpu>>;
    /// The queue of port writes that did not leave the guest, if the back end keeps one.
    fn coalesced(&self) -> Option<Arc<dyn Coalesced>>;
    /// What is to be done beside the first run of the vCPUs, on a thread that may wait. It holds what it needs.
    fn afterwork(&self) -> Option<Afterwork> {
        None
    }
    /// What its debug facilities can do. May run a probe guest, once per process.
    fn capabilities(&self) -> Result<Capabilities>;
    /// The vCPUs for which `runs` says so are about to run, all others stay where they are. None runs now.
    fn resuming(&self, runs: &dyn Fn(u32) -> bool) {
        let _ = runs;
    }
}

/// What [`Backend::afterwork`] gives.
pub type Afterwork = Box<dyn FnOnce() + Send>;

/// Port writes that wait. They happened before any exit that is handled after them, and are taken first.
pub trait Coalesced: Send + Sync {
    /// Where the next one is taken from, and where KVM puts the next one.
    fn marks(&self) -> (&AtomicU32, &AtomicU32);
    /// Whether none waits. Cheap.
    fn is_empty(&self) -> bool {
        let (first, last) = self.marks();
        // What another thread took has arrived where it belongs.
        first.load(Ordering::Acquire) == last.load(Ordering::Acquire)
    }
    /// Gives each write, port and bytes, to `take`, in their order, until that refuses one (which stays).
    fn drain(&self, take: &mut dyn FnMut(u16, &[u8]) -> bool);
}

/// A virtual CPU. One thread at a time uses it: its own, or anybody's while the world is stopped.
pub trait Vcpu: Send {
    /// Binds the vCPU to the calling thread, so that a kick reaches it. Called once, before the first `run`.
    fn bind_to_current_thread(&mut self) -> Result<()>;
    /// Ends the binding; called by the bound thread before it ends.
    fn unbind(&mut self);
    /// The thread goes to where it may stay for long (a stopped world): from now to the next `run`, no other vCPU waits
    /// for this one.
    fn park(&mut self) {}
    /// The thread does something of its own before the next `run` (a callback) that may take long, or wait for another
    /// vCPU.
    fn step_aside(&mut self) {}
    /// Executes guest code until something happens that the VMM must see.
    fn run(&mut self) -> Result<Exit>;
    /// Finishes the port or memory access that the last exit was about, without executing another instruction, so
    /// that registers are true. Returns the exit that completing it caused, if any (a single step that is done).
    fn complete_io(&mut self) -> Result<Option<Exit>>;
    /// The bytes of the last port or memory access: what the guest wrote, or the place to put what it reads.
    fn io_data(&mut self) -> &mut [u8];
    /// General registers.
    fn registers(&mut self) -> Result<Registers>;
    /// Sets the general registers.
    fn set_registers(&mut self, registers: &Registers) -> Result<()>;
    /// Segment, control and system registers.
    fn system_registers(&mut self) -> Result<SystemRegisters>;
    /// Sets segment, control and system registers.
    fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<()>;
    /// x87 and SSE registers.
    fn fpu(&mut self) -> Result<FpuState>;
    /// Sets the x87 and SSE registers.
    fn set_fpu(&mut self, fpu: &FpuState) -> Result<()>;
    /// Upper halves of the YMM registers.
    fn ymm_high(&mut self) -> Result<[u128; 16]>;
    /// Sets the upper halves of the YMM registers.
    fn set_ymm_high(&mut self, high: &[u128; 16]) -> Result<()>;
    /// Which registers it has beyond those of SSE.
    fn extensions(&self) -> Extensions;
    /// The registers of AVX-512 and PKRU; what it does not have is zero.
    fn extended(&mut self) -> Result<ExtendedState> {
        Ok(ExtendedState::default())
    }
    /// Sets those of them that it has.
    fn set_extended(&mut self, state: &ExtendedState) -> Result<()> {
        let _ = state;
        Ok(())
    }
    /// A model-specific register.
    fn msr(&mut self, index: u32) -> Result<u64>;
    /// Sets a model-specific register.
    fn set_msr(&mut self, index: u32, value: u64) -> Result<()>;
    /// XCR0: which state components XSAVE handles.
    fn xcr0(&mut self) -> Result<u64>;
    /// Instructions that it has executed, where the back end counts them.
    fn instructions(&mut self) -> Option<u64> {
        None
    }
    /// The state from which a software CPU may go on in this one's place, with its vector registers if `vectors` says so
    /// (otherwise they are marked as not available by CR0.TS). `None` if it can't: something waits to be delivered, the
    /// mode is one that it doesn't have. Nothing is pending of an access.
    fn lend(&mut self, vectors: bool) -> Result<Option<Box<x86::State>>> {
        let _ = vectors;
        Ok(None)
    }
    /// Takes the state back: what has changed since of general registers, flags, the interrupt shadow, and of vector
    /// registers if they were lent.
    fn take_back(&mut self, lent: &x86::State, state: &x86::State) -> Result<()> {
        let _ = (lent, state);
        Ok(())
    }
    /// Rises whenever a register is set, an exception given or the vCPU put to sleep: whether somebody else has done so
    /// in between. Only where it can be lent.
    fn changes(&self) -> u64 {
        0
    }
    /// Frequency of the guest's time stamp counter in kHz, if known.
    fn tsc_khz(&self) -> Option<u32>;
    /// Chooses how the vCPU is debugged from the next `run` on.
    fn set_guest_debug(&mut self, debug: &GuestDebug) -> Result<()>;
    /// Delivers an exception to the guest at the next `run`, as if the instruction at RIP had raised it.
    fn inject(&mut self, exception: Exception) -> Result<()>;
    /// Whether the vCPU waits in HLT.
    fn is_halted(&mut self) -> Result<bool>;
    /// Whether the instruction at the program counter comes next: the vCPU doesn't sleep, and nothing that was given to
    /// it waits to be delivered before. False also where that isn't known.
    fn is_at_instruction(&mut self) -> Result<bool>;
    /// Puts the vCPU to sleep as HLT does: at the next `run` it waits for an interrupt first.
    fn halt(&mut self) -> Result<()>;
    /// A handle that makes `run` return from any thread.
    fn kick_handle(&self) -> Arc<dyn Kick>;
}

/// Makes a vCPU leave the guest.
pub trait Kick: Send + Sync {
    /// The current or the next `run` returns [`Exit::Interrupted`], and a blocking host call of the vCPU's thread
    /// is interrupted. A kick that comes when the vCPU is outside of the guest is not lost.
    fn kick(&self);
}

/// Why a vCPU left the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// OUT. `value` is the first element; string I/O has `count` elements in [`Vcpu::io_data`].
    IoOut {
        /// Port.
        port: u16,
        /// Bytes an element: 1, 2 or 4.
        size: u8,
        /// Elements.
        count: u32,
        /// First element, zero-extended.
        value: u32,
    },
    /// IN: fill [`Vcpu::io_data`] with `size * count` bytes before the next `run`.
    IoIn {
        /// Port.
        port: u16,
        /// Bytes an element: 1, 2 or 4.
        size: u8,
        /// Elements.
        count: u32,
    },
    /// Read of an address that is not RAM: fill [`Vcpu::io_data`].
    MmioRead {
        /// Guest-physical address.
        address: u64,
        /// Bytes, up to 8.
        size: usize,
    },
    /// Write to an address that is not RAM; the bytes are in [`Vcpu::io_data`].
    MmioWrite {
        /// Guest-physical address.
        address: u64,
        /// Bytes, up to 8.
        size: usize,
    },
    /// The guest halts and the back end leaves waiting to the VMM.
    Hlt,
    /// A debug event: single step, breakpoint or watchpoint.
    Debug(DebugEvent),
    /// Triple fault.
    Shutdown,
    /// A kick or a signal.
    Interrupted,
    /// The instruction at RIP is one that this hypervisor can't execute.
    Unemulated,
    /// The hypervisor gave up; the text says how, in its own words.
    Failed(Failure),
}

/// A failure that the hypervisor reports of a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The CPU refused the guest's state.
    Entry {
        /// The hardware's reason.
        reason: u64,
    },
    /// KVM_EXIT_INTERNAL_ERROR with another suberror than emulation.
    Internal {
        /// The suberror.
        suberror: u32,
    },
    /// The software CPU has not got what the instruction at RIP needs.
    Missing(crate::x86::Missing),
    /// An exit reason that this VMM does not ask for.
    UnexpectedExit {
        /// The number of the exit reason.
        reason: u32,
    },
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Entry { reason } => {
                write!(f, "KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x}: the guest's state is not valid")
            }
            Self::Internal { suberror } => write!(f, "KVM_EXIT_INTERNAL_ERROR, suberror {suberror}"),
            Self::Missing(what) => write!(f, "that the software CPU has no {what}"),
            Self::UnexpectedExit { reason } => write!(f, "the unexpected exit reason {reason}"),
        }
    }
}

/// What a debug exit was about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DebugEvent {
    /// `int3` at `pc`, not yet executed.
    pub software: bool,
    /// One instruction was executed.
    pub single_step: bool,
    /// Which of [`GuestDebug::hardware`] fired: bit i is the i-th; bit 63 stands for that and all behind it.
    pub hardware: u64,
    /// The data access that fired a watchpoint, where the back end knows it.
    pub access: Option<DataAccess>,
    /// Where the vCPU is.
    pub pc: u64,
}

/// One access of an instruction to data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataAccess {
    /// Linear address.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// A write, or a read that a write follows.
    pub write: bool,
}

/// How a vCPU is debugged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestDebug {
    /// Leave after one instruction.
    pub single_step: bool,
    /// Keep interrupts from being taken while stepping, where the back end can.
    pub block_interrupts: bool,
    /// Leave at `int3`.
    pub software_breakpoints: bool,
    /// What the CPU itself looks out for: at most [`Capabilities::hardware_breakpoints`].
    pub hardware: Vec<HardwareBreakpoint>,
}

/// A place that the CPU itself looks out for: a debug register's worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HardwareBreakpoint {
    /// Linear address; aligned to `length` for data, unless the back end has [`Capabilities::any_range`].
    pub address: u64,
    /// What fires it.
    pub access: Access,
    /// Bytes watched: 1, 2, 4 or 8, or any number with [`Capabilities::any_range`]; 1 for execution.
    pub length: u64,
}

/// What fires a [`HardwareBreakpoint`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The instruction at the address is about to execute.
    Execute,
    /// A write has happened.
    Write,
    /// A read has happened. Only with [`Capabilities::any_range`].
    Read,
    /// A read or a write has happened.
    ReadWrite,
}

impl HardwareBreakpoint {
    /// An execution breakpoint.
    pub fn execute(address: u64) -> Self {
        Self { address, access: Access::Execute, length: 1 }
    }
}

/// An exception to deliver to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    /// Vector.
    pub vector: u8,
    /// Error code, for the vectors that have one.
    pub error_code: Option<u32>,
    /// CR2, for a page fault; bits to set in DR6, for a debug exception.
    pub address: Option<u64>,
}

/// What happens when a guest under debug executes `int3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Int3 {
    /// A debug exit: software breakpoints work.
    DebugExit,
    /// The hypervisor fails to emulate it, with RIP at the `int3`: software breakpoints work by that.
    Unemulated,
    /// The guest gets it: software breakpoints do not work.
    NotIntercepted,
}

/// What a back end can do for a debugger, as probed on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Ring-0 code runs on the CPU itself, with all its instructions.
    pub native_ring0: bool,
    /// Single-step.
    pub single_step: bool,
    /// Interrupts can be kept out of a step.
    pub block_interrupts: bool,
    /// Fate of `int3`.
    pub int3: Int3,
    /// How many places [`GuestDebug::hardware`] may have; `u32::MAX` is no limit.
    pub hardware_breakpoints: u32,
    /// Data watchpoints in [`GuestDebug::hardware`] fire.
    pub watchpoints: bool,
    /// Watchpoints may have any length and alignment, and be of reads alone.
    pub any_range: bool,
    /// A step sets no trap flag that the guest could see, and ends at the first instruction of a handler where the
    /// instruction raises an exception.
    pub exact_steps: bool,
}

/// The back end that a VM gets, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// `kvm` or `soft`.
    pub name: &'static str,
    /// The reason, in a sentence for people.
    pub reason: String,
}

/// Chooses a back end: the one of that name, or for `auto` KVM if ring 0 runs natively on it, else the software CPU.
pub fn choose(name: &str) -> Result<Choice> {
    let asked_for = || "it was asked for".to_owned();
    match name {
        "kvm" => Ok(Choice { name: "kvm", reason: asked_for() }),
        "soft" => Ok(Choice { name: "soft", reason: asked_for() }),
        "auto" => Ok(match kvm::probe::is_native() {
            Ok(true) => Choice { name: "kvm", reason: "KVM runs the guest's kernel on the CPU itself".into() },
            Ok(false) => Choice {
                name: "soft",
                reason:
                    "this KVM emulates the guest's kernel, about 1 million instructions a second; the software CPU \
                         is faster"
                        .into(),
            },
            Err(error) => Choice { name: "soft", reason: format!("there is no usable KVM: {error}") },
        }),
        other => Err(crate::error::Error::Config(format!(
            "backend {other:?} is unknown; choose \"auto\", \"kvm\" or \"soft\""
        ))),
    }
}

/// Opens the back end of that name: `auto`, `kvm`, `soft`.
pub fn open(name: &str, memory: &GuestMemory, options: &MachineOptions) -> Result<Arc<dyn Backend>> {
    let choice = choose(name)?;
    match choice.name {
        "kvm" => Ok(Arc::new(kvm::KvmBackend::new(memory, options)?)),
        _ => Ok(Arc::new(soft::SoftBackend::new(memory, options)?)),
    }
}
