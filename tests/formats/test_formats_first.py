"""First states in other formats: made where the param lies, as converting zeros would make them."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from fused_optim import storage
from support.cases import ONE_EACH, SHAPES, Case
from support.formats import DTYPES, EACH_FORMAT, MASTERS, STATE_DTYPES
from support.marks import few_cases, needs_cpu_kernels, over
from support.program import SCALARS

pytestmark = needs_cpu_kernels

CHOSEN = {"scalar", "16385", "large_grad_transposed", "channels_last", "sliced", "grad_expanded"}
FEW_SHAPES = [shape for shape in SHAPES if shape.id in CHOSEN]


def initial_value(case: Case) -> float:
    if case.optimizer == "Rprop":
        return case.hypers()["lr"]
    return dict(case.options).get("initial_accumulator_value", 0.0)


def on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@few_cases
def test_bits_of_converted_zeros(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, dtype, state_dtype, master in itertools.product(
        FEW_SHAPES, DTYPES, STATE_DTYPES.values(), MASTERS
    ):
        param = nn.Parameter(shape.param(dtype, generator))
        param.grad = shape.grad(dtype, generator)
        extra = {} if dtype == torch.float32 else {"master": master}
        opt = case.fused([param], state_dtype=state_dtype, **extra)
        group = opt.param_groups[0]
        if not storage.applies(param, group):
            continue
        created = opt._create_state(param, group)
        for name, first in opt._first_values(group).items():
            if name not in SCALARS:
                value = param if name == "z" else torch.tensor(first, dtype=param.dtype)
                assert (created[name] == value).all()
        key = (0, storage.CONVERTING, 0)
        expected = storage.encode_states(param, group, created, opt._description(), key)
        if "step_size" in expected:  # not rounded to the param's dtype first
            expected["step_size"].fill_(initial_value(case))
        firsts = [opt._create_states(param, group)]
        if param in opt.state:  # torch.optim's constructor has made them
            firsts.append(opt._convert_states(param, group, opt.state[param]))
        for first in firsts:
            assert first.keys() == {key for key, value in expected.items() if value is not None}
            for key, value in first.items():
                assert value.dtype == expected[key].dtype and value.device == param.device
                assert value.stride() == expected[key].stride()
                assert torch.equal(value, expected[key])


@over([c for c in ONE_EACH if not initial_value(c)])
@pytest.mark.parametrize("key", ["capturable", "fused", None])
def test_nothing_is_read_from_the_device(case: Case, key: str | None) -> None:
    """A meta tensor has nothing that could be read."""
    generator = torch.Generator().manual_seed(0)
    for shape, (dtype, state_dtype, master) in itertools.product(FEW_SHAPES, EACH_FORMAT):
        param = nn.Parameter(on_meta(shape.param(dtype, generator)))
        param.grad = on_meta(shape.grad(dtype, generator))
        opt = case.fused([param], state_dtype=state_dtype, master=master)
        group = opt.param_groups[0]
        if key in group:
            group[key] = True
        first = opt._create_states(param, group)
        on_device = key in group or case.optimizer == "ASGD"
        for name in SCALARS & first.keys():
            assert first[name].is_meta == (opt._description()["has_step"] and on_device)
        if param in opt.state:  # torch.optim's constructor has made them
            first |= opt._convert_states(param, group, opt.state[param])
        assert all(value.is_meta for name, value in first.items() if name not in SCALARS)
