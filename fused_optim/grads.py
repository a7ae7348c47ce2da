"""Grads that no kernel reads: their norm, and clipping."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def sum_of_squares(grads: Iterable[Tensor]) -> tuple[float, bool]:
    """Of grads of any kind.

    Returns:
        The sum in float64, of the whole tensors where they are sharded, and whether some element is not
        finite.
    """
    total, nonfinite = 0.0, False
    for grad in grads:
        dense = grad.coalesce().values() if grad.is_sparse else grad
        wide = torch.complex128 if dense.is_complex() else torch.float64
        norm = _whole(torch.linalg.vector_norm(dense.detach(), dtype=wide))
        if not math.isfinite(norm):
            # The squares of large float64 numbers overflow without an infinite one among them.
            nonfinite |= dense.dtype != wide or _whole((~dense.isfinite()).sum()) > 0
        total += norm * norm  # norm**2 would raise where it overflows
    return total, nonfinite


def _whole(number: Tensor) -> float:
    if hasattr(number, "full_tensor"):  # a DTensor: each process has a part
        number = number.full_tensor()  # type: ignore[operator]
    return float(number.item())


@contextlib.contextmanager
def clipped(params: Sequence[Tensor], coefficient: float, write: bool) -> Iterator[None]:
    """Grads times the coefficient: in place if `write`, else for the time of the context."""
    if coefficient == 1.0:
        yield
        return
    originals = [(param, param.grad) for param in params]
    try:
        with torch.no_grad():
            for param, grad in originals:
                assert grad is not None
                if write:
                    grad.mul_(coefficient)
                else:
                    param.grad = grad * coefficient
        yield
    finally:
        for param, grad in originals:
            param.grad = grad
