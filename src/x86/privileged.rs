//! The instructions that make a machine of the CPU, and which of them an instruction is: it needs more than the registers
//! that the other families see. The families are below; here are the small ones. Ports are in `port`, MSRs in `msr`.

mod control_registers;
mod descriptor_tables;
mod far_transfers;
mod segment_loads;
mod stack_frames;
mod syscalls;
mod system_flags;

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::Outcome;
use super::core::Core;
use super::exception::Cause;
use super::flags::mask;
use super::operand::{Machine, Step};
use super::platform::{Platform, Reply};
use super::state::Fault;
use crate::registers::{CR0_TS, RAX, RBX, RCX, RDX};

const CR4_UMIP: u64 = 1 << 11;
/// EFER: SYSCALL is enabled.
pub(super) const EFER_SCE: u64 = 1;

/// An instruction that the machine's whole state may take part in. RIP is at the next instruction already.
pub(super) struct System<'a> {
    pub core: &'a mut Core,
    pub platform: &'a mut (dyn Platform + 'a),
    pub instruction: &'a Instruction,
    pub code: &'a [u8],
}

/// #GP(0).
pub(super) const GENERAL_PROTECTION: Outcome = Outcome::fault_zero(13);
/// #UD.
pub(super) const UNDEFINED: Outcome = Outcome::fault(6);

impl From<Fault> for Outcome {
    fn from(fault: Fault) -> Self {
        let Fault { vector, error_code, address } = fault;
        Self::Fault { vector, error_code, address }
    }
}

/// Whether an instruction may belong here: such a one is never executed by what knows general registers alone.
pub(super) fn needs_machine(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let register = |operand: u32| {
        operand < instruction.op_count()
            && instruction.op_kind(operand) == OpKind::Register
            && is_system_register(instruction.op_register(operand))
    };
    match instruction.mnemonic() {
        M::Mov | M::Pop => register(0) || register(1),
        M::Leave => instruction.code() == Code::Leavew,
        M::Cli | M::Sti | M::Popfq | M::Popf | M::Hlt | M::Iretq | M::Iretd | M::Iret | M::Syscall | M::Sysretq => true,
        M::Swapgs | M::Int | M::Int3 | M::Int1 | M::Cpuid | M::In | M::Out | M::Rdmsr | M::Wrmsr | M::Xsetbv => true,
        M::Enter | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Lgdt | M::Lidt | M::Sgdt | M::Sidt => true,
        M::Outsd | M::Lldt | M::Ltr | M::Sldt | M::Str | M::Smsw | M::Lmsw | M::Clts | M::Stac | M::Clac => true,
        M::Invlpg | M::Invpcid | M::Wbinvd | M::Invd | M::Wbnoinvd | M::Rdpmc | M::Clflush | M::Clflushopt => true,
        M::Clwb | M::Lss | M::Lfs | M::Lgs | M::Lar | M::Lsl | M::Verr | M::Verw | M::Retf | M::Monitor => true,
        // With REX.B the bytes that iced calls PAUSE exchange R8 with RAX.
        M::Pause => instruction.len() == 2,
        M::Mwait | M::Sysenter | M::Sysexit | M::Sysret | M::Sysexitq => true,
        _ => false,
    }
}

fn is_system_register(register: Register) -> bool {
    register.is_cr() || register.is_dr() || register.is_segment_register()
}

impl System<'_> {
    /// Executes the instruction if it belongs here; false if it does not.
    pub fn execute(&mut self) -> Step<bool> {
        use Mnemonic as M;
        match self.instruction.mnemonic() {
            M::Cli => self.set_interrupts(false)?,
            M::Sti => self.set_interrupts(true)?,
            M::Popfq => self.pop_flags(8)?,
            M::Popf => self.pop_flags(2)?,
            M::Hlt => self.halt()?,
            M::Iretq => self.iret(8)?,
            M::Iretd => self.iret(4)?,
            M::Iret => self.iret(2)?,
            M::Syscall => self.syscall()?,
            M::Sysretq | M::Sysret => self.sysret()?,
            M::Swapgs => self.swapgs()?,
            M::Int => self.software_interrupt(self.instruction.immediate8())?,
            M::Int3 => self.breakpoint()?,
            M::Int1 => self.deliver(1, Cause::Exception)?,
            M::Cpuid => self.cpuid(),
            M::In | M::Out => self.port()?,
            M::Rdmsr => self.read_msr()?,
            M::Wrmsr => self.write_msr()?,
            M::Mov => return self.mov(),
            M::Pop => return self.pop_segment(),
            M::Xsetbv => self.xsetbv()?,
            M::Enter => self.enter()?,
            M::Pause if self.instruction.len() == 2 => self.pause(),
            M::Leave if self.instruction.code() == Code::Leavew => self.leave_word()?,
            _ => return self.execute_rare(),
        }
        Ok(true)
    }

    fn pause(&mut self) {
        let reply = self.platform.pause(self.core.state.instructions);
        self.core.devices.leave |= reply == Reply::Leave;
    }

    fn execute_rare(&mut self) -> Step<bool> {
        use Mnemonic as M;
        match self.instruction.mnemonic() {
            M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => self.port_string()?,
            M::Lgdt | M::Lidt => self.load_table()?,
            M::Sgdt | M::Sidt => self.store_table()?,
            M::Lldt => self.load_ldt()?,
            M::Ltr => self.load_task()?,
            M::Sldt | M::Str => self.store_selector()?,
            M::Smsw => self.store_status()?,
            M::Lmsw => self.load_status()?,
            M::Clts => {
                self.require_ring0()?;
                self.core.state.core.system.cr0 &= !CR0_TS;
            }
            M::Stac | M::Clac => self.set_access()?,
            M::Invlpg => self.invalidate()?,
            M::Invpcid => self.invalidate_context()?,
            M::Wbinvd | M::Invd | M::Wbnoinvd => self.require_ring0()?,
            M::Rdpmc => return Err(GENERAL_PROTECTION),
            M::Clflush | M::Clflushopt | M::Clwb => self.touch()?,
            M::Lss | M::Lfs | M::Lgs => self.load_far_pointer()?,
            M::Lar | M::Lsl => self.look_up_segment()?,
            M::Verr | M::Verw => self.verify_segment()?,
            M::Jmp | M::Call => return self.far_transfer(),
            M::Retf => self.far_return()?,
            M::Monitor | M::Mwait | M::Sysenter | M::Sysexit | M::Sysexitq => return Err(UNDEFINED),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Lends the operand machinery of the other families.
    pub fn machine<R>(&mut self, act: impl FnOnce(&mut Machine) -> Step<R>) -> Step<R> {
        self.core.with_machine(self.platform, self.instruction, self.code, act)
    }

    /// The registers.
    pub fn general(&mut self) -> &mut [u64; 16] {
        &mut self.core.state.core.registers.general
    }

    /// The low 32 bits of a register.
    pub fn low(&mut self, register: usize) -> u64 {
        self.general()[register] & mask(4)
    }

    /// EDX:EAX.
    pub fn pair(&mut self) -> u64 {
        self.low(RDX) << 32 | self.low(RAX)
    }

    /// Sets EDX:EAX.
    pub fn set_pair(&mut self, value: u64) {
        self.general()[RAX] = value & mask(4);
        self.general()[RDX] = value >> 32;
    }

    pub fn flags(&mut self) -> &mut u64 {
        &mut self.core.state.core.registers.rflags
    }

    /// #GP in any ring but 0.
    pub fn require_ring0(&self) -> Step {
        if self.core.privilege() == 0 { Ok(()) } else { Err(GENERAL_PROTECTION) }
    }

    pub(super) fn require_no_umip(&self) -> Step {
        if self.core.state.core.system.cr4 & CR4_UMIP == 0 { Ok(()) } else { self.require_ring0() }
    }

    pub(super) fn deliver(&mut self, vector: u8, cause: Cause) -> Step {
        let flags = *self.flags();
        self.core.deliver(vector, None, cause, flags).map_err(Outcome::from)
    }

    fn halt(&mut self) -> Step {
        self.require_ring0()?;
        self.core.state.halted = true;
        Ok(())
    }

    fn cpuid(&mut self) {
        let (leaf, subleaf) = (self.general()[RAX].to_le_bytes(), self.general()[RCX].to_le_bytes());
        let low = |bytes: [u8; 8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let (leaf, subleaf) = (low(leaf), low(subleaf));
        let table = super::cpuid(leaf, subleaf, &self.core.state);
        let answer = self.platform.cpuid(leaf, subleaf, table);
        for (register, value) in [RAX, RBX, RCX, RDX].into_iter().zip(answer) {
            self.general()[register] = value.into();
        }
    }

    /// The selector that the instruction's operand holds.
    pub(super) fn selector_operand(&mut self, operand: u32) -> Step<u16> {
        Ok(selector(self.machine(|m| m.read(operand, 2))?))
    }

    /// Stores 2 bytes to memory, or a zero-extended value to a register.
    pub(super) fn store_word(&mut self, value: u64) -> Step {
        self.machine(|m| {
            let size = if m.instruction.op_kind(0) == OpKind::Memory { 2 } else { m.size(0)? };
            m.write(0, size, value)
        })
    }

    /// The cache-line instructions: there is no cache, but their operand may fault as a load does.
    fn touch(&mut self) -> Step {
        self.machine(|m| {
            let address = m.address()?;
            m.load_bytes(address, &mut [0])
        })
    }
}

/// The low 16 bits.
fn selector(value: u64) -> u16 {
    let [low, high, ..] = value.to_le_bytes();
    u16::from_le_bytes([low, high])
}
