"""Bytes per parameter, counted in the tensors that exist after a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from variants import Format, check_served

from fused_optim._C import SMALLEST_INT8
from fused_optim.bench.choice import OPTIONS, TITLES

# Of sizes at which a step count per tensor no longer shows, and the last group of 64 may be short.
SHAPES = ((500, 500), (64, 64, 3, 3), (SMALLEST_INT8,), (67, 67))


@dataclass(frozen=True)
class Footprint:
    """Bytes per parameter.

    Args:
        states: all tensors in optimizer.state, a master's remainder included.
    """

    params: float
    grads: float
    states: float

    @property
    def kept(self) -> float:
        """What remains between two steps once the grads are gone."""
        return self.params + self.states

    @property
    def total(self) -> float:
        return self.kept + self.grads


def measure(format: Format) -> dict[str, Footprint]:
    """Take one step with two states, and with one; the keys are TITLES."""
    return {TITLES.get(name, name): _footprint(format, name) for name in ("AdamW", "SGD")}


def _footprint(format: Format, optimizer_name: str) -> Footprint:
    torch.manual_seed(0)
    params = [torch.randn(shape).to(format.param_dtype).requires_grad_() for shape in SHAPES]
    for param in params:
        param.grad = torch.randn(param.shape).to(format.param_dtype)
    optimizer = format.make(optimizer_name, params, lr=1e-3, **OPTIONS.get(optimizer_name, {}))
    optimizer.step()
    check_served([optimizer])
    numel = sum(param.numel() for param in params)
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return Footprint(
        _nbytes(params) / numel,
        _nbytes([param.grad for param in params]) / numel,
        _nbytes(states) / numel,
    )


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
