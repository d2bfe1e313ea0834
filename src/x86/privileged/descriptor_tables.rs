//! The registers of descriptor tables and of the task, and what makes the MMU forget: INVLPG and INVPCID.

use iced_x86::Mnemonic;

use super::super::operand::Step;
use super::super::segment::selector_fault;
use super::{GENERAL_PROTECTION, System};
use crate::registers::{DescriptorTable, Segment};

impl System<'_> {
    pub(super) fn load_table(&mut self) -> Step {
        self.require_ring0()?;
        let (limit, base) = self.machine(|m| {
            let address = m.address()?;
            let mut bytes = [0; 10];
            m.load_bytes(address, &mut bytes)?;
            let base = super::super::operand::from_bytes(&bytes[2..]);
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

    pub(super) fn store_table(&mut self) -> Step {
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

    pub(super) fn load_ldt(&mut self) -> Step {
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

    pub(super) fn load_task(&mut self) -> Step {
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

    pub(super) fn store_selector(&mut self) -> Step {
        self.require_no_umip()?;
        let system = &self.core.state.core.system;
        let segment = if self.instruction.mnemonic() == Mnemonic::Sldt { system.ldt } else { system.tr };
        self.store_word(segment.selector.into())
    }

    pub(super) fn invalidate(&mut self) -> Step {
        self.require_ring0()?;
        let linear = self.machine(|m| m.address())?.linear;
        self.core.mmu.flush_page(linear);
        Ok(())
    }

    pub(super) fn invalidate_context(&mut self) -> Step {
        self.require_ring0()?;
        let kind = self.machine(|m| {
            let address = m.address()?;
            let mut descriptor = [0; 16];
            m.load_bytes(address, &mut descriptor)?;
            let bad = descriptor[2..8].iter().any(|byte| *byte != 0) || descriptor[1] & 0xf0 != 0;
            let kind = m.read(0, 8)?;
            let linear = super::super::operand::from_bytes(&descriptor[8..]);
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
}
