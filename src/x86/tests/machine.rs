//! A small machine for tests of the whole CPU: page tables, descriptor tables, a handler for every vector that halts,
//! and a platform that notes what it is asked.

use crate::memory::{Backing, GuestMemory};
use crate::registers::{
    CR0_PE, CR0_PG, CR0_WP, CR4_OSFXSR, CR4_OSXSAVE, CR4_PAE, DescriptorTable, EFER_LMA, EFER_LME, EFER_NXE, RSP,
    Segment,
};
use crate::x86::{Cpu, CpuExit, MsrReply, Platform, Reply};

/// Where programs begin.
pub const CODE: u64 = 0x1_0000;
/// Top of the stack.
pub const STACK: u64 = 0x8_0000;
/// Data for programs.
pub const DATA: u64 = 0x10_0000;
/// An address that is mapped but not RAM.
pub const DEVICE: u64 = 0x50_0000;
/// The page table for the addresses from 2 MiB, of 4 KiB pages.
pub const TABLE: u64 = 0x4000;
/// First address that [`TABLE`] maps.
pub const PAGES: u64 = 0x20_0000;
/// Handlers, 16 bytes each.
pub const HANDLERS: u64 = 0x2_0000;
/// Selectors.
pub const CODE0: u16 = 0x08;
pub const DATA0: u16 = 0x10;
pub const DATA3: u16 = 0x1b;
pub const CODE3: u16 = 0x23;
pub const TASK: u16 = 0x28;

const PML4: u64 = 0x1000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const TSS: u64 = 0x7000;
const ALL: u64 = 7;

/// A platform that notes and answers as a test wants it.
#[derive(Default)]
pub struct Board {
    pub outs: Vec<(u16, Vec<u8>)>,
    /// Ports from here on are the VMM's.
    pub vmm_ports: u16,
    pub pending: Option<u8>,
    pub acknowledged: Vec<u8>,
    pub msrs: Vec<(u32, u64)>,
    pub priority: u8,
    pub leave: bool,
}

impl Platform for Board {
    fn port_read(&mut self, port: u16, data: &mut [u8], _now: u64) -> Reply {
        if port >= self.vmm_ports {
            return Reply::Unknown;
        }
        data.fill(0x5a);
        Reply::Done
    }

    fn port_write(&mut self, port: u16, data: &[u8], _now: u64) -> Reply {
        if port >= self.vmm_ports {
            return Reply::Unknown;
        }
        self.outs.push((port, data.to_vec()));
        if self.leave { Reply::Leave } else { Reply::Done }
    }

    fn owns_port(&mut self, port: u16, _size: usize, _is_in: bool) -> bool {
        port < self.vmm_ports
    }

    fn mmio_read(&mut self, _address: u64, _data: &mut [u8], _now: u64) -> Reply {
        Reply::Unknown
    }

    fn mmio_write(&mut self, _address: u64, _data: &[u8], _now: u64) -> Reply {
        Reply::Unknown
    }

    fn read_msr(&mut self, index: u32, _now: u64) -> MsrReply {
        if index == 0x1b { MsrReply::Done(0xfee0_0900) } else { MsrReply::Refused }
    }

    fn write_msr(&mut self, index: u32, value: u64, _now: u64) -> MsrReply {
        self.msrs.push((index, value));
        MsrReply::Leave
    }

    fn tsc(&mut self, now: u64) -> u64 {
        now * 2
    }

    fn pending_interrupt(&mut self, _now: u64) -> Option<u8> {
        self.pending
    }

    fn acknowledge_interrupt(&mut self, vector: u8, _now: u64) {
        self.pending = None;
        self.acknowledged.push(vector);
    }

    fn pause(&mut self, _now: u64) -> Reply {
        if self.leave { Reply::Leave } else { Reply::Done }
    }

    fn task_priority(&mut self) -> u8 {
        self.priority
    }

    fn set_task_priority(&mut self, priority: u8, _now: u64) {
        self.priority = priority;
    }
}

/// CPU, memory and board.
pub struct Rig {
    pub cpu: Cpu,
    pub memory: GuestMemory,
    pub board: Board,
}

fn segment(selector: u16, attributes: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes }
}

impl Rig {
    /// In ring 0, at the beginning of `code`.
    pub fn new(code: &[u8]) -> Self {
        let memory = GuestMemory::new(0, 4 << 20, Backing::default()).unwrap();
        write_tables(&memory);
        memory.write(CODE, code).unwrap();
        let mut cpu = Cpu::new(&memory);
        let mut state = cpu.snapshot();
        let system = &mut state.core.system;
        (system.cs, system.ss) = (segment(CODE0, 0xa09b), segment(DATA0, 0xc093));
        (system.ds, system.es) = (system.ss, system.ss);
        system.tr = Segment { selector: TASK, base: TSS, limit: 0x67, attributes: 0x8b };
        system.gdt = DescriptorTable { base: GDT, limit: 0x37 };
        system.idt = DescriptorTable { base: IDT, limit: 0xfff };
        system.cr0 = CR0_PE | CR0_PG | CR0_WP | 0x10;
        system.cr3 = PML4;
        system.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXSAVE | 1 << 10 | 1 << 16;
        system.efer = EFER_LME | EFER_LMA | EFER_NXE | 1;
        state.core.registers.rip = CODE;
        state.core.registers.general[RSP] = STACK;
        cpu.restore(&state);
        Self { cpu, memory, board: Board { vmm_ports: 0x400, ..Board::default() } }
    }

    /// Changes the state.
    pub fn with(mut self, change: impl FnOnce(&mut crate::x86::State)) -> Self {
        let mut state = self.cpu.snapshot();
        change(&mut state);
        self.cpu.restore(&state);
        self
    }

    /// Goes to ring 3, with the same code and stack.
    pub fn in_ring3(self) -> Self {
        self.with(|state| {
            state.core.system.cs = segment(CODE3, 0xa0fb);
            state.core.system.ss = segment(DATA3, 0xc0f3);
        })
    }

    /// Runs, at most 100,000 instructions.
    pub fn run(&mut self) -> CpuExit {
        self.cpu.run(&mut self.board, 100_000)
    }

    pub fn register(&self, index: usize) -> u64 {
        self.cpu.registers().general[index]
    }

    pub fn rip(&self) -> u64 {
        self.cpu.registers().rip
    }

    pub fn word(&self, address: u64) -> u64 {
        self.memory.read_object(address).unwrap()
    }

    /// The vector whose handler the CPU has halted in.
    pub fn vector(&self) -> u64 {
        (self.rip() - 1 - HANDLERS) / 16
    }

    /// The word `index` of what was pushed last.
    pub fn pushed(&self, index: u64) -> u64 {
        self.word(self.register(RSP) + 8 * index)
    }

    /// Sets the entry of a page of [`TABLE`].
    pub fn map(&self, page: u64, entry: u64) {
        self.memory.write_object(TABLE + 8 * page, entry).unwrap();
    }
}

fn write_tables(memory: &GuestMemory) {
    let put = |at: u64, value: u64| memory.write_object(at, value).unwrap();
    put(PML4, 0x2000 | ALL);
    put(0x2000, 0x3000 | ALL);
    put(0x3000, ALL | 1 << 7);
    put(0x3008, TABLE | ALL);
    put(0x3010, 0x40_0000 | ALL | 1 << 7);
    for page in 0..512 {
        put(TABLE + 8 * page, (PAGES + 0x1000 * page) | ALL);
    }
    let descriptors = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
    for (i, descriptor) in descriptors.into_iter().enumerate() {
        put(GDT + 8 * i as u64, descriptor);
    }
    put(GDT + 0x28, 0x0000_8900_0000_0067 | TSS << 16);
    put(GDT + 0x30, 0);
    for vector in 0..256 {
        let handler = HANDLERS + 16 * vector;
        let stack = if vector == 2 { 1 } else { 0 };
        let dpl = if vector == 3 || vector == 0x80 { 0x60 } else { 0 };
        put(
            IDT + 16 * vector,
            handler & 0xffff | u64::from(CODE0) << 16 | stack << 32 | (0x8e + dpl) << 40 | handler >> 16 << 48,
        );
        put(IDT + 16 * vector + 8, 0);
        memory.write(handler, &[0xf4]).unwrap();
    }
    put(TSS + 4, 0x9_0000);
    put(TSS + 0x24, 0xa_0000);
    // No permission bitmap.
    memory.write(TSS + 0x66, &[0x68, 0]).unwrap();
}
