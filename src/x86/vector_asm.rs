//! Makers of the small functions that execute one vector instruction on the host's own CPU: each loads its operands into
//! XMM registers, executes the instruction and stores the result. Those that depend on MXCSR run under the guest's
//! rounding control with all exceptions masked. An immediate selects an entry of a jump table, since an instruction's
//! immediate can't be a variable.
//!
//! All functions are `unsafe` with the contract of [`VectorFn`](super::vector::VectorFn).

/// A function that executes `text` with `dst` in XMM0 and `src` in XMM1 and stores XMM0 to `dst`.
macro_rules! plain {
    ($text:expr) => {{
        unsafe fn run(dst: *mut u128, src: *const u128, _control: *mut Control) {
            // SAFETY: the caller vouches for the pointers and that the host has the instruction.
            unsafe {
                asm!("movups xmm0, [{d}]", "movups xmm1, [{s}]", $text, "movups [{d}], xmm0",
                    d = in(reg) dst, s = in(reg) src, out("xmm0") _, out("xmm1") _, options(nostack));
            }
        }
        run as VectorFn
    }};
}

/// The same for an instruction that leaves its answer in RAX.
macro_rules! to_general {
    ($($text:expr),+) => {{
        unsafe fn run(dst: *mut u128, src: *const u128, _control: *mut Control) {
            // SAFETY: as in `plain`; 8 bytes are stored to `dst`. The stack is used to read the flags.
            unsafe {
                asm!("movups xmm0, [{d}]", "movups xmm1, [{s}]", $($text,)+ "mov [{d}], rax",
                    d = in(reg) dst, s = in(reg) src, out("rax") _, out("xmm0") _, out("xmm1") _);
            }
        }
        run as VectorFn
    }};
}

/// The same under the guest's MXCSR, with the store as a parameter.
macro_rules! float {
    ($store:expr, $($text:expr),+) => {{
        unsafe fn run(dst: *mut u128, src: *const u128, control: *mut Control) {
            // SAFETY: as in `plain`; `control` is valid, masks every exception and has no reserved bit set, and the
            // host's MXCSR is back before any other code runs.
            unsafe {
                asm!("stmxcsr [{c} + 4]", "movups xmm0, [{d}]", "movups xmm1, [{s}]", "ldmxcsr [{c}]",
                    $($text,)+ "stmxcsr [{c}]", "ldmxcsr [{c} + 4]", $store,
                    d = in(reg) dst, s = in(reg) src, c = in(reg) control,
                    out("rax") _, out("xmm0") _, out("xmm1") _);
            }
        }
        run as VectorFn
    }};
}

/// The same as `float` under the host's MXCSR, which gathers the flags.
macro_rules! bare {
    ($store:expr, $($text:expr),+) => {{
        unsafe fn run(dst: *mut u128, src: *const u128, _control: *mut Control) {
            // SAFETY: as in `plain`. The stack is used to read the flags.
            unsafe {
                asm!("movups xmm0, [{d}]", "movups xmm1, [{s}]", $($text,)+ $store,
                    d = in(reg) dst, s = in(reg) src, out("rax") _, out("xmm0") _, out("xmm1") _);
            }
        }
        run as VectorFn
    }};
}

/// Jumps to the entry of a table of copies of an instruction on XMM0 and XMM1, one for each immediate.
macro_rules! immediate_table {
    ($count:literal, $bytes:literal) => {
        concat!(
            "lea {t}, [rip + 2f]\nshl {i}, 4\nadd {t}, {i}\njmp {t}\n",
            ".set .Luhyve_immediate, 0\n.balign 16\n2:\n.rept ",
            $count,
            "\n.byte ",
            $bytes,
            ", .Luhyve_immediate\njmp 3f\n.balign 16\n.set .Luhyve_immediate, .Luhyve_immediate + 1\n.endr\n3:"
        )
    };
}

/// A function for an instruction with an immediate of which the low bits count: `$count` (a power of two) values.
/// `$bytes` are its bytes up to the immediate.
macro_rules! immediate {
    ($count:literal, $bytes:literal) => {{
        unsafe fn run(dst: *mut u128, src: *const u128, control: *mut Control) {
            // SAFETY: `control` is valid.
            let immediate = unsafe { (*control).immediate } & ($count - 1);
            // SAFETY: as in `plain`; the jump stays within the table.
            unsafe {
                asm!("movups xmm0, [{d}]", "movups xmm1, [{s}]", immediate_table!($count, $bytes),
                    "movups [{d}], xmm0",
                    d = in(reg) dst, s = in(reg) src, t = out(reg) _, i = inout(reg) immediate => _,
                    out("xmm0") _, out("xmm1") _, options(nostack));
            }
        }
        run as VectorFn
    }};
}

/// The same under the guest's MXCSR.
macro_rules! float_immediate {
    ($count:literal, $bytes:literal) => {{
        unsafe fn run(dst: *mut u128, src: *const u128, control: *mut Control) {
            // SAFETY: `control` is valid.
            let immediate = unsafe { (*control).immediate } & ($count - 1);
            // SAFETY: as in `float` and `immediate`.
            unsafe {
                asm!("stmxcsr [{c} + 4]", "movups xmm0, [{d}]", "movups xmm1, [{s}]", "ldmxcsr [{c}]",
                    immediate_table!($count, $bytes), "stmxcsr [{c}]", "ldmxcsr [{c} + 4]", "movups [{d}], xmm0",
                    d = in(reg) dst, s = in(reg) src, c = in(reg) control,
                    t = out(reg) _, i = inout(reg) immediate => _,
                    out("xmm0") _, out("xmm1") _, options(nostack));
            }
        }
        run as VectorFn
    }};
}

/// A function for an instruction on XMM2 (`dst`) and XMM1 (`src`) with the control's third operand in XMM0.
macro_rules! third {
    ($text:expr) => {{
        unsafe fn run(dst: *mut u128, src: *const u128, control: *mut Control) {
            // SAFETY: as in `plain`, and `control` is valid.
            unsafe {
                asm!("movups xmm2, [{d}]", "movups xmm1, [{s}]", "movups xmm0, [{c} + 16]", $text,
                    "movups [{d}], xmm2",
                    d = in(reg) dst, s = in(reg) src, c = in(reg) control,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, options(nostack));
            }
        }
        run as VectorFn
    }};
}

/// The same under the guest's MXCSR.
macro_rules! float_third {
    ($text:expr) => {{
        unsafe fn run(dst: *mut u128, src: *const u128, control: *mut Control) {
            // SAFETY: as in `float` and `third`.
            unsafe {
                asm!("stmxcsr [{c} + 4]", "movups xmm2, [{d}]", "movups xmm1, [{s}]", "movups xmm0, [{c} + 16]",
                    "ldmxcsr [{c}]", $text, "stmxcsr [{c}]", "ldmxcsr [{c} + 4]", "movups [{d}], xmm2",
                    d = in(reg) dst, s = in(reg) src, c = in(reg) control,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, options(nostack));
            }
        }
        run as VectorFn
    }};
}

pub(super) use {bare, float, float_immediate, float_third, immediate, immediate_table, plain, third, to_general};
