/*
 * Takes exceptions and repairs each in its own handler.
 *
 * Options: -DWITH_DEBUG_REGISTERS adds a breakpoint in DR0 and single-steps by the trap flag, which a debugger that
 * uses them itself takes away; -DWITHOUT_INT3 leaves int3 out.
 * Symbols: on_page_fault(address, error), on_breakpoint(n), on_step(n), watched_function.
 * Output, a line each: "page fault 0x500000001230 error 0x2", "no execute error 0x11", "undefined instruction",
 * "breakpoints 3", "divide error", "general protection", then with debug registers "debug register 1", "steps 4";
 * "faults ok". Exit code: 0, or 97 after a FAIL line, or 98 for an exception that should not come.
 */
#include "guest.h"

#define VECTOR_DE 0
#define VECTOR_DB 1
#define VECTOR_BP 3
#define VECTOR_UD 6
#define VECTOR_GP 13
#define VECTOR_PF 14

#define WINDOW 0x500000001000ull
#define CODE_WINDOW 0x500000003000ull
#define FLAG_RF 0x10000ull

volatile uint64_t breakpoints;
volatile uint64_t page_faults;
volatile uint64_t debug_hits;
volatile uint64_t single_steps;

static volatile uint64_t fault_address;
static volatile uint64_t fault_error;
static volatile uint64_t faults_seen;
static volatile uint64_t resume_at;

static uint8_t page[4096] ALIGNED(4096);
static uint8_t code_page[4096] ALIGNED(4096);

KEEP void on_page_fault(uint64_t address, uint64_t error)
{
    fault_address = address;
    fault_error = error;
    page_faults = page_faults + 1;
    if ((address & ~0xfffull) == WINDOW) {
        map_page(WINDOW, (uintptr_t)page, PAGE_PRESENT | PAGE_WRITABLE);
    } else {
        check((address & ~0xfffull) == CODE_WINDOW, "a page fault comes from a known page");
        map_page(CODE_WINDOW, (uintptr_t)code_page, PAGE_PRESENT);
    }
}

static void page_fault(struct exception_frame *frame)
{
    on_page_fault(read_cr2(), frame->error);
}

KEEP void on_breakpoint(uint64_t n)
{
    breakpoints = n;
}

static void breakpoint(struct exception_frame *frame)
{
    check(*(const uint8_t *)(frame->rip - 1) == 0xcc, "RIP is behind the int3");
    on_breakpoint(breakpoints + 1);
}

/* For faults whose instruction cannot be repaired: goes on where the code said. */
static void skip(struct exception_frame *frame)
{
    faults_seen = faults_seen + 1;
    fault_error = frame->error;
    frame->rip = resume_at;
}

static void test_page_fault(void)
{
    volatile uint64_t *word = (volatile uint64_t *)(WINDOW + 0x230);
    *word = 0x1234;
    check_equal((int64_t)page_faults, 1, "one page fault");
    check(fault_address == (uintptr_t)word, "CR2 is the address");
    check_equal((int64_t)fault_error, 2, "the error code is a write to an absent page");
    check(*word == 0x1234, "the store was done again");
    check(*(uint64_t *)&page[0x230] == 0x1234, "the store reached the page");
    print("page fault ");
    print_hex(fault_address);
    print(" error ");
    print_hex(fault_error);
    print("\n");
}

static void test_no_execute(void)
{
    code_page[0] = 0xc3; /* ret */
    map_page(CODE_WINDOW, (uintptr_t)code_page, PAGE_PRESENT | PAGE_NO_EXECUTE);
    void (*volatile code)(void) = (void (*)(void))CODE_WINDOW;
    code();
    check_equal((int64_t)page_faults, 2, "one page fault more");
    check(fault_address == CODE_WINDOW, "CR2 is the code's address");
    print("no execute error ");
    print_hex(fault_error);
    print("\n");
}

static void test_undefined_instruction(void)
{
    __asm__ volatile("leaq 1f(%%rip), %%rax\n\t"
                     "movq %%rax, %0\n\t"
                     "ud2\n"
                     "1:"
                     : "=m"(resume_at)::"rax", "memory");
    check_equal((int64_t)faults_seen, 1, "one undefined instruction");
    print("undefined instruction\n");
}

static void test_divide_error(void)
{
    __asm__ volatile("leaq 1f(%%rip), %%rax\n\t"
                     "movq %%rax, %0\n\t"
                     "xorl %%ecx, %%ecx\n\t"
                     "xorl %%edx, %%edx\n\t"
                     "divq %%rcx\n"
                     "1:"
                     : "=m"(resume_at)::"rax", "rcx", "rdx", "cc", "memory");
    check_equal((int64_t)faults_seen, 2, "one divide error");
    print("divide error\n");
}

static void test_general_protection(void)
{
    __asm__ volatile("leaq 1f(%%rip), %%rax\n\t"
                     "movq %%rax, %0\n\t"
                     "movabsq $0x1234000000000000, %%rcx\n\t"
                     "movq (%%rcx), %%rdx\n"
                     "1:"
                     : "=m"(resume_at)::"rax", "rcx", "rdx", "memory");
    check_equal((int64_t)faults_seen, 3, "one general protection fault");
    check_equal((int64_t)fault_error, 0, "its error code is 0");
    print("general protection\n");
}

static void test_breakpoints(void)
{
#ifndef WITHOUT_INT3
    __asm__ volatile("int3\n\tint3\n\tint3" ::: "memory");
    check_equal((int64_t)breakpoints, 3, "three breakpoints");
#endif
    print("breakpoints ");
    print_dec((int64_t)breakpoints);
    print("\n");
}

#ifdef WITH_DEBUG_REGISTERS

KEEP void on_step(uint64_t n)
{
    single_steps = n;
}

KEEP uint64_t watched_function(uint64_t value)
{
    return value + 1;
}

static void debug_exception(struct exception_frame *frame)
{
    uint64_t status;
    __asm__ volatile("movq %%dr6, %0" : "=r"(status));
    __asm__ volatile("movq %0, %%dr6" ::"r"(0xffff0ff0ull));
    if ((status & 1) != 0) {
        check(frame->rip == (uintptr_t)watched_function, "the breakpoint hits in front of the function");
        debug_hits = debug_hits + 1;
        __asm__ volatile("movq %0, %%dr7" ::"r"(0x400ull));
        frame->rflags |= FLAG_RF;
    }
    if ((status & 0x4000) != 0) {
        on_step(single_steps + 1);
    }
}

static void test_debug_registers(void)
{
    set_handler(VECTOR_DB, debug_exception);
    __asm__ volatile("movq %0, %%dr0" ::"r"(watched_function));
    __asm__ volatile("movq %0, %%dr7" ::"r"(0x402ull)); /* breakpoint 0, global, on execution */
    check_equal((int64_t)watched_function(1), 2, "the function runs after its breakpoint");
    check_equal((int64_t)debug_hits, 1, "the breakpoint hit once");
    print("debug register ");
    print_dec((int64_t)debug_hits);
    print("\n");

    /* The popfq that sets TF does not trap itself; three nops and the popfq that clears TF do. */
    __asm__ volatile("pushfq\n\t"
                     "pushfq\n\t"
                     "orq $0x100, (%%rsp)\n\t"
                     "popfq\n\t"
                     "nop\n\t"
                     "nop\n\t"
                     "nop\n\t"
                     "popfq" ::: "memory", "cc");
    print("steps ");
    print_dec((int64_t)single_steps);
    print("\n");
    check_equal((int64_t)single_steps, 4, "four single-steps");
}

#endif

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
    idt_init();
    set_handler(VECTOR_PF, page_fault);
    set_handler(VECTOR_BP, breakpoint);
    set_handler(VECTOR_UD, skip);
    set_handler(VECTOR_DE, skip);
    set_handler(VECTOR_GP, skip);
    test_page_fault();
    test_no_execute();
    test_undefined_instruction();
    test_breakpoints();
    test_divide_error();
    test_general_protection();
#ifdef WITH_DEBUG_REGISTERS
    test_debug_registers();
#endif
    print("faults ok\n");
    return 0;
}
