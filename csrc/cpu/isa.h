// Which instruction set the kernels of simd/ use. They are compiled once for each, in a namespace
// of its own; `dispatch` calls the one of the current set.
#ifndef FASTDREAMER_CPU_ISA_H
#define FASTDREAMER_CPU_ISA_H

#include "fastdreamer.h"

#if defined(__x86_64__)
#define FD_X86 1
#define FD_ISA_CASES(call)                     \
  case FD_ISA_AVX512: return avx512::call;     \
  case FD_ISA_AVX2: return avx2::call;
#define FD_DECLARE(declaration)                \
  namespace avx512 { declaration; }            \
  namespace avx2 { declaration; }              \
  namespace portable { declaration; }
#else
#define FD_ISA_CASES(call)
#define FD_DECLARE(declaration) namespace portable { declaration; }
#endif

// Returns what `call` returns, in the namespace of the current instruction set.
#define FD_DISPATCH(call)              \
  switch (current_isa()) {             \
    FD_ISA_CASES(call)                 \
    default: return portable::call;    \
  }

namespace fastdreamer {

int32_t current_isa();

}  // namespace fastdreamer

#endif
