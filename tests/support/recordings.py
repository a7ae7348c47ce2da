"""What a trainer has done to its optimizer, recorded from outside, and done again by torch.optim."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from support.cases import OF_TORCH
from support.twins import IMPLEMENTATION_FLAGS, assert_close

Groups = list[dict[str, Any]]
REPLACED = tuple(getattr(torch.optim, name) for name in OF_TORCH)


@dataclass
class Recording:
    """Of each step its groups before it, with copies of the params, and its grads and params after it."""

    optimizers: list[Optimizer] = field(default_factory=list)
    groups: list[Groups] = field(default_factory=list)
    grads: list[list[Tensor | None]] = field(default_factory=list)
    params: list[list[Tensor]] = field(default_factory=list)

    @property
    def optimizer(self) -> Optimizer:
        """The only one that took steps."""
        (optimizer,) = dict.fromkeys(self.optimizers)
        return optimizer

    @property
    def options(self) -> list[Groups]:
        """The options of the groups in each step, but what chooses an implementation."""
        left_out = ("params", *IMPLEMENTATION_FLAGS)
        return [
            [{k: v for k, v in g.items() if k not in left_out} for g in gs] for gs in self.groups
        ]


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """All steps within the context of optimizers that ours replace, not those of their wrappers."""
    recording = Recording()

    def before(optimizer: Optimizer, *_: object) -> None:
        if not isinstance(optimizer, REPLACED):
            return
        recording.optimizers.append(optimizer)
        recording.groups.append(
            [
                {**group, "params": [param.detach().clone() for param in group["params"]]}
                for group in optimizer.param_groups
            ]
        )

    def after(optimizer: Optimizer, *_: object) -> None:
        if not isinstance(optimizer, REPLACED):
            return
        params = [param for group in optimizer.param_groups for param in group["params"]]
        # Lightning runs the backward within the step: they are there only now.
        grads = [param.grad for param in params]
        recording.grads.append([grad if grad is None else grad.clone() for grad in grads])
        recording.params.append([param.detach().clone() for param in params])

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield recording
    finally:
        for hook in hooks:
            hook.remove()


def assert_stock_does_the_same(recording: Recording, stock_class: type[Optimizer]) -> None:
    """From the params, options and grads of each step, torch.optim, with states of its own, gets the same."""
    groups = recording.groups[0]
    known = stock_class([torch.zeros(1)]).defaults.keys() - {"params", *IMPLEMENTATION_FLAGS}
    params = [[torch.nn.Parameter(param.clone()) for param in group["params"]] for group in groups]
    stock = stock_class([{"params": ps} for ps in params], foreach=False)
    for i, grads in enumerate(recording.grads):
        rest = zip(grads, recording.params[i], strict=True)
        found = []
        for group, options in zip(stock.param_groups, recording.groups[i], strict=True):
            group.update({key: options[key] for key in known})
            for param, before in zip(group["params"], options["params"], strict=True):
                param.data.copy_(before)
                param.grad, after = next(rest)
                found.append((after, param, before, options["lr"]))
        stock.step()
        for j, (after, param, before, lr) in enumerate(found):
            assert_close(after, param, i + 1, f"step {i}, params[{j}]")
            if stock_class is torch.optim.AdamW:
                error = (after - param.detach()).abs()
                bound = (i + 1) * adamw_roundings(before, lr)
                assert (error <= bound).all(), f"step {i}, params[{j}]: by {error.max():.3g}"


def adamw_roundings(param: Tensor, lr: float) -> Tensor:
    """How far apart the roundings of one step may bring two float32 implementations.

    Fewer than 16 in each (see twins), half an eps each, of values no larger than the param and 10 lr: by
    Cauchy and Schwarz exp_avg / sqrt(exp_avg_sq) is at most 7.3 with betas of (0.9, 0.999), less with the
    others in use, and the grad's own part of it 0.1 / sqrt(0.001). No weight decay enters them. Those of the
    states live on in later steps.
    """
    return 16 * torch.finfo(torch.float32).eps * (param.abs() + 10 * lr)
