//! Writes everything into guest memory that the kernel expects to find, and says with which registers it starts.

use super::boot_info;
use super::fdt;
use super::image::Image;
use super::layout::Layout;
use crate::error::{Error, ImageError, Result};
use crate::memory::GuestMemory;
use crate::paging;
use crate::registers::{
    CR0_PE, CR0_PG, CR4_PAE, DescriptorTable, EFER_LMA, EFER_LME, EFER_NXE, RDI, RSI, RSP, Registers, Segment,
    SystemRegisters,
};

/// Null, 64-bit code, data.
const GDT: [u64; 3] = [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];
/// CR0: the coprocessor is a 387.
const CR0_ET: u64 = 1 << 4;
/// CR0: x87 errors raise #MF.
const CR0_NE: u64 = 1 << 5;
/// RFLAGS: the bit that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;
/// The local APIC's usual address, enabled.
const APIC_BASE: u64 = 0xfee0_0000 | 1 << 11;
/// IA32_APIC_BASE: this is the processor that boots.
const APIC_BASE_BOOT: u64 = 1 << 8;

/// What the guest is told of its machine and its input.
#[derive(Debug, Clone, Copy)]
pub struct BootParameters<'a> {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Frequency of the time stamp counter in kHz; 0 if unknown.
    pub tsc_khz: u32,
    /// Time of the boot in nanoseconds since 1970.
    pub boot_time_ns: i128,
    /// Arguments of the kernel.
    pub kernel_args: &'a [String],
    /// Arguments of the application.
    pub app_args: &'a [String],
    /// Environment variables, name and value.
    pub environment: &'a [(String, String)],
    /// Guest directories that the host serves.
    pub mounts: &'a [String],
    /// Whether there is a PCI bus to probe.
    pub has_pci: bool,
}

/// The registers of a vCPU before its first instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootState {
    /// General-purpose registers.
    pub registers: Registers,
    /// System registers.
    pub system: SystemRegisters,
}

impl BootState {
    /// The state of vCPU `number`. All start at the same place; the others wait in the kernel for their turn.
    pub fn for_vcpu(&self, number: u32) -> Self {
        let mut state = *self;
        state.registers.general[RSI] = u64::from(number);
        if number != 0 {
            state.system.apic_base &= !APIC_BASE_BOOT;
        }
        state
    }
}

/// Writes kernel and boot data into `memory`, which must be as `layout` says, and fresh: what an image wants zeroed is
/// not touched. Returns the state of vCPU 0.
///
/// # Errors
/// [`Error::Config`] if a parameter can't be passed on or the memory is not that of the layout.
pub fn load(
    image: &Image,
    layout: &Layout,
    memory: &GuestMemory,
    parameters: &BootParameters<'_>,
) -> Result<BootState> {
    let planned = layout.guest_address..layout.guest_address + layout.memory_size;
    if memory.range() != planned {
        return Err(Error::Config(format!("guest RAM is {:#x?}, the layout is for {planned:#x?}", memory.range())));
    }
    load_kernel(image, layout, memory)?;
    let tree = fdt::build(planned, parameters)?;
    if tree.len() as u64 > layout.device_tree.end - layout.device_tree.start {
        let what =
            format!("the device tree has {} bytes, the layout has room for {:#x?}", tree.len(), layout.device_tree);
        return Err(Error::Image { image: image.name().to_owned(), source: ImageError::DoesNotFit { what } });
    }
    memory.write(layout.device_tree.start, &tree)?;
    memory.write(layout.boot_info, &boot_info::encode(image, layout, parameters)?)?;
    memory.write(layout.gdt, &GDT.map(u64::to_le_bytes).concat())?;
    paging::write_boot_tables(memory, layout.page_table_root, layout.page_tables.clone(), layout.mapped.clone())?;
    Ok(boot_state(image, layout))
}

fn load_kernel(image: &Image, layout: &Layout, memory: &GuestMemory) -> Result<()> {
    let bias = layout.load_bias();
    for segment in &image.elf.segments {
        let contents = super::elf::bytes_at(image.kernel(), "a segment", segment.file_start, segment.file_size)
            .map_err(|source| Error::Image { image: image.name().to_owned(), source })?;
        memory.write(segment.addresses.start.wrapping_add(bias), contents)?;
    }
    for relocation in &image.elf.relocations {
        let value = relocation.value.wrapping_add(if relocation.is_biased { bias } else { 0 });
        memory.write_object(relocation.address.wrapping_add(bias), value)?;
    }
    Ok(())
}

fn boot_state(image: &Image, layout: &Layout) -> BootState {
    let mut registers = Registers {
        rip: image.entry().wrapping_add(layout.load_bias()),
        rflags: RFLAGS_RESERVED,
        ..Registers::default()
    };
    registers.general[RDI] = layout.boot_info;
    registers.general[RSP] = layout.stack;
    let data = Segment { selector: 0x10, ..flat_segment(GDT[2]) };
    // Segments that nothing has loaded are as after a reset (SDM volume 3, table 11-1).
    let after_reset = |attributes| Segment { selector: 0, base: 0, limit: 0xffff, attributes };
    let system = SystemRegisters {
        cs: Segment { selector: 8, ..flat_segment(GDT[1]) },
        ds: data,
        es: data,
        ss: data,
        fs: after_reset(0x93),
        gs: after_reset(0x93),
        // 64-bit mode needs a busy 64-bit TSS (type 11).
        tr: after_reset(0x8b),
        ldt: after_reset(0x82),
        gdt: DescriptorTable { base: layout.gdt, limit: 3 * 8 - 1 },
        // The kernel sets up its own before it may fault.
        idt: DescriptorTable { base: 0, limit: 0 },
        cr0: CR0_PE | CR0_ET | CR0_NE | CR0_PG,
        cr2: 0,
        cr3: layout.page_table_root,
        cr4: CR4_PAE,
        cr8: 0,
        efer: EFER_LME | EFER_LMA | EFER_NXE,
        apic_base: APIC_BASE | APIC_BASE_BOOT,
    };
    BootState { registers, system }
}

/// The hidden part of a segment register for a descriptor with base 0 and the largest limit.
fn flat_segment(descriptor: u64) -> Segment {
    let attributes = u16::try_from(descriptor >> 40 & 0xf0ff).expect("sixteen bits are left");
    Segment { selector: 0, base: 0, limit: u32::MAX, attributes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::{ElfBuilder, PLAIN, Program, dynamic, image, rela};
    use crate::memory::Backing;
    use crate::paging::{PagingMode, translate};

    fn loaded(image: &Image, parameters: &BootParameters<'_>) -> (Layout, GuestMemory, BootState) {
        let size = super::super::device_tree_size(parameters).unwrap();
        let layout = Layout::plan(image, 64 << 20, size, false, &mut || 0).unwrap();
        let memory = GuestMemory::new(layout.guest_address, layout.memory_size, Backing::default()).unwrap();
        let state = load(image, &layout, &memory, parameters).unwrap();
        (layout, memory, state)
    }

    #[test]
    fn test_load_writes_segments_and_relocations() {
        let table = [rela(0x1000, 8, 0, 0x20), rela(0x1071, 8, 0, -1)].concat();
        let builder = ElfBuilder::hermit().program(Program::load(0x9000, table)).program(Program::new(
            object::elf::PT_DYNAMIC,
            0,
            dynamic(&[(7, 0x9000), (8, 48), (9, 24)]),
        ));
        let (layout, memory, _) = loaded(&image(&builder), &PLAIN);
        let mut code = [0; 0x101];
        memory.read(layout.kernel_start, &mut code).unwrap();
        assert!(code[..0x100] == [0x90; 0x100] && code[0x100] == 0);
        let word = |offset| memory.read_object::<u64>(layout.kernel_start + offset).unwrap();
        assert_eq!((word(0x1000), word(0x1071), word(0x1008)), (0x4_0020, 0x3_ffff, 0xdddd_dddd_dddd_dddd));
        assert_eq!(word(0x1080), 0);
    }

    #[test]
    fn test_load_gives_the_state_that_hermit_starts_with() {
        let (layout, memory, state) = loaded(&image(&ElfBuilder::hermit().interface(3)), &PLAIN);
        let (registers, system) = (state.registers, state.system);
        let expected = (layout.kernel_start + 0x10, 2, layout.boot_info, layout.kernel_start - 0x8000);
        assert_eq!((registers.rip, registers.rflags, registers.general[RDI], registers.general[RSP]), expected);
        assert_eq!(
            (system.cr0, system.cr4, system.efer, system.cr3),
            (0x8000_0031, 0x20, 0xd00, layout.page_table_root)
        );
        assert_eq!(system.cs, Segment { selector: 8, base: 0, limit: u32::MAX, attributes: 0xa09b });
        assert_eq!(system.ss, Segment { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xc093 });
        assert_eq!(memory.read_object::<u64>(layout.gdt + 8).unwrap(), 0x00AF_9B00_0000_FFFF);
        let mut magic = [0; 4];
        memory.read(layout.device_tree.start, &mut magic).unwrap();
        assert_eq!(magic, [0xd0, 0x0d, 0xfe, 0xed]);
        for address in [layout.gdt, layout.device_tree.start, layout.stack, registers.rip, layout.kernel_end - 1] {
            let found = translate(&memory, &PagingMode::from(&system), address).unwrap();
            assert!(found.physical == address && found.writable && found.executable && !found.user);
        }
    }

    #[test]
    fn test_boot_state_of_other_vcpus_differs_in_its_number() {
        let (_, _, state) = loaded(&image(&ElfBuilder::hermit()), &PLAIN);
        assert_eq!(state.for_vcpu(0), state);
        let third = state.for_vcpu(3);
        assert_eq!((third.registers.general[RSI], third.system.apic_base), (3, 0xfee0_0800));
        assert_eq!((third.registers.rip, third.system.cr3), (state.registers.rip, state.system.cr3));
    }

    #[test]
    fn test_load_of_a_big_environment_has_its_device_tree_mapped_below_the_kernel() {
        let environment: Vec<_> = (0..20_000).map(|i| (format!("NAME{i}"), "a value".repeat(10))).collect();
        let parameters = BootParameters { environment: &environment, ..PLAIN };
        let (layout, memory, state) = loaded(&image(&ElfBuilder::hermit().abi_tag()), &parameters);
        assert!(layout.device_tree.end <= layout.stack && layout.kernel_start > 1 << 20);
        let last = memory.read_object::<u32>(layout.device_tree.start + 4).unwrap().swap_bytes();
        assert!(
            translate(&memory, &PagingMode::from(&state.system), layout.device_tree.start + u64::from(last) - 1)
                .is_ok()
        );
    }

    #[test]
    fn test_load_into_other_memory_than_planned_is_refused() {
        let image = image(&ElfBuilder::hermit());
        let layout = Layout::plan(&image, 64 << 20, 0x1000, false, &mut || 0).unwrap();
        let memory = GuestMemory::new(0, 32 << 20, Backing::default()).unwrap();
        assert!(matches!(load(&image, &layout, &memory, &PLAIN).unwrap_err(), Error::Config(_)));
        let environment = vec![("A".to_owned(), "x".repeat(0x4000))];
        let memory = GuestMemory::new(0, 64 << 20, Backing::default()).unwrap();
        let error = load(&image, &layout, &memory, &BootParameters { environment: &environment, ..PLAIN }).unwrap_err();
        assert!(matches!(error, Error::Image { source: ImageError::DoesNotFit { .. }, .. }));
    }
}
