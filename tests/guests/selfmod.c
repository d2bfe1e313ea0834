/*
 * Changes its own code at run time, in place and by copies, as a loader of code would.
 *
 * Options: -DROUNDS=n (5).
 * Symbols: patched() returns what its instruction was last patched to; loaded_code, the page that copies run from;
 * on_patched(round, value), called after each; global rounds_done.
 * Output: "round R: patched V loaded W" with V = R and W = 100 + R, then "selfmod ok". Exit code: 0.
 */
#include "guest.h"

#ifndef ROUNDS
#define ROUNDS 5
#endif

uint32_t patched(void);
extern uint8_t patched_value[] __attribute__((visibility("hidden")));
extern uint8_t patched_end[] __attribute__((visibility("hidden")));

volatile uint64_t rounds_done;
uint8_t loaded_code[4096] ALIGNED(4096);

__asm__(".text\n"
        ".globl patched\n"
        ".type patched, @function\n"
        "patched:\n"
        "\tmovl $0, %eax\n"
        ".globl patched_value\n"
        ".set patched_value, . - 4\n"
        "\tret\n"
        ".globl patched_end\n"
        "patched_end:\n"
        ".size patched, . - patched\n");

KEEP void on_patched(uint64_t round, uint64_t value)
{
    (void)value;
    rounds_done = round;
}

/* CPUID is a serialising instruction: what follows is fetched anew. */
static void patch(uint8_t *immediate, uint32_t value)
{
    memcpy(immediate, &value, sizeof value);
    cpuid(0, 0);
}

static uint32_t load_and_call(uint32_t value)
{
    const uint8_t *code = (const uint8_t *)patched;
    memset(loaded_code, 0xcc, sizeof loaded_code);
    memcpy(loaded_code, code, (size_t)(patched_end - code));
    patch(&loaded_code[patched_value - code], value);
    uint32_t (*volatile loaded)(void) = (uint32_t(*)(void))loaded_code;
    return loaded();
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
    for (uint32_t round = 1; round <= ROUNDS; round++) {
        patch(patched_value, round);
        uint32_t value = patched();
        uint32_t loaded = load_and_call(100 + round);
        on_patched(round, value);
        print("round ");
        print_dec(round);
        print(": patched ");
        print_dec(value);
        print(" loaded ");
        print_dec(loaded);
        print("\n");
        check(value == round && loaded == 100 + round, "the changed code ran");
    }
    print("selfmod ok\n");
    return 0;
}
