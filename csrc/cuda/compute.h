// The types that products are computed in, and the tile that a warp computes: 16 rows of A, from
// shared memory, times 8 columns of packed weights, added in float32.
//
// The layout is that of mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"). With
// group = lane / 4 and pair = lane % 4, a lane holds
//   of A   rows group and group + 8, columns 2 pair + {0, 1} and 2 pair + 8 + {0, 1}
//   of B   rows 2 pair + {0, 1} and 2 pair + 8 + {0, 1}, column group
//   of C   rows group and group + 8, columns 2 pair + {0, 1}
#ifndef FASTDREAMER_CUDA_COMPUTE_H
#define FASTDREAMER_CUDA_COMPUTE_H

#include <string.h>

#include "block.h"

namespace fastdreamer {

constexpr int kTileRows = 16, kTileColumns = 8;
constexpr int kChunk = 32;                               // inputs that a lane loads weights of at once
constexpr int kLaneWeights = kChunk * kTileColumns / kWarp;  // 8: two fragments of B
constexpr int kChunkWeights = kWarp * kLaneWeights;

struct alignas(8) Accumulator {
  float c[4];
};

// Where a weight lies in its chunk, as (input, column of the tile); the inverse of packed_place.
struct Place {
  int input, column;
};
FD_FN Place packed_weight(int at) {
  const int lane = at / kLaneWeights, i = at % kLaneWeights;
  return {i / 4 * 16 + i % 4 / 2 * 8 + lane % 4 * 2 + i % 2, lane / 4};
}
FD_FN int packed_place(int input, int column) {
  const int lane = column * 4 + input % 8 / 2;
  return lane * kLaneWeights + input / 16 * 4 + input % 16 / 8 * 2 + input % 2;
}

struct Float32 {
  using Scalar = float;
  FD_FN static float from(float x) { return x; }
  FD_FN static float to(float x) { return x; }

  // acc += a chunk of the rows a, `stride` apart, times one of packed weights: for MT tiles of rows
  // and NT of columns, whose rows may differ.
  template <int MT, int NT>
  FD_FN static void multiply(
      Lanes<Accumulator> (&acc)[MT][NT], const float* const (&a)[NT], int stride,
      const float* const (&w)[NT]) {
    by_lane([&](int lane, int slot) {
      const int group = lane / 4, pair = lane % 4;
#pragma unroll 4
      for (int k = 0; k < kChunk; ++k)
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const float w0 = w[n][packed_place(k, 2 * pair)], w1 = w[n][packed_place(k, 2 * pair + 1)];
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            const float* row = a[n] + (m * kTileRows + group) * stride + k;
            float* c = acc[m][n].value[slot].c;
            c[0] += row[0] * w0, c[1] += row[0] * w1;
            c[2] += row[8 * stride] * w0, c[3] += row[8 * stride] * w1;
          }
        }
    });
  }
};

struct Bfloat16 {
  using Scalar = uint16_t;  // the upper half of a float

  FD_FN static uint16_t from(float x) {  // to the nearest, halves to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  FD_FN static float to(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }

  struct alignas(16) Four {  // two values of bfloat16 in each
    uint32_t x[4];
  };

  template <int MT, int NT>
  FD_FN static void multiply(
      Lanes<Accumulator> (&acc)[MT][NT], const uint16_t* const (&a)[NT], int stride,
      const uint16_t* const (&w)[NT]) {
    Lanes<Four> b[NT];
    by_lane([&](int lane, int slot) {
#pragma unroll
      for (int n = 0; n < NT; ++n)
        b[n].value[slot] = reinterpret_cast<const Four*>(w[n])[lane];
    });
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        Lanes<Four> part;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          if (n == 0 || a[n] != a[n - 1]) part = rows(a[n] + m * kTileRows * stride + k * 16, stride);
          mma(acc[m][n], part, b[n], k);
        }
      }
  }

  FD_FN static Lanes<Four> rows(const uint16_t* a, int stride) {
    Lanes<Four> part;
    by_lane([&](int lane, int slot) {
      const uint16_t* at = a + lane / 4 * stride + lane % 4 * 2;
      uint32_t* x = part.value[slot].x;
      x[0] = *reinterpret_cast<const uint32_t*>(at);
      x[1] = *reinterpret_cast<const uint32_t*>(at + 8 * stride);
      x[2] = *reinterpret_cast<const uint32_t*>(at + 8);
      x[3] = *reinterpret_cast<const uint32_t*>(at + 8 * stride + 8);
    });
    return part;
  }

  // c += a b for the k-th of the two fragments that lie in b.
  FD_FN static void mma(
      Lanes<Accumulator>& c, const Lanes<Four>& a, const Lanes<Four>& b, int k) {
#ifdef __CUDA_ARCH__
    float* d = c.value[0].c;
    const uint32_t *x = a.value[0].x, *y = b.value[0].x + 2 * k;
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
#else
    // The instruction: every lane's registers into two matrices, their product back into lanes.
    float left[16][16], right[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int group = lane / 4, pair = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const uint32_t both = a.value[lane].x[i / 2];
        left[group + i / 2 % 2 * 8][2 * pair + i % 2 + i / 4 * 8] = half(both, i % 2);
      }
      for (int i = 0; i < 4; ++i)
        right[2 * pair + i % 2 + i / 2 * 8][group] = half(b.value[lane].x[2 * k + i / 2], i % 2);
    }
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int j = 0; j < 16; ++j) c.value[lane].c[i] += left[row][j] * right[j][column];
      }
#endif
  }

 private:
  FD_FN static float half(uint32_t both, int i) {
    return to(static_cast<uint16_t>(both >> 16 * i));
  }
};

}  // namespace fastdreamer

#endif
