/*
 * Never ends: all cpus execute HLT in a loop, with interrupts never enabled.
 *
 * Output: "halting" from cpu 0. No exit.
 */
#include "guest.h"

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu == 0) {
        print("halting\n");
    }
    for (;;) {
        halt();
    }
}
