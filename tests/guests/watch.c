/*
 * Touches data in many ways, for watchpoints: cpu 0 walks through the ways once, then every cpu counts COUNT times in
 * a word of its own and in a shared one.
 *
 * Needs: /data/input with at least 16 bytes, for the host's write.
 * Options: -DCOUNT=n (100).
 * Symbols: word, bytes[64], block[64], stack_words[64], shared, own[8]; on_way(n) before each way; ways:
 *   1 a store of 8 bytes, 2 of the same value, 3 of one byte in the middle, 4 a read, 5 a read-modify-write,
 *   6 a locked one, 7 a repeated string store, 8 a repeated string copy from it, 9 a push, 10 a file read by the host,
 *   11 a store of 10 bytes by SGDT, 12 neighbours of the word.
 * Output: "watch ok". Exit code: 0.
 */
#include "guest.h"

#ifndef COUNT
#define COUNT 100
#endif

struct {
    volatile uint64_t before;
    volatile uint64_t word;
    volatile uint64_t after;
} area ALIGNED(64);

volatile uint8_t bytes[64] ALIGNED(64);
volatile uint8_t block[64] ALIGNED(64);
uint64_t stack_words[64] ALIGNED(64);
volatile uint64_t shared;
volatile uint64_t own[MAX_CPUS];
volatile uint64_t finished;
volatile uint64_t sink;

extern volatile uint64_t word __attribute__((visibility("hidden")));
__asm__(".globl word\n.set word, area + 8\n");

KEEP void on_way(uint64_t n)
{
    sink = n;
}

static void string_ways(void)
{
    void *to = (void *)bytes;
    uint64_t count = 4;
    on_way(7);
    __asm__ volatile("rep stosq" : "+D"(to), "+c"(count) : "a"(0x0101010101010101ull) : "memory");
    void *from = (void *)bytes;
    to = (void *)block;
    count = 32;
    on_way(8);
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
}

static void ways(void)
{
    on_way(1);
    area.word = 0x1111;
    on_way(2);
    area.word = 0x1111;
    on_way(3);
    ((volatile uint8_t *)&area.word)[3] = 0x22;
    on_way(4);
    sink = area.word;
    on_way(5);
    __asm__ volatile("addq $1, %0" : "+m"(area.word));
    on_way(6);
    __asm__ volatile("lock xaddq %1, %0" : "+m"(area.word), "+r"((uint64_t){2}));
    string_ways();
    on_way(9);
    __asm__ volatile("movq %%rsp, %%rcx\n\tleaq %0, %%rsp\n\tpushq $7\n\tmovq %%rcx, %%rsp"
                     : "=m"(stack_words[32]) : : "rcx", "memory");
    int32_t fd = sys_open("/data/input", O_RDONLY, 0);
    check(fd >= 0, "open /data/input");
    on_way(10);
    check_equal(sys_read(fd, (void *)block, 16), 16, "read of 16 bytes");
    on_way(11);
    __asm__ volatile("sgdt %0" : "=m"(*(volatile uint8_t(*)[10])bytes));
    on_way(12);
    area.before = 1;
    area.after = 1;
    on_way(13);
}

KEEP void count(uint64_t cpu)
{
    own[cpu] = own[cpu] + 1;
    __atomic_add_fetch(&shared, 1, __ATOMIC_RELAXED);
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    if (cpu == 0) {
        ways();
    }
    for (uint64_t i = 0; i < COUNT; i++) {
        count(cpu);
    }
    __atomic_add_fetch(&finished, 1, __ATOMIC_RELEASE);
    if (cpu != 0) {
        park();
    }
    while (__atomic_load_n(&finished, __ATOMIC_ACQUIRE) < cpu_count(boot)) {
        pause();
    }
    check_equal((int64_t)shared, (int64_t)(COUNT * cpu_count(boot)), "shared");
    print("watch ok\n");
    return 0;
}
