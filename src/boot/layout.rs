//! Where in guest memory the boot data and the kernel lie. All boot data lies below the kernel: kernels hand out the
//! memory above themselves, and not all of them spare the device tree there.

use std::ops::Range;

use super::image::Image;
use crate::error::{Error, ImageError, Result};
use crate::paging;

/// Offsets from the guest address.
const GDT: u64 = 0x1000;
const SMALL_DEVICE_TREE: Range<u64> = 0x5000..0x9000;
const BOOT_INFO: u64 = 0x9000;
const PAGE_TABLE_ROOT: u64 = 0x1_0000;
const PAGE_TABLES: Range<u64> = 0x1_1000..0x3_0000;
/// Where a device tree goes that does not fit its usual place, and how close the stack may come.
const FREE: u64 = 0x3_0000;
/// Where a relocatable kernel lies if nothing forces it up.
const KERNEL: u64 = 0x4_0000;
/// Bytes of the boot stack, directly below the kernel.
const STACK_SIZE: u64 = 0x8000;

const PAGE: u64 = 0x1000;
const LARGE_PAGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
/// Least memory of a VM.
const MEMORY_MINIMUM: u64 = 16 << 20;
/// No memory lies from here to 4 GiB, where the devices are.
const DEVICES_START: u64 = 3 * GIB;
/// Memory of kernels with interface 2 and 3 starts in this range.
const HIGH: Range<u64> = 4 * GIB..64 * GIB;
/// Physical addresses that any CPU has.
const PHYSICAL_END: u64 = 1 << 40;

/// Guest-physical addresses of everything that is in memory when the guest starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// First address of RAM, a multiple of 2 MiB.
    pub guest_address: u64,
    /// Bytes of RAM, a multiple of 2 MiB.
    pub memory_size: u64,
    /// Loaded address of the kernel's lowest segment.
    pub kernel_start: u64,
    /// End of the kernel's highest segment.
    pub kernel_end: u64,
    /// The global descriptor table.
    pub gdt: u64,
    /// Room for the device tree.
    pub device_tree: Range<u64>,
    /// The `RawBootInfo`.
    pub boot_info: u64,
    /// The page table of the highest level (PML4).
    pub page_table_root: u64,
    /// Pages for all other page tables.
    pub page_tables: Range<u64>,
    /// Addresses that the page tables map to themselves.
    pub mapped: Range<u64>,
    /// Lowest address of the boot stack. RSP starts here, at the bottom: the kernel adds the size itself.
    pub stack: u64,
    load_bias: u64,
}

impl Layout {
    /// Places `image` in `memory_size` bytes of RAM. `random` is called only with `aslr` and a relocatable image;
    /// `device_tree_size` comes from [`device_tree_size`](super::device_tree_size).
    ///
    /// # Errors
    /// [`Error::Config`] for a memory size that no image could have, [`Error::Image`] with
    /// [`ImageError::DoesNotFit`] for one that this image can't have.
    pub fn plan(
        image: &Image,
        memory_size: u64,
        device_tree_size: u64,
        aslr: bool,
        random: &mut dyn FnMut() -> u64,
    ) -> Result<Self> {
        check_memory_size(memory_size)?;
        let device_tree = device_tree_place(device_tree_size)?;
        let boot_end = (FREE.max(device_tree.end) + STACK_SIZE).next_multiple_of(PAGE);
        let place = Place { image, memory_size, boot_end };
        let does_not_fit =
            |what| Error::Image { image: image.name().to_owned(), source: ImageError::DoesNotFit { what } };
        let guest_address = place.guest_address(aslr, random).map_err(does_not_fit)?;
        let kernel_start = place.kernel_start(guest_address).map_err(does_not_fit)?;
        let kernel_end = place.kernel_end(guest_address, kernel_start).map_err(does_not_fit)?;
        let mapped = mapped(image, guest_address, kernel_end).map_err(does_not_fit)?;
        let at = |offset: Range<u64>| guest_address + offset.start..guest_address + offset.end;
        Ok(Self {
            guest_address,
            memory_size,
            kernel_start,
            kernel_end,
            gdt: guest_address + GDT,
            device_tree: at(device_tree),
            boot_info: guest_address + BOOT_INFO,
            page_table_root: guest_address + PAGE_TABLE_ROOT,
            page_tables: at(PAGE_TABLES),
            mapped,
            stack: kernel_start / PAGE * PAGE - STACK_SIZE,
            load_bias: kernel_start.wrapping_sub(image.link_start()),
        })
    }

    /// The random number by which [`Layout::plan`] chooses this start of RAM.
    pub fn chance_of(image: &Image, guest_address: u64) -> u64 {
        let range = Place { image, memory_size: 0, boot_end: 0 }.address_range();
        guest_address.saturating_sub(range.start) / LARGE_PAGE
    }

    /// What to add, wrapping, to an address of the ELF file to get the address in the guest.
    pub fn load_bias(&self) -> u64 {
        self.load_bias
    }
}

fn check_memory_size(size: u64) -> Result<()> {
    if size < MEMORY_MINIMUM || !size.is_multiple_of(LARGE_PAGE) {
        return Err(Error::Config(format!(
            "memory size {size} ({} MiB): at least 16 MiB and a multiple of 2 MiB are needed",
            size >> 20
        )));
    }
    if size > PHYSICAL_END - HIGH.start {
        return Err(Error::Config(format!("memory size {size} ({} MiB): at most 1020 GiB are possible", size >> 20)));
    }
    Ok(())
}

fn device_tree_place(size: u64) -> Result<Range<u64>> {
    if size <= SMALL_DEVICE_TREE.end - SMALL_DEVICE_TREE.start {
        return Ok(SMALL_DEVICE_TREE);
    }
    // The format has 32-bit sizes.
    if size > u64::from(u32::MAX) {
        return Err(Error::Config(format!("arguments and environment need a device tree of {size} bytes")));
    }
    Ok(FREE..FREE + size.next_multiple_of(PAGE))
}

/// The question that [`Layout::plan`] answers.
struct Place<'a> {
    image: &'a Image,
    memory_size: u64,
    /// Offset of the lowest address that the kernel may have.
    boot_end: u64,
}

impl Place<'_> {
    fn guest_address(&self, aslr: bool, random: &mut dyn FnMut() -> u64) -> Result<u64, String> {
        let range = self.address_range();
        if range.end == DEVICES_START && self.memory_size > DEVICES_START {
            let kind = if self.image.interface() == 1 { "with interface version 1" } else { "linked below 3 GiB" };
            return Err(format!(
                "memory size {} MiB: an image {kind} can have at most {} MiB",
                self.memory_size >> 20,
                DEVICES_START >> 20
            ));
        }
        let room = (range.end - range.start).saturating_sub(self.memory_size);
        // Kernels of entry version 3 take RAM to begin at 0, whatever the boot information says.
        if !aslr || !self.image.is_relocatable() || self.image.entry_version() < 4 {
            return Ok(range.start);
        }
        let mut address = range.start + random() % (room / LARGE_PAGE + 1) * LARGE_PAGE;
        while address > range.start && self.ends_with_its_gib(address)? {
            address -= LARGE_PAGE;
        }
        Ok(address)
    }

    /// Whether the kernel, with RAM from this address, fills its last large page of a GiB. Hermit 0.6 kernels make their
    /// page tables in the memory behind themselves, and panic if they have no table yet that this would be mapped by.
    fn ends_with_its_gib(&self, guest_address: u64) -> Result<bool, String> {
        let kernel_start = self.kernel_start(guest_address)?;
        let kernel_end = self.kernel_end(guest_address, kernel_start)?;
        Ok(kernel_end.next_multiple_of(LARGE_PAGE).is_multiple_of(GIB))
    }

    /// Where memory may lie. An image that is not relocatable gets the start, so that memory covers what it can.
    fn address_range(&self) -> Range<u64> {
        let is_linked_low = !self.image.is_relocatable() && self.image.link_start() < DEVICES_START;
        if self.image.interface() == 1 || is_linked_low { 0..DEVICES_START } else { HIGH }
    }

    fn kernel_start(&self, guest_address: u64) -> Result<u64, String> {
        let link_start = self.image.link_start();
        if self.image.is_relocatable() {
            let alignment = self.image.elf.alignment;
            let lowest = guest_address + self.boot_end.max(KERNEL);
            // The next address that leaves the same remainder as the linked one.
            return Ok(lowest + (link_start.wrapping_sub(lowest) & (alignment - 1)));
        }
        let lowest = guest_address + self.boot_end;
        if link_start < lowest {
            return Err(format!(
                "the kernel is linked at {link_start:#x}; boot data, device tree and stack need {guest_address:#x}..{lowest:#x}"
            ));
        }
        Ok(link_start)
    }

    fn kernel_end(&self, guest_address: u64, kernel_start: u64) -> Result<u64, String> {
        let kernel_end = kernel_start
            .checked_add(self.image.loaded_size())
            .ok_or_else(|| format!("the kernel at {kernel_start:#x} ends past the address space"))?;
        let needed = (kernel_end - guest_address).div_ceil(LARGE_PAGE) * 2;
        if kernel_end > guest_address + self.memory_size {
            return Err(format!(
                "the kernel needs {kernel_start:#x}..{kernel_end:#x}, so at least {needed} MiB of memory from {guest_address:#x}; there are {} MiB",
                self.memory_size >> 20
            ));
        }
        Ok(kernel_end)
    }
}

/// Kernels without an ABI tag expect that the whole last GiB is mapped.
fn mapped(image: &Image, guest_address: u64, kernel_end: u64) -> Result<Range<u64>, String> {
    let unit = if image.hermit_version().is_some() { LARGE_PAGE } else { GIB };
    let mapped = guest_address..kernel_end.next_multiple_of(unit);
    let (needed, available) = (paging::boot_table_count(&mapped), (PAGE_TABLES.end - PAGE_TABLES.start) / PAGE);
    if needed > available {
        return Err(format!("mapping {mapped:#x?} needs {needed} page tables, there is room for {available}"));
    }
    Ok(mapped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::{ElfBuilder, Program, image};

    fn plan(image: &Image, memory_size: u64) -> Result<Layout> {
        Layout::plan(image, memory_size, 0x1000, false, &mut || unreachable!("without ASLR"))
    }

    #[track_caller]
    fn assert_does_not_fit(result: Result<Layout>, expected: &str) {
        let error = result.unwrap_err();
        let fits =
            matches!(&error, Error::Image { source: ImageError::DoesNotFit { what }, .. } if what.contains(expected));
        assert!(fits, "{error}");
    }

    #[test]
    fn test_layout_of_a_v1_pie_starts_at_zero() {
        let layout = plan(&image(&ElfBuilder::hermit()), 64 << 20).unwrap();
        assert_eq!((layout.guest_address, layout.kernel_start, layout.kernel_end), (0, 0x4_0000, 0x4_3000));
        assert_eq!((layout.gdt, layout.device_tree.clone(), layout.boot_info), (0x1000, 0x5000..0x9000, 0x9000));
        assert_eq!((layout.page_table_root, layout.stack, layout.load_bias()), (0x1_0000, 0x3_8000, 0x4_0000));
        assert_eq!(layout.mapped, 0..GIB);
    }

    #[test]
    fn test_layout_of_a_v3_pie_lies_above_4_gib() {
        let layout = plan(&image(&ElfBuilder::hermit().interface(3).abi_tag()), 8 << 30).unwrap();
        assert_eq!((layout.guest_address, layout.mapped), (4 * GIB, 4 * GIB..4 * GIB + LARGE_PAGE));
        assert!(plan(&image(&ElfBuilder::hermit().interface(3)), 200 << 30).is_ok());
    }

    #[test]
    fn test_layout_with_aslr_stays_in_range_and_aligned() {
        for (interface, range) in [(1, 0..DEVICES_START), (2, HIGH), (3, HIGH)] {
            let image = image(&ElfBuilder::hermit().interface(interface));
            for (seed, size) in
                [(0, 64 << 20), (u64::MAX, 64 << 20), (0x1234_5678_9abc, 1 << 30), (u64::MAX / 3, 3 << 30)]
            {
                let layout = Layout::plan(&image, size, 0x1000, true, &mut || seed).unwrap();
                assert_eq!(layout.guest_address % LARGE_PAGE, 0);
                assert!(layout.guest_address >= range.start && layout.guest_address + size <= range.end);
            }
            let last = Layout::plan(&image, 64 << 20, 0x1000, true, &mut || {
                (range.end - range.start - (64 << 20)) / LARGE_PAGE
            })
            .unwrap();
            assert_eq!(last.guest_address + last.memory_size, range.end);
        }
    }

    #[test]
    fn test_layout_with_aslr_leaves_the_kernel_mapped_memory_behind_it() {
        for (interface, start) in [(1, 0), (2, HIGH.start), (3, HIGH.start)] {
            let image = image(&ElfBuilder::hermit().interface(interface).abi_tag());
            for place in 0..2 * GIB / LARGE_PAGE {
                let layout = Layout::plan(&image, 64 << 20, 0x1000, true, &mut || place).unwrap();
                let wanted = start + place * LARGE_PAGE;
                let moved = if (wanted + LARGE_PAGE).is_multiple_of(GIB) { LARGE_PAGE } else { 0 };
                assert_eq!(layout.guest_address, wanted - moved);
                assert!(!layout.mapped.end.is_multiple_of(GIB));
                assert_eq!(Layout::chance_of(&image, layout.guest_address), place - moved / LARGE_PAGE);
            }
        }
    }

    #[test]
    fn test_layout_of_a_fixed_image_keeps_its_address() {
        for interface in 1..=3 {
            let fixed = image(&ElfBuilder::linked_at(2, 0x80_0000).interface(interface));
            let layout = Layout::plan(&fixed, 64 << 20, 0x1000, true, &mut || unreachable!("not relocatable")).unwrap();
            assert_eq!((layout.guest_address, layout.kernel_start, layout.load_bias()), (0, 0x80_0000, 0));
            assert_eq!(layout.stack, 0x7f_8000);
        }
        let high = image(&ElfBuilder::linked_at(2, 4 * GIB + 0x80_0000).interface(3));
        assert_eq!(plan(&high, 64 << 20).unwrap().guest_address, 4 * GIB);
    }

    #[test]
    fn test_layout_of_an_image_linked_where_no_memory_is_says_so() {
        for base in [0, 0x3_7000] {
            assert_does_not_fit(plan(&image(&ElfBuilder::linked_at(2, base)), 64 << 20), "is linked at");
        }
        assert_does_not_fit(plan(&image(&ElfBuilder::linked_at(2, 0x400_0000)), 64 << 20), "at least 66 MiB");
        assert_does_not_fit(
            plan(&image(&ElfBuilder::linked_at(2, 0xc000_0000).interface(3)), 64 << 20),
            "is linked at",
        );
        assert_does_not_fit(plan(&image(&ElfBuilder::linked_at(2, 0xffff_ffff_8000_0000)), 64 << 20), "at least");
        assert!(plan(&image(&ElfBuilder::linked_at(2, 0x3_8000)), 64 << 20).is_ok());
    }

    #[test]
    fn test_memory_size_odd_is_refused_with_numbers() {
        let pie = image(&ElfBuilder::hermit());
        for size in [0, 1, 14 << 20, (16 << 20) + 4096, 17 << 20, u64::MAX, 1 << 40, u64::MAX - LARGE_PAGE + 1] {
            assert!(matches!(plan(&pie, size).unwrap_err(), Error::Config(_)), "{size:#x}");
        }
        assert!(plan(&pie, 16 << 20).is_ok() && plan(&pie, 3 << 30).is_ok());
        assert_does_not_fit(plan(&pie, (3 << 30) + LARGE_PAGE), "at most 3072 MiB");
        assert_does_not_fit(
            plan(&image(&ElfBuilder::linked_at(2, 0x80_0000).interface(3)), 4 << 30),
            "linked below 3 GiB",
        );
    }

    #[test]
    fn test_kernel_bigger_than_memory_says_what_is_needed() {
        let big = ElfBuilder::hermit().program(Program::load(0x10_0000, vec![1]).memory_size(32 << 20));
        assert_does_not_fit(plan(&image(&big), 32 << 20), "at least 34 MiB");
        assert!(plan(&image(&big), 34 << 20).is_ok());
    }

    #[test]
    fn test_kernel_bigger_than_the_page_tables_reach_is_refused() {
        let of_gib = |gib: u64| {
            image(&ElfBuilder::hermit().interface(3).program(Program::load(0x10_0000, vec![1]).memory_size(gib << 30)))
        };
        assert!(plan(&of_gib(20), 32 << 30).is_ok());
        assert_does_not_fit(plan(&of_gib(40), 64 << 30), "page tables");
    }

    #[test]
    fn test_device_tree_that_is_big_moves_the_kernel_up() {
        let at = |image: &Image, size| Layout::plan(image, 64 << 20, size, false, &mut || 0);
        let pie = image(&ElfBuilder::hermit());
        let small = at(&pie, 0x4000).unwrap();
        assert_eq!((small.device_tree, small.kernel_start), (0x5000..0x9000, 0x4_0000));
        let medium = at(&pie, 0x4001).unwrap();
        assert_eq!((medium.device_tree, medium.kernel_start), (0x3_0000..0x3_5000, 0x4_0000));
        let large = at(&pie, 0x10_0000).unwrap();
        assert_eq!((large.device_tree, large.stack, large.kernel_start), (0x3_0000..0x13_0000, 0x13_0000, 0x13_8000));
        assert_does_not_fit(at(&pie, 0x400_0000), "at least 66 MiB");
        assert!(matches!(at(&pie, 1 << 33).unwrap_err(), Error::Config(_)));
        let fixed = image(&ElfBuilder::linked_at(2, 0x80_0000));
        assert_eq!(at(&fixed, 0x7c_8000).unwrap().stack, 0x7f_8000);
        assert_does_not_fit(at(&fixed, 0x7c_8001), "is linked at");
    }

    #[test]
    fn test_pie_with_odd_start_or_alignment_is_moved_by_a_multiple_of_it() {
        let odd = plan(&image(&ElfBuilder::linked_at(3, 0x1_2340)), 64 << 20).unwrap();
        assert_eq!((odd.kernel_start, odd.load_bias() % 0x1000, odd.stack), (0x4_0340, 0, 0x3_8000));
        let aligned = ElfBuilder::hermit().program(Program::load(0x9000, vec![1]).alignment(4 << 20));
        for seed in [0, 1, 2] {
            let layout = Layout::plan(&image(&aligned), 64 << 20, 0x1000, true, &mut || seed).unwrap();
            assert_eq!(layout.load_bias() % (4 << 20), 0);
        }
    }
}
