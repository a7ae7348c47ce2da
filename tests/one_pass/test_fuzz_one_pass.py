"""Random programs with every combination of the options of one pass, against the same in stock's calls."""

import copy
import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.cases import CASES
from support.operations import (
    SAFE_SURGERIES,
    added_group,
    changed_hypers,
    freed_and_allocated,
    step_with_other_strides,
    step_with_some_grads,
    steps,
)
from support.phases import Phase, PhaseRun, run_phases
from support.surgeries import SURGERIES

N_PROGRAMS = 120
N_OPERATIONS = 10
DTYPES = (torch.float32, torch.float64)


def step_with_a_bad_grad(run: PhaseRun, dice: random.Random) -> None:
    run.set_grads()
    params = [param for param in run.all_params() if param.numel() > 0]
    if params and run.phase.skip_nonfinite:  # otherwise all is NaN from here
        dice.choice(params).grad.flatten()[0] = dice.choice([math.inf, -math.inf, math.nan])
        param = dice.choice(params)
        param.grad = torch.full_like(param, dice.choice([math.inf, -math.inf, math.nan]))
    run.step_as_is()


def step_without_any_grad(run: PhaseRun, dice: random.Random) -> None:
    for param in run.all_params():
        param.grad = None
    run.step_as_is()


def frozen_midway(run: PhaseRun, dice: random.Random) -> None:
    params = run.all_params()
    if params:
        dice.choice(params).requires_grad_(False)


def checkpoint(run: PhaseRun, dice: random.Random) -> None:
    saved = run.saved()
    if dice.random() < 0.5:
        run.step()
    run.load(saved)


def copied(run: PhaseRun, dice: random.Random) -> None:
    whole = (run.opt, run.params, run.shadows)
    if dice.random() < 0.5:
        run.opt, run.params, run.shadows = copy.deepcopy(whole)
    else:
        run.opt, run.params, run.shadows = pickle.loads(pickle.dumps(whole))


def changed_norm(run: PhaseRun, dice: random.Random) -> None:
    norm = dice.choice([None, 0.1, 10.0, math.inf])
    run.phase = Phase({**run.phase.options, "max_grad_norm": norm})
    if run.is_ours:
        run.opt.max_grad_norm = norm


OPERATIONS: list[Callable[[Any, random.Random], None]] = [
    steps,
    steps,
    steps,
    step_with_some_grads,
    step_with_other_strides,
    step_with_a_bad_grad,
    step_without_any_grad,
    changed_hypers,
    changed_norm,
    added_group,
    checkpoint,
    copied,
    frozen_midway,
    freed_and_allocated,
]

# Another optimizer has averages of its own; a copy made there would have to take stock's along.
OTHER_OPTIMIZERS = ("groups given to another optimizer", "deep copied")
ALLOWED_SURGERIES = [one for one in SAFE_SURGERIES if one.id not in OTHER_OPTIMIZERS]


def drawn_phase(dice: random.Random) -> Phase:
    choices = {
        "max_grad_norm": [None, 0.5, 5.0, 1e6],
        "write_clipped_grads": [False, True],
        "skip_nonfinite": [False, True],
        "zero_grads": [False, True],
        "ema_decay": [None, 0.0, 0.5, 0.99],
        "ema_warmup": [False, True],
    }
    return Phase({key: dice.choice(values) for key, values in choices.items()})


def program_of(seed: int) -> Callable[[PhaseRun], None]:
    def program(run: PhaseRun) -> None:
        dice = random.Random(seed)
        for _ in range(N_OPERATIONS):
            if dice.random() < 0.3:
                dice.choice(ALLOWED_SURGERIES).operate(run)
            else:
                dice.choice(OPERATIONS)(run, dice)
            params = run.all_params()
            if len({id(param) for param in params}) < len(params):
                return  # no group may list a param twice; what stock's calls make of it differs by call
        run.step()

    return program


def test_the_surgeries_left_out_are_there() -> None:
    assert {surgery.id for surgery in SURGERIES} >= set(OTHER_OPTIMIZERS)


@pytest.mark.parametrize("seed", range(N_PROGRAMS))
def test_random_program(seed: int) -> None:
    dice = random.Random(seed)
    case = dice.choice(CASES)
    phase = drawn_phase(dice)
    ours, stock = run_phases(case, phase, program_of(seed), dtype=dice.choice(DTYPES))
    assert ours.opt.skipped_steps.item() <= stock.n_skipped  # a copy or checkpoint may begin anew
