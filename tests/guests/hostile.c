/*
 * Makes every hypercall of both tables with the worst parameters; the host must serve, refuse or ignore each.
 *
 * Run it with stdin at /dev/null, with a directory mapped to /data or without one.
 * Options: -DSECTION=n runs one section alone. Sections 1 to 12 run by default. 13 opens files until the host refuses.
 * From 20 on, each tries one bad way to exit and stands alone: 20 v1 exit, pointer out of RAM; 21 v1 exit, struct across
 * the end of RAM; 22, 23 v1 exit by a byte, by a word; 24 v1 exit by a string instruction with bad pointers; 25 v2 exit
 * with a value of 64 bits, 0x100000007; 26 v2 exit by a byte, value 7; 27 v1 exit from an unmapped pointer in the hole.
 * Output: "section N" lines (and "string io" where interface 1's console is fed by a string instruction), "hostile ok".
 * Exit code: 0, or 97 after a FAIL line. Sections 20…: what the host makes of it; "still here" and 95 if it goes on.
 */
#include "guest.h"

#ifndef SECTION
#define SECTION 0
#endif

#define EXIT_STILL_HERE 95
#define HOLE 0xd0000000ull
#define NAME_SIZE (1 << 20)
#define O_PATH 010000000
#define O_TMPFILE 020200000
#define O_NOFOLLOW 0400000
#define O_DIRECT 040000

static uint64_t ram_start;
static uint64_t ram_end;

static uint64_t bad[32];
static size_t bad_count;

static char long_name[NAME_SIZE + 1];
static uint8_t scratch[8192] ALIGNED(4096);
static struct v1_cmdsize_params sizes;
static uint64_t pointers[MAX_ARGC_ENVC];

static const int32_t odd_fds[] = {INT32_MIN, INT32_MAX, -1, -2, -100, 3, 4, 1000, 65536};
static const uint64_t odd_lengths[] = {0, 1, UINT64_MAX, INT64_MAX, 1ull << 63, 1ull << 32, (1ull << 32) - 1, 1ull << 31};

/* Addresses below the image hold the cpu's own tables, so none of these may lie there. */
static void collect_bad_addresses(void)
{
    const uint64_t all[] = {
        ram_end,      ram_end - 1,  ram_end - 2,        ram_end - 4,           ram_end - 8,       ram_end - 12,
        ram_end - 16, ram_end - 20, ram_end - 31,       ram_end - 1000,        ram_end + 4096,    HOLE,
        0xfee00000,   0xfec00000,   0xffffffff,         0x100000000 - 4,       0xfffffffffffff000, UINT64_MAX,
        UINT64_MAX - 7, 1ull << 63, 0x0000800000000000, 0x0010000000000000ull, 0x7ffffffffffff000, 0x8000000000000010,
    };
    for (size_t i = 0; i < LENGTH(all); i++) {
        bad[bad_count++] = all[i];
    }
    if (ram_start > 0x10000) {
        bad[bad_count++] = 0;
        bad[bad_count++] = 1;
        bad[bad_count++] = ram_start - 1;
        bad[bad_count++] = ram_start - 8;
    }
}

static bool is_safe_for_v1(uint64_t address)
{
    uint64_t low = (uint32_t)address;
    return low + 0x2000 < ram_start || low >= ram_end - 0x2000;
}

static uint8_t *end_of_ram(uint64_t size)
{
    return (uint8_t *)(ram_end - size);
}

static void map_end_of_ram(void)
{
    for (uint64_t page = ram_end - 4 * PAGE_SIZE; page < ram_end; page += PAGE_SIZE) {
        if (physical_address_of(page) == UINT64_MAX) {
            map_page(page, page, PAGE_PRESENT | PAGE_WRITABLE);
        }
    }
    memset(end_of_ram(4 * PAGE_SIZE), 0, 4 * PAGE_SIZE);
}

/* Raw calls whose result the guest looks at. */

static int32_t open_v2(uint64_t name, int32_t flags, int32_t mode)
{
    struct open_params parameters = {.name = name, .flags = flags, .mode = mode, .ret = INT32_MIN};
    call_v2(V2_OPEN, (uintptr_t)&parameters);
    return parameters.ret;
}

static int32_t close_v2(int32_t fd)
{
    struct close_params parameters = {.fd = fd, .ret = INT32_MIN};
    call_v2(V2_CLOSE, (uintptr_t)&parameters);
    return parameters.ret;
}

static int64_t transfer_v2(uint16_t port, int32_t fd, uint64_t buffer, uint64_t length)
{
    struct v2_transfer_params parameters = {.len = length, .ret = INT64_MIN, .buf = buffer, .fd = fd};
    call_v2(port, (uintptr_t)&parameters);
    return parameters.ret;
}

/* The first table takes addresses of 32 bits: an image above 4 GiB cannot pass its own structs there. */
static bool can_call_v1(void)
{
    return ram_end <= 0x100000000ull;
}

static void open_v1(uint64_t name, int32_t flags)
{
    struct open_params parameters = {.name = name, .flags = flags, .mode = 0644, .ret = -1};
    if (can_call_v1()) {
        call_v1(V1_OPEN, (uint32_t)(uintptr_t)&parameters);
        if (parameters.ret >= 3) {
            close_v2(parameters.ret);
        }
    }
}

static void unlink_both(uint64_t name)
{
    struct unlink_params parameters = {.name = name, .ret = INT32_MIN};
    call_v2(V2_UNLINK, (uintptr_t)&parameters);
    if (can_call_v1()) {
        call_v1(V1_UNLINK, (uint32_t)(uintptr_t)&parameters);
    }
}

static void stat_and_mkdir(uint64_t name, uint64_t length)
{
    struct v3_stat_params stat = {.name = name, .attr = (uintptr_t)scratch};
    call_v2(V2_STAT, (uintptr_t)&stat);
    struct v3_mkdir_params mkdir = {.path = name, .len = length};
    call_v2(V2_MKDIR, (uintptr_t)&mkdir);
}

static void transfer_v1(uint16_t port, int32_t fd, uint64_t buffer, uint64_t length)
{
    /* FileWrite's struct is the front of FileRead's. */
    struct v1_read_params parameters = {.fd = fd, .buf = buffer, .len = length, .ret = -1};
    if (can_call_v1()) {
        call_v1(port, (uint32_t)(uintptr_t)&parameters);
    }
}

static int32_t scratch_file(void)
{
    int32_t fd = open_v2((uintptr_t) "/hostile.tmp", O_RDWR | O_CREAT, 0644);
    check(fd >= 3, "a file can be created");
    check_equal(transfer_v2(V2_WRITE, fd, (uintptr_t) "abc", 3), 3, "it can be written");
    return fd;
}

static void drop_scratch_file(int32_t fd)
{
    check_equal(close_v2(fd), 0, "the file can be closed");
    unlink_both((uintptr_t) "/hostile.tmp");
}

static void rewind_file(int32_t fd)
{
    struct v2_lseek_params parameters = {.fd = fd};
    call_v2(V2_LSEEK, (uintptr_t)&parameters);
}

/* 1: parameter structs out of RAM or across its end. */
static void bad_structs(void)
{
    static const uint16_t v1_ports[] = {V1_WRITE,  V1_OPEN,     V1_CLOSE,   V1_READ,   V1_LSEEK,  V1_NETWRITE,
                                        V1_NETREAD, V1_NETSTAT, V1_CMDSIZE, V1_CMDVAL, V1_UNLINK, V1_SERIAL_BUFFER};
    static const uint16_t v2_ports[] = {
        V2_SERIAL_BUFFER, V2_SERIAL_READ_BUFFER, V2_WRITE, V2_OPEN,  V2_CLOSE, V2_READ,        V2_LSEEK,
        V2_UNLINK,        V2_GETDENTS,           V2_STAT,  V2_FSTAT, V2_MKDIR, V2_SHARED_OPEN, V2_SHARED_CLOSE};
    for (size_t address = 0; address < bad_count; address++) {
        for (size_t port = 0; port < LENGTH(v1_ports) && is_safe_for_v1(bad[address]); port++) {
            call_v1(v1_ports[port], (uint32_t)bad[address]);
        }
        for (size_t port = 0; port < LENGTH(v2_ports); port++) {
            call_v2(v2_ports[port], bad[address]);
        }
    }
    memset(end_of_ram(2 * PAGE_SIZE), 0, 2 * PAGE_SIZE);
}

/* 2: buffers out of RAM and lengths that lead out of it, wrap round or are nothing. */
static void bad_buffers(void)
{
    int32_t file = scratch_file();
    const int32_t fds[] = {1, 2, file};
    /* All at the end of RAM, so that a host that serves what there is overwrites nothing of this guest. */
    const uint64_t own[] = {(uintptr_t)end_of_ram(8192), (uintptr_t)end_of_ram(64), (uintptr_t)end_of_ram(1)};
    for (size_t f = 0; f < LENGTH(fds); f++) {
        for (size_t i = 0; i < bad_count; i++) {
            int64_t done = transfer_v2(V2_WRITE, fds[f], bad[i], 4096);
            check(done < 4096, "a write from outside of RAM is refused");
            transfer_v1(V1_WRITE, fds[f], bad[i], 4096);
            rewind_file(file);
            done = transfer_v2(V2_READ, fds[f] == file ? file : -1, bad[i], 4096);
            check(done < 4096, "a read to outside of RAM is refused");
            transfer_v1(V1_READ, fds[f] == file ? file : -1, bad[i], 4096);
        }
        for (size_t i = 0; i < LENGTH(own); i++) {
            for (size_t l = 0; l < LENGTH(odd_lengths); l++) {
                if (odd_lengths[l] == 1) {
                    continue; /* a legal write of one byte, to a console too */
                }
                rewind_file(file);
                transfer_v2(V2_READ, file, own[i], odd_lengths[l]);
                transfer_v1(V1_READ, file, own[i], odd_lengths[l]);
                int64_t done = transfer_v2(V2_WRITE, fds[f], own[i], odd_lengths[l]);
                check(odd_lengths[l] == 0 ? done == 0 : done <= 8192, "no more is written than there is");
                transfer_v1(V1_WRITE, fds[f], own[i], odd_lengths[l]);
            }
            transfer_v2(V2_WRITE, fds[f], own[i], -own[i]);
            transfer_v2(V2_WRITE, fds[f], own[i], -own[i] + 16);
            transfer_v2(V2_READ, file, own[i], -own[i] + 16);
        }
    }
    for (size_t i = 0; i < bad_count; i++) {
        for (size_t l = 0; l < LENGTH(odd_lengths); l++) {
            struct v2_serial_params v2 = {.len = odd_lengths[l], .buf = bad[i]};
            struct v1_serial_params v1 = {.buf = v2.buf, .len = v2.len};
            call_v2(V2_SERIAL_BUFFER, (uintptr_t)&v2);
            if (can_call_v1()) {
                call_v1(V1_SERIAL_BUFFER, (uint32_t)(uintptr_t)&v1);
            }
        }
    }
    drop_scratch_file(file);
}

/* 3: strings without an end, of a megabyte, not in UTF-8, at bad addresses. */
static void bad_strings(void)
{
    memset(long_name, 'a', NAME_SIZE);
    long_name[0] = '/';
    memset(end_of_ram(2 * PAGE_SIZE), 'A', 2 * PAGE_SIZE);
    *end_of_ram(2 * PAGE_SIZE) = '/';
    static const char *const no_utf8[] = {"/\xff\xfe", "/data/\xc3\x28", "\x80", "/data/\xed\xa0\x80", "/\xf5\x80\x80\x80"};
    uint64_t names[32 + 8];
    size_t count = 0;
    for (size_t i = 0; i < bad_count; i++) {
        names[count++] = bad[i];
    }
    names[count++] = (uintptr_t)end_of_ram(2 * PAGE_SIZE);
    names[count++] = (uintptr_t)end_of_ram(1);
    for (size_t i = 0; i < LENGTH(no_utf8); i++) {
        names[count++] = (uintptr_t)no_utf8[i];
    }
    names[count++] = (uintptr_t)long_name;
    for (size_t i = 0; i < count; i++) {
        int32_t fd = open_v2(names[i], O_RDONLY, 0);
        check(fd < 0, "a bad name opens nothing");
        open_v1(names[i], O_RDONLY);
        unlink_both(names[i]);
        stat_and_mkdir(names[i], odd_lengths[i % LENGTH(odd_lengths)]);
        if (i >= bad_count + 2 && i + 1 < count) {
            check(open_v2(names[i], O_WRONLY | O_CREAT, 0644) < 0, "a name that is not UTF-8 creates nothing");
        }
    }
    int32_t fd = open_v2((uintptr_t)long_name, O_WRONLY | O_CREAT, 0644);
    if (fd >= 0) {
        close_v2(fd);
    }
    memset(end_of_ram(2 * PAGE_SIZE), 0, 2 * PAGE_SIZE);
}

/*
 * 4: paths that try to leave what is mapped, and paths that are hardly paths. The former are only read, so that a host
 * that fails here keeps its files.
 */
static void odd_paths(void)
{
    static const char *const escapes[] = {
        "/../etc/passwd", "/../../../../etc/passwd", "/data/../../etc/passwd", "/data/../../../etc/passwd",
        "..",             "../etc/passwd",           "../../../../etc/passwd", "/data/..",
        "/etc/passwd",    "/proc/self/environ",      "/dev/zero",              "/data/./../../etc/shadow",
    };
    static const char *const odd[] = {
        "",       "/",         "//",      "///",      ".",          "/.",           "/..",         "data",
        "./data", "/data",     "/data/",  "/data//",  "//data",     "/data/.",      "/data/../data", "/data/a/../b",
        "\n",     "/data/\n",  "/\t",     "/data/ ",  "/data/\xe2\x82\xac",    "-",
    };
    for (size_t i = 0; i < LENGTH(escapes); i++) {
        int32_t fd = open_v2((uintptr_t)escapes[i], O_RDONLY, 0);
        if (fd >= 0) {
            /* A directory of the map itself may open; what it must not do is give bytes of the host. */
            check(transfer_v2(V2_READ, fd, (uintptr_t)scratch, 64) <= 0, "a path does not lead out of the map");
            close_v2(fd);
        }
        open_v1((uintptr_t)escapes[i], O_RDONLY);
        struct v3_stat_params stat = {.name = (uintptr_t)escapes[i], .attr = (uintptr_t)scratch};
        call_v2(V2_STAT, (uintptr_t)&stat);
    }
    for (size_t i = 0; i < LENGTH(odd); i++) {
        for (int32_t flags = 0; flags <= 3; flags++) {
            int32_t fd = open_v2((uintptr_t)odd[i], flags | (flags == 1 ? O_CREAT : 0), 0644);
            if (fd >= 0) {
                close_v2(fd);
            }
            open_v1((uintptr_t)odd[i], flags);
        }
        struct v3_stat_params stat = {.name = (uintptr_t)odd[i], .attr = (uintptr_t)scratch};
        call_v2(V2_STAT, (uintptr_t)&stat);
        struct v3_mkdir_params mkdir = {.path = (uintptr_t)odd[i], .len = strlen(odd[i]) + 1};
        call_v2(V2_MKDIR, (uintptr_t)&mkdir);
        unlink_both((uintptr_t)odd[i]);
    }
}

/* 5: flags, modes, descriptors, whence and offsets that mean nothing. */
static void odd_numbers(void)
{
    static const int32_t flags[] = {-1, INT32_MIN, INT32_MAX, 3, 0x40000000, O_DIRECTORY | O_CREAT, O_PATH, O_TMPFILE,
                                    O_NOFOLLOW, O_DIRECT, O_TRUNC, O_EXCL, O_APPEND | O_TRUNC | O_CREAT | O_EXCL};
    static const int64_t offsets[] = {0, -1, 1, INT64_MIN, INT64_MAX, 1ll << 32};
    static const uint32_t whences[] = {0, 1, 2, 3, 4, 5, UINT32_MAX, 0x7fffffff, 0x80000000};
    for (size_t i = 0; i < LENGTH(flags); i++) {
        int32_t fd = open_v2((uintptr_t) "/flags.tmp", flags[i], -1);
        if (fd >= 0) {
            close_v2(fd);
        }
        open_v1((uintptr_t) "/flags.tmp", flags[i]);
        fd = open_v2((uintptr_t) "/data", flags[i], 07777);
        if (fd >= 0) {
            close_v2(fd);
        }
        unlink_both((uintptr_t) "/flags.tmp");
    }
    int32_t file = scratch_file();
    for (size_t o = 0; o < LENGTH(offsets); o++) {
        for (size_t w = 0; w < LENGTH(whences); w++) {
            struct v2_lseek_params v2 = {.offset = offsets[o], .whence = whences[w], .fd = file};
            call_v2(V2_LSEEK, (uintptr_t)&v2);
            struct v1_lseek_params v1 = {.fd = file, .offset = offsets[o], .whence = (int32_t)whences[w]};
            if (can_call_v1()) {
                call_v1(V1_LSEEK, (uint32_t)(uintptr_t)&v1);
            }
            v2 = (struct v2_lseek_params){.offset = offsets[o], .whence = whences[w], .fd = 1};
            call_v2(V2_LSEEK, (uintptr_t)&v2);
        }
    }
    drop_scratch_file(file);
    for (size_t i = 0; i < LENGTH(odd_fds); i++) {
        int32_t fd = odd_fds[i];
        check(transfer_v2(V2_READ, fd, (uintptr_t)scratch, 16) < 0, "read from an odd descriptor");
        check(transfer_v2(V2_WRITE, fd, (uintptr_t)scratch, 16) < 0, "write to an odd descriptor");
        transfer_v1(V1_READ, fd, (uintptr_t)scratch, 16);
        transfer_v1(V1_WRITE, fd, (uintptr_t)scratch, 16);
        struct v2_lseek_params lseek = {.fd = fd};
        call_v2(V2_LSEEK, (uintptr_t)&lseek);
        close_v2(fd);
        struct v3_fstat_params fstat = {.fd = fd, .attr = (uintptr_t)scratch};
        call_v2(V2_FSTAT, (uintptr_t)&fstat);
        check(fstat.ret.tag != RESULT_SUCCESS, "fstat of an odd descriptor");
    }
    for (int32_t fd = 0; fd < 3; fd++) {
        close_v2(fd);
        struct v3_fstat_params fstat = {.fd = fd, .attr = (uintptr_t)scratch};
        call_v2(V2_FSTAT, (uintptr_t)&fstat);
    }
    transfer_v2(V2_READ, 1, (uintptr_t)scratch, 16);
    transfer_v2(V2_WRITE, 0, (uintptr_t)scratch, 0);
}

/* 6: directories and attributes. */
static void directories(void)
{
    int32_t file = scratch_file();
    int32_t directory = open_v2((uintptr_t) "/data", O_RDONLY | O_DIRECTORY, 0);
    const int32_t fds[] = {file, directory, 0, 1, 2, -1, INT32_MIN, 1000};
    for (size_t f = 0; f < LENGTH(fds); f++) {
        for (size_t l = 0; l < LENGTH(odd_lengths); l++) {
            struct v3_getdents_params getdents = {.fd = fds[f], .buf = (uintptr_t)scratch, .len = odd_lengths[l]};
            call_v2(V2_GETDENTS, (uintptr_t)&getdents);
            check(fds[f] == directory || getdents.tag != GETDENTS_SUCCESS, "getdents works on directories only");
            getdents = (struct v3_getdents_params){.fd = fds[f], .buf = bad[l], .len = 4096};
            call_v2(V2_GETDENTS, (uintptr_t)&getdents);
        }
    }
    static const uint32_t kinds[] = {2, 3, 0x7fffffff, 0x80000000, UINT32_MAX};
    for (size_t i = 0; i < LENGTH(kinds); i++) {
        struct v3_stat_params stat = {.name = (uintptr_t) "/hostile.tmp", .kind = kinds[i], .attr = (uintptr_t)scratch};
        call_v2(V2_STAT, (uintptr_t)&stat);
        check(stat.ret.tag != RESULT_SUCCESS, "stat of an invalid kind");
    }
    for (size_t i = 0; i < bad_count; i++) {
        struct v3_stat_params stat = {.name = (uintptr_t) "/hostile.tmp", .attr = bad[i]};
        call_v2(V2_STAT, (uintptr_t)&stat);
        struct v3_fstat_params fstat = {.fd = file, .attr = bad[i]};
        call_v2(V2_FSTAT, (uintptr_t)&fstat);
    }
    for (size_t l = 0; l < LENGTH(odd_lengths); l++) {
        struct v3_mkdir_params mkdir = {.path = (uintptr_t) "/hostile.dir", .len = odd_lengths[l]};
        call_v2(V2_MKDIR, (uintptr_t)&mkdir);
    }
    if (directory >= 0) {
        close_v2(directory);
    }
    drop_scratch_file(file);
    memset(end_of_ram(2 * PAGE_SIZE), 0, 2 * PAGE_SIZE);
}

/* 7: structs at every alignment, which must work. */
static void unaligned_structs(void)
{
    int32_t file = scratch_file();
    for (uint64_t shift = 1; shift < 8; shift++) {
        rewind_file(file);
        struct v2_transfer_params read = {.len = 3, .ret = INT64_MIN, .buf = (uintptr_t)&scratch[1001], .fd = file};
        memcpy(&scratch[shift], &read, sizeof read);
        memset(&scratch[1000], 0, 8);
        call_v2(V2_READ, (uintptr_t)&scratch[shift]);
        memcpy(&read, &scratch[shift], sizeof read);
        check_equal(read.ret, 3, "a read whose struct is unaligned");
        check(memcmp(&scratch[1000], "\0abc", 5) == 0, "it delivers its bytes");

        /* Across two pages. */
        struct v2_lseek_params lseek = {.offset = 1, .whence = SEEK_SET, .fd = file};
        memcpy(&scratch[PAGE_SIZE - shift], &lseek, sizeof lseek);
        call_v2(V2_LSEEK, (uintptr_t)&scratch[PAGE_SIZE - shift]);
        memcpy(&lseek, &scratch[PAGE_SIZE - shift], sizeof lseek);
        check_equal(lseek.offset, 1, "an lseek whose struct lies in two pages");

        struct v3_fstat_params fstat = {.fd = file, .attr = (uintptr_t)&scratch[2048 + shift]};
        memcpy(&scratch[shift], &fstat, sizeof fstat);
        call_v2(V2_FSTAT, (uintptr_t)&scratch[shift]);
        struct v3_getdents_params getdents = {.fd = file, .buf = (uintptr_t)&scratch[2048 + shift], .len = 100};
        memcpy(&scratch[shift], &getdents, sizeof getdents);
        call_v2(V2_GETDENTS, (uintptr_t)&scratch[shift]);
    }
    drop_scratch_file(file);
}

/* 8: ports that nobody has, and those of the hypercalls in other sizes and directions. */
static void odd_ports(void)
{
    static const uint16_t unknown[] = {0x00,  0x60,  0x64,   0x80,   0x92,   0x99,   0x1f7,  0x3f8,  0x401,  0x47f,
                                       0x7ff, 0x881, 0x1000, 0x1011, 0x10ff, 0x11a0, 0x1200, 0x1210, 0x8000, 0xfffc};
    for (size_t i = 0; i < LENGTH(unknown); i++) {
        outb(unknown[i], 0);
        outw(unknown[i], 0);
        outl(unknown[i], 0);
        inb(unknown[i]);
        inw(unknown[i]);
        inl(unknown[i]);
    }
    check_equal(inb(0x99), 0xff, "an unknown port reads as ones, a byte");
    check_equal(inw(0x99), 0xffff, "an unknown port reads as ones, a word");
    check_equal(inl(0x9c), 0xffffffff, "an unknown port reads as ones, a doubleword");

    static const uint16_t calls[] = {V1_WRITE,     V1_OPEN,  V1_CLOSE, V1_READ,  V1_EXIT,  V1_LSEEK,    V1_CMDSIZE,
                                     V1_CMDVAL,    V1_UART,  V1_UNLINK, V1_SERIAL_BUFFER, V2_EXIT,   V2_SERIAL_BYTE,
                                     V2_SERIAL_BUFFER, V2_WRITE, V2_OPEN, V2_CLOSE, V2_READ, V2_LSEEK, V2_UNLINK,
                                     V2_GETDENTS, V2_STAT, V2_FSTAT, V2_MKDIR};
    for (size_t i = 0; i < LENGTH(calls); i++) {
        inb(calls[i]);
        inw(calls[i]);
        inl(calls[i]);
        if (calls[i] != V1_EXIT && calls[i] != V2_EXIT && calls[i] != V1_UART && calls[i] != V2_SERIAL_BYTE) {
            /* As addresses these lie in a gap of the boot area, wherever RAM starts. */
            __asm__ volatile("outb %%al, %%dx" ::"a"(0x80), "d"(calls[i]), "D"(HOLE) : "memory");
            __asm__ volatile("outw %%ax, %%dx" ::"a"(0xe000), "d"(calls[i]), "D"(HOLE) : "memory");
        }
    }

    static const uint32_t pci[] = {0, 0x80000000, 0x80000001, 0x800000fc, 0x80000800, 0x80ffffff, 0xffffffff, 0x80010000};
    for (size_t i = 0; i < LENGTH(pci); i++) {
        outl(0xcf8, pci[i]);
        inl(0xcf8);
        for (uint16_t port = 0xcfc; port <= 0xcff; port++) {
            inb(port);
            inw(port);
            inl(port);
            outb(port, 0xff);
            outw(port, 0xffff);
            outl(port, 0xffffffff);
        }
    }
    outb(0xcf8, 1);
    outw(0xcfa, 1);
    outl(0xcf8, 0);
}

static void string_out_byte(uint16_t port, const void *from, uint64_t count)
{
    __asm__ volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(port), "D"(HOLE) : "memory");
}

static void string_out_dword(uint16_t port, const void *from, uint64_t count)
{
    __asm__ volatile("rep outsl" : "+S"(from), "+c"(count) : "d"(port), "D"(HOLE) : "memory");
}

static void string_in(uint16_t port, uint64_t count)
{
    uint8_t *to = scratch;
    __asm__ volatile("rep insb" : "+D"(to), "+c"(count) : "d"(port) : "memory");
    to = scratch;
    count = 16;
    __asm__ volatile("rep insl" : "+D"(to), "+c"(count) : "d"(port) : "memory");
}

/* 9: string instructions, whose exits carry many values at once. */
static void string_io(void)
{
    static const char text[] = "string io\n";
    string_out_byte(V1_UART, text, sizeof text - 1);
    static uint32_t addresses[64];
    for (size_t i = 0; i < LENGTH(addresses); i++) {
        addresses[i] = (uint32_t)bad[i % bad_count];
        if (!is_safe_for_v1(addresses[i])) {
            addresses[i] = (uint32_t)HOLE;
        }
    }
    static const uint16_t ports[] = {V1_WRITE, V1_OPEN, V1_CLOSE, V1_READ, V1_CMDVAL, V2_WRITE, V2_OPEN, V2_GETDENTS, 0x99,
                                     0xcfc};
    for (size_t i = 0; i < LENGTH(ports); i++) {
        string_out_dword(ports[i], addresses, LENGTH(addresses));
        string_out_byte(ports[i], text, 0);
        string_in(ports[i], 4096);
    }
    string_in(V1_UART, 4096);
    string_in(V1_EXIT, 16);
    string_in(0xcf8, 16);
    string_out_byte(0x99, scratch, sizeof scratch);
    memset(end_of_ram(2 * PAGE_SIZE), 0, 2 * PAGE_SIZE);
}

/* 10: the command line, asked for out of order and with garbage to put it. */
static void command_line(void)
{
    struct v1_cmdval_params values;
    if (!can_call_v1()) {
        return;
    }
    for (int round = 0; round < 2; round++) {
        /* No pointer that is found there leads into RAM. */
        memset(end_of_ram(2 * PAGE_SIZE), 0xff, 2 * PAGE_SIZE);
        for (size_t i = 0; i < bad_count; i++) {
            values = (struct v1_cmdval_params){.argv = bad[i], .envp = bad[bad_count - 1 - i]};
            call_v1(V1_CMDVAL, (uint32_t)(uintptr_t)&values);
            for (size_t k = 0; k < LENGTH(pointers); k++) {
                pointers[k] = bad[(i + k) % bad_count];
            }
            values = (struct v1_cmdval_params){.argv = (uintptr_t)pointers, .envp = (uintptr_t)pointers};
            call_v1(V1_CMDVAL, (uint32_t)(uintptr_t)&values);
        }
        memset(end_of_ram(2 * PAGE_SIZE), 0xff, 2 * PAGE_SIZE);
        values = (struct v1_cmdval_params){.argv = ram_end - 8, .envp = ram_end - 16};
        call_v1(V1_CMDVAL, (uint32_t)(uintptr_t)&values);
        call_v1(V1_CMDSIZE, (uint32_t)(uintptr_t)&sizes);
        check(sizes.argc >= 0 && sizes.argc <= MAX_ARGC_ENVC, "argc is in its range");
        check(sizes.envc >= 0 && sizes.envc <= MAX_ARGC_ENVC, "envc is in its range");
    }
    memset(end_of_ram(2 * PAGE_SIZE), 0, 2 * PAGE_SIZE);
}

/* 11: calls that are reserved, deprecated or declared only. */
static void reserved_calls(void)
{
    static const uint16_t v1_ports[] = {V1_NETWRITE, V1_NETREAD, V1_NETSTAT};
    static const uint16_t v2_ports[] = {V2_SERIAL_READ_BYTE, V2_SERIAL_READ_BUFFER, V2_SHARED_OPEN, V2_SHARED_CLOSE,
                                        0x11a0, 0x1060};
    memset(scratch, 0xff, sizeof scratch);
    for (size_t i = 0; i < LENGTH(v1_ports) && can_call_v1(); i++) {
        call_v1(v1_ports[i], (uint32_t)(uintptr_t)scratch);
    }
    for (size_t i = 0; i < LENGTH(v2_ports); i++) {
        call_v2(v2_ports[i], (uintptr_t)scratch);
        call_v2(v2_ports[i], UINT64_MAX);
    }
    call_v2(V2_SERIAL_BYTE, 0xffffffffffffff00 | '\n');
    memset(scratch, 0, sizeof scratch);
}

/* 12: the first table's virtual buffers, through page tables that lead astray. */
static void virtual_buffers(void)
{
    if (!can_call_v1()) {
        return;
    }
    const uint64_t window = 0x610000000000;
    map_page(window, (uintptr_t)scratch, PAGE_PRESENT | PAGE_WRITABLE);
    map_page(window + 2 * PAGE_SIZE, HOLE, PAGE_PRESENT | PAGE_WRITABLE);
    map_page(window + 4 * PAGE_SIZE, 0x000ffffffffff000, PAGE_PRESENT | PAGE_WRITABLE);
    map_page(window + 6 * PAGE_SIZE, ram_end - PAGE_SIZE, PAGE_PRESENT);
    map_page(window + 7 * PAGE_SIZE, ram_end, PAGE_PRESENT | PAGE_WRITABLE);
    volatile uint64_t *top = (volatile uint64_t *)(read_cr3() & 0x000ffffffffff000);
    top[200] = 0x000f7e5700000003; /* a table where no RAM is */
    top[201] = (uintptr_t)top | 3; /* a table that is its own */
    top[202] = (ram_end - PAGE_SIZE) | 3;
    memset(end_of_ram(PAGE_SIZE), 0xff, PAGE_SIZE); /* entries that are huge, reserved, everything */
    const uint64_t buffers[] = {
        window + PAGE_SIZE - 3,     window + PAGE_SIZE,     window + 2 * PAGE_SIZE,  window + 4 * PAGE_SIZE,
        window + 7 * PAGE_SIZE - 3, window - 3,             200ull << 39,            201ull << 39,
        202ull << 39,               0x0000800000000000,     0xffff800000000000 - 3,  UINT64_MAX - 3,
        0xffffff8000000000,         0x1234567812345678,
    };
    int32_t file = scratch_file();
    for (size_t i = 0; i < LENGTH(buffers); i++) {
        for (size_t l = 0; l < LENGTH(odd_lengths); l++) {
            if (odd_lengths[l] == 1) {
                continue;
            }
            transfer_v1(V1_WRITE, 1000, buffers[i], odd_lengths[l]);
            transfer_v1(V1_READ, 1000, buffers[i], odd_lengths[l]);
        }
        /* The self-referring windows show the page tables: reading a file there would change them. */
        if (buffers[i] != 201ull << 39 && buffers[i] != 0xffffff8000000000) {
            rewind_file(file);
            transfer_v1(V1_READ, file, buffers[i], 6);
            transfer_v1(V1_READ, file, buffers[i], UINT64_MAX);
        }
        transfer_v1(V1_WRITE, file, buffers[i], 6);
        transfer_v1(V1_WRITE, file, buffers[i], 3 * PAGE_SIZE);
    }
    top[200] = 0;
    top[201] = 0;
    top[202] = 0;
    drop_scratch_file(file);
    memset(end_of_ram(2 * PAGE_SIZE), 0, 2 * PAGE_SIZE);
}

/* 13: as many open files as the host allows. */
static void exhaustion(void)
{
    char name[] = "/many/0000";
    int32_t last = 0;
    int64_t opened = 0;
    for (int i = 0; i < 3000 && last >= 0; i++) {
        name[6] = (char)('0' + i / 1000);
        name[7] = (char)('0' + i / 100 % 10);
        name[8] = (char)('0' + i / 10 % 10);
        name[9] = (char)('0' + i % 10);
        last = open_v2((uintptr_t)name, O_RDWR | O_CREAT, 0600);
        opened += last >= 0;
    }
    print("opened ");
    print_dec(opened);
    print("\n");
}

static void bad_exit(int section)
{
    static const uint32_t addresses[] = {0xd0000000, 0xfffffffc};
    switch (section) {
    case 20:
        call_v1(V1_EXIT, (uint32_t)(ram_end + 0x100000 < HOLE ? ram_end + 0x100000 : HOLE));
        break;
    case 21:
        call_v1(V1_EXIT, (uint32_t)(ram_end - 2));
        break;
    case 22:
        outb(V1_EXIT, 0x80);
        break;
    case 23:
        outw(V1_EXIT, 0xe000);
        break;
    case 24:
        string_out_dword(V1_EXIT, addresses, LENGTH(addresses));
        break;
    case 25:
        call_v2(V2_EXIT, 0x100000007);
        break;
    case 26:
        __asm__ volatile("outb %%al, %%dx" ::"a"(0), "d"(V2_EXIT), "D"(7ull) : "memory");
        break;
    default:
        call_v1(V1_EXIT, (uint32_t)HOLE);
    }
    print("still here\n");
    guest_exit(EXIT_STILL_HERE);
}

typedef void (*section_function)(void);

static const section_function sections[] = {
    bad_structs, bad_buffers, bad_strings, odd_paths,    odd_numbers,    directories,     unaligned_structs,
    odd_ports,   string_io,   command_line, reserved_calls, virtual_buffers, exhaustion,
};

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    if (cpu != 0) {
        park();
    }
    ram_start = boot->phys_start;
    ram_end = boot->phys_end;
    idt_init();
    map_end_of_ram();
    collect_bad_addresses();
    for (int number = 1; number <= (int)LENGTH(sections); number++) {
        if (SECTION == number || (SECTION == 0 && number < 13)) {
            print("section ");
            print_dec(number);
            print("\n");
            sections[number - 1]();
        }
    }
    if (SECTION >= 20) {
        print("section ");
        print_dec(SECTION);
        print("\n");
        bad_exit(SECTION);
    }
    print("hostile ok\n");
    return 0;
}
