/*
 * Crashes cpu 0 in the way that -DKIND names; each kind is the function crash_KIND.
 *
 *   triple        ud2 without an IDT: shutdown
 *   int3_no_idt   int3 without an IDT: shutdown
 *   jump_null     call of address 0, which is unmapped first: shutdown, RIP is 0
 *   stack         recursion into an unmapped page below the stack: shutdown
 *   double        a #UD whose gate is absent, with a #DF handler: prints "double fault", exit code 96
 *   cr3           loads CR3 with an address that holds no page table: the cpu cannot fetch on
 *   cr3_reserved  loads CR3 with reserved bits: #GP without an IDT: shutdown
 *   mmio          reads 0xD0000000, where neither RAM nor a device is; a host that lets it pass gets exit code 0
 *   mmio_write    writes there
 *   sse           sqrtpd, which a host without SSE in ring 0 must emulate: prints "sse ok", exit code 0
 *   avx           vaddpd, likewise: "avx ok" or "avx not offered", exit code 0
 *   port          unknown ports: must not crash, prints "port 0xff 0xffff 0xffffffff", exit code 0
 *   hlt_forever   cli; hlt: no exit
 *   check         a failed check(): prints "FAIL: on purpose", exit code 97
 *   exception     ud2 with the shared IDT: prints "unexpected exception 6 …", exit code 98
 *   ap_triple     cpu 1 executes ud2, cpu 0 spins (needs two cpus)
 *   ap_exit       cpu 1 exits with code 5, cpu 0 spins (needs two cpus)
 *
 * Output: "crash KIND" first, in all cases.
 */
#include "guest.h"

#ifndef KIND
#define KIND triple
#endif

#define JOIN_(left, right) left##right
#define JOIN(left, right) JOIN_(left, right)
#define TEXT_(word) #word
#define TEXT(word) TEXT_(word)

#define HOLE 0xd0000000ull
#define EXIT_DOUBLE_FAULT 96

static volatile bool ap_may_go;
volatile uint64_t depth;

KEEP void crash_triple(void)
{
    __asm__ volatile("ud2");
}

KEEP void crash_int3_no_idt(void)
{
    __asm__ volatile("int3");
}

KEEP void crash_jump_null(void)
{
    map_page(0, 0, 0);
    void (*volatile nowhere)(void) = NULL;
    nowhere();
}

KEEP uint64_t recurse(volatile uint64_t *previous)
{
    volatile uint64_t local[32];
    local[0] = *previous + 1;
    depth = local[0];
    return depth == 0 ? 0 : recurse(local) + local[0];
}

KEEP void crash_stack(void)
{
    map_page((uintptr_t)stacks[0], 0, 0);
    volatile uint64_t start = 0;
    recurse(&start);
}

static void on_double_fault(struct exception_frame *frame)
{
    (void)frame;
    print("double fault\n");
    guest_exit(EXIT_DOUBLE_FAULT);
}

KEEP void crash_double(void)
{
    idt_init();
    for (int vector = 0; vector < 32; vector++) {
        if (vector != 8) {
            idt_remove((uint8_t)vector);
        }
    }
    set_handler(8, on_double_fault);
    __asm__ volatile("ud2");
}

KEEP void crash_cr3(void)
{
    write_cr3(0x0000007e57000000ull);
}

KEEP void crash_cr3_reserved(void)
{
    write_cr3(read_cr3() | 0x7ff0000000000000ull);
}

KEEP void crash_mmio(void)
{
    map_page(HOLE, HOLE, PAGE_PRESENT | PAGE_WRITABLE | PAGE_UNCACHED);
    uint32_t found = *(volatile uint32_t *)HOLE;
    print("mmio ");
    print_hex(found);
    print("\n");
}

KEEP void crash_mmio_write(void)
{
    map_page(HOLE, HOLE, PAGE_PRESENT | PAGE_WRITABLE | PAGE_UNCACHED);
    *(volatile uint32_t *)HOLE = 0x12345678;
    print("mmio written\n");
}

/* CR0.EM off and MP on, CR4.OSFXSR and OSXMMEXCPT on. */
static void enable_sse(void)
{
    __asm__ volatile("movq %0, %%cr0" ::"r"((read_cr0() & ~0xcull) | 2));
    __asm__ volatile("movq %0, %%cr4" ::"r"(read_cr4() | 0x600));
}

KEEP void crash_sse(void)
{
    static const uint64_t squares[2] ALIGNED(16) = {0x4010000000000000, 0x4022000000000000}; /* 4.0, 9.0 */
    static uint64_t roots[2] ALIGNED(16);
    enable_sse();
    __asm__ volatile("movups %1, %%xmm1\n\t"
                     ".globl sse_instruction\n"
                     "sse_instruction:\n\t"
                     "sqrtpd %%xmm1, %%xmm0\n\t"
                     "movups %%xmm0, %0"
                     : "=m"(roots)
                     : "m"(squares));
    check(roots[0] == 0x4000000000000000 && roots[1] == 0x4008000000000000, "sqrtpd of 4 and 9 is 2 and 3");
    print("sse ok\n");
}

KEEP void crash_avx(void)
{
    static const uint64_t ones[4] ALIGNED(32) = {0x3ff0000000000000, 0x3ff0000000000000, 0x3ff0000000000000,
                                                 0x3ff0000000000000};
    static uint64_t sums[4] ALIGNED(32);
    uint32_t features = cpuid(1, 0).ecx;
    if ((features >> 26 & 1) == 0 || (features >> 28 & 1) == 0) {
        print("avx not offered\n");
        return;
    }
    enable_sse();
    __asm__ volatile("movq %0, %%cr4" ::"r"(read_cr4() | 1 << 18));
    __asm__ volatile("xsetbv" ::"a"(7), "d"(0), "c"(0));
    __asm__ volatile("vmovups %1, %%ymm1\n\t"
                     "vaddpd %%ymm1, %%ymm1, %%ymm0\n\t"
                     "vmovups %%ymm0, %0"
                     : "=m"(sums)
                     : "m"(ones));
    check(sums[0] == 0x4000000000000000 && sums[3] == 0x4000000000000000, "vaddpd of 1 and 1 is 2");
    print("avx ok\n");
}

KEEP void crash_port(void)
{
    outb(0x99, 1);
    outw(0x99, 2);
    outl(0x9c, 3);
    uint8_t byte = inb(0x99);
    uint16_t word = inw(0x99);
    uint32_t dword = inl(0x9c);
    print("port ");
    print_hex(byte);
    print(" ");
    print_hex(word);
    print(" ");
    print_hex(dword);
    print("\n");
}

KEEP void crash_hlt_forever(void)
{
    for (;;) {
        disable_interrupts();
        halt();
    }
}

KEEP void crash_check(void)
{
    check(false, "on purpose");
}

KEEP void crash_exception(void)
{
    idt_init();
    __asm__ volatile("ud2");
}

KEEP void crash_ap_triple(void)
{
    ap_may_go = true;
    for (;;) {
        pause();
    }
}

KEEP void crash_ap_exit(void)
{
    ap_may_go = true;
    for (;;) {
        pause();
    }
}

static void other_cpu(void)
{
    while (!ap_may_go) {
        pause();
    }
    if (starts_with(TEXT(KIND), "ap_exit")) {
        guest_exit(5);
    }
    __asm__ volatile("ud2");
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu == 1 && starts_with(TEXT(KIND), "ap_")) {
        other_cpu();
    }
    if (cpu != 0) {
        park();
    }
    print("crash " TEXT(KIND) "\n");
    JOIN(crash_, KIND)();
    return 0;
}
