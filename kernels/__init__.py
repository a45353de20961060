"""Dreamer's operators: plain PyTorch references and the compiled libraries that serve them.

Use `resolve` to choose a backend once, then call the operators of the `Ops` it returns. Nothing
here knows of agents, configurations or environments, so other Dreamer code can use it alone.
"""

if __name__ != "fastdreamer.kernels":
    raise ImportError(f"import this package as fastdreamer.kernels, not as {__name__}")

from .ops import BACKENDS, Ops, resolve

__all__ = ["BACKENDS", "Ops", "resolve"]
