"""Builds fused_optim._C. Everything else about the package stands in pyproject.toml."""

import os
import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

SOURCES = [
    "csrc/module.cpp",
    "csrc/plan.cpp",
    "csrc/gather.cpp",
    "csrc/lay_out.cpp",
    "csrc/complete.cpp",
    "csrc/averages.cpp",
    "csrc/group.cpp",
    "csrc/storage.cpp",
    "csrc/codec.cpp",
    "csrc/shard.cpp",
    "csrc/scalars.cpp",
    "csrc/memory.cpp",
    "csrc/work.cpp",
    "csrc/tables.cpp",
    "csrc/view.cpp",
    "csrc/py.cpp",
    "csrc/layout.cpp",
    "csrc/norm.cpp",
    "csrc/parallel.cpp",
    "csrc/dispatch.cpp",
    "csrc/isa/baseline.cpp",
]
# Where sanitizers make the compiler slow, one instruction set is enough.
BASELINE_ONLY = os.environ.get("FUSED_OPTIM_BUILD_BASELINE_ONLY") == "1"
if platform.machine().lower() in ("x86_64", "amd64") and not BASELINE_ONLY:
    SOURCES += ["csrc/isa/avx2.cpp", "csrc/isa/avx512.cpp"]

# -ffp-contract=off: every instruction set gives the same bits. -fno-math-errno and
# -fno-trapping-math: without them, sqrt and guarded divisions stay scalar. -fno-unswitch-loops: GCC 12
# unswitches the tile loops into ones that it then does not vectorise.
COMPILE_ARGS = [
    os.environ.get("FUSED_OPTIM_BUILD_OPT", "-O3"),  # -O0 where sanitizers make the compiler slow
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-unswitch-loops",
    "-Wall",
    "-Wextra",
]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []

ParallelCompile().install()
setup(
    ext_modules=[
        Pybind11Extension(
            "fused_optim._C",
            SOURCES,
            depends=sorted(str(path) for path in Path("csrc").rglob("*.*")),
            cxx_std=17,
            define_macros=[("FUSED_OPTIM_BASELINE_ONLY", "1")] if BASELINE_ONLY else [],
            extra_compile_args=[] if sys.platform == "win32" else COMPILE_ARGS + OPENMP,
            extra_link_args=OPENMP,
            # Without a compiler the installation still succeeds: the stock path serves everything.
            optional=True,
        )
    ]
)
