"""Random programs of steps, surgery, checkpoints and hyperparameter changes, against stock."""

import copy
import io
import pickle
import random
from collections.abc import Callable

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
from support.twins import Run, run_both

N_PROGRAMS = 200
N_OPERATIONS = 10

# An extra step each, in float64 a wrong one is 1e10 times the tolerance.
DTYPES = (torch.float32, torch.float64)


def step_with_closure(run: Run, dice: random.Random) -> None:
    def closure() -> float:
        run.set_grads()
        return 1.0

    run.seen.append(run.opt.step(closure))
    run.n_steps += 1


def checkpoint(run: Run, dice: random.Random) -> None:
    file = io.BytesIO()
    torch.save(run.opt.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    if dice.random() < 0.5:
        run.step()
    run.opt.load_state_dict(saved)


def copied(run: Run, dice: random.Random) -> None:
    if dice.random() < 0.5:
        run.opt, run.params = copy.deepcopy((run.opt, run.params))
    else:
        run.opt, run.params = pickle.loads(pickle.dumps((run.opt, run.params)))


def flags_of_stock(run: Run, dice: random.Random) -> None:
    """fused and foreach change nothing in ours; the reference keeps its for-loop."""
    flag = dice.choice(["foreach", "fused"])
    for group in run.opt.param_groups:
        if run.is_ours and flag in group:
            group[flag] = True


OPERATIONS: list[Callable[[Run, random.Random], None]] = [
    steps,
    steps,
    step_with_some_grads,
    step_with_other_strides,
    step_with_closure,
    changed_hypers,
    added_group,
    checkpoint,
    copied,
    flags_of_stock,
    freed_and_allocated,
]


def program_of(seed: int) -> Callable[[Run], None]:
    def program(run: Run) -> None:
        dice = random.Random(seed)
        for _ in range(N_OPERATIONS):
            if dice.random() < 0.4:
                dice.choice(SAFE_SURGERIES).operate(run)
            else:
                dice.choice(OPERATIONS)(run, dice)
        run.step()

    return program


@pytest.mark.parametrize("seed", range(N_PROGRAMS))
def test_random_program(seed: int) -> None:
    dice = random.Random(seed)
    case = dice.choice(CASES)
    run_both(case, program_of(seed), dtype=dice.choice(DTYPES))
