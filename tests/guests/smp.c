/*
 * Every cpu calls tick(cpu, i) COUNT times; cpu 0 waits for all and reports.
 *
 * Options: -DCOUNT=n (1000).
 * Symbols: tick(cpu, i); globals ticks[8], all_ticks, finished.
 * Output: one line "cpu K: COUNT" a cpu, then "all=CPUS*COUNT". Exit code: 0.
 */
#include "guest.h"

#ifndef COUNT
#define COUNT 1000
#endif

volatile uint64_t ticks[MAX_CPUS];
volatile uint64_t all_ticks;
volatile uint64_t finished;

KEEP uint64_t tick(uint64_t cpu, uint64_t i)
{
    ticks[cpu] = ticks[cpu] + 1;
    return i + __atomic_add_fetch(&all_ticks, 1, __ATOMIC_RELAXED);
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    for (uint64_t i = 0; i < COUNT; i++) {
        tick(cpu, i);
    }
    __atomic_add_fetch(&finished, 1, __ATOMIC_RELEASE);
    if (cpu != 0) {
        park();
    }
    while (__atomic_load_n(&finished, __ATOMIC_ACQUIRE) < cpu_count(boot)) {
        pause();
    }
    for (uint64_t i = 0; i < cpu_count(boot); i++) {
        print("cpu ");
        print_dec((int64_t)i);
        print(": ");
        print_dec((int64_t)ticks[i]);
        print("\n");
    }
    print("all=");
    print_dec((int64_t)all_ticks);
    print("\n");
    return 0;
}
