"""The formats of states and params that tests loop over, and trainings in them."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import fused_optim
from fused_optim import _C
from support.cases import fullest
from support.twins import Run

# In several chunks with a partial group; below what 8 bits are for; one group exactly; one element.
SHAPES = ((257, 131), (33, 5), (64, 64), (4099,), (), (0,))
STATE_DTYPES = {"stock": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": "int8"}
MASTERS = (None, "stochastic", "split8", "split16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What differs from stock, for each dtype of the params.
COMBINATIONS = [
    pytest.param(dtype, state_dtype, master, id=f"{str(dtype)[6:]}-{name}-{master}")
    for dtype, (name, state_dtype), master in itertools.product(
        DTYPES, STATE_DTYPES.items(), MASTERS
    )
    if not (dtype == torch.float32 and master) and not (state_dtype is None and master is None)
]
# Every format once, where the rest is the same.
EACH_FORMAT = [
    (torch.float32, torch.bfloat16, None),
    (torch.float32, "int8", None),
    (torch.bfloat16, torch.float32, "split16"),
    (torch.bfloat16, torch.bfloat16, "split16"),
    (torch.bfloat16, None, "stochastic"),
    (torch.bfloat16, "int8", "split8"),
    (torch.float16, None, "stochastic"),
    (torch.float16, "int8", "split16"),
    (torch.float16, torch.bfloat16, "split8"),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_combination = pytest.mark.parametrize(("dtype", "state_dtype", "master"), COMBINATIONS)
each_format = pytest.mark.parametrize(("dtype", "state_dtype", "master"), EACH_FORMAT, ids=str)
each_state_dtype = pytest.mark.parametrize("state_dtype", STATE_DTYPES.values(), ids=STATE_DTYPES)
packed_states = pytest.mark.parametrize(
    "state_dtype", list(STATE_DTYPES.values())[1:], ids=list(STATE_DTYPES)[1:]
)


def options_of(state_dtype: Any, master: str | None) -> dict[str, Any]:
    return {"state_dtype": state_dtype, "master": master}


def run_of(
    name: str, dtype: torch.dtype = torch.float32, shapes: Sequence = SHAPES, **options: Any
) -> Run:
    """Ours of this name, with the most options of the table and these."""
    case = fullest(name)
    return Run(case, case.fused, shapes, dtype, options)


def without_cancelling(name: str) -> dict[str, Any]:
    """Options under which a rounding stays one: none is left alone by terms that cancel.

    A centered variance shows what weight decay has taken off a grad, and a sign may flip where betas other
    than the default ones have grads of few bits cancel.
    """
    cls = getattr(fused_optim, name)
    defaults = cls([torch.zeros(1)]).defaults
    options = {"betas": defaults["betas"]} if "betas" in defaults else {}
    # An update by the size of the grad alone, whatever that is.
    is_relative = {"centered", "exp_inf"} & {*defaults, *_C.rules()[cls._rule]["states"]}
    return {**options, "weight_decay": 0.0} if is_relative else options
