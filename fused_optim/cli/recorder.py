"""What the optimizers of a process did, counted step by step and printed when it ends."""

import atexit
import functools
import multiprocessing.util
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from fused_optim import patching
from fused_optim.optimizer import FusedOptimizer, Outcome
from fused_optim.tracing import left_to_the_interpreter


@dataclass
class _Totals:
    """Of all optimizers of one class.

    seconds: in step(), without the program's closures.
    tensors: backend -> how often it has stepped one.
    fallbacks: reason -> which tensors: (number of the optimizer, group, index).
    """

    optimizers: set[int] = field(default_factory=set)
    n_steps: int = 0
    n_skipped: int = 0
    seconds: float = 0.0
    tensors: Counter[str] = field(default_factory=Counter)
    fallbacks: dict[str, set[tuple[int, int, int]]] = field(default_factory=dict)

    def add(self, outcome: Outcome, optimizer: int) -> None:
        n_cpu, n_triton, fallbacks = outcome
        self.tensors.update(cpu=n_cpu, triton=n_triton, stock=len(fallbacks or ()))
        for group, index, reason in fallbacks or ():
            self.fallbacks.setdefault(reason, set()).add((optimizer, group, index))


class Recorder:
    """Counts the steps of this process, and of those forked from it each its own.

    Args:
        is_child: of a process that was started by hand, which says so if nothing was stepped in it.
    """

    def __init__(self, *, is_child: bool) -> None:
        self._is_child = is_child
        self._forget()

    def _forget(self) -> None:
        self._totals: dict[str, _Totals] = {}
        self._numbers: WeakKeyDictionary[FusedOptimizer, int] = WeakKeyDictionary()
        self._n_optimizers = 0

    def start(self) -> None:
        """Before the first optimizer is made: it wraps step(), which then costs what it cost before."""
        step: Callable[..., Any] = FusedOptimizer.step

        @left_to_the_interpreter
        @functools.wraps(step)
        def recorded(optimizer: FusedOptimizer, closure: Callable[[], Any] | None = None) -> Any:
            in_closure = 0.0

            def timed() -> Any:
                nonlocal in_closure
                assert closure is not None
                began = time.perf_counter()
                try:
                    return closure()
                finally:
                    in_closure += time.perf_counter() - began

            before = optimizer.__dict__.get("_last_step"), _n_skipped(optimizer)
            began = time.perf_counter()
            loss = step(optimizer, closure and timed)
            seconds = time.perf_counter() - began - in_closure
            outcome = optimizer.__dict__.get("_last_step")
            is_skipped = outcome is before[0] or _n_skipped(optimizer) > before[1]
            self._add(optimizer, seconds, None if is_skipped else outcome)
            return loss

        FusedOptimizer.step = recorded  # type: ignore[method-assign]
        atexit.register(self._print)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin_in_child)
        # Children of multiprocessing end without exit handlers, but with finalizers, which they drop first.
        multiprocessing.util.register_after_fork(
            self, lambda _: multiprocessing.util.Finalize(None, self._print, exitpriority=0)
        )

    def _begin_in_child(self) -> None:
        self._is_child = True
        self._forget()

    def _add(self, optimizer: FusedOptimizer, seconds: float, outcome: Outcome | None) -> None:
        """outcome: None for a step that was skipped."""
        totals = self._totals.setdefault(type(optimizer).__name__, _Totals())
        if optimizer not in self._numbers:
            self._numbers[optimizer] = self._n_optimizers
            self._n_optimizers += 1
        number = self._numbers[optimizer]
        totals.optimizers.add(number)
        totals.n_steps += 1
        totals.seconds += seconds
        if outcome is None:
            totals.n_skipped += 1
        else:
            totals.add(outcome, number)

    def _print(self) -> None:
        lines = self.lines()
        self._forget()
        if lines and sys.stderr is not None:
            # In one piece: other processes write too.
            sys.stderr.write("".join(f"{_prefix(self._is_child)}: {line}\n" for line in lines))
            sys.stderr.flush()

    def lines(self) -> list[str]:
        """The report; empty for a child without a step."""
        lines = []
        for name, totals in self._totals.items():
            lines += _describe(name, totals)
        if not lines and self._is_child:
            return []
        if not lines:
            lines.append("no step of Adam, AdamW, SGD, RMSprop or Adagrad in this process")
        for derived in sorted(patching.derived, key=lambda cls: cls.__qualname__):
            base = next(cls for cls in derived.__mro__ if cls.__module__.startswith("torch.optim"))
            lines.append(
                f"{derived.__qualname__} derives from torch.optim.{base.__name__} and keeps its step"
            )
        return lines


def _n_skipped(optimizer: FusedOptimizer) -> int:
    """Without waiting for a device: what it alone skips counts as steps."""
    return 0 if optimizer._one_pass is None else optimizer._one_pass.n_skipped


def _prefix(is_child: bool) -> str:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"fused_optim [rank {os.environ.get('RANK', '?')}]"
    return f"fused_optim [process {os.getpid()}]" if is_child else "fused_optim"


def _describe(name: str, totals: _Totals) -> list[str]:
    n_optimizers = len(totals.optimizers)
    who = name if n_optimizers == 1 else f"{n_optimizers} {name}"
    skipped = f", {totals.n_skipped} of them skipped" if totals.n_skipped else ""
    mean = totals.seconds / totals.n_steps
    lines = [
        f"{who}: {count(totals.n_steps, 'step')}{skipped}, {totals.seconds:.3g} s in step(), "
        f"{mean * 1e3:.3g} ms each"
    ]
    n_stepped = totals.n_steps - totals.n_skipped
    if n_stepped:
        by_backend = ", ".join(
            f"{totals.tensors[backend] / n_stepped:.4g} {where}"
            for backend, where in (
                ("cpu", "on CPU kernels"),
                ("triton", "on Triton kernels"),
                ("stock", "by torch.optim's code"),
            )
            if totals.tensors[backend] or (backend == "stock")
        )
        lines.append(f"  tensors in a step: {by_backend}")
    for reason, tensors in totals.fallbacks.items():
        lines.append(f"  {count(len(tensors), 'tensor')} by torch.optim's code: {reason}")
    return lines


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
