/*
 * A hand-written sequence of instructions (steps.S), each at a label step_N, for single-step tests.
 *
 * Symbols: steps, step_1 … step_28, step_callee; globals steps_word, steps_source, steps_target.
 * Output: "s" from step_16's OUT, then "steps=5" and a newline. Exit code: 0, or 97 after a FAIL line.
 */
#include "guest.h"

/* Runs the sequence; port and value are what its OUT to the console needs under the guest's interface. */
uint64_t steps(uint64_t port, uint64_t value);

volatile uint64_t steps_word;
const char steps_source[16] = "sixteen letters";
char steps_target[16];

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
    idt_init();
#if INTERFACE == 1
    uint64_t result = steps(V1_UART, 's');
#else
    uint64_t result = steps(V2_SERIAL_BYTE, 's');
#endif
    print("teps=");
    print_dec((int64_t)result);
    print("\n");
    check_equal((int64_t)result, 5, "the loop ran five times");
    check(steps_word == 42, "the store reached memory");
    check(memcmp(steps_target, steps_source, sizeof steps_source) == 0, "the string was copied");
    return 0;
}
