"""Outputs: tensors that get the params' new values, in their own dtype, from each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    if not output.dtype.is_floating_point or param.is_complex():
        raise ValueError(
            f"{name} has dtype {output.dtype}, its param {param.dtype}; floating-point ones go together"
        )


def check_copied(name: str, output: Tensor, param: Tensor) -> None:
    """Raise the error for what torch would refuse when the step is made, or could not write to."""
    check(name, output, param)
    part = sharding.part_of(output)
    if output.layout != torch.strided or (part is output) != (sharding.part_of(param) is param):
        raise ValueError(f"{name} is no strided tensor, or sharded otherwise than its param")
    if part.is_meta or param.is_meta:
        raise ValueError(f"{name} or its param is on the meta device")
    if part.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} is an inference tensor")
    begin, end = _range(part)
    storage = part.untyped_storage()
    if (
        end > begin
        and not storage.data_ptr() <= begin <= end <= storage.data_ptr() + storage.nbytes()
    ):
        raise ValueError(f"{name} is larger than its storage")
    if any(size > 1 and stride == 0 for size, stride in zip(part.shape, part.stride())):
        raise ValueError(f"elements of {name} share memory")


def refuse_shared(outputs: Mapping[str, Tensor], others: Iterable[Tensor]) -> None:
    """Raise ValueError if an output's range of addresses meets that of another one, or of another tensor."""
    ranges = [(*_range(sharding.part_of(output)), name) for name, output in outputs.items()]
    ranges += [(*_range(sharding.part_of(other)), "") for other in others]
    end, last = 0, ""
    for begin, behind, name in sorted(found for found in ranges if found[0] < found[1]):
        if begin < end and (name or last):
            raise ValueError(f"{name or last} shares memory with another tensor")
        if behind > end:
            end, last = behind, name


def _range(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first element to behind the last one."""
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.is_meta:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def register(optimizer: FusedOptimizer, outputs: Mapping[Tensor, Tensor] | None) -> None:
    """See :meth:`FusedOptimizer.set_outputs`."""
    if outputs is not None and not isinstance(outputs, Mapping):
        raise TypeError(f"outputs must be a dict of tensors, not {type(outputs).__name__}")
    found = dict(outputs or {})
    params = [param for group in optimizer.param_groups for param in group["params"]]
    numbers = {id(param): i for i, param in enumerate(params)}
    names = {}
    for param, output in found.items():
        if id(param) not in numbers:
            raise ValueError("a key of outputs is no param of this optimizer")
        name = f"the output of param {numbers[id(param)]}"
        check(name, output, param)
        check_copied(name, output, param)
        names[name] = output
    refuse_shared(names, params)
    copy(found.items())
    optimizer._outputs = found or None


@torch.no_grad()
def copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Do for (param, output) pairs without kernels what a step does."""
    for param, output in pairs:
        output.copy_(param)


def of_stepped(optimizer: FusedOptimizer) -> Sequence[tuple[Tensor, Tensor]]:
    """(param, output) of each param that has a grad, checked."""
    found = [pair for pair in (optimizer._outputs or {}).items() if pair[0].grad is not None]
    check_left([(param, output, None) for param, output in found])
    return found


def check_left(left: Iterable[tuple[Tensor, Any, Any]]) -> None:
    """Check the outputs, whose third item is None, among what a plan leaves to torch."""
    for param, output, weight in left:
        if weight is None:
            check_copied("the output of a param", output, param)
