/*
 * Calls work(i, 2 * i) COUNT times on cpu 0; a breakpoint's best friend.
 *
 * Options: -DCOUNT=n (1000).
 * Symbols: work(i, twice); globals calls, total.
 * Output: "calls=COUNT total=T" with T = 3 * (0 + … + COUNT-1), i.e. the sum of both arguments. Exit code: 0.
 */
#include "guest.h"

#ifndef COUNT
#define COUNT 1000
#endif

volatile uint64_t calls;
volatile uint64_t total;

KEEP uint64_t work(uint64_t i, uint64_t twice)
{
    calls = calls + 1;
    total = total + i + twice;
    return total;
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
    for (uint64_t i = 0; i < COUNT; i++) {
        work(i, 2 * i);
    }
    print("calls=");
    print_dec((int64_t)calls);
    print(" total=");
    print_dec((int64_t)total);
    print("\n");
    return 0;
}
