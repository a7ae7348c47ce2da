"""Ours against torch.optim's for-loop and against float64: every case, shape and dtype."""

import numpy as np
import pytest
import torch

from support.bounds import Machine
from support.cases import CASES, DTYPES, SHAPES, STOCK_SHAPES, Case, Shape, expected_backends
from support.marks import all_cases, each_state, every_dtype, over
from support.numerics import (
    N_STEPS,
    Exact,
    Sampled,
    check_close_to_stock,
    check_float64_update,
    check_rms_against_oracle,
)
from support.oracle import ORACLES

pytestmark = pytest.mark.usefixtures("one_thread")


@every_dtype
@all_cases
def test_close_to_stock(case: Case, dtype: torch.dtype) -> None:
    check_close_to_stock(case, dtype)


# float64 has no finer oracle; it is held to 1e-12 of the update instead.
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize < 8], ids=str)
@each_state
def test_rms_error_against_oracle(case: Case, dtype: torch.dtype) -> None:
    check_rms_against_oracle(case, dtype)


# With a float32 lr tensor stock rounds its step size to float32: test_close_to_stock bounds that.
@over([case for case in CASES if case.tensor_dtype == torch.float64])
def test_float64_within_1e_12_of_the_update(case: Case) -> None:
    check_float64_update(case)


@all_cases
def test_bounds_follow_the_oracle(case: Case) -> None:
    """The values that carry the bounds are those of the papers, to float64 accuracy."""
    run = Sampled(case.stock, SHAPES[:-1], torch.float64)
    exact = Exact(case, Machine.of(torch.float64, torch.float64, False), run)
    param, state = run.param(), {}
    for step in range(1, N_STEPS + 1):
        run.step()
        exact.step(run.grad(), step)
        param, state = ORACLES[case.optimizer](param, run.grad(), state, step, **case.hypers())
    for name, true in {"param": param, **state}.items():
        value = exact.streams()[name]
        # Both round in float64, in different orders of operations.
        assert np.all(np.abs(value.value - true) <= 2 * value.error), name


@pytest.mark.parametrize("shape", STOCK_SHAPES, ids=lambda shape: shape.id)
@all_cases
def test_unservable_tensors_take_stock_alone(case: Case, shape: Shape) -> None:
    """One tensor is bit-equal to stock, the other is served, in the same step."""
    shapes = (shape, SHAPES[-1])
    runs = [Sampled(build, shapes, torch.float32) for build in (case.stock, case.fused)]
    errors = []
    for run in runs:
        try:
            run.step()
            errors.append(None)
        except RuntimeError as error:
            errors.append((type(error), str(error)))
    stock, ours = runs
    assert errors[0] == errors[1]
    if errors[0] is None:
        assert torch.equal(ours.params[0], stock.params[0])
        assert ours.opt.last_step.tensors == expected_backends(shapes, case)
        (fallback,) = ours.opt.last_step.fallbacks
        assert (fallback.group, fallback.index) == (0, 0)
        assert fallback.reason
