"""Builds csrc/ into plain C libraries inside fastdreamer.kernels.

FASTDREAMER_BUILD=0 skips the build; CXX chooses the compiler. The CUDA library is built where nvcc
12 and CMake are, if FASTDREAMER_CUDA is not 0.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel  # type: ignore[no-redef]


def find_compiler() -> str | None:
    """The first C++ compiler that accepts C++17."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        command = [name, "-std=c++17", "-x", "c++", "-fsyntax-only", "-"]
        if shutil.which(name) and subprocess.run(command, input=b"", **quiet).returncode == 0:
            return name
    return None


def accepts(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler knows these flags."""
    command = [compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=b"", capture_output=True, check=False).returncode == 0


def has_cuda() -> bool:
    """Whether nvcc is new enough for sm_90 and what CMakeLists.txt asks of it."""
    if os.environ.get("FASTDREAMER_CUDA") == "0" or not shutil.which("cmake"):
        return False
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not nvcc:
        return False
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)", version.stdout)
    return bool(release) and int(release[1]) >= 12


ENABLED = os.environ.get("FASTDREAMER_BUILD", "1") != "0"
COMPILER = find_compiler() if ENABLED else None
CUDA = COMPILER is not None and has_cuda()
# What CMakeLists.txt says, for a machine that has a compiler but no CMake.
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Icsrc", "-Icsrc/cpu"]
SIMD_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"]
PRODUCTS = {"gru_step", "norm_act", "rssm_imagine", "rssm_observe", "unimix"}  # of BFLOAT16's sets
ISAS: dict[str, list[str]] = {"portable": []}
BFLOAT16: dict[str, list[str]] = {}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ["-mavx2", "-mfma"]
    ISAS["avx512"] = [f"-mavx512{x}" for x in ("f", "bw", "dq", "vl")] + [
        "-mfma",
        "-mprefer-vector-width=512",
    ]
    BFLOAT16["avx512bf16"] = [*ISAS["avx512"], "-mavx512bf16"]
    BFLOAT16["amx"] = [*BFLOAT16["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
    if COMPILER and not accepts(COMPILER, BFLOAT16["amx"]):
        BFLOAT16.clear()


class CLibrary(Extension):
    """A shared library without Python in it, named like a module of its package."""


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        if shutil.which("cmake"):
            self.build_with_cmake(output)
        else:
            self.build_with_compiler(ext, output)

    def build_with_compiler(self, ext: Extension, output: Path) -> None:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        simd = sorted(glob("csrc/cpu/simd/*.cpp"))
        sets = ["-DFD_BFLOAT16_SETS"] * bool(BFLOAT16)
        units = [(source, "", sets) for source in ext.sources if source not in simd]
        for isa, flags in {**ISAS, **BFLOAT16}.items():
            chosen = [s for s in simd if isa in ISAS or Path(s).stem in PRODUCTS]
            units += [(s, isa, [f"-DFD_ISA={isa}", *SIMD_FLAGS, *flags]) for s in chosen]
        objects = []
        for source, isa, flags in units:
            objects.append(str(folder / f"{Path(source).stem}-{isa}.o"))
            command = [COMPILER, *FLAGS, *flags, "-c", source, "-o", objects[-1]]
            subprocess.run(command, check=True)
        subprocess.run([COMPILER, "-shared", *objects, "-o", str(output)], check=True)

    def build_with_cmake(self, output: Path) -> None:
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_COMPILER": COMPILER,
            "FASTDREAMER_OUTPUT_DIR": output.parent,
            "FASTDREAMER_CUDA": "ON" if CUDA else "OFF",
        }
        configure = ["cmake", "-S", ".", "-B", self.build_temp]
        subprocess.run([*configure, *(f"-D{k}={v}" for k, v in options.items())], check=True)
        target = output.stem.removeprefix("lib")
        build = ["cmake", "--build", self.build_temp, "--target", target, "--parallel"]
        subprocess.run(build, check=True)


class BuildPython(build_py):
    def run(self) -> None:
        if ENABLED and COMPILER is None:
            line = "fastdreamer: no C++17 compiler found: installing pure Python (slow)"
            print(line, file=sys.stderr)
        super().run()


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # The library knows nothing of Python: one wheel serves every Python 3 of a platform.
        tag = super().get_tag()
        return ("py3", "none", tag[2])


CPU_LIBRARY = CLibrary(
    "fastdreamer.kernels.libfastdreamer_cpu",
    sources=sorted(glob("csrc/cpu/**/*.cpp", recursive=True)),
    depends=["CMakeLists.txt", *sorted(glob("csrc/**/*.h", recursive=True))],
)

CUDA_LIBRARY = CLibrary(
    "fastdreamer.kernels.libfastdreamer_cuda",
    sources=sorted(glob("csrc/cuda/*.cu")),
    depends=CPU_LIBRARY.depends,
)

setup(
    packages=[*find_packages(include=["fastdreamer", "fastdreamer.*"]), "fastdreamer.kernels"],
    package_dir={"fastdreamer": "fastdreamer", "fastdreamer.kernels": "kernels"},
    ext_modules=[CPU_LIBRARY] * bool(COMPILER) + [CUDA_LIBRARY] * CUDA,
    cmdclass={"build_ext": BuildLibrary, "build_py": BuildPython, "bdist_wheel": PlatformWheel},
)
