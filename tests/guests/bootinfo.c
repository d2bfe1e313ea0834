/*
 * Prints the boot information and checks the state that the loader and the host promise.
 *
 * Checked: stack pointer at entry, segments and descriptors, CR0, CR4, EFER, masked interrupts, zeroed .bss, relocated
 * pointers, the TLS image and, through FS, each cpu's own copy of it.
 * Options: -DCHECK_APIC_ID also checks that CPUID's APIC ids equal the cpu number (some hosts show their own).
 * Output: "boot FIELD: VALUE" lines, "state REGISTER: VALUE" lines, one "cpu K: apic A x2apic B lapic C" line a cpu,
 * "bootinfo ok". Exit code: 0, or 97 after a FAIL line.
 */
#include "guest.h"

#define MSR_EFER 0xc0000080u
#define MSR_FS_BASE 0xc0000100u
#define CR4_MCE 0x40ull
#define BOOT_STACK_SIZE 0x8000

struct PACKED descriptor_table {
    uint16_t limit;
    uint64_t base;
};

struct cpu_report {
    uint32_t initial_apic_id;
    uint32_t x2apic_id;
    uint32_t lapic_id;
    volatile bool done;
};

static struct cpu_report reports[MAX_CPUS];
static volatile uint8_t zeroed[3 * 4096];
static uint64_t initialised = 0x0123456789abcdef;

KEEP static int first_function(void)
{
    return 11;
}

KEEP static int second_function(void)
{
    return 22;
}

struct relocated {
    int (*function)(void);
    const char *text;
    uint64_t *number;
};

/* Not hidden: in a symbolic image these become R_X86_64_64, elsewhere R_X86_64_RELATIVE. */
uint64_t shared_number = 77;
struct relocated relocated[] = {
    {first_function, "first", &initialised},
    {second_function, "second", &shared_number},
};

#ifndef SYMBOLIC
static _Thread_local volatile uint64_t tls_number = 0x1122334455667788;
static _Thread_local char tls_text[16] = "thread local";
static _Thread_local volatile uint64_t tls_zeroes[5];

static uint8_t tls_blocks[MAX_CPUS][512] ALIGNED(64);

/* The block ends at the thread pointer, where its own address is kept (System V ABI, TLS variant II). */
static void tls_init(const struct boot_info *boot, uint64_t cpu)
{
    uint64_t align = boot->tls_align > 8 ? boot->tls_align : 8;
    check(align <= 64 && boot->tls_memsz <= 256, "the TLS segment has a size that fits this guest");
    uint64_t *pointer = (uint64_t *)&tls_blocks[cpu][256];
    uint8_t *image = (uint8_t *)pointer - ((boot->tls_memsz + align - 1) & ~(align - 1));
    memcpy(image, (const void *)boot->tls_start, boot->tls_filesz);
    *pointer = (uintptr_t)pointer;
    write_msr(MSR_FS_BASE, (uintptr_t)pointer);
}

static void check_tls(const struct boot_info *boot, uint64_t cpu)
{
    check(boot->tls_start >= boot->image_start && boot->tls_start + boot->tls_filesz <= boot->image_end,
          "the TLS image lies in the kernel image");
    check(boot->tls_memsz >= sizeof tls_number + sizeof tls_text + sizeof tls_zeroes, "TLS memory size");
    check(boot->tls_filesz >= sizeof tls_number + sizeof tls_text, "TLS file size");
    check(boot->tls_filesz < boot->tls_memsz, "the TLS segment ends in zeroes");
    tls_init(boot, cpu);
    check(tls_number == 0x1122334455667788, "TLS number");
    check(strcmp(tls_text, "thread local") == 0, "TLS text");
    for (size_t i = 0; i < LENGTH(tls_zeroes); i++) {
        check(tls_zeroes[i] == 0, "TLS zeroes");
    }
    tls_number = cpu;
}
#else
static void check_tls(const struct boot_info *boot, uint64_t cpu)
{
    (void)cpu;
    check(boot->tls_memsz == 0, "an image without TLS has none in the boot information");
}
#endif

static void check_image(void)
{
    for (size_t i = 0; i < sizeof zeroed; i++) {
        if (zeroed[i] != 0) {
            check(false, ".bss is zeroed");
        }
    }
    const volatile struct relocated *table = relocated;
    check(table[0].function() == 11 && table[1].function() == 22, "relocated functions");
    check(strcmp(table[0].text, "first") == 0 && strcmp(table[1].text, "second") == 0, "relocated texts");
    check(*table[0].number == 0x0123456789abcdef && *table[1].number == 77, "relocated numbers");
}

static uint16_t selector(char which)
{
    uint16_t value = 0;
    switch (which) {
    case 'c':
        __asm__("movw %%cs, %0" : "=r"(value));
        break;
    case 's':
        __asm__("movw %%ss, %0" : "=r"(value));
        break;
    case 'd':
        __asm__("movw %%ds, %0" : "=r"(value));
        break;
    default:
        __asm__("movw %%es, %0" : "=r"(value));
    }
    return value;
}

static void check_state(const struct boot_info *boot, uint64_t cpu)
{
    check(boot_rsp[cpu] == boot->image_start - BOOT_STACK_SIZE, "RSP at entry is 0x8000 below the kernel");
    check(selector('c') == 0x08, "CS is 8");
    check(selector('s') == 0x10 && selector('d') == 0x10 && selector('e') == 0x10, "SS, DS and ES are 0x10");
    struct descriptor_table gdt;
    __asm__("sgdt %0" : "=m"(gdt));
    check(gdt.base >= boot->phys_start && gdt.base < boot->image_start, "the GDT lies in front of the kernel");
    check(gdt.limit >= 23, "the GDT has three entries");
    const uint64_t *entries = (const uint64_t *)gdt.base;
    check((entries[1] & 0x00affe000000ffff) == 0x00af9a000000ffff, "GDT entry 1 is 64-bit code");
    check((entries[2] & 0x00cffe000000ffff) == 0x00cf92000000ffff, "GDT entry 2 is writable data");
    check(read_cr0() == 0x80000031, "CR0 is PG|NE|ET|PE");
    /* KVM on AMD shows the host's machine-check bit, too. */
    check((read_cr4() & ~CR4_MCE) == 0x20, "CR4 is PAE");
    check(read_msr(MSR_EFER) == 0xd00, "EFER is NXE|LMA|LME");
    uint64_t flags;
    __asm__("pushfq; popq %0" : "=r"(flags));
    check((flags & 0x37700) == 0, "IF, TF, DF, NT, IOPL are clear");
}

static void report(uint64_t cpu)
{
    struct cpu_report *own = &reports[cpu];
    own->initial_apic_id = cpuid(1, 0).ebx >> 24;
    own->x2apic_id = cpuid(0xb, 0).edx;
    lapic_init();
    own->lapic_id = lapic_id();
    own->done = true;
}

static void line(const char *name, uint64_t value, bool hexadecimal)
{
    print(name);
    if (hexadecimal) {
        print_hex(value);
    } else {
        print_dec((int64_t)value);
    }
    print("\n");
}

static void print_boot_info(const struct boot_info *boot)
{
    line("boot phys_start: ", boot->phys_start, true);
    line("boot phys_end: ", boot->phys_end, true);
    line("boot serial_port: ", boot->serial_port, true);
    line("boot device_tree: ", boot->device_tree, true);
    line("boot image_start: ", boot->image_start, true);
    line("boot image_end: ", boot->image_end, true);
    line("boot tls_start: ", boot->tls_start, true);
    line("boot tls_filesz: ", boot->tls_filesz, false);
    line("boot tls_memsz: ", boot->tls_memsz, false);
    line("boot tls_align: ", boot->tls_align, false);
    line("boot platform: ", boot->platform, false);
    line("boot has_pci: ", boot->has_pci, false);
    line("boot num_cpus: ", boot->num_cpus, false);
    line("boot cpu_khz: ", boot->cpu_khz, false);
    line("boot time_ns: ", (uint64_t)boot->boot_time_ns, false);
    line("boot address: ", (uintptr_t)boot, true);
    line("state rsp: ", boot_rsp[0], true);
    line("state cr0: ", read_cr0(), true);
    line("state cr3: ", read_cr3(), true);
    line("state cr4: ", read_cr4(), true);
    line("state efer: ", read_msr(MSR_EFER), true);
}

static void check_boot_info(const struct boot_info *boot)
{
    check(boot->platform == 1, "the platform is uhyve");
    check(boot->image_start == (uintptr_t)image_start, "the image starts where it was loaded");
    check(boot->image_end >= (uintptr_t)image_end, "the image reaches to its last segment's end");
    check(boot->phys_start <= boot->image_start && boot->image_end <= boot->phys_end, "the image lies in RAM");
    check((uintptr_t)boot >= boot->phys_start && (uintptr_t)boot < boot->image_start, "boot info lies before the kernel");
    check(boot->serial_port == (INTERFACE == 1 ? 0x800 : 0x1030), "the serial port fits the interface");
    check(boot->num_cpus >= 1, "there is a cpu");
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    check_state(boot, cpu);
    if (cpu == 0) {
        print_boot_info(boot);
        check_boot_info(boot);
        check_image();
    }
    check_tls(boot, cpu);
    report(cpu);
    if (cpu != 0) {
        park();
    }
    for (uint64_t i = 0; i < cpu_count(boot); i++) {
        while (!reports[i].done) {
            pause();
        }
        print("cpu ");
        print_dec((int64_t)i);
        print(": apic ");
        print_dec(reports[i].initial_apic_id);
        print(" x2apic ");
        print_dec(reports[i].x2apic_id);
        line(" lapic ", reports[i].lapic_id, false);
        check_equal(reports[i].lapic_id, (int64_t)i, "the local APIC's id is the cpu number");
#ifdef CHECK_APIC_ID
        check_equal(reports[i].initial_apic_id, (int64_t)i, "CPUID leaf 1: initial APIC id");
        check_equal(reports[i].x2apic_id, (int64_t)i, "CPUID leaf 0xB: x2APIC id");
#endif
    }
#ifndef SYMBOLIC
    check(tls_number == 0, "cpu 0 kept its own TLS");
#endif
    print("bootinfo ok\n");
    return 0;
}
