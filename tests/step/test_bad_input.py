"""What cannot be stepped raises a clear error before anything is written."""

import inspect
from collections.abc import Callable

import pytest
import torch

from support.cases import DEVICE, FEW_CASES, ONE_EACH, Case, stock_class
from support.marks import each_optimizer, few_cases, over
from support.program import SCALARS
from support.surgeries import tensors_of
from support.twins import SHAPES, Run, assert_untouched, run_both, snapshot, step_or_leave_untouched


def assert_refused(run: Run, error: type[Exception], match: str) -> None:
    before = snapshot(run.opt)
    versions = [param._version for param in run.params]
    with pytest.raises(error, match=match or None):
        run.opt.step()
    assert_untouched(run.opt, before)
    assert [param._version for param in run.params] == versions


def begun(case: Case, n_steps: int = 2) -> Run:
    """Ours with a second group, so that there is something to write before the bad tensor is met."""
    run = Run(case, case.fused)
    run.opt.add_param_group({"params": [torch.nn.Parameter(run.randn((33, 5)))]})
    run.step(n_steps)
    run.set_grads()
    return run


@over([case for case in FEW_CASES if case.optimizer != "Rprop"])  # whose first step alone reads lr
@pytest.mark.parametrize("lr", ["0.1", None, [0.1]], ids=repr)
def test_lr_that_is_no_number(case: Case, lr: object) -> None:
    run = begun(case)
    run.opt.param_groups[1]["lr"] = lr
    assert_refused(run, (TypeError, ValueError), "")


@few_cases
def test_missing_option_is_a_key_error(case: Case) -> None:
    run = begun(case)
    del run.opt.param_groups[1]["lr"]
    assert_refused(run, KeyError, "lr")


@few_cases
@pytest.mark.parametrize("shape", [(5, 33), (1,), (5,), (), (33, 6), (33, 5, 1), (0,)], ids=str)
@pytest.mark.parametrize("n_steps", [0, 2])
def test_grad_of_another_shape(case: Case, shape: tuple[int, ...], n_steps: int) -> None:
    run = begun(case, n_steps)
    param = run.opt.param_groups[1]["params"][0]
    param.grad.data = run.randn(shape)
    assert_refused(run, RuntimeError, "group 1.*shape")


@few_cases
def test_state_on_another_device(case: Case) -> None:
    # torch itself refuses to attach a grad of another device.
    run = begun(case)
    param = run.opt.param_groups[1]["params"][0]
    for key, value in run.opt.state.get(param, {}).items():
        if key == "step":
            continue
        before = snapshot(run.opt)
        run.opt.state[param][key] = torch.empty_like(value, device="meta")
        with pytest.raises(RuntimeError, match=f"group 1.*{key}.*device"):
            run.opt.step()
        run.opt.state[param][key] = value
        assert_untouched(run.opt, before)


@few_cases
@pytest.mark.parametrize("shape", [(5, 33), (1,), (), (33, 6), (66, 5), (0,)], ids=str)
def test_state_of_another_shape(case: Case, shape: tuple[int, ...]) -> None:
    run = begun(case)
    param = run.opt.param_groups[1]["params"][0]
    for key, value in run.opt.state.get(param, {}).items():
        if key == "step":
            continue
        if key in SCALARS and shape in ((), (1,)):
            continue
        run.opt.state[param][key] = run.randn(shape)
        assert_refused(run, RuntimeError, f"group 1.*{key}.*shape")
        run.opt.state[param][key] = value
    run.step()


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.bool], ids=str)
def test_state_of_another_dtype(case: Case, dtype: torch.dtype) -> None:
    """Refused where stock refuses it, without a trace; else as stock."""
    keys = [key for key in _state_keys(case) if key != "step"]
    for key in keys:

        def program(run: Run, key: str = key) -> None:
            run.step(2)
            state = run.opt.state[run.params[1]]
            state[key] = state[key].to(dtype)
            step_or_leave_untouched(run)

        run_both(case, program)


def _state_keys(case: Case) -> list[str]:
    run = Run(case, case.stock)
    run.step()
    return list(run.opt.state[run.params[1]])


@few_cases
def test_state_that_is_no_tensor(case: Case) -> None:
    for key in _state_keys(case):
        for value in ("text", 3.5, [1.0], torch.zeros(33, 5).numpy()):

            def program(run: Run, key: str = key, value: object = value) -> None:
                run.step(2)
                run.opt.state[run.params[1]][key] = value
                try:
                    step_or_leave_untouched(run)
                except (AttributeError, RuntimeError) as error:
                    # Which of the three stock raises depends on the first operation that meets it.
                    raise TypeError(str(error)) from error

            run_both(case, program)


def free_param(run: Run) -> None:
    run.opt.param_groups[1]["params"][0].data.untyped_storage().resize_(0)


def free_grad(run: Run) -> None:
    run.opt.param_groups[1]["params"][0].grad.untyped_storage().resize_(0)


def free_state(run: Run) -> None:
    param = run.opt.param_groups[1]["params"][0]
    for state, _, value in tensors_of(run, lambda key: True):
        if state is run.opt.state[param]:
            value.untyped_storage().resize_(0)


def step_without_traceback(run: Run) -> None:
    """Pytest prints the arguments in a traceback, and reading what was freed kills the process."""
    try:
        run.opt.step()
    except Exception as error:
        raise error.with_traceback(None) from None


@few_cases
@pytest.mark.parametrize("free", [free_param, free_grad, free_state])
@pytest.mark.parametrize("n_steps", [0, 2])
def test_freed_memory(case: Case, free: Callable[[Run], None], n_steps: int) -> None:
    run = begun(case, n_steps)
    before = snapshot(run.opt)
    param = run.opt.param_groups[1]["params"][0]
    if free is free_state and not run.opt.state.get(param):
        return
    free(run)
    with pytest.raises(RuntimeError, match="group 1.*freed"):  # noqa: RUF043
        step_without_traceback(run)
    # What was freed cannot be compared: leave it out of both snapshots.
    del run.opt.param_groups[1]
    n_kept = 3 * len(SHAPES)
    assert snapshot(run.opt) == before[:n_kept]


@few_cases
@pytest.mark.parametrize("thing", [None, 3, "weights", [torch.zeros(1)]], ids=repr)
def test_param_that_is_no_tensor(case: Case, thing: object) -> None:
    run = begun(case)
    before = snapshot(run.opt)
    run.opt.param_groups[1]["params"].append(thing)
    with pytest.raises((TypeError, AttributeError)):
        run.opt.step()
    run.opt.param_groups[1]["params"].pop()
    assert_untouched(run.opt, before)


@few_cases
@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")], ids=str)
def test_odd_step_counts_do_as_stock_does(case: Case, value: float) -> None:
    def program(run: Run) -> None:
        run.step(2)
        for _, _, step in tensors_of(run, lambda key: key == "step"):
            step.fill_(value)
        step_or_leave_untouched(run)

    run_both(case, program)


@few_cases
def test_integer_params_are_refused_or_stepped_as_stock(case: Case) -> None:
    def program(run: Run) -> None:
        param = torch.zeros(5, dtype=torch.int64, device=DEVICE)
        run.params = [*run.params, param]
        run.opt = run.make(run.params)
        for other in run.params[:-1]:
            other.grad = run.randn(other)
        param.grad = torch.ones_like(param)
        before = snapshot(run.opt)
        try:
            run.step_as_is()
        except RuntimeError:
            if run.is_ours:
                assert list(snapshot(run.opt)[::3]) == before[::3]
            raise

    # Grads of 1 leave whole numbers where stock can step at all.
    ours, stock = run_both(case, program)
    assert (ours.error is None) == (stock.error is None)


@few_cases
def test_inference_tensors(case: Case) -> None:
    """Stepped within inference mode; refused outside of it, where stock raises when it has written."""
    run = Run(case, case.fused)
    with torch.inference_mode():
        run.params[1] = torch.nn.Parameter(run.randn((33, 5)))
        run.opt = run.make(run.params)
        run.step(2)
        assert run.opt.last_step.tensors == {case.backend: len(run.params)}
    assert run.params[1].is_inference()
    run.opt.state.clear()
    for param in run.params:
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        case.stock(run.params).step()
    before = snapshot(run.opt)
    match = "param 1 of group 0: Inplace update to inference tensor"
    with pytest.raises(RuntimeError, match=match):
        run.opt.step()
    assert_untouched(run.opt, before)


@each_optimizer
def test_a_plain_dict_makes_no_entry(case: Case) -> None:
    """Stock's error, before stock steps what no kernel serves."""
    run = begun(case)
    params = [
        torch.nn.Parameter(run.randn((3,)).to(dtype)) for dtype in (torch.complex64, torch.float32)
    ]
    for param in params:
        param.grad = torch.ones_like(param)
    run.opt.add_param_group({"params": params})
    run.opt.state = {p: state for p, state in run.opt.state.items() if p is not params[1]}
    assert_refused(run, KeyError, "")


FUSED = [
    case
    for case in ONE_EACH
    if "fused" in inspect.signature(stock_class(case.optimizer)).parameters
]


@over(FUSED)
def test_fused_asks_for_more_than_the_meta_device(case: Case) -> None:
    def meta_param() -> torch.nn.Parameter:
        param = torch.nn.Parameter(torch.ones(3, device="meta"))
        param.grad = torch.ones_like(param)
        return param

    # Every class has the same text, but Adagrad before torch 2.13: it had no kernel for GPUs.
    with pytest.raises(RuntimeError) as stock:
        torch.optim.AdamW([meta_param()], fused=True).step()
    run = Run(case, case.fused, extra={"fused": True})
    run.step()
    run.set_grads()
    run.opt.add_param_group({"params": [meta_param()]})
    before = [param.detach().clone() for param in run.params]
    with pytest.raises(RuntimeError) as ours:
        run.opt.step()
    assert str(ours.value) == str(stock.value)
    assert all(map(torch.equal, run.params, before))
