//! Orders of events in the engine's protocol that chance would bring about once in a long while: kicks that are late,
//! vCPUs that are early.

use super::*;

/// An engine that has stopped at its entry, with one vCPU, which runs until it is asked for. It needs no kick: those of a
/// test do what the test is about.
fn engine_with_busy_vcpu() -> (Arc<Engine>, JoinHandle<()>) {
    let engine = Arc::new(Engine::new(1, true));
    let own = engine.clone();
    let thread = std::thread::spawn(move || {
        while own.safe_point(0) != Command::End {
            while !own.is_requested(0) {
                std::thread::yield_now();
            }
        }
    });
    assert!(matches!(until_stopped(&engine).reason, StopReason::Entry));
    (engine, thread)
}

/// The vCPU has left its safe point.
fn until_it_runs(engine: &Engine) {
    while engine.lock().seats[0].parked {
        std::thread::yield_now();
    }
}

fn until_stopped(engine: &Engine) -> Stop {
    loop {
        match engine.check_stopped() {
            Ok(stop) => return stop,
            Err(_) => std::thread::yield_now(),
        }
    }
}

#[test]
fn test_kick_that_comes_when_its_stop_is_over_disturbs_no_later_one() {
    struct Slow(Sender<()>, Mutex<Receiver<()>>);
    impl Kick for Slow {
        fn kick(&self) {
            let _ = self.0.send(());
            let _ = self.1.lock().unwrap().recv();
        }
    }
    bounded(|| {
        let (engine, thread) = engine_with_busy_vcpu();
        let ((tell, told), (go, hear)) = (channel(), channel());
        engine.set_kick(0, Some(Arc::new(Slow(tell, Mutex::new(hear)))));
        for number in (2..20).step_by(2) {
            engine.resume(|_| Plan::Run).unwrap();
            until_it_runs(&engine);
            let other = engine.clone();
            let late = std::thread::spawn(move || other.interrupt(StopReason::Interrupt));
            told.recv().unwrap();
            // The kick is under way; the vCPU comes without.
            let stop = until_stopped(&engine);
            assert!(matches!(stop.reason, StopReason::Interrupt) && stop.number == number);
            engine.resume(|_| Plan::Run).unwrap();
            until_it_runs(&engine);
            go.send(()).unwrap();
            assert!(late.join().unwrap());
            assert!(matches!(engine.status(), Status::Running), "the kick asks for nothing by itself");
            let other = engine.clone();
            let next = std::thread::spawn(move || other.interrupt(StopReason::Timeout));
            told.recv().unwrap();
            go.send(()).unwrap();
            assert!(next.join().unwrap());
            let stop = until_stopped(&engine);
            assert!(matches!(stop.reason, StopReason::Timeout) && stop.number == number + 1);
        }
        drop((go, told));
        engine.end(End::Killed);
        thread.join().unwrap();
    });
}

#[test]
fn test_vcpu_that_comes_before_the_owner_of_the_exclusive_section_waits_is_not_waited_for() {
    struct UntilParked(Arc<Engine>);
    impl Kick for UntilParked {
        fn kick(&self) {
            while !self.0.lock().seats[0].parked {
                std::thread::yield_now();
            }
        }
    }
    bounded(|| {
        let (engine, thread) = engine_with_busy_vcpu();
        engine.set_kick(0, Some(Arc::new(UntilParked(engine.clone()))));
        engine.resume(|_| Plan::Run).unwrap();
        for _ in 0..50 {
            // The vCPU runs before the section is asked for.
            until_it_runs(&engine);
            let section = engine.exclusive(Owner::FrontEnd).unwrap();
            assert!(!section.stopped && engine.lock().seats[0].parked);
        }
        assert!(engine.interrupt(StopReason::Interrupt));
        assert_eq!(until_stopped(&engine).number, 2);
        engine.end(End::Killed);
        engine.set_kick(0, None);
        thread.join().unwrap();
    });
}

#[test]
fn test_step_that_the_exclusive_section_held_back_is_made_before_the_stop() {
    bounded(|| {
        let world = World::new(2, true);
        world.stop();
        for number in (2..40).step_by(2) {
            let section = world.engine.exclusive(Owner::FrontEnd).unwrap();
            world.engine.resume(|n| if n == 0 { Plan::Step } else { Plan::Run }).unwrap();
            assert!(world.engine.interrupt(StopReason::Interrupt));
            assert!(world.engine.is_stopping(), "a step is owed");
            drop(section);
            let stop = world.stop();
            assert_eq!((stop.number, stop.vcpu, stop.pc), (number, 0, 0x57e9));
            assert_eq!(world.plans[1].lock().unwrap().len(), 0, "vCPU 1 had nothing to make up for");
            world.engine.resume(|_| Plan::Hold).unwrap();
            assert!(world.engine.interrupt(StopReason::Interrupt));
            assert_eq!(world.stop().number, number + 1);
        }
        world.close();
    });
}

#[test]
fn test_wait_with_the_descriptor_of_an_earlier_one_is_not_over_by_what_that_was_told() {
    bounded(|| {
        let world = World::running(1);
        for number in 2..10 {
            let used = world.engine.lock().spare.clone().unwrap();
            used.write(1).unwrap();
            assert!(world.runs());
            assert!(Arc::ptr_eq(&used, world.engine.lock().spare.as_ref().unwrap()));
            world.find(0, number);
            assert_eq!(world.stop().number, number);
            world.engine.resume(|_| Plan::Run).unwrap();
        }
        world.close();
    });
}

#[test]
fn test_stop_that_nobody_approves_is_shown_at_no_moment() {
    bounded(|| {
        let (engine, thread) = engine_with_busy_vcpu();
        engine.gate_stops(true);
        engine.resume(|_| Plan::Run).unwrap();
        let (other, over) = (engine.clone(), Arc::new(AtomicBool::new(false)));
        let until = over.clone();
        let watcher = std::thread::spawn(move || {
            while !until.load(Ordering::SeqCst) {
                let now = Some(Instant::now());
                let shown = other.wait_for_stop(now, &mut || Ok::<(), Error>(())).unwrap();
                assert!(shown.is_none(), "a stop is shown before it is approved");
            }
        });
        for _ in 0..600_000 {
            // Of the stop before, which is over.
            engine.approve();
            assert!(engine.interrupt(StopReason::Interrupt));
            until_stopped(&engine);
            engine.resume(|_| Plan::Run).unwrap();
        }
        over.store(true, Ordering::SeqCst);
        watcher.join().unwrap();
        engine.end(End::Killed);
        thread.join().unwrap();
    });
}
