//! A vCPU's local APIC (Intel SDM 3A, chapter 11) as registers in memory (xAPIC) or MSRs (x2APIC). It is plain state: who
//! owns it tells it the time, and sends the messages that a write gives back.

use super::apic_command::{Address, Delivery, Message};
use super::apic_timer::{Timer, TimerMode};
use super::vectors::Vectors;

/// Where the registers are after a reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;
/// IA32_APIC_BASE: this is the bootstrap processor.
const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
const BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: the APIC is on.
const BASE_ENABLED: u64 = 1 << 11;
/// Guest-physical addresses have so many bits.
const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// The first MSR of x2APIC mode; the others follow in the order of the registers.
pub const MSR_FIRST: u32 = 0x800;
/// The last MSR that is set aside for x2APIC mode.
pub const MSR_LAST: u32 = 0x8ff;

/// Six LVT entries, and the version that all CPUs of the last decades have.
const VERSION: u32 = 0x0005_0014;
const LVT_MASKED: u32 = 1 << 16;
const SVR_ENABLED: u32 = 1 << 8;
const SVR_WRITABLE: u32 = 0x3ff;
const ESR_SEND_ILLEGAL: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;
/// Bits of an interrupt command that mean something: vector, mode, level, trigger, shorthand.
const ICR_WRITABLE: u32 = 0x000c_cfff;

// Registers, by the number of their MSR: their offset in memory, divided by 16.
const ID: u16 = 0x02;
const VERSION_REGISTER: u16 = 0x03;
const TPR: u16 = 0x08;
const APR: u16 = 0x09;
const PPR: u16 = 0x0a;
const EOI: u16 = 0x0b;
const LDR: u16 = 0x0d;
const DFR: u16 = 0x0e;
const SVR: u16 = 0x0f;
const ISR: u16 = 0x10;
const TMR: u16 = 0x18;
const IRR: u16 = 0x20;
const ESR: u16 = 0x28;
const ICR_LOW: u16 = 0x30;
const ICR_HIGH: u16 = 0x31;
const LVT_TIMER: u16 = 0x32;
const LVT_ERROR: u16 = 0x37;
const TIMER_INITIAL: u16 = 0x38;
const TIMER_CURRENT: u16 = 0x39;
const TIMER_DIVIDE: u16 = 0x3e;
const SELF_IPI: u16 = 0x3f;

/// Positions in [`LocalApic::lvt`].
const TIMER: usize = 0;
const LINT0: usize = 3;
const ERROR: usize = 5;
/// What may be written to each LVT entry: timer, thermal, performance, LINT0, LINT1, error.
const LVT_WRITABLE: [u32; 6] = [0x0007_00ff, 0x0001_07ff, 0x0001_07ff, 0x0001_a7ff, 0x0001_a7ff, 0x0001_00ff];
/// LINT0 takes what the 8259 sends, which is how a PC's firmware leaves it.
const LVT_EXTINT: u32 = 7 << 8;

/// The access is a general-protection fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused;

/// What a write asks of the rest of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Send this.
    Send(Message),
    /// A level-triggered interrupt of this vector is over: tell the IOAPIC.
    End(u8),
}

/// The time at which a register is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moment {
    /// Nanoseconds of the machine's clock.
    pub now: u64,
    /// The vCPU's time stamp counter, which ticks as fast.
    pub tsc: u64,
}

/// A local APIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalApic {
    id: u32,
    base: u64,
    tpr: u32,
    ldr: u32,
    dfr: u32,
    svr: u32,
    icr: (u32, u32),
    lvt: [u32; 6],
    esr: u32,
    errors: u32,
    isr: Vectors,
    tmr: Vectors,
    irr: Vectors,
    timer: Timer,
    nmi: bool,
}

impl LocalApic {
    /// The APIC of vCPU `id` after a reset.
    pub fn new(id: u32) -> Self {
        let is_first = id == 0;
        let mut lvt = [LVT_MASKED; 6];
        if is_first {
            lvt[LINT0] = LVT_EXTINT;
        }
        Self {
            id,
            base: DEFAULT_BASE | BASE_ENABLED | if is_first { BASE_BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            icr: (0, 0),
            lvt,
            esr: 0,
            errors: 0,
            isr: Vectors::default(),
            tmr: Vectors::default(),
            irr: Vectors::default(),
            timer: Timer::default(),
            nmi: false,
        }
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Writes IA32_APIC_BASE as the guest does: reserved bits and changes of mode that a CPU does not make are refused.
    pub fn write_base(&mut self, value: u64) -> Result<(), Refused> {
        let mode = |base: u64| (base & BASE_ENABLED != 0, base & BASE_X2APIC != 0);
        let is_refused = matches!(
            (mode(self.base), mode(value)),
            (_, (false, true)) | ((true, true), (true, false)) | ((false, false), (true, true))
        );
        if value & !(BASE_ADDRESS | BASE_BSP | BASE_X2APIC | BASE_ENABLED) != 0 || is_refused {
            return Err(Refused);
        }
        self.set_base(value);
        Ok(())
    }

    /// Sets IA32_APIC_BASE from outside of the guest, whatever it was.
    pub fn set_base(&mut self, value: u64) {
        let is_on = value & BASE_ENABLED != 0;
        if !is_on && self.is_enabled() {
            *self = Self { base: self.base, lvt: [LVT_MASKED; 6], ..Self::new(self.id) };
        }
        self.base = value & (BASE_ADDRESS | BASE_BSP | BASE_ENABLED) | if is_on { value & BASE_X2APIC } else { 0 };
        if self.is_x2apic() {
            self.ldr = (self.id >> 4) << 16 | 1 << (self.id & 15);
        }
    }

    fn is_enabled(&self) -> bool {
        self.base & BASE_ENABLED != 0
    }

    /// Whether its registers are MSRs.
    pub fn is_x2apic(&self) -> bool {
        self.base & (BASE_ENABLED | BASE_X2APIC) == BASE_ENABLED | BASE_X2APIC
    }

    /// Guest-physical address of the page with its registers, if they are in memory.
    pub fn window(&self) -> Option<u64> {
        (self.is_enabled() && !self.is_x2apic()).then_some(self.base & BASE_ADDRESS)
    }

    /// Guest-physical address of that page, whether registers are in it now or not.
    pub fn page(&self) -> u64 {
        self.base & BASE_ADDRESS
    }

    /// How messages reach it.
    pub fn address(&self) -> Address {
        Address { id: self.id, logical: self.ldr, format: self.dfr, is_x2apic: self.is_x2apic() }
    }

    /// CR8: the upper half of the task priority.
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    /// Sets CR8.
    pub fn set_cr8(&mut self, value: u64) {
        let [low, ..] = value.to_le_bytes();
        self.tpr = u32::from(low & 0xf) << 4;
    }

    /// The processor priority: the task's, or that of what is in service if it is higher.
    pub fn priority(&self) -> u32 {
        let in_service = u32::from(self.isr.highest().unwrap_or(0)) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    /// The interrupt that the CPU would take now.
    #[inline]
    pub fn pending(&self) -> Option<u8> {
        let vector = self.irr.highest()?;
        (u32::from(vector) >> 4 > self.priority() >> 4 && self.is_active()).then_some(vector)
    }

    fn is_active(&self) -> bool {
        self.is_enabled() && self.svr & SVR_ENABLED != 0
    }

    /// The CPU takes the interrupt that is pending.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending()?;
        self.irr.remove(vector);
        self.isr.insert(vector);
        Some(vector)
    }

    /// Whether it lets through what the 8259 sends.
    pub fn takes_extint(&self) -> bool {
        !self.is_enabled() || self.lvt[LINT0] & (LVT_MASKED | LVT_EXTINT) == LVT_EXTINT
    }

    /// Whether an NMI waits.
    pub fn has_nmi(&self) -> bool {
        self.nmi
    }

    /// The CPU takes the NMI.
    pub fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }

    /// A message for this APIC arrives.
    pub fn accept(&mut self, message: &Message) {
        match message.delivery {
            Delivery::Fixed | Delivery::LowestPriority => self.raise(message.vector, message.is_level),
            Delivery::Nmi => self.nmi = self.nmi || self.is_enabled(),
            Delivery::Ignored => {}
        }
    }

    fn raise(&mut self, vector: u8, is_level: bool) {
        if !self.is_active() {
            return;
        }
        if vector < 16 {
            return self.fail(ESR_RECEIVE_ILLEGAL);
        }
        if is_level {
            self.tmr.insert(vector);
        } else {
            self.tmr.remove(vector);
        }
        self.irr.insert(vector);
    }

    fn fail(&mut self, error: u32) {
        self.errors |= error;
        let entry = self.lvt[ERROR];
        let [vector, ..] = entry.to_le_bytes();
        // An error entry with an illegal vector would be an error of its own, without end.
        if entry & LVT_MASKED == 0 && vector >= 16 {
            self.raise(vector, false);
        }
    }

    /// Brings the timer up to the time.
    pub fn advance(&mut self, now: u64) {
        if self.timer.expire(now) && self.lvt[TIMER] & LVT_MASKED == 0 {
            let [vector, ..] = self.lvt[TIMER].to_le_bytes();
            self.raise(vector, false);
        }
    }

    /// When the timer's next interrupt comes: never while its entry is masked.
    pub fn next_interrupt(&self) -> Option<u64> {
        self.timer.next().filter(|_| self.lvt[TIMER] & LVT_MASKED == 0)
    }

    /// When the timer's interrupt wakes a CPU that waits for one, as priorities are now.
    pub fn next_wake(&self) -> Option<u64> {
        let class = self.lvt[TIMER] >> 4 & 0xf;
        self.next_interrupt().filter(|_| class > self.priority() >> 4 && self.is_active())
    }

    /// IA32_TSC_DEADLINE.
    pub fn deadline(&self) -> u64 {
        self.timer.deadline()
    }

    /// Writes IA32_TSC_DEADLINE.
    pub fn set_deadline(&mut self, deadline: u64, moment: Moment) {
        let at = moment.now.saturating_add(deadline.saturating_sub(moment.tsc));
        self.timer.set_deadline(deadline, at);
        self.advance(moment.now);
    }

    /// The time stamp counter was set: a deadline is reached earlier or later.
    pub fn move_deadline(&mut self, moment: Moment) {
        if self.timer.deadline() != 0 {
            self.set_deadline(self.timer.deadline(), moment);
        }
    }

    /// A read at `offset` in the page of registers.
    pub fn read_memory(&mut self, offset: u64, now: u64, data: &mut [u8]) {
        data.fill(0);
        let (at, register) = (usize::try_from(offset & 0xf).unwrap_or(0), register_at(offset));
        if at + data.len() > 4 {
            return;
        }
        let value = self.read(register, now).unwrap_or_else(|| {
            self.fail(ESR_ILLEGAL_REGISTER);
            0
        });
        data.copy_from_slice(&value.to_le_bytes()[at..at + data.len()]);
    }

    /// A write at `offset` in the page of registers. Only aligned words of 32 bits mean anything (11.4.1).
    pub fn write_memory(&mut self, offset: u64, moment: Moment, data: &[u8]) -> Effect {
        let (Ok(bytes), true) = (<[u8; 4]>::try_from(data), offset.is_multiple_of(16)) else { return Effect::None };
        let value = u32::from_le_bytes(bytes);
        match register_at(offset) {
            LDR => self.ldr = value & 0xff00_0000,
            DFR => self.dfr = value | 0x0fff_ffff,
            ICR_HIGH => self.icr.1 = value & 0xff00_0000,
            ICR_LOW => return self.command(value & ICR_WRITABLE, self.icr.1),
            register => {
                return self.write(register, value, moment).unwrap_or_else(|Refused| {
                    if self.read(register, moment.now).is_none() {
                        self.fail(ESR_ILLEGAL_REGISTER);
                    }
                    Effect::None
                });
            }
        }
        Effect::None
    }

    /// A read of the MSR of x2APIC mode with that number from 0x800 on.
    pub fn read_msr(&self, index: u32, now: u64) -> Result<u64, Refused> {
        if !self.is_x2apic() {
            return Err(Refused);
        }
        match register_of(index) {
            APR | DFR | ICR_HIGH | EOI | SELF_IPI => Err(Refused),
            ICR_LOW => Ok(u64::from(self.icr.0) | u64::from(self.icr.1) << 32),
            register => self.read(register, now).map(u64::from).ok_or(Refused),
        }
    }

    /// A write of the MSR of x2APIC mode with that number from 0x800 on.
    pub fn write_msr(&mut self, index: u32, value: u64, moment: Moment) -> Result<Effect, Refused> {
        if !self.is_x2apic() {
            return Err(Refused);
        }
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        let (low, high) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        let register = register_of(index);
        if register == ICR_LOW {
            return if low & !ICR_WRITABLE == 0 { Ok(self.command(low, high)) } else { Err(Refused) };
        }
        let writable = match register {
            TPR | SELF_IPI => 0xff,
            EOI | ESR => 0,
            SVR => SVR_WRITABLE,
            LVT_TIMER..=LVT_ERROR => LVT_WRITABLE[usize::from(register - LVT_TIMER)],
            TIMER_INITIAL => u32::MAX,
            TIMER_DIVIDE => 0xb,
            _ => return Err(Refused),
        };
        if low & !writable != 0 || high != 0 {
            return Err(Refused);
        }
        if register == SELF_IPI {
            return Ok(self.command(1 << 18 | low, 0));
        }
        self.write(register, low, moment)
    }

    /// A register's value; `None` if there is none.
    fn read(&self, register: u16, now: u64) -> Option<u32> {
        Some(match register {
            ID if self.is_x2apic() => self.id,
            ID => self.id << 24,
            VERSION_REGISTER => VERSION,
            TPR => self.tpr,
            // Arbitration is over in an instant.
            APR | PPR => self.priority(),
            EOI => 0,
            LDR => self.ldr,
            DFR => self.dfr,
            SVR => self.svr,
            ISR..TMR => self.isr.register(register - ISR),
            TMR..IRR => self.tmr.register(register - TMR),
            IRR..ESR => self.irr.register(register - IRR),
            ESR => self.esr,
            ICR_LOW => self.icr.0,
            ICR_HIGH => self.icr.1,
            LVT_TIMER..=LVT_ERROR => self.lvt[usize::from(register - LVT_TIMER)],
            TIMER_INITIAL => self.timer.initial(),
            TIMER_CURRENT => self.timer.current(now),
            TIMER_DIVIDE => self.timer.divide(),
            _ => return None,
        })
    }

    /// Writes a register that both modes have; what isn't writable in it keeps its value.
    fn write(&mut self, register: u16, value: u32, moment: Moment) -> Result<Effect, Refused> {
        match register {
            TPR => self.tpr = value & 0xff,
            EOI => return Ok(self.end()),
            SVR => self.set_svr(value & SVR_WRITABLE),
            ESR => self.esr = std::mem::take(&mut self.errors),
            LVT_TIMER..=LVT_ERROR => self.set_lvt(usize::from(register - LVT_TIMER), value),
            TIMER_INITIAL => self.timer.set_initial(value, moment.now),
            TIMER_DIVIDE => self.timer.set_divide(value, moment.now),
            _ => return Err(Refused),
        }
        Ok(Effect::None)
    }

    fn set_svr(&mut self, value: u32) {
        self.svr = value;
        if value & SVR_ENABLED == 0 {
            self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
        }
    }

    fn set_lvt(&mut self, n: usize, value: u32) {
        let forced = if self.svr & SVR_ENABLED == 0 { LVT_MASKED } else { 0 };
        self.lvt[n] = value & LVT_WRITABLE[n] | forced;
        if n == TIMER {
            self.timer.set_mode(TimerMode::from_entry(value));
        }
    }

    /// The interrupt in service with the highest priority is over.
    fn end(&mut self) -> Effect {
        let Some(vector) = self.isr.highest() else { return Effect::None };
        self.isr.remove(vector);
        if self.tmr.contains(vector) { Effect::End(vector) } else { Effect::None }
    }

    fn command(&mut self, low: u32, high: u32) -> Effect {
        let is_self_ipi = low & !0xff == 1 << 18 && self.is_x2apic();
        if !is_self_ipi {
            self.icr = (low, high);
        }
        let message = Message::from_command(low, high, self.is_x2apic());
        if message.is_illegal() {
            self.fail(ESR_SEND_ILLEGAL);
            return Effect::None;
        }
        Effect::Send(message)
    }
}

fn register_at(offset: u64) -> u16 {
    u16::try_from(offset >> 4 & 0xff).expect("eight bits")
}

fn register_of(index: u32) -> u16 {
    u16::try_from(index.wrapping_sub(MSR_FIRST)).unwrap_or(u16::MAX)
}

#[cfg(test)]
#[path = "local_apic_tests.rs"]
mod tests;
