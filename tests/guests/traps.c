/*
 * A place for code that a debugger writes and steps through, and a handler for every exception that notes what it got.
 *
 * Symbols: ready (called once, before the exit); arena (a page of nops, code), scratch (a page, data), syscall_entry;
 * globals seen[256], frame_rip, frame_rflags (of the last frame), resume_at (where a fault's handler returns to; 0:
 * where it came from).
 * Ring 3 may use the arena, the scratch page and the stack. Output: "traps ok". Exit code: 0.
 */
#include "guest.h"

#define MSR_EFER 0xc0000080
#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_SFMASK 0xc0000084
#define EFER_SCE 1
#define PAGE_USER 4ull
#define FLAGS_OF_SYSCALL 0x700ull /* TF, IF, DF */

volatile uint64_t seen[256];
volatile uint64_t frame_rip;
volatile uint64_t frame_rflags;
volatile uint64_t resume_at;
uint8_t scratch[4096] ALIGNED(4096);
extern uint8_t arena[];
extern uint8_t syscall_entry[];

__asm__(".text\n"
        ".balign 4096\n"
        ".globl arena\n.hidden arena\n.type arena, @object\n"
        "arena: .skip 4096, 0x90\n.size arena, 4096\n"
        ".globl syscall_entry\n.hidden syscall_entry\n.type syscall_entry, @function\n"
        "syscall_entry: nop\nnop\nsysretq\n.size syscall_entry, . - syscall_entry\n");

/* Descriptors: null, code and data of ring 0; as SYSRET wants them: code 32, data, code 64 of ring 3; a task. */
static uint64_t gdt[8] ALIGNED(16) = {
    0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cffb000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff,
};
static uint32_t task[26] ALIGNED(16);

static void note(struct exception_frame *frame)
{
    seen[frame->vector & 255] = seen[frame->vector & 255] + 1;
    frame_rip = frame->rip;
    frame_rflags = frame->rflags;
    if (resume_at != 0) {
        frame->rip = resume_at;
        resume_at = 0;
    }
}

KEEP void ready(void)
{
}

/* Lets ring 3 use the page at an address: every level has to say so. */
static void share(uint64_t address)
{
    map_page(address, physical_address_of(address), PAGE_PRESENT | PAGE_WRITABLE | PAGE_USER);
    uint64_t *table = (uint64_t *)(read_cr3() & 0xffffffffff000ull);
    for (int shift = 39; shift > 12; shift -= 9) {
        uint64_t *entry = &table[address >> shift & 511];
        *entry |= PAGE_USER;
        table = (uint64_t *)(*entry & 0xffffffffff000ull);
    }
    write_cr3(read_cr3());
}

static void load_descriptors(void)
{
    struct PACKED {
        uint16_t limit;
        uint64_t base;
    } pointer = {sizeof gdt - 1, (uintptr_t)gdt};
    static uint8_t stack[4096] ALIGNED(16);
    uint64_t base = (uintptr_t)task, top = (uintptr_t)stack + sizeof stack;
    task[1] = (uint32_t)top;
    task[2] = (uint32_t)(top >> 32);
    gdt[6] = (sizeof task - 1) | (base & 0xffffff) << 16 | 0x89ull << 40 | (base >> 24 & 0xff) << 56;
    gdt[7] = base >> 32;
    __asm__ volatile("lgdt %0\n\tltr %w1" ::"m"(pointer), "r"(0x30) : "memory");
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
    idt_init();
    for (int vector = 0; vector < 256; vector++) {
        set_handler((uint8_t)vector, note);
    }
    load_descriptors();
    share((uintptr_t)arena);
    share((uintptr_t)scratch);
    share((uintptr_t)stacks[0] + STACK_SIZE - PAGE_SIZE);
    write_msr(MSR_EFER, read_msr(MSR_EFER) | EFER_SCE);
    write_msr(MSR_STAR, 0x0010000800000000ull);
    write_msr(MSR_LSTAR, (uintptr_t)syscall_entry);
    write_msr(MSR_SFMASK, FLAGS_OF_SYSCALL);
    ready();
    print("traps ok\n");
    return 0;
}
