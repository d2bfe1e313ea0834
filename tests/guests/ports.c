/*
 * A counted loop of exits, for benchmarks.
 *
 * Options: -DCOUNT=n (10000), -DPORT=n (0x99, a port that nobody has), -DADDRESS=n (0xF0000, for mmio: outside of RAM if
 * the guest's memory does not start at 0), -DKIND=: out, in, outsb (one string instruction), hypercall (a close of fd -1),
 * hlt (each woken by an interrupt that the cpu sends itself), mmio, none (the bare loop).
 * Symbols: run_KIND; globals start_tsc, end_tsc.
 * Output: "ports KIND count=COUNT cycles=C". Exit code: 0.
 */
#include "guest.h"

#ifndef COUNT
#define COUNT 10000
#endif
#ifndef PORT
#define PORT 0x99
#endif
#ifndef ADDRESS
#define ADDRESS 0xf0000
#endif
#ifndef KIND
#define KIND out
#endif

#define JOIN_(left, right) left##right
#define JOIN(left, right) JOIN_(left, right)
#define TEXT_(word) #word
#define TEXT(word) TEXT_(word)

#define VECTOR 0x32

volatile uint64_t start_tsc;
volatile uint64_t end_tsc;

static uint8_t block[COUNT];

KEEP void run_none(void)
{
    for (uint64_t i = 0; i < COUNT; i++) {
        __asm__ volatile("" ::: "memory");
    }
}

KEEP void run_out(void)
{
    for (uint64_t i = 0; i < COUNT; i++) {
        outb(PORT, (uint8_t)i);
    }
}

KEEP void run_in(void)
{
    for (uint64_t i = 0; i < COUNT; i++) {
        inb(PORT);
    }
}

KEEP void run_outsb(void)
{
    const uint8_t *from = block;
    uint64_t count = COUNT;
    __asm__ volatile("rep outsb" : "+S"(from), "+c"(count) : "d"((uint16_t)PORT) : "memory");
}

KEEP void run_hypercall(void)
{
    for (uint64_t i = 0; i < COUNT; i++) {
        sys_close(-1);
    }
}

KEEP void run_hlt(void)
{
    for (uint64_t i = 0; i < COUNT; i++) {
        lapic_send_ipi(lapic_id(), VECTOR);
        wait_for_interrupt();
        disable_interrupts();
    }
}

KEEP void run_mmio(void)
{
    for (uint64_t i = 0; i < COUNT; i++) {
        (void)*(volatile uint32_t *)ADDRESS;
    }
}

static void on_interrupt(struct exception_frame *frame)
{
    (void)frame;
    lapic_end_of_interrupt();
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
    idt_init();
    set_handler(VECTOR, on_interrupt);
    lapic_init();
    if (physical_address_of(ADDRESS) == UINT64_MAX) {
        map_page(ADDRESS, ADDRESS, PAGE_PRESENT | PAGE_WRITABLE | PAGE_UNCACHED);
    }
    start_tsc = read_tsc();
    JOIN(run_, KIND)();
    end_tsc = read_tsc();
    print("ports " TEXT(KIND) " count=");
    print_dec(COUNT);
    print(" cycles=");
    print_dec((int64_t)(end_tsc - start_tsc));
    print("\n");
    return 0;
}
