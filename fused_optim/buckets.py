"""Params that are stepped in a kernel call of their own, and their positions in the optimizer."""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_optim.formats import first_number
from fused_optim.optimizer import FusedOptimizer, Outcome

# New states lie behind the grads of their step, and in glibc (2.36) the hole that a freed grad leaves is a
# few bytes too small for an aligned block of the same size: in the first iteration, which makes the states,
# all holes would stay. Given back to the system, the peak of benchmarks/release_memory.py grows by 422 to 470
# MiB, not 611 (599 in the ordinary loop). That takes 19 ms once; 41 ms in a transformer of 110 M params.
# Smaller holes are not worth it.
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
        """Step those of the params of which ``(param, (group, index))`` is given, and free their grads.

        None if there are none. Nothing is left in the bucket then or afterwards.
        """
        streams = self._streams
        self.clear()
        if not positions:
            return None
        params = [param for param, _ in positions]
        n_states = len(optimizer.state)
        _wait_for(streams, params)
        outcome = _Chosen(optimizer, positions).step(self)
        nbytes = 0
        for param in params:
            if param.device.type == "cpu":
                nbytes += param.nbytes
            param.grad = None
        if len(optimizer.state) > n_states and nbytes >= TRIM_NBYTES:
            _trim()(0)
        return outcome


class _Chosen:
    """Some params of an optimizer in groups of their own, with options as they are now."""

    def __init__(
        self, optimizer: FusedOptimizer, found: list[tuple[Tensor, tuple[int, int]]]
    ) -> None:
        self._optimizer = optimizer
        self._stock_error: BaseException | None = None
        by_group: dict[int, list[tuple[Tensor, int]]] = {}
        for param, (g, i) in found:
            by_group.setdefault(g, []).append((param, i))
        self._groups = [
            {
                **optimizer.param_groups[g],
                "params": [param for param, _ in members],
                "param_indices": [first_number(optimizer.param_groups, g) + i for _, i in members],
            }
            for g, members in by_group.items()
        ]
        self._positions = [(g, [i for _, i in members]) for g, members in by_group.items()]

    def step(self, keeper: Bucket) -> Outcome:
        """One kernel call; fallbacks and errors tell the positions in the optimizer's groups."""
        try:
            with torch.no_grad():
                outcome = self._optimizer._step_groups(self._groups, keeper, self._step_with_stock)
        except Exception as error:
            is_told, self._stock_error = error is self._stock_error, None
            if is_told:
                raise
            text = re.sub(r"param (\d+) of group (\d+)|param group (\d+)", self._name, str(error))
            if text == str(error):
                raise
            raise type(error)(text) from None
        assert outcome is not None  # nobody has set found_inf
        return outcome[0], outcome[1], self._in_optimizer(outcome[2] or [])

    def _step_with_stock(self, fallbacks: list[tuple[int, int, str]], launcher: Any) -> None:
        try:
            self._optimizer._step_with_stock(self._in_optimizer(fallbacks), launcher)
        except BaseException as error:
            self._stock_error = error  # which tells the optimizer's positions already
            raise

    def _in_optimizer(self, fallbacks: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
        return [
            (self._positions[g][0], self._positions[g][1][i], reason) for g, i, reason in fallbacks
        ]

    def _name(self, match: re.Match[str]) -> str:
        if match[3] is not None:
            return f"param group {self._positions[int(match[3])][0]}"
        g, indices = self._positions[int(match[2])]
        return f"param {indices[int(match[1])]} of group {g}"


def _wait_for(streams: set[torch.cuda.Stream], params: list[Tensor]) -> None:
    """Let the kernels wait for grads of other streams, and the memory of these grads for the kernels."""
    for stream in streams:
        current = torch.cuda.current_stream(stream.device)
        if stream == current:
            continue
        current.wait_stream(stream)
        for param in params:
            if param.device == stream.device and param.grad is not None:
                param.grad.record_stream(current)
