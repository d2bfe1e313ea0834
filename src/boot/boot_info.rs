//! The boot information: the struct whose address the kernel gets in RDI. The format is hermit-entry's `RawBootInfo`.

use std::num::{NonZeroU16, NonZeroU32, NonZeroU64};

use hermit_entry::boot_info::{BootInfo, HardwareInfo, LoadInfo, PlatformInfo, RawBootInfo, TlsInfo};
use time::OffsetDateTime;

use super::image::Image;
use super::layout::Layout;
use super::load::BootParameters;
use crate::error::{Error, Result};

/// Bytes of the struct.
pub(super) const SIZE: usize = size_of::<RawBootInfo>();
const _: () = assert!(SIZE == 128, "FIELDS describes the RawBootInfo of entry version 4");

/// The bytes of the struct that are fields of its variant for uhyve: start and length. All others are padding.
const FIELDS: [(usize, usize); 6] = [
    (0, 18),   // address range, serial port
    (24, 60),  // device tree, kernel range, thread-local storage, platform tag
    (88, 1),   // PCI
    (96, 8),   // number of CPUs
    (104, 4),  // frequency
    (112, 16), // boot time
];

/// The serial port of kernels with interface 1: one byte a write.
const SERIAL_PORT_V1: NonZeroU16 = NonZeroU16::new(0x800).expect("it is not zero");
/// The serial port of later kernels: the hypercall that writes a buffer.
const SERIAL_PORT_V2: NonZeroU16 = NonZeroU16::new(0x1030).expect("it is not zero");

/// The bytes of the boot information; padding is zero.
pub(super) fn encode(image: &Image, layout: &Layout, parameters: &BootParameters<'_>) -> Result<[u8; SIZE]> {
    let raw = RawBootInfo::from(BootInfo {
        hardware_info: HardwareInfo {
            phys_addr_range: layout.guest_address..layout.guest_address + layout.memory_size,
            serial_port_base: Some(if image.interface() == 1 { SERIAL_PORT_V1 } else { SERIAL_PORT_V2 }),
            device_tree: NonZeroU64::new(layout.device_tree.start),
        },
        load_info: LoadInfo {
            kernel_image_addr_range: layout.kernel_start..layout.kernel_end,
            tls_info: image.elf.thread_local.map(|tls| TlsInfo {
                start: tls.address.wrapping_add(layout.load_bias()),
                filesz: tls.file_size,
                memsz: tls.memory_size,
                align: tls.alignment,
            }),
        },
        platform_info: platform_info(parameters)?,
    });
    Ok(to_bytes(&raw))
}

fn platform_info(parameters: &BootParameters<'_>) -> Result<PlatformInfo> {
    let time = parameters.boot_time_ns;
    Ok(PlatformInfo::Uhyve {
        has_pci: parameters.has_pci,
        num_cpus: NonZeroU64::new(u64::from(parameters.cpus))
            .ok_or_else(|| Error::Config("a VM needs a CPU".into()))?,
        cpu_freq: NonZeroU32::new(parameters.tsc_khz),
        boot_time: OffsetDateTime::from_unix_timestamp_nanos(time)
            .map_err(|_| Error::Config(format!("boot time {time} ns is not in the years -9999 to 9999")))?,
    })
}

fn to_bytes(raw: &RawBootInfo) -> [u8; SIZE] {
    let mut bytes = [0; SIZE];
    let source = std::ptr::from_ref(raw).cast::<u8>();
    for (start, length) in FIELDS {
        let field = &mut bytes[start..start + length];
        // SAFETY: FIELDS lies within the 128 bytes of `raw`, a `repr(C)` struct whose only variant made here, `Uhyve`,
        // has its fields exactly there. So the bytes read are initialised; padding, which may not be, is never read.
        // The target is a local array and cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(source.add(start), field.as_mut_ptr(), length) };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::{ElfBuilder, PLAIN, Program, image};

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn encoded(builder: ElfBuilder, parameters: &BootParameters<'_>) -> (Layout, [u8; SIZE]) {
        let image = image(&builder);
        let layout = Layout::plan(&image, 64 << 20, 0x1000, false, &mut || 0).unwrap();
        let bytes = encode(&image, &layout, parameters).unwrap();
        (layout, bytes)
    }

    #[test]
    fn test_boot_info_has_every_field_at_its_offset() {
        let tls = Program::new(object::elf::PT_TLS, 0x1010, vec![0; 0x20]).memory_size(0x81).alignment(16);
        let time = 0x0123_4567_89ab_cdef_i128;
        let parameters = BootParameters { cpus: 5, tsc_khz: 2_400_001, boot_time_ns: time, has_pci: true, ..PLAIN };
        let (layout, bytes) = encoded(ElfBuilder::hermit().interface(3).program(tls), &parameters);
        let base = layout.guest_address;
        assert_eq!((base, layout.kernel_start), (4 << 30, (4 << 30) + 0x4_0000));
        let words: Vec<u64> = (0..16).map(|i| word(&bytes, i * 8)).collect();
        let expected =
            [base, base + (64 << 20), 0x1030, base + 0x5000, base + 0x4_0000, base + 0x4_3000, base + 0x4_1010];
        assert_eq!(words[..7], expected);
        assert_eq!(words[7..], [0x20, 0x81, 16, 1, 1, 5, 2_400_001, 0x0123_4567_89ab_cdef, 0]);
    }

    #[test]
    fn test_boot_info_without_tls_and_frequency_has_zeros() {
        let (_, bytes) = encoded(ElfBuilder::hermit(), &BootParameters { boot_time_ns: -1, ..PLAIN });
        assert_eq!(word(&bytes, 16), 0x800);
        assert!([48, 56, 64, 72, 88, 104].iter().all(|at| word(&bytes, *at) == 0));
        assert_eq!((word(&bytes, 112), word(&bytes, 120)), (u64::MAX, u64::MAX));
    }

    #[test]
    fn test_boot_info_with_impossible_parameters_is_refused() {
        for parameters in [BootParameters { cpus: 0, ..PLAIN }, BootParameters { boot_time_ns: i128::MAX, ..PLAIN }] {
            assert!(matches!(platform_info(&parameters).unwrap_err(), Error::Config(_)));
        }
    }
}
