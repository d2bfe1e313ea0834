use proptest::prelude::*;

use super::*;

/// Two threads, the second stopped first, and sixteen registers that conditions may use.
struct Fake;

impl Session for Fake {
    fn thread_ids(&mut self) -> Vec<u64> {
        vec![2, 1]
    }

    fn threads(&mut self) -> Vec<ThreadEntry> {
        let entry =
            |id, core| ThreadEntry { id, name: format!("vCPU {core}"), extra: "a<b & #*".into(), core: Some(core) };
        vec![entry(2, 1), entry(1, 0)]
    }

    fn register(&self, number: u16) -> Option<RegisterId> {
        u8::try_from(number).ok().filter(|number| *number < 16).map(RegisterId::General)
    }
}

/// A filter with something like gdbstub behind it.
struct Harness {
    filter: Filter,
    /// The payloads that passed, and how many conditions came with each.
    passed: Vec<(String, usize)>,
    interrupts: usize,
}

impl Harness {
    fn new() -> Self {
        Self { filter: Filter::new(1024), passed: Vec::new(), interrupts: 0 }
    }

    fn without_acks() -> Self {
        let mut harness = Self::new();
        assert_eq!(harness.send(&frame(b"QStartNoAckMode")), "+$OK#9a");
        harness
    }

    /// What the client gets for these bytes.
    fn send(&mut self, bytes: &[u8]) -> String {
        self.filter.receive(bytes);
        self.work();
        String::from_utf8_lossy(&self.filter.output()).into_owned()
    }

    /// The payload of the one reply to a packet.
    fn ask(&mut self, payload: &str) -> String {
        let reply = self.send(&frame(payload.as_bytes()));
        let end = reply.len().saturating_sub(3);
        reply.get(1..end).unwrap_or_default().to_owned()
    }

    /// What passes for a packet.
    fn passes(&mut self, payload: &str) -> String {
        self.passed.clear();
        self.ask(payload);
        self.passed.iter().map(|(payload, _)| payload.as_str()).collect::<Vec<_>>().join(" ")
    }

    fn work(&mut self) {
        while let Some(event) = self.filter.next(&mut Fake) {
            match event {
                Event::Packet { bytes, conditions } => {
                    let payload = &bytes[1..bytes.len() - 3];
                    assert_eq!(bytes, frame(payload));
                    self.passed.push((String::from_utf8_lossy(payload).into_owned(), conditions.len()));
                    let reply = match payload {
                        [b'v', b'C', b'o', b'n', b't', b';', ..] => continue,
                        b"?" => &b"T05thread:p1.2;"[..],
                        [b'q', b'S', ..] => b"PacketSize=400;multiprocess+",
                        b"qOffsets" => b"TextSeg=40000",
                        _ => b"OK",
                    };
                    self.filter.outgoing(&[b"+", frame(reply).as_slice()].concat());
                }
                Event::Interrupt => {
                    self.interrupts += 1;
                    self.stop("T02thread:p1.1;");
                }
            }
        }
    }

    fn stop(&mut self, reply: &str) {
        self.filter.outgoing(&frame(reply.as_bytes()));
    }
}

#[test]
fn test_packets_are_acknowledged_until_the_client_wants_none() {
    let mut harness = Harness::new();
    assert_eq!(harness.send(b"+$g#67"), "+$OK#9a");
    assert_eq!(harness.send(&[frame(b"QStartNoAckMode"), frame(b"g")].concat()), "+$OK#9a$OK#9a");
    assert_eq!(harness.send(b"+$g#67+"), "$OK#9a");
}

#[test]
fn test_damaged_packet_is_asked_for_again_or_refused() {
    let mut harness = Harness::new();
    assert_eq!(harness.send(b"$g#68"), "-");
    assert_eq!(harness.send(b"$g#zz"), "-");
    assert!(harness.passed.is_empty());
    assert_eq!(Harness::without_acks().send(b"$g#68"), "$E16#ac");
}

#[test]
fn test_stop_that_is_asked_for_again_is_the_last_one_whatever_was_asked_between() {
    let mut harness = Harness::without_acks();
    let stop = harness.ask("?");
    assert!(stop.starts_with("T05"), "{stop}");
    for packet in ["qOffsets", "g", "qSupported"] {
        harness.ask(packet);
        assert_eq!(harness.ask("?"), stop, "{packet}");
    }
}

#[test]
fn test_nack_gets_the_last_reply_again_a_few_times() {
    let mut harness = Harness::new();
    harness.send(b"$g#67");
    assert_eq!(harness.send(b"-"), "$OK#9a");
    assert_eq!(harness.send(&b"-".repeat(1000)), "$OK#9a".repeat(MAX_NACKS as usize - 1));
    assert!(harness.filter.wants_close());
}

#[test]
fn test_garbage_and_cut_off_packets_are_skipped() {
    let mut harness = Harness::without_acks();
    assert_eq!(harness.send(b"\x00zz#\xff\x80$m10,$g#67"), "$OK#9a");
    assert_eq!(harness.passed.last().unwrap().0, "g");
}

#[test]
fn test_packet_longer_than_the_buffer_is_refused() {
    let mut harness = Harness::without_acks();
    let fits = format!("G{}", "0".repeat(1018));
    assert_eq!(harness.ask(&fits), "OK");
    assert_eq!(harness.ask(&format!("{fits}00")), "E16");
    assert_eq!(harness.ask("g"), "OK");
}

#[test]
fn test_features_are_reduced_to_what_gdbstub_takes_and_extended() {
    let mut harness = Harness::without_acks();
    let reply = harness.ask("qSupported:multiprocess+;;swbreak+;xmlRegisters=i386;");
    assert_eq!(reply, "PacketSize=400;multiprocess+;ConditionalBreakpoints+;qXfer:threads:read+");
    assert_eq!(harness.passed.last().unwrap().0, "qSupported:multiprocess+");
    assert_eq!(harness.passes("qSupported"), "qSupported:multiprocess-");
}

#[test]
fn test_unknown_packets_get_the_empty_reply() {
    let mut harness = Harness::without_acks();
    for packet in [
        "",
        "qCRC:1000,10",
        "vAttachName;61",
        "qProcessInfoPID:1",
        "vMustReplyEmpty",
        "QNonStop:1",
        "QThreadEvents:1",
        "vCtrlC",
        "vContSupported?",
        "qXfer:nothing:read::0,1",
        "qXfer:features:write:a:0:x",
        "bc",
        "qTStatus",
        "x0,1",
        "vFile:stat:61",
        "jThreadsInfo",
        "Hm1",
        "A1",
        "vFile",
        "\u{fffd}",
    ] {
        assert_eq!(harness.ask(packet), "", "{packet}");
    }
    assert!(harness.passed.is_empty());
}

#[test]
fn test_malformed_packets_are_refused() {
    let mut harness = Harness::without_acks();
    for packet in [
        "gx",
        "kk",
        "Dx",
        "D;0",
        "D;",
        "m",
        "m1",
        "m1,",
        "m1,x",
        "m00000000000000001,1",
        "M1,2:00",
        "M1,1:0",
        "X1,2:a",
        "X1,1:}",
        "p",
        "pzz",
        "p100000000",
        "P1",
        "P1=",
        "P1=0",
        "G",
        "G0",
        "Gxx",
        "Hg",
        "Hg-1",
        "Hgp01.zz",
        "Hgzz",
        "T",
        "T0",
        "T-1",
        "vCont",
        "vCont;",
        "vCont;t",
        "vCont;x",
        "vCont;c:",
        "vCont;c;;",
        "vCont;C5",
        "vCont;r1",
        "vCont;r2,1",
        "vCont;rfffffffffffffffff,1",
        "c1000",
        "s1000",
        "C",
        "C5",
        "c:1",
        "vKill;0",
        "vKill;",
        "vAttach;x",
        "vRun;6",
        "R",
        "Z0",
        "Z0,1",
        "Z0,1,",
        "Zf,1,1",
        "Z00,1,1",
        "Z0,1,1,1",
        "Z0,11111111111111111,1",
        "z0,1,1;X1,27",
        "qAttached:0",
        "qRcmd,6",
        "qRcmd,zz",
        "qThreadExtraInfo,0",
        "qThreadExtraInfo,",
        "qXfer:features:read:a:0",
        "qXfer:features:read:a:x,1",
        "qXfer:exec-file:read:0:0,1",
        "qXfer:threads:read:a:0,1",
        "QCatchSyscalls:1;",
        "QCatchSyscalls:1;11111111111111111",
        "QCatchSyscalls:2",
        "QEnvironmentHexEncoded:61",
        "QSetWorkingDir:6",
        "qRegisterInfoz",
        "QStartupWithShell:2",
    ] {
        assert_eq!(harness.ask(packet), "E16", "{packet}");
    }
    for packet in [
        "vFile:open:61,0",
        "vFile:open:6,0,0",
        "vFile:open:61,4,0",
        "vFile:open:61,0,10000",
        "vFile:close:x",
        "vFile:pread:1,2",
    ] {
        assert_eq!(harness.ask(packet), "F-1,16", "{packet}");
    }
    assert!(harness.passed.is_empty());
}

#[test]
fn test_well_formed_packets_pass_as_they_are() {
    let mut harness = Harness::without_acks();
    for packet in [
        "?",
        "!",
        "g",
        "G00ff",
        "p10",
        "P10=0000000000000000",
        "M10,2:00ff",
        "X10,3:a}\u{3}:",
        "D",
        "D;1",
        "vCont?",
        "qOffsets",
        "qRcmd,",
        "qRcmd,68656c70",
        "qAttached",
        "qAttached:1",
        "vRun;",
        "vRun;61;62",
        "vAttach;1",
        "Z2,1000,8",
        "z0,1000,1",
        "Z1,1000,1",
        "qXfer:features:read:target.xml:0,ffb",
        "qXfer:exec-file:read:1:0,10",
        "vFile:open:61,0,1c0",
        "vFile:setfs:0",
        "vFile:pread:5,1000,0",
        "vFile:pwrite:5,0,a,b",
        "QCatchSyscalls:1;1;2",
        "QDisableRandomization:1",
        "qHostInfo",
    ] {
        assert_eq!(harness.passes(packet), packet);
    }
}

#[test]
fn test_empty_write_is_a_probe_and_a_write_of_a_colon_is_none() {
    let mut harness = Harness::without_acks();
    assert_eq!(harness.passes("X1000,0:"), "");
    assert_eq!(harness.ask("X1000,0:"), "OK");
    assert_eq!(harness.passes("X1000,1::"), "X1000,1::");
}

#[test]
fn test_memory_reads_are_limited_to_a_reply_and_the_address_space() {
    let mut harness = Harness::without_acks();
    assert_eq!(harness.passes("m1000,ffffffffffffffff"), "m1000,1f0");
    assert_eq!(harness.passes("mfffffffffffffffe,10"), "mfffffffffffffffe,2");
    assert_eq!(harness.passes("mffffffffffffffff,1"), "mffffffffffffffff,1");
    assert_eq!(harness.passes("m0,0"), "");
}

#[test]
fn test_threads_are_answered_from_the_session() {
    let mut harness = Harness::without_acks();
    assert_eq!(harness.ask("qfThreadInfo"), "m2,1");
    assert_eq!(harness.ask("qsThreadInfo"), "l");
    assert_eq!(harness.ask("qC"), "QC2");
    assert_eq!((harness.ask("T1"), harness.ask("T3"), harness.ask("Tp2.1")), ("OK".into(), "E03".into(), "E03".into()));
    assert_eq!((harness.ask("Hg3"), harness.ask("Hgp1.1")), ("E03".into(), "OK".into()));
    assert_eq!(harness.passed.last().unwrap().0, "Hg1");
    assert_eq!(harness.ask("qC"), "QC1");
    assert_eq!(harness.passes("Hg0"), "Hg1");
    harness.ask("qSupported:multiprocess+");
    assert_eq!(harness.ask("qfThreadInfo"), "mp1.2,p1.1");
    assert_eq!(harness.ask("qThreadExtraInfo,p1.1"), hex(b"vCPU 0 (a<b & #*)"));
}

#[test]
fn test_threads_document_is_escaped_twice_and_read_in_parts() {
    let mut harness = Harness::without_acks();
    let whole = harness.ask("qXfer:threads:read::0,200");
    assert!(whole.starts_with("l<?xml"), "{whole}");
    assert!(
        whole.contains("<thread id=\"1\" core=\"0\" name=\"vCPU 0\">a&lt;b &amp; }\u{3}}\u{a}</thread>"),
        "{whole}"
    );
    let first = harness.ask("qXfer:threads:read::0,20");
    let second = harness.ask("qXfer:threads:read::20,200");
    assert_eq!(whole[1..], format!("{}{}", &first[1..], &second[1..]));
    assert_eq!((&first[..1], &second[..1]), ("m", "l"));
    assert_eq!(harness.ask("qXfer:threads:read::ffffffffffffffff,20"), "l");
}

#[test]
fn test_resumes_take_their_normal_form() {
    for (packet, expected) in [
        ("vCont;c", "vCont;c"),
        ("vCont;c:-1", "vCont;c"),
        ("vCont;c:p1.-1", "vCont;c"),
        ("vCont;C05:p1", "vCont;C05"),
        ("vCont;s:p1.1;c:p1.-1", "vCont;s:1;c"),
        ("vCont;r10,20:1;c:2", "vCont;r10,20:1;c:2"),
        ("vCont;s:1;c:1", "vCont;s:1"),
        ("vCont;c;s:1", "vCont;c"),
        ("vCont;s", "vCont;s:2;s:1"),
        ("vCont;c:1;s", "vCont;c:1;s:2"),
        ("vCont;s:0", "vCont;s:2;s:1"),
        ("c", "vCont;c"),
        ("C05", "vCont;C05"),
        ("s", "vCont;s:2;c"),
    ] {
        assert_eq!(Harness::without_acks().passes(packet), expected, "{packet}");
    }
    assert_eq!(Harness::without_acks().ask("vCont;c:7"), "E03");
    assert_eq!(Harness::without_acks().ask("vCont;c:p2.1"), "E03");
}

#[test]
fn test_old_resumes_obey_hc() {
    let mut harness = Harness::without_acks();
    assert_eq!(harness.ask("Hc1"), "OK");
    assert_eq!(harness.passes("s"), "vCont;s:1");
    harness.stop("T05thread:1;");
    harness.filter.output();
    assert_eq!(harness.ask("Hc-1"), "OK");
    assert_eq!(harness.passes("c"), "vCont;c");
}

#[test]
fn test_packets_wait_while_the_guest_runs() {
    let mut harness = Harness::without_acks();
    harness.send(&[frame(b"c"), frame(b"g"), frame(b"c"), frame(b"g")].concat());
    assert_eq!(harness.passed.len(), 1);
    harness.stop("T05thread:1;");
    harness.work();
    assert_eq!(
        harness.passed.iter().map(|(packet, _)| packet.as_str()).collect::<Vec<_>>(),
        ["vCont;c", "g", "vCont;c"]
    );
    assert!(harness.filter.is_running());
}

#[test]
fn test_interrupt_overtakes_all_that_waits() {
    let mut harness = Harness::without_acks();
    harness.send(&frame(b"c"));
    let reply = harness.send(&[frame(b"g"), vec![3]].concat());
    assert_eq!(harness.interrupts, 1);
    assert_eq!(reply, "$T02thread:p1.1;#a3$OK#9a");
    harness.send(&[frame(b"c"), frame(b"c"), vec![3]].concat());
    assert_eq!(harness.interrupts, 2);
    assert!(harness.filter.is_running(), "by the second packet");
}

#[test]
fn test_interrupt_of_a_stopped_guest_does_nothing() {
    let mut harness = Harness::without_acks();
    assert_eq!(harness.send(&[3]), "");
    harness.send(&frame(b"c"));
    assert_eq!(harness.interrupts, 0);
}

#[test]
fn test_kill_and_detach_do_not_wait() {
    for packet in ["k", "D;1", "vKill;1"] {
        let mut harness = Harness::without_acks();
        harness.send(&frame(b"c"));
        assert_eq!(harness.passes(packet), packet);
        assert!(!harness.filter.is_running());
        assert_eq!(harness.passes("?"), "?", "nothing is known of the guest");
    }
}

#[test]
fn test_kill_has_no_reply() {
    let mut harness = Harness::without_acks();
    assert_eq!(harness.send(&frame(b"k")), "");
    assert!(harness.filter.wants_close());
    let mut extended = Harness::without_acks();
    assert_eq!(extended.ask("!"), "OK");
    assert_eq!(extended.send(&frame(b"k")), "");
    assert!(!extended.filter.wants_close() && extended.filter.is_extended());
    assert_eq!(extended.send(&frame(b"R00")), "");
    assert_eq!(extended.ask("g"), "OK");
}

#[test]
fn test_last_stop_is_said_again_as_it_was() {
    let mut harness = Harness::without_acks();
    assert_eq!(harness.ask("?"), "T05thread:p1.2;");
    harness.send(&frame(b"c"));
    harness.stop("T05thread:p1.1;swbreak:;10:00;");
    harness.filter.output();
    assert_eq!(harness.ask("?"), "T05thread:p1.1;10:00;", "the client does not know swbreak");
    assert_eq!(harness.ask("qC"), "QC1");
    harness.ask("qSupported:multiprocess+;swbreak+;hwbreak+");
    harness.send(&frame(b"c"));
    harness.stop("T05thread:p1.1;swbreak:;");
    harness.filter.output();
    assert_eq!(harness.ask("?"), "T05thread:p1.1;swbreak:;");
    harness.send(&frame(b"c"));
    harness.stop("W2a");
    assert!(!harness.filter.is_running());
    harness.filter.output();
    assert_eq!(harness.ask("?"), "W2a;process:1");
}

#[test]
fn test_conditions_leave_the_packet_and_are_verified() {
    let mut harness = Harness::without_acks();
    assert_eq!(harness.ask("Z0,1000,1;X3,220127X6,26000322012700"), "E16", "the length is wrong");
    assert_eq!(harness.ask("Z0,1000,1;X3,220127X6,260003260127"), "OK", "a register that isn't there");
    assert_eq!(harness.ask("Z0,1000,1;X3,220127X4,26000327"), "OK");
    assert_eq!(harness.ask("Z1,1000,1;X3,220127;X3,220027"), "OK");
    assert_eq!(harness.ask("Z0,1000,1"), "OK");
    let plain = |kind, count| (format!("Z{kind},1000,1"), count);
    assert_eq!(harness.passed, [plain(0, 0), plain(0, 2), plain(1, 2), plain(0, 0)]);
}

#[test]
fn test_conditions_and_commands_in_the_wrong_place_are_refused() {
    let mut harness = Harness::without_acks();
    for packet in
        ["Z2,1000,8;X3,220127", "z0,1000,1;X3,220127", "Z0,1000,1;cmds:0,X3,220127", "Z0,1000,1;X", "Z0,1000,1;X1,2"]
    {
        assert_eq!(harness.ask(packet), "E16", "{packet}");
    }
    assert!(harness.passed.is_empty());
}

#[test]
fn test_failure_of_the_stub_is_answered_and_its_state_restored() {
    let mut harness = Harness::without_acks();
    harness.ask("qSupported:multiprocess+");
    harness.ask("Hg1");
    harness.filter.receive(&frame(b"g"));
    assert!(harness.filter.next(&mut Fake).is_some());
    harness.filter.outgoing(b"+$00");
    let again = harness.filter.recover();
    assert_eq!(again, [frame(b"qSupported:multiprocess+"), frame(b"Hg1")]);
    assert_eq!(harness.filter.output(), frame(b"E05"));
    assert_eq!(harness.ask("g"), "OK");
}

#[test]
fn test_console_text_is_shown_only_while_the_guest_runs() {
    let mut harness = Harness::without_acks();
    assert!(!harness.filter.console(b"hi"));
    harness.send(&frame(b"c"));
    assert!(harness.filter.console(b"hi"));
    assert_eq!(harness.filter.output(), frame(b"O6869"));
}

#[test]
fn test_client_that_floods_a_running_guest_is_let_go() {
    let mut harness = Harness::without_acks();
    harness.send(&frame(b"c"));
    harness.send(&frame(b"g").repeat(MAX_WAITING));
    assert!(harness.filter.wants_close());
}

/// Packets of real sessions, and what breaks parsers.
fn session() -> impl Strategy<Value = Vec<u8>> {
    const PACKETS: [&[u8]; 20] = [
        b"qSupported:multiprocess+;swbreak+;hwbreak+",
        b"QStartNoAckMode",
        b"?",
        b"!",
        b"Hgp1.1",
        b"Hc-1",
        b"g",
        b"m1000,40",
        b"M1000,2:00ff",
        b"X1000,2:}\x03a",
        b"p10",
        b"P10=0000000000000000",
        b"Z0,1000,1;X3,220127X4,26000327",
        b"z0,1000,1",
        b"vCont;s:p1.1;c",
        b"c",
        b"qXfer:threads:read::0,40",
        b"qRcmd,68656c70",
        b"vFile:open:61,0,0",
        b"D;1",
    ];
    let damage = (any::<prop::sample::Index>(), any::<u8>(), 0u8..4);
    let part = prop_oneof![
        8 => (0..PACKETS.len()).prop_map(|i| frame(PACKETS[i])),
        2 => ((0..PACKETS.len()), damage).prop_map(|(i, (at, byte, how))| {
            let mut payload = PACKETS[i].to_vec();
            let at = at.index(payload.len());
            match how {
                0 => payload[at] = byte,
                1 => payload.truncate(at),
                2 => payload.insert(at, byte),
                _ => { payload.remove(at); }
            }
            frame(&payload)
        }),
        1 => proptest::collection::vec(any::<u8>(), 0..8),
        1 => prop::sample::select(vec![vec![3], b"+".to_vec(), b"-".to_vec(), b"$".to_vec(), b"#".to_vec()]),
    ];
    proptest::collection::vec(part, 0..30).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn test_any_bytes_are_taken_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        Harness::new().send(&bytes);
    }

    #[test]
    fn test_any_split_of_a_stream_gives_the_same(bytes in session(), cuts in proptest::collection::vec(1usize..40, 1..20)) {
        let (mut whole, mut cut) = (Harness::new(), Harness::new());
        let expected = whole.send(&bytes);
        let mut got = String::new();
        let mut rest = &bytes[..];
        for length in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (part, after) = rest.split_at(rest.len().min(*length));
            got += &cut.send(part);
            rest = after;
        }
        prop_assert_eq!(cut.passed, whole.passed);
        prop_assert_eq!(cut.interrupts, whole.interrupts);
        prop_assert_eq!(got, expected);
    }

    #[test]
    fn test_any_output_of_the_stub_is_taken_without_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..100),
        replies in proptest::collection::vec("[TSWXOE]?[0-9a-z:;.]{0,30}", 0..8),
    ) {
        let mut harness = Harness::without_acks();
        harness.filter.outgoing(&bytes);
        for reply in replies {
            harness.filter.receive(&frame(b"vCont;c"));
            let _ = harness.filter.next(&mut Fake);
            harness.filter.outgoing(&frame(reply.as_bytes()));
        }
    }
}
