//! The registers of a vCPU in our own structs. The back ends, the software CPU, the GDB server and Python convert
//! from and to these, so that no back end's types leak out of its folder.

mod extended;

pub use extended::{ExtendedState, Extensions};

/// General-purpose registers, instruction pointer and flags.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8…R15: the order of x86 instruction encoding.
    pub general: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
}

/// Index of RAX in [`Registers::general`].
pub const RAX: usize = 0;
/// Index of RCX in [`Registers::general`].
pub const RCX: usize = 1;
/// Index of RDX in [`Registers::general`].
pub const RDX: usize = 2;
/// Index of RBX in [`Registers::general`].
pub const RBX: usize = 3;
/// Index of RSP in [`Registers::general`].
pub const RSP: usize = 4;
/// Index of RBP in [`Registers::general`].
pub const RBP: usize = 5;
/// Index of RSI in [`Registers::general`].
pub const RSI: usize = 6;
/// Index of RDI in [`Registers::general`].
pub const RDI: usize = 7;
/// Index of R8 in [`Registers::general`].
pub const R8: usize = 8;
/// Index of R9 in [`Registers::general`].
pub const R9: usize = 9;
/// Index of R11 in the general registers.
pub const R11: usize = 11;

/// The registers of the System V calling convention that carry the first six integer arguments.
pub const ARGUMENTS: [usize; 6] = [RDI, RSI, RDX, RCX, R8, R9];

impl std::fmt::Display for Registers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, name) in GENERAL_NAMES.iter().enumerate() {
            write!(f, "{name:>3} {:016x}{}", self.general[i], if i % 4 == 3 { "\n" } else { "  " })?;
        }
        write!(f, "rip {:016x}  rflags {:08x}", self.rip, self.rflags)
    }
}

/// Names of [`Registers::general`], by index.
pub const GENERAL_NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// Access rights as in bits 8–15 (type, S, DPL, P) and 20–23 (AVL, L, D/B, G) of a descriptor's upper half, shifted right by 8.
    pub attributes: u16,
}

/// Bits of [`Segment::attributes`].
pub mod segment_attributes {
    /// Type, four bits.
    pub const TYPE: u16 = 0xf;
    /// Code or data segment.
    pub const S: u16 = 1 << 4;
    /// Position of the privilege level.
    pub const DPL_SHIFT: u16 = 5;
    /// Present.
    pub const P: u16 = 1 << 7;
    /// Available to software.
    pub const AVL: u16 = 1 << 12;
    /// 64-bit code.
    pub const L: u16 = 1 << 13;
    /// Default operand size.
    pub const DB: u16 = 1 << 14;
    /// Limit counts in pages.
    pub const G: u16 = 1 << 15;
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Segment, control and model-specific registers that decide how the CPU works.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SystemRegisters {
    /// Code segment.
    pub cs: Segment,
    /// Data segment.
    pub ds: Segment,
    /// Extra segment.
    pub es: Segment,
    /// FS, with its base.
    pub fs: Segment,
    /// GS, with its base.
    pub gs: Segment,
    /// Stack segment.
    pub ss: Segment,
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table.
    pub ldt: Segment,
    /// Global descriptor table.
    pub gdt: DescriptorTable,
    /// Interrupt descriptor table.
    pub idt: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2, the last page fault's address.
    pub cr2: u64,
    /// CR3, the page-table root.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8, the task priority.
    pub cr8: u64,
    /// Extended features.
    pub efer: u64,
    /// Local APIC base and enable bits.
    pub apic_base: u64,
}

/// CR0: protected mode.
pub const CR0_PE: u64 = 1;
/// CR0: task switched; the next FPU or SSE instruction raises #NM.
pub const CR0_TS: u64 = 1 << 3;
/// CR0: supervisor writes obey read-only pages.
pub const CR0_WP: u64 = 1 << 16;
/// CR0: paging.
pub const CR0_PG: u64 = 1 << 31;
/// CR4: physical address extension.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4: FXSAVE and SSE are enabled.
pub const CR4_OSFXSR: u64 = 1 << 9;
/// CR4: five-level paging.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4: XSAVE and XCR0 are enabled.
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// EFER: long mode enabled.
pub const EFER_LME: u64 = 1 << 8;
/// EFER: long mode active.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER: no-execute pages.
pub const EFER_NXE: u64 = 1 << 11;
/// RFLAGS: trap flag.
pub const RFLAGS_TF: u64 = 1 << 8;
/// RFLAGS: interrupts enabled.
pub const RFLAGS_IF: u64 = 1 << 9;
/// RFLAGS: resume flag.
pub const RFLAGS_RF: u64 = 1 << 16;

/// x87 and SSE state, as FXSAVE holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FpuState {
    /// ST0–ST7, 80 bits each in the low ten bytes.
    pub st: [[u8; 16]; 8],
    /// Control word.
    pub fcw: u16,
    /// Status word.
    pub fsw: u16,
    /// Tag word in FXSAVE's abridged form (one bit a register: 1 = in use).
    pub ftw: u8,
    /// Last opcode.
    pub fop: u16,
    /// Last instruction pointer.
    pub fip: u64,
    /// Last data pointer.
    pub fdp: u64,
    /// XMM0–XMM15.
    pub xmm: [u128; 16],
    /// SSE control and status.
    pub mxcsr: u32,
}

impl Default for FpuState {
    /// The state after FNINIT and with all SSE exceptions masked.
    fn default() -> Self {
        Self { st: [[0; 16]; 8], fcw: 0x37f, fsw: 0, ftw: 0, fop: 0, fip: 0, fdp: 0, xmm: [0; 16], mxcsr: 0x1f80 }
    }
}

/// A register that a condition, a script or a debugger names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RegisterId {
    /// One of [`Registers::general`].
    General(u8),
    /// Instruction pointer.
    Rip,
    /// Flags.
    Rflags,
    /// Base of FS.
    FsBase,
    /// Base of GS.
    GsBase,
    /// CR0.
    Cr0,
    /// CR2.
    Cr2,
    /// CR3.
    Cr3,
    /// CR4.
    Cr4,
    /// CR8.
    Cr8,
    /// EFER.
    Efer,
}

impl RegisterId {
    /// All of them with their names; `pc` and `sp` are aliases that [`RegisterId::from_name`] knows besides.
    pub const NAMED: [(&'static str, RegisterId); 26] = {
        let mut all = [("rip", RegisterId::Rip); 26];
        let mut i = 0;
        while i < 16 {
            // The index is below 16.
            #[allow(clippy::cast_possible_truncation)]
            let number = i as u8;
            all[i] = (GENERAL_NAMES[i], RegisterId::General(number));
            i += 1;
        }
        all[17] = ("rflags", RegisterId::Rflags);
        all[18] = ("fs_base", RegisterId::FsBase);
        all[19] = ("gs_base", RegisterId::GsBase);
        all[20] = ("cr0", RegisterId::Cr0);
        all[21] = ("cr2", RegisterId::Cr2);
        all[22] = ("cr3", RegisterId::Cr3);
        all[23] = ("cr4", RegisterId::Cr4);
        all[24] = ("cr8", RegisterId::Cr8);
        all[25] = ("efer", RegisterId::Efer);
        all
    };

    /// The register of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "pc" => Some(Self::Rip),
            "sp" => Some(Self::General(4)),
            _ => Self::NAMED.iter().find(|(known, _)| *known == name).map(|(_, id)| *id),
        }
    }

    /// Its position in [`RegisterId::NAMED`]: the number that condition bytecode uses.
    pub fn index(self) -> u8 {
        let position = Self::NAMED.iter().position(|(_, id)| *id == self).expect("every register is named");
        u8::try_from(position).expect("there are fewer than 256 registers")
    }

    /// The register at that position of [`RegisterId::NAMED`].
    pub fn from_index(index: u8) -> Option<Self> {
        Self::NAMED.get(usize::from(index)).map(|(_, id)| *id)
    }

    /// Whether it lies in [`Registers`] (else in [`SystemRegisters`]).
    pub fn is_general(self) -> bool {
        matches!(self, Self::General(_) | Self::Rip | Self::Rflags)
    }
}

impl Registers {
    /// The value of a general register, `rip` or `rflags`; `None` for a system register.
    pub fn get(&self, id: RegisterId) -> Option<u64> {
        match id {
            RegisterId::General(n) => Some(self.general[usize::from(n)]),
            RegisterId::Rip => Some(self.rip),
            RegisterId::Rflags => Some(self.rflags),
            _ => None,
        }
    }

    /// Sets a general register, `rip` or `rflags`; false for a system register.
    pub fn set(&mut self, id: RegisterId, value: u64) -> bool {
        match id {
            RegisterId::General(n) => self.general[usize::from(n)] = value,
            RegisterId::Rip => self.rip = value,
            RegisterId::Rflags => self.rflags = value,
            _ => return false,
        }
        true
    }
}

impl SystemRegisters {
    /// The value of a system register; `None` for a general one.
    pub fn get(&self, id: RegisterId) -> Option<u64> {
        Some(match id {
            RegisterId::FsBase => self.fs.base,
            RegisterId::GsBase => self.gs.base,
            RegisterId::Cr0 => self.cr0,
            RegisterId::Cr2 => self.cr2,
            RegisterId::Cr3 => self.cr3,
            RegisterId::Cr4 => self.cr4,
            RegisterId::Cr8 => self.cr8,
            RegisterId::Efer => self.efer,
            _ => return None,
        })
    }

    /// Sets a system register; false for a general one.
    pub fn set(&mut self, id: RegisterId, value: u64) -> bool {
        match id {
            RegisterId::FsBase => self.fs.base = value,
            RegisterId::GsBase => self.gs.base = value,
            RegisterId::Cr0 => self.cr0 = value,
            RegisterId::Cr2 => self.cr2 = value,
            RegisterId::Cr3 => self.cr3 = value,
            RegisterId::Cr4 => self.cr4 = value,
            RegisterId::Cr8 => self.cr8 = value,
            RegisterId::Efer => self.efer = value,
            _ => return false,
        }
        true
    }
}
