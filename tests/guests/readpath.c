/*
 * Reads the file /in to its end, in pieces of up to 256 bytes, and echoes each; a FIFO there makes the reads block.
 *
 * Options: -DFILE_PATH="\"/in\"".
 * Output: "opened", the contents, "end of file". Exit code: 0; 1 if the open fails, 2 if a read fails.
 */
#include "guest.h"

#ifndef FILE_PATH
#define FILE_PATH "/in"
#endif

static char buffer[256];

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
    int32_t fd = sys_open(FILE_PATH, O_RDONLY, 0);
    if (fd < 0) {
        print("open failed: ");
        print_dec(fd);
        print("\n");
        return 1;
    }
    print("opened\n");
    int64_t length;
    while ((length = sys_read(fd, buffer, sizeof buffer)) > 0) {
        serial_buffer(buffer, (uint64_t)length);
    }
    print(length == 0 ? "end of file\n" : "read failed\n");
    sys_close(fd);
    return length == 0 ? 0 : 2;
}
