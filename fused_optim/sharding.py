"""Grads of which each process holds a part: their norm, and where it cannot be known."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_distributed() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


class ShardedSquares:
    """Sums squares of the local parts of DTensors, then over the processes: one reduction per kind."""

    def __init__(self) -> None:
        self._sums: dict[Any, Tensor] = {}

    def add(self, grad: Any) -> None:
        """grad: a DTensor of any placements."""
        if any(placement.is_partial() for placement in grad.placements):
            from torch.distributed.tensor import Replicate

            grad = grad.redistribute(
                placements=[Replicate() if p.is_partial() else p for p in grad.placements]
            )
        # Not is_shard(): it is False for the strided shards of fully_shard on tensor-parallel params.
        dims = tuple(i for i, p in enumerate(grad.placements) if not p.is_replicate())
        wide = torch.complex128 if grad.is_complex() else torch.float64
        squares = torch.linalg.vector_norm(grad.to_local(), dtype=wide).square()
        key = grad.device_mesh, dims
        self._sums[key] = self._sums[key] + squares if key in self._sums else squares

    def total(self) -> float:
        """The sum over all processes that share the tensors; each of them has to ask."""
        total = 0.0
        for (mesh, dims), squares in self._sums.items():
            for dim in dims:
                torch.distributed.all_reduce(squares, group=mesh.get_group(dim))
            total += float(squares.item())
        return total


def refuse_hidden_shards(params: Iterable[Tensor]) -> None:
    """Raise RuntimeError if other processes hold parts of the model that no tensor here tells of."""
    for param in params:
        # FullyShardedDataParallel's mark on its flat params and, with use_orig_params, on views of them.
        if getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False):
            raise RuntimeError(
                "max_grad_norm and skip_nonfinite need all grads, but FullyShardedDataParallel hides the "
                "shards of other processes; use torch.distributed.fsdp.fully_shard, whose params "
                "are DTensors, or the wrapper's own clip_grad_norm_()"
            )


def is_built_for_some_params() -> bool:
    """Whether ZeroRedundancyOptimizer is building the optimizer at this moment."""
    frame = sys._getframe(1)
    while frame is not None:
        if type(frame.f_locals.get("self")).__name__ == "ZeroRedundancyOptimizer":
            return True
        frame = frame.f_back
    return False


def refuse_some_params() -> None:
    """Raise RuntimeError for an optimizer that `is_built_for_some_params`."""
    raise RuntimeError(
        "max_grad_norm and skip_nonfinite need all grads, but ZeroRedundancyOptimizer gives each "
        "process an optimizer for some of the params; clip with "
        "torch.nn.utils.clip_grad_norm_() before its step()"
    )
