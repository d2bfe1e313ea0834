//! Where a step ends if the instruction leads elsewhere by a way that the trap flag does not follow: into a handler,
//! which is entered with the flag cleared, or out of one, with flags from the stack. A hypervisor steps by that flag; the
//! places are looked out for besides, with debug registers, and the flags that the guest gets are its own.

use super::bus::GuestBus;
use super::stepping::INT3;
use crate::backend::{Access, Exception, GuestDebug, HardwareBreakpoint};
use crate::error::Result;
use crate::paging::{self, PagingMode};
use crate::registers::{R11, RCX, RFLAGS_RF, RFLAGS_TF, RSP, Registers};
use crate::vcpu::Seat;
use crate::x86;

const IA32_LSTAR: u32 = 0xc000_0082;
/// EFER: SYSCALL is enabled.
const EFER_SCE: u64 = 1;
const INT: u8 = 0xcd;
const SYSCALL: [u8; 2] = [0x0f, 0x05];
const SYSRETQ: [u8; 3] = [0x48, 0x0f, 0x07];
const IRETQ: [u8; 2] = [0x48, 0xcf];
const GENERAL_PROTECTION: u8 = 13;
const PAGE_FAULT: u8 = 14;
/// What an instruction may raise that the emulator does not know, the likeliest first: #GP, #UD, #PF, #NM.
const LIKELY: [u8; 4] = [GENERAL_PROTECTION, 6, PAGE_FAULT, 7];
/// DR6.BS: a #DB is a trap flag's.
const DR6_SINGLE_STEP: u64 = 1 << 14;

impl Seat<'_> {
    /// Adds the places where the instruction at the program counter may lead to what a step looks out for. Watched data
    /// goes first, breakpoints elsewhere last.
    pub(super) fn look_out(&mut self, debug: &mut GuestDebug, code: &[u8], before: &Registers) -> Result<()> {
        let capabilities = self.machine.capabilities()?;
        if capabilities.exact_steps {
            return Ok(());
        }
        let places = self.landings(code, before)?;
        let (mut all, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut debug.hardware).into_iter().partition(|place| place.access != Access::Execute);
        all.extend(places.into_iter().filter(|at| *at != before.rip).map(HardwareBreakpoint::execute));
        all.extend(others);
        all.truncate(usize::try_from(capabilities.hardware_breakpoints).unwrap_or(usize::MAX));
        debug.hardware = all;
        Ok(())
    }

    fn landings(&mut self, code: &[u8], before: &Registers) -> Result<Vec<u64>> {
        if let [INT, vector, ..] = *code {
            return Ok(self.gate(vector.into())?.into_iter().collect());
        }
        if code.starts_with(&SYSCALL) && self.context().cpu.system_registers()?.efer & EFER_SCE != 0 {
            return Ok(vec![self.context().cpu.msr(IA32_LSTAR)?]);
        }
        if code.starts_with(&SYSRETQ) {
            return Ok(vec![before.general[RCX]]);
        }
        if code.starts_with(&IRETQ) {
            return Ok(self.stack_word(before, 0)?.into_iter().collect());
        }
        let mut places = Vec::new();
        for vector in self.predicted(code, before)? {
            places.extend(self.gate(vector.into())?);
        }
        Ok(places)
    }

    /// What the instruction is about to raise, as far as it can be told.
    fn predicted(&mut self, code: &[u8], before: &Registers) -> Result<Vec<u8>> {
        let mode = self.paging_mode()?;
        let is_executable = paging::translate(&self.machine.memory, &mode, before.rip).is_ok_and(|t| t.executable);
        if code.is_empty() || !is_executable {
            return Ok(vec![PAGE_FAULT, GENERAL_PROTECTION]);
        }
        if code.first() == Some(&INT3) {
            return Ok(vec![3]);
        }
        Ok(match self.trial(code, mode)? {
            x86::Outcome::Done | x86::Outcome::Repeat => Vec::new(),
            x86::Outcome::Fault { vector, .. } => vec![vector],
            x86::Outcome::Unsupported => LIKELY.to_vec(),
        })
    }

    /// Executes an instruction on a copy of the registers, with memory that keeps nothing.
    fn trial(&mut self, code: &[u8], mode: PagingMode) -> Result<x86::Outcome> {
        let mut state = self.emulator_state(code)?;
        let (view, memory) = (self.machine.view(), &self.machine.memory);
        let user = state.system.cs.selector & 3 == 3;
        let mut bus = GuestBus {
            view,
            memory,
            mode,
            user,
            watches: &[],
            recorder: Default::default(),
            one_iteration: true,
            is_trial: true,
        };
        Ok(x86::step_bytes(&mut state, &mut bus, code))
    }

    fn stack_word(&mut self, registers: &Registers, index: u64) -> Result<Option<u64>> {
        let mode = self.paging_mode()?;
        let mut word = [0; 8];
        let at = registers.general[RSP].wrapping_add(8 * index);
        Ok(self.machine.view().read(&mode, at, &mut word).is_ok().then(|| u64::from_le_bytes(word)))
    }

    /// Whether the guest itself sets its trap flag with the instruction that is about to execute.
    pub(super) fn restores_trap_flag(&mut self, code: &[u8], before: &Registers) -> Result<bool> {
        let flags = match *code {
            [0x9d, ..] | [0x66 | 0x48, 0x9d, ..] => self.stack_word(before, 0)?,
            _ if code.starts_with(&IRETQ) => self.stack_word(before, 2)?,
            _ if code.starts_with(&SYSRETQ) => Some(before.general[R11]),
            _ => None,
        };
        Ok(flags.is_some_and(|flags| flags & RFLAGS_TF != 0))
    }

    /// After a step by the trap flag over an instruction that the guest traces as well: its #DB is the guest's. SYSCALL
    /// has saved the flag, and interrupts by software have taken it away.
    pub(super) fn give_trap(&mut self, code: &[u8], before: &Registers) -> Result<()> {
        let is_interrupt = matches!(code.first(), Some(&(INT3 | INT))) || code.starts_with(&SYSCALL);
        let after = self.context().cpu.registers()?;
        if !is_interrupt && after.rip != before.rip {
            self.context().cpu.inject(Exception { vector: 1, error_code: None, address: Some(DR6_SINGLE_STEP) })?;
        }
        Ok(())
    }

    /// Takes the trap flag of a step out of what SYSCALL has saved of the flags, wherever the step ended.
    pub(super) fn clear_flag_of_syscall(&mut self, code: &[u8], before: &Registers) -> Result<()> {
        if !code.starts_with(&SYSCALL) || before.rflags & RFLAGS_TF != 0 {
            return Ok(());
        }
        let mut after = self.context().cpu.registers()?;
        let length = SYSCALL.len() as u64;
        let is_entered = after.general[RCX] == before.rip.wrapping_add(length);
        if is_entered && (after.general[R11] ^ before.rflags) & !RFLAGS_RF == RFLAGS_TF {
            after.general[R11] &= !RFLAGS_TF;
            self.context().cpu.set_registers(&after)?;
        }
        Ok(())
    }
}
