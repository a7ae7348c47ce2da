"""The error of the update: the same gradients, step by step, for every format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from demo_tasks import Task, loss_of
from torch import Tensor
from torch.optim import AdamW, Optimizer
from variants import MASTERS, STATES, Format, NearestAdamW, check_served, int8_part

LR = 1e-3
EPS = 1e-8
SCALES = (1.0, 1e-6, 1e6)
NEAREST = "nearest"  # the emulation's place among the formats
MEASURE_EVERY = 20
Make = Callable[[list[Tensor], float], Optimizer]


@dataclass(frozen=True)
class Replay:
    """What came out.

    Args:
        nmse: {scale: {format or NEAREST: [NMSE of the update at each of `steps`]}}
        displacement: {format with its master: NMSE of the way from the first to the last weights}
        int8_part: of the elements, those in tensors large enough for int8.
    """

    steps: list[int]
    nmse: dict[float, dict[Format | str, list[float]]]
    displacement: dict[Format, float]
    numel: int
    int8_part: float
    losses: list[float]


class _Follower:
    """An optimizer that takes the recorded gradients.

    With `weight_decay` 0 an update does not depend on the params. They are 0 before every step where
    the update is measured, so that it is what they hold afterwards, without another rounding.
    """

    def __init__(self, make: Make, params: list[Tensor], eps: float = EPS) -> None:
        self.params = [param.requires_grad_() for param in params]
        self.optimizer = make(self.params, eps)

    @torch.no_grad()
    def step(self, grads: list[Tensor], *, from_zero: bool) -> None:
        for param, grad in zip(self.params, grads):
            param.grad = grad.to(param.dtype, copy=True)
            if from_zero:
                param.zero_()
        self.optimizer.step()


def run(task: Task) -> Replay:
    """Train with stock AdamW in float32; every follower steps with the same gradients."""
    torch.manual_seed(0)
    model = task.build()
    params = list(model.parameters())
    makes: dict[Format | str, Make] = {format: _make(format) for format in STATES}
    makes[NEAREST] = _nearest
    trainer = AdamW(params, lr=LR, eps=EPS, weight_decay=0.0, fused=True)
    references = {
        scale: _Follower(_stock, _copies(params, torch.float64), EPS * scale) for scale in SCALES
    }
    followers = {
        scale: {
            kind: _Follower(make, _copies(params, torch.float32), EPS * scale)
            for kind, make in makes.items()
        }
        for scale in SCALES
    }
    start = _copies(params, torch.bfloat16)
    master_reference = _Follower(_stock, _copies(start, torch.float64))
    masters = {
        format: _Follower(_make(format), _copies(start, torch.bfloat16)) for format in MASTERS
    }
    steps, losses = [], []
    nmse = {scale: {kind: [] for kind in found} for scale, found in followers.items()}
    for step, batch in enumerate(task.batches, start=1):
        trainer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
        grads = [param.grad for param in params]
        is_measured = step % MEASURE_EVERY == 0 or step == len(task.batches)
        if is_measured:
            steps.append(step)
        for scale, found in followers.items():
            scaled = [grad * scale for grad in grads]
            references[scale].step(scaled, from_zero=True)
            for kind, follower in found.items():
                follower.step(scaled, from_zero=True)
                if is_measured:
                    nmse[scale][kind].append(_nmse(follower.params, references[scale].params))
        rounded = [grad.bfloat16() for grad in grads]
        for follower in (master_reference, *masters.values()):
            follower.step(rounded, from_zero=False)
        trainer.step()
    check_served(
        follower.optimizer
        for found in (*followers.values(), masters)
        for kind, follower in found.items()
        if kind != NEAREST
    )
    return Replay(
        steps,
        nmse,
        {
            format: _nmse(follower.optimizer.master_params(), master_reference.params, start)
            for format, follower in masters.items()
        },
        sum(param.numel() for param in params),
        int8_part(params),
        losses,
    )


def _make(format: Format) -> Make:
    return lambda params, eps: format.make("AdamW", params, lr=LR, eps=eps, weight_decay=0.0)


def _nearest(params: list[Tensor], eps: float) -> Optimizer:
    return NearestAdamW(params, lr=LR, eps=eps, weight_decay=0.0)


def _stock(params: list[Tensor], eps: float) -> Optimizer:
    return AdamW(params, lr=LR, eps=eps, weight_decay=0.0, fused=True)


def _copies(params: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [param.detach().to(dtype, copy=True) for param in params]


def _nmse(found: list[Tensor], expected: list[Tensor], start: list[Tensor] | None = None) -> float:
    """sum((found - expected)^2) / sum((expected - start)^2), with `start` 0 by default."""
    error = size = 0.0
    for index, (ours, reference) in enumerate(zip(found, expected)):
        reference = reference.detach()
        error += (ours.detach().double() - reference).square().sum().item()
        if start is not None:
            reference = reference - start[index].double()
        size += reference.square().sum().item()
    return error / size
