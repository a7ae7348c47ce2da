"""The checks of test_numerics see a rule that is broken on purpose."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from support.cases import CASES, Case
from support.marks import every_dtype, plain_optimizers
from support.numerics import check_close_to_stock, check_float64_update, check_rms_against_oracle

pytestmark = pytest.mark.usefixtures("one_thread")


def _with(case: Case, key: str, value: Any) -> Case:
    return Case(case.optimizer, tuple({**dict(case.options), key: value}.items()))


def _wrong(value: Any) -> list[Any]:
    """One part in 100 off, or the opposite of a flag; each beta in turn."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, tuple):
        return [
            tuple(_wrong(item)[0] if i == j else item for j, item in enumerate(value))
            for i in range(len(value))
        ]
    return [value * 0.99]


def _mutations() -> Iterator[tuple[Case, Case]]:
    """(case, the same with one option wrong), once for every option of every optimizer."""
    seen = set()
    for case in CASES:
        hypers = case.hypers()
        for key in ("lr", "betas", *(key for key, _ in case.options)):
            value = hypers.get(key)
            # A wrong 0 is 0; tensor options cannot be replaced by name.
            if not value or value == (0.0, 0.999) or case.tensor_options:
                continue
            if (case.optimizer, key) not in seen:
                seen.add((case.optimizer, key))
                yield from ((case, _with(case, key, wrong)) for wrong in _wrong(value))


MUTATIONS = list(_mutations())


@pytest.mark.parametrize(
    ("case", "wrong"), MUTATIONS, ids=[f"{case.id}->{wrong.id}" for case, wrong in MUTATIONS]
)
def test_one_option_wrong(case: Case, wrong: Case) -> None:
    with pytest.raises(AssertionError, match=r"too far apart|other states"):
        check_close_to_stock(case, torch.float32, build=wrong.fused)


@every_dtype
@plain_optimizers
def test_sign_wrong(case: Case, dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="too far apart"):
        check_close_to_stock(case, dtype, build=_with(case, "maximize", True).fused)


@plain_optimizers
def test_one_element_wrong(case: Case) -> None:
    """The last element of one tensor 100 units off."""

    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        def nudge(*_: Any) -> None:
            params[-1].view(-1)[-1].mul_(1 + 100 * torch.finfo(torch.float32).eps)

        optimizer = case.fused(params)
        optimizer.register_step_post_hook(nudge)
        return optimizer

    with pytest.raises(AssertionError, match=r"1 of .* too far apart"):
        check_close_to_stock(case, torch.float32, build=build)


@plain_optimizers
def test_rms_and_float64_checks_see_a_wrong_lr(case: Case) -> None:
    lr = case.hypers()["lr"]
    with pytest.raises(AssertionError, match="RMS error"):
        check_rms_against_oracle(case, torch.float32, build=_with(case, "lr", lr * 0.999).fused)
    # A float32 among the states holds ASGD's.
    change = 1e-6 if case.optimizer == "ASGD" else 1e-11
    wrong = _with(case, "lr", lr * (1 - change))
    with pytest.raises(AssertionError, match="after an update"):
        check_float64_update(case, build=wrong.fused)


@plain_optimizers
def test_silent_fallback(case: Case) -> None:
    """Stock's own code passes every comparison of numbers, but not the check of the backend."""
    with pytest.raises(AssertionError, match="stock"):
        check_close_to_stock(
            case, torch.float32, build=lambda params: case.fused(params, differentiable=True)
        )
