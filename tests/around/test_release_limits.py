"""Where release_gradients refuses, what is left after a backward that raises, and what keeps what alive."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import fused_optim
from fused_optim import release_gradients
from support.cases import BACKEND, DEVICE
from support.marks import needs_cpu_kernels
from support.processes import python


def linear(n_layers: int = 4) -> tuple[nn.Sequential, fused_optim.AdamW]:
    """Layers of one param with 25 elements."""
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(n_layers))).to(DEVICE)
    return model, fused_optim.AdamW(model.parameters())


def backward(model: nn.Module) -> None:
    model(torch.ones(3, 5, device=DEVICE)).sum().backward()


def copies(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def changed(model: nn.Module, before: list[Tensor]) -> list[bool]:
    return [not torch.equal(param, old) for param, old in zip(model.parameters(), before)]


def assert_intact(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    assert not hasattr(opt, "_released") and not hasattr(opt, "_step_supports_amp_scaling")
    assert all(not param._post_accumulate_grad_hooks for param in model.parameters())


@pytest.mark.parametrize(
    ("name", "value"), [("max_grad_norm", 1.0), ("skip_nonfinite", True), ("zero_grads", True)]
)
def test_options_that_need_all_grads(name: str, value: object) -> None:
    model, opt = linear()
    setattr(opt, name, value)
    with pytest.raises(ValueError, match=name):
        release_gradients(model, opt)
    # The option itself, not the refusal, has told GradScaler that step() scales.
    del opt._step_supports_amp_scaling
    assert_intact(model, opt)
    setattr(opt, name, None if name == "max_grad_norm" else False)
    release_gradients(model, opt)
    setattr(opt, name, value)
    before = copies(model)
    with pytest.raises(RuntimeError, match=name):
        backward(model)
    assert not any(changed(model, before))


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_options_of_groups(option: str) -> None:
    model, opt = linear()
    opt.param_groups[0][option] = True
    with pytest.raises(ValueError, match=f"param group 0 has {option}=True"):
        release_gradients(model, opt)
    assert_intact(model, opt)


@pytest.mark.parametrize("argument", ["accumulation_steps", "bucket_numel"])
@pytest.mark.parametrize("value", [0, -1])
def test_arguments_out_of_range(argument: str, value: int) -> None:
    model, opt = linear()
    with pytest.raises(ValueError, match=f"Invalid {argument}: {value}, must be >= 1"):
        release_gradients(model, opt, **{argument: value})
    assert_intact(model, opt)


def test_other_optimizers_and_params() -> None:
    model, opt = linear()
    with pytest.raises(ValueError, match="an optimizer of fused_optim, got AdamW"):
        release_gradients(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="param 2 of group 0 does not belong to the model"):
        release_gradients(model[:2], opt)
    opt.param_groups[0]["params"].append(model[1].weight)
    with pytest.raises(ValueError, match="param 4 of group 0 is there twice"):
        release_gradients(model, opt)
    assert_intact(model, opt)


def test_already_released() -> None:
    model, opt = linear()
    handle = release_gradients(model, opt)
    with pytest.raises(ValueError, match="already releases"):
        release_gradients(model, opt)
    with pytest.raises(ValueError, match="param 0 of group 0 is already released"):
        release_gradients(model, fused_optim.SGD(model[2].parameters()))
    handle.remove()
    release_gradients(model, fused_optim.SGD(model[2].parameters()))
    # The first optimizer of these is gone, and with it its handle.
    release_gradients(model, opt)


WRAPPERS = {
    "DistributedDataParallel": "model = nn.parallel.DistributedDataParallel(model)",
    "has a DistributedDataParallel": """
model = nn.Sequential(nn.parallel.DistributedDataParallel(model))""",
    "FullyShardedDataParallel": """
from torch.distributed.fsdp import FullyShardedDataParallel
model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)""",
    "FSDPModule": """
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))""",
    "DTensor": """
from torch.distributed.tensor import distribute_module
from torch.distributed.device_mesh import init_device_mesh
distribute_module(model, init_device_mesh("cpu", (1,)))""",
    "2 processes": "processes = 2",
    "": "",  # one process is fine, until there are more
}

DISTRIBUTED = """
import torch, torch.distributed as dist
from torch import nn
import fused_optim
processes = 1
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = nn.Linear(3, 2)
{wrap}
dist.get_world_size = lambda group=None: processes
opt = fused_optim.AdamW(model.parameters())
try:
    fused_optim.release_gradients(model, opt)
except (ValueError, RuntimeError) as error:
    print(error)
else:
    model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is None
    opt.step()
    processes = 2
    try:
        model(torch.ones(1, 3)).sum().backward()
    except RuntimeError as error:
        print("later:", error)
dist.destroy_process_group()
"""


@needs_cpu_kernels
@pytest.mark.parametrize("reason", WRAPPERS)
def test_distributed(reason: str) -> None:
    done = python(DISTRIBUTED.format(wrap=WRAPPERS[reason]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("release_gradients cannot work: " if reason else "later: ")
    assert (reason or "2 processes") in done.stdout, done.stdout


@pytest.mark.parametrize("accumulation_steps", [1, 3])
@pytest.mark.parametrize("bucket_numel", [1, 10**6])
def test_a_backward_too_many(accumulation_steps: int, bucket_numel: int) -> None:
    model, opt = linear()
    release_gradients(model, opt, accumulation_steps=accumulation_steps, bucket_numel=bucket_numel)
    for _ in range(2):
        for _ in range(accumulation_steps):
            backward(model)
        before = copies(model)
        for _ in range(2):  # until step() is called
            with pytest.raises(RuntimeError, match=f"accumulation_steps={accumulation_steps}"):
                backward(model)
        opt.zero_grad()  # what was stepped is not accumulated anew
        with pytest.raises(RuntimeError, match="param 3 of group 0"):
            backward(model)
        assert not any(changed(model, before))
        opt.zero_grad()
        opt.step()
        assert opt.last_step.tensors == {BACKEND: 4}


def test_a_backward_too_many_for_some_params() -> None:
    model, opt = linear()
    release_gradients(model, opt)
    model[3].weight.sum().backward()
    before = copies(model)
    with pytest.raises(RuntimeError, match="accumulation_steps=1"):
        backward(model)
    assert not any(changed(model, before))


def test_second_backward_of_one_graph() -> None:
    model, opt = linear()
    release_gradients(model, opt, accumulation_steps=2)
    loss = model(torch.ones(3, 5, device=DEVICE)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    opt.step()
    assert opt.last_step.tensors == {BACKEND: 4}
    loss = model(torch.ones(3, 5, device=DEVICE)).sum()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):  # ours, or autograd's: the params have been modified
        loss.backward()


def test_double_backward() -> None:
    def train(releases: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, opt = linear()
        if releases:
            release_gradients(model, opt, bucket_numel=26)
        for _ in range(3):
            loss = model(torch.ones(3, 5, device=DEVICE)).square().sum()
            grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            (loss + sum(grad.square().sum() for grad in grads)).backward()
            opt.step()
            opt.zero_grad()
        return list(model.parameters())

    assert all(torch.equal(p, q) for p, q in zip(train(True), train(False)))


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        raise KeyError("on purpose")


def fail_midway(model: nn.Sequential) -> None:
    x = Fails.apply(model[:2](torch.ones(3, 5, device=DEVICE)))
    with pytest.raises(KeyError, match="on purpose"):
        model[2:](x).sum().backward()


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("then", ["nothing", "zero_grad", "step"])
@pytest.mark.parametrize(
    ("bucket_numel", "stepped", "left"),
    [
        (1, [False, False, True, True], []),
        (26, [False, False, True, True], []),
        (60, [False] * 4, [2, 3]),
    ],
)
def test_a_backward_that_raises(
    accumulation_steps: int, then: str, bucket_numel: int, stepped: list[bool], left: list[int]
) -> None:
    model, opt = linear()
    params = list(model.parameters())
    release_gradients(model, opt, accumulation_steps=accumulation_steps, bucket_numel=bucket_numel)
    for _ in range(2):
        for _ in range(accumulation_steps - 1):
            backward(model)
        before = copies(model)
        fail_midway(model)
        assert changed(model, before) == stepped
        has_grad = [i for i, param in enumerate(params) if param.grad is not None]
        assert has_grad == (left if accumulation_steps == 1 else sorted({0, 1, *left}))
        if then == "zero_grad":
            opt.zero_grad()
        elif then == "step":
            opt.step()
            assert opt.last_step.tensors.get(BACKEND, 0) == sum(stepped) + len(has_grad)
            opt.zero_grad()
        for _ in range(accumulation_steps):
            backward(model)
        assert all(param.grad is None for param in params)
        opt.step()
        assert opt.last_step.tensors == {BACKEND: 4}


@pytest.mark.parametrize("bucket_numel", [1, 10**6])
def test_a_step_that_raises(bucket_numel: int) -> None:
    """Its error tells the position in the optimizer, and it can be mended."""
    model, opt = linear()
    opt.add_param_group({"params": [opt.param_groups[0]["params"].pop()]})
    release_gradients(model, opt, bucket_numel=bucket_numel)
    backward(model)
    opt.step()
    good = opt.state[model[1].weight]["exp_avg"]
    opt.state[model[1].weight]["exp_avg"] = good[:2]
    with pytest.raises(RuntimeError, match="param 1 of group 0: state 'exp_avg' has shape"):
        backward(model)
    opt.state[model[1].weight]["exp_avg"] = good
    opt.zero_grad()
    opt.param_groups[1]["lr"] = "0.1"
    with pytest.raises(TypeError, match=r"param group 1 \(lr='0.1', "):
        backward(model)
    opt.param_groups[1]["lr"] = 0.1
    opt.zero_grad()
    backward(model)
    opt.step()
    assert opt.last_step.tensors == {BACKEND: 4}


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("unscales", [False, True])
def test_grad_scaler(fused: bool | None, unscales: bool) -> None:
    model, _ = linear()
    opt = fused_optim.AdamW(model.parameters(), fused=fused)
    amp = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    handle = release_gradients(model, opt)
    amp.scale(model(torch.ones(3, 5, device=DEVICE)).sum()).backward()
    if unscales:
        amp.unscale_(opt)
    with pytest.raises(RuntimeError, match="already stepped, in the backward, with scaled grads"):
        amp.step(opt)
    assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")
    opt.step()
    handle.remove()
    amp = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    amp.scale(model(torch.ones(3, 5, device=DEVICE)).sum()).backward()
    amp.step(opt)
    assert opt.last_step.tensors == {BACKEND: 4}


def test_a_disabled_grad_scaler_is_none() -> None:
    model, opt = linear()
    release_gradients(model, opt)
    amp = torch.amp.GradScaler(DEVICE.type, enabled=False)
    amp.scale(model(torch.ones(3, 5, device=DEVICE)).sum()).backward()
    amp.step(opt)
    assert opt.last_step.tensors == {BACKEND: 4}


def test_scale_set_by_hand() -> None:
    model, opt = linear()
    release_gradients(model, opt)
    opt.grad_scale = torch.tensor(2.0, device=DEVICE)
    before = copies(model)
    with pytest.raises(RuntimeError, match="scaled grads"):
        backward(model)
    assert not any(changed(model, before))


def test_without_kernels() -> None:
    program = """
import torch, fused_optim
model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
groups = [{"params": model[0].parameters()}, {"params": model[1].parameters()}]
opt = fused_optim.AdamW(groups)
fused_optim.release_gradients(model, opt, bucket_numel=10)
model(torch.ones(1, 3)).sum().backward()
opt.step()
print([(f.group, f.index, f.reason) for f in opt.last_step.fallbacks])
"""
    done = python(program, FUSED_OPTIM_BACKEND="stock")
    assert done.returncode == 0, done.stderr
    reason = "no kernels in use"
    assert done.stdout.strip() == str([(g, i, reason) for g in (0, 1) for i in (0, 1)])


@pytest.mark.parametrize("keeps", ["nothing", "handle", "model"])
def test_nothing_keeps_model_or_optimizer_alive(keeps: str) -> None:
    gc.disable()
    try:
        model, opt = linear()
        handle = release_gradients(model, opt, bucket_numel=26)
        backward(model)
        opt.step()
        refs = {
            "model": weakref.ref(model[0].weight),
            "optimizer": weakref.ref(opt),
            "handle": weakref.ref(handle),
        }
        del opt
        if keeps == "model":  # which then accumulates as ever
            del handle
            backward(model)
            assert model[0].weight.grad is not None
        else:
            del model
            if keeps == "nothing":
                del handle
        alive = [name for name, ref in refs.items() if ref() is not None]
        assert alive == [name for name in refs if name == keeps]
    finally:
        gc.enable()
