"""The cycle of `make soak`, once for each optimizer: what it does is legal, and what it compares is equal."""

import pytest
import torch
from endurance import soak

from support.cases import VARIANTS, fullest
from support.marks import each_name, needs_cpu_kernels

pytestmark = needs_cpu_kernels


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "N_STEPS", 2)


@each_name
def test_a_cycle(name: str) -> None:
    runs = [soak.Soaked(fullest(name)) for _ in range(2)]
    soak.cycle(runs, list(VARIANTS).index(name))  # others meet for each optimizer


def test_a_bit_that_changes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(run: soak.Soaked) -> None:
        with torch.no_grad():
            run.group["params"][0].view(torch.int32)[3] ^= 1

    monkeypatch.setattr(soak, "NEUTRAL", [changed])
    with pytest.raises(AssertionError, match="changed during max_grad_norm: param 0"):
        soak.cycle([soak.Soaked(fullest("SGD")) for _ in range(2)], 0)
