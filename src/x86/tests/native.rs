//! Executes an instruction on the host's own CPU: bytes in an executable page, all registers loaded before and stored
//! after. The mapping has a page of code, one of register state and a scratch area for memory operands.

use std::arch::asm;

use crate::registers::{FpuState, Registers};
use crate::x86::CpuState;
use crate::x86::xsave::{get_x87, put_x87};

/// Bytes of scratch memory.
pub(super) const SCRATCH: usize = 4096;
/// Where the state page begins, from the code page.
const STATE: usize = 4096;
/// Where the scratch area begins.
const SCRATCH_AT: usize = 8192;
/// Where the way back is, from the code page: after the longest instruction, and for one that traps.
const BACK_AT: usize = 64;
/// Offsets in the state page: registers, flags, the host's stack, the way back, the components that XSAVE saves, and
/// the XSAVE areas of the guest and (at 2048) the host.
const RFLAGS_AT: usize = 128;
const RETURN_AT: usize = 144;
const COMPONENTS_AT: usize = 160;
const TRAPPED_AT: usize = 168;
const GUEST_AT: usize = 256;
/// Bytes of an XSAVE area with AVX, and where in it the header and the upper halves are.
const AREA: usize = 832;
const HEADER_AT: usize = 512;
const UPPER_AT: usize = 576;

pub(super) struct Native {
    page: *mut u8,
}

impl Native {
    pub fn new() -> Self {
        install_handler();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), SCRATCH_AT + SCRATCH, protection, flags, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        Self { page: page.cast() }
    }

    /// Address of the scratch memory, which instructions may use.
    pub fn scratch(&self) -> u64 {
        self.page as u64 + SCRATCH_AT as u64
    }

    /// Address that the instruction executes at.
    pub fn rip(&self) -> u64 {
        self.page as u64 + 7
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= SCRATCH_AT + SCRATCH);
        // SAFETY: inside the mapping, which nothing else refers to.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.page.add(at), bytes.len()) }
    }

    fn get(&self, at: usize, length: usize) -> &[u8] {
        assert!(at + length <= SCRATCH_AT + SCRATCH);
        // SAFETY: inside the mapping; it changes only through `&mut self`.
        unsafe { std::slice::from_raw_parts(self.page.add(at), length) }
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.get(at, 8).try_into().unwrap())
    }

    /// Writes the code: load RDI, the instruction, NOPs, store RAX, RAX = state page, go back.
    fn assemble(&mut self, instruction: &[u8]) {
        let mut code = Vec::new();
        let relative = |code: &mut Vec<u8>, opcode: &[u8], target: usize| {
            code.extend_from_slice(opcode);
            let distance = target as i64 - (code.len() as i64 + 4);
            code.extend_from_slice(&(distance as i32).to_le_bytes());
        };
        relative(&mut code, &[0x48, 0x8b, 0x3d], STATE + 56);
        code.extend_from_slice(instruction);
        code.resize(BACK_AT, 0x90);
        relative(&mut code, &[0x48, 0x89, 0x05], STATE);
        relative(&mut code, &[0x48, 0x8d, 0x05], STATE);
        relative(&mut code, &[0xff, 0x25], STATE + RETURN_AT);
        self.put(0, &code);
    }

    /// Executes the instruction and returns the registers afterwards, and whether it raised an SSE exception; RIP is
    /// left alone.
    pub fn run(&mut self, before: &CpuState, instruction: &[u8], memory: &mut [u8]) -> (CpuState, bool) {
        self.assemble(instruction);
        self.put(SCRATCH_AT, memory);
        for (i, value) in before.registers.general.iter().enumerate() {
            self.put(STATE + 8 * i, &value.to_le_bytes());
        }
        self.put(STATE + RFLAGS_AT, &before.registers.rflags.to_le_bytes());
        let components = if has_avx() { 7 } else { 3 };
        self.put(STATE + COMPONENTS_AT, &[components, 0, 0, 0]);
        self.put(STATE + TRAPPED_AT, &[0]);
        self.put(STATE + GUEST_AT, &image(before, components));
        // SAFETY: the instruction is one that ends at its own end, touches the scratch area only, and leaves state that
        // is saved and restored here alone. All registers are restored or declared.
        unsafe { enter(self.page, self.page.add(STATE)) };
        memory.copy_from_slice(self.get(SCRATCH_AT, memory.len()));
        let mut after = *before;
        after.registers = Registers {
            general: std::array::from_fn(|i| self.word(STATE + 8 * i)),
            rip: before.registers.rip,
            rflags: self.word(STATE + RFLAGS_AT),
        };
        let area = self.get(STATE + GUEST_AT, AREA);
        after.fpu = state(area);
        if has_avx() {
            after.ymm_high = vectors(area, UPPER_AT);
        }
        (after, self.get(STATE + TRAPPED_AT, 1)[0] != 0)
    }
}

/// Makes SIGFPE in an instruction of ours go to the way back, with a note that it came.
fn install_handler() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is a valid value to fill in, and the handler does what a handler may.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigfpe as *const () as usize;
            // The guest's stack is memory that is compared; every thread of Rust's has another one for signals.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGFPE, &raw const action, std::ptr::null_mut())
        };
        assert_eq!(result, 0);
    });
}

extern "C" fn on_sigfpe(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    // SAFETY: the kernel passes a valid context. Only instructions of ours raise the signal; they stand in a code page
    // with a state page after it.
    unsafe {
        let rip = &mut (*context).uc_mcontext.gregs[libc::REG_RIP as usize];
        let page = *rip & !0xfff;
        *((page + (STATE + TRAPPED_AT) as i64) as *mut u8) = 1;
        *rip = page + BACK_AT as i64;
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`.
        unsafe { libc::munmap(self.page.cast(), SCRATCH_AT + SCRATCH) };
    }
}

fn has_avx() -> bool {
    std::is_x86_feature_detected!("avx")
}

fn image(cpu: &CpuState, components: u8) -> [u8; AREA] {
    let mut area = [0; AREA];
    put_x87(&mut area, &cpu.fpu, true);
    area[24..28].copy_from_slice(&cpu.fpu.mxcsr.to_le_bytes());
    area[HEADER_AT] = components;
    for i in 0..16 {
        area[160 + 16 * i..176 + 16 * i].copy_from_slice(&cpu.fpu.xmm[i].to_le_bytes());
        area[UPPER_AT + 16 * i..][..16].copy_from_slice(&cpu.ymm_high[i].to_le_bytes());
    }
    area
}

fn vectors(area: &[u8], at: usize) -> [u128; 16] {
    std::array::from_fn(|i| u128::from_le_bytes(area[at + 16 * i..][..16].try_into().unwrap()))
}

fn state(area: &[u8]) -> FpuState {
    let mut fpu = FpuState::default();
    get_x87(area, &mut fpu, true);
    fpu.mxcsr = u32::from_le_bytes(area[24..28].try_into().unwrap());
    fpu.xmm = vectors(area, 160);
    fpu
}

/// Loads the state, jumps to `code`, and stores the state when it comes back.
///
/// # Safety
/// `code` and `state` are the pages that [`Native`] has prepared.
#[inline(never)]
unsafe fn enter(code: *const u8, state: *mut u8) {
    // SAFETY: see the function's contract; every register is saved or declared as clobbered.
    unsafe {
        asm!(
            "push rbx", "push rbp", "pushfq",
            "mov [rdi + 152], rsi",
            "mov [rdi + 136], rsp",
            "lea rax, [rip + 2f]",
            "mov [rdi + 144], rax",
            "mov eax, [rdi + 160]",
            "xor edx, edx",
            "xsave64 [rdi + 2048]",
            "xrstor64 [rdi + 256]",
            "push qword ptr [rdi + 128]",
            "popfq",
            "mov rax, [rdi]", "mov rcx, [rdi + 8]", "mov rdx, [rdi + 16]", "mov rbx, [rdi + 24]",
            "mov rsp, [rdi + 32]", "mov rbp, [rdi + 40]", "mov rsi, [rdi + 48]",
            "mov r8, [rdi + 64]", "mov r9, [rdi + 72]", "mov r10, [rdi + 80]", "mov r11, [rdi + 88]",
            "mov r12, [rdi + 96]", "mov r13, [rdi + 104]", "mov r14, [rdi + 112]", "mov r15, [rdi + 120]",
            "jmp qword ptr [rdi + 152]",
            "2:",
            "mov [rax + 8], rcx", "mov [rax + 16], rdx", "mov [rax + 24], rbx", "mov [rax + 32], rsp",
            "mov [rax + 40], rbp", "mov [rax + 48], rsi", "mov [rax + 56], rdi",
            "mov [rax + 64], r8", "mov [rax + 72], r9", "mov [rax + 80], r10", "mov [rax + 88], r11",
            "mov [rax + 96], r12", "mov [rax + 104], r13", "mov [rax + 112], r14", "mov [rax + 120], r15",
            "mov rsp, [rax + 136]",
            "pushfq", "pop qword ptr [rax + 128]",
            "cld",
            "mov rdi, rax",
            "mov eax, [rdi + 160]",
            "xor edx, edx",
            "xsave64 [rdi + 256]",
            "xrstor64 [rdi + 2048]",
            "popfq", "pop rbp", "pop rbx",
            inout("rdi") state => _, inout("rsi") code => _,
            out("rax") _, out("rcx") _, out("rdx") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        );
    }
}
