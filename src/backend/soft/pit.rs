//! The 8254 interval timer of a PC: channel 0 interrupts, channel 2 is what kernels calibrate clocks by. Counters are
//! computed from the time, they do not tick.

/// Ticks a second.
const FREQUENCY: u128 = 1_193_182;
const NANOSECONDS: u128 = 1_000_000_000;

/// One counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Channel {
    mode: u8,
    /// Access: 1 low byte, 2 high byte, 3 low then high.
    access: u8,
    is_bcd: bool,
    /// The count that was written: 1 to 65536.
    reload: u32,
    /// When counting began; none before a count is written.
    start: Option<u64>,
    /// The low byte of a count whose high byte is to come.
    low: Option<u8>,
    /// The next read of a count gives its high byte.
    reads_high: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
    gate: bool,
}

impl Channel {
    const fn new(gate: bool) -> Self {
        Self {
            mode: 3,
            access: 3,
            is_bcd: false,
            reload: 0x1_0000,
            start: None,
            low: None,
            reads_high: false,
            latched: None,
            latched_status: None,
            gate,
        }
    }

    fn ticks(&self, now: u64) -> u64 {
        let Some(start) = self.start else { return 0 };
        let ticks = u128::from(now.saturating_sub(start)) * FREQUENCY / NANOSECONDS;
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    /// The count as a guest reads it.
    fn count(&self, now: u64) -> u16 {
        let (reload, ticks) = (u64::from(self.reload), self.ticks(now));
        let left = match self.mode {
            2 => reload - ticks % reload,
            3 => reload - 2 * ticks % reload,
            _ => reload.wrapping_sub(ticks) & 0xffff,
        };
        let [low, high, ..] = left.to_le_bytes();
        let binary = u16::from_le_bytes([low, high]);
        if self.is_bcd { to_bcd(binary) } else { binary }
    }

    /// The level of OUT.
    fn out(&self, now: u64) -> bool {
        let (reload, ticks) = (u64::from(self.reload), self.ticks(now));
        match self.mode {
            0 | 1 => self.start.is_some() && ticks >= reload,
            2 => ticks % reload != reload - 1,
            3 => ticks % reload < reload.div_ceil(2),
            _ => ticks != reload,
        }
    }

    fn control(&mut self, value: u8) {
        *self = Self { gate: self.gate, reload: self.reload, ..Self::new(self.gate) };
        self.access = value >> 4 & 3;
        self.mode = [0, 1, 2, 3, 4, 5, 2, 3][usize::from(value >> 1 & 7)];
        self.is_bcd = value & 1 != 0;
    }

    fn write(&mut self, value: u8, now: u64) {
        let count = match (self.access, self.low.take()) {
            (1, _) => value.into(),
            (2, _) => u16::from(value) << 8,
            (_, None) => {
                self.low = Some(value);
                return;
            }
            (_, Some(low)) => u16::from_le_bytes([low, value]),
        };
        let count = if self.is_bcd { from_bcd(count) } else { count };
        let whole = if self.is_bcd { 10_000 } else { 0x1_0000 };
        self.reload = if count == 0 { whole } else { count.into() };
        self.start = self.gate.then_some(now);
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched.unwrap_or_else(|| self.count(now)).to_le_bytes();
        let is_high = self.access == 2 || (self.access == 3 && self.reads_high);
        self.reads_high = self.access == 3 && !self.reads_high;
        if !self.reads_high {
            self.latched = None;
        }
        if is_high { high } else { low }
    }

    fn latch(&mut self, now: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.count(now));
        }
    }

    fn latch_status(&mut self, now: u64) {
        let status = u8::from(self.out(now)) << 7
            | u8::from(self.start.is_none()) << 6
            | self.access << 4
            | self.mode << 1
            | u8::from(self.is_bcd);
        self.latched_status.get_or_insert(status);
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        if gate && !self.gate {
            self.start = Some(now);
        }
        self.gate = gate;
    }

    /// When OUT rises next after `now`.
    fn next_rise(&self, now: u64) -> Option<u64> {
        let start = self.start?;
        let (reload, ticks) = (u64::from(self.reload), self.ticks(now));
        let tick = match self.mode {
            2 | 3 => (ticks / reload + 1) * reload,
            _ if ticks < reload => reload,
            _ => return None,
        };
        let delay = (u128::from(tick) * NANOSECONDS).div_ceil(FREQUENCY);
        Some(start.saturating_add(u64::try_from(delay).unwrap_or(u64::MAX)))
    }
}

fn to_bcd(value: u16) -> u16 {
    (0..4).fold(0, |bcd, n| bcd | (value / 10u16.pow(n) % 10) << (4 * n))
}

fn from_bcd(bcd: u16) -> u16 {
    (0..4).fold(0, |value: u16, n| value.saturating_add((bcd >> (4 * n) & 0xf) * 10u16.pow(n)))
}

/// The timer with its three channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pit {
    channels: [Channel; 3],
    speaker: u8,
    /// When channel 0 interrupts next.
    next: Option<u64>,
}

impl Default for Pit {
    fn default() -> Self {
        Self { channels: [Channel::new(true), Channel::new(true), Channel::new(false)], speaker: 0, next: None }
    }
}

/// Shorter periods than this are one interrupt: a guest can't have the machine do nothing else.
const SHORTEST_PERIOD: u64 = 10_000;

impl Pit {
    /// Whether the port is one of its own.
    pub fn has_port(port: u16) -> bool {
        matches!(port, 0x40..=0x43 | 0x61)
    }

    /// A byte from a port.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].read(now),
            0x61 => {
                let refresh = self.channels[1].ticks(now).to_le_bytes()[0] & 1;
                self.speaker | refresh << 4 | u8::from(self.channels[2].out(now)) << 5
            }
            _ => 0xff,
        }
    }

    /// A byte to a port.
    pub fn write(&mut self, port: u16, value: u8, now: u64) {
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].write(value, now),
            0x43 => self.control(value, now),
            0x61 => {
                self.speaker = value & 3;
                self.channels[2].set_gate(value & 1 != 0, now);
            }
            _ => {}
        }
        if matches!(port, 0x40 | 0x43) {
            self.next = self.channels[0].next_rise(now);
        }
    }

    fn control(&mut self, value: u8, now: u64) {
        match (value >> 6, value >> 4 & 3) {
            (3, _) => {
                let chosen = (0..3).filter(|n| value & 2 << n != 0);
                for n in chosen {
                    if value & 0x20 == 0 {
                        self.channels[n].latch(now);
                    }
                    if value & 0x10 == 0 {
                        self.channels[n].latch_status(now);
                    }
                }
            }
            (n, 0) => self.channels[usize::from(n)].latch(now),
            (n, _) => self.channels[usize::from(n)].control(value),
        }
    }

    /// Whether channel 0 has interrupted until `now`.
    pub fn expire(&mut self, now: u64) -> bool {
        let Some(next) = self.next.filter(|next| *next <= now) else { return false };
        let rise = self.channels[0].next_rise(now).map(|rise| rise.max(next.saturating_add(SHORTEST_PERIOD)));
        // At the end of time there is no next one.
        self.next = now.checked_add(1).and_then(|soon| rise.map(|rise| rise.max(soon)));
        true
    }

    /// When channel 0 interrupts next.
    pub fn next_event(&self) -> Option<u64> {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pit: &mut Pit, control: u8, count: u16, now: u64) {
        let port = 0x40 + u16::from(control >> 6);
        pit.write(0x43, control, now);
        for byte in count.to_le_bytes() {
            pit.write(port, byte, now);
        }
    }

    fn read(pit: &mut Pit, channel: u16, now: u64) -> u16 {
        u16::from_le_bytes([pit.read(0x40 + channel, now), pit.read(0x40 + channel, now)])
    }

    #[test]
    fn test_rate_generator_counts_down_and_interrupts_each_period() {
        let mut pit = Pit::default();
        set(&mut pit, 0x34, 11_932, 0);
        assert_eq!(read(&mut pit, 0, 0), 11_932);
        assert_eq!(read(&mut pit, 0, 5_000_000), 11_932 - 5_965);
        assert_eq!(pit.next_event(), Some(10_000_151));
        assert!(!pit.expire(10_000_150) && pit.expire(10_000_151) && !pit.expire(10_000_151));
        assert_eq!(pit.next_event(), Some(20_000_302));
        assert!(pit.expire(95_000_000), "what was missed is one");
        assert_eq!(pit.next_event(), Some(100_001_509));
    }

    #[test]
    fn test_latch_holds_a_count_until_it_is_read() {
        let mut pit = Pit::default();
        set(&mut pit, 0x30, 1000, 0);
        pit.write(0x43, 0, 0);
        assert_eq!(read(&mut pit, 0, 500_000), 1000);
        assert_eq!(read(&mut pit, 0, 500_000), 1000 - 596);
    }

    #[test]
    fn test_channel_2_is_gated_and_its_output_is_in_port_61() {
        let mut pit = Pit::default();
        set(&mut pit, 0xb0, 1193, 0);
        assert_eq!(pit.read(0x61, 9_000_000) & 0x20, 0, "the gate is closed");
        pit.write(0x61, 1, 10_000_000);
        assert_eq!(pit.read(0x61, 10_900_000) & 0x21, 0x01);
        assert_eq!(pit.read(0x61, 11_000_000) & 0x21, 0x21);
    }

    #[test]
    fn test_one_interrupt_on_terminal_count() {
        let mut pit = Pit::default();
        set(&mut pit, 0x30, 0, 0);
        assert_eq!(pit.next_event(), Some(54_925_402), "0 is 65,536");
        assert!(pit.expire(60_000_000));
        assert_eq!(pit.next_event(), None);
    }

    #[test]
    fn test_status_tells_mode_and_output() {
        let mut pit = Pit::default();
        set(&mut pit, 0x36, 1000, 0);
        pit.write(0x43, 0xe2, 0);
        assert_eq!(pit.read(0x40, 0), 0x80 | 0x30 | 3 << 1);
        set(&mut pit, 0x31, 0x1234, 0);
        assert_eq!(read(&mut pit, 0, 0), 0x1234, "binary-coded decimals");
    }

    #[test]
    fn test_shortest_period_leaves_time_for_the_guest() {
        let mut pit = Pit::default();
        set(&mut pit, 0x34, 1, 0);
        assert!(pit.expire(1_000));
        assert!(pit.next_event() >= Some(10_000));
    }

    #[test]
    fn test_every_byte_at_every_port_is_taken_at_any_time() {
        let mut pit = Pit::default();
        let mut state = 1u64;
        let mut now = 0u64;
        for _ in 0..200_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let [.., value, choice] = state.to_le_bytes();
            let port = [0x40, 0x41, 0x42, 0x43, 0x61][usize::from(choice) % 5];
            now = now.saturating_add(state >> 30);
            pit.write(port, value, now);
            pit.read(port, now);
            pit.expire(now);
        }
        let _ = pit.expire(u64::MAX - 1);
    }
}
