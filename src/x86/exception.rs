//! Delivery of exceptions and interrupts through the 64-bit interrupt descriptor table, and the way back by IRET (Intel
//! SDM volume 3, chapter 7). An exception during delivery becomes a double fault or a shutdown by the manual's table.

use super::core::Core;
use super::mmu::{Access, PAGE};
use super::segment::{Descriptor, SegmentFault};
use super::state::Fault;
use crate::registers::{RFLAGS_IF, RFLAGS_RF, RFLAGS_TF, RSP, Segment, segment_attributes};

/// RFLAGS: nested task.
pub(super) const RFLAGS_NT: u64 = 1 << 14;
/// RFLAGS: virtual-8086 mode.
pub(super) const RFLAGS_VM: u64 = 1 << 17;

const DEBUG: u8 = 1;
const DOUBLE_FAULT: u8 = 8;
const INVALID_TSS: u8 = 10;
const NOT_PRESENT: u8 = 11;
const STACK_FAULT: u8 = 12;
const GENERAL_PROTECTION: u8 = 13;
const PAGE_FAULT: u8 = 14;

/// Error code bits: the cause was outside of the program; the index is one of the IDT.
const EXTERNAL: u32 = 1;
const IN_IDT: u32 = 2;

/// What causes a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// An exception of the processor.
    Exception,
    /// INT n, INT3 or INTO: gates check the privilege level.
    Software,
    /// An interrupt.
    Interrupt,
}

impl Cause {
    fn external(self) -> u32 {
        if self == Self::Software { 0 } else { EXTERNAL }
    }
}

/// A gate of the IDT.
struct Gate {
    selector: u16,
    offset: u64,
    stack: u8,
    is_interrupt: bool,
}

fn is_contributory(vector: u8) -> bool {
    matches!(vector, 0 | 10..=13)
}

/// Whether a fault while another is being delivered makes a double fault.
fn is_double(first: u8, second: u8) -> bool {
    let page = first == PAGE_FAULT && (second == PAGE_FAULT || is_contributory(second));
    page || is_contributory(first) && is_contributory(second)
}

impl Core {
    /// Delivers an exception with `flags` as the RFLAGS to be saved; false if it ends in a shutdown.
    pub fn deliver_exception(&mut self, fault: Fault, flags: u64) -> bool {
        let mut current = fault;
        // Each round delivers, or comes closer to the double fault.
        loop {
            if current.vector == DEBUG {
                self.state.debug[6] |= current.address.unwrap_or(0);
                // General detect is over.
                self.state.debug[7] &= !(1 << 13);
            } else if current.vector == PAGE_FAULT {
                self.state.core.system.cr2 = current.address.unwrap_or(0);
            }
            match self.deliver(current.vector, current.error_code, Cause::Exception, flags) {
                Ok(()) => return true,
                Err(_) if current.vector == DOUBLE_FAULT => {
                    self.state.shut_down = true;
                    return false;
                }
                Err(next) if is_double(current.vector, next.vector) => {
                    current = Fault::with_code(DOUBLE_FAULT, 0);
                }
                Err(next) => current = next,
            }
        }
    }

    /// Delivers an interrupt; a fault in doing so is delivered instead. False if that ends in a shutdown.
    pub fn deliver_interrupt(&mut self, vector: u8) -> bool {
        let flags = self.state.core.registers.rflags;
        match self.deliver(vector, None, Cause::Interrupt, flags) {
            Ok(()) => true,
            Err(fault) => self.deliver_exception(fault, flags),
        }
    }

    /// Enters the handler of a vector, all or nothing.
    pub fn deliver(&mut self, vector: u8, error_code: Option<u32>, cause: Cause, flags: u64) -> Result<(), Fault> {
        let gate = self.gate(vector, cause)?;
        let external = cause.external();
        let bad = |selector: u16| Fault::with_code(GENERAL_PROTECTION, u32::from(selector & !3) | external);
        if gate.selector & !3 == 0 {
            return Err(Fault::with_code(GENERAL_PROTECTION, external));
        }
        let descriptor = self.descriptor(gate.selector).map_err(|fault| match fault {
            SegmentFault::Limit => bad(gate.selector),
            SegmentFault::Page(fault) => fault,
        })?;
        let level = self.privilege();
        if !descriptor.is_code64() || descriptor.dpl() > level {
            return Err(bad(gate.selector));
        }
        if !descriptor.is_present() {
            return Err(Fault::with_code(NOT_PRESENT, u32::from(gate.selector & !3) | external));
        }
        let inner = if descriptor.is_conforming() { level } else { descriptor.dpl() };
        let old = self.state.core.registers;
        let top = if gate.stack != 0 {
            self.tss_word(0x24 + 8 * (u64::from(gate.stack) - 1), external)?
        } else if inner < level {
            self.tss_word(4 + 8 * u64::from(inner), external)?
        } else {
            old.general[RSP]
        };
        let system = &self.state.core.system;
        let mut frame =
            vec![u64::from(system.ss.selector), old.general[RSP], flags, system.cs.selector.into(), old.rip];
        frame.extend(error_code.map(u64::from));
        let top = (top & !0xf).wrapping_sub(8 * frame.len() as u64);
        frame.reverse();
        let bytes: Vec<u8> = frame.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.write_as(top, &bytes, inner == 3, external)?;
        self.mark_accessed(gate.selector, &descriptor)?;
        self.enter(&gate, &descriptor, inner, top);
        Ok(())
    }

    fn enter(&mut self, gate: &Gate, descriptor: &Descriptor, inner: u8, top: u64) {
        let level = self.privilege();
        let system = &mut self.state.core.system;
        system.cs = descriptor.segment(gate.selector & !3 | u16::from(inner));
        if inner < level {
            system.ss = null_stack(inner);
        }
        let registers = &mut self.state.core.registers;
        registers.general[RSP] = top;
        registers.rip = gate.offset;
        registers.rflags &= !(RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM);
        if gate.is_interrupt {
            registers.rflags &= !RFLAGS_IF;
        }
        self.state.halted = false;
        (self.state.interrupt_shadow, self.state.trap_shadow) = (false, false);
        self.mode_changed();
    }

    fn gate(&mut self, vector: u8, cause: Cause) -> Result<Gate, Fault> {
        let index = (u32::from(vector) * 8) | IN_IDT | cause.external();
        let table = self.state.core.system.idt;
        let at = 16 * u64::from(vector);
        if at + 15 > u64::from(table.limit) {
            return Err(Fault::with_code(GENERAL_PROTECTION, index));
        }
        let mut bytes = [0; 16];
        self.read_as(table.base.wrapping_add(at), &mut bytes, false, 0)?;
        let [low, high] = [0, 8].map(|i| u64::from_le_bytes(bytes[i..i + 8].try_into().expect("eight bytes")));
        let kind = low >> 40 & 0x1f;
        let required = low >> 45 & 3;
        if !matches!(kind, 0xe | 0xf) || cause == Cause::Software && required < u64::from(self.privilege()) {
            return Err(Fault::with_code(GENERAL_PROTECTION, index));
        }
        if low >> 47 & 1 == 0 {
            return Err(Fault::with_code(NOT_PRESENT, index));
        }
        let [_, _, s0, s1, stack, ..] = low.to_le_bytes();
        let offset = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        if !self.mmu.is_canonical(offset) {
            return Err(Fault::with_code(GENERAL_PROTECTION, cause.external()));
        }
        Ok(Gate { selector: u16::from_le_bytes([s0, s1]), offset, stack: stack & 7, is_interrupt: kind == 0xe })
    }

    /// A stack pointer from the task-state segment.
    fn tss_word(&mut self, at: u64, external: u32) -> Result<u64, Fault> {
        let task = self.state.core.system.tr;
        if at + 7 > u64::from(task.limit) {
            return Err(Fault::with_code(INVALID_TSS, u32::from(task.selector & !3) | external));
        }
        let mut bytes = [0; 8];
        self.read_as(task.base.wrapping_add(at), &mut bytes, false, 0)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The privilege level.
    pub fn privilege(&self) -> u8 {
        let [low, _] = self.state.core.system.cs.selector.to_le_bytes();
        low & 3
    }

    /// Reads memory with the rights of ring 0 or 3, whatever the current level.
    pub fn read_as(&mut self, address: u64, buffer: &mut [u8], is_user: bool, external: u32) -> Result<(), Fault> {
        let mut done = 0;
        for (physical, length) in self.pieces(address, buffer.len(), Access::Read, is_user, external)? {
            let piece = &mut buffer[done..done + length];
            if self.mmu.memory.read(physical, piece).is_err() {
                piece.fill(0xff);
            }
            done += length;
        }
        Ok(())
    }

    /// Writes memory with the rights of ring 0 or 3: all of it or nothing.
    pub fn write_as(&mut self, address: u64, data: &[u8], is_user: bool, external: u32) -> Result<(), Fault> {
        let mut done = 0;
        for (physical, length) in self.pieces(address, data.len(), Access::Write, is_user, external)? {
            // What is not RAM swallows the write.
            let _ = self.mmu.memory.write(physical, &data[done..done + length]);
            done += length;
        }
        Ok(())
    }

    fn pieces(
        &mut self,
        address: u64,
        length: usize,
        access: Access,
        is_user: bool,
        external: u32,
    ) -> Result<[(u64, usize); 2], Fault> {
        let last = address.wrapping_add(length as u64 - 1);
        if !self.mmu.is_canonical(address) || !self.mmu.is_canonical(last) {
            let vector = if access == Access::Write { STACK_FAULT } else { GENERAL_PROTECTION };
            return Err(Fault::with_code(vector, external));
        }
        let walk = |at: u64| {
            self.mmu.walk_as(at, access, is_user).map(|found| found.physical).map_err(|code| Fault {
                vector: PAGE_FAULT,
                error_code: Some(code),
                address: Some(at),
            })
        };
        let first = length.min(usize::try_from(PAGE - address % PAGE).expect("at most a page"));
        let low = (walk(address)?, first);
        let high = if first < length { (walk(address.wrapping_add(first as u64))?, length - first) } else { (0, 0) };
        Ok([low, high])
    }
}

/// SS after a change to an inner level.
pub(super) fn null_stack(level: u8) -> Segment {
    use segment_attributes as a;
    let attributes = a::P | a::S | 3 | u16::from(level) << a::DPL_SHIFT | a::DB | a::G;
    Segment { selector: level.into(), base: 0, limit: u32::MAX, attributes }
}
