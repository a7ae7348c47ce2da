"""The example of what PyTorch itself puts around an optimizer: torch.optim, given the same, does the same."""

import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import fused_optim
from support.marks import needs_cpu_kernels
from support.recordings import Recording, assert_stock_does_the_same, recorded

pytestmark = needs_cpu_kernels

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_torch.py"


@pytest.fixture(scope="module")
def recording(one_thread: None) -> dict[type, Recording]:
    """By the optimizer's class."""
    with recorded() as whole:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    torch.compiler.reset()
    classes = [type(optimizer) for optimizer in whole.optimizers]
    return {
        cls: Recording(
            *(
                [value for value, its in zip(getattr(whole, field.name), classes) if its is cls]
                for field in fields(whole)
            )
        )
        for cls in dict.fromkeys(classes)
    }


def test_compiled_step_with_one_cycle(recording: dict[type, Recording]) -> None:
    sgd = recording[fused_optim.SGD]
    assert len(sgd.params) == 40
    assert sgd.optimizer.last_step.tensors == {"cpu": 4}
    assert len({groups[0]["momentum"] for groups in sgd.options}) > 30, "no cycle of momentum"
    assert_stock_does_the_same(sgd, torch.optim.SGD)


def test_compiled_model_with_scaler_schedules_and_averages(
    recording: dict[type, Recording],
) -> None:
    adamw = recording[fused_optim.AdamW]
    assert len(adamw.params) == 80
    assert adamw.optimizer.last_step.tensors == {"cpu": 4}
    lrs = [groups[0]["lr"] for groups in adamw.options]
    assert lrs[-1] < 1e-4 < max(lrs) <= 1e-2
    assert_stock_does_the_same(adamw, torch.optim.AdamW)
