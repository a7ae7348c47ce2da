"""The formats that are compared, and how to make an optimizer with one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import fused_optim
from fused_optim._C import SMALLEST_INT8


@dataclass(frozen=True)
class Format:
    """How params and states are stored.

    Args:
        param_dtype: of params and grads.
        state_dtype, master: the optimizer's options of these names.
    """

    param_dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | str | None = None
    master: str | None = None

    @property
    def cells(self) -> tuple[str, str, str]:
        """Param dtype, state_dtype and master, as one writes them."""
        return tuple(
            f"`{str(value).removeprefix('torch.')}`"
            for value in (self.param_dtype, self.state_dtype, self.master)
        )

    @property
    def label(self) -> str:
        """One line for a plot."""
        return " / ".join(cell.strip("`") for cell in self.cells)

    def make(self, optimizer: str, params: Iterable[Tensor], **options: Any) -> Optimizer:
        """The fused optimizer of this name."""
        chosen = {"state_dtype": self.state_dtype, "master": self.master}
        options |= {name: value for name, value in chosen.items() if value is not None}
        return getattr(fused_optim, optimizer)(params, **options)


FLOAT32 = Format()
STATES = (FLOAT32, Format(state_dtype=torch.bfloat16), Format(state_dtype="int8"))
MASTERS = tuple(
    Format(torch.bfloat16, torch.float32, master)
    for master in (None, "stochastic", "split8", "split16")
)
ALL = tuple(
    Format(param_dtype, state_dtype, master)
    for param_dtype in (torch.float32, torch.bfloat16)
    for master in (None, "stochastic", "split8", "split16")
    for state_dtype in (None, torch.float32, torch.bfloat16, "int8")
    if master is None or param_dtype is torch.bfloat16
)
SMALLEST_WITH_MASTER = Format(torch.bfloat16, "int8", "split8")
TRAINED = (
    *STATES,
    Format(torch.bfloat16),
    Format(torch.bfloat16, torch.bfloat16, "stochastic"),
    Format(torch.bfloat16, "int8", "stochastic"),
    SMALLEST_WITH_MASTER,
    Format(torch.bfloat16, torch.float32, "split16"),
)


def int8_part(params: Iterable[Tensor]) -> float:
    """Of the elements, those in tensors whose states "int8" stores in 8 bits."""
    numels = [param.numel() for param in params]
    return sum(numel for numel in numels if numel >= SMALLEST_INT8) / sum(numels)


def check_served(optimizers: Iterable[Optimizer]) -> None:
    """Raise RuntimeError if the latest step of one was torch.optim's code for some tensor."""
    for optimizer in optimizers:
        if optimizer.last_step.fallbacks:
            raise RuntimeError(f"not the kernels' numbers: {optimizer.last_step.fallbacks}")


class NearestAdamW(torch.optim.AdamW):
    """Stock AdamW whose states are rounded to the nearest bfloat16 after every step."""

    def step(self, closure: None = None) -> None:
        super().step(closure)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].copy_(state[name].bfloat16())
