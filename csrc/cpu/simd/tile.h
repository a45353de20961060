// kLanes rows of a matrix, transposed: element k of every row in one vector, so that rows of a few
// elements still fill it.
#ifndef FASTDREAMER_CPU_SIMD_TILE_H
#define FASTDREAMER_CPU_SIMD_TILE_H

#include "gemm.h"
#include "lanes.h"

namespace fastdreamer {
namespace FD_ISA {

// kLanes rows of `size` contiguous elements, size <= kLanes, to element k of every row in v[k]. The
// squares leave the rows in another order, which the last shuffle undoes.
template <int size, int... lane>
static inline void read_narrow(const float* x, Vec* v, Lanes<lane...>) {
  constexpr int beside = kLanes / size;
  for (int i = 0; i < size; ++i) v[i] = load(x + i * kLanes);
  transpose<size>(v);
  for (int i = 0; i < size; ++i)
    v[i] = shuffle(v[i], v[i], Lanes<(lane % beside * size + lane / beside)...>());
}

// The inverse of read_narrow.
template <int size, int... lane>
static inline void write_narrow(float* x, Vec* v, Lanes<lane...>) {
  constexpr int beside = kLanes / size;
  for (int i = 0; i < size; ++i)
    v[i] = shuffle(v[i], v[i], Lanes<(lane % size * beside + lane / size)...>());
  transpose<size>(v);
  for (int i = 0; i < size; ++i) store(x + i * kLanes, v[i]);
}

class Tile {
 public:
  explicit Tile(int64_t K) : K_(K), data_(K * kLanes) {}

  Vec get(int64_t k) const { return load(at(k)); }
  void set(int64_t k, Vec x) { store(at(k), x); }

  // Rows of K contiguous elements; lanes without a row become 0.
  void read(const float* x, int rows) {
    if (rows < kLanes) {
      for (int64_t k = 0; k < K_; ++k) set(k, Vec{});
      return read_columns(0, x, rows);
    }
    if (K_ == 2) return read_all<2>(x);
    if (K_ == 4) return read_all<4>(x);
    if (K_ == 8 && kLanes >= 8) return read_all<8>(x);
    const int64_t square = K_ / kLanes * kLanes;
    for (int64_t k = 0; k < square; k += kLanes) {
      Vec v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = load(x + i * K_ + k);
      transpose<kLanes>(v);
      for (int i = 0; i < kLanes; ++i) set(k + i, v[i]);
    }
    read_columns(square, x, kLanes);
  }

  void write(float* x, int rows) const {
    if (rows < kLanes) return write_columns(0, x, rows);
    if (K_ == 2) return write_all<2>(x);
    if (K_ == 4) return write_all<4>(x);
    if (K_ == 8 && kLanes >= 8) return write_all<8>(x);
    const int64_t square = K_ / kLanes * kLanes;
    for (int64_t k = 0; k < square; k += kLanes) {
      Vec v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = get(k + i);
      transpose<kLanes>(v);
      for (int i = 0; i < kLanes; ++i) store(x + i * K_ + k, v[i]);
    }
    write_columns(square, x, kLanes);
  }

 private:
  float* at(int64_t k) const { return data_.get() + k * kLanes; }

  void read_columns(int64_t first, const float* x, int rows) {
    for (int64_t k = first; k < K_; ++k)
      for (int i = 0; i < rows; ++i) at(k)[i] = x[i * K_ + k];
  }
  void write_columns(int64_t first, float* x, int rows) const {
    for (int64_t k = first; k < K_; ++k)
      for (int i = 0; i < rows; ++i) x[i * K_ + k] = at(k)[i];
  }

  // kLanes rows of K <= kLanes elements, which lie in K whole vectors.
  template <int K>
  void read_all(const float* x) {
    constexpr int size = K < kLanes ? K : kLanes;
    Vec v[size];
    read_narrow<size>(x, v, AllLanes());
    for (int k = 0; k < size; ++k) set(k, v[k]);
  }
  template <int K>
  void write_all(float* x) const {
    constexpr int size = K < kLanes ? K : kLanes;
    Vec v[size];
    for (int k = 0; k < size; ++k) v[k] = get(k);
    write_narrow<size>(x, v, AllLanes());
  }

  int64_t K_;
  Buffer data_;
};

}  // namespace FD_ISA
}  // namespace fastdreamer

#endif
