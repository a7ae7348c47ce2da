"""Parameters, grads and state that share memory: as many writers as stock has, in stock's order."""

import itertools

import pytest
import torch

import fused_optim
from support.cases import Case
from support.marks import few_cases, needs_cpu_kernels
from support.twins import Run, run_both

# Three such tensors are enough for the kernels to share a step between threads; one is not enough for
# stock to do so, whose threads would only slow the tests down.
NUMEL = 32_000

# With that many elements only float64 leaves a tolerance far below a step's size.
DTYPE = torch.float64


@few_cases
@pytest.mark.parametrize("grouped", [False, True])
def test_params_that_are_the_same_memory(case: Case, grouped: bool) -> None:
    def program(run: Run) -> None:
        first, second = run.params[:2]
        second.data = first.data
        run.opt = run.make([{"params": [first]}, {"params": [second]}] if grouped else run.params)
        run.step(3)

    run_both(case, program, shapes=((NUMEL,), (NUMEL,), (NUMEL,)), dtype=DTYPE)


@few_cases
def test_params_that_become_the_same_memory(case: Case) -> None:
    def program(run: Run) -> None:
        run.step(2)
        run.params[1].data = run.params[0].data
        run.step(2)
        run.params[1].data = run.params[0].data.clone()
        run.step(2)

    run_both(case, program, shapes=((NUMEL,), (NUMEL,), (NUMEL,)), dtype=DTYPE)


@few_cases
def test_params_that_overlap_in_one_buffer(case: Case) -> None:
    def program(run: Run) -> None:
        flat = run.randn((3 * NUMEL,), DTYPE)
        views = [flat[: NUMEL + 40], flat[NUMEL : 2 * NUMEL], flat[10:30], flat[2 * NUMEL - 1 :]]
        run.params = [torch.nn.Parameter(view) for view in views]
        assert run.params[0].data_ptr() == flat.data_ptr()
        run.opt = run.make(run.params)
        run.step(3)

    run_both(case, program, dtype=DTYPE)


@few_cases
def test_disjoint_views_of_one_buffer_stay_on_the_kernels(case: Case) -> None:
    def program(run: Run) -> None:
        flat = run.randn((3 * NUMEL,), DTYPE)
        flat_grad = torch.zeros_like(flat)
        cuts = (0, 1, 18, NUMEL, 2 * NUMEL - 7, 3 * NUMEL)
        run.params = [torch.nn.Parameter(flat[a:b]) for a, b in itertools.pairwise(cuts)]
        run.opt = run.make(run.params)
        for _ in range(3):
            flat_grad.copy_(run.randn((3 * NUMEL,), DTYPE))
            for param, a, b in zip(run.params, cuts, cuts[1:]):
                param.grad = flat_grad[a:b]
            run.step_as_is()

    run_both(case, program, dtype=DTYPE, tensors={case.backend: 5})


@few_cases
def test_interleaved_views_of_one_buffer(case: Case) -> None:
    def program(run: Run) -> None:
        matrix = run.randn((300, 250), DTYPE)
        run.params = [torch.nn.Parameter(matrix[:, :100]), torch.nn.Parameter(matrix[:, 100:])]
        run.opt = run.make(run.params)
        run.step(3)

    run_both(case, program, dtype=DTYPE)


@few_cases
def test_one_grad_for_two_params(case: Case) -> None:
    def program(run: Run) -> None:
        run.set_grads()
        run.params[1].grad = run.params[0].grad
        for _ in range(3):
            run.step_as_is()

    run_both(case, program, shapes=((33, 5), (33, 5)), tensors={case.backend: 2})


@few_cases
def test_grad_that_is_the_param(case: Case) -> None:
    def program(run: Run) -> None:
        run.set_grads()
        run.params[0].grad = run.params[0].data
        run.step_as_is()

    run_both(case, program, shapes=((33, 5), (7,)))


@few_cases
def test_grad_that_is_another_param(case: Case) -> None:
    # Stock steps the first before it reads it as the second's grad.
    def program(run: Run) -> None:
        run.set_grads()
        run.params[1].grad = run.params[0].data
        run.step_as_is()

    run_both(case, program, shapes=((NUMEL,), (NUMEL,), (NUMEL,)), dtype=DTYPE)


@few_cases
def test_grad_that_is_a_shifted_view_of_the_param(case: Case) -> None:
    def program(run: Run) -> None:
        flat = run.randn((NUMEL + 1,), DTYPE)
        run.params = [torch.nn.Parameter(flat[:-1])]
        run.opt = run.make(run.params)
        run.params[0].grad = flat[1:]
        run.step_as_is()

    run_both(case, program, dtype=DTYPE)


@few_cases
def test_state_that_two_params_share(case: Case) -> None:
    def program(run: Run) -> None:
        run.step()
        first, second = run.params[:2]
        if first in run.opt.state:
            run.opt.state[second] = run.opt.state[first]
        run.step(2)

    run_both(case, program, shapes=((NUMEL,), (NUMEL,), (NUMEL,)), dtype=DTYPE)


@few_cases
def test_step_tensor_that_two_params_share(case: Case) -> None:
    def program(run: Run) -> None:
        run.step()
        states = [run.opt.state.get(param, {}) for param in run.params]
        if "step" in states[0]:
            states[1]["step"] = states[0]["step"]
        run.step(2)

    run_both(case, program, shapes=((33, 5), (33, 5)))


@few_cases
def test_state_that_is_the_grad(case: Case) -> None:
    def program(run: Run) -> None:
        run.step()
        run.set_grads()
        for param in run.params:
            for key, value in run.opt.state.get(param, {}).items():
                if key != "step" and torch.is_tensor(value):
                    run.opt.state[param][key] = param.grad
                    break
        run.step_as_is()

    run_both(case, program, shapes=((33, 5), (7,)))


@few_cases
def test_tensors_in_shared_memory(case: Case) -> None:
    def program(run: Run) -> None:
        for param in run.params:
            param.share_memory_()
        run.step(3)

    run_both(case, program, shapes=((33, 5), (7,)), tensors={case.backend: 2})


@needs_cpu_kernels
def test_memory_of_a_state_that_is_no_more_may_be_a_grad_s() -> None:
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    opt = fused_optim.SGD(params, lr=0.1, momentum=0.9)
    for param in params:
        param.grad = torch.ones(4)
    opt.step()
    opt.step()
    memory = opt.state[params[0]]["momentum_buffer"]
    opt.param_groups[0]["momentum"] = 0
    opt.state.clear()
    opt.step()
    params[1].grad = memory
    opt.step()
    assert opt.last_step is not None and "stock" not in opt.last_step.tensors
