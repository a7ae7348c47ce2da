"""What random programs are made of."""

import random

import torch

from support.cases import BACKEND
from support.surgeries import SURGERIES
from support.twins import Run

# The ones after which every optimizer can go on.
SAFE_SURGERIES = [surgery for surgery in SURGERIES if surgery.served == BACKEND]


def steps(run: Run, dice: random.Random) -> None:
    run.step(dice.randint(1, 3))


def step_with_some_grads(run: Run, dice: random.Random) -> None:
    run.set_grads()
    for param in run.params:
        if dice.random() < 0.4:
            param.grad = None
    run.step_as_is()


def step_with_other_strides(run: Run, dice: random.Random) -> None:
    run.set_grads()
    for param in run.params:
        roll = dice.random()  # for those without a grad, too: a copy of a param has none
        if param.grad is not None and param.dim() == 2 and roll < 0.7:
            param.grad = param.grad.t().contiguous().t()
        elif param.grad is not None and param.dim() and param.numel() and roll < 0.3:
            param.grad = param.grad[:1].expand(param.shape)
    run.step_as_is()


def changed_hypers(run: Run, dice: random.Random) -> None:
    for group in run.opt.param_groups:
        key, value = dice.choice(
            [
                ("lr", 0.05),
                ("weight_decay", 0.1),
                ("weight_decay", 0.0),
                ("maximize", True),
                ("eps", 1e-4),
            ]
        )
        if key in group:
            group[key] = value


def added_group(run: Run, dice: random.Random) -> None:
    param = torch.nn.Parameter(run.randn((dice.randint(0, 40),), run.params[0].dtype))
    run.params = [*run.params, param]
    run.opt.add_param_group({"params": [param], "lr": 0.02})


def freed_and_allocated(run: Run, dice: random.Random) -> None:
    run.junk = [run.randn((dice.randint(1, 300),)) for _ in range(20)]
