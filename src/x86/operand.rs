//! Operands of the instruction being executed: general registers with their sub-registers, effective addresses, and
//! memory through the bus with the checks that the processor makes before it asks the page tables.

use iced_x86::{Instruction, OpKind, Register};

use super::flags::{ARITHMETIC, mask};
use super::{Bus, CpuState, Outcome};
use crate::registers::{CR4_LA57, RSP};

/// The result of a part of an instruction; an error ends the instruction.
pub(super) type Step<T = ()> = Result<T, Outcome>;

/// How often a locked read-modify-write tries again when other vCPUs interfere, before it gives up.
const ATTEMPTS: u32 = 100_000;

/// One instruction in the course of its execution. RIP is at the next instruction already.
pub(super) struct Machine<'a> {
    /// The vCPU.
    pub cpu: &'a mut CpuState,
    /// Its memory.
    pub bus: &'a mut dyn Bus,
    /// What to execute.
    pub instruction: &'a Instruction,
    /// The instruction's bytes.
    pub code: &'a [u8],
}

/// A checked linear address.
#[derive(Clone, Copy)]
pub(super) struct Address {
    /// Linear address.
    pub linear: u64,
    /// Accessed relative to the stack, so that a bad address is #SS instead of #GP.
    pub is_stack: bool,
}

/// A general register's place in the register file.
#[derive(Clone, Copy)]
pub(super) struct Slot {
    /// Number of the 64-bit register.
    pub index: usize,
    /// Position of the lowest bit: 8 for AH, CH, DH and BH.
    pub shift: u32,
    /// Bytes.
    pub size: usize,
}

/// Where a general register lives; `None` for any other register.
#[inline]
pub(super) fn slot(register: Register) -> Option<Slot> {
    SLOTS.get(register as usize).copied().flatten()
}

/// The answers of [`slot`], by number.
static SLOTS: [Option<Slot>; Register::R15 as usize + 1] = {
    let mut slots = [None; Register::R15 as usize + 1];
    let mut n = 0;
    while n < slots.len() {
        slots[n] = find_slot(n);
        n += 1;
    }
    slots
};

/// The place of the register with that number: each size's registers follow one another.
pub(super) const fn find_slot(n: usize) -> Option<Slot> {
    use Register as R;
    let (first, last, index, shift, size) = if n >= R::RAX as usize {
        (R::RAX, R::R15, 0, 0, 8)
    } else if n >= R::EAX as usize {
        (R::EAX, R::R15D, 0, 0, 4)
    } else if n >= R::AX as usize {
        (R::AX, R::R15W, 0, 0, 2)
    } else if n >= R::SPL as usize {
        (R::SPL, R::R15L, 4, 0, 1)
    } else if n >= R::AH as usize {
        (R::AH, R::BH, 0, 8, 1)
    } else {
        (R::AL, R::BL, 0, 0, 1)
    };
    if n < first as usize || n > last as usize {
        return None;
    }
    Some(Slot { index: index + n - first as usize, shift, size })
}

/// The little-endian value of up to 8 bytes.
pub(super) fn from_bytes(bytes: &[u8]) -> u64 {
    let mut whole = [0; 8];
    whole[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(whole)
}

impl Machine<'_> {
    /// Size of an operand in bytes; an immediate has the first operand's.
    pub fn size(&self, operand: u32) -> Step<usize> {
        match self.instruction.op_kind(operand) {
            OpKind::Register => Ok(slot(self.instruction.op_register(operand)).ok_or(Outcome::Unsupported)?.size),
            OpKind::Memory => Ok(self.instruction.memory_size().size()),
            _ if operand != 0 => self.size(0),
            _ => Err(Outcome::Unsupported),
        }
    }

    /// Value of a general register, zero-extended.
    pub fn register(&self, register: Register) -> Step<u64> {
        let place = slot(register).ok_or(Outcome::Unsupported)?;
        Ok(self.cpu.registers.general[place.index] >> place.shift & mask(place.size))
    }

    /// Sets a general register: 4 bytes clear the upper half, 1 or 2 leave the rest alone.
    pub fn set_register(&mut self, register: Register, value: u64) -> Step {
        let place = slot(register).ok_or(Outcome::Unsupported)?;
        let whole = &mut self.cpu.registers.general[place.index];
        let bits = mask(place.size);
        *whole = match place.size {
            8 => value,
            4 => value & bits,
            _ => *whole & !(bits << place.shift) | (value & bits) << place.shift,
        };
        Ok(())
    }

    /// Sets the low `size` bytes of general register `index`, as [`Machine::set_register`] does.
    pub fn set_general(&mut self, index: usize, size: usize, value: u64) {
        let whole = &mut self.cpu.registers.general[index];
        *whole = if size >= 4 { value & mask(size) } else { *whole & !mask(size) | value & mask(size) };
    }

    /// The low `size` bytes of general register `index`.
    pub fn general(&self, index: usize, size: usize) -> u64 {
        self.cpu.registers.general[index] & mask(size)
    }

    /// Replaces the arithmetic flags.
    pub fn set_arithmetic(&mut self, flags: u64) {
        self.set_flags(ARITHMETIC, flags);
    }

    /// Replaces the flags in `which`.
    pub fn set_flags(&mut self, which: u64, flags: u64) {
        self.cpu.registers.rflags = self.cpu.registers.rflags & !which | flags & which;
    }

    /// Effective address of the memory operand without a segment base.
    pub fn effective_address(&self) -> Step<u64> {
        let instruction = self.instruction;
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let mut address = instruction.memory_displacement64();
        // With RIP or EIP as base, iced has added it already.
        let is_relative = matches!(base, Register::RIP | Register::EIP);
        if base != Register::None && !is_relative {
            address = address.wrapping_add(self.register(base)?);
        }
        if index != Register::None {
            let scaled = self.register(index)?.wrapping_mul(u64::from(instruction.memory_index_scale()));
            address = address.wrapping_add(scaled);
        }
        Ok(if self.has_32_bit_address() { address & mask(4) } else { address })
    }

    /// Whether the memory operand's address is cut to 32 bits.
    pub fn has_32_bit_address(&self) -> bool {
        let instruction = self.instruction;
        let is_double = |r: Register| r == Register::EIP || r >= Register::EAX && r <= Register::R15D;
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let has_none = base == Register::None && index == Register::None;
        is_double(base) || is_double(index) || has_none && instruction.memory_displ_size() == 4
    }

    /// Base of the segment that the memory operand names: only FS and GS have one in 64-bit mode.
    pub fn segment_base(&self) -> u64 {
        match self.instruction.memory_segment() {
            Register::FS => self.cpu.system.fs.base,
            Register::GS => self.cpu.system.gs.base,
            _ => 0,
        }
    }

    /// Linear address of the memory operand.
    pub fn address(&self) -> Step<Address> {
        let linear = self.effective_address()?.wrapping_add(self.segment_base());
        let is_stack =
            matches!(self.instruction.memory_base(), Register::RSP | Register::RBP | Register::ESP | Register::EBP)
                && !matches!(self.instruction.memory_segment(), Register::FS | Register::GS);
        Ok(Address { linear, is_stack })
    }

    /// Whether `address` is canonical for the paging mode.
    pub fn is_canonical(&self, address: u64) -> bool {
        let unused = if self.cpu.system.cr4 & CR4_LA57 != 0 { 7 } else { 16 };
        (address << unused).cast_signed() >> unused == address.cast_signed()
    }

    /// Raises #GP or #SS if an access would leave the canonical range.
    fn check(&self, address: Address, length: usize) -> Step {
        let last = address.linear.wrapping_add(length as u64 - 1);
        if self.is_canonical(address.linear) && self.is_canonical(last) {
            return Ok(());
        }
        Err(Outcome::fault_zero(if address.is_stack { 12 } else { 13 }))
    }

    /// Raises #GP if a memory operand that must be aligned is not.
    pub fn check_alignment(&self, address: Address, alignment: u64) -> Step {
        if address.linear.is_multiple_of(alignment) { Ok(()) } else { Err(Outcome::fault_zero(13)) }
    }

    /// Reads guest memory.
    pub fn load_bytes(&mut self, address: Address, buffer: &mut [u8]) -> Step {
        self.check(address, buffer.len())?;
        Ok(self.bus.read(address.linear, buffer)?)
    }

    /// Writes guest memory.
    pub fn store_bytes(&mut self, address: Address, data: &[u8]) -> Step {
        self.check(address, data.len())?;
        Ok(self.bus.write(address.linear, data)?)
    }

    /// Reads an integer of up to 8 bytes.
    pub fn load(&mut self, address: Address, size: usize) -> Step<u64> {
        let mut buffer = [0; 8];
        let bytes = buffer.get_mut(..size).ok_or(Outcome::Unsupported)?;
        self.load_bytes(address, bytes)?;
        Ok(u64::from_le_bytes(buffer))
    }

    /// Writes an integer of up to 8 bytes.
    pub fn store(&mut self, address: Address, size: usize, value: u64) -> Step {
        let bytes = value.to_le_bytes();
        self.store_bytes(address, bytes.get(..size).ok_or(Outcome::Unsupported)?)
    }

    /// Reads an operand, zero-extended from `size` bytes (an immediate first sign-extended to the operand size).
    pub fn read(&mut self, operand: u32, size: usize) -> Step<u64> {
        match self.instruction.op_kind(operand) {
            OpKind::Register => self.register(self.instruction.op_register(operand)),
            OpKind::Memory => {
                let address = self.address()?;
                self.load(address, size)
            }
            _ => Ok(self.instruction.try_immediate(operand).map_err(|_| Outcome::Unsupported)? & mask(size)),
        }
    }

    /// Writes an operand of `size` bytes.
    pub fn write(&mut self, operand: u32, size: usize, value: u64) -> Step {
        match self.instruction.op_kind(operand) {
            OpKind::Register => self.set_register(self.instruction.op_register(operand), value),
            OpKind::Memory => {
                let address = self.address()?;
                self.store(address, size, value)
            }
            _ => Err(Outcome::Unsupported),
        }
    }

    /// Replaces operand 0 by what `change` makes of it and sets the flags `which` as `change` says; returns the old
    /// value. With a LOCK prefix this is atomic.
    pub fn modify(&mut self, size: usize, which: u64, change: impl Fn(u64) -> (u64, u64)) -> Step<u64> {
        if self.instruction.op_kind(0) == OpKind::Memory {
            let address = self.address()?;
            return self.modify_at(address, size, which, change);
        }
        let register = self.instruction.op_register(0);
        let old = self.register(register)?;
        let (new, flags) = change(old);
        self.set_register(register, new)?;
        self.set_flags(which, flags);
        Ok(old)
    }

    /// [`Machine::modify`] for an integer in memory.
    pub fn modify_at(
        &mut self,
        address: Address,
        size: usize,
        which: u64,
        change: impl Fn(u64) -> (u64, u64),
    ) -> Step<u64> {
        let old = self.load(address, size)?;
        if self.instruction.has_lock_prefix() {
            return self.modify_locked(address, size, which, old, change);
        }
        let (new, flags) = change(old);
        self.store(address, size, new)?;
        self.set_flags(which, flags);
        Ok(old)
    }

    /// Tries to exchange until no other vCPU came in between; `old` is a first guess at what is there.
    pub fn modify_locked(
        &mut self,
        address: Address,
        size: usize,
        which: u64,
        mut old: u64,
        change: impl Fn(u64) -> (u64, u64),
    ) -> Step<u64> {
        for _ in 0..ATTEMPTS {
            let (new, flags) = change(old);
            let found = self.compare_exchange(address, size, old.into(), new.into())?;
            if found == u128::from(old) {
                self.set_flags(which, flags);
                return Ok(old);
            }
            old = from_bytes(&found.to_le_bytes()[..size]);
        }
        Err(Outcome::Unsupported)
    }

    /// [`Bus::compare_exchange`] with the address checked.
    pub fn compare_exchange(&mut self, address: Address, size: usize, expected: u128, new: u128) -> Step<u128> {
        self.check(address, size)?;
        Ok(self.bus.compare_exchange(address.linear, size, expected, new)?)
    }

    /// Pushes `size` bytes.
    pub fn push(&mut self, size: usize, value: u64) -> Step {
        let top = self.cpu.registers.general[RSP].wrapping_sub(size as u64);
        self.store(Address { linear: top, is_stack: true }, size, value)?;
        self.cpu.registers.general[RSP] = top;
        Ok(())
    }

    /// Pops `size` bytes.
    pub fn pop(&mut self, size: usize) -> Step<u64> {
        let top = self.cpu.registers.general[RSP];
        let value = self.load(Address { linear: top, is_stack: true }, size)?;
        self.cpu.registers.general[RSP] = top.wrapping_add(size as u64);
        Ok(value)
    }
}
