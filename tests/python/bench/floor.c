/*
 * What it costs to leave a KVM guest and to enter it again, written without the package, which it judges: the same
 * ioctls, a guest of the same three instructions, a time stamp on either side of each KVM_RUN.
 *
 * Arguments: HOST_CPU COUNT SKIP. Prints the median of COUNT exits in nanoseconds, behind SKIP that are not timed.
 * Ends with 77 if there is no KVM.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <x86intrin.h>

#define MEMORY 0x100000
#define CODE 0x8000
#define PORT 0x99
#define MAX_LEAVES 256

static void check(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

static uint64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_RAW, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static int by_size(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
    return (left > right) - (left < right);
}

static int make_vcpu(int kvm, int vm)
{
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    check(vcpu, "KVM_CREATE_VCPU");
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + MAX_LEAVES * sizeof cpuid->entries[0]);
    cpuid->nent = MAX_LEAVES;
    check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
    check(ioctl(vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
    free(cpuid);
    struct kvm_mp_state running = {.mp_state = KVM_MP_STATE_RUNNABLE};
    check(ioctl(vcpu, KVM_SET_MP_STATE, &running), "KVM_SET_MP_STATE");
    struct kvm_sregs system;
    check(ioctl(vcpu, KVM_GET_SREGS, &system), "KVM_GET_SREGS");
    system.cr0 = 0x80000031;
    system.cr3 = 0x1000;
    system.cr4 = 0x20;
    system.efer = 0x500;
    system.cs.base = 0;
    system.cs.selector = 8;
    system.cs.l = 1;
    system.cs.db = 0;
    system.cs.type = 11;
    system.cs.g = 1;
    system.cs.limit = system.ss.limit = UINT32_MAX;
    system.ss.g = 1;
    system.ss.type = 3;
    check(ioctl(vcpu, KVM_SET_SREGS, &system), "KVM_SET_SREGS");
    struct kvm_regs registers = {.rip = CODE, .rcx = UINT64_MAX, .rdx = PORT, .rflags = 2, .rsp = 0x7000};
    check(ioctl(vcpu, KVM_SET_REGS, &registers), "KVM_SET_REGS");
    return vcpu;
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        return 2;
    }
    uint64_t count = strtoull(argv[2], NULL, 10), skip = strtoull(argv[3], NULL, 10);
    uint64_t *took = calloc(count + 1, sizeof *took);
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(atoi(argv[1]), &cpus);
    check(sched_setaffinity(0, sizeof cpus, &cpus), "sched_setaffinity");

    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) {
        return 77;
    }
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    check(vm, "KVM_CREATE_VM");
    check(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
    check(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    uint8_t *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    /* Page tables that map 2 MiB to themselves; out dx, al; dec rcx; jnz to the first. */
    *(uint64_t *)(memory + 0x1000) = 0x2003;
    *(uint64_t *)(memory + 0x2000) = 0x3003;
    *(uint64_t *)(memory + 0x3000) = 0x83;
    memcpy(memory + CODE, "\xee\x48\xff\xc9\x75\xfa", 6);
    struct kvm_userspace_memory_region region = {.memory_size = MEMORY, .userspace_addr = (uintptr_t)memory};
    check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    int vcpu = make_vcpu(kvm, vm);
    int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    check(size, "KVM_GET_VCPU_MMAP_SIZE");
    volatile struct kvm_run *run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);

    uint64_t first_ns = nanoseconds(), first_ticks = __rdtsc();
    for (uint64_t n = 0; n < skip + count; n++) {
        uint64_t before = __rdtsc();
        int result = ioctl(vcpu, KVM_RUN, 0);
        uint64_t after = __rdtsc();
        if (result != 0 || run->exit_reason != KVM_EXIT_IO || run->io.port != PORT) {
            fprintf(stderr, "KVM_RUN gave %d, exit reason %u\n", result, run->exit_reason);
            return 1;
        }
        if (n >= skip) {
            took[n - skip] = after - before;
        }
    }
    double rate = (double)(__rdtsc() - first_ticks) / (double)(nanoseconds() - first_ns);
    qsort(took, count, sizeof *took, by_size);
    printf("%.1f\n", (double)took[count / 2] / rate);
    return 0;
}
