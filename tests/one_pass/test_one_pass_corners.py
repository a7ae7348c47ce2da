"""One pass where its parts meet others: shared grads, hooks, inference mode, scalers, surgery."""

import math

import pytest
import torch
from torch import Tensor

import fused_optim
from fused_optim import backends
from support.cases import DEVICE
from support.processes import python


class Subclass(Tensor):
    """What no kernel serves."""


def ones(numel: int = 2, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(numel, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"zero_grads": True}, 0.0),
        ({"max_grad_norm": 1.0, "write_clipped_grads": True}, 0.5),
        ({}, 1.0),
    ],
)
@pytest.mark.parametrize("scale", [None, 4.0])
def test_one_grad_of_a_kernel_and_of_stock(options: dict, left: float, scale: float | None) -> None:
    """Each is stepped by the grad as it was, which is then written once."""
    params = [ones(), torch.nn.Parameter(torch.ones(2, device=DEVICE).as_subclass(Subclass))]
    opt = fused_optim.SGD(params, lr=0.5, **options)
    params[0].grad = params[1].grad = torch.full((2,), scale or 1.0, device=DEVICE)
    if scale is not None:
        opt.grad_scale = torch.tensor(scale, device=DEVICE)
    opt.step()
    coefficient = 0.5 if "max_grad_norm" in options else 1.0  # four ones: a norm of 2
    for param in params:
        assert param.tolist() == pytest.approx([1 - 0.5 * coefficient] * 2, abs=1e-6)
        assert param.grad.tolist() == pytest.approx([left] * 2, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_averages_made_in_inference_mode(dtype: torch.dtype) -> None:
    param = ones(dtype=dtype)
    opt = fused_optim.SGD([param], lr=0.5, ema_decay=0.5)
    with torch.inference_mode(), opt.swapped_ema():
        pass
    for _ in range(2):
        param.grad = torch.ones_like(param)
        opt.step()
    assert opt.ema_params()[0].real.tolist() == [0.25, 0.25]


def test_hooks_of_checkpoints_see_the_averages() -> None:
    """A load hook that matches params by name, as torch's documentation has it; a save hook."""

    def build(names: str) -> tuple[fused_optim.SGD, dict[str, torch.nn.Parameter]]:
        params = {name: ones() for name in names}
        return fused_optim.SGD(list(params.items()), lr=1.0, ema_decay=0.5), params

    opt, params = build("ab")
    params["a"].grad, params["b"].grad = (g.to(DEVICE) for g in (torch.zeros(2), torch.ones(2)))
    opt.step()
    seen = []
    opt.register_state_dict_post_hook(lambda _, saved: seen.append(sorted(saved)))
    saved = opt.state_dict()
    assert seen == [["ema", "param_groups", "state"]]

    other, _ = build("ba")

    def by_name(optimizer: torch.optim.Optimizer, loaded: dict) -> dict:
        group = loaded["param_groups"][0]
        index = dict(zip(group["param_names"], group["params"]))
        names = optimizer.param_groups[0]["param_names"]
        return {
            **loaded,
            "param_groups": [{**group, "params": [index[n] for n in names], "param_names": names}],
        }

    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(saved)
    assert [average[0].item() for average in other.ema_params()] == [0.0, 1.0]
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1


def test_options_of_averaging_without_a_decay_are_for_the_groups_that_have_one() -> None:
    groups = [{"params": [ones(dtype=torch.bfloat16)], "ema_decay": 0.5}, {"params": [ones()]}]
    opt = fused_optim.SGD(groups, ema_warmup=True, ema_dtype=torch.float32)
    assert opt.param_groups[0]["ema_warmup"]
    (average,) = opt.ema_params()
    assert average.dtype == torch.float32


def test_scaler_that_raises_leaves_no_wish() -> None:
    param = ones()
    opt = fused_optim.SGD([param], lr=1.0, ema_decay=0.5)
    amp = fused_optim.GradScaler(DEVICE.type, init_scale=4.0)
    amp.scale(param.sum()).backward()
    with opt.swapped_ema(), pytest.raises(RuntimeError, match="within swapped_ema"):
        amp.step(opt)
    param.grad.fill_(math.nan)
    opt.step()  # nobody has asked it to skip
    assert param.isnan().all() and opt.skipped_steps.item() == 0


def test_nan_that_comes_after_unscaling_is_skipped() -> None:
    param = ones()
    opt = fused_optim.SGD([param], lr=1.0, skip_nonfinite=True)
    amp = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    amp.scale(param.sum()).backward()
    amp.unscale_(opt)
    param.grad[0] = math.nan
    amp.step(opt)
    assert param.tolist() == [1.0, 1.0] and opt.skipped_steps.item() == 1


def test_written_averages_tell_autograd() -> None:
    param = ones()
    opt = fused_optim.SGD([param], ema_decay=0.5)
    weight = torch.ones(2, requires_grad=True, device=DEVICE)
    product = (weight * opt.ema_params()[0]).sum()
    param.grad = torch.ones_like(param)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_differentiable_is_refused_with_averages() -> None:
    with pytest.raises(ValueError, match="differentiable=True cannot be combined with ema_decay"):
        fused_optim.SGD([ones()], differentiable=True, ema_decay=0.5)
    opt = fused_optim.SGD([ones()], differentiable=True)
    opt.param_groups[0]["ema_decay"] = 0.5
    opt.param_groups[0]["params"][0].grad = torch.ones(2, device=DEVICE)
    with pytest.raises(ValueError, match="differentiable=True cannot be combined with ema_decay"):
        opt.step()


@pytest.mark.parametrize("kernels", [True, False])
def test_averages_follow_params_of_another_shape(
    kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(backends, "cpu_kernels", lambda: None)
    param = ones()
    opt = fused_optim.SGD([param], ema_decay=0.5)
    opt.step()
    param.data = torch.full((4,), 2.0, device=DEVICE)
    assert opt.ema_params()[0].tolist() == [2.0] * 4
    with opt.swapped_ema():
        pass
    param.data = torch.full((3,), 3.0, device=DEVICE)
    opt.step()
    assert opt.ema_params()[0].tolist() == [3.0] * 3


@pytest.mark.parametrize("kernels", [True, False])
def test_averages_of_removed_params_go_with_the_next_step_that_is_not_skipped(
    kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(backends, "cpu_kernels", lambda: None)
    # On the CPU: what a device alone skips counts as a step.
    params = [torch.nn.Parameter(torch.ones(2, device="cpu")) for _ in range(2)]
    opt = fused_optim.SGD(params, ema_decay=0.5, skip_nonfinite=True)
    opt.step()
    del opt.param_groups[0]["params"][0]
    for grad, n_left in ((math.nan, 2), (1.0, 1)):
        params[1].grad = torch.full_like(params[1], grad)
        opt.step()
        assert len(opt._averages) == n_left


def test_bad_decay_writes_nothing_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cpu_kernels", lambda: None)
    param = ones()
    opt = fused_optim.SGD([param], lr=1.0, ema_decay=0.5)
    opt.param_groups[0]["ema_decay"] = 1.5
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="Invalid ema_decay"):
        opt.step()
    assert param.tolist() == [1.0, 1.0]


def test_backward_within_swapped_averages_is_refused_while_released() -> None:
    model = torch.nn.Linear(2, 1).to(DEVICE)
    opt = fused_optim.SGD(model.parameters(), ema_decay=0.5)
    before = [param.detach().clone() for param in model.parameters()]
    with (
        fused_optim.release_gradients(model, opt),
        opt.swapped_ema(),
        pytest.raises(RuntimeError, match="within swapped_ema"),
    ):
        model(torch.ones(1, 2, device=DEVICE)).sum().backward()
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before))


@pytest.mark.parametrize("has_ema", [False, True])
def test_averages_of_released_params(has_ema: bool) -> None:
    """Each is averaged once, whether it was stepped in the backward or had no grad."""
    averages = []
    for released in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(DEVICE)
        model[0].bias.requires_grad_(False)
        opt = fused_optim.AdamW(model.parameters(), lr=0.1, ema_decay=0.5 if has_ema else None)
        if released:
            fused_optim.release_gradients(model, opt, bucket_numel=5)
        for _ in range(3):
            model(torch.randn(2, 3).to(DEVICE)).square().sum().backward()
            opt.step()
            opt.zero_grad()
        averages.append(opt.ema_params() if has_ema else list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*averages))


def test_strided_shards_are_summed_over_their_dimension() -> None:
    """fully_shard on tensor-parallel params, on a mesh of processes that are not there."""
    program = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from fused_optim.sharding import ShardedSquares
torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
mesh = init_device_mesh("cpu", (2, 2))
placements = [_StridedShard(0, split_factor=2), Shard(0)]
squares = ShardedSquares()
squares.add(DTensor.from_local(torch.ones(2, 2), mesh, placements, run_check=False))
assert [dims for _, dims in squares._sums] == [(0, 1)], squares._sums
"""
    result = python(program)
    assert result.returncode == 0, result.stderr
