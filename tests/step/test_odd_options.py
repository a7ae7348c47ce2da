"""Options that no kernel takes, written by hand or given at first: as with torch.optim, to the letter."""

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from support.cases import Case
from support.marks import each_optimizer, few_cases
from support.processes import python
from support.twins import Run, run_both, step_or_leave_untouched

FLAGS = {"nesterov", "amsgrad", "centered", "decoupled_weight_decay", "maximize"}
OPTIONS = {
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "momentum",
    "dampening",
    "alpha",
    "lr_decay",
    *FLAGS,
}
# Where one of them is negative, numbers that are nearly equal are subtracted: no bound holds.
MUST_BE_POSITIVE = {"eps", "alpha", "betas"}

VALUES = {
    "None": lambda: None,
    "text": lambda: "0.1",
    "list": lambda: [0.1],
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "negative": lambda: -0.1,
    "1e300": lambda: 1e300,
    "-1e39": lambda: -1e39,
    "10**400": lambda: 10**400,
    "True": lambda: True,
    "False": lambda: False,
    "numpy32": lambda: np.float32(0.5),
    "numpy64": lambda: np.float64(0.5),
    "array": lambda: np.array(0.5),
    "Fraction": lambda: Fraction(1, 2),
    "Decimal": lambda: Decimal("0.5"),
    "complex": lambda: 0.5j,
    "class": lambda: object,
    "tensor": lambda: torch.tensor(0.5),
    "tensor[1]": lambda: torch.tensor([0.5]),
    "tensor[2]": lambda: torch.tensor([0.5, 0.5]),
    "tensor_nan": lambda: torch.tensor(math.nan),
    "tensor_int": lambda: torch.tensor(1),
    "tensor_bool": lambda: torch.tensor(True),
    "tensor_complex": lambda: torch.tensor(0.5 + 0j),
}
BETAS = {
    "none": lambda: None,
    "number": lambda: 0.9,
    "one": lambda: (0.9,),
    "three": lambda: (0.9, 0.99, 0.999),
    "text": lambda: "ab",
    "list": lambda: [0.9, 0.99],
    "tensor": lambda: torch.tensor([0.9, 0.99]),
    "ones": lambda: (1.0, 1.0),  # bias corrections of 0
}


def odd_values(key: str) -> dict[str, Callable[[], object]]:
    if key != "betas":
        negative = {"negative"} if key in MUST_BE_POSITIVE else set()
        return {name: value for name, value in VALUES.items() if name not in negative}
    pairs = {}
    for name, value in odd_values("eps").items():
        pairs[f"{name}, 0.9"] = lambda value=value: (value(), 0.9)
        pairs[f"0.9, {name}"] = lambda value=value: (0.9, value())
    return {**BETAS, **pairs}


def assert_named(ours: Run, stock: Run, key: str) -> None:
    """Stock's own text, with the group and the option."""
    if stock.error is None or isinstance(
        stock.error, KeyError
    ):  # of a state that an option asks for
        return
    text = str(ours.error)
    assert str(stock.error) in text
    assert "group 0" in text and f"{key}=" in text


@few_cases
@pytest.mark.parametrize("n_steps", [0, 1])
def test_written_between_steps(case: Case, n_steps: int) -> None:
    for key in sorted(OPTIONS & Run(case, case.stock).opt.param_groups[0].keys()):
        for value in odd_values(key).values():

            def program(run: Run, key: str = key, value: Callable[[], object] = value) -> None:
                run.step(n_steps)
                run.opt.param_groups[0][key] = value()
                try:
                    step_or_leave_untouched(run)
                    step_or_leave_untouched(run)
                finally:  # what equals nothing, or not itself
                    run.opt.param_groups[0][key] = None

            ours, stock = run_both(case, program, shapes=((7,), ()))
            assert_named(ours, stock, key)


@few_cases
def test_given_to_the_constructor(case: Case) -> None:
    for key in sorted(OPTIONS & Run(case, case.stock).opt.param_groups[0].keys()):
        for value in odd_values(key).values():
            texts = []

            def program(
                run: Run, key: str = key, value: Callable[[], object] = value, texts: list = texts
            ) -> None:
                try:
                    run.opt = run.make(run.params, **{key: value()})
                except Exception as error:
                    texts.append(str(error))
                    raise
                step_or_leave_untouched(run)
                step_or_leave_untouched(run)
                run.opt.param_groups[0][key] = None

            ours, stock = run_both(case, program, shapes=((7,), ()))
            if texts:
                assert texts[0] == texts[1]
            else:
                assert_named(ours, stock, key)


@few_cases
def test_of_one_group_leaves_the_others_to_the_kernels(case: Case) -> None:
    run = Run(case, case.fused)
    run.opt.add_param_group({"params": [torch.nn.Parameter(run.randn((33, 5)))], "lr": math.inf})
    run.step()
    assert run.opt.last_step.tensors == {case.backend: len(run.params), "stock": 1}
    assert "float32's range" in run.opt.last_step.fallbacks[0].reason
    assert run.opt.explain().tensors == run.opt.last_step.tensors


@each_optimizer
@pytest.mark.parametrize("lr", [-0.1, -1e-18, torch.tensor(-0.1), math.nan], ids=str)
def test_negative_learning_rate_is_stepped_with(case: Case, lr: object) -> None:
    def program(run: Run) -> None:
        run.step()
        run.opt.param_groups[0]["lr"] = lr
        run.step(2)
        run.opt.param_groups[0]["lr"] = 0.01
        run.step(2)  # ASGD's lr counts in the step after

    ours, _ = run_both(case, program)
    if case.optimizer != "AdamWScheduleFree" or lr == lr:  # its weight_sum is NaN from then on
        assert ours.opt.last_step.tensors == {case.backend: len(ours.params)}


SCHEDULES = {
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, end_factor=0.0, total_iters=100),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 - t / 100),
}


@each_optimizer
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_that_overshoots(case: Case, name: str) -> None:
    def program(run: Run) -> None:
        scheduler = SCHEDULES[name](run.opt)
        for _ in range(104):
            run.step()
            scheduler.step()
        run.seen.append(run.opt.param_groups[0]["lr"])

    run_both(case, program, shapes=((7,),), lr=1e-3)


WARNS = """
import warnings
import torch, fused_optim
warnings.simplefilter("always")
def step(lr):
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    opt = fused_optim.SGD([param])
    opt.param_groups[0]["lr"] = lr
    with warnings.catch_warnings(record=True) as caught:
        opt.step()
    return [str(warning.message) for warning in caught]
assert step(-1e-18) == []
param = torch.nn.Parameter(torch.ones(3))
opt = fused_optim.SGD([param])
opt.param_groups[0]["lr"] = -0.5
with warnings.catch_warnings():
    warnings.simplefilter("error")
    opt.explain()  # steps with nothing
first, = step(-0.5)
assert "negative learning rate" in first and "-0.5" in first, first
assert step(-0.5) == step(torch.tensor(-1.0)) == []
"""


def test_one_warning_of_a_negative_learning_rate() -> None:
    done = python(WARNS)
    assert done.returncode == 0, done.stderr


@each_optimizer
def test_formats_and_one_pass_with_an_odd_option(case: Case) -> None:
    """What stock steps for us is clipped, averaged, decoded and encoded as ever."""
    params = [torch.nn.Parameter(torch.ones(5000)), torch.nn.Parameter(torch.ones(3))]
    opt = case.fused(params, state_dtype="int8", max_grad_norm=1.0, ema_decay=0.5)
    for lr in (0.01, -math.inf, 0.01, 0.01):
        counts = "eta" in opt.state[params[0]] and not opt.state[params[0]]["eta"].isfinite()
        opt.param_groups[0]["lr"] = lr
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
        assert len(opt.last_step.fallbacks) == (2 if math.isinf(lr) or counts else 0)
    assert opt.grad_norm.item() == pytest.approx(math.sqrt(5003))
    assert len(opt.ema_params()) == 2


class Subclass(torch.Tensor):
    pass


@each_optimizer
def test_tensors_of_a_subclass_are_rehearsed_too(case: Case) -> None:
    def program(run: Run) -> None:
        run.params[0] = torch.nn.Parameter(run.randn((7,)).as_subclass(Subclass))
        run.opt = run.make(run.params)
        run.step()
        run.opt.param_groups[0]["lr"] = "x"
        step_or_leave_untouched(run)

    ours, stock = run_both(case, program)
    assert_named(ours, stock, "lr")
