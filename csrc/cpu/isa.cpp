// Chooses the instruction set: the best that the processor has, or what fd_set_isa asks for.
#include "isa.h"

#if defined(FD_BFLOAT16_SETS) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastdreamer {
namespace {

#ifdef FD_AMX_EMULATED
constexpr bool kEmulated = true;  // the tiles of AMX, among portable code
#else
constexpr bool kEmulated = false;
#endif

// Whether the processor has AMX in bfloat16 and the system keeps its tiles for this process, which
// Linux does where it is asked to.
bool has_tiles() {
#if defined(FD_BFLOAT16_SETS) && defined(__linux__)
  constexpr unsigned kOsSavesState = 1u << 27, kBfloat16 = 1u << 22, kTiles = 1u << 24;
  constexpr unsigned kTileState = 3u << 17;  // XCR0: configuration and data
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsSavesState)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & kBfloat16) || !(d & kTiles)) return false;
  __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  if ((a & kTileState) != kTileState) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has(int32_t isa) {
#ifdef FD_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == FD_ISA_AVX2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (isa == FD_ISA_AVX512) return avx512;
#ifdef FD_BFLOAT16_SETS
  const bool bfloat16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == FD_ISA_AVX512BF16) return bfloat16;
  if (isa == FD_ISA_AMX) return kEmulated || (bfloat16 && has_tiles());
#endif
#endif
  return isa == FD_ISA_PORTABLE;
}

int32_t best() {
  for (int32_t isa = FD_ISA_AMX; isa > FD_ISA_PORTABLE; --isa)
    if (has(isa)) return isa;
  return FD_ISA_PORTABLE;
}

int32_t chosen = -1;

}  // namespace

int32_t current_isa() {
  if (chosen < 0) chosen = best();
  return chosen;
}

int32_t extended_isa() {
  const int32_t isa = current_isa();
  if (kEmulated && isa == FD_ISA_AMX) return FD_ISA_PORTABLE;
  return isa > FD_ISA_AVX512 ? FD_ISA_AVX512 : isa;
}

int32_t product_isa(int32_t compute) {
  return compute == FD_BFLOAT16 ? current_isa() : extended_isa();
}

}  // namespace fastdreamer

int32_t fd_isa(void) { return fastdreamer::current_isa(); }

int32_t fd_set_isa(int32_t isa) {
  if (isa < FD_ISA_PORTABLE || isa > FD_ISA_AMX || !fastdreamer::has(isa)) return FD_ERROR_ISA;
  fastdreamer::chosen = isa;
  return FD_OK;
}
