"""Runs of ours beside torch.optim and beside exact arithmetic, and the checks made on them."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from support.bounds import RECURRENCES, Bounded, Machine
from support.cases import SHAPES, Case, Shape, expected_backends, n_steps_of_all
from support.oracle import ORACLES
from support.program import Program

Array = NDArray[np.float64]
Build = Callable[..., Optimizer]

N_STEPS = 10
# 16-bit types are compared after one step from equal state: this many stock steps make the state.
WARM_UP_STEPS = 3
# Units of the storage type (eps times the size of the terms) between ours and stock, in 16 bits.
MAX_UNITS = 2
# Their derived bounds alone hold: stock rounds Adadelta's delta six times before it squares it, and ASGD's
# average takes over the errors of its param; what moves AdamWScheduleFree's params is rounded four times.
WITHOUT_UNITS = {"Adadelta", "ASGD", "AdamWScheduleFree"}
# Error over update, the largest element of each: what float64 is chosen for.
FLOAT64_RELATIVE = 1e-12
# Our RMS error over stock's.
MAX_RMS_RATIO = 1.1
# Stock's vectorised code has fused multiply-adds; ours has none, to give the same bits on every
# machine. In a float32 state one saves the rounding of a term beside that of the sum, which is of
# like size: sqrt(2). In a param it saves that of an update, far smaller than the param's own; in 16
# bits the rounding to storage is all that counts.
MAX_FLOAT32_STATE_RMS_RATIO = 2**0.5

# Larger tensors are sampled: both ends, both sides of all multiples of 4096, and every 13th.
# test_bitwise compares all of their elements with the same values cut into small tensors.
ALL_ELEMENTS_UP_TO = 4096
# Enough elements for an RMS, in shapes that are not sampled.
RMS_SHAPES = tuple(Shape(f"rms_{i}", (61, 67)) for i in range(25))


@functools.lru_cache(maxsize=64)
def _params(shapes: tuple[Shape, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [shape.param(dtype, generator) for shape in shapes]


@functools.lru_cache(maxsize=64)
def _grads(shapes: tuple[Shape, ...], dtype: torch.dtype, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [shape.grad(dtype, generator) for shape in shapes]


@functools.lru_cache(maxsize=4)
def _sampled(shapes: tuple[Shape, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which elements are compared, as positions in the joined tensors, and the shape of each."""
    positions, owners, start = [], [], 0
    for i, shape in enumerate(shapes):
        index = np.arange(math.prod(shape.size))
        if index.size > ALL_ELEMENTS_UP_TO:
            from_edge = np.minimum(index, index.size - 1 - index)
            from_boundary = (index + 32) % 4096
            index = index[(from_edge < 64) | (from_boundary < 64) | (index % 13 == 0)]
        positions.append(start + index)
        owners.append(np.full(index.size, i))
        start += math.prod(shape.size)
    return np.concatenate(positions), np.concatenate(owners)


class Sampled(Program):
    """One parameter of each shape, fed with the same values in every run, seen as float64."""

    def __init__(self, build: Build, shapes: Sequence[Shape], dtype: torch.dtype) -> None:
        self.shapes = tuple(shapes)
        self.dtype = dtype
        fresh = _params(self.shapes, dtype)
        # A plain clone would turn a slice of a wider tensor into a contiguous one.
        params = [copy.deepcopy(param) for param in fresh]
        assert [p.stride() for p in params] == [p.stride() for p in fresh]
        super().__init__(build(params), params, lambda step: _grads(self.shapes, dtype, step + 1))

    def step_as_is(self) -> None:
        grads = [param.grad for param in self.params]
        before = [grad.clone() for grad in grads]
        super().step_as_is()
        for shape, grad, same in zip(self.shapes, grads, before):
            assert grad.layout == torch.sparse_coo or torch.equal(grad, same), (
                f"{shape.id}: the grad was written"
            )

    def grad(self) -> Array:
        """The grads of the latest step."""
        return self.flat(_grads(self.shapes, self.dtype, self.n_steps))

    def param(self) -> Array:
        return self.flat(self.params)

    def states(self) -> dict[str, Array]:
        """Every state but `step`, the tensors of all parameters joined; a number for each element."""
        keys = [set(self.opt.state.get(param, {})) for param in self.params]
        assert all(key == keys[0] for key in keys), "parameters have different states"
        return {
            key: self.flat([self.opt.state[p][key].expand(p.shape) for p in self.params])
            for key in sorted(keys[0] - {"step"})
        }

    def streams(self) -> dict[str, Array]:
        return {"param": self.param(), **self.states()}

    def steps(self) -> list[float]:
        """The `step` of every parameter that has one."""
        states = [self.opt.state.get(param, {}) for param in self.params]
        return [state["step"].item() for state in states if "step" in state]

    def continue_from(self, other: Sampled) -> None:
        """Takes over values, state and the position in the stream of grads."""
        for param, source in zip(self.params, other.params):
            param.copy_(source)
        # The state alone: the hyperparameters of a checkpoint would replace our own.
        ours, theirs = self.opt.state_dict(), copy.deepcopy(other.opt.state_dict())
        self.opt.load_state_dict({**ours, "state": theirs["state"]})
        self.n_steps = other.n_steps

    def flat(self, tensors: Sequence[Tensor]) -> Array:
        """The sampled elements in logical order, whatever the strides, as float64."""
        elements = torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])
        return elements.cpu().numpy()[_sampled(self.shapes)[0]]

    def shape_at(self, position: int) -> str:
        return self.shapes[_sampled(self.shapes)[1][position]].id


class Exact:
    """The recurrence in exact arithmetic, with the error bound of one kind of implementation."""

    def __init__(self, case: Case, machine: Machine, run: Sampled) -> None:
        self.recurrence = RECURRENCES[case.optimizer]
        self.hypers = case.hypers()
        self.machine = machine
        self.param = machine.stored(run.param())
        self.state = {key: machine.stored(value) for key, value in run.states().items()}

    def step(self, grad: Array, step: int) -> None:
        stored = self.machine.stored(grad)
        self.param, self.state = self.recurrence(
            self.machine, self.param, stored, self.state, step, **self.hypers
        )

    def streams(self) -> dict[str, Bounded]:
        return {"param": self.param, **self.state}


def check_close_to_stock(case: Case, dtype: torch.dtype, build: Build | None = None) -> None:
    """Params and all state within the bounds of stock and of exact arithmetic, for every shape.

    float32 and float64 after N_STEPS steps from the start. 16-bit types after one step from equal
    state, because there stock rounds every intermediate tensor to 16 bits and we do not: each of
    the two has its own bound, and they are within MAX_UNITS. `build` takes the place of `case.fused`.
    """
    stock = Sampled(case.stock, SHAPES, dtype)
    ours = Sampled(build or case.fused, SHAPES, dtype)
    n_steps = N_STEPS
    if dtype.itemsize == 2:
        for _ in range(max(WARM_UP_STEPS, n_steps_of_all(case))):
            stock.step()
        ours.continue_from(stock)
        n_steps = 1
    start = stock.streams()
    # Ours first; one recurrence serves both where they round alike.
    machines = [Machine.of(dtype, case.tensor_dtype, stores) for stores in (False, True)]
    exacts = {machine: Exact(case, machine, stock) for machine in machines}
    for _ in range(n_steps):
        for run in (ours, stock):
            run.step()
        for exact in exacts.values():
            exact.step(ours.grad(), ours.n_steps)
        check_backend(case, ours)
    assert ours.steps() == stock.steps(), "step counts differ"
    for exact in exacts.values():
        # It takes a sum that cancels to within its own roundings.
        assert all(np.mean(bound.jumped) < 0.01 for bound in exact.streams().values())
    _compare(ours, stock, *(exacts[machine].streams() for machine in machines))
    if dtype.itemsize == 2 and case.optimizer not in WITHOUT_UNITS:
        smallest = torch.finfo(dtype).tiny
        sizes = _term_sizes(case, start, ours.grad(), ours.n_steps)
        for name, value in ours.streams().items():
            units = MAX_UNITS * torch.finfo(dtype).eps * np.maximum(sizes[name], smallest)
            bounds = [exacts[machine].streams()[name] for machine in machines]
            jumped = np.logical_or(*(bound.jumped for bound in bounds))
            units = np.where(jumped, sum(bound.error for bound in bounds), units)
            _assert_within(ours, f"{name}, units", value, stock.streams()[name], units)


def check_backend(case: Case, run: Sampled) -> None:
    """The latest step was served by the backend that the table names, without a fallback."""
    report = run.opt.last_step
    assert report.tensors == expected_backends(run.shapes, case), report


def _compare(
    ours: Sampled, stock: Sampled, ours_exact: dict[str, Bounded], stock_exact: dict[str, Bounded]
) -> None:
    our_streams, stock_streams = ours.streams(), stock.streams()
    keys = [list(streams) for streams in (our_streams, stock_streams)]
    assert keys[0] == keys[1] and our_streams.keys() == ours_exact.keys(), f"other states: {keys}"
    # In float64 the exact value is itself computed in float64, as well as its bound says.
    margin = 2 if ours.dtype == torch.float64 else 1
    for name, value in our_streams.items():
        our_bound, stock_bound = ours_exact[name].error, stock_exact[name].error
        true, reference = ours_exact[name].value, stock_streams[name]
        _assert_within(ours, f"{name}, stock to exact", reference, true, margin * stock_bound)
        _assert_within(ours, f"{name}, ours to stock", value, reference, our_bound + stock_bound)
        _assert_within(ours, f"{name}, ours to exact", value, true, margin * our_bound)


def _term_sizes(case: Case, start: dict[str, Array], grad: Array, step: int) -> dict[str, Array]:
    """One step with the absolute value of every term: what a result that cancels was made of."""
    hypers = {**case.hypers(), "maximize": False}
    sizes = {name: np.abs(value) for name, value in start.items()}
    param = sizes.pop("param")
    after, states = ORACLES[case.optimizer](param, np.abs(grad), sizes, step, **hypers)
    return {"param": param + np.abs(after - param), **states}


def _assert_within(run: Sampled, what: str, left: Array, right: Array, bound: Array) -> None:
    # Infinite where the interval round a variance reaches 0: with grads of random sign, nowhere.
    assert np.isfinite(bound).all(), f"{what}: {np.isinf(bound).sum()} elements have no bound"
    difference = np.abs(left - right)
    # A NaN on one side compares false, hence counts as too far.
    far = np.flatnonzero(~(difference <= bound))
    assert far.size == 0, (
        f"{what}: {far.size} of {bound.size} elements too far apart, first in shape "
        f"{run.shape_at(far[0])}: {left[far[0]]!r} and {right[far[0]]!r}, "
        f"{difference[far[0]]:.3g} > {bound[far[0]]:.3g}"
    )


def check_rms_against_oracle(case: Case, dtype: torch.dtype, build: Build | None = None) -> None:
    """RMS error over 1e5 elements at most 1.1 times stock's (float32 states: sqrt(2))."""
    ours = Sampled(build or case.fused, RMS_SHAPES, dtype)
    stock = Sampled(case.stock, RMS_SHAPES, dtype)
    oracle = ORACLES[case.optimizer]
    hypers: dict[str, Any] = case.hypers()
    param, state = stock.param(), {}
    assert param.size >= 100_000
    for step in range(1, N_STEPS + 1):
        for run in (ours, stock):
            run.step()
        param, state = oracle(param, ours.grad(), state, step, **hypers)
    check_backend(case, ours)
    our_streams, stock_streams = ours.streams(), stock.streams()
    assert our_streams.keys() == stock_streams.keys() == {"param", *state}, "other states"
    for name, true in {"param": param, **state}.items():
        if np.ndim(true) == 0:  # one number, whose error has no mean
            continue
        our_error, stock_error = (
            np.sqrt(np.mean((streams[name] - true) ** 2))
            for streams in (our_streams, stock_streams)
        )
        is_float32_state = name != "param" and dtype == torch.float32
        ratio = MAX_FLOAT32_STATE_RMS_RATIO if is_float32_state else MAX_RMS_RATIO
        assert our_error <= ratio * stock_error, (
            f"{name}: RMS error {our_error:.4g} is {our_error / stock_error:.3f} of stock's"
        )


def check_float64_update(case: Case, build: Build | None = None) -> None:
    """float64 params and state within 1e-12 of the update, for every shape."""
    ours = Sampled(build or case.fused, SHAPES, torch.float64)
    stock = Sampled(case.stock, SHAPES, torch.float64)
    start = stock.streams()
    for _ in range(N_STEPS):
        for run in (ours, stock):
            run.step()
    check_backend(case, ours)
    for name, reference in stock.streams().items():
        update = np.abs(reference - start.get(name, 0.0)).max()
        difference = np.abs(ours.streams()[name] - reference).max()
        assert difference <= FLOAT64_RELATIVE * update, (
            f"{name}: differs by {difference:.3g} after an update of {update:.3g}"
        )
