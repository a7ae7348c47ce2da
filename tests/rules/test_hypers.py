"""Hyperparameters are read from the group at each step, whoever wrote them there."""

import inspect
import math
import random
from decimal import Decimal

import pytest
import torch
from torch.optim import lr_scheduler

from fused_optim import _C
from support.cases import DEVICE, Case
from support.marks import all_cases, each_optimizer
from support.twins import SHAPES, Run, run_both


def cycles(opt: torch.optim.Optimizer) -> bool:
    """Whether a cyclic scheduler can write momentum, or betas, into the groups."""
    return "betas" in opt.defaults or bool(opt.defaults.get("momentum"))


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3], 0.5),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.25, 2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, 1.0, 4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)], [2]
    ),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 4),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, 2, cycle_momentum=cycles(opt)),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(
        opt, 0.1, total_steps=8, cycle_momentum=cycles(opt)
    ),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, 0.01, 2),
}


def test_every_scheduler_of_torch_is_here() -> None:
    public = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value)
        and issubclass(value, lr_scheduler.LRScheduler)
        and value is not lr_scheduler.LRScheduler
        and not name.startswith("_")
    }
    assert public <= set(SCHEDULERS)


@each_optimizer
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(case: Case, name: str) -> None:
    def program(run: Run) -> None:
        scheduler = SCHEDULERS[name](run.opt)
        for epoch in range(6):
            run.step()
            if name == "ReduceLROnPlateau":
                scheduler.step(float(epoch))
            else:
                scheduler.step()
            run.seen.append(float(run.opt.param_groups[0]["lr"]))
        run.step()

    ours, _ = run_both(case, program, tensors={case.backend: len(SHAPES)})
    assert len(set(ours.seen)) > 1, "the scheduler changed nothing"


@each_optimizer
def test_step_is_a_bound_method_that_schedulers_wrap(case: Case) -> None:
    opt = case.fused([torch.nn.Parameter(torch.zeros(1))])
    assert inspect.ismethod(opt.step)
    assert opt.step.__self__ is opt and opt.step.__func__ is type(opt).step
    lr_scheduler.StepLR(opt, 1)
    assert opt.step._wrapped_by_lr_sched


# Values that each option may take between two steps. Those that add a state key are in test_surgery.
WRITTEN = {
    "lr": 0.07,
    "betas": (0.7, 0.95),
    "eps": 1e-3,
    "weight_decay": 0.3,
    "maximize": True,
    "momentum": 0.3,
    "dampening": 0.4,
    "nesterov": True,
    "alpha": 0.8,
    "lr_decay": 0.2,
    "decoupled_weight_decay": True,
}


@all_cases
def test_every_option_written_between_steps(case: Case) -> None:
    def program(run: Run) -> None:
        run.step(2)
        group = run.opt.param_groups[0]
        for key, value in WRITTEN.items():
            # Momentum switched on midway is missing from the state; switched on before, it is an option.
            if key in group and (key != "momentum" or group[key]):
                group[key] = (not value) if group[key] is True else value
                run.step(1)

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tensor_lr_filled_in_place(case: Case, dtype: torch.dtype) -> None:
    def program(run: Run) -> None:
        lr = run.opt.param_groups[0]["lr"]
        for value in (0.1, 0.03, 0.0):
            lr.fill_(value)
            run.step()
        run.opt.param_groups[0]["lr"] = torch.tensor([0.02], device=DEVICE)
        run.step()

    ours, _ = run_both(
        case,
        program,
        lr=torch.tensor(0.01, dtype=dtype, device=DEVICE),
        tensors={case.backend: len(SHAPES)},
    )
    assert ours.opt.param_groups[0]["lr"].item() == pytest.approx(0.02)


@each_optimizer
def test_tensor_betas_written_into_the_group(case: Case) -> None:
    def program(run: Run) -> None:
        run.step()
        for group in run.opt.param_groups:
            if "betas" in group:
                # Exact in float32, because stock casts a tensor beta to the param's dtype.
                group["betas"] = (torch.tensor(0.75), torch.tensor(0.9375))
        run.step(2)

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@each_optimizer
def test_groups_keep_their_own_hypers(case: Case) -> None:
    def program(run: Run) -> None:
        run.opt = run.make(
            [
                {"params": run.params[:1], "lr": 0.1},
                {"params": run.params[1:3], "weight_decay": 0.2, "maximize": True},
                {"params": run.params[3:], "lr": 0.0},
            ]
        )
        run.step(3)

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@each_optimizer
def test_differentiable_takes_stocks_path(case: Case) -> None:
    def program(run: Run) -> None:
        run.step(2)

    run_both(case, program, differentiable=True, tensors={"stock": len(SHAPES)})


@each_optimizer
def test_differentiable_carries_gradients(case: Case) -> None:
    def program(run: Run) -> None:
        source = run.randn((5,)).double().requires_grad_()
        param = torch.ones_like(source, requires_grad=True).clone()
        opt = run.make([param], differentiable=True)
        param.grad = source * 2
        opt.step()
        # SGD detaches the grad that becomes its first momentum buffer; a sign passes on none.
        states = [state for state in opt.state[param].values() if state.requires_grad]
        total = param.sum() + sum(state.sum() for state in states)
        (slope,) = torch.autograd.grad(total, source, allow_unused=True)
        run.seen.append(slope)

    ours, _ = run_both(case, program)
    assert ours.error is None
    assert ours.seen[0] is None or torch.count_nonzero(ours.seen[0]) > 0


def test_real_powers_are_as_good_as_they_say() -> None:
    """csrc/rules.h's power(), by way of ASGD: eta = lr / (1 + lambd * lr * step)**alpha."""
    generator = random.Random(0)
    for _ in range(10_000):
        lambd = 10.0 ** generator.uniform(-18, 200) * generator.choice((1, -1))
        base = 1 + lambd
        exponent = generator.uniform(-3, 3)
        if not base > 0 or abs(log2 := math.log2(base) * exponent) > 900:
            continue
        _, eta, _ = _C.advance("asgd", [1.0, lambd, exponent, 0.0, 0.0], [0.0, 1.0, 1.0], False)
        product = Decimal(eta) * Decimal(base) ** Decimal(exponent)  # of 28 digits
        assert abs(float(product - 1)) <= 4 * (6 + abs(log2)) * 2.0**-53, (base, exponent)
    for lambd in (-1.0, -2.0, math.nan):
        assert math.isnan(
            _C.advance("asgd", [1.0, lambd, 0.5, 0.0, 0.0], [0.0, 1.0, 1.0], False)[1]
        )
    infinite = _C.advance("asgd", [1.0, math.inf, 0.5, 0.0, 0.0], [0.0, 1.0, 1.0], False)
    assert infinite[1] == 2.0**-512
