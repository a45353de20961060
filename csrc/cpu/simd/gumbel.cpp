// Gumbel noise of the numbers of Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (2011).
#include "rows.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastdreamer {
namespace FD_ISA {
namespace {

typedef uint64_t LongVec __attribute__((vector_size(4 * kLanes)));

constexpr int kCounters = 16, kBlock = 4 * kCounters;

// The products of the lower halves.
inline LongVec multiply(LongVec x, uint64_t factor) {
#if defined(__AVX512F__)
  return LongVec(_mm512_maskz_mul_epu32(0xff, __m512i(x), __m512i(LongVec{} + factor)));
#elif defined(__AVX2__)
  return LongVec(_mm256_mul_epu32(__m256i(x), __m256i(LongVec{} + factor)));
#else
  return (x & 0xffffffff) * factor;
#endif
}

// The four words that follow from each counter, in the lower halves; the upper ones are arbitrary.
inline void philox(uint64_t key, LongVec counter, LongVec (&x)[4]) {
  x[0] = counter, x[1] = counter >> 32, x[2] = x[3] = LongVec{};
  uint64_t low = key, high = key >> 32;
  for (int round = 0; round < 10; ++round, low += 0x9E3779B9, high += 0xBB67AE85) {
    const LongVec a = multiply(x[0], 0xD2511F53), b = multiply(x[2], 0xCD9E8D57);
    x[0] = (b >> 32) ^ x[1] ^ low;
    x[2] = (a >> 32) ^ x[3] ^ high;
    x[1] = b, x[3] = a;
  }
}

// u, the middles of 2^23 equal parts of 0 .. 1: the first words of 16 counters, then their second,
// third and fourth ones.
inline void uniform_block(uint64_t key, uint64_t counter, float* u) {
  LongVec even;
  for (int i = 0; i < kLanes / 2; ++i) even[i] = counter + 2 * i;
  for (int i = 0; i < kCounters; i += kLanes) {
    LongVec a[4], b[4];
    philox(key, even + i, a);
    philox(key, even + i + 1, b);
    for (int word = 0; word < 4; ++word) {
      const LongVec both = (a[word] & 0xffffffff) | (b[word] << 32);
      const IntVec upper = (reinterpret_cast<IntVec>(both) >> 9) & 0x7fffff;
      store(u + word * kCounters + i, __builtin_convertvector(upper, Vec) * 0x1p-23f + 0x1p-24f);
    }
  }
}

// One pass for each logarithm: with both in one, few of their long chains would overlap.
void minus_log(float* x, int64_t n) {
  by_vectors(n, [&](int64_t i, int c) { store_some(x + i, -log(load_some(x + i, c, 1)), c); });
}

}  // namespace

// y = -log(-log u), n numbers from the first of a block on.
void gumbel_blocks(uint64_t key, int64_t block, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) uniform_block(key, kCounters * block++, y + i);
  if (i < n) {
    float rest[kBlock];
    uniform_block(key, kCounters * block, rest);
    copy(rest, y + i, n - i);
  }
  minus_log(y, n);
  minus_log(y, n);
}

}  // namespace FD_ISA
}  // namespace fastdreamer
