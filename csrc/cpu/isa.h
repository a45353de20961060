// Which instruction set the kernels of simd/ use. They are compiled once for each, in a namespace
// of its own; `dispatch` calls the one of the current set.
#ifndef FASTDREAMER_CPU_ISA_H
#define FASTDREAMER_CPU_ISA_H

#include "fastdreamer.h"

// The sets with products in bfloat16, where the compiler has them, serve what is asked for in bfloat16
// of the sources with products, and of norms for their rounding (FD_..._PRODUCTS); the set that they
// extend serves the rest.
#ifdef FD_BFLOAT16_SETS
#define FD_PRODUCT_CASES(...)                             \
  case FD_ISA_AMX: return amx::__VA_ARGS__;               \
  case FD_ISA_AVX512BF16: return avx512bf16::__VA_ARGS__;
#define FD_DECLARE_PRODUCTS(...)          \
  FD_DECLARE(__VA_ARGS__)                 \
  namespace amx { __VA_ARGS__; }          \
  namespace avx512bf16 { __VA_ARGS__; }
#else
#define FD_PRODUCT_CASES(...)
#define FD_DECLARE_PRODUCTS(...) FD_DECLARE(__VA_ARGS__)
#endif

#if defined(__x86_64__)
#define FD_X86 1
#define FD_ISA_CASES(...)                         \
  case FD_ISA_AVX512: return avx512::__VA_ARGS__; \
  case FD_ISA_AVX2: return avx2::__VA_ARGS__;
#define FD_DECLARE(...)                \
  namespace avx512 { __VA_ARGS__; }    \
  namespace avx2 { __VA_ARGS__; }      \
  namespace portable { __VA_ARGS__; }
#else
#define FD_ISA_CASES(...)
#define FD_DECLARE(...) namespace portable { __VA_ARGS__; }
#endif

// Returns what `call` returns, in the namespace of the current instruction set.
#define FD_DISPATCH(...)                    \
  switch (extended_isa()) {                 \
    FD_ISA_CASES(__VA_ARGS__)               \
    default: return portable::__VA_ARGS__;  \
  }
#define FD_DISPATCH_PRODUCTS(compute, ...)  \
  switch (product_isa(compute)) {           \
    FD_PRODUCT_CASES(__VA_ARGS__)           \
    FD_ISA_CASES(__VA_ARGS__)               \
    default: return portable::__VA_ARGS__;  \
  }

namespace fastdreamer {

int32_t current_isa();

// The set that the current one extends, or itself.
int32_t extended_isa();

// The set for products whose factors are FD_FLOAT32 or FD_BFLOAT16.
int32_t product_isa(int32_t compute);

}  // namespace fastdreamer

#endif
