"""Params that are stepped in a kernel call of their own, and their positions in the optimizer."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_optim.optimizer import FusedOptimizer
from fused_optim.step import Outcome, step_groups
from fused_optim.storage import first_number

# The first iteration makes the states, which lie behind the grads of their step. In glibc (2.36)
# the hole that a freed grad leaves is a few bytes too small for an aligned block of the same size,
# so all holes would stay. Giving them back to the system takes 19 ms once (41 ms for a transformer
# of 110 M params), and the peak of benchmarks/release_memory.py grows by 422 to 470 MiB instead of
# 611 (599 in the ordinary loop). Smaller holes are not worth it.
TRIM_NBYTES = 2**20


@functools.cache
def _trim() -> Callable[[int], object]:
    """glibc's malloc_trim; nothing with other C libraries."""
    found = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return found or (lambda _: None)


class Bucket:
    """Params whose grads are complete, until one kernel call steps them all.

    Keeps the ``_plan`` of its calls: it is filled again in each iteration, mostly with the same params.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.params: list[Tensor] = []
        self.numel = 0
        self._streams: set[torch.cuda.Stream] = set()  # which wrote the grads

    def add(self, param: Tensor) -> None:
        self.params.append(param)
        self.numel += param.numel()
        if param.is_cuda:
            self._streams.add(torch.cuda.current_stream(param.device))

    def step(
        self, optimizer: FusedOptimizer, positions: list[tuple[Tensor, tuple[int, int]]]
    ) -> Outcome | None:
        """Step the params at these positions, free their grads, and empty the bucket.

        Args:
            positions: (param, (group, index)) of the params that are still in the optimizer.

        Returns:
            The outcome; None without positions.
        """
        streams = self._streams
        self.clear()
        if not positions:
            return None
        params = [param for param, _ in positions]
        n_states = len(optimizer.state)
        _wait_for(streams, params)
        with torch.no_grad():
            outcome = step_groups(optimizer, _groups_of(optimizer, positions), self)
        assert outcome is not None  # found_inf is not set: GradScaler is refused
        nbytes = 0
        for param in params:
            if param.device.type == "cpu":
                nbytes += param.nbytes
            param.grad = None
        if len(optimizer.state) > n_states and nbytes >= TRIM_NBYTES:
            _trim()(0)
        return outcome


def _groups_of(
    optimizer: FusedOptimizer, positions: list[tuple[Tensor, tuple[int, int]]]
) -> list[dict[str, Any]]:
    """Put these params into groups with today's options; ``_origin`` says where they come from."""
    by_group: dict[int, list[tuple[Tensor, int]]] = {}
    for param, (g, i) in positions:
        by_group.setdefault(g, []).append((param, i))
    groups = optimizer.param_groups
    return [
        {
            **groups[g],
            "params": [param for param, _ in members],
            "_origin": (g, [i for _, i in members], first_number(groups, g)),
        }
        for g, members in by_group.items()
    ]


def _wait_for(streams: set[torch.cuda.Stream], params: list[Tensor]) -> None:
    """Have the kernels wait for grads of other streams, and keep these grads' memory until then."""
    for stream in streams:
        current = torch.cuda.current_stream(stream.device)
        if stream == current:
            continue
        current.wait_stream(stream)
        for param in params:
            if param.device == stream.device and param.grad is not None:
                param.grad.record_stream(current)
