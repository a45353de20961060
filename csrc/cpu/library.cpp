// What belongs to the library as a whole: its version and the names of its errors.
#include "fastdreamer.h"

int32_t fd_abi_version(void) { return FD_ABI_VERSION; }

const char* fd_error_string(int32_t error) {
  switch (error) {
    case FD_OK: return "no error";
    case FD_ERROR_NULL_POINTER: return "a tensor or its strides is a null pointer";
    case FD_ERROR_SIZE: return "a size is out of range";
    case FD_ERROR_DTYPE: return "this dtype is not supported";
    case FD_ERROR_ISA: return "this processor lacks the instruction set";
    case FD_ERROR_INDEX: return "the index of a class is out of range";
    case FD_ERROR_UNSUPPORTED: return "the device takes no model of this size";
    case FD_ERROR_WORKSPACE: return "the workspace is too small or not aligned to 16 bytes";
    default: return "unknown error code";
  }
}
