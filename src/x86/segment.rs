//! Segment descriptors: reading them from the tables, loading segment registers, and the far transfers that go through
//! them. In 64-bit mode only privilege, type and presence matter, and the bases of FS and GS.

use super::Outcome;
use super::core::Core;
use super::cpu::Missing;
use super::state::Fault;
use crate::registers::{DescriptorTable, Segment, segment_attributes as attributes};

/// Type of a 64-bit call gate.
const CALL_GATE: u16 = 0xc;

/// A descriptor: eight bytes of a code or data segment, sixteen of a system segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    low: u64,
    high: u64,
}

/// Why a descriptor can't be read.
#[derive(Debug, Clone, Copy)]
pub(super) enum SegmentFault {
    /// The selector is beyond the table's limit.
    Limit,
    /// Reading the table faults.
    Page(Fault),
}

/// A segment register that a selector can be loaded into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DataSegment {
    Es,
    Ss,
    Ds,
    Fs,
    Gs,
}

impl Descriptor {
    /// Access rights as the descriptor has them, without the segment's own reading of the limit.
    pub fn raw_attributes(&self) -> u16 {
        self.attributes()
    }

    fn attributes(&self) -> u16 {
        let [.., a, b, _] = self.low.to_le_bytes();
        u16::from_le_bytes([a, b]) & 0xf0ff
    }

    fn has(&self, bits: u16) -> bool {
        self.attributes() & bits != 0
    }

    pub fn is_present(&self) -> bool {
        self.has(attributes::P)
    }

    pub fn dpl(&self) -> u8 {
        let [low, _] = (self.attributes() >> attributes::DPL_SHIFT & 3).to_le_bytes();
        low
    }

    pub fn is_code(&self) -> bool {
        self.has(attributes::S) && self.has(8)
    }

    /// A code segment of 64-bit mode.
    pub fn is_code64(&self) -> bool {
        self.is_code() && self.has(attributes::L) && !self.has(attributes::DB)
    }

    /// A code segment of any mode.
    fn is_valid_code(&self) -> bool {
        self.is_code() && !(self.has(attributes::L) && self.has(attributes::DB))
    }

    pub fn is_conforming(&self) -> bool {
        self.is_code() && self.has(4)
    }

    fn is_readable(&self) -> bool {
        self.has(attributes::S) && (!self.has(8) || self.has(2))
    }

    fn is_writable_data(&self) -> bool {
        self.has(attributes::S) && !self.has(8) && self.has(2)
    }

    /// Type of a system segment; `None` for code and data.
    pub fn system_type(&self) -> Option<u16> {
        if self.has(attributes::S) { None } else { Some(self.attributes() & attributes::TYPE) }
    }

    /// The register contents, for that selector.
    pub fn segment(&self, selector: u16) -> Segment {
        let raw = u32::try_from(self.low & 0xffff | self.low >> 32 & 0xf_0000).expect("twenty bits");
        let limit = if self.has(attributes::G) { raw << 12 | 0xfff } else { raw };
        let base = self.low >> 16 & 0xff_ffff | self.low >> 32 & 0xff00_0000;
        let is_system = !self.has(attributes::S);
        let base = if is_system { base | self.high << 32 } else { base };
        let accessed = u16::from(!is_system);
        Segment { selector, base, limit, attributes: self.attributes() | accessed }
    }
}

impl Core {
    fn table(&self, selector: u16) -> DescriptorTable {
        let system = &self.state.core.system;
        if selector & 4 == 0 {
            return system.gdt;
        }
        DescriptorTable { base: system.ldt.base, limit: u16::try_from(system.ldt.limit).unwrap_or(u16::MAX) }
    }

    /// The descriptor that a selector names.
    pub fn descriptor(&mut self, selector: u16) -> Result<Descriptor, SegmentFault> {
        let table = self.table(selector);
        let offset = u64::from(selector & !7);
        if offset + 7 > u64::from(table.limit) || selector & 4 != 0 && self.state.core.system.ldt.selector & !3 == 0 {
            return Err(SegmentFault::Limit);
        }
        let mut bytes = [0; 8];
        let at = table.base.wrapping_add(offset);
        self.read_as(at, &mut bytes, false, 0).map_err(SegmentFault::Page)?;
        let low = u64::from_le_bytes(bytes);
        let mut descriptor = Descriptor { low, high: 0 };
        if descriptor.system_type().is_some() && offset + 15 <= u64::from(table.limit) {
            self.read_as(at.wrapping_add(8), &mut bytes, false, 0).map_err(SegmentFault::Page)?;
            descriptor.high = u64::from_le_bytes(bytes);
        }
        Ok(descriptor)
    }

    /// The same with the faults of an instruction that names the selector.
    pub fn descriptor_or_fault(&mut self, selector: u16) -> Result<Descriptor, Fault> {
        self.descriptor(selector).map_err(|fault| match fault {
            SegmentFault::Limit => selector_fault(13, selector),
            SegmentFault::Page(fault) => fault,
        })
    }

    /// Sets the accessed bit of a code or data segment, as loading it does.
    pub fn mark_accessed(&mut self, selector: u16, descriptor: &Descriptor) -> Result<(), Fault> {
        if descriptor.system_type().is_none() && !descriptor.has(1) {
            let at = self.table(selector).base.wrapping_add(u64::from(selector & !7) + 5);
            let [.., kind, _, _] = descriptor.low.to_le_bytes();
            self.write_as(at, &[kind | 1], false, 0)?;
        }
        Ok(())
    }

    /// Sets the busy bit of a task-state segment.
    pub fn mark_busy(&mut self, selector: u16, descriptor: &Descriptor) -> Result<(), Fault> {
        let at = self.table(selector).base.wrapping_add(u64::from(selector & !7) + 5);
        let [.., kind, _, _] = descriptor.low.to_le_bytes();
        self.write_as(at, &[kind | 2], false, 0)
    }

    /// Loads a selector as MOV and POP do.
    pub fn load_data_segment(&mut self, which: DataSegment, selector: u16) -> Result<(), Fault> {
        let level = self.privilege();
        let [low, _] = (selector & 3).to_le_bytes();
        if selector & !3 == 0 {
            if which == DataSegment::Ss && (level == 3 || low != level) {
                return Err(Fault::with_code(13, 0));
            }
            self.set_data_segment(which, Segment { selector, ..Segment::default() });
            return Ok(());
        }
        let descriptor = self.descriptor_or_fault(selector)?;
        let is_allowed = if which == DataSegment::Ss {
            low == level && descriptor.is_writable_data() && descriptor.dpl() == level
        } else {
            descriptor.is_readable() && (descriptor.is_conforming() || descriptor.dpl() >= level.max(low))
        };
        if !is_allowed {
            return Err(selector_fault(13, selector));
        }
        if !descriptor.is_present() {
            return Err(selector_fault(if which == DataSegment::Ss { 12 } else { 11 }, selector));
        }
        self.mark_accessed(selector, &descriptor)?;
        self.set_data_segment(which, descriptor.segment(selector));
        Ok(())
    }

    fn set_data_segment(&mut self, which: DataSegment, segment: Segment) {
        let system = &mut self.state.core.system;
        *match which {
            DataSegment::Es => &mut system.es,
            DataSegment::Ss => &mut system.ss,
            DataSegment::Ds => &mut system.ds,
            DataSegment::Fs => &mut system.fs,
            DataSegment::Gs => &mut system.gs,
        } = segment;
    }

    /// Checks a code selector as the target of a far jump or call (same privilege).
    pub fn far_target(&mut self, selector: u16) -> Result<Segment, Outcome> {
        if selector & !3 == 0 {
            return Err(Fault::with_code(13, 0).into());
        }
        let level = self.privilege();
        let descriptor = self.descriptor_or_fault(selector)?;
        let [requested, _] = (selector & 3).to_le_bytes();
        if descriptor.system_type() == Some(CALL_GATE) && descriptor.dpl() >= level.max(requested) {
            return Err(self.lack(Missing::CallGate));
        }
        let is_allowed = if descriptor.is_conforming() {
            descriptor.dpl() <= level
        } else {
            descriptor.dpl() == level && requested <= level
        };
        self.check_code(selector, &descriptor, is_allowed)?;
        Ok(descriptor.segment(selector & !3 | u16::from(level)))
    }

    /// Checks a code segment that privilege levels allow or not, and marks it as accessed.
    fn check_code(&mut self, selector: u16, descriptor: &Descriptor, is_allowed: bool) -> Result<(), Outcome> {
        if !descriptor.is_valid_code() || !is_allowed {
            return Err(selector_fault(13, selector).into());
        }
        if !descriptor.is_present() {
            return Err(selector_fault(11, selector).into());
        }
        if !descriptor.is_code64() {
            return Err(self.lack(Missing::LegacyMode));
        }
        self.mark_accessed(selector, descriptor)?;
        Ok(())
    }

    /// Checks a code and a stack selector as what IRET or RET returns to.
    pub fn return_target(&mut self, code: u16, stack: Option<u16>) -> Result<(Segment, Option<Segment>), Outcome> {
        if code & !3 == 0 {
            return Err(Fault::with_code(13, 0).into());
        }
        let descriptor = self.descriptor_or_fault(code)?;
        let [requested, _] = (code & 3).to_le_bytes();
        let is_allowed = requested >= self.privilege()
            && if descriptor.is_conforming() { descriptor.dpl() <= requested } else { descriptor.dpl() == requested };
        self.check_code(code, &descriptor, is_allowed)?;
        let stack = match stack {
            Some(stack) => Some(self.return_stack(stack, requested)?),
            None => None,
        };
        Ok((descriptor.segment(code), stack))
    }

    fn return_stack(&mut self, stack: u16, level: u8) -> Result<Segment, Fault> {
        if stack & !3 == 0 {
            let is_allowed = level != 3 && stack & 3 == u16::from(level);
            return if is_allowed {
                Ok(Segment { selector: stack, ..Segment::default() })
            } else {
                Err(Fault::with_code(13, 0))
            };
        }
        let descriptor = self.descriptor_or_fault(stack)?;
        if stack & 3 != u16::from(level) || !descriptor.is_writable_data() || descriptor.dpl() != level {
            return Err(selector_fault(13, stack));
        }
        if !descriptor.is_present() {
            return Err(selector_fault(12, stack));
        }
        self.mark_accessed(stack, &descriptor)?;
        Ok(descriptor.segment(stack))
    }

    /// After a return to an outer level: segments that it must not use become null.
    pub fn hide_inner_segments(&mut self) {
        let level = self.privilege();
        let system = &mut self.state.core.system;
        for segment in [&mut system.es, &mut system.ds, &mut system.fs, &mut system.gs] {
            let dpl = segment.attributes >> attributes::DPL_SHIFT & 3;
            let is_conforming = segment.attributes & (attributes::S | 0xc) == attributes::S | 0xc;
            if segment.selector & !3 != 0 && !is_conforming && dpl < u16::from(level) {
                *segment = Segment { base: segment.base, ..Segment::default() };
            }
        }
    }
}

/// A fault whose error code is a selector.
pub(super) fn selector_fault(vector: u8, selector: u16) -> Fault {
    Fault::with_code(vector, u32::from(selector & !3))
}
