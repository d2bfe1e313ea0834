//! Whose turn it is among the vCPUs of a machine: a baton that goes round, by a quantum of instructions that a seed
//! varies. The same seed gives the same turns, however the host schedules the threads: a vCPU keeps its turn while its
//! thread is outside of the guest to answer an exit, and one whose turn it is and whose thread is late is waited for.
//! Only a vCPU that is *away*, its thread at the engine's safe point, loses its turn to those that run.

/// Instructions of a turn, on average, unless the user chooses.
pub const DEFAULT_QUANTUM: u64 = 20_000;
const LONGEST_QUANTUM: u64 = 1 << 40;

/// How a vCPU waits after HLT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Halt {
    /// Maskable interrupts are enabled.
    pub is_maskable: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Seat {
    /// It runs, or is about to.
    is_present: bool,
    /// Its thread waits for its turn.
    is_waiting: bool,
    halt: Option<Halt>,
}

/// The turns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    seats: Vec<Seat>,
    holder: usize,
    left: u64,
    quantum: u64,
    random: u64,
}

impl Schedule {
    /// Turns among `cpus` vCPUs, which are all away; the first is vCPU 0's. A quantum of 0 is the default one.
    pub fn new(cpus: u32, quantum: u64, seed: u64) -> Self {
        let quantum = if quantum == 0 { DEFAULT_QUANTUM } else { quantum.min(LONGEST_QUANTUM) };
        let seats = (0..cpus).map(|_| Seat::default()).collect();
        let mut schedule = Self { seats, holder: 0, left: 0, quantum, random: seed };
        schedule.left = schedule.next_quantum();
        schedule
    }

    /// Between half and one and a half of the quantum (SplitMix64).
    fn next_quantum(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (self.quantum / 2 + (mixed ^ mixed >> 31) % self.quantum).max(1)
    }

    /// Whose turn it is.
    pub fn holder(&self) -> usize {
        self.holder
    }

    /// Instructions that are left of the turn.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Whether no other vCPU is there to take a turn.
    pub fn is_alone(&self) -> bool {
        self.seats.iter().filter(|seat| seat.is_present).count() < 2
    }

    /// The vCPU whose turn it is has executed so many instructions.
    pub fn spend(&mut self, instructions: u64) {
        self.left = self.left.saturating_sub(instructions);
    }

    /// The vCPU takes turns from now on (`true`), or is away.
    pub fn set_present(&mut self, vcpu: usize, is_present: bool) {
        self.seats[vcpu].is_present = is_present;
    }

    /// The vCPU's thread waits for its turn.
    pub fn set_waiting(&mut self, vcpu: usize, is_waiting: bool) {
        self.seats[vcpu].is_waiting = is_waiting;
    }

    /// Whether the vCPU's thread waits for its turn.
    pub fn is_waiting(&self, vcpu: usize) -> bool {
        self.seats[vcpu].is_waiting
    }

    /// The vCPU waits for an interrupt, or for none any more.
    pub fn set_halt(&mut self, vcpu: usize, halt: Option<Halt>) {
        self.seats[vcpu].halt = halt;
    }

    /// The vCPUs that wait for a maskable interrupt.
    pub fn sleepers(&self) -> impl Iterator<Item = usize> {
        let sleeps = |seat: &Seat| seat.is_present && seat.halt.is_some_and(|halt| halt.is_maskable);
        self.seats.iter().enumerate().filter(move |(_, seat)| sleeps(seat)).map(|(n, _)| n)
    }

    fn is_runnable(&self, vcpu: usize, wakes: &dyn Fn(usize, Halt) -> bool) -> bool {
        let seat = &self.seats[vcpu];
        seat.is_present && seat.halt.is_none_or(|halt| wakes(vcpu, halt))
    }

    /// The turn is over: the next in the round that can run gets it, the same one if there is no other.
    pub fn pass(&mut self, wakes: &dyn Fn(usize, Halt) -> bool) {
        let cpus = self.seats.len();
        let next = (1..=cpus).map(|n| (self.holder + n) % cpus).find(|n| self.is_runnable(*n, wakes));
        if let Some(next) = next {
            self.give(next);
        }
    }

    /// Sees to it that the turn is of a vCPU that can run; false if there is none.
    pub fn settle(&mut self, wakes: &dyn Fn(usize, Halt) -> bool) -> bool {
        if !self.is_runnable(self.holder, wakes) {
            self.pass(wakes);
        }
        self.is_runnable(self.holder, wakes)
    }

    /// The vCPU is away from now on. Its turn, if it has it, goes to the next one that waits for it and was not told to
    /// stop waiting; if there is none, all are about to be away, and it has its turn when they come back.
    pub fn leave(&mut self, vcpu: usize, wakes: &dyn Fn(usize, Halt) -> bool, stays: &dyn Fn(usize) -> bool) {
        self.seats[vcpu].is_present = false;
        if self.holder != vcpu {
            return;
        }
        let cpus = self.seats.len();
        let waits = |n: &usize| self.seats[*n].is_waiting && stays(*n) && self.is_runnable(*n, wakes);
        if let Some(next) = (1..cpus).map(|n| (vcpu + n) % cpus).find(waits) {
            self.give(next);
        }
    }

    fn give(&mut self, vcpu: usize) {
        self.holder = vcpu;
        self.left = self.next_quantum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASLEEP: &dyn Fn(usize, Halt) -> bool = &|_, _| false;
    const AWAKE: &dyn Fn(usize, Halt) -> bool = &|_, _| true;

    fn present(cpus: u32, seed: u64) -> Schedule {
        let mut schedule = Schedule::new(cpus, 1000, seed);
        (0..cpus as usize).for_each(|n| schedule.set_present(n, true));
        schedule
    }

    fn turns(seed: u64) -> Vec<(usize, u64)> {
        let mut schedule = present(3, seed);
        let mut turn = || {
            let now = (schedule.holder(), schedule.left());
            schedule.pass(ASLEEP);
            now
        };
        (0..300).map(|_| turn()).collect()
    }

    #[test]
    fn test_turns_go_round_with_quanta_that_the_seed_gives() {
        let turns_of_7 = turns(7);
        assert!((0..300).all(|n| turns_of_7[n].0 == n % 3));
        assert!(turns_of_7.iter().all(|(_, left)| (500..1500).contains(left)));
        assert_eq!(turns_of_7, turns(7));
        assert_ne!(turns_of_7, turns(8));
    }

    #[test]
    fn test_any_quantum_gives_turns_of_at_least_one_instruction() {
        for quantum in [1, 2, u64::MAX] {
            let mut schedule = Schedule::new(1, quantum, 1);
            assert!(schedule.left() >= 1);
            schedule.spend(u64::MAX);
            assert_eq!(schedule.left(), 0);
        }
    }

    #[test]
    fn test_sleeping_vcpus_are_left_out_until_they_wake() {
        let mut schedule = present(3, 0);
        schedule.set_halt(1, Some(Halt { is_maskable: true }));
        schedule.pass(ASLEEP);
        assert_eq!(schedule.holder(), 2);
        schedule.pass(ASLEEP);
        schedule.pass(AWAKE);
        assert_eq!((schedule.holder(), schedule.sleepers().collect::<Vec<_>>()), (1, vec![1]));
        for n in [0, 2] {
            schedule.set_halt(n, Some(Halt { is_maskable: false }));
        }
        assert!(!schedule.settle(ASLEEP) && schedule.settle(AWAKE));
    }

    #[test]
    fn test_holder_that_leaves_keeps_its_turn_unless_another_waits() {
        let mut schedule = present(3, 0);
        let left = schedule.left();
        schedule.leave(0, ASLEEP, &|_| true);
        assert_eq!((schedule.holder(), schedule.left()), (0, left), "nobody waits");
        schedule.set_present(0, true);
        (1..3).for_each(|n| schedule.set_waiting(n, true));
        schedule.leave(0, ASLEEP, &|_| false);
        assert_eq!(schedule.holder(), 0, "the others are about to leave too");
        schedule.set_present(0, true);
        schedule.leave(0, ASLEEP, &|n| n == 2);
        assert_eq!(schedule.holder(), 2);
    }

    #[test]
    fn test_vcpu_that_comes_takes_the_turn_of_one_that_is_away() {
        let mut schedule = present(2, 0);
        schedule.set_present(0, false);
        assert!(schedule.settle(ASLEEP) && schedule.holder() == 1);
        schedule.set_present(0, true);
        assert!(schedule.settle(ASLEEP) && schedule.holder() == 1, "not taken back");
    }
}
