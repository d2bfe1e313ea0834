//! The instructions that make a machine of the CPU: control and debug registers, descriptor tables, segment loads,
//! system calls, returns from interrupts, model-specific registers, CPUID, HLT. They need more than the registers that
//! the other families see. Ports are in `port`, MSRs in `msr`.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::Outcome;
use super::core::Core;
use super::cpu::{CpuExit, Missing};
use super::exception::{Cause, RFLAGS_NT, RFLAGS_VM};
use super::flags::{ARITHMETIC, DF, ZF, flag, mask};
use super::operand::{Machine, Step};
use super::platform::{Platform, Reply};
use super::segment::{DataSegment, selector_fault};
use super::state::Fault;
use crate::registers::{
    CR0_PE, CR0_PG, CR4_LA57, CR4_OSFXSR, CR4_OSXSAVE, CR4_PAE, DescriptorTable, RAX, RBP, RCX, RDX, RFLAGS_IF,
    RFLAGS_RF, RFLAGS_TF, RSP, Segment, segment_attributes,
};

/// RFLAGS: I/O privilege level.
pub(super) const RFLAGS_IOPL: u64 = 3 << 12;
/// RFLAGS: alignment check, or access to user pages under SMAP.
pub(super) const RFLAGS_AC: u64 = 1 << 18;
const RFLAGS_ID: u64 = 1 << 21;
/// RFLAGS bits that POPF and IRET may change at ring 0.
const POPPABLE: u64 = ARITHMETIC | DF | RFLAGS_TF | RFLAGS_IF | RFLAGS_IOPL | RFLAGS_NT | RFLAGS_AC | RFLAGS_ID;
/// RFLAGS bit 1, which is always set.
const RFLAGS_FIXED: u64 = 2;

const CR0_MP: u64 = 1 << 1;
const CR0_EM: u64 = 1 << 2;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_AM: u64 = 1 << 18;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_KNOWN: u64 = CR0_PE
    | CR0_MP
    | CR0_EM
    | crate::registers::CR0_TS
    | CR0_ET
    | CR0_NE
    | crate::registers::CR0_WP
    | CR0_AM
    | CR0_NW
    | CR0_CD
    | CR0_PG;
/// CR4: VME to PGE and PCE (bits 0 to 8), SSE, UMIP, FSGSBASE, XSAVE, SMEP, SMAP. PCIDs, VMX, LA57 are not offered.
const CR4_KNOWN: u64 = 0x1ff | CR4_OSFXSR | 1 << 10 | CR4_UMIP | 1 << 16 | CR4_OSXSAVE | 1 << 20 | 1 << 21;
const CR4_UMIP: u64 = 1 << 11;
const CR4_DE: u64 = 1 << 3;

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

/// The segment register that is written by an instruction with that operand.
fn data_segment(register: Register) -> Option<DataSegment> {
    Some(match register {
        Register::ES => DataSegment::Es,
        Register::SS => DataSegment::Ss,
        Register::DS => DataSegment::Ds,
        Register::FS => DataSegment::Fs,
        Register::GS => DataSegment::Gs,
        _ => return None,
    })
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
                self.core.state.core.system.cr0 &= !crate::registers::CR0_TS;
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

    fn require_no_umip(&self) -> Step {
        if self.core.state.core.system.cr4 & CR4_UMIP == 0 { Ok(()) } else { self.require_ring0() }
    }

    /// The I/O privilege level.
    pub fn io_level(&mut self) -> u8 {
        let [_, high, ..] = (*self.flags() & RFLAGS_IOPL).to_le_bytes();
        high >> 4
    }

    fn deliver(&mut self, vector: u8, cause: Cause) -> Step {
        let flags = *self.flags();
        self.core.deliver(vector, None, cause, flags).map_err(Outcome::from)
    }

    fn set_interrupts(&mut self, enable: bool) -> Step {
        if self.core.privilege() > self.io_level() {
            return Err(GENERAL_PROTECTION);
        }
        let was = *self.flags() & RFLAGS_IF != 0;
        *self.flags() = *self.flags() & !RFLAGS_IF | flag(enable, RFLAGS_IF);
        self.core.state.interrupt_shadow = enable && !was;
        Ok(())
    }

    /// RFLAGS after POPF or IRET of `size` bytes.
    fn popped_flags(&mut self, new: u64, size: usize, level: u8) -> u64 {
        let mut which = POPPABLE & mask(size);
        if level != 0 {
            which &= !RFLAGS_IOPL;
        }
        if level > self.io_level() {
            which &= !RFLAGS_IF;
        }
        *self.flags() & !which | new & which | RFLAGS_FIXED
    }

    fn pop_flags(&mut self, size: usize) -> Step {
        let new = self.machine(|m| m.pop(size))?;
        let level = self.core.privilege();
        let flags = self.popped_flags(new, size, level) & !RFLAGS_RF;
        *self.flags() = flags;
        Ok(())
    }

    fn halt(&mut self) -> Step {
        self.require_ring0()?;
        self.core.state.halted = true;
        Ok(())
    }

    fn iret(&mut self, size: usize) -> Step {
        if *self.flags() & RFLAGS_NT != 0 {
            return Err(GENERAL_PROTECTION);
        }
        let mut words = [0; 5];
        self.machine(|m| {
            for word in &mut words {
                *word = m.pop(size)?;
            }
            Ok(())
        })?;
        let [rip, code, flags, rsp, stack] = words;
        let level = self.core.privilege();
        let (code, stack) = self.core.return_target(selector(code), Some(selector(stack)))?;
        if !self.core.mmu.is_canonical(rip) {
            return Err(GENERAL_PROTECTION);
        }
        let keeps = *self.flags() & !mask(size);
        let new = self.popped_flags(flags, size, level) | keeps;
        *self.flags() = new & !(RFLAGS_VM | RFLAGS_RF) | flags & RFLAGS_RF & mask(size);
        self.go_out(rip, rsp, code, stack, level);
        Ok(())
    }

    /// The end of a far return.
    fn go_out(&mut self, rip: u64, rsp: u64, code: Segment, stack: Option<Segment>, from: u8) {
        let state = &mut self.core.state.core;
        state.registers.rip = rip;
        state.registers.general[RSP] = rsp;
        state.system.cs = code;
        if let Some(stack) = stack {
            state.system.ss = stack;
        }
        if self.core.privilege() > from {
            self.core.hide_inner_segments();
        }
    }

    fn syscall(&mut self) -> Step {
        let state = &mut self.core.state;
        if state.core.system.efer & EFER_SCE == 0 {
            return Err(UNDEFINED);
        }
        let registers = &mut state.core.registers;
        registers.general[RCX] = registers.rip;
        registers.general[11] = registers.rflags & !RFLAGS_RF;
        registers.rip = state.msrs.lstar;
        registers.rflags = registers.rflags & !(state.msrs.sfmask | RFLAGS_RF) | RFLAGS_FIXED;
        let base = selector(state.msrs.star >> 32) & !3;
        state.core.system.cs = flat_code(base, 0);
        state.core.system.ss = flat_data(base.wrapping_add(8), 0);
        Ok(())
    }

    fn sysret(&mut self) -> Step {
        if self.core.state.core.system.efer & EFER_SCE == 0 {
            return Err(UNDEFINED);
        }
        self.require_ring0()?;
        if self.instruction.mnemonic() == Mnemonic::Sysret {
            return Err(self.core.lack(Missing::LegacyMode));
        }
        let target = self.general()[RCX];
        if !self.core.mmu.is_canonical(target) {
            return Err(GENERAL_PROTECTION);
        }
        let state = &mut self.core.state;
        let registers = &mut state.core.registers;
        registers.rip = target;
        registers.rflags = registers.general[11] & POPPABLE | RFLAGS_FIXED;
        let base = selector(state.msrs.star >> 48);
        state.core.system.cs = flat_code(base.wrapping_add(16) | 3, 3);
        state.core.system.ss = flat_data(base.wrapping_add(8) | 3, 3);
        Ok(())
    }

    fn swapgs(&mut self) -> Step {
        self.require_ring0()?;
        let state = &mut self.core.state;
        std::mem::swap(&mut state.core.system.gs.base, &mut state.msrs.kernel_gs_base);
        Ok(())
    }

    fn software_interrupt(&mut self, vector: u8) -> Step {
        self.deliver(vector, Cause::Software)
    }

    fn breakpoint(&mut self) -> Step {
        if self.core.stop_at_int3 {
            self.core.exit = Some(CpuExit::Int3);
            return Err(Outcome::Unsupported);
        }
        self.software_interrupt(3)
    }

    fn cpuid(&mut self) {
        let (leaf, subleaf) = (self.general()[RAX].to_le_bytes(), self.general()[RCX].to_le_bytes());
        let low = |bytes: [u8; 8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let (leaf, subleaf) = (low(leaf), low(subleaf));
        let table = super::cpuid(leaf, subleaf, &self.core.state);
        let answer = self.platform.cpuid(leaf, subleaf, table);
        for (register, value) in [RAX, crate::registers::RBX, RCX, RDX].into_iter().zip(answer) {
            self.general()[register] = value.into();
        }
    }

    fn mov(&mut self) -> Step<bool> {
        let (to, from) = (self.instruction.op_register(0), self.instruction.op_register(1));
        let is_register = |operand| self.instruction.op_kind(operand) == OpKind::Register;
        if is_register(1) && (from.is_cr() || from.is_dr()) {
            self.require_ring0()?;
            let value = if from.is_cr() { self.control(from)? } else { self.debug_register(from)? };
            self.machine(|m| m.write(0, 8, value))?;
        } else if is_register(0) && (to.is_cr() || to.is_dr()) {
            self.require_ring0()?;
            let value = self.machine(|m| m.read(1, 8))?;
            if to.is_cr() { self.set_control(to, value)? } else { self.set_debug_register(to, value)? }
        } else if is_register(0) && to.is_segment_register() {
            let which = data_segment(to).ok_or(UNDEFINED)?;
            let value = self.machine(|m| m.read(1, 2))?;
            self.load_segment(which, selector(value))?;
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    fn load_segment(&mut self, which: DataSegment, selector: u16) -> Step {
        self.core.load_data_segment(which, selector)?;
        let is_stack = which == DataSegment::Ss;
        (self.core.state.interrupt_shadow, self.core.state.trap_shadow) = (is_stack, is_stack);
        Ok(())
    }

    fn pop_segment(&mut self) -> Step<bool> {
        if self.instruction.op_kind(0) != OpKind::Register || !self.instruction.op_register(0).is_segment_register() {
            return Ok(false);
        }
        let which = data_segment(self.instruction.op_register(0)).ok_or(UNDEFINED)?;
        let size = usize::try_from(self.instruction.stack_pointer_increment().unsigned_abs()).expect("2 or 8");
        let value = self.machine(|m| m.pop(size))?;
        self.load_segment(which, selector(value))?;
        Ok(true)
    }

    fn control(&mut self, register: Register) -> Step<u64> {
        let system = &self.core.state.core.system;
        Ok(match register {
            Register::CR0 => system.cr0,
            Register::CR2 => system.cr2,
            Register::CR3 => system.cr3,
            Register::CR4 => system.cr4,
            Register::CR8 => self.platform.task_priority().into(),
            _ => return Err(UNDEFINED),
        })
    }

    fn set_control(&mut self, register: Register, value: u64) -> Step {
        let system = &mut self.core.state.core.system;
        match register {
            Register::CR0 => {
                let is_bad = value >> 32 != 0
                    || value & (CR0_PE | CR0_PG) != CR0_PE | CR0_PG
                    || value & (CR0_NW | CR0_CD) == CR0_NW;
                if is_bad {
                    return Err(GENERAL_PROTECTION);
                }
                system.cr0 = value & CR0_KNOWN | CR0_ET;
            }
            Register::CR2 => system.cr2 = value,
            Register::CR3 => {
                if value >> super::mmu::PHYSICAL_BITS != 0 {
                    return Err(GENERAL_PROTECTION);
                }
                system.cr3 = value;
                self.core.mmu.flush();
            }
            Register::CR4 => {
                let known = CR4_KNOWN | system.cr4 & CR4_LA57;
                if value & !known != 0 || value & CR4_PAE == 0 || (value ^ system.cr4) & CR4_LA57 != 0 {
                    return Err(GENERAL_PROTECTION);
                }
                system.cr4 = value;
                self.core.mmu.flush();
            }
            Register::CR8 => {
                let priority = u8::try_from(value).ok().filter(|priority| *priority < 16).ok_or(GENERAL_PROTECTION)?;
                self.platform.set_task_priority(priority, self.core.state.instructions);
            }
            _ => return Err(UNDEFINED),
        }
        Ok(())
    }

    /// Where a debug register lies: 4 and 5 are 6 and 7 unless CR4.DE makes them undefined.
    fn debug_index(&self, register: Register) -> Step<usize> {
        let number = register as usize - Register::DR0 as usize;
        match number {
            4 | 5 if self.core.state.core.system.cr4 & CR4_DE != 0 => Err(UNDEFINED),
            4 | 5 => Ok(number + 2),
            0..=7 => Ok(number),
            _ => Err(UNDEFINED),
        }
    }

    fn check_general_detect(&mut self) -> Step {
        const DR7_GD: u64 = 1 << 13;
        const DR6_BD: u64 = 1 << 13;
        if self.core.state.debug[7] & DR7_GD == 0 {
            return Ok(());
        }
        Err(Outcome::Fault { vector: 1, error_code: None, address: Some(DR6_BD) })
    }

    fn debug_register(&mut self, register: Register) -> Step<u64> {
        let index = self.debug_index(register)?;
        self.check_general_detect()?;
        Ok(self.core.state.debug[index])
    }

    fn set_debug_register(&mut self, register: Register, value: u64) -> Step {
        let index = self.debug_index(register)?;
        self.check_general_detect()?;
        if index >= 6 && value >> 32 != 0 {
            return Err(GENERAL_PROTECTION);
        }
        self.core.state.debug[index] = match index {
            6 => value & 0xe00f | 0xffff_0ff0,
            7 => value & 0xffff_23ff | 0x400,
            _ => value,
        };
        Ok(())
    }

    fn xsetbv(&mut self) -> Step {
        if self.core.state.core.system.cr4 & CR4_OSXSAVE == 0 {
            return Err(UNDEFINED);
        }
        self.require_ring0()?;
        let value = self.pair();
        let is_valid = super::cpuid::is_valid_xcr0(value);
        if self.low(RCX) != 0 || !is_valid {
            return Err(GENERAL_PROTECTION);
        }
        self.core.state.core.xcr0 = value;
        Ok(())
    }

    fn load_table(&mut self) -> Step {
        self.require_ring0()?;
        let (limit, base) = self.machine(|m| {
            let address = m.address()?;
            let mut bytes = [0; 10];
            m.load_bytes(address, &mut bytes)?;
            let base = super::operand::from_bytes(&bytes[2..]);
            Ok((u16::from_le_bytes([bytes[0], bytes[1]]), base))
        })?;
        if !self.core.mmu.is_canonical(base) {
            return Err(GENERAL_PROTECTION);
        }
        let system = &mut self.core.state.core.system;
        let table = DescriptorTable { base, limit };
        if self.instruction.mnemonic() == Mnemonic::Lgdt {
            system.gdt = table
        } else {
            system.idt = table
        }
        Ok(())
    }

    fn store_table(&mut self) -> Step {
        self.require_no_umip()?;
        let system = &self.core.state.core.system;
        let table = if self.instruction.mnemonic() == Mnemonic::Sgdt { system.gdt } else { system.idt };
        let mut bytes = table.limit.to_le_bytes().to_vec();
        bytes.extend(table.base.to_le_bytes());
        self.machine(|m| {
            let address = m.address()?;
            m.store_bytes(address, &bytes)
        })
    }

    /// The selector that the instruction's operand holds.
    fn selector_operand(&mut self, operand: u32) -> Step<u16> {
        Ok(selector(self.machine(|m| m.read(operand, 2))?))
    }

    fn load_ldt(&mut self) -> Step {
        self.require_ring0()?;
        let new = self.selector_operand(0)?;
        if new & !3 == 0 {
            self.core.state.core.system.ldt = Segment { selector: new, ..Segment::default() };
            return Ok(());
        }
        let descriptor = self.system_descriptor(new, &[2])?;
        self.core.state.core.system.ldt = descriptor;
        Ok(())
    }

    fn load_task(&mut self) -> Step {
        self.require_ring0()?;
        let new = self.selector_operand(0)?;
        if new & !3 == 0 {
            return Err(GENERAL_PROTECTION);
        }
        let mut segment = self.system_descriptor(new, &[9])?;
        let descriptor = self.core.descriptor_or_fault(new)?;
        self.core.mark_busy(new, &descriptor)?;
        segment.attributes |= 2;
        self.core.state.core.system.tr = segment;
        Ok(())
    }

    /// A present system segment of one of these types, in the GDT.
    fn system_descriptor(&mut self, selector: u16, types: &[u16]) -> Step<Segment> {
        if selector & 4 != 0 {
            return Err(selector_fault(13, selector).into());
        }
        let descriptor = self.core.descriptor_or_fault(selector)?;
        let segment = descriptor.segment(selector);
        let fits = descriptor.system_type().is_some_and(|kind| types.contains(&kind));
        if !fits || !self.core.mmu.is_canonical(segment.base) {
            return Err(selector_fault(13, selector).into());
        }
        if !descriptor.is_present() {
            return Err(selector_fault(11, selector).into());
        }
        Ok(segment)
    }

    /// Stores 2 bytes to memory, or a zero-extended value to a register.
    fn store_word(&mut self, value: u64) -> Step {
        self.machine(|m| {
            let size = if m.instruction.op_kind(0) == OpKind::Memory { 2 } else { m.size(0)? };
            m.write(0, size, value)
        })
    }

    fn store_selector(&mut self) -> Step {
        self.require_no_umip()?;
        let system = &self.core.state.core.system;
        let segment = if self.instruction.mnemonic() == Mnemonic::Sldt { system.ldt } else { system.tr };
        self.store_word(segment.selector.into())
    }

    fn store_status(&mut self) -> Step {
        self.require_no_umip()?;
        self.store_word(self.core.state.core.system.cr0)
    }

    fn load_status(&mut self) -> Step {
        self.require_ring0()?;
        let new = self.machine(|m| m.read(0, 2))?;
        // PE can be set, not cleared.
        let cr0 = &mut self.core.state.core.system.cr0;
        *cr0 = *cr0 & !0xe | new & 0xf;
        Ok(())
    }

    fn set_access(&mut self) -> Step {
        if self.core.privilege() != 0 {
            return Err(UNDEFINED);
        }
        let allowed = self.instruction.mnemonic() == Mnemonic::Stac;
        *self.flags() = *self.flags() & !RFLAGS_AC | flag(allowed, RFLAGS_AC);
        Ok(())
    }

    fn invalidate(&mut self) -> Step {
        self.require_ring0()?;
        let linear = self.machine(|m| m.address())?.linear;
        self.core.mmu.flush_page(linear);
        Ok(())
    }

    fn invalidate_context(&mut self) -> Step {
        self.require_ring0()?;
        let kind = self.machine(|m| {
            let address = m.address()?;
            let mut descriptor = [0; 16];
            m.load_bytes(address, &mut descriptor)?;
            let bad = descriptor[2..8].iter().any(|byte| *byte != 0) || descriptor[1] & 0xf0 != 0;
            let kind = m.read(0, 8)?;
            let linear = super::operand::from_bytes(&descriptor[8..]);
            // Without PCIDs only PCID 0 exists.
            let has_pcid = kind < 2 && (descriptor[0] != 0 || descriptor[1] != 0);
            let bad = bad || has_pcid || kind == 0 && !m.is_canonical(linear);
            if bad { Err(GENERAL_PROTECTION) } else { Ok(kind) }
        })?;
        if kind > 3 {
            return Err(GENERAL_PROTECTION);
        }
        self.core.mmu.flush();
        Ok(())
    }

    /// The cache-line instructions: there is no cache, but their operand may fault as a load does.
    fn touch(&mut self) -> Step {
        self.machine(|m| {
            let address = m.address()?;
            m.load_bytes(address, &mut [0])
        })
    }

    /// Offset and selector of a far pointer in memory.
    fn far_pointer(&mut self) -> Step<(u64, u16)> {
        self.machine(|m| {
            let address = m.address()?;
            let size = m.instruction.memory_size().size().saturating_sub(2).clamp(2, 8);
            let mut bytes = [0; 10];
            m.load_bytes(address, &mut bytes[..size + 2])?;
            let offset = super::operand::from_bytes(&bytes[..size]);
            Ok((offset, u16::from_le_bytes([bytes[size], bytes[size + 1]])))
        })
    }

    fn load_far_pointer(&mut self) -> Step {
        let (offset, new) = self.far_pointer()?;
        let which = match self.instruction.mnemonic() {
            Mnemonic::Lss => DataSegment::Ss,
            Mnemonic::Lfs => DataSegment::Fs,
            _ => DataSegment::Gs,
        };
        self.core.load_data_segment(which, new)?;
        self.machine(|m| {
            let size = m.size(0)?;
            m.write(0, size, offset)
        })
    }

    /// LAR and LSL: access rights or limit of a segment, if it is one that may be seen.
    fn look_up_segment(&mut self) -> Step {
        let new = self.selector_operand(1)?;
        let is_rights = self.instruction.mnemonic() == Mnemonic::Lar;
        let found = self.visible_segment(new, if is_rights { &[2, 9, 0xb, 0xc] } else { &[2, 9, 0xb] })?;
        *self.flags() = *self.flags() & !ZF | flag(found.is_some(), ZF);
        let Some((segment, raw)) = found else { return Ok(()) };
        let value = if is_rights { u64::from(raw) << 8 } else { segment.limit.into() };
        self.machine(|m| {
            let size = m.size(0)?;
            m.write(0, size, value & mask(size))
        })
    }

    /// A segment that the current level may see, with its attributes as the descriptor has them.
    fn visible_segment(&mut self, new: u16, system_types: &[u16]) -> Step<Option<(Segment, u16)>> {
        use super::segment::SegmentFault;
        if new & !3 == 0 {
            return Ok(None);
        }
        let descriptor = match self.core.descriptor(new) {
            Ok(descriptor) => descriptor,
            Err(SegmentFault::Limit) => return Ok(None),
            Err(SegmentFault::Page(fault)) => return Err(fault.into()),
        };
        let [requested, _] = (new & 3).to_le_bytes();
        let is_known = descriptor.system_type().is_none_or(|kind| system_types.contains(&kind));
        let is_visible = descriptor.is_conforming() || descriptor.dpl() >= self.core.privilege().max(requested);
        Ok((is_known && is_visible).then(|| (descriptor.segment(new), descriptor.raw_attributes())))
    }

    fn verify_segment(&mut self) -> Step {
        let new = self.selector_operand(0)?;
        let found = self.visible_segment(new, &[])?;
        let is_code = |attributes: u16| attributes & 8 != 0;
        let wants_write = self.instruction.mnemonic() == Mnemonic::Verw;
        let fits =
            found.is_some_and(|(_, a)| if wants_write { !is_code(a) && a & 2 != 0 } else { !is_code(a) || a & 2 != 0 });
        *self.flags() = *self.flags() & !ZF | flag(fits, ZF);
        Ok(())
    }

    /// JMP and CALL with a far pointer in memory; near ones belong elsewhere.
    fn far_transfer(&mut self) -> Step<bool> {
        let size = match self.instruction.code() {
            Code::Jmp_m1616 | Code::Call_m1616 => 2,
            Code::Jmp_m1632 | Code::Call_m1632 => 4,
            Code::Jmp_m1664 | Code::Call_m1664 => 8,
            _ => return Ok(false),
        };
        let (offset, new) = self.far_pointer()?;
        let segment = self.core.far_target(new)?;
        if !self.core.mmu.is_canonical(offset) {
            return Err(GENERAL_PROTECTION);
        }
        if self.instruction.mnemonic() == Mnemonic::Call {
            let (code, back) = (self.core.state.core.system.cs.selector, self.core.state.core.registers.rip);
            let rsp = self.general()[RSP];
            self.machine(|m| {
                m.push(size, code.into())?;
                m.push(size, back).inspect_err(|_| m.cpu.registers.general[RSP] = rsp)
            })?;
        }
        let state = &mut self.core.state.core;
        state.system.cs = segment;
        state.registers.rip = offset;
        Ok(true)
    }

    fn far_return(&mut self) -> Step {
        let size = match self.instruction.code() {
            Code::Retfw | Code::Retfw_imm16 => 2,
            Code::Retfd | Code::Retfd_imm16 => 4,
            _ => 8,
        };
        let released = if self.instruction.op_count() == 1 { u64::from(self.instruction.immediate16()) } else { 0 };
        let (rip, code) = self.machine(|m| Ok((m.pop(size)?, m.pop(size)?)))?;
        let level = self.core.privilege();
        let outer = selector(code) & 3 > level.into();
        let rsp = &mut self.general()[RSP];
        *rsp = rsp.wrapping_add(released);
        let frame = if outer { Some(self.machine(|m| Ok((m.pop(size)?, m.pop(size)?)))?) } else { None };
        let (segment, stack) = self.core.return_target(selector(code), frame.map(|(_, stack)| selector(stack)))?;
        if !self.core.mmu.is_canonical(rip) {
            return Err(GENERAL_PROTECTION);
        }
        let rsp = frame.map_or(self.general()[RSP], |(rsp, _)| rsp.wrapping_add(released));
        self.go_out(rip, rsp, segment, stack, level);
        Ok(())
    }

    /// ENTER: a frame of `immediate16` bytes, with copies of outer frames' pointers.
    fn enter(&mut self) -> Step {
        let size = if self.instruction.code() == Code::Enterw_imm16_imm8 { 2 } else { 8 };
        let bytes = u64::from(self.instruction.immediate16());
        let depth = self.instruction.immediate8_2nd() % 32;
        self.machine(|m| {
            m.push(size, m.cpu.registers.general[RBP])?;
            let frame = m.cpu.registers.general[RSP];
            let mut outer = m.cpu.registers.general[RBP];
            for _ in 1..depth {
                outer = outer.wrapping_sub(size as u64);
                let address = super::operand::Address { linear: outer, is_stack: true };
                let value = m.load(address, size)?;
                m.push(size, value)?;
            }
            if depth > 0 {
                m.push(size, frame)?;
            }
            let top = m.cpu.registers.general[RSP].wrapping_sub(bytes);
            // The new top has to be writable.
            let address = super::operand::Address { linear: top, is_stack: true };
            let value = m.load(address, size)?;
            m.store(address, size, value)?;
            m.set_general(RBP, size, frame);
            m.cpu.registers.general[RSP] = top;
            Ok(())
        })
    }

    fn leave_word(&mut self) -> Step {
        self.machine(|m| {
            m.cpu.registers.general[RSP] = m.cpu.registers.general[RBP];
            let value = m.pop(2)?;
            m.set_general(RBP, 2, value);
            Ok(())
        })
    }
}

/// The low 16 bits.
fn selector(value: u64) -> u16 {
    let [low, high, ..] = value.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// CS as SYSCALL and SYSRET set it.
fn flat_code(selector: u16, level: u16) -> Segment {
    use segment_attributes as a;
    let attributes = a::P | a::S | 0xb | level << a::DPL_SHIFT | a::L | a::G;
    Segment { selector, base: 0, limit: u32::MAX, attributes }
}

/// SS as SYSCALL and SYSRET set it.
fn flat_data(selector: u16, level: u16) -> Segment {
    use segment_attributes as a;
    let attributes = a::P | a::S | 3 | level << a::DPL_SHIFT | a::DB | a::G;
    Segment { selector, base: 0, limit: u32::MAX, attributes }
}
