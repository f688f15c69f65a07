"""Compile the kernel for CPUs, once for each instruction set, where there is a C++ compiler.

Without one, the installation succeeds all the same: PyTorch's operators do the work, more slowly.
Everything else about the package is in pyproject.toml.
"""

import hashlib
import platform
from pathlib import Path

from setuptools import Extension, setup

SOURCE, HEADER = "phatgoose/ops/cpu_kernels.cpp", "phatgoose/ops/cpu_vectors.h"
AVX2 = ["-mavx2", "-mfma"]
# PyTorch tells at run time which of them the processor understands (phatgoose/ops/compiled.py).
INSTRUCTION_SETS = {"any": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": AVX2,
        "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    }


def extension(name: str, options: list[str]) -> Extension:
    """Return a shared library without a Python interface.

    OpenMP is asked for when compiling and not when linking: at run time, the library takes the
    symbols of the OpenMP that PyTorch has loaded.
    """
    source = b"".join(Path(file).read_bytes() for file in (SOURCE, HEADER))
    digest = hashlib.sha256(source).hexdigest()[:12]
    return Extension(
        f"phatgoose_cpu_{name}",
        [SOURCE],
        depends=[HEADER],
        language="c++",
        define_macros=[("PHATGOOSE_SOURCE", f'"{digest}"')],
        extra_compile_args=["-std=c++17", "-O3", "-g0", *OPENMP, *options],
        optional=True,
    )


# Clang on a Mac comes without OpenMP.
OPENMP = [] if platform.system() == "Darwin" else ["-fopenmp"]

setup(ext_modules=[extension(name, options) for name, options in INSTRUCTION_SETS.items()])
