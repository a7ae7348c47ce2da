"""torch.compile, dispatch modes, make_fx and the profiler around optimizers."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fused_optim
from support.cases import DEVICE, Case
from support.marks import each_optimizer, few_cases, needs_cpu_kernels, not_interpreted
from support.processes import python
from support.twins import SHAPES, Run, assert_close, run_both

REASON = "a dispatch mode is active"


@not_interpreted
@pytest.mark.parametrize("patched", [False, True])
def test_compiled_functions_make_and_use_optimizers(patched: bool) -> None:
    """In a process of its own: the first optimizer of a class wraps its step().

    Of those that share all code but their rule, one.
    """
    names = ["Adam", "SGD"] if patched else ["AdamW", "Adagrad", "Lion"]
    done = python(
        f"from support.compiled import check\nfor name in {names}: check(name, {patched})"
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Recording(TorchDispatchMode):
    """Sees the operations of torch, and does them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "profiler":  # torch.optim records its steps by an operation, too
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@few_cases
def test_dispatch_mode_sees_what_it_sees_of_stock(case: Case) -> None:
    def program(run: Run) -> None:
        run.step()
        for _ in range(2):
            run.set_grads()
            with Recording() as mode:
                run.step_as_is()
            run.seen.append(mode.names)
            if run.is_ours:
                assert run.opt.last_step.tensors == {"stock": len(SHAPES)}
                assert {f.reason for f in run.opt.last_step.fallbacks} == {REASON}
        assert any(name.endswith("_.Tensor") for name in run.seen[0])
        run.step()

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@few_cases
def test_states_that_are_made_under_a_dispatch_mode(case: Case) -> None:
    def program(run: Run) -> None:
        run.set_grads()
        with Recording():
            run.step_as_is()
        run.step(2)

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@each_optimizer
def test_explain_says_that_a_dispatch_mode_is_active(case: Case) -> None:
    run = Run(case, case.fused)
    with Recording():
        under_mode = run.opt.explain()
    assert under_mode.tensors == {"stock": len(SHAPES)}
    assert {row.reason for row in under_mode.rows} == {REASON}
    assert run.opt.explain().tensors == {case.backend: len(SHAPES)}


ONE_PASS = {
    "clip": {"max_grad_norm": 0.5, "write_clipped_grads": True},
    "average and zero": {"ema_decay": 0.5, "zero_grads": True},
    "skip": {"skip_nonfinite": True},
}


@few_cases
@pytest.mark.parametrize("options", ONE_PASS)
def test_one_pass_under_a_dispatch_mode(case: Case, options: str) -> None:
    """As the kernels do it all."""
    runs = []
    for make_mode in (Recording, contextlib.nullcontext):
        run = Run(case, case.fused, extra=ONE_PASS[options])
        run.step()
        run.set_grads()
        if options == "skip":
            run.params[1].grad[3, 2] = float("nan")
        with make_mode():
            run.step_as_is()
        runs.append(run)
    (watched, free), opts = runs, [run.opt for run in runs]
    if options != "skip":
        assert [opt.last_step.tensors for opt in opts] == [
            {"stock": len(SHAPES)},
            {case.backend: len(SHAPES)},
        ]
    assert opts[0].skipped_steps == opts[1].skipped_steps == (options == "skip")
    for ours, expected in zip(watched.params, free.params):
        assert_close(ours, expected, 2)
        assert_close(ours.grad, expected.grad, 1)
    if options == "clip":
        assert opts[0].grad_norm > 0.5
        torch.testing.assert_close(opts[0].grad_norm, opts[1].grad_norm, check_device=False)
    if options == "average and zero":
        assert not any(param.grad.any() for param in watched.params)
        for ours, expected in zip(*(opt.ema_params() for opt in opts)):
            assert_close(ours, expected, 2)


FORMATS = {
    "int8": (torch.float32, {"state_dtype": "int8"}),
    "bfloat16": (torch.float32, {"state_dtype": torch.bfloat16}),
    "split16": (torch.bfloat16, {"master": "split16"}),
}
LONG = ((5000,),)  # int8 is for tensors of 4,096 elements


@few_cases
@pytest.mark.parametrize("format", FORMATS)
def test_formats_under_a_dispatch_mode(case: Case, format: str) -> None:
    """They decode to values that kernels step to: the states before are the same, bit for bit."""
    dtype, options = FORMATS[format]
    values, backends = [], []
    for make_mode in (Recording, contextlib.nullcontext):
        run = Run(case, case.fused, LONG, dtype, options)
        run.step(2)
        run.set_grads()
        with make_mode():
            run.step_as_is()
        backends.append(*run.opt.last_step.tensors)
        values.append(run.opt.master_params())
    assert backends == ["stock", case.backend]
    for ours, expected in zip(*values):
        assert_close(ours, expected, 1)


@few_cases
def test_released_grads_under_a_dispatch_mode(case: Case) -> None:
    weights = []
    for make_mode in (Recording, contextlib.nullcontext):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3).to(DEVICE)
        opt = case.fused(model.parameters())
        with fused_optim.release_gradients(model, opt), make_mode():
            model(torch.ones(2, 5, device=DEVICE)).square().sum().backward()
            opt.step()
        weights.append((opt.last_step.tensors, model.weight))
    (watched_tensors, watched), (free_tensors, free) = weights
    assert (watched_tensors, free_tensors) == ({"stock": 2}, {case.backend: 2})
    assert_close(watched, free, 1)


@needs_cpu_kernels
def test_forced_kernels_refuse_a_dispatch_mode() -> None:
    program = """
import torch
from step.test_tracing import REASON, Recording, Run
from support.cases import ONE_EACH
for case in ONE_EACH:
    run = Run(case, case.fused)
    run.step()
    try:
        with Recording():
            run.step()
    except RuntimeError as error:
        assert REASON in str(error), error
    else:
        raise AssertionError(case)
    run.step()
"""
    done = python(program, FUSED_OPTIM_BACKEND="cpu")
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def swapped(run: Run, params: list[Tensor]) -> Iterator[None]:
    """The optimizer has these params and clones of its states for a while."""
    group, state = run.opt.param_groups[0], run.opt.state
    own = group["params"]
    run.opt.state = type(state)(dict)
    for param, old in zip(params, own):
        run.opt.state[param] = {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in state.get(old, {}).items()
        }
    group["params"] = params
    try:
        yield
    finally:
        group["params"], run.opt.state = own, state


def traced(run: Run, shape: torch.Size) -> torch.fx.GraphModule:
    def step(param: Tensor, grad: Tensor) -> Tensor:
        param = param.clone()
        with swapped(run, [param]):
            param.grad = grad
            run.opt.step()
        return param * 2

    return make_fx(step)(torch.ones(shape), torch.ones(shape))


@needs_cpu_kernels
@few_cases
def test_make_fx_records_the_update_as_stocks(case: Case) -> None:
    def program(run: Run) -> None:
        run.step()
        graph = traced(run, run.params[0].shape)
        nodes = [node for node in graph.graph.nodes if "profiler" not in str(node.target)]
        run.seen.append([str(node.target) for node in nodes])
        run.seen.append(graph(torch.ones(7), torch.ones(7)))
        run.step()

    ours, stock = run_both(case, program, [(7,)])
    # Adam's and Adagrad's read a number of steps from a tensor, which make_fx refuses.
    assert str(ours.error) == str(stock.error)
    if stock.error is None:
        assert any("_." in name for name in ours.seen[0])


@needs_cpu_kernels
@few_cases
@pytest.mark.parametrize("format", FORMATS)
def test_make_fx_of_formats_is_an_error(case: Case, format: str) -> None:
    dtype, options = FORMATS[format]
    run = Run(case, case.fused, LONG, dtype, options)

    def step(param: Tensor, grad: Tensor) -> Tensor:
        param = param.clone()
        optimizer = run.make([param])
        param.grad = grad
        optimizer.step()
        return param

    values = torch.ones(*LONG, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"state_dtype and master .* ProxyTorchDispatchMode"):
        make_fx(step)(values, values)


@needs_cpu_kernels
@few_cases
def test_no_codec_writes_to_fake_tensors(case: Case) -> None:
    """They have no memory: that would end the process."""
    run = Run(case, case.fused, LONG, torch.bfloat16, {"master": "split16"})
    run.step()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match=r"state_dtype and master .* FakeTensorMode"),
    ):
        run.opt.master_params()


@each_optimizer
def test_fake_tensors_are_stepped_as_by_stock(case: Case) -> None:
    def program(run: Run) -> None:
        with FakeTensorMode():
            param = torch.nn.Parameter(torch.ones(7))
            inside, outside = (run.make([param]) for _ in range(2))
            param.grad = torch.ones(7)
            inside.step()
        outside.step()
        for opt in (inside, outside):
            run.seen.append(sorted(opt.state[param]))
            if run.is_ours:
                assert opt.last_step.tensors == {"stock": 1}
        run.opt = run.make([torch.nn.Parameter(torch.ones(1))])

    run_both(case, program)


def test_fake_tensors_are_averaged() -> None:
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.ones(7))
        opt = fused_optim.SGD([param], lr=0.1, ema_decay=0.123, ema_warmup=True)
        param.grad = torch.ones(7)
        for _ in range(3):
            opt.step()
    assert opt._averages[param][1] == 3
