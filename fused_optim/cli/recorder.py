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

from torch.optim import Optimizer

from fused_optim import patching
from fused_optim.cli.unserved import Unserved
from fused_optim.optimizer import FusedOptimizer
from fused_optim.optimizers import REPLACED
from fused_optim.step import Outcome
from fused_optim.tracing import left_to_the_interpreter
from fused_optim.units import count

*_first, _last = (stock.__name__ for stock in REPLACED)
SERVED = f"{', '.join(_first)} or {_last}"


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
    n_without_grads: int = 0
    seconds: float = 0.0
    tensors: Counter[str] = field(default_factory=Counter)
    fallbacks: dict[str, set[tuple[int, int, int]]] = field(default_factory=dict)

    def add(self, outcome: Outcome, optimizer: int) -> None:
        n_cpu, n_triton, fallbacks = outcome
        self.n_without_grads += not (n_cpu or n_triton or fallbacks)
        self.tensors.update(cpu=n_cpu, triton=n_triton, stock=len(fallbacks or ()))
        for group, index, reason in fallbacks or ():
            self.fallbacks.setdefault(reason, set()).add((optimizer, group, index))


class Recorder:
    """Counts the steps of this process, and of those forked from it each its own.

    Args:
        is_child: of a process that was started by hand, which says so if nothing was stepped in it.
        keeps_params: to the end of the process, which params may otherwise not live to see.
    """

    def __init__(self, *, is_child: bool = False, keeps_params: bool = False) -> None:
        self._is_child, self._keeps_params = is_child, keeps_params
        self._unserved = Unserved()
        self._forget()

    def _forget(self) -> None:
        self._totals: dict[str, _Totals] = {}
        self._numbers: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._n_optimizers = 0
        # The groups of each optimizer, in the order of their first steps.
        self.param_groups: dict[int, list[dict[str, Any]]] = {}
        self._unserved.counts.clear()
        self._began = time.perf_counter()

    def start(self, *stock: type[Optimizer]) -> None:
        """Before the first optimizer is made: it wraps step(), which then costs what it cost before.

        Args:
            stock: classes of torch.optim whose optimizers count as well.
        """
        steps = {cls: cls.step for cls in (FusedOptimizer, *stock)}
        for cls, step in steps.items():
            cls.step = self._recorded(cls, step)  # type: ignore[method-assign]
        self._unserved.start()

    def _recorded(self, cls: type[Optimizer], step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def recorded(optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
            if cls is not FusedOptimizer and type(optimizer) is not cls:
                return step(optimizer, closure)  # as a part of another class's step
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

        return left_to_the_interpreter(recorded, with_callees=False)  # stock's may be compiled

    def print_at_exit(self) -> None:
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

    def _add(self, optimizer: Optimizer, seconds: float, outcome: Outcome | None) -> None:
        """outcome: None for a step that was skipped."""
        totals = self._totals.setdefault(type(optimizer).__name__, _Totals())
        if optimizer not in self._numbers:
            self._numbers[optimizer] = self._n_optimizers
            self._n_optimizers += 1
        number = self._numbers[optimizer]
        if self._keeps_params:
            self.param_groups[number] = optimizer.param_groups
        totals.optimizers.add(number)
        totals.n_steps += 1
        totals.seconds += seconds
        if outcome is None:
            totals.n_skipped += 1
        else:
            totals.add(outcome, number)

    def step_seconds(self) -> float:
        return sum(totals.seconds for totals in self._totals.values())

    def n_steps(self) -> int:
        return sum(totals.n_steps for totals in self._totals.values())

    def whole_seconds(self) -> float:
        """Since the start; in a child, since its own."""
        return time.perf_counter() - self._began

    def _print(self) -> None:
        lines = self.lines()
        self._forget()
        if lines and sys.stderr is not None:
            # In one piece: other processes write too.
            sys.stderr.write("".join(f"{_prefix(self._is_child)}: {line}\n" for line in lines))
            sys.stderr.flush()

    def lines(self) -> list[str]:
        """The report; empty for a child without a step and without an optimizer that is not served."""
        if self._is_child and not self._totals and not self._unserved.counts:
            return []
        lines = []
        for name, totals in self._totals.items():
            lines += _describe(name, totals)
        if lines:
            share = 100 * self.step_seconds() / self.whole_seconds()
            lines.append(f"step() took {share:.3g}% of the whole {self.whole_seconds():.3g} s")
        else:
            lines.append(f"no step of {SERVED} in this process")
        for derived in sorted(patching.derived, key=lambda cls: cls.__qualname__):
            base = next(cls for cls in derived.__mro__ if cls.__module__.startswith("torch.optim"))
            lines.append(
                f"{derived.__qualname__} derives from torch.optim.{base.__name__} and keeps its step"
            )
        for (name, package), n in self._unserved.counts.items():
            lines.append(f"{n:,} {name} of {package}, not served")
        return lines


def _n_skipped(optimizer: Any) -> int:
    """Without waiting for a device: what it alone skips counts as steps."""
    one_pass = getattr(optimizer, "_clipping", None)  # stock's has none
    return 0 if one_pass is None else one_pass.n_skipped


def _prefix(is_child: bool) -> str:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"fused_optim [rank {os.environ.get('RANK', '?')}]"
    return f"fused_optim [process {os.getpid()}]" if is_child else "fused_optim"


def _describe(name: str, totals: _Totals) -> list[str]:
    n_optimizers = len(totals.optimizers)
    who = name if n_optimizers == 1 else f"{n_optimizers} {name}"
    skipped = f", {totals.n_skipped} of them skipped" if totals.n_skipped else ""
    if totals.n_without_grads:
        skipped += f", {totals.n_without_grads} of them without grads"
    mean = totals.seconds / totals.n_steps
    lines = [
        f"{who}: {count(totals.n_steps, 'step')}{skipped}, {totals.seconds:.3g} s in step(), "
        f"{mean * 1e3:.3g} ms each"
    ]
    n_stepped = totals.n_steps - totals.n_skipped - totals.n_without_grads
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
