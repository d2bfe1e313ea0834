/*
 * Counts interrupts of the local APIC's timer and halts between them.
 *
 * Options: -DCOUNT=n (20), -DPERIOD=n (2000000 timer ticks, nanoseconds on KVM), -DONE_SHOT re-arms in the handler.
 * Symbols: on_timer_tick(n), called from the handler with n = 1…COUNT; global timer_ticks.
 * Output: "timer ticks=COUNT". Exit code: 0.
 */
#include "guest.h"

#ifndef COUNT
#define COUNT 20
#endif
#ifndef PERIOD
#define PERIOD 2000000
#endif

#define VECTOR 0x30

volatile uint64_t timer_ticks;

KEEP void on_timer_tick(uint64_t n)
{
    timer_ticks = n;
}

static void handler(struct exception_frame *frame)
{
    (void)frame;
    on_timer_tick(timer_ticks + 1);
#ifdef ONE_SHOT
    if (timer_ticks < COUNT) {
        lapic_timer(VECTOR, PERIOD, false);
    }
#endif
    lapic_end_of_interrupt();
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
    idt_init();
    set_handler(VECTOR, handler);
    lapic_init();
#ifdef ONE_SHOT
    lapic_timer(VECTOR, PERIOD, false);
#else
    lapic_timer(VECTOR, PERIOD, true);
#endif
    while (timer_ticks < COUNT) {
        wait_for_interrupt();
        disable_interrupts();
    }
    print("timer ticks=");
    print_dec(COUNT);
    print("\n");
    return 0;
}
