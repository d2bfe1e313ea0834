/*
 * Cpu 0 wakes every other cpu from HLT by an inter-processor interrupt, ROUNDS times each; alone, it interrupts itself.
 *
 * Options: -DROUNDS=n (3).
 * Symbols: on_ipi(cpu, n), called from the handler; global received[8].
 * Output: one line "ipi cpu K: ROUNDS" a cpu, then "ipi ok". Exit code: 0.
 */
#include "guest.h"

#ifndef ROUNDS
#define ROUNDS 3
#endif

#define VECTOR 0x31

volatile uint64_t received[MAX_CPUS];
static volatile uint64_t waiting_for[MAX_CPUS];
static volatile uint32_t apic_ids[MAX_CPUS];
static volatile bool table_loaded;

KEEP void on_ipi(uint64_t cpu, uint64_t n)
{
    received[cpu] = n;
}

static void handler(struct exception_frame *frame)
{
    (void)frame;
    uint64_t cpu = this_cpu();
    on_ipi(cpu, received[cpu] + 1);
    lapic_end_of_interrupt();
}

static void wait_on(uint64_t cpu)
{
    while (!table_loaded) {
        pause();
    }
    idt_load();
    lapic_init();
    apic_ids[cpu] = lapic_id();
    for (uint64_t round = 1; round <= ROUNDS; round++) {
        waiting_for[cpu] = round;
        while (received[cpu] < round) {
            wait_for_interrupt();
            disable_interrupts();
        }
    }
    park();
}

static void wake(uint64_t cpu)
{
    for (uint64_t round = 1; round <= ROUNDS; round++) {
        while (waiting_for[cpu] < round) {
            pause();
        }
        lapic_send_ipi(apic_ids[cpu], VECTOR);
        while (received[cpu] < round) {
            pause();
        }
    }
}

static void interrupt_itself(void)
{
    for (uint64_t round = 1; round <= ROUNDS; round++) {
        lapic_send_ipi(lapic_id(), VECTOR);
        while (received[0] < round) {
            wait_for_interrupt();
            disable_interrupts();
        }
    }
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    if (cpu != 0) {
        wait_on(cpu);
    }
    idt_init();
    set_handler(VECTOR, handler);
    lapic_init();
    table_loaded = true;
    uint64_t cpus = cpu_count(boot);
    if (cpus == 1) {
        interrupt_itself();
    }
    for (uint64_t other = 1; other < cpus; other++) {
        wake(other);
    }
    for (uint64_t i = cpus == 1 ? 0 : 1; i < cpus; i++) {
        print("ipi cpu ");
        print_dec((int64_t)i);
        print(": ");
        print_dec((int64_t)received[i]);
        print("\n");
    }
    print("ipi ok\n");
    return 0;
}
