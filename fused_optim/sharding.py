"""Handles DTensors, split over processes, and refuses norms that cannot be known."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fused_optim.options import SCALE_BLOCK


def is_distributed() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def is_dtensor(tensor: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return module is not None and type(tensor) is module.DTensor


def part_of(tensor: Any) -> Any:
    """The plain tensor that this process holds of a DTensor; any other tensor is returned as it is."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


@torch.no_grad()
def rebuilt(part: Tensor, whole: Any) -> Tensor:
    """Make a tensor, shaped and sharded like `whole`, of which this process holds `part`."""
    if not is_dtensor(whole):
        return part
    return type(whole).from_local(
        part,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


@torch.no_grad()
def sharded_like(tensor: Any, param: Any) -> Tensor:
    """Shard values like a param; each process has all of a plain tensor."""
    if tensor.shape != param.shape:
        raise ValueError(f"values of shape {tuple(tensor.shape)} for {tuple(param.shape)}")
    if not is_dtensor(param):
        return tensor.full_tensor() if is_dtensor(tensor) else tensor
    if is_sharded_like(tensor, param):
        return tensor
    if is_dtensor(tensor):
        tensor = tensor.full_tensor()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)


def is_sharded_like(tensor: Any, param: Any) -> bool:
    if not is_dtensor(param) or not is_dtensor(tensor):
        return not is_dtensor(param) and not is_dtensor(tensor)
    return tensor.placements == param.placements and tensor.device_mesh == param.device_mesh


def place_of(param: Any) -> tuple[int, int]:
    """Place the part of a param that this process holds in the whole, for the random bits.

    Returns:
        The number of elements of the whole, and the index in it of the part's first element. If
        the parts are no contiguous runs of a contiguous whole (columns of a matrix, say), part n
        gets the index (n + 1) * numel, numel rounded up to blocks of 64: no two parts share one.
    """
    if not is_dtensor(param):
        return param.numel(), 0
    mesh, placements = param.device_mesh, param.placements
    first = _first_element(
        mesh,
        tuple(mesh.get_coordinate() or ()),
        placements,
        param.shape,
        param.stride(),
        param._local_tensor.is_contiguous(),
    )
    return param.numel(), first


@functools.lru_cache(maxsize=4096)  # 30 us
def _first_element(
    mesh: Any,
    coordinate: tuple[int, ...],
    placements: tuple[Any, ...],
    shape: torch.Size,
    strides: tuple[int, ...],
    part_is_contiguous: bool,
) -> int:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    number, kinds = 0, set()
    for i, placement in enumerate(placements[: len(coordinate)]):
        if not placement.is_replicate():
            number = number * mesh.size(i) + coordinate[i]
            kinds.add(type(placement))
    if not kinds:
        return 0
    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    row_major = torch.empty(shape, device="meta").stride()
    cut = [d for d in range(len(shape)) if sizes[d] != shape[d]]
    is_run = all(size == 1 for size in sizes[: cut[-1]]) if cut else True
    if kinds == {Shard} and part_is_contiguous and strides == row_major and is_run:
        return sum(offset * stride for offset, stride in zip(offsets, strides))
    n_blocks = (shape.numel() + SCALE_BLOCK - 1) // SCALE_BLOCK
    return (number + 1) * n_blocks * SCALE_BLOCK


def is_sharded(param: Any) -> bool:
    """Return True if the tensor shows that this process may hold only a part of the param."""
    return is_dtensor(param) or is_fsdp1s(param)


def is_fsdp1s(param: Any) -> bool:
    """Return True for FullyShardedDataParallel's flat params, and views (use_orig_params)."""
    return getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False)


def is_for_distributed_checkpoint() -> bool:
    """Return True while torch.distributed.checkpoint asks for a state_dict."""
    asking = "torch.distributed.checkpoint.state_dict"
    return any(frame.f_globals.get("__name__") == asking for frame in _callers())


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
        if is_fsdp1s(param):
            raise RuntimeError(
                "max_grad_norm and skip_nonfinite need all grads, but FullyShardedDataParallel hides the "
                "shards of other processes; use torch.distributed.fsdp.fully_shard, whose params "
                "are DTensors, or the wrapper's own clip_grad_norm_()"
            )
    if "deepspeed" not in sys.modules:  # to look at 40 callers takes as long as a small step
        return
    partitioning = ("deepspeed.runtime.zero.", "deepspeed.runtime.bf16_optimizer")
    if any(str(f.f_globals.get("__name__")).startswith(partitioning) for f in _callers()):
        raise RuntimeError(
            "max_grad_norm and skip_nonfinite need all grads, but DeepSpeed's ZeRO gives each process a "
            "part of them; use gradient_clipping in DeepSpeed's configuration"
        )


def is_built_for_some_params() -> bool:
    """Return True while ZeroRedundancyOptimizer is building the optimizer."""
    return any(
        type(frame.f_locals.get("self")).__name__ == "ZeroRedundancyOptimizer"
        for frame in _callers()
    )


def _callers() -> Iterator[FrameType]:
    """Yield the frames of all callers: some wrappers leave no other trace."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def refuse_some_params() -> None:
    """Raise RuntimeError for an optimizer that `is_built_for_some_params`."""
    raise RuntimeError(
        "max_grad_norm and skip_nonfinite need all grads, but ZeroRedundancyOptimizer gives each "
        "process an optimizer for some of the params; clip with "
        "torch.nn.utils.clip_grad_norm_() before its step()"
    )
