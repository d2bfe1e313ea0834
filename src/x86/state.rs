//! The architectural state of a whole CPU: plain, copyable, and all that a snapshot of it has to hold. Caches
//! (translations, decoded code) are derived from it and guest memory, and are not part of it.

use super::CpuState;

/// The model-specific registers that the CPU itself keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msrs {
    /// `IA32_STAR`: selectors of SYSCALL and SYSRET.
    pub star: u64,
    /// `IA32_LSTAR`: where SYSCALL goes.
    pub lstar: u64,
    /// `IA32_CSTAR`: the same for compatibility mode; kept, never used.
    pub cstar: u64,
    /// `IA32_FMASK`: RFLAGS bits that SYSCALL clears.
    pub sfmask: u64,
    /// `IA32_KERNEL_GS_BASE`: what SWAPGS exchanges with the base of GS.
    pub kernel_gs_base: u64,
    /// `IA32_PAT`.
    pub pat: u64,
    /// `IA32_MISC_ENABLE`.
    pub misc_enable: u64,
    /// `IA32_MTRR_DEF_TYPE`.
    pub mtrr_default: u64,
    /// `IA32_MTRR_PHYSBASE0`, `IA32_MTRR_PHYSMASK0`, and so on, for eight ranges.
    pub mtrr_variable: [u64; 16],
    /// The eleven fixed-range MTRRs, in the order of their numbers.
    pub mtrr_fixed: [u64; 11],
    /// `IA32_SYSENTER_CS`, `_ESP` and `_EIP`: kept, never used.
    pub sysenter: [u64; 3],
}

impl Default for Msrs {
    /// The values after a reset.
    fn default() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1,
            mtrr_default: 0,
            mtrr_variable: [0; 16],
            mtrr_fixed: [0; 11],
            sysenter: [0; 3],
        }
    }
}

/// An exception that waits to be delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Vector.
    pub vector: u8,
    /// The error code to push, for the vectors that have one.
    pub error_code: Option<u32>,
    /// CR2, for a page fault; bits to set in DR6, for a debug exception.
    pub address: Option<u64>,
}

impl Fault {
    /// An exception without an error code.
    pub const fn plain(vector: u8) -> Self {
        Self { vector, error_code: None, address: None }
    }

    /// An exception with that error code.
    pub const fn with_code(vector: u8, error_code: u32) -> Self {
        Self { vector, error_code: Some(error_code), address: None }
    }
}

/// The most accesses to devices of one kind that one instruction may make: 64 bytes in pieces of 8.
const DEVICE_ACCESSES: usize = 8;

/// An access to a device that an instruction makes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceAccess {
    /// Guest-physical address, or port.
    pub address: u64,
    /// By IN, OUT and their string forms, not by a memory operand.
    pub is_port: bool,
    /// Bytes, up to 8.
    pub size: u8,
    /// The bytes.
    pub data: [u8; 8],
}

impl DeviceAccess {
    /// An access of `data`'s length (up to 8), with these bytes.
    pub(super) fn new(address: u64, is_port: bool, data: &[u8]) -> Self {
        let mut whole = [0; 8];
        let length = data.len().min(8);
        whole[..length].copy_from_slice(&data[..length]);
        Self { address, is_port, size: u8::try_from(length).expect("at most 8"), data: whole }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.data[..usize::from(self.size.min(8))]
    }
}

/// Accesses in order, as many as one instruction makes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceAccesses {
    list: [DeviceAccess; DEVICE_ACCESSES],
    length: u8,
}

impl DeviceAccesses {
    /// Those that there are.
    pub fn as_slice(&self) -> &[DeviceAccess] {
        &self.list[..usize::from(self.length)]
    }

    /// Adds one; false if there is no room.
    pub(super) fn push(&mut self, access: DeviceAccess) -> bool {
        let Some(place) = self.list.get_mut(usize::from(self.length)) else { return false };
        *place = access;
        self.length += 1;
        true
    }

    /// Takes the first away.
    pub(super) fn pop_front(&mut self) -> Option<DeviceAccess> {
        if self.length == 0 {
            return None;
        }
        let first = self.list[0];
        self.list.copy_within(1.., 0);
        self.length -= 1;
        Some(first)
    }
}

/// Everything that a CPU is, apart from memory and devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// Registers that instructions of the user's level work on, and the system registers. CR8 and the APIC base are
    /// the platform's; what stands here means nothing.
    pub core: CpuState,
    /// Model-specific registers.
    pub msrs: Msrs,
    /// DR0 to DR7; 4 and 5 mean nothing.
    pub debug: [u64; 8],
    /// Interrupts are held off until after the next instruction (STI, MOV to SS and POP SS).
    pub interrupt_shadow: bool,
    /// Debug exceptions are held off as well (MOV to SS).
    pub trap_shadow: bool,
    /// An exception to be delivered before the next instruction.
    pub injected: Option<Fault>,
    /// HLT was executed, and no interrupt has come since.
    pub halted: bool,
    /// After a triple fault nothing is executed any more.
    pub shut_down: bool,
    /// Instructions that have retired. A fault does not retire its instruction; each iteration of a repeated string
    /// instruction that is left and continued counts once more.
    pub instructions: u64,
    /// State of the generator behind RDRAND and RDSEED.
    pub random: u64,
    /// A read that the VMM has to answer before the CPU goes on; the instruction is then executed again.
    pub pending_read: Option<DeviceAccess>,
    /// Answers to reads of the instruction at RIP, which is executed again.
    pub answers: DeviceAccesses,
    /// Writes to devices that the last instruction made and the VMM has not been told of.
    pub pending_writes: DeviceAccesses,
}

impl Default for State {
    /// [`CpuState::default`] and everything else as after a reset.
    fn default() -> Self {
        Self {
            core: CpuState::default(),
            msrs: Msrs::default(),
            debug: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            interrupt_shadow: false,
            trap_shadow: false,
            injected: None,
            halted: false,
            shut_down: false,
            instructions: 0,
            random: 0x9e37_79b9_7f4a_7c15,
            pending_read: None,
            answers: DeviceAccesses::default(),
            pending_writes: DeviceAccesses::default(),
        }
    }
}
