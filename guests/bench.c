/*
 * The guest of `uhyve bench`: loops that leave the guest in one way each. Like the demo it stands alone: this file and the
 * demo's linker script.
 *
 * Arguments: CASE COUNT [SIZE]. Cases whose exits the host times end with code 0 and print nothing. Those that the guest
 * times itself (wake, ipi, timer) print little-endian 64-bit words: the frequency of the time stamp counter in kHz, then
 * COUNT differences in ticks. Worth a breakpoint: work(i), and the global watched, which it writes.
 */
#include <stddef.h>
#include <stdint.h>

#define MAX_CPUS 64
#define STACK_SHIFT 13
#define MAX_SAMPLES 16384
#define MAX_SIZE (1 << 20)
#define TEXT_(word) #word
#define TEXT(word) TEXT_(word)

#define PORT_CMDSIZE 0x740
#define PORT_CMDVAL 0x780
#define PORT_EXIT 0x1010
#define PORT_SERIAL_BYTE 0x1020
#define PORT_SERIAL_BUFFER 0x1030
#define PORT_QUEUED_BYTE 0x800
#define PORT_WRITE 0x1100
#define PORT_OPEN 0x1110
#define PORT_CLOSE 0x1120
#define PORT_READ 0x1130
#define PORT_LSEEK 0x1140
/* A port that nothing answers. */
#define PORT_NOTHING 0x99

/* Where firmware has tables, and this machine has none: the host answers. */
#define FIRMWARE 0xf0000ull
#define VECTOR 0x40
#define EXIT_UNKNOWN 2
#define EXIT_FAILED 3
#define O_RDWR 2

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

uint8_t stacks[MAX_CPUS << STACK_SHIFT] __attribute__((aligned(4096), used));
volatile uint64_t watched;
volatile uint64_t calls;
static uint8_t data[MAX_SIZE] __attribute__((aligned(4096)));

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
        "\tcall bench_main\n"
        "1:\tcli\n"
        "\thlt\n"
        "\tjmp 1b\n"
        "\t.cfi_endproc\n"
        ".size _start, . - _start\n"
        ".popsection\n");

/* The one interrupt: its time goes to arrived as early as can be. */
volatile uint64_t arrived;
__asm__(".pushsection .text, \"ax\", @progbits\n"
        ".type on_interrupt, @function\n"
        "on_interrupt:\n"
        "\tpushq %rax\n"
        "\tpushq %rcx\n"
        "\tpushq %rdx\n"
        "\trdtsc\n"
        "\tshlq $32, %rdx\n"
        "\torq %rdx, %rax\n"
        "\tmovq %rax, arrived(%rip)\n"
        /* End of interrupt, x2APIC. */
        "\tmovl $0x80b, %ecx\n"
        "\txorl %eax, %eax\n"
        "\txorl %edx, %edx\n"
        "\twrmsr\n"
        "\tpopq %rdx\n"
        "\tpopq %rcx\n"
        "\tpopq %rax\n"
        "\tiretq\n"
        ".size on_interrupt, . - on_interrupt\n"
        ".popsection\n");
extern const uint8_t on_interrupt[] __attribute__((visibility("hidden")));

/* Hypercalls: interface 2 takes the address of the parameters, or the value, in RDI; interface 1 in EAX. */
static void call(uint16_t port, uint64_t parameter)
{
    __asm__ volatile("outl %%eax, %%dx" ::"a"(0x1234), "d"(port), "D"(parameter) : "memory");
}

static void old_call(uint16_t port, const void *parameters)
{
    __asm__ volatile("outl %0, %1" ::"a"((uint32_t)(uintptr_t)parameters), "Nd"(port) : "memory");
}

static void stop(uint64_t code)
{
    call(PORT_EXIT, code);
    for (;;) {
        __asm__ volatile("cli; hlt");
    }
}

struct buffer_call {
    uint64_t length;
    uint64_t buffer;
};

struct transfer_call {
    uint64_t length;
    int64_t result;
    uint64_t buffer;
    int32_t descriptor;
};

struct open_call {
    uint64_t name;
    int32_t flags, mode, result;
} __attribute__((packed));

struct close_call {
    int32_t descriptor, result;
} __attribute__((packed));

struct seek_call {
    int64_t offset;
    uint32_t whence;
    int32_t descriptor;
};

static void print(const void *text, uint64_t length)
{
    struct buffer_call parameters = {length, (uintptr_t)text};
    call(PORT_SERIAL_BUFFER, (uintptr_t)&parameters);
}

static int32_t open_file(const char *name)
{
    struct open_call parameters = {(uintptr_t)name, O_RDWR, 0, -1};
    call(PORT_OPEN, (uintptr_t)&parameters);
    return parameters.result;
}

static void close_file(int32_t descriptor)
{
    struct close_call parameters = {descriptor, -1};
    call(PORT_CLOSE, (uintptr_t)&parameters);
}

static void rewind_file(int32_t descriptor)
{
    struct seek_call parameters = {0, 0, descriptor};
    call(PORT_LSEEK, (uintptr_t)&parameters);
}

/* Arguments. */

#define MAX_WORDS 128

static struct {
    int32_t argc;
    int32_t arg_sizes[MAX_WORDS];
    int32_t envc;
    int32_t env_sizes[MAX_WORDS];
} __attribute__((packed)) sizes;
static char words[MAX_WORDS][256];
static char spare[4096];
static uint64_t word_places[MAX_WORDS], spare_places[MAX_WORDS];

static void read_arguments(void)
{
    struct {
        uint64_t words, environment;
    } __attribute__((packed)) values = {(uintptr_t)word_places, (uintptr_t)spare_places};
    old_call(PORT_CMDSIZE, &sizes);
    for (int i = 0; i < MAX_WORDS; i++) {
        word_places[i] = (uintptr_t)(sizes.arg_sizes[i] <= 256 ? words[i] : spare);
        spare_places[i] = (uintptr_t)spare;
    }
    old_call(PORT_CMDVAL, &values);
}

static int is(const char *word, const char *name)
{
    while (*word != 0 && *(const volatile char *)word == *name) {
        word++;
        name++;
    }
    return *word == *name;
}

static uint64_t number(const char *digits)
{
    uint64_t value = 0;
    while (*digits >= '0' && *digits <= '9') {
        value = value * 10 + (uint64_t)(*(const volatile char *)digits++ - '0');
    }
    return value;
}

/* Loops of three instructions: the one that leaves, the count, the jump. */

static void port_out(uint64_t count)
{
    __asm__ volatile("1: outb %%al, %%dx; decq %0; jnz 1b" : "+c"(count) : "a"(0), "d"(PORT_NOTHING) : "memory");
}

static void port_in(uint64_t count)
{
    __asm__ volatile("1: inb %%dx, %%al; decq %0; jnz 1b" : "+c"(count) : "d"(PORT_NOTHING) : "rax", "memory");
}

/* The boot page tables map RAM alone; the firmware area lies in the first 2 MiB. */
static void map_firmware(void)
{
    static uint64_t directory[512] __attribute__((aligned(4096)));
    const uint64_t address = 0x000ffffffffff000ull;
    uint64_t root;
    __asm__ volatile("movq %%cr3, %0" : "=r"(root));
    uint64_t *upper = (uint64_t *)(*(uint64_t *)(root & address) & address);
    if ((upper[0] & 1) == 0) {
        upper[0] = (uintptr_t)directory | 3;
    }
    uint64_t *pages = (uint64_t *)(upper[0] & address);
    if ((pages[0] & 1) == 0) {
        pages[0] = 0x83;
    }
    __asm__ volatile("movq %0, %%cr3" ::"r"(root) : "memory");
}

static void mmio_read(uint64_t count)
{
    map_firmware();
    __asm__ volatile("1: movb (%%rsi), %%al; decq %0; jnz 1b" : "+c"(count) : "S"(FIRMWARE) : "rax", "memory");
}

static void mmio_write(uint64_t count)
{
    map_firmware();
    __asm__ volatile("1: movb %%al, (%%rsi); decq %0; jnz 1b" : "+c"(count) : "a"(0), "S"(FIRMWARE) : "memory");
}

static void queued_byte(uint64_t count)
{
    __asm__ volatile("1: outb %%al, %%dx; decq %0; jnz 1b" : "+c"(count) : "a"('.'), "d"(PORT_QUEUED_BYTE) : "memory");
}

/* The same hypercall again and again, with the same parameters. */
static void call_again(uint64_t count, uint16_t port, uint64_t parameter)
{
    __asm__ volatile("1: outl %%eax, %%dx; decq %0; jnz 1b"
                     : "+c"(count)
                     : "a"(0x1234), "d"(port), "D"(parameter)
                     : "memory");
}

static void serial_buffer(uint64_t count, uint64_t size)
{
    struct buffer_call parameters = {size, (uintptr_t)data};
    call_again(count, PORT_SERIAL_BUFFER, (uintptr_t)&parameters);
}

static void transfer(uint64_t count, uint64_t size, uint16_t port)
{
    int32_t descriptor = open_file("/bench/data");
    if (descriptor < 0) {
        stop(EXIT_FAILED);
    }
    struct transfer_call parameters = {size, 0, (uintptr_t)data, descriptor};
    for (uint64_t i = 0; i < count; i++) {
        rewind_file(descriptor);
        call(port, (uintptr_t)&parameters);
        if (parameters.result != (int64_t)size) {
            stop(EXIT_FAILED);
        }
    }
    close_file(descriptor);
}

static void open_close(uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        int32_t descriptor = open_file("/bench/data");
        if (descriptor < 0) {
            stop(EXIT_FAILED);
        }
        close_file(descriptor);
    }
}

/* Something to stop at. */
KEEP uint64_t work(uint64_t i)
{
    calls = i;
    watched = i;
    return i + 1;
}

static void work_on(uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        work(i);
    }
}

/* Interrupts. */

static uint64_t read_tsc(void)
{
    uint32_t low, high;
    __asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (uint64_t)high << 32 | low;
}

static void write_msr(uint32_t msr, uint64_t value)
{
    __asm__ volatile("wrmsr" ::"c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

static uint64_t read_msr(uint32_t msr)
{
    uint32_t low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr) : "memory");
    return (uint64_t)high << 32 | low;
}

#define MSR_APIC_BASE 0x1b
#define X2APIC_ID 0x802
#define X2APIC_TPR 0x808
#define X2APIC_SPURIOUS 0x80f
#define X2APIC_ICR 0x830
#define X2APIC_TIMER 0x832
#define X2APIC_INITIAL_COUNT 0x838
#define X2APIC_DIVIDE 0x83e

static struct {
    uint16_t offset_low, selector;
    uint8_t stack, type;
    uint16_t offset_middle;
    uint32_t offset_high, reserved;
} gates[VECTOR + 1] __attribute__((aligned(16)));

static void take_interrupts(void)
{
    uintptr_t handler = (uintptr_t)on_interrupt;
    gates[VECTOR].offset_low = (uint16_t)handler;
    gates[VECTOR].offset_middle = (uint16_t)(handler >> 16);
    gates[VECTOR].offset_high = (uint32_t)(handler >> 32);
    gates[VECTOR].selector = 8;
    gates[VECTOR].type = 0x8e;
    struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) table = {sizeof gates - 1, (uintptr_t)gates};
    __asm__ volatile("lidt %0" ::"m"(table));
    uint64_t base = read_msr(MSR_APIC_BASE) | 0x800;
    write_msr(MSR_APIC_BASE, base);
    write_msr(MSR_APIC_BASE, base | 0x400);
    write_msr(X2APIC_TPR, 0);
    write_msr(X2APIC_SPURIOUS, 0x1ff);
}

static uint64_t samples[MAX_SAMPLES + 1];
static volatile uint32_t receiver;
static volatile uint64_t started, ready, came, taken;

/* How the other cpu waits for its interrupt. */
static void receive(uint64_t count, int sleeps)
{
    take_interrupts();
    receiver = (uint32_t)read_msr(X2APIC_ID);
    for (uint64_t n = 1; n <= count; n++) {
        arrived = 0;
        ready = n;
        if (sleeps) {
            while (arrived == 0) {
                __asm__ volatile("sti; hlt; cli" ::: "memory");
            }
        } else {
            __asm__ volatile("sti" ::: "memory");
            while (arrived == 0) {
                __asm__ volatile("pause" ::: "memory");
            }
            __asm__ volatile("cli" ::: "memory");
        }
        came = arrived;
        taken = n;
    }
}

/* Between its word that it is ready and the interrupt, the other cpu must have come to its place. */
static void let_it_settle(uint64_t ticks)
{
    uint64_t until = read_tsc() + ticks;
    while (read_tsc() < until) {
        __asm__ volatile("pause");
    }
}

static void send(uint64_t count, uint64_t khz)
{
    take_interrupts();
    for (uint64_t n = 1; n <= count; n++) {
        while (ready < n) {
            __asm__ volatile("pause" ::: "memory");
        }
        let_it_settle(khz / 10);
        uint64_t sent = read_tsc();
        write_msr(X2APIC_ICR, (uint64_t)receiver << 32 | VECTOR);
        while (taken < n) {
            __asm__ volatile("pause" ::: "memory");
        }
        samples[n] = came > sent ? came - sent : 0;
    }
}

/* One-shot timers of 200 µs (the timer counts nanoseconds): how late they are. */
static void timer(uint64_t count, uint64_t khz)
{
    const uint64_t period = 200000;
    take_interrupts();
    write_msr(X2APIC_DIVIDE, 0xb);
    write_msr(X2APIC_TIMER, VECTOR);
    for (uint64_t n = 1; n <= count; n++) {
        arrived = 0;
        uint64_t set = read_tsc();
        write_msr(X2APIC_INITIAL_COUNT, period);
        while (arrived == 0) {
            __asm__ volatile("sti; hlt; cli" ::: "memory");
        }
        uint64_t due = set + period * khz / 1000000;
        samples[n] = arrived > due ? arrived - due : 0;
    }
}

static void report(uint64_t count, uint64_t khz)
{
    samples[0] = khz;
    print(samples, (count + 1) * sizeof samples[0]);
}

static void spin(void)
{
    for (;;) {
        watched = watched + 1;
        __asm__ volatile("pause" ::: "memory");
    }
}

static void on_other_cpu(uint64_t cpu)
{
    /* Cpu 0 reads the arguments; the others wait for it. */
    while (started == 0) {
        __asm__ volatile("pause" ::: "memory");
    }
    if (is(words[1], "spin")) {
        spin();
    }
    if (cpu == 1 && (is(words[1], "wake") || is(words[1], "ipi"))) {
        receive(number(words[2]), is(words[1], "wake"));
    }
}

static int run(const struct boot_info *boot, const char *name, uint64_t count, uint64_t size)
{
    if (is(name, "exit")) {
        return 0;
    }
    if (is(name, "port_out")) {
        port_out(count);
    } else if (is(name, "port_in")) {
        port_in(count);
    } else if (is(name, "mmio_read")) {
        mmio_read(count);
    } else if (is(name, "mmio_write")) {
        mmio_write(count);
    } else if (is(name, "queued_byte")) {
        queued_byte(count);
    } else if (is(name, "serial_byte")) {
        call_again(count, PORT_SERIAL_BYTE, '.');
    } else if (is(name, "serial_buffer")) {
        serial_buffer(count, size);
    } else if (is(name, "write")) {
        transfer(count, size, PORT_WRITE);
    } else if (is(name, "read")) {
        transfer(count, size, PORT_READ);
    } else if (is(name, "open_close")) {
        open_close(count);
    } else if (is(name, "work")) {
        work_on(count);
    } else if (is(name, "wake") || is(name, "ipi")) {
        send(count, boot->cpu_khz);
        report(count, boot->cpu_khz);
    } else if (is(name, "timer")) {
        timer(count, boot->cpu_khz);
        report(count, boot->cpu_khz);
    } else if (is(name, "spin")) {
        spin();
    } else {
        return EXIT_UNKNOWN;
    }
    return 0;
}

KEEP void bench_main(const struct boot_info *boot, uint64_t cpu)
{
    if (cpu != 0) {
        on_other_cpu(cpu);
        return;
    }
    read_arguments();
    uint64_t count = number(words[2]), size = number(words[3]);
    int is_too_much = size > MAX_SIZE || count == 0;
    if (is(words[1], "wake") || is(words[1], "ipi") || is(words[1], "timer")) {
        is_too_much |= count > MAX_SAMPLES || boot->cpu_khz == 0;
    }
    if (sizes.argc < 3 || is_too_much) {
        stop(EXIT_UNKNOWN);
    }
    started = 1;
    stop((uint64_t)run(boot, words[1], count, size));
}
