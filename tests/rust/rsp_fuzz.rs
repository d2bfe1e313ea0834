//! Hostile clients of the server for gdb: random and mutated sessions go through the whole of it, with a real guest of
//! two vCPUs behind. None may panic, hang or end the VM, and the next client is served each time.
//!
//! `UHYVE_FUZZ_PACKETS` says how many packets (100,000 by default), `UHYVE_FUZZ_SEED` where to begin.

// Helpers of tests unwrap as the tests do.
#![allow(clippy::unwrap_used)]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use uhyve_core::boot::Image;
use uhyve_core::debug::breakpoints::Breakpoint;
use uhyve_core::debug::condition::Program;
use uhyve_core::debug::engine::Status;
use uhyve_core::debug::stop::Stop;
use uhyve_core::devices::serial::Output;
use uhyve_core::error::Error;
use uhyve_core::gdb::address::Address;
use uhyve_core::gdb::policy::{Answer, Decision, Failure, Policy, ThreadInfo};
use uhyve_core::gdb::server::Server;
use uhyve_core::isolation::IoMode;
use uhyve_core::isolation::landlock::FileIsolation;
use uhyve_core::memory::Backing;
use uhyve_core::paging::PagingMode;
use uhyve_core::vm::{Config, Machine, SoftConfig};

/// `again: inc rax; add rbx, rax; nop; jmp again`: a guest that needs no stack and never ends.
const LOOP: [u8; 9] = [0x48, 0xff, 0xc0, 0x48, 0x01, 0xc3, 0x90, 0xeb, 0xf7];
/// Where its instructions begin.
const INSTRUCTIONS: [u64; 4] = [0, 3, 6, 7];
/// No answer takes so long.
const SOON: Duration = Duration::from_secs(30);

/// Packets of real sessions of gdb and LLDB. `PC` is an instruction of the guest, `DATA` memory that it does not use.
const PACKETS: [&str; 66] = [
    "qSupported:multiprocess+;swbreak+;hwbreak+;qRelocInsn+;fork-events+;vfork-events+;exec-events+;vContSupported+;\
     QThreadEvents+;no-resumed+;memory-tagging+;xmlRegisters=i386",
    "qSupported:xmlRegisters=i386,arm,mips,arc;multiprocess+;fork-events+;vfork-events+",
    "vMustReplyEmpty",
    "QStartNoAckMode",
    "!",
    "Hgp0.0",
    "Hg0",
    "Hgp1.1",
    "Hg2",
    "Hgp1.2",
    "Hc-1",
    "Hc0",
    "Hc1",
    "Hcp1.2",
    "qXfer:features:read:target.xml:0,ffb",
    "qXfer:features:read:target.xml:100,ffb",
    "qXfer:auxv:read::0,1000",
    "qXfer:exec-file:read:1:0,1000",
    "qXfer:memory-map:read::0,1000",
    "qXfer:threads:read::0,1000",
    "qXfer:threads:read::8,9",
    "qTStatus",
    "?",
    "qfThreadInfo",
    "qsThreadInfo",
    "qAttached:1",
    "qAttached",
    "qC",
    "qOffsets",
    "qSymbol::",
    "T1",
    "Tp1.2",
    "qThreadExtraInfo,p1.1",
    "g",
    "p0",
    "p10",
    "p3a",
    "mPC,9",
    "mPC,40",
    "mDATA,400",
    "m0,8",
    "mffffffffffffffff,8",
    "xPC,8",
    "qCRC:PC,9",
    "vCont?",
    "Z0,PC,1",
    "z0,PC,1",
    "Z1,PC,1",
    "z1,PC,1",
    "Z0,PC,1;X9,260000164022051327",
    "Z0,PC,1;X7,26000016400e27X3,220027",
    "Z0,PC,1;X6,210000270000",
    "Z1,PC,1;X3,220127",
    "Z2,DATA,8",
    "z2,DATA,8",
    "Z4,DATA,4",
    "z4,DATA,4",
    "qRcmd,68656c70",
    "qRcmd,7374617473",
    "qRcmd,766d",
    "vFile:setfs:0",
    "vFile:open:2f6574632f706173737764,0,0",
    "vFile:pread:3,800,0",
    "vFile:close:3",
    "qHostInfo",
    "qProcessInfo",
];
/// What lets the guest run. Ctrl-C follows.
const RESUMES: [&str; 12] = [
    "vCont;c",
    "vCont;c:p1.-1",
    "vCont;s:p1.1",
    "vCont;s:1;c",
    "vCont;s:p1.2;c:p1.-1",
    "vCont;rPC,DATA:p1.1;c:p1.-1",
    "vCont;C05:1",
    "vCont;c:2",
    "c",
    "s",
    "C05",
    "S05",
];
/// What may end the guest.
const DANGEROUS: [&str; 14] = [
    "k",
    "vKill;1",
    "R00",
    "vRun;",
    "vRun;6869;6f",
    "D",
    "D;1",
    "P10=0000000000000000",
    "P0=ffffffffffffffff",
    "MDATA,4:00112233",
    "XPC,2:ab",
    "MPC,1:90",
    "G0000000000000000",
    "vAttach;1",
];
const NUMBERS: [&str; 8] =
    ["0", "1", "-1", "ffffffff", "7fffffffffffffff", "ffffffffffffffff", "10000000000000000", ""];

/// A packet that no session has, and what its reply begins with.
const LAST: &[u8] = b"qXfer:threads:read::0,3";
const LAST_REPLY: &[u8] = b"m<?x#";

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit).unwrap()).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// Makes fresh VMs, and knows the one that is served.
struct Maker {
    image: Arc<Image>,
    current: Mutex<Arc<Machine>>,
}

impl Maker {
    fn make(image: &Arc<Image>) -> Result<Arc<Machine>, Error> {
        let machine = Machine::start(Config {
            image: image.clone(),
            memory: Some(32 << 20),
            cpus: Some(2),
            kernel_args: None,
            args: None,
            environment: Vec::new(),
            files: Vec::new(),
            output: Output::Discard,
            backend: "kvm".into(),
            aslr: false,
            backing: Backing::default(),
            pit: false,
            cpu_pm: false,
            affinity: Vec::new(),
            tempdir: None,
            isolation: FileIsolation::None,
            io_mode: IoMode::default(),
            soft: SoftConfig::default(),
            debugging: true,
            wrapper: None,
            measure: Default::default(),
        })?;
        machine.wait(Some(Instant::now() + SOON), &mut || Ok::<(), Error>(()))?.unwrap();
        let (pc, mode) = machine.with_vcpu(0, |context| {
            Ok((context.cpu.registers()?.rip, PagingMode::from(&context.cpu.system_registers()?)))
        })?;
        machine.view().write(&mode, pc, &LOOP).unwrap();
        Ok(machine)
    }

    fn current(&self) -> Arc<Machine> {
        self.current.lock().unwrap().clone()
    }
}

impl Policy for Maker {
    fn judges(&self) -> bool {
        false
    }

    fn on_stop(&self, _: &Stop) -> Answer<Decision> {
        None
    }

    fn threads(&self) -> Answer<Vec<ThreadInfo>> {
        None
    }

    fn on_attach(&self, _: &str) -> Answer<()> {
        None
    }

    fn on_detach(&self, _: &str) -> Answer<()> {
        None
    }

    fn on_disconnect(&self, _: &str) -> Answer<Decision> {
        None
    }

    fn monitor(&self, _: &str, _: &str) -> Answer<String> {
        None
    }

    fn monitor_commands(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    fn bind(&self, _: &Arc<Breakpoint>, _: &str) -> Result<(), String> {
        Err("none".into())
    }

    fn compile(&self, _: &str) -> Result<Program, String> {
        Err("none".into())
    }

    fn restart(&self, _: Option<Vec<String>>) -> Result<Arc<Machine>, Failure> {
        let machine = Self::make(&self.image)
            .map_err(|error| Failure { text: error.to_string(), error: Arc::new(error.to_string()) })?;
        let before = std::mem::replace(&mut *self.current.lock().unwrap(), machine.clone());
        before.close();
        Ok(machine)
    }

    fn keep(&self, _: Failure) {}
}

/// A VM with its server.
struct World {
    maker: Arc<Maker>,
    server: Server,
    path: PathBuf,
    pc: u64,
}

impl World {
    fn new() -> Result<Self, Error> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let image = Arc::new(Image::from_bytes("demo", uhyve_core::demo::IMAGE.to_vec())?);
        let machine = Maker::make(&image)?;
        let pc = machine.with_vcpu(0, |context| Ok(context.cpu.registers()?.rip))?;
        let number = COUNT.fetch_add(1, Ordering::SeqCst);
        let path = std::env::temp_dir().join(format!("uhyve-fuzz-{}-{number}", std::process::id()));
        let maker = Arc::new(Maker { image, current: Mutex::new(machine.clone()) });
        let address = Address::parse(&format!("unix:{}", path.display()))?;
        let server = Server::start(machine, &address, Some(maker.clone()), None)?;
        Ok(Self { maker, server, path, pc })
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        stream
    }

    /// Whether the guest has ended, one way or another.
    fn is_over(&self) -> bool {
        match self.maker.current().engine.status() {
            Status::Running => false,
            Status::Stopped(stop) => stop.reason.end().is_some(),
            Status::Ended(_) => true,
        }
    }

    /// Sends a session, and reads until its last packet is answered or the server hangs up. How many replies came.
    fn run(&self, session: &[u8]) -> usize {
        let mut stream = self.connect();
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut writer = stream.try_clone().unwrap();
        let (deadline, mut received) = (Instant::now() + SOON, Vec::new());
        std::thread::scope(|scope| {
            // What was begun ends first. A server that has hung up takes no more.
            let last = [session, b"#00\x03", &frame(LAST)].concat();
            let mut sender = stream.try_clone().unwrap();
            scope.spawn(move || drop(sender.write_all(&last)));
            let mut buffer = [0; 1 << 14];
            loop {
                match stream.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(length) => received.extend_from_slice(&buffer[..length]),
                    // Something let the guest run again after the last Ctrl-C.
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        assert!(Instant::now() < deadline, "the server hangs in {}", session.escape_ascii());
                        let _ = writer.write_all(&[3]);
                    }
                    Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                    Err(error) => panic!("{error}"),
                }
                if received.windows(LAST_REPLY.len()).any(|part| part == LAST_REPLY) {
                    break;
                }
            }
            // The server has let go of this client when it hangs up itself.
            let _ = stream.shutdown(Shutdown::Write);
            stream.set_read_timeout(Some(SOON)).unwrap();
            while matches!(stream.read(&mut buffer), Ok(1..)) {}
        });
        received.iter().filter(|byte| **byte == b'#').count()
    }

    /// The next client is answered, whatever became of the guest.
    fn greet(&self) {
        let mut client = Client { stream: self.connect() };
        client.stream.write_all(b"$QStartNoAckMode#b0").unwrap();
        assert_eq!(client.byte(), b'+');
        assert_eq!(client.read(), "OK");
        assert!(client.ask("?").starts_with(['T', 'W', 'X']));
        client.leave();
    }

    /// A client as it should be finds a guest that it can look at and step.
    fn check(&self, detach: bool) {
        let mut client = Client { stream: self.connect() };
        client.stream.write_all(b"$QStartNoAckMode#b0").unwrap();
        assert_eq!(client.byte(), b'+');
        assert_eq!(client.read(), "OK");
        assert!(client.ask("qSupported:multiprocess+").contains("ConditionalBreakpoints+"));
        assert!(client.ask("?").starts_with('T'));
        let threads = client.ask("qfThreadInfo");
        let mut names: Vec<_> = threads[1..].split(',').collect();
        assert_eq!(client.ask(&format!("Hg{}", names[0])), "OK");
        assert!(client.ask("g").len() > 300);
        assert_eq!(client.ask(&format!("m{:x},9", self.pc)).len(), 18);
        let stop = client.ask(&format!("vCont;s:{}", names[0]));
        assert!(
            stop.starts_with("T05") && stop.contains(&format!("thread:{};", names[0].replace("p1.", "p01.0"))),
            "{stop}"
        );
        names.sort_unstable();
        assert_eq!(names, ["p1.1", "p1.2"]);
        if detach {
            assert_eq!(client.ask("D;1"), "OK");
        }
        client.leave();
    }

    fn close(self) {
        self.server.close();
        self.maker.current().close();
    }
}

/// A client without acknowledgements.
struct Client {
    stream: UnixStream,
}

impl Client {
    fn byte(&mut self) -> u8 {
        let mut byte = [0];
        self.stream.read_exact(&mut byte).expect("the server answers");
        byte[0]
    }

    fn read(&mut self) -> String {
        assert_eq!(self.byte(), b'$');
        let mut payload = Vec::new();
        loop {
            match self.byte() {
                b'#' => break,
                byte => payload.push(byte),
            }
        }
        self.byte();
        self.byte();
        String::from_utf8(payload).unwrap()
    }

    /// Goes, and waits until the server has seen it.
    fn leave(mut self) {
        let _ = self.stream.shutdown(Shutdown::Write);
        let mut rest = Vec::new();
        let _ = self.stream.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{}", rest.escape_ascii());
    }

    fn ask(&mut self, payload: &str) -> String {
        self.stream.write_all(&frame(payload.as_bytes())).unwrap();
        self.read()
    }
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let sum = payload.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    [b"$", payload, format!("#{sum:02x}").as_bytes()].concat()
}

/// Makes sessions.
struct Sessions {
    random: Random,
    pc: u64,
    packets: usize,
}

impl Sessions {
    /// One that leaves the guest alive, or one that may do anything.
    fn make(&mut self, is_harmless: bool) -> Vec<u8> {
        let mut session = Vec::new();
        if self.random.percent(70) {
            self.add(&mut session, PACKETS[0].as_bytes());
            self.add(&mut session, b"QStartNoAckMode");
        }
        if self.random.percent(40) {
            self.add(&mut session, b"!");
        }
        for _ in 0..20 + self.random.below(150) {
            self.part(&mut session, is_harmless);
        }
        session
    }

    fn add(&mut self, session: &mut Vec<u8>, payload: &[u8]) {
        session.extend(frame(payload));
        self.packets += 1;
    }

    fn part(&mut self, session: &mut Vec<u8>, is_harmless: bool) {
        match self.random.below(100) {
            0..=59 => {
                let packet = self.random.pick(&PACKETS);
                let payload = self.fill(packet);
                self.add(session, &payload);
            }
            60..=67 => {
                let packet = self.random.pick(&RESUMES);
                let payload = self.fill(packet);
                self.add(session, &payload);
                self.interrupt_after(session);
            }
            68..=87 => self.mutant(session, is_harmless),
            88..=92 => {
                let length = self.random.below(40);
                let payload: Vec<u8> =
                    (0..length).map(|_| self.random.pick(b"0123456789abcdef,;:pTvqQ$}*X ")).collect();
                self.add_checked(session, &payload, is_harmless);
            }
            93..=95 => {
                let length = self.random.below(6);
                session.extend((0..length).map(|_| self.random.pick(&[b'+', b'+', b'-', b'#', b'$', 0, 0xff])));
            }
            96 => session.push(3),
            97 if !is_harmless => {
                let packet = self.random.pick(&DANGEROUS);
                let payload = self.fill(packet);
                self.add(session, &payload);
            }
            _ => {
                // A wrong checksum.
                let mut bytes = frame(b"g");
                let at = 1 + self.random.below(3);
                bytes[at] ^= 1;
                session.extend(bytes);
                self.packets += 1;
            }
        }
    }

    /// What waits behind a resume is looked at only when the guest has stopped.
    fn interrupt_after(&mut self, session: &mut Vec<u8>) {
        if self.random.percent(20) {
            self.add(session, b"g");
        }
        session.push(3);
    }

    fn fill(&mut self, packet: &str) -> Vec<u8> {
        let pc = self.pc + self.random.pick(&INSTRUCTIONS);
        packet.replace("PC", &format!("{pc:x}")).replace("DATA", &format!("{:x}", self.pc + 0x2000)).into_bytes()
    }

    fn mutant(&mut self, session: &mut Vec<u8>, is_harmless: bool) {
        let packet = if self.random.percent(20) { self.random.pick(&RESUMES) } else { self.random.pick(&PACKETS) };
        let packet = if !is_harmless && self.random.percent(10) { self.random.pick(&DANGEROUS) } else { packet };
        let mut payload = self.fill(packet);
        for _ in 0..1 + self.random.below(3) {
            self.mutate(&mut payload);
        }
        self.add_checked(session, &payload, is_harmless);
        session.push(3);
    }

    fn mutate(&mut self, payload: &mut Vec<u8>) {
        let at = self.random.below(payload.len() + 1);
        let byte = if self.random.percent(50) { self.random.byte() } else { self.random.pick(b"0f,;:.-p#}x") };
        match self.random.below(7) {
            0 => payload.truncate(at),
            1 => payload.insert(at, byte),
            2 if at < payload.len() => payload[at] = byte,
            3 if at < payload.len() => drop(payload.remove(at)),
            4 => {
                let other = self.random.pick(&PACKETS);
                let other = self.fill(other);
                payload.truncate(at);
                payload.extend_from_slice(&other[other.len().min(at)..]);
            }
            5 => {
                // Another number in place of one.
                let start = payload.iter().position(u8::is_ascii_hexdigit).unwrap_or(0).max(at.min(payload.len()));
                let end = start + payload[start..].iter().take_while(|b| b.is_ascii_hexdigit()).count();
                let number = self.random.pick(&NUMBERS);
                payload.splice(start..end, number.bytes());
            }
            _ => {
                let times = 1 + self.random.below(40);
                payload.splice(at..at, std::iter::repeat_n(byte, times));
            }
        }
    }

    /// Leaves out what could end the guest, if it must not.
    fn add_checked(&mut self, session: &mut Vec<u8>, payload: &[u8], is_harmless: bool) {
        let ends = matches!(payload.first(), Some(b'M' | b'X' | b'P' | b'G' | b'k' | b'R' | b'Z' | b'z'))
            || [&b"vKill"[..], b"vRun", b"qRcmd"].iter().any(|name| payload.starts_with(name))
            || payload.contains(&b'$')
            || payload.contains(&b'#');
        if !(is_harmless && ends) {
            self.add(session, payload);
        }
    }
}

fn variable(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn test_fuzzed_sessions_neither_panic_nor_hang_nor_end_the_vm() {
    std::panic::set_hook(Box::new(|panic| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        eprintln!("{panic}");
    }));
    let mut world = match World::new() {
        Err(error) if std::env::var("UHYVE_REQUIRE_KVM").is_err() => {
            eprintln!("skipped: {error}");
            return;
        }
        world => world.unwrap(),
    };
    let seed = variable("UHYVE_FUZZ_SEED", 1);
    let wanted = usize::try_from(variable("UHYVE_FUZZ_PACKETS", 100_000)).unwrap();
    let mut sessions = Sessions { random: Random(seed), pc: world.pc, packets: 0 };
    let (started, mut count, mut replies, mut ended) = (Instant::now(), 0, 0, 0);

    while sessions.packets < wanted {
        let is_harmless = count % 2 == 0;
        sessions.pc = world.pc;
        let session = sessions.make(is_harmless);
        replies += world.run(&session);
        count += 1;
        assert_eq!(PANICS.load(Ordering::SeqCst), 0, "seed {seed}, session {count}");
        if is_harmless {
            assert!(!world.is_over(), "seed {seed}: session {count} ended the VM: {}", session.escape_ascii());
            world.check(sessions.random.percent(50));
        } else {
            // The guest may be damaged, and fall later; the server is to be there for the next client all the same.
            ended += usize::from(world.is_over());
            world.greet();
            std::mem::replace(&mut world, World::new().unwrap()).close();
        }
    }

    world.close();
    println!(
        "{} packets in {count} sessions, {replies} replies, {ended} guests ended, {:.1} s",
        sessions.packets,
        started.elapsed().as_secs_f64()
    );
    assert_eq!(PANICS.load(Ordering::SeqCst), 0);
    assert!(replies * 10 > sessions.packets * 6, "{replies} replies to {} packets", sessions.packets);
}
