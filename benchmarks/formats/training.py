"""Whole training runs with each format, several seeds each."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from demo_tasks import Batch
from tasks import Training
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import CosineAnnealingLR
from variants import TRAINED, Format, check_served, int8_part

KINDS = ("training", "held-out")


@dataclass(frozen=True)
class Run:
    """Losses of one run: per step, and those of KINDS with the final weights."""

    losses: list[float]
    final: dict[str, float]

    def last_tenth(self) -> float:
        """By how much the loss changed from the tenth of the run before the last to the last."""
        n = max(1, len(self.losses) // 10)
        return statistics.fmean(self.losses[-n:]) - statistics.fmean(self.losses[-2 * n : -n])


@dataclass(frozen=True)
class Comparison:
    """What one model came to.

    Args:
        int8_part: of the params, those whose states int8 stores in 8 bits.
        runs: one per seed, the same seeds in the same order for each format.
    """

    training: Training
    numel: int
    int8_part: float
    runs: dict[Format, list[Run]]

    def final(self, format: Format, kind: str) -> list[float]:
        return [run.final[kind] for run in self.runs[format]]


@dataclass(frozen=True)
class Summary:
    """A list of final losses, one per seed, beside a reference's of the same seeds.

    Args:
        difference: of the means.
        standard_error: of the difference, from the differences seed by seed.
        spread: of the reference, largest minus smallest.
    """

    mean: float
    std: float
    low: float
    high: float
    difference: float
    standard_error: float
    spread: float

    @property
    def is_within(self) -> bool:
        """False for NaN."""
        return abs(self.difference) <= self.spread


def summarize(losses: list[float], reference: list[float]) -> Summary:
    found, expected = torch.tensor([losses, reference], dtype=torch.float64)
    differences = found - expected
    numbers = (
        found.mean(),
        found.std(),
        found.min(),
        found.max(),
        differences.mean(),
        differences.std() / len(losses) ** 0.5,
        expected.max() - expected.min(),
    )
    return Summary(*(number.item() for number in numbers))


def compare(training: Training, n_seeds: int) -> Comparison:
    """Train from the same starts, on the same batches, with each of TRAINED."""
    params = list(training.task.build().parameters())
    return Comparison(
        training,
        sum(param.numel() for param in params),
        int8_part(params),
        {format: [_run(training, format, seed) for seed in range(n_seeds)] for format in TRAINED},
    )


def _run(training: Training, format: Format, seed: int) -> Run:
    task = training.with_seed(seed)
    torch.manual_seed(seed)
    model = task.build()
    for param in model.parameters():
        param.data = param.data.to(format.param_dtype)
    optimizer = format.make(training.optimizer, model.parameters(), **training.options)
    schedule = CosineAnnealingLR(optimizer, len(task.batches))
    losses = []
    for batch in task.batches:
        optimizer.zero_grad()
        loss = _loss_of(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    check_served([optimizer])
    with torch.no_grad():
        final = [
            _loss_of(model, batch).item()
            for batch in (_joined(training.task.batches[: training.n_evaluated]), task.held_out)
        ]
    return Run(losses, dict(zip(KINDS, final)))


def _loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """In float32, whatever the params are stored in: the formats differ in storage alone."""
    inputs, targets = batch
    params = {name: param.float() for name, param in model.named_parameters()}
    logits = functional_call(model, params, (inputs,))
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def _joined(batches: Iterable[Batch]) -> Batch:
    inputs, targets = zip(*batches)
    return torch.cat(inputs), torch.cat(targets)
