"""The page of all optimizers, docs/optimizers.md, beside the classes themselves."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import fused_optim
from fused_optim.optimizers import OPTIMIZERS
from support.cases import stock_class
from support.program import SCALARS

PAGE = Path(__file__).parents[2].joinpath("docs/optimizers.md").read_text("utf-8")
GENERAL = {"params", "lr", "maximize", "foreach", "differentiable", "capturable", "fused"}


def rows() -> dict[str, list[list[str]]]:
    """Optimizer -> what stands between backticks in each cell of its row, and the cells' numbers."""
    found = {}
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            cells = line.strip("| ").split(" | ")
            for name in re.findall(r"`(\w+)`", cells[0].split(",")[0] + cells[0].split(",")[-1]):
                if name in OPTIMIZERS:
                    found[name] = cells
    return found


def test_every_optimizer_has_a_row() -> None:
    assert list(rows()) == list(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_options_are_those_of_the_constructor(name: str) -> None:
    of_row = {*re.findall(r"`(\w+)`", rows()[name][3])} - {*OPTIMIZERS}
    known = {*inspect.signature(stock_class(name)).parameters} - GENERAL
    if name == "AdamW":  # shares Adam's row
        known |= {"decoupled_weight_decay"}
    assert of_row == known


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_states_and_bytes_are_as_said(name: str) -> None:
    cell = rows()[name][2]
    said = [float(number) for number in re.findall(r"\d+\.\d\d", cell)]
    forms = (
        (torch.float32, {}),
        (torch.float32, {"state_dtype": "int8"}),
        (torch.bfloat16, {"state_dtype": "int8", "master": "split8"}),
    )
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    for nbytes, (dtype, options) in zip(said, forms, strict=True):
        param = torch.ones(64, 64, dtype=dtype)
        param.grad = torch.ones_like(param)
        optimizer = getattr(fused_optim, name)([param], **momentum, **options)
        optimizer.step()
        states = optimizer.state[param]
        kept = [param, *(value for key, value in states.items() if key not in SCALARS)]
        assert f"{sum(value.nbytes for value in kept) / 4096:.2f}" == f"{nbytes:.2f}"
        if not options:
            assert states.keys() - {"step"} <= {*re.findall(r"`(\w+)`", cell)}
