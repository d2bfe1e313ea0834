/*
 * All cpus work for a while, in a loop of its own each; the first that is done wins.
 *
 * Options: -DWORK=n (200000), iterations of each.
 * Output: "winner=K". Exit code: 0.
 */
#include "guest.h"

#ifndef WORK
#define WORK 200000
#endif

volatile uint64_t winner;
volatile uint64_t finished;

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    for (volatile uint64_t i = 0; i < WORK; i++) {
    }
    /* No atomic exchange: this is the race. */
    if (winner == 0) {
        winner = cpu + 1;
    }
    __atomic_add_fetch(&finished, 1, __ATOMIC_RELEASE);
    if (cpu != 0) {
        park();
    }
    while (__atomic_load_n(&finished, __ATOMIC_ACQUIRE) < cpu_count(boot)) {
        pause();
    }
    print("winner=");
    print_dec((int64_t)winner - 1);
    print("\n");
    return 0;
}
