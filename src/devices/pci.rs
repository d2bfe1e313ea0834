//! The PCI configuration ports of a machine without PCI devices, and the firmware area of one without firmware.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

/// The port that selects a register.
pub const ADDRESS: u16 = 0xcf8;
const DATA: Range<u16> = 0xcfc..0xd00;

/// PCI configuration mechanism 1 (PCI Local Bus 3.0, 3.2.2.3.2) with nothing behind it: every function reads as ones, bus 0 device 0 too.
#[derive(Default)]
pub struct Pci {
    address: AtomicU32,
}

/// Whether a port belongs to PCI configuration.
pub fn is_pci(port: u16) -> bool {
    (ADDRESS..ADDRESS + 4).contains(&port) || DATA.contains(&port)
}

impl Pci {
    /// A write; false if the port is not PCI's.
    pub fn write(&self, port: u16, size: u8, value: u32) -> bool {
        if port == ADDRESS && size == 4 {
            self.address.store(value, Ordering::Relaxed);
        }
        is_pci(port)
    }

    /// A read of any port that no other device answers: the address register, or ones.
    pub fn read(&self, port: u16, size: u8) -> [u8; 4] {
        if port == ADDRESS && size == 4 { self.address.load(Ordering::Relaxed).to_le_bytes() } else { [0xff; 4] }
    }
}

/// Where a PC's firmware keeps the tables that kernels scan for. It reads as zeros, so that nothing is found.
pub struct Firmware;

impl Firmware {
    /// The extended BIOS data area's last page, and the BIOS area.
    pub const RANGES: [Range<u64>; 2] = [0x9_f000..0xa_0000, 0xe_0000..0x10_0000];

    /// Whether a guest-physical address is there.
    pub fn contains(address: u64) -> bool {
        Self::RANGES.iter().any(|r| r.contains(&address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_absent_device_reads_as_ones_and_the_address_register_as_written() {
        let pci = Pci::default();
        assert!(pci.write(0xcf8, 4, 0x8000_0000));
        assert_eq!(pci.read(0xcf8, 4), 0x8000_0000u32.to_le_bytes());
        assert_eq!(pci.read(0xcfc, 4), [0xff; 4]);
        assert!(!pci.write(0x99, 1, 0));
    }
}
