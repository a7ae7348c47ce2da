"""Random programs of steps, surgery, checkpoints and changed options; one that fails is shrunk.

Programs in torch.optim's formats are judged by the same program on torch.optim, or by their own bits, as all
others are: the same program on the baseline kernels, without the operations that must change nothing.

A few run with all tests. `make fuzz N=100000` runs as many as it is told, and `make fuzz SEED=17` those of
seed 17 again. The shrunk program that hypothesis prints becomes a test that calls `check` with it.
"""

import copy
import io
import itertools
import math
import os
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import fused_optim
from fused_optim import _C
from support.cases import CASES, DTYPES
from support.formats import MASTERS, STATE_DTYPES
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
from support.program import assert_same_bits
from support.surgeries import SURGERIES
from support.twins import SHAPES

N_PROGRAMS = int(os.environ.get("FUZZ_N", "300"))
FIRST_SEED = int(os.environ.get("FUZZ_SEED", "0"))
# Hypothesis remembers all programs of a seed, and takes longer for each the more they are.
PER_SEED = 500

CASE = {case.id: case for case in CASES}
DTYPE = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
# With a tensor that is large enough for 8 bits.
LARGER_SHAPES = (SHAPES[0], (_C.SMALLEST_INT8 // 5 + 1, 5), *SHAPES[2:])

Operation = Callable[[Any, random.Random], None]


def step_with_closure(run: PhaseRun, dice: random.Random) -> None:
    def closure() -> float:
        run.set_grads()
        return 1.0

    if run.is_ours:
        run.seen.append(run.opt.step(closure))
        run.n_steps += 1
    else:
        run.seen.append(closure())
        run.step_as_is()


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
    file = io.BytesIO()
    torch.save(run.saved(), file)
    file.seek(0)
    # Copied, as what torch.load has read cannot be resized.
    run.load(copy.deepcopy(torch.load(file, weights_only=True)))


def earlier_checkpoint(run: PhaseRun, dice: random.Random) -> None:
    saved = run.saved()
    run.step()
    run.load(saved)


def copied(run: PhaseRun, dice: random.Random) -> None:
    run.opt, run.params, run.shadows = copy.deepcopy((run.opt, run.params, run.shadows))


def pickled(run: PhaseRun, dice: random.Random) -> None:
    whole = (run.opt, run.params, run.shadows)
    run.opt, run.params, run.shadows = pickle.loads(pickle.dumps(whole))


def flags_of_stock(run: PhaseRun, dice: random.Random) -> None:
    """fused and foreach change nothing in ours; the reference keeps its for-loop."""
    flag = dice.choice(["foreach", "fused"])
    for group in run.opt.param_groups:
        if run.is_ours and flag in group:
            group[flag] = True


def changed_norm(run: PhaseRun, dice: random.Random) -> None:
    norm = dice.choice([None, 0.1, 10.0, math.inf])
    run.phase = Phase({**run.phase.options, "max_grad_norm": norm})
    if run.is_ours:
        run.opt.max_grad_norm = norm


def changed_format(run: PhaseRun, dice: random.Random) -> None:
    for group in run.opt.param_groups:
        if "state_dtype" in group:
            group["state_dtype"] = dice.choice(list(STATE_DTYPES.values()))
    run.step()  # a checkpoint before it would convert the states once more


OPERATIONS: dict[str, Operation] = {
    one.__name__: one
    for one in (
        steps,
        step_with_some_grads,
        step_with_other_strides,
        step_with_closure,
        step_with_a_bad_grad,
        step_without_any_grad,
        changed_hypers,
        changed_norm,
        changed_format,
        added_group,
        checkpoint,
        earlier_checkpoint,
        copied,
        pickled,
        frozen_midway,
        flags_of_stock,
        freed_and_allocated,
    )
}
OPERATIONS |= {one.id: lambda run, dice, one=one: one.operate(run) for one in SAFE_SURGERIES}
STEPS = [name for name in OPERATIONS if name.startswith(("steps", "step_"))]

# After these, every bit is what it was.
NEUTRAL = {
    "checkpoint",
    "copied",
    "pickled",
    "flags_of_stock",
    "new param data",
    "new state data",
    "inner dicts replaced",
    "inner dicts reordered",
    "state reordered",
    "own grad buffers",
    "reloaded checkpoint",
}
# Random bits and blocks of 64 elements go by the order of the elements in memory.
RELAID = {
    "param data in another layout",
    "state in another layout",
    "state views of a larger tensor",
}
# A product of codes is no state in their format, nor is one of another shape.
WITHOUT_FORMATS = RELAID | {"new state tensors", "resized param"}
SAVES, COPIES = {"checkpoint", "earlier_checkpoint", "reloaded checkpoint"}, {"copied", "pickled"}
# Averages belong to the optimizer that made them; stock's would have to be taken along.
WITHOUT_AVERAGES = {"groups given to another optimizer", "deep copied", "reloaded checkpoint"}

OPTIONS = {
    "max_grad_norm": [None, 0.5, 5.0, 1e6],
    "write_clipped_grads": [False, True],
    "skip_nonfinite": [False, True],
    "zero_grads": [False, True],
    "ema_decay": [None, 0.0, 0.5, 0.99],
    "ema_warmup": [False, True],
}
FORMATS = {"state_dtype": list(STATE_DTYPES.values()), "master": list(MASTERS)}


def none_or_some_of(options: dict[str, list]) -> st.SearchStrategy[dict[str, Any]]:
    """In one draw: each takes hypothesis as long as a step."""
    some = [dict(zip(options, chosen)) for chosen in itertools.product(*options.values())]
    return st.sampled_from([{}] * (len(some) // 3) + some)


options_of_one_pass, formats = none_or_some_of(OPTIONS), none_or_some_of(FORMATS)
# As many steps as all the rest.
operations = st.lists(
    st.sampled_from(STEPS * (len(OPERATIONS) // len(STEPS)) + list(OPERATIONS)),
    min_size=1,
    max_size=10,
)


def raises_as_stock(run: PhaseRun, name: str) -> bool:
    """Whether torch.optim raises: state_dict() with strangers in it, a setstate with a user's keys alone."""
    strangers = {key for key in run.opt.state if torch.is_tensor(key)} - set(run.all_params())
    alone = any(state.keys() == {"my_mask"} for state in run.opt.state.values())
    return bool(name in SAVES and strangers) or (name in SAVES | COPIES and alone)


def program_of(
    names: list[str], seed: int, left_out: Callable[[PhaseRun, str], bool]
) -> Callable[[PhaseRun], None]:
    def program(run: PhaseRun) -> None:
        run.step()
        for i, name in enumerate(names):
            impossible = WITHOUT_AVERAGES if run.phase.options else set()
            if run.phase.options.keys() & FORMATS.keys():
                impossible = impossible | WITHOUT_FORMATS
            if name not in impossible and not left_out(run, name):
                OPERATIONS[name](run, random.Random(100 * seed + i))
            params = run.all_params()
            if len({id(param) for param in params}) < len(params):
                return  # no group may list a param twice; what stock's calls make of it differs by call
        run.step()

    return program


@contextmanager
def plain_kernels() -> Iterator[None]:
    isa = _C.isa()
    _C.set_isa("baseline")
    try:
        yield
    finally:
        _C.set_isa(isa)


def harvest(run: PhaseRun) -> dict[str, torch.Tensor]:
    """What must be the same: params, the rule's states, averages."""
    found = {}
    for i, param in enumerate(run.all_params()):
        found[f"param {i}"] = param.detach()
        states = run.state(param).items()
        found |= {
            f"{key} {i}": value
            for key, value in states
            if torch.is_tensor(value) and key != "my_mask"  # which a checkpoint casts
        }
    if any(group.get("ema_decay") is not None for group in run.opt.param_groups):
        found |= {f"average {i}": average for i, average in enumerate(run.averages())}
    return found


def assert_neutral(case: str, phase: Phase, names: list[str], seed: int, **made: Any) -> PhaseRun:
    """The same bits without what must change nothing, on the baseline kernels; or the same error."""

    def run(kernels: Any, left_out: set[str]) -> PhaseRun:
        run = PhaseRun(CASE[case], CASE[case].fused, phase, **made)
        program = program_of(
            names,
            seed,
            lambda run, name: (
                name in left_out
                or raises_as_stock(run, name)
                or (name == "module there and back" and made["dtype"] != torch.float32)
            ),
        )
        try:
            with kernels:
                program(run)
        except Exception as error:
            run.error = error
        return run

    # An expanded grad is written by torch.optim's code, whose bits go by the layout.
    writes_grads = phase.zero_grads or phase.write_clipped_grads
    neutral = NEUTRAL if writes_grads else NEUTRAL | RELAID
    full, bare = run(nullcontext(), set()), run(plain_kernels(), neutral)
    if type(full.error) is not type(bare.error):
        raise full.error or bare.error
    if full.error is None:
        assert_same_bits(harvest(full), harvest(bare))
    return full


def dtypes_for(judge: str, case: str, names: list[str]) -> list[str]:
    """Those in which the judge gives the same.

    Loading a checkpoint casts what is one number to the dtype of a float64 param, and in torch.optim of any.
    Its squares underflow in float16; in bfloat16 its variance may be negative. Where a decay cancels a grad,
    or momentum does in Lion, what is left is divided by its own size: the more programs there are, the
    smaller is the smallest of them, until a rounding turns its sign. In float64 that takes 1e15 elements.
    """
    rule = getattr(fused_optim, CASE[case].optimizer)._rule
    has_numbers = _C.rules()[rule]["scalars"]
    if judge == "own bits":
        return [dtype for dtype in DTYPE if dtype != "float64" or not has_numbers]
    options = dict(CASE[case].options)
    may_cancel = CASE[case].optimizer == "Lion" or options.get("weight_decay")
    if may_cancel or "changed_hypers" in names:
        return ["float64"]
    is_rough = options.get("centered") or has_numbers
    return ["float32", "float64"] if is_rough else ["float32", "float64", "bfloat16"]


@st.composite
def programs(draw: st.DrawFn) -> dict[str, Any]:
    judge = draw(st.sampled_from(["torch.optim", "own bits"]))
    case, options = draw(st.sampled_from(list(CASE))), draw(options_of_one_pass)
    names = draw(operations)
    if judge == "torch.optim":
        names = [name for name in names if name != "changed_format"]
    else:
        options = options | draw(formats)
    dtype = draw(st.sampled_from(dtypes_for(judge, case, names)))
    drawn = {"judge": judge, "case": case, "dtype": dtype, "options": options, "names": names}
    return {**drawn, "seed": draw(st.integers(0, 999))}


seen: Counter[str] = Counter()


def check(
    judge: str, case: str, dtype: str, options: dict[str, Any], names: list[str], seed: int
) -> None:
    seen["programs"] += 1
    phase = Phase(options)
    if judge == "torch.optim":
        program = program_of(names, seed, lambda run, name: False)
        run, stock = run_phases(CASE[case], phase, program, dtype=DTYPE[dtype])
        # An optimizer that takes over from another counts from 0.
        assert run.error or run.opt.skipped_steps.item() <= len(stock.skipped)
    else:
        shapes = LARGER_SHAPES if options.keys() & FORMATS.keys() else SHAPES
        run = assert_neutral(case, phase, names, seed, shapes=shapes, dtype=DTYPE[dtype])
    seen[f"judged by {judge}"] += 1
    seen["steps"] += run.n_steps
    seen["ended by an error"] += run.error is not None


def test_what_is_neutral_or_left_out_is_there() -> None:
    assert OPERATIONS.keys() >= NEUTRAL | WITHOUT_FORMATS
    assert {one.id for one in SURGERIES} >= WITHOUT_AVERAGES


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + -(-N_PROGRAMS // PER_SEED)))
def test_random_programs(seed: int) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=min(PER_SEED, N_PROGRAMS),
        database=None,
        report_multiple_bugs=False,
        deadline=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(programs())
    def program(drawn):
        check(**drawn)

    seen.clear()
    program()
    print(f"seed {seed}: {dict(seen)}")
