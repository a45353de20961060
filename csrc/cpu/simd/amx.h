// The tile instructions of AMX in bfloat16: the compiler's own, or with FD_AMX_EMULATED a software
// model of them for machines without any. The names and arguments are the compiler's.
#ifndef FASTDREAMER_CPU_SIMD_AMX_H
#define FASTDREAMER_CPU_SIMD_AMX_H

#include <stdint.h>

namespace fastdreamer {
namespace FD_ISA {

// What _tile_loadconfig reads, by palette 1: up to 16 rows of up to 64 bytes for 8 tiles.
struct TileConfig {
  uint8_t palette, start_row, zeros[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "as the instruction reads it");

}  // namespace FD_ISA
}  // namespace fastdreamer

#ifndef FD_AMX_EMULATED

#include <immintrin.h>

#else

#include <math.h>
#include <stdlib.h>
#include <string.h>

namespace fastdreamer {
namespace FD_ISA {

// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: the operations of
// LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED and TDPBF16PS. Where the processor would
// raise an exception, the program ends.
struct TileState {
  TileConfig config;
  uint8_t rows[8][16][64];
};
inline thread_local TileState tile_state;

static inline int tile_rows(int t) {
  if (tile_state.config.palette != 1 || t < 0 || t > 7 || tile_state.config.rows[t] == 0) abort();
  return tile_state.config.rows[t];
}
static inline int tile_bytes(int t) { return tile_rows(t) ? tile_state.config.row_bytes[t] : 0; }

static inline void _tile_loadconfig(const void* memory) {
  memset(&tile_state, 0, sizeof tile_state);
  TileConfig& config = tile_state.config;
  memcpy(&config, memory, sizeof config);
  bool valid = config.palette == 1 && config.start_row == 0;
  for (uint8_t zero : config.zeros) valid &= zero == 0;
  for (int t = 0; t < 16; ++t) {
    const bool used = config.rows[t] > 0;
    valid &= used == (config.row_bytes[t] > 0) && config.rows[t] <= 16 &&
             config.row_bytes[t] <= 64 && config.row_bytes[t] % 4 == 0 && (t < 8 || !used);
  }
  if (!valid) abort();
}
static inline void _tile_release() { memset(&tile_state, 0, sizeof tile_state); }

static inline void _tile_zero(int t) {
  tile_rows(t);
  memset(tile_state.rows[t], 0, sizeof tile_state.rows[t]);
}
static inline void _tile_loadd(int t, const void* memory, int64_t stride) {
  _tile_zero(t);
  for (int row = 0; row < tile_rows(t); ++row)
    memcpy(tile_state.rows[t][row], static_cast<const char*>(memory) + row * stride, tile_bytes(t));
}
static inline void _tile_stored(int t, void* memory, int64_t stride) {
  for (int row = 0; row < tile_rows(t); ++row)
    memcpy(static_cast<char*>(memory) + row * stride, tile_state.rows[t][row], tile_bytes(t));
}

// Subnormal numbers are taken, and left, as zeros.
static inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0, x) : x; }
static inline float tile_value(const uint8_t* row, int element) {
  uint16_t half;
  memcpy(&half, row + 2 * element, 2);
  const uint32_t whole = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &whole, 4);
  return flushed(value);
}

// Sums of even and of odd factors, in the order of the rows of b, then their sum added to c.
static inline void _tile_dpbf16ps(int c, int a, int b) {
  const int columns = tile_bytes(c) / 4, depth = tile_bytes(a) / 4;
  if (tile_rows(c) != tile_rows(a) || depth != tile_rows(b) || columns != tile_bytes(b) / 4) abort();
  for (int m = 0; m < tile_rows(c); ++m) {
    float parts[32] = {};
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < 2 * columns; ++n) {
        const float x = tile_value(tile_state.rows[a][m], 2 * k + n % 2);
        parts[n] = flushed(fmaf(x, tile_value(tile_state.rows[b][k], n), parts[n]));
      }
    for (int n = 0; n < columns; ++n) {
      float* sums = reinterpret_cast<float*>(tile_state.rows[c][m]);
      sums[n] = flushed(flushed(sums[n]) + flushed(parts[2 * n] + parts[2 * n + 1]));
    }
  }
}

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif

#endif
