//! The IOAPIC (Intel 82093AA): 24 pins, each with an entry that says which message it sends. Polarity is ignored: a line
//! is asserted or not, whatever voltage a guest believes that to be.

use super::apic_command::{Delivery, Destination, Message};

/// Guest-physical address of its registers.
pub const BASE: u64 = 0xfec0_0000;
/// Pins.
pub const PINS: usize = 24;
/// Version 0x11, and the highest pin.
const VERSION: u32 = 0x0017_0011;
/// Offsets of the register that selects, and of the window to what is selected.
const SELECT: u64 = 0;
const WINDOW: u64 = 0x10;
const FIRST_ENTRY: u8 = 0x10;

const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Vector, mode, polarity, trigger, mask and destination; delivery status and remote IRR are the hardware's.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// The IOAPIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoApic {
    select: u8,
    id: u32,
    entries: [u64; PINS],
    /// Lines that are asserted, a bit each.
    lines: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self { select: 0, id: 0, entries: [MASKED; PINS], lines: 0 }
    }
}

impl IoApic {
    /// A read at `offset` in its page.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset & 0xff {
            SELECT => self.select.into(),
            WINDOW => self.selected(),
            _ => 0,
        };
        data.fill(0);
        let length = data.len().min(4);
        data[..length].copy_from_slice(&value.to_le_bytes()[..length]);
    }

    /// A write at `offset` in its page; gives the message that a pin sends because of it.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<Message> {
        let mut bytes = [0; 4];
        let length = data.len().min(4);
        bytes[..length].copy_from_slice(&data[..length]);
        match offset & 0xff {
            SELECT => self.select = bytes[0],
            WINDOW => return self.write_selected(u32::from_le_bytes(bytes)),
            _ => {}
        }
        None
    }

    fn selected(&self) -> u32 {
        match self.select {
            0 | 2 => self.id,
            1 => VERSION,
            _ => self.entry().map_or(0, |(pin, is_high)| {
                let [a, b, c, d, e, f, g, h] = self.entries[pin].to_le_bytes();
                u32::from_le_bytes(if is_high { [e, f, g, h] } else { [a, b, c, d] })
            }),
        }
    }

    /// The pin whose entry is selected, and which half of it.
    fn entry(&self) -> Option<(usize, bool)> {
        let n = self.select.checked_sub(FIRST_ENTRY)?;
        let pin = usize::from(n / 2);
        (pin < PINS).then_some((pin, n % 2 != 0))
    }

    fn write_selected(&mut self, value: u32) -> Option<Message> {
        if self.select == 0 {
            self.id = value & 0x0f00_0000;
        }
        let (pin, is_high) = self.entry()?;
        let entry = &mut self.entries[pin];
        let (kept, new) = if is_high {
            (*entry & 0xffff_ffff, u64::from(value) << 32)
        } else {
            (*entry & !0xffff_ffff, u64::from(value))
        };
        *entry = kept | (*entry & REMOTE_IRR) | (new & WRITABLE);
        if *entry & LEVEL == 0 {
            *entry &= !REMOTE_IRR;
        }
        self.assert_level(pin)
    }

    /// A device drives the line of a pin; gives the message that is sent.
    pub fn set_line(&mut self, pin: usize, is_asserted: bool) -> Option<Message> {
        if pin >= PINS {
            return None;
        }
        let was_asserted = self.lines & 1 << pin != 0;
        self.lines = self.lines & !(1 << pin) | u32::from(is_asserted) << pin;
        let entry = self.entries[pin];
        if entry & LEVEL != 0 {
            return self.assert_level(pin);
        }
        (is_asserted && !was_asserted && entry & MASKED == 0).then(|| message(entry))
    }

    /// A level-triggered pin sends while its line is asserted, and the interrupt before is over.
    fn assert_level(&mut self, pin: usize) -> Option<Message> {
        let entry = &mut self.entries[pin];
        if self.lines & 1 << pin == 0 || *entry & (LEVEL | MASKED | REMOTE_IRR) != LEVEL {
            return None;
        }
        *entry |= REMOTE_IRR;
        Some(message(*entry))
    }

    /// An interrupt of this vector is over: the pins that sent it send again if their lines are still asserted.
    pub fn end(&mut self, vector: u8, mut send: impl FnMut(Message)) {
        for pin in 0..PINS {
            let entry = &mut self.entries[pin];
            if *entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR && entry.to_le_bytes()[0] == vector {
                *entry &= !REMOTE_IRR;
                if let Some(message) = self.assert_level(pin) {
                    send(message);
                }
            }
        }
    }
}

fn message(entry: u64) -> Message {
    let [vector, mode, .., destination] = entry.to_le_bytes();
    let id = u32::from(destination);
    Message {
        vector,
        delivery: Delivery::from_bits(u32::from(mode) << 8),
        destination: if entry & LOGICAL != 0 { Destination::Logical(id) } else { Destination::Physical(id) },
        is_wide: false,
        is_level: entry & LEVEL != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(ioapic: &mut IoApic, register: u8, value: u32) -> Option<Message> {
        ioapic.write(SELECT, &u32::from(register).to_le_bytes());
        ioapic.write(WINDOW, &value.to_le_bytes())
    }

    fn read(ioapic: &mut IoApic, register: u8) -> u32 {
        ioapic.write(SELECT, &[register]);
        let mut data = [0; 4];
        ioapic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn test_version_tells_24_entries_and_all_are_masked() {
        let mut ioapic = IoApic::default();
        assert_eq!(read(&mut ioapic, 1), 0x0017_0011);
        assert!((0..24).all(|pin| read(&mut ioapic, 0x10 + 2 * pin) == 0x1_0000));
        assert_eq!(read(&mut ioapic, 0x40), 0);
        write(&mut ioapic, 0, u32::MAX);
        assert_eq!(read(&mut ioapic, 0), 0x0f00_0000);
    }

    #[test]
    fn test_edge_sends_once_and_not_while_masked() {
        let mut ioapic = IoApic::default();
        assert_eq!(ioapic.set_line(11, true), None, "masked");
        ioapic.set_line(11, false);
        write(&mut ioapic, 0x10 + 23, 0x0300_0000);
        assert_eq!(write(&mut ioapic, 0x10 + 22, 0x0045), None);
        let sent = ioapic.set_line(11, true).unwrap();
        assert_eq!((sent.vector, sent.destination, sent.is_level), (0x45, Destination::Physical(3), false));
        assert_eq!(ioapic.set_line(11, true), None);
        ioapic.set_line(11, false);
        assert!(ioapic.set_line(11, true).is_some());
        assert_eq!(ioapic.set_line(24, true), None, "there is no such pin");
    }

    #[test]
    fn test_level_sends_again_after_its_end_while_asserted() {
        let mut ioapic = IoApic::default();
        write(&mut ioapic, 0x10 + 10, 0x8850);
        let sent = ioapic.set_line(5, true).unwrap();
        assert!(sent.is_level && sent.destination == Destination::Logical(0));
        assert_eq!(read(&mut ioapic, 0x10 + 10) & 0x4000, 0x4000, "remote IRR");
        let mut again = Vec::new();
        ioapic.end(0x51, |m| again.push(m));
        assert_eq!(again, []);
        ioapic.end(0x50, |m| again.push(m));
        assert_eq!(again, [sent]);
        ioapic.set_line(5, false);
        ioapic.end(0x50, |m| again.push(m));
        assert_eq!((again.len(), read(&mut ioapic, 0x10 + 10) & 0x4000), (1, 0));
    }

    #[test]
    fn test_level_that_waits_is_sent_when_it_is_unmasked() {
        let mut ioapic = IoApic::default();
        write(&mut ioapic, 0x10, 0x1_8030);
        assert_eq!(ioapic.set_line(0, true), None);
        assert!(write(&mut ioapic, 0x10, 0x8030).is_some());
        assert_eq!(write(&mut ioapic, 0x10, 0x8030), None, "not before its end");
    }

    #[test]
    fn test_read_only_bits_are_the_hardwares() {
        let mut ioapic = IoApic::default();
        write(&mut ioapic, 0x10, u32::MAX);
        write(&mut ioapic, 0x11, u32::MAX);
        assert_eq!((read(&mut ioapic, 0x10), read(&mut ioapic, 0x11)), (0x1_afff, 0xff00_0000));
    }

    #[test]
    fn test_any_access_is_answered() {
        let mut ioapic = IoApic::default();
        for offset in 0..0x1000u64 {
            for length in [0usize, 1, 2, 3, 4, 8, 16] {
                ioapic.write(offset, &vec![u8::try_from(offset & 0xff).unwrap(); length]);
                ioapic.read(offset, &mut vec![0; length]);
            }
        }
        ioapic.end(255, |_| ());
    }
}
