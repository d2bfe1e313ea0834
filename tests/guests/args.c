/*
 * Prints what the host passes to the application.
 *
 * Interface 1: Cmdsize and Cmdval, checking that sizes and contents agree and that nothing is written beyond them.
 * Interfaces 2 and 3, and 1 with -DWITH_FDT: walks the device tree.
 * Output, interface 1: "argc=N", "argv[I]=…", "envc=N", "env[I]=…" lines.
 * Output, device tree: "fdt PATH PROPERTY: VALUE" lines (one a string of a string list; `reg` as pairs of hexadecimal
 * numbers, four-byte properties as decimals), "fdt reserved: ADDRESS SIZE", "fdt cpus: N".
 * All end with "args ok". Exit code: 0, or 97 after a FAIL line.
 */
#include "guest.h"

#if INTERFACE == 1

#define CANARY 0xa5
#define CANARY_SIZE 16

static struct v1_cmdsize_params sizes;
static uint64_t argv[MAX_ARGC_ENVC];
static uint64_t envp[MAX_ARGC_ENVC];
static uint8_t pool[1 << 20];

/* Gives each string a buffer of its announced size with a canary behind it. */
static uint64_t lay_out(uint64_t at, const int32_t *lengths, int32_t count, uint64_t *addresses)
{
    for (int32_t i = 0; i < count; i++) {
        check(lengths[i] >= 1, "a string has room for its NUL");
        check(at + (uint64_t)lengths[i] + CANARY_SIZE <= sizeof pool, "the strings fit the guest's pool");
        addresses[i] = (uintptr_t)&pool[at];
        at += (uint64_t)lengths[i];
        memset(&pool[at], CANARY, CANARY_SIZE);
        at += CANARY_SIZE;
    }
    return at;
}

static void show(const char *name, const int32_t *lengths, int32_t count, const uint64_t *addresses)
{
    for (int32_t i = 0; i < count; i++) {
        const char *text = (const char *)addresses[i];
        check_equal((int64_t)strlen(text) + 1, lengths[i], "a string has its announced size");
        for (int32_t k = 0; k < CANARY_SIZE; k++) {
            check((uint8_t)text[lengths[i] + k] == CANARY, "nothing is written behind a string");
        }
        print(name);
        print("[");
        print_dec(i);
        print("]=");
        print(text);
        print("\n");
    }
}

static void print_command_line(void)
{
    sys_cmdsize(&sizes);
    check(sizes.argc >= 1 && sizes.argc <= MAX_ARGC_ENVC, "argc is in 1..128");
    check(sizes.envc >= 0 && sizes.envc <= MAX_ARGC_ENVC, "envc is in 0..128");
    int32_t argsz[MAX_ARGC_ENVC];
    int32_t envsz[MAX_ARGC_ENVC];
    memcpy(argsz, sizes.argsz, sizeof argsz);
    memcpy(envsz, sizes.envsz, sizeof envsz);
    uint64_t used = lay_out(0, argsz, sizes.argc, argv);
    lay_out(used, envsz, sizes.envc, envp);
    sys_cmdval(argv, envp);
    print("argc=");
    print_dec(sizes.argc);
    print("\n");
    show("argv", argsz, sizes.argc, argv);
    print("envc=");
    print_dec(sizes.envc);
    print("\n");
    show("env", envsz, sizes.envc, envp);
}

#endif

#if INTERFACE != 1 || defined(WITH_FDT)

#define FDT_MAGIC 0xd00dfeedu
#define FDT_BEGIN_NODE 1
#define FDT_END_NODE 2
#define FDT_PROP 3
#define FDT_NOP 4
#define FDT_END 9
#define PATH_SIZE 256

static uint32_t big32(const void *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return __builtin_bswap32(value);
}

static uint64_t big64(const void *at)
{
    return (uint64_t)big32(at) << 32 | big32((const uint8_t *)at + 4);
}

static void property_head(const char *path, const char *name)
{
    print("fdt ");
    print(path[0] == 0 ? "/" : path);
    print(" ");
    print(name);
    print(": ");
}

static bool is_text(const uint8_t *data, uint32_t length)
{
    if (length == 0 || data[length - 1] != 0 || data[0] == 0) {
        return false;
    }
    for (uint32_t i = 0; i + 1 < length; i++) {
        if (data[i] != 0 && data[i] < ' ' && data[i] != '\n' && data[i] != '\t') {
            return false;
        }
    }
    return true;
}

static void print_property(const char *path, const char *name, const uint8_t *data, uint32_t length)
{
    if (is_text(data, length) || (length == 1 && data[0] == 0)) {
        for (uint32_t at = 0; at < length; at += (uint32_t)strlen((const char *)data + at) + 1) {
            property_head(path, name);
            print((const char *)data + at);
            print("\n");
        }
        return;
    }
    property_head(path, name);
    if (length == 4) {
        print_dec(big32(data));
    } else {
        for (uint32_t at = 0; at + 8 <= length; at += 8) {
            print(at == 0 ? "" : " ");
            print_hex(big64(data + at));
        }
    }
    print("\n");
}

static void print_device_tree(uint64_t address)
{
    check(address != 0, "there is a device tree");
    const uint8_t *tree = (const uint8_t *)address;
    check(big32(tree) == FDT_MAGIC, "the device tree has its magic number");
    uint32_t total = big32(tree + 4);
    const uint8_t *at = tree + big32(tree + 8);
    const char *strings = (const char *)tree + big32(tree + 12);
    for (const uint8_t *reserved = tree + big32(tree + 16); big64(reserved + 8) != 0; reserved += 16) {
        print("fdt reserved: ");
        print_hex(big64(reserved));
        print(" ");
        print_hex(big64(reserved + 8));
        print("\n");
    }

    char path[PATH_SIZE] = "";
    size_t used = 0;
    int64_t cpus = 0;
    for (;;) {
        check(at < tree + total, "the structure block ends within the device tree");
        uint32_t token = big32(at);
        at += 4;
        if (token == FDT_BEGIN_NODE) {
            const char *name = (const char *)at;
            size_t length = strlen(name);
            at += (length + 4) & ~3ull;
            check(used + length + 2 < PATH_SIZE, "a node's path fits the guest's buffer");
            if (length != 0) {
                path[used++] = '/';
                memcpy(&path[used], name, length + 1);
                used += length;
            }
            cpus += starts_with(path, "/cpus/cpu@");
        } else if (token == FDT_PROP) {
            uint32_t length = big32(at);
            print_property(path, strings + big32(at + 4), at + 8, length);
            at += 8 + ((length + 3) & ~3u);
        } else if (token == FDT_END_NODE) {
            while (used > 0 && path[used] != '/') {
                used--;
            }
            path[used] = 0;
        } else if (token == FDT_END) {
            break;
        } else {
            check(token == FDT_NOP, "the structure block has known tokens");
        }
    }
    print("fdt cpus: ");
    print_dec(cpus);
    print("\n");
}

#endif

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
#if INTERFACE == 1
    print_command_line();
#endif
#if INTERFACE != 1 || defined(WITH_FDT)
    print_device_tree(boot->device_tree);
#endif
    print("args ok\n");
    return 0;
}
