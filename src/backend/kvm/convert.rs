//! Between KVM's register structs and ours.

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};

use crate::registers::{
    DescriptorTable, FpuState, Registers, Segment, SystemRegisters, segment_attributes as attributes,
};

impl From<&kvm_regs> for Registers {
    fn from(r: &kvm_regs) -> Self {
        Self {
            general: [
                r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
                r.r15,
            ],
            rip: r.rip,
            rflags: r.rflags,
        }
    }
}

impl From<&Registers> for kvm_regs {
    fn from(r: &Registers) -> Self {
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = r.general;
        Self {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip: r.rip,
            rflags: r.rflags,
        }
    }
}

fn segment(s: &kvm_segment) -> Segment {
    let bit = |value: u8, mask: u16| if value != 0 { mask } else { 0 };
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        attributes: u16::from(s.type_ & 0xf)
            | bit(s.s, attributes::S)
            | u16::from(s.dpl & 3) << attributes::DPL_SHIFT
            | bit(u8::from(s.present != 0 && s.unusable == 0), attributes::P)
            | bit(s.avl, attributes::AVL)
            | bit(s.l, attributes::L)
            | bit(s.db, attributes::DB)
            | bit(s.g, attributes::G),
    }
}

fn kvm_segment_of(s: &Segment) -> kvm_segment {
    let bit = |mask: u16| u8::from(s.attributes & mask != 0);
    let [low, _] = s.attributes.to_le_bytes();
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: low & 0xf,
        s: bit(attributes::S),
        dpl: low >> attributes::DPL_SHIFT & 3,
        present: bit(attributes::P),
        avl: bit(attributes::AVL),
        l: bit(attributes::L),
        db: bit(attributes::DB),
        g: bit(attributes::G),
        unusable: 1 - bit(attributes::P),
        padding: 0,
    }
}

fn table(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: t.base, limit: t.limit }
}

fn kvm_table(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

impl From<&kvm_sregs> for SystemRegisters {
    fn from(s: &kvm_sregs) -> Self {
        Self {
            cs: segment(&s.cs),
            ds: segment(&s.ds),
            es: segment(&s.es),
            fs: segment(&s.fs),
            gs: segment(&s.gs),
            ss: segment(&s.ss),
            tr: segment(&s.tr),
            ldt: segment(&s.ldt),
            gdt: table(&s.gdt),
            idt: table(&s.idt),
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8,
            efer: s.efer,
            apic_base: s.apic_base,
        }
    }
}

/// Overwrites what we model of `target`, and leaves the rest (pending interrupts).
pub(super) fn apply(system: &SystemRegisters, target: &mut kvm_sregs) {
    target.cs = kvm_segment_of(&system.cs);
    target.ds = kvm_segment_of(&system.ds);
    target.es = kvm_segment_of(&system.es);
    target.fs = kvm_segment_of(&system.fs);
    target.gs = kvm_segment_of(&system.gs);
    target.ss = kvm_segment_of(&system.ss);
    target.tr = kvm_segment_of(&system.tr);
    target.ldt = kvm_segment_of(&system.ldt);
    target.gdt = kvm_table(&system.gdt);
    target.idt = kvm_table(&system.idt);
    (target.cr0, target.cr2, target.cr3, target.cr4, target.cr8) =
        (system.cr0, system.cr2, system.cr3, system.cr4, system.cr8);
    (target.efer, target.apic_base) = (system.efer, system.apic_base);
}

impl From<&kvm_fpu> for FpuState {
    fn from(f: &kvm_fpu) -> Self {
        Self {
            st: f.fpr,
            fcw: f.fcw,
            fsw: f.fsw,
            ftw: f.ftwx,
            fop: f.last_opcode,
            fip: f.last_ip,
            fdp: f.last_dp,
            xmm: f.xmm.map(u128::from_le_bytes),
            mxcsr: f.mxcsr,
        }
    }
}

impl From<&FpuState> for kvm_fpu {
    fn from(f: &FpuState) -> Self {
        Self {
            fpr: f.st,
            fcw: f.fcw,
            fsw: f.fsw,
            ftwx: f.ftw,
            last_opcode: f.fop,
            last_ip: f.fip,
            last_dp: f.fdp,
            xmm: f.xmm.map(u128::to_le_bytes),
            mxcsr: f.mxcsr,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_registers_survive_the_round_trip() {
        let registers = Registers { general: std::array::from_fn(|i| 0x1111 * i as u64), rip: 77, rflags: 2 };
        assert_eq!(Registers::from(&kvm_regs::from(&registers)), registers);
        let fpu = FpuState {
            xmm: std::array::from_fn(|i| u128::MAX - i as u128),
            fcw: 1,
            fsw: 2,
            ftw: 3,
            ..Default::default()
        };
        assert_eq!(FpuState::from(&kvm_fpu::from(&fpu)), fpu);
    }

    #[test]
    fn test_segment_attributes_survive_the_round_trip() {
        for attributes in [0xa09bu16, 0xc093, 0x008b, 0, 0xf0ff] {
            let before = Segment { selector: 8, base: 5, limit: u32::MAX, attributes };
            assert_eq!(segment(&kvm_segment_of(&before)), before, "{attributes:#x}");
        }
    }
}
