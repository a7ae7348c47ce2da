"""Loops of the shape of engines that step on the host: ZeRO-Offload, HybridDeviceOptimizer."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_optim
from fused_optim.functional import adamw, grad_norm
from support.cases import BACKEND
from support.program import assert_same_bits
from support.twins import assert_close

N_STEPS = 3
OPTIONS = {"lr": 0.01, "weight_decay": 0.1}

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="needs CPU kernels")


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 3)).bfloat16()


def backward(model: nn.Module, step: int) -> None:
    inputs = torch.randn(8, 33, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(inputs.bfloat16()).float().square().mean().backward()


def by_torch(clip: float) -> nn.Module:
    """float32 masters beside a bfloat16 model, in torch's calls."""
    model = make_model()
    masters = [nn.Parameter(param.detach().float()) for param in model.parameters()]
    opt = torch.optim.AdamW(masters, **OPTIONS, foreach=False, fused=False)
    for step in range(N_STEPS):
        backward(model, step)
        for master, param in zip(masters, model.parameters()):
            master.grad = param.grad.float()
        norm = torch.linalg.vector_norm(
            torch.cat([master.grad.flatten() for master in masters]).double()
        )
        for master in masters:
            master.grad *= min(1.0, clip / (norm.item() + 1e-6))
        opt.step()
        with torch.no_grad():
            for master, param in zip(masters, model.parameters()):
                param.copy_(master)
    return model


@pytest.mark.parametrize("n_buckets", [1, 3])
def test_lists_in_buckets_with_the_model_as_output(n_buckets: int) -> None:
    model = make_model()
    params = list(model.parameters())
    masters = [param.detach().float() for param in params]
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(m) for m in masters] for _ in range(2))
    steps = [torch.tensor(0.0) for _ in masters]
    for step in range(N_STEPS):
        backward(model, step)
        grads = [param.grad for param in params]
        clip = min(1.0, 0.05 / (grad_norm(grads).item() + 1e-6))
        for bucket in range(n_buckets):
            part = slice(bucket, None, n_buckets)
            adamw(
                masters[part], grads[part], exp_avgs[part], exp_avg_sqs[part], [], steps[part],
                amsgrad=False, beta1=0.9, beta2=0.999, eps=1e-8, maximize=False,
                clip=clip, outputs=[param.data for param in params[part]], **OPTIONS,
            )  # fmt: skip
    for param, expected in zip(params, by_torch(0.05).parameters()):
        assert_close(param, expected, 1)


def test_one_flat_master_with_slices_of_a_flat_model_as_output() -> None:
    """DeepSpeed's ZeRO-Offload keeps each group of params in one tensor."""
    model = make_model()
    params = list(model.parameters())
    flat = torch.cat([param.detach().flatten() for param in params])
    for param, part in zip(params, flat.split([param.numel() for param in params])):
        param.data = part.view_as(param)
    master = nn.Parameter(flat.float())
    opt = fused_optim.AdamW([master], **OPTIONS, max_grad_norm=0.05)
    opt.set_outputs({master: flat})
    for step in range(N_STEPS):
        backward(model, step)
        master.grad = torch.cat([param.grad.float().flatten() for param in params])
        opt.step()
        assert opt.last_step.tensors == {"cpu": 1}
    for param, expected in zip(params, by_torch(0.05).parameters()):
        assert_close(param, expected, 1)


def test_an_optimizer_for_each_tensor() -> None:
    """Megatron-Core's HybridDeviceOptimizer has one for each param, to overlap them with copies."""
    model = make_model().float()
    twin = copy.deepcopy(model)
    each = [fused_optim.AdamW([param], **OPTIONS) for param in model.parameters()]
    whole = fused_optim.AdamW(twin.parameters(), **OPTIONS)
    for step in range(N_STEPS):
        for param, other in zip(model.parameters(), twin.parameters()):
            param.grad = torch.full_like(param, step - 1.5)
            other.grad = param.grad.clone()
        for opt in each:
            opt.step()
        whole.step()
    assert_same_bits(list(model.parameters()), list(twin.parameters()))


def test_params_and_states_swapped_in_for_a_step() -> None:
    swap = getattr(torch.optim, "swap_in_optimizer_params_and_state", None)
    if swap is None:
        pytest.skip("torch is older than that")
    runs = []
    for cls, extra in ((fused_optim.AdamW, {}), (torch.optim.AdamW, {"foreach": False})):
        model, other = make_model().float(), make_model().float()
        opt = cls(model.parameters(), **OPTIONS, **extra)
        torch.manual_seed(1)

        def set_grads(of: nn.Module) -> None:
            for param in of.parameters():
                param.grad = torch.randn_like(param)

        set_grads(model)
        opt.step()
        state = copy.deepcopy(opt.state_dict())
        for _ in range(N_STEPS):
            set_grads(other)
            with swap(opt, dict(other.named_parameters()), state):
                opt.step()
            set_grads(model)
            opt.step()
        states = [value for of_param in state["state"].values() for value in of_param.values()]
        runs.append([*model.parameters(), *other.parameters(), *states])
        if cls is fused_optim.AdamW:
            assert opt.last_step.tensors == {"cpu": 4}
    for ours, stock in zip(*runs):
        assert_close(ours, stock, 1 + N_STEPS)


@pytest.mark.parametrize(
    ("dtype", "options", "has_output", "held", "moved"),
    [
        (torch.float32, {}, True, 12, 30),
        (torch.float32, {"state_dtype": torch.bfloat16}, True, 8, 22),
        (torch.float32, {"state_dtype": "int8"}, True, 6.06, 18.1),
        (torch.bfloat16, {"master": "split16", "state_dtype": torch.bfloat16}, False, 8, 18),
        (torch.bfloat16, {"master": "split8", "state_dtype": "int8"}, False, 5.06, 12.1),
    ],
)
def test_bytes_that_the_page_says(
    dtype: torch.dtype, options: dict, has_output: bool, held: float, moved: float
) -> None:
    """docs/offload.md, per parameter: params with states; what a step moves."""
    param = nn.Parameter(torch.zeros(64_000, dtype=dtype))
    param.grad = torch.zeros_like(param)
    opt = fused_optim.AdamW([param], **options)
    if has_output:
        opt.set_outputs({param: torch.zeros_like(param, dtype=torch.bfloat16)})
    opt.step()
    said = opt.explain()
    numel = param.numel()
    assert (param.nbytes + said.state_nbytes) / numel == pytest.approx(held, abs=0.005)
    assert said.step_nbytes / numel == pytest.approx(moved, abs=0.05)
    page = (Path(__file__).parents[2] / "docs/offload.md").read_text()
    assert re.search(rf"\| {held} and \d \| {moved} \|", page)
