// Chooses the instruction set: the best that the processor has, or what fd_set_isa asks for.
#include "isa.h"

namespace fastdreamer {
namespace {

bool has(int32_t isa) {
#ifdef FD_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == FD_ISA_AVX2) return avx2;
  if (isa == FD_ISA_AVX512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == FD_ISA_PORTABLE;
}

int32_t best() {
  for (int32_t isa = FD_ISA_AVX512; isa > FD_ISA_PORTABLE; --isa)
    if (has(isa)) return isa;
  return FD_ISA_PORTABLE;
}

int32_t chosen = -1;

}  // namespace

int32_t current_isa() {
  if (chosen < 0) chosen = best();
  return chosen;
}

}  // namespace fastdreamer

int32_t fd_isa(void) { return fastdreamer::current_isa(); }

int32_t fd_set_isa(int32_t isa) {
  if (isa < FD_ISA_PORTABLE || isa > FD_ISA_AVX512 || !fastdreamer::has(isa)) return FD_ERROR_ISA;
  fastdreamer::chosen = isa;
  return FD_OK;
}
