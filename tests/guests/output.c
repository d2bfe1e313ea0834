/*
 * Prints in every way there is, mixed, so that lost or reordered output shows.
 *
 * Options: -DLINES=n (1000), -DBUFFER_SIZE=n (1048576; 0 for none), -DCRASH triple-faults instead of the exit.
 * Output: "line 0" to "line LINES-1", by serial bytes, by the serial buffer and by fd 1 in turn; BUFFER_SIZE bytes in one
 * serial-buffer call, rows of 63 times the letter 'a' + row % 26 and a newline; "the end without a newline".
 * Exit code: 0, or with CRASH a shutdown.
 */
#include "guest.h"

#ifndef LINES
#define LINES 1000
#endif
#ifndef BUFFER_SIZE
#define BUFFER_SIZE (1 << 20)
#endif

#define ROW 64

static char buffer[BUFFER_SIZE + 1];

/* Formats "line N\n"; returns its length. */
static size_t format_line(char *text, uint64_t number)
{
    char digits[20];
    size_t count = 0;
    do {
        digits[count++] = (char)('0' + number % 10);
        number /= 10;
    } while (number != 0);
    memcpy(text, "line ", 5);
    size_t length = 5;
    while (count > 0) {
        text[length++] = digits[--count];
    }
    text[length++] = '\n';
    return length;
}

static void print_lines(void)
{
    char text[32];
    for (uint64_t number = 0; number < LINES; number++) {
        size_t length = format_line(text, number);
        switch (number % 3) {
        case 0:
            for (size_t i = 0; i < length; i++) {
                serial_byte((uint8_t)text[i]);
            }
            break;
        case 1:
            serial_buffer(text, length);
            break;
        default:
            sys_write(1, text, length);
        }
    }
}

static void print_rows(void)
{
    for (size_t row = 0; row * ROW < BUFFER_SIZE; row++) {
        size_t left = BUFFER_SIZE - row * ROW;
        memset(&buffer[row * ROW], 'a' + (int)(row % 26), left < ROW - 1 ? left : ROW - 1);
        if (left >= ROW) {
            buffer[row * ROW + ROW - 1] = '\n';
        }
    }
    if (BUFFER_SIZE > 0) {
        serial_buffer(buffer, BUFFER_SIZE);
    }
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
    print_lines();
    print_rows();
    for (const char *at = "the end without a newline"; *at != 0; at++) {
        serial_byte((uint8_t)*at);
    }
#ifdef CRASH
    __asm__ volatile("ud2");
#endif
    return 0;
}
