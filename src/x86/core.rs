//! The inside of a [`Cpu`](super::Cpu): its state, translation, and the slow executor, which decodes and executes one
//! instruction with everything that may come of it. The block engine does the rest faster and falls back to this.

use iced_x86::{Instruction, Mnemonic};

use super::bus::{CoreBus, Devices, Outside, fetch};
use super::cpu::{CpuExit, Missing};
use super::mmu::{Mmu, Mode, Watched};
use super::operand::Machine;
use super::platform::{Platform, Reply};
use super::privileged::{System, needs_machine};
use super::state::{DeviceAccess, Fault, State};
use super::string::CHUNK;
use super::{MAX_LENGTH, Outcome, checks_alignment, decode, execute_family};
use crate::memory::GuestMemory;
use crate::registers::{RCX, RFLAGS_RF, RFLAGS_TF, segment_attributes};

/// Decoded instructions that are kept, by address.
const DECODED: usize = 256;
/// DR6: a single step.
pub(super) const DR6_STEP: u64 = 1 << 14;

/// What became of one instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slow {
    /// It has retired (of a repeated one, a part).
    Retired,
    /// It has not: the guest is at the handler of an exception.
    Delivered,
    /// It has not: the VMM has to do something first.
    Exit(CpuExit),
}

/// A decoded instruction and its bytes.
#[derive(Clone, Copy)]
pub(super) struct Decoded {
    pub instruction: Instruction,
    pub code: [u8; MAX_LENGTH],
}

/// State and slow machinery of a CPU.
pub(super) struct Core {
    pub mmu: Mmu,
    pub state: State,
    pub devices: Devices,
    /// Leave at INT3.
    pub stop_at_int3: bool,
    /// Leave what another CPU has to do: [`Cpu::lend`](super::Cpu::lend).
    pub is_lent: bool,
    /// A debugger steps: repeated string instructions execute one iteration at a time.
    pub is_stepped: bool,
    /// What hooks will be told of, while there are any.
    pub trace: Option<Vec<Watched>>,
    /// An exit that the instruction asks for after it has retired.
    pub exit: Option<CpuExit>,
    decoded: Box<[Option<Decoded>]>,
}

impl Core {
    pub fn new(memory: &GuestMemory) -> Self {
        let mut core = Self {
            mmu: Mmu::new(memory),
            state: State::default(),
            devices: Devices::default(),
            stop_at_int3: false,
            is_lent: false,
            is_stepped: false,
            trace: None,
            exit: None,
            decoded: vec![None; DECODED].into_boxed_slice(),
        };
        core.mode_changed();
        core
    }

    /// Tells the MMU of control registers, privilege level and flags.
    pub fn mode_changed(&mut self) {
        self.mmu.set_mode(Mode::new(&self.state.core.system, self.state.core.registers.rflags));
    }

    /// The same, and that all translations are to be made anew.
    pub fn mode_renewed(&mut self) {
        self.mmu.set_mode_anew(Mode::new(&self.state.core.system, self.state.core.registers.rflags));
    }

    /// Whether code is of 64-bit mode.
    pub fn is_in_long_mode(&self) -> bool {
        self.state.core.system.cs.attributes & segment_attributes::L != 0
    }

    /// Refuses an instruction that needs what is missing.
    pub fn lack(&mut self, what: Missing) -> Outcome {
        self.exit = Some(CpuExit::Missing(what));
        Outcome::Unsupported
    }

    /// Executes the instruction at RIP and delivers what it raises.
    pub fn slow_step(&mut self, platform: &mut dyn Platform) -> Slow {
        let decoded = match self.decode() {
            Ok(decoded) => decoded,
            Err(fault) => return self.raise(fault),
        };
        self.slow_execute(&decoded, platform)
    }

    /// Decodes the instruction at RIP.
    pub fn decode(&mut self) -> Result<Decoded, Fault> {
        let rip = self.state.core.registers.rip;
        if !self.mmu.is_canonical(rip) {
            return Err(Fault::with_code(13, 0));
        }
        if !self.is_in_long_mode() {
            // The other modes are missing: no instruction is known there.
            return Err(Fault::plain(6));
        }
        let mut code = [0; MAX_LENGTH];
        let available = fetch(&mut self.mmu, rip, &mut code).map_err(|code| page_fault(rip, code))?;
        self.decode_bytes(code, available)
    }

    /// Decodes the instruction at RIP, of whose code so many bytes could be fetched.
    pub fn decode_bytes(&mut self, code: [u8; MAX_LENGTH], available: usize) -> Result<Decoded, Fault> {
        let rip = self.state.core.registers.rip;
        let slot = usize::try_from(rip % DECODED as u64).expect("a small number");
        if let Some(known) = &self.decoded[slot]
            && known.instruction.ip() == rip
            && known.instruction.len() <= available
            && known.code[..known.instruction.len()] == code[..known.instruction.len()]
        {
            return Ok(*known);
        }
        match decode(&code[..available], rip) {
            Ok(instruction) => {
                let decoded = Decoded { instruction, code };
                self.decoded[slot] = Some(decoded);
                Ok(decoded)
            }
            Err(Outcome::Fault { vector, error_code, address }) => Err(Fault { vector, error_code, address }),
            // Cut short: the rest is not mapped, or not RAM.
            Err(_) => {
                let next = rip.wrapping_add(available as u64);
                match self.mmu.translate_code(next) {
                    Err(error) if self.mmu.is_canonical(next) => Err(page_fault(next, error)),
                    _ => Err(Fault::with_code(13, 0)),
                }
            }
        }
    }

    /// Executes a decoded instruction, which stands at RIP, and delivers what it raises.
    pub fn slow_execute(&mut self, decoded: &Decoded, platform: &mut dyn Platform) -> Slow {
        let instruction = &decoded.instruction;
        let code = &decoded.code[..instruction.len()];
        let traps = self.state.core.registers.rflags & RFLAGS_TF != 0;
        if self.is_lent && (traps || is_foreign(instruction)) {
            return Slow::Exit(CpuExit::Foreign(None));
        }
        let had_shadow = std::mem::take(&mut self.state.interrupt_shadow);
        let had_trap_shadow = std::mem::take(&mut self.state.trap_shadow);
        (self.devices, self.exit) = (Devices::default(), None);
        let outcome = self.execute(instruction, code, platform);
        let shadows = (had_shadow, had_trap_shadow);
        match outcome {
            Outcome::Done => {
                let traps = self.traps_after(instruction.mnemonic(), traps);
                self.retire(1, traps, platform)
            }
            Outcome::Repeat => {
                // A repeated instruction that was cut short by a fault to come has not retired yet.
                let left = self.state.core.registers.general[RCX];
                let is_port = is_port_string(instruction);
                let retired = u64::from(is_port || left.is_multiple_of(CHUNK));
                self.retire(retired, traps, platform)
            }
            Outcome::Fault { vector, error_code, address } => {
                let fault = Fault { vector, error_code, address };
                self.give_up(shadows);
                self.raise(fault)
            }
            Outcome::Unsupported => {
                if let Some(exit) = self.exit.take() {
                    (self.state.interrupt_shadow, self.state.trap_shadow) = shadows;
                    return Slow::Exit(exit);
                }
                if let Some(access) = self.devices.blocked {
                    (self.state.interrupt_shadow, self.state.trap_shadow) = shadows;
                    self.state.pending_read = Some(access);
                    return Slow::Exit(read_exit(&access));
                }
                self.give_up(shadows);
                if self.is_lent {
                    return Slow::Exit(CpuExit::Foreign(None));
                }
                self.raise(Fault::plain(6))
            }
        }
    }

    /// Whether TF traps after an instruction that began with it as `traps` says. SYSCALL and SYSRET trap by what the flag
    /// is afterwards; interrupts by software take it away.
    fn traps_after(&self, mnemonic: Mnemonic, traps: bool) -> bool {
        use Mnemonic as M;
        match mnemonic {
            M::Syscall | M::Sysretq => self.state.core.registers.rflags & RFLAGS_TF != 0,
            M::Int | M::Int3 | M::Int1 => false,
            _ => traps && !self.state.trap_shadow,
        }
    }

    /// Forgets what an instruction that has not retired was about.
    fn give_up(&mut self, shadows: (bool, bool)) {
        (self.state.interrupt_shadow, self.state.trap_shadow) = shadows;
        self.state.answers = Default::default();
        self.devices = Devices::default();
    }

    fn execute(&mut self, instruction: &Instruction, code: &[u8], platform: &mut dyn Platform) -> Outcome {
        let before = self.state.core.registers;
        self.state.core.registers.rip = instruction.next_ip();
        let mut system = System { core: self, platform, instruction, code };
        match system.execute() {
            Ok(true) => Outcome::Done,
            Ok(false) => {
                self.state.core.registers = before;
                let (cpu, mut bus) = self.operand_bus(platform);
                execute_family(cpu, &mut bus, instruction, code)
            }
            Err(outcome) => {
                if outcome != Outcome::Repeat {
                    self.state.core.registers = before;
                }
                outcome
            }
        }
    }

    /// The registers and a bus for an instruction; without a platform it refuses devices and what is watched.
    pub fn bus<'a>(
        &'a mut self,
        platform: Option<&'a mut (dyn Platform + 'a)>,
    ) -> (&'a mut super::CpuState, CoreBus<'a>) {
        let state = &mut self.state;
        let checks_alignment = checks_alignment(&state.core);
        let one_iteration = self.is_stepped || state.core.registers.rflags & RFLAGS_TF != 0;
        let now = state.instructions;
        let (devices, answers) = (&mut self.devices, &mut state.answers);
        let outside = platform.map(|platform| Outside { platform, devices, answers, now });
        let bus = CoreBus {
            mmu: &mut self.mmu,
            outside,
            random: &mut state.random,
            trace: self.trace.as_mut(),
            checks_alignment,
            one_iteration,
        };
        (&mut state.core, bus)
    }

    /// The bus for memory operands: a lent CPU has no devices there.
    fn operand_bus<'a>(&'a mut self, platform: &'a mut (dyn Platform + 'a)) -> (&'a mut super::CpuState, CoreBus<'a>) {
        if self.is_lent { self.bus(None) } else { self.bus(Some(platform)) }
    }

    /// After an instruction: its writes to devices, what it changed in the mode, and the trap that TF asks for.
    fn retire(&mut self, count: u64, traps: bool, platform: &mut dyn Platform) -> Slow {
        self.state.instructions += count;
        self.state.answers = Default::default();
        self.mode_changed();
        self.write_devices(platform);
        if self.devices.leave {
            self.exit.get_or_insert(CpuExit::Platform);
        }
        if traps {
            self.debug_trap(DR6_STEP);
        }
        Slow::Retired
    }

    fn write_devices(&mut self, platform: &mut dyn Platform) {
        let now = self.state.instructions;
        while let Some(access) = self.devices.writes.pop_front() {
            let reply = if access.is_port {
                let port = u16::try_from(access.address).expect("a port");
                platform.port_write(port, access.bytes(), now)
            } else {
                platform.mmio_write(access.address, access.bytes(), now)
            };
            self.devices.leave |= reply == Reply::Leave;
            if reply == Reply::Unknown {
                // There is room: the list is as long as the one that it comes from, and empty before the instruction.
                self.state.pending_writes.push(access);
            }
        }
    }

    /// A trap of the debug registers or of TF, delivered before the next instruction.
    pub fn debug_trap(&mut self, reason: u64) {
        let also = match self.state.injected {
            Some(Fault { vector: 1, address: Some(bits), .. }) => bits,
            _ => 0,
        };
        self.state.injected = Some(Fault { vector: 1, error_code: None, address: Some(reason | also) });
    }

    /// Delivers an exception of the instruction at RIP.
    pub fn raise(&mut self, fault: Fault) -> Slow {
        if self.is_lent {
            return Slow::Exit(CpuExit::Foreign(Some(fault)));
        }
        let is_fault = !matches!(fault.vector, 1 | 3 | 4);
        let flags = self.state.core.registers.rflags | if is_fault { RFLAGS_RF } else { 0 };
        if self.deliver_exception(fault, flags) { Slow::Delivered } else { Slow::Exit(CpuExit::Shutdown) }
    }

    /// A [`Machine`] for the operands of an instruction.
    pub fn with_machine<R>(
        &mut self,
        platform: &mut dyn Platform,
        instruction: &Instruction,
        code: &[u8],
        act: impl FnOnce(&mut Machine) -> R,
    ) -> R {
        let (cpu, mut bus) = self.operand_bus(platform);
        act(&mut Machine { cpu, bus: &mut bus, instruction, code })
    }
}

/// Whether a lent CPU leaves the instruction to its owner.
fn is_foreign(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let is_own = matches!(instruction.mnemonic(), M::Cli | M::Sti | M::Popfq | M::Popf | M::In | M::Out | M::Enter);
    shows_machine(instruction) || needs_machine(instruction) && !is_own
}

/// Whether an instruction shows or changes what the CPU has not got in its registers: the time, chance, XCR0.
pub(super) fn shows_machine(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let mnemonic = instruction.mnemonic();
    matches!(mnemonic, M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdrand | M::Rdseed | M::Xgetbv | M::Wrfsbase | M::Wrgsbase)
        || matches!(mnemonic, M::Xsave | M::Xsave64 | M::Xsavec | M::Xsavec64 | M::Xsaveopt | M::Xsaveopt64)
        || matches!(mnemonic, M::Xsaves | M::Xsaves64 | M::Xrstor | M::Xrstor64 | M::Xrstors | M::Xrstors64)
}

fn page_fault(address: u64, code: u32) -> Fault {
    Fault { vector: 14, error_code: Some(code), address: Some(address) }
}

/// INS and OUTS retire element by element.
fn is_port_string(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(instruction.mnemonic(), M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd)
}

/// The exit that asks the VMM for a read.
pub(super) fn read_exit(access: &DeviceAccess) -> CpuExit {
    match u16::try_from(access.address) {
        Ok(port) if access.is_port => CpuExit::PortIn { port, size: access.size },
        _ => CpuExit::MmioRead { address: access.address, size: access.size.into() },
    }
}

/// The exit that tells the VMM of a write.
pub(super) fn write_exit(access: &DeviceAccess) -> CpuExit {
    let [a, b, c, d, ..] = access.data;
    match u16::try_from(access.address) {
        Ok(port) if access.is_port => {
            CpuExit::PortOut { port, size: access.size, value: u32::from_le_bytes([a, b, c, d]) }
        }
        _ => CpuExit::MmioWrite { address: access.address, size: access.size.into() },
    }
}
