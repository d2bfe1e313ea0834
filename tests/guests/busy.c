/*
 * Never ends: all cpus count spin_counter up for ever.
 *
 * Output: "busy" from cpu 0 before it spins. No exit.
 */
#include "guest.h"

volatile uint64_t spin_counter;

KEEP void spin(void)
{
    for (;;) {
        spin_counter = spin_counter + 1;
    }
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu == 0) {
        print("busy\n");
    }
    spin();
    return 0;
}
