/* The functions that the test guests share; guest.h says what each does. */
#include "guest.h"

/* Hypercalls. */

void guest_exit(int32_t code)
{
#if INTERFACE == 1
    struct v1_exit_params parameters = {.code = code};
    hypercall(V1_EXIT, &parameters);
#else
    call_v2(V2_EXIT, (uint32_t)code);
#endif
    for (;;) {
        disable_interrupts();
        halt();
    }
}

void serial_byte(uint8_t byte)
{
#if INTERFACE == 1
    outb(V1_UART, byte);
#else
    call_v2(V2_SERIAL_BYTE, byte);
#endif
}

void serial_buffer(const void *data, uint64_t length)
{
#if INTERFACE == 1
    struct v1_serial_params parameters = {.buf = (uintptr_t)data, .len = length};
    hypercall(V1_SERIAL_BUFFER, &parameters);
#else
    struct v2_serial_params parameters = {.len = length, .buf = (uintptr_t)data};
    hypercall(V2_SERIAL_BUFFER, &parameters);
#endif
}

int32_t sys_open(const char *name, int32_t flags, int32_t mode)
{
    struct open_params parameters = {.name = (uintptr_t)name, .flags = flags, .mode = mode, .ret = INT32_MIN};
    hypercall(INTERFACE == 1 ? V1_OPEN : V2_OPEN, &parameters);
    return parameters.ret;
}

int64_t sys_read(int32_t fd, void *buffer, uint64_t length)
{
#if INTERFACE == 1
    struct v1_read_params parameters = {.fd = fd, .buf = (uintptr_t)buffer, .len = length, .ret = INT64_MIN};
    hypercall(V1_READ, &parameters);
#else
    struct v2_transfer_params parameters = {.len = length, .ret = INT64_MIN, .buf = (uintptr_t)buffer, .fd = fd};
    hypercall(V2_READ, &parameters);
#endif
    return parameters.ret;
}

int64_t sys_write(int32_t fd, const void *buffer, uint64_t length)
{
#if INTERFACE == 1
    /* The first interface has no field for a result: the host may only leave the length alone. */
    struct v1_write_params parameters = {.fd = fd, .buf = (uintptr_t)buffer, .len = length};
    hypercall(V1_WRITE, &parameters);
    return (int64_t)parameters.len;
#else
    struct v2_transfer_params parameters = {.len = length, .ret = INT64_MIN, .buf = (uintptr_t)buffer, .fd = fd};
    hypercall(V2_WRITE, &parameters);
    return parameters.ret;
#endif
}

int64_t sys_lseek(int32_t fd, int64_t offset, int32_t whence)
{
#if INTERFACE == 1
    struct v1_lseek_params parameters = {.fd = fd, .offset = offset, .whence = whence};
    hypercall(V1_LSEEK, &parameters);
#else
    struct v2_lseek_params parameters = {.offset = offset, .whence = (uint32_t)whence, .fd = fd};
    hypercall(V2_LSEEK, &parameters);
#endif
    return parameters.offset;
}

int32_t sys_close(int32_t fd)
{
    struct close_params parameters = {.fd = fd, .ret = INT32_MIN};
    hypercall(INTERFACE == 1 ? V1_CLOSE : V2_CLOSE, &parameters);
    return parameters.ret;
}

int32_t sys_unlink(const char *name)
{
    struct unlink_params parameters = {.name = (uintptr_t)name, .ret = INT32_MIN};
    hypercall(INTERFACE == 1 ? V1_UNLINK : V2_UNLINK, &parameters);
    return parameters.ret;
}

static int32_t result_of(const struct v3_result *result)
{
    check(result->tag == RESULT_SUCCESS || result->tag == RESULT_ERROR, "the host set a result");
    if (result->tag == RESULT_SUCCESS) {
        return 0;
    }
    return result->error < 0 ? result->error : -result->error;
}

int64_t sys_getdents(int32_t fd, void *buffer, uint64_t length)
{
    struct v3_getdents_params parameters = {.fd = fd, .buf = (uintptr_t)buffer, .len = length};
    call_v2(V2_GETDENTS, (uintptr_t)&parameters);
    switch (parameters.tag) {
    case GETDENTS_SUCCESS:
        return (int64_t)parameters.length;
    case GETDENTS_END:
        return 0;
    default:
        check(parameters.tag == GETDENTS_ERROR, "the host set a result of getdents");
        return parameters.error < 0 ? parameters.error : -parameters.error;
    }
}

static int32_t stat_of_kind(const char *name, uint32_t kind, struct file_attr *attr)
{
    struct v3_stat_params parameters = {.name = (uintptr_t)name, .kind = kind, .attr = (uintptr_t)attr};
    call_v2(V2_STAT, (uintptr_t)&parameters);
    return result_of(&parameters.ret);
}

int32_t sys_stat(const char *name, struct file_attr *attr)
{
    return stat_of_kind(name, 0, attr);
}

int32_t sys_lstat(const char *name, struct file_attr *attr)
{
    return stat_of_kind(name, 1, attr);
}

int32_t sys_fstat(int32_t fd, struct file_attr *attr)
{
    struct v3_fstat_params parameters = {.fd = fd, .attr = (uintptr_t)attr};
    call_v2(V2_FSTAT, (uintptr_t)&parameters);
    return result_of(&parameters.ret);
}

int32_t sys_mkdir(const char *name)
{
    struct v3_mkdir_params parameters = {.path = (uintptr_t)name, .len = strlen(name) + 1};
    call_v2(V2_MKDIR, (uintptr_t)&parameters);
    return result_of(&parameters.ret);
}

void sys_cmdsize(struct v1_cmdsize_params *sizes)
{
    call_v1(V1_CMDSIZE, (uint32_t)(uintptr_t)sizes);
}

void sys_cmdval(const uint64_t *argv, const uint64_t *envp)
{
    struct v1_cmdval_params parameters = {.argv = (uintptr_t)argv, .envp = (uintptr_t)envp};
    call_v1(V1_CMDVAL, (uint32_t)(uintptr_t)&parameters);
}

/* Printing. */

void print(const char *text)
{
    serial_buffer(text, strlen(text));
}

static void print_digits(uint64_t value, uint64_t base, const char *prefix)
{
    char text[32];
    size_t at = sizeof text - 1;
    text[at] = 0;
    do {
        text[--at] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value != 0);
    for (size_t left = strlen(prefix); left > 0; left--) {
        text[--at] = prefix[left - 1];
    }
    print(&text[at]);
}

void print_dec(int64_t value)
{
    if (value < 0) {
        print_digits(-(uint64_t)value, 10, "-");
    } else {
        print_digits((uint64_t)value, 10, "");
    }
}

void print_hex(uint64_t value)
{
    print_digits(value, 16, "0x");
}

KEEP static void check_failed(const char *what)
{
    print("FAIL: ");
    print(what);
    print("\n");
    guest_exit(EXIT_CHECK_FAILED);
}

void check(bool condition, const char *what)
{
    if (!condition) {
        check_failed(what);
    }
}

void check_equal(int64_t found, int64_t expected, const char *what)
{
    if (found != expected) {
        print("found ");
        print_dec(found);
        print(", expected ");
        print_dec(expected);
        print("\n");
        check_failed(what);
    }
}

/* Memory and strings. The compiler may call the first four by itself, so they must not call themselves. */

void *memcpy(void *to, const void *from, size_t length)
{
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(length)::"memory");
    return start;
}

void *memmove(void *to, const void *from, size_t length)
{
    if ((uintptr_t)to - (uintptr_t)from >= length) {
        return memcpy(to, from, length);
    }
    uint8_t *target = (uint8_t *)to + length - 1;
    const uint8_t *source = (const uint8_t *)from + length - 1;
    __asm__ volatile("std; rep movsb; cld" : "+D"(target), "+S"(source), "+c"(length)::"memory");
    return to;
}

void *memset(void *to, int byte, size_t length)
{
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(length) : "a"(byte) : "memory");
    return start;
}

int memcmp(const void *left, const void *right, size_t length)
{
    const volatile uint8_t *a = left;
    const volatile uint8_t *b = right;
    for (size_t i = 0; i < length; i++) {
        int difference = a[i] - b[i];
        if (difference != 0) {
            return difference;
        }
    }
    return 0;
}

size_t strlen(const char *text)
{
    const volatile char *end = text;
    while (*end != 0) {
        end++;
    }
    return (size_t)(end - text);
}

int strcmp(const char *left, const char *right)
{
    while (*left != 0 && *left == *right) {
        left++;
        right++;
    }
    return (uint8_t)*left - (uint8_t)*right;
}

bool starts_with(const char *text, const char *prefix)
{
    while (*prefix != 0) {
        if (*text++ != *prefix++) {
            return false;
        }
    }
    return true;
}

/* Cpus. */

uint64_t cpu_count(const struct boot_info *boot)
{
    return boot->num_cpus < MAX_CPUS ? boot->num_cpus : MAX_CPUS;
}

uint64_t this_cpu(void)
{
    return ((uintptr_t)__builtin_frame_address(0) - (uintptr_t)stacks) / STACK_SIZE;
}

void lock_acquire(struct lock *lock)
{
    while (__atomic_exchange_n(&lock->held, 1, __ATOMIC_ACQUIRE) != 0) {
        pause();
    }
}

void lock_release(struct lock *lock)
{
    __atomic_store_n(&lock->held, 0, __ATOMIC_RELEASE);
}

/* Paging. The tables are reached by their physical addresses, which the host maps one to one. */

#define ADDRESS_MASK 0x000ffffffffff000ull
#define TABLE_COUNT 32

static uint64_t table_pool[TABLE_COUNT][512] ALIGNED(4096);
static uint64_t tables_used;
static struct lock table_lock;

static uint64_t *new_table(void)
{
    check(tables_used < TABLE_COUNT, "there is a page table left in the pool");
    return table_pool[tables_used++];
}

static uint64_t *table_at(uint64_t entry)
{
    return (uint64_t *)(entry & ADDRESS_MASK);
}

/* The table below an entry: made if there is none, and made of 512 equal pieces if it is a 2 MiB page. */
static uint64_t *table_below(uint64_t *entry)
{
    if ((*entry & PAGE_PRESENT) == 0) {
        *entry = (uintptr_t)new_table() | PAGE_PRESENT | PAGE_WRITABLE;
    } else if ((*entry & PAGE_HUGE) != 0) {
        uint64_t *pages = new_table();
        for (uint64_t i = 0; i < 512; i++) {
            pages[i] = (*entry & ~PAGE_HUGE) + i * PAGE_SIZE;
        }
        *entry = (uintptr_t)pages | PAGE_PRESENT | PAGE_WRITABLE;
    }
    return table_at(*entry);
}

void map_page(uint64_t virtual_address, uint64_t physical_address, uint64_t flags)
{
    lock_acquire(&table_lock);
    uint64_t *table = table_at(read_cr3());
    for (int shift = 39; shift > 12; shift -= 9) {
        table = table_below(&table[virtual_address >> shift & 511]);
    }
    table[virtual_address >> 12 & 511] = (physical_address & ADDRESS_MASK) | flags;
    __asm__ volatile("invlpg (%0)" ::"r"(virtual_address) : "memory");
    lock_release(&table_lock);
}

uint64_t physical_address_of(uint64_t virtual_address)
{
    uint64_t entry = read_cr3();
    for (int shift = 39; shift >= 12; shift -= 9) {
        entry = table_at(entry)[virtual_address >> shift & 511];
        if ((entry & PAGE_PRESENT) == 0) {
            return UINT64_MAX;
        }
        if (shift == 12 || (entry & PAGE_HUGE) != 0) {
            uint64_t offset_mask = (1ull << shift) - 1;
            return (entry & ADDRESS_MASK & ~offset_mask) | (virtual_address & offset_mask);
        }
    }
    return UINT64_MAX;
}

/* Exceptions. */

struct gate {
    uint16_t offset_low;
    uint16_t selector;
    uint8_t stack;
    uint8_t type;
    uint16_t offset_middle;
    uint32_t offset_high;
    uint32_t reserved;
};

static struct gate idt[256] ALIGNED(16);
static exception_handler handlers[256];

void idt_init(void)
{
    for (int vector = 0; vector < 256; vector++) {
        uintptr_t stub = (uintptr_t)exception_stubs[vector];
        idt[vector] = (struct gate){
            .offset_low = (uint16_t)stub,
            .selector = 8,
            .type = 0x8e,
            .offset_middle = (uint16_t)(stub >> 16),
            .offset_high = (uint32_t)(stub >> 32),
        };
    }
    idt_load();
}

void idt_load(void)
{
    struct PACKED {
        uint16_t limit;
        uint64_t base;
    } pointer = {sizeof idt - 1, (uintptr_t)idt};
    __asm__ volatile("lidt %0" ::"m"(pointer));
}

void set_handler(uint8_t vector, exception_handler handler)
{
    __atomic_store_n(&handlers[vector], handler, __ATOMIC_RELEASE);
}

void idt_remove(uint8_t vector)
{
    idt[vector].type = 0;
}

/* Called by the stubs of start.S. */
void handle_exception(struct exception_frame *frame);

KEEP void handle_exception(struct exception_frame *frame)
{
    exception_handler handler = __atomic_load_n(&handlers[frame->vector & 255], __ATOMIC_ACQUIRE);
    if (handler != NULL) {
        handler(frame);
        return;
    }
    print("unexpected exception ");
    print_dec((int64_t)frame->vector);
    print(" error ");
    print_hex(frame->error);
    print(" rip ");
    print_hex(frame->rip);
    print(" cr2 ");
    print_hex(read_cr2());
    print("\n");
    guest_exit(EXIT_UNEXPECTED_EXCEPTION);
}

/* Local APIC. */

#define MSR_APIC_BASE 0x1b
#define MSR_X2APIC 0x800
#define APIC_BASE 0xfee00000ull
#define APIC_BASE_ENABLE 0x800ull
#define APIC_BASE_X2APIC 0x400ull

#define LAPIC_ID 0x20
#define LAPIC_TPR 0x80
#define LAPIC_EOI 0xb0
#define LAPIC_SPURIOUS 0xf0
#define LAPIC_ICR 0x300
#define LAPIC_ICR_HIGH 0x310
#define LAPIC_TIMER 0x320
#define LAPIC_INITIAL_COUNT 0x380
#define LAPIC_DIVIDE 0x3e0

static bool has_x2apic;

static uint32_t lapic_read(uint32_t offset)
{
    if (has_x2apic) {
        return (uint32_t)read_msr(MSR_X2APIC + offset / 16);
    }
    return *(volatile uint32_t *)(APIC_BASE + offset);
}

static void lapic_write(uint32_t offset, uint32_t value)
{
    if (has_x2apic) {
        write_msr(MSR_X2APIC + offset / 16, value);
    } else {
        *(volatile uint32_t *)(APIC_BASE + offset) = value;
    }
}

void lapic_init(void)
{
    uint64_t base = APIC_BASE | (read_msr(MSR_APIC_BASE) & 0x100) | APIC_BASE_ENABLE;
    has_x2apic = (cpuid(1, 0).ecx >> 21 & 1) != 0;
    write_msr(MSR_APIC_BASE, base);
    if (has_x2apic) {
        write_msr(MSR_APIC_BASE, base | APIC_BASE_X2APIC);
    } else {
        map_page(APIC_BASE, APIC_BASE, PAGE_PRESENT | PAGE_WRITABLE | PAGE_UNCACHED);
    }
    lapic_write(LAPIC_TPR, 0);
    lapic_write(LAPIC_SPURIOUS, 0x1ff);
}

uint32_t lapic_id(void)
{
    return has_x2apic ? lapic_read(LAPIC_ID) : lapic_read(LAPIC_ID) >> 24;
}

void lapic_end_of_interrupt(void)
{
    lapic_write(LAPIC_EOI, 0);
}

void lapic_timer(uint8_t vector, uint32_t count, bool periodic)
{
    lapic_write(LAPIC_DIVIDE, 0xb); /* by 1 */
    lapic_write(LAPIC_TIMER, vector | (periodic ? 1u << 17 : 0));
    lapic_write(LAPIC_INITIAL_COUNT, count);
}

void lapic_send_ipi(uint32_t destination, uint8_t vector)
{
    if (has_x2apic) {
        write_msr(MSR_X2APIC + LAPIC_ICR / 16, (uint64_t)destination << 32 | vector);
    } else {
        lapic_write(LAPIC_ICR_HIGH, destination << 24);
        lapic_write(LAPIC_ICR, vector);
    }
}
