//! Whatever a guest passes: no panic, no hang, and nothing outside of what the call may touch.

use super::*;
use proptest::prelude::*;

fn ports() -> Vec<u16> {
    (0..=u16::MAX).filter(|port| identify(*port).is_some()).collect()
}

/// Addresses and lengths at which something could go wrong.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => any::<u64>(),
        4 => 0..RAM + 16,
        2 => (RAM - 1100)..RAM,
        2 => 0u64..64,
        1 => (u64::MAX - 4096)..=u64::MAX,
        2 => Just(NAME),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn test_any_parameters_leave_the_host_alone(
        calls in prop::collection::vec((prop::sample::select(ports()), word(), prop::collection::vec(word(), 5), any::<bool>(), 0u64..3), 1..12),
        name in prop_oneof![Just("/d/file"), Just("/v"), Just("/t/x"), Just("/.."), Just("")],
        pages in any::<u64>(),
    ) {
        let guest = guest_with(Output::Capture { limit: 4096 }, &["a"], &[("K", "V")]);
        for (port, value, words, at_parameters, kind) in calls {
            guest.name(name);
            let mut parameters: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            // Now and then a descriptor that may be open.
            if kind == 0 {
                let fd = [0, 12, 24].into_iter().nth(usize::try_from(pages % 3).unwrap()).unwrap();
                parameters[fd..fd + 4].copy_from_slice(&3i32.to_le_bytes());
            }
            guest.put(PARAMETERS, &parameters);
            let address = if at_parameters { PARAMETERS + kind } else { value };
            let mut walks = 0u64;
            let mut translate = |at: u64| {
                walks += 1;
                (at % 7 != pages % 7).then_some((at.wrapping_mul(pages | 1) % (2 * RAM), at % 0x1000))
            };
            let outcome = guest.raw(port, address, &|| false, &mut 0, &mut translate);
            // A buffer of all of RAM, byte by byte, checked and moved.
            prop_assert!(walks <= 4 * RAM);
            prop_assert!(!matches!(outcome, Outcome::Interrupted | Outcome::HostError(_)));
        }
    }
}

#[test]
fn test_parameters_at_the_end_of_ram_are_ignored() {
    let guest = guest();
    for port in ports() {
        for address in [RAM - 1, RAM, 0xffff_ffff] {
            let outcome = guest.value(port, address);
            assert!(matches!(outcome, Outcome::Done | Outcome::Exit(_) | Outcome::Crash(_)), "{port:#x}: {outcome:?}");
        }
    }
}

#[test]
fn test_open_files_and_created_paths_have_a_limit() {
    let guest = guest();
    let mut last = 0;
    for _ in 0..=crate::isolation::descriptors::MAX_OPEN {
        last = guest.open("/v/a", 0);
    }
    assert_eq!(last, -1, "EMFILE has no number of its own");
    guest.services.files.set_created(crate::isolation::files::MAX_CREATED - 1);
    assert_eq!((guest.mkdir("/last").0, guest.mkdir("/one-more")), (1, (2, abi::EIO)));
    assert!(guest.open("/one-more", abi::O_CREAT) < 0);
    assert_eq!(guest.stat("/one-more", 0).1, abi::ENOENT);
}
