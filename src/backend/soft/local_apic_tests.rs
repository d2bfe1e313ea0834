//! Tests of the local APIC.

use super::super::apic_command::Destination;
use super::*;

const START: Moment = Moment { now: 1000, tsc: 5000 };

/// A register's offset in memory.
fn at(register: u16) -> u64 {
    u64::from(register) * 16
}

fn enabled(id: u32) -> LocalApic {
    let mut apic = LocalApic::new(id);
    write(&mut apic, SVR, 0x1ff);
    apic
}

fn x2apic(id: u32) -> LocalApic {
    let mut apic = enabled(id);
    apic.write_base(apic.base() | BASE_X2APIC).unwrap();
    apic
}

fn write(apic: &mut LocalApic, register: u16, value: u32) -> Effect {
    apic.write_memory(at(register), START, &value.to_le_bytes())
}

fn read(apic: &mut LocalApic, register: u16) -> u32 {
    let mut data = [0; 4];
    apic.read_memory(at(register), START.now, &mut data);
    u32::from_le_bytes(data)
}

fn fixed(vector: u8) -> Message {
    Message { vector, delivery: Delivery::Fixed, destination: Destination::All, is_wide: false, is_level: false }
}

#[test]
fn test_reset_state_is_that_of_a_disabled_apic() {
    let mut apic = LocalApic::new(3);
    assert_eq!(apic.base(), 0xfee0_0800);
    assert_eq!(LocalApic::new(0).base(), 0xfee0_0900);
    assert_eq!((read(&mut apic, ID), read(&mut apic, VERSION_REGISTER)), (3 << 24, 0x50014));
    assert_eq!((read(&mut apic, SVR), read(&mut apic, DFR), read(&mut apic, LVT_TIMER)), (0xff, u32::MAX, LVT_MASKED));
    apic.accept(&fixed(0x40));
    assert_eq!(apic.pending(), None, "software has not enabled it");
}

#[test]
fn test_interrupts_are_taken_by_priority_and_ended_in_turn() {
    let mut apic = enabled(0);
    for vector in [0x31, 0x52, 0x58] {
        apic.accept(&fixed(vector));
    }
    assert_eq!(apic.acknowledge(), Some(0x58));
    assert_eq!((apic.pending(), apic.priority()), (None, 0x50), "0x52 is of the same class");
    apic.accept(&fixed(0x60));
    assert_eq!(apic.acknowledge(), Some(0x60));
    assert_eq!(read(&mut apic, ISR + 3), 1, "0x60");
    assert_eq!(write(&mut apic, EOI, 0), Effect::None);
    assert_eq!(write(&mut apic, EOI, 0), Effect::None);
    assert_eq!(apic.acknowledge(), Some(0x52));
    write(&mut apic, EOI, 0);
    assert_eq!(apic.acknowledge(), Some(0x31));
    write(&mut apic, EOI, 0);
    write(&mut apic, EOI, 0);
    assert_eq!((apic.pending(), apic.priority()), (None, 0));
}

#[test]
fn test_task_priority_holds_interrupts_back_and_is_cr8() {
    let mut apic = enabled(0);
    apic.accept(&fixed(0x45));
    write(&mut apic, TPR, 0xffff_ff40);
    assert_eq!((apic.cr8(), apic.pending(), read(&mut apic, TPR)), (4, None, 0x40));
    apic.set_cr8(3);
    assert_eq!((apic.pending(), read(&mut apic, PPR)), (Some(0x45), 0x30));
}

#[test]
fn test_end_of_a_level_interrupt_is_told_to_the_ioapic() {
    let mut apic = enabled(0);
    apic.accept(&Message { is_level: true, ..fixed(0x71) });
    assert_eq!((apic.acknowledge(), read(&mut apic, TMR + 3)), (Some(0x71), 1 << 17));
    assert_eq!(write(&mut apic, EOI, 0), Effect::End(0x71));
}

#[test]
fn test_timer_raises_its_vector_unless_it_is_masked() {
    let mut apic = enabled(0);
    write(&mut apic, TIMER_DIVIDE, 0xb);
    write(&mut apic, LVT_TIMER, 0x40);
    write(&mut apic, TIMER_INITIAL, 100);
    assert_eq!((apic.next_interrupt(), read(&mut apic, TIMER_CURRENT)), (Some(1100), 100));
    apic.advance(1099);
    assert_eq!(apic.pending(), None);
    apic.advance(1100);
    assert_eq!((apic.acknowledge(), apic.next_interrupt()), (Some(0x40), None));
    write(&mut apic, EOI, 0);
    write(&mut apic, LVT_TIMER, 0x40 | LVT_MASKED);
    write(&mut apic, TIMER_INITIAL, 1);
    apic.advance(5000);
    assert_eq!((apic.pending(), apic.next_interrupt(), read(&mut apic, TIMER_CURRENT)), (None, None, 0));
}

#[test]
fn test_deadline_in_the_past_is_an_interrupt_at_once() {
    let mut apic = enabled(0);
    write(&mut apic, LVT_TIMER, 0x4_0040);
    apic.set_deadline(5300, START);
    assert_eq!((apic.deadline(), apic.next_interrupt()), (5300, Some(1300)));
    apic.move_deadline(Moment { now: 1000, tsc: 5200 });
    assert_eq!(apic.next_interrupt(), Some(1100));
    apic.set_deadline(4999, START);
    assert_eq!((apic.deadline(), apic.pending()), (0, Some(0x40)));
}

#[test]
fn test_command_gives_a_message_and_errors_are_latched_by_a_write() {
    let mut apic = enabled(1);
    write(&mut apic, ICR_HIGH, 0x0200_0000);
    let effect = write(&mut apic, ICR_LOW, 0x4030);
    let Effect::Send(message) = effect else { panic!("{effect:?}") };
    assert_eq!((message.vector, message.destination, message.is_wide), (0x30, Destination::Physical(2), false));
    assert_eq!((read(&mut apic, ICR_LOW), read(&mut apic, ICR_HIGH)), (0x4030, 0x0200_0000));
    write(&mut apic, LVT_ERROR, 0xee);
    assert_eq!(write(&mut apic, ICR_LOW, 0x0f), Effect::None);
    assert_eq!((apic.acknowledge(), read(&mut apic, ESR)), (Some(0xee), 0));
    write(&mut apic, ESR, 0);
    assert_eq!(read(&mut apic, ESR), ESR_SEND_ILLEGAL);
    write(&mut apic, ESR, 0);
    assert_eq!(read(&mut apic, ESR), 0);
}

#[test]
fn test_errors_without_a_legal_vector_end() {
    let mut apic = enabled(0);
    write(&mut apic, LVT_ERROR, 3);
    apic.accept(&fixed(5));
    write(&mut apic, ESR, 0);
    assert_eq!((apic.pending(), read(&mut apic, ESR)), (None, ESR_RECEIVE_ILLEGAL));
}

#[test]
fn test_nmi_is_taken_once() {
    let mut apic = LocalApic::new(0);
    apic.accept(&Message { delivery: Delivery::Nmi, ..fixed(0) });
    assert!(apic.has_nmi() && apic.take_nmi() && !apic.take_nmi());
}

#[test]
fn test_software_disabled_apic_masks_its_entries() {
    let mut apic = enabled(0);
    write(&mut apic, LVT_TIMER, 0x40);
    write(&mut apic, SVR, 0xff);
    assert_eq!(read(&mut apic, LVT_TIMER), 0x40 | LVT_MASKED);
    write(&mut apic, LVT_TIMER, 0x41);
    assert_eq!(read(&mut apic, LVT_TIMER), 0x41 | LVT_MASKED);
}

#[test]
fn test_modes_change_only_as_a_cpu_changes_them() {
    let mut apic = LocalApic::new(2);
    assert_eq!(apic.window(), Some(DEFAULT_BASE));
    for refused in [DEFAULT_BASE | BASE_X2APIC, DEFAULT_BASE | BASE_ENABLED | 1, 1 << 52 | BASE_ENABLED] {
        assert_eq!(apic.write_base(refused), Err(Refused), "{refused:#x}");
    }
    apic.write_base(DEFAULT_BASE | BASE_ENABLED | BASE_X2APIC).unwrap();
    assert_eq!((apic.window(), apic.address().logical), (None, 1 << 2));
    assert_eq!(apic.write_base(DEFAULT_BASE | BASE_ENABLED), Err(Refused));
    apic.write_base(DEFAULT_BASE).unwrap();
    assert_eq!(apic.write_base(DEFAULT_BASE | BASE_ENABLED | BASE_X2APIC), Err(Refused));
    apic.write_base(0x1234_5000 | BASE_ENABLED).unwrap();
    assert_eq!((apic.window(), apic.is_x2apic()), (Some(0x1234_5000), false));
}

#[test]
fn test_x2apic_registers_are_msrs_with_their_refusals() {
    let mut apic = x2apic(0x21);
    let msr = |register: u16| MSR_FIRST + u32::from(register);
    assert_eq!(apic.read_msr(msr(ID), 0), Ok(0x21));
    assert_eq!(apic.read_msr(msr(LDR), 0), Ok(2 << 16 | 2));
    assert_eq!(LocalApic::new(0).read_msr(msr(ID), 0), Err(Refused), "not in x2APIC mode");
    for register in [APR, DFR, ICR_HIGH, EOI, 0x2f, 0x3a, 0x40, 0] {
        assert_eq!(apic.read_msr(msr(register), 0), Err(Refused), "{register:#x}");
    }
    for (register, value) in [
        (EOI, 1),
        (ESR, 1),
        (TPR, 0x100),
        (SVR, 0x400),
        (LVT_TIMER, 1 << 12),
        (ICR_LOW, 1 << 12),
        (ID, 0),
        (ISR, 0),
        (TIMER_DIVIDE, 4),
        (TIMER_INITIAL, 1 << 32),
    ] {
        assert_eq!(apic.write_msr(msr(register), value, START), Err(Refused), "{register:#x}");
    }
    assert_eq!(apic.write_msr(msr(TPR), 0x20, START), Ok(Effect::None));
    let Ok(Effect::Send(message)) = apic.write_msr(msr(ICR_LOW), 0x1_0000_0041 | 3 << 32, START) else { panic!() };
    assert_eq!((message.destination, message.is_wide), (Destination::Physical(3), true));
    assert_eq!(apic.read_msr(msr(ICR_LOW), 0), Ok(0x3_0000_0041));
    let Ok(Effect::Send(message)) = apic.write_msr(msr(SELF_IPI), 0x55, START) else { panic!() };
    assert_eq!((message.destination, message.vector), (Destination::Itself, 0x55));
}

#[test]
fn test_odd_accesses_of_memory_do_nothing() {
    let mut apic = enabled(0);
    let mut data = [0xaa; 8];
    apic.read_memory(at(VERSION_REGISTER), 0, &mut data);
    assert_eq!(data, [0; 8]);
    apic.read_memory(at(VERSION_REGISTER) + 2, 0, &mut data[..1]);
    assert_eq!(data[0], 5);
    for (offset, length) in [(at(TPR) + 1, 4), (at(TPR), 1), (at(TPR), 8), (at(ID), 4), (at(0x3a), 4), (0xff0, 4)] {
        assert_eq!(apic.write_memory(offset, START, &vec![0x77; length]), Effect::None);
    }
    assert_eq!((read(&mut apic, TPR), read(&mut apic, ID)), (0, 0));
    write(&mut apic, ESR, 0);
    assert_eq!(read(&mut apic, ESR), ESR_ILLEGAL_REGISTER);
}

#[test]
fn test_every_register_takes_every_value() {
    for mut apic in [enabled(0), x2apic(300)] {
        let mut state = 0x1234_5678_9abc_def0u64;
        for step in 0..200_000u64 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let moment = Moment { now: step * 100, tsc: state };
            let register = u16::try_from(state >> 20 & 0xff).unwrap();
            let [a, b, c, d, ..] = state.to_le_bytes();
            apic.write_memory(at(register), moment, &[a, b, c, d]);
            let _ = apic.write_msr(MSR_FIRST + u32::from(register), state >> (state >> 58), moment);
            let _ = apic.read_msr(MSR_FIRST + u32::from(register), moment.now);
            let mut data = [0; 4];
            apic.read_memory(at(register), moment.now, &mut data);
            apic.set_deadline(state, moment);
            apic.advance(moment.now);
            apic.accept(&fixed(a));
            apic.acknowledge();
            assert!(apic.next_interrupt().is_none_or(|next| next > moment.now));
        }
    }
}
