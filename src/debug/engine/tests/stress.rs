//! The engine's protocol under random vCPUs: every stop is whole, and each event is reported once.
//! `UHYVE_STRESS_SEED` chooses other worlds.

use super::*;

/// A small generator with a period of 2^64 (Steele, Lea and Flood: SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What the threads of a stress run share.
struct Stress {
    engine: Engine,
    /// In guest code.
    inside: Vec<AtomicBool>,
    /// Between two safe points.
    moving: Vec<AtomicBool>,
    next: AtomicU64,
    emitted: Mutex<BTreeSet<u64>>,
}

impl Stress {
    fn emit(&self, vcpu: u32) {
        let id = self.next.fetch_add(1, Ordering::SeqCst) + 1;
        self.emitted.lock().unwrap().insert(id);
        self.engine.stop(found(vcpu, id));
    }

    fn section(&self, owner: Owner, random: &mut Random) {
        let Some(section) = self.engine.exclusive(owner) else { return };
        for (n, inside) in (0..).zip(&self.inside) {
            assert!(owner == Owner::Vcpu(n) || !inside.load(Ordering::SeqCst), "vCPU {n} runs beside {owner:?}");
        }
        assert!(!section.stopped || owner == Owner::FrontEnd, "the world was stopped without {owner:?}");
        if random.one_in(4) {
            std::thread::yield_now();
        }
    }

    fn vcpu(&self, n: u32, mut random: Random) {
        let (inside, moving) = (&self.inside[n as usize], &self.moving[n as usize]);
        let gap = |f: &mut dyn FnMut()| {
            inside.store(false, Ordering::SeqCst);
            f();
            inside.store(true, Ordering::SeqCst);
        };
        loop {
            inside.store(false, Ordering::SeqCst);
            moving.store(false, Ordering::SeqCst);
            let Command::Run(plan) = self.engine.safe_point(n) else { return };
            moving.store(true, Ordering::SeqCst);
            inside.store(true, Ordering::SeqCst);
            assert_ne!(plan, Plan::Hold);
            if plan == Plan::Step {
                self.emit(n);
                continue;
            }
            while !self.engine.is_requested(n) {
                match random.below(64) {
                    0 => self.emit(n),
                    // A step over a planted byte: the owner itself executes in the section.
                    1 | 2 => gap(&mut || self.section(Owner::Vcpu(n), &mut random)),
                    3 => gap(&mut || self.engine.outside(n, || self.section(Owner::Vcpu(n), &mut random))),
                    4 => gap(&mut || self.engine.outside(n, std::thread::yield_now)),
                    _ => std::thread::yield_now(),
                }
            }
        }
    }

    /// One front end starts the world again and again, and keeps the books.
    fn control(&self, cpus: u32, mut random: Random, until: Instant) -> (u64, BTreeMap<u64, u32>) {
        let (mut number, mut seen) = (0, BTreeMap::new());
        while Instant::now() < until {
            if random.one_in(8) {
                self.engine.interrupt(StopReason::Interrupt);
            }
            let limit = Instant::now() + Duration::from_millis(random.below(3) + 1);
            let status = self.engine.wait_for_stop(Some(limit), &mut || Ok::<(), Error>(()));
            let stop = match status.unwrap() {
                Some(Status::Stopped(stop)) => stop,
                _ => {
                    // All may hold.
                    self.engine.interrupt(StopReason::Timeout);
                    continue;
                }
            };
            assert_eq!(stop.number, number + 1, "a stop is missing, or is old");
            number = stop.number;
            self.all_stand_still();
            if stop.pc != 0 {
                *seen.entry(stop.pc).or_insert(0) += 1;
            }
            if random.one_in(4) {
                self.section(Owner::FrontEnd, &mut random);
                self.all_stand_still();
            }
            let next = self.engine.report_pending(
                |_| false,
                |event| {
                    let holds = random.one_in(2);
                    if !holds {
                        *seen.entry(event.pc).or_insert(0) += 1;
                    }
                    holds
                },
            );
            if next.unwrap().is_some() {
                continue;
            }
            let (step, mood) = (random.below(cpus.into()), random.below(8));
            self.all_stand_still();
            let plan = |n: u32| match mood {
                0 if u64::from(n) == step => Plan::Step,
                0 => Plan::Hold,
                1 if u64::from(n) == step => Plan::Hold,
                2 => Plan::Hold,
                3 => Plan::Step,
                _ => Plan::Run,
            };
            self.engine.resume(plan).unwrap();
        }
        (number, seen)
    }

    fn all_stand_still(&self) {
        assert!(self.moving.iter().all(|m| !m.load(Ordering::SeqCst)), "stopped, and a vCPU is not at its safe point");
    }
}

fn stress(cpus: u32, seed: u64, time: Duration) {
    let flags = || (0..cpus).map(|_| AtomicBool::new(false)).collect();
    let world = Stress {
        engine: Engine::new(cpus, true),
        inside: flags(),
        moving: flags(),
        next: AtomicU64::new(0),
        emitted: Mutex::default(),
    };
    let until = Instant::now() + time;
    let (number, mut seen) = std::thread::scope(|scope| {
        let mut threads: Vec<_> = (0..cpus)
            .map(|n| {
                scope.spawn({
                    let world = &world;
                    move || world.vcpu(n, Random(seed ^ u64::from(n) << 32))
                })
            })
            .collect();
        threads.push(scope.spawn(|| {
            let mut random = Random(seed.rotate_left(17));
            while Instant::now() < until {
                match random.below(4) {
                    0 => drop(world.engine.interrupt(StopReason::Interrupt)),
                    _ => world.section(Owner::FrontEnd, &mut random),
                }
                std::thread::sleep(Duration::from_micros(random.below(200)));
            }
        }));
        let result = world.control(cpus, Random(seed), until);
        world.engine.end(End::Killed);
        result
    });
    // What was found and neither reported nor dropped was on its way when the VM ended: one stop at most, and what waited.
    let left: BTreeSet<u64> = world.engine.lock().queue.iter().map(|e| e.pc).collect();
    let current = world.engine.lock().stop.as_ref().map_or(0, |s| s.pc);
    for pc in left {
        *seen.entry(pc).or_insert(0) += 1;
    }
    if current != 0 && world.engine.lock().stop.as_ref().is_some_and(|s| s.number > number) {
        *seen.entry(current).or_insert(0) += 1;
    }
    assert!(seen.values().all(|times| *times == 1), "seed {seed}: an event was reported twice: {seen:?}");
    // An event that a thread finds after the end goes nowhere: the last one of each.
    let lost: Vec<_> = world.emitted.lock().unwrap().iter().filter(|id| !seen.contains_key(id)).copied().collect();
    assert!(lost.len() <= cpus as usize, "seed {seed}: events were lost: {lost:?}");
    assert!(number > 10, "only {number} stops");
}

#[test]
fn test_random_worlds_stop_wholly_and_report_each_event_once() {
    let chosen = std::env::var("UHYVE_STRESS_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    let seed = chosen.map_or(0x5eed_0000, |seed| seed.wrapping_mul(64));
    bounded(move || {
        for round in 0..4 {
            for cpus in [1, 2, 4] {
                stress(cpus, seed.wrapping_add(round * 16 + u64::from(cpus)), Duration::from_millis(300));
            }
        }
    });
}
