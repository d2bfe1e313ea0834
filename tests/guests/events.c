/*
 * Every cpu goes through event(cpu, i) COUNT times and counts, for itself, each place that it has passed, so that what a
 * debugger saw can be held against what happened. Every 16th time it naps: it halts until its timer's next interrupt,
 * which is enabled nowhere else.
 *
 * Options: -DCOUNT=n (1000; 0: for ever); -DEARLY: cpu 0 exits when it is done itself, with the others in the middle;
 * -DWITHOUT_NAPS.
 * Symbols: event(cpu, i), with RDI and RSI unchanged to its end, and in it
 *   event               its first instruction; calls[cpu] counts it, by event_counted
 *   event_serial        CPUID, which no emulator of single instructions knows; serials[cpu] counts it, by serial_counted
 *   event_write         a write of cpu << 32 | i to word; the next instruction is event_written, and writes[cpu]
 *                       counts that, by written_counted;
 *   globals calls[8], serials[8], writes[8], word, total.
 * Output: "events total=T" with T the number of all calls, but with EARLY. Exit code: 0.
 */
#include "guest.h"

#ifndef COUNT
#define COUNT 1000
#endif

#define VECTOR 0x30
#define NAP 100000

volatile uint64_t calls[MAX_CPUS];
volatile uint64_t serials[MAX_CPUS];
volatile uint64_t writes[MAX_CPUS];
volatile uint64_t word;
volatile uint64_t total;
volatile uint64_t finished;
static volatile bool table_loaded;

void event(uint64_t cpu, uint64_t i);
__asm__(".text\n"
        ".globl event, event_counted, event_serial, serial_counted, event_write, event_written, written_counted\n"
        ".type event, @function\n"
        "event:\n"
        "\t.cfi_startproc\n"
        "\tleaq calls(%rip), %rdx\n"
        "\tincq (%rdx, %rdi, 8)\n"
        "event_counted:\n"
        "\tpushq %rbp\n"
        "\t.cfi_def_cfa_offset 16\n"
        "\t.cfi_offset %rbp, -16\n"
        "\tmovq %rsp, %rbp\n"
        "\t.cfi_def_cfa_register %rbp\n"
        "\tpushq %rbx\n"
        "\t.cfi_offset %rbx, -24\n"
        "\txorl %eax, %eax\n"
        "\txorl %ecx, %ecx\n"
        "event_serial:\n"
        "\tcpuid\n"
        "\tleaq serials(%rip), %rdx\n"
        "\tincq (%rdx, %rdi, 8)\n"
        "serial_counted:\n"
        "\tlock incq total(%rip)\n"
        "\tmovq %rdi, %rax\n"
        "\tshlq $32, %rax\n"
        "\torq %rsi, %rax\n"
        "event_write:\n"
        "\tmovq %rax, word(%rip)\n"
        "event_written:\n"
        "\tleaq writes(%rip), %rdx\n"
        "\tincq (%rdx, %rdi, 8)\n"
        "written_counted:\n"
        "\tpopq %rbx\n"
        "\t.cfi_restore %rbx\n"
        "\tpopq %rbp\n"
        "\t.cfi_def_cfa %rsp, 8\n"
        "\tret\n"
        "\t.cfi_endproc\n"
        ".size event, . - event\n");

static void handler(struct exception_frame *frame)
{
    (void)frame;
    lapic_end_of_interrupt();
}

static void prepare(uint64_t cpu)
{
    if (cpu == 0) {
        idt_init();
        set_handler(VECTOR, handler);
        table_loaded = true;
    }
    while (!table_loaded) {
        pause();
    }
    idt_load();
    lapic_init();
    lapic_timer(VECTOR, NAP, true);
}

static void nap(uint64_t i)
{
#ifndef WITHOUT_NAPS
    if ((i & 15) == 15) {
        wait_for_interrupt();
        disable_interrupts();
    }
#else
    (void)i;
#endif
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    prepare(cpu);
    for (uint64_t i = 0; COUNT == 0 || i < COUNT; i++) {
        event(cpu, i);
        nap(i);
    }
    __atomic_add_fetch(&finished, 1, __ATOMIC_RELEASE);
    if (cpu != 0) {
        park();
    }
#ifndef EARLY
    while (__atomic_load_n(&finished, __ATOMIC_ACQUIRE) < cpu_count(boot)) {
        pause();
    }
    print("events total=");
    print_dec((int64_t)total);
    print("\n");
#endif
    return 0;
}
