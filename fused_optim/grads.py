"""Grads that no kernel reads: their norm, unscaling, clipping and zeroing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fused_optim.sharding import ShardedSquares


@torch.no_grad()
def sum_of_squares(grads: Iterable[Tensor]) -> tuple[float, bool]:
    """Of grads of any kind.

    Returns:
        The sum in float64, of the whole tensors where they are DTensors, and whether some element is not
        finite.
    """
    total, nonfinite = 0.0, False
    sharded: ShardedSquares | None = None
    for grad in grads:
        if hasattr(grad, "device_mesh"):
            sharded = sharded or ShardedSquares()
            sharded.add(grad.detach())
            continue
        dense = grad.coalesce().values() if grad.is_sparse else grad
        wide = torch.complex128 if dense.is_complex() else torch.float64
        norm = torch.linalg.vector_norm(dense.detach(), dtype=wide).item()
        if not math.isfinite(norm):
            # The squares of large float64 numbers overflow without an infinite one among them.
            nonfinite |= dense.dtype != wide or not bool(dense.isfinite().all())
        total += norm * norm  # norm**2 would raise where it overflows
    if sharded is not None:
        squares = sharded.total()
        nonfinite |= not math.isfinite(squares)
        total += squares
    return total, nonfinite


def _overlaps(grad: Tensor) -> bool:
    strided = grad.layout == torch.strided
    return strided and any(n > 1 and s == 0 for n, s in zip(grad.shape, grad.stride()))


# (param, its grad, what the step leaves in it; None: zeros)
Left = list[tuple[Tensor, Tensor, Tensor | None]]


@contextlib.contextmanager
def stand_ins(
    params: Sequence[Tensor],
    grad_scale: Tensor | None,
    clip: float | Tensor,
    *,
    writes_clipped: bool,
    zeroes: bool,
) -> Iterator[Left]:
    """For a while, copies that are unscaled and clipped stand in for the grads of params.

    Gives what `write` is to leave in the grads, once nobody needs them as they were: a kernel may read the
    same grad for another param.

    Args:
        clip: the coefficient; a tensor lies on the grads' device, and nothing waits for it.
    """
    originals = [(param, param.grad) for param in params if param.grad is not None]
    clips = isinstance(clip, Tensor) or clip != 1.0
    left: Left = []
    try:
        with torch.no_grad():
            for param, grad in originals:
                unscaled = grad if grad_scale is None else grad / grad_scale.to(grad.device)
                clipped = _times(unscaled, clip) if clips else unscaled
                if clipped is not grad:
                    put(param, clipped)
                leaves = None if zeroes else clipped if writes_clipped else unscaled
                if leaves is not grad:
                    left.append((param, grad, leaves))
        yield left
    finally:
        for param, grad in originals:
            if param.grad is not grad:
                put(param, grad)


@torch.no_grad()
def write(left: Left) -> None:
    """What `stand_ins` gave."""
    for param, grad, value in left:
        if value is None:
            grad.zero_()
        elif _overlaps(grad):
            # Elements that share memory, of an expanded grad, cannot be written one by one.
            put(param, value)
        else:
            grad.copy_(value)


def put(param: Tensor, grad: Tensor) -> None:
    """``param.grad = grad``, which refuses another dtype than the param's; setting ``grad.data`` does not."""
    dtype = param.grad_dtype if param.is_leaf else param.dtype
    if dtype is None or dtype == grad.dtype:
        param.grad = grad
        return
    values = grad.data
    grad.data = values.to(dtype)
    param.grad = grad
    grad.data = values


def _times(grad: Tensor, coefficient: float | Tensor) -> Tensor:
    if not isinstance(coefficient, Tensor):
        return grad * coefficient
    # As by a number, which torch does not round to 16 bits before it multiplies.
    wide = torch.promote_types(grad.dtype, torch.float32)
    return (grad.to(wide) * coefficient.to(wide)).to(grad.dtype)
