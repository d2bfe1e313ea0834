/*
 * The demo image that comes with the package: a small server-like guest to debug.
 *
 * It greets, tells the number of cpus, handles ten requests of id * 1000 bytes and exits with code 0. It stands alone:
 * one source file and one linker script make a position-independent image with debug information, entry version 4,
 * hypercall interface 1. Worth a breakpoint: handle_request(id, size), the globals served, bytes_served, cpus_online.
 */
#include <stddef.h>
#include <stdint.h>

#define MAX_CPUS 64
#define STACK_SHIFT 13
#define TEXT_(word) #word
#define TEXT(word) TEXT_(word)

/* Hypercalls of interface 1: OUT of the parameters' 32-bit physical address to the port. */
#define PORT_EXIT 0x540
#define PORT_SERIAL_BUFFER 0x880

#if defined(__clang__)
#define KEEP __attribute__((noinline, used))
#else
#define KEEP __attribute__((noipa, used))
#endif

struct boot_info {
    uint64_t phys_start, phys_end;
    uint64_t serial_port;
    uint64_t device_tree;
    uint64_t image_start, image_end;
    uint64_t tls[4];
    uint64_t platform;
    uint64_t has_pci;
    uint64_t num_cpus;
    uint32_t cpu_khz;
};

_Static_assert(offsetof(struct boot_info, num_cpus) == 96, "boot info, entry version 4");

struct request {
    uint64_t id;
    uint64_t size;
};

volatile uint64_t served;
volatile uint64_t bytes_served;
volatile uint64_t cpus_online;
uint8_t stacks[MAX_CPUS << STACK_SHIFT] __attribute__((aligned(4096), used));

/* The note by which a loader knows an image: entry version 4. */
__asm__(".pushsection .note.hermit, \"a\", @note\n"
        ".balign 4\n"
        ".long 7, 1, 0x5a00\n"
        ".asciz \"HERMIT\"\n"
        ".balign 4\n"
        ".byte 4\n"
        ".balign 4\n"
        ".popsection\n");

/* All cpus start here with the same stack pointer; RDI is the boot information, RSI the cpu's number. */
__asm__(".pushsection .text.start, \"ax\", @progbits\n"
        ".globl _start\n"
        ".type _start, @function\n"
        "_start:\n"
        "\t.cfi_startproc\n"
        "\t.cfi_undefined %rip\n"
        "\tcmpq $" TEXT(MAX_CPUS) ", %rsi\n"
        "\tjae 1f\n"
        "\tleaq stacks(%rip), %rax\n"
        "\tleaq 1(%rsi), %rcx\n"
        "\tshlq $" TEXT(STACK_SHIFT) ", %rcx\n"
        "\tleaq (%rax, %rcx), %rsp\n"
        "\txorl %ebp, %ebp\n"
        "\tcall demo_main\n"
        "1:\tcli\n"
        "\thlt\n"
        "\tjmp 1b\n"
        "\t.cfi_endproc\n"
        ".size _start, . - _start\n"
        ".popsection\n");

static void hypercall(uint16_t port, const void *parameters)
{
    __asm__ volatile("outl %0, %1" ::"a"((uint32_t)(uintptr_t)parameters), "Nd"(port) : "memory");
}

static void print(const char *text)
{
    size_t length = 0;
    while (((const volatile char *)text)[length] != 0) {
        length++;
    }
    const struct {
        uint64_t buffer;
        uint64_t length;
    } parameters = {(uintptr_t)text, length};
    hypercall(PORT_SERIAL_BUFFER, &parameters);
}

static void print_number(uint64_t number)
{
    char digits[21];
    size_t at = sizeof digits - 1;
    digits[at] = 0;
    do {
        digits[--at] = (char)('0' + number % 10);
        number /= 10;
    } while (number != 0);
    print(&digits[at]);
}

static void stop(int32_t code)
{
    hypercall(PORT_EXIT, &code);
}

/* Handles one request and returns the bytes served so far. */
KEEP uint64_t handle_request(uint64_t id, uint64_t size)
{
    struct request request = {id, size};
    served = served + 1;
    bytes_served = bytes_served + request.size;
    print("request ");
    print_number(request.id);
    print(" of ");
    print_number(request.size);
    print(" bytes\n");
    return bytes_served;
}

KEEP void demo_main(const struct boot_info *boot, uint64_t cpu)
{
    __atomic_add_fetch(&cpus_online, 1, __ATOMIC_RELEASE);
    if (cpu != 0) {
        return;
    }
    print("Hello from the demo guest\n");
    print_number(boot->num_cpus);
    print(boot->num_cpus == 1 ? " cpu\n" : " cpus\n");
    for (uint64_t id = 1; id <= 10; id++) {
        handle_request(id, id * 1000);
    }
    print("served ");
    print_number(served);
    print(" requests\n");
    stop(0);
}
