//! The real-time clock of a PC and its CMOS memory (MC146818): time and date in binary-coded decimals, 24 hours.

const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;
const NANOSECONDS: u64 = 1_000_000_000;
const DAY: u64 = 86_400;

/// The clock. It runs with the machine's, and can't be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cmos {
    index: u8,
    memory: [u8; 128],
    /// Seconds since 1970 when the machine's clock was at 0.
    epoch: u64,
}

/// A date of the Gregorian calendar.
struct Date {
    year: u64,
    month: u64,
    day: u64,
    /// 1 for Sunday.
    weekday: u64,
}

impl Date {
    /// The date so many days after 1 January 1970, by counting from 1 March of year 0, in eras of 400 years.
    fn from_days(days: u64) -> Self {
        let shifted = days + 719_468;
        let (era, of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * of_year + 2) / 153;
        let day = of_year - (153 * from_march + 2) / 5 + 1;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        let year = era * 400 + year_of_era + u64::from(month <= 2);
        Self { year, month, day, weekday: (days + 4) % 7 + 1 }
    }
}

fn bcd(value: u64) -> u8 {
    let [byte, ..] = (value / 10 % 10 * 16 + value % 10).to_le_bytes();
    byte
}

impl Cmos {
    /// A clock that shows `epoch` seconds since 1970 at time 0.
    pub fn new(epoch: u64) -> Self {
        Self { index: 0, memory: [0; 128], epoch: epoch.min(u64::from(u32::MAX) * 8) }
    }

    /// Whether the port is one of its own.
    pub fn has_port(port: u16) -> bool {
        matches!(port, INDEX | DATA)
    }

    /// A byte from a port.
    pub fn read(&self, port: u16, now: u64) -> u8 {
        if port != DATA {
            return 0xff;
        }
        let time = self.epoch + now / NANOSECONDS;
        let (date, second) = (Date::from_days(time / DAY), time % DAY);
        match self.index {
            0 => bcd(second % 60),
            2 => bcd(second / 60 % 60),
            4 => bcd(second / 3600),
            6 => bcd(date.weekday),
            7 => bcd(date.day),
            8 => bcd(date.month),
            9 => bcd(date.year % 100),
            CENTURY => bcd(date.year / 100),
            // A 32,768 Hz clock; no update is ever in progress.
            STATUS_A => 0x26,
            // 24 hours, decimals.
            STATUS_B => 0x02,
            STATUS_C => 0,
            // The battery is good.
            STATUS_D => 0x80,
            index => self.memory[usize::from(index)],
        }
    }

    /// A byte to a port.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            INDEX => self.index = value & 0x7f,
            _ => self.memory[usize::from(self.index)] = value,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(cmos: &mut Cmos, index: u8, now: u64) -> u8 {
        cmos.write(INDEX, index | 0x80);
        cmos.read(DATA, now)
    }

    fn shown(epoch: u64, now: u64) -> [u8; 8] {
        let mut cmos = Cmos::new(epoch);
        [CENTURY, 9, 8, 7, 4, 2, 0, 6].map(|index| read(&mut cmos, index, now))
    }

    #[test]
    fn test_date_and_time_are_those_of_the_epoch_and_the_clock() {
        assert_eq!(shown(0, 0), [0x19, 0x70, 1, 1, 0, 0, 0, 5], "a Thursday");
        assert_eq!(shown(951_782_399, 0), [0x20, 0, 2, 0x28, 0x23, 0x59, 0x59, 2]);
        assert_eq!(shown(951_782_399, NANOSECONDS), [0x20, 0, 2, 0x29, 0, 0, 0, 3]);
        assert_eq!(shown(1_735_689_599, 0), [0x20, 0x24, 0x12, 0x31, 0x23, 0x59, 0x59, 3]);
        assert_eq!(shown(4_102_444_800, 0), [0x21, 0, 1, 1, 0, 0, 0, 6]);
    }

    #[test]
    fn test_status_says_that_the_time_is_good_in_decimals() {
        let mut cmos = Cmos::new(0);
        assert_eq!([STATUS_A, STATUS_B, STATUS_C, STATUS_D].map(|i| read(&mut cmos, i, 0)), [0x26, 2, 0, 0x80]);
        assert_eq!(cmos.read(INDEX, 0), 0xff);
    }

    #[test]
    fn test_memory_keeps_what_is_written_and_the_clock_does_not() {
        let mut cmos = Cmos::new(0);
        for index in 0..=255u8 {
            cmos.write(INDEX, index);
            cmos.write(DATA, !index);
        }
        assert_eq!((read(&mut cmos, 0x40, 0), read(&mut cmos, 9, 0)), (0x3f, 0x70));
        let mut late = Cmos::new(u64::MAX);
        assert_eq!(read(&mut late, STATUS_D, u64::MAX), 0x80);
        for index in [0, 2, 4, 6, 7, 8, 9, CENTURY] {
            let value = read(&mut late, index, u64::MAX);
            assert!(value >> 4 < 10 && value & 0xf < 10, "{index}: {value:#x}");
        }
    }
}
