//! Loads of data segment registers, and the instructions that ask what a selector stands for.

use iced_x86::{Mnemonic, OpKind, Register};

use super::super::flags::{ZF, flag, mask};
use super::super::operand::Step;
use super::super::segment::{DataSegment, SegmentFault};
use super::{System, UNDEFINED, selector};
use crate::registers::Segment;

/// The segment register that is written by an instruction with that operand.
pub(super) fn data_segment(register: Register) -> Option<DataSegment> {
    Some(match register {
        Register::ES => DataSegment::Es,
        Register::SS => DataSegment::Ss,
        Register::DS => DataSegment::Ds,
        Register::FS => DataSegment::Fs,
        Register::GS => DataSegment::Gs,
        _ => return None,
    })
}

impl System<'_> {
    pub(super) fn load_segment(&mut self, which: DataSegment, selector: u16) -> Step {
        self.core.load_data_segment(which, selector)?;
        let is_stack = which == DataSegment::Ss;
        (self.core.state.interrupt_shadow, self.core.state.trap_shadow) = (is_stack, is_stack);
        Ok(())
    }

    pub(super) fn pop_segment(&mut self) -> Step<bool> {
        if self.instruction.op_kind(0) != OpKind::Register || !self.instruction.op_register(0).is_segment_register() {
            return Ok(false);
        }
        let which = data_segment(self.instruction.op_register(0)).ok_or(UNDEFINED)?;
        let size = usize::try_from(self.instruction.stack_pointer_increment().unsigned_abs()).expect("2 or 8");
        let value = self.machine(|m| m.pop(size))?;
        self.load_segment(which, selector(value))?;
        Ok(true)
    }

    /// Offset and selector of a far pointer in memory.
    pub(super) fn far_pointer(&mut self) -> Step<(u64, u16)> {
        self.machine(|m| {
            let address = m.address()?;
            let size = m.instruction.memory_size().size().saturating_sub(2).clamp(2, 8);
            let mut bytes = [0; 10];
            m.load_bytes(address, &mut bytes[..size + 2])?;
            let offset = super::super::operand::from_bytes(&bytes[..size]);
            Ok((offset, u16::from_le_bytes([bytes[size], bytes[size + 1]])))
        })
    }

    pub(super) fn load_far_pointer(&mut self) -> Step {
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
    pub(super) fn look_up_segment(&mut self) -> Step {
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

    pub(super) fn verify_segment(&mut self) -> Step {
        let new = self.selector_operand(0)?;
        let found = self.visible_segment(new, &[])?;
        let is_code = |attributes: u16| attributes & 8 != 0;
        let wants_write = self.instruction.mnemonic() == Mnemonic::Verw;
        let fits =
            found.is_some_and(|(_, a)| if wants_write { !is_code(a) && a & 2 != 0 } else { !is_code(a) || a & 2 != 0 });
        *self.flags() = *self.flags() & !ZF | flag(fits, ZF);
        Ok(())
    }
}
