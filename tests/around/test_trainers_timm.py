"""timm's factories of optimizers, its Lookahead, its schedulers and its Lion."""

import copy
import importlib.abc
import importlib.machinery
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fused_optim
from support.marks import needs_cpu_kernels
from support.recordings import Recording, assert_stock_does_the_same, recorded

pytestmark = [needs_cpu_kernels, pytest.mark.usefixtures("one_thread")]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Names of timm's whose classes are torch.optim's.
NAMES = {
    "adam": "Adam",
    "adamw": "AdamW",
    "sgd": "SGD",
    "momentum": "SGD",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
}
N_STEPS = 7


class _Anything(type):
    """A class with every attribute; none of them is what another one is."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return object()


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """timm imports torchvision, for images alone, and there may be no build of it for this torch."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@pytest.fixture(scope="module")
def timm() -> Any:
    finder = _NoTorchvision()
    sys.meta_path.append(finder)  # behind those that find a real one
    try:
        import timm
        import timm.optim
        import timm.scheduler

        return timm
    finally:  # other libraries ask whether there is one
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if type(module) is _StandIn]:
            del sys.modules[name]


@pytest.fixture
def make_model(timm: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224",
            img_size=16,
            patch_size=8,
            embed_dim=32,
            depth=1,
            num_heads=2,
            num_classes=4,
        )

    return make


def train(
    model: nn.Module, opt: Optimizer, after: Callable[[int], None] = lambda i: None
) -> Recording:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with recorded() as recording:
        for i in range(N_STEPS):
            opt.zero_grad()
            nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
            opt.step()
            after(i)
    return recording


def are_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("name", NAMES)
def test_patched_factory(timm: Any, make_model: Any, name: str) -> None:
    """With its groups by layer, and its scheduler, which multiplies the lr of each."""
    recordings = []
    for patches in (True, False):
        model = make_model()
        arguments = {"lr": 1e-2, "weight_decay": 0.05, "layer_decay": 0.7}
        if patches:
            with fused_optim.patched():
                opt = timm.optim.create_optimizer_v2(model, name, **arguments)
        else:
            opt = timm.optim.create_optimizer_v2(model, name, **arguments)
        scheduler = timm.scheduler.CosineLRScheduler(opt, N_STEPS, warmup_t=2)
        recordings.append(train(model, opt, scheduler.step))
    ours, stock = recordings
    assert type(ours.optimizer) is getattr(fused_optim, NAMES[name])
    assert type(stock.optimizer) is getattr(torch.optim, NAMES[name])
    assert ours.optimizer.last_step.tensors == {"cpu": len(ours.params[0])}
    assert ours.options == stock.options
    assert len({group["lr"] for groups in ours.options for group in groups}) > N_STEPS
    assert are_equal(ours.grads[0], stock.grads[0])
    assert_stock_does_the_same(ours, getattr(torch.optim, NAMES[name]))


def test_a_registry_of_one_s_own(timm: Any, make_model: Any) -> None:
    registry = timm.optim.OptimizerRegistry()
    registry.register(timm.optim.OptimInfo("fusedadamw", fused_optim.AdamW, has_betas=True))
    model = make_model()
    opt = registry.create_optimizer(
        model, "fusedadamw", lr=1e-2, weight_decay=0.05, betas=(0.8, 0.9), max_grad_norm=0.5
    )
    assert type(opt) is fused_optim.AdamW
    assert opt.max_grad_norm == 0.5
    assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.05]
    recording = train(model, opt)
    assert opt.last_step.tensors == {"cpu": len(recording.params[0])}
    for grads in recording.grads:
        norm = nn.utils.get_total_norm(grads)
        assert norm > 0.5, "nothing to clip"
        for grad in grads:
            grad.mul_(0.5 / norm)
    assert_stock_does_the_same(recording, torch.optim.AdamW)


@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_lookahead(timm: Any, make_model: Any, state_dtype: Any) -> None:
    """It keeps a tensor of its own among the optimizer's states, and goes on from a checkpoint."""

    def make() -> tuple[nn.Module, Optimizer]:
        model = make_model()
        with fused_optim.patched(state_dtype=state_dtype):
            return model, timm.optim.create_optimizer_v2(model, "lookahead_adamw", lr=1e-2)

    model, opt = make()
    assert isinstance(opt, timm.optim.Lookahead)
    ours = train(model, opt)
    assert type(ours.optimizer) is fused_optim.AdamW
    assert ours.optimizer.last_step.tensors == {"cpu": len(ours.params[0])}
    states = [state["lookahead_slow_buff"] for state in ours.optimizer.state.values()]
    assert len(states) == len(ours.params[0])
    assert {state.dtype for state in states} == {torch.float32}

    twin, its_opt = make()
    twin.load_state_dict(model.state_dict())
    its_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    resumed, whole = train(twin, its_opt), train(model, opt)
    assert are_equal(resumed.params[-1], whole.params[-1])
    # In step 6 the slow params begin, as copies; step 12 is the fifth of these.
    assert not are_equal(whole.groups[5][0]["params"], whole.params[4]), "Lookahead did nothing"


@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.01, "betas": (0.5, 0.8), "weight_decay": 1.0, "maximize": True}],
    ids=str,
)
def test_lion_is_timms(timm: Any, options: dict[str, Any]) -> None:
    """torch.optim has none to compare with. Ours also goes on from a checkpoint of timm's."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator)
    makes = [timm.optim.Lion, fused_optim.Lion]
    pairs = [(make([param := nn.Parameter(values.clone())], **options), param) for make in makes]
    for i in range(2 * N_STEPS):
        if i == N_STEPS:
            theirs, param = pairs[0]
            resumed = nn.Parameter(param.detach().clone())
            pairs.append((fused_optim.Lion([resumed]), resumed))
            pairs[-1][0].load_state_dict(copy.deepcopy(theirs.state_dict()))
        grad = torch.randn(1000, generator=generator)
        for opt, param in pairs:
            param.grad = grad.clone()
            opt.step()
    # lr times a sign is exact, and no sum of momentum and grad here is 0 to within its roundings.
    assert all(torch.equal(param, pairs[0][1]) for _, param in pairs[1:])
    assert not torch.equal(pairs[0][1], values)


def test_example(timm: Any, capsys: pytest.CaptureFixture) -> None:
    runpy.run_path(str(EXAMPLES / "train_timm.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "tensors by {'cpu': " in out
    assert f"made a {fused_optim.AdamW}" in out
