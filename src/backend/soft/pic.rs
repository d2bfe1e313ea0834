//! The pair of 8259A interrupt controllers of a PC. Hermit gives them vectors and masks them, and takes interrupts from
//! the APICs; a guest that uses them gets them as they are, with the slave at the master's line 2.

/// Lines of both.
pub const LINES: usize = 16;
const CASCADE: u8 = 2;
const ICW1: u8 = 1 << 4;
const ICW1_NEEDS_ICW4: u8 = 1;
const ICW1_SINGLE: u8 = 2;
const ICW1_LEVEL: u8 = 8;
const ICW4_AUTO_EOI: u8 = 2;
const OCW3: u8 = 1 << 3;
/// Ports of the edge/level control registers.
const ELCR: u16 = 0x4d0;

/// One 8259A.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Pic {
    irr: u8,
    isr: u8,
    mask: u8,
    lines: u8,
    /// Lines that are level-triggered.
    level: u8,
    base: u8,
    /// The line with the highest priority.
    first: u8,
    /// The initialisation word that comes next: 2, 3 or 4; 0 for none.
    next_word: u8,
    needs_icw4: bool,
    is_single: bool,
    is_all_level: bool,
    auto_eoi: bool,
    rotates: bool,
    reads_isr: bool,
    special_mask: bool,
}

impl Pic {
    fn write(&mut self, is_data: bool, value: u8) {
        match (is_data, self.next_word) {
            (false, _) if value & ICW1 != 0 => {
                *self = Self {
                    lines: self.lines,
                    level: self.level,
                    next_word: 2,
                    needs_icw4: value & ICW1_NEEDS_ICW4 != 0,
                    is_single: value & ICW1_SINGLE != 0,
                    is_all_level: value & ICW1_LEVEL != 0,
                    ..Self::default()
                };
            }
            (false, _) if value & OCW3 != 0 => self.command_3(value),
            (false, _) => self.command_2(value),
            (true, 0) => self.mask = value,
            (true, 2) => {
                self.base = value & 0xf8;
                self.next_word = if !self.is_single {
                    3
                } else if self.needs_icw4 {
                    4
                } else {
                    0
                };
            }
            (true, 3) => self.next_word = if self.needs_icw4 { 4 } else { 0 },
            (true, _) => {
                self.auto_eoi = value & ICW4_AUTO_EOI != 0;
                self.next_word = 0;
            }
        }
    }

    /// End of interrupt, and rotation of priorities.
    fn command_2(&mut self, value: u8) {
        let (rotate, specific, end) = (value & 0x80 != 0, value & 0x40 != 0, value & 0x20 != 0);
        let line = if specific { Some(value & 7) } else { self.highest(self.isr) };
        match (rotate, specific, end, line) {
            (_, _, true, Some(line)) => {
                self.isr &= !(1 << line);
                if rotate {
                    self.first = (line + 1) & 7;
                }
            }
            (true, true, false, Some(line)) => self.first = (line + 1) & 7,
            (_, false, false, _) => self.rotates = rotate,
            _ => {}
        }
    }

    fn command_3(&mut self, value: u8) {
        if value & 2 != 0 {
            self.reads_isr = value & 1 != 0;
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    fn read(&self, is_data: bool) -> u8 {
        match (is_data, self.reads_isr) {
            (true, _) => self.mask,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }

    fn is_level(&self, line: u8) -> bool {
        self.is_all_level || self.level & 1 << line != 0
    }

    fn set_line(&mut self, line: u8, is_asserted: bool) {
        let bit = 1 << line;
        if is_asserted && (self.is_level(line) || self.lines & bit == 0) {
            self.irr |= bit;
        } else if !is_asserted {
            self.irr &= !bit;
        }
        self.lines = if is_asserted { self.lines | bit } else { self.lines & !bit };
    }

    /// The line among `set` with the highest priority.
    fn highest(&self, set: u8) -> Option<u8> {
        (0..8).map(|n| (self.first + n) & 7).find(|line| set & 1 << line != 0)
    }

    fn rank(&self, line: u8) -> u8 {
        line.wrapping_sub(self.first) & 7
    }

    /// The line whose interrupt it asks for.
    fn pending(&self) -> Option<u8> {
        if self.next_word != 0 {
            return None;
        }
        let line = self.highest(self.irr & !self.mask)?;
        let in_service = if self.special_mask { self.isr & !self.mask } else { self.isr };
        self.highest(in_service).is_none_or(|current| self.rank(line) < self.rank(current)).then_some(line)
    }

    fn acknowledge(&mut self, line: u8) -> u8 {
        if !self.is_level(line) {
            self.irr &= !(1 << line);
        }
        if !self.auto_eoi {
            self.isr |= 1 << line;
        } else if self.rotates {
            self.first = (line + 1) & 7;
        }
        self.base | line
    }
}

/// Both of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pics {
    master: Pic,
    slave: Pic,
}

impl Default for Pics {
    fn default() -> Self {
        let pic = |base| Pic { base, mask: 0xff, ..Pic::default() };
        Self { master: pic(0x08), slave: pic(0x70) }
    }
}

impl Pics {
    /// Whether the port is one of theirs.
    pub fn has_port(port: u16) -> bool {
        matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | ELCR | 0x4d1)
    }

    /// A byte from a port.
    pub fn read(&self, port: u16) -> u8 {
        match port {
            ELCR => self.master.level,
            0x4d1 => self.slave.level,
            _ if port < 0x80 => self.master.read(port & 1 != 0),
            _ => self.slave.read(port & 1 != 0),
        }
    }

    /// A byte to a port.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            // The timer, the keyboard, the cascade, the clock and the coprocessor are edges.
            ELCR => self.master.level = value & 0xf8,
            0x4d1 => self.slave.level = value & 0xde,
            _ if port < 0x80 => self.master.write(port & 1 != 0, value),
            _ => self.slave.write(port & 1 != 0, value),
        }
        self.cascade();
    }

    /// A device drives line 0 to 15.
    pub fn set_line(&mut self, line: usize, is_asserted: bool) {
        let Ok(line @ 0..16) = u8::try_from(line) else { return };
        if line < 8 {
            self.master.set_line(line, is_asserted);
        } else {
            self.slave.set_line(line - 8, is_asserted);
        }
        self.cascade();
    }

    fn cascade(&mut self) {
        let is_asserted = self.slave.pending().is_some();
        self.master.set_line(CASCADE, is_asserted);
    }

    /// Whether the INTR line to the CPU is asserted.
    pub fn is_pending(&self) -> bool {
        self.master.pending().is_some()
    }

    /// The CPU's acknowledge cycle gives the vector; that of line 7 if the request has gone away meanwhile.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.pending() {
            Some(CASCADE) => {
                self.master.acknowledge(CASCADE);
                match self.slave.pending() {
                    Some(line) => self.slave.acknowledge(line),
                    None => self.slave.base | 7,
                }
            }
            Some(line) => self.master.acknowledge(line),
            None => self.master.base | 7,
        };
        self.cascade();
        vector
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors from 0x20 and 0x28 on, all lines unmasked.
    fn pics() -> Pics {
        let mut pics = Pics::default();
        for (port, value) in [
            (0x20, 0x11),
            (0xa0, 0x11),
            (0x21, 0x20),
            (0xa1, 0x28),
            (0x21, 4),
            (0xa1, 2),
            (0x21, 1),
            (0xa1, 1),
            (0x21, 0),
            (0xa1, 0),
        ] {
            pics.write(port, value);
        }
        pics
    }

    #[test]
    fn test_all_lines_are_masked_at_first_and_masks_read_back() {
        let mut pics = Pics::default();
        (0..LINES).for_each(|line| pics.set_line(line, true));
        assert!(!pics.is_pending());
        pics.write(0x21, 0xfe);
        assert_eq!((pics.read(0x21), pics.read(0xa1)), (0xfe, 0xff));
    }

    #[test]
    fn test_lines_are_taken_by_priority_and_again_after_their_end() {
        let mut pics = pics();
        for line in [4, 1, 9] {
            pics.set_line(line, true);
        }
        assert_eq!(pics.acknowledge(), 0x21);
        assert!(!pics.is_pending(), "1 is in service");
        pics.write(0x20, 0x20);
        assert_eq!(pics.acknowledge(), 0x29, "the slave is at line 2");
        pics.write(0xa0, 0x20);
        pics.write(0x20, 0x20);
        assert_eq!(pics.acknowledge(), 0x24);
        pics.write(0x20, 0x0b);
        assert_eq!(pics.read(0x20), 1 << 4, "in service");
        pics.write(0x20, 0x64);
        assert_eq!(pics.read(0x20), 0, "a specific end");
        assert!(!pics.is_pending(), "edges have passed");
    }

    #[test]
    fn test_request_that_goes_away_is_spurious() {
        let mut pics = pics();
        pics.set_line(3, true);
        pics.set_line(3, false);
        assert!(!pics.is_pending());
        assert_eq!(pics.acknowledge(), 0x27);
    }

    #[test]
    fn test_level_line_asks_again_while_it_is_asserted() {
        let mut pics = pics();
        pics.write(ELCR, 0xff);
        assert_eq!(pics.read(ELCR), 0xf8);
        pics.set_line(5, true);
        assert_eq!(pics.acknowledge(), 0x25);
        pics.write(0x20, 0x20);
        assert!(pics.is_pending());
        pics.set_line(5, false);
        assert!(!pics.is_pending());
    }

    #[test]
    fn test_automatic_end_leaves_nothing_in_service() {
        let mut pics = Pics::default();
        for (port, value) in [(0x20, 0x11), (0x21, 0x40), (0x21, 4), (0x21, 3), (0x21, 0)] {
            pics.write(port, value);
        }
        pics.set_line(0, true);
        assert_eq!(pics.acknowledge(), 0x40);
        pics.set_line(6, true);
        assert_eq!(pics.acknowledge(), 0x46);
    }

    #[test]
    fn test_rotation_makes_the_line_that_was_served_the_last() {
        let mut pics = pics();
        pics.set_line(0, true);
        pics.acknowledge();
        pics.write(0x20, 0xa0);
        pics.set_line(0, false);
        pics.set_line(0, true);
        pics.set_line(7, true);
        assert_eq!(pics.acknowledge(), 0x27);
    }

    #[test]
    fn test_every_byte_at_every_port_is_taken() {
        let mut pics = Pics::default();
        let mut state = 7u32;
        for _ in 0..100_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let [_, value, choice, line] = state.to_le_bytes();
            let port = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1][usize::from(choice) % 6];
            pics.write(port, value);
            pics.read(port);
            pics.set_line(usize::from(line & 31), value & 1 != 0);
            if pics.is_pending() {
                pics.acknowledge();
            }
        }
    }
}
