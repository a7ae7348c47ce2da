"""Finds the optimizer in wrappers that pass for the optimizer itself."""

from __future__ import annotations

from typing import TypeVar

import torch

_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)


def unwrapped(optimizer: _Optimizer) -> _Optimizer:
    """The optimizer itself, where Lightning and Fabric hand out a wrapper.

    Their wrappers derive from the optimizer's class, for isinstance, but lack its attributes.
    Our methods would take a missing attribute for an option that is not in use, without an error.
    """
    if "param_groups" in optimizer.__dict__:
        return optimizer
    return getattr(optimizer, "optimizer", optimizer)  # ours in its constructor has neither
