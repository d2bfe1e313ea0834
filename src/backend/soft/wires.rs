//! What a CPU finds around itself while it executes: the machine's devices, at the time that its instructions have come to.

use super::board::{Board, Interrupt};
use super::clock::Clock;
use super::cpuid;
use super::local_apic::Moment;
use super::machine::Shared;
use crate::devices::pci::Firmware;
use crate::x86::{MsrReply, Platform, Reply};

const IA32_TSC: u32 = 0x10;
const IA32_TSC_ADJUST: u32 = 0x3b;
/// The end-of-interrupt register, in memory and as an MSR: nothing has to be rescheduled for it.
const EOI_OFFSET: u64 = 0xb0;
const EOI_MSR: u32 = 0x80b;

/// The wires of one vCPU for one slice.
pub(super) struct Wires<'a> {
    pub shared: &'a Shared,
    pub vcpu: usize,
    pub number: u32,
    pub cpus: u32,
    /// The clock when the CPU's count was `start`.
    pub clock: Clock,
    /// The CPU's count of instructions at the start of the slice.
    pub start: u64,
    /// PAUSE was executed, and there are other vCPUs to go on.
    pub pauses: bool,
    /// What to add to the machine's time for the time stamp counter.
    pub tsc_offset: &'a mut u64,
}

impl Wires<'_> {
    fn moment(&self, count: u64) -> Moment {
        let now = self.clock.after(count.wrapping_sub(self.start));
        Moment { now, tsc: now.wrapping_add(*self.tsc_offset) }
    }

    /// A read of an MSR that is the machine's.
    pub fn msr(&self, index: u32, moment: Moment) -> Option<u64> {
        match index {
            IA32_TSC => Some(moment.tsc),
            IA32_TSC_ADJUST => Some(*self.tsc_offset),
            _ if Board::has_msr(index) => self.shared.lock().board.read_msr(self.vcpu, index, moment).ok(),
            _ => None,
        }
    }

    /// A write of an MSR that is the machine's; false if there is no such, or it does not take the value.
    pub fn set_msr(&mut self, index: u32, value: u64, moment: Moment) -> bool {
        match index {
            IA32_TSC => *self.tsc_offset = value.wrapping_sub(moment.now),
            IA32_TSC_ADJUST => *self.tsc_offset = value,
            _ => {
                return Board::has_msr(index)
                    && self.shared.lock().board.write_msr(self.vcpu, index, value, moment).is_ok();
            }
        }
        let moment = Moment { tsc: moment.now.wrapping_add(*self.tsc_offset), ..moment };
        self.shared.lock().board.apic_mut(self.vcpu).move_deadline(moment);
        true
    }

    pub fn moment_now(&self) -> Moment {
        self.moment(self.start)
    }
}

fn done(is_known: bool) -> Reply {
    if is_known { Reply::Done } else { Reply::Unknown }
}

impl Platform for Wires<'_> {
    fn port_read(&mut self, port: u16, data: &mut [u8], now: u64) -> Reply {
        let now = self.moment(now).now;
        done(self.shared.lock().board.read_port(port, now, data))
    }

    fn port_write(&mut self, port: u16, data: &[u8], now: u64) -> Reply {
        let now = self.moment(now).now;
        let is_known = self.shared.lock().board.write_port(port, now, data);
        if is_known { Reply::Leave } else { Reply::Unknown }
    }

    fn mmio_read(&mut self, address: u64, data: &mut [u8], now: u64) -> Reply {
        let moment = self.moment(now);
        let is_known = self.shared.lock().board.read_memory(self.vcpu, address, moment, data);
        if !is_known && Firmware::contains(address) {
            // No tables are there, and kernels look for them at every place that they may begin.
            data.fill(0);
            return Reply::Done;
        }
        done(is_known)
    }

    fn mmio_write(&mut self, address: u64, data: &[u8], now: u64) -> Reply {
        let moment = self.moment(now);
        let is_known = self.shared.lock().board.write_memory(self.vcpu, address, moment, data);
        match is_known {
            false => Reply::Unknown,
            true if address & 0xfff == EOI_OFFSET => Reply::Done,
            true => Reply::Leave,
        }
    }

    fn read_msr(&mut self, index: u32, now: u64) -> MsrReply {
        self.msr(index, self.moment(now)).map_or(MsrReply::Refused, MsrReply::Done)
    }

    fn write_msr(&mut self, index: u32, value: u64, now: u64) -> MsrReply {
        match self.set_msr(index, value, self.moment(now)) {
            false => MsrReply::Refused,
            true if index == EOI_MSR => MsrReply::Done(0),
            true => MsrReply::Leave,
        }
    }

    fn tsc(&mut self, now: u64) -> u64 {
        self.moment(now).tsc
    }

    fn pause(&mut self, _now: u64) -> Reply {
        self.pauses = self.cpus > 1;
        if self.pauses { Reply::Leave } else { Reply::Done }
    }

    fn pending_interrupt(&mut self, now: u64) -> Option<u8> {
        let now = self.moment(now).now;
        let mut inner = self.shared.lock();
        inner.board.advance(now);
        match inner.board.pending(self.vcpu) {
            Some(Interrupt::Maskable) => inner.board.vector(self.vcpu),
            _ => None,
        }
    }

    fn acknowledge_interrupt(&mut self, _vector: u8, _now: u64) {
        self.shared.lock().board.acknowledge(self.vcpu);
    }

    fn task_priority(&mut self) -> u8 {
        let [low, ..] = self.shared.lock().board.apic(self.vcpu).cr8().to_le_bytes();
        low
    }

    fn set_task_priority(&mut self, priority: u8, _now: u64) {
        self.shared.lock().board.apic_mut(self.vcpu).set_cr8(priority.into());
    }

    fn cpuid(&mut self, leaf: u32, subleaf: u32, table: [u32; 4]) -> [u32; 4] {
        cpuid::cpuid(leaf, subleaf, table, self.number, self.cpus)
    }
}
