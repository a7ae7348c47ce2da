"""Train two small models with torch.optim and with fused_optim, and compare curves and times.

Exits with 1 if a loss curve leaves the bound derived in demo_bound.py, if a tensor was not stepped
by a fused_optim kernel, or if a model learned nothing. demo_phase.py then times all that a training loop
does around the step too.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # The plot is a file; the machine may have no display.
import matplotlib.pyplot as plt
import numpy as np
import torch
from demo_bound import add_rounding_noise, tolerance
from demo_phase import compare_phases
from demo_tasks import Task, blind_loss, characters, digits
from demo_train import Phase, Run, train
from torch.nn import Parameter
from torch.optim import Optimizer

import fused_optim
from fused_optim.optimizers import REPLACED

MakeOptimizer = Callable[..., Optimizer]

# Every optimizer that torch.optim has too, on the cheaper task but for AdamW.
CHARACTERS_OPTIMIZERS = {"AdamW": {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}}
DIGITS_OPTIONS = {
    "Adam": {"lr": 2e-3},
    "RAdam": {"lr": 1e-2},
    "ASGD": {"lr": 0.5, "t0": 50},
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    "RMSprop": {"lr": 1e-3, "momentum": 0.5, "centered": True},
}
DIGITS_OPTIMIZERS = {
    stock.__name__: DIGITS_OPTIONS.get(stock.__name__, {})
    for stock in REPLACED
    if stock.__name__ not in CHARACTERS_OPTIMIZERS
}

# Student's t with 4 degrees of freedom asks for a factor of 34 over 230 steps; with 3 it would be
# 80, with 6 it would be 16, and every twin costs one more training run.
N_TWINS = 4

# A user is watching: each training, six runs of it with the twins, takes ten seconds at most.
N_EPOCHS, N_STEPS = 4, 30
# The phases' seven runs clip all grads.
N_PHASE_STEPS = 15

PLOT = Path(__file__).resolve().parents[1] / "build" / "demo" / "curves.png"


@dataclass(frozen=True)
class Comparison:
    """The same training with a stock and a fused optimizer, and how far they may differ."""

    task: Task
    optimizer: str
    stock: Run
    fused: Run
    bound: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        return np.abs(self.fused.losses - self.stock.losses)

    def failures(self) -> list[str]:
        """What makes the demo exit non-zero, in words; empty when all is well."""
        found = []
        # Written so that a NaN loss counts as outside.
        outside = ~(self.difference <= self.bound)
        if outside.any():
            step = int(outside.argmax())
            found.append(
                f"loss curves differ by {self.difference[step]:.2e} at step {step}, "
                f"more than the {self.bound[step]:.2e} that rounding explains"
            )
        found += [f"{n} tensor steps: {why}" for why, n in self.fused.not_fused.items()]
        blind = blind_loss(torch.cat([targets for _, targets in self.task.batches]))
        for name, run in (("stock", self.stock), ("fused", self.fused)):
            last = run.losses[-10:].mean()
            if not last < blind:
                found.append(f"{name} learned nothing: loss {last:.3f}, blind guess {blind:.3f}")
        return [f"{self.task.name}, {self.optimizer}: {failure}" for failure in found]


def step_alone(
    make_optimizer: MakeOptimizer, noise_seed: int | None = None
) -> Callable[..., Phase]:
    """What makes the phase that is step() and nothing else; with a `noise_seed`, a twin's."""

    def build(params: Iterable[Parameter]) -> Phase:
        optimizer = make_optimizer(params)
        if noise_seed is not None:
            add_rounding_noise(optimizer, noise_seed)
        return Phase(optimizer, optimizer.step, before_backward=optimizer.zero_grad)

    return build


def compare(task: Task, optimizer: str, stock: MakeOptimizer, fused: MakeOptimizer) -> Comparison:
    """Train `task` with both, and with the twins that tell how far they may differ."""
    for make_optimizer in (stock, fused):
        train(
            task.first(3), step_alone(make_optimizer)
        )  # First calls load code, which is not a step's time.
    stock_run = train(task, step_alone(stock))
    fused_run = train(task, step_alone(fused))
    twins = [train(task, step_alone(stock, seed)).losses for seed in range(N_TWINS)]
    bound = tolerance(stock_run.losses, np.array(twins))
    return Comparison(task, optimizer, stock_run, fused_run, bound)


def report(comparison: Comparison) -> None:
    """Print one comparison."""
    stock, fused = comparison.stock, comparison.fused
    params = list(comparison.task.build().parameters())
    numel = sum(param.numel() for param in params)
    worst = int(comparison.difference.argmax())
    closest = (comparison.difference / comparison.bound).max()
    print(
        f"\n{comparison.task.name}, {comparison.optimizer}: {numel:,} parameters in "
        f"{len(params)} tensors, {len(stock.losses)} steps, loss {stock.losses[0]:.3f} -> "
        f"{stock.losses[-10:].mean():.3f}"
    )
    print(
        f"  curves: largest difference {comparison.difference[worst]:.2e} at step {worst} "
        f"(bound there {comparison.bound[worst]:.2e}); never above {closest:.1%} of the bound"
    )
    print(
        f"  held-out accuracy: torch.optim {stock.accuracy:.1%}, fused_optim {fused.accuracy:.1%}"
    )
    for name, run in (("torch.optim", stock), ("fused_optim", fused)):
        print(
            f"  {name}: {run.step_seconds * 1e3:7.1f} ms in step() of "
            f"{run.seconds:5.2f} s training ({run.step_seconds / run.seconds:.1%})"
        )
    print(f"  step(): {stock.step_seconds / fused.step_seconds:.1f}x faster", flush=True)


def plot(comparisons: list[Comparison], path: Path) -> None:
    """Save the loss curves, and their differences under their bounds."""
    figure, axes = plt.subplots(
        2, len(comparisons), figsize=(3.4 * len(comparisons), 6), sharex="col", squeeze=False
    )
    for (curve, gap), comparison in zip(axes.T, comparisons, strict=True):
        curve.set_title(f"{comparison.task.name}, {comparison.optimizer}")
        curve.plot(comparison.stock.losses, label="torch.optim", linewidth=3, color="tab:orange")
        curve.plot(comparison.fused.losses, label="fused_optim", linewidth=1, color="tab:blue")
        curve.set_ylim(bottom=0)
        gap.semilogy(comparison.bound, label="bound", color="tab:red", linestyle="--")
        # Equal losses have no place on a log axis and leave a gap.
        differences = np.where(comparison.difference > 0, comparison.difference, np.nan)
        gap.semilogy(differences, ".", label="difference", markersize=3, color="tab:blue")
        gap.set_xlabel("step")
    axes[0, 0].set_ylabel("training loss (nats)")
    axes[1, 0].set_ylabel("|fused_optim - torch.optim|")
    axes[0, 0].legend()
    axes[1, 0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Run every comparison; 0 if all hold."""
    torch.use_deterministic_algorithms(True)
    # Models this small gain little from a second thread, and threads that wait for each other on a
    # machine with other work to do can make a step a hundred times slower.
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread")
    comparisons = []
    for task, optimizers in (
        (digits(N_EPOCHS), DIGITS_OPTIMIZERS),
        (characters(N_STEPS), CHARACTERS_OPTIMIZERS),
    ):
        for name, options in optimizers.items():
            comparison = compare(
                task,
                name,
                lambda params, n=name, o=options: getattr(torch.optim, n)(params, **o),
                lambda params, n=name, o=options: getattr(fused_optim, n)(params, **o),
            )
            report(comparison)
            comparisons.append(comparison)
    [(name, options)] = CHARACTERS_OPTIMIZERS.items()
    phases = compare_phases(characters(N_PHASE_STEPS), name, options, N_TWINS)
    phases.report()
    plot(comparisons, PLOT)
    failures = [f for comparison in (*comparisons, phases) for f in comparison.failures()]
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if not failures:
        print("\nevery curve within its bound, every tensor stepped by a fused_optim kernel")
    print(f"{time.perf_counter() - start:.0f} s in all; plot: {os.path.relpath(PLOT)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
