/*
 * Walks over every file call of its interface and checks each result.
 *
 * Needs: a writable, otherwise empty host directory mapped to /data, with hello.txt in it that contains "hello\n".
 * If the host put a symbolic link /data/link to hello.txt there, interface 3 checks it with stat and lstat.
 * Output: what it writes to fd 1 and 2, "files ok". Exit code: 0, or 97 after a FAIL line.
 * Leaves in the directory: appended.txt ("one two three"), with interface 3 the directory "made" with three files.
 */
#include "guest.h"

#define BIG 70000
#define S_IFMT 0170000
#define S_IFDIR 0040000
#define S_IFREG 0100000
#define S_IFLNK 0120000

static char small[256];
static uint8_t pages[BIG + 4096] ALIGNED(4096);
static uint8_t copy[BIG + 4096] ALIGNED(4096);

static uint8_t pattern(uint64_t i)
{
    return (uint8_t)(i * 7 + (i >> 8));
}

/* The first interface promises just "negative" for close, unlink, read and lseek. */
static void check_error(int64_t found, int64_t error, const char *what)
{
    if (INTERFACE == 1) {
        check(found < 0, what);
    } else {
        check_equal(found, -error, what);
    }
}

static void read_hello(void)
{
    int32_t fd = sys_open("/data/hello.txt", O_RDONLY, 0);
    check(fd >= 3, "open /data/hello.txt");
    check_equal(sys_read(fd, small, sizeof small), 6, "read hello.txt");
    check(memcmp(small, "hello\n", 6) == 0, "hello.txt holds hello");
    check_equal(sys_read(fd, small, sizeof small), 0, "read at the end of hello.txt");
    check_equal(sys_lseek(fd, 1, SEEK_SET), 1, "lseek in hello.txt");
    check_equal(sys_read(fd, small, 0), 0, "read of no bytes");
    check_equal(sys_read(fd, small, 3), 3, "read of three bytes");
    check(memcmp(small, "ell", 3) == 0, "three bytes from the second on");
    if (INTERFACE != 1) {
        check(sys_write(fd, "x", 1) < 0, "write to a file opened for reading");
    } else {
        sys_write(fd, "x", 1);
    }
    check_equal(sys_close(fd), 0, "close hello.txt");
    check_error(sys_close(fd), EBADF, "close twice");
    check_error(sys_read(fd, small, 1), EBADF, "read from a closed file");
}

static void create_and_seek(void)
{
    int32_t fd = sys_open("/data/new.txt", O_RDWR | O_CREAT | O_EXCL, 0644);
    check(fd >= 3, "create /data/new.txt");
    check_equal(sys_write(fd, "0123456789", 10), 10, "write ten bytes");
    check_equal(sys_lseek(fd, 0, SEEK_CUR), 10, "SEEK_CUR tells the offset");
    check_equal(sys_lseek(fd, -4, SEEK_END), 6, "SEEK_END");
    check_equal(sys_read(fd, small, 10), 4, "read the last four bytes");
    check(memcmp(small, "6789", 4) == 0, "the last four bytes");
    check_equal(sys_lseek(fd, 2, SEEK_SET), 2, "SEEK_SET");
    check_equal(sys_lseek(fd, 3, SEEK_CUR), 5, "SEEK_CUR forwards");
    check_equal(sys_write(fd, "X", 1), 1, "overwrite one byte");
    check(sys_lseek(fd, -100, SEEK_SET) < 0, "lseek before the start fails");
    check_equal(sys_lseek(fd, 0, SEEK_CUR), 6, "a failed lseek leaves the offset");
    check_equal(sys_lseek(fd, 16, SEEK_SET), 16, "lseek behind the end");
    check_equal(sys_write(fd, "Z", 1), 1, "write behind the end");
    check_equal(sys_lseek(fd, 0, SEEK_SET), 0, "lseek to the start");
    check_equal(sys_read(fd, small, sizeof small), 17, "read all of it");
    check(memcmp(small, "01234X6789\0\0\0\0\0\0Z", 17) == 0, "contents with a hole of zeroes");
    check_equal(sys_close(fd), 0, "close new.txt");

    check_equal(sys_open("/data/new.txt", O_RDWR | O_CREAT | O_EXCL, 0644), -EEXIST, "O_EXCL on a file that exists");
    fd = sys_open("/data/new.txt", O_RDWR | O_TRUNC, 0);
    check(fd >= 3, "open with O_TRUNC");
    check_equal(sys_lseek(fd, 0, SEEK_END), 0, "O_TRUNC empties the file");
    check_equal(sys_close(fd), 0, "close the truncated file");
    check_equal(sys_unlink("/data/new.txt"), 0, "unlink new.txt");
    check_error(sys_unlink("/data/new.txt"), ENOENT, "unlink twice");
    check_equal(sys_open("/data/new.txt", O_RDONLY, 0), -ENOENT, "open after unlink");
}

static void append(void)
{
    static const char *const words[] = {"one", " two", " three"};
    for (size_t i = 0; i < LENGTH(words); i++) {
        int32_t fd = sys_open("/data/appended.txt", O_WRONLY | O_CREAT | O_APPEND, 0644);
        check(fd >= 3, "open with O_APPEND");
        check_equal(sys_write(fd, words[i], strlen(words[i])), (int64_t)strlen(words[i]), "append a word");
        check(sys_read(fd, small, 1) < 0, "read from a file opened for writing");
        check_equal(sys_close(fd), 0, "close the appended file");
    }
    int32_t fd = sys_open("/data/appended.txt", O_RDONLY, 0);
    check_equal(sys_read(fd, small, sizeof small), 13, "read the appended file");
    check(memcmp(small, "one two three", 13) == 0, "the words stand in order");
    check_equal(sys_close(fd), 0, "close the appended file");
}

static void cross_pages(void)
{
    for (uint64_t i = 0; i < BIG; i++) {
        pages[4000 + i] = pattern(i);
    }
    int32_t fd = sys_open("/data/big.bin", O_RDWR | O_CREAT, 0644);
    check(fd >= 3, "create big.bin");
    check_equal(sys_write(fd, &pages[4000], BIG), BIG, "write from a buffer of many pages");
    check_equal(sys_lseek(fd, 0, SEEK_SET), 0, "lseek to the start of big.bin");
    check_equal(sys_read(fd, &copy[4095], BIG + 1), BIG, "read into a buffer of many pages");
    check(memcmp(&copy[4095], &pages[4000], BIG) == 0, "what was read is what was written");
    check_equal(sys_close(fd), 0, "close big.bin");
}

/* The first interface takes virtual buffers: two neighbours there need not be neighbours in RAM. */
static void scattered_buffer(void)
{
    const uint64_t window = 0x600000000000;
    memset(copy, 0, sizeof copy);
    map_page(window, (uintptr_t)&copy[2 * PAGE_SIZE], PAGE_PRESENT | PAGE_WRITABLE);
    map_page(window + PAGE_SIZE, (uintptr_t)&copy[0], PAGE_PRESENT | PAGE_WRITABLE);
    map_page(window + 2 * PAGE_SIZE, (uintptr_t)&copy[5 * PAGE_SIZE], PAGE_PRESENT | PAGE_WRITABLE);
    check(physical_address_of(window) == (uintptr_t)&copy[2 * PAGE_SIZE], "the window is mapped");

    int32_t fd = sys_open("/data/big.bin", O_RDONLY, 0);
    check_equal(sys_read(fd, (void *)(window + 100), 2 * PAGE_SIZE), 2 * PAGE_SIZE, "read into scattered pages");
    check(memcmp((void *)(window + 100), &pages[4000], 2 * PAGE_SIZE) == 0, "scattered pages hold the file");
    check(memcmp(&copy[2 * PAGE_SIZE + 100], &pages[4000], PAGE_SIZE - 100) == 0, "first piece");
    check(memcmp(&copy[0], &pages[4000 + PAGE_SIZE - 100], PAGE_SIZE) == 0, "second piece");
    check(memcmp(&copy[5 * PAGE_SIZE], &pages[4000 + 2 * PAGE_SIZE - 100], 100) == 0, "third piece");
    for (uint64_t i = 0; i < PAGE_SIZE; i++) {
        check(copy[PAGE_SIZE + i] == 0 && copy[3 * PAGE_SIZE + i] == 0, "pages in between are untouched");
    }
    check_equal(sys_close(fd), 0, "close big.bin");

    fd = sys_open("/data/scattered.bin", O_RDWR | O_CREAT, 0644);
    check(fd >= 3, "create scattered.bin");
    sys_write(fd, (void *)(window + 100), 2 * PAGE_SIZE);
    check_equal(sys_lseek(fd, 0, SEEK_SET), 0, "lseek in scattered.bin");
    check_equal(sys_read(fd, &copy[8 * PAGE_SIZE], BIG / 2), 2 * PAGE_SIZE, "read scattered.bin");
    check(memcmp(&copy[8 * PAGE_SIZE], &pages[4000], 2 * PAGE_SIZE) == 0, "scattered pages were written in order");
    check_equal(sys_close(fd), 0, "close scattered.bin");
    check_equal(sys_unlink("/data/scattered.bin"), 0, "unlink scattered.bin");
}

static void refusals(void)
{
    check_equal(sys_open("/data/none.txt", O_RDONLY, 0), -ENOENT, "open a file that is not there");
    check_equal(sys_open("/nowhere/none.txt", O_RDONLY, 0), -ENOENT, "open an unmapped path");
    check_equal(sys_open("/data/x", O_DIRECTORY | O_CREAT, 0), -EINVAL, "O_DIRECTORY with O_CREAT");
    check_error(sys_close(1000), EBADF, "close a number that was never a file");
    check_error(sys_close(-1), EBADF, "close -1");
    check_error(sys_read(1000, small, 1), EBADF, "read from a number that was never a file");
    check_error(sys_lseek(1000, 0, SEEK_SET), EBADF, "lseek in a number that was never a file");
    check_error(sys_unlink("/nowhere/none.txt"), ENOENT, "unlink an unmapped path");
}

/* A file that is created at an unmapped path lives as long as the guest. */
static void unmapped_file(void)
{
    int32_t fd = sys_open("/scratch.txt", O_RDWR | O_CREAT, 0644);
    check(fd >= 3, "create a file at an unmapped path");
    check_equal(sys_write(fd, "kept", 4), 4, "write to it");
    check_equal(sys_close(fd), 0, "close it");
    fd = sys_open("/scratch.txt", O_RDONLY, 0);
    check(fd >= 3, "open it again");
    check_equal(sys_read(fd, small, sizeof small), 4, "read it");
    check(memcmp(small, "kept", 4) == 0, "it kept its contents");
    check_equal(sys_close(fd), 0, "close it again");
    check_equal(sys_unlink("/scratch.txt"), 0, "unlink it");
    check_equal(sys_open("/scratch.txt", O_RDONLY, 0), -ENOENT, "it is gone");
}

static void console(void)
{
    check_equal(sys_write(1, "to fd 1\n", 8), 8, "write to fd 1");
    check_equal(sys_write(2, "to fd 2\n", 8), 8, "write to fd 2");
    check_equal(sys_close(1), 0, "closing fd 1 is ignored");
    check_equal(sys_write(1, "to fd 1 again\n", 14), 14, "fd 1 still works");
}

#if INTERFACE == 3

static void make_file(const char *name)
{
    int32_t fd = sys_open(name, O_WRONLY | O_CREAT | O_EXCL, 0644);
    check(fd >= 3, "create a file in the new directory");
    check_equal(sys_close(fd), 0, "close it");
}

/* Counts the entries "f0" to "f2" of one buffer in found; returns the number of records. */
static int count_entries(const char *buffer, int64_t length, int *found)
{
    int records = 0;
    for (int64_t at = 0; at < length;) {
        const struct dirent64 *entry = (const struct dirent64 *)(buffer + at);
        check(entry->reclen > offsetof(struct dirent64, name), "a record has a length");
        check(at + entry->reclen <= length, "a record ends within the buffer");
        check(strlen(entry->name) + 1 + offsetof(struct dirent64, name) <= entry->reclen, "a name ends in its record");
        if (entry->name[0] == 'f' && entry->name[1] >= '0' && entry->name[1] <= '2' && entry->name[2] == 0) {
            check(entry->type == DT_REG, "a file's entry says so");
            found[entry->name[1] - '0']++;
        } else {
            check(strcmp(entry->name, ".") == 0 || strcmp(entry->name, "..") == 0, "there are only known names");
            check(entry->type == DT_DIR, "a directory's entry says so");
        }
        records++;
        at += entry->reclen;
    }
    return records;
}

static void list_directory(uint64_t buffer_size)
{
    static char buffer[1024] ALIGNED(8);
    int found[3] = {0, 0, 0};
    int32_t fd = sys_open("/data/made", O_RDONLY | O_DIRECTORY, 0);
    check(fd >= 3, "open the directory");
    check(sys_getdents(fd, buffer, 8) == -EINVAL, "getdents with a buffer too small for an entry");
    for (;;) {
        int64_t length = sys_getdents(fd, buffer, buffer_size);
        check(length >= 0, "getdents");
        if (length == 0) {
            break;
        }
        count_entries(buffer, length, found);
    }
    check(found[0] == 1 && found[1] == 1 && found[2] == 1, "each entry is listed once");
    check_equal(sys_getdents(fd, buffer, buffer_size), 0, "getdents at the end");
    check_equal(sys_close(fd), 0, "close the directory");
}

static void directories(void)
{
    check_equal(sys_mkdir("/data/made"), 0, "mkdir");
    check_equal(sys_mkdir("/data/made"), -EEXIST, "mkdir twice");
    make_file("/data/made/f0");
    make_file("/data/made/f1");
    make_file("/data/made/f2");
    list_directory(1024);
    list_directory(32);
    check(sys_unlink("/data/made") < 0, "unlink of a directory fails");

    int32_t fd = sys_open("/data/hello.txt", O_RDONLY, 0);
    check(sys_getdents(fd, small, sizeof small) < 0, "getdents on a file fails");
    check_equal(sys_close(fd), 0, "close hello.txt");
}

static void attributes(void)
{
    struct file_attr attr;
    struct file_attr other;
    check_equal(sys_stat("/data/hello.txt", &attr), 0, "stat");
    check(attr.size == 6 && (attr.mode & S_IFMT) == S_IFREG && attr.nlink >= 1, "stat of hello.txt");
    check(attr.mtim.sec > 0 && attr.mtim.nsec >= 0 && attr.mtim.nsec < 1000000000, "stat tells a time");
    check_equal(sys_lstat("/data/hello.txt", &other), 0, "lstat");
    check(other.ino == attr.ino && other.size == attr.size, "lstat agrees with stat");
    int32_t fd = sys_open("/data/hello.txt", O_RDONLY, 0);
    check_equal(sys_fstat(fd, &other), 0, "fstat");
    check(other.ino == attr.ino && other.dev == attr.dev && other.size == attr.size, "fstat agrees with stat");
    check_equal(sys_close(fd), 0, "close hello.txt");
    check_equal(sys_fstat(fd, &other), -EBADF, "fstat of a closed file");
    check_equal(sys_stat("/data", &attr), 0, "stat of the directory");
    check((attr.mode & S_IFMT) == S_IFDIR, "a directory says so");
    check_equal(sys_stat("/data/none.txt", &attr), -ENOENT, "stat of a file that is not there");
    check_equal(sys_stat("/nowhere", &attr), -ENOENT, "stat of an unmapped path");
    if (sys_lstat("/data/link", &attr) == 0) {
        check((attr.mode & S_IFMT) == S_IFLNK, "lstat sees the link");
        check_equal(sys_stat("/data/link", &attr), 0, "stat follows the link");
        check((attr.mode & S_IFMT) == S_IFREG && attr.size == 6, "stat sees the link's target");
    }
}

#endif

int guest_main(const struct boot_info *boot, uint64_t cpu)
{
    (void)boot;
    if (cpu != 0) {
        park();
    }
    read_hello();
    create_and_seek();
    append();
    cross_pages();
    if (INTERFACE == 1) {
        scattered_buffer();
    }
    check_equal(sys_unlink("/data/big.bin"), 0, "unlink big.bin");
    refusals();
    unmapped_file();
    console();
#if INTERFACE == 3
    attributes();
    directories();
#endif
    print("files ok\n");
    return 0;
}
