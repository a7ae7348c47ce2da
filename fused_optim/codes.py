"""Codes and scales found again from the states that they decode to: such a checkpoint loses nothing.

Rounding to 8 bits is not idempotent: a group's largest code need not be the largest that there is, and the
scale made of it would then be another one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 64  # elements of one scale
# Of the largest code in a group that the kernels have written. The scale is rounded up by less than 2**-7:
# 126 / (1 + 2**-7) - 0.5 > 124, 253 / (1 + 2**-7) - 1 > 250.
_LARGEST = {torch.int8: (124, 125, 126), torch.uint8: (250, 251, 252, 253)}


@torch.no_grad()
def restore(values: Tensor, stream: Tensor, scales: Tensor) -> None:
    """Write the codes of each group of values that some codes and scale stand for exactly; leave the others.

    Args:
        values: float32, in the shape of the stream.
        stream: int8 codes, or uint8 ones of square roots, dense.
        scales: bfloat16, one for each 64 elements in the order of the memory.
    """
    if stream.numel() == 0:
        return
    flat = _in_memory_order(stream)
    ordered = torch.empty_like(stream, dtype=torch.float32).copy_(values)
    n = flat.numel()
    groups = functional.pad(_in_memory_order(ordered), (0, -n % GROUP)).view(-1, GROUP)
    is_square = stream.dtype == torch.uint8
    roots = groups.sqrt() if is_square else groups
    largest = roots.abs().amax(dim=1, keepdim=True)
    codes = functional.pad(flat, (0, -n % GROUP)).view(-1, GROUP)
    for code in _LARGEST[stream.dtype]:
        scale = (largest / code).to(torch.bfloat16)
        size = scale.float()
        found = (roots / size).round()
        decoded = found * size
        if is_square:
            decoded = decoded * decoded
        # 0 * inf and 0 / 0 are NaN, which equals nothing: such groups stay as they are.
        exact = (decoded == groups).all(dim=1) & (found.abs().amax(dim=1) == code)
        codes[exact] = found[exact].to(stream.dtype)
        scales[exact] = scale[exact, 0]
    flat.copy_(codes.view(-1)[:n])


def _in_memory_order(dense: Tensor) -> Tensor:
    return torch.as_strided(dense, (dense.numel(),), (1,))
