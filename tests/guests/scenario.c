/*
 * What a debugging session of a newcomer looks at: locals of several types that a debugger changes, a register in the
 * middle of assembly, and a global of one byte that is written once and read once.
 *
 * Built with -O0, so that every local has a place in memory.
 * Symbols: scenario(), with the locals number, fraction, copied and seen; opaque(n); mark(), called once in the middle;
 * last(n), called with what was read from the global watched (2, then 3).
 * Output: "number=N fraction=BITS copied=C watched=W", BITS being those of the double. Exit code: 0 if number, fraction
 * and copied are what only a debugger can have made of them: 6, 4.5 and 5; 1 otherwise.
 */
#include "guest.h"

static volatile uint8_t watched = 2;

KEEP void opaque(int n)
{
    (void)n;
}

KEEP void mark(void)
{
}

KEEP void last(uint8_t read)
{
    (void)read;
}

KEEP int scenario(void)
{
    int number = 5; /* line: number */
    opaque(number); /* line: opaque */
    double fraction = 3.5; /* line: fraction */
    mark(); /* line: mark */
    uint64_t copied; /* RCX is what the debugger sets before this. */
    __asm__ volatile("movq %%rcx, %%rax" : "=a"(copied)); /* line: copied */
    uint64_t seen = 0; /* line: seen */
    watched = 3; /* line: writes */
    seen = 1; /* line: after write */
    seen = watched; /* line: reads */
    last((uint8_t)seen); /* line: last */
    uint64_t bits;
    __builtin_memcpy(&bits, &fraction, sizeof bits);
    print("number=");
    print_dec(number);
    print(" fraction=");
    print_hex(bits);
    print(" copied=");
    print_dec((int64_t)copied);
    print(" watched=");
    print_dec((int64_t)seen);
    print("\n");
    return number == 6 && bits == 0x4012000000000000 && copied == 5 ? 0 : 1;
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
    return scenario();
}
