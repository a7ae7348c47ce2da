"""torch.set_default_device is for what a program makes, not for what a step makes."""

import contextlib
from typing import Any

import pytest
import torch

import fused_optim
from support.cases import BACKEND, DEVICE
from support.program import Program, Streams, assert_same_bits

SHAPES = ((7,), (3, 70), (1,), (8193,))
PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("AdamW", {}),
    "on the device": ("AdamW", {"capturable": True, "lr": torch.tensor(0.1)}),
    "one pass": ("RMSprop", {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9}),
    "formats": ("Adam", {"state_dtype": "int8", "master": "split16"}),
    "scaled": ("SGD", {"momentum": 0.9, "dampening": 0.5, "fused": True}),
}


def outcome(name: str, default: contextlib.AbstractContextManager) -> Streams:
    optimizer, options = PROGRAMS[name]
    dtype = torch.bfloat16 if "master" in options else torch.float32
    generator = torch.Generator().manual_seed(1)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(DEVICE, dtype)

    params = [torch.nn.Parameter(draw(shape)) for shape in SHAPES]
    options = {
        k: v.clone().to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()
    }

    def make() -> Any:
        return getattr(fused_optim, optimizer)(params, **options)

    opt = make()
    if name != "scaled":  # torch.optim's own first states would go to the default device
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
        saved, opt = opt.state_dict(), make()
        opt.load_state_dict(saved)
    with default:
        for n_grads in (4, 4, 3, 4):
            for i, param in enumerate(params):
                param.grad = draw(param.shape) if i < n_grads else None
            if name == "scaled":
                opt.grad_scale = torch.full((), 3.0, device=DEVICE)
                opt.found_inf = torch.full((), float(n_grads == 3), device=DEVICE)
            opt.step()
            assert opt.last_step is not None and "stock" not in opt.last_step.tensors
    return Program(opt, params).harvest_all()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_step_makes_nothing_on_the_default_device(name: str) -> None:
    if name == "on the device" and BACKEND != "triton":
        pytest.skip("needs Triton: a GPU or its interpreter")
    usual = outcome(name, contextlib.nullcontext())
    assert_same_bits(outcome(name, torch.device("meta")), usual)


@pytest.mark.parametrize("name", PROGRAMS)
def test_nor_does_what_is_uploaded_and_compiled(name: str) -> None:
    if BACKEND != "cpu":
        pytest.skip("needs CPU kernels, and Triton as a compiler")
    pytest.importorskip("triton", reason="needs triton")
    from support.stub_gpu import stub_gpu

    with stub_gpu() as gpu:
        outcome(name, torch.device("meta"))
        assert "multi_tensor" in gpu.names()
