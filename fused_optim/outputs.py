"""Outputs: tensors that get the params' new values, in their own dtype, from each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_optim import sharding

if TYPE_CHECKING:
    from fused_optim.optimizer import FusedOptimizer


def check(name: str, output: Any, param: Tensor) -> None:
    """Raise the error for what cannot get a param's new values."""
    if not isinstance(output, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(output).__name__}")
    if output.shape != param.shape:
        raise ValueError(f"{name} has shape {tuple(output.shape)}, its param {tuple(param.shape)}")
    if not output.dtype.is_floating_point:
        raise ValueError(f"{name} has dtype {output.dtype}; it must be a floating-point one")


def register(optimizer: FusedOptimizer, outputs: Mapping[Tensor, Tensor] | None) -> None:
    """See :meth:`FusedOptimizer.set_outputs`."""
    found = dict(outputs or {})
    params = [param for group in optimizer.param_groups for param in group["params"]]
    numbers = {id(param): i for i, param in enumerate(params)}
    for param, output in found.items():
        if id(param) not in numbers:
            raise ValueError("a key of outputs is no param of this optimizer")
        check(f"the output of param {numbers[id(param)]}", output, param)
    _refuse_shared_memory(params, {numbers[id(param)]: output for param, output in found.items()})
    optimizer._outputs = found or None
    copy_all(optimizer)


def _refuse_shared_memory(params: list[Tensor], outputs: dict[int, Tensor]) -> None:
    ranges = [(*_range(output), i) for i, output in outputs.items()]
    ranges += [(*_range(param), -1) for param in params]
    ranges = sorted(found for found in ranges if found[0] < found[1])
    end, last = 0, -1
    for begin, behind, i in ranges:
        if begin < end and max(i, last) >= 0:
            raise ValueError(
                f"the output of param {max(i, last)} shares memory with another tensor"
            )
        if behind > end:
            end, last = behind, i


def _range(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first element to behind the last one."""
    part = sharding.part_of(tensor)
    if part.layout != torch.strided or part.numel() == 0 or part.is_meta:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(part.shape, part.stride()))
    begin = part.data_ptr()
    return begin, begin + (last + 1) * part.element_size()


@torch.no_grad()
def copy_all(optimizer: FusedOptimizer) -> None:
    """Do without kernels what a step does."""
    for param, output in (optimizer._outputs or {}).items():
        output.copy_(param)
