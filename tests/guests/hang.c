/*
 * Never ends: each cpu masks interrupts and halts once, which no interrupt can wake.
 *
 * Output: "hanging" from cpu 0. No exit.
 */
#include "guest.h"

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu == 0) {
        print("hanging\n");
    }
    disable_interrupts();
    halt();
    for (;;) {
        pause();
    }
}
