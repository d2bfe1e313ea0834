//! The registers of a vCPU as GDB numbers and lays them out. One table serves the target description, `g`/`G`, `p`/`P`
//! and the registers that a stop reply carries, so that they can't disagree.

use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::ops::Range;

use gdbstub::arch::{Arch, RegId, Registers as ArchRegisters};

use crate::backend::Vcpu;
use crate::error::Result;
use crate::registers::{ExtendedState, Extensions, FpuState, Registers, Segment, SystemRegisters};

/// GDB's order of the general registers, as indices into [`Registers::general`].
const GENERAL: [usize; 16] = [0, 3, 1, 2, 6, 7, 5, 4, 8, 9, 10, 11, 12, 13, 14, 15];
/// `KERNEL_GS_BASE`, which SWAPGS exchanges with the base of GS.
const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// How many registers a stop reply carries: the general ones, RIP and EFLAGS.
pub const EXPEDITED: u16 = 18;

/// What a register of the table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    General(usize),
    Rip,
    Eflags,
    Segment(SegmentName),
    St(usize),
    Fpu(FpuField),
    Xmm(usize),
    Mxcsr,
    FsBase,
    GsBase,
    KernelGsBase,
    Control(ControlName),
    /// Bits 128 to 255 of the first 16 vector registers.
    YmmHigh(usize),
    /// The lowest quarter of one of the 16 vector registers that AVX-512 adds.
    UpperXmm(usize),
    /// The second quarter of one of these.
    UpperYmmHigh(usize),
    Mask(usize),
    /// Bits 256 to 511 of a vector register.
    ZmmHigh(usize),
    Pkru,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SegmentName {
    Cs,
    Ss,
    Ds,
    Es,
    Fs,
    Gs,
}

/// The x87 registers in GDB's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FpuField {
    Control,
    Status,
    Tag,
    InstructionSegment,
    InstructionOffset,
    OperandSegment,
    OperandOffset,
    Opcode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ControlName {
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Cr8,
    Efer,
}

impl Kind {
    /// The register with that number, if it exists.
    fn of(number: u16) -> Option<Self> {
        use ControlName::{Cr0, Cr2, Cr3, Cr4, Cr8, Efer};
        use FpuField as F;
        use SegmentName::{Cs, Ds, Es, Fs, Gs, Ss};
        const FPU: [FpuField; 8] = [
            F::Control,
            F::Status,
            F::Tag,
            F::InstructionSegment,
            F::InstructionOffset,
            F::OperandSegment,
            F::OperandOffset,
            F::Opcode,
        ];
        let n = usize::from(number);
        Some(match n {
            0..16 => Self::General(GENERAL[n]),
            16 => Self::Rip,
            17 => Self::Eflags,
            18..24 => Self::Segment([Cs, Ss, Ds, Es, Fs, Gs][n - 18]),
            24..32 => Self::St(n - 24),
            32..40 => Self::Fpu(FPU[n - 32]),
            40..56 => Self::Xmm(n - 40),
            56 => Self::Mxcsr,
            57 => Self::FsBase,
            58 => Self::GsBase,
            59 => Self::KernelGsBase,
            60..66 => Self::Control([Cr0, Cr2, Cr3, Cr4, Cr8, Efer][n - 60]),
            66..82 => Self::YmmHigh(n - 66),
            82..98 => Self::UpperXmm(n - 82),
            98..114 => Self::UpperYmmHigh(n - 98),
            114..122 => Self::Mask(n - 114),
            122..154 => Self::ZmmHigh(n - 122),
            154 => Self::Pkru,
            _ => return None,
        })
    }

    fn size(self) -> usize {
        match self {
            Self::Eflags | Self::Segment(_) | Self::Fpu(_) | Self::Mxcsr | Self::Pkru => 4,
            Self::St(_) => 10,
            Self::Xmm(_) | Self::YmmHigh(_) | Self::UpperXmm(_) | Self::UpperYmmHigh(_) => 16,
            Self::ZmmHigh(_) => 32,
            _ => 8,
        }
    }

    fn name(self) -> String {
        match self {
            Self::General(i) => crate::registers::GENERAL_NAMES[i].to_owned(),
            Self::Rip => "rip".into(),
            Self::Eflags => "eflags".into(),
            Self::Segment(name) => format!("{name:?}").to_lowercase(),
            Self::St(i) => format!("st{i}"),
            Self::Fpu(field) => match field {
                FpuField::Control => "fctrl",
                FpuField::Status => "fstat",
                FpuField::Tag => "ftag",
                FpuField::InstructionSegment => "fiseg",
                FpuField::InstructionOffset => "fioff",
                FpuField::OperandSegment => "foseg",
                FpuField::OperandOffset => "fooff",
                FpuField::Opcode => "fop",
            }
            .into(),
            Self::Xmm(i) => format!("xmm{i}"),
            Self::Mxcsr => "mxcsr".into(),
            Self::FsBase => "fs_base".into(),
            Self::GsBase => "gs_base".into(),
            Self::KernelGsBase => "k_gs_base".into(),
            Self::Control(name) => format!("{name:?}").to_lowercase(),
            Self::YmmHigh(i) => format!("ymm{i}h"),
            Self::UpperXmm(i) => format!("xmm{}", i + 16),
            Self::UpperYmmHigh(i) => format!("ymm{}h", i + 16),
            Self::Mask(i) => format!("k{i}"),
            Self::ZmmHigh(i) => format!("zmm{i}h"),
            Self::Pkru => "pkru".into(),
        }
    }

    fn gdb_type(self) -> &'static str {
        match self {
            Self::General(4 | 5) => "data_ptr",
            Self::Rip => "code_ptr",
            Self::Eflags => "i386_eflags",
            Self::St(_) => "i387_ext",
            Self::Xmm(_) | Self::UpperXmm(_) => "vec128",
            Self::Mxcsr => "i386_mxcsr",
            Self::YmmHigh(_) | Self::UpperYmmHigh(_) => "uint128",
            Self::Mask(_) => "uint64",
            Self::ZmmHigh(_) => "v2ui128",
            Self::General(_) | Self::FsBase | Self::GsBase | Self::KernelGsBase | Self::Control(_) => "int64",
            Self::Segment(_) | Self::Fpu(_) | Self::Pkru => "int",
        }
    }
}

/// One more than the highest number.
const END: u16 = 155;

/// A feature of the description: registers that are there together.
struct Feature {
    name: &'static str,
    /// Types that its registers have: GDB looks for them in the same feature only.
    types: &'static [&'static str],
    numbers: Range<u16>,
    is_had: fn(Extensions) -> bool,
}

/// GDB's own features, and one of ours for what it has no name for.
const FEATURES: [Feature; 7] = [
    Feature { name: "org.gnu.gdb.i386.core", types: &[CORE_TYPES], numbers: 0..40, is_had: |_| true },
    Feature { name: "org.gnu.gdb.i386.sse", types: &[VECTOR_TYPE, MXCSR_TYPE], numbers: 40..57, is_had: |_| true },
    Feature { name: "org.gnu.gdb.i386.segments", types: &[], numbers: 57..59, is_had: |_| true },
    Feature { name: "org.hermit-os.uhyve.system", types: &[], numbers: 59..66, is_had: |_| true },
    Feature { name: "org.gnu.gdb.i386.avx", types: &[], numbers: 66..82, is_had: |has| has.avx },
    Feature {
        name: "org.gnu.gdb.i386.avx512",
        types: &[VECTOR_TYPE, AVX512_TYPE],
        numbers: 82..154,
        is_had: |has| has.avx512,
    },
    Feature { name: "org.gnu.gdb.i386.pkeys", types: &[], numbers: 154..END, is_had: |has| has.pkru },
];

/// The numbers of the registers that a vCPU has, in the order of `g`.
fn numbers(has: Extensions) -> impl Iterator<Item = u16> {
    FEATURES.into_iter().filter(move |feature| (feature.is_had)(has)).flat_map(|feature| feature.numbers)
}

/// A register's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Number(pub u16);

impl RegId for Number {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let number = u16::try_from(id).ok()?;
        let kind = Kind::of(number)?;
        Some((Self(number), NonZeroUsize::new(kind.size())))
    }

    fn to_raw_id(&self) -> Option<usize> {
        Some(self.0.into())
    }
}

/// The general register (by its index in [`Registers::general`]), RIP (16) or EFLAGS (17) with that number of GDB's.
pub fn core_register(number: u16) -> Option<crate::registers::RegisterId> {
    use crate::registers::RegisterId as Id;
    Some(match Kind::of(number)? {
        Kind::General(i) => Id::General(u8::try_from(i).expect("below 16")),
        Kind::Rip => Id::Rip,
        Kind::Eflags => Id::Rflags,
        Kind::FsBase => Id::FsBase,
        Kind::GsBase => Id::GsBase,
        Kind::Control(ControlName::Cr0) => Id::Cr0,
        Kind::Control(ControlName::Cr2) => Id::Cr2,
        Kind::Control(ControlName::Cr3) => Id::Cr3,
        Kind::Control(ControlName::Cr4) => Id::Cr4,
        Kind::Control(ControlName::Cr8) => Id::Cr8,
        Kind::Control(ControlName::Efer) => Id::Efer,
        _ => return None,
    })
}

/// All registers of a vCPU that GDB sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VcpuState {
    /// General registers.
    pub registers: Registers,
    /// Segment and control registers.
    pub system: SystemRegisters,
    fpu: FpuState,
    kernel_gs_base: u64,
    ymm_high: [u128; 16],
    extended: ExtendedState,
}

impl VcpuState {
    /// Reads a vCPU that stands still, as far as it has the registers.
    pub fn read(cpu: &mut dyn Vcpu, has: Extensions) -> Result<Self> {
        Ok(Self {
            registers: cpu.registers()?,
            system: cpu.system_registers()?,
            fpu: cpu.fpu()?,
            kernel_gs_base: cpu.msr(KERNEL_GS_BASE).unwrap_or(0),
            ymm_high: if has.avx { cpu.ymm_high()? } else { [0; 16] },
            extended: if has.avx512 || has.pkru { cpu.extended()? } else { ExtendedState::default() },
        })
    }

    /// Writes what differs from `before` to the vCPU, and nothing else.
    pub fn write(&self, before: &Self, cpu: &mut dyn Vcpu) -> Result<()> {
        if self.system != before.system {
            cpu.set_system_registers(&self.system)?;
        }
        if self.registers != before.registers {
            cpu.set_registers(&self.registers)?;
        }
        if self.fpu != before.fpu {
            cpu.set_fpu(&self.fpu)?;
        }
        if self.ymm_high != before.ymm_high {
            cpu.set_ymm_high(&self.ymm_high)?;
        }
        if self.extended != before.extended {
            cpu.set_extended(&self.extended)?;
        }
        if self.kernel_gs_base != before.kernel_gs_base {
            cpu.set_msr(KERNEL_GS_BASE, self.kernel_gs_base)?;
        }
        Ok(())
    }

    /// The bytes of a register in GDB's layout; none for a number that does not exist.
    pub fn get(&self, number: u16) -> Vec<u8> {
        let Some(kind) = Kind::of(number) else { return Vec::new() };
        let wide = |value: u64| value.to_le_bytes().to_vec();
        let narrow = |value: u32| value.to_le_bytes().to_vec();
        match kind {
            Kind::General(i) => wide(self.registers.general[i]),
            Kind::Rip => wide(self.registers.rip),
            Kind::Eflags => narrow(low(self.registers.rflags)),
            Kind::Segment(name) => narrow(self.segment(name).selector.into()),
            Kind::St(i) => self.fpu.st[i][..10].to_vec(),
            Kind::Fpu(field) => narrow(self.fpu_field(field)),
            Kind::Xmm(i) => self.fpu.xmm[i].to_le_bytes().to_vec(),
            Kind::Mxcsr => narrow(self.fpu.mxcsr),
            Kind::FsBase => wide(self.system.fs.base),
            Kind::GsBase => wide(self.system.gs.base),
            Kind::KernelGsBase => wide(self.kernel_gs_base),
            Kind::Control(name) => wide(self.control(name)),
            Kind::YmmHigh(i) => self.ymm_high[i].to_le_bytes().to_vec(),
            Kind::UpperXmm(i) => self.extended.zmm_upper[i][0].to_le_bytes().to_vec(),
            Kind::UpperYmmHigh(i) => self.extended.zmm_upper[i][1].to_le_bytes().to_vec(),
            Kind::Mask(i) => wide(self.extended.masks[i]),
            Kind::ZmmHigh(i) => self.zmm_high(i).map(u128::to_le_bytes).concat(),
            Kind::Pkru => narrow(self.extended.pkru),
        }
    }

    /// Sets a register from bytes in GDB's layout. False if there are too few or there is no such register.
    pub fn set(&mut self, number: u16, bytes: &[u8]) -> bool {
        let Some(kind) = Kind::of(number) else { return false };
        if bytes.len() < kind.size() || self.get(number) == bytes[..kind.size()] {
            return bytes.len() >= kind.size();
        }
        let mut padded = [0u8; 32];
        padded[..kind.size()].copy_from_slice(&bytes[..kind.size()]);
        let [low, high] = [0, 16].map(|at| u128::from_le_bytes(padded[at..at + 16].try_into().expect("sixteen")));
        let [a, b, c, d, e, f, g, h, ..] = padded;
        let wide = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let narrow = u32::from_le_bytes([a, b, c, d]);
        match kind {
            Kind::General(i) => self.registers.general[i] = wide,
            Kind::Rip => self.registers.rip = wide,
            Kind::Eflags => self.registers.rflags = (self.registers.rflags & !0xffff_ffff) | wide | 2,
            Kind::Segment(name) => self.segment_mut(name).selector = u16::from_le_bytes([a, b]),
            Kind::St(i) => self.fpu.st[i][..10].copy_from_slice(&padded[..10]),
            Kind::Fpu(field) => self.set_fpu_field(field, narrow),
            Kind::Xmm(i) => self.fpu.xmm[i] = low,
            Kind::Mxcsr => self.fpu.mxcsr = narrow,
            Kind::FsBase => self.system.fs.base = wide,
            Kind::GsBase => self.system.gs.base = wide,
            Kind::KernelGsBase => self.kernel_gs_base = wide,
            Kind::Control(name) => *self.control_mut(name) = wide,
            Kind::YmmHigh(i) => self.ymm_high[i] = low,
            Kind::UpperXmm(i) => self.extended.zmm_upper[i][0] = low,
            Kind::UpperYmmHigh(i) => self.extended.zmm_upper[i][1] = low,
            Kind::Mask(i) => self.extended.masks[i] = wide,
            Kind::ZmmHigh(i) if i < 16 => self.extended.zmm_high[i] = [low, high],
            Kind::ZmmHigh(i) => self.extended.zmm_upper[i - 16][2..].copy_from_slice(&[low, high]),
            Kind::Pkru => self.extended.pkru = narrow,
        }
        true
    }

    fn zmm_high(&self, register: usize) -> [u128; 2] {
        let ExtendedState { zmm_high, zmm_upper, .. } = &self.extended;
        if register < 16 { zmm_high[register] } else { [zmm_upper[register - 16][2], zmm_upper[register - 16][3]] }
    }

    fn segment(&self, name: SegmentName) -> &Segment {
        match name {
            SegmentName::Cs => &self.system.cs,
            SegmentName::Ss => &self.system.ss,
            SegmentName::Ds => &self.system.ds,
            SegmentName::Es => &self.system.es,
            SegmentName::Fs => &self.system.fs,
            SegmentName::Gs => &self.system.gs,
        }
    }

    fn segment_mut(&mut self, name: SegmentName) -> &mut Segment {
        match name {
            SegmentName::Cs => &mut self.system.cs,
            SegmentName::Ss => &mut self.system.ss,
            SegmentName::Ds => &mut self.system.ds,
            SegmentName::Es => &mut self.system.es,
            SegmentName::Fs => &mut self.system.fs,
            SegmentName::Gs => &mut self.system.gs,
        }
    }

    fn control(&self, name: ControlName) -> u64 {
        match name {
            ControlName::Cr0 => self.system.cr0,
            ControlName::Cr2 => self.system.cr2,
            ControlName::Cr3 => self.system.cr3,
            ControlName::Cr4 => self.system.cr4,
            ControlName::Cr8 => self.system.cr8,
            ControlName::Efer => self.system.efer,
        }
    }

    fn control_mut(&mut self, name: ControlName) -> &mut u64 {
        match name {
            ControlName::Cr0 => &mut self.system.cr0,
            ControlName::Cr2 => &mut self.system.cr2,
            ControlName::Cr3 => &mut self.system.cr3,
            ControlName::Cr4 => &mut self.system.cr4,
            ControlName::Cr8 => &mut self.system.cr8,
            ControlName::Efer => &mut self.system.efer,
        }
    }

    /// FXSAVE64 keeps 64-bit pointers; GDB shows their halves as offset and segment.
    fn fpu_field(&self, field: FpuField) -> u32 {
        let fpu = &self.fpu;
        match field {
            FpuField::Control => fpu.fcw.into(),
            FpuField::Status => fpu.fsw.into(),
            FpuField::Tag => full_tag(fpu).into(),
            FpuField::InstructionSegment => low(fpu.fip >> 32) & 0xffff,
            FpuField::InstructionOffset => low(fpu.fip),
            FpuField::OperandSegment => low(fpu.fdp >> 32) & 0xffff,
            FpuField::OperandOffset => low(fpu.fdp),
            FpuField::Opcode => u32::from(fpu.fop & 0x7ff),
        }
    }

    fn set_fpu_field(&mut self, field: FpuField, value: u32) {
        let fpu = &mut self.fpu;
        let [a, b, ..] = value.to_le_bytes();
        let half = u16::from_le_bytes([a, b]);
        let with_segment = |pointer: u64| (pointer & 0xffff_ffff) | u64::from(half) << 32;
        let with_offset = |pointer: u64| (pointer & !0xffff_ffff) | u64::from(value);
        match field {
            FpuField::Control => fpu.fcw = half,
            FpuField::Status => fpu.fsw = half,
            FpuField::Tag => fpu.ftw = abridged_tag(half),
            FpuField::InstructionSegment => fpu.fip = with_segment(fpu.fip),
            FpuField::InstructionOffset => fpu.fip = with_offset(fpu.fip),
            FpuField::OperandSegment => fpu.fdp = with_segment(fpu.fdp),
            FpuField::OperandOffset => fpu.fdp = with_offset(fpu.fdp),
            FpuField::Opcode => fpu.fop = half & 0x7ff,
        }
    }
}

fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).expect("masked")
}

/// The tag word of FSAVE, two bits a physical register (Intel SDM 1, 8.1.7), from FXSAVE's one bit and the contents.
fn full_tag(fpu: &FpuState) -> u16 {
    let top = usize::from(fpu.fsw >> 11 & 7);
    let mut word = 0;
    for physical in 0..8 {
        let tag = if fpu.ftw & 1 << physical == 0 { 3 } else { tag_of(&fpu.st[(physical + 8 - top) % 8]) };
        word |= tag << (2 * physical);
    }
    word
}

/// 0 valid, 1 zero, 2 special.
fn tag_of(value: &[u8; 16]) -> u16 {
    let mantissa = u64::from_le_bytes(value[..8].try_into().expect("eight"));
    let exponent = u16::from_le_bytes([value[8], value[9]]) & 0x7fff;
    match (exponent, mantissa) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        (_, mantissa) if mantissa >> 63 == 0 => 2,
        _ => 0,
    }
}

fn abridged_tag(word: u16) -> u8 {
    (0..8).filter(|i| word >> (2 * i) & 3 != 3).fold(0, |bits, i| bits | 1 << i)
}

/// Bytes of the general registers, RIP, EFLAGS and the selectors: fewer are no register file.
const CORE_SIZE: usize = 164;

/// The registers of `g` and `G`: the bytes of all of the description, in its order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegisterFile {
    bytes: Vec<u8>,
}

impl RegisterFile {
    /// The file for a state.
    pub fn new(state: &VcpuState, has: Extensions) -> Self {
        Self { bytes: numbers(has).flat_map(|number| state.get(number)).collect() }
    }

    /// Sets each register whose bytes are there. False if not even the core registers are.
    pub fn apply(&self, state: &mut VcpuState, has: Extensions) -> bool {
        if self.bytes.len() < CORE_SIZE {
            return false;
        }
        let mut rest = self.bytes.as_slice();
        for number in numbers(has) {
            let size = Kind::of(number).map_or(0, Kind::size);
            if !state.set(number, rest) {
                break;
            }
            rest = &rest[size..];
        }
        true
    }
}

impl ArchRegisters for RegisterFile {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.bytes.get(128..136).map_or(0, |b| u64::from_le_bytes(b.try_into().expect("eight")))
    }

    fn gdb_serialize(&self, write_byte: impl FnMut(Option<u8>)) {
        self.bytes.iter().copied().map(Some).for_each(write_byte);
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> std::result::Result<(), ()> {
        // An error here would end the session: `apply` refuses what is too short.
        self.bytes = bytes.to_vec();
        Ok(())
    }
}

/// x86-64 with our register numbers.
pub enum Amd64 {}

impl Arch for Amd64 {
    type Usize = u64;
    type Registers = RegisterFile;
    type RegId = Number;
    type BreakpointKind = usize;
}

/// Types that GDB's standard features refer to (`gdb/features/i386` of GDB's sources defines the names).
const CORE_TYPES: &str = r#"<flags id="i386_eflags" size="4">
<field name="" start="22" end="31"/><field name="CF" start="0" end="0"/><field name="" start="1" end="1"/><field name="PF" start="2" end="2"/>
<field name="AF" start="4" end="4"/><field name="ZF" start="6" end="6"/><field name="SF" start="7" end="7"/><field name="TF" start="8" end="8"/>
<field name="IF" start="9" end="9"/><field name="DF" start="10" end="10"/><field name="OF" start="11" end="11"/><field name="NT" start="14" end="14"/>
<field name="RF" start="16" end="16"/><field name="VM" start="17" end="17"/><field name="AC" start="18" end="18"/><field name="VIF" start="19" end="19"/>
<field name="VIP" start="20" end="20"/><field name="ID" start="21" end="21"/></flags>"#;
const VECTOR_TYPE: &str = r#"<vector id="v8bf16" type="bfloat16" count="8"/><vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/>
<vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/><vector id="v4i32" type="int32" count="4"/>
<vector id="v2i64" type="int64" count="2"/><union id="vec128"><field name="v8_bfloat16" type="v8bf16"/><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/>
<field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/><field name="v4_int32" type="v4i32"/>
<field name="v2_int64" type="v2i64"/><field name="uint128" type="uint128"/></union>"#;
const MXCSR_TYPE: &str = r#"<flags id="i386_mxcsr" size="4">
<field name="IE" start="0" end="0"/><field name="DE" start="1" end="1"/><field name="ZE" start="2" end="2"/><field name="OE" start="3" end="3"/>
<field name="UE" start="4" end="4"/><field name="PE" start="5" end="5"/><field name="DAZ" start="6" end="6"/><field name="IM" start="7" end="7"/>
<field name="DM" start="8" end="8"/><field name="ZM" start="9" end="9"/><field name="OM" start="10" end="10"/><field name="UM" start="11" end="11"/>
<field name="PM" start="12" end="12"/><field name="FZ" start="15" end="15"/></flags>"#;

const AVX512_TYPE: &str = r#"<vector id="v2ui128" type="uint128" count="2"/>"#;

/// `target.xml`: the features that a vCPU has.
pub fn target_description(has: Extensions) -> String {
    let mut text = String::from(
        "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\">\n<target version=\"1.0\"><architecture>i386:x86-64</architecture>\n",
    );
    for feature in FEATURES.into_iter().filter(|feature| (feature.is_had)(has)) {
        let _ = writeln!(text, "<feature name=\"{}\">{}", feature.name, feature.types.concat());
        let first = feature.numbers.start;
        for (number, kind) in feature.numbers.filter_map(|number| Some((number, Kind::of(number)?))) {
            let group = match kind {
                Kind::St(_) | Kind::Fpu(_) => " group=\"float\"",
                Kind::Control(_) | Kind::KernelGsBase | Kind::Pkru => " group=\"system\"",
                _ => "",
            };
            let (name, bits, of) = (kind.name(), kind.size() * 8, kind.gdb_type());
            let _ = write!(text, "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{of}\"{group}");
            // The numbers of those that follow count up from it.
            if number == first {
                let _ = write!(text, " regnum=\"{number}\"");
            }
            text.push_str("/>\n");
        }
        text.push_str("</feature>\n");
    }
    text.push_str("</target>\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Extensions = Extensions { avx: true, avx512: true, pkru: true };

    #[test]
    fn test_register_file_of_a_state_applied_to_another_gives_the_same_state() {
        let mut state = VcpuState::default();
        for number in 0..END {
            let size = Kind::of(number).unwrap().size();
            let value: Vec<u8> = (0..size).map(|i| u8::try_from(number).unwrap() ^ u8::try_from(i).unwrap()).collect();
            assert!(state.set(number, &value));
        }
        let file = RegisterFile::new(&state, ALL);
        let mut other = VcpuState::default();
        assert!(file.apply(&mut other, ALL));
        assert_eq!(RegisterFile::new(&other, ALL), file);
        assert_eq!(other, state);
        assert_eq!(file.pc(), state.registers.rip);
    }

    #[test]
    fn test_write_of_one_register_leaves_all_others() {
        let before = VcpuState::default();
        let mut after = before;
        assert!(after.set(3, &7u64.to_le_bytes()));
        assert_eq!(after.registers.general[crate::registers::RDX], 7);
        after.registers.general[crate::registers::RDX] = 0;
        assert_eq!(after, before);
    }

    #[test]
    fn test_tag_word_of_empty_zero_and_special_registers_is_fsave_s() {
        let mut fpu = FpuState { ftw: 0b0000_0111, ..FpuState::default() };
        fpu.st[1][..10].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
        fpu.st[2][..10].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x7f]);
        assert_eq!(full_tag(&fpu), 0b11_11_11_11_11_10_00_01);
        assert_eq!(abridged_tag(full_tag(&fpu)), fpu.ftw);
    }

    #[test]
    fn test_short_and_unknown_registers_are_refused() {
        let mut state = VcpuState::default();
        assert!(!state.set(0, &[1, 2, 3]));
        assert!(!state.set(END, &[0; 16]));
        let mut file = RegisterFile::default();
        file.gdb_deserialize(&[0; 100]).unwrap();
        assert!(!file.apply(&mut state, Extensions::default()));
        assert!(state.get(999).is_empty());
    }

    #[test]
    fn test_description_names_each_register_once_and_extensions_only_where_they_are() {
        let text = target_description(ALL);
        for number in 0..END {
            let name = Kind::of(number).unwrap().name();
            assert_eq!(text.matches(&format!("<reg name=\"{name}\"")).count(), 1, "{name}");
        }
        assert!(Kind::of(END).is_none());
        for feature in text.split("<feature").filter(|feature| feature.contains("vec128")) {
            assert!(feature.contains("<union id=\"vec128\""), "{feature}");
        }
        let plain = target_description(Extensions::default());
        for name in ["ymm0h", "xmm16", "k0", "zmm0h", "pkru"] {
            assert!(!plain.contains(&format!("\"{name}\"")), "{name}");
        }
        let keys = Extensions { pkru: true, ..Default::default() };
        assert!(
            target_description(keys)
                .contains("name=\"pkru\" bitsize=\"32\" type=\"int\" group=\"system\" regnum=\"154\"")
        );
        let (with, without) =
            [keys, Extensions::default()].map(|has| RegisterFile::new(&VcpuState::default(), has)).into();
        assert_eq!(with.bytes.len(), without.bytes.len() + 4);
    }

    #[test]
    fn test_parts_of_a_vector_register_of_avx512_lie_in_the_state_that_xsave_has() {
        let mut state = VcpuState::default();
        let parts = [(40u16, 1u8, 16), (66, 2, 16), (122, 3, 32), (82, 5, 16), (98, 6, 16), (138, 7, 32), (115, 9, 8)];
        for (number, value, size) in parts {
            let mut bytes = vec![0; size];
            (bytes[0], bytes[size - 1]) = (value, value);
            assert!(state.set(number, &bytes));
            assert_eq!(state.get(number), bytes);
        }
        let ExtendedState { masks, zmm_high, zmm_upper, .. } = &state.extended;
        let ends = |value: u128| value << 120 | value;
        assert_eq!((state.fpu.xmm[0], state.ymm_high[0], zmm_high[0]), (ends(1), ends(2), [3, 3 << 120]));
        assert_eq!(zmm_upper[0], [ends(5), ends(6), 7, 7 << 120]);
        assert_eq!(masks[1], 9 << 56 | 9);
    }
}
