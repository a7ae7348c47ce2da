"""SGD's momentum where the device alone knows whether a first step was skipped."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import BaseTorchDispatchMode

import fused_optim
from support.cases import BACKEND, DEVICE

if BACKEND != "triton":
    pytest.skip("needs Triton: a GPU or its interpreter", allow_module_level=True)


def skipped_first_step() -> tuple[torch.nn.Parameter, fused_optim.SGD]:
    """Dampening shows whether a step was a first one: that takes the whole grad."""
    param = torch.nn.Parameter(torch.ones(5, device=DEVICE))
    opt = fused_optim.SGD([param], lr=0.5, momentum=0.9, dampening=0.5, fused=True)
    param.grad = torch.full((5,), 2.0, device=DEVICE)
    step(opt, skip=True)
    return param, opt


def step(opt: fused_optim.SGD, skip: bool = False) -> None:
    opt.grad_scale = torch.ones((), device=DEVICE)
    opt.found_inf = torch.full((), float(skip), device=DEVICE)
    opt.step()
    del opt.grad_scale, opt.found_inf


def buffer(opt: fused_optim.SGD) -> list[float]:
    return opt.state_dict()["state"][0]["momentum_buffer"].tolist()


def test_starts_with_the_first_step_that_is_not_skipped() -> None:
    param, opt = skipped_first_step()
    assert param.tolist() == [1.0] * 5
    step(opt, skip=True)
    step(opt)
    assert param.tolist() == [0.0] * 5 and buffer(opt) == [2.0] * 5
    step(opt, skip=True)
    step(opt)
    assert buffer(opt) == pytest.approx([2.8] * 5)
    opt.step()  # and without a scaler
    assert buffer(opt) == pytest.approx([3.52] * 5)
    assert opt.last_step.tensors == {"triton": 1}


@pytest.mark.parametrize("save", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_is_not_saved_before_and_lives_on(save) -> None:
    param, opt = skipped_first_step()
    opt.state[param]["mine"] = 7
    live = opt.state[param]["momentum_buffer"]
    assert opt.state_dict()["state"] == {}
    saved = save(opt)
    assert len(saved.state) == 0
    assert opt.state[param]["mine"] == 7 and opt.state[param]["momentum_buffer"] is live
    step(opt)
    assert buffer(opt) == [2.0] * 5
    saved.param_groups[0]["params"][0].grad = torch.full((5,), 2.0, device=DEVICE)
    saved.step()
    assert buffer(saved) == [2.0] * 5


def test_is_started_by_stock_where_that_takes_over() -> None:
    param, opt = skipped_first_step()
    grad, param.grad = param.grad, torch._neg_view(-param.grad)  # for which there is no kernel
    step(opt)
    assert opt.last_step.tensors == {"stock": 1}
    assert param.tolist() == [0.0] * 5 and buffer(opt) == [2.0] * 5
    param.grad = grad
    step(opt)
    assert opt.last_step.tensors == {"triton": 1}
    assert buffer(opt) == pytest.approx([2.8] * 5)


def test_is_started_by_stock_under_a_dispatch_mode() -> None:
    param, opt = skipped_first_step()
    with BaseTorchDispatchMode():
        step(opt)
    assert opt.last_step.tensors == {"stock": 1}
    assert param.tolist() == [0.0] * 5 and buffer(opt) == [2.0] * 5
    step(opt)
    assert opt.last_step.tensors == {"triton": 1}
    assert buffer(opt) == pytest.approx([2.8] * 5)


def test_is_asked_about_no_more_once_the_host_has_learnt_it() -> None:
    _, opt = skipped_first_step()
    for _ in range(4):
        step(opt)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    assert not opt._unsure


def test_memory_of_what_was_learnt_may_be_a_grad_s() -> None:
    params = [torch.nn.Parameter(torch.randn(4, device=DEVICE)) for _ in range(8)]
    opt = fused_optim.SGD(params, lr=0.01, momentum=0.9, skip_nonfinite=True)
    for _ in range(20):  # grads on the CPU come to lie where freed numbers did
        opt.zero_grad()
        sum(param.square().sum() for param in params).backward()
        opt.step()
        assert opt.last_step.tensors == {"triton": 8}
