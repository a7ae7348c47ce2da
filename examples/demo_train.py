"""The demo's training loop: batches in, losses and times out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from demo_tasks import Task, accuracy_of, loss_of
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


@dataclass(frozen=True)
class Phase:
    """What a loop does between backward() and the next forward.

    Args:
        optimizer: whose step is part of it.
        run: all that is timed.
        before_backward: what is not.
        averages: of the params, in their order, where there are any.
    """

    optimizer: Optimizer
    run: Callable[[], object]
    before_backward: Callable[[], object] = lambda: None
    averages: Callable[[], list[Tensor]] | None = None


@dataclass(frozen=True)
class Run:
    """One training run: a loss per step, what it learned, and where its time went.

    Args:
        step_seconds: in all phases together.
        averages_loss: held-out loss of the averages; None without them.
    """

    losses: np.ndarray
    accuracy: float
    seconds: float
    step_seconds: float
    not_fused: dict[str, int]
    averages_loss: float | None = None


def train(task: Task, make_phase: Callable[[Iterable[Parameter]], Phase]) -> Run:
    """Train on all batches of `task`."""
    torch.manual_seed(0)
    model = task.build()
    phase = make_phase(model.parameters())
    losses: list[float] = []
    not_fused: dict[str, int] = {}
    step_seconds = 0.0
    start = time.perf_counter()
    for batch in task.batches:
        phase.before_backward()
        loss = loss_of(model, batch)
        loss.backward()
        step_start = time.perf_counter()
        phase.run()
        step_seconds += time.perf_counter() - step_start
        losses.append(loss.item())
        for why, n_tensors in _not_fused(phase.optimizer).items():
            not_fused[why] = not_fused.get(why, 0) + n_tensors
    seconds = time.perf_counter() - start
    accuracy = accuracy_of(model, task.held_out)
    averages_loss = None
    if phase.averages is not None:
        with torch.no_grad():
            for param, average in zip(model.parameters(), phase.averages(), strict=True):
                param.copy_(average)
            averages_loss = loss_of(model, task.held_out).item()
    return Run(np.array(losses), accuracy, seconds, step_seconds, not_fused, averages_loss)


def _not_fused(optimizer: Optimizer) -> dict[str, int]:
    """Tensors of the latest step that no kernel served, by reason; stock optimizers have none."""
    report = getattr(optimizer, "last_step", None)
    if report is None:
        return {}
    reasons: dict[str, int] = {}
    for fallback in report.fallbacks:
        reasons[fallback.reason] = reasons.get(fallback.reason, 0) + 1
    with_grad = sum(p.grad is not None for g in optimizer.param_groups for p in g["params"])
    stepped = sum(n for backend, n in report.tensors.items() if backend != "stock")
    missing = with_grad - stepped - len(report.fallbacks)
    if missing:
        reasons["not counted by last_step"] = missing
    return reasons
