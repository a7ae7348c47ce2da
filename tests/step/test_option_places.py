"""Options beside torch.optim's stand where they are heeded; elsewhere they are errors, never ignored."""

import math
import re
import warnings
from pathlib import Path

import pytest
import torch

import fused_optim
from fused_optim.options import KernelOptions
from support.cases import DEVICE
from support.marks import needs_cpu_kernels

pytestmark = needs_cpu_kernels

GIVEN = {
    "max_grad_norm": 1.0,
    "write_clipped_grads": True,
    "skip_nonfinite": True,
    "zero_grads": True,
    "ema_decay": 0.5,
    "ema_warmup": True,
    "ema_dtype": torch.float32,
    "state_dtype": "int8",
    "master": "split8",
    "rounding_seed": 3,
}
INVALID = {
    "max_grad_norm": (0, -1.0, math.nan, "x", [1.0]),
    "write_clipped_grads": ("no", 1, None),
    "skip_nonfinite": ("no", 1, None),
    "zero_grads": ("no", 0, None),
    "ema_decay": (1.0, -0.1, math.nan, "x", [0.5]),
    "ema_warmup": ("no", 1, None),
    "ema_dtype": ("float32", torch.float16),
    "state_dtype": ("fp16", torch.float16, 8),
    "master": ("split4", True),
    "rounding_seed": (-1, 0.5, "x"),
}


def params() -> list[torch.nn.Parameter]:
    param = torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16, device=DEVICE))
    param.grad = torch.ones_like(param)
    return [param]


def table() -> dict[str, tuple[bool, ...]]:
    page = Path(__file__).parents[2] / "docs" / "api.md"
    rows = re.findall(
        r"^\| `(\w+)` \| (yes|no) \| (yes|no) \| (yes|no) \|$", page.read_text(), re.M
    )
    return {key: tuple(cell == "yes" for cell in cells) for key, *cells in rows}


def test_the_table_has_all_options() -> None:
    assert table().keys() == KernelOptions.__annotations__.keys() == GIVEN.keys() == INVALID.keys()


@pytest.mark.parametrize("key", GIVEN)
def test_options_stand_where_the_table_says(key: str) -> None:
    in_constructor, in_group, as_attribute = table()[key]
    value = GIVEN[key]
    assert in_constructor
    opt = fused_optim.AdamW(params(), **{key: value})
    if in_group:
        assert opt.param_groups[0][key] == value
        opt = fused_optim.AdamW([{"params": params(), key: value}])
        assert opt.param_groups[0][key] == value
    else:
        with pytest.raises(ValueError, match=f"{key} is an option of the optimizer"):
            fused_optim.AdamW([{"params": params(), key: value}])
        with pytest.raises(ValueError, match=f"{key} is an option of the optimizer"):
            opt.add_param_group({"params": params(), key: value})
        assert len(opt.param_groups) == 1
        saved = opt.state_dict()
        saved["param_groups"][0][key] = value
        with pytest.raises(ValueError, match=f"{key} is an option of the optimizer"):
            opt.load_state_dict(saved)
    opt = fused_optim.AdamW(params())
    if as_attribute:
        setattr(opt, key, value)
        assert getattr(opt, key) == value
    else:
        with pytest.raises(AttributeError, match=f"{key} is an option of param groups"):
            setattr(opt, key, value)
        assert not hasattr(opt, key)
    opt.step()


@pytest.mark.parametrize("key", INVALID)
def test_values_out_of_range_are_named(key: str) -> None:
    _, in_group, as_attribute = table()[key]
    for value in INVALID[key]:
        with pytest.raises((ValueError, TypeError), match=f"Invalid {key}: "):
            fused_optim.AdamW(params(), **{key: value})
        if in_group:
            opt = fused_optim.AdamW(params())
            with pytest.raises((ValueError, TypeError), match=f"Invalid {key}: "):
                opt.add_param_group({"params": params(), key: value})
            assert len(opt.param_groups) == 1
        if as_attribute:
            opt = fused_optim.AdamW(params())
            with pytest.raises((ValueError, TypeError), match=f"Invalid {key}: "):
                setattr(opt, key, value)


@pytest.mark.parametrize("key", ["ema_decay", "state_dtype", "master", "rounding_seed"])
def test_values_out_of_range_in_a_group_are_named_by_the_step(key: str) -> None:
    for value in INVALID[key]:
        opt = fused_optim.AdamW(params(), master="split8")
        before = opt.param_groups[0]["params"][0].clone()
        opt.param_groups[0][key] = value
        with pytest.raises(ValueError, match=rf"Invalid {key} in param group 0"):
            opt.step()
        assert torch.equal(opt.param_groups[0]["params"][0], before)


def test_programs_that_are_patched_have_attributes_of_their_own() -> None:
    with fused_optim.patched():
        opt = torch.optim.AdamW(params())
    opt.ema_decay, opt.master = 0.999, True
    assert opt.ema_decay == 0.999 and opt.master is True
    assert not hasattr(opt, "state_dtype")
    assert opt.param_groups[0].keys().isdisjoint(GIVEN)
    opt.step()


def test_names_of_dtypes_stand_for_them() -> None:
    for name in ("float32", "bfloat16"):
        by_name, by_dtype, written = (
            fused_optim.AdamW(params(), state_dtype=given)
            for given in (name, getattr(torch, name), torch.float32)
        )
        assert by_name.param_groups[0]["state_dtype"] is getattr(torch, name)
        written.param_groups[0]["state_dtype"] = name
        for opt in (by_name, by_dtype, written):
            opt.step()
            assert opt.last_step.tensors == {"cpu": 1}
            state = opt.state[opt.param_groups[0]["params"][0]]
            assert state["exp_avg_sq"].dtype is getattr(torch, name)
        assert written.explain().rows[0].format == by_dtype.explain().rows[0].format


def test_a_master_that_float32_params_ignore_is_said() -> None:
    whole = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    with pytest.warns(UserWarning, match="master='split8' does nothing for float32 params"):
        opt = fused_optim.AdamW([whole], master="split8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, device=DEVICE))]})
    assert "master 'split8' unused" in str(opt.explain())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = fused_optim.AdamW([whole, *params()], master="split8")  # a model in mixed precision
        fused_optim.AdamW([whole], state_dtype="int8")
    by_format = {row.format: row.indices for row in opt.explain().rows}
    assert [indices for format, indices in by_format.items() if "unused" in format] == [(0,)]
