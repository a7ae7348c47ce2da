"""Threads, forked children and Ctrl-C."""

import multiprocessing
import os
import threading

import pytest
import torch

from support.cases import CASES, FEW_CASES, ONE_EACH, Case, fullest
from support.marks import few_cases, needs_cpu_kernels, over
from support.processes import fresh_python, python
from support.twins import Run, assert_same_run

pytestmark = needs_cpu_kernels
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# Enough for the kernels to use several threads. Each stays under the 32,768 elements from which torch's own
# operations do so: those hang in a forked child.
LARGE = ((150, 200), (30_011,), (32_000,))


def stepped(case: Case, n_steps: int, build: str = "fused", shapes: tuple = LARGE) -> Run:
    # In float64 the tolerance stays far below a step's size with that many elements.
    run = Run(case, getattr(case, build), shapes, torch.float64)
    run.step(n_steps)
    return run


@few_cases
def test_two_optimizers_in_two_threads(case: Case) -> None:
    expected = stepped(case, 10, "stock")
    runs: list[Run | None] = [None, None]

    def work(i: int) -> None:
        runs[i] = stepped(case, 10)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in runs:
        assert run is not None
        assert_same_run(run, expected)


@few_cases
def test_many_small_optimizers_in_many_threads(case: Case) -> None:
    expected = stepped(case, 30, "stock", ((5, 3), ()))
    runs: dict[int, Run] = {}
    threads = [
        threading.Thread(
            target=lambda i=i: runs.__setitem__(i, stepped(case, 30, shapes=((5, 3), ())))
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == len(threads)
    for run in runs.values():
        assert_same_run(run, expected)


@few_cases
def test_one_optimizer_in_two_threads_does_not_crash(case: Case) -> None:
    # The values are a race, as in stock; that every step writes whole, live memory is not.
    run = Run(case, case.fused, LARGE)
    run.set_grads()
    errors = []

    def work() -> None:
        try:
            for _ in range(30):
                run.opt.step()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(param.isfinite().all() for param in run.params)
    run.step()
    assert run.opt.last_step.tensors == {case.backend: len(LARGE)}


# Zeros, buffers that the first step fills, first values, copies of the param.
@pytest.mark.parametrize("name", ["Adam", "SGD", "Rprop", "AdamWScheduleFree"])
def test_first_step_in_two_threads_shows_no_unwritten_state(name: str) -> None:
    """A state that one thread has made but not yet filled is there for the other to read."""
    case = fullest(name)
    for _ in range(60):
        run = Run(case, case.fused, ((30_000,),) * 12)
        run.set_grads()
        # What is freed here is what a state that nobody fills would hold.
        junk = [torch.full((30_000,), float("nan")) for _ in range(36)]
        del junk
        barrier = threading.Barrier(2)

        def work(opt: torch.optim.Optimizer = run.opt, wait: threading.Barrier = barrier) -> None:
            wait.wait()
            opt.step()

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(param.isfinite().all() for param in run.params)


@few_cases
def test_surgery_in_another_thread_during_steps(case: Case) -> None:
    """Tensors dropped while a step runs stay alive until it ends."""
    run = Run(case, case.fused, LARGE)
    run.set_grads()
    run.opt.step()
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for param in run.params:
                for key, value in list(run.opt.state.get(param, {}).items()):
                    if key != "step":
                        run.opt.state[param][key] = value.clone()
                param.grad = param.grad.clone()

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(30):
            run.opt.step()
    finally:
        stop.set()
        thread.join()
    assert all(param.isfinite().all() for param in run.params)


# Each program runs in a process of its own, which is ended if it hangs. What it waits for itself it gives up
# before that: its children would outlive it.
FORK = """
import os, sys, torch
from support.cases import ONE_EACH
from support.twins import Run, assert_same_run
from step.test_threads import LARGE, stepped
for case in ONE_EACH:
    expected = stepped(case, 6, "stock")
    run = stepped(case, 3)
    child = os.fork()
    if child == 0:
        run.step(3)
        fresh = stepped(case, 6)
        # Torch's own reductions would hang here.
        torch.set_num_threads(1)
        assert_same_run(run, expected)
        assert_same_run(fresh, expected)
        os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7, (case, status)
    run.step(3)
    assert_same_run(run, expected)
    print(case.optimizer)
"""


@needs_fork
def test_forked_child_and_its_parent_go_on_stepping() -> None:
    done = python(FORK)
    assert done.stdout.split() == [case.optimizer for case in ONE_EACH], done.stderr


@needs_fork
def test_fork_of_a_forked_child() -> None:
    program = """
import os
from support.cases import ONE_EACH
from step.test_threads import stepped
case = ONE_EACH[0]
stepped(case, 1)
for _ in range(2):
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status))
    stepped(case, 1)
os._exit(7)
"""
    assert python(program).returncode == 7


def _step_in_child(case_id: str, queue: multiprocessing.Queue) -> None:
    case = next(case for case in CASES if case.id == case_id)
    run = stepped(case, 3)
    queue.put([param.detach().numpy() for param in run.params])


MULTIPROCESSING = """
import multiprocessing, torch
from support.processes import HANG_S
from step.test_threads import _step_in_child, stepped
from support.cases import ONE_EACH
from support.twins import assert_close
if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    case = ONE_EACH[0]
    expected = stepped(case, 3, "stock")
    stepped(case, 1)
    queue = context.Queue()
    workers = [context.Process(target=_step_in_child, args=(case.id, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in workers:
        for ours, stock in zip(queue.get(timeout=HANG_S / 2), expected.params):
            assert_close(torch.from_numpy(ours), stock, 3)
    for worker in workers:
        worker.join()
    print([worker.exitcode for worker in workers])
"""


@needs_fork
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_children(method: str, tmp_path) -> None:
    # spawn imports the main module again, so it has to be a file.
    main = tmp_path / "main_module.py"
    main.write_text(MULTIPROCESSING.format(method=method))
    done = python(f"import runpy; runpy.run_path({str(main)!r}, run_name='__main__')")
    assert done.stdout.strip() == "[0, 0]", done.stderr


DATA_LOADER = """
import torch
from support.processes import HANG_S
from step.test_threads import stepped
from support.cases import ONE_EACH
from support.twins import assert_close

class Stepping(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return [param.detach() for param in stepped(ONE_EACH[i % len(ONE_EACH)], 2).params]

expected = [stepped(ONE_EACH[i % len(ONE_EACH)], 2, "stock") for i in range(4)]
stepped(ONE_EACH[0], 2)
loader = torch.utils.data.DataLoader(Stepping(), batch_size=None, num_workers=2, timeout=HANG_S / 2)
for run, params in zip(expected, loader):
    for ours, stock in zip(params, run.params):
        assert_close(ours, stock, 2)
    stepped(ONE_EACH[0], 1)
print("loaded")
"""


@needs_fork
def test_data_loader_workers_step() -> None:
    done = fresh_python(DATA_LOADER)
    assert done.stdout.split() == ["loaded"], done.stderr


CTRL_C = """
import signal, sys, torch
from fused_optim import backends
from support.cases import FEW_CASES
from support.twins import Run, assert_same_run
case = next(case for case in FEW_CASES if case.id == {case_id!r})
SHAPES = ((300, 300), (70_001,), *((64, 3),) * 100)
backends.cpu_kernels()  # an interrupted import of them is not what this is about

def interrupt(number, frame):
    global interrupted
    interrupted = True
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
for attempt in range(8):
    run = Run(case, case.fused, SHAPES, torch.float64)
    run.set_grads()
    interrupted = False
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.003 + 0.0017 * attempt)
        while not interrupted:
            run.opt.step()
    except KeyboardInterrupt:
        pass
    counts = {{float(run.opt.state[param]["step"]) for param in run.params if run.opt.state[param]}}
    assert len(counts) <= 1, counts
    n_steps = int(counts.pop()) if counts else 0
    expected = Run(case, case.stock, SHAPES, torch.float64)
    expected.set_grads()
    for _ in range(n_steps):
        expected.opt.step()
    run.n_steps = expected.n_steps = n_steps
    if n_steps:
        assert_same_run(run, expected)
    # And it goes on from there.
    run.step()
    expected.step()
    assert_same_run(run, expected)
print("whole")
"""


def counts_steps(case: Case) -> bool:
    run = Run(case, case.stock)
    run.step()
    return "step" in run.opt.state.get(run.params[0], {})


# The fullest case of an optimizer may be centered, and one grad repeated for ever has no variance.
@over([case for case in FEW_CASES if counts_steps(case) and not case.options])
def test_ctrl_c_leaves_whole_steps(case: Case) -> None:
    done = python(CTRL_C.format(case_id=case.id))
    assert done.stdout.split() == ["whole"], done.stderr


@few_cases
def test_thread_count_changed_between_steps(case: Case) -> None:
    expected = stepped(case, 6, "stock")
    before = torch.get_num_threads()
    try:
        run = Run(case, case.fused, LARGE, torch.float64)
        for n_threads in (1, 2, 4, 1, 3, before):
            torch.set_num_threads(n_threads)
            run.step()
    finally:
        torch.set_num_threads(before)
    assert_same_run(run, expected)
