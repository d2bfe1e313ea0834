/*
 * Waits MILLISECONDS by the time stamp counter, with the frequency of the boot information.
 *
 * Options: -DMILLISECONDS=n (50).
 * Output: "khz=K boot_time_s=S", "waited MILLISECONDS ms". Exit code: 0, or 97 after a FAIL line.
 */
#include "guest.h"

#ifndef MILLISECONDS
#define MILLISECONDS 50
#endif

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    if (cpu != 0) {
        park();
    }
    check(boot->cpu_khz != 0, "the boot information tells the frequency");
    print("khz=");
    print_dec(boot->cpu_khz);
    print(" boot_time_s=");
    print_dec((int64_t)((uint64_t)boot->boot_time_ns / 1000000000));
    print("\n");
    uint64_t start = read_tsc();
    uint64_t previous = start;
    uint64_t wait = (uint64_t)boot->cpu_khz * MILLISECONDS;
    while (previous - start < wait) {
        uint64_t now = read_tsc();
        check(now >= previous, "the time stamp counter does not run backwards");
        previous = now;
        pause();
    }
    print("waited ");
    print_dec(MILLISECONDS);
    print(" ms\n");
    return 0;
}
