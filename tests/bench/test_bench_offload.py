"""The benchmark's rows of offloaded training: all sides do the same."""

import pytest
import torch
from torch import nn

from fused_optim.bench import contestants, measure, offload, workloads
from fused_optim.bench.agreement import Disagreement
from fused_optim.bench.contestants import OURS, STOCK_CALLS
from fused_optim.bench.peers import Lineup, Peer
from fused_optim.bench.workloads import Target, Workload
from support.marks import needs_cpu_kernels

pytestmark = [needs_cpu_kernels, pytest.mark.usefixtures("frozen_heap")]

SHAPES = [(40, 50), (3,), (2_500,)]
WORK = Workload("work", "work", "AdamW", SHAPES, Target(0.01), offload=1)
PIECES = Workload("pieces", "pieces", "AdamW", SHAPES, Target(0.01), offload=2)
PEER, OTHER = (
    Peer(name, "torch", "torch", {"AdamW": lambda _, params, lr=lr: torch.optim.AdamW(params, lr)})
    for name, lr in {"peer": 1e-3, "other": 1.0}.items()
)


def test_a_row_says_who_was_timed_and_what_was_moved() -> None:
    row = measure.measure_row(WORK, quick=True, lineup=Lineup((PEER, OTHER), by_name=True))
    assert set(row.samples_s) == {OURS, STOCK_CALLS, "peer"} and row.baseline == STOCK_CALLS
    assert row.not_measured["other"].startswith("computes something else: ")
    assert row.backends == {"cpu": 3} and row.fallbacks == []
    assert row.nbytes == 28 * (2000 + 3 + 2500)
    pieces = measure.measure_row(PIECES, quick=True, lineup=Lineup((PEER, OTHER)))
    assert not pieces.not_measured
    assert set(pieces.samples_s) == {OURS, offload.WHOLE} and pieces.baseline == offload.WHOLE


def test_pieces_step_each_tensor_once() -> None:
    entrants = offload.enter(PIECES, contestants.make_params(PIECES), [])
    for step in entrants.steps.values():
        step()
        step()
    assert [step.item() for step in entrants.ours.steps] == [2.0] * 3
    whole = offload.Host(contestants.make_params(PIECES), entrants.ours.grads)
    whole.step()
    whole.step()
    assert all(map(torch.equal, whole.masters, entrants.ours.masters))
    assert all(map(torch.equal, whole.outputs, entrants.ours.outputs))


@pytest.mark.parametrize(
    ("what", "told"), [("masters", "param 2 differs"), ("outputs", "output 2 is not")]
)
def test_a_step_that_differs_from_stocks_is_not_timed(what: str, told: str) -> None:
    params = contestants.make_params(WORK)
    host = offload.Host(params, [param.grad.bfloat16() for param in params])
    stock = [nn.Parameter(param.detach().clone()) for param in params]
    offload._compare(host, stock)
    getattr(host, what)[2][17] += 0.01
    with pytest.raises(Disagreement, match=told):
        offload._compare(host, stock)


def test_rows_are_for_the_cpu() -> None:
    names = {row.name for row in workloads.table(False) if row.offload}
    assert names == {"offload-gpt2", "offload-64m", "offload-pieces"}
    assert not any(row.offload for row in workloads.gpu_table(False))
