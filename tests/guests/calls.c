/*
 * Calls of several kinds, for backtraces and finish: recursion, a tree of calls, function pointers.
 *
 * Options: -DDEPTH=n (50).
 * Symbols: descend(n), fibonacci(n), add, subtract, multiply, apply(operation, a, b).
 * Output: "descend=1275" (sum 1…DEPTH), "fibonacci=610", "apply=9 5 14". Exit code: 0.
 */
#include "guest.h"

#ifndef DEPTH
#define DEPTH 50
#endif

typedef int64_t (*operation)(int64_t, int64_t);

volatile uint64_t deepest;

KEEP uint64_t descend(uint64_t n)
{
    if (n == 0) {
        deepest = deepest + 1;
        return 0;
    }
    return n + descend(n - 1);
}

KEEP uint64_t fibonacci(uint64_t n)
{
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

KEEP int64_t add(int64_t a, int64_t b)
{
    return a + b;
}

KEEP int64_t subtract(int64_t a, int64_t b)
{
    return a - b;
}

KEEP int64_t multiply(int64_t a, int64_t b)
{
    return a * b;
}

static const operation operations[] = {add, subtract, multiply};

KEEP int64_t apply(operation chosen, int64_t a, int64_t b)
{
    int64_t result = chosen(a, b);
    return result;
}

static void line(const char *name, uint64_t value)
{
    print(name);
    print_dec((int64_t)value);
    print("\n");
}

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
    line("descend=", descend(DEPTH));
    line("fibonacci=", fibonacci(15));
    print("apply=");
    for (size_t i = 0; i < LENGTH(operations); i++) {
        print(i == 0 ? "" : " ");
        print_dec(apply(operations[i], 7, 2));
    }
    print("\n");
    return 0;
}
