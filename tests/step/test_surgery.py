"""Surgery between two steps, done to ours and to stock's.

The memory of what a surgery replaced is freed and filled with other tensors, so that a step through a
pointer that outlived its tensor shows: in those, or under the address sanitizer.
"""

import gc
import weakref

import pytest
import torch

from support.cases import DEVICE, Case
from support.marks import few_cases, not_interpreted
from support.surgeries import SURGERIES, Surgery, tensors_of
from support.twins import SHAPES, Run, run_both, step_or_leave_untouched

JUNK = 7.0

every_surgery = pytest.mark.parametrize(
    "surgery",
    [
        pytest.param(
            surgery, id=surgery.id, marks=not_interpreted if "capturable" in surgery.id else ()
        )
        for surgery in SURGERIES
    ],
)


def junk_in_freed_memory() -> list[torch.Tensor]:
    # Tensors die with their last reference, so no collection is needed first.
    return [torch.full(shape, JUNK, device=DEVICE) for shape in SHAPES for _ in range(8)]


def operated(surgeries: list[Surgery], n_steps_before: int = 2):
    def program(run: Run) -> None:
        run.step(n_steps_before)
        junk = []
        for surgery in surgeries:
            surgery.operate(run)
            junk += junk_in_freed_memory()
            for _ in range(2):
                step_or_leave_untouched(run)
        assert all(bool((tensor == JUNK).all()) for tensor in junk), "wrote into freed memory"

    return program


def assert_served(run: Run, backend: str) -> None:
    n_tensors = sum(
        param.grad is not None for group in run.opt.param_groups for param in group["params"]
    )
    assert run.opt.last_step.tensors == {backend: n_tensors}


@every_surgery
@few_cases
def test_surgery_twice(case: Case, surgery: Surgery) -> None:
    ours, _ = run_both(case, operated([surgery, surgery]))
    if surgery.served and ours.error is None:
        assert_served(ours, surgery.served)


@every_surgery
@few_cases
def test_surgery_before_the_first_step(case: Case, surgery: Surgery) -> None:
    ours, _ = run_both(case, operated([surgery], n_steps_before=0))
    if surgery.served and ours.error is None:
        assert_served(ours, surgery.served)


@few_cases
def test_an_optimizer_that_dies_frees_its_tensors(case: Case) -> None:
    run = Run(case, case.fused, SHAPES)
    run.step(2)
    watched = [weakref.ref(run.opt), *(weakref.ref(param) for param in run.params)]
    watched += [weakref.ref(value) for _, _, value in tensors_of(run)]
    del run
    gc.collect()
    assert all(reference() is None for reference in watched)


@few_cases
def test_what_the_user_removed_is_free_after_the_next_step(case: Case) -> None:
    run = Run(case, case.fused, SHAPES)
    run.step(2)
    param = run.params.pop(1)
    watched = [weakref.ref(param), weakref.ref(param.grad)]
    watched += [weakref.ref(value) for value in run.opt.state.get(param, {}).values()]
    run.opt.state.pop(param, None)
    del run.opt.param_groups[0]["params"][1], param
    run.step()
    gc.collect()
    assert all(reference() is None for reference in watched)
