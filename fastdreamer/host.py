"""Settings of the process that make it faster without changing a number."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let glibc keep freed activations instead of returning their pages at once.

    An update allocates and frees gigabytes in large blocks; by default each is mapped and zeroed
    by the kernel anew. Returns whether it was done (glibc only).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    limit = 2**31 - 1
    settings = ((_M_MMAP_THRESHOLD, limit), (_M_TRIM_THRESHOLD, limit), (_M_TOP_PAD, 2**26))
    return all([libc.mallopt(name, value) for name, value in settings])
