"""AdamWScheduleFree beside the package that it takes the place of; train() and eval()."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fused_optim import AdamWScheduleFree, plain
from support.cases import BACKEND

schedulefree = pytest.importorskip("schedulefree")
if BACKEND != "cpu":
    pytest.skip("counts what the CPU's kernels serve", allow_module_level=True)

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all": {"lr": 0.01, "weight_decay": 0.1, "warmup_steps": 3, "r": 0.5, "betas": (0.8, 0.99)},
    "weights alike": {"lr": 0.1, "weight_lr_power": 0.0, "eps": 1e-4},
}
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
BOTH = (AdamWScheduleFree, plain.AdamWScheduleFree)
each_class = pytest.mark.parametrize("ours", BOTH, ids=["kernels", "plain"])


def new_params(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(3,), (65, 129), ()]
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def step(optimizers: list, n: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for param, *others in zip(*(o.param_groups[0]["params"] for o in optimizers)):
            grad = torch.randn(param.shape, dtype=torch.float64, generator=generator)
            for each in (param, *others):
                each.grad = grad.to(each.dtype)
        for optimizer in optimizers:
            optimizer.step()


def assert_close(left: Any, right: Any) -> None:
    # The params and a step are near 1; each of 10 steps rounds a dozen times.
    for a, b in zip(left.param_groups[0]["params"], right.param_groups[0]["params"], strict=True):
        assert (a - b).abs().max() <= 10 * 12 * torch.finfo(torch.float64).eps


@each_class
@each_options
def test_equal_to_the_package_in_both_modes(options: dict[str, Any], ours: type) -> None:
    theirs = schedulefree.AdamWScheduleFree(new_params(), foreach=False, **options)
    optimizer = ours(new_params(), **options)
    theirs.train()
    optimizer.train()
    for seed in range(2):
        step([optimizer, theirs], 5, seed)
        assert_close(optimizer, theirs)
        for mode in ("eval", "eval", "train", "train"):
            getattr(theirs, mode)()
            getattr(optimizer, mode)()
            assert_close(optimizer, theirs)


@each_class
@each_options
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_goes_on_from_a_checkpoint_of_the_package(
    options: dict[str, Any], mode: str, ours: type
) -> None:
    theirs = schedulefree.AdamWScheduleFree(new_params(), foreach=False, **options)
    theirs.train()
    step([theirs], 5)
    getattr(theirs, mode)()
    params = [nn.Parameter(p.detach().clone()) for p in theirs.param_groups[0]["params"]]
    optimizer = ours(params, **options)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    if mode == "eval":
        with pytest.raises(RuntimeError, match="in eval mode"):
            optimizer.step()
    for each in (theirs, optimizer):
        each.train()
    step([optimizer, theirs], 5, seed=1)
    assert_close(optimizer, theirs)


@each_class
def test_step_in_eval_mode_is_refused_and_changes_nothing(ours: type) -> None:
    optimizer = ours(new_params())
    step([optimizer], 2)
    optimizer.eval()
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    for each in (optimizer, copy.deepcopy(optimizer)):
        with pytest.raises(
            RuntimeError, match=r"step\(\) in eval mode: call the optimizer's train"
        ):
            each.step()
    assert all(map(torch.equal, before, optimizer.param_groups[0]["params"]))
    optimizer.train()
    step([optimizer], 1)


def test_beta1_of_0_keeps_no_average_and_is_refused() -> None:
    with pytest.raises(ValueError, match=r"index 0: 0\.0, must be more than 0"):
        AdamWScheduleFree(new_params(), betas=(0.0, 0.9))


def test_checkpoints_keep_their_numbers_in_float64() -> None:
    optimizer, other = (AdamWScheduleFree(new_params(torch.float32)) for _ in range(2))
    step([optimizer], 3)
    other.load_state_dict(optimizer.state_dict())
    of_both = (next(iter(o.state.values())) for o in (optimizer, other))
    for left, right in zip(*([states[k] for k in ("lr_max", "weight_sum")] for states in of_both)):
        assert left.dtype == right.dtype == torch.float64
        assert left == right


@pytest.mark.parametrize("master", ["split8", "split16"])
def test_eval_and_train_keep_the_master_s_bits(master: str) -> None:
    params = new_params(torch.bfloat16)
    optimizer = AdamWScheduleFree(params, lr=0.01, master=master, state_dtype="int8")
    exact = AdamWScheduleFree([nn.Parameter(p.detach().float()) for p in params], lr=0.01)
    step([optimizer, exact], 3)
    assert optimizer.last_step is not None
    assert optimizer.last_step.tensors == {"cpu": 3}
    before = optimizer.master_params()
    zs = [optimizer.state[p]["z"] for p in params]
    optimizer.eval()
    averages = optimizer.master_params()
    optimizer.train()
    # Of 8 + 8 bits, half a unit for each of two roundings, which the way back divides by beta1.
    unit = 2.0**-16 if master == "split8" else 2.0**-23
    for param, back, z, average in zip(before, optimizer.master_params(), zs, averages):
        size = torch.maximum(param.abs(), z.abs()).maximum(average.abs())
        assert ((param - back).abs() <= 4 * unit * size).all()
        assert ((average - torch.lerp(param, z, 1 - 1 / 0.9)).abs() <= 2 * unit * size).all()
