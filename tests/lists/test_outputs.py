"""set_outputs(): tensors that get the params' new values from each step."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_optim
from support.cases import BACKEND, DEVICE, Case
from support.marks import each_optimizer, few_cases
from support.processes import python
from support.program import assert_same_bits
from support.twins import SHAPES, Run

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ADAMW = Case("AdamW")


def with_outputs(run: Run, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs of all params, of one dtype or of several."""
    outputs = [
        torch.zeros_like(param, dtype=dtype or DTYPES[i % 3], requires_grad=False)
        for i, param in enumerate(run.params)
    ]
    run.opt.set_outputs(dict(zip(run.params, outputs)))
    assert_refreshed(run, outputs)
    return outputs


def assert_refreshed(run: Run, outputs: list[Tensor]) -> None:
    expected = [param.detach().to(output.dtype) for param, output in zip(run.params, outputs)]
    assert_same_bits(outputs, expected)


@each_optimizer
def test_each_step_refreshes_them_and_changes_nothing_else(case: Case) -> None:
    run, other = Run(case, case.fused), Run(case, case.fused)
    outputs = with_outputs(run)
    for _ in range(3):
        run.step()
        assert_refreshed(run, outputs)
    assert run.opt.last_step.tensors == {BACKEND: len(SHAPES)}
    other.step(3)
    assert_same_bits(run.harvest(), other.harvest())


OPTIONS: dict[str, dict[str, Any]] = {
    "one pass": {"max_grad_norm": 0.1, "skip_nonfinite": True, "zero_grads": True},
    "average": {"ema_decay": 0.5},
    "int8": {"state_dtype": "int8"},
    "bfloat16": {"state_dtype": torch.bfloat16},
}


@few_cases
@pytest.mark.parametrize("options", OPTIONS)
def test_with_other_options(case: Case, options: str) -> None:
    run, other = (
        Run(case, case.fused, shapes=(*SHAPES, (5000,)), extra=OPTIONS[options]) for _ in range(2)
    )
    outputs = with_outputs(run, torch.bfloat16)
    for _ in range(3):
        run.step()
        assert_refreshed(run, outputs)
    other.step(3)
    assert_same_bits(run.harvest(), other.harvest())


@pytest.mark.parametrize("master", ["stochastic", "split8", "split16"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_masters_give_what_other_code_reads(master: str, dtype: torch.dtype) -> None:
    run = Run(ADAMW, ADAMW.fused, dtype=dtype, extra={"master": master})
    outputs = with_outputs(run)
    for _ in range(3):
        run.step()
        assert_refreshed(run, outputs)


def _noncontiguous(run: Run) -> None:
    run.params[1].grad = torch.ones(5, 33, device=DEVICE).t()


def _double(run: Run) -> None:
    run.params[1].data = run.params[1].data.double()
    run.opt.state.clear()
    run.params[1].grad = run.randn(run.params[1])


def _differentiable(run: Run) -> None:
    run.opt.param_groups[0]["differentiable"] = True


@few_cases
@pytest.mark.parametrize("change", [_noncontiguous, _double, _differentiable])
def test_of_params_that_are_copied_or_stepped_by_torch(
    case: Case, change: Callable[[Run], None]
) -> None:
    run = Run(case, case.fused)
    outputs = with_outputs(run, torch.bfloat16)
    run.step()
    for param in run.params:
        param.grad = run.randn(param)
    change(run)
    with torch.no_grad():
        run.opt.step()
    assert_refreshed(run, outputs)


@few_cases
def test_what_is_skipped_or_has_no_grad_leaves_them_alone(case: Case) -> None:
    run = Run(case, case.fused, extra={"skip_nonfinite": True})
    outputs = with_outputs(run)
    run.step()
    before = [output.clone() for output in outputs]
    run.set_grads()
    run.params[0].grad.fill_(float("inf"))
    run.opt.step()
    assert run.opt.skipped_steps == 1
    assert_same_bits(before, outputs)
    for param in run.params[1:]:
        param.grad = None
    run.params[0].grad.fill_(1.0)
    run.opt.step()
    assert_refreshed(run, outputs)
    assert_same_bits(before[1:], outputs[1:])
    assert not torch.equal(before[0], outputs[0])


def test_they_may_be_slices_of_one_buffer_and_change() -> None:
    run = Run(ADAMW, ADAMW.fused)
    buffer = torch.zeros(sum(param.numel() for param in run.params), dtype=torch.bfloat16)
    parts = buffer.to(DEVICE).split([param.numel() for param in run.params])
    outputs = [part.view(param.shape) for part, param in zip(parts, run.params)]
    run.opt.set_outputs(dict(zip(run.params, outputs)))
    run.step()
    assert_refreshed(run, outputs)
    before = [output.clone() for output in outputs]
    others = with_outputs(run, torch.float16)  # they take the others' place
    run.step()
    assert_refreshed(run, others)
    assert_same_bits(before, outputs)
    run.opt.set_outputs(None)
    before = [output.clone() for output in others]
    run.step()
    assert_same_bits(before, others)


def test_they_are_no_part_of_copies_and_checkpoints() -> None:
    run = Run(ADAMW, ADAMW.fused)
    with_outputs(run)
    run.step()
    twin = copy.deepcopy(run.opt)
    assert run.opt._outputs is not None and twin._outputs is None
    assert run.opt.state_dict().keys() == {"state", "param_groups"}


def test_in_the_backward() -> None:
    run = Run(ADAMW, ADAMW.fused)
    outputs = with_outputs(run, torch.bfloat16)
    handle = fused_optim.release_gradients(torch.nn.ParameterList(run.params), run.opt)
    for _ in range(2):
        sum(param.square().sum() for param in run.params).backward()
        run.opt.step()
        assert_refreshed(run, outputs)
    handle.remove()


@pytest.mark.skipif(BACKEND != "cpu", reason="needs CPU kernels")
def test_without_kernels() -> None:
    done = python(
        """
import torch, fused_optim
param = torch.nn.Parameter(torch.arange(5.0))
opt = fused_optim.AdamW([param])
output = torch.zeros(5, dtype=torch.bfloat16)
opt.set_outputs({param: output})
param.grad = torch.ones(5)
opt.step()
assert opt.last_step.tensors == {"stock": 1}
print(torch.equal(output, param.bfloat16()))
""",
        FUSED_OPTIM_BACKEND="stock",
    )
    assert done.stdout.split() == ["True"], done.stderr


BAD: dict[str, tuple[Callable[[Run], dict[Any, Any]], type[Exception], str]] = {
    "no tensor": (lambda run: {run.params[1]: 3}, TypeError, "the output of param 1 must be"),
    "a stranger": (
        lambda run: {torch.zeros(7): torch.zeros(7)},
        ValueError,
        "a key of outputs is no param of this optimizer",
    ),
    "shape": (
        lambda run: {run.params[1]: torch.zeros(5, 33)},
        ValueError,
        r"the output of param 1 has shape \(5, 33\), its param \(33, 5\)",
    ),
    "integers": (
        lambda run: {run.params[0]: torch.zeros(7, dtype=torch.int32)},
        ValueError,
        "the output of param 0 has dtype torch.int32",
    ),
    "the param": (
        lambda run: {run.params[4]: run.params[4].data},
        ValueError,
        "the output of param 4 shares memory with another tensor",
    ),
    "one for two": (
        lambda run: dict.fromkeys((run.params[0], run.params[2]), torch.zeros(())),
        ValueError,
        "the output of param 0 has shape",
    ),
    "no dict": (lambda run: [run.params[0]], TypeError, "outputs must be a dict of tensors"),
    "expanded": (
        lambda run: {run.params[1]: torch.zeros(1).expand(33, 5)},
        ValueError,
        "elements of the output of param 1 share memory",
    ),
    "sparse": (
        lambda run: {run.params[1]: torch.zeros(33, 5).to_sparse()},
        ValueError,
        "the output of param 1 is no strided tensor",
    ),
    "one memory for two": (
        lambda run: (lambda t: {run.params[0]: t[:7], run.params[2]: t[6]})(torch.zeros(8)),
        ValueError,
        "the output of param 2 shares memory with another tensor",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_sets_nothing(bad: str) -> None:
    outputs, error, words = BAD[bad]
    run = Run(ADAMW, ADAMW.fused)
    before = with_outputs(run)
    with pytest.raises(error, match=words):
        run.opt.set_outputs(outputs(run))
    run.step()
    assert_refreshed(run, before)


def test_with_an_average_params_without_grads_leave_theirs_alone() -> None:
    run = Run(ADAMW, ADAMW.fused, extra={"ema_decay": 0.5})
    outputs = with_outputs(run)
    run.set_grads()
    run.params[1].grad = None
    before = outputs[1].clone()
    run.params[1].data.fill_(7.0)
    run.opt.step()
    assert_same_bits([before], [outputs[1]])
    assert_refreshed(run, [*outputs[:1], run.params[1].detach(), *outputs[2:]])


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5}], ids=str)
def test_an_output_that_no_longer_fits_is_an_error(options: dict[str, Any]) -> None:
    run = Run(ADAMW, ADAMW.fused, extra=options)
    with_outputs(run)
    run.params[1].data = run.params[1].data[:3].clone()
    run.opt.state.clear()
    run.set_grads()
    before = [param.detach().clone() for param in run.params]
    with pytest.raises(ValueError, match=r"(its output|the output of a param) has shape"):
        run.opt.step()
    assert_same_bits(before, run.params)
