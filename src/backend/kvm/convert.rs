//! Between KVM's register structs and ours.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

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

/// Words of the legacy area of XSAVE (Intel SDM 1, 10.5.1).
const FIP: usize = 2;
const FDP: usize = 4;
const MXCSR: usize = 6;
const ST: usize = 8;
const XMM: usize = 40;

/// The x87 and SSE state in an XSAVE area. (KVM_GET_FPU has a field for MXCSR, but KVM does not fill it.)
pub(super) fn fpu(area: &[u32]) -> FpuState {
    let halves = |word: usize| {
        let [a, b, c, d] = area[word].to_le_bytes();
        (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
    };
    let register = |word: usize| (0..4).fold(0u128, |value, i| value | u128::from(area[word + i]) << (32 * i));
    let ((fcw, fsw), (ftw, fop)) = (halves(0), halves(1));
    FpuState {
        st: std::array::from_fn(|i| register(ST + 4 * i).to_le_bytes()),
        fcw,
        fsw,
        ftw: ftw.to_le_bytes()[0],
        fop,
        fip: u64::from(area[FIP]) | u64::from(area[FIP + 1]) << 32,
        fdp: u64::from(area[FDP]) | u64::from(area[FDP + 1]) << 32,
        xmm: std::array::from_fn(|i| register(XMM + 4 * i)),
        mxcsr: area[MXCSR],
    }
}

/// Overwrites the x87 and SSE state in an XSAVE area.
pub(super) fn put_fpu(fpu: &FpuState, area: &mut [u32]) {
    let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
    area[0] = u32::from(fpu.fcw) | u32::from(fpu.fsw) << 16;
    area[1] = u32::from(fpu.ftw) | u32::from(fpu.fop) << 16;
    area[MXCSR] = fpu.mxcsr;
    let mut put = |at: usize, bytes: &[u8]| {
        for (target, source) in area[at..].iter_mut().zip(bytes.chunks_exact(4)) {
            *target = word(source);
        }
    };
    put(FIP, &fpu.fip.to_le_bytes());
    put(FDP, &fpu.fdp.to_le_bytes());
    for (i, st) in fpu.st.iter().enumerate() {
        put(ST + 4 * i, st);
    }
    for (i, xmm) in fpu.xmm.iter().enumerate() {
        put(XMM + 4 * i, &xmm.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_registers_survive_the_round_trip() {
        let registers = Registers { general: std::array::from_fn(|i| 0x1111 * i as u64), rip: 77, rflags: 2 };
        assert_eq!(Registers::from(&kvm_regs::from(&registers)), registers);
        let state = FpuState {
            st: std::array::from_fn(|i| (u128::MAX / (i as u128 + 1)).to_le_bytes()),
            xmm: std::array::from_fn(|i| u128::MAX - i as u128),
            fcw: 1,
            fsw: 2,
            ftw: 3,
            fop: 4,
            fip: 5 << 32 | 6,
            fdp: 7 << 32 | 8,
            mxcsr: 9,
        };
        let mut area = [0; 1024];
        put_fpu(&state, &mut area);
        assert_eq!(fpu(&area), state);
    }

    #[test]
    fn test_segment_attributes_survive_the_round_trip() {
        for attributes in [0xa09bu16, 0xc093, 0x008b, 0, 0xf0ff] {
            let before = Segment { selector: 8, base: 5, limit: u32::MAX, attributes };
            assert_eq!(segment(&kvm_segment_of(&before)), before, "{attributes:#x}");
        }
    }
}
