use proptest::prelude::*;

use super::*;
use crate::registers::RAX;

/// 256 bytes of memory at 0x1000; each register has its index as its value but for RDI and RSI.
struct Fake {
    memory: [u8; 256],
    reads: usize,
}

impl Fake {
    fn new() -> Self {
        let mut memory = [0; 256];
        for (i, byte) in (0u8..=255).zip(&mut memory) {
            *byte = i;
        }
        memory[8..12].copy_from_slice(&0x8000_0001u32.to_le_bytes());
        Self { memory, reads: 0 }
    }
}

impl Context for Fake {
    fn register(&mut self, register: RegisterId) -> Result<u64, EvaluateError> {
        Ok(match register {
            RegisterId::General(7) => 0x1000,
            RegisterId::General(6) => 9,
            RegisterId::General(0) => u64::MAX,
            other => other.index().into(),
        })
    }

    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), GuestFault> {
        self.reads += 1;
        let start = address.checked_sub(0x1000).and_then(|start| usize::try_from(start).ok());
        let range = start.and_then(|start| self.memory.get(start..start.checked_add(buffer.len())?));
        let fault = GuestFault { address, length: buffer.len() as u64, is_virtual: true };
        buffer.copy_from_slice(range.ok_or(fault)?);
        Ok(())
    }

    fn vcpu(&self) -> u32 {
        3
    }

    fn hits(&self) -> u64 {
        5
    }

    fn reached(&self) -> u64 {
        7
    }
}

const RDI: u8 = 7;
const RSI: u8 = 6;

fn op(opcode: Opcode) -> Vec<u8> {
    vec![opcode as u8]
}

fn constant(index: u16) -> Vec<u8> {
    [vec![Opcode::Constant as u8], index.to_le_bytes().to_vec()].concat()
}

fn reg(index: u8) -> Vec<u8> {
    vec![Opcode::Register as u8, index]
}

fn jump(opcode: Opcode, distance: u16) -> Vec<u8> {
    [vec![opcode as u8], distance.to_le_bytes().to_vec()].concat()
}

fn value(code: &[Vec<u8>], constants: &[i128]) -> Result<i128, EvaluateError> {
    Program::verify(&code.concat(), constants).expect("valid").run::<MAX_STACK, _>(&mut Fake::new())
}

fn binary(opcode: Opcode, a: i128, b: i128) -> Result<i128, EvaluateError> {
    value(&[constant(0), constant(1), op(opcode)], &[a, b])
}

/// `arg1 > 8 and u32[arg0 + 8] != 0`, as `uhyve.condition` compiles it.
fn example() -> Program {
    let code = [
        reg(RSI),
        constant(0),
        op(Opcode::Greater),
        jump(Opcode::JumpIfZeroOrDrop, 11),
        reg(RDI),
        constant(0),
        op(Opcode::Add),
        op(Opcode::LoadU32),
        constant(1),
        op(Opcode::NotEqual),
    ];
    Program::verify(&code.concat(), &[8, 0]).expect("valid")
}

#[test]
fn test_evaluate_example_reads_memory_only_after_the_first_operand_holds() {
    let program = example();
    let mut guest = Fake::new();
    assert!(program.evaluate(&mut guest).expect("mapped"));
    assert_eq!(guest.reads, 1);
    assert!(program.reads_memory());
    assert!(program.uses_only_general_registers());
}

#[test]
fn test_evaluate_through_a_trait_object_works() {
    let mut guest = Fake::new();
    let context: &mut dyn Context = &mut guest;
    assert!(example().evaluate(context).expect("mapped"));
}

#[test]
fn test_uses_only_general_registers_with_a_system_register_is_false() {
    let index = RegisterId::Cr3.index();
    assert!(!Program::verify(&reg(index), &[]).expect("valid").uses_only_general_registers());
    assert!(!Program::verify(&op(Opcode::Vcpu), &[]).expect("valid").reads_memory());
}

#[test]
fn test_evaluate_leaves_pushes_what_the_context_says() {
    assert_eq!(value(&[op(Opcode::Vcpu)], &[]).expect("value"), 3);
    assert_eq!(value(&[op(Opcode::Hits)], &[]).expect("value"), 5);
    assert_eq!(value(&[op(Opcode::Reached)], &[]).expect("value"), 7);
    let rax = u8::try_from(RAX).expect("small");
    assert_eq!(value(&[reg(rax)], &[]).expect("value"), i128::from(u64::MAX));
}

#[test]
fn test_evaluate_loads_are_little_endian_and_signed_as_named() {
    let at = |opcode, address| value(&[constant(0), op(opcode)], &[address]).expect("mapped");
    assert_eq!(at(Opcode::LoadU32, 0x1008), 0x8000_0001);
    assert_eq!(at(Opcode::LoadI32, 0x1008), i128::from(i32::MIN) + 1);
    assert_eq!(at(Opcode::LoadI8, 0x10ff), -1);
    assert_eq!(at(Opcode::LoadU8, 0x10ff), 255);
    assert_eq!(at(Opcode::LoadU16, 0x1010), 0x1110);
    assert_eq!(at(Opcode::LoadI16, 0x10fe), -2);
    assert_eq!(at(Opcode::LoadU64, 0x1010), 0x1716_1514_1312_1110);
    assert_eq!(at(Opcode::LoadI64, 0x10f8), i128::from(0xfffe_fdfc_fbfa_f9f8_u64.cast_signed()));
}

#[test]
fn test_evaluate_bad_addresses_are_errors() {
    let at = |address| value(&[constant(0), op(Opcode::LoadU64)], &[address]);
    assert!(matches!(
        at(0x2000),
        Err(EvaluateError::Unmapped(GuestFault { address: 0x2000, length: 8, is_virtual: true }))
    ));
    assert!(matches!(at(-1), Err(EvaluateError::Address(-1))));
    assert!(matches!(at(1 << 64), Err(EvaluateError::Address(_))));
    assert!(matches!(at(u64::MAX.into()), Err(EvaluateError::Unmapped(_))));
}

#[test]
fn test_evaluate_division_is_floored() {
    for (a, b) in [(7, 2), (-7, 2), (7, -2), (-7, -2), (i128::MIN, 3), (i128::MAX, -3), (6, 3), (-6, 3)] {
        let quotient = binary(Opcode::FloorDivide, a, b).expect("value");
        let remainder = binary(Opcode::Modulo, a, b).expect("value");
        assert_eq!(quotient.wrapping_mul(b).wrapping_add(remainder), a, "{a} by {b}");
        assert!(remainder == 0 || (remainder < 0) == (b < 0), "{a} % {b} = {remainder}");
        assert!(remainder.unsigned_abs() < b.unsigned_abs());
    }
    assert_eq!(binary(Opcode::Modulo, i128::MIN, -1).expect("value"), 0);
    assert!(matches!(binary(Opcode::FloorDivide, i128::MIN, -1), Err(EvaluateError::Overflow)));
    assert!(matches!(binary(Opcode::FloorDivide, 1, 0), Err(EvaluateError::DivisionByZero)));
    assert!(matches!(binary(Opcode::Modulo, 1, 0), Err(EvaluateError::DivisionByZero)));
}

#[test]
fn test_evaluate_what_leaves_128_bits_is_an_overflow() {
    assert!(matches!(binary(Opcode::Add, i128::MAX, 1), Err(EvaluateError::Overflow)));
    assert!(matches!(binary(Opcode::Subtract, i128::MIN, 1), Err(EvaluateError::Overflow)));
    assert!(matches!(binary(Opcode::Multiply, i128::MAX, 2), Err(EvaluateError::Overflow)));
    assert!(matches!(binary(Opcode::ShiftLeft, 1, 127), Err(EvaluateError::Overflow)));
    assert_eq!(binary(Opcode::ShiftLeft, -1, 127).expect("value"), i128::MIN);
    assert!(matches!(value(&[constant(0), op(Opcode::Negate)], &[i128::MIN]), Err(EvaluateError::Overflow)));
}

#[test]
fn test_evaluate_shift_counts_out_of_range_are_errors() {
    for opcode in [Opcode::ShiftLeft, Opcode::ShiftRight] {
        assert!(matches!(binary(opcode, 0, -1), Err(EvaluateError::Shift(-1))));
        assert!(matches!(binary(opcode, 0, 128), Err(EvaluateError::Shift(128))));
        assert_eq!(binary(opcode, 0, 127).expect("value"), 0);
    }
    assert_eq!(binary(Opcode::ShiftRight, -8, 1).expect("value"), -4);
}

#[test]
fn test_evaluate_casts_wrap_and_extend() {
    let cast = |opcode, number| value(&[constant(0), op(opcode)], &[number]).expect("value");
    assert_eq!(cast(Opcode::CastU8, -1), 255);
    assert_eq!(cast(Opcode::CastI8, 0x180), -128);
    assert_eq!(cast(Opcode::CastU16, 0x1_2345), 0x2345);
    assert_eq!(cast(Opcode::CastI16, 0x8000), -0x8000);
    assert_eq!(cast(Opcode::CastU32, -1), 0xffff_ffff);
    assert_eq!(cast(Opcode::CastI32, 0xffff_fffe), -2);
    assert_eq!(cast(Opcode::CastU64, i128::MIN), 0);
    assert_eq!(cast(Opcode::CastI64, u64::MAX.into()), -1);
}

#[test]
fn test_evaluate_stack_instructions() {
    let two = [constant(0), constant(1)].concat();
    assert_eq!(value(&[two.clone(), op(Opcode::DropSecond)], &[1, 2]).expect("value"), 2);
    assert_eq!(value(&[two.clone(), op(Opcode::Drop)], &[1, 2]).expect("value"), 1);
    let tuck = [two.clone(), op(Opcode::Tuck), op(Opcode::Subtract), op(Opcode::Subtract)];
    assert_eq!(value(&tuck, &[10, 3]).expect("value"), 3 - (10 - 3));
    let member = |element| {
        let code = [two.clone(), constant(2), op(Opcode::Member), op(Opcode::DropSecond)];
        value(&code, &[4, 0, element]).expect("value")
    };
    assert_eq!((member(4), member(5)), (1, 0));
}

#[test]
fn test_evaluate_conditional_jumps_take_either_path() {
    let choose = |condition| {
        let code = [constant(0), jump(Opcode::JumpIfZero, 6), constant(1), jump(Opcode::Jump, 3), constant(2)];
        value(&code, &[condition, 10, 20]).expect("value")
    };
    assert_eq!((choose(-1), choose(0)), (10, 20));
    let keep = |opcode, first| value(&[constant(0), jump(opcode, 3), constant(1)], &[first, 9]).expect("value");
    assert_eq!((keep(Opcode::JumpIfZeroOrDrop, 0), keep(Opcode::JumpIfZeroOrDrop, 4)), (0, 9));
    assert_eq!((keep(Opcode::JumpIfNonzeroOrDrop, 0), keep(Opcode::JumpIfNonzeroOrDrop, 4)), (9, 4));
}

#[test]
fn test_verify_refuses_what_could_go_wrong() {
    let refused = |code: &[Vec<u8>]| Program::verify(&code.concat(), &[0]).expect_err("invalid");
    assert_eq!(refused(&[]), VerifyError::Result { depth: 0 });
    assert_eq!(refused(&[constant(0), constant(0)]), VerifyError::Result { depth: 2 });
    assert_eq!(refused(&[vec![0xff]]), VerifyError::Opcode { at: 0, code: 0xff });
    assert_eq!(refused(&[vec![0, 0]]), VerifyError::Truncated { at: 0 });
    assert_eq!(refused(&[constant(1)]), VerifyError::Operand { at: 0, operand: 1 });
    assert_eq!(refused(&[reg(26)]), VerifyError::Operand { at: 0, operand: 26 });
    assert_eq!(refused(&[constant(0), op(Opcode::Add)]), VerifyError::Underflow { at: 3 });
    assert_eq!(refused(&[constant(0), jump(Opcode::JumpIfZeroOrDrop, 1), constant(0)]), VerifyError::Target { to: 7 });
    assert_eq!(refused(&[constant(0), jump(Opcode::Jump, 1)]), VerifyError::Target { to: 7 });
    assert_eq!(refused(&[constant(0), jump(Opcode::Jump, 1), op(Opcode::Not)]), VerifyError::Unreachable { at: 6 });
    let uneven = [constant(0), constant(0), jump(Opcode::JumpIfZero, 3), constant(0)];
    assert_eq!(refused(&uneven), VerifyError::Merge { at: 12, first: 2, second: 1 });
    let deep = vec![constant(0); MAX_STACK + 1];
    assert_eq!(refused(&deep), VerifyError::Overflow { at: MAX_STACK * 3 });
    assert_eq!(refused(&[vec![0; MAX_CODE + 1]]), VerifyError::TooLong { length: MAX_CODE + 1 });
}

#[test]
fn test_verify_accepts_the_deepest_stack() {
    let code = [vec![constant(0); MAX_STACK].concat(), op(Opcode::Add).repeat(MAX_STACK - 1)].concat();
    let program = Program::verify(&code, &[1]).expect("valid");
    assert!(program.evaluate(&mut Fake::new()).expect("value"));
}

#[test]
fn test_opcodes_are_numbered_as_they_decode() {
    for (name, code) in OPCODES {
        let opcode = Opcode::from_code(*code).expect("in the table");
        let letters = format!("{opcode:?}").to_uppercase();
        assert_eq!((opcode as u8, letters), (*code, name.replace('_', "")));
    }
    assert_eq!(Opcode::from_code(u8::try_from(OPCODES.len()).expect("few")), None);
}

#[test]
fn test_evaluate_errors_say_what_happened() {
    assert_eq!(EvaluateError::Shift(200).to_string(), "the condition shifts by 200: a shift count is 0 to 127");
    let fault = GuestFault { address: 0x2000, length: 8, is_virtual: true };
    let text = EvaluateError::from(fault).to_string();
    assert_eq!(
        text,
        "the condition reads memory that isn't there: guest virtual address 0x2000 (+8 bytes) is not mapped"
    );
}

/// Instructions that are likely to be valid, so that the verifier lets some of the programs through.
fn instruction() -> impl Strategy<Value = Vec<u8>> {
    (0..OPCODES.len(), 0u16..3, 0u8..26, 0u16..12).prop_map(|(which, index, register, distance)| {
        let opcode = Opcode::from_code(OPCODES[which].1).expect("in the table");
        match opcode.operand() {
            Operand::None => op(opcode),
            Operand::Constant => constant(index),
            Operand::Register => reg(register),
            Operand::Jump => jump(opcode, distance),
        }
    })
}

/// Pushes two numbers first and sums up at the end, which makes valid programs far more frequent.
fn plausible() -> impl Strategy<Value = Vec<u8>> {
    (prop::collection::vec(instruction(), 0..12), 0usize..8)
        .prop_map(|(middle, sums)| [constant(0).repeat(3), middle.concat(), op(Opcode::Add).repeat(sums)].concat())
}

fn numbers() -> impl Strategy<Value = Vec<i128>> {
    let special = prop::sample::select(vec![0, 1, -1, 64, 127, 0x1000, i128::MIN, i128::MAX, u64::MAX.into()]);
    prop::collection::vec(prop_oneof![special, any::<i128>()], 3)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn test_verify_random_bytes_accepts_only_what_runs(code in prop::collection::vec(0u8..52, 0..24), constants in numbers()) {
        if let Ok(program) = Program::verify(&code, &constants) {
            let _ = program.evaluate(&mut Fake::new());
        }
    }

    #[test]
    fn test_verify_plausible_programs_accepts_only_what_runs(code in plausible(), constants in numbers()) {
        if let Ok(program) = Program::verify(&code, &constants) {
            let _ = program.evaluate(&mut Fake::new());
            let deep = program.run::<MAX_STACK, _>(&mut Fake::new());
            prop_assert!(program.max_stack <= MAX_STACK);
            if let (Ok(deep), true) = (deep, program.max_stack <= SMALL_STACK) {
                prop_assert_eq!(deep, program.run::<SMALL_STACK, _>(&mut Fake::new()).expect("same program"));
            }
        }
    }

    #[test]
    fn test_evaluate_division_of_any_numbers_is_pythons(a: i64, b: i64) {
        if b != 0 {
            let (wide, divisor) = (i128::from(a), i128::from(b));
            let floored = wide.div_euclid(divisor) - i128::from(divisor < 0 && wide.rem_euclid(divisor) != 0);
            prop_assert_eq!(binary(Opcode::FloorDivide, wide, divisor).expect("value"), floored);
        }
    }
}
