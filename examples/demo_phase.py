"""Clip, step, average and zero: stock's calls, ours between them, and ours in one pass.

All three have to train alike: their losses, and the held-out loss of their averages, may lie apart by
no more than demo_bound.py derives from the twins of stock's calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from demo_bound import FLOAT32_EPS, add_rounding_noise, coin_tosser, tolerance
from demo_tasks import Task
from demo_train import Phase, Run, train
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fused_optim

# The grads of the task's steps have norms from 0.7 to 4, so all of them are clipped.
MAX_GRAD_NORM = 0.5
EMA_DECAY = 0.9

STOCK, SWAPPED, ONE_PASS = "stock calls", "plain swap", "one pass"


class StockCalls:
    """torch's calls around an optimizer's step; as a twin's, with rounding noise.

    In a twin each clipped grad and each average, which two correct implementations round apart, moves up
    or down by 2^-23 of itself, by a coin toss. What a norm in float32 is wrong by, which float64
    tells, goes to all grads with one common sign.
    """

    def __init__(self, optimizer: Optimizer, noise_seed: int | None = None) -> None:
        self.optimizer = optimizer
        self.params: list[Tensor] = [p for g in optimizer.param_groups for p in g["params"]]
        self.averages: list[Tensor] = []
        self._coins = None if noise_seed is None else coin_tosser(noise_seed)
        if noise_seed is not None:
            add_rounding_noise(optimizer, noise_seed)

    def __call__(self) -> None:
        self._clip()
        self.optimizer.step()
        self._average()
        self.optimizer.zero_grad(set_to_none=False)

    def _clip(self) -> None:
        if self._coins is None:
            torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
            return
        grads = [param.grad for param in self.params if param.grad is not None]
        exact = float(torch.nn.utils.get_total_norm([grad.double() for grad in grads]))
        norm = float(torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM))
        off = abs(norm / exact - 1) + FLOAT32_EPS
        sign = self._coins(torch.zeros((), dtype=torch.float64)).item()
        for grad in grads:
            grad.mul_(1 + sign * off).add_(self._coins(grad) * grad, alpha=FLOAT32_EPS)

    @torch.no_grad()
    def _average(self) -> None:
        if not self.averages:
            self.averages = [param.detach().clone() for param in self.params]
        else:
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                self.averages, self.params, 1 - EMA_DECAY
            )
        for average in self.averages if self._coins is not None else ():
            average.add_(self._coins(average) * average, alpha=FLOAT32_EPS)


def stock_calls(
    cls: type[Optimizer], options: dict[str, Any], noise_seed: int | None = None
) -> Callable[[Iterable[Parameter]], Phase]:
    """What makes the phase of torch's calls around an optimizer of this class."""

    def build(params: Iterable[Parameter]) -> Phase:
        calls = StockCalls(cls(params, **options), noise_seed)
        return Phase(calls.optimizer, calls, averages=lambda: calls.averages)

    return build


def one_pass(cls: Any, options: dict[str, Any]) -> Callable[[Iterable[Parameter]], Phase]:
    """What makes the phase that is one step() of ours."""

    def build(params: Iterable[Parameter]) -> Phase:
        optimizer = cls(
            params, **options, max_grad_norm=MAX_GRAD_NORM, ema_decay=EMA_DECAY, zero_grads=True
        )
        return Phase(optimizer, optimizer.step, averages=optimizer.ema_params)

    return build


@dataclass(frozen=True)
class PhaseComparison:
    """The same training with each of the phases.

    Args:
        runs: by name, stock's calls first.
        bound: how far a loss may be from stock's, per step.
        averages_bound: how far the held-out loss of the averages may be.
    """

    title: str
    runs: dict[str, Run]
    bound: np.ndarray
    averages_bound: float

    def failures(self) -> list[str]:
        """What makes the demo exit non-zero, in words; empty when all is well."""
        stock = self.runs[STOCK]
        assert stock.averages_loss is not None
        found = []
        for name, run in self.runs.items():
            assert run.averages_loss is not None
            difference = np.abs(run.losses - stock.losses)
            # Written so that a NaN loss counts as outside.
            outside = ~(difference <= self.bound)
            if outside.any():
                step = int(outside.argmax())
                found.append(
                    f"{name}: loss curves differ by {difference[step]:.2e} at step {step}, "
                    f"more than the {self.bound[step]:.2e} that rounding explains"
                )
            apart = abs(run.averages_loss - stock.averages_loss)
            if not apart <= self.averages_bound:
                found.append(
                    f"{name}: losses of the averages differ by {apart:.2e}, "
                    f"more than the {self.averages_bound:.2e} that rounding explains"
                )
            found += [f"{name}: {n} tensor steps: {why}" for why, n in run.not_fused.items()]
        return [f"{self.title}: {failure}" for failure in found]

    def report(self) -> None:
        """Print the times side by side."""
        stock = self.runs[STOCK]
        n_steps = len(stock.losses)
        print(f"\n{self.title}: {n_steps} steps")
        for name, run in self.runs.items():
            print(
                f"  {name:11}: {run.step_seconds / n_steps * 1e3:6.2f} ms per step "
                f"({stock.step_seconds / run.step_seconds:.1f}x), last loss {run.losses[-1]:.6f}, "
                f"of the averages {run.averages_loss:.6f}"
            )
        print(
            f"  bounds: {self.bound[-1]:.1e} and {self.averages_bound:.1e} from the stock calls",
            flush=True,
        )


def compare_phases(
    task: Task, optimizer: str, options: dict[str, Any], n_twins: int
) -> PhaseComparison:
    """Train `task` with each of the phases, and with the twins of stock's calls."""
    stock_class, our_class = getattr(torch.optim, optimizer), getattr(fused_optim, optimizer)
    phases = {
        STOCK: stock_calls(stock_class, options),
        SWAPPED: stock_calls(our_class, options),
        ONE_PASS: one_pass(our_class, options),
    }
    for make_phase in phases.values():
        train(task.first(2), make_phase)  # First calls load code, which is not a phase's time.
    runs = {name: train(task, make_phase) for name, make_phase in phases.items()}
    twins = [train(task, stock_calls(stock_class, options, seed)) for seed in range(n_twins)]
    averages_losses = np.array([[twin.averages_loss] for twin in twins])
    return PhaseComparison(
        f"{task.name}, {optimizer}: clip, step, average and zero",
        runs,
        tolerance(runs[STOCK].losses, np.array([twin.losses for twin in twins])),
        tolerance(np.array([runs[STOCK].averages_loss]), averages_losses).item(),
    )
