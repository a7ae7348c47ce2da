"""Constants of one compilation of `multi_tensor`, and the numbers it is tuned with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton.language as tl

from . import prepare
from .multi_tensor import KEPT, STREAMS
from .rules import RULES
from .streams import STORAGES

# Storage types that a kernel reads, by the name that torch gives them.
DTYPES = {
    "float32": tl.float32,
    "float64": tl.float64,
    "bfloat16": tl.bfloat16,
    "float16": tl.float16,
}
NBITS = {"float32": 32, "float64": 64, "bfloat16": 16, "float16": 16, "int8": 8, "uint8": 8}
# Storage -> (dtype of its elements in memory, or None: the stream's own, as bit patterns; dtype of its scales
# or remainder).
PACKED = {
    "stochastic": (None, None),
    "signed8": (tl.int8, tl.uint16),
    "root8": (tl.uint8, tl.uint16),
    "split8": (None, tl.int8),
    "split16": (None, tl.int16),
}
# Tensors that one program of `prepare` takes: one per thread.
PREPARE_BLOCK = 128
# triton.compile's options for both kernels. Fusing a multiplication into an addition saves a rounding,
# which the C++ kernels, whose bits these are to equal, do not save.
COMPILE_OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Specialization:
    """The constants of one compilation of `multi_tensor`.

    Attributes:
        rule: key of RULES.
        dtypes: names of the storage types of param, grad, all states of the rule, and the EMA; None:
            there is no such state, or no EMA.
        storages: of the same streams, see streams.py; what is packed has the dtype that it stands for, or
            that of its codes.
        grad_write: what is left in the grads, see multi_tensor.py.
        warp_size: threads of a warp: 32, or 64 on AMD's gfx9.
        interpreted: for Triton's interpreter.
    """

    rule: str
    dtypes: tuple[str | None, ...]
    storages: tuple[str, ...]
    grad_write: int = KEPT.value
    warp_size: int = 32
    interpreted: bool = False

    def __post_init__(self) -> None:
        rule = RULES[self.rule]
        assert len(self.there) == len(rule.states), self
        assert all(there or rule.optional >> s & 1 for s, there in enumerate(self.there)), self

    @property
    def there(self) -> tuple[bool, ...]:
        """Of each state whether there is one."""
        return tuple(dtype is not None for dtype in self.dtypes[2:-1])

    @property
    def compute(self) -> tl.dtype:
        return tl.float64 if "float64" in self.dtypes else tl.float32

    @property
    def word(self) -> tl.dtype:
        """The dtype that holds the bits of a hyper."""
        return tl.int64 if self.compute is tl.float64 else tl.int32

    @property
    def is_packed(self) -> bool:
        return any(storage != "plain" for storage in self.storages)

    @property
    def parts(self) -> int:
        """Tensors that a block comes in, see streams.py: with 2, a thread has both elements of a pair.

        With 4, Adam's states of 8 bits take 159 registers on sm_90 instead of 101 (Triton 3.9).
        """
        return 2 if self.is_packed else 1

    @property
    def num_warps(self) -> int:
        """One where something special may send a whole block another way: no warp has to wait for others."""
        return 1 if self.is_packed else 4

    @property
    def block(self) -> int:
        """Elements in flight: 128 bits of a thread's in each stream or part, where that is possible.

        So a thread has 4 elements, whatever the dtypes, so that no layout is converted. For float32, sm_90
        takes 32 to 56 registers then; for 16 elements 124 to 168, and for 32 it spills. Where all streams
        have 16 bits, 8 are 128 bits; in float64, which is not mixed with others, 2 are, and 4 spill in
        centered RMSprop on sm_80. The interpreter pays per block, not per element.
        """
        if self.interpreted:
            return 8192
        nbits = {NBITS[dtype] for dtype in self.dtypes if dtype is not None}
        per_thread = 4
        if self.compute is tl.float64:
            per_thread = 2
        elif nbits == {16} and not self.is_packed:
            per_thread = 8
        return self.parts * per_thread * self.warp_size * self.num_warps

    @property
    def chunk(self) -> int:
        """Elements that one program takes: 64 of each thread, and of each part.

        Each program first reads the tables, three loads that wait for each other, and on sm_90 takes about
        100 instructions for that; a thread's 64 elements take 2,800 with float32 and Adam. With larger
        chunks, the last ones of a small model would leave more of the multiprocessors idle.
        """
        if self.interpreted:
            return 2 * self.block
        return 64 * self.parts * self.warp_size * self.num_warps

    def constants(self) -> dict[str, Any]:
        """The constexpr arguments of `multi_tensor`, in the order of its signature."""
        rule = RULES[self.rule]
        dtypes, codes, extras = [], [], []
        for name, storage in zip(self.dtypes, self.storages):
            code, extra = PACKED.get(storage, (None, None))
            dtype = code or (name and DTYPES[name])
            dtypes.append(dtype)
            # Bit patterns, which are what formats.py computes with.
            codes.append(tl.uint16 if code is None and storage != "plain" else dtype)
            extras.append(extra)
        n_streams = len(dtypes)
        return {
            "RULE": rule.update,
            "THERE": self.there,
            "N_HYPERS": len(rule.hypers),
            "DTYPES": tuple(dtypes),
            "CODES": tuple(codes),
            "STORAGES": tuple(map(STORAGES.index, self.storages)),
            "EXTRAS": tuple(extras),
            "COLUMNS": STREAMS.value + n_streams + (2 * n_streams + 1 if self.is_packed else 0),
            "COMPUTE": self.compute,
            "CHUNK": self.chunk,
            "BLOCK": self.block,
            "PARTS": self.parts,
            "GRAD_WRITE": self.grad_write,
            "INTERPRETED": self.interpreted,
        }


def prepare_constants(rule: str, averages: bool) -> dict[str, Any]:
    """The constexpr arguments of `prepare.prepare`, in the order of its signature."""
    return {
        "PREPARE": getattr(prepare, rule),
        "ADVANCE": getattr(prepare, f"{rule}_advance", prepare.advance),
        "PREPARES_BEFORE": RULES[rule].prepares_before,
        "N_OPTIONS": len(RULES[rule].options),
        "N_SCALARS": len(RULES[rule].scalars),
        "N_HYPERS": len(RULES[rule].hypers),
        "N_AVERAGED": max(len(RULES[rule].scalars), 2),  # as csrc/tables.cpp
        "AVERAGES": averages,
        "BLOCK": PREPARE_BLOCK,
    }


# Warps of `finish`, whose one program is short.
FINISH_WARPS = 4


def norm_warps(dtype: str, warp_size: int) -> int:
    """Warps of `norm`, whose blocks have 512 elements: 128 bits a thread, or twice that in float64."""
    return (64 if dtype in ("bfloat16", "float16") else 128) // warp_size


def norm_constants(dtype: str, interpreted: bool) -> dict[str, Any]:
    """The constexpr arguments of `norm.norm`, in the order of its signature."""
    return {"DTYPE": DTYPES[dtype], "INTERPRETED": interpreted}
