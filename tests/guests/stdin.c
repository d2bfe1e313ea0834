/*
 * Reads fd 0 once, up to 100 bytes, and echoes them.
 *
 * Output: "stdin N", a newline, then the N bytes as they came. Exit code: 0, 1 if the read fails.
 */
#include "guest.h"

static char buffer[100];

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
    int64_t length = sys_read(0, buffer, sizeof buffer);
    print("stdin ");
    print_dec(length);
    print("\n");
    if (length < 0) {
        return 1;
    }
    serial_buffer(buffer, (uint64_t)length);
    return 0;
}
