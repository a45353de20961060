// The CUDA library's functions on the host, for tests: its kernels run on threads.
#include "rssm_imagine.cu"
#include "rssm_observe.cu"
#include "rssm_observe_backward.cu"

namespace fastdreamer {

int emulated_warps = 1;
static Device emulated_device{1, 1 << 20, false, 1 << 28};

int32_t current_device(Device* device) {
  *device = emulated_device;
  return FD_OK;
}

}  // namespace fastdreamer

// The device to emulate: how many blocks run at once, of how many warps, with how much shared
// memory, whether in clusters, and its cache.
extern "C" FD_API void fd_emulate(
    int32_t blocks, int32_t warps, int32_t shared, int32_t clusters, int32_t cache) {
  fastdreamer::emulated_device = {blocks, shared, clusters != 0, cache};
  fastdreamer::emulated_warps = warps;
}

int32_t fd_abi_version(void) { return FD_ABI_VERSION; }
const char* fd_error_string(int32_t) { return "an error of the emulated library"; }
