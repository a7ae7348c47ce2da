"""Grads that no kernel reads: their norm, and clipping."""

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


@contextlib.contextmanager
def clipped(params: Sequence[Tensor], coefficient: float | Tensor, write: bool) -> Iterator[None]:
    """Grads times the coefficient: for good if `write`, else for the time of the context.

    A coefficient that is a tensor lies on the grads' device, and nothing waits for it.
    """
    if not isinstance(coefficient, Tensor) and coefficient == 1.0:
        yield
        return
    originals = [(param, param.grad) for param in params]
    try:
        with torch.no_grad():
            for param, grad in originals:
                assert grad is not None
                clip = _times(grad, coefficient)
                # Elements that share memory, of an expanded grad, cannot be written one by one.
                if write and not _overlaps(grad):
                    grad.copy_(clip)
                else:
                    param.grad = clip
        yield
    finally:
        for param, grad in originals:
            if not write:
                param.grad = grad


def _times(grad: Tensor, coefficient: float | Tensor) -> Tensor:
    if not isinstance(coefficient, Tensor):
        return grad * coefficient
    # As by a number, which torch does not round to 16 bits before it multiplies.
    wide = torch.promote_types(grad.dtype, torch.float32)
    return (grad.to(wide) * coefficient.to(wide)).to(grad.dtype)
