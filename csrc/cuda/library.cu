// What belongs to the library as a whole: its version, its errors, the device.
#include "launch.h"

namespace fastdreamer {

int32_t current_device(Device* device) {
  int index = 0, major = 0;
  if (int32_t error = error_of(cudaGetDevice(&index))) return error;
  const auto get = [&](int* to, cudaDeviceAttr what) {
    return error_of(cudaDeviceGetAttribute(to, what, index));
  };
  if (int32_t error = get(&device->multiprocessors, cudaDevAttrMultiProcessorCount)) return error;
  if (int32_t error = get(&device->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin)) return error;
  if (int32_t error = get(&major, cudaDevAttrComputeCapabilityMajor)) return error;
  if (int32_t error = get(&device->cache, cudaDevAttrL2CacheSize)) return error;
  device->clusters = major >= 9;
  return major >= 8 ? FD_OK : FD_ERROR_UNSUPPORTED;
}

}  // namespace fastdreamer

int32_t fd_abi_version(void) { return FD_ABI_VERSION; }

const char* fd_error_string(int32_t error) {
  switch (error) {
    case FD_OK: return "no error";
    case FD_ERROR_NULL_POINTER: return "a tensor or its strides is a null pointer";
    case FD_ERROR_SIZE: return "a size is out of range";
    case FD_ERROR_DTYPE: return "this dtype is not supported";
    case FD_ERROR_UNSUPPORTED: return "the device takes no model of this size";
    case FD_ERROR_WORKSPACE: return "the workspace is too small or not aligned to 16 bytes";
    default: break;
  }
  if (error < FD_ERROR_DEVICE) return "unknown error code";
  return cudaGetErrorString(static_cast<cudaError_t>(error - FD_ERROR_DEVICE));
}
