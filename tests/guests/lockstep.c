/*
 * All cpus pass a token round: cpu 0 to 1 to … to 0, COUNT times round.
 *
 * Options: -DCOUNT=n (100).
 * Symbols: pass(cpu, round); globals token, passes.
 * Output: "lockstep cpus=C rounds=COUNT passes=C*COUNT". Exit code: 0.
 */
#include "guest.h"

#ifndef COUNT
#define COUNT 100
#endif

volatile uint64_t token;
volatile uint64_t passes;

KEEP void pass(uint64_t cpu, uint64_t round)
{
    (void)cpu;
    (void)round;
    passes = passes + 1;
    __atomic_add_fetch(&token, 1, __ATOMIC_RELEASE);
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    uint64_t cpus = cpu_count(boot);
    for (uint64_t round = 0; round < COUNT; round++) {
        while (__atomic_load_n(&token, __ATOMIC_ACQUIRE) != round * cpus + cpu) {
            pause();
        }
        pass(cpu, round);
    }
    if (cpu != 0) {
        park();
    }
    while (__atomic_load_n(&token, __ATOMIC_ACQUIRE) < COUNT * cpus) {
        pause();
    }
    print("lockstep cpus=");
    print_dec((int64_t)cpus);
    print(" rounds=");
    print_dec(COUNT);
    print(" passes=");
    print_dec((int64_t)passes);
    print("\n");
    return 0;
}
