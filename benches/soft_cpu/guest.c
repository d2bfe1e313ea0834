/* The workloads of the bench of the software CPU: bare code for ring 0, which runs at a fixed address with memory from
 * HEAP on. A workload is called with how often it does its work, and returns a checksum. */
#include <emmintrin.h>
#include <stdint.h>

typedef uint64_t u64;
typedef uint32_t u32;
typedef uint8_t u8;
typedef u64 function(u64, u64 *);

#define HEAP ((u8 *)0x1000000)
#define PLAIN __attribute__((noinline))

/* Written by soft_cpu.py. */
extern function *const functions[];
extern const u64 function_count;

static u64 next(u64 *state) { return *state = *state * 6364136223846793005u + 1442695040888963407u; }

PLAIN static u64 integer(u64 count) {
  u64 a = 1, b = 2;
  for (u64 i = 0; i < 1000 * count; i++) {
    a ^= a << 7;
    b += a * 5 + 3;
    a ^= b >> 9;
    b = (b << 3 | b >> 61) - a;
  }
  return a ^ b;
}

PLAIN static u64 sieve(u64 count) {
  enum { SIZE = 100000 };
  u8 *composite = HEAP;
  u64 primes = 0;
  while (count--) {
    for (u32 i = 0; i < SIZE; i++) composite[i] = 0;
    for (u32 i = 2; i < SIZE; i++) {
      if (composite[i]) continue;
      primes++;
      for (u32 k = 2 * i; k < SIZE; k += i) composite[k] = 1;
    }
  }
  return primes;
}

PLAIN static u64 memory(u64 count) {
  enum { WORDS = 8192 };
  u64 *words = (u64 *)HEAP;
  for (u32 i = 0; i < WORDS; i++) words[i] = i;
  while (count--) {
    for (u32 i = 0; i < WORDS; i++) words[i] += i ^ count;
  }
  return words[77];
}

PLAIN static u64 sse_copy(u64 count) {
  enum { VECTORS = 4096 };
  __m128i *from = (__m128i *)HEAP, *to = from + VECTORS, sum = _mm_set1_epi32(3);
  for (u32 i = 0; i < VECTORS; i++) from[i] = _mm_set1_epi32(i);
  while (count--) {
    for (u32 i = 0; i < VECTORS; i += 2) {
      __m128i a = _mm_load_si128(from + i), b = _mm_loadu_si128(from + i + 1);
      sum = _mm_xor_si128(_mm_add_epi32(sum, a), b);
      _mm_store_si128(to + i, sum);
      _mm_storeu_si128(to + i + 1, b);
    }
  }
  return _mm_cvtsi128_si32(sum);
}

static u32 rotate(u32 x, int n) { return x >> n | x << (32 - n); }

static u32 sha_k[64];

PLAIN static void sha256_block(u32 *h, const u8 *data) {
  u32 w[64], s[8];
  for (int i = 0; i < 16; i++) w[i] = __builtin_bswap32(((const u32 *)data)[i]);
  for (int i = 16; i < 64; i++) {
    u32 a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + w[i - 7] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
  }
  for (int i = 0; i < 8; i++) s[i] = h[i];
  for (int i = 0; i < 64; i++) {
    u32 e = s[4], a = s[0];
    u32 t = s[7] + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & s[5]) ^ (~e & s[6])) + sha_k[i] + w[i];
    u32 m = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
    s[7] = s[6], s[6] = s[5], s[5] = e, s[4] = s[3] + t, s[3] = s[2], s[2] = s[1], s[1] = a, s[0] = t + m;
  }
  for (int i = 0; i < 8; i++) h[i] += s[i];
}

PLAIN static u64 sha256(u64 count) {
  u32 h[8];
  u64 random = 1;
  for (int i = 0; i < 64; i++) sha_k[i] = next(&random) >> 32;
  for (int i = 0; i < 8; i++) h[i] = next(&random) >> 32;
  for (u32 i = 0; i < 4096; i++) HEAP[i] = i * 7;
  while (count--) {
    for (u32 i = 0; i < 4096; i += 64) sha256_block(h, HEAP + i);
  }
  return h[0];
}

PLAIN static u64 crc32(u64 count) {
  u32 *table = (u32 *)HEAP, crc = ~0u;
  u8 *data = HEAP + 4096;
  for (u32 i = 0; i < 256; i++) {
    u32 c = i;
    for (int k = 0; k < 8; k++) c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
    table[i] = c;
  }
  for (u32 i = 0; i < 65536; i++) data[i] = i * 7;
  while (count--) {
    for (u32 i = 0; i < 65536; i++) crc = table[(crc ^ data[i]) & 255] ^ crc >> 8;
  }
  return crc;
}

/* Without the optimiser's unrolling of the recursion. */
__attribute__((noipa, optimize("O1"))) static u64 fibonacci(u64 n) {
  return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

PLAIN static u64 fib(u64 count) {
  u64 sum = 0;
  while (count--) sum += fibonacci(20);
  return sum;
}

PLAIN static void sort(u32 *first, u32 *last) {
  while (first < last) {
    u32 *i = first - 1, *k = last + 1, pivot = first[(last - first) / 2];
    for (;;) {
      do i++;
      while (*i < pivot);
      do k--;
      while (*k > pivot);
      if (i >= k) break;
      u32 t = *i;
      *i = *k;
      *k = t;
    }
    sort(first, k);
    first = k + 1;
  }
}

PLAIN static u64 quicksort(u64 count) {
  enum { ITEMS = 20000 };
  u32 *items = (u32 *)HEAP;
  u64 random = 1, sum = 0;
  while (count--) {
    for (u32 i = 0; i < ITEMS; i++) items[i] = next(&random) >> 32;
    sort(items, items + ITEMS - 1);
    sum += items[ITEMS / 2];
  }
  return sum;
}

struct node {
  struct node *next;
  u64 value;
};

PLAIN static u64 list(u64 count) {
  enum { NODES = 1 << 16 };
  struct node *nodes = (struct node *)HEAP, *at = nodes;
  u64 sum = 0;
  /* An odd step and a multiplier of the form 4n + 1 visit all. */
  for (u32 i = 0, k = 0; i < NODES; i++) {
    u32 after = (k * 0x9e35u + 0x3039) & (NODES - 1);
    nodes[k].next = nodes + after;
    nodes[k].value = i;
    k = after;
  }
  for (u64 i = 0; i < count * NODES; i++) {
    sum += at->value;
    at = at->next;
  }
  return sum;
}

PLAIN static u64 large(u64 count) {
  u64 a = 1, random = 1;
  for (u64 i = 0; i < 1000 * count; i++) a = functions[(next(&random) >> 33) % function_count](a, (u64 *)HEAP);
  return a;
}

PLAIN static u64 once(u64 count) {
  u64 a = 1;
  while (count--) {
    for (u64 i = 0; i < function_count; i++) a = functions[i](a, (u64 *)HEAP);
  }
  return a;
}

PLAIN u64 work(u64 workload, u64 count) {
  static u64 (*const workloads[])(u64) = {integer, sieve,     memory, sse_copy, sha256, crc32,
                                          fib,     quicksort, list,   large,    once};
  return workloads[workload](count);
}

/* Called with the workload in RDI, the count in RSI and a stack. */
__asm__(".section .entry, \"ax\"\n.globl _start\n_start: call work\nhlt\n.text\n");
