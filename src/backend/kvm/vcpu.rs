//! A vCPU of KVM: KVM_RUN and what comes back from it, registers through the shared page where that saves an ioctl,
//! guest debug, injection.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO,
    KVM_EXIT_IO_OUT, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT,
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP, KVM_INTERNAL_ERROR_EMULATION, KVM_SYNC_X86_REGS, KVM_VCPUEVENT_VALID_SHADOW, Msrs,
    kvm_guest_debug, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_run, kvm_xsave,
};
use kvm_ioctls::{SyncReg, VcpuFd};

use super::xsave::{Layout, XSTATE_BV, XSTATE_X87_SSE};
use super::{convert, failed, kick};
use crate::backend::{
    Access, DebugEvent, Exception, Exit, Failure, GuestDebug, HardwareBreakpoint, Kick, Vcpu, signal,
};
use crate::error::{Error, Result};
use crate::registers::{ExtendedState, Extensions, FpuState, Registers, SystemRegisters};
use crate::x86;

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
/// The general registers come with each exit for so many exits after somebody last asked for them. A guest that needs
/// them at each exit (hypercalls of interface 2, breakpoints) saves an ioctl; one that never does, saves the copy.
const SYNC_EXITS: u8 = 64;
const DR7_RESERVED: u64 = 0x400;
/// DR7.LE and GE: exact breakpoints.
const DR7_EXACT: u64 = 0x300;

/// A vCPU of KVM.
pub struct KvmVcpu {
    fd: VcpuFd,
    kick: Arc<kick::KvmKick>,
    /// Exits that still bring the general registers with them.
    sync_exits: u8,
    /// The shared page holds the current general registers.
    synced: bool,
    /// The shared page holds registers that KVM takes at the next KVM_RUN.
    dirty: bool,
    io: Option<IoAccess>,
    /// The system registers, until the guest runs or somebody sets them.
    system: Option<SystemRegisters>,
    debug: GuestDebug,
    debugging: bool,
    /// An exception is given to KVM, at this program counter, and the guest has not run since.
    injected: Option<u64>,
    /// See [`Vcpu::changes`].
    changes: u64,
    layout: Layout,
}

/// Where the data of the last port or memory access lies in the shared page.
#[derive(Clone, Copy)]
struct IoAccess {
    offset: usize,
    length: usize,
    /// KVM finishes it at the next KVM_RUN.
    pending: bool,
}

impl KvmVcpu {
    pub(super) fn new(fd: VcpuFd, layout: Layout) -> Result<Self> {
        let mut vcpu = Self {
            fd,
            kick: Arc::new(kick::KvmKick::new()),
            sync_exits: 0,
            synced: false,
            dirty: false,
            io: None,
            system: None,
            debug: GuestDebug::default(),
            debugging: false,
            injected: None,
            changes: 0,
            layout,
        };
        vcpu.set_msr(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS)?;
        // All vCPUs of a Hermit guest start at the entry point; there is no INIT and no SIPI.
        vcpu.fd
            .set_mp_state(kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE })
            .map_err(failed("KVM_SET_MP_STATE"))?;
        Ok(vcpu)
    }

    pub(super) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    pub(super) fn has_injected(&self) -> bool {
        self.injected.is_some()
    }

    fn page(&mut self) -> &mut kvm_run {
        self.fd.get_kvm_run()
    }

    fn immediate_exit(&mut self) -> &AtomicU8 {
        let flag: *mut u8 = &mut self.page().immediate_exit;
        // SAFETY: the byte lives as long as the page, has no alignment, and everybody who touches it does so atomically.
        unsafe { AtomicU8::from_ptr(flag) }
    }

    /// KVM_RUN. `Ok(false)`: interrupted.
    #[inline]
    fn enter(&mut self) -> Result<bool> {
        if self.sync_exits > 0 {
            self.count_sync_exit();
        }
        self.io = None;
        self.system = None;
        // SAFETY: a vCPU fd; what the guest does stays in guest memory.
        let result = unsafe { kvm_run(self.fd.as_raw_fd()) };
        self.dirty = false;
        self.synced = self.sync_exits > 0;
        if result != 0 {
            return interrupted(result);
        }
        self.injected = None;
        Ok(true)
    }

    #[cold]
    fn count_sync_exit(&mut self) {
        self.sync_exits -= 1;
        if self.sync_exits == 0 {
            self.fd.clear_sync_valid_reg(SyncReg::Register);
        }
    }

    /// After an interruption: an exception that was given may still wait to be delivered.
    #[cold]
    fn look_for_delivery(&mut self) -> Result<()> {
        if let Some(given_at) = self.injected
            && self.registers()?.rip != given_at
        {
            self.injected = None;
        }
        Ok(())
    }

    #[inline]
    fn decode(&mut self) -> Exit {
        // The two that come by the thousand, without a jump table.
        let reason = self.page().exit_reason;
        if reason == KVM_EXIT_IO {
            return self.decode_io();
        }
        if reason == KVM_EXIT_MMIO {
            return self.decode_mmio();
        }
        self.decode_rare()
    }

    #[inline(never)]
    fn decode_rare(&mut self) -> Exit {
        let page = self.page();
        match page.exit_reason {
            KVM_EXIT_HLT => Exit::Hlt,
            KVM_EXIT_DEBUG => self.decode_debug(),
            KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            // A reset or power-off request through a paravirtual interface ends the guest like a shutdown cycle.
            KVM_EXIT_SYSTEM_EVENT => Exit::Shutdown,
            KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN => Exit::Interrupted,
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: the exit reason names the union's field.
                let suberror = unsafe { page.__bindgen_anon_1.internal.suberror };
                if suberror == KVM_INTERNAL_ERROR_EMULATION {
                    Exit::Unemulated
                } else {
                    Exit::Failed(Failure::Internal { suberror })
                }
            }
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: the exit reason names the union's field.
                let reason = unsafe { page.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason };
                Exit::Failed(Failure::Entry { reason })
            }
            reason => Exit::Failed(Failure::UnexpectedExit { reason }),
        }
    }

    #[inline]
    fn decode_io(&mut self) -> Exit {
        // SAFETY: the exit reason names the union's field.
        let io = unsafe { self.page().__bindgen_anon_1.io };
        let length = usize::from(io.size) * io.count as usize;
        let offset = usize::try_from(io.data_offset).expect("an offset into the shared page");
        self.io = Some(IoAccess { offset, length, pending: true });
        let (port, size, count) = (io.port, io.size, io.count);
        if u32::from(io.direction) != KVM_EXIT_IO_OUT {
            return Exit::IoIn { port, size, count };
        }
        let value = match *self.io_data() {
            [a, b, c, d, ..] if size == 4 => u32::from_le_bytes([a, b, c, d]),
            [a, b, ..] if size == 2 => u16::from_le_bytes([a, b]).into(),
            [a, ..] => a.into(),
            [] => 0,
        };
        Exit::IoOut { port, size, count, value }
    }

    #[inline]
    fn decode_mmio(&mut self) -> Exit {
        let page = self.page();
        let base = std::ptr::from_ref(page) as usize;
        // SAFETY: the exit reason names the union's field.
        let mmio = unsafe { &page.__bindgen_anon_1.mmio };
        let (address, size, write) = (mmio.phys_addr, (mmio.len as usize).min(mmio.data.len()), mmio.is_write != 0);
        let offset = mmio.data.as_ptr() as usize - base;
        self.io = Some(IoAccess { offset, length: size, pending: true });
        if write { Exit::MmioWrite { address, size } } else { Exit::MmioRead { address, size } }
    }

    fn decode_debug(&mut self) -> Exit {
        // SAFETY: the exit reason names the union's field.
        let arch = unsafe { self.page().__bindgen_anon_1.debug.arch };
        let software = arch.exception == 3;
        let [low, ..] = arch.dr6.to_le_bytes();
        Exit::Debug(DebugEvent {
            software,
            single_step: !software && arch.dr6 & (1 << 14) != 0,
            hardware: if software { 0 } else { u64::from(low & 0xf) },
            access: None,
            pc: arch.pc,
        })
    }

    /// Hands registers that wait in the shared page to KVM.
    fn flush_registers(&mut self) -> Result<()> {
        if self.dirty {
            let regs: kvm_regs = self.fd.sync_regs().regs;
            self.fd.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
            self.fd.clear_sync_dirty_reg(SyncReg::Register);
            self.dirty = false;
        }
        Ok(())
    }

    fn xsave_area(&self) -> Result<kvm_xsave> {
        self.fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))
    }

    fn set_xsave_area(&mut self, area: &kvm_xsave) -> Result<()> {
        self.changes += 1;
        // SAFETY: no feature that makes the area larger than 4 KiB was enabled for this process's guests.
        unsafe { self.fd.set_xsave(area) }.map_err(failed("KVM_SET_XSAVE"))
    }

    fn arm(&mut self) -> Result<()> {
        let debug = &self.debug;
        let on = |wanted: bool, flag: u32| if wanted { flag } else { 0 };
        let hardware = !debug.hardware.is_empty();
        let mut request = kvm_guest_debug {
            control: on(debug.single_step, KVM_GUESTDBG_SINGLESTEP)
                | on(debug.single_step && debug.block_interrupts, KVM_GUESTDBG_BLOCKIRQ)
                | on(debug.software_breakpoints, KVM_GUESTDBG_USE_SW_BP)
                | on(hardware, KVM_GUESTDBG_USE_HW_BP),
            ..Default::default()
        };
        if request.control != 0 {
            request.control |= KVM_GUESTDBG_ENABLE;
        }
        if hardware {
            request.arch.debugreg[7] = DR7_RESERVED | DR7_EXACT;
            for (i, breakpoint) in debug.hardware.iter().take(DEBUG_REGISTERS).enumerate() {
                request.arch.debugreg[i] = breakpoint.address;
                request.arch.debugreg[7] |= 2 << (2 * i) | dr7_condition(breakpoint) << (16 + 4 * i);
            }
        }
        self.debugging = request.control != 0;
        self.fd.set_guest_debug(&request).map_err(failed("KVM_SET_GUEST_DEBUG"))
    }
}

/// DR0 to DR3.
const DEBUG_REGISTERS: usize = 4;

/// The R/W and LEN fields of DR7 (Intel SDM 3B, 19.2.4).
fn dr7_condition(breakpoint: &HardwareBreakpoint) -> u64 {
    let access = match breakpoint.access {
        Access::Execute => return 0,
        Access::Write => 1,
        Access::Read | Access::ReadWrite => 3,
    };
    let length = match breakpoint.length {
        2 => 1,
        4 => 3,
        8 => 2,
        _ => 0,
    };
    access | length << 2
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kick.unbind();
    }
}

impl Vcpu for KvmVcpu {
    fn bind_to_current_thread(&mut self) -> Result<()> {
        signal::unblock()?;
        let flag: *const AtomicU8 = self.immediate_exit();
        self.kick.bind(flag)
    }

    fn unbind(&mut self) {
        self.kick.unbind();
    }

    #[unsafe(link_section = "exit_path")]
    fn run(&mut self) -> Result<Exit> {
        if self.enter()? {
            return Ok(self.decode());
        }
        self.immediate_exit().store(0, std::sync::atomic::Ordering::SeqCst);
        self.kick.take();
        self.look_for_delivery()?;
        Ok(Exit::Interrupted)
    }

    fn complete_io(&mut self) -> Result<Option<Exit>> {
        if !self.io.is_some_and(|io| io.pending) {
            return Ok(None);
        }
        self.immediate_exit().store(1, std::sync::atomic::Ordering::SeqCst);
        let left = self.enter();
        self.immediate_exit().store(0, std::sync::atomic::Ordering::SeqCst);
        if self.kick.is_kicked() {
            // It came meanwhile, and is for the next `run`.
            self.immediate_exit().store(1, std::sync::atomic::Ordering::SeqCst);
        }
        Ok(if left? { Some(self.decode()) } else { None })
    }

    fn io_data(&mut self) -> &mut [u8] {
        let Some(IoAccess { offset, length, .. }) = self.io else { return &mut [] };
        let base = std::ptr::from_mut(self.page()).cast::<u8>();
        // SAFETY: KVM placed the data at this offset of the mapping that begins with the kvm_run struct, and the
        // borrow of `self` keeps KVM_RUN from running meanwhile.
        unsafe { std::slice::from_raw_parts_mut(base.add(offset), length) }
    }

    fn registers(&mut self) -> Result<Registers> {
        if !self.synced && !self.dirty {
            let regs = self.fd.get_regs().map_err(failed("KVM_GET_REGS"))?;
            self.fd.sync_regs_mut().regs = regs;
            self.synced = true;
        }
        if self.sync_exits == 0 {
            self.fd.set_sync_valid_reg(SyncReg::Register);
        }
        self.sync_exits = SYNC_EXITS;
        Ok(Registers::from(&self.fd.sync_regs_mut().regs))
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<()> {
        debug_assert!(!self.io.is_some_and(|io| io.pending), "registers are set after complete_io");
        self.changes += 1;
        self.fd.sync_regs_mut().regs = registers.into();
        self.fd.set_sync_dirty_reg(SyncReg::Register);
        self.dirty = true;
        self.synced = true;
        Ok(())
    }

    fn system_registers(&mut self) -> Result<SystemRegisters> {
        if let Some(known) = self.system {
            return Ok(known);
        }
        let found = SystemRegisters::from(&self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?);
        self.system = Some(found);
        Ok(found)
    }

    fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<()> {
        self.changes += 1;
        self.system = None;
        let mut sregs = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        convert::apply(registers, &mut sregs);
        self.fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))
    }

    fn fpu(&mut self) -> Result<FpuState> {
        Ok(convert::fpu(&self.xsave_area()?.region))
    }

    fn set_fpu(&mut self, fpu: &FpuState) -> Result<()> {
        let mut area = self.xsave_area()?;
        area.region[XSTATE_BV] |= XSTATE_X87_SSE;
        convert::put_fpu(fpu, &mut area.region);
        self.set_xsave_area(&area)
    }

    fn ymm_high(&mut self) -> Result<[u128; 16]> {
        Ok(self.layout.ymm_high(&self.xsave_area()?.region))
    }

    fn set_ymm_high(&mut self, high: &[u128; 16]) -> Result<()> {
        let mut area = self.xsave_area()?;
        self.layout.put_ymm_high(high, &mut area.region);
        self.set_xsave_area(&area)
    }

    fn extensions(&self) -> Extensions {
        self.layout.extensions()
    }

    fn extended(&mut self) -> Result<ExtendedState> {
        Ok(self.layout.extended(&self.xsave_area()?.region))
    }

    fn set_extended(&mut self, state: &ExtendedState) -> Result<()> {
        let mut area = self.xsave_area()?;
        self.layout.put_extended(state, &mut area.region);
        self.set_xsave_area(&area)
    }

    fn msr(&mut self, index: u32) -> Result<u64> {
        let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).expect("one entry fits");
        let taken = self.fd.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?;
        if taken == 1 { Ok(msrs.as_slice()[0].data) } else { Err(refused("KVM_GET_MSRS")) }
    }

    fn set_msr(&mut self, index: u32, value: u64) -> Result<()> {
        self.changes += 1;
        // EFER and the bases of FS and GS are both.
        self.system = None;
        let msrs =
            Msrs::from_entries(&[kvm_msr_entry { index, data: value, ..Default::default() }]).expect("one entry fits");
        let taken = self.fd.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
        if taken == 1 { Ok(()) } else { Err(refused("KVM_SET_MSRS")) }
    }

    fn xcr0(&mut self) -> Result<u64> {
        let xcrs = self.fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?;
        Ok(xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0).map_or(1, |x| x.value))
    }

    fn lend(&mut self, vectors: bool) -> Result<Option<Box<x86::State>>> {
        self.lend_state(vectors)
    }

    fn take_back(&mut self, lent: &x86::State, state: &x86::State) -> Result<()> {
        self.take_state_back(lent, state)
    }

    fn changes(&self) -> u64 {
        self.changes
    }

    fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok().filter(|khz| *khz != 0 && *khz < 1 << 30)
    }

    fn set_guest_debug(&mut self, debug: &GuestDebug) -> Result<()> {
        if *debug == self.debug && !debug.single_step {
            return Ok(());
        }
        // KVM_SET_REGS loses the trap flag that KVM_SET_GUEST_DEBUG sets, so registers go first.
        self.flush_registers()?;
        self.debug.clone_from(debug);
        self.arm()
    }

    fn inject(&mut self, exception: Exception) -> Result<()> {
        self.changes += 1;
        self.injected = Some(self.registers()?.rip);
        if exception.vector == 1 {
            let mut debug = self.fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?;
            debug.dr6 |= exception.address.unwrap_or(0);
            self.fd.set_debug_regs(&debug).map_err(failed("KVM_SET_DEBUGREGS"))?;
        } else if let Some(address) = exception.address {
            let mut system = self.system_registers()?;
            system.cr2 = address;
            self.set_system_registers(&system)?;
        }
        let mut events = self.fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        events.exception.injected = 1;
        events.exception.nr = exception.vector;
        events.exception.has_error_code = u8::from(exception.error_code.is_some());
        events.exception.error_code = exception.error_code.unwrap_or(0);
        self.fd.set_vcpu_events(&events).map_err(failed("KVM_SET_VCPU_EVENTS"))
    }

    fn is_halted(&mut self) -> Result<bool> {
        let state = self.fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        Ok(state.mp_state == kvm_bindings::KVM_MP_STATE_HALTED)
    }

    fn is_at_instruction(&mut self) -> Result<bool> {
        Ok(!self.is_halted()? && self.lend_state(false)?.is_some())
    }

    fn halt(&mut self) -> Result<()> {
        self.changes += 1;
        // HLT is behind the instruction whose interrupts STI holds off; a shadow that stays would keep it asleep.
        let mut events = self.fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        events.interrupt.shadow = 0;
        events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
        self.fd.set_vcpu_events(&events).map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        self.fd
            .set_mp_state(kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_HALTED })
            .map_err(failed("KVM_SET_MP_STATE"))
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }
}

/// The system call by itself. libc's function for it is on another page of code, and its `errno` on one more of data: after
/// an exit none of them may be known to the CPU any longer.
///
/// # Safety
/// `fd` is a vCPU.
#[inline]
unsafe fn kvm_run(fd: RawFd) -> i64 {
    // KVM_RUN = _IO(KVMIO, 0x80). The typed wrapper decodes exits into borrowed slices, which this file does itself.
    const KVM_RUN: u64 = 0xae80;
    let result: i64;
    // SAFETY: Linux's convention for system calls on x86-64; this one has no argument, and the caller vouches for `fd`.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") libc::SYS_ioctl => result,
            in("rdi") i64::from(fd),
            in("rsi") KVM_RUN,
            in("rdx") 0u64,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// What a KVM_RUN that failed comes to.
#[cold]
fn interrupted(result: i64) -> Result<bool> {
    let source = std::io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EIO));
    match source.raw_os_error() {
        Some(libc::EINTR | libc::EAGAIN) => Ok(false),
        _ => Err(Error::Hypervisor { call: "KVM_RUN", source }),
    }
}

fn refused(call: &'static str) -> Error {
    Error::Hypervisor { call, source: std::io::Error::other("KVM refused the register") }
}

// The shared page's field for registers is the x86 one.
const _: () = assert!(KVM_SYNC_X86_REGS == 1);
