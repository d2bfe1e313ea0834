//! The devices of a machine and the wires between them. It is plain state, as the devices are: a copy of it is a copy of
//! the machine without its CPUs and RAM.

use super::apic_command::{Delivery, Destination, Message};
use super::cmos::Cmos;
use super::io_apic::{self, IoApic};
use super::local_apic::{Effect, LocalApic, MSR_FIRST, MSR_LAST, Moment, Refused};
use super::pic::Pics;
use super::pit::Pit;

const IA32_APIC_BASE: u32 = 0x1b;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const PAGE: u64 = 0x1000;
/// Where the interval timer is wired to, at the IOAPIC and the 8259s.
const PIT_LINE: usize = 0;

/// What a CPU is asked to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupt {
    /// A non-maskable interrupt.
    Nmi,
    /// A maskable one.
    Maskable,
}

/// All devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Board {
    apics: Vec<LocalApic>,
    io_apic: IoApic,
    pics: Pics,
    pit: Option<Pit>,
    cmos: Cmos,
}

impl Board {
    /// The devices of a machine with so many vCPUs, whose clock showed `epoch` seconds since 1970 at time 0.
    pub fn new(cpus: u32, has_pit: bool, epoch: u64) -> Self {
        Self {
            apics: (0..cpus).map(LocalApic::new).collect(),
            io_apic: IoApic::default(),
            pics: Pics::default(),
            pit: has_pit.then(Pit::default),
            cmos: Cmos::new(epoch),
        }
    }

    /// A vCPU's local APIC.
    pub fn apic(&self, vcpu: usize) -> &LocalApic {
        &self.apics[vcpu]
    }

    /// A vCPU's local APIC.
    pub fn apic_mut(&mut self, vcpu: usize) -> &mut LocalApic {
        &mut self.apics[vcpu]
    }

    fn offset_in_apic(&self, vcpu: usize, address: u64) -> Option<u64> {
        address.checked_sub(self.apics[vcpu].page()).filter(|offset| *offset < PAGE)
    }

    fn offset_in_io_apic(address: u64) -> Option<u64> {
        address.checked_sub(io_apic::BASE).filter(|offset| *offset < PAGE)
    }

    /// Whether a vCPU finds a device at a guest-physical address.
    pub fn has_memory(&self, vcpu: usize, address: u64) -> bool {
        self.offset_in_apic(vcpu, address).is_some() || Self::offset_in_io_apic(address).is_some()
    }

    /// A read of a guest-physical address by a vCPU; false if no device is there.
    pub fn read_memory(&mut self, vcpu: usize, address: u64, moment: Moment, data: &mut [u8]) -> bool {
        self.advance(moment.now);
        if let Some(offset) = self.offset_in_apic(vcpu, address) {
            match self.apics[vcpu].window() {
                Some(_) => self.apics[vcpu].read_memory(offset, moment.now, data),
                // In x2APIC mode nobody answers there, and kernels look all the same.
                None => data.fill(0xff),
            }
        } else if let Some(offset) = Self::offset_in_io_apic(address) {
            self.io_apic.read(offset, data);
        } else {
            return false;
        }
        true
    }

    /// A write to a guest-physical address by a vCPU; false if no device is there.
    pub fn write_memory(&mut self, vcpu: usize, address: u64, moment: Moment, data: &[u8]) -> bool {
        self.advance(moment.now);
        if let Some(offset) = self.offset_in_apic(vcpu, address) {
            if self.apics[vcpu].window().is_some() {
                let effect = self.apics[vcpu].write_memory(offset, moment, data);
                self.apply(vcpu, effect);
            }
        } else if let Some(offset) = Self::offset_in_io_apic(address) {
            if let Some(message) = self.io_apic.write(offset, data) {
                self.route(&message, None);
            }
        } else {
            return false;
        }
        true
    }

    /// Whether a port belongs to a device.
    pub fn has_port(&self, port: u16) -> bool {
        Pics::has_port(port) || Cmos::has_port(port) || (self.pit.is_some() && Pit::has_port(port))
    }

    /// A read of ports from `port` on; false if the first belongs to no device.
    pub fn read_port(&mut self, port: u16, now: u64, data: &mut [u8]) -> bool {
        if !self.has_port(port) {
            return false;
        }
        self.advance(now);
        for (port, byte) in (port..=u16::MAX).zip(data) {
            *byte = match &mut self.pit {
                _ if Pics::has_port(port) => self.pics.read(port),
                _ if Cmos::has_port(port) => self.cmos.read(port, now),
                Some(pit) if Pit::has_port(port) => pit.read(port, now),
                _ => 0xff,
            };
        }
        true
    }

    /// A write of ports from `port` on; false if the first belongs to no device.
    pub fn write_port(&mut self, port: u16, now: u64, data: &[u8]) -> bool {
        if !self.has_port(port) {
            return false;
        }
        self.advance(now);
        for (port, byte) in (port..=u16::MAX).zip(data) {
            match &mut self.pit {
                _ if Pics::has_port(port) => self.pics.write(port, *byte),
                _ if Cmos::has_port(port) => self.cmos.write(port, *byte),
                Some(pit) if Pit::has_port(port) => pit.write(port, *byte, now),
                _ => {}
            }
        }
        true
    }

    /// Whether a model-specific register is a device's.
    pub fn has_msr(index: u32) -> bool {
        matches!(index, IA32_APIC_BASE | IA32_TSC_DEADLINE | MSR_FIRST..=MSR_LAST)
    }

    /// A read of a model-specific register that is a device's.
    pub fn read_msr(&mut self, vcpu: usize, index: u32, moment: Moment) -> Result<u64, Refused> {
        self.advance(moment.now);
        let apic = &self.apics[vcpu];
        match index {
            IA32_APIC_BASE => Ok(apic.base()),
            IA32_TSC_DEADLINE => Ok(apic.deadline()),
            _ => apic.read_msr(index, moment.now),
        }
    }

    /// A write of a model-specific register that is a device's.
    pub fn write_msr(&mut self, vcpu: usize, index: u32, value: u64, moment: Moment) -> Result<(), Refused> {
        self.advance(moment.now);
        let apic = &mut self.apics[vcpu];
        match index {
            IA32_APIC_BASE => apic.write_base(value)?,
            IA32_TSC_DEADLINE => apic.set_deadline(value, moment),
            _ => {
                let effect = apic.write_msr(index, value, moment)?;
                self.apply(vcpu, effect);
            }
        }
        Ok(())
    }

    fn apply(&mut self, vcpu: usize, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Send(message) => self.route(&message, Some(vcpu)),
            Effect::End(vector) => {
                let mut again = Vec::new();
                self.io_apic.end(vector, |message| again.push(message));
                again.iter().for_each(|message| self.route(message, None));
            }
        }
    }

    /// Brings a message to those who are meant.
    fn route(&mut self, message: &Message, sender: Option<usize>) {
        let is_meant = |n: usize, apic: &LocalApic| match message.destination {
            Destination::Itself => Some(n) == sender,
            Destination::AllButItself => Some(n) != sender,
            destination => apic.address().is_meant(destination, message.is_wide),
        };
        if message.delivery == Delivery::LowestPriority {
            let meant = self.apics.iter_mut().enumerate().filter(|(n, apic)| is_meant(*n, apic));
            if let Some((_, apic)) = meant.min_by_key(|(_, apic)| apic.priority()) {
                apic.accept(message);
            }
            return;
        }
        for (n, apic) in self.apics.iter_mut().enumerate() {
            if is_meant(n, apic) {
                apic.accept(message);
            }
        }
    }

    /// A device drives an interrupt line, which leads to the 8259s (16 lines) and to the IOAPIC (24).
    pub fn set_line(&mut self, line: usize, is_asserted: bool) {
        self.pics.set_line(line, is_asserted);
        if let Some(message) = self.io_apic.set_line(line, is_asserted) {
            self.route(&message, None);
        }
    }

    /// Brings all timers up to the time.
    pub fn advance(&mut self, now: u64) {
        self.apics.iter_mut().for_each(|apic| apic.advance(now));
        if self.pit.as_mut().is_some_and(|pit| pit.expire(now)) {
            self.set_line(PIT_LINE, false);
            self.set_line(PIT_LINE, true);
        }
    }

    /// When a timer does something to a CPU next.
    pub fn next_event(&self) -> Option<u64> {
        self.apics.iter().filter_map(LocalApic::next_interrupt).chain(self.next_pit()).min()
    }

    /// When the interval timer interrupts next, whether anybody hears it or not.
    pub fn next_pit(&self) -> Option<u64> {
        self.pit.as_ref().and_then(Pit::next_event)
    }

    /// What a vCPU is asked to take now.
    #[inline]
    pub fn pending(&self, vcpu: usize) -> Option<Interrupt> {
        let apic = &self.apics[vcpu];
        if apic.has_nmi() {
            return Some(Interrupt::Nmi);
        }
        let from_pics = || vcpu == 0 && self.pics.is_pending() && apic.takes_extint();
        (apic.pending().is_some() || from_pics()).then_some(Interrupt::Maskable)
    }

    /// The vector of the maskable interrupt that a vCPU is asked to take.
    pub fn vector(&self, vcpu: usize) -> Option<u8> {
        if vcpu == 0 && self.pics.is_pending() && self.apics[0].takes_extint() {
            return Some({ self.pics }.acknowledge());
        }
        self.apics[vcpu].pending()
    }

    /// A vCPU takes its NMI.
    pub fn take_nmi(&mut self, vcpu: usize) -> bool {
        self.apics[vcpu].take_nmi()
    }

    /// A vCPU takes a maskable interrupt: its vector. What comes from the 8259s goes first.
    pub fn acknowledge(&mut self, vcpu: usize) -> Option<u8> {
        if vcpu == 0 && self.pics.is_pending() && self.apics[0].takes_extint() {
            return Some(self.pics.acknowledge());
        }
        self.apics[vcpu].acknowledge()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const APIC: u64 = 0xfee0_0000;
    const NOW: Moment = Moment { now: 100, tsc: 100 };

    fn board(cpus: u32) -> Board {
        let mut board = Board::new(cpus, true, 0);
        for vcpu in 0..cpus as usize {
            write(&mut board, vcpu, APIC + 0xf0, 0x1ff);
        }
        board
    }

    fn write(board: &mut Board, vcpu: usize, address: u64, value: u32) {
        assert!(board.write_memory(vcpu, address, NOW, &value.to_le_bytes()));
    }

    fn route_pin(board: &mut Board, pin: u32, low: u32, high: u32) {
        for (register, value) in [(0x11 + 2 * pin, high), (0x10 + 2 * pin, low)] {
            write(board, 0, io_apic::BASE, register);
            write(board, 0, io_apic::BASE + 0x10, value);
        }
    }

    fn taken(board: &mut Board) -> Vec<Option<u8>> {
        (0..board.apics.len()).map(|vcpu| board.acknowledge(vcpu)).collect()
    }

    #[test]
    fn test_ipi_reaches_whom_its_shorthand_or_id_names() {
        let mut board = board(3);
        for (high, low, expected) in [
            (2, 0x40, [None, None, Some(0x40)]),
            (0, 0x4_0041, [None, Some(0x41), None]),
            (0, 0x8_0052, [Some(0x52); 3]),
            (0, 0xc_0063, [Some(0x63), None, Some(0x63)]),
            (0xff, 0x74, [Some(0x74); 3]),
        ] {
            write(&mut board, 1, APIC + 0x310, high << 24);
            write(&mut board, 1, APIC + 0x300, low);
            assert_eq!(taken(&mut board), expected, "{low:#x}");
        }
    }

    #[test]
    fn test_nmi_ipi_is_pending_before_all_else() {
        let mut board = board(2);
        write(&mut board, 0, APIC + 0x300, 0xc_0430);
        write(&mut board, 0, APIC + 0x300, 0x8_0040);
        assert_eq!((board.pending(0), board.pending(1)), (Some(Interrupt::Maskable), Some(Interrupt::Nmi)));
        assert!(board.take_nmi(1) && !board.take_nmi(1));
        assert_eq!(board.pending(1), Some(Interrupt::Maskable));
    }

    #[test]
    fn test_device_line_reaches_a_cpu_through_the_io_apic_until_it_falls() {
        let mut board = board(2);
        route_pin(&mut board, 11, 0x8055, 1 << 24);
        board.set_line(11, true);
        assert_eq!(taken(&mut board), [None, Some(0x55)]);
        board.write_memory(1, APIC + 0xb0, NOW, &[0; 4]);
        assert_eq!(taken(&mut board), [None, Some(0x55)], "still asserted");
        board.set_line(11, false);
        board.write_memory(1, APIC + 0xb0, NOW, &[0; 4]);
        assert_eq!(taken(&mut board), [None, None]);
    }

    #[test]
    fn test_lowest_priority_message_reaches_one() {
        let mut board = board(3);
        board.apic_mut(0).set_cr8(2);
        route_pin(&mut board, 3, 0x150, 0xff << 24);
        board.set_line(3, true);
        assert_eq!(taken(&mut board), [None, Some(0x50), None]);
    }

    #[test]
    fn test_interval_timer_interrupts_through_the_pics() {
        let mut board = board(1);
        for (port, value) in
            [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xfe), (0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)]
        {
            assert!(board.write_port(port, 0, &[value]));
        }
        let next = board.next_event().unwrap();
        assert!((10_000_000..10_001_000).contains(&next));
        board.advance(next - 1);
        assert_eq!(board.pending(0), None);
        board.advance(next);
        assert_eq!((board.pending(0), board.acknowledge(0)), (Some(Interrupt::Maskable), Some(0x20)));
    }

    #[test]
    fn test_timer_that_cannot_wake_is_no_wake() {
        let mut board = board(2);
        for vcpu in 0..2 {
            write(&mut board, vcpu, APIC + 0x320, 0x2_0040);
            write(&mut board, vcpu, APIC + 0x380, 1000);
        }
        assert_eq!(board.apic(1).next_wake(), Some(2100));
        board.apic_mut(1).set_cr8(4);
        assert_eq!((board.apic(0).next_wake(), board.apic(1).next_wake()), (Some(2100), None));
        write(&mut board, 0, APIC + 0x320, 0x3_0040);
        assert_eq!(board.apic(0).next_wake(), None);
    }

    #[test]
    fn test_page_of_an_apic_in_x2apic_mode_is_a_hole() {
        let mut board = board(1);
        let base = board.apic(0).base();
        board.write_msr(0, IA32_APIC_BASE, base | 0x400, NOW).unwrap();
        let mut data = [0; 4];
        write(&mut board, 0, APIC + 0x80, 0x20);
        assert!(board.read_memory(0, APIC + 0x80, NOW, &mut data));
        assert_eq!((data, board.apic(0).cr8()), ([0xff; 4], 0));
    }

    #[test]
    fn test_registers_that_no_device_has_are_left_to_others() {
        let mut board = board(1);
        assert!(!board.read_memory(0, 0x9000_0000, NOW, &mut [0; 4]));
        assert!(!board.write_port(0x3f8, 0, &[0]) && !board.read_port(0xcfc, 0, &mut [0; 4]));
        assert!(!Board::has_msr(0xc000_0080) && Board::has_msr(0x6e0));
        assert_eq!(board.read_msr(0, 0x802, NOW), Err(Refused), "not in x2APIC mode");
        let mut data = [0; 4];
        assert!(board.read_port(0x71, 0, &mut data));
        assert_eq!(data[1..], [0xff; 3]);
        assert!(board.read_port(0x4d1, 0, &mut [0; 2]));
        assert!(!Board::new(1, false, 0).has_port(0x40));
    }
}
