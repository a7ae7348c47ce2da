"""Grads of which each process holds a part: fully_shard's DTensors, and wrappers that hide the rest."""

import copy
import os
import sys
import types
from pathlib import Path

import pytest
import torch

import fused_optim
from support.cases import DEVICE
from support.processes import python_all

pytestmark = pytest.mark.skipif(
    DEVICE.type != "cpu" or not torch.distributed.is_available(), reason="needs a second GPU"
)
WORLD_SIZE = 2


def _process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    try:
        _global_norm()
        _hidden_shards()
    finally:
        torch.distributed.destroy_process_group()
    # A thread of gloo's may abort an interpreter that ends, see examples/fsdp2_train.py.
    os._exit(0)


def _global_norm() -> None:
    """Clipping, skipping, averaging and a checkpoint with sharded params, as stock with whole ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Linear(5, 3))
    whole = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    opt = fused_optim.AdamW(
        model.parameters(), lr=0.1, max_grad_norm=0.1, ema_decay=0.5, skip_nonfinite=True
    )
    stock = torch.optim.AdamW(whole.parameters(), lr=0.1, foreach=False)
    averages: list[torch.Tensor] = []
    for i in range(4):
        x = torch.randn(4, 8)
        if i == 2:
            x[0, 0] = torch.inf
        for one in (model, whole):
            one.zero_grad()
            one(x).square().mean().backward()
        opt.step()
        if i != 2:
            norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
            stock.step()
            # Stock's norm is float32: one rounding for each of 63 elements at most.
            assert opt.grad_norm.item() == pytest.approx(norm.item(), rel=63 * 2**-23)
            params = [param.detach() for param in whole.parameters()]
            averages = [a.lerp(p, 0.5) for a, p in zip(averages, params)] or [
                param.clone() for param in params
            ]
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.skipped_steps.item() == 1
    # As in twins: 64 roundings in each of 3 steps, of values below 4.
    bound = 64 * 3 * 2**-23 * 4
    for param, other in zip(model.parameters(), whole.parameters()):
        assert (param.full_tensor() - other).abs().max().item() <= bound
    for average, other in zip(opt.ema_params(), averages, strict=True):
        assert (average.full_tensor() - other).abs().max().item() <= bound


def _hidden_shards() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    linear = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="ZeroRedundancyOptimizer gives each process"):
        ZeroRedundancyOptimizer(linear.parameters(), fused_optim.AdamW, max_grad_norm=1.0)
    zero = ZeroRedundancyOptimizer(linear.parameters(), fused_optim.AdamW)
    zero.optim.max_grad_norm = 1.0
    for param in linear.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="ZeroRedundancyOptimizer gives each process"):
        zero.optim.step()
    for keeps_params in (False, True):
        module = torch.nn.Linear(4, 4)
        model = FullyShardedDataParallel(
            module, use_orig_params=keeps_params, device_id=torch.device("cpu")
        )
        opt = fused_optim.SGD(model.parameters(), max_grad_norm=1.0)
        model(torch.ones(2, 4)).sum().backward()
        with pytest.raises(RuntimeError, match="FullyShardedDataParallel hides"):
            opt.step()
    opt = fused_optim.SGD(linear.parameters(), max_grad_norm=1.0)
    opt.step()
    sys.modules["deepspeed"] = types.ModuleType("deepspeed")
    opt.step()  # not called by it
    for module in ("zero.stage_1_and_2", "zero.stage3", "bf16_optimizer"):
        deepspeed = {"__name__": f"deepspeed.runtime.{module}", "opt": opt}
        with pytest.raises(RuntimeError, match="DeepSpeed's ZeRO gives each process"):
            exec("opt.step()", deepspeed)


def test_two_processes(tmp_path: Path) -> None:
    programs = [
        f"from around import test_sharded; test_sharded._process({rank}, {str(tmp_path)!r})"
        for rank in range(WORLD_SIZE)
    ]
    for done in python_all(programs):
        assert done.returncode == 0, done.stderr
