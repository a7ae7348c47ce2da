"""set_num_threads(): the kernels' own number of threads."""

import pytest
import torch

import fused_optim
from fused_optim import backends
from support.cases import BACKEND
from support.processes import fresh_python

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="needs CPU kernels")


@pytest.fixture(autouse=True)
def _restored():
    yield
    fused_optim.set_num_threads(None)


def test_it_takes_the_place_of_torchs_and_leaves_that_alone() -> None:
    torchs = torch.get_num_threads()
    assert backends.num_threads() == torchs
    fused_optim.set_num_threads(torchs + 3)
    assert fused_optim.config()["threads"] == torchs + 3 and torch.get_num_threads() == torchs
    fused_optim.set_num_threads(None)
    assert fused_optim.config()["threads"] == torchs


@pytest.mark.parametrize("bad", [0, -1, 1.0, "2", True], ids=repr)
def test_bad_numbers(bad: object) -> None:
    with pytest.raises(ValueError, match="Invalid num_threads"):
        fused_optim.set_num_threads(bad)  # type: ignore[arg-type]
    assert backends.num_threads() == torch.get_num_threads()


def test_a_process_with_one_thread_of_torchs_steps_with_more() -> None:
    """Threads of OpenMP stay, so that they can be counted."""
    done = fresh_python(
        """
import os
import torch, fused_optim
from fused_optim.functional import lion

def n_threads():
    return len(os.listdir("/proc/self/task"))

def step(**more):
    tensors = [[torch.zeros(1_000_000)] for _ in range(3)]
    lion(*tensors, beta1=0.9, beta2=0.9, lr=0.1, weight_decay=0.0, maximize=False, **more)

step()
before = n_threads()
assert torch.get_num_threads() == 1
fused_optim.set_num_threads(3)
step()
assert n_threads() == before + 2, n_threads()
step(num_threads=5)
print(n_threads() - before, torch.get_num_threads())
""",
        OMP_NUM_THREADS="1",
    )
    assert done.stdout.split() == ["4", "1"], done.stderr
