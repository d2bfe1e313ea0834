/*
 * Every cpu spins with interrupts enabled while its local APIC's timer interrupts it, so that an interrupt is always
 * about to come.
 *
 * Options: -DPERIOD=n (200000 timer ticks, nanoseconds on KVM).
 * Symbols: turn(cpu), called all the time; on_tick(cpu), called from the handler; globals turns[8], timer_ticks[8].
 * Output: "ticking" from cpu 0. No exit.
 */
#include "guest.h"

#ifndef PERIOD
#define PERIOD 200000
#endif

#define VECTOR 0x30

volatile uint64_t turns[MAX_CPUS];
volatile uint64_t timer_ticks[MAX_CPUS];
static volatile bool table_loaded;

KEEP void on_tick(uint64_t cpu)
{
    timer_ticks[cpu] = timer_ticks[cpu] + 1;
}

static void handler(struct exception_frame *frame)
{
    (void)frame;
    on_tick(this_cpu());
    lapic_end_of_interrupt();
}

KEEP void turn(uint64_t cpu)
{
    turns[cpu] = turns[cpu] + 1;
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu == 0) {
        idt_init();
        set_handler(VECTOR, handler);
        print("ticking\n");
        table_loaded = true;
    }
    while (!table_loaded) {
        pause();
    }
    idt_load();
    lapic_init();
    lapic_timer(VECTOR, PERIOD, true);
    enable_interrupts();
    for (;;) {
        turn(cpu);
    }
}
