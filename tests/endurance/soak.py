"""A million steps of each optimizer among surgery: memory stays flat, bits stay what they are without it.

    make soak [STEPS=1000000] [NAMES="AdamW SGD"]

Two optimizers take half of the steps each. A cycle goes through CHANGES, which are done to both and undone,
and for each of them does one operation of NEUTRAL, to one of the two alone. Then their bits are compared.

After a round of 16 cycles all of one table have met all of the other, and the program is where it was: as
many of Python's blocks and of malloc's bytes are in use, give or take what caches hold. What counts is the
growth over all rounds. Each does an operation at least 27 times; a leak in it, be it of one object, shows as
often, and one in a step far more. Allowed is half of that; and for resident memory, which comes in pages, a
small object for each operation. (GLIBC_TUNABLES: what a thread has freed and keeps at hand counts as in use.)
"""

import argparse
import copy
import ctypes
import functools
import gc
import io
import itertools
import math
import os
import pickle
import statistics
import sys
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_optim import _C
from support.cases import VARIANTS, Case, fullest
from support.program import Program, Streams, assert_same_bits, tame

N_STEPS = 50  # between two operations
WARM_UP = 0.05  # part of the steps before memory is measured
SMALLEST_CHUNK = 32  # bytes that glibc's malloc takes for one, with its header
SMALL_OBJECT = 56  # bytes of a Python object with a few attributes

# The fourth is large enough for 8 bits.
SHAPES = ((7,), (33, 5), (), (_C.SMALLEST_INT8 + 3,), (2, 3, 4, 4))
BFLOAT16_SHAPES = ((130,),)
N_GRADS = 7


@functools.cache
def grads_of(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """One is transposed."""
    grads = [tame(math.prod(shape), dtype, seed).view(shape) for seed in range(N_GRADS)]
    if len(shape) == 2:
        grads[1] = grads[1].t().contiguous().t()
    return grads


# Those of the first group, to be switched on.
OPTIONS = {"ema_decay": None, "state_dtype": None, "rounding_seed": 0}


class Soaked(Program):
    """Params in two groups: float32, and bfloat16 with more bits beside them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(0)
        bfloat16 = [self.new(shape, torch.bfloat16) for shape in BFLOAT16_SHAPES]
        groups = [
            {"params": [self.new(shape) for shape in SHAPES], **OPTIONS},
            {"params": bfloat16, "master": "split8"},
        ]
        super().__init__(case.fused(groups), [])

    def new(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=self.generator).to(dtype))

    @property
    def group(self) -> dict[str, Any]:
        return self.opt.param_groups[0]

    def all_params(self) -> list[Tensor]:
        return [param for group in self.opt.param_groups for param in group["params"]]

    def set_grads(self) -> None:
        writes = self.opt.zero_grads or self.opt.write_clipped_grads
        for i, param in enumerate(self.all_params()):
            grad = grads_of(param.shape, param.dtype)[(self.n_steps + i) % N_GRADS]
            param.grad = grad.clone() if writes else grad

    def harvest(self) -> Streams:
        self.params = self.all_params()
        return super().harvest()


Operation = Callable[[Soaked], object]


# What changes no bit


def checkpoint_loaded(run: Soaked) -> None:
    run.opt.load_state_dict(run.opt.state_dict())


def checkpoint_through_a_file(run: Soaked) -> None:
    file = io.BytesIO()
    torch.save(run.opt.state_dict(), file)
    file.seek(0)
    run.opt.load_state_dict(torch.load(file, weights_only=True))


def deep_copied(run: Soaked) -> None:
    run.opt = copy.deepcopy(run.opt)


def pickled(run: Soaked) -> None:
    run.opt = pickle.loads(pickle.dumps(run.opt))


def another_optimizer(run: Soaked) -> None:
    groups = [{**group, "params": list(group["params"])} for group in run.opt.param_groups]
    other = run.case.fused(groups)
    other.load_state_dict(run.opt.state_dict())
    for key in SWITCHES:
        setattr(other, key, getattr(run.opt, key))
    run.opt = other


def new_storages(run: Soaked) -> None:
    for param in run.all_params():
        param.data = param.data.clone()
        for key, value in run.opt.state.get(param, {}).items():
            if torch.is_tensor(value):
                run.opt.state[param][key] = value.clone()


def new_state_data(run: Soaked) -> None:
    for states in run.opt.state.values():
        for value in states.values():
            if torch.is_tensor(value):
                value.data = value.data.clone()


def replaced_params(run: Soaked) -> None:
    for group in run.opt.param_groups:
        if group.get("ema_decay") is not None:
            continue  # averages belong to the object
        for i, old in enumerate(group["params"]):
            group["params"][i] = nn.Parameter(old.detach().clone(), old.requires_grad)
            if old in run.opt.state:
                run.opt.state[group["params"][i]] = run.opt.state.pop(old)


def param_taken_out_and_put_back(run: Soaked) -> None:
    param = run.group["params"].pop(1)
    states = run.opt.state.pop(param, None)
    run.group["params"].insert(1, param)
    if states is not None:
        run.opt.state[param] = states


def group_added_and_removed(run: Soaked) -> None:
    run.opt.add_param_group({"params": [nn.Parameter(torch.ones(5))], "lr": 0.1})
    run.opt.param_groups.pop()


def dicts_replaced(run: Soaked) -> None:
    copies = {param: dict(states) for param, states in run.opt.state.items()}
    run.opt.state = defaultdict(dict, copies)
    run.opt.param_groups = [dict(group) for group in run.opt.param_groups]


def options_on_and_off_again(run: Soaked) -> None:
    for key, value in SWITCHES.items():
        before = getattr(run.opt, key)
        setattr(run.opt, key, value)
        setattr(run.opt, key, before)
    for key, value in HYPERS.items():
        with switched_in_group(run, key, value):
            pass


def hooks(run: Soaked) -> None:
    run.opt.register_step_pre_hook(lambda *args: None).remove()
    run.opt.register_state_dict_post_hook(lambda *args: None).remove()


def outputs_set_and_taken_away(run: Soaked) -> None:
    run.opt.set_outputs({param: torch.empty_like(param) for param in run.all_params()})
    run.opt.set_outputs(None)


def explained(run: Soaked) -> None:
    str(run.opt.explain())


def refused_step(run: Soaked) -> None:
    run.set_grads()
    with switched_in_group(run, "ema_decay", 2.0):
        try:
            run.opt.step()
        except ValueError:
            return
    raise AssertionError("an ema_decay of 2 was taken")


NEUTRAL: list[Operation] = [
    checkpoint_loaded,
    checkpoint_through_a_file,
    deep_copied,
    pickled,
    another_optimizer,
    new_storages,
    new_state_data,
    replaced_params,
    param_taken_out_and_put_back,
    group_added_and_removed,
    dicts_replaced,
    options_on_and_off_again,
    hooks,
    outputs_set_and_taken_away,
    explained,
    refused_step,
]
ROUND = len(NEUTRAL)  # cycles


# What is done to both, and undone

SWITCHES = {
    "max_grad_norm": 1.0,
    "write_clipped_grads": True,
    "skip_nonfinite": True,
    "zero_grads": True,
}
# Those of torch.optim only where the optimizer has them.
HYPERS = {
    "lr": 1e-4,
    "weight_decay": 0.01,
    "eps": 1e-3,
    "maximize": True,
    "amsgrad": False,  # on from the beginning: its state must be there
    "centered": False,
    "momentum": 0.5,
    "nesterov": True,
    "foreach": True,
    "fused": True,
    "ema_decay": 0.9,
    "state_dtype": "int8",
    "rounding_seed": 7,
}


@contextmanager
def switched(run: Soaked, key: str, value: object) -> Iterator[None]:
    before = getattr(run.opt, key)
    setattr(run.opt, key, value)
    yield
    setattr(run.opt, key, before)


@contextmanager
def switched_in_group(run: Soaked, key: str, value: object) -> Iterator[None]:
    before = run.group.get(key)
    if key in run.group:
        run.group[key] = value
    yield
    if key in run.group:
        run.group[key] = before


@contextmanager
def states_of_bfloat16(run: Soaked) -> Iterator[None]:
    with switched_in_group(run, "state_dtype", torch.bfloat16):
        yield


@contextmanager
def another_master(run: Soaked) -> Iterator[None]:
    run.opt.param_groups[1]["master"] = "split16"
    yield
    run.opt.param_groups[1]["master"] = "split8"


@contextmanager
def skipped_steps(run: Soaked) -> Iterator[None]:
    with switched(run, "skip_nonfinite", True):
        run.set_grads()
        run.all_params()[1].grad = torch.full_like(run.all_params()[1], math.nan)
        run.step_as_is()
        yield


@contextmanager
def steps_without_some_grads(run: Soaked) -> Iterator[None]:
    for n in range(3):
        run.set_grads()
        for i, param in enumerate(run.all_params()):
            if i % 3 == n or n == 2:
                param.grad = None
        run.step_as_is()
    yield


@contextmanager
def added_group(run: Soaked) -> Iterator[None]:
    run.opt.add_param_group({"params": [run.new((11, 3)), run.new(())], "lr": 0.02})
    yield
    for param in run.opt.param_groups.pop()["params"]:
        del run.opt.state[param]


@contextmanager
def removed_param(run: Soaked) -> Iterator[None]:
    param = run.group["params"].pop(0)
    run.opt.state.pop(param, None)
    yield
    run.group["params"].insert(0, param)


@contextmanager
def new_params(run: Soaked) -> Iterator[None]:
    """Without states: a training that begins again, so that values stay what they are in one."""
    run.opt.state.clear()
    for group in run.opt.param_groups:
        group["params"] = [run.new(tuple(old.shape), old.dtype) for old in group["params"]]
    yield


@contextmanager
def longer_param(run: Soaked) -> Iterator[None]:
    """Points are added to a cloud, and pruned."""
    for rows in (40, 33):
        old = run.group["params"][1]
        new = run.group["params"][1] = nn.Parameter(torch.zeros(rows, 5))
        new.data[:33] = old.data[:33]
        states = run.opt.state.pop(old, {})
        for key, value in states.items():
            if torch.is_tensor(value) and value.dim():
                states[key] = torch.zeros(rows, 5, dtype=value.dtype)
                states[key][:33] = value[:33]
        run.opt.state[new] = states
        if rows == 40:
            yield


@contextmanager
def earlier_checkpoint(run: Soaked) -> Iterator[None]:
    saved = copy.deepcopy(run.opt.state_dict())
    yield
    run.opt.load_state_dict(saved)


@contextmanager
def frozen_param(run: Soaked) -> Iterator[None]:
    run.group["params"][1].requires_grad_(False)
    yield
    run.group["params"][1].requires_grad_(True)


CHANGES: list[Callable[[Soaked], AbstractContextManager]] = [
    *(functools.partial(switched, key=key, value=value) for key, value in SWITCHES.items()),
    *(functools.partial(switched_in_group, key=key, value=value) for key, value in HYPERS.items()),
    states_of_bfloat16,
    another_master,
    skipped_steps,
    steps_without_some_grads,
    added_group,
    removed_param,
    new_params,
    longer_param,
    earlier_checkpoint,
    frozen_param,
]


def cycle(runs: list[Soaked], number: int) -> None:
    """All of both tables once; which of them meet depends on the number of the cycle."""
    for i, change in enumerate(CHANGES):
        with ExitStack() as stack:
            for run in runs:
                stack.enter_context(change(run))
                run.step(N_STEPS)
            operation = NEUTRAL[(i + number) % len(NEUTRAL)]
            operation(runs[0])
            for run in runs:
                run.step(N_STEPS)
            try:
                assert_same_bits(runs[0].harvest(), runs[1].harvest())
            except AssertionError as error:
                name = getattr(change, "keywords", {}).get("key") or change.__name__
                raise AssertionError(f"{operation.__name__} during {name}: {error}") from None
        for run in runs:
            run.step()
    assert all(param.isfinite().all() for param in runs[0].all_params())


MALLINFO2 = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Malloc(ctypes.Structure):
    """struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO2.split()]


_mallinfo2 = ctypes.CDLL(None).mallinfo2
_mallinfo2.restype = Malloc


class Marks:
    """What was in use: Python's blocks of up to 512 bytes, malloc's bytes, the process's pages.

    In arrays: marks that were objects would be counted by the next one.
    """

    def __init__(self) -> None:
        self.blocks, self.malloc, self.resident = (array("q") for _ in range(3))

    def set(self) -> None:
        gc.collect()
        info = _mallinfo2()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.blocks.append(sys.getallocatedblocks())
        self.malloc.append(info.uordblks + info.hblkhd)
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE"))


def growth(marks: array) -> float:
    """From one mark to the next: the median over all pairs of marks, as Theil and Sen have it."""
    pairs = itertools.combinations(enumerate(marks), 2)
    return statistics.median((after - before) / (j - i) for (i, before), (j, after) in pairs)


def soak(name: str, n_steps: int) -> None:
    """Raises AssertionError for a bit that differs, or memory that grows."""
    runs = [Soaked(fullest(name)) for _ in range(2)]
    began, n_cycles, marks = time.monotonic(), 0, Marks()
    while sum(run.n_steps for run in runs) < n_steps or len(marks.blocks) < 2:
        for _ in range(ROUND):
            cycle(runs, n_cycles)
            n_cycles += 1
        if sum(run.n_steps for run in runs) >= WARM_UP * n_steps:
            marks.set()
    n_rounds = len(marks.blocks) - 1
    blocks, malloc = growth(marks.blocks), growth(marks.malloc)
    resident = marks.resident[-1] - marks.resident[0]
    print(
        f"{name}: {sum(run.n_steps for run in runs)} steps, {n_cycles * len(CHANGES)} operations of each "
        f"kind, {time.monotonic() - began:.0f} s; in a round of {ROUND} cycles, of {n_rounds}, "
        f"{blocks:+.1f} blocks and {malloc:+.0f} bytes of malloc; "
        f"resident {resident / 2**10:+.0f} KiB of {marks.resident[-1] / 2**20:.0f} MiB",
        flush=True,
    )
    assert blocks < len(CHANGES) / 2, "Python objects leak"
    assert malloc < len(CHANGES) * SMALLEST_CHUNK / 2, "memory of malloc leaks"
    assert resident < n_rounds * ROUND * len(CHANGES) * SMALL_OBJECT, "resident memory grows"


def main() -> None:
    parser = argparse.ArgumentParser(prog="endurance.soak")
    parser.add_argument("names", nargs="*", default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=1_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        soak(name, arguments.steps)


if __name__ == "__main__":
    main()
