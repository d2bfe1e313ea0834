//! What surrounds a CPU: the trait that a machine implements to be asked for ports, memory-mapped devices, interrupts,
//! time, CPUID and the MSRs that belong to devices. The CPU calls it on its own thread, in the course of an instruction.

/// What became of a request to the [`Platform`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// Answered; the CPU goes on.
    Done,
    /// Answered; the CPU finishes the instruction and returns [`CpuExit::Platform`](super::CpuExit::Platform), so that
    /// the machine can reschedule: a timer was armed, an interrupt sent.
    Leave,
    /// Nothing here knows the address: the CPU leaves with an exit for the VMM.
    Unknown,
}

/// What an MSR access of the guest came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MsrReply {
    /// Read (with the value) or written (the value means nothing).
    Done(u64),
    /// Written; the CPU finishes the instruction and returns [`CpuExit::Platform`](super::CpuExit::Platform).
    Leave,
    /// There is no such MSR, or the value is not allowed: #GP(0) for the guest.
    Refused,
}

/// The machine around one CPU. What it doesn't say is as with nothing around it: no device, no interrupt, no MSR.
///
/// `now` is the CPU's retired-instruction count at the call, exact to the instruction: a clock that is derived from it
/// is deterministic. Nothing here may panic on a guest's numbers.
pub trait Platform {
    /// IN of `data.len()` (1, 2 or 4) bytes. [`Reply::Unknown`] leaves with
    /// [`CpuExit::PortIn`](super::CpuExit::PortIn).
    fn port_read(&mut self, port: u16, data: &mut [u8], now: u64) -> Reply {
        let _ = (port, data, now);
        Reply::Unknown
    }

    /// OUT of `data.len()` (1, 2 or 4) bytes. [`Reply::Unknown`] leaves with
    /// [`CpuExit::PortOut`](super::CpuExit::PortOut).
    fn port_write(&mut self, port: u16, data: &[u8], now: u64) -> Reply {
        let _ = (port, data, now);
        Reply::Unknown
    }

    /// Whether a lent CPU may access a port; if not, it leaves it to its owner.
    fn owns_port(&mut self, port: u16, size: usize, is_in: bool) -> bool {
        let _ = (port, size, is_in);
        false
    }

    /// A read of `data.len()` bytes (up to 8) at a guest-physical address that is not RAM.
    fn mmio_read(&mut self, address: u64, data: &mut [u8], now: u64) -> Reply {
        let _ = (address, data, now);
        Reply::Unknown
    }

    /// A write of `data.len()` bytes (up to 8) at a guest-physical address that is not RAM.
    fn mmio_write(&mut self, address: u64, data: &[u8], now: u64) -> Reply {
        let _ = (address, data, now);
        Reply::Unknown
    }

    /// RDMSR of an MSR that the CPU does not keep itself: `IA32_APIC_BASE` (0x1b), `IA32_TSC` (0x10), TSC deadline
    /// (0x6e0), x2APIC (0x800 to 0x8ff), and all that is unknown.
    fn read_msr(&mut self, index: u32, now: u64) -> MsrReply {
        let _ = (index, now);
        MsrReply::Refused
    }

    /// WRMSR of such an MSR.
    fn write_msr(&mut self, index: u32, value: u64, now: u64) -> MsrReply {
        let _ = (index, value, now);
        MsrReply::Refused
    }

    /// The time-stamp counter.
    fn tsc(&mut self, now: u64) -> u64 {
        now
    }

    /// PAUSE: the guest waits for another CPU. [`Reply::Leave`] lets the machine give the turn away.
    fn pause(&mut self, now: u64) -> Reply {
        let _ = now;
        Reply::Done
    }

    /// The vector of the most urgent interrupt that the local APIC would deliver at its task priority, if there is one.
    /// Cheap: asked at every entry and after every call to this trait while interrupts are enabled.
    fn pending_interrupt(&mut self, now: u64) -> Option<u8> {
        let _ = now;
        None
    }

    /// The CPU takes that interrupt now: the controller moves it from requested to in service.
    fn acknowledge_interrupt(&mut self, vector: u8, now: u64) {
        let _ = (vector, now);
    }

    /// A read of CR8: bits 7 to 4 of the local APIC's task priority.
    fn task_priority(&mut self) -> u8 {
        0
    }

    /// A write of CR8.
    fn set_task_priority(&mut self, priority: u8, now: u64) {
        let _ = (priority, now);
    }

    /// CPUID. `table` is what the CPU itself answers (see [`cpuid`](super::cpuid)): the features that it has, and what
    /// depends on its registers. A platform replaces what it knows better: topology, APIC id, the TSC's frequency.
    fn cpuid(&mut self, leaf: u32, subleaf: u32, table: [u32; 4]) -> [u32; 4] {
        let _ = (leaf, subleaf);
        table
    }
}

/// Nothing around the CPU.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nothing;

impl Platform for Nothing {}
