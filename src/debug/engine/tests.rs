//! The engine's protocol, with plain threads in place of vCPUs: scripted ones for each rule, in `orders` such that come in
//! a rare order, and in `stress` random ones for all together.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use super::*;

mod orders;
mod stress;

const WATCHDOG: Duration = Duration::from_secs(30);
/// Long enough for a thread to do what it must not do.
const A_WHILE: Duration = Duration::from_millis(20);

/// Runs a test on a thread of its own and fails if that does not end.
fn bounded(test: impl FnOnce() + Send + 'static) {
    let (done, wait) = channel();
    let thread = std::thread::spawn(move || {
        test();
        let _ = done.send(());
    });
    let result = wait.recv_timeout(WATCHDOG);
    assert!(!matches!(result, Err(std::sync::mpsc::RecvTimeoutError::Timeout)), "deadlock: the test does not end");
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// What a scripted vCPU does in its guest.
enum Act {
    /// Finds something that stops the world.
    Find(Event),
    /// Enters the exclusive section, tells so, and leaves it when it hears back.
    Exclusive(Sender<Option<bool>>, Receiver<()>),
    /// Runs a callback that tells so, and returns when it hears back.
    Outside(Sender<()>, Receiver<()>),
    /// Runs a callback that enters the exclusive section.
    OutsideThenExclusive(Sender<Option<bool>>, Receiver<()>),
}

#[derive(Default)]
struct Script {
    acts: Mutex<VecDeque<Act>>,
    changed: Condvar,
}

impl Kick for Script {
    fn kick(&self) {
        let _acts = self.acts.lock().unwrap();
        self.changed.notify_all();
    }
}

/// An engine and its threads.
struct World {
    engine: Arc<Engine>,
    scripts: Vec<Arc<Script>>,
    plans: Vec<Arc<Mutex<Vec<Plan>>>>,
    /// Whether the thread is between a safe point's end and the next one's beginning.
    moving: Vec<Arc<AtomicBool>>,
    threads: Vec<JoinHandle<()>>,
}

impl World {
    fn new(cpus: u32, debugging: bool) -> Self {
        let engine = Arc::new(Engine::new(cpus, debugging));
        let mut world =
            Self { engine, scripts: Vec::new(), plans: Vec::new(), moving: Vec::new(), threads: Vec::new() };
        for n in 0..cpus {
            let (engine, script) = (world.engine.clone(), Arc::new(Script::default()));
            let (plans, moving) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
            world.scripts.push(script.clone());
            world.plans.push(plans.clone());
            world.moving.push(moving.clone());
            world.threads.push(std::thread::spawn(move || vcpu(&engine, n, &script, &plans, &moving)));
        }
        world
    }

    /// Past the entry.
    fn running(cpus: u32) -> Self {
        let world = Self::new(cpus, true);
        assert!(matches!(world.stop().reason, StopReason::Entry));
        world.engine.resume(|_| Plan::Run).unwrap();
        world
    }

    fn act(&self, vcpu: usize, act: Act) {
        let script = &self.scripts[vcpu];
        script.acts.lock().unwrap().push_back(act);
        script.changed.notify_all();
    }

    fn find(&self, vcpu: u32, pc: u64) {
        self.act(vcpu as usize, Act::Find(found(vcpu, pc)));
    }

    fn status(&self, limit: Duration) -> Option<Status> {
        let deadline = Some(Instant::now() + limit);
        self.engine.wait_for_stop(deadline, &mut || Ok::<(), Error>(())).unwrap()
    }

    /// The next stop; nobody moves then.
    fn stop(&self) -> Stop {
        match self.status(WATCHDOG) {
            Some(Status::Stopped(stop)) => {
                assert!(self.moving.iter().all(|m| !m.load(Ordering::SeqCst)), "a stop is reported, and a vCPU runs");
                stop
            }
            Some(Status::Ended(end)) => panic!("ended: {end:?}"),
            _ => panic!("no stop"),
        }
    }

    fn end(&self) -> Arc<End> {
        match self.status(WATCHDOG) {
            Some(Status::Ended(end)) => end,
            _ => panic!("not ended"),
        }
    }

    fn runs(&self) -> bool {
        self.status(A_WHILE).is_none()
    }

    fn close(mut self) {
        self.engine.end(End::Killed);
        for thread in self.threads.drain(..) {
            while !thread.is_finished() {
                self.engine.kick_late();
                std::thread::yield_now();
            }
            thread.join().unwrap();
        }
    }
}

fn found(vcpu: u32, pc: u64) -> Event {
    Event::new(vcpu, pc, StopReason::Step)
}

fn vcpu(engine: &Arc<Engine>, n: u32, script: &Arc<Script>, plans: &Mutex<Vec<Plan>>, moving: &AtomicBool) {
    engine.set_kick(n, Some(script.clone()));
    loop {
        moving.store(false, Ordering::SeqCst);
        let Command::Run(plan) = engine.safe_point(n) else { return };
        moving.store(true, Ordering::SeqCst);
        plans.lock().unwrap().push(plan);
        if plan == Plan::Step {
            engine.stop(found(n, 0x57e9));
            continue;
        }
        while !engine.is_requested(n) {
            let mut acts = script.acts.lock().unwrap();
            let Some(act) = acts.pop_front() else {
                // A kick comes with the lock, so it is not missed between the look and the sleep.
                if !engine.is_requested(n) {
                    drop(script.changed.wait(acts).unwrap());
                }
                continue;
            };
            drop(acts);
            perform(engine, n, act);
        }
    }
}

fn perform(engine: &Engine, n: u32, act: Act) {
    let section = |tell: Sender<Option<bool>>, hear: Receiver<()>| {
        let section = engine.exclusive(Owner::Vcpu(n));
        let _ = tell.send(section.as_ref().map(|s| s.stopped));
        let _ = hear.recv();
    };
    match act {
        Act::Find(event) => engine.stop(event),
        Act::Exclusive(tell, hear) => section(tell, hear),
        Act::Outside(tell, hear) => engine.outside(n, || {
            let _ = tell.send(());
            let _ = hear.recv();
        }),
        Act::OutsideThenExclusive(tell, hear) => engine.outside(n, || section(tell, hear)),
    }
}

/// Lets a vCPU enter the exclusive section; the first channel tells when it is inside, the second lets it leave.
fn exclusive(world: &World, vcpu: usize) -> (Receiver<Option<bool>>, Sender<()>) {
    let ((tell, told), (go, hear)) = (channel(), channel());
    world.act(vcpu, Act::Exclusive(tell, hear));
    (told, go)
}

fn outside(world: &World, vcpu: usize) -> Sender<()> {
    let ((tell, told), (go, hear)) = (channel(), channel());
    world.act(vcpu, Act::Outside(tell, hear));
    told.recv().unwrap();
    go
}

#[test]
fn test_debugging_begins_with_one_stop_at_the_entry() {
    bounded(|| {
        let world = World::new(3, true);
        let stop = world.stop();
        assert!(matches!(stop.reason, StopReason::Entry) && stop.number == 1 && stop.vcpu == 0);
        assert!(world.plans.iter().all(|p| p.lock().unwrap().is_empty()), "nobody has run before");
        assert!(!world.engine.interrupt(StopReason::Interrupt), "nothing to stop");
        assert_eq!(world.engine.check_stopped().unwrap().number, 1);
        world.close();
    });
}

#[test]
fn test_without_debugging_the_threads_run_at_once_and_an_exit_ends_the_vm() {
    bounded(|| {
        let world = World::new(2, false);
        assert!(world.runs());
        world.act(1, Act::Find(Event::new(1, 0, StopReason::Exit { code: 7 })));
        assert!(matches!(*world.end(), End::Exit(7)));
        world.close();
    });
}

#[test]
fn test_stop_and_resume_give_one_stop_an_event_with_rising_numbers() {
    bounded(|| {
        let world = World::running(2);
        for number in 2..50 {
            let vcpu = u32::from(number % 2 == 0);
            world.find(vcpu, number);
            let stop = world.stop();
            assert_eq!((stop.vcpu, stop.pc, stop.number), (vcpu, number, number));
            assert!(world.engine.report_pending(|_| false, |_| true).unwrap().is_none());
            world.engine.resume(|_| Plan::Run).unwrap();
        }
        assert!(world.runs());
        world.close();
    });
}

#[test]
fn test_simultaneous_events_are_reported_one_by_one_unless_the_check_drops_them() {
    bounded(|| {
        let world = World::running(4);
        // None of them comes to its safe point before all four have been found.
        let go: Vec<_> = (0..4).map(|n| outside(&world, n)).collect();
        for n in 0..4 {
            world.find(n, 0x100 + u64::from(n));
        }
        for n in 0..4 {
            world.engine.stop(found(n, 0x200 + u64::from(n)));
        }
        go.into_iter().for_each(drop);
        let first = world.stop();
        assert_eq!(first.pc, 0x200);
        let mut seen = Vec::new();
        let next = world.engine.report_pending(
            |_| false,
            |event| {
                seen.push(event.pc);
                event.pc != 0x201
            },
        );
        let next = next.unwrap().unwrap();
        assert_eq!((next.pc, next.vcpu, next.number, seen), (0x202, 2, first.number + 1, vec![0x201, 0x202]));
        assert_eq!(world.stop().pc, 0x202);
        assert_eq!(world.engine.report_pending(|_| false, |_| true).unwrap().unwrap().pc, 0x203);
        assert!(world.engine.report_pending(|_| false, |_| true).unwrap().is_none());
        world.close();
    });
}

#[test]
fn test_interrupt_stops_all_and_an_event_that_comes_first_takes_its_place() {
    bounded(|| {
        let world = World::running(3);
        assert!(world.engine.interrupt(StopReason::Timeout));
        assert!(matches!(world.stop().reason, StopReason::Timeout));
        world.engine.resume(|_| Plan::Run).unwrap();
        let go = outside(&world, 0);
        assert!(world.engine.interrupt(StopReason::Interrupt));
        assert!(world.engine.interrupt(StopReason::Interrupt), "it is on its way");
        world.engine.stop(found(0, 0x42));
        drop(go);
        assert_eq!(world.stop().pc, 0x42);
        assert!(world.engine.report_pending(|_| false, |_| true).unwrap().is_none());
        world.engine.resume(|_| Plan::Run).unwrap();
        assert!(world.runs(), "the interrupt was not kept for later");
        world.close();
    });
}

#[test]
fn test_step_plan_moves_one_vcpu_and_holds_the_others() {
    bounded(|| {
        let world = World::new(3, true);
        world.stop();
        for number in 2..10 {
            world.engine.resume(|n| if n == 1 { Plan::Step } else { Plan::Hold }).unwrap();
            let stop = world.stop();
            assert!(matches!(stop.reason, StopReason::Step));
            assert_eq!((stop.vcpu, stop.number), (1, number));
        }
        assert_eq!(world.plans[1].lock().unwrap().len(), 8);
        assert!(world.plans[0].lock().unwrap().is_empty() && world.plans[2].lock().unwrap().is_empty());
        world.engine.resume(|_| Plan::Hold).unwrap();
        assert!(world.runs());
        assert!(world.engine.interrupt(StopReason::Interrupt));
        assert!(matches!(world.stop().reason, StopReason::Interrupt), "of a world in which all hold");
        world.close();
    });
}

#[test]
fn test_interrupt_is_of_a_vcpu_that_did_not_hold() {
    bounded(|| {
        let world = World::new(3, true);
        assert_eq!(world.stop().vcpu, 0);
        world.engine.resume(|n| if n == 2 { Plan::Run } else { Plan::Hold }).unwrap();
        assert!(world.engine.interrupt(StopReason::Interrupt));
        assert_eq!(world.stop().vcpu, 2);
        world.engine.resume(|_| Plan::Run).unwrap();
        assert!(world.engine.interrupt(StopReason::Interrupt));
        assert_eq!(world.stop().vcpu, 2, "the last one that stopped");
        world.close();
    });
}

#[test]
fn test_step_plan_for_all_moves_each_once_before_the_one_stop() {
    bounded(|| {
        let world = World::new(3, true);
        world.stop();
        for round in 1..200 {
            world.engine.resume(|n| if n == 1 { Plan::StepRange { start: 0, end: 8 } } else { Plan::Step }).unwrap();
            world.stop();
            for n in [0, 2] {
                let plans = world.plans[n].lock().unwrap();
                assert_eq!((plans.len(), plans.last()), (round, Some(&Plan::Step)), "vCPU {n}");
            }
            assert!(world.engine.report_pending(|_| false, |_| false).unwrap().is_none());
        }
        world.close();
    });
}

#[test]
fn test_exclusive_of_a_vcpu_holds_the_others_and_tells_nobody() {
    bounded(|| {
        let world = World::running(3);
        let (told, go) = exclusive(&world, 0);
        assert_eq!(told.recv().unwrap(), Some(false));
        assert!(!world.moving[1].load(Ordering::SeqCst) && !world.moving[2].load(Ordering::SeqCst));
        assert!(world.runs());
        drop(go);
        assert!(world.runs());
        world.find(2, 5);
        assert_eq!(world.stop().number, 2);
        world.close();
    });
}

#[test]
fn test_nested_demands_for_the_exclusive_section_are_served_in_turn() {
    bounded(|| {
        let world = World::running(3);
        let sections: Vec<_> = (0..3).map(|n| exclusive(&world, n)).collect();
        let engine = world.engine.clone();
        let front = std::thread::spawn(move || engine.exclusive(Owner::FrontEnd).map(|e| e.stopped));
        for (_, go) in &sections {
            let _ = go.send(());
        }
        for (told, _) in &sections {
            // One that was asked to its safe point before it got here may have been held meanwhile.
            assert_eq!(told.recv().unwrap(), Some(false));
        }
        assert_eq!(front.join().unwrap(), Some(false));
        assert!(world.runs());
        world.close();
    });
}

#[test]
fn test_no_stop_is_reported_while_a_vcpu_is_in_or_waits_for_the_exclusive_section() {
    bounded(|| {
        let world = World::running(3);
        let go = outside(&world, 2);
        let (told0, go0) = exclusive(&world, 0);
        assert_eq!(told0.recv().unwrap(), Some(false));
        // vCPU 2 asks for the section while vCPU 0 has it.
        let (told2, go2) = exclusive(&world, 2);
        drop(go);
        let engine = world.engine.clone();
        let late = std::thread::spawn(move || engine.interrupt(StopReason::Interrupt));
        assert!(late.join().unwrap());
        assert!(world.runs(), "vCPU 0 is inside");
        drop(go0);
        // It gets the section before the stop, or is stopped before it asks for it.
        if told2.recv_timeout(A_WHILE) == Ok(Some(false)) {
            assert!(world.runs(), "vCPU 2 is inside");
        }
        drop(go2);
        assert!(matches!(world.stop().reason, StopReason::Interrupt));
        world.close();
    });
}

#[test]
fn test_exclusive_of_a_front_end_works_while_running_and_stopped_and_fails_once_ended() {
    bounded(|| {
        let world = World::running(2);
        {
            let section = world.engine.exclusive(Owner::FrontEnd).unwrap();
            assert!(!section.stopped);
            assert!(world.moving.iter().all(|m| !m.load(Ordering::SeqCst)));
            assert!(world.engine.interrupt(StopReason::Interrupt));
            assert!(matches!(world.stop().reason, StopReason::Interrupt), "all stand still as it is");
        }
        {
            let section = world.engine.exclusive(Owner::FrontEnd).unwrap();
            assert!(section.stopped);
            world.engine.resume(|_| Plan::Run).unwrap();
            std::thread::sleep(A_WHILE);
            assert!(world.moving.iter().all(|m| !m.load(Ordering::SeqCst)), "the section outlasts the resume");
        }
        assert!(world.runs());
        world.engine.end(End::Killed);
        assert!(world.engine.exclusive(Owner::FrontEnd).is_none());
        world.close();
    });
}

#[test]
fn test_callback_that_waits_for_another_thread_does_not_block_the_exclusive_section_but_the_stop() {
    bounded(|| {
        let world = World::running(2);
        let go = outside(&world, 0);
        drop(world.engine.exclusive(Owner::FrontEnd).unwrap());
        let (told, leave) = exclusive(&world, 1);
        assert_eq!(told.recv().unwrap(), Some(false));
        drop(leave);
        assert!(world.engine.interrupt(StopReason::Interrupt));
        assert!(world.runs(), "the callback has not returned");
        drop(go);
        world.stop();
        world.close();
    });
}

#[test]
fn test_callback_returns_only_after_the_exclusive_section_of_another() {
    bounded(|| {
        let world = World::running(2);
        let go = outside(&world, 0);
        let section = world.engine.exclusive(Owner::FrontEnd).unwrap();
        let (told, _leave) = exclusive(&world, 0);
        drop(go);
        assert!(told.recv_timeout(A_WHILE).is_err(), "still in its callback");
        drop(section);
        assert_eq!(told.recv().unwrap(), Some(false));
        drop(_leave);
        world.close();
    });
}

#[test]
fn test_callbacks_of_two_vcpus_may_both_change_breakpoints() {
    bounded(|| {
        let world = World::running(2);
        let mut told = Vec::new();
        for n in 0..2 {
            let ((tell, hear_told), (go, hear)) = (channel(), channel());
            drop(go);
            world.act(n, Act::OutsideThenExclusive(tell, hear));
            told.push(hear_told);
        }
        for told in told {
            assert_eq!(told.recv().unwrap(), Some(false));
        }
        assert!(world.runs());
        world.close();
    });
}

#[test]
fn test_end_releases_everybody_from_wherever_they_are() {
    bounded(|| {
        for _ in 0..50 {
            let world = World::running(3);
            let (_told, go) = exclusive(&world, 0);
            let (_told1, go1) = exclusive(&world, 1);
            let engine = world.engine.clone();
            let front = std::thread::spawn(move || drop(engine.exclusive(Owner::FrontEnd)));
            world.engine.end(End::Exit(3));
            world.engine.end(End::Killed);
            drop((go, go1));
            front.join().unwrap();
            assert!(matches!(*world.end(), End::Exit(3)), "the first end counts");
            assert!(world.engine.resume(|_| Plan::Run).is_err() && world.engine.check_stopped().is_err());
            world.close();
        }
    });
}

#[test]
fn test_end_during_the_check_of_an_event_stays_the_end() {
    bounded(|| {
        let world = World::running(2);
        let go = outside(&world, 1);
        world.engine.stop(found(0, 1));
        world.engine.stop(found(1, 2));
        drop(go);
        world.stop();
        let result = world.engine.report_pending(
            |_| false,
            |_| {
                world.engine.end(End::Killed);
                true
            },
        );
        assert!(result.is_err());
        assert!(matches!(world.engine.status(), Status::Ended(_)));
        world.close();
    });
}

#[test]
fn test_final_stop_refuses_to_resume_and_detach_makes_it_the_end() {
    bounded(|| {
        let world = World::running(2);
        world.act(0, Act::Find(Event::new(0, 0, StopReason::Exit { code: -5 })));
        assert!(matches!(world.stop().reason, StopReason::Exit { code: -5 }));
        let error = world.engine.resume(|_| Plan::Run).unwrap_err();
        assert!(error.to_string().contains("code -5"), "{error}");
        world.engine.detach().unwrap();
        assert!(matches!(*world.end(), End::Exit(-5)));
        world.close();
    });
}

#[test]
fn test_detach_lets_all_run_and_drops_what_is_found_later_but_the_end() {
    bounded(|| {
        let world = World::running(3);
        world.find(0, 1);
        world.stop();
        world.engine.resume(|n| if n == 0 { Plan::Run } else { Plan::Hold }).unwrap();
        world.engine.interrupt(StopReason::Interrupt);
        world.engine.detach().unwrap();
        assert!(world.runs());
        world.find(1, 2);
        assert!(world.runs(), "a hit that was found too late");
        world.act(2, Act::Find(Event::new(2, 0, StopReason::Exit { code: 9 })));
        assert!(matches!(*world.end(), End::Exit(9)));
        world.close();
    });
}

#[test]
fn test_wait_returns_at_its_deadline_and_with_the_error_of_its_check() {
    bounded(|| {
        let world = World::running(1);
        let before = Instant::now();
        assert!(world.status(A_WHILE).is_none());
        assert!(before.elapsed() >= A_WHILE);
        world.close();
    });
}

#[test]
fn test_kick_that_a_thread_misses_is_sent_again_to_whoever_waits() {
    struct Deaf(AtomicU32);
    impl Kick for Deaf {
        fn kick(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    bounded(|| {
        let engine = Arc::new(Engine::new(2, true));
        let deaf = Arc::new(Deaf(AtomicU32::new(0)));
        let threads: Vec<_> = (0..2)
            .map(|n| {
                let (engine, deaf) = (engine.clone(), deaf.clone());
                std::thread::spawn(move || {
                    engine.set_kick(n, (n == 1).then(|| deaf.clone() as Arc<dyn Kick>));
                    engine.safe_point(n);
                    match n {
                        0 => {
                            // The waiter is asleep by now, without a limit.
                            std::thread::sleep(A_WHILE);
                            engine.stop(found(0, 1));
                        }
                        // Blocks in the host, and misses the first kicks.
                        _ => {
                            while deaf.0.load(Ordering::SeqCst) < 3 {
                                std::thread::sleep(Duration::from_millis(1));
                            }
                        }
                    }
                    engine.safe_point(n);
                })
            })
            .collect();
        let wait = || engine.wait_for_stop(None, &mut || Ok::<(), Error>(())).unwrap().unwrap();
        assert!(matches!(wait(), Status::Stopped(_)));
        engine.resume(|_| Plan::Run).unwrap();
        assert!(matches!(wait(), Status::Stopped(stop) if stop.pc == 1));
        engine.end(End::Killed);
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
}
