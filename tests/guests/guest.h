/*
 * What every test guest shares: the boot information, the hypercalls of all three interface
 * versions, printing, exceptions, paging, the local APIC. INTERFACE selects which version the
 * sys_* wrappers use; the raw structs and calls of both tables are always there, because a host
 * serves both to any image.
 */
#ifndef GUEST_H
#define GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifndef INTERFACE
#define INTERFACE 1
#endif

#define MAX_CPUS 8
#define STACK_SIZE 16384
#define PAGE_SIZE 4096ull

/* Exit codes of guests that fail on their own account. */
#define EXIT_CHECK_FAILED 97
#define EXIT_UNEXPECTED_EXCEPTION 98

/* A function that a debugger finds under its own name, with its arguments where the ABI puts them. */
#if defined(__clang__)
#define KEEP __attribute__((noinline, used))
#else
#define KEEP __attribute__((noipa, used))
#endif

#define NORETURN __attribute__((noreturn))
#define ALIGNED(n) __attribute__((aligned(n)))
#define PACKED __attribute__((packed))
#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

#pragma GCC visibility push(hidden)

/* Boot information, entry version 4 (version 3 has the same bytes). */

struct boot_info {
    uint64_t phys_start;
    uint64_t phys_end;
    uint16_t serial_port;
    uint64_t device_tree;
    uint64_t image_start;
    uint64_t image_end;
    uint64_t tls_start;
    uint64_t tls_filesz;
    uint64_t tls_memsz;
    uint64_t tls_align;
    uint32_t platform; /* tag of a Rust enum; what follows is the variant of uhyve */
    ALIGNED(8) uint8_t has_pci;
    uint64_t num_cpus;
    uint32_t cpu_khz;
    __int128 boot_time_ns;
};

_Static_assert(sizeof(struct boot_info) == 128, "boot info has 128 bytes");
_Static_assert(offsetof(struct boot_info, device_tree) == 24, "boot info layout");
_Static_assert(offsetof(struct boot_info, platform) == 80, "boot info layout");
_Static_assert(offsetof(struct boot_info, has_pci) == 88, "boot info layout");
_Static_assert(offsetof(struct boot_info, num_cpus) == 96, "boot info layout");
_Static_assert(offsetof(struct boot_info, cpu_khz) == 104, "boot info layout");
_Static_assert(offsetof(struct boot_info, boot_time_ns) == 112, "boot info layout");

/* Each guest defines this; the value it returns on cpu 0 is the exit code, other cpus then halt. */
int guest_main(const struct boot_info *boot, uint64_t cpu);

/* Symbols of start.S and of the linker script. */
extern const uint8_t image_start[];
extern const uint8_t image_end[];
extern uint8_t stacks[MAX_CPUS][STACK_SIZE];
extern uint64_t boot_rsp[MAX_CPUS];
extern uint8_t exception_stubs[256][16];
NORETURN void park(void);

/* Hypercall numbers: the I/O port in both tables. */

#define V1_WRITE 0x400
#define V1_OPEN 0x440
#define V1_CLOSE 0x480
#define V1_READ 0x500
#define V1_EXIT 0x540
#define V1_LSEEK 0x580
#define V1_NETWRITE 0x640
#define V1_NETREAD 0x680
#define V1_NETSTAT 0x700
#define V1_CMDSIZE 0x740
#define V1_CMDVAL 0x780
#define V1_UART 0x800
#define V1_UNLINK 0x840
#define V1_SERIAL_BUFFER 0x880

#define V2_EXIT 0x1010
#define V2_SERIAL_BYTE 0x1020
#define V2_SERIAL_BUFFER 0x1030
#define V2_SERIAL_READ_BYTE 0x1040
#define V2_SERIAL_READ_BUFFER 0x1050
#define V2_WRITE 0x1100
#define V2_OPEN 0x1110
#define V2_CLOSE 0x1120
#define V2_READ 0x1130
#define V2_LSEEK 0x1140
#define V2_UNLINK 0x1150
#define V2_GETDENTS 0x1160
#define V2_STAT 0x1170
#define V2_FSTAT 0x1180
#define V2_MKDIR 0x1190
#define V2_SHARED_OPEN 0x1200
#define V2_SHARED_CLOSE 0x1210

/* Parameters. Open, close and unlink are the same packed structs in both tables. */

struct PACKED open_params {
    uint64_t name;
    int32_t flags;
    int32_t mode;
    int32_t ret;
};

struct PACKED close_params {
    int32_t fd;
    int32_t ret;
};

struct PACKED unlink_params {
    uint64_t name;
    int32_t ret;
};

struct PACKED v1_write_params {
    int32_t fd;
    uint64_t buf; /* virtual */
    uint64_t len;
};

struct PACKED v1_read_params {
    int32_t fd;
    uint64_t buf; /* virtual */
    uint64_t len;
    int64_t ret;
};

struct PACKED v1_lseek_params {
    int32_t fd;
    int64_t offset; /* in: offset, out: result */
    int32_t whence;
};

struct PACKED v1_exit_params {
    int32_t code;
};

struct PACKED v1_serial_params {
    uint64_t buf;
    uint64_t len;
};

#define MAX_ARGC_ENVC 128

struct PACKED v1_cmdsize_params {
    int32_t argc;
    int32_t argsz[MAX_ARGC_ENVC];
    int32_t envc;
    int32_t envsz[MAX_ARGC_ENVC];
};

struct PACKED v1_cmdval_params {
    uint64_t argv; /* physical address of an array of physical addresses */
    uint64_t envp;
};

struct v2_transfer_params { /* FileWrite and FileRead */
    uint64_t len;
    int64_t ret;
    uint64_t buf; /* physical */
    int32_t fd;
};

struct v2_lseek_params {
    int64_t offset;
    uint32_t whence;
    int32_t fd;
};

struct v2_serial_params {
    uint64_t len;
    uint64_t buf;
};

struct v2_serial_read_params {
    uint64_t maxlen;
    uint64_t len;
    uint64_t buf;
};

enum { GETDENTS_NONE, GETDENTS_SUCCESS, GETDENTS_END, GETDENTS_ERROR };
enum { RESULT_NONE, RESULT_SUCCESS, RESULT_ERROR };

struct v3_getdents_params {
    int32_t fd;
    uint64_t buf;
    uint64_t len;
    uint32_t tag; /* GETDENTS_* */
    union {
        uint64_t length;
        int32_t error;
    };
};

struct v3_result {
    uint32_t tag; /* RESULT_* */
    int32_t error;
};

struct v3_stat_params {
    uint64_t name;
    uint32_t kind; /* 0 stat, 1 lstat */
    uint64_t attr;
    struct v3_result ret;
};

struct v3_fstat_params {
    int32_t fd;
    uint64_t attr;
    struct v3_result ret;
};

struct v3_mkdir_params {
    uint64_t path;
    uint64_t len;
    struct v3_result ret;
};

struct dirent64 {
    uint64_t ino;
    int64_t off;
    uint16_t reclen;
    uint8_t type;
    char name[];
};

struct timespec {
    int64_t sec;
    int32_t nsec;
};

struct file_attr {
    uint64_t dev;
    uint64_t ino;
    uint64_t nlink;
    uint32_t mode;
    uint32_t uid;
    uint32_t gid;
    uint64_t rdev;
    int64_t size;
    int64_t blksize;
    int64_t blocks;
    struct timespec atim;
    struct timespec mtim;
    struct timespec ctim;
};

_Static_assert(sizeof(struct v2_transfer_params) == 32, "v2 layout");
_Static_assert(sizeof(struct v3_getdents_params) == 40, "v3 layout");
_Static_assert(sizeof(struct v3_stat_params) == 32, "v3 layout");
_Static_assert(sizeof(struct file_attr) == 120, "v3 layout");

#define O_RDONLY 0
#define O_WRONLY 1
#define O_RDWR 2
#define O_CREAT 0100
#define O_EXCL 0200
#define O_TRUNC 01000
#define O_APPEND 02000
#define O_DIRECTORY 0200000

#define SEEK_SET 0
#define SEEK_CUR 1
#define SEEK_END 2

#define EPERM 1
#define ENOENT 2
#define EIO 5
#define EBADF 9
#define EFAULT 14
#define EEXIST 17
#define EISDIR 21
#define EINVAL 22

#define DT_DIR 4
#define DT_REG 8

/* Port I/O. */

static inline void outb(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port) : "memory");
}

static inline void outw(uint16_t port, uint16_t value)
{
    __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port) : "memory");
}

static inline void outl(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port) : "memory");
}

static inline uint8_t inb(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline uint16_t inw(uint16_t port)
{
    uint16_t value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline uint32_t inl(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

/* A call of the first table: 32 bits of address travel in EAX. */
static inline void call_v1(uint16_t port, uint32_t parameter)
{
    outl(port, parameter);
}

/* A call of the second table: EAX is a dummy, 64 bits of address or value travel in RDI. */
static inline void call_v2(uint16_t port, uint64_t parameter)
{
    __asm__ volatile("outl %%eax, %%dx" ::"a"(0x1234), "d"(port), "D"(parameter) : "memory");
}

/* Makes a call of the table that INTERFACE selects. */
static inline void hypercall(uint16_t port, const void *parameters)
{
#if INTERFACE == 1
    call_v1(port, (uint32_t)(uintptr_t)parameters);
#else
    call_v2(port, (uintptr_t)parameters);
#endif
}

/* Hypercalls of the selected interface; errors are negated errno values. */

NORETURN void guest_exit(int32_t code);
void serial_byte(uint8_t byte);
void serial_buffer(const void *data, uint64_t length);
int32_t sys_open(const char *name, int32_t flags, int32_t mode);
int64_t sys_read(int32_t fd, void *buffer, uint64_t length);
int64_t sys_write(int32_t fd, const void *buffer, uint64_t length);
int64_t sys_lseek(int32_t fd, int64_t offset, int32_t whence);
int32_t sys_close(int32_t fd);
int32_t sys_unlink(const char *name);
/* Version 3 only. getdents returns the bytes written and 0 at the end. */
int64_t sys_getdents(int32_t fd, void *buffer, uint64_t length);
int32_t sys_stat(const char *name, struct file_attr *attr);
int32_t sys_lstat(const char *name, struct file_attr *attr);
int32_t sys_fstat(int32_t fd, struct file_attr *attr);
int32_t sys_mkdir(const char *name);
/* Version 1 only. */
void sys_cmdsize(struct v1_cmdsize_params *sizes);
void sys_cmdval(const uint64_t *argv, const uint64_t *envp);

/* Printing: each call is one serial-buffer hypercall. */

void print(const char *text);
void print_dec(int64_t value);
void print_hex(uint64_t value); /* 0x and as many digits as needed */
/* Prints "FAIL: what" and exits with EXIT_CHECK_FAILED unless the condition holds. */
void check(bool condition, const char *what);
/* check() for two numbers; prints both when they differ. */
void check_equal(int64_t found, int64_t expected, const char *what);

/* Memory and strings. */

void *memcpy(void *to, const void *from, size_t length);
void *memmove(void *to, const void *from, size_t length);
void *memset(void *to, int byte, size_t length);
int memcmp(const void *left, const void *right, size_t length);
size_t strlen(const char *text);
int strcmp(const char *left, const char *right);
bool starts_with(const char *text, const char *prefix);

/* Cpus. */

/* The number of cpus of this machine that run guest code, at most MAX_CPUS. */
uint64_t cpu_count(const struct boot_info *boot);
/* The number of the cpu that executes this, told from its stack. */
uint64_t this_cpu(void);

static inline void pause(void)
{
    __asm__ volatile("pause" ::: "memory");
}

static inline void halt(void)
{
    __asm__ volatile("hlt" ::: "memory");
}

/* Enables interrupts and halts; none can come between the two. */
static inline void wait_for_interrupt(void)
{
    __asm__ volatile("sti; hlt" ::: "memory");
}

static inline void enable_interrupts(void)
{
    __asm__ volatile("sti" ::: "memory");
}

static inline void disable_interrupts(void)
{
    __asm__ volatile("cli" ::: "memory");
}

static inline uint64_t read_tsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

static inline uint64_t read_msr(uint32_t msr)
{
    uint32_t low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr) : "memory");
    return (uint64_t)high << 32 | low;
}

static inline void write_msr(uint32_t msr, uint64_t value)
{
    __asm__ volatile("wrmsr" ::"c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

static inline uint64_t read_cr0(void)
{
    uint64_t value;
    __asm__ volatile("movq %%cr0, %0" : "=r"(value)::"memory");
    return value;
}

static inline uint64_t read_cr2(void)
{
    uint64_t value;
    __asm__ volatile("movq %%cr2, %0" : "=r"(value)::"memory");
    return value;
}

static inline uint64_t read_cr3(void)
{
    uint64_t value;
    __asm__ volatile("movq %%cr3, %0" : "=r"(value)::"memory");
    return value;
}

static inline void write_cr3(uint64_t value)
{
    __asm__ volatile("movq %0, %%cr3" ::"r"(value) : "memory");
}

static inline uint64_t read_cr4(void)
{
    uint64_t value;
    __asm__ volatile("movq %%cr4, %0" : "=r"(value)::"memory");
    return value;
}

struct cpuid {
    uint32_t eax, ebx, ecx, edx;
};

static inline struct cpuid cpuid(uint32_t leaf, uint32_t subleaf)
{
    struct cpuid found;
    __asm__ volatile("cpuid"
                     : "=a"(found.eax), "=b"(found.ebx), "=c"(found.ecx), "=d"(found.edx)
                     : "a"(leaf), "c"(subleaf));
    return found;
}

/* Paging. */

#define PAGE_PRESENT 1ull
#define PAGE_WRITABLE 2ull
#define PAGE_UNCACHED 0x10ull
#define PAGE_HUGE 0x80ull
#define PAGE_NO_EXECUTE (1ull << 63)

/* Maps one 4 KiB page, splitting a 2 MiB page if it lies in one; flags 0 unmap it. */
void map_page(uint64_t virtual_address, uint64_t physical_address, uint64_t flags);
/* Walks the page tables; returns UINT64_MAX if the address is not mapped. */
uint64_t physical_address_of(uint64_t virtual_address);

/* Exceptions and interrupts. */

struct exception_frame {
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
    uint64_t vector;
    uint64_t error;
    uint64_t rip, cs, rflags, rsp, ss;
};

typedef void (*exception_handler)(struct exception_frame *frame);

/* Fills the table that all cpus share and loads it on this one. */
void idt_init(void);
/* Loads the shared table on another cpu, once idt_init has returned. */
void idt_load(void);
/* A vector without a handler prints its frame and exits with EXIT_UNEXPECTED_EXCEPTION. */
void set_handler(uint8_t vector, exception_handler handler);
/* Marks a vector's gate as not present. */
void idt_remove(uint8_t vector);

/* Local APIC: x2APIC where CPUID offers it, else the registers at 0xFEE00000. */

void lapic_init(void); /* on each cpu */
uint32_t lapic_id(void);
void lapic_end_of_interrupt(void);
void lapic_timer(uint8_t vector, uint32_t count, bool periodic);
void lapic_send_ipi(uint32_t destination, uint8_t vector);

/* A spin lock, for short sections. */
struct lock {
    volatile uint32_t held;
};

void lock_acquire(struct lock *lock);
void lock_release(struct lock *lock);

#pragma GCC visibility pop

#endif
