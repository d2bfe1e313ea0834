/*
 * Greets by serial bytes, then by the serial buffer.
 *
 * Options: -DEXIT_CODE=n (0).
 * Output: "Hello from a test guest", "and a line by the buffer". Exit code: EXIT_CODE.
 */
#include "guest.h"

#ifndef EXIT_CODE
#define EXIT_CODE 0
#endif

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
    for (const char *at = "Hello from a test guest\n"; *at != 0; at++) {
        serial_byte((uint8_t)*at);
    }
    print("and a line by the buffer\n");
    return (int32_t)(EXIT_CODE);
}
