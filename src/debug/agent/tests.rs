use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::debug::breakpoints::Condition;
use crate::error::GuestFault;

/// Sixteen bytes of memory at 0x1000 (0xf0 to 0xff), and registers that hold their index.
struct Fake;

impl Context for Fake {
    fn register(&mut self, register: RegisterId) -> Result<u64, EvaluateError> {
        Ok(register.index().into())
    }

    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), GuestFault> {
        let memory: Vec<u8> = (0xf0..=0xff).collect();
        let start = address.checked_sub(0x1000).and_then(|start| usize::try_from(start).ok());
        let range = start.and_then(|start| memory.get(start..start.checked_add(buffer.len())?));
        let fault = GuestFault { address, length: buffer.len() as u64, is_virtual: true };
        buffer.copy_from_slice(range.ok_or(fault)?);
        Ok(())
    }

    fn vcpu(&self) -> u32 {
        0
    }

    fn hits(&self) -> u64 {
        0
    }

    fn reached(&self) -> u64 {
        0
    }
}

const ADD: u8 = 0x02;
const SUB: u8 = 0x03;
const LOG_NOT: u8 = 0x0e;
const EXT: u8 = 0x16;
const REF32: u8 = 0x19;
const IF_GOTO: u8 = 0x20;
const GOTO: u8 = 0x21;
const CONST8: u8 = 0x22;
const CONST64: u8 = 0x25;
const REG: u8 = 0x26;
const END: u8 = 0x27;
const DUP: u8 = 0x28;
const POP: u8 = 0x29;
const ZERO_EXT: u8 = 0x2a;
const SWAP: u8 = 0x2b;
const PICK: u8 = 0x32;
const ROT: u8 = 0x33;

fn register(number: u16) -> Option<RegisterId> {
    u8::try_from(number).ok().filter(|number| *number < 16).map(RegisterId::General)
}

fn verify(code: &[u8]) -> Result<AgentProgram, VerifyError> {
    AgentProgram::verify(code, &register)
}

fn value(code: &[u8]) -> Result<u64, EvaluateError> {
    verify(code).expect("valid").value(&mut Fake)
}

fn constant(value: u64) -> Vec<u8> {
    [vec![CONST64], value.to_be_bytes().to_vec()].concat()
}

fn binary_value(opcode: u8, a: u64, b: u64) -> Result<u64, EvaluateError> {
    value(&[constant(a), constant(b), vec![opcode, END]].concat())
}

fn unary_value(code: &[u8], a: u64) -> u64 {
    value(&[&constant(a), code, &[END]].concat()).unwrap()
}

#[test]
fn test_arithmetic_wraps_at_64_bits() {
    let minus = |n: i64| n.cast_unsigned();
    for (opcode, a, b, expected) in [
        (ADD, u64::MAX, 2, 1),
        (SUB, 1, 2, u64::MAX),
        (0x04, minus(-3), 5, minus(-15)),
        (0x05, minus(-7), 2, minus(-3)),
        (0x05, minus(i64::MIN), minus(-1), minus(i64::MIN)),
        (0x06, minus(-7), 2, u64::MAX / 2 - 3),
        (0x07, minus(-7), 2, minus(-1)),
        (0x07, minus(i64::MIN), minus(-1), 0),
        (0x08, minus(-7), 4, 1),
        (0x0f, 12, 10, 8),
        (0x10, 12, 10, 14),
        (0x11, 12, 10, 6),
    ] {
        assert_eq!(binary_value(opcode, a, b).unwrap(), expected, "{opcode:#x} {a:#x} {b:#x}");
    }
}

#[test]
fn test_shift_by_any_count_moves_bits_out() {
    let high = 1 << 63;
    for (opcode, a, b, expected) in [
        (0x09, 3, 62, 3 << 62),
        (0x09, 3, 64, 0),
        (0x09, 3, 1 << 32, 0),
        (0x0a, high, 63, u64::MAX),
        (0x0a, high, 1 << 40, u64::MAX),
        (0x0a, 4, u64::MAX, 0),
        (0x0b, high, 63, 1),
        (0x0b, high, 64, 0),
    ] {
        assert_eq!(binary_value(opcode, a, b).unwrap(), expected, "{opcode:#x} {a:#x} {b:#x}");
    }
}

#[test]
fn test_comparisons_differ_by_sign() {
    assert_eq!(binary_value(0x13, 5, 5).unwrap(), 1);
    assert_eq!(binary_value(0x13, 5, 6).unwrap(), 0);
    assert_eq!(binary_value(0x14, u64::MAX, 0).unwrap(), 1);
    assert_eq!(binary_value(0x15, u64::MAX, 0).unwrap(), 0);
    assert_eq!(binary_value(0x15, 1, 2).unwrap(), 1);
}

#[test]
fn test_division_by_zero_is_an_error() {
    for opcode in 0x05..=0x08 {
        assert!(matches!(binary_value(opcode, 1, 0), Err(EvaluateError::DivisionByZero)), "{opcode:#x}");
    }
}

#[test]
fn test_extensions_keep_the_named_bits() {
    assert_eq!(unary_value(&[EXT, 8], 0x1ff), u64::MAX);
    assert_eq!(unary_value(&[EXT, 8], 0x17f), 0x7f);
    assert_eq!(unary_value(&[EXT, 1], 1), u64::MAX);
    assert_eq!(unary_value(&[EXT, 64], 1 << 63), 1 << 63);
    assert_eq!(unary_value(&[ZERO_EXT, 8], 0x1ff), 0xff);
    assert_eq!(unary_value(&[ZERO_EXT, 255], u64::MAX), u64::MAX);
    assert_eq!(unary_value(&[LOG_NOT], 0), 1);
    assert_eq!(unary_value(&[LOG_NOT], 7), 0);
    assert_eq!(unary_value(&[0x12], 0), u64::MAX);
}

#[test]
fn test_stack_opcodes_reorder_as_the_manual_says() {
    let three = [CONST8, 1, CONST8, 2, CONST8, 3];
    let top_after = |code: &[u8]| value(&[&three, code, &[END]].concat()).unwrap();
    assert_eq!(top_after(&[POP]), 2);
    assert_eq!(top_after(&[SWAP]), 2);
    assert_eq!(top_after(&[SWAP, POP]), 3);
    assert_eq!(top_after(&[ROT]), 2);
    assert_eq!(top_after(&[ROT, POP]), 1);
    assert_eq!(top_after(&[ROT, POP, POP]), 3);
    assert_eq!(top_after(&[PICK, 0]), 3);
    assert_eq!(top_after(&[PICK, 2]), 1);
    assert_eq!(top_after(&[DUP, ADD]), 6);
}

#[test]
fn test_memory_is_read_little_endian_and_zero_extended() {
    for (opcode, expected) in [(0x17, 0xf1), (0x18, 0xf2f1), (0x19, 0xf4f3_f2f1), (0x1a, 0xf8f7_f6f5_f4f3_f2f1)] {
        assert_eq!(unary_value(&[opcode], 0x1001), expected);
    }
}

#[test]
fn test_unmapped_memory_is_an_error_that_names_the_address() {
    for address in [0x2000, 0x100e, u64::MAX, u64::MAX - 2] {
        let error = value(&[constant(address), vec![REF32, END]].concat()).unwrap_err();
        assert!(error.to_string().contains(&format!("{address:#x}")), "{error}");
    }
}

/// What gdb makes of `*(int *)($rdi + 4) == 5 || $rsi > 1`, in essence.
#[test]
fn test_jumps_lead_by_position() {
    let code = [
        &[REG, 0, 5, CONST8, 5, 0x13][..],
        &[IF_GOTO, 0, 16],
        &[REG, 0, 4, CONST8, 9, 0x15],
        &[END],
        &[CONST8, 1, END],
    ]
    .concat();
    assert_eq!(code[16], CONST8);
    assert_eq!(value(&code).unwrap(), 1, "register 5 holds 5");
    let code = [&[REG, 0, 6][..], &code[3..]].concat();
    assert_eq!(value(&code).unwrap(), 1, "4 is less than 9");
}

#[test]
fn test_loop_that_ends_gives_its_value_and_one_that_does_not_is_stopped() {
    // 10 → … → 0, one at a time.
    let counts = [CONST8, 10, CONST8, 1, SUB, DUP, IF_GOTO, 0, 2, END];
    assert_eq!(value(&counts).unwrap(), 0);
    let endless = [GOTO, 0, 0];
    assert!(matches!(value(&endless), Err(EvaluateError::Endless(MAX_STEPS))));
}

#[test]
fn test_verifier_refuses_what_cannot_run() {
    let at = |code: &[u8]| verify(code).unwrap_err();
    assert_eq!(at(&[]), VerifyError::Truncated { at: 0 });
    assert_eq!(at(&[CONST8]), VerifyError::Truncated { at: 0 });
    assert_eq!(at(&[CONST8, 1]), VerifyError::Truncated { at: 2 }, "no end");
    assert_eq!(at(&[ADD, END]), VerifyError::Underflow { at: 0 });
    assert_eq!(at(&[END]), VerifyError::Underflow { at: 0 });
    assert_eq!(at(&[CONST8, 1, PICK, 1, END]), VerifyError::Underflow { at: 2 });
    assert_eq!(at(&[GOTO, 0, 1]), VerifyError::Target { to: 1 });
    assert_eq!(at(&[GOTO, 0, 3]), VerifyError::Target { to: 3 });
    assert_eq!(at(&[REG, 0, 99, END]), VerifyError::Operand { at: 0, operand: 99 });
    assert_eq!(at(&[CONST8, 1, EXT, 0, END]), VerifyError::Operand { at: 2, operand: 0 });
    let merge = [CONST8, 1, CONST8, 1, IF_GOTO, 0, 9, CONST8, 1, END];
    assert_eq!(at(&merge), VerifyError::Merge { at: 9, first: 2, second: 1 });
    let grows = [CONST8, 1, GOTO, 0, 0];
    assert_eq!(at(&grows), VerifyError::Merge { at: 0, first: 0, second: 1 });
    let deep = [[CONST8, 1].repeat(MAX_STACK + 1), vec![END]].concat();
    assert_eq!(at(&deep), VerifyError::Overflow { at: 2 * MAX_STACK });
    assert!(verify(&[[CONST8, 1].repeat(MAX_STACK), vec![END]].concat()).is_ok());
    assert_eq!(at(&vec![END; MAX_CODE + 1]), VerifyError::TooLong { length: MAX_CODE + 1 });
}

#[test]
fn test_opcodes_that_a_condition_has_no_use_for_are_refused() {
    let others = [0x00, 0x01, 0x0c, 0x0d, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f, 0x2c, 0x2d, 0x2e, 0x2f, 0x30, 0x31, 0x34, 0xff];
    for code in others {
        assert_eq!(verify(&[CONST8, 1, CONST8, 1, code]).unwrap_err(), VerifyError::Opcode { at: 4, code });
    }
}

#[test]
fn test_several_conditions_hold_when_one_does_and_fail_when_one_fails_before_that() {
    let [no, yes] = [0, 1].map(|value| Arc::new(verify(&[CONST8, value, END]).unwrap()));
    let fails = Arc::new(verify(&[CONST8, 1, REF32, END]).unwrap());
    let holds = |agent: &[&Arc<AgentProgram>]| {
        let agent = agent.iter().copied().cloned().collect();
        Condition { agent, ..Default::default() }.evaluate(&mut Fake).ok()
    };
    assert_eq!(holds(&[]), Some(true));
    assert_eq!(holds(&[&no, &no]), Some(false));
    assert_eq!(holds(&[&no, &yes]), Some(true));
    assert_eq!(holds(&[&yes, &fails]), Some(true));
    assert_eq!(holds(&[&no, &fails, &yes]), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn test_any_bytes_are_refused_or_run_without_panic(code in proptest::collection::vec(any::<u8>(), 0..64)) {
        if let Ok(program) = verify(&code) {
            let _ = program.evaluate(&mut Fake);
        }
    }

    /// Bytes that are mostly opcodes, so that programs of some length pass.
    #[test]
    fn test_likely_programs_run_without_panic(
        parts in proptest::collection::vec((0u8..0x34, 0u8..8), 0..40),
    ) {
        let mut code = constant(1).repeat(8);
        for (opcode, operand) in parts {
            let operands = match opcode {
                EXT | ZERO_EXT | CONST8 | PICK => vec![operand],
                IF_GOTO | GOTO => vec![0, operand * 9],
                0x23 | REG => vec![0, operand],
                0x24 => vec![0, 0, 0, operand],
                CONST64 => vec![0, 0, 0, 0, 0, 0, 0x10, operand],
                _ => vec![],
            };
            let longer = [&code[..], &[opcode], &operands].concat();
            if verify(&[&longer[..], &[END]].concat()).is_ok() {
                code = longer;
            }
        }
        code.push(END);
        let _ = verify(&code).expect("each part was tried").evaluate(&mut Fake);
    }
}
