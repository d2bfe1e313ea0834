/*
 * Calls in many shapes, for backtraces and source-level steps. Every cpu computes fib(DEPTH); cpu 0 first walks
 * through the shapes. Tests find their lines by the words in comments that begin with "line:".
 *
 * Options: -DDEPTH=n (8).
 * Symbols: factorial(n), recursive; leaf(n), called through inlined twice(n) by middle(n) by outer(n); bare(n), assembly
 *   without unwind information that calls leaf; no_frame(n), without frame pointer; spin(n), a loop; fib(n); broken(),
 *   which calls leaf with a stack that leads nowhere; globals results[8], sink.
 * Output: "frames ok". Exit code: 0.
 */
#include "guest.h"

#ifndef DEPTH
#define DEPTH 8
#endif

volatile uint64_t results[MAX_CPUS];
volatile uint64_t sink;
volatile uint64_t finished;

KEEP uint64_t leaf(uint64_t n)
{
    sink = n; /* line: in leaf */
    return n + 1;
}

static inline __attribute__((always_inline)) uint64_t twice(uint64_t n)
{
    uint64_t first = leaf(n); /* line: in twice */
    return leaf(first);
}

KEEP uint64_t middle(uint64_t n)
{
    sink = 1;
    uint64_t result = twice(n); /* line: in middle */
    return result * 2;
}

KEEP uint64_t outer(uint64_t n)
{
    uint64_t result = middle(n); /* line: in outer */
    sink = result; /* line: after middle */
    return result;
}

KEEP uint64_t factorial(uint64_t n)
{
    if (n <= 1) {
        return 1; /* line: factorial ends */
    }
    uint64_t below = factorial(n - 1); /* line: factorial calls */
    return below * n; /* line: factorial multiplies */
}

KEEP __attribute__((optimize("omit-frame-pointer"))) uint64_t no_frame(uint64_t n)
{
    volatile uint64_t local[8];
    local[n & 7] = n;
    sink = leaf(local[n & 7]);
    return sink;
}

uint64_t bare(uint64_t n);
uint64_t broken(uint64_t n);
__asm__(".text\n"
        ".globl bare\n"
        ".type bare, @function\n"
        "bare:\n"
        "\tpushq %rbp\n"
        "\tmovq %rsp, %rbp\n"
        "\tcall leaf\n"
        "\tpopq %rbp\n"
        "\tret\n"
        ".size bare, . - bare\n"
        ".globl broken\n"
        ".type broken, @function\n"
        "broken:\n"
        "\tpushq %rbp\n"
        "\tpushq %rbx\n"
        "\tmovq %rsp, %rbx\n"
        "\tmovq $-9, %rbp\n"
        "\tcall leaf\n"
        "\tmovq %rsp, %rbp\n"
        "\tcall leaf\n"
        "\tmovq %rbx, %rsp\n"
        "\tpopq %rbx\n"
        "\tpopq %rbp\n"
        "\tret\n"
        ".size broken, . - broken\n");

KEEP uint64_t spin(uint64_t n)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < n; i++) sum += i ^ n; /* line: spins */
    return sum; /* line: after spin */
}

KEEP uint64_t fib(uint64_t n)
{
    if (n < 2) {
        return n;
    }
    uint64_t left = fib(n - 1); /* line: fib left */
    uint64_t right = fib(n - 2); /* line: fib right */
    return left + right; /* line: fib adds */
}

KEEP void shapes(void)
{
    sink = outer(5); /* line: calls outer */
    sink = factorial(5); /* line: calls factorial */
    sink = no_frame(3); /* line: calls no_frame */
    sink = bare(4);
    sink = broken(6);
    sink = spin(1000); /* line: calls spin */
    sink = 0; /* line: after spins */
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    if (cpu == 0) {
        shapes();
    }
    results[cpu] = fib(DEPTH); /* line: calls fib */
    __atomic_add_fetch(&finished, 1, __ATOMIC_RELEASE);
    if (cpu != 0) {
        park();
    }
    while (__atomic_load_n(&finished, __ATOMIC_ACQUIRE) < cpu_count(boot)) {
        pause();
    }
    for (uint64_t i = 0; i < cpu_count(boot); i++) {
        check_equal((int64_t)results[i], (int64_t)results[0], "the same result on every cpu");
    }
    print("frames ok\n");
    return 0;
}
